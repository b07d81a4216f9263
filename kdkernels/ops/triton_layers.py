"""The layer row problem (:mod:`kdkernels.ops.layer_rows`) in Triton: one program a row, which it keeps in registers.

A row of 16,384 float32 states is 64 a thread of 8 warps; wider rows raise ValueError. Sums are over the whole block at once,
so the result depends on the shape alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .triton_shared import _alpha_stride, _device_of, _legal_alpha

MAX_WIDTH = 16384


@triton.jit
def _layer_row_kernel(
    u_ptr,
    v_ptr,
    text_ptr,
    valid_ptr,
    alpha_ptr,
    coef_ptr,
    grad_u_ptr,
    grad_v_ptr,
    loss_ptr,
    stride_u,
    stride_v,
    stride_text,
    stride_grad_u,
    stride_grad_v,
    stride_alpha,
    width,
    BLOCK: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_VALID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WANT_U: tl.constexpr,
    WANT_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 from 0.5M rows of 4096 on
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if WANT_U:
        grad_u_ptr += row * stride_grad_u
    if WANT_V:
        grad_v_ptr += row * stride_grad_v
    if HAS_VALID:
        counts = tl.load(valid_ptr + row)
        if counts == 0:
            tl.store(loss_ptr + row, 0.0)
            zero = tl.zeros([BLOCK], tl.float32)
            if WANT_U:
                tl.store(grad_u_ptr + columns, zero.to(grad_u_ptr.dtype.element_ty), mask=inside)
            if WANT_V:
                tl.store(grad_v_ptr + columns, zero.to(grad_v_ptr.dtype.element_ty), mask=inside)
            return
    u = tl.load(u_ptr + row * stride_u + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * stride_v + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_TEXT:
        alpha = tl.load(alpha_ptr + row * stride_alpha)
        text_width = tl.where(alpha == 0.0, 0, width)  # where alpha is 0 the text path is not read
        text = tl.load(text_ptr + row * stride_text + columns, mask=columns < text_width, other=0.0).to(tl.float32)
        v = tl.where(alpha == 0.0, v, v + _legal_alpha(alpha) * (v - text))
    u_inverse = 1.0
    v_inverse = 1.0
    if NORMALIZE:
        u_square = tl.sum(u * u, axis=0)
        v_square = tl.sum(v * v, axis=0)
        u_inverse = tl.where(u_square == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(u_square == 0.0, 1.0, u_square)))
        v_inverse = tl.where(v_square == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(v_square == 0.0, 1.0, v_square)))
        u = u * u_inverse
        v = v * v_inverse
    difference = u - v
    loss = tl.sum(difference * difference, axis=0)
    tl.store(loss_ptr + row, loss)
    if WANT_U or WANT_V:
        factor = 2.0 * tl.load(coef_ptr + row)
        along = 0.0
        if NORMALIZE:
            # Of unit vectors u (u - v) = |u - v|^2 / 2, free of the cancellation in 1 - u v.
            along = 0.5 * loss
            factor = tl.where((u_inverse == 0.0) | (v_inverse == 0.0), 0.0, factor)
        tl.debug_barrier()  # the gradient may lie over the row: all of it is read before any is overwritten
        if WANT_U:
            grad = (difference - u * along) * (factor * u_inverse)
            tl.store(grad_u_ptr + columns, grad.to(grad_u_ptr.dtype.element_ty), mask=inside)
        if WANT_V:
            grad = (-difference - v * along) * (factor * v_inverse)
            tl.store(grad_v_ptr + columns, grad.to(grad_v_ptr.dtype.element_ty), mask=inside)


def layer_rows(
    u: torch.Tensor,
    v: torch.Tensor,
    text: torch.Tensor | None,
    valid: torch.Tensor | None,
    alpha: torch.Tensor,
    coef: torch.Tensor,
    *,
    normalize: bool,
    grad_u: torch.Tensor | None = None,
    grad_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :mod:`kdkernels.ops.layer_rows`. Raises ValueError for rows wider than MAX_WIDTH."""
    if u.shape[1] > MAX_WIDTH:
        raise ValueError(f"student_hidden: expected a width of at most {MAX_WIDTH} with impl='triton', got {u.shape[1]}")
    loss = torch.empty(u.shape[0], dtype=torch.float32, device=u.device)
    if u.shape[0] == 0:
        return loss
    width = u.shape[1]
    block = triton.next_power_of_2(width)
    # Left to itself, Triton 3.6's ptxas spills a word to do with 32; 16 states of three tensors need at most 96.
    registers = {"maxnreg": 96} if block <= 8192 else {}

    def stride(x: torch.Tensor | None) -> int:
        return 0 if x is None else x.stride(0)

    with _device_of(u, _layer_row_kernel):
        _layer_row_kernel[(u.shape[0],)](
            u_ptr=u,
            v_ptr=v,
            text_ptr=text,
            valid_ptr=None if valid is None else valid.view(torch.uint8),
            alpha_ptr=alpha,
            coef_ptr=coef,
            grad_u_ptr=grad_u,
            grad_v_ptr=grad_v,
            loss_ptr=loss,
            stride_u=stride(u),
            stride_v=stride(v),
            stride_text=stride(text),
            stride_grad_u=stride(grad_u),
            stride_grad_v=stride(grad_v),
            stride_alpha=_alpha_stride(alpha),
            width=width,
            BLOCK=block,
            HAS_TEXT=text is not None,
            HAS_VALID=valid is not None,
            NORMALIZE=normalize,
            WANT_U=grad_u is not None,
            WANT_V=grad_v is not None,
            # 16 states of each tensor a thread, and 32 to 64 only where a block has no more threads.
            num_warps=min(16, max(1, block // 512)),
            enable_fp_fusion=True,
            **registers,
        )
    return loss
