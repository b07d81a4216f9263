"""The fused linear loss without logits, in Triton: GEMMs of both heads with the online softmax in their epilogue.

For evaluation and for hard memory limits: kd and ce of every token, no gradient, forward_kl or reverse_kl. One program owns a
tile of M tokens and a strip of the vocabulary. For each tile of its strip, M x E logits, it forms

    s = h_s W_s^T + b_s   and   z_audio = h W_t^T + b_t   in fp32 accumulators

and folds them into the running maxima, shifted sums and the cross term of its tokens, as the row kernel does with logits it
reads. The strips' results, (splits, N) a field, are merged by a second small kernel in a fixed order: deterministic.

Where a tile is stored. Two accumulators of 128 x 128 and an online softmax do not fit into registers together. So each product
goes into a tile of memory of the program's own (128 KiB for s and z together), and every tile of the strip overwrites it:
about 20 MiB on the whole GPU, which stay in L2. The epilogue reads it in slices of columns.

The teacher's paths. Without softcap and plausibility mask they collapse: h is the contrast of the hidden states. For bf16 weights
it is the sum of two bf16 tensors (relative error 2^-17), both multiplied with the same tile of W_t. Float16 could overflow there,
and a softcap is not linear: then z_audio and z_text are formed one by one. A plausibility mask needs the maximum of z_audio
first, which takes one more GEMM. z_text is then formed only in tiles with a survivor.

Legend: N tokens, V valid ids, H_s / H_t hidden widths, M x E a tile of tokens and ids, K a step of the inner dimension.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .chunking import default_workspace_bytes
from .rows import DIVERGENCES, LinearTensors, RowResult, RowSpec
from .triton_shared import (
    _FLOOR,
    _FORWARD,
    _LOG2E,
    _MASKED,
    _advance,
    _alpha_stride,
    _contrast,
    _cross_entropy,
    _device_of,
    _finish_kd,
    _kl_of_row,
    _legal_alpha,
    _log_ratio_of_sums,
    _logit_with_slope,
    _merge_weight,
    _rates,
    _temperature_code,
)

# What the second operand of the teacher's GEMM is.
_NOTHING = tl.constexpr(0)
_LOW = tl.constexpr(1)  # the half of the contrast that the first operand rounds away; both are summed
_TEXT = tl.constexpr(2)  # h_text; the first operand is h_audio

# Fields of a strip's result, each (splits, N) float32.
_S_MAX, _Q_SUM, _Q1_SUM, _LABEL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_Z_MAX, _P_SUM, _CROSS, _HOLE = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_FIELDS = 8
MAX_SPLITS = 256
MAX_WAVES = 4  # of programs: each has scratch of its own


@triton.jit
def _product(
    first_ptr,
    second_ptr,  # None, or a second operand: its product is added
    weight_ptr,
    first_offset,  # (M,) int64
    second_offset,
    weight_offset,  # (E,) int64
    width,
    stride_inner,  # of the weight
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(first + second) @ weight.T, (M, E) fp32"""
    total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    step = tl.arange(0, BLOCK_K)
    for start in range(0, width, BLOCK_K):
        inner = start + step
        inside = inner < width
        weight_ptrs = weight_ptr + weight_offset[None, :] + (inner.to(tl.int64) * stride_inner)[:, None]  # (K, E)
        first_ptrs = first_ptr + first_offset[:, None] + inner[None, :]  # (M, K)
        weight = tl.load(weight_ptrs) if EVEN else tl.load(weight_ptrs, mask=inside[:, None], other=0.0)
        first = tl.load(first_ptrs) if EVEN else tl.load(first_ptrs, mask=inside[None, :], other=0.0)
        if UPCAST:
            weight, first = weight.to(tl.float32), first.to(tl.float32)
        total = tl.dot(first, weight, total, input_precision="ieee")
        if second_ptr is not None:
            second_ptrs = second_ptr + second_offset[:, None] + inner[None, :]
            second = tl.load(second_ptrs) if EVEN else tl.load(second_ptrs, mask=inside[None, :], other=0.0)
            if UPCAST:
                second = second.to(tl.float32)
            total = tl.dot(second, weight, total, input_precision="ieee")
    return total


@triton.jit
def _put_product(
    tile_ptr, first_ptr, second_ptr, weight_ptr, first_offset, second_offset, weight_offset, width, stride_inner,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """:func:`_product` into a tile of memory."""
    product = _product(
        first_ptr, second_ptr, weight_ptr, first_offset, second_offset, weight_offset, width, stride_inner, BLOCK_M, BLOCK_E,
        BLOCK_K, EVEN, UPCAST,
    )  # fmt: skip
    row = tl.arange(0, BLOCK_M)[:, None] * BLOCK_E
    tl.store(tile_ptr + row + tl.arange(0, BLOCK_E)[None, :], product)


@triton.jit
def _slice(
    tile_ptr,
    bias_ptr,
    first_column,  # of the tile
    start,
    vocab,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SLICE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Columns start to start + SLICE of a tile of products as logits, (M, SLICE); _MASKED beyond the vocabulary."""
    local = start + tl.arange(0, SLICE)
    column = first_column + local
    inside = (column < vocab)[None, :]
    value = tl.load(tile_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_E + local[None, :])
    if bias_ptr is not None:
        value += tl.load(bias_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
    return _logit_with_slope(tl.where(inside, value, float("-inf")), inside, SCALE, SOFTCAP)[0]


@triton.jit(do_not_specialize=["n_tokens"])
def _contrast_kernel(
    audio_ptr,
    text_ptr,
    alpha_ptr,
    high_ptr,  # (N, H)
    low_ptr,  # (N, H) or None
    stride_audio,
    stride_text,
    stride_alpha,
    n_tokens,
    width,
    BLOCK: tl.constexpr,
):
    """high + low = (1 + alpha) h_audio - alpha h_text, one token a program; NaN for an illegal alpha."""
    token = tl.program_id(0).to(tl.int64)
    alpha = _legal_alpha(tl.load(alpha_ptr + token * stride_alpha))
    text_width = tl.where(alpha == 0.0, 0, width)  # where alpha is 0 the text path is not read: it may hold anything
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(audio_ptr + token * stride_audio + column, mask=inside, other=0.0).to(tl.float32)
        text = tl.load(text_ptr + token * stride_text + column, mask=column < text_width, other=0.0).to(tl.float32)
        value = tl.where(alpha == 0.0, value, value + alpha * (value - text))
        high = value.to(high_ptr.dtype.element_ty)
        tl.store(high_ptr + token * width + column, high, mask=inside)
        if low_ptr is not None:
            low = (value - high.to(tl.float32)).to(low_ptr.dtype.element_ty)
            tl.store(low_ptr + token * width + column, low, mask=inside)


@triton.jit(do_not_specialize=["n_tokens", "tiles_per_split"])
def _audio_max_kernel(
    audio_ptr,
    weight_ptr,
    bias_ptr,
    tile_ptr,  # (programs, M, E) float32
    max_ptr,  # (splits, N)
    stride_audio,
    stride_weight,
    stride_inner,
    n_tokens,
    vocab,
    width,
    tiles_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Largest z_audio of each token in each strip of the vocabulary."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    tile_ptr += (split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (BLOCK_M * BLOCK_E)
    offset = tl.minimum(row, n_tokens - 1).to(tl.int64) * stride_audio
    largest = tl.full([BLOCK_M], _FLOOR, tl.float32)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab, BLOCK_E))):
        safe = tl.minimum(tile * BLOCK_E + tl.arange(0, BLOCK_E), vocab - 1).to(tl.int64)
        _put_product(
            tile_ptr, audio_ptr, None, weight_ptr, offset, offset, safe * stride_weight, width, stride_inner, BLOCK_M, BLOCK_E,
            BLOCK_K, EVEN, UPCAST,
        )  # fmt: skip
        tl.debug_barrier()
        for start in range(0, BLOCK_E, SLICE):
            audio = _slice(tile_ptr, bias_ptr, tile * BLOCK_E, start, vocab, BLOCK_M, BLOCK_E, SLICE, SCALE, SOFTCAP)
            largest = tl.maximum(largest, tl.max(audio, axis=1))
        tl.debug_barrier()
    tl.store(max_ptr + split.to(tl.int64) * n_tokens + row, largest, mask=row < n_tokens)


@triton.jit(do_not_specialize=["n_tokens", "splits", "tiles_per_split"])
def _no_logits_kernel(
    student_ptr,  # (N, H_s)
    student_weight_ptr,
    student_bias_ptr,
    first_ptr,  # (N, H_t): h_audio, the contrast, or its high half
    second_ptr,  # (N, H_t) or None: see SECOND
    teacher_weight_ptr,
    teacher_bias_ptr,
    target_ptr,
    alpha_ptr,
    audio_max_ptr,  # (N,)
    tile_ptr,  # (programs, 1 to 3, M, E) float32: products of the student, of z or z_audio, of z_text
    partial_ptr,  # (_FIELDS, splits, N)
    stride_student,
    stride_first,
    stride_second,
    stride_student_weight,
    stride_student_inner,
    stride_teacher_weight,
    stride_teacher_inner,
    stride_alpha,
    n_tokens,
    splits,
    tiles_per_split,
    vocab,
    student_width,
    teacher_width,
    inverse_temperature,
    log_plausibility,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICE: tl.constexpr,
    SECOND: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEMPERATURE: tl.constexpr,  # 1, 2, or 0 for any other
    HAS_PLAUSIBILITY: tl.constexpr,
    WITH_KD: tl.constexpr,
    WITH_CE: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    EVEN_STUDENT: tl.constexpr,
    EVEN_TEACHER: tl.constexpr,
    UPCAST_STUDENT: tl.constexpr,
    UPCAST_TEACHER: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    # Beyond the last token, and below beyond the last id, the last one is read again: no masks in the loops. 64 bits: a head of
    # 262k ids and width 8192 has 2^31 weights.
    token = tl.minimum(row, n_tokens - 1).to(tl.int64)
    TILE: tl.constexpr = BLOCK_M * BLOCK_E
    TILES: tl.constexpr = 1 if not WITH_KD else (3 if SECOND == _TEXT else 2)
    tile_ptr += (split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (TILES * TILE)
    rate = _rates(inverse_temperature, TEMPERATURE)[0]
    if WITH_CE:
        label = tl.load(target_ptr + token)
        label = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)
    if SECOND == _TEXT:
        alpha = tl.load(alpha_ptr + token * stride_alpha)[:, None]
    if HAS_PLAUSIBILITY:
        threshold = (tl.load(audio_max_ptr + token) + log_plausibility)[:, None]

    s_max = tl.full([BLOCK_M], _FLOOR, tl.float32)
    z_max = tl.full([BLOCK_M], _FLOOR, tl.float32)
    q_sum = tl.zeros([BLOCK_M], tl.float32)
    q1_sum = tl.zeros([BLOCK_M], tl.float32)
    p_sum = tl.zeros([BLOCK_M], tl.float32)
    cross = tl.zeros([BLOCK_M], tl.float32)
    hole = tl.full([BLOCK_M], _MASKED, tl.float32)
    label_logit = tl.zeros([BLOCK_M], tl.float32)
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(vocab, BLOCK_E))):
        first_column = tile * BLOCK_E
        safe = tl.minimum(first_column + tl.arange(0, BLOCK_E), vocab - 1).to(tl.int64)
        _put_product(
            tile_ptr, student_ptr, None, student_weight_ptr, token * stride_student, token, safe * stride_student_weight,
            student_width, stride_student_inner, BLOCK_M, BLOCK_E, BLOCK_K, EVEN_STUDENT, UPCAST_STUDENT,
        )  # fmt: skip
        if WITH_KD:
            _put_product(
                tile_ptr + TILE, first_ptr, second_ptr if SECOND == _LOW else None, teacher_weight_ptr, token * stride_first,
                token * stride_second, safe * stride_teacher_weight, teacher_width, stride_teacher_inner, BLOCK_M, BLOCK_E,
                BLOCK_K, EVEN_TEACHER, UPCAST_TEACHER,
            )  # fmt: skip
            if SECOND == _TEXT:
                wanted = 1
                if HAS_PLAUSIBILITY:
                    tl.debug_barrier()
                    wanted = 0
                    for start in range(0, BLOCK_E, SLICE):
                        z = _slice(
                            tile_ptr + TILE, teacher_bias_ptr, first_column, start, vocab, BLOCK_M, BLOCK_E, SLICE,
                            TEACHER_SCALE, TEACHER_SOFTCAP,
                        )  # fmt: skip
                        survives = tl.where((z < threshold) | (alpha == 0.0), 0, 1)
                        wanted = tl.maximum(wanted, tl.max(tl.max(survives, axis=1), axis=0))
                if wanted > 0:
                    _put_product(
                        tile_ptr + 2 * TILE, second_ptr, None, teacher_weight_ptr, token * stride_second, token,
                        safe * stride_teacher_weight, teacher_width, stride_teacher_inner, BLOCK_M, BLOCK_E, BLOCK_K,
                        EVEN_TEACHER, UPCAST_TEACHER,
                    )  # fmt: skip
        tl.debug_barrier()  # what one thread stored another reads
        for start in range(0, BLOCK_E, SLICE):
            s = _slice(
                tile_ptr, student_bias_ptr, first_column, start, vocab, BLOCK_M, BLOCK_E, SLICE, STUDENT_SCALE, STUDENT_SOFTCAP,
            )  # fmt: skip
            if WITH_CE:
                column = first_column + start + tl.arange(0, SLICE)
                label_logit += tl.sum(tl.where(column[None, :] == label[:, None], s, 0.0), axis=1)
            s_old = s_max
            if WITH_KD:
                z = _slice(
                    tile_ptr + TILE, teacher_bias_ptr, first_column, start, vocab, BLOCK_M, BLOCK_E, SLICE, TEACHER_SCALE,
                    TEACHER_SOFTCAP,
                )  # fmt: skip
                if HAS_PLAUSIBILITY:
                    dropped = z < threshold
                if SECOND == _TEXT:
                    # Not written in a tile without survivors; then nothing of it counts below.
                    text = _slice(
                        tile_ptr + 2 * TILE, teacher_bias_ptr, first_column, start, vocab, BLOCK_M, BLOCK_E, SLICE,
                        TEACHER_SCALE, TEACHER_SOFTCAP,
                    )  # fmt: skip
                    z = _contrast(z, text, alpha)
                if HAS_PLAUSIBILITY:
                    z = tl.where(dropped, _MASKED, z)
                # From here on as in the row kernel's first pass.
                s_max, s_keep, s_shifted, s_exp = _advance(s_max, s, rate)
                q_old = q_sum
                q_sum = q_sum * s_keep + tl.sum(s_exp, axis=1)
                z_old = z_max
                z_max, z_keep, z_shifted, z_exp = _advance(z_max, z, rate)
                p_old = p_sum
                p_sum = p_sum * z_keep + tl.sum(z_exp, axis=1)
                if DIVERGENCE == _FORWARD:
                    moved = (z_old - z_max) - (s_old - s_max)
                    cross = z_keep * (cross + p_old * moved) + tl.sum(z_exp * (z_shifted - s_shifted), axis=1)
                    hole = tl.maximum(hole, tl.max(tl.where(s == _MASKED, z, _MASKED), axis=1))
                else:
                    moved = (s_old - s_max) - (z_old - z_max)
                    cross = s_keep * (cross + q_old * moved) + tl.sum(s_exp * (s_shifted - z_shifted), axis=1)
                    hole = tl.maximum(hole, tl.max(tl.where(z == _MASKED, s, _MASKED), axis=1))
                if WITH_CE and TEMPERATURE == 2:
                    q1_sum = q1_sum * (s_keep * s_keep) + tl.sum(s_exp * s_exp, axis=1)  # e^s = (e^(s/2))^2
                if WITH_CE and TEMPERATURE == 0:
                    q1_sum = q1_sum * tl.exp2((s_old - s_max) * _LOG2E) + tl.sum(tl.exp2(s_shifted * _LOG2E), axis=1)
            else:
                s_max, s_keep, s_shifted, s_exp = _advance(s_max, s, _LOG2E)
                q1_sum = q1_sum * s_keep + tl.sum(s_exp, axis=1)
        tl.debug_barrier()  # before the next tile is stored

    written = row < n_tokens
    field = splits.to(tl.int64) * n_tokens
    partial_ptr += split.to(tl.int64) * n_tokens + row
    tl.store(partial_ptr + _S_MAX * field, s_max, mask=written)
    if WITH_CE:
        if WITH_KD and TEMPERATURE == 1:
            q1_sum = q_sum
        tl.store(partial_ptr + _Q1_SUM * field, q1_sum, mask=written)
        tl.store(partial_ptr + _LABEL * field, label_logit, mask=written)
    if WITH_KD:
        tl.store(partial_ptr + _Q_SUM * field, q_sum, mask=written)
        tl.store(partial_ptr + _Z_MAX * field, z_max, mask=written)
        tl.store(partial_ptr + _P_SUM * field, p_sum, mask=written)
        tl.store(partial_ptr + _CROSS * field, cross, mask=written)
        tl.store(partial_ptr + _HOLE * field, hole, mask=written)


@triton.jit(do_not_specialize=["n_tokens", "splits"])
def _merge_kernel(
    partial_ptr,  # (_FIELDS, splits, N)
    target_ptr,
    alpha_ptr,
    kd_ptr,
    ce_ptr,
    stride_alpha,
    n_tokens,
    splits,
    vocab,
    ignore_index,
    inverse_temperature,
    SPLITS: tl.constexpr,  # a power of two
    DIVERGENCE: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    WITH_KD: tl.constexpr,
    WITH_CE: tl.constexpr,
):
    """kd and ce of one token from its strips: the row kernel's merge with strips for groups."""
    token = tl.program_id(0)
    if HAS_TARGET:
        target = tl.load(target_ptr + token)
        if target == ignore_index:
            tl.store(kd_ptr + token, 0.0)
            tl.store(ce_ptr + token, 0.0)
            return
    split = tl.arange(0, SPLITS)
    inside = split < splits
    field = splits.to(tl.int64) * n_tokens
    strip_ptr = partial_ptr + split.to(tl.int64) * n_tokens + token
    rate = inverse_temperature * _LOG2E
    s_max = tl.load(strip_ptr + _S_MAX * field, mask=inside, other=_FLOOR)
    s_row, s_weight = _merge_weight(s_max, rate)
    if WITH_CE:
        label_inside = (target >= 0) & (target < vocab)
        q1_sum = tl.load(strip_ptr + _Q1_SUM * field, mask=inside, other=0.0)
        q1_row = tl.sum(q1_sum * _merge_weight(s_max, _LOG2E)[1], axis=0)
        label_logit = tl.sum(tl.load(strip_ptr + _LABEL * field, mask=inside, other=0.0), axis=0)
        tl.store(ce_ptr + token, _cross_entropy(q1_row, s_row, label_logit, label_inside))
    else:
        tl.store(ce_ptr + token, 0.0)
    if WITH_KD:
        alpha_legal = True
        if HAS_TEXT:
            alpha = tl.load(alpha_ptr + token * stride_alpha)
            alpha_legal = (alpha >= 0.0) & (alpha < float("inf"))
        q_sum = tl.load(strip_ptr + _Q_SUM * field, mask=inside, other=0.0)
        p_sum = tl.load(strip_ptr + _P_SUM * field, mask=inside, other=0.0)
        z_max = tl.load(strip_ptr + _Z_MAX * field, mask=inside, other=_FLOOR)
        cross = tl.load(strip_ptr + _CROSS * field, mask=inside, other=0.0)
        hole = tl.load(strip_ptr + _HOLE * field, mask=inside, other=_MASKED)
        z_row, z_weight = _merge_weight(z_max, rate)
        q_row = tl.sum(q_sum * s_weight, axis=0)
        p_row = tl.sum(p_sum * z_weight, axis=0)
        log_z = _log_ratio_of_sums(p_row, q_row)
        kd, infinite = _kl_of_row(
            cross, hole, q_sum, p_sum, s_max, z_max, s_row, z_row, s_weight, z_weight, q_row, p_row, log_z, inverse_temperature,
            rate, DIVERGENCE,
        )  # fmt: skip
        tl.store(kd_ptr + token, _finish_kd(kd, inverse_temperature, infinite, p_row == 0.0, alpha_legal))
    else:
        tl.store(kd_ptr + token, 0.0)


def _tiles(n_tokens: int, itemsize: int, operands: int, limits: _Limits, products: int = 2) -> dict[str, int]:
    """BLOCK_M, BLOCK_E, BLOCK_K, SLICE and launch options of the GEMM kernels.

    The pipeline has as many stages as shared memory holds of one weight's tile and ``operands`` tiles of hidden states. A slice
    is 16 or fewer logits a thread and tensor. Fixed, because a tuner would have to synchronise.
    """
    if itemsize == 4:  # no tensor cores: float32 products are exact ones
        rows, columns, inner = 64, 64, (32 if products < 3 else 16)
    else:
        # A step of 64 spills where tensor cores take their operands from registers (all but sm_90 to sm_110), and where a
        # program forms three products.
        rows, columns = (128 if n_tokens > 64 else 64), 128
        inner = 64 if 9 <= limits.capability < 12 and products < 3 else 32
    stage = (columns + rows * operands) * inner * itemsize
    # Left to itself, ptxas spills float32's accumulators to fit one more block.
    registers = {"maxnreg": 255} if itemsize == 4 else {}
    return {
        "BLOCK_M": rows,
        "BLOCK_E": columns,
        "BLOCK_K": inner,
        "SLICE": 32,
        "num_warps": 8,
        "num_stages": max(2, min(4, limits.shared_bytes // stage)),
        "enable_fp_fusion": True,
        **registers,
    }


@functools.cache
def _split_count(token_tiles: int, vocab_tiles: int, processors: int) -> tuple[int, int]:
    """(splits, tiles of the vocabulary a split): the fewest splits within 5% of the shortest time in waves of programs.

    There are at most MAX_WAVES waves, since each program has scratch of its own.
    """

    def rounds(splits: int) -> int:
        return math.ceil(token_tiles * splits / processors) * math.ceil(vocab_tiles / splits)

    most = min(vocab_tiles, MAX_SPLITS, max(1, MAX_WAVES * processors // max(token_tiles, 1)))
    shortest = min(map(rounds, range(1, most + 1)))
    splits = next(s for s in range(1, most + 1) if rounds(s) <= 1.05 * shortest)
    per_split = math.ceil(vocab_tiles / splits)
    return math.ceil(vocab_tiles / per_split), per_split


@dataclass(frozen=True)
class _Limits:
    """The properties of a device that shape the launch. The interpreter has none of its own and gets an H100's."""

    processors: int = 132
    shared_bytes: int = 227 << 10  # that a program may use
    capability: int = 9  # the major one


def _device_limits(device: torch.device) -> _Limits:
    if device.type != "cuda":
        return _Limits()
    properties: Any = torch.cuda.get_device_properties(device)  # whose stubs lack the shared memory that is wanted
    return _Limits(properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major)


def _second_operand(audio: torch.Tensor, text: torch.Tensor | None, weight: torch.Tensor, spec: RowSpec) -> int:
    if text is None or not spec.with_kd:
        return _NOTHING.value
    if (
        spec.teacher_softcap is not None
        or spec.plausibility is not None
        or weight.dtype == audio.dtype == torch.float16
    ):
        return _TEXT.value
    return _LOW.value if weight.dtype == audio.dtype == torch.bfloat16 else _NOTHING.value


def _upcast(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the operands become float32: if their dtypes differ, and in the interpreter, which multiplies bf16 as bits."""
    interpreted = not isinstance(_no_logits_kernel, triton.JITFunction)
    return hidden.dtype != weight.dtype or (interpreted and weight.dtype == torch.bfloat16)


@dataclass(frozen=True)
class _Plan:
    """The launch for a slab of tokens."""

    tiles: dict[str, int]
    token_tiles: int
    splits: int
    tiles_per_split: int
    products: int  # tiles of products a program holds
    scratch_bytes: int


def _plan(
    n: int, vocab: int, teacher_width: int, itemsize: int, second_is: int, spec: RowSpec, device: torch.device
) -> _Plan:
    limits = _device_limits(device)
    products = 1 if not spec.with_kd else 3 if second_is == _TEXT.value else 2
    tiles = _tiles(n, itemsize, 2 if second_is == _LOW.value else 1, limits, products)
    token_tiles = math.ceil(n / tiles["BLOCK_M"])
    splits, per_split = _split_count(token_tiles, math.ceil(vocab / tiles["BLOCK_E"]), limits.processors)
    operands = {_LOW.value: 2 * itemsize, _TEXT.value: 0, _NOTHING.value: 4}[second_is] * teacher_width
    scratch = 4 * token_tiles * splits * products * tiles["BLOCK_M"] * tiles["BLOCK_E"]
    scratch += n * (operands + 4 * (_FIELDS + 1) * splits)
    return _Plan(tiles, token_tiles, splits, per_split, products, scratch)


def linear_caad_no_logits(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    audio_hidden: torch.Tensor,
    text_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    target: torch.Tensor | None,
    alpha: torch.Tensor,
    spec: RowSpec,
    *,
    workspace_bytes: int | None = None,
) -> RowResult:
    """kd and ce of every token (see :mod:`kdkernels.ops.rows`; divergence forward_kl or reverse_kl), no gradient, no statistics.

    Args:
        student_hidden: (N, H_s), audio_hidden, text_hidden: (N, H_t), weights (V_s, H_s) and (V_t, H_t) float32 | bfloat16 |
            float16, on a CUDA device, or on the CPU under TRITON_INTERPRET=1. Tokens whose target is ignored count nowhere.
        workspace_bytes: bound on the scratch, as far as one tile of tokens goes; None: the chunked path's default.

    GEMMs accumulate in float32. Hidden states and weight of different dtypes are multiplied in float32. Scratch: tiles of
    products (17 MiB for a wave of programs on an H100, at most four waves), 36 bytes a token and split of the vocabulary, and the
    contrast's operands, 4 H_t bytes a token; tokens go through in slabs, so that it does not grow with N. Nothing is read back to
    the host.

    Raises RuntimeError for CPU tensors without the interpreter.
    """
    heads = LinearTensors(
        _rows_of(student_hidden), student_weight, student_bias, _rows_of(audio_hidden),
        None if text_hidden is None else _rows_of(text_hidden), teacher_weight, teacher_bias,
    )  # fmt: skip
    device, n_total = student_hidden.device, student_hidden.shape[0]
    out = RowResult.empty(n_total, 0, device)
    second_is = _second_operand(audio_hidden, text_hidden, teacher_weight, spec)
    sizes = [student_hidden.element_size(), student_weight.element_size()]
    if spec.with_kd:
        sizes += [audio_hidden.element_size(), teacher_weight.element_size()]
        if text_hidden is not None and second_is == _NOTHING.value:
            sizes.append(4)
    budget = default_workspace_bytes(device) if workspace_bytes is None else workspace_bytes

    def plan(tokens: int) -> _Plan:
        return _plan(tokens, spec.vocab, audio_hidden.shape[1], max(sizes), second_is, spec, device)

    # A tile of tokens for each multiprocessor, and fewer where the workspace is smaller, down to one tile.
    tile = plan(n_total).tiles["BLOCK_M"]
    def within_budget(tokens: int) -> int:
        while tokens > tile and plan(tokens).scratch_bytes > budget:
            tokens = math.ceil(tokens / 2 / tile) * tile
        return tokens

    slab = within_budget(min(n_total, tile * _device_limits(device).processors))
    start = 0
    while start < n_total:
        length = within_budget(min(slab, n_total - start))  # fewer tokens may have more splits, and so more scratch
        tokens = slice(start, start + length)
        start += length
        _Slab(
            heads.student_hidden[tokens],
            heads.audio_hidden[tokens],
            None if heads.text_hidden is None else heads.text_hidden[tokens],
            heads,
            None if target is None else target[tokens],
            alpha[tokens] if alpha.numel() > 1 else alpha,
            spec,
            second_is,
            plan(tokens.stop - tokens.start),
        ).solve(out.kd[tokens], out.ce[tokens])
    return out


def _rows_of(hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


def contrastive_summands(
    audio: torch.Tensor, text: torch.Tensor, alpha: torch.Tensor, dtype: torch.dtype, count: int
) -> list[torch.Tensor]:
    """As :func:`kdkernels.ops.gemm.contrastive_summands`, in one pass over both paths."""
    audio, text = _rows_of(audio), _rows_of(text)
    parts = [torch.empty(audio.shape, dtype=dtype, device=audio.device) for _ in range(count)]
    if len(audio) == 0:
        return parts
    with _device_of(audio, _contrast_kernel):
        _contrast_kernel[(len(audio),)](
            audio_ptr=audio,
            text_ptr=text,
            alpha_ptr=alpha,
            high_ptr=parts[0],
            low_ptr=parts[1] if count > 1 else None,
            stride_audio=audio.stride(0),
            stride_text=text.stride(0),
            stride_alpha=_alpha_stride(alpha),
            n_tokens=audio.shape[0],
            width=audio.shape[1],
            BLOCK=min(2048, max(128, triton.next_power_of_2(audio.shape[1]))),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return parts


@dataclass(frozen=True, eq=False)
class _Slab:
    """Tokens that go through the kernels together, and how."""

    student: torch.Tensor  # (n, H_s)
    audio: torch.Tensor  # (n, H_t)
    text: torch.Tensor | None
    heads: LinearTensors  # for the weights and biases
    target: torch.Tensor | None
    alpha: torch.Tensor
    spec: RowSpec
    second_is: int
    plan: _Plan

    def solve(self, kd: torch.Tensor, ce: torch.Tensor) -> None:
        """Writes the (n,) results."""
        plan = self.plan
        size = (plan.token_tiles * plan.splits, plan.products, plan.tiles["BLOCK_M"], plan.tiles["BLOCK_E"])
        products = self._float32(*size)
        partial = self._float32(_FIELDS, plan.splits, len(self.student))
        with _device_of(self.student, _no_logits_kernel):
            first, second = self._operands()
            largest = None
            if self.spec.with_kd and self.spec.plausibility is not None:
                largest = self._largest_audio(products)
            self._fold_logits(first, second, largest, products, partial)
            self._merge(partial, kd, ce)

    def _float32(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.student.device)

    @property
    def _grid(self) -> tuple[int, int]:
        """Tokens first: programs side by side read the same weights, out of L2."""
        return self.plan.token_tiles, self.plan.splits

    def _operands(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The operands that the teacher's weight is multiplied with; see ``second_is``."""
        audio, text = self.audio, self.text
        if self.second_is == _TEXT.value:
            return audio, text
        if text is None or not self.spec.with_kd:
            return audio, None
        low = self.second_is == _LOW.value
        dtype = self.heads.teacher_weight.dtype if low else torch.float32
        first, *more = contrastive_summands(audio, text, self.alpha, dtype, 1 + low)
        return first, more[0] if more else None

    def _largest_audio(self, products: torch.Tensor) -> torch.Tensor:
        """max z_audio of each token."""
        audio, weight, spec, tiles = self.audio, self.heads.teacher_weight, self.spec, self.plan.tiles
        largest = self._float32(self.plan.splits, len(audio))
        _audio_max_kernel[self._grid](
            audio_ptr=audio,
            weight_ptr=weight,
            bias_ptr=self.heads.teacher_bias,
            tile_ptr=products,
            max_ptr=largest,
            stride_audio=audio.stride(0),
            stride_weight=weight.stride(0),
            stride_inner=weight.stride(1),
            n_tokens=audio.shape[0],
            vocab=spec.vocab,
            width=audio.shape[1],
            tiles_per_split=self.plan.tiles_per_split,
            SCALE=float(spec.teacher_scale),
            SOFTCAP=spec.teacher_softcap,
            EVEN=audio.shape[1] % tiles["BLOCK_K"] == 0,
            UPCAST=_upcast(audio, weight),
            **tiles,
        )
        return largest.amax(0)

    def _fold_logits(
        self,
        first: torch.Tensor,
        second: torch.Tensor | None,
        largest: torch.Tensor | None,
        products: torch.Tensor,
        partial: torch.Tensor,
    ) -> None:
        """Both heads' products, tile by tile, folded into the strips' results."""
        student, spec, tiles = self.student, self.spec, self.plan.tiles
        _, student_weight, student_bias, _, _, teacher_weight, teacher_bias = self.heads
        _no_logits_kernel[self._grid](
            student_ptr=student,
            student_weight_ptr=student_weight,
            student_bias_ptr=student_bias,
            first_ptr=first,
            second_ptr=second,
            teacher_weight_ptr=teacher_weight,
            teacher_bias_ptr=teacher_bias,
            target_ptr=self.target,
            alpha_ptr=self.alpha,
            audio_max_ptr=largest,
            tile_ptr=products,
            partial_ptr=partial,
            stride_student=student.stride(0),
            stride_first=first.stride(0),
            stride_second=0 if second is None else second.stride(0),
            stride_student_weight=student_weight.stride(0),
            stride_student_inner=student_weight.stride(1),
            stride_teacher_weight=teacher_weight.stride(0),
            stride_teacher_inner=teacher_weight.stride(1),
            stride_alpha=_alpha_stride(self.alpha),
            n_tokens=student.shape[0],
            splits=partial.shape[1],
            tiles_per_split=self.plan.tiles_per_split,
            vocab=spec.vocab,
            student_width=student.shape[1],
            teacher_width=first.shape[1],
            inverse_temperature=1.0 / spec.temperature,
            log_plausibility=spec.log_plausibility,
            SECOND=self.second_is,
            DIVERGENCE=DIVERGENCES.index(spec.divergence),
            TEMPERATURE=_temperature_code(spec.temperature),
            HAS_PLAUSIBILITY=spec.plausibility is not None and spec.with_kd,
            WITH_KD=spec.with_kd,
            WITH_CE=self._with_ce,
            STUDENT_SCALE=float(spec.student_scale),
            TEACHER_SCALE=float(spec.teacher_scale),
            STUDENT_SOFTCAP=spec.student_softcap,
            TEACHER_SOFTCAP=spec.teacher_softcap,
            EVEN_STUDENT=student.shape[1] % tiles["BLOCK_K"] == 0,
            EVEN_TEACHER=first.shape[1] % tiles["BLOCK_K"] == 0,
            UPCAST_STUDENT=_upcast(student, student_weight),
            UPCAST_TEACHER=_upcast(first, teacher_weight),
            **tiles,
        )

    @property
    def _with_ce(self) -> bool:
        return self.spec.with_ce and self.target is not None

    def _merge(self, partial: torch.Tensor, kd: torch.Tensor, ce: torch.Tensor) -> None:
        """The strips' results as those of the tokens."""
        spec = self.spec
        _merge_kernel[(len(kd),)](
            partial_ptr=partial,
            target_ptr=self.target,
            alpha_ptr=self.alpha,
            kd_ptr=kd,
            ce_ptr=ce,
            stride_alpha=_alpha_stride(self.alpha),
            n_tokens=kd.shape[0],
            splits=partial.shape[1],
            vocab=spec.vocab,
            ignore_index=spec.ignore_index,
            inverse_temperature=1.0 / spec.temperature,
            SPLITS=triton.next_power_of_2(partial.shape[1]),
            DIVERGENCE=DIVERGENCES.index(spec.divergence),
            HAS_TEXT=self.text is not None,
            HAS_TARGET=self.target is not None,
            WITH_KD=spec.with_kd,
            WITH_CE=self._with_ce,
            num_warps=1,
            enable_fp_fusion=True,
        )
