"""The row problem (:mod:`kdkernels.ops.rows`) in Triton.

One program owns one row and streams it in blocks of G groups of E logits. A group belongs to one thread and keeps its
own running maxima and shifted sums, so nothing is exchanged between threads inside a loop; the groups are merged once,
after the pass. z_hat, p and q are never stored. Passes over the row:

    plausibility   max of z_audio                                                     (only with a plausibility mask)
    1              maxima; sum e^(s-max), sum e^(z-max); the divergence's cross term; sum for the label's softmax
    jsd            KL(p||m) and KL(q||m), which need p and q                          (only for the jsd)
    2              the gradient                                                       (only with grad)

Pass 1 walks the blocks downwards, the others upwards: what pass 1 read last, and L2 still holds, is read again first.

A gradient in the student's memory. Column j of a row is written at byte w*j and read at byte 4*j or 2*j >= w*j of the
same row, blocks ascend, and a barrier stands between a block's loads and its stores. So the stores of block b end
before the first byte of block b + 1, and all threads' loads of block b and below lie behind the barrier. Earlier passes
are separated from the gradient's by the barriers of their final reductions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import DIVERGENCES, RowProblem, RowResult, RowSpec, check_overlap, row_launcher_of
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
    _cross_entropy,
    _device_of,
    _entropy,
    _finish_kd,
    _first,
    _is_vectorisable,
    _jsd_terms,
    _kl,
    _kl_of_row,
    _latest_argmax,
    _log_ratio_of_sums,
    _merge_moment,
    _merge_weight,
    _rates,
    _read,
    _read_pair,
    _read_teacher,
    _readable,
    _reciprocal,
    _stride,
    _temperature_code,
)


@triton.jit(do_not_specialize=["sequence", "stride_stats"])
def _caad_row_kernel(
    student_ptr,
    audio_ptr,
    text_ptr,
    target_ptr,
    alpha_ptr,
    kd_coef_ptr,
    ce_coef_ptr,
    grad_ptr,
    kd_ptr,
    ce_ptr,
    stats_ptr,
    stride_student_batch,
    stride_student_seq,
    stride_audio_batch,
    stride_audio_seq,
    stride_text_batch,
    stride_text_seq,
    stride_grad_batch,
    stride_grad_seq,
    stride_alpha,
    stride_stats,
    sequence,  # T: row = b * T + t
    vocab,  # V
    readable,  # see _readable, or None
    width,  # V_s
    ignore_index,
    inverse_temperature,
    jsd_beta,
    log_plausibility,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # neighbouring logits lie in one thread (16-byte loads), or else in neighbouring threads
    DIVERGENCE: tl.constexpr,
    TEMPERATURE: tl.constexpr,  # 1, 2, or 0 for any other
    HAS_TEXT: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_PLAUSIBILITY: tl.constexpr,
    WITH_KD: tl.constexpr,
    WITH_CE: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    WANT_STATS: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * GROUP
    NEED_TEACHER: tl.constexpr = WITH_KD or WANT_STATS
    row = tl.program_id(0)
    # 64 bits: batch * stride passes 2^31 from 16k rows of a 128k vocabulary on.
    batch = (row // sequence).to(tl.int64)
    position = (row % sequence).to(tl.int64)
    student_ptr += batch * stride_student_batch + position * stride_student_seq
    if NEED_TEACHER:
        audio_ptr += batch * stride_audio_batch + position * stride_audio_seq
    if HAS_TEXT:
        text_ptr += batch * stride_text_batch + position * stride_text_seq
    if WANT_GRAD:
        grad_ptr += batch * stride_grad_batch + position * stride_grad_seq
    local = _columns(GROUPS, GROUP, CONTIGUOUS)  # (G, E)

    if HAS_TARGET:
        target = tl.load(target_ptr + row)
        if target == ignore_index:
            tl.store(kd_ptr + row, 0.0)
            tl.store(ce_ptr + row, 0.0)
            if WANT_STATS:
                for i in tl.static_range(4):
                    tl.store(stats_ptr + i * stride_stats + row, 0.0)
            if WANT_GRAD:
                for start in range(0, width, BLOCK):
                    columns = start + local
                    zero = tl.zeros([GROUPS, GROUP], tl.float32)
                    tl.store(grad_ptr + columns, zero.to(grad_ptr.dtype.element_ty), mask=columns < width)
            return

    rate, inverse_tau = _rates(inverse_temperature, TEMPERATURE)
    alpha = 0.0
    text_vocab = 0
    text_readable = None
    alpha_legal = True
    if HAS_TEXT:
        alpha = tl.load(alpha_ptr + row * stride_alpha)
        # Not read where it does not count; the statistics compare the two paths.
        text_vocab = vocab if WANT_STATS else tl.where(alpha == 0.0, 0, vocab)
        if readable is not None:
            text_readable = readable if WANT_STATS else tl.where(alpha == 0.0, 0, readable)
        alpha_legal = (alpha >= 0.0) & (alpha < float("inf"))
    if WITH_CE:
        # Before the gradient: it may overwrite the row.
        label_inside = (target >= 0) & (target < vocab)
        label = tl.where(label_inside, target, 0).to(tl.int32)
        label_logit = _read(student_ptr, label, label_inside, STUDENT_SCALE, STUDENT_SOFTCAP)

    blocks = tl.cdiv(vocab, BLOCK)
    threshold = 0.0
    if HAS_PLAUSIBILITY:
        audio_max = tl.full([GROUPS], _FLOOR, tl.float32)
        for i in range(0, blocks):
            columns = i * BLOCK + local
            audio = _read(audio_ptr, columns, columns < vocab, TEACHER_SCALE, TEACHER_SOFTCAP, readable)
            audio_max = tl.maximum(audio_max, tl.max(audio, axis=1))
        threshold = tl.max(audio_max, axis=0) + log_plausibility

    # Pass 1. s: student, z: z_hat; q and p their softmax at tau, q1 the student's at 1. All sums are (G,).
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

    for i in range(0, blocks):
        columns = (blocks - 1 - i) * BLOCK + local
        inside = columns < vocab
        s = _read(student_ptr, columns, inside, STUDENT_SCALE, STUDENT_SOFTCAP, readable)
        s_old = s_max
        if NEED_TEACHER:
            s_max, s_keep, s_shifted, s_exp = _advance(s_max, s, rate)
            q_old = q_sum
            q_sum = q_sum * s_keep + tl.sum(s_exp, axis=1)
            audio, text, z = _read_teacher(
                audio_ptr, text_ptr, columns, inside, text_vocab, alpha, threshold, HAS_TEXT, HAS_PLAUSIBILITY, TEACHER_SCALE,
                TEACHER_SOFTCAP, readable, text_readable,
            )  # fmt: skip
            z_old = z_max
            z_max, z_keep, z_shifted, z_exp = _advance(z_max, z, rate)
            p_old = p_sum
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
            if WITH_CE and TEMPERATURE == 2:
                q1_sum = q1_sum * (s_keep * s_keep) + tl.sum(s_exp * s_exp, axis=1)  # e^s = (e^(s/2))^2
            if WITH_CE and TEMPERATURE == 0:
                q1_sum = q1_sum * tl.exp2((s_old - s_max) * _LOG2E) + tl.sum(tl.exp2(s_shifted * _LOG2E), axis=1)
        elif WITH_CE:
            s_max, s_keep, s_shifted, s_exp = _advance(s_max, s, _LOG2E)
            q1_sum = q1_sum * s_keep + tl.sum(s_exp, axis=1)

    # Merge the groups.
    s_row, s_weight = _merge_weight(s_max, rate)
    if WITH_CE:
        if NEED_TEACHER and TEMPERATURE == 1:
            q1_sum = q_sum
        s1_weight = _merge_weight(s_max, _LOG2E)[1]
        q1_row = tl.sum(q1_sum * s1_weight, axis=0)
        tl.store(ce_ptr + row, _cross_entropy(q1_row, s_row, label_logit, label_inside))
    else:
        tl.store(ce_ptr + row, 0.0)

    if NEED_TEACHER:
        z_row, z_weight = _merge_weight(z_max, rate)
        q_row = tl.sum(q_sum * s_weight, axis=0)
        p_row = tl.sum(p_sum * z_weight, axis=0)
        inverse_q = _reciprocal(q_row)
        inverse_p = _reciprocal(p_row)
        log_z = _log_ratio_of_sums(p_row, q_row)  # log(p/q) = ((z - max z) - (s - max s)) / tau - log_z
    if WITH_KD:
        empty = p_row == 0.0
        infinite = empty & (p_row > 0.0)  # never, for the jsd
        if DIVERGENCE == _JSD:
            kl_p = tl.zeros([GROUPS], tl.float32)
            kl_q = tl.zeros([GROUPS], tl.float32)
            for i in range(0, blocks):
                columns = i * BLOCK + local
                inside = columns < vocab
                s, slope, z = _read_pair(
                    student_ptr, audio_ptr, text_ptr, columns, inside, text_vocab, alpha, threshold, WITH_KD, HAS_TEXT,
                    HAS_PLAUSIBILITY, STUDENT_SCALE, TEACHER_SCALE, STUDENT_SOFTCAP, TEACHER_SOFTCAP, readable, text_readable,
                )  # fmt: skip
                log_ratio = ((z - z_row) - (s - s_row)) * inverse_tau - log_z
                log_p_m, log_q_m = _jsd_terms(log_ratio, jsd_beta)
                kl_p += tl.sum(tl.exp2((z - z_row) * rate) * log_p_m, axis=1)
                kl_q += tl.sum(tl.exp2((s - s_row) * rate) * log_q_m, axis=1)
            jsd_q = tl.sum(kl_q, axis=0) * inverse_q
            kd = jsd_beta * tl.sum(kl_p, axis=0) * inverse_p + (1.0 - jsd_beta) * jsd_q
        else:
            kd, infinite = _kl_of_row(
                cross, hole, q_sum, p_sum, s_max, z_max, s_row, z_row, s_weight, z_weight, q_row, p_row, log_z, inverse_tau, rate,
                DIVERGENCE,
            )  # fmt: skip
            reverse_kl = kd
        tl.store(kd_ptr + row, _finish_kd(kd, inverse_tau, infinite, empty, alpha_legal))
    else:
        tl.store(kd_ptr + row, 0.0)

    if WANT_STATS:
        q_mean = _merge_moment(q_moment, q_sum, s_max, s_row, s_weight) * inverse_q * inverse_tau
        p_mean = _merge_moment(p_moment, p_sum, z_max, z_row, z_weight) * inverse_p * inverse_tau
        tl.store(stats_ptr + row, _entropy(q_row, q_mean))
        tl.store(stats_ptr + stride_stats + row, _entropy(p_row, p_mean))
        same = _first(s_max, s_top, s_row) == _first(z_max, z_top, z_row)
        tl.store(stats_ptr + 2 * stride_stats + row, tl.where(same, 1.0, 0.0))
        path = 0.0
        if HAS_TEXT:
            audio_row, audio_weight = _merge_weight(audio_max, rate)
            text_row, text_weight = _merge_weight(text_max, rate)
            audio_total = tl.sum(audio_sum * audio_weight, axis=0)
            text_total = tl.sum(text_sum * text_weight, axis=0)
            path, path_infinite = _kl(
                path_cross, audio_sum, path_hole, audio_max, text_max, audio_row, text_row, audio_weight,
                _reciprocal(audio_total), -_log_ratio_of_sums(audio_total, text_total), inverse_tau, rate,
            )  # fmt: skip
            path = tl.where(path < 0.0, 0.0, path)
            path = tl.where(audio_total == 0.0, 0.0, tl.where(path_infinite, path + float("inf"), path))
        tl.store(stats_ptr + 3 * stride_stats + row, path)

    # Pass 2. What has no factor may be NaN. Its numbers of the row become 0 once. Its logits become at most 0 by a minimum, which
    # drops NaN. So the factor 0 meets finite numbers alone. A select for each logit would take more registers. Where NaN has a
    # factor, the row's numbers carry it into the gradient.
    if WANT_GRAD:
        unused = True
        if WITH_KD:
            # tau^2 from kd, 1 / tau from d (s / tau) / d s.
            kd_coef = tl.load(kd_coef_ptr + row)
            kd_scale = tl.where(empty, 0.0, kd_coef / inverse_tau)
            if DIVERGENCE == _REVERSE:
                kd_scale = tl.where(infinite, 0.0, kd_scale)
            kd_scale = tl.where(alpha_legal | (kd_coef == 0.0), kd_scale, float("nan"))
            without_kd = kd_scale == 0.0
            z_row = tl.where(without_kd, 0.0, z_row)
            inverse_p = tl.where(without_kd, 0.0, inverse_p)
            log_z = tl.where(without_kd, 0.0, log_z)
            if DIVERGENCE == _REVERSE:
                reverse_kl = tl.where(without_kd, 0.0, reverse_kl)
            if DIVERGENCE == _JSD:
                jsd_q = tl.where(without_kd, 0.0, jsd_q)
            unused = without_kd
        if WITH_CE:
            ce_scale = tl.load(ce_coef_ptr + row)
            ce_scale = tl.where(label_inside | (ce_scale == 0.0), ce_scale, float("nan"))
            unused = ce_scale == 0.0
            if WITH_KD:
                unused = unused & without_kd
            inverse_q1 = tl.where(unused, 0.0, _reciprocal(q1_row))
        s_row = tl.where(unused, 0.0, s_row)
        if WITH_KD:
            inverse_q = tl.where(unused, 0.0, inverse_q)
        for start in range(0, width, BLOCK):
            columns = start + local
            inside = columns < vocab
            s, slope, z = _read_pair(
                student_ptr, audio_ptr, text_ptr, columns, inside, text_vocab, alpha, threshold, WITH_KD, HAS_TEXT,
                HAS_PLAUSIBILITY, STUDENT_SCALE, TEACHER_SCALE, STUDENT_SOFTCAP, TEACHER_SOFTCAP, readable, text_readable,
            )  # fmt: skip
            gradient = tl.zeros([GROUPS, GROUP], tl.float32)
            s_below = tl.minimum(s - s_row, 0.0)
            if WITH_KD:
                z_below = tl.minimum(z - z_row, 0.0)
                s_exp = tl.exp2(s_below * rate)
                q = s_exp * inverse_q
                if DIVERGENCE == _FORWARD:
                    gradient = kd_scale * (q - tl.exp2(z_below * rate) * inverse_p)
                else:
                    log_ratio = (z_below - s_below) * inverse_tau - log_z
                    if DIVERGENCE == _REVERSE:
                        gradient = kd_scale * q * (-log_ratio - reverse_kl)
                    else:
                        log_q_m = _jsd_terms(log_ratio, jsd_beta)[1]
                        gradient = kd_scale * (1.0 - jsd_beta) * q * (log_q_m - jsd_q)
            if WITH_CE:
                if WITH_KD and TEMPERATURE == 1:
                    q1 = q
                elif WITH_KD and TEMPERATURE == 2:
                    q1 = s_exp * s_exp * inverse_q1
                else:
                    q1 = tl.exp2(s_below * _LOG2E) * inverse_q1
                gradient += ce_scale * (q1 - tl.where(columns == label, 1.0, 0.0))
            masked = s == _MASKED
            if STUDENT_SOFTCAP is not None:
                masked = masked | (gradient == 0.0)  # the slope at NaN is NaN
            gradient = tl.where(masked, 0.0, gradient * slope)
            tl.debug_barrier()  # all of this block is read before any of it is overwritten
            tl.store(grad_ptr + columns, gradient.to(grad_ptr.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["sequence"])
def _scale_rows_kernel(
    source_ptr,
    factor_ptr,
    out_ptr,
    stride_source_batch,
    stride_source_seq,
    stride_out_batch,
    stride_out_seq,
    stride_factor,
    sequence,
    width,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    batch = (row // sequence).to(tl.int64)
    position = (row % sequence).to(tl.int64)
    factor = tl.load(factor_ptr + row * stride_factor).to(tl.float32)
    if IN_PLACE and factor == 1.0:
        return
    source_ptr += batch * stride_source_batch + position * stride_source_seq
    out_ptr += batch * stride_out_batch + position * stride_out_seq
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(source_ptr + columns, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(out_ptr + columns, value.to(out_ptr.dtype.element_ty), mask=inside)


def launch_table(spec: RowSpec, itemsize: int, want_stats: bool, contiguous: bool = True) -> dict[str, int]:
    """GROUPS, GROUP and launch options from the width of the vocabulary and of the narrowest input.

    A group is what one thread loads in 16 bytes of the narrowest input. A thread holds 16 logits of each tensor, and 8
    where there are more sums or more arithmetic per logit. Four warps, because by ptxas's counts (sm_80, 90 and 100)
    they leave room for more rows on a multiprocessor than eight do. Fixed, because a tuner would have to synchronise.
    """
    heavy = spec.divergence == "jsd" or spec.student_softcap is not None or spec.teacher_softcap is not None
    elements = 8 if heavy or want_stats else 16
    warps = 1
    while warps < 4 and 32 * warps * elements < spec.vocab:
        warps *= 2
    group = 16 // itemsize
    table = {"GROUPS": 32 * warps * elements // group, "GROUP": group, "num_warps": warps, "enable_fp_fusion": True}
    if heavy or want_stats:
        table["maxnreg"] = 160  # left to itself, ptxas spills the row's scalars to fit one more block
    elif not contiguous and itemsize == 2 and spec.with_kd and spec.divergence == "forward_kl":
        # Loads of single items need more addresses. Left to itself, ptxas takes 88 to 127 registers for them, as its version and
        # small changes of the kernel decide. 96 leave room for a fifth block on a multiprocessor and need no spills.
        table["maxnreg"] = 96
    return table


def _solve_rows(problem: RowProblem) -> RowResult:
    """The row problem of :mod:`kdkernels.ops.rows` on a CUDA device, or on the CPU under TRITON_INTERPRET=1.

    All arithmetic is in float32. Extra memory: the (N,) results. Nothing is read back to the host.

    Raises:
        ValueError: ``grad`` lies in the student's memory in a way that would overwrite logits before they are read.
        RuntimeError: CPU tensors without the interpreter.
    """
    student, audio, text, target, alpha, kd_coef, ce_coef, spec, grad, want_stats = problem
    out = problem.empty_result()
    if grad is not None:
        check_overlap(student, grad)
    if problem.rows == 0:
        return out
    read = list(problem.read.values())
    readable = _readable(read, grad, spec.vocab)
    contiguous = readable is not None or all(_is_vectorisable(x, spec.vocab) for x in (*read, grad) if x is not None)
    with _device_of(student, _caad_row_kernel):
        _caad_row_kernel[(problem.rows,)](
            student_ptr=student,
            audio_ptr=audio,
            text_ptr=text,
            target_ptr=target,
            alpha_ptr=alpha,
            kd_coef_ptr=kd_coef,
            ce_coef_ptr=ce_coef,
            grad_ptr=grad,
            kd_ptr=out.kd,
            ce_ptr=out.ce,
            stats_ptr=out.stats,
            stride_student_batch=_stride(student, 0),
            stride_student_seq=_stride(student, 1),
            stride_audio_batch=_stride(audio, 0),
            stride_audio_seq=_stride(audio, 1),
            stride_text_batch=_stride(text, 0),
            stride_text_seq=_stride(text, 1),
            stride_grad_batch=_stride(grad, 0),
            stride_grad_seq=_stride(grad, 1),
            stride_alpha=_alpha_stride(alpha),
            stride_stats=0 if out.stats is None else out.stats.stride(0),
            sequence=student.shape[1],
            vocab=spec.vocab,
            readable=readable,
            width=student.shape[2],
            ignore_index=spec.ignore_index,
            inverse_temperature=1.0 / spec.temperature,
            jsd_beta=spec.jsd_beta,
            log_plausibility=spec.log_plausibility,
            CONTIGUOUS=contiguous,
            DIVERGENCE=DIVERGENCES.index(spec.divergence),
            TEMPERATURE=_temperature_code(spec.temperature),
            HAS_TEXT=text is not None,
            HAS_TARGET=target is not None,
            HAS_PLAUSIBILITY=problem.masked,
            WITH_KD=spec.with_kd,
            WITH_CE=problem.with_ce,
            WANT_GRAD=grad is not None,
            WANT_STATS=want_stats,
            STUDENT_SCALE=float(spec.student_scale),
            TEACHER_SCALE=float(spec.teacher_scale),
            STUDENT_SOFTCAP=spec.student_softcap,
            TEACHER_SOFTCAP=spec.teacher_softcap,
            **launch_table(spec, min(x.element_size() for x in read), want_stats, contiguous),
        )
    return out


caad_rows = row_launcher_of(_solve_rows)


def scale_rows(source: torch.Tensor, factor: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """source[b, t, :] * factor (one number) or source[b, t, :] * factor[b * T + t], in float32, rounded to ``out``'s dtype.

    With ``out`` being ``source`` a row whose factor is 1 is left alone without being read: the usual
    ``loss.backward()`` costs one scalar load a row, and no value is read back to the host.

    Args:
        source: (B, T, V), last stride 1.
        factor: one element or (B * T,), any floating dtype, on the same device.
        out: None for a new contiguous tensor, or (B, T, V) with last stride 1; may be ``source``.
    """
    if out is None:
        out = torch.empty_like(source, memory_format=torch.contiguous_format)
    rows = source.shape[0] * source.shape[1]
    if rows > 0:
        with _device_of(source, _scale_rows_kernel):
            _scale_rows_kernel[(rows,)](
                source_ptr=source,
                factor_ptr=factor,
                out_ptr=out,
                stride_source_batch=_stride(source, 0),
                stride_source_seq=_stride(source, 1),
                stride_out_batch=_stride(out, 0),
                stride_out_seq=_stride(out, 1),
                stride_factor=0 if factor.numel() == 1 else factor.stride(0),
                sequence=source.shape[1],
                width=source.shape[2],
                IN_PLACE=out is source,
                BLOCK=min(4096, max(128, triton.next_power_of_2(source.shape[2]))),
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out
