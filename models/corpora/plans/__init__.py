"""Which clips a corpus is made of: a plan lists recordings with their labels, and nothing is decoded or spoken yet.

    base        what all plans share: settings and sizes, recordings, splits of the voices
    hinted      the sizes tiny, demo, sources and full: a clip's context is a hint, true or false
    benchmark   the sizes benchmark and benchmark_tiny, put together from
    lines         tasks about recorded English lines
    synthetic     tasks that need exactly known attributes: espeak
    languages     the language task
"""
