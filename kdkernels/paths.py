"""The two paths' inputs: how the negative one is made, and how both become rows of one batch.

Legend: B rows of a path, L columns of its longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]
Negative = Callable[[Inputs], Inputs]

# Inputs with one entry a token, and the value that pads them.  Nothing else is padded: its trailing shape has to be the same on
# both paths.
SEQUENCE_PADDING: dict[str, float | int] = {
    "input_ids": 0,
    "attention_mask": 0,
    "inputs_embeds": 0.0,
    "position_ids": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}
# Keys that make no sense where no logits are built.
_IGNORED_KEYS = frozenset({"labels", "logits_to_keep", "num_logits_to_keep", "use_cache", "return_dict"})
# Keys that would silently change what the rows mean.
_REFUSED_KEYS = frozenset({"past_key_values", "cache", "cache_position", "decoder_input_ids"})


# --------------------------------------------------------------------------------------------------------------------
# The negative path
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, init=False)
class MaskFeatures:
    """Negative path: the same inputs with the named feature tensors filled with `value`.

    What CAAD's authors do: the log-mel features are zeroed, the length, the placeholders and the words stay.

    Args:
        keys: names of float tensors in the inputs, for example "input_features".
        value: what they are filled with.
    """

    keys: tuple[str, ...]
    value: float

    def __init__(self, *keys: str, value: float = 0.0):
        if not keys:
            raise ValueError("keys: expected at least one name of an input, got none")
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "value", value)

    def __call__(self, inputs: Inputs) -> dict[str, Any]:
        _require_keys(inputs, self.keys)
        masked = {key: torch.full_like(inputs[key], self.value) for key in self.keys}
        return {**inputs, **masked}


@dataclass(frozen=True, init=False)
class DropKey:
    """Negative path: the same inputs without the named entries.

    The placeholders of the audio stay in `input_ids`, so the model has to accept placeholders without features. Some models embed
    them as tokens, others raise an error.  The two paths cannot share a batch: each runs in a pass of its own.
    """

    keys: tuple[str, ...]

    def __init__(self, *keys: str):
        if not keys:
            raise ValueError("keys: expected at least one name of an input, got none")
        object.__setattr__(self, "keys", keys)

    def __call__(self, inputs: Inputs) -> dict[str, Any]:
        _require_keys(inputs, self.keys)
        return {key: value for key, value in inputs.items() if key not in self.keys}


@dataclass(frozen=True)
class MarkAbsent:
    """Negative path for models with a (B,) bool input that says which rows hear their audio: all False.

    On the positive path an absent flag becomes all True; a flag given by the caller is kept.
    """

    key: str = "audio_present"

    def positive(self, inputs: Inputs) -> dict[str, Any]:
        """The inputs of the path with audio: a flag that is missing becomes all True."""
        if inputs.get(self.key) is not None:
            return dict(inputs)
        return {**inputs, self.key: self._rows(inputs, True)}

    def __call__(self, inputs: Inputs) -> dict[str, Any]:
        return {**inputs, self.key: self._rows(inputs, False)}

    @staticmethod
    def _rows(inputs: Inputs, value: bool) -> Tensor:
        tokens = tokens_of(inputs, "inputs")
        return torch.full((tokens.shape[0],), value, dtype=torch.bool, device=tokens.device)


def _require_keys(inputs: Inputs, keys: tuple[str, ...]) -> None:
    for key in keys:
        if inputs.get(key) is None:
            raise ValueError(f"negative: expected the inputs to have {key!r}, got {sorted(inputs)}")
        if not isinstance(inputs[key], Tensor):
            raise TypeError(f"negative: expected inputs[{key!r}] to be a tensor, got {type(inputs[key]).__name__}")


# --------------------------------------------------------------------------------------------------------------------
# Both paths as rows of one batch
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathBatch:
    """Model inputs of `rows` rows and `length` columns."""

    inputs: dict[str, Any]
    rows: int
    length: int

    def batch_dimension(self, key: str) -> int:
        return _batch_dimension(key, self.inputs[key])

    def slice(self, start: int, stop: int) -> PathBatch:
        if (start, stop) == (0, self.rows):
            return self
        part: dict[str, Any] = {}
        for key, value in self.inputs.items():
            if isinstance(value, Tensor) and value.ndim:
                dimension = self.batch_dimension(key)
                if value.shape[dimension] != self.rows:
                    raise ValueError(
                        f"rows_per_pass: expected one entry a row in inputs[{key!r}] to split by, got "
                        f"{value.shape[dimension]} entries for {self.rows} rows; pass rows_per_pass=None"
                    )
                part[key] = value.narrow(dimension, start, stop - start)
            elif isinstance(value, list):
                part[key] = value[start:stop]
            else:
                part[key] = value
        return PathBatch(part, stop - start, self.length)


def _batch_dimension(key: str, value: Tensor) -> int:
    return 1 if key == "position_ids" and value.ndim == 3 else 0  # (3, B, L): multimodal rotary positions


def tokens_of(inputs: Inputs, name: str) -> Tensor:
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ValueError(
            f"{name}: expected a tensor 'input_ids' (B, L) or 'inputs_embeds' (B, L, H), got {sorted(inputs)}"
        )
    return tokens


def clean(inputs: Inputs, name: str) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{name}: expected a mapping of the model's inputs, got {type(inputs).__name__}")
    refused = sorted(_REFUSED_KEYS & inputs.keys())
    if refused:
        raise ValueError(f"{name}: expected the inputs of a whole sequence, got {refused}")
    return {key: value for key, value in inputs.items() if value is not None and key not in _IGNORED_KEYS}


def as_batch(inputs: dict[str, Any], name: str) -> PathBatch:
    tokens = tokens_of(inputs, name)
    return PathBatch(inputs, tokens.shape[0], tokens.shape[1])


def join(audio: PathBatch, text: PathBatch, *, pad_left: bool = False) -> PathBatch:
    """The rows of both paths as one batch, the shorter path padded to the longer one's length.

    Tensors are concatenated along the batch. Features of audio may have several entries for a row, or none, since transformers'
    audio LMs take them flattened, in the order of their placeholders. They may be missing on the negative path. Anything that
    is not a tensor has to be the same on both paths.
    """
    length = max(audio.length, text.length)
    need_mask = audio.length != text.length
    first = _pad(audio, length, left=pad_left, need_mask=need_mask)
    second = _pad(text, length, left=pad_left, need_mask=need_mask)
    if ("attention_mask" in first) != ("attention_mask" in second):
        for batch, inputs in ((audio, first), (text, second)):
            inputs.setdefault("attention_mask", _ones_mask(batch))
    joined: dict[str, Any] = {}
    for key in [*first, *(key for key in second if key not in first)]:
        if key not in first or key not in second:
            if key in SEQUENCE_PADDING:
                raise ValueError(f"text_inputs: expected {key!r} on both paths or on neither, got it on one only")
            joined[key] = first.get(key, second.get(key))
            continue
        joined[key] = _join_values(key, first[key], second[key])
    return PathBatch(joined, audio.rows + text.rows, length)


def _join_values(key: str, first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim:
        dimension = _batch_dimension(key, first)
        mine, other = list(first.shape), list(second.shape)
        if len(mine) == len(other):
            mine[dimension] = other[dimension] = 0
        if mine != other:
            raise ValueError(
                f"text_inputs[{key!r}]: expected the trailing shape of the positive path, {tuple(first.shape)}, "
                f"got {tuple(second.shape)}"
            )
        return torch.cat([first, second.to(first.device)], dim=dimension)
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *second]
    if first is not second and not (type(first) is type(second) and bool(first == second)):
        raise ValueError(f"text_inputs[{key!r}]: expected the value of the positive path, {first!r}, got {second!r}")
    return first


def _ones_mask(batch: PathBatch) -> Tensor:
    tokens = tokens_of(batch.inputs, "inputs")
    return torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)


def _pad(batch: PathBatch, length: int, *, left: bool, need_mask: bool) -> dict[str, Any]:
    inputs = dict(batch.inputs)
    if need_mask and "attention_mask" not in inputs:
        inputs["attention_mask"] = _ones_mask(batch)
    missing = length - batch.length
    if not missing:
        return inputs
    for key, padding in SEQUENCE_PADDING.items():
        value = inputs.get(key)
        if value is None:
            continue
        dimension = _batch_dimension(key, value) + 1
        one_a_token = value.ndim > dimension and value.shape[dimension] == batch.length
        if not one_a_token or (key == "attention_mask" and value.ndim > 2):
            raise ValueError(
                f"inputs[{key!r}]: expected one entry a token ({batch.rows}, {batch.length}) to pad to {length} "
                f"columns, got shape {tuple(value.shape)}"
            )
        shape = list(value.shape)
        shape[dimension] = missing
        filler = value.new_full(shape, padding)
        inputs[key] = torch.cat([filler, value] if left else [value, filler], dim=dimension)
    return inputs
