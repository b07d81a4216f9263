"""Synthesis: attributes do what they say, equal requests give equal bytes, threads take turns, errors are clear."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from models.corpora.sources import espeak
from models.corpora.sources.espeak import EspeakError, Utterance, list_variants, synthesise, synthesise_all

pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")


def test_rate_shortens_and_pitch_raises():
    text = "The sailor carried the mirror near the river."
    slow, fast, high = (
        synthesise(Utterance(text=text, **options)) for options in ({"rate_wpm": 100}, {"rate_wpm": 300}, {"pitch": 90})
    )
    assert slow[0].dtype == np.float32 and np.abs(slow[0]).max() <= 1.0 and slow[1] == 22050
    assert len(slow[0]) > 2 * len(fast[0])
    low = synthesise(Utterance(text=text, pitch=10))
    assert _median_pitch_hz(*high) > 1.5 * _median_pitch_hz(*low)


def _median_pitch_hz(samples: np.ndarray, rate_hz: int) -> float:
    found = []
    for start in range(0, len(samples) - 2048, 1024):
        frame = samples[start : start + 2048] - samples[start : start + 2048].mean()
        if (frame**2).mean() < 1e-3:
            continue
        correlation = np.correlate(frame, frame, "full")[2047:]
        first, last = rate_hz // 400, rate_hz // 60
        found.append(rate_hz / (first + int(np.argmax(correlation[first:last]))))
    return float(np.median(found))


def test_equal_requests_in_fresh_processes_give_equal_samples():
    utterances = [Utterance(text="Good luck.", voice="en-us+f2"), Utterance(text="Goodbye.", voice="en-gb-scotland+m3")]
    first = synthesise_all(utterances)
    time.sleep(1.1)  # the library seeds itself with the time in seconds
    second = synthesise_all(utterances)
    for (a, rate_a), (b, rate_b) in zip(first, second, strict=True):
        assert rate_a == rate_b
        np.testing.assert_array_equal(a, b)
    assert synthesise_all([]) == []


def test_threads_take_turns():
    utterances = [Utterance(text="Number " + "one " * n, voice=f"en-us+m{1 + n % 3}") for n in range(1, 17)]
    alone = [len(synthesise(utterance)[0]) for utterance in utterances]
    with ThreadPoolExecutor(4) as pool:
        together = [len(samples) for samples, _ in pool.map(synthesise, utterances)]
    # Jitter moves an end by a few milliseconds; samples of another thread would make it longer by much more.
    np.testing.assert_allclose(together, alone, atol=22050 * 0.02)


def test_variants_have_both_genders():
    variants = list_variants()
    assert {"f2": "woman", "m3": "man"}.items() <= {v.name: v.gender for v in variants}.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": " "}, "text: expected 1 to 2000 characters"),
        ({"text": "x" * 2001}, "text: expected 1 to 2000 characters, got 2001"),
        ({"rate_wpm": 40}, "rate_wpm: expected 80 to 450, got 40"),
        ({"pitch": 101}, "pitch: expected 0 to 100, got 101"),
        ({"volume": -1}, "volume: expected 0 to 100, got -1"),
    ],
)
def test_values_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        Utterance(**{"text": "Hello.", **options})


def test_an_unknown_voice_is_an_error_here_and_in_the_process_of_its_own():
    unknown = Utterance(text="Hello.", voice="xx-none")
    with pytest.raises(EspeakError, match="no voice 'xx-none'"):
        synthesise(unknown)
    with pytest.raises(EspeakError, match="no voice 'xx-none'"):
        synthesise_all([unknown])


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(espeak._Library, "_instance", None)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(EspeakError, match=r"espeak-ng is missing: .*pip install espeakng-loader"):
        synthesise(Utterance(text="Hello."))
