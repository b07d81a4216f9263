"""Which device runs, and which precision is fast on it."""

from __future__ import annotations

import torch


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether `device` has instructions for bfloat16 products; without them they are many times slower than float32's."""
    if torch.device(device).type != "cpu":
        return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    # Private names, the only way to ask; where they are gone float32 is the safe answer.
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def inference_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Of a language model that is only read: bfloat16 where that is fast, else float32."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def pick_device(device: str, *, name: str = "--device") -> torch.device:
    """The device that `device` names; "auto" = CUDA where there is one.

    Args:
        name: the option or key that the user set, for the message.

    Raises:
        ValueError: no such device on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name}: expected auto, cpu, cuda or cuda:N, got {device!r}") from None
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name}: got {device!r}, but torch {torch.__version__} sees no CUDA device here")
    return picked
