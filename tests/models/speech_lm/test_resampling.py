"""Resampling by torchaudio, a batch at a time: soxr's samples below the filters' transition, and the same features."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import tiny_speech
import torch

from models.data.audio import resample, write_audio
from models.data.example import Example
from models.speech_lm.features import clip_features
from models.speech_lm.log_mel import LogMelError
from models.speech_lm.resampling import check_resampler, resample_batch
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe

EDGE = 800  # samples at 16 kHz: the filters ring at a clip's ends


def tones(rate: int, seconds: float, seed: int) -> np.ndarray:
    """Twenty tones up to 90% of the lower rate's half."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(rate * seconds) + 7) / rate
    pitches = rng.uniform(50, 0.9 * min(rate, 16_000) / 2, 20)
    return np.mean([np.sin(2 * np.pi * pitch * time + rng.uniform(0, 6)) for pitch in pitches], 0).astype(np.float32)


def test_it_is_soxr_s_below_the_transition():
    pytest.importorskip("torchaudio", exc_type=Exception)
    rates = [48_000, 8_000, 22_050, 16_000, 44_100, 48_000, 32_000, 24_000]
    waves = [tones(rate, 0.5 + 0.1 * n, n) for n, rate in enumerate(rates)]
    made = resample_batch(waves, rates, to_hz=16_000, device="cpu")
    for wave, rate, heard in zip(waves, rates, made, strict=True):
        expected = resample(wave, rate, 16_000)
        assert heard.shape == expected.shape and heard.dtype == np.float32, rate
        assert np.abs(heard - expected)[EDGE:-EDGE].max() < 5e-4, rate
    assert np.array_equal(made[3], waves[3])
    alone = resample_batch(waves[:1], rates[:1], to_hz=16_000, device="cpu")
    np.testing.assert_allclose(alone[0], made[0], atol=1e-6)  # the longer clip beside it changes nothing


def test_features_of_clips_at_other_rates(tmp_path):
    pytest.importorskip("torchaudio", exc_type=Exception)
    rates = (16_000, 8_000, 44_100)
    for n, rate in enumerate(rates):
        write_audio(tmp_path / f"{n}.wav", 0.5 * tones(rate, 1.0, n), sample_rate=rate)
    examples = [Example(id=str(n), audio=f"{n}.wav", question="?", target="x") for n in range(len(rates))]
    made = {}
    for name in ("soxr", "torchaudio"):
        model = tiny_speech.make_speech_lm()
        model.use_resampler(name)
        store, kept = clip_features(model, examples, audio_root=tmp_path, progress_bar=False)
        assert len(kept) == 3
        made[name] = store.rows(examples).float()
    assert not torch.equal(made["soxr"], made["torchaudio"])
    torch.testing.assert_close(made["torchaudio"], made["soxr"], rtol=0.02, atol=0.02)


def test_what_cannot_run_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(LogMelError, match=r"features.resampler: torchaudio cannot be imported .* pip install 'torchaudio=="):
        check_resampler("torchaudio")
    with pytest.raises(ValueError, match="resampler: expected one of soxr, torchaudio, got 'librosa'"):
        check_resampler("librosa")
    with pytest.raises(ConfigError, match=r"features.resampler: expected one of"):
        load_recipe("ce_only", ["features.resampler=sox"])
