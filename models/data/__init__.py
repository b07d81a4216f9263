"""What every data set goes through: manifests, prompts and audio. `manifest.py` documents the file format."""
