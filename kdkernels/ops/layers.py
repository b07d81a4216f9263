"""The layer loss in token chunks: projection GEMM, row kernel, GEMMs of the gradients; and its operator.

Per chunk of C tokens: a GEMM writes the projected states into scratch. One row kernel writes the loss and, into the scratch, the
gradient. Then one GEMM makes the student's gradient and one the projection's. Without a projection the row kernel runs alone.

Legend: N tokens, C tokens of a chunk, H_s / H_t hidden widths of student and teacher, W the width in which they are compared.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from . import layer_rows, native
from .chunking import plan_chunks
from .gemm import (
    add_weight_gradient,
    contrast_format,
    contrastive_summands,
    empty_weight_gradient,
    finish_weight_gradient,
    gemm,
    gradient_view,
    hidden_gradient,
    return_scratch,
    spread,
    take_scratch,
)
from .reference import savable, without_autocast
from .schema import _scaled, check_values, half_gain, refuse_second_derivative, register_formulas, without_gradients

# Factors on half_gain. Differences of hidden states may be large, and half_gain alone leaves room up to 65504. Differences of
# unit vectors are small, and they are divided by the vector's length.
_GAIN_PLAIN, _GAIN_NORMALIZED = 2.0**-6, 2.0**6


@dataclass(frozen=True)
class LayerResult:
    """loss (N,) float32 unweighted; gradients (N, H_s), the projection's shape, or None."""

    loss: Tensor
    hidden_grad: Tensor | None
    projection_grad: Tensor | None


# Rows of a layer are short. With as few tokens a chunk as for logits, starting threads would cost as much as the products.
_CPU_SCRATCH_BYTES = 16 << 20


def layer_rows_of(impl: str) -> Callable[..., Tensor]:
    """The ``layer_rows`` function (see :mod:`kdkernels.ops.layer_rows`) of a kernel implementation."""
    if impl == "triton":
        return importlib.import_module(".triton_layers", __package__).layer_rows
    return {"cpu": native.layer_rows}[impl]


def layer_chunks(
    student: Tensor,
    audio: Tensor,
    text: Tensor | None,
    projection: Tensor | None,
    valid: Tensor | None,
    alpha: Tensor,
    coef: Tensor,
    *,
    project_teacher: bool,
    normalize: bool,
    hidden_grad: bool,
    projection_grad: bool,
    rows: Callable[..., Tensor],
) -> LayerResult:
    """One pair of layers: student (N, H_s) against audio (N, H_t), or their contrast with text.

    ``projection``: (H_t, H_s) for the student's states, (H_s, H_t) with ``project_teacher``, or None.
    """
    device, n_total = student.device, student.shape[0]
    keep, valid = None, coef != 0 if valid is None else valid & (coef != 0)
    if device.type == "cpu" and bool(valid.all()):
        valid = None
    if valid is not None and device.type == "cpu":  # on other devices their number would need a sync
        keep = valid.nonzero()[:, 0]
        student, audio, coef = student[keep], audio[keep], coef[keep]
        text = None if text is None else text[keep]
        alpha = alpha[keep] if alpha.numel() > 1 else alpha
        valid = None
    n = student.shape[0]
    loss = torch.empty(n, dtype=torch.float32, device=device)
    dh = torch.empty_like(student, memory_format=torch.contiguous_format) if hidden_grad else None
    dp = None
    if projection is None:
        loss = rows(student, audio, text, valid, alpha, coef, normalize=normalize, grad_u=dh)
    else:
        width = projection.shape[0]
        fixed = max(1, _CPU_SCRATCH_BYTES // (4 * width)) if device.type == "cpu" else None
        plan = plan_chunks(
            n_tokens=n, bytes_per_token=4 * width, student_width=student.shape[1], device=device, chunk_tokens=fixed
        )
        at_once = plan.chunks == 1 and student.dtype == projection.dtype
        dp = empty_weight_gradient(projection, at_once=at_once) if projection_grad else None
        if dp is not None and n == 0:
            dp.zero_()
        shape = (min(plan.chunk_tokens, max(n, 1)), width)
        memory = take_scratch(4 * math.prod(shape), device)
        scratch = memory[: 4 * math.prod(shape)].view(torch.float32).view(shape)
        for start in range(0, n, plan.chunk_tokens):
            chunk = slice(start, min(start + plan.chunk_tokens, n))
            here = _Pair(
                student[chunk],
                audio[chunk],
                None if text is None else text[chunk],
                projection,
                None if valid is None else valid[chunk],
                alpha[chunk] if alpha.numel() > 1 else alpha,
                coef[chunk],
                normalize,
                rows,
            )
            solve = here.teacher_projected if project_teacher else here.student_projected
            loss[chunk], hidden, grad = solve(scratch[: chunk.stop - start], None if dh is None else dh[chunk], dp is not None)
            if dp is not None and grad is not None:
                # A row that does not count has a gradient of 0, but may itself be NaN.
                hidden = hidden if here.valid is None else hidden.masked_fill(~here.valid[:, None], 0.0)
                add_weight_gradient(dp, grad, hidden, accumulate=start > 0)
        return_scratch(memory)
    if keep is not None:
        loss = spread(loss, keep, n_total, 0)
        dh = None if dh is None else spread(dh, keep, n_total, 0)
    return LayerResult(loss, dh, dp)


@dataclass(frozen=True, eq=False)
class _Pair:
    """One chunk of a pair of layers that a projection stands between.

    Both ways to solve it take scratch (C, W), the student's gradient (C, H_s) or None, and whether the projection trains. They
    return the loss (C,), what is projected, and the gradient (C, W) of the projected side, or None.
    """

    student: Tensor  # (C, H_s)
    audio: Tensor  # (C, H_t)
    text: Tensor | None
    projection: Tensor
    valid: Tensor | None
    alpha: Tensor
    coef: Tensor
    normalize: bool
    rows: Callable[..., Tensor]

    def teacher_projected(
        self, scratch: Tensor, student_grad: Tensor | None, trains: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden, dtype = self.audio, self.projection.dtype
        more: list[Tensor] = []
        if self.text is not None:
            summand, count = contrast_format(hidden.dtype, self.projection, scratch.dtype)
            hidden, *more = contrastive_summands(hidden, self.text, self.alpha, summand, count)
        gemm(hidden, self.projection, None, scratch, *more)
        grad = gradient_view(scratch, dtype) if trains else None
        loss = self._rows(self.student, scratch, None, student_grad, grad)
        return loss, hidden.to(dtype) if trains else hidden, grad

    def student_projected(
        self, scratch: Tensor, student_grad: Tensor | None, trains: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        gemm(self.student, self.projection, None, scratch)
        grad = gradient_view(scratch, self.projection.dtype) if trains or student_grad is not None else None
        loss = self._rows(scratch, self.audio, self.text, grad, None)
        if student_grad is not None and grad is not None:
            hidden_gradient(grad, self.projection, student_grad)
        return loss, self.student, grad

    def _rows(
        self, u: Tensor, v: Tensor, text: Tensor | None, grad_u: Tensor | None, grad_v: Tensor | None
    ) -> Tensor:
        shared = (self.valid, self.alpha, self.coef)
        return self.rows(u, v, text, *shared, normalize=self.normalize, grad_u=grad_u, grad_v=grad_v)


@library.custom_op("kdkernels::layer_mse", mutates_args=())
def layer_mse(
    student: Tensor,  # (N, H_s)
    audio: Tensor,  # (N, H_t)
    text: Tensor | None,
    projection: Tensor | None,
    valid: Tensor | None,  # (N,) bool
    alpha: Tensor,  # (1,) or (N,) float32
    coef: Tensor,  # (N,) float32: d loss / d squared error of the token
    project_teacher: bool,
    normalize: bool,
    reduced: bool,
    hidden_grad: bool,
    projection_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss: () if reduced else (N,); gradient of the student's states, times _gain; of the projection; each full or empty)."""
    check_values(None, alpha, 0, 0)
    gain = _gain(coef, student, projection, normalize)
    with torch.amp.autocast(student.device.type, enabled=False):
        out = layer_chunks(
            student,
            audio,
            text,
            projection,
            valid,
            alpha,
            coef if gain is None else coef * gain,
            project_teacher=project_teacher,
            normalize=normalize,
            hidden_grad=hidden_grad,
            projection_grad=projection_grad,
            rows=layer_rows_of(impl),
        )
    loss = torch.where(coef == 0, 0.0, coef * out.loss)
    dp = out.projection_grad
    if dp is not None and projection is not None:
        dp = finish_weight_gradient(dp if gain is None else dp / gain, _stored_dtype(projection))
    return (
        loss.sum() if reduced else loss,
        student.new_empty(0) if out.hidden_grad is None else out.hidden_grad,
        student.new_empty(0) if dp is None else dp,
    )


def _stored_dtype(projection: Tensor) -> torch.dtype:
    """Of a projection's gradient until it is scaled: many of its values would be among float16's subnormals."""
    return torch.float32 if projection.dtype == torch.float16 else projection.dtype


def _gain(coef: Tensor, student: Tensor, projection: Tensor | None, normalize: bool) -> Tensor | None:
    """The factor by which a float16 gradient is too large inside; see half_gain."""
    gain = half_gain(coef, coef, student.dtype, *([] if projection is None else [projection.dtype]))
    return None if gain is None else gain * (_GAIN_NORMALIZED if normalize else _GAIN_PLAIN)


_STUDENT, _PROJECTION, _COEF = 0, 3, 6
_TENSORS = 7
_NORMALIZE, _REDUCED, _HIDDEN_GRAD, _PROJECTION_GRAD = 8, 9, 10, 11


@layer_mse.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    student, coef = arguments[_STUDENT], arguments[_COEF]

    def gradient(of: int, wanted: int) -> Tensor:
        if not arguments[wanted]:
            return student.new_empty(0)
        dtype = _stored_dtype(arguments[of]) if of == _PROJECTION else student.dtype
        return torch.empty_like(arguments[of], dtype=dtype, memory_format=torch.contiguous_format)

    return (
        coef.new_empty(() if arguments[_REDUCED] else coef.shape),
        gradient(_STUDENT, _HIDDEN_GRAD),
        gradient(_PROJECTION, _PROJECTION_GRAD),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    without_gradients(ctx, output[1:])
    # The GEMM of the projection's gradient needs each token's own factor: an unreduced loss runs again in the backward.
    ctx.again = not inputs[_REDUCED] and not inputs[_HIDDEN_GRAD] and not inputs[_PROJECTION_GRAD]
    if ctx.again:
        ctx.save_for_backward(*[x.clone() if x.is_inference() else x for x in inputs[:_TENSORS] if x is not None])
        ctx.absent = [x is None for x in inputs[:_TENSORS]]
        ctx.options = inputs[_TENSORS:]
    else:
        gain = _gain(inputs[_COEF], inputs[_STUDENT], inputs[_PROJECTION], inputs[_NORMALIZE])
        ctx.save_for_backward(*output[1:], *([] if gain is None else [gain]))
    ctx.projection_dtype = None if inputs[_PROJECTION] is None else inputs[_PROJECTION].dtype


def _backward(ctx: Any, grad_loss: Tensor, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    needs = ctx.needs_input_grad[_STUDENT], ctx.needs_input_grad[_PROJECTION]
    factor: Tensor | None = grad_loss  # of what the gradients lack; None: nothing
    if ctx.again:
        saved = iter(ctx.saved_tensors)
        inputs: list[Any] = [None if absent else next(saved) for absent in ctx.absent]
        inputs[_COEF] = inputs[_COEF] * grad_loss
        project_teacher, normalize, *_, impl = ctx.options
        _, dh, dp = layer_mse(*inputs, project_teacher, normalize, True, *needs, impl)
        gain, factor = _gain(inputs[_COEF], inputs[_STUDENT], inputs[_PROJECTION], normalize), None
    else:
        dh, dp, gain = (*ctx.saved_tensors, None)[:3]
    grads: list[Tensor | None] = [None] * 13
    if needs[0]:
        of_hidden = factor if gain is None else (1.0 if factor is None else factor) / gain
        grads[_STUDENT] = dh if of_hidden is None else _scaled(dh, of_hidden)
    if needs[1]:
        scaled = dp if factor is None else _scaled(dp, factor)
        grads[_PROJECTION] = scaled.to(ctx.projection_dtype)
    return tuple(grads)


register_formulas(layer_mse, _setup, _backward)


def reference_layer_mse(
    student: Tensor,
    audio: Tensor,
    text: Tensor | None,
    projection: Tensor | None,
    valid: Tensor | None,
    alpha: Tensor,
    coef: Tensor,
    *,
    project_teacher: bool,
    normalize: bool,
) -> Tensor:
    """The loss per token (N,) by eager PyTorch in coef's dtype, gradients by autograd."""
    dtype = coef.dtype
    u, v = student.to(dtype), layer_rows.contrastive(audio, text, alpha).to(dtype)
    # A row that does not count may hold anything.
    valid = coef != 0 if valid is None else valid & (coef != 0)
    u, v = (torch.where(valid[:, None], x, torch.zeros_like(x)) for x in (u, v))
    if projection is not None:
        projection = savable(projection.to(dtype))
        with without_autocast(u.device):
            if project_teacher:
                v = v @ projection.T
            else:
                u = u @ projection.T
    loss = layer_rows.squared_errors(u, v, normalize=normalize)
    return torch.where(coef == 0, 0.0, coef * loss)
