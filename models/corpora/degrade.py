"""Makes clips comparable and hard: one band, one level, a length limit, and noise of a given level, all by given seeds.

For the tasks about band and room a clip goes through a `Channel` of its own. Noise is added after the channel, so that the
frequencies that the channel removes are not silent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.data.audio import SAMPLE_RATE_HZ, resample

BAND_RATE_HZ = 8_000
LEVEL_RMS = 0.05
_RUMBLE_WINDOW = 200  # samples of 16 kHz: removes what lies below about 80 Hz from the brown noise
_WIDE_RATE_HZ = 11_025  # of the Amazon Queen recordings
_TELEPHONE_HZ = (300.0, 3_400.0)
_BAND_EDGE_HZ = 100.0
_TRIM_FRAME_SECONDS = 0.02
TRIM_MARGIN_SECONDS = 0.06  # of silence that is left at each end
_TRIM_BELOW_PEAK_DB = 40.0
_DIRECT_SECONDS = 0.005
BANDS = ("common", "wide", "narrow")


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What is done to a recording before noise is added.

    Args:
        band: "common" is the band of an 8 kHz recording, "wide" that of an 11 kHz recording, "narrow" a telephone's 300 to
            3400 Hz.
        reverberation_seconds: time in which a room's echo falls by 60 dB. The echo has the energy of the direct sound. None
            is no room.
        trim: cut the silence at both ends, whose length differs between sources.
        noise_in_band: whether the noise has the band of an 8 kHz recording too. If it has not, the empty upper band marks a
            clip without noise.

    Raises:
        ValueError: a value outside its range.
    """

    band: str = "common"
    reverberation_seconds: float | None = None
    trim: bool = False
    noise_in_band: bool = False

    def __post_init__(self) -> None:
        if self.band not in BANDS:
            raise ValueError(f"band: expected one of {list(BANDS)}, got {self.band!r}")
        if self.reverberation_seconds is not None and not 0.0 < self.reverberation_seconds <= 10.0:
            raise ValueError(f"reverberation_seconds: expected above 0 to 10, got {self.reverberation_seconds:g}")


def prepare_clip(
    samples: np.ndarray,
    rate_hz: int,
    *,
    snr_db: float | None,
    rng: np.random.Generator,
    max_seconds: float,
    channel: Channel = Channel(),
) -> np.ndarray:
    """Bring a recording to 16 kHz, to its channel's band, to at most `max_seconds` and to one level; add noise.

    Sources differ in band and level, and a model could tell them apart by these. The level is normalised again after
    the noise is added, so that it does not tell how much noise there is.

    Args:
        samples: float (samples,) at `rate_hz`.
        snr_db: energy of speech over energy of noise, in dB over the whole clip; None adds no noise.
        rng: makes the room's echo, then chooses the kind of noise (white or brown, with equal chances) and makes it.
        max_seconds: longer recordings are cut.
        channel: band and room, and whether the silence at the ends is cut.

    Returns:
        float32 (samples,) at 16 kHz with root mean square 0.05 (silence stays silence).

    Raises:
        ValueError: `samples` is empty or not one-dimensional.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"samples: expected shape (samples,) with at least one, got {samples.shape}")
    if channel.trim:
        samples = trim_silence(samples, rate_hz)
    speech = band_limited(samples, rate_hz, channel.band)[: int(max_seconds * SAMPLE_RATE_HZ)]
    if channel.reverberation_seconds is not None and speech.size:
        speech = _reverberated(speech, channel.reverberation_seconds, rng)
    speech = _at_level(speech)
    if snr_db is None or not speech.size:
        return speech
    noise = make_noise(len(speech), rng=rng)
    if channel.noise_in_band:
        noise = band_limited(noise, SAMPLE_RATE_HZ, "common")[: len(speech)]
        noise = _unit_rms(np.pad(noise, (0, len(speech) - len(noise))))
    return _at_level(speech + noise * np.float32(LEVEL_RMS * 10.0 ** (-snr_db / 20.0)))


def trim_silence(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """`samples` (n,) without their silent ends, 40 dB or more below the loudest 20 ms; 60 ms of each end are left."""
    size = max(1, int(_TRIM_FRAME_SECONDS * rate_hz))
    count = len(samples) // size
    if count < 2:
        return samples
    energy = np.square(samples[: count * size], dtype=np.float64).reshape(count, size).mean(1)
    loud = np.flatnonzero(energy > energy.max() * 10.0 ** (-_TRIM_BELOW_PEAK_DB / 10.0))
    if not loud.size:  # silence
        return samples
    margin = int(TRIM_MARGIN_SECONDS * rate_hz)
    return samples[max(0, loud[0] * size - margin) : (loud[-1] + 1) * size + margin]


def band_limited(samples: np.ndarray, rate_hz: int, band: str) -> np.ndarray:
    """float32 (samples,) at 16 kHz in one of BANDS, from `samples` at `rate_hz`."""
    if band == "common":
        return resample(resample(samples, rate_hz, BAND_RATE_HZ), BAND_RATE_HZ, SAMPLE_RATE_HZ)
    wide = resample(resample(samples, rate_hz, _WIDE_RATE_HZ), _WIDE_RATE_HZ, SAMPLE_RATE_HZ)
    if band == "wide" or not wide.size:
        return wide
    low, high = _TELEPHONE_HZ
    frequency = np.fft.rfftfreq(len(wide), 1.0 / SAMPLE_RATE_HZ)
    # Edges of half a cosine, since an abrupt edge would ring.
    rise = np.clip((frequency - low) / _BAND_EDGE_HZ + 0.5, 0.0, 1.0)
    fall = np.clip((high - frequency) / _BAND_EDGE_HZ + 0.5, 0.0, 1.0)
    gain = np.sin(0.5 * np.pi * np.minimum(rise, fall)) ** 2
    return np.fft.irfft(np.fft.rfft(wide) * gain, len(wide)).astype(np.float32)


def _reverberated(speech: np.ndarray, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """The sound in a room: the direct sound and decaying noise of the same energy, cut to the length of the dry sound."""
    time = np.arange(int(min(1.5 * seconds, 4.0) * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    response = rng.standard_normal(len(time)) * np.exp(-np.log(1000.0) * time / seconds)
    response[time < _DIRECT_SECONDS] = 0.0
    response /= np.sqrt(np.sum(response**2)) + 1e-9
    response[0] = 1.0
    size = len(speech) + len(response)
    wet = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(response, size), size)
    return wet[: len(speech)].astype(np.float32)


def make_noise(count: int, *, rng: np.random.Generator) -> np.ndarray:
    """float32 (count,) noise of root mean square 1: white, or brown without its rumble, with equal chances."""
    brown = rng.random() < 0.5
    noise = rng.standard_normal(count)
    if brown:
        noise = np.cumsum(noise)
        noise -= _moving_mean(noise, _RUMBLE_WINDOW)
    return _unit_rms(noise)


def _unit_rms(noise: np.ndarray) -> np.ndarray:
    return (noise / (np.sqrt(np.mean(noise**2)) + 1e-9)).astype(np.float32)


def _at_level(samples: np.ndarray) -> np.ndarray:
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if samples.size else 0.0
    return samples if rms < 1e-6 else (samples * np.float32(LEVEL_RMS / rms)).astype(np.float32)


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each value; at the ends, of the fewer values that there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - window // 2, 0), np.minimum(index + window - window // 2, len(values))
    return (sums[last] - sums[first]) / (last - first)
