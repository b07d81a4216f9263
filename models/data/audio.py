"""Reads and writes audio files: the length, a span of limited length, and one exception for everything that can go wrong.

The length is known before a sample is decoded. libsndfile's header count is used where the format counts its samples
(wav, flac, ogg, aiff, au). An mp3 holds only an estimate, and a flac from a pipe holds no count at all. libsndfile does not
read m4a, webm and aac. For all of these FFmpeg (the package PyAV) walks through the packets and adds up their durations. A clip
that is too long then raises AudioError. At most `max_seconds` of sound are held in memory.

Decoders read what is left of a file that was cut off and say nothing. So a file is refused if it shows that its end is missing:
by a size or a count in its header, or by an Ogg page that is not whole. docs/limits.md lists the formats that show nothing.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr

from models.data.problems import MISSING_CLIP
from models.io_utils import atomic_write_bytes

SAMPLE_RATE_HZ = 16_000
MAX_SECONDS = 30.0
_MIN_RATE_HZ, _MAX_RATE_HZ = 4_000, 384_000
_MAX_CHANNELS = 32
_BLOCK_FRAMES = 1 << 16
# Encoders round a clip's end to their own frame, and labels are rounded to hundredths. An end this close counts as the end.
_END_TOLERANCE_SECONDS = 0.1
# Packets hold an encoder's delay and padding, which decoding removes: a few frames of 1152 samples, or of AAC's 1024.
_PADDING_FRAMES = 4 * 1152
_BYTES_PER_SAMPLE = {
    "PCM_S8": 1,
    "PCM_U8": 1,
    "PCM_16": 2,
    "PCM_24": 3,
    "PCM_32": 4,
    "FLOAT": 4,
    "DOUBLE": 8,
    "ULAW": 1,
    "ALAW": 1,
}
# libsndfile's log of the sound in a wav, aiff and au file, and of a whole RF64 and W64 file, whose sound it does not compare.
_CUT_DATA = re.compile(r"^(?:data| SSND|  Data Size  |riff|  Riff size) +: (\d+) \(should be (\d+)\)", re.MULTILINE)
# Programs that write to a pipe cannot know the length: sox claims some 2 GiB, ffmpeg 4 GiB.
_STREAMED_BYTES = 0x7F000000
_CUT_TOLERANCE = 0.01
# mp3 encoders begin with a frame without sound. Behind its header and side information stand "Xing" or "Info", flags, and the
# number of frames where the last flag is set. Or "VBRI", version, delay, quality, bytes, and the number of frames.
_MP3_COUNT = re.compile(
    rb"\xff(?P<version>[\xe2\xe3\xf2\xf3\xfa\xfb]).."
    rb"(?:(?:.{9}|.{17}|.{32})(?:..)?(?:Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f](?P<xing>....)"
    rb"|.{32}VBRI.{10}(?P<vbri>....))",
    re.DOTALL,
)
_HEAD_BYTES = 1 << 13
_MP3_SPARE_FRAMES = 2  # encoders differ in whether they count the first frame, and the last one
_OGG_PAGE_BYTES = 27 + 255 + 255 * 255  # at most
_NIST_COUNT = re.compile(rb"^sample_count -i (\d+)", re.MULTILINE)
_MATROSKA_SEGMENT = b"\x18\x53\x80\x67"
_UNCOMPRESSED = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU"}
_NO_MP3_FRAME = 7  # libsndfile's error for an mp3 without a frame; its text says that the file does not exist
_NO_COUNT = 1 << 62  # libsndfile's frames of a stream that does not say how long it is
# The formats that FFmpeg may read. Playlists and the like are not among them: they name other files and addresses.
_CONTAINERS = "aac,ac3,amr,asf,flac,matroska,mov,mp3,ogg,wav"


class AudioError(ValueError):
    """A clip cannot be used; `reason` says why in one line, without the path."""

    def __init__(self, reason: str, path: str | os.PathLike[str] | None = None):
        self.reason = reason
        self.path = None if path is None else Path(path)
        super().__init__(reason if path is None else f"{path}: {reason}")


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """What is known of a file before it is decoded.

    Args:
        duration_seconds, frames: its length; `frames` counts samples of one channel.
        format: libsndfile's name (WAV, FLAC, MP3, ...) or FFmpeg's (mov, matroska, aac, ...).
        counted: True if the header counts the samples; False if FFmpeg's packets were added up.
    """

    duration_seconds: float
    sample_rate_hz: int
    channels: int
    frames: int
    format: str
    counted: bool = True


def probe_audio(path: str | os.PathLike[str]) -> AudioInfo:
    """Length, rate and channels of an audio file, after a check that its header can be true.

    Raises:
        AudioError: the file is missing, empty, not a regular file (a named pipe would block), or of a format that libsndfile
            and FFmpeg do not know. Or its header cannot be true: it has more samples than bytes, or a rate or number of
            channels that speech does not have. Or the file shows that its end is missing.
    """
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise AudioError(MISSING_CLIP, path) from None
    except (OSError, ValueError, RuntimeError) as error:  # permissions, name too long, null bytes, loops of links
        raise AudioError(f"cannot be opened ({_short(error)})", path) from None
    if not stat.S_ISREG(status.st_mode):
        raise AudioError("not a regular file", path)
    if status.st_size == 0:
        raise AudioError("empty file (0 bytes)", path)
    try:
        info = sf.info(str(path), verbose=True)
    except Exception as error:  # libsndfile raises several unrelated types for a broken header
        why = "no mp3 frame in it" if getattr(error, "code", 0) == _NO_MP3_FRAME else _short(error)
        return _checked(_walk(path, otherwise=f"corrupt or unknown header ({why})"), path)
    cut = _CUT_DATA.search(info.extra_info)
    if cut and int(cut[1]) < _STREAMED_BYTES:
        _check_whole(int(cut[1]), int(cut[2]), "bytes of sound", path)
    if info.frames >= _NO_COUNT or info.format == "MP3" or info.subtype.startswith("MPEG"):
        return _checked(_walk(path, otherwise=f"corrupt or unknown {info.format} data"), path)
    known = AudioInfo(
        duration_seconds=info.frames / max(1, info.samplerate),
        sample_rate_hz=info.samplerate,
        channels=info.channels,
        frames=info.frames,
        format=info.format,
    )
    _checked(known, path)
    sample_bytes = _BYTES_PER_SAMPLE.get(info.subtype)
    if info.format in _UNCOMPRESSED and sample_bytes and info.frames * info.channels * sample_bytes > status.st_size:
        raise AudioError(
            f"corrupt header: it claims {info.frames} samples, the file has only {status.st_size} bytes", path
        )
    return known


def _check_whole(claimed: int, there: int, what: str, path: Path) -> None:
    """AudioError if a header claims more of something than the file holds."""
    if claimed > there * (1 + _CUT_TOLERANCE):
        raise AudioError(f"corrupt or cut off: the header claims {claimed} {what}, {there} are there", path)


def _checked(info: AudioInfo, path: Path) -> AudioInfo:
    """`info`, if a recording can have such a rate, channels and length, and nothing shows that the file's end is missing."""
    _check_end(info, path)
    if not _MIN_RATE_HZ <= info.sample_rate_hz <= _MAX_RATE_HZ:
        raise AudioError(f"wrong rate: {info.sample_rate_hz} Hz, expected {_MIN_RATE_HZ} to {_MAX_RATE_HZ}", path)
    if not 1 <= info.channels <= _MAX_CHANNELS:
        raise AudioError(f"corrupt header: {info.channels} channels, expected 1 to {_MAX_CHANNELS}", path)
    if info.frames <= 0:
        raise AudioError("empty clip (0 samples)", path)
    return info


def _check_end(info: AudioInfo, path: Path) -> None:
    """AudioError for an mp3, Ogg, Matroska, MP4 or NIST file that shows that its end is missing."""
    if info.format == "mp3":
        if found := _MP3_COUNT.search(_mp3_head(path)):
            there = info.frames // (1152 if found["version"] >= b"\xf8" else 576)
            claimed = int.from_bytes(found["xing"] or found["vbri"], "big")
            if claimed > there + _MP3_SPARE_FRAMES:
                _check_whole(claimed, there, "frames", path)
    elif info.format in ("OGG", "ogg"):
        _, mark, page = _part(path, -_OGG_PAGE_BYTES).rpartition(b"OggS\0")
        page = mark + page
        parts = page[26] if len(page) > 26 else 255
        size = 27 + parts + sum(page[27 : 27 + parts])
        # That no page is marked as the last one shows nothing: Android's recorders mark none.
        if mark and size > len(page):
            raise AudioError(f"corrupt or cut off: the last page has {size} bytes or more, {len(page)} are there", path)
    elif info.format == "matroska":
        head, mark, rest = _part(path, 0, _HEAD_BYTES).partition(_MATROSKA_SEGMENT)
        width = 9 - rest[0].bit_length() if rest else 0
        unknown = (1 << 7 * width) - 1  # is written by a recorder, which cannot know the size
        size = int.from_bytes(rest[:width], "big") & unknown
        if size != unknown:
            _check_whole(size, path.stat().st_size - len(head) - len(mark) - width, "bytes", path)
    elif info.format == "mov":
        start, size = 0, path.stat().st_size
        while start + 8 <= size:  # over the boxes: the length, a name, and for the length 1 the true one
            head = _part(path, start, 16)
            length = int.from_bytes(head[8:] if head[:4] == b"\0\0\0\x01" else head[:4], "big")
            if head[4:8] in (b"mdat", b"moof"):  # those with the sound; what follows the last box may be anything
                _check_whole(start + length, size, "bytes", path)
            start += max(length, 8) if length else size  # 0 = to the file's end
    elif info.format == "NIST" and (counted := _NIST_COUNT.search(_part(path, 0, _HEAD_BYTES))):
        _check_whole(int(counted[1]), info.frames, "samples", path)


def _mp3_head(path: Path) -> bytes:
    """An mp3's first bytes behind its ID3v2 tags."""
    start = 0
    while (tag := _part(path, start, 10))[:3] == b"ID3" and len(tag) == 10:
        start += 10 + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
    return _part(path, start, _HEAD_BYTES)


def _part(path: Path, start: int, size: int = -1) -> bytes:
    """`size` bytes of a file from `start`, which counts from its end if it is negative; all bytes to its end for -1."""
    try:
        with path.open("rb") as file:
            file.seek(start if start >= 0 else max(0, path.stat().st_size + start))
            return file.read(size)
    except OSError as error:
        raise AudioError(f"cannot be opened ({_short(error)})", path) from None


def check_span(
    info: AudioInfo, *, start_seconds: float = 0.0, end_seconds: float | None = None, max_seconds: float = MAX_SECONDS
) -> tuple[float, float]:
    """The span (start, end) in seconds, checked against the clip's length; nothing is decoded.

    A span may be up to 0.1 s longer than `max_seconds` (an encoder's padding); its end is then cut.

    Raises:
        AudioError: the span starts or ends after the clip's end, is empty, is shorter than half a sample at 16 kHz, or is longer
            than `max_seconds`.
    """
    end = info.duration_seconds if end_seconds is None else end_seconds
    if start_seconds < 0 or (end_seconds is not None and end_seconds <= start_seconds):
        raise AudioError(f"empty span: {start_seconds:g} to {end:g} s")
    if start_seconds >= info.duration_seconds:
        raise AudioError(f"span starts at {start_seconds:g} s, the clip ends at {info.duration_seconds:.2f} s")
    if end > info.duration_seconds + _END_TOLERANCE_SECONDS:
        raise AudioError(f"span ends at {end:g} s, the clip ends at {info.duration_seconds:.2f} s")
    end = min(end, info.duration_seconds)
    if (end - start_seconds) * SAMPLE_RATE_HZ < 0.5:  # nothing would be left of it
        raise AudioError(f"too short: {end - start_seconds:.2g} s, less than half a sample at {SAMPLE_RATE_HZ} Hz")
    if end - start_seconds > max_seconds + _END_TOLERANCE_SECONDS:
        raise AudioError(f"too long: {end - start_seconds:.1f} s, at most {max_seconds:g} s are allowed")
    return start_seconds, min(end, start_seconds + max_seconds)


def load_audio(
    path: str | os.PathLike[str],
    *,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    sample_rate: int = SAMPLE_RATE_HZ,
    max_seconds: float = MAX_SECONDS,
) -> np.ndarray:
    """Decode a span of an audio file to one channel at `sample_rate`.

    Args:
        path: wav, flac, ogg, opus, mp3, m4a, webm, aiff, au ... of any rate; several channels are averaged.
        start_seconds, end_seconds: the span; None means to the end.
        sample_rate: rate of the result in Hz.
        max_seconds: a longer span raises AudioError before it is decoded.

    Returns:
        float32 (samples,), in [-1, 1] for integer formats. Memory: at most `max_seconds` of sound.

    Raises:
        AudioError: missing, empty, corrupt, too long or too short, a span outside the clip, or samples that are not finite.
    """
    samples, rate = load_at_own_rate(
        path, start_seconds=start_seconds, end_seconds=end_seconds, max_seconds=max_seconds
    )
    try:
        return resample(samples, rate, sample_rate)
    except AudioError as error:
        raise AudioError(error.reason, path) from None


def load_at_own_rate(
    path: str | os.PathLike[str],
    *,
    start_seconds: float = 0.0,
    end_seconds: float | None = None,
    max_seconds: float = MAX_SECONDS,
) -> tuple[np.ndarray, int]:
    """A span as `load_audio` decodes it, before it is resampled: float32 (samples,), and their rate in Hz."""
    path = Path(path)
    info = probe_audio(path)
    try:
        start, end = check_span(info, start_seconds=start_seconds, end_seconds=end_seconds, max_seconds=max_seconds)
    except AudioError as error:
        raise AudioError(error.reason, path) from None
    first_frame = round(start * info.sample_rate_hz)
    wanted_frames = max(1, round(end * info.sample_rate_hz) - first_frame)
    try:
        decode = _decode if info.counted else _decode_packets
        blocks = list(decode(path, first_frame, wanted_frames))
    except AudioError:
        raise
    except Exception as error:  # for a damaged stream libsndfile and FFmpeg raise one of several errors
        raise AudioError(f"corrupt audio data ({_short(error)})", path) from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not samples.size:
        raise AudioError("empty clip (no sample could be decoded)", path)
    # A compressed file that was cut off decodes to less than its header says. A frame or two less is only the encoder's padding.
    padding = _END_TOLERANCE_SECONDS * info.sample_rate_hz + (0 if info.counted else _PADDING_FRAMES)
    if samples.size < wanted_frames - padding:
        raise AudioError(
            f"corrupt audio data (expected {wanted_frames} samples, {samples.size} could be decoded)", path
        )
    if not np.isfinite(samples).all():
        raise AudioError("corrupt audio data (samples that are not finite)", path)
    return samples, info.sample_rate_hz


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Band-limited resampling of float32 (samples,). Raises AudioError if no sample is left."""
    if from_hz == to_hz:
        return np.ascontiguousarray(samples, np.float32)
    made = soxr.resample(np.asarray(samples, np.float32), from_hz, to_hz).astype(np.float32, copy=False)
    if not made.size:
        raise AudioError(f"too short: {len(samples)} samples at {from_hz} Hz give none at {to_hz} Hz")
    return made


def encode_audio(samples: np.ndarray, *, sample_rate: int = SAMPLE_RATE_HZ, format: str = "FLAC") -> bytes:
    """16-bit mono file content of float (samples,); values beyond [-1, 1] are clipped.

    Raises:
        ValueError: `samples` is empty, not one-dimensional, or not finite.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"samples: expected shape (samples,) with at least one, got {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("samples: expected finite values, got NaN or infinity")
    buffer = io.BytesIO()
    sf.write(buffer, np.clip(samples, -1.0, 1.0), sample_rate, format=format, subtype="PCM_16")
    return buffer.getvalue()


def write_audio(path: str | os.PathLike[str], samples: np.ndarray, *, sample_rate: int = SAMPLE_RATE_HZ) -> Path:
    """Write float (samples,) as 16-bit mono, atomically. The suffix (.flac or .wav) decides the format."""
    path = Path(path)
    formats = {".flac": "FLAC", ".wav": "WAV"}
    if path.suffix.lower() not in formats:
        raise ValueError(f"path: expected a name in .flac or .wav, got {path.name!r}")
    return atomic_write_bytes(path, encode_audio(samples, sample_rate=sample_rate, format=formats[path.suffix.lower()]))


def _decode(path: Path, first_frame: int, wanted_frames: int) -> Iterator[np.ndarray]:
    with sf.SoundFile(str(path)) as file:
        if first_frame:
            file.seek(first_frame)
        while wanted_frames > 0:
            block = file.read(min(_BLOCK_FRAMES, wanted_frames), dtype="float32", always_2d=True)
            if not len(block):
                return
            wanted_frames -= len(block)
            yield block.mean(1) if block.shape[1] > 1 else block[:, 0]


@contextmanager
def _open_packets(path: Path) -> Iterator[tuple[Any, Any]]:
    """FFmpeg's container of a file and its first audio stream. FFmpeg reads this one file and nothing else."""
    import av  # it takes half a second, and most files do not need it

    options = {"format_whitelist": _CONTAINERS}
    with path.open("rb") as file, av.open(file, options=options, metadata_errors="replace") as container:
        if not container.streams.audio:
            raise AudioError("no audio stream in it", path)
        yield container, container.streams.audio[0]


def _walk(path: Path, *, otherwise: str) -> AudioInfo:
    """Length by the durations of all packets; nothing is decoded.

    Raises:
        AudioError: FFmpeg does not know the file either; `otherwise` says why.
    """
    try:
        with _open_packets(path) as (container, stream):
            seconds = sum(packet.duration * packet.time_base for packet in container.demux(stream) if packet.duration)
            rate, channels, name = stream.rate or 0, stream.channels, container.format.name.split(",")[0]
    except AudioError:
        raise
    except ImportError:
        raise AudioError(f"{otherwise}; files of this kind are read by PyAV: pip install av", path) from None
    except Exception as error:  # FFmpeg's errors are of several types
        raise AudioError(f"{otherwise}; FFmpeg: {getattr(error, 'strerror', None) or _short(error)}", path) from None
    frames = round(seconds * rate)
    return AudioInfo(
        duration_seconds=frames / max(1, rate), sample_rate_hz=rate, channels=channels, frames=frames, format=name, counted=False
    )


def _decode_packets(path: Path, first_frame: int, wanted_frames: int) -> Iterator[np.ndarray]:
    """Decodes with FFmpeg, from the clip's beginning, because without a sample count no position can be looked up."""
    import av

    with _open_packets(path) as (container, stream):
        as_float = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        for frame in container.decode(stream):
            for plane in as_float.resample(frame):
                block = plane.to_ndarray().mean(0)[first_frame:][:wanted_frames]
                first_frame = max(0, first_frame - plane.samples)
                wanted_frames -= len(block)
                if len(block):
                    yield block
                if wanted_frames <= 0:
                    return


def _short(error: BaseException) -> str:
    """The last part of an error's text, which says what is wrong; libsndfile puts the path before it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return (text.rsplit(": ", 1)[-1] or type(error).__name__)[:120]
