"""Several teachers behind one student: the chunk loop of :mod:`kdkernels.ops.linear` with one gradient for all that can be mixed,
and its operator.

Per chunk of C tokens: the student's logits, then a teacher's after the other into the same scratch and from there into the
mixture (:mod:`kdkernels.ops.mixture`), then the row kernel once. A teacher that cannot be mixed has a row pass of its own; the
gradients of several passes are added in float32.

Legend: N tokens, C tokens of a chunk, K teachers, V valid ids, H_s / H_k hidden widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, library

from .dispatch import row_launcher
from .linear import LinearResult, TeacherHead, kept_tokens, picked, student_chunks, survivors_launcher
from .mixture import gradient_passes, mix_launcher
from .rows import RowResult, RowSpec, joined_stats, stat_count
from .schema import check_values, fake_linear_results, half_gain, linear_results, register_linear_autograd


def multi_teacher_chunks(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teachers: Sequence[TeacherHead],
    target: Tensor | None,
    omega: Tensor,  # (K, N)
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec: RowSpec,
    *,
    rows: Callable[..., RowResult],
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
    target, kd_coef, ce_coef = picked(keep, target, kd_coef, ce_coef)
    omega = omega if keep is None else omega.index_select(1, keep)
    omega = torch.where(omega >= 0, omega, torch.nan)
    teachers = [t.pick(keep) for t in teachers]
    need_teachers = spec.with_kd or want_stats
    passes = gradient_passes([t.spec.divergence for t in teachers]) if need_teachers else []
    mixtures = sum(len(group) > 1 for group in passes)
    no_alpha = omega.new_zeros(1)

    def chunk_rows(
        chunk: slice, student_logits: Tensor, scratch: Tensor, totals: Tensor, grad: Tensor | None
    ) -> RowResult:
        labels = None if target is None else target[chunk]
        student, ce_only = student_logits[None], (labels, no_alpha, kd_coef[chunk], ce_coef[chunk])
        if not passes:
            return rows(student, student, None, *ce_only, spec, grad=None if grad is None else grad[None])
        kd, ce = torch.zeros_like(kd_coef[chunk]), None
        stats: list[RowResult | None] = [None] * len(teachers)

        def logits(k: int) -> tuple[Tensor, Tensor | None]:
            audio, text = (None if x is None else x[None] for x in teachers[k].logits(chunk, labels, scratch))
            if want_stats:
                measured = dataclasses.replace(teachers[k].row_spec, with_ce=False)
                unused = torch.zeros_like(kd)
                alpha = teachers[k].alpha_of(chunk)
                stats[k] = rows(student, audio, text, labels, alpha, unused, unused, measured, want_stats=True)
            return audio, text

        for number, group in enumerate(passes):
            first, last = number == 0, number == len(passes) - 1
            weight = sum(omega[k, chunk] for k in group)
            rest = None
            if len(group) > 1:
                audio, text, alpha = totals[None, number], None, no_alpha
                row_spec = dataclasses.replace(spec, divergence=teachers[group[0]].spec.divergence)
                sums = None
                for k in group:
                    share = torch.where(weight == 0, 0.0, omega[k, chunk] / weight)
                    a, t = logits(k)
                    here = teachers[k]
                    sums = mix(
                        a, t, labels, here.alpha_of(chunk), share, here.row_spec, audio, sums, last=k == group[-1]
                    )
                mass, rest = sums.float().unbind(0)
                weight, rest = weight * mass, weight * rest
            else:
                here = teachers[group[0]]
                audio, text = logits(group[0])
                alpha, row_spec = here.alpha_of(chunk), here.row_spec
            # Until the last pass the student's logits are still wanted: gradients go over what was distilled from.
            if grad is None:
                row_grad = None
            elif len(passes) == 1:
                row_grad = grad[None]
            else:
                row_grad = totals[None, 0] if first else audio
            out = rows(
                student,
                audio,
                text,
                labels,
                alpha,
                kd_coef[chunk] * weight,
                ce_coef[chunk],
                dataclasses.replace(row_spec, with_ce=spec.with_ce and last),
                grad=row_grad,
            )
            kd += torch.where(weight == 0, 0.0, weight * out.kd)
            if rest is not None:
                kd += spec.temperature**2 * rest
            ce = out.ce
            if grad is not None and not first:
                torch.add(totals[0], row_grad[0], out=grad if last else totals[0])
        return RowResult(kd=kd, ce=ce, stats=joined_stats(stats) if want_stats else None)

    return student_chunks(
        student_hidden,
        student_weight,
        student_bias,
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


@library.custom_op("kdkernels::linear_multi_teacher", mutates_args=())
def linear_multi_teacher(
    student_hidden: Tensor,  # (N, H_s)
    student_weight: Tensor,  # (V_s, H_s)
    student_bias: Tensor | None,
    audio_hidden: Sequence[Tensor],  # K of (N, H_k), and so on
    text_hidden: Sequence[Optional[Tensor]],  # noqa: UP045 - torch reads the annotation, and knows a list of "| None" not
    teacher_weight: Sequence[Tensor],
    teacher_bias: Sequence[Optional[Tensor]],  # noqa: UP045
    alpha: Sequence[Tensor],
    target: Tensor | None,
    omega: Tensor,  # (K, N) float32
    kd_coef: Tensor,
    ce_coef: Tensor,
    vocab: int,
    temperature: float,
    divergence: str,  # K of them, with commas
    jsd_beta: Sequence[float],
    plausibility: Sequence[float],  # 0: none
    ignore_index: int,
    with_kd: bool,
    with_ce: bool,
    student_scale: float,
    teacher_scale: Sequence[float],
    student_softcap: float | None,
    teacher_softcap: Sequence[float],  # 0: none
    logits_dtype: torch.dtype,
    chunk_tokens: int | None,
    workspace_bytes: int | None,
    reduced: bool,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    want_stats: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As linear_caad; the statistics are (2 + stat_count(K), N)."""
    for k, a in enumerate(alpha):
        check_values(None if k else target, a, vocab, ignore_index, source=f"sources[{k}].")
    spec = RowSpec(
        vocab=vocab,
        temperature=temperature,
        ignore_index=ignore_index,
        with_kd=with_kd,
        with_ce=with_ce,
        student_scale=student_scale,
        student_softcap=student_softcap,
    )
    teachers = [
        TeacherHead(
            *tensors,
            dataclasses.replace(
                spec,
                divergence=kind,
                jsd_beta=beta,
                plausibility=mask or None,
                teacher_scale=scale,
                teacher_softcap=cap or None,
            ),
            want_stats,
            logits_dtype,
            survivors_launcher(impl),
        )
        for *tensors, kind, beta, mask, scale, cap in zip(
            audio_hidden, text_hidden, teacher_weight, teacher_bias, alpha,
            divergence.split(","), jsd_beta, plausibility, teacher_scale, teacher_softcap, strict=True,
        )
    ]  # fmt: skip
    any_grad = hidden_grad or weight_grad or bias_grad
    gain = None
    if any_grad:
        dtypes = (student_hidden.dtype, student_weight.dtype, logits_dtype)
        gain = half_gain(kd_coef * omega.sum(0), ce_coef, *dtypes)
    with torch.amp.autocast(student_hidden.device.type, enabled=False):
        out = multi_teacher_chunks(
            student_hidden,
            student_weight,
            student_bias,
            teachers,
            target,
            omega,
            kd_coef,
            ce_coef,
            spec,
            rows=row_launcher(impl),
            mix=mix_launcher(impl),
            logits_dtype=logits_dtype,
            chunk_tokens=chunk_tokens,
            workspace_bytes=workspace_bytes,
            hidden_grad=hidden_grad,
            weight_grad=weight_grad,
            bias_grad=bias_grad,
            want_stats=want_stats,
            gain=gain,
        )
    return linear_results(out, student_hidden, student_weight, kd_coef, ce_coef, reduced, gain)


@linear_multi_teacher.register_fake
def _(student_hidden, student_weight, student_bias, audio_hidden, text_hidden, teacher_weight, teacher_bias, alpha, target,
      omega, kd_coef, ce_coef, vocab, temperature, divergence, jsd_beta, plausibility, ignore_index, with_kd, with_ce,
      student_scale, teacher_scale, student_softcap, teacher_softcap, logits_dtype, chunk_tokens, workspace_bytes, reduced,
      hidden_grad, weight_grad, bias_grad, want_stats, impl):  # fmt: skip
    return fake_linear_results(
        student_hidden, student_weight, student_bias, kd_coef, logits_dtype, reduced, hidden_grad, weight_grad, bias_grad,
        (2 + stat_count(len(audio_hidden))) * want_stats,
    )  # fmt: skip


register_linear_autograd(linear_multi_teacher, tensors=12)
