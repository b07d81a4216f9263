"""The settings of the loss for one run, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ..checks import is_not_negative, is_whole, plain_numbers, shown
from ..loss_options import LinearLossOptions

ALPHA = 2.0  # with two paths, where nothing is said


@dataclass(frozen=True)
class CAADOptions:
    """What `CAADTrainer` passes to `kdkernels.fused_linear_caad_loss`, which documents each option; alpha may ramp up.

    A value out of range raises ValueError at construction.
    """

    alpha: float | None = None  # None = 2.0 with two paths; without a negative path there is no alpha
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
    round_contrast: bool = False
    impl: str = "auto"

    def __post_init__(self) -> None:
        LinearLossOptions(**self._of_the_loss())
        if isinstance(self.alpha, torch.Tensor):
            raise TypeError("alpha: expected a number, got a tensor; a batch's column 'alpha' has one for each token")
        start = self.alpha_start
        if start is not None and not is_not_negative(start):
            raise ValueError(f"alpha_start: expected a finite number >= 0 or None, got {shown(start)}")
        if not is_whole(self.alpha_ramp_steps):
            raise TypeError(f"alpha_ramp_steps: expected an int, got {type(self.alpha_ramp_steps).__name__}")
        if self.alpha_ramp_steps < 0:
            raise ValueError(f"alpha_ramp_steps: expected >= 0, got {self.alpha_ramp_steps!r}")
        if start is not None and self.alpha_ramp_steps == 0:
            raise ValueError(f"alpha_ramp_steps: expected >= 1 with alpha_start={start:g}, which has no effect alone, got 0")
        if start is None and self.alpha_ramp_steps > 0:
            raise ValueError(f"alpha_start: expected a number with alpha_ramp_steps={self.alpha_ramp_steps}, got None")
        if self.divergence != "jsd" and self.jsd_beta != CAADOptions.jsd_beta:
            default = CAADOptions.jsd_beta
            raise ValueError(f"jsd_beta: expected {default} with divergence={self.divergence!r}, got {self.jsd_beta}")
        plain_numbers(self)

    def alpha_at(self, step: int) -> float:
        """alpha of optimiser step `step`, the first being 1: alpha_start there, then linear over alpha_ramp_steps."""
        alpha = ALPHA if self.alpha is None else self.alpha
        if self.alpha_start is None or step > self.alpha_ramp_steps:
            return alpha
        return self.alpha_start + (alpha - self.alpha_start) * (step - 1) / self.alpha_ramp_steps

    def keywords(self, step: int) -> dict[str, Any]:
        """The keywords of the loss at optimiser step `step`."""
        return {**self._of_the_loss(), "alpha": self.alpha_at(step)}

    def refuse_alpha(self, by_token: object = None) -> None:
        """In plain distillation: raises ValueError for an alpha that somebody has given."""
        for name, value in (
            ("options.alpha", self.alpha),
            ("options.alpha_start", self.alpha_start),
            ("inputs['alpha']", by_token),
        ):
            if value is not None:
                got = "a tensor" if isinstance(value, torch.Tensor) else value
                raise ValueError(
                    f"{name}: expected None in plain distillation, got {got}: there is no negative path to contrast with. "
                    "Give the DualPathTeacher a `negative`, the batch columns `negative_NAME`, or a ContrastCache of both paths"
                )

    def _of_the_loss(self) -> dict[str, Any]:
        ramp = ("alpha_start", "alpha_ramp_steps")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ramp}
        return {**values, "alpha": ALPHA if self.alpha is None else self.alpha}
