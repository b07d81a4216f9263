"""Which device runs a model, and which precision is fast on it."""

from __future__ import annotations

import torch


def has_fast_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether `device` has instructions for bfloat16 products. Without them these are many times slower than float32's."""
    if torch.device(device).type != "cpu":
        return torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has only private names for this. If a version lacks them, the answer is no, and float32 is used.
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def inference_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of a language model that is not trained: bfloat16 if that is fast on `device`, else float32."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


def pick_device(device: str, *, name: str = "--device") -> torch.device:
    """The device that `device` names; "auto" is CUDA if there is one, else the CPU.

    Args:
        name: the option or key that the user set, for the message.

    Raises:
        ValueError: this machine has no such device.
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
