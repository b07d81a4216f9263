"""Manifests, prompts, audio, and the corpora they describe. `manifest.py` documents the one file format."""
