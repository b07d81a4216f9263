"""The keywords of the losses in one place, each checked where they come together.

The public functions spell their keywords out and make one of these; everything behind them passes it on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_not_negative, check_tensor, is_number, is_positive, is_whole, shown
from .ops.dispatch import check_implementation
from .ops.rows import DIVERGENCES, RowSpec, scalar

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, eq=False, kw_only=True)
class LossOptions:
    """The keywords of :func:`kdkernels.fused_caad_loss`, which documents them.

    Shapes and devices of the tensors among them are checked later, beside the logits (:mod:`kdkernels.loss_terms`).

    Raises ValueError or TypeError, naming the keyword.
    """

    alpha: float | Tensor = 2.0
    temperature: float = 2.0
    kd_weight: float = 0.7
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    plausibility: float | None = None
    mask: Tensor | None = None
    ignore_index: int = -100
    kd_token_weight: Tensor | None = None
    ce_token_weight: Tensor | None = None
    kd_normalizer: float | Tensor | None = None
    ce_normalizer: float | Tensor | None = None
    reduction: str = "mean"
    vocab_size: int | None = None
    impl: str = "auto"
    inplace: bool = False
    return_stats: bool = False

    def __post_init__(self) -> None:
        check_divergence(self.divergence, self.jsd_beta, self.plausibility)
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {self.reduction!r}")
        if not is_positive(self.temperature):
            raise ValueError(f"temperature: expected a finite number > 0, got {shown(self.temperature)}")
        if not (is_number(self.kd_weight) and 0 <= self.kd_weight <= 1):
            raise ValueError(f"kd_weight: expected a number in [0, 1], got {self.kd_weight!r}")
        for name in ("inplace", "return_stats"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(getattr(self, name)).__name__}")
        if not is_whole(self.ignore_index):
            raise TypeError(f"ignore_index: expected an int, got {type(self.ignore_index).__name__}")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"ignore_index: expected an int64, as the target's ids are, got {self.ignore_index}")
        if self.vocab_size is not None:
            if not is_whole(self.vocab_size):
                raise TypeError(f"vocab_size: expected an int or None, got {type(self.vocab_size).__name__}")
            if self.vocab_size < 1:
                raise ValueError(f"vocab_size: expected 1 to the width of the logits, got {self.vocab_size}")
        for name in ("alpha", "kd_normalizer", "ce_normalizer"):
            x = getattr(self, name)
            if not (isinstance(x, Tensor) or (x is None and name != "alpha")):
                check_not_negative(name, x)
        for name in ("mask", "kd_token_weight", "ce_token_weight"):
            if (x := getattr(self, name)) is not None:
                check_tensor(name, x)
        check_implementation(self.impl)

    def row_spec(self, vocab: int, *, has_target: bool) -> RowSpec:
        """What the row kernels are told. Without a target the CE term is left out and ``kd_weight`` counts as 1."""
        share = self.kd_share(has_target=has_target)
        return RowSpec(
            vocab=vocab,
            temperature=scalar(self.temperature),
            divergence=limit_of_jsd(self.divergence, self.jsd_beta),
            jsd_beta=scalar(self.jsd_beta),
            plausibility=None if self.plausibility is None else scalar(self.plausibility),
            ignore_index=int(self.ignore_index),
            with_kd=share > 0 or self.return_stats,
            with_ce=has_target and (share < 1 or self.return_stats),
        )

    def kd_share(self, *, has_target: bool) -> float:
        return self.kd_weight if has_target else 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearLossOptions(LossOptions):
    """The keywords of :func:`kdkernels.fused_linear_caad_loss` that are no tensors of a head."""

    student_softcap: float | None = None
    teacher_softcap: float | None = None
    student_logit_scale: float = 1.0
    teacher_logit_scale: float = 1.0
    chunk_tokens: int | None = None
    workspace_bytes: int | None = None
    logits_dtype: torch.dtype | None = None
    round_contrast: bool = False

    def __post_init__(self) -> None:
        check_head_options("student_{}", self.student_softcap, self.student_logit_scale)
        check_head_options("teacher_{}", self.teacher_softcap, self.teacher_logit_scale)
        for name, x in (("chunk_tokens", self.chunk_tokens), ("workspace_bytes", self.workspace_bytes)):
            if x is not None and not (is_whole(x) and 1 <= x < 2**63):
                raise ValueError(f"{name}: expected a whole number >= 1 that fits int64, or None, got {x!r}")
        if self.chunk_tokens is not None and self.workspace_bytes is not None:
            raise ValueError("workspace_bytes: expected None where chunk_tokens is given, got both")
        if self.logits_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"logits_dtype: expected None, float32, bfloat16 or float16, got {self.logits_dtype}"
            )
        if not isinstance(self.round_contrast, bool):
            raise TypeError(f"round_contrast: expected a bool, got {type(self.round_contrast).__name__}")
        LossOptions.__post_init__(self)

    def row_spec(self, vocab: int, *, has_target: bool) -> RowSpec:
        return dataclasses.replace(
            LossOptions.row_spec(self, vocab, has_target=has_target),
            student_scale=scalar(self.student_logit_scale),
            teacher_scale=scalar(self.teacher_logit_scale),
            student_softcap=None if self.student_softcap is None else scalar(self.student_softcap),
            teacher_softcap=None if self.teacher_softcap is None else scalar(self.teacher_softcap),
        )

    @property
    def chunking(self) -> tuple[torch.dtype, int | None, int | None]:
        """(dtype of a chunk's logits, chunk_tokens, workspace_bytes), as the operators take them."""
        dtype = torch.float32 if self.logits_dtype is None else self.logits_dtype
        return dtype, self.chunk_tokens, self.workspace_bytes


def check_divergence(divergence: str, jsd_beta: float, plausibility: float | None, source: str = "") -> None:
    """``source``: what precedes the arguments' names where there are several."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"{source}divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if divergence == "jsd":
        if not (is_number(jsd_beta) and 0 <= jsd_beta <= 1):
            raise ValueError(f"{source}jsd_beta: expected a number in [0, 1], got {jsd_beta!r}")
    elif not (is_number(jsd_beta) and 0 < jsd_beta < 1):
        raise ValueError(f"{source}jsd_beta: expected a number in (0, 1), got {jsd_beta!r}")
    if plausibility is not None:
        if not (is_number(plausibility) and 0 < plausibility <= 1):
            raise ValueError(f"{source}plausibility: expected a number in (0, 1] or None, got {plausibility!r}")
        if limit_of_jsd(divergence, jsd_beta) == "reverse_kl":
            beta = f" and jsd_beta={jsd_beta!r}" if divergence == "jsd" else ""
            raise ValueError(
                f"{source}plausibility: expected None with divergence={divergence!r}{beta} (KL(q || p) is infinite where p is "
                f"cut to 0), got {plausibility!r}"
            )


def limit_of_jsd(divergence: str, jsd_beta: float) -> str:
    """The divergence that is computed: at the ends of beta the jsd stands for a KL, as in GKD, TRL and Liger.

    Near its ends the jsd is beta KL(p || q), and (1 - beta) KL(q || p). Those libraries drop the factor at 0 and at 1.
    """
    if divergence != "jsd" or 0 < jsd_beta < 1:
        return divergence
    return "forward_kl" if jsd_beta == 0 else "reverse_kl"


def check_head_options(pattern: str, softcap: float | None, logit_scale: float) -> None:
    """``pattern`` makes the arguments' names, for example "student_{}"."""
    for name, x in (("softcap", softcap), ("logit_scale", logit_scale)):
        optional = name == "softcap"
        if not (x is None and optional) and not is_positive(x):
            expected = f"a finite number > 0{' or None' if optional else ''}"
            raise ValueError(f"{pattern.format(name)}: expected {expected}, got {shown(x)}")
