"""What the layer losses share: their arguments checked, and the first weights of their projections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_shape, check_tensor, is_not_negative, is_whole, shown
from .loss_terms import check_amounts, values_on
from .ops.rows import scalar


def initial_weight(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """Orthonormal rows or columns; the identity where it is square."""
    if weight.is_meta:
        return weight
    if weight.shape[0] == weight.shape[1]:
        return torch.nn.init.eye_(weight)
    # In float32 on the CPU: QR has no half precision, and the draw is the same on every device.
    drawn = torch.nn.init.orthogonal_(torch.empty(weight.shape, dtype=torch.float32), generator=generator)
    return weight.copy_(drawn)


def pair_count(pairs: int | Sequence[tuple[int, int]]) -> int:
    listed = isinstance(pairs, Sequence) and not isinstance(pairs, str)
    if not (is_whole(pairs) or listed):
        raise TypeError(f"pairs: expected a number of pairs, or a list of them, got {type(pairs).__name__}")
    count = pairs if is_whole(pairs) else len(pairs)
    if count < 1:
        raise ValueError(f"pairs: expected at least one, got {pairs!r}")
    for pair in () if is_whole(pairs) else pairs:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(is_whole(x) for x in pair)):
            raise TypeError(f"pairs: expected (student layer, teacher layer) of ints, got {pair!r}")
    return int(count)


def layer_widths(name: str, value: int | Sequence[int], count: int) -> list[int]:
    if not (is_whole(value) or (isinstance(value, Iterable) and not isinstance(value, str))):
        raise TypeError(f"{name}: expected a whole number, or one a pair, got {value!r}")
    widths = [value] * count if is_whole(value) else list(value)
    if len(widths) != count:
        raise ValueError(f"{name}: expected one number or {count}, got {len(widths)}")
    for w in widths:
        if not is_whole(w) or w < 1:
            raise ValueError(f"{name}: expected whole numbers >= 1, got {w!r}")
    return [int(w) for w in widths]


def check_states(name: str, states: Any, count: int | None = None) -> list[Tensor]:
    if isinstance(states, Tensor) or not isinstance(states, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, one a layer, got {type(states).__name__}")
    if count is not None and len(states) != count:
        raise ValueError(f"{name}: expected {count} layers as student_hidden has, got {len(states)}")
    for i, x in enumerate(states):
        check_tensor(f"{name}[{i}]", x, floating=True)
        if x.dim() < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name}[{i}]: expected (..., width), got {tuple(x.shape)}")
    return list(states)


def layer_weight_tensor(
    layer_weight: Sequence[float] | Tensor | None, count: int, device: torch.device, dtype: torch.dtype
) -> Tensor | list[Any]:
    if layer_weight is None:
        return [1.0] * count
    if isinstance(layer_weight, Tensor):
        check_shape("layer_weight", layer_weight, torch.Size([count]))
        layer_weight = values_on("layer_weight", layer_weight, device, dtype)
        check_amounts("layer_weight", layer_weight)
        return layer_weight
    if not isinstance(layer_weight, Iterable):
        raise TypeError(f"layer_weight: expected {count} numbers, one a layer, or a tensor, got {type(layer_weight).__name__}")
    weights = list(layer_weight)
    if len(weights) != count:
        raise ValueError(f"layer_weight: expected {count} as student_hidden has layers, got {len(weights)}")
    for w in weights:
        if not is_not_negative(w):
            raise ValueError(f"layer_weight: expected finite numbers >= 0, got {shown(w)}")
    return [scalar(w) for w in weights]
