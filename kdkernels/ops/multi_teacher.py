"""Several teachers behind one student: the chunk loop of :mod:`kdkernels.ops.linear` with one gradient for all that can be mixed,
and its operator.

Per chunk of C tokens: first the student's logits. Then the teachers' logits, one teacher after the other, go into the same
scratch and from there into the mixture (:mod:`kdkernels.ops.mixture`). Then the row kernel runs once. A teacher that cannot be
mixed has a row pass of its own; the gradients of several passes are added in float32.

Legend: N tokens, C tokens of a chunk, K teachers, V valid ids, H_s / H_k hidden widths.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, library

from .dispatch import row_launcher
from .linear import (
    LinearResult,
    TeacherHead,
    counted_tokens,
    kept_tokens,
    picked,
    student_chunks,
    survivors_launcher,
)
from .mixture import gradient_passes, mix_launcher
from .rows import RowLauncher, RowResult, RowSpec, joined_stats, packed_numbers, stat_count
from .schema import (
    READS_ON_HOST,
    LinearSettings,
    check_values,
    fake_linear_results,
    half_gain,
    linear_results,
    register_linear_autograd,
)


class _Taught(NamedTuple):
    """What a row pass distils from: the logits of one teacher, or a mixture of several."""

    audio: Tensor  # (1, C, V)
    text: Tensor | None
    alpha: Tensor
    spec: RowSpec
    weight: Tensor  # (C,)
    rest: Tensor | None = None  # (C,) what the divergence from the mixture leaves out


@dataclass(frozen=True, eq=False)
class _Chunk:
    """The row passes of C tokens, in the order in which they run."""

    teachers: Sequence[TeacherHead]
    passes: list[list[int]]  # indices of the teachers that share a row pass
    spec: RowSpec  # what is common to all teachers
    rows: RowLauncher
    mix: Callable[..., Tensor]
    tokens: slice
    labels: Tensor | None  # (C,)
    omega: Tensor  # (K, C)
    kd_coef: Tensor  # (C,)
    ce_coef: Tensor
    student: Tensor  # (1, C, V)
    scratch: Tensor  # (buffers, C, V)
    totals: Tensor  # (buffers, C, V) float32
    stats: dict[int, RowResult] | None  # by teacher, filled here; None: not wanted

    def solve(self, grad: Tensor | None) -> RowResult:
        """kd, ce and statistics; the gradient goes into ``grad`` (C, V), which lies over the student's logits."""
        if not self.passes:
            coefs, grad = (self.kd_coef, self.ce_coef), None if grad is None else grad[None]
            return self.rows(self.student, self.student, None, self.labels, self._no_alpha, *coefs, self.spec, grad=grad)
        kd = torch.zeros_like(self.kd_coef)
        for number, group in enumerate(self.passes):
            first, last = number == 0, number == len(self.passes) - 1
            taught = self._mixture(number, group) if len(group) > 1 else self._one(group[0])
            row_grad = None
            if grad is not None:
                # The student's logits are needed until the last pass. So gradients overwrite the logits of the teachers.
                row_grad = grad[None] if first and last else self.totals[None, 0] if first else taught.audio
            out = self._row_pass(taught, row_grad, with_ce=self.spec.with_ce and last)
            kd += torch.where(taught.weight == 0, 0.0, taught.weight * out.kd)
            if taught.rest is not None:
                kd += self.spec.temperature**2 * taught.rest
            if grad is not None and row_grad is not None and not first:
                torch.add(self.totals[0], row_grad[0], out=grad if last else self.totals[0])
        stats = None if self.stats is None else joined_stats([self.stats[k] for k in range(len(self.teachers))])
        return RowResult(kd=kd, ce=out.ce, stats=stats)

    @property
    def _no_alpha(self) -> Tensor:
        return self.omega.new_zeros(1)

    def _row_pass(self, taught: _Taught, grad: Tensor | None, *, with_ce: bool) -> RowResult:
        spec = dataclasses.replace(taught.spec, with_ce=with_ce)
        kd_coef = self.kd_coef * taught.weight
        return self.rows(
            self.student, taught.audio, taught.text, self.labels, taught.alpha, kd_coef, self.ce_coef, spec, grad=grad
        )

    def _one(self, k: int) -> _Taught:
        teacher = self.teachers[k]
        return _Taught(*self._logits(k), teacher.alpha_of(self.tokens), teacher.row_spec, self.omega[k])

    def _mixture(self, number: int, group: list[int]) -> _Taught:
        """The teachers of a group as one teacher. Its logits go into ``totals[number]``."""
        total = self.totals[None, number]
        sums: Any = None  # the first teacher makes them
        weight = functools.reduce(torch.add, [self.omega[k] for k in group])
        for k in group:
            share = torch.where(weight == 0, 0.0, self.omega[k] / weight)
            audio, text = self._logits(k)
            teacher = self.teachers[k]
            alpha = teacher.alpha_of(self.tokens)
            sums = self.mix(audio, text, self.labels, alpha, share, teacher.row_spec, total, sums, last=k == group[-1])
        mass, rest = sums.float().unbind(0)
        spec = dataclasses.replace(self.spec, divergence=self.teachers[group[0]].spec.divergence)
        return _Taught(total, None, self._no_alpha, spec, weight * mass, weight * rest)

    def _logits(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Teacher k's logits (1, C, V) in ``scratch``, and its statistics where they are wanted."""
        teacher = self.teachers[k]
        audio, text = teacher.logits(self.tokens, self.labels, self.scratch)
        audio, text = audio[None], None if text is None else text[None]
        if self.stats is not None:
            spec, unused = dataclasses.replace(teacher.row_spec, with_ce=False), torch.zeros_like(self.kd_coef)
            alpha = teacher.alpha_of(self.tokens)
            self.stats[k] = self.rows(
                self.student, audio, text, self.labels, alpha, unused, unused, spec, want_stats=True
            )
        return audio, text


def multi_teacher_chunks(
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden states (N, H_s), weight (V_s, H_s), bias
    teachers: Sequence[TeacherHead],
    target: Tensor | None,
    omega: Tensor,  # (K, N)
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec: RowSpec,
    *,
    rows: RowLauncher,
    mix: Callable[..., Tensor],
    logits_dtype: torch.dtype,
    want_stats: bool,
    gain: Tensor | None,
    **chunks: Any,
) -> LinearResult:
    """kd is sum_k omega_k kd_k. ``spec``: what is common to all teachers; ``chunks``: keywords of student_chunks."""
    if gain is not None:
        kd_coef, ce_coef = kd_coef * gain, ce_coef * gain
    keep = kept_tokens(target, spec.ignore_index)
    target, kd_coef, ce_coef = picked(keep, target), picked(keep, kd_coef), picked(keep, ce_coef)
    omega = picked(keep, omega, dim=1)
    omega = torch.where(omega >= 0, omega, torch.nan)
    counts = counted_tokens(target, spec.ignore_index, kd_coef * omega.sum(0), ce_coef)
    teachers = [t.pick(keep) for t in teachers]
    need_teachers = spec.with_kd or want_stats
    passes = gradient_passes([t.spec.divergence for t in teachers]) if need_teachers else []
    mixtures = sum(len(group) > 1 for group in passes)

    def chunk_rows(
        tokens: slice, student_logits: Tensor, scratch: Tensor, totals: Tensor, grad: Tensor | None
    ) -> RowResult:
        labels = None if target is None else target[tokens]
        here = (omega[:, tokens], kd_coef[tokens], ce_coef[tokens])
        stats: dict[int, RowResult] | None = {} if want_stats else None
        of_all = (teachers, passes, spec, rows, mix)
        return _Chunk(*of_all, tokens, labels, *here, student_logits[None], scratch, totals, stats).solve(grad)

    return student_chunks(
        *student,
        chunk_rows,
        keep=keep,
        counts=counts,
        vocab=spec.vocab,
        logits_dtype=logits_dtype,
        teacher_buffers=need_teachers * (1 + any(t.two_paths for t in teachers)),
        float32_buffers=max(mixtures, int(len(passes) > 1)),
        n_stats=stat_count(len(teachers)) if want_stats else 0,
        gain=gain,
        **chunks,
    )


def packed_specs(specs: Sequence[RowSpec]) -> tuple[list[int], Tensor, str]:
    """The operator's arguments. The teachers' specs may differ only in the fields that concern a teacher alone."""
    parts = [spec.parts() for spec in specs]
    numbers = packed_numbers([x for _, of_one, _ in parts for x in of_one])
    return parts[0][0], numbers, ",".join(name for _, _, name in parts)


def _unpacked_specs(whole: Sequence[int], numbers: Tensor, divergences: str) -> list[RowSpec]:
    names = divergences.split(",")
    by_teacher = numbers.view(len(names), -1).tolist()
    return [RowSpec.unpacked(whole, own, name) for own, name in zip(by_teacher, names, strict=True)]


@library.custom_op("kdkernels::linear_multi_teacher", mutates_args=(), **READS_ON_HOST)
def linear_multi_teacher(
    student_hidden: Tensor,  # (N, H_s)
    student_weight: Tensor,  # (V_s, H_s)
    student_bias: Tensor | None,
    audio_hidden: Sequence[Tensor],  # K of (N, H_k), and so on
    text_hidden: Sequence[Optional[Tensor]],  # noqa: UP045 - torch reads the annotation; of a list it does not know "| None"
    teacher_weight: Sequence[Tensor],
    teacher_bias: Sequence[Optional[Tensor]],  # noqa: UP045
    alpha: Sequence[Tensor],
    target: Tensor | None,
    omega: Tensor,  # (K, N) float32
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec_whole: Sequence[int],  # packed_specs
    spec_numbers: Tensor,
    divergences: str,
    wanted_whole: Sequence[int],  # LinearSettings.packed()
    logits_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As linear_caad; the statistics are (2 + stat_count(K), N)."""
    student = (student_hidden, student_weight, student_bias)
    specs = _unpacked_specs(spec_whole, spec_numbers, divergences)
    common, wanted = specs[0].of_student(), LinearSettings.unpacked(wanted_whole, logits_dtype, impl)
    for k, a in enumerate(alpha):
        check_values(None if k else target, a, common.vocab, common.ignore_index, source=f"sources[{k}].")
    heads = zip(audio_hidden, text_hidden, teacher_weight, teacher_bias, alpha, strict=True)
    teachers = [
        TeacherHead(*head, spec, wanted.want_stats, logits_dtype, survivors_launcher(impl), wanted.round_contrast)
        for head, spec in zip(heads, specs, strict=True)
    ]
    gain = None
    if wanted.any_grad:
        gain = half_gain(kd_coef * omega.sum(0), ce_coef, student_hidden.dtype, student_weight.dtype, logits_dtype)
    with torch.amp.autocast(student_hidden.device.type, enabled=False):
        out = multi_teacher_chunks(
            student,
            teachers,
            target,
            omega,
            kd_coef,
            ce_coef,
            common,
            rows=row_launcher(impl),
            mix=mix_launcher(impl),
            gain=gain,
            **wanted.chunks,
        )
    return linear_results(out, student, kd_coef, ce_coef, wanted.reduced)


_TENSORS = 12  # inputs up to ce_coef


@linear_multi_teacher.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_stats = 2 + stat_count(len(arguments[3]))
    wanted = LinearSettings.unpacked(*arguments[-3:])
    return fake_linear_results(arguments[:3], arguments[_TENSORS - 2], wanted, n_stats)


register_linear_autograd(linear_multi_teacher, tensors=_TENSORS)
