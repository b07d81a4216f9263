"""Settings of a healing run. They are apart from the code that needs torch, so that the command line has them at once."""

from __future__ import annotations

from dataclasses import dataclass

KEEP_LAYERS = (0, 1, 2, 3, 4, 5, 6, 27, 28, 29)


@dataclass(frozen=True, kw_only=True)
class HealingConfig:
    """Settings of a healing run. Together with teacher, layers and texts they decide its place in the cache.

    Args:
        steps: optimiser steps.
        batch_size: texts in a step.
        lr: peak learning rate of AdamW. It warms up, then falls linearly to a twentieth.
        warmup_steps: steps until the learning rate has its peak.
        weight_decay: of AdamW.
        max_grad_norm: gradient clipping.
        max_tokens: longer texts are cut to this length.
        precision: "float32", "bfloat16" (both bodies under autocast, weights and optimiser in float32), or "auto":
            bfloat16 if the hardware multiplies in it, which takes little more than half the time.
        held_out: texts that are not trained on; the reported KL is theirs.
        seed: of the order of texts.
    """

    steps: int = 96
    batch_size: int = 8
    lr: float = 1e-3
    warmup_steps: int = 15
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_tokens: int = 64
    precision: str = "auto"
    held_out: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_tokens", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens: expected >= 2, a token and the one it predicts, got {self.max_tokens}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision: expected auto, float32 or bfloat16, got {self.precision!r}")
        if self.lr <= 0:
            raise ValueError(f"lr: expected > 0, got {self.lr}")
