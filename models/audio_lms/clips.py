"""Clips as waveforms, decoded when a batch needs them or just before: memory does not grow with the number of clips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from models.data.audio import MAX_SECONDS, AudioError, load_audio
from models.data.example import Example

_READERS = min(8, os.cpu_count() or 1)


class ClipReader:
    """Reads the clips of examples; it takes the place that a store of features has for a speech LM of this project.

    Args:
        audio_root: folder that the examples' paths are relative to.
        sampling_rate: of the waveforms, in Hz.
        max_seconds: a longer clip is an error.
    """

    def __init__(self, audio_root: str | os.PathLike[str], *, sampling_rate: int, max_seconds: float = MAX_SECONDS) -> None:
        self.audio_root = Path(audio_root)
        self.sampling_rate = sampling_rate
        self.max_seconds = max_seconds
        self._pool = ThreadPoolExecutor(_READERS)  # decoding and resampling release Python's lock
        self._ahead: dict[tuple[Any, ...], Future[np.ndarray | None]] = {}

    def prefetch(self, examples: Sequence[Example]) -> None:
        """Start to decode these clips; `rows` then gives the same arrays sooner. The clips of the last call are forgotten."""
        ahead = {_span(example): self._ahead.get(_span(example)) for example in examples}
        for key, reading in self._ahead.items():
            if key not in ahead:
                reading.cancel()
        by_span = {_span(example): example for example in examples}
        self._ahead = {key: reading or self._pool.submit(self._read, by_span[key]) for key, reading in ahead.items()}

    def rows(self, examples: Sequence[Example]) -> np.ndarray:
        """(B,) of dtype object: the clip of each example as float32 (samples,), or None.

        Raises:
            AudioError: a clip cannot be read; the message names the example.
        """
        made = np.empty(len(examples), dtype=object)
        reading = [self._ahead.get(_span(e)) or self._pool.submit(self._read, e) for e in examples]
        for row, clip in enumerate(reading):
            made[row] = clip.result()
        return made

    def _read(self, example: Example) -> np.ndarray | None:
        if example.audio is None:
            return None
        try:
            return load_audio(
                self.audio_root / example.audio,
                start_seconds=example.start_seconds,
                end_seconds=example.end_seconds,
                sample_rate=self.sampling_rate,
                max_seconds=self.max_seconds,
            )
        except AudioError as error:
            raise AudioError(f"example {example.id!r}: {error.reason}", error.path) from None


def _span(example: Example) -> tuple[Any, ...]:
    return example.audio, example.start_seconds, example.end_seconds
