"""Encoder features: the audio encoder is frozen, so each clip goes through it once.

    python -m models features MANIFEST --model SPEECH_LM_FOLDER --out features.safetensors

The result is one safetensors file: `features` (n, K, T, D) float16. Its metadata say what made them: encoder, layers, frames
and window. They also have each clip's key, its length and the SHA-256 of its file. A key is file and span, so a clip that
stands in three prompts is stored once. All commands go through `clip_features`. It reads such a file or encodes the clips now,
and it refuses features of another encoder or of other sound.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from models.data.audio import MAX_SECONDS, SAMPLE_RATE_HZ, AudioError, load_audio
from models.data.manifest import Example
from models.data.readers import read_data
from models.io_utils import atomic_write_bytes, sha256_file
from models.speech_lm.commands import features_parser

_LINES_SHOWN = 20
_CUT_TOLERANCE_SECONDS = 0.1  # an encoder's padding


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


def made_by(model: Any) -> dict[str, Any]:
    """What decides the features of a SpeechLM: its encoder's weights and the settings that it hears with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    config = model.config
    return {
        "encoder": digest.hexdigest()[:16],
        "encoder_layers": list(config.encoder_layers),
        "audio_frames": config.audio_frames,
        "max_audio_seconds": config.max_audio_seconds,
    }


class FeatureStore:
    """Features by clip key, in memory: (n, K, T, D) float16.

    Args:
        keys: one for each row.
        features: (n, K, T, D), any float dtype; kept as float16.
        made_by: see the function of that name; None for features of unknown origin, which `check_origin` refuses.
        clips: what each row was made of, in the order of `keys`.
    """

    def __init__(
        self,
        keys: Sequence[str],
        features: torch.Tensor,
        *,
        made_by: dict[str, Any] | None = None,
        clips: Sequence[Clip] | None = None,
    ) -> None:
        if features.dim() != 4 or len(keys) != len(features):
            raise ValueError(f"features: expected ({len(keys)}, K, T, D), got {tuple(features.shape)}")
        if clips is not None and len(clips) != len(keys):
            raise ValueError(f"clips: expected {len(keys)}, one for each key, got {len(clips)}")
        self.features = features.to(torch.float16)
        self.made_by = made_by
        self._row = {key: i for i, key in enumerate(keys)}
        if len(self._row) != len(keys):
            raise ValueError("keys: expected each key once, got some twice")
        self._clips = None if clips is None else dict(zip(keys, clips, strict=True))

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

    def clip(self, example: Example) -> Clip | None:
        """What an example's features were made of; None where that is not known."""
        return None if self._clips is None else self._clips.get(clip_key(example))

    def check_origin(self, model: Any) -> None:
        """Whether `model` would make these features.

        Raises:
            FeatureError: another encoder, other layers, frames or window made them, or nobody knows.
        """
        if self.made_by is None:
            raise FeatureError("the features do not say what made them; make them again: python -m models features")
        wanted = made_by(model)
        for name, value in wanted.items():
            if self.made_by.get(name) != value:
                raise FeatureError(f"the features were made with {name} {self.made_by.get(name)}, the model hears with {value}")

    def check_sound(self, examples: Iterable[Example], audio_root: str | Path) -> int:
        """Whether the clips' files still hold the sound that the features were made of.

        Returns:
            clips that could not be compared, because their files are not under `audio_root`.

        Raises:
            FeatureError: a file holds other sound; the message names the first.
        """
        known: dict[str, str | None] = {}
        missing, changed = set(), {}
        for example in examples:
            clip = self.clip(example)
            if clip is None:
                continue
            if example.audio not in known:
                path = Path(audio_root) / example.audio
                known[example.audio] = sha256_file(path)[:16] if path.is_file() else None
            if known[example.audio] is None:
                missing.add(example.audio)
            elif known[example.audio] != clip.sha256:
                changed.setdefault(example.audio, example.id)
        if changed:
            audio, first = next(iter(changed.items()))
            raise FeatureError(f"{len(changed)} clips hold other sound than the features were made of; example {first}: {audio}")
        return len(missing)

    def save(self, path: str | Path) -> Path:
        """Write atomically as safetensors."""
        metadata = {"keys": json.dumps(list(self._row)), "made_by": json.dumps(self.made_by)}
        if self._clips is not None:
            metadata["clips"] = json.dumps(list(self._clips.values()))
        return atomic_write_bytes(path, save({"features": self.features.contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStore:
        """Read what `save` wrote. Files of earlier versions are read too; they do not say what made them.

        Raises:
            FeatureError: no such file, or a file of another kind.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata()
                clips = [Clip(*clip) for clip in json.loads(metadata["clips"])] if "clips" in metadata else None
                origin = json.loads(metadata.get("made_by", "null"))
                return cls(json.loads(metadata["keys"]), file.get_tensor("features"), made_by=origin, clips=clips)
        except Exception as error:  # safetensors raises several unrelated types, and none names the file
            raise FeatureError(f"{path}: not a feature file: {error}") from error


def clip_features(
    model: Any,
    examples: Sequence[Example],
    *,
    audio_root: str | Path,
    features: str | Path | None = None,
    batch_clips: int = 8,
    max_seconds: float = MAX_SECONDS,
    max_bad_fraction: float = 0.05,
    max_cut_fraction: float = 1.0,
    progress_bar: bool = True,
    say: Callable[[str], None] = tqdm.write,
) -> tuple[FeatureStore, list[Example]]:
    """The features of the examples' clips, read from a file or encoded now.

    Args:
        model: the SpeechLM that hears.
        audio_root: folder of the audio.
        features: file of `python -m models features`; None encodes the clips.
        max_seconds: a longer clip cannot be read.
        max_bad_fraction: of the examples; more without features is an error.
        max_cut_fraction: of the clips; more that are longer than the model's window (`max_audio_seconds`) is an error.
        say: is told each example that is left out, and how many clips are cut.

    Returns:
        the store, and the examples that have features or no clip.

    Raises:
        FeatureError: too many clips are missing or cut, or the features are of another encoder or of other sound.
    """
    reasons: dict[str, str] = {}
    if features is not None:
        store = FeatureStore.load(features)
        try:
            store.check_origin(model)
            unseen = store.check_sound(examples, audio_root)
        except FeatureError as error:
            raise FeatureError(f"{features}: {error}") from None
        if unseen:
            say(f"{features}: the files of {unseen} clips are not in {audio_root}, so their sound was not compared")
    else:
        store, problems = extract_features(
            examples,
            model.encode_audio,
            audio_root=audio_root,
            batch_clips=batch_clips,
            max_seconds=max_seconds,
            max_bad_fraction=max_bad_fraction,
            made_by=made_by(model),
            progress_bar=progress_bar,
        )
        key_of = {example.id: clip_key(example) for example in examples}
        reasons = {key_of[example_id]: reason for example_id, reason in problems}
    usable = [e for e in examples if e.audio is None or e in store]
    left_out = [e for e in examples if e.audio is not None and e not in store]
    lines = [f"skipped {e.id}: {reasons.get(clip_key(e), f'{features} has no features of its clip')}" for e in left_out]
    for line in lines[:_LINES_SHOWN]:
        say(line)
    if len(lines) > _LINES_SHOWN:
        say(f"skipped {len(lines) - _LINES_SHOWN} more")
    if len(left_out) > max_bad_fraction * len(examples):
        share = f"{len(left_out)} of {len(examples)} examples have no features, more than {max_bad_fraction:.0%}"
        raise FeatureError(f"{features or 'audio'}: {share}")
    _check_window(model.config.max_audio_seconds, store, usable, max_cut_fraction, say)
    return store, usable


def _check_window(
    window_seconds: float, store: FeatureStore, examples: Sequence[Example], max_cut_fraction: float, say: Callable[[str], None]
) -> None:
    """Say how many clips the model hears only the beginning of; an error above `max_cut_fraction`."""
    clips = {clip_key(e): store.clip(e) for e in examples if e.audio is not None}
    cut = [clip.seconds for clip in clips.values() if clip is not None and clip.seconds > window_seconds + _CUT_TOLERANCE_SECONDS]
    if not cut:
        return
    line = (
        f"{len(cut)} of {len(clips)} clips are longer than the {window_seconds:g} s that the model hears (max_audio_seconds), "
        f"up to {max(cut):.1f} s: the rest of each is cut off"
    )
    if len(cut) > max_cut_fraction * len(clips):
        raise FeatureError(f"{line}; that is more than max_cut_fraction {max_cut_fraction:g}")
    say(line)


def extract_features(
    examples: Iterable[Example],
    encode: Callable[[list[np.ndarray]], torch.Tensor],
    *,
    audio_root: str | Path,
    batch_clips: int = 8,
    max_seconds: float = 30.0,
    max_bad_fraction: float = 0.05,
    made_by: dict[str, Any] | None = None,
    progress_bar: bool = True,
) -> tuple[FeatureStore, list[tuple[str, str]]]:
    """Encode every clip of `examples` once.

    Args:
        encode: waveforms (16 kHz mono float32) -> (B, K, T, D); `SpeechLM.encode_audio`.
        made_by: what `encode` is, for the store; see the function of that name.

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
    heard: list[Clip] = []
    out: list[torch.Tensor] = []
    problems: list[tuple[str, str]] = []
    bar = tqdm(clips.items(), desc="encode clips", unit="clip", disable=not progress_bar)
    waves = _read_clips(bar, audio_root, max_seconds, problems)
    while batch := list(itertools.islice(waves, batch_clips)):
        encoded = encode([wave for _, wave in batch]).to(torch.float16).cpu()  # float16 has only inf beyond 65504
        finite = encoded.flatten(1).isfinite().all(1)
        out.append(encoded[finite])
        for (key, wave), good in zip(batch, finite.tolist(), strict=True):
            if good:
                keys.append(key)
                heard.append(Clip(len(wave) / SAMPLE_RATE_HZ, sha256_file(Path(audio_root) / clips[key].audio)[:16]))
            else:
                problems.append((clips[key].id, f"{clips[key].audio}: the encoder's features are not finite in float16"))
    if len(problems) > max_bad_fraction * max(1, len(clips)):
        listed = "; ".join(f"{i}: {reason}" for i, reason in problems[:5])
        raise FeatureError(f"{len(problems)} of {len(clips)} clips could not be read (max {max_bad_fraction:.0%}): {listed}")
    if not keys:
        raise FeatureError("examples: expected at least one clip that can be encoded, got none")
    return FeatureStore(keys, torch.cat(out), made_by=made_by, clips=heard), problems


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
        manifest = read_data(
            arguments.manifest, audio_root=arguments.audio_root, allow_links=arguments.allow_links
        )
        for problem in manifest.problems:
            print(f"skipped {problem}")
        model = SpeechLM.from_pretrained(arguments.model)
        store, _ = clip_features(
            model,
            manifest.examples,
            audio_root=manifest.audio_root,
            batch_clips=arguments.batch_clips,
            max_cut_fraction=arguments.max_cut_fraction,
            say=print,
        )
        store.save(arguments.out)
    except (FeatureError, BackboneError, SpeechLMError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(store)} clips, {tuple(store.features.shape[1:])} each -> {arguments.out}")
    return 0
