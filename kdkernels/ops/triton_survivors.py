"""The contrast under a plausibility mask, in Triton: z_text only at the survivors, tokens with z_audio >= max z_audio + log beta.

A GEMM makes a chunk's whole z_audio. This kernel turns it into z_hat, with -inf where a token did not survive. So the row kernel
needs neither a text path nor a mask. One program owns M x E logits, counts the survivors among them and then runs

    nothing     only masks
    few         one dot product of two rows, h_text and W_t, a survivor
    many        one dense product of the tile on tensor cores

The device makes this choice. So nothing is read back to the host, a CUDA graph can capture it, and the worst case costs one dense
GEMM.

Legend: C tokens of a chunk, V valid ids, H_t hidden width, M x E a tile of tokens and ids.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .rows import RowSpec
from .triton_no_logits import _device_limits, _product, _tiles, _upcast
from .triton_shared import _FLOOR, _MASKED, _alpha_stride, _contrast, _device_of, _logit_with_slope

# The dense product and z_audio are in registers together, one address a logit where rows are not aligned: a quarter of a GEMM
# kernel's tile.
ROWS, ROWS_FP32, COLUMNS = 64, 32, 64
# Survivors a tile from which the dense product is cheaper. Estimated, not measured: for H_t 4096 a tile is 34 MFLOP, 13 us at 2.6
# TFLOP/s a multiprocessor. A dot product reads two rows of 8 KiB from L2 and reduces them, about 1 us.
DENSE_FROM = 12


@triton.jit
def _finish_contrast(audio, text, bias, alpha, threshold, legal, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, inside):
    """z_hat from logits z_audio and products h_text W_t^T; -inf where dropped or masked."""
    dropped = audio < threshold
    text = _logit_with_slope(tl.where(inside, text + bias, float("-inf")), inside, SCALE, SOFTCAP)[0]
    z = _contrast(audio, text, alpha)
    z = tl.where(dropped | (z == _MASKED), float("-inf"), z)
    return tl.where(legal, z, float("nan"))


@triton.jit
def _audio_logits(logits_ptr, row_offset, column, inside, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    value = tl.load(logits_ptr + row_offset[:, None] + column[None, :], mask=inside, other=float("-inf"))
    return _logit_with_slope(value.to(tl.float32), inside, SCALE, SOFTCAP)[0]


@triton.jit(do_not_specialize=["n_tokens", "ignore_index"])
def _survivors_kernel(
    logits_ptr,  # (C, V): stored z_audio, becomes z_hat
    row_max_ptr,  # (C,): the largest stored value
    text_ptr,  # (C, H_t)
    weight_ptr,  # (V, H_t)
    bias_ptr,
    target_ptr,
    alpha_ptr,
    stride_logits,
    stride_text,
    stride_weight,
    stride_inner,
    stride_alpha,
    n_tokens,
    vocab,
    width,
    ignore_index,
    log_plausibility,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK_DOT: tl.constexpr,
    DENSE_FROM: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_M
    first_column = tl.program_id(1) * BLOCK_E
    row = first_row + tl.arange(0, BLOCK_M)
    token = tl.minimum(row, n_tokens - 1).to(tl.int64)
    row_offset = token * stride_logits
    written = (row < n_tokens)[:, None]
    alpha = tl.load(alpha_ptr + token * stride_alpha)[:, None]
    legal = (alpha >= 0.0) & (alpha < float("inf"))
    largest = _logit_with_slope(tl.load(row_max_ptr + token).to(tl.float32), row >= 0, SCALE, SOFTCAP)[0]
    threshold = (tl.maximum(largest, _FLOOR) + log_plausibility)[:, None]
    reads_text = tl.where(written & (alpha != 0.0) & legal, 1, 0)
    if target_ptr is not None:
        target = tl.load(target_ptr + token)
        reads_text = tl.where((target == ignore_index)[:, None], 0, reads_text)

    survivors = 0
    for start in range(0, BLOCK_E, SLICE):
        column = first_column + start + tl.arange(0, SLICE)
        audio = _audio_logits(logits_ptr, row_offset, column, (column < vocab)[None, :], SCALE, SOFTCAP)
        wanted = tl.where(audio < threshold, 0, reads_text)
        survivors += tl.sum(tl.sum(wanted, axis=1), axis=0)

    if survivors >= DENSE_FROM:
        column = first_column + tl.arange(0, BLOCK_E)
        safe = tl.minimum(column, vocab - 1).to(tl.int64)
        text = _product(
            text_ptr, None, weight_ptr, token * stride_text, token, safe * stride_weight, width, stride_inner, BLOCK_M, BLOCK_E,
            BLOCK_K, EVEN, UPCAST,
        )  # fmt: skip
        inside = (column < vocab)[None, :]
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + safe).to(tl.float32)[None, :]
        audio = _audio_logits(logits_ptr, row_offset, column, inside, SCALE, SOFTCAP)
        z = _finish_contrast(audio, text, bias, alpha, threshold, legal, SCALE, SOFTCAP, inside)
        z_ptrs = logits_ptr + row_offset[:, None] + column[None, :]
        tl.store(z_ptrs, z.to(logits_ptr.dtype.element_ty), mask=inside & written)
        return

    index = tl.arange(0, BLOCK_M)[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    for start in range(0, BLOCK_E, SLICE):
        column = first_column + start + tl.arange(0, SLICE)
        inside = (column < vocab)[None, :]
        audio = _audio_logits(logits_ptr, row_offset, column, inside, SCALE, SOFTCAP)
        wanted = tl.where(audio < threshold, 0, reads_text)
        text = tl.zeros([BLOCK_M, SLICE], tl.float32)
        last = -1
        for _ in range(0, tl.sum(tl.sum(wanted, axis=1), axis=0)):
            open_index = tl.where((wanted > 0) & (index > last), index, BLOCK_M * SLICE)
            last = tl.min(tl.min(open_index, axis=1), axis=0)
            h_ptr = text_ptr + (first_row + last // SLICE).to(tl.int64) * stride_text
            w_ptr = weight_ptr + (first_column + start + last % SLICE).to(tl.int64) * stride_weight
            total = tl.zeros([BLOCK_DOT], tl.float32)
            for begin in range(0, width, BLOCK_DOT):
                inner = begin + tl.arange(0, BLOCK_DOT)
                h = tl.load(h_ptr + inner, mask=inner < width, other=0.0).to(tl.float32)
                w = tl.load(w_ptr + inner.to(tl.int64) * stride_inner, mask=inner < width, other=0.0).to(tl.float32)
                total += h * w
            text = tl.where(index == last, tl.sum(total, axis=0), text)
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
        z = _finish_contrast(audio, text, bias, alpha, threshold, legal, SCALE, SOFTCAP, inside)
        z_ptrs = logits_ptr + row_offset[:, None] + column[None, :]
        tl.store(z_ptrs, z.to(logits_ptr.dtype.element_ty), mask=inside & written)


def contrast_at_survivors(
    audio_logits: torch.Tensor,
    text_hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor | None,
    alpha: torch.Tensor,
    spec: RowSpec,
) -> None:
    """z_audio becomes z_hat in place, with ``spec``'s teacher scale and softcap applied, and -inf where a token did not survive.

    Args:
        audio_logits: (C, V) float32 or bfloat16, last stride 1: h_audio W_t^T + b_t as stored.
        text_hidden: (C, H_t), weight: (V, H_t), bias: (V,) or None: float32, bfloat16 or float16.
        target: (C,) or None; rows to ignore end up undefined. alpha: (1,) or (C,) float32; a bad one makes its row NaN.

    z_text accumulates in float32. Extra memory: C values. Nothing is read back to the host.
    """
    if audio_logits.shape[0] == 0:
        return
    text_hidden = text_hidden if text_hidden.stride(1) == 1 else text_hidden.contiguous()
    (tokens, vocab), width = audio_logits.shape, text_hidden.shape[1]
    itemsize = max(text_hidden.element_size(), weight.element_size())
    tiles = _tiles(tokens, itemsize, 1, _device_limits(audio_logits.device))
    rows, inner = (ROWS_FP32, 16) if itemsize == 4 else (ROWS, tiles["BLOCK_K"])
    tiles |= {
        "BLOCK_M": rows,
        "BLOCK_E": COLUMNS,
        "BLOCK_K": inner,
        "maxnreg": 255,  # left to itself, ptxas spills to fit one more block
    }
    with _device_of(audio_logits, _survivors_kernel):
        _survivors_kernel[(math.ceil(tokens / rows), math.ceil(vocab / COLUMNS))](
            logits_ptr=audio_logits,
            row_max_ptr=audio_logits.amax(1),
            text_ptr=text_hidden,
            weight_ptr=weight,
            bias_ptr=bias,
            target_ptr=target,
            alpha_ptr=alpha,
            stride_logits=audio_logits.stride(0),
            stride_text=text_hidden.stride(0),
            stride_weight=weight.stride(0),
            stride_inner=weight.stride(1),
            stride_alpha=_alpha_stride(alpha),
            n_tokens=tokens,
            vocab=vocab,
            width=width,
            ignore_index=spec.ignore_index,
            log_plausibility=spec.log_plausibility,
            BLOCK_DOT=min(2048, max(256, triton.next_power_of_2(width))),
            DENSE_FROM=DENSE_FROM,
            SCALE=float(spec.teacher_scale),
            SOFTCAP=spec.teacher_softcap,
            EVEN=width % inner == 0,
            UPCAST=_upcast(text_hidden, weight),
            **tiles,
        )
