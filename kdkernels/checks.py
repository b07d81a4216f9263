"""Checks of what callers pass: each raises ValueError or TypeError that names the argument, with expected and got."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeIs


_LARGEST = torch.finfo(torch.float32).max
_LEAST = torch.finfo(torch.float32).tiny


def is_number(x: Any) -> TypeIs[float]:
    """Python's numbers and NumPy's scalars."""
    return isinstance(x, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)) and not isinstance(x, bool)


def is_whole(x: Any) -> TypeIs[int]:
    return isinstance(x, (int, torch.SymInt, numbers.Integral)) and not isinstance(x, bool)


def is_not_negative(x: Any) -> TypeIs[float]:
    """A number of [0, 3.4e38], which is finite in float32 too: the losses compute in it."""
    return is_number(x) and 0 <= x <= _LARGEST


def is_positive(x: Any) -> TypeIs[float]:
    """A number of [1.2e-38, 3.4e38], which is neither 0 nor infinite in float32."""
    return is_number(x) and _LEAST <= x <= _LARGEST


def shown(x: Any) -> str:
    """A refused number for a message; with the reason if it is finite and above 0."""
    return f"{x!r}{' (infinite or 0 in float32)' if is_number(x) and 0 < x < math.inf else ''}"


def check_not_negative(name: str, x: Any) -> None:
    if not is_not_negative(x):
        raise ValueError(f"{name}: expected a finite number >= 0, got {shown(x)}")


def plain_numbers(options: Any) -> None:
    """Makes Python's numbers of the NumPy scalars among a frozen dataclass' fields: JSON knows no others."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            object.__setattr__(options, field.name, int(value) if isinstance(value, numbers.Integral) else float(value))


def is_dtensor(x: Any) -> bool:
    """A DTensor has an attribute that tells it. Asking torch.distributed.tensor would import it."""
    return hasattr(x, "placements")


def check_tensor(name: str, x: Any, *, floating: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    placements = getattr(x, "placements", None)
    if placements is not None:
        raise TypeError(
            f"{name}: expected a plain tensor, the same on every rank, got a DTensor placed as {tuple(placements)}; "
            "x.full_tensor() gathers it"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {x.layout}")
    if floating and not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def check_shape(name: str, x: Tensor, expected: torch.Size) -> None:
    if x.shape != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(x.shape)}")


def check_leading(name: str, x: Tensor, leading: torch.Size, like: str) -> None:
    if x.dim() < 1 or x.shape[:-1] != leading:
        raise ValueError(f"{name}: expected leading shape {tuple(leading)} as {like} has, got {tuple(x.shape)}")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as the student has, got {x.device}")


def check_head(
    pattern: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    like: Tensor,
    hidden_name: str = "hidden",
    *,
    empty: bool = False,
) -> None:
    """Hidden states (..., H), weight (V, H) and bias (V,) on ``like``'s device.

    Args:
        pattern: makes the arguments' names, for example "student_{}".
        empty: whether the weight may have no rows.
    """
    names = [pattern.format(x) for x in (hidden_name, "weight", "bias")]
    operands = (hidden, weight) if bias is None else (hidden, weight, bias)
    for name, x in zip(names[: len(operands)], operands, strict=True):
        check_tensor(name, x, floating=True)
        check_device(name, x, like)
    if hidden.dim() < 1:
        raise ValueError(f"{names[0]}: expected (..., width), got a scalar")
    width = hidden.shape[-1]
    if width == 0:
        raise ValueError(f"{names[0]}: expected a width of at least 1, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{names[1]}: expected (vocabulary, {width}) to match {names[0]}, got {tuple(weight.shape)}")
    if weight.shape[0] == 0 and not empty:
        raise ValueError(f"{names[1]}: expected a vocabulary, got 0 rows (is the head sharded by FSDP or ZeRO-3?)")
    if bias is not None:
        check_shape(names[2], bias, weight.shape[:1])


def check_text_path(name: str, text: Tensor | None, audio: Tensor) -> None:
    """The text path's tensor beside the audio path's; None is allowed."""
    if text is not None:
        check_tensor(name, text, floating=True)
        check_shape(name, text, audio.shape)
        check_device(name, text, audio)
