"""The row problem with every row spread over the ranks of a process group: what a rank computes of its slice.

A slice is a :class:`~kdkernels.ops.rows.RowProblem` over the rank's columns. Its targets stay ids of the whole vocabulary. A
:class:`ShardRows` computes

    audio_max   the largest z_audio of the slice                                        (only with a plausibility mask)
    sums        SUMS (and STAT_SUMS): maxima, and sums relative to them
    jsd_sums    sum_v p_v log(p_v / m_v) and sum_v q_v log(q_v / m_v) of the slice      (only for the jsd)
    gradient    the gradient, from FACTORS that hold what the whole row contributes

in this order. Between two of them the ranks exchange and merge what they have (:mod:`kdkernels.parallel`). Ignored rows are not
read: their sums are those of an empty slice, and their gradient is 0.

With s and z over tau, their maxima M_s and M_z in the slice, e_s = e^(s - M_s), e_z = e^(z - M_z) and e_1 = e_s^tau the
gradient is

    forward_kl    of_q e_s - of_p e_z                                              0 where s is masked
    reverse_kl    of_q e_s ((s - M_s) - (z - M_z) + centre)
    jsd           of_q e_s (log(q / m) - centre)        q = q_share e_s, p = p_share e_z, m = beta p + (1 - beta) q

plus of_q1 e_1, less of_label in the target's column. Where a term's factors are 0 it is 0, even if the logits are NaN.

Legend: C rows, V_r columns of the slice, tau the temperature.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .reference import contrastive_logits
from .rows import MASK_BELOW, RowProblem

# Rows of ShardRows.sums. Everything is over tau: maxima and logits, and the differences in cross and moments.
# cross: forward_kl: sum e_z ((z - M_z) - (s - M_s)), reverse_kl: sum e_s ((s - M_s) - (z - M_z)), else 0. label: s of the target,
# 0 where it is not in the slice. A maximum of nothing is finite and below -1e29. cross may be +inf.
SUMS = ("s_max", "z_max", "q_sum", "q1_sum", "p_sum", "cross", "label")
# Moments: sum e_s (s - M_s), sum e_z (z - M_z). Tops: the first id of the maximum. Then the same of the two teacher paths, and
# sum e_audio ((audio - max) - (text - max)); 0 without a text path.
STAT_SUMS = (
    "q_moment", "p_moment", "s_top", "z_top", "audio_max", "text_max", "audio_sum", "text_sum", "path_cross",
)  # fmt: skip
FACTORS = ("q_share", "p_share", "of_q", "of_p", "of_q1", "of_label", "centre")


class ShardRows(Protocol):
    """One rank's slice of C rows. Made from a RowProblem and the id of the slice's first column."""

    def audio_max(self) -> Tensor:
        """(C,) float32, at least -1e30."""

    def sums(self, audio_max: Tensor | None) -> Tensor:
        """(K, C) float64: SUMS, with statistics STAT_SUMS too. ``audio_max``: of the whole row; None without plausibility."""

    def jsd_sums(self, factors: Tensor) -> Tensor:
        """(2, C) float64 from the first two of FACTORS, (2, C) float32."""

    def gradient(self, factors: Tensor) -> None:
        """Writes ``problem.grad`` from FACTORS, (7, C) float32."""


@dataclass(frozen=True, eq=False)
class _Slice:
    """Logits of the slice and their exponentials. Without a teacher z is -inf throughout."""

    s: Tensor  # (C, V_r) student
    z: Tensor  # (C, V_r) z_hat
    paths: tuple[Tensor, Tensor] | None  # z_audio and z_text
    s_max: Tensor  # (C,)
    z_max: Tensor
    ds: Tensor  # (C, V_r): (s - max s) / tau
    dz: Tensor
    q: Tensor  # (C, V_r): e^ds, without its sum
    q1: Tensor  # at temperature 1
    p: Tensor


class EagerShard:
    """:class:`ShardRows` in eager PyTorch: the formula beside which the kernels are tested. Holds 8 float32 tensors (C, V_r)."""

    def __init__(self, problem: RowProblem, first: int) -> None:
        self.problem, self.first = problem, first
        spec, target = problem.spec, problem.target
        self.valid = torch.ones(problem.rows, dtype=torch.bool, device=problem.student.device)
        self.label_here = self.label = None
        if target is not None:
            self.valid = target != spec.ignore_index
            self.label_here = self.valid & (target >= first) & (target < first + spec.vocab)
            self.label = torch.where(self.label_here, target - first, 0)

    def _logits(self, x: Tensor, scale: float, softcap: float | None) -> Tensor:
        x = torch.where(self.valid[:, None], x[0, :, : self.problem.spec.vocab].float(), -math.inf) * scale
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        return x.masked_fill((x < MASK_BELOW) | ~self.valid[:, None], -math.inf)

    @functools.cached_property
    def _audio(self) -> Tensor:
        spec = self.problem.spec
        return self._logits(self.problem.audio, spec.teacher_scale, spec.teacher_softcap)

    def audio_max(self) -> Tensor:
        return _peak(self._audio)

    def sums(self, audio_max: Tensor | None) -> Tensor:
        problem, spec = self.problem, self.problem.spec
        self.slice = here = self._slice(audio_max)
        label = here.s.new_zeros(len(here.s))
        if problem.with_ce and self.label is not None and self.label_here is not None and spec.vocab:
            label = torch.where(self.label_here, here.s.gather(1, self.label[:, None])[:, 0], 0.0)
        cross = torch.zeros_like(label)
        if spec.with_kd and spec.divergence == "forward_kl":
            cross = _weighted_sum(here.p, here.dz - here.ds)
        if spec.with_kd and spec.divergence == "reverse_kl":
            cross = _weighted_sum(here.q, here.ds - here.dz)
        tau = spec.temperature
        maxima = [here.s_max.double() / tau, here.z_max.double() / tau]
        told = [*maxima, here.q.sum(-1), here.q1.sum(-1), here.p.sum(-1), cross, label.double() / tau]
        if problem.want_stats:
            told += [_weighted_sum(here.q, here.ds), _weighted_sum(here.p, here.dz)]
            told += [_first_top(here.s, self.first), _first_top(here.z, self.first)]
            told += [torch.zeros_like(label)] * 5 if here.paths is None else _path_sums(*here.paths, tau)
        return torch.stack([x.double() for x in told])

    def _slice(self, audio_max: Tensor | None) -> _Slice:
        problem, spec = self.problem, self.problem.spec
        s = self._logits(problem.student, spec.student_scale, spec.student_softcap)
        z, paths = s.new_full(s.shape, -math.inf), None
        if problem.reads_teacher:
            text = (
                None if problem.text is None else self._logits(problem.text, spec.teacher_scale, spec.teacher_softcap)
            )
            paths = None if text is None else (self._audio, text)
            z = contrastive_logits(self._audio, text, problem.alpha, None)
            if audio_max is not None:
                z = z.masked_fill(self._audio < (audio_max + spec.log_plausibility)[:, None], -math.inf)
        s_max, z_max = _peak(s), _peak(z)
        ds, dz = (s - s_max[:, None]) / spec.temperature, (z - z_max[:, None]) / spec.temperature
        return _Slice(s, z, paths, s_max, z_max, ds, dz, ds.exp(), (ds * spec.temperature).exp(), dz.exp())

    def _jsd_logs(self, factors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, p, log(q / m) and log(p / m), 0 where q and p are; (C, V_r)."""
        beta = self.problem.spec.jsd_beta
        q, p = self.slice.q * factors[0][:, None], self.slice.p * factors[1][:, None]
        m = beta * p + (1 - beta) * q
        m = torch.where(m > 0, m, 1.0)  # also where the smallest p or q times its share is 0
        log_qm, log_pm = (torch.where(x > 0, torch.log(x / m), 0.0) for x in (q, p))
        return q, p, log_qm, log_pm

    def jsd_sums(self, factors: Tensor) -> Tensor:
        q, p, log_qm, log_pm = self._jsd_logs(factors)
        return torch.stack([(p * log_pm).sum(-1), (q * log_qm).sum(-1)]).double()

    def gradient(self, factors: Tensor) -> None:
        here, spec, grad = self.slice, self.problem.spec, self.problem.grad
        assert grad is not None
        of = dict(zip(FACTORS, factors[:, :, None].unbind(0), strict=True))
        if spec.divergence == "forward_kl":
            total = torch.where(torch.isneginf(here.s), 0.0, of["of_q"] * here.q - of["of_p"] * here.p)
        elif spec.divergence == "reverse_kl":
            gap = torch.where(here.q > 0, here.ds - here.dz, 0.0) + of["centre"]
            total = torch.where(here.q == 0, 0.0, of["of_q"] * here.q * gap)
        else:
            total = of["of_q"] * here.q * (self._jsd_logs(factors)[2] - of["centre"])
        total = torch.where((of["of_q"] == 0) & (of["of_p"] == 0), 0.0, total)
        if self.problem.with_ce:
            label_term = of["of_q1"] * here.q1
            if spec.vocab and self.label is not None and self.label_here is not None:
                masked = torch.isneginf(here.s.gather(1, self.label[:, None])[:, 0])
                hit = torch.where(self.label_here & ~masked, factors[5], 0.0)
                label_term = label_term.scatter_add(1, self.label[:, None], -hit[:, None])
            total = total + torch.where((of["of_q1"] == 0) & (of["of_label"] == 0), 0.0, label_term)
        if spec.student_softcap is not None:
            total = torch.where(total == 0, 0.0, total * (1 - (here.s / spec.student_softcap) ** 2))
        grad[0, :, : spec.vocab] = torch.where(self.valid[:, None], total * spec.student_scale, 0.0)
        grad[0, :, spec.vocab :] = 0


def _peak(x: Tensor) -> Tensor:
    """Maximum of each row's slice, finite; (C,)."""
    return x.amax(-1).clamp_min(MASK_BELOW) if x.shape[1] else x.new_full(x.shape[:1], MASK_BELOW)


def _weighted_sum(e: Tensor, d: Tensor) -> Tensor:
    """sum_v e_v d_v with 0 * (anything) = 0; (C,)."""
    return torch.where(e > 0, e * d, 0.0).sum(-1)


def _first_top(x: Tensor, first: int) -> Tensor:
    """Id of the first maximum of each row's slice; (C,)."""
    return x.argmax(-1) + first if x.shape[1] else x.new_full(x.shape[:1], math.inf)


def _path_sums(audio: Tensor, text: Tensor, tau: float) -> list[Tensor]:
    """The last five of STAT_SUMS."""
    maxima = [_peak(x) for x in (audio, text)]
    da, dt = ((x - m[:, None]) / tau for x, m in zip((audio, text), maxima, strict=True))
    sums = [da.exp().sum(-1), dt.exp().sum(-1)]
    return [*(m.double() / tau for m in maxima), *sums, _weighted_sum(da.exp(), da - dt)]
