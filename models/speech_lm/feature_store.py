"""The features of clips by clip key, in memory or on disk, and the checks that they are what a model would make now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from models.corpora.hearing import PLAIN, Hearing
from models.data.example import Example
from models.speech_lm.clip_keys import Clip, FeatureError, clip_key, file_hashes
from models.speech_lm.feature_files import FeatureFiles, read_header, write_feature_file


def made_by(model: Any, hears: Hearing = PLAIN) -> dict[str, Any]:
    """What decides the features of a SpeechLM: its encoder's weights and the settings that it hears with.

    What makes the log-mel spectrograms is not among them: all backends give the same values, up to rounding. A clip that is
    heard as it is has no entry `hears`, like the files of earlier versions.
    """
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
        **({"hears": hears.of_the_sound()} if hears.of_the_sound() else {}),
    }


class ClipFeatures:
    """The features of clips by clip key; `FeatureStore` has them in memory, `MappedFeatures` on disk.

    Attributes:
        made_by: see the function of that name; None for features of unknown origin, which `check_origin` refuses.
        row_shape: (K, T, D).
    """

    made_by: dict[str, Any] | None
    row_shape: tuple[int, ...]

    def find(self, key: str) -> int | None:
        """The number of a clip's row; None without one."""
        raise NotImplementedError

    def read(self, numbers: Sequence[int]) -> torch.Tensor:
        """(n, K, T, D) float16 of these rows."""
        raise NotImplementedError

    def clip_at(self, number: int) -> Clip | None:
        """What a row was made of; None where that is not known."""
        raise NotImplementedError

    def __contains__(self, example: Example) -> bool:
        return self.find(clip_key(example)) is not None

    def rows(self, examples: Sequence[Example]) -> torch.Tensor:
        """(B, K, T, D) float32; zeros for an example without audio (mask it by audio_present)."""
        out = torch.zeros(len(examples), *self.row_shape)
        heard = {b: self.find(clip_key(example)) for b, example in enumerate(examples) if example.audio is not None}
        for b, number in heard.items():
            if number is None:
                raise FeatureError(f"example {examples[b].id}: no features of clip {clip_key(examples[b])}")
        if heard:
            out[list(heard)] = self.read(list(heard.values())).float()
        return out

    def clip(self, example: Example) -> Clip | None:
        """What an example's features were made of; None where that is not known."""
        number = self.find(clip_key(example))
        return None if number is None else self.clip_at(number)

    def check_origin(self, model: Any, hears: Hearing = PLAIN) -> None:
        """Whether `model` would make these features of clips that it hears as `hears` says.

        Raises:
            FeatureError: another encoder, other layers, frames, window or sound made them, or nobody knows.
        """
        if self.made_by is None:
            raise FeatureError("the features do not say what made them; make them again: python -m models features")
        wanted = {"hears": None, **made_by(model, hears)}
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
        known = [(example, clip) for example in examples if (clip := self.clip(example)) is not None]
        now = file_hashes([example for example, _ in known], audio_root)
        missing, changed = set(), {}
        for example, clip in known:
            sha256 = now[example.audio]
            if sha256 is None:
                missing.add(example.audio)
            elif sha256[:16] != clip.sha256:
                changed.setdefault(example.audio, example.id)
        if changed:
            audio, first = next(iter(changed.items()))
            raise FeatureError(f"{len(changed)} clips hold other sound than the features were made of; example {first}: {audio}")
        return len(missing)


class FeatureStore(ClipFeatures):
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
        self.row_shape = tuple(features.shape[1:])
        self._row = {key: i for i, key in enumerate(keys)}
        if len(self._row) != len(keys):
            raise ValueError("keys: expected each key once, got some twice")
        self._clips = None if clips is None else list(clips)

    def __len__(self) -> int:
        return len(self._row)

    def find(self, key: str) -> int | None:
        return self._row.get(key)

    def read(self, numbers: Sequence[int]) -> torch.Tensor:
        return self.features[list(numbers)]

    def clip_at(self, number: int) -> Clip | None:
        return None if self._clips is None else self._clips[number]

    def save(self, path: str | Path) -> Path:
        """Write atomically as safetensors."""
        return write_feature_file(path, list(self._row), self.features, made_by=self.made_by, clips=self._clips)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStore:
        """Read what `save` wrote. Files of earlier versions are read too; they do not say what made them.

        Raises:
            FeatureError: no such file, or a file of another kind.
        """
        keys, clips, origin, _, _ = read_header(path)
        try:
            with safe_open(str(path), framework="pt") as file:
                return cls(keys, file.get_tensor("features"), made_by=origin, clips=clips)
        except Exception as error:
            raise FeatureError(f"{path}: not a feature file: {error}") from error


class MappedFeatures(ClipFeatures):
    """Features that stay on disk: a file of `FeatureStore.save`, or a folder of shards. Each row is read when it is asked for.

    Raises:
        FeatureError: as `FeatureFiles`.
    """

    def __init__(self, path: str | Path) -> None:
        self._files = FeatureFiles(path)
        self.made_by, self.row_shape = self._files.made_by, self._files.row_shape

    def __len__(self) -> int:
        return len(self._files)

    def find(self, key: str) -> int | None:
        return self._files.find(key)

    def read(self, numbers: Sequence[int]) -> torch.Tensor:
        return self._files.read(numbers)

    def clip_at(self, number: int) -> Clip | None:
        return self._files.clip(number)
