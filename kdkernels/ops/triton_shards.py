"""One rank's slice of rows over several ranks (:mod:`kdkernels.ops.shards`) in Triton, in the manner of
:mod:`kdkernels.ops.triton_caad`: one program a row, blocks of G groups of E logits, a group's running sums in one thread, masked
logits as finite sentinels, a gradient that may lie in the student's memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .rows import DIVERGENCES, RowProblem, check_overlap
from .shards import FACTORS, STAT_SUMS, SUMS
from .triton_caad import launch_table
from .triton_shared import (
    _FLOOR,
    _FORWARD,
    _JSD,
    _LOG2E,
    _MASKED,
    _REVERSE,
    _advance,
    _advance_moment,
    _alpha_stride,
    _columns,
    _device_of,
    _first,
    _is_vectorisable,
    _jsd_terms,
    _latest_argmax,
    _merge_cross,
    _merge_moment,
    _merge_weight,
    _rates,
    _read,
    _read_pair,
    _read_teacher,
    _stride,
    _temperature_code,
)


@triton.jit
def _shard_max_kernel(
    audio_ptr,
    target_ptr,
    out_ptr,
    stride_audio,
    vocab,
    ignore_index,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0)
    audio_ptr += row.to(tl.int64) * stride_audio
    local = _columns(GROUPS, GROUP, CONTIGUOUS)  # (G, E)
    columns_here = vocab
    if HAS_TARGET:  # an ignored row is an empty slice
        columns_here = tl.where(tl.load(target_ptr + row) == ignore_index, 0, vocab)
    audio_max = tl.full([GROUPS], _FLOOR, tl.float32)
    for i in range(0, tl.cdiv(columns_here, BLOCK)):
        columns = i * BLOCK + local
        audio = _read(audio_ptr, columns, columns < columns_here, TEACHER_SCALE, TEACHER_SOFTCAP)
        audio_max = tl.maximum(audio_max, tl.max(audio, axis=1))
    tl.store(out_ptr + row, tl.max(audio_max, axis=0))


@triton.jit(do_not_specialize=["first", "stride_sums"])
def _shard_sums_kernel(
    student_ptr,
    audio_ptr,
    text_ptr,
    target_ptr,
    alpha_ptr,
    audio_max_ptr,
    sums_ptr,
    stride_student,
    stride_audio,
    stride_text,
    stride_alpha,
    stride_sums,
    vocab,
    first,
    ignore_index,
    inverse_temperature,
    log_plausibility,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEMPERATURE: tl.constexpr,  # 1, 2, or 0 for any other
    HAS_TEXT: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_PLAUSIBILITY: tl.constexpr,
    WITH_KD: tl.constexpr,
    WITH_CE: tl.constexpr,
    WANT_STATS: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * GROUP
    NEED_TEACHER: tl.constexpr = WITH_KD or WANT_STATS
    row = tl.program_id(0)
    # 64 bits: row * stride passes 2^31 from 16k rows of a 128k vocabulary on.
    row64 = row.to(tl.int64)
    student_ptr += row64 * stride_student
    if NEED_TEACHER:
        audio_ptr += row64 * stride_audio
    if HAS_TEXT:
        text_ptr += row64 * stride_text
    local = _columns(GROUPS, GROUP, CONTIGUOUS)  # (G, E)

    label = -1
    columns_here = vocab  # an ignored row is an empty slice
    if HAS_TARGET:
        target = tl.load(target_ptr + row)
        columns_here = tl.where(target == ignore_index, 0, vocab)
        label = tl.where((target >= first) & (target < first + columns_here), target - first, -1).to(tl.int32)

    rate, inverse_tau = _rates(inverse_temperature, TEMPERATURE)
    alpha = 0.0
    text_vocab = 0
    if HAS_TEXT:
        alpha = tl.load(alpha_ptr + row * stride_alpha)
        # Not read where it does not count; the statistics compare the two paths.
        text_vocab = columns_here if WANT_STATS else tl.where(alpha == 0.0, 0, columns_here)
    threshold = 0.0
    if HAS_PLAUSIBILITY:
        threshold = tl.load(audio_max_ptr + row) + log_plausibility

    # s: student, z: z_hat; q and p their softmax at tau, q1 the student's at 1. All sums are (G,).
    s_max = tl.full([GROUPS], _FLOOR, tl.float32)
    z_max = tl.full([GROUPS], _FLOOR, tl.float32)
    q_sum = tl.zeros([GROUPS], tl.float32)
    q1_sum = tl.zeros([GROUPS], tl.float32)
    p_sum = tl.zeros([GROUPS], tl.float32)
    cross = tl.zeros([GROUPS], tl.float32)  # forward: sum e^z (z - s); reverse: sum e^s (s - z); each less its maximum
    hole = tl.full([GROUPS], _MASKED, tl.float32)  # largest logit of the weighting side where the other is masked
    if WANT_STATS:
        q_moment = tl.zeros([GROUPS], tl.float32)  # sum e^s s, less the maximum
        p_moment = tl.zeros([GROUPS], tl.float32)
        s_top = tl.zeros([GROUPS], tl.int32)
        z_top = tl.zeros([GROUPS], tl.int32)
        audio_max = tl.full([GROUPS], _FLOOR, tl.float32)
        text_max = tl.full([GROUPS], _FLOOR, tl.float32)
        audio_sum = tl.zeros([GROUPS], tl.float32)
        text_sum = tl.zeros([GROUPS], tl.float32)
        path_cross = tl.zeros([GROUPS], tl.float32)
        path_hole = tl.full([GROUPS], _MASKED, tl.float32)

    blocks = tl.cdiv(columns_here, BLOCK)
    for i in range(0, blocks):
        columns = (blocks - 1 - i) * BLOCK + local
        inside = columns < columns_here
        s = _read(student_ptr, columns, inside, STUDENT_SCALE, STUDENT_SOFTCAP)
        s_old = s_max
        q_old = q_sum
        s_max, s_keep, s_shifted, s_exp = _advance(s_max, s, rate)
        q_sum = q_sum * s_keep + tl.sum(s_exp, axis=1)
        if WITH_CE and TEMPERATURE == 2:
            q1_sum = q1_sum * (s_keep * s_keep) + tl.sum(s_exp * s_exp, axis=1)  # e^s = (e^(s/2))^2
        if WITH_CE and TEMPERATURE == 0:
            q1_sum = q1_sum * tl.exp2((s_old - s_max) * _LOG2E) + tl.sum(tl.exp2(s_shifted * _LOG2E), axis=1)
        if NEED_TEACHER:
            audio, text, z = _read_teacher(
                audio_ptr, text_ptr, columns, inside, text_vocab, alpha, threshold, HAS_TEXT, HAS_PLAUSIBILITY, TEACHER_SCALE,
                TEACHER_SOFTCAP,
            )  # fmt: skip
            z_old = z_max
            p_old = p_sum
            z_max, z_keep, z_shifted, z_exp = _advance(z_max, z, rate)
            p_sum = p_sum * z_keep + tl.sum(z_exp, axis=1)
            if WITH_KD and DIVERGENCE == _FORWARD:
                moved = (z_old - z_max) - (s_old - s_max)
                cross = z_keep * (cross + p_old * moved) + tl.sum(z_exp * (z_shifted - s_shifted), axis=1)
                hole = tl.maximum(hole, tl.max(tl.where(s == _MASKED, z, _MASKED), axis=1))
            if WITH_KD and DIVERGENCE == _REVERSE:
                moved = (s_old - s_max) - (z_old - z_max)
                cross = s_keep * (cross + q_old * moved) + tl.sum(s_exp * (s_shifted - z_shifted), axis=1)
                hole = tl.maximum(hole, tl.max(tl.where(z == _MASKED, s, _MASKED), axis=1))
            if WANT_STATS:
                s_top = _latest_argmax(s, columns, s_old, s_top)
                z_top = _latest_argmax(z, columns, z_old, z_top)
                q_moment = _advance_moment(q_moment, q_old, s_old, s_max, s_keep, s_exp, s_shifted)
                p_moment = _advance_moment(p_moment, p_old, z_old, z_max, z_keep, z_exp, z_shifted)
                if HAS_TEXT:
                    audio_old, text_old = audio_max, text_max
                    audio_max, audio_keep, audio_shifted, audio_exp = _advance(audio_max, audio, rate)
                    text_max, text_keep, text_shifted, text_exp = _advance(text_max, text, rate)
                    moved = (audio_old - audio_max) - (text_old - text_max)
                    path_cross = audio_keep * (path_cross + audio_sum * moved)
                    path_cross += tl.sum(audio_exp * (audio_shifted - text_shifted), axis=1)
                    path_hole = tl.maximum(path_hole, tl.max(tl.where(text == _MASKED, audio, _MASKED), axis=1))
                    audio_sum = audio_sum * audio_keep + tl.sum(audio_exp, axis=1)
                    text_sum = text_sum * text_keep + tl.sum(text_exp, axis=1)

    # Merge the groups, and hand out float64 over tau: see SUMS.
    tau64 = inverse_tau * tl.full([], 1.0, tl.float64)
    s_row, s_weight = _merge_weight(s_max, rate)
    z_row, z_weight = _merge_weight(z_max, rate)
    out_ptr = sums_ptr + row
    _put(out_ptr, 0, stride_sums, s_row * tau64)
    _put(out_ptr, 1, stride_sums, z_row * tau64)
    _put(out_ptr, 2, stride_sums, tl.sum(q_sum * s_weight, axis=0))
    if WITH_CE and TEMPERATURE == 1:
        q1_sum = q_sum
    _put(out_ptr, 3, stride_sums, tl.sum(q1_sum * _merge_weight(s_max, _LOG2E)[1], axis=0))
    _put(out_ptr, 4, stride_sums, tl.sum(p_sum * z_weight, axis=0))
    if DIVERGENCE == _REVERSE:
        total = _merge_cross(cross, q_sum, s_max, z_max, s_row, z_row, s_weight)
        infinite = tl.exp2((tl.max(hole, axis=0) - s_row) * rate) > 0.0
    else:
        total = _merge_cross(cross, p_sum, z_max, s_max, z_row, s_row, z_weight)
        infinite = tl.exp2((tl.max(hole, axis=0) - z_row) * rate) > 0.0
    if DIVERGENCE == _JSD or not WITH_KD:
        total = 0.0
        infinite = False
    _put(out_ptr, 5, stride_sums, _or_infinite(total * tau64, infinite))
    here = 0.0 * tau64
    if WITH_CE:
        label_logit = _read(student_ptr, tl.maximum(label, 0), label >= 0, STUDENT_SCALE, STUDENT_SOFTCAP)
        here = tl.where(label >= 0, tl.where(label_logit == _MASKED, float("-inf"), label_logit * tau64), 0.0)
    _put(out_ptr, 6, stride_sums, here)
    if WANT_STATS:
        _put(out_ptr, 7, stride_sums, _merge_moment(q_moment, q_sum, s_max, s_row, s_weight) * tau64)
        _put(out_ptr, 8, stride_sums, _merge_moment(p_moment, p_sum, z_max, z_row, z_weight) * tau64)
        nothing = tl.where(vocab == 0, float("inf"), 0.0)
        _put(out_ptr, 9, stride_sums, first + _first(s_max, s_top, s_row).to(tl.float64) + nothing)
        _put(out_ptr, 10, stride_sums, first + _first(z_max, z_top, z_row).to(tl.float64) + nothing)
        audio_row, audio_weight = _merge_weight(audio_max, rate)
        text_row, text_weight = _merge_weight(text_max, rate)
        _put(out_ptr, 11, stride_sums, audio_row * tau64)
        _put(out_ptr, 12, stride_sums, text_row * tau64)
        _put(out_ptr, 13, stride_sums, tl.sum(audio_sum * audio_weight, axis=0))
        _put(out_ptr, 14, stride_sums, tl.sum(text_sum * text_weight, axis=0))
        path = _merge_cross(path_cross, audio_sum, audio_max, text_max, audio_row, text_row, audio_weight)
        infinite = tl.exp2((tl.max(path_hole, axis=0) - audio_row) * rate) > 0.0
        _put(out_ptr, 15, stride_sums, _or_infinite(path * tau64, infinite))


@triton.jit
def _put(out_ptr, index: tl.constexpr, stride, value):
    tl.store(out_ptr + index * stride, value.to(tl.float64))


@triton.jit
def _or_infinite(x, infinite):
    """A sum, so that a NaN elsewhere in the row stays one."""
    return tl.where(infinite, x + float("inf"), x)


@triton.jit
def _raw_maxima(sums_ptr, stride_sums, inverse_tau):
    """The maxima of s and z as the slice's logits are, from those over tau: float64 gives back the float32 that went in."""
    tau64 = inverse_tau * tl.full([], 1.0, tl.float64)
    s_row = (tl.load(sums_ptr) / tau64).to(tl.float32)
    z_row = (tl.load(sums_ptr + stride_sums) / tau64).to(tl.float32)
    return s_row, z_row


@triton.jit
def _log_of_shares(q_share, p_share):
    """log(p_share / q_share); finite where one of them is 0, for then its side has no mass in the slice."""
    return tl.maximum(tl.log(p_share), -1e4) - tl.maximum(tl.log(q_share), -1e4)


@triton.jit(do_not_specialize=["stride_sums", "stride_factors", "stride_out"])
def _shard_jsd_kernel(
    student_ptr,
    audio_ptr,
    text_ptr,
    target_ptr,
    alpha_ptr,
    audio_max_ptr,
    sums_ptr,
    factors_ptr,
    out_ptr,
    stride_student,
    stride_audio,
    stride_text,
    stride_alpha,
    stride_sums,
    stride_factors,
    stride_out,
    vocab,
    ignore_index,
    inverse_temperature,
    jsd_beta,
    log_plausibility,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_PLAUSIBILITY: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    student_ptr += row64 * stride_student
    audio_ptr += row64 * stride_audio
    if HAS_TEXT:
        text_ptr += row64 * stride_text
    local = _columns(GROUPS, GROUP, CONTIGUOUS)  # (G, E)
    columns_here = vocab
    if HAS_TARGET:
        columns_here = tl.where(tl.load(target_ptr + row) == ignore_index, 0, vocab)
    rate, inverse_tau = _rates(inverse_temperature, TEMPERATURE)
    s_row, z_row = _raw_maxima(sums_ptr + row, stride_sums, inverse_tau)
    q_share = tl.load(factors_ptr + row)
    p_share = tl.load(factors_ptr + stride_factors + row)
    log_shares = _log_of_shares(q_share, p_share)
    alpha = 0.0
    text_vocab = 0
    if HAS_TEXT:
        alpha = tl.load(alpha_ptr + row * stride_alpha)
        text_vocab = tl.where(alpha == 0.0, 0, columns_here)
    threshold = 0.0
    if HAS_PLAUSIBILITY:
        threshold = tl.load(audio_max_ptr + row) + log_plausibility
    kl_p = tl.zeros([GROUPS], tl.float32)
    kl_q = tl.zeros([GROUPS], tl.float32)
    for i in range(0, tl.cdiv(columns_here, BLOCK)):
        columns = i * BLOCK + local
        s, _slope, z = _read_pair(
            student_ptr, audio_ptr, text_ptr, columns, columns < columns_here, text_vocab, alpha, threshold, True, HAS_TEXT,
            HAS_PLAUSIBILITY, STUDENT_SCALE, TEACHER_SCALE, STUDENT_SOFTCAP, TEACHER_SOFTCAP,
        )  # fmt: skip
        log_p_m, log_q_m = _jsd_terms(((z - z_row) - (s - s_row)) * inverse_tau + log_shares, jsd_beta)
        kl_p += tl.sum(tl.exp2((z - z_row) * rate) * log_p_m, axis=1)
        kl_q += tl.sum(tl.exp2((s - s_row) * rate) * log_q_m, axis=1)
    tl.store(out_ptr + row, (tl.sum(kl_p, axis=0) * p_share).to(tl.float64))
    tl.store(out_ptr + stride_out + row, (tl.sum(kl_q, axis=0) * q_share).to(tl.float64))


@triton.jit(do_not_specialize=["first", "stride_sums", "stride_factors"])
def _shard_gradient_kernel(
    student_ptr,
    audio_ptr,
    text_ptr,
    target_ptr,
    alpha_ptr,
    audio_max_ptr,
    sums_ptr,
    factors_ptr,
    grad_ptr,
    stride_student,
    stride_audio,
    stride_text,
    stride_alpha,
    stride_sums,
    stride_factors,
    stride_grad,
    vocab,
    width,  # V_s of the slice
    first,
    ignore_index,
    inverse_temperature,
    jsd_beta,
    log_plausibility,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_PLAUSIBILITY: tl.constexpr,
    WITH_KD: tl.constexpr,
    WITH_CE: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    student_ptr += row64 * stride_student
    grad_ptr += row64 * stride_grad
    if WITH_KD:
        audio_ptr += row64 * stride_audio
    if HAS_TEXT:
        text_ptr += row64 * stride_text
    local = _columns(GROUPS, GROUP, CONTIGUOUS)  # (G, E)
    label = -1
    if HAS_TARGET:
        target = tl.load(target_ptr + row)
        if target == ignore_index:
            for start in range(0, width, BLOCK):
                columns = start + local
                zero = tl.zeros([GROUPS, GROUP], tl.float32)
                tl.store(grad_ptr + columns, zero.to(grad_ptr.dtype.element_ty), mask=columns < width)
            return
        label = tl.where((target >= first) & (target < first + vocab), target - first, -1).to(tl.int32)

    rate, inverse_tau = _rates(inverse_temperature, TEMPERATURE)
    s_row, z_row = _raw_maxima(sums_ptr + row, stride_sums, inverse_tau)
    factors_ptr += row
    of_q = tl.load(factors_ptr + 2 * stride_factors)
    of_p = tl.load(factors_ptr + 3 * stride_factors)
    of_q1 = tl.load(factors_ptr + 4 * stride_factors)
    of_label = tl.load(factors_ptr + 5 * stride_factors)
    centre = tl.load(factors_ptr + 6 * stride_factors)
    silent = (of_q == 0.0) & (of_p == 0.0)  # a term without a factor may be NaN
    log_shares = 0.0
    if DIVERGENCE == _JSD:
        log_shares = _log_of_shares(tl.load(factors_ptr), tl.load(factors_ptr + stride_factors))
    alpha = 0.0
    text_vocab = 0
    if HAS_TEXT:
        alpha = tl.load(alpha_ptr + row * stride_alpha)
        text_vocab = tl.where(alpha == 0.0, 0, vocab)
    threshold = 0.0
    if HAS_PLAUSIBILITY:
        threshold = tl.load(audio_max_ptr + row) + log_plausibility

    for start in range(0, width, BLOCK):
        columns = start + local
        s, slope, z = _read_pair(
            student_ptr, audio_ptr, text_ptr, columns, columns < vocab, text_vocab, alpha, threshold, WITH_KD, HAS_TEXT,
            HAS_PLAUSIBILITY, STUDENT_SCALE, TEACHER_SCALE, STUDENT_SOFTCAP, TEACHER_SOFTCAP,
        )  # fmt: skip
        gradient = tl.zeros([GROUPS, GROUP], tl.float32)
        s_exp = tl.exp2((s - s_row) * rate)
        if WITH_KD:
            if DIVERGENCE == _FORWARD:
                gradient = of_q * s_exp - of_p * tl.exp2((z - z_row) * rate)
            else:
                log_ratio = ((z - z_row) - (s - s_row)) * inverse_tau
                if DIVERGENCE == _REVERSE:
                    gradient = of_q * s_exp * (centre - log_ratio)
                else:
                    gradient = of_q * s_exp * (_jsd_terms(log_ratio + log_shares, jsd_beta)[1] - centre)
            gradient = tl.where(silent, 0.0, gradient)
        if WITH_CE:
            if TEMPERATURE == 1:
                q1 = s_exp
            elif TEMPERATURE == 2:
                q1 = s_exp * s_exp
            else:
                q1 = tl.exp2((s - s_row) * _LOG2E)
            label_term = of_q1 * q1 - tl.where(columns == label, of_label, 0.0)
            gradient += tl.where((of_q1 == 0.0) & (of_label == 0.0), 0.0, label_term)
        gradient = tl.where((s == _MASKED) | (gradient == 0.0), 0.0, gradient * slope)
        tl.debug_barrier()  # all of this block is read before any of it is overwritten
        tl.store(grad_ptr + columns, gradient.to(grad_ptr.dtype.element_ty), mask=columns < width)


class TritonShard:
    """See :mod:`kdkernels.ops.shards`; on a CUDA device, or on the CPU under TRITON_INTERPRET=1. The host reads nothing back.

    Raises ValueError for a ``grad`` that lies in the student's memory in a way that would overwrite logits before they are
    read.
    """

    def __init__(self, problem: RowProblem, first: int) -> None:
        if problem.grad is not None:
            check_overlap(problem.student, problem.grad)
        self.problem, self.first = problem, first
        self.max_of_audio: torch.Tensor | None = None

    def _new(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.problem.student.device)

    def _launch(self, kernel: Any, want_stats: bool = False, **own: Any) -> None:
        """``own``: arguments beside those that describe the problem, of which a kernel gets what it has a parameter for."""
        problem, spec = self.problem, self.problem.spec
        if problem.rows == 0:
            return
        read = list(problem.read.values())
        contiguous = all(_is_vectorisable(x, spec.vocab) for x in (*read, problem.grad) if x is not None)
        ours = {
            "student_ptr": problem.student,
            "audio_ptr": problem.audio,
            "text_ptr": problem.text,
            "target_ptr": problem.target,
            "alpha_ptr": problem.alpha,
            "audio_max_ptr": self.max_of_audio,
            "grad_ptr": problem.grad,
            "stride_student": _stride(problem.student, 1),
            "stride_audio": _stride(problem.audio, 1),
            "stride_text": _stride(problem.text, 1),
            "stride_grad": _stride(problem.grad, 1),
            "stride_alpha": _alpha_stride(problem.alpha),
            "vocab": spec.vocab,
            "width": problem.student.shape[2],
            "first": self.first,
            "ignore_index": spec.ignore_index,
            "inverse_temperature": 1.0 / spec.temperature,
            "jsd_beta": spec.jsd_beta,
            "log_plausibility": spec.log_plausibility,
            "CONTIGUOUS": contiguous,
            "DIVERGENCE": DIVERGENCES.index(spec.divergence),
            "TEMPERATURE": _temperature_code(spec.temperature),
            "HAS_TEXT": problem.text is not None,
            "HAS_TARGET": problem.target is not None,
            "HAS_PLAUSIBILITY": problem.masked,
            "WITH_KD": spec.with_kd,
            "WITH_CE": problem.with_ce,
            "WANT_STATS": want_stats,
            "STUDENT_SCALE": float(spec.student_scale),
            "TEACHER_SCALE": float(spec.teacher_scale),
            "STUDENT_SOFTCAP": spec.student_softcap,
            "TEACHER_SOFTCAP": spec.teacher_softcap,
        }
        arguments = {name: x for name, x in ours.items() if name in kernel.arg_names} | own
        table = launch_table(spec, min(x.element_size() for x in read), want_stats, contiguous)
        with _device_of(problem.student, kernel):
            kernel[(problem.rows,)](**arguments, **table)

    def audio_max(self) -> torch.Tensor:
        out = self._new(self.problem.rows, dtype=torch.float32)
        self._launch(_shard_max_kernel, out_ptr=out)
        return out

    def sums(self, audio_max: torch.Tensor | None) -> torch.Tensor:
        want_stats = self.problem.want_stats
        self.max_of_audio = audio_max
        self.own_sums = self._new(len(SUMS) + want_stats * len(STAT_SUMS), self.problem.rows)
        self._launch(_shard_sums_kernel, want_stats, sums_ptr=self.own_sums, stride_sums=self.own_sums.stride(0))
        return self.own_sums

    def _after_the_exchange(self, kernel: Any, factors: torch.Tensor, **own: Any) -> None:
        strides: dict[str, Any] = {"stride_sums": self.own_sums.stride(0), "stride_factors": factors.stride(0)}
        self._launch(kernel, sums_ptr=self.own_sums, factors_ptr=factors, **strides, **own)

    def jsd_sums(self, factors: torch.Tensor) -> torch.Tensor:
        out = self._new(2, self.problem.rows)
        self._after_the_exchange(_shard_jsd_kernel, factors, out_ptr=out, stride_out=out.stride(0))
        return out

    def gradient(self, factors: torch.Tensor) -> None:
        assert factors.shape[0] == len(FACTORS)
        self._after_the_exchange(_shard_gradient_kernel, factors)
