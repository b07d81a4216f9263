"""The student's rows against a projected teacher (:mod:`kdkernels.ops.projection`) in Triton, in the manner of
:mod:`kdkernels.ops.triton_caad`: one program a row, blocks of G groups of E logits, a group's running sums in one thread.

Pass 1 walks the row downwards for its maximum and sums, pass 2 upwards for the gradient. Then the items of the likeliest ids and
of the label are written again, each from one float32 sum. Their logits are read first, because the gradient may overwrite them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .projected import Projected
from .rows import RowResult, RowSpec, check_overlap
from .triton_caad import launch_table
from .triton_shared import (
    _FLOOR,
    _LOG2E,
    _MASKED,
    _advance,
    _advance_moment,
    _columns,
    _cross_entropy,
    _device_of,
    _entropy,
    _first,
    _is_vectorisable,
    _latest_argmax,
    _merge_moment,
    _merge_weight,
    _rates,
    _read,
    _readable,
    _reciprocal,
    _stride,
    _temperature_code,
)


@triton.jit(do_not_specialize=["stride_stats"])
def _projected_row_kernel(
    student_ptr,
    ids_ptr,
    probabilities_ptr,
    mass_ptr,
    rest_ptr,
    target_ptr,
    kd_coef_ptr,
    ce_coef_ptr,
    grad_ptr,
    kd_ptr,
    ce_ptr,
    stats_ptr,
    stride_student,
    stride_grad,
    stride_stats,
    top_k,  # K
    vocab,  # V
    readable,  # see _readable, or None
    width,  # V_s
    ignore_index,
    inverse_temperature,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    TOP: tl.constexpr,  # power of two >= K
    TEMPERATURE: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    WITH_KD: tl.constexpr,
    WITH_CE: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    WANT_STATS: tl.constexpr,
    SCALE: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0)
    # 64 bits: row * stride passes 2^31 from 16k rows of a 128k vocabulary on.
    row64 = row.to(tl.int64)
    student_ptr += row64 * stride_student
    if WANT_GRAD:
        grad_ptr += row64 * stride_grad
    local = _columns(GROUPS, GROUP, CONTIGUOUS)  # (G, E)

    if HAS_TARGET:
        target = tl.load(target_ptr + row)
        if target == ignore_index:
            tl.store(kd_ptr + row, 0.0)
            tl.store(ce_ptr + row, 0.0)
            if WANT_STATS:
                tl.store(stats_ptr + row, 0.0)
                tl.store(stats_ptr + stride_stats + row, 0.0)
            if WANT_GRAD:
                for start in range(0, width, BLOCK):
                    columns = start + local
                    zero = tl.zeros([GROUPS, GROUP], tl.float32)
                    tl.store(grad_ptr + columns, zero.to(grad_ptr.dtype.element_ty), mask=columns < width)
            return

    rate, inverse_tau = _rates(inverse_temperature, TEMPERATURE)
    top = tl.arange(0, TOP)
    ids = tl.load(ids_ptr + row64 * top_k + top, mask=top < top_k, other=-1)
    p = tl.load(probabilities_ptr + row64 * top_k + top, mask=top < top_k, other=0.0)
    known = (ids >= 0) & (ids < vocab) & (p != 0.0)
    ids = tl.where(known, ids, 0)
    p = tl.where(known, p, 0.0)
    s_known = _read(student_ptr, ids, known, SCALE, None)
    label = 0
    label_logit = 0.0
    if WITH_CE:
        label_inside = (target >= 0) & (target < vocab)
        label = tl.where(label_inside, target, 0).to(tl.int32)
        label_logit = _read(student_ptr, label, label_inside, SCALE, None)

    # Pass 1. q is the student's softmax at tau, q1 at 1. All sums are (G,).
    s_max = tl.full([GROUPS], _FLOOR, tl.float32)
    q_sum = tl.zeros([GROUPS], tl.float32)
    q1_sum = tl.zeros([GROUPS], tl.float32)
    if WANT_STATS:
        q_moment = tl.zeros([GROUPS], tl.float32)
        s_top = tl.zeros([GROUPS], tl.int32)
    blocks = tl.cdiv(vocab, BLOCK)
    for i in range(0, blocks):
        columns = (blocks - 1 - i) * BLOCK + local
        s = _read(student_ptr, columns, columns < vocab, SCALE, None, readable)
        s_old = s_max
        s_max, s_keep, s_shifted, s_exp = _advance(s_max, s, rate)
        if WANT_STATS:
            s_top = _latest_argmax(s, columns, s_old, s_top)
            q_moment = _advance_moment(q_moment, q_sum, s_old, s_max, s_keep, s_exp, s_shifted)
        q_sum = q_sum * s_keep + tl.sum(s_exp, axis=1)
        if WITH_CE and TEMPERATURE == 2:
            q1_sum = q1_sum * (s_keep * s_keep) + tl.sum(s_exp * s_exp, axis=1)  # e^s = (e^(s/2))^2
        if WITH_CE and TEMPERATURE == 0:
            q1_sum = q1_sum * tl.exp2((s_old - s_max) * _LOG2E) + tl.sum(tl.exp2(s_shifted * _LOG2E), axis=1)

    s_row, s_weight = _merge_weight(s_max, rate)
    q_row = tl.sum(q_sum * s_weight, axis=0)
    inverse_q = _reciprocal(q_row)
    if WITH_CE:
        q1_row = q_row
        if TEMPERATURE != 1:
            q1_row = tl.sum(q1_sum * _merge_weight(s_max, _LOG2E)[1], axis=0)
        tl.store(ce_ptr + row, _cross_entropy(q1_row, s_row, label_logit, label_inside))
    else:
        tl.store(ce_ptr + row, 0.0)

    mass = tl.load(mass_ptr + row)
    if WITH_KD:
        rest = tl.load(rest_ptr + row)
        masked = tl.sum(tl.where(known & (s_known == _MASKED), 1.0, 0.0), axis=0)
        below = tl.where(s_known == _MASKED, 0.0, s_known - s_row) * inverse_tau
        left = mass - tl.sum(p, axis=0)
        kd = mass * tl.log(tl.where(q_row == 0.0, 1.0, q_row)) + (left * (s_row * inverse_tau) + rest) - tl.sum(p * below, axis=0)
        kd = tl.where(kd < 0.0, 0.0, kd)  # rounding; NaN passes
        kd = tl.where((masked > 0.0) | (q_row == 0.0), float("inf"), kd)
        tl.store(kd_ptr + row, tl.where(mass == 0.0, 0.0, kd / (inverse_tau * inverse_tau)))
    else:
        tl.store(kd_ptr + row, 0.0)

    if WANT_STATS:
        q_mean = _merge_moment(q_moment, q_sum, s_max, s_row, s_weight) * inverse_q * inverse_tau
        tl.store(stats_ptr + row, _entropy(q_row, q_mean))
        largest = tl.max(p, axis=0)
        place = tl.min(tl.where((p == largest) & (p > 0.0), top, TOP), axis=0)
        likeliest = tl.sum(tl.where(top == place, ids, 0), axis=0)
        same = (largest > 0.0) & (_first(s_max, s_top, s_row) == likeliest)
        tl.store(stats_ptr + stride_stats + row, tl.where(same, 1.0, 0.0))

    # Pass 2.
    if WANT_GRAD:
        kd_scale = 0.0
        ce_scale = 0.0
        inverse_q1 = 0.0
        if WITH_KD:
            kd_scale = tl.load(kd_coef_ptr + row) / inverse_tau * SCALE
        if WITH_CE:
            ce_scale = tl.load(ce_coef_ptr + row) * SCALE
            ce_scale = tl.where(label_inside | (ce_scale == 0.0), ce_scale, float("nan"))
            inverse_q1 = _reciprocal(q1_row)
        for start in range(0, width, BLOCK):
            columns = start + local
            s = _read(student_ptr, columns, columns < vocab, SCALE, None, readable)
            gradient = _student_gradient(
                s, s_row, kd_scale * mass, ce_scale, inverse_q, inverse_q1, rate, TEMPERATURE, WITH_KD, WITH_CE
            )
            tl.debug_barrier()  # all of this block is read before any of it is overwritten
            tl.store(grad_ptr + columns, gradient.to(grad_ptr.dtype.element_ty), mask=columns < width)
        tl.debug_barrier()
        label_known = tl.zeros([TOP], tl.int32) > 0
        if WITH_CE:
            label_known = known & (ids == label)
        if WITH_KD:
            gradient = _student_gradient(
                s_known, s_row, kd_scale * mass, ce_scale, inverse_q, inverse_q1, rate, TEMPERATURE, WITH_KD, WITH_CE
            )
            gradient -= tl.where(kd_scale == 0.0, 0.0, kd_scale * p) + tl.where(label_known, ce_scale, 0.0)
            gradient = tl.where(s_known == _MASKED, 0.0, gradient)
            tl.store(grad_ptr + ids, gradient.to(grad_ptr.dtype.element_ty), mask=known)
        if WITH_CE:
            gradient = _student_gradient(
                label_logit, s_row, kd_scale * mass, ce_scale, inverse_q, inverse_q1, rate, TEMPERATURE, WITH_KD, WITH_CE
            )
            gradient = tl.where(label_logit == _MASKED, 0.0, gradient - ce_scale)
            written = False
            if WITH_KD:
                written = tl.sum(label_known.to(tl.int32), axis=0) > 0
            tl.store(grad_ptr + label, gradient.to(grad_ptr.dtype.element_ty), mask=label_inside & (written == 0))


@triton.jit
def _student_gradient(
    s, s_row, kd_scale, ce_scale, inverse_q, inverse_q1, rate, TEMPERATURE: tl.constexpr, WITH_KD: tl.constexpr,
    WITH_CE: tl.constexpr,
):  # fmt: skip
    """kd_scale q + ce_scale q1; 0 at a masked logit, and from a term without a factor."""
    s_exp = tl.exp2((s - s_row) * rate)
    q = s_exp * inverse_q
    gradient = tl.zeros_like(q)
    if WITH_KD:
        gradient = tl.where(kd_scale == 0.0, 0.0, kd_scale * q)
    if WITH_CE:
        if TEMPERATURE == 1:
            q1 = q
        elif TEMPERATURE == 2:
            q1 = s_exp * s_exp * inverse_q1
        else:
            q1 = tl.exp2((s - s_row) * _LOG2E) * inverse_q1
        gradient += tl.where(ce_scale == 0.0, 0.0, ce_scale * q1)
    return tl.where(s == _MASKED, 0.0, gradient)


def projected_rows(
    student: torch.Tensor,
    projected: Projected,
    rest: torch.Tensor,
    target: torch.Tensor | None,
    kd_coef: torch.Tensor,
    ce_coef: torch.Tensor,
    spec: RowSpec,
    *,
    grad: torch.Tensor | None,
    want_stats: bool,
) -> RowResult:
    """See :func:`kdkernels.ops.projection.projected_rows_launcher`. All arithmetic is in float32; nothing is read back."""
    rows = student.shape[1]
    out = RowResult.empty(rows, 2 if want_stats else 0, student.device)
    if grad is not None:
        check_overlap(student, grad)
    if rows == 0:
        return out
    ids, probabilities = projected.ids.contiguous(), projected.probabilities.contiguous()
    readable = _readable([student], grad, spec.vocab)
    with _device_of(student, _projected_row_kernel):
        _projected_row_kernel[(rows,)](
            student_ptr=student,
            ids_ptr=ids,
            probabilities_ptr=probabilities,
            mass_ptr=projected.mass.contiguous(),
            rest_ptr=rest.float().contiguous(),
            target_ptr=target,
            kd_coef_ptr=kd_coef,
            ce_coef_ptr=ce_coef,
            grad_ptr=grad,
            kd_ptr=out.kd,
            ce_ptr=out.ce,
            stats_ptr=out.stats,
            stride_student=_stride(student, 1),
            stride_grad=_stride(grad, 1),
            stride_stats=0 if out.stats is None else out.stats.stride(0),
            top_k=ids.shape[1],
            vocab=spec.vocab,
            readable=readable,
            width=student.shape[2],
            ignore_index=spec.ignore_index,
            inverse_temperature=1.0 / spec.temperature,
            CONTIGUOUS=readable is not None
            or all(_is_vectorisable(x, spec.vocab) for x in (student, grad) if x is not None),
            TOP=triton.next_power_of_2(ids.shape[1]),
            TEMPERATURE=_temperature_code(spec.temperature),
            HAS_TARGET=target is not None,
            WITH_KD=spec.with_kd,
            WITH_CE=spec.with_ce and target is not None,
            WANT_GRAD=grad is not None,
            WANT_STATS=want_stats,
            SCALE=float(spec.student_scale),
            **launch_table(spec, student.element_size(), want_stats),
        )
    return out
