"""Recordings of equal length, so that the length of a clip does not tell its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.corpora.degrade import trim_silence
from models.corpora.plans.base import Decodable, SoundFile
from models.data.audio import SAMPLE_RATE_HZ, AudioError, load_audio


@dataclass(frozen=True)
class OfLength:
    """A recording without the silence at its ends, cut or filled with silence, so that its length does not tell the label."""

    sound: Decodable | SoundFile
    seconds: float

    def decode(self) -> tuple[np.ndarray, int]:
        samples, rate_hz = _trimmed(self.sound)
        count = round(self.seconds * rate_hz)
        return np.pad(samples[:count], (0, max(0, count - len(samples)))), rate_hz


def seconds_of(sound: Decodable | SoundFile) -> float:
    """The length without the silence at both ends; 0 for a recording that cannot be read, which is not chosen then."""
    try:
        samples, rate_hz = _trimmed(sound)
    except AudioError:
        return 0.0
    return len(samples) / rate_hz


def _trimmed(sound: Decodable | SoundFile) -> tuple[np.ndarray, int]:
    samples, rate_hz = sound.decode() if isinstance(sound, Decodable) else (load_audio(sound.path), SAMPLE_RATE_HZ)
    return trim_silence(samples, rate_hz), rate_hz
