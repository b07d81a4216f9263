"""The name of an example's clip, what is known of it, and the error of everything that concerns its features."""

from __future__ import annotations

from typing import NamedTuple

from models.corpora.hearing import clip_key

__all__ = ["Clip", "FeatureError", "clip_key"]


class FeatureError(RuntimeError):
    """Features are missing, damaged, or too many clips could not be read."""


class Clip(NamedTuple):
    """What features were made of: seconds of sound in the span, and the first 16 hex digits of its file's SHA-256."""

    seconds: float
    sha256: str
