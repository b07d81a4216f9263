"""Questions about two clips, asked by the command line in both modes and with the contrast of both paths."""

from __future__ import annotations

import json

import pytest

from models.cli import main as models
from models.data.audio import write_audio
from models.evaluation.predictions import read_predictions
from tests.models.audio_lms import tiny_audio_lms as tiny

ROW = {"instruction": "Are the two tones one? The answer could be yes or no.", "label": "yes", "audio2": "b.wav"}


@pytest.mark.slow
def test_evaluate_asks_about_two_clips(tmp_path):
    task = tmp_path / "bench" / "SpeakerVerification_VCTK"
    for name, hertz in (("a.wav", 300.0), ("b.wav", 1200.0), ("c.wav", 500.0)):
        write_audio(task / name, tiny.tone(hertz, seconds=0.5))
    (task / "metadata.json").write_text(json.dumps({"a.wav": ROW, "c.wav": {**ROW, "label": "no"}}))
    model = tiny.FAMILIES["qwen2_audio"](tmp_path / "model")
    words = ["evaluate", str(model), "--benchmark", "dynamic-superb", "--audio-root", str(tmp_path / "bench"), "--device", "cpu"]
    words += ["--decoding", "contrastive", "--formula", "authors", "--max-new-tokens", "3", "--controls", "no_audio"]
    for mode, more in (("choice", []), ("generate", ["--top-k", "5"])):
        out = tmp_path / f"{mode}.jsonl"
        assert models([*words, "--mode", mode, "--out", str(out), *more]) == 0
        settings, made = read_predictions(out)
        assert len(made) == 4 and settings["settings"]["formula"] == "authors"
        assert all("a.wav" in p.clip or "c.wav" in p.clip for p in made if not p.control)
        assert settings["settings"].get("top_k") == (5 if more else None)
