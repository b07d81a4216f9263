"""Which precision is fast where."""

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
