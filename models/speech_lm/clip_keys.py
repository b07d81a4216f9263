"""The name of an example's clip, what is known of it, and the error of everything that concerns its features."""

from __future__ import annotations

from typing import NamedTuple

from models.data.example import Example


class FeatureError(RuntimeError):
    """Features are missing, damaged, or too many clips could not be read."""


def clip_key(example: Example) -> str:
    """Name of an example's clip: file and span, e.g. "queen/joe.wav@0.0-None". Empty for a text-only example."""
    if example.audio is None:
        return ""
    return f"{example.audio}@{example.start_seconds}-{example.end_seconds}"


class Clip(NamedTuple):
    """What features were made of: seconds of sound in the span, and the first 16 hex digits of its file's SHA-256."""

    seconds: float
    sha256: str
