"""Runs every clip through the frozen encoder once, into memory or into shards on disk; clips are decoded ahead by threads."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from models.corpora.hearing import PLAIN, Hearing
from models.data.audio import MAX_SECONDS, SAMPLE_RATE_HZ, AudioError, load_at_own_rate, resample
from models.data.example import Example
from models.io_utils import sha256_file
from models.speech_lm.clip_keys import Clip, FeatureError, clip_key
from models.speech_lm.feature_files import write_shard
from models.speech_lm.feature_store import FeatureStore

SHARD_MIB = 64.0
Resample = Callable[[list[np.ndarray], list[int]], list[np.ndarray]]  # clips and their rates -> clips at SAMPLE_RATE_HZ
_BEYOND_FLOAT16 = 65_520.0  # from here on float16 rounds to infinity
_READERS = min(8, os.cpu_count() or 1)


def write_features(
    folder: str | Path,
    examples: Iterable[Example],
    encode: Callable[[list[np.ndarray]], torch.Tensor],
    *,
    audio_root: str | Path,
    made_by: dict[str, Any] | None,
    batch_clips: int = 8,
    shard_mib: float = SHARD_MIB,
    max_seconds: float = MAX_SECONDS,
    hears: Hearing = PLAIN,
    progress_bar: bool = True,
    resample_together: Resample | None = None,
) -> list[tuple[str, str]]:
    """Encode every clip once into shards; at most one shard is in memory.

    Args:
        encode, made_by, hears, resample_together: as for `extract_features`.

    Returns:
        (example id, reason) of each clip that could not be read, or whose features are not finite.
    """
    problems: list[tuple[str, str]] = []
    keys: list[str] = []
    clips: list[Clip] = []
    parts: list[torch.Tensor] = []

    def flush() -> None:
        if keys:
            write_shard(folder, keys, torch.cat(parts), made_by=made_by, clips=clips)
        for each in (keys, clips, parts):
            each.clear()

    options: dict[str, Any] = {"audio_root": audio_root, "batch_clips": batch_clips, "max_seconds": max_seconds, "hears": hears}
    options |= {"progress_bar": progress_bar, "resample_together": resample_together}
    for some_keys, some_clips, encoded in _encoded(examples, encode, problems, **options):
        keys += some_keys
        clips += some_clips
        parts.append(encoded)
        if len(keys) * encoded[0].nbytes >= shard_mib * (1 << 20):
            flush()
    flush()
    return problems


def extract_features(
    examples: Iterable[Example],
    encode: Callable[[list[np.ndarray]], torch.Tensor],
    *,
    audio_root: str | Path,
    batch_clips: int = 8,
    max_seconds: float = 30.0,
    max_bad_fraction: float = 0.05,
    made_by: dict[str, Any] | None = None,
    hears: Hearing = PLAIN,
    progress_bar: bool = True,
    resample_together: Resample | None = None,
) -> tuple[FeatureStore, list[tuple[str, str]]]:
    """Encode every clip of `examples` once, into memory.

    Args:
        encode: waveforms (16 kHz mono float32) -> (B, K, T, D); `SpeechLM.encode_audio`.
        made_by: what `encode` is, for the store; see the function of that name.
        hears: what is done to a clip before it is encoded.
        resample_together: resamples a batch; None = each clip by soxr, while it is read.

    Returns:
        the store, and (example id, reason) of each clip that could not be read, or whose features are not finite.

    Raises:
        ValueError: `batch_clips` is below 1.
        FeatureError: more than `max_bad_fraction` of the clips could not be read; the message lists the first.
    """
    problems: list[tuple[str, str]] = []
    options: dict[str, Any] = {"audio_root": audio_root, "batch_clips": batch_clips, "max_seconds": max_seconds, "hears": hears}
    options |= {"progress_bar": progress_bar, "resample_together": resample_together}
    clips = {clip_key(e): e for e in examples if e.audio is not None}
    made = list(_encoded(clips.values(), encode, problems, **options))
    refuse_if_too_many(problems, len(clips), max_bad_fraction)
    if not made:
        raise FeatureError("examples: expected at least one clip that can be encoded, got none")
    keys = [key for some, _, _ in made for key in some]
    heard = [clip for _, some, _ in made for clip in some]
    return FeatureStore(keys, torch.cat([encoded for _, _, encoded in made]), made_by=made_by, clips=heard), problems


def refuse_if_too_many(problems: Sequence[tuple[str, str]], clips: int, max_bad_fraction: float) -> None:
    if len(problems) > max_bad_fraction * max(1, clips):
        listed = "; ".join(f"{i}: {reason}" for i, reason in problems[:5])
        raise FeatureError(f"{len(problems)} of {clips} clips could not be read (max {max_bad_fraction:.0%}): {listed}")


def _encoded(
    examples: Iterable[Example],
    encode: Callable[[list[np.ndarray]], torch.Tensor],
    problems: list[tuple[str, str]],
    *,
    audio_root: str | Path,
    batch_clips: int,
    max_seconds: float,
    hears: Hearing,
    progress_bar: bool,
    resample_together: Resample | None,
) -> Iterator[tuple[list[str], list[Clip], torch.Tensor]]:
    """Keys, clips and features (n, K, T, D) float16 of batch after batch; what goes wrong with a clip goes to `problems`."""
    if batch_clips < 1:
        raise ValueError(f"batch_clips: expected at least 1, got {batch_clips}")
    clips = {clip_key(e): e for e in examples if e.audio is not None}
    bar = tqdm(clips.items(), desc="encode clips", unit="clip", disable=not progress_bar)
    waves = _read_clips(bar, audio_root, max_seconds, problems, hears, own_rate=resample_together is not None)
    while read := list(itertools.islice(waves, batch_clips)):
        heard = [wave for _, wave, _, _ in read]
        if resample_together is not None:
            resampled = resample_together(heard, [rate for _, _, rate, _ in read])
            heard = [hears.sound(wave, key) for wave, (key, _, _, _) in zip(resampled, read, strict=True)]
        batch = [(key, wave, sha) for (key, _, _, sha), wave in zip(read, heard, strict=True)]
        made = encode(heard)
        finite = (made.flatten(1).abs().amax(1) < _BEYOND_FLOAT16).cpu()  # False for NaN too
        encoded = made.to(torch.float16).cpu()
        for (key, _, _), good in zip(batch, finite.tolist(), strict=True):
            if not good:
                problems.append((clips[key].id, f"{clips[key].audio}: the encoder's features are not finite in float16"))
        kept = [each for each, good in zip(batch, finite.tolist(), strict=True) if good]
        if kept:
            yield [key for key, _, _ in kept], [Clip(len(wave) / SAMPLE_RATE_HZ, sha) for _, wave, sha in kept], encoded[finite]


def _read_clips(
    clips: Iterable[tuple[str, Example]],
    audio_root: str | Path,
    max_seconds: float,
    problems: list[tuple[str, str]],
    hears: Hearing,
    *,
    own_rate: bool,
) -> Iterator[tuple[str, np.ndarray, int, str]]:
    """Key, waveform, its rate and the file's hash of each clip that can be read, in order; (example id, reason) of the others
    goes to `problems`. With `own_rate` a clip is neither resampled nor changed yet. A few clips are decoded ahead by threads:
    decoding and hashing release Python's lock.
    """

    def read(example: Example) -> tuple[np.ndarray, int, str]:
        path = Path(audio_root) / example.audio
        wave, rate = load_at_own_rate(
            path, start_seconds=example.start_seconds, end_seconds=example.end_seconds, max_seconds=max_seconds
        )
        if not own_rate:
            wave, rate = hears.sound(resample(wave, rate, SAMPLE_RATE_HZ), clip_key(example)), SAMPLE_RATE_HZ
        return wave, rate, sha256_file(path)[:16]

    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[tuple[str, Example, Future[tuple[np.ndarray, int, str]]]] = deque()
        waiting = iter(clips)
        while True:
            for key, example in itertools.islice(waiting, 2 * _READERS - len(ahead)):
                ahead.append((key, example, pool.submit(read, example)))
            if not ahead:
                return
            key, example, reading = ahead.popleft()
            try:
                wave, rate, sha = reading.result()
            except AudioError as error:
                problems.append((example.id, str(error)))
            else:
                yield key, wave, rate, sha
