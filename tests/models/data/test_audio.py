"""Audio: what is decoded, and that everything unusable is an AudioError before it can cost time or memory."""

from __future__ import annotations

import os
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile as sf

from models.data.audio import AudioError, check_span, encode_audio, load_audio, probe_audio, write_audio


def _tone(seconds: float, rate_hz: int = 16_000, *, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def _wav_header(*, frames: int, rate_hz: int = 16_000, riff_bytes: int | None = None) -> bytes:
    data_bytes = frames * 2
    riff_bytes = 36 + data_bytes if riff_bytes is None else riff_bytes
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate_hz, rate_hz * 2, 2, 16)
    size = lambda n: min(n, 0xFFFFFFFF)  # noqa: E731
    return (
        b"RIFF" + struct.pack("<I", size(riff_bytes)) + b"WAVE" + form + b"data" + struct.pack("<I", size(data_bytes))
    )


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
@pytest.mark.parametrize("rate_hz", [8_000, 16_000, 44_100])
def test_any_format_rate_and_channels_become_16_khz_mono(tmp_path, suffix, rate_hz):
    stereo = np.stack([_tone(1.0, rate_hz), np.zeros(rate_hz, np.float32)], 1)
    sf.write(tmp_path / f"a{suffix}", stereo, rate_hz)
    samples = load_audio(tmp_path / f"a{suffix}")
    assert samples.dtype == np.float32 and abs(samples.size - 16_000) <= 16_000 * 0.1
    spectrum = np.abs(np.fft.rfft(samples[:16_000]))
    assert abs(np.argmax(spectrum) * 16_000 / min(samples.size, 16_000) - 440) < 3
    assert 0.2 < np.abs(samples[4000:12000]).max() < 0.3  # the mean of a tone and silence


def test_a_span_is_the_same_as_a_slice_of_the_whole(tmp_path):
    write_audio(tmp_path / "a.wav", _tone(2.0))
    whole = load_audio(tmp_path / "a.wav")
    np.testing.assert_array_equal(
        load_audio(tmp_path / "a.wav", start_seconds=0.5, end_seconds=1.25), whole[8000:20000]
    )


def test_written_audio_reads_back_to_16_bit_accuracy_and_is_clipped(tmp_path):
    tone = _tone(0.5) * 3.0
    for name in ("a.flac", "a.wav"):
        write_audio(tmp_path / name, tone)
        np.testing.assert_allclose(load_audio(tmp_path / name), np.clip(tone, -1, 1), atol=2**-15 * 1.01)
    assert encode_audio(tone) == encode_audio(tone)  # the corpus is hashed


def test_three_hours_are_refused_from_the_header_in_no_time_and_memory(tmp_path):
    path = tmp_path / "long.wav"
    with path.open("wb") as file:  # a sparse file: a true, complete wav of three hours of silence
        file.write(_wav_header(frames=3 * 3600 * 16_000))
        file.truncate(44 + 2 * 3 * 3600 * 16_000)
    tracemalloc.start()
    with pytest.raises(AudioError, match=r"too long: 10800.0 s, at most 30 s"):
        load_audio(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert load_audio(path, start_seconds=9000, end_seconds=9001).size == 16_000


def test_a_header_that_claims_more_than_the_file_holds_takes_no_memory(tmp_path):
    path = tmp_path / "liar.wav"
    path.write_bytes(_wav_header(frames=2**40) + b"\0\0" * 100)
    tracemalloc.start()
    try:
        samples = load_audio(path)
    except AudioError as error:
        assert "corrupt" in error.reason or "too long" in error.reason
    else:
        assert samples.size == 100  # libsndfile has found the true length by itself
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("claimed_seconds", [2, 3 * 3600])
def test_a_wav_that_was_cut_off_is_refused(tmp_path, claimed_seconds):
    path = tmp_path / "cut.wav"
    path.write_bytes(_wav_header(frames=claimed_seconds * 16_000) + b"\0\1" * 16_000)
    with pytest.raises(AudioError, match=rf"cut off: the header claims {claimed_seconds * 32_000} bytes of sound, 32000"):
        load_audio(path)


@pytest.mark.parametrize("claimed_frames", [0x7FFFFFFF // 2, 2**40, 16_001])
def test_a_wav_from_a_pipe_or_short_of_a_sample_is_read(tmp_path, claimed_frames):
    path = tmp_path / "piped.wav"
    path.write_bytes(_wav_header(frames=claimed_frames) + b"\0\1" * 16_000)
    assert load_audio(path).size == 16_000


def test_a_header_that_claims_a_few_seconds_too_many_is_never_padded(tmp_path):
    path = tmp_path / "liar.au"
    header = b".snd" + struct.pack(">IIIII", 24, 16_000 * 2 * 20, 3, 16_000, 1)
    path.write_bytes(header + b"\0\1" * 16_000)
    try:
        assert load_audio(path).size == 16_000
    except AudioError as error:
        assert "corrupt" in error.reason


def _missing(path):
    pass


def _empty(path):
    path.write_bytes(b"")


def _no_samples(path):
    path.write_bytes(_wav_header(frames=0))


def _garbage(path):
    path.write_bytes(os.urandom(4096))


def _truncated_header(path):
    path.write_bytes(_wav_header(frames=1000)[:20])


def _slow_rate(path):
    path.write_bytes(_wav_header(frames=100, rate_hz=100) + b"\0\0" * 100)


def _absurd_rate(path):
    path.write_bytes(_wav_header(frames=100, rate_hz=2_000_000_000) + b"\0\0" * 100)


def _folder(path):
    path.mkdir()


def _pipe(path):
    os.mkfifo(path)


def _not_finite(path):
    sf.write(path, np.array([0.0, np.nan, np.inf, 0.0]), 16_000, subtype="FLOAT")


def _truncated_flac(path):
    noise = np.random.default_rng(0).standard_normal(64_000) * 0.1
    path.write_bytes(encode_audio(noise)[:40_000])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_missing, "missing file"),
        (_empty, "empty file"),
        (_no_samples, "empty clip"),
        (_garbage, "corrupt or unknown header"),
        (_truncated_header, "corrupt or unknown header"),
        (_slow_rate, "wrong rate: 100 Hz"),
        (_absurd_rate, "wrong rate|corrupt"),
        (_folder, "not a regular file"),
        (_pipe, "not a regular file"),
        (_not_finite, "not finite"),
        (_truncated_flac, "corrupt audio data"),
    ],
)
def test_what_cannot_be_used_is_an_audio_error_with_its_reason(tmp_path, make, reason):
    path = tmp_path / "a.wav"
    make(path)
    with pytest.raises(AudioError, match=reason) as caught:
        load_audio(path)
    assert str(path) in str(caught.value) and str(path) not in caught.value.reason
    assert "\n" not in str(caught.value)


def test_a_path_with_a_null_byte_is_an_audio_error():
    with pytest.raises(AudioError, match="cannot be opened"):
        probe_audio("a\0b.wav")


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ({"start_seconds": 2.0}, "span starts at 2 s"),
        ({"end_seconds": 2.0}, "span ends at 2 s"),
        ({"start_seconds": 0.5, "end_seconds": 0.5}, "empty span"),
        ({"start_seconds": 0.5, "end_seconds": 0.2}, "empty span"),
        ({"start_seconds": -1.0}, "empty span"),
        ({"max_seconds": 0.5}, "too long: 1.0 s"),
    ],
)
def test_bad_spans(tmp_path, span, reason):
    write_audio(tmp_path / "a.flac", _tone(1.0))
    with pytest.raises(AudioError, match=reason):
        load_audio(tmp_path / "a.flac", **span)


def test_an_end_rounded_up_is_the_end(tmp_path):
    write_audio(tmp_path / "a.flac", _tone(1.0))
    info = probe_audio(tmp_path / "a.flac")
    assert check_span(info, end_seconds=1.05) == (0.0, 1.0)


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros((2, 2)), np.array([np.nan])])
def test_encode_refuses_what_is_no_clip(samples):
    with pytest.raises(ValueError, match="samples: expected"):
        encode_audio(samples)


def test_write_refuses_an_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a name in .flac or .wav, got 'a.mp3'"):
        write_audio(tmp_path / "a.mp3", _tone(0.1))
