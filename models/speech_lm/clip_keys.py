"""The name of an example's clip, what is known of it and its file, and the error of everything that concerns its features."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from models.corpora.hearing import clip_key
from models.data.example import Example
from models.io_utils import sha256_file

__all__ = ["Clip", "FeatureError", "clip_key", "file_hashes"]

_READERS = min(8, os.cpu_count() or 1)


class FeatureError(RuntimeError):
    """Features are missing, damaged, or too many clips could not be read."""


class Clip(NamedTuple):
    """What features were made of: seconds of sound in the span, and the first 16 hex digits of its file's SHA-256."""

    seconds: float
    sha256: str


def file_hashes(examples: Iterable[Example], audio_root: str | os.PathLike[str]) -> dict[str, str | None]:
    """SHA-256 of each audio file of the examples, by its path in them; None of a file that is not there."""

    def read(audio: str) -> str | None:
        path = Path(audio_root) / audio
        return sha256_file(path) if path.is_file() else None

    files = list(dict.fromkeys(audio for example in examples for audio, _, _ in example.clips))
    with ThreadPoolExecutor(_READERS) as pool:  # reading and hashing release Python's lock
        return dict(zip(files, pool.map(read, files), strict=True))
