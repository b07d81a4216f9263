"""Audio: what is decoded, and that everything unusable is an AudioError before it can cost time or memory."""

from __future__ import annotations

import io
import os
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import soundfile as sf

from models.data.audio import AudioError, check_span, encode_audio, load_audio, probe_audio, resample, write_audio


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


_SOUNDFILE_FORMATS = {  # suffix: format, subtype
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".opus": ("OGG", "OPUS"),
    ".ogg": ("OGG", "VORBIS"),
    ".aiff": ("AIFF", "PCM_16"),
    ".au": ("AU", "PCM_16"),
    ".w64": ("W64", "PCM_16"),
    ".rf64": ("RF64", "PCM_16"),
    ".sph": ("NIST", "PCM_16"),
}


def _whole(suffix: str, tmp_path) -> bytes:
    """3 s of noise in the format of that suffix, as libsndfile writes it, or FFmpeg."""
    noise = (0.1 * np.random.default_rng(0).standard_normal(48_000)).astype(np.float32)
    path = tmp_path / f"whole{suffix}"
    if suffix in _SOUNDFILE_FORMATS:
        form, subtype = _SOUNDFILE_FORMATS[suffix]
        sf.write(path, noise, 16_000, format=form, subtype=subtype)
    else:
        codec, container, muxer = {
            ".info.mp3": ("libmp3lame", None, {}),
            ".webm": ("libopus", None, {}),
            ".oga": ("libopus", "ogg", {}),
            ".mka": ("aac", None, {}),
            ".m4a": ("aac", None, {"movflags": "faststart"}),
            ".frag.mp4": ("aac", None, {"movflags": "frag_keyframe+empty_moov", "frag_duration": "3000000"}),
            ".mp3.wav": ("libmp3lame", None, {}),
        }[suffix]
        rate_hz = 48_000 if codec == "libopus" else 16_000
        _packets(path, codec, np.repeat(noise, rate_hz // 16_000), rate_hz, container=container, muxer=muxer)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.5, 0.93])
@pytest.mark.parametrize("suffix", [*_SOUNDFILE_FORMATS, ".info.mp3", ".webm", ".oga", ".mka", ".m4a", ".frag.mp4", ".mp3.wav"])
def test_a_file_whose_end_is_missing_is_refused_and_a_whole_one_is_heard(tmp_path, suffix, share):
    whole = _whole(suffix, tmp_path)
    assert abs(load_audio(tmp_path / f"whole{suffix}").size - 48_000) < 2_000
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(AudioError, match=r"cut off: the (header claims|last page has) \d+ (frames|samples|bytes)"):
        probe_audio(path)


def _mp3_claiming(frames: int, *, flags: int = 0x0F, name: bytes = b"Xing") -> bytes:
    """A 2 s mp3 at 16 kHz, one channel: 58 frames, and a first one that claims another number."""
    buffer = io.BytesIO()
    sf.write(buffer, _tone(2.0), 16_000, format="MP3")
    data = bytearray(buffer.getvalue())
    at = data.index(b"Xing")
    assert struct.unpack(">II", data[at + 4 : at + 12]) == (0x0F, 58)
    data[at : at + 12] = name + struct.pack(">II", flags, frames)
    return bytes(data)


def test_the_count_of_an_mp3_may_be_off_by_little_and_another_count_is_none(tmp_path):
    path = tmp_path / "a.mp3"
    readable = {
        "one more": _mp3_claiming(59),
        "two more": _mp3_claiming(60),
        "fewer": _mp3_claiming(30),
        "zero": _mp3_claiming(0),
        "no count": _mp3_claiming(999, flags=0x0E),
        "ID3v1": _mp3_claiming(58) + b"TAG" + bytes(125),
        "APE": _mp3_claiming(58) + b"APETAGEX" + bytes(924),
        "another name": _mp3_claiming(999, name=b"Nots"),
    }
    for name, data in readable.items():
        path.write_bytes(data)
        assert abs(probe_audio(path).duration_seconds - 2.088) < 0.08, name
    for data in (_mp3_claiming(61), b"ID3\x03\0\0\0\x01\0\0" + bytes(1 << 14) + _mp3_claiming(61)):
        path.write_bytes(data)
        with pytest.raises(AudioError, match="cut off: the header claims 61 frames, 58 are there"):
            load_audio(path)


def test_the_count_of_fraunhofers_mp3_encoder_is_read(tmp_path):
    data = bytearray(_mp3_claiming(58))
    first = data.index(b"Xing") - 13
    data[first + 4 : first + 60] = bytes(56)
    data[first + 36 : first + 54] = b"VBRI" + struct.pack(">HHHII", 1, 0, 0, len(data), 116)
    (tmp_path / "a.mp3").write_bytes(data)
    with pytest.raises(AudioError, match=r"cut off: the header claims 116 frames, 5[89] are there"):
        load_audio(tmp_path / "a.mp3")


def _without_end_of_stream(ogg: bytes) -> bytes:
    """An Ogg stream whose last page is not marked as such, as Android's recorders write it; opus ends with a whole packet."""
    data = bytearray(ogg)
    last = data.rindex(b"OggS")
    assert data[last + 5] == 4
    data[last + 5] = 0
    if b"OpusHead" in ogg:
        ends = struct.unpack("<q", data[last + 6 : last + 14])[0]
        data[last + 6 : last + 14] = struct.pack("<q", -(-ends // 960) * 960)
    data[last + 22 : last + 26] = bytes(4)
    check = 0
    for byte in data[last:]:
        check ^= byte << 24
        for _ in range(8):
            check = (check << 1) ^ 0x104C11DB7 if check & 0x80000000 else check << 1
    data[last + 22 : last + 26] = struct.pack("<I", check)
    return bytes(data)


@pytest.mark.parametrize("suffix", [".opus", ".ogg"])
def test_an_ogg_file_of_a_recorder_that_marks_no_last_page_is_heard_to_its_end(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(_without_end_of_stream(_whole(suffix, tmp_path)))
    assert abs(load_audio(tmp_path / f"a{suffix}").size - 48_000) < 2_000


@pytest.mark.parametrize("behind", [b"TAG" + b" " * 125, bytes(100), struct.pack(">I4s", 0, b"free") + b"x" * 50])
def test_what_follows_the_last_box_of_an_m4a_is_not_sound(tmp_path, behind):
    (tmp_path / "a.m4a").write_bytes(_whole(".m4a", tmp_path) + behind)
    assert abs(load_audio(tmp_path / "a.m4a").size - 48_000) < 2_000


def test_a_webm_of_a_recorder_that_does_not_know_its_size_is_heard(tmp_path):
    noise = (0.1 * np.random.default_rng(0).standard_normal(144_000)).astype(np.float32)
    _packets(tmp_path / "a.webm", "libopus", noise, 48_000, muxer={"live": "1"})
    assert abs(load_audio(tmp_path / "a.webm").size - 48_000) < 2_000


@pytest.mark.parametrize("data", [bytes(4096), b"not an mp3" * 500])
def test_an_mp3_without_a_frame_is_not_called_missing(tmp_path, data):
    (tmp_path / "a.mp3").write_bytes(data)
    with pytest.raises(AudioError, match=r"corrupt or unknown header \(no mp3 frame in it\); FFmpeg: Invalid data"):
        load_audio(tmp_path / "a.mp3")


def _packets(path, codec: str, samples: np.ndarray, rate_hz: int, *, container=None, muxer=None, **codec_options) -> None:
    """Encode with FFmpeg. Without options of the `muxer` an mp3 gets no Xing header, which would hold its length."""
    import av

    options = {"write_xing": "0", "id3v2_version": "0"} if muxer is None and path.suffix == ".mp3" else muxer or {}
    with av.open(str(path), "w", options=options, format=container) as file:
        stream = file.add_stream(codec, rate=rate_hz, options=codec_options)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray((samples[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = rate_hz
        fifo = av.AudioFifo()
        for part in av.AudioResampler(format=stream.format, layout="mono", rate=rate_hz).resample(frame):
            fifo.write(part)
        size = stream.codec_context.frame_size or 1152
        while (part := fifo.read(size) or fifo.read(0)) is not None:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))


def _changing(seconds: float, rate_hz: int) -> np.ndarray:
    """Silence at first, noise later: a variable bit rate whose first frames say little about the rest."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(round(seconds * rate_hz))
    return (noise * (np.arange(noise.size) > 2 * rate_hz)).astype(np.float32)


def _without_length(flac: bytes) -> bytes:
    """A flac whose STREAMINFO says 0 samples, as an encoder leaves it that writes to a pipe."""
    data = bytearray(flac)
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("vbr.mp3", "libmp3lame", {"global_quality": "472"}),
        ("abr.mp3", "libmp3lame", {"abr": "1", "b": "64k"}),
        ("cbr.mp3", "libmp3lame", {"b": "64k"}),
        ("a.m4a", "aac", {}),
        ("a.aac", "aac", {}),
        ("a.mka", "aac", {}),
        ("a.webm", "libopus", {}),
    ],
)
def test_compressed_audio_without_a_count_is_heard_to_its_end(tmp_path, name, codec, options):
    rate_hz = 48_000 if codec == "libopus" else 22_050
    _packets(tmp_path / name, codec, _changing(5.77, rate_hz), rate_hz, **options)
    samples = load_audio(tmp_path / name)
    # An encoder adds a frame of padding before and one behind.
    assert 5.7 < samples.size / 16_000 < 5.9
    assert abs(samples[:24_000]).max() < 0.01 < np.std(samples[40_000:91_000])
    info = probe_audio(tmp_path / name)
    assert abs(info.duration_seconds - samples.size / 16_000) < 0.05 and not info.counted
    part = load_audio(tmp_path / name, start_seconds=3.0, end_seconds=4.0)
    assert part.size == 16_000
    np.testing.assert_allclose(part[800:-800], samples[48_800:63_200], atol=2e-3)
    with pytest.raises(AudioError, match=r"too long: 5\.[89] s, at most 2 s are allowed"):
        load_audio(tmp_path / name, max_seconds=2.0)


def test_a_flac_from_a_pipe_is_heard_to_its_end(tmp_path):
    flac = encode_audio(_changing(5.0, 16_000))
    (tmp_path / "counted.flac").write_bytes(flac)
    (tmp_path / "piped.flac").write_bytes(_without_length(flac))
    assert probe_audio(tmp_path / "piped.flac").duration_seconds == 5.0
    np.testing.assert_array_equal(load_audio(tmp_path / "piped.flac"), load_audio(tmp_path / "counted.flac"))


def test_a_long_mp3_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    _packets(tmp_path / "a.mp3", "libmp3lame", np.zeros(32 * 16_000, np.float32), 16_000, b="32k")
    monkeypatch.setattr("models.data.audio._decode_packets", None)
    with pytest.raises(AudioError, match=r"too long: 32\.\d s, at most 30 s"):
        load_audio(tmp_path / "a.mp3")


def test_a_span_over_the_limit_by_an_encoders_padding_is_cut_to_it(tmp_path):
    write_audio(tmp_path / "a.flac", _tone(2.05))
    assert load_audio(tmp_path / "a.flac", max_seconds=2.0).size == 32_000
    with pytest.raises(AudioError, match=r"too long: 2\.2 s, at most 2 s"):
        write_audio(tmp_path / "b.flac", _tone(2.25))
        load_audio(tmp_path / "b.flac", max_seconds=2.0)


def test_without_pyav_the_message_says_what_to_install(tmp_path, monkeypatch):
    _packets(tmp_path / "a.m4a", "aac", _tone(1.0), 16_000)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"Format not recognised.*; files of this kind are read by PyAV: pip install av"):
        load_audio(tmp_path / "a.m4a")


def test_a_playlist_opens_no_other_file(tmp_path):
    write_audio(tmp_path / "secret.wav", _tone(1.0))
    for name, text in {
        "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n",
        "a.ffconcat": "ffconcat version 1.0\nfile secret.wav\n",
        "a.mp3": "#EXTM3U\n#EXTINF:1,\nsecret.wav\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AudioError, match="corrupt or unknown header"):
            load_audio(tmp_path / name)


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
        ({"start_seconds": 0.5, "end_seconds": 0.50002}, "too short: 2e-05 s, less than half a sample at 16000 Hz"),
    ],
)
def test_bad_spans(tmp_path, span, reason):
    write_audio(tmp_path / "a.flac", _tone(1.0))
    with pytest.raises(AudioError, match=reason):
        load_audio(tmp_path / "a.flac", **span)


@pytest.mark.parametrize("count", [1, 2])
def test_a_clip_of_which_nothing_is_left_at_16_khz_is_an_audio_error(tmp_path, count):
    path = tmp_path / "a.wav"
    sf.write(path, np.full(count, 0.1), 96_000)
    with pytest.raises(AudioError, match=r"a\.wav: too short"):
        load_audio(path)
    with pytest.raises(AudioError, match=f"too short: {count} samples at 96000 Hz give none at 16000 Hz"):
        resample(np.ones(count, np.float32), 96_000, 16_000)
    sf.write(path, np.full(200, 0.1), 96_000)
    with pytest.raises(AudioError, match=r"a\.wav: too short"):
        load_audio(path, end_seconds=(count + 0.4) / 96_000)
    assert load_audio(path, end_seconds=3 / 96_000).size == 1


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
