"""Making clips comparable and hard: one band, one level, a length limit, noise of a given level; all by given seeds."""

from __future__ import annotations

import numpy as np

from models.data.audio import SAMPLE_RATE_HZ, resample

BAND_RATE_HZ = 8_000
LEVEL_RMS = 0.05
_RUMBLE_WINDOW = 200  # samples of 16 kHz: takes what lies below about 80 Hz out of the brown noise


def prepare_clip(
    samples: np.ndarray,
    rate_hz: int,
    *,
    snr_db: float | None,
    rng: np.random.Generator,
    max_seconds: float,
) -> np.ndarray:
    """Bring a recording to 16 kHz, the band of an 8 kHz recording, at most `max_seconds` and one level; add noise.

    Sources differ in band and level, and a model would tell them apart by these. The level is normalised again after
    the noise is added, so that it gives nothing away about the noise either.

    Args:
        samples: float (samples,) at `rate_hz`.
        snr_db: energy of speech over energy of noise, in dB over the whole clip; None adds no noise.
        rng: chooses the kind of noise (white or brown, with equal chances) and makes it.
        max_seconds: what is longer is cut.

    Returns:
        float32 (samples,) at 16 kHz with root mean square 0.05 (silence stays silence).

    Raises:
        ValueError: `samples` is empty or not one-dimensional.
    """
    samples = np.asarray(samples, np.float32)
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"samples: expected shape (samples,) with at least one, got {samples.shape}")
    narrow = resample(resample(samples, rate_hz, BAND_RATE_HZ), BAND_RATE_HZ, SAMPLE_RATE_HZ)
    speech = _at_level(narrow[: int(max_seconds * SAMPLE_RATE_HZ)])
    if snr_db is None or not speech.size:
        return speech
    noise = make_noise(len(speech), rng=rng)
    return _at_level(speech + noise * np.float32(LEVEL_RMS * 10.0 ** (-snr_db / 20.0)))


def make_noise(count: int, *, rng: np.random.Generator) -> np.ndarray:
    """float32 (count,) noise of root mean square 1: white, or brown without its rumble, with equal chances."""
    brown = rng.random() < 0.5
    noise = rng.standard_normal(count)
    if brown:
        noise = np.cumsum(noise)
        noise -= _moving_mean(noise, _RUMBLE_WINDOW)
    return (noise / (np.sqrt(np.mean(noise**2)) + 1e-9)).astype(np.float32)


def _at_level(samples: np.ndarray) -> np.ndarray:
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if samples.size else 0.0
    return samples if rms < 1e-6 else (samples * np.float32(LEVEL_RMS / rms)).astype(np.float32)


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over `window` values around each one; at the ends over those that there are."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - window // 2, 0), np.minimum(index + window - window // 2, len(values))
    return (sums[last] - sums[first]) / (last - first)
