"""Clips as waveforms, decoded when a batch needs them: memory does not grow with the number of clips."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

    def rows(self, examples: Sequence[Example]) -> np.ndarray:
        """(B,) of dtype object: the clip of each example as float32 (samples,), a tuple of several, or None.

        Raises:
            AudioError: a clip cannot be read; the message names the example.
        """
        made = np.empty(len(examples), dtype=object)
        with ThreadPoolExecutor(_READERS) as pool:  # decoding and resampling release Python's lock
            for row, clip in enumerate(pool.map(self._read, examples)):
                made[row] = clip
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
