"""The row problem: what every kernel of the CAAD loss computes, one row of logits at a time.

Legend: B, T leading dimensions (row r = b * T + t), N = B * T rows, V_s / V_t widths of the student's and the teacher's
logits, V = ``spec.vocab`` valid ids.

Each backend (``native``, ``triton_caad``) offers one function of this signature::

    caad_rows(student, audio, text, target, alpha, kd_coef, ce_coef, spec, *, grad=None, want_stats=False) -> RowResult

    student   (B, T, V_s)  fp32 | bf16 | fp16, last stride 1, any strides in front
    audio     (B, T, V_t)  likewise; its dtype may differ from the student's
    text      (B, T, V_t)  or None: plain distillation, alpha is not read
    target    (N,) int64 or None
    alpha     (1,) or (N,) float32
    kd_coef   (N,) float32: d loss / d kd_i;  ce_coef (N,) float32: d loss / d ce_i
    grad      None, or (B, T, V_s) fp32 | bf16 | fp16 with last stride 1, which receives
              kd_coef_i * d kd_i / d s + ce_coef_i * d ce_i / d s. It may share ``student``'s memory: row r of ``grad`` may
              overlap row r of ``student`` (and no other row), also at a smaller item size; or likewise ``audio``'s.

Rows whose target is ``ignore_index`` are never read: their kd, ce and statistics are 0 and their gradient is 0.
A row with a target outside [0, V) or a negative or non-finite alpha gives NaN (the CPU front end refuses it before).

Several teachers first become one such row by ``mix_rows``: :mod:`kdkernels.ops.mixture`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")

# Rows of RowResult.stats, in order. Entropies and the divergence are in nats, of the distributions at temperature tau.
STAT_NAMES = ("student_entropy", "teacher_entropy", "top1_agreement", "path_divergence")


@dataclass(frozen=True)
class RowSpec:
    """Everything of the row problem that is not a tensor.

    A logit l read from memory stands for ``softcap * tanh(scale * l / softcap)`` (``scale * l`` without a softcap); ``grad``
    is the gradient with respect to the value in memory.
    """

    vocab: int
    temperature: float = 2.0
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    plausibility: float | None = None
    ignore_index: int = -100
    with_kd: bool = True  # False: kd is not needed; it comes back as 0
    with_ce: bool = True  # False: ce is not needed (or there is no target); it comes back as 0
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    student_softcap: float | None = None
    teacher_softcap: float | None = None


@dataclass(frozen=True)
class RowResult:
    """kd (N,) and ce (N,) float32, unweighted, kd with its tau^2; stats (len(STAT_NAMES), N) float32 or None."""

    kd: torch.Tensor
    ce: torch.Tensor
    stats: torch.Tensor | None


def stat_count(teachers: int) -> int:
    """Rows of RowResult.stats with several teachers: the student's entropy, then one a teacher of each: kd, its entropy, top-1
    agreement, path divergence."""
    return 1 + teachers * len(STAT_NAMES)


def joined_stats(results: Sequence[RowResult]) -> torch.Tensor:
    """(stat_count, N) from the results against each teacher."""
    by_name = [torch.stack([r.stats[i] for r in results]) for i in range(1, len(STAT_NAMES))]
    return torch.cat([results[0].stats[:1], torch.stack([r.kd for r in results]), *by_name])


def check_overlap(student: torch.Tensor, grad: torch.Tensor) -> None:
    """Raises ValueError for a gradient in the student's memory whose stores would reach logits before they are read."""
    if student.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr():
        return
    shift = grad.data_ptr() - student.data_ptr()
    row_bytes = student.shape[-1] * student.element_size()
    if 0 < shift < row_bytes or (shift == 0 and grad.element_size() > student.element_size()):
        raise ValueError(
            "grad: expected memory of its own, or rows that begin where the student's begin, with items no wider; got "
            f"rows that begin {shift} bytes later, {grad.dtype} over {student.dtype}"
        )
