"""Several teachers behind one student: the chunk loop of :mod:`kdkernels.ops.linear` with one gradient for all that can be mixed,
and its operator.

Per chunk of C tokens: the student's logits, then a teacher's after the other into the same scratch and from there into the
mixture (:mod:`kdkernels.ops.mixture`), then the row kernel once. A teacher that cannot be mixed has a row pass of its own; the
gradients of several passes are added in float32.

Legend: N tokens, C tokens of a chunk, K teachers, V valid ids, H_s / H_k hidden widths.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from .dispatch import row_launcher
from .linear import LinearResult, TeacherHead, kept_tokens, picked, student_chunks, survivors_launcher
from .mixture import gradient_passes, mix_launcher
from .rows import SPEC_FIELDS, RowLauncher, RowResult, RowSpec, joined_stats, stat_count
from .schema import (
    LinearSettings,
    check_values,
    fake_linear_results,
    half_gain,
    linear_results,
    register_linear_autograd,
    schema_of,
    split_settings,
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
                # Until the last pass the student's logits are still wanted: gradients go over what was distilled from.
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
        """The teachers of a group as one, whose logits go into ``totals[number]``."""
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
        vocab=spec.vocab,
        logits_dtype=logits_dtype,
        teacher_buffers=need_teachers * (1 + any(t.two_paths for t in teachers)),
        float32_buffers=max(mixtures, int(len(passes) > 1)),
        n_stats=stat_count(len(teachers)) if want_stats else 0,
        gain=gain,
        **chunks,
    )


# The fields of RowSpec that are one a teacher: divergences with commas between them, 0 for no plausibility mask and no softcap.
_BY_TEACHER = {
    "divergence": "str",
    "jsd_beta": "float[]",
    "plausibility": "float[]",
    "teacher_scale": "float[]",
    "teacher_softcap": "float[]",
}


def packed_specs(common: RowSpec, specs: Sequence[RowSpec]) -> list[Any]:
    """The operator's arguments for K teachers that share all but the fields of _BY_TEACHER."""
    packed: dict[str, Any] = {name: [getattr(s, name) or 0.0 for s in specs] for name in _BY_TEACHER}
    packed["divergence"] = ",".join(s.divergence for s in specs)
    return [packed.get(name, value) for name, value in zip(SPEC_FIELDS, common.values(), strict=True)]


def _unpacked_specs(settings: Sequence[Any]) -> tuple[RowSpec, list[RowSpec]]:
    """(what is common to all teachers, each teacher's own) from :func:`packed_specs`."""
    fields = dict(zip(SPEC_FIELDS, settings, strict=True))
    lists = {name: fields.pop(name) for name in _BY_TEACHER}
    lists["divergence"] = lists["divergence"].split(",")
    for name in ("plausibility", "teacher_softcap"):
        lists[name] = [x or None for x in lists[name]]
    common = RowSpec(**fields)
    own = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    return common, [dataclasses.replace(common, **values) for values in own]


class _Arguments(NamedTuple):
    """The tensors of linear_multi_teacher."""

    student_hidden: Tensor  # (N, H_s)
    student_weight: Tensor  # (V_s, H_s)
    student_bias: Tensor | None
    audio_hidden: list[Tensor]  # K of (N, H_k), and so on
    text_hidden: list[Tensor | None]
    teacher_weight: list[Tensor]
    teacher_bias: list[Tensor | None]
    alpha: list[Tensor]
    target: Tensor | None
    omega: Tensor  # (K, N) float32
    kd_coef: Tensor
    ce_coef: Tensor

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> tuple[_Arguments, RowSpec, list[RowSpec], LinearSettings]:
        """(tensors, what is common to all teachers, each teacher's own spec, settings) from the operator's arguments."""
        tensors, settings, wanted = split_settings(arguments, len(cls._fields))
        return cls(*tensors), *_unpacked_specs(settings), wanted


@library.custom_op(
    "kdkernels::linear_multi_teacher",
    mutates_args=(),
    schema=(
        "(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor[] audio_hidden, Tensor?[] text_hidden, "
        "Tensor[] teacher_weight, Tensor?[] teacher_bias, Tensor[] alpha, Tensor? target, Tensor omega, Tensor kd_coef, "
        f"Tensor ce_coef, {schema_of(RowSpec, **_BY_TEACHER)}, {schema_of(LinearSettings)}) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def linear_multi_teacher(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As linear_caad; the statistics are (2 + stat_count(K), N)."""
    given, common, specs, wanted = _Arguments.of(arguments)
    for k, alpha in enumerate(given.alpha):
        check_values(None if k else given.target, alpha, common.vocab, common.ignore_index, source=f"sources[{k}].")
    survivors = survivors_launcher(wanted.impl)
    heads = zip(given.audio_hidden, given.text_hidden, given.teacher_weight, given.teacher_bias, given.alpha, strict=True)
    teachers = [
        TeacherHead(*head, spec, wanted.want_stats, wanted.logits_dtype, survivors)
        for head, spec in zip(heads, specs, strict=True)
    ]
    gain = None
    if wanted.any_grad:
        dtypes = (given.student_hidden.dtype, given.student_weight.dtype, wanted.logits_dtype)
        gain = half_gain(given.kd_coef * given.omega.sum(0), given.ce_coef, *dtypes)
    with torch.amp.autocast(given.student_hidden.device.type, enabled=False):
        out = multi_teacher_chunks(
            given[:3],
            teachers,
            *given[8:],
            common,
            rows=row_launcher(wanted.impl),
            mix=mix_launcher(wanted.impl),
            gain=gain,
            **wanted.chunks,
        )
    return linear_results(out, given[:3], given.kd_coef, given.ce_coef, wanted.reduced, gain)


@linear_multi_teacher.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, _, specs, wanted = _Arguments.of(arguments)
    return fake_linear_results(given[:3], given.kd_coef, wanted, 2 + stat_count(len(specs)))


register_linear_autograd(linear_multi_teacher, tensors=len(_Arguments._fields))
