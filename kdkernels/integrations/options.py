"""The loss's settings of a run, checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..caad import CAADLoss, _check_chunks


@dataclass(frozen=True)
class CAADOptions:
    """What `CAADTrainer` passes to `kdkernels.fused_linear_caad_loss`, which documents each; contrast may ramp up.

    Raises ValueError for a value out of range, at construction.
    """

    alpha: float = 2.0
    alpha_start: float | None = None  # alpha of the first optimiser step; None = constant
    alpha_ramp_steps: int = 0  # optimiser steps until alpha is reached
    temperature: float = 2.0
    kd_weight: float = 0.7
    divergence: str = "forward_kl"  # forward_kl | reverse_kl | jsd
    jsd_beta: float = 0.5
    plausibility: float | None = None
    vocab_size: int | None = None
    chunk_tokens: int | None = None
    workspace_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    impl: str = "auto"

    def __post_init__(self) -> None:
        _check_chunks(self.chunk_tokens, self.workspace_bytes, self.logits_dtype)
        if isinstance(self.alpha, torch.Tensor):
            raise TypeError("alpha: expected a number, got a tensor; a batch's column 'alpha' has one for each token")
        if self.vocab_size is not None and not (isinstance(self.vocab_size, int) and self.vocab_size >= 1):
            raise ValueError(f"vocab_size: expected a whole number >= 1 or None, got {self.vocab_size!r}")
        CAADLoss(
            alpha=self.alpha,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            divergence=self.divergence,
            jsd_beta=self.jsd_beta,
            plausibility=self.plausibility,
            vocab_size=self.vocab_size,
            impl=self.impl,
        )
        start = self.alpha_start
        if start is not None and not (isinstance(start, (int, float)) and 0 <= start < math.inf):
            raise ValueError(f"alpha_start: expected a finite number >= 0 or None, got {start!r}")
        if not isinstance(self.alpha_ramp_steps, int):
            raise TypeError(f"alpha_ramp_steps: expected an int, got {type(self.alpha_ramp_steps).__name__}")
        if self.alpha_ramp_steps < 0:
            raise ValueError(f"alpha_ramp_steps: expected >= 0, got {self.alpha_ramp_steps!r}")

    def alpha_at(self, step: int) -> float:
        """alpha of optimiser step `step`, the first being 1: alpha_start there, then linear over alpha_ramp_steps."""
        if self.alpha_start is None or step > self.alpha_ramp_steps:
            return self.alpha
        return self.alpha_start + (self.alpha - self.alpha_start) * (step - 1) / self.alpha_ramp_steps

    def keywords(self, step: int) -> dict[str, Any]:
        """Of the loss, at optimiser step `step`."""
        names = (
            "temperature",
            "kd_weight",
            "divergence",
            "jsd_beta",
            "plausibility",
            "vocab_size",
            "chunk_tokens",
            "workspace_bytes",
            "logits_dtype",
            "impl",
        )
        return {"alpha": self.alpha_at(step), **{name: getattr(self, name) for name in names}}
