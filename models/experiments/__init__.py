"""Experiments from corpus to table: the demo, the six systems of the CAAD paper, the ablation of sources and layers,
the study of several teachers."""
