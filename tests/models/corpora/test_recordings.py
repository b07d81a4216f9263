"""The two recorded sources, read from files of their form made here, and the degradation of clips."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile as sf

from models.corpora.degrade import LEVEL_RMS, Channel, make_noise, prepare_clip, trim_silence
from models.corpora.sources.queen import read_lines
from models.corpora.sources.tuxpaint import read_stamps
from models.data.audio import AudioError


def _mp3(seconds: float = 1.5) -> bytes:
    buffer = io.BytesIO()
    samples = 0.3 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * 22050)) / 22050)
    sf.write(buffer, samples, 22050, format="MP3", subtype="MPEG_LAYER_III")
    return buffer.getvalue()


def _dialogue(number: int, hero: dict[int, str], other: dict[int, str]) -> bytes:
    def table(sentences: dict[int, str]) -> bytes:
        data = b""
        for index, text in sentences.items():
            record = struct.pack(">hhB", 0, index, len(text)) + text.encode("latin-1")
            data += record + b"\0" * (-len(record) % 4)
        return data

    levels = 1
    hero_table = table(hero)
    others_at = 32 + 96 * levels + len(hero_table)
    header = struct.pack(">5h", levels, 0, number, len(hero), len(other)).ljust(22, b"\0") + struct.pack(
        ">H", others_at
    )
    return b"AmBk".ljust(20, b"\0") + header.ljust(32, b"\0") + b"\0" * 96 * levels + hero_table + table(other)


def archive(files: dict[str, bytes]) -> bytes:
    offset = 15 + 21 * len(files)
    table, body = b"", b""
    for name, content in files.items():
        table += name.encode().ljust(12, b"\0") + b"\1" + struct.pack(">II", offset + len(body), len(content))
        body += content
    return b"QTBL" + b"TEST10".ljust(8, b"\0") + b"\1" + struct.pack(">H", len(files)) + table + body


def test_lines_are_aligned_with_their_sounds_part_by_part(tmp_path):
    files = {
        "FAYE2.DOG": _dialogue(
            2,
            {6: "Hello there, Faye."},
            {1: "Do I know you?*CH02  *EXYou look  familiar.", 10: "Never voiced.", -1: "No sentence."},
        ),
        "020006J1.SB": _mp3(),
        "020001P1.SB": _mp3(),
        "020001P2.SB": b"no mp3",
        "ROCKPAKS.SB": b"music",
    }
    (tmp_path / "queen.1c").write_bytes(archive(files))
    lines = read_lines(tmp_path / "queen.1c")
    assert [(line.clip_id, line.speaker, line.text) for line in lines] == [
        ("020001P1", "FAYE", "Do I know you?"),
        ("020001P2", "FAYE", "You look familiar."),
        ("020006J1", "JOE", "Hello there, Faye."),
    ]
    samples, rate_hz = lines[2].decode()
    assert rate_hz == 22050 and abs(len(samples) / rate_hz - lines[2].duration_seconds()) < 0.2
    with pytest.raises(AudioError, match="020001P2: corrupt mp3"):
        lines[1].decode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"XXXX" + data[4:], "expected the game's resource file"),
        (lambda data: data[:40], "the table of 1 entries|ends at"),
        (lambda data: data[:13] + b"\xff\xff" + data[15:], "the table of 65535 entries|ends at"),
        (lambda data: data[:-1], "entry A.DOG ends at"),
    ],
)
def test_a_damaged_resource_file_is_a_value_error(tmp_path, damage, message):
    (tmp_path / "queen.1c").write_bytes(damage(archive({"A.DOG": _dialogue(1, {}, {})})))
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / "queen.1c")


def test_stamps_are_read_with_both_texts(tmp_path):
    birds = tmp_path / "animals"
    birds.mkdir()
    (birds / "crow.txt").write_text("A crow.\nfr.utf8=Un corbeau.\nbroken\n", "utf-8")
    for name in (
        "crow_desc_fr.ogg",
        "crow_desc_ro.ogg",
        "crow_desc_lt.ogg",
        "crow_desc.ogg",
        "hen_desc_fr.ogg",
        "crow.ogg",
    ):
        (birds / name).write_bytes(b"")
    stamps = read_stamps(tmp_path)
    assert [(s.stamp, s.language, s.text, s.english) for s in stamps] == [
        ("animals/crow", "French", "Un corbeau.", "A crow."),
        ("animals/crow", "Romanian", "A crow.", "A crow."),
    ]
    with pytest.raises(ValueError, match="root: expected a folder with spoken Tux Paint stamps"):
        read_stamps(birds / "none")


def _speech(seconds: float = 2.0, rate_hz: int = 22050) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(round(seconds * rate_hz)).astype(np.float32) * 0.2


@pytest.mark.parametrize("snr_db", [None, -18.0, 2.0])
def test_clips_have_one_level_length_limit_and_band(snr_db):
    clip = prepare_clip(_speech(5.0), 22050, snr_db=snr_db, rng=np.random.default_rng(0), max_seconds=4.0)
    assert clip.dtype == np.float32 and len(clip) == 64_000
    assert np.sqrt(np.mean(clip**2)) == pytest.approx(LEVEL_RMS, rel=1e-3)
    assert np.abs(clip).max() < 1.0  # nothing is clipped in 16 bits
    if snr_db is None:
        energy = np.abs(np.fft.rfft(clip)) ** 2
        assert energy[len(energy) * 4300 // 8000 :].sum() < 1e-4 * energy.sum()


def test_the_noise_has_the_level_that_was_asked_for():
    speech = prepare_clip(_speech(), 22050, snr_db=None, rng=np.random.default_rng(0), max_seconds=4.0)
    noisy = prepare_clip(_speech(), 22050, snr_db=-6.0, rng=np.random.default_rng(3), max_seconds=4.0)
    share = float(np.dot(noisy, speech) / np.dot(speech, speech))
    noise = noisy / share - speech
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(-6.0, abs=0.3)


def test_noise_comes_in_two_colours_by_seed():
    def low_part(seed: int) -> float:
        noise = make_noise(16_000, rng=np.random.default_rng(seed))
        assert np.sqrt(np.mean(noise**2)) == pytest.approx(1.0, rel=1e-3)
        energy = np.abs(np.fft.rfft(noise)) ** 2
        return float(energy[:1000].sum() / energy.sum())

    parts = [low_part(seed) for seed in range(20)]
    assert any(part < 0.2 for part in parts) and any(part > 0.8 for part in parts) and low_part(7) == low_part(7)


def test_silence_and_nothing():
    assert not prepare_clip(np.zeros(8000), 8000, snr_db=None, rng=np.random.default_rng(0), max_seconds=4.0).any()
    with pytest.raises(ValueError, match="samples: expected shape"):
        prepare_clip(np.zeros(0), 8000, snr_db=None, rng=np.random.default_rng(0), max_seconds=4.0)


def _part(clip: np.ndarray, low_hz: float, high_hz: float) -> float:
    """The share of a clip's energy between two frequencies."""
    energy = np.abs(np.fft.rfft(clip)) ** 2
    frequency = np.fft.rfftfreq(len(clip), 1 / 16_000)
    return float(energy[(frequency >= low_hz) & (frequency < high_hz)].sum() / energy.sum())


def _clip(channel: Channel, *, snr_db: float | None = None, seed: int = 0, samples: np.ndarray | None = None) -> np.ndarray:
    samples = _speech() if samples is None else samples
    return prepare_clip(
        samples, 22050, snr_db=snr_db, rng=np.random.default_rng(seed), max_seconds=4.0, channel=channel
    )


def test_bands_hold_what_they_say_and_noise_is_added_behind_them():
    narrow, wide, common = (_clip(Channel(band=band)) for band in ("narrow", "wide", "common"))
    assert _part(narrow, 250, 3450) > 0.999 and _part(narrow, 400, 3300) > 0.9  # edges 100 Hz wide, around 300 and 3400
    assert _part(wide, 4000, 5500) > 0.2 and _part(wide, 5700, 8000) < 1e-3
    assert _part(common, 4200, 8000) < 1e-4 and _part(common, 0, 300) > 0.05
    for clip in (narrow, wide, common):
        assert np.sqrt(np.mean(clip**2)) == pytest.approx(LEVEL_RMS, rel=1e-3)
    white = next(seed for seed in range(20) if np.random.default_rng(seed).random() >= 0.5)
    assert _part(_clip(Channel(band="narrow"), snr_db=0.0, seed=white), 5700, 8000) > 0.1


def test_noise_in_band_leaves_the_upper_band_empty_and_keeps_its_level():
    white = next(seed for seed in range(20) if np.random.default_rng(seed).random() >= 0.5)
    limited, open_ = (_clip(Channel(noise_in_band=flag), snr_db=0.0, seed=white) for flag in (True, False))
    assert _part(limited, 4200, 8000) < 1e-4 < 0.1 < _part(open_, 4200, 8000)
    speech = _clip(Channel())
    share = float(np.dot(limited, speech) / np.dot(speech, speech))
    noise = limited / share - speech
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(0.0, abs=0.3)


def test_a_room_goes_on_after_the_sound_for_as_long_as_it_says():
    click = np.zeros(22050 * 3)
    click[:100] = np.random.default_rng(1).standard_normal(100)
    tails = {}
    for seconds in (0.3, 0.9):
        wet = _clip(Channel(reverberation_seconds=seconds), samples=click)
        assert len(wet) == 48_000
        level = [10 * np.log10(np.mean(wet[n : n + 1600] ** 2)) for n in (1600, 6400)]  # 0.1 and 0.4 s after the click
        tails[seconds] = level[0] - level[1]
    assert tails[0.3] == pytest.approx(60, abs=8) and tails[0.9] == pytest.approx(20, abs=4)
    dry = _clip(Channel(), samples=click)
    assert np.mean(dry[3200:] ** 2) < 1e-6 * np.mean(dry**2)


def test_silence_at_the_ends_is_cut_and_none_in_between():
    speech = _speech(0.5)
    gap = np.zeros(22050, np.float32)
    samples = np.concatenate([gap, speech, gap, speech, gap[:5000]])
    trimmed = trim_silence(samples, 22050)
    assert len(trimmed) == pytest.approx(len(speech) * 2 + len(gap) + 2 * 0.06 * 22050, abs=900)
    assert np.array_equal(trim_silence(gap, 22050), gap)
    assert len(trim_silence(speech[:10], 22050)) == 10
    clip = _clip(Channel(trim=True), samples=samples)
    assert len(clip) < len(_clip(Channel(), samples=samples)) - 16_000


def test_channels_are_checked():
    with pytest.raises(ValueError, match="band: expected one of"):
        Channel(band="stereo")
    with pytest.raises(ValueError, match="reverberation_seconds: expected above 0 to 10, got 0"):
        Channel(reverberation_seconds=0.0)
