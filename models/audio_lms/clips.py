"""Clips as waveforms, decoded when a batch needs them or just before: memory does not grow with the number of clips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from models.corpora.hearing import PLAIN, Hearing, span_key
from models.data.audio import MAX_SECONDS, AudioError, load_audio
from models.data.example import Example

_READERS = min(8, os.cpu_count() or 1)


class ClipReader:
    """Reads the clips of examples; it takes the place that a store of features has for a speech LM of this project.

    Args:
        audio_root: folder that the examples' paths are relative to.
        sampling_rate: of the waveforms, in Hz.
        max_seconds: a longer clip is an error.
        hears: what is done to a clip after it is decoded.
    """

    def __init__(
        self,
        audio_root: str | os.PathLike[str],
        *,
        sampling_rate: int,
        max_seconds: float = MAX_SECONDS,
        hears: Hearing = PLAIN,
    ) -> None:
        self.audio_root = Path(audio_root)
        self.sampling_rate = sampling_rate
        self.max_seconds = max_seconds
        self.hears = hears
        self._pool = ThreadPoolExecutor(_READERS)  # decoding and resampling release Python's lock
        self._ahead: dict[tuple[Any, ...], Future[Any]] = {}

    def gives_the_same_as(self, other: ClipReader) -> bool:
        """Whether both read the same waveforms: then one reader can serve two models, and no clip is decoded twice."""
        mine, theirs = ((r.audio_root, r.sampling_rate, r.max_seconds, r.hears.of_the_sound()) for r in (self, other))
        return mine == theirs

    def prefetch(self, examples: Sequence[Example]) -> None:
        """Start to decode these clips; `rows` then gives the same arrays sooner. The clips of the last call are forgotten."""
        ahead = {example.clips: self._ahead.get(example.clips) for example in examples}
        for key, reading in self._ahead.items():
            if key not in ahead:
                reading.cancel()
        by_clips = {example.clips: example for example in examples}
        self._ahead = {key: reading or self._pool.submit(self._read, by_clips[key]) for key, reading in ahead.items()}

    def rows(self, examples: Sequence[Example]) -> np.ndarray:
        """(B,) of dtype object: the clip of each example as float32 (samples,), a tuple of several, or None.

        Raises:
            AudioError: a clip cannot be read; the message names the example.
        """
        made = np.empty(len(examples), dtype=object)
        reading = [self._ahead.get(e.clips) or self._pool.submit(self._read, e) for e in examples]
        for row, clip in enumerate(reading):
            made[row] = clip.result()
        return made

    def _read(self, example: Example) -> np.ndarray | tuple[np.ndarray, ...] | None:
        heard = []
        for clip in example.clips:
            audio, start, end = clip
            try:
                samples = load_audio(
                    self.audio_root / audio,
                    start_seconds=start,
                    end_seconds=end,
                    sample_rate=self.sampling_rate,
                    max_seconds=self.max_seconds,
                )
            except AudioError as error:
                raise AudioError(f"example {example.id!r}: {error.reason}", error.path) from None
            heard.append(self.hears.sound(samples, span_key(clip), sample_rate=self.sampling_rate))
        return tuple(heard) if len(heard) > 1 else heard[0] if heard else None
