"""`models ask` with a SpeechLM; audio LMs of transformers are asked in tests/models/audio_lms."""

from __future__ import annotations

import numpy as np
from tiny_speech import make_speech_lm

from models.data.audio import write_audio
from models.evaluation.ask_one import answer, main


def test_a_speech_lm_answers_about_a_clip(tmp_path, capsys):
    wave = np.random.default_rng(0).normal(0, 0.1, 8_000).astype(np.float32)
    clip = str(write_audio(tmp_path / "clip.wav", wave))
    model = make_speech_lm()
    model.save_pretrained(tmp_path / "model", include_frozen=True)
    words = [str(tmp_path / "model"), clip, "Is the speaker a man or a woman?", "--device", "cpu", "--max-new-tokens", "4"]
    for alpha in ([], ["--alpha", "1"]):
        assert main([*words, *alpha]) == 0
        expected = answer(model, [clip], words[2], alpha=float(alpha[1]) if alpha else None, max_new_tokens=4)
        assert capsys.readouterr().out == expected + "\n"
    for wrong, message in {
        (*words[:2], *words[1:]): "clips: expected one for a SpeechLM, got 2",
        (str(tmp_path / "none"), *words[1:]): "no such folder",
        (*words, "--alpha", "-1"): "--alpha: expected a finite number >= 0, got -1.0",
        (*words[:-1], "0"): "--max-new-tokens: expected at least 1, got 0",
    }.items():
        assert main(wrong) == 1 and message in capsys.readouterr().err


def test_a_clip_that_is_longer_than_the_models_window_is_mentioned(tmp_path, capsys):
    make_speech_lm().save_pretrained(tmp_path / "model", include_frozen=True)  # it hears 1 s
    said = {}
    for seconds in (1, 3):
        clip = str(write_audio(tmp_path / f"{seconds}.wav", np.zeros(16_000 * seconds, np.float32)))
        assert main([str(tmp_path / "model"), clip, "Who?", "--device", "cpu", "--max-new-tokens", "2"]) == 0
        said[seconds] = capsys.readouterr()
    assert "clips are longer than" not in said[1].err and said[1].out == said[3].out
    assert "1 of 1 clips are longer than the 1 s that the model hears, up to 3.0 s" in said[3].err


def test_a_model_of_nan_has_no_answer(tmp_path, capsys):
    clip = str(write_audio(tmp_path / "clip.wav", np.zeros(8_000, np.float32)))
    model = make_speech_lm()
    model.connector.output_scale.data.fill_(np.nan)
    model.save_pretrained(tmp_path / "model", include_frozen=True)
    assert main([str(tmp_path / "model"), clip, "Who?", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert told.out == "" and "error: example 'question': the model's logits are NaN" in told.err
