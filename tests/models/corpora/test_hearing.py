"""What a model hears: levels, bands, codecs and prompts to their definitions, the same for a seed and a clip."""

import dataclasses

import numpy as np
import pytest

from models.corpora.hearing import CODECS, PLAIN, Hearing, parse_hearing, read_hears, write_hears
from models.data.example import Example

RATE = 16_000


@pytest.fixture(scope="module")
def clip():
    times = np.arange(RATE) / RATE
    tones = sum(np.sin(2 * np.pi * hertz * times) for hertz in (200, 1000, 3000, 6000))
    return (0.05 * tones).astype(np.float32)


def db(one, other):
    return 10 * np.log10(np.mean(one.astype(np.float64) ** 2) / np.mean(other.astype(np.float64) ** 2))


def at(samples, hertz):
    """Amplitude of a tone in a clip of one second."""
    return 2 * abs(np.fft.rfft(samples)[hertz]) / len(samples)


def test_noise_has_its_level_and_depends_on_seed_and_clip_alone(clip):
    heard = Hearing(snr_db=(5.0,), seed=1).sound(clip, "a.wav@0.0-None")
    assert db(clip, heard - clip) == pytest.approx(5.0, abs=1e-3)
    assert np.array_equal(heard, Hearing(snr_db=(5.0,), seed=1).sound(clip, "a.wav@0.0-None"))
    for other in (Hearing(snr_db=(5.0,), seed=2).sound(clip, "a.wav@0.0-None"), Hearing(snr_db=(5.0,), seed=1).sound(clip, "b")):
        assert not np.array_equal(heard, other)
    levels = [db(clip, Hearing(snr_db=(0.0, 20.0)).sound(clip, name) - clip) for name in "abcdefgh"]
    assert 0 <= min(levels) < 8 and 12 < max(levels) <= 20.001  # a level of its own for each clip
    assert PLAIN.sound(clip, "a") is clip


def test_a_band_ends_where_it_says(clip):
    for band, kept in {"common": (200, 1000, 3000), "wide": (200, 1000, 3000), "narrow": (1000, 3000)}.items():
        heard = Hearing(band=band).sound(clip, "a")
        assert len(heard) == len(clip)
        for hertz in (200, 1000, 3000, 6000):
            assert (at(heard, hertz) > 0.04) == (hertz in kept), (band, hertz)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_a_codec_keeps_length_and_place_and_loses_something(codec, clip):
    for rate in (RATE, 24_000):
        heard = Hearing(codec=codec).sound(clip, "a", sample_rate=rate)
        assert heard.shape == clip.shape and heard.dtype == np.float32
    low = (0.3 * np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE)).astype(np.float32)
    heard = Hearing(codec=codec).sound(low, "a")
    assert 1e-4 < np.abs(heard - low)[2000:-2000].mean() < 0.05
    assert np.array_equal(heard, Hearing(codec=codec).sound(low, "a"))


def test_the_prompt_shows_what_it_should():
    example = Example(
        id="e", audio=None, transcription="Good luck.", context="Note: a man.", question="Who?", metadata={"accent": "Scottish"},
        target="A man.",
    )  # fmt: skip
    assert PLAIN.shown(example) is example
    told = dataclasses.replace(example, metadata={**example.metadata, "said_before": "Note: it is a child."})
    assert Hearing(context_from="said_before").shown(told).context == "Note: it is a child."
    with pytest.raises(ValueError, match="context_from needs its metadata 'said_before'"):
        Hearing(context_from="said_before").shown(example)
    with pytest.raises(ValueError, match="context_from: expected '' with context false"):
        Hearing(context=False, context_from="said_before")
    shown = Hearing(transcript=False, context=False, question="{question} The accent is {accent}.").shown(example)
    assert (shown.transcription, shown.context, shown.question) == ("", "", "Who? The accent is Scottish.")
    assert (shown.id, shown.target) == (example.id, example.target)
    with pytest.raises(ValueError, match=r"example 'e': the question '\{mood\}' needs its metadata 'mood'"):
        Hearing(question="{mood}").shown(example)


def test_settings_are_written_read_and_parsed(tmp_path):
    made = Hearing(snr_db=(0.0, 10.0), band="narrow", transcript=False)
    assert parse_hearing(["snr_db=0,10", "band=narrow", "transcript=false"]) == made
    write_hears(tmp_path, made)
    assert read_hears(tmp_path) == made and read_hears(tmp_path / "none") == parse_hearing(["clean"]) == PLAIN
    assert Hearing(seed=3).settings() == {} and PLAIN.settings() == {}  # nothing is drawn
    for words, message in {
        "snr_db=10,0": "snr_db: expected none, one, or a lowest and a highest",
        "band=low": "band: expected one of full, common",
        "codec=aac": "codec: expected one of none, ulaw",
        "transcript=maybe": "transcript: expected true or false, got 'maybe'",
        "noise=3": "expected clean, or NAME=VALUE with a name of snr_db",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_hearing([words])
