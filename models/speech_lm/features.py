"""Encoder features on disk: the Whisper encoder is frozen, so each clip goes through it once.

    python -m models features MANIFEST --model SPEECH_LM_FOLDER --out features.safetensors

The result is one safetensors file: `features` (n, K, T, D) float16, with the clips' keys in its metadata. A clip's key is its
file and span, so a clip that stands in three prompts is stored once.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from models.data.audio import AudioError, load_audio
from models.data.manifest import Example, read_manifest
from models.io_utils import atomic_write_bytes
from models.speech_lm.commands import features_parser


class FeatureError(RuntimeError):
    """Features are missing, damaged, or too many clips could not be read."""


def clip_key(example: Example) -> str:
    """Name of an example's clip: file and span, e.g. "queen/joe.wav@0.0-None". Empty for a text-only example."""
    if example.audio is None:
        return ""
    return f"{example.audio}@{example.start_seconds}-{example.end_seconds}"


class FeatureStore:
    """Features by clip key, in memory: (n, K, T, D) float16.

    Args:
        keys: one for each row.
        features: (n, K, T, D), any float dtype; kept as float16.
    """

    def __init__(self, keys: Sequence[str], features: torch.Tensor) -> None:
        if features.dim() != 4 or len(keys) != len(features):
            raise ValueError(f"features: expected ({len(keys)}, K, T, D), got {tuple(features.shape)}")
        self.features = features.to(torch.float16)
        self._row = {key: i for i, key in enumerate(keys)}
        if len(self._row) != len(keys):
            raise ValueError("keys: expected each key once, got some twice")

    def __contains__(self, example: Example) -> bool:
        return clip_key(example) in self._row

    def __len__(self) -> int:
        return len(self._row)

    def rows(self, examples: Sequence[Example]) -> torch.Tensor:
        """(B, K, T, D) float32; zeros for an example without audio (mask it by audio_present)."""
        out = torch.zeros(len(examples), *self.features.shape[1:])
        for b, example in enumerate(examples):
            if example.audio is not None:
                try:
                    out[b] = self.features[self._row[clip_key(example)]]
                except KeyError:
                    raise FeatureError(f"example {example.id}: no features of clip {clip_key(example)}") from None
        return out

    def save(self, path: str | Path) -> Path:
        """Write atomically as safetensors."""
        metadata = {"keys": json.dumps(list(self._row))}
        return atomic_write_bytes(path, save({"features": self.features.contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStore:
        """Read what `save` wrote.

        Raises:
            FeatureError: no such file, or a file of another kind.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                return cls(json.loads(file.metadata()["keys"]), file.get_tensor("features"))
        except Exception as error:  # safetensors raises several unrelated types, and none names the file
            raise FeatureError(f"{path}: not a feature file: {error}") from error


def extract_features(
    examples: Iterable[Example],
    encode: Callable[[list[np.ndarray]], torch.Tensor],
    *,
    audio_root: str | Path,
    batch_clips: int = 8,
    max_seconds: float = 30.0,
    max_bad_fraction: float = 0.05,
    progress_bar: bool = True,
) -> tuple[FeatureStore, list[tuple[str, str]]]:
    """Encode every clip of `examples` once.

    Args:
        encode: waveforms (16 kHz mono float32) -> (B, K, T, D); `SpeechLM.encode_audio`.

    Returns:
        the store, and (example id, reason) of each clip that could not be read, or whose features are not finite.

    Raises:
        ValueError: `batch_clips` is below 1.
        FeatureError: more than `max_bad_fraction` of the clips could not be read; the message lists the first.
    """
    if batch_clips < 1:
        raise ValueError(f"batch_clips: expected at least 1, got {batch_clips}")
    clips = {clip_key(e): e for e in examples if e.audio is not None}
    keys: list[str] = []
    out: list[torch.Tensor] = []
    problems: list[tuple[str, str]] = []
    bar = tqdm(clips.items(), desc="encode clips", unit="clip", disable=not progress_bar)
    waves = _read_clips(bar, audio_root, max_seconds, problems)
    while batch := list(itertools.islice(waves, batch_clips)):
        encoded = encode([wave for _, wave in batch]).to(torch.float16).cpu()  # float16 has only inf beyond 65504
        finite = encoded.flatten(1).isfinite().all(1)
        out.append(encoded[finite])
        for (key, _), good in zip(batch, finite.tolist(), strict=True):
            if good:
                keys.append(key)
            else:
                problems.append((clips[key].id, f"{clips[key].audio}: the encoder's features are not finite in float16"))
    if len(problems) > max_bad_fraction * max(1, len(clips)):
        listed = "; ".join(f"{i}: {reason}" for i, reason in problems[:5])
        raise FeatureError(f"{len(problems)} of {len(clips)} clips could not be read (max {max_bad_fraction:.0%}): {listed}")
    if not keys:
        raise FeatureError("examples: expected at least one clip that can be encoded, got none")
    return FeatureStore(keys, torch.cat(out)), problems


def _read_clips(
    clips: Iterable[tuple[str, Example]], audio_root: str | Path, max_seconds: float, problems: list[tuple[str, str]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Key and waveform of each clip that can be read; (example id, reason) of the others goes to `problems`."""
    for key, example in clips:
        try:
            wave = load_audio(
                Path(audio_root) / example.audio,
                start_seconds=example.start_seconds,
                end_seconds=example.end_seconds,
                max_seconds=max_seconds,
            )
        except AudioError as error:
            problems.append((example.id, str(error)))
        else:
            yield key, wave


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    from models.backbones.resolve import BackboneError
    from models.speech_lm.model import SpeechLM, SpeechLMError

    arguments = features_parser().parse_args(argv)
    try:
        manifest = read_manifest(arguments.manifest, audio_root=arguments.audio_root)
        for problem in manifest.problems:
            print(f"skipped {problem}")
        model = SpeechLM.from_pretrained(arguments.model)
        store, problems = extract_features(
            manifest.examples, model.encode_audio, audio_root=manifest.audio_root, batch_clips=arguments.batch_clips
        )
        store.save(arguments.out)
    except (FeatureError, BackboneError, SpeechLMError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for example_id, reason in problems:
        print(f"skipped {example_id}: {reason}")
    print(f"{len(store)} clips, {tuple(store.features.shape[1:])} each -> {arguments.out}")
    return 0
