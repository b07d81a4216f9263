"""Which clips a corpus is made of. A plan lists recordings with their labels; nothing is decoded or spoken yet.

    base        what all plans share: settings and sizes, recordings, splits of characters and voices
    hinted      the sizes tiny, demo, sources and full: a clip's context is a true or false hint
    benchmark   the sizes benchmark and benchmark_tiny, which consist of
    lines         tasks about recorded English lines
    synthetic     tasks that need exactly known attributes: espeak
    languages     the language task
    lengths       clips of equal length
    recorded      the size external, and the tasks language and cry of study_tasks
"""
