"""The custom operators: one for each of the two hot paths, with fake and autograd, so that torch.compile can trace them.

Everything is computed in the forward; the backward only scales. Registered at import; torch is all that is needed for that.

Legend: B, T leading dimensions, N = B * T tokens, V_s / V_t vocabulary widths, H_s / H_t hidden widths.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._pytree import tree_flatten, tree_unflatten

from .chunking import NO_LOGITS, choose_path
from .dispatch import checks_enabled, row_launcher
from .linear import LinearResult, linear_caad_chunks, survivors_launcher
from .rows import STAT_NAMES, LinearTensors, RowProblem, RowResult, RowSpec

_N_STATS = 2 + len(STAT_NAMES)  # kd, ce, then STAT_NAMES
_LINEAR_TENSORS = len(LinearTensors._fields) + 4  # and target, alpha, kd_coef, ce_coef

@dataclass(frozen=True)
class LinearSettings:
    """What an operator over LM heads is asked for."""

    chunk_tokens: int | None
    workspace_bytes: int | None
    reduced: bool
    hidden_grad: bool
    weight_grad: bool
    bias_grad: bool
    want_stats: bool
    logits_dtype: torch.dtype
    impl: str

    def packed(self) -> tuple[list[int], torch.dtype, str]:
        """The operator's last arguments, see :meth:`RowSpec.packed`."""
        flags = (self.reduced, self.hidden_grad, self.weight_grad, self.bias_grad, self.want_stats)
        sizes = (self.chunk_tokens or 0, self.workspace_bytes or 0)
        return [*sizes, *map(int, flags)], self.logits_dtype, self.impl

    @classmethod
    def unpacked(cls, whole: Sequence[int], logits_dtype: torch.dtype, impl: str) -> LinearSettings:
        chunk_tokens, workspace_bytes, reduced, hidden_grad, weight_grad, bias_grad, want_stats = whole
        grads = (bool(hidden_grad), bool(weight_grad), bool(bias_grad))
        sizes = (chunk_tokens or None, workspace_bytes or None)
        return cls(*sizes, bool(reduced), *grads, bool(want_stats), logits_dtype, impl)

    @property
    def any_grad(self) -> bool:
        return self.hidden_grad or self.weight_grad or self.bias_grad

    @property
    def chunks(self) -> dict[str, Any]:
        """Keywords of the chunk loops."""
        names = ("logits_dtype", "chunk_tokens", "workspace_bytes", "hidden_grad", "weight_grad", "bias_grad", "want_stats")
        return {name: getattr(self, name) for name in names}


def check_values(target: Tensor | None, alpha: Tensor, vocab: int, ignore_index: int, *, source: str = "") -> None:
    """ValueError for a target outside [0, vocab) or a negative or non-finite alpha, where looking costs no device sync.

    ``source``: what precedes alpha's name where there are several.
    """
    if target is not None and checks_enabled(target.device) and target.numel():
        bad = (target != ignore_index) & ((target < 0) | (target >= vocab))
        if bool(bad.any()):
            raise ValueError(
                f"target: expected ids in [0, {vocab}) or ignore_index {ignore_index}, got {int(target[bad][0])} "
                f"at {int(bad.sum())} of {target.numel()} positions"
            )
    if checks_enabled(alpha.device) and alpha.numel():
        bad = ~((alpha >= 0) & torch.isfinite(alpha))
        if bool(bad.any()):
            raise ValueError(f"{source}alpha: expected finite values >= 0, got {float(alpha[bad][0])}")


def weighted(kd: Tensor, ce: Tensor, kd_coef: Tensor, ce_coef: Tensor) -> Tensor:
    """kd_coef kd + ce_coef ce per token; a coefficient of 0 silences its term even where that is infinite."""
    return torch.where(kd_coef == 0, 0.0, kd_coef * kd) + torch.where(ce_coef == 0, 0.0, ce_coef * ce)


def all_stats(result: RowResult) -> Tensor:
    assert result.stats is not None
    return torch.cat([torch.stack([result.kd, result.ce]), result.stats])  # (_N_STATS, N)


def half_gain(kd_coef: Tensor, ce_coef: Tensor, *dtypes: torch.dtype) -> Tensor | None:
    """The power of two by which a float16 gradient is stored too large, and which the backward takes out again; else None.

    Without it the gradient of a mean over thousands of tokens would be among float16's subnormals. A gradient scaler acts in the
    backward, which is too late.
    """
    if torch.float16 not in dtypes:
        return None
    largest = torch.cat([kd_coef.abs() + ce_coef.abs(), kd_coef.new_zeros(1)]).amax()
    return torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent)


def refuse_second_derivative() -> None:
    """For a backward: RuntimeError under create_graph=True, the only time that autograd records it. The forward has computed the
    gradient, and nothing that is recorded leads to it: a second derivative would silently be 0."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: the fused losses have no second derivatives; impl='reference' computes them by autograd"
        )


def _is_one(grad_output: Tensor) -> bool:
    """Whether scaling can be skipped. Asked only on the CPU and not while tracing: elsewhere it would wait for the device."""
    plain = type(grad_output) is Tensor and grad_output.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and bool((grad_output == 1).all())


def _without_gain(grad_output: Tensor, gain: Tensor) -> Tensor:
    """``gain`` as the operators return it: half_gain, or empty for none."""
    return grad_output / gain if gain.numel() else grad_output


def _triton_scales(grad: Tensor) -> bool:
    """Whether the Triton kernel scales a gradient: one read and one write, and no float32 copy of a narrower one. Not while
    tracing:
    the compiler fuses what it sees there."""
    plain = type(grad) is Tensor and grad.is_cuda and not torch.compiler.is_compiling()
    return plain and grad.stride(-1) == 1 and importlib.util.find_spec("triton") is not None


def _scale_rows(grad: Tensor, factor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """grad * factor, factor () or of grad's leading shape."""
    from .triton_caad import scale_rows

    rows = grad if grad.dim() == 3 else grad[None]
    return scale_rows(rows, factor.reshape(-1), out=rows if out is grad else out).view(grad.shape)


def _scaled(grad: Tensor, grad_output: Tensor) -> Tensor:
    """A new tensor: the saved one may be wanted again (retain_graph). On the CPU the saved one where the factor is 1."""
    if _is_one(grad_output):
        return grad
    if grad.dim() in (2, 3) and _triton_scales(grad):
        return _scale_rows(grad, grad_output)
    factor = grad_output.to(torch.promote_types(grad.dtype, torch.float32))
    return (grad * factor.reshape(factor.shape + (1,) * (grad.dim() - factor.dim()))).to(grad.dtype)


# -- logits in -----------------------------------------------------------------------------------------------------------


@library.custom_op("kdkernels::caad_rows", mutates_args=())
def caad_rows(
    student: Tensor,  # (B, T, V_s)
    audio: Tensor,  # (B, T, V_t)
    text: Tensor | None,
    target: Tensor | None,  # (N,)
    alpha: Tensor,  # (1,) or (N,) float32
    kd_coef: Tensor,  # (N,) float32
    ce_coef: Tensor,
    whole: Sequence[int],  # RowSpec.packed()
    numbers: Sequence[float],
    divergence: str,
    want_grad: bool,
    want_stats: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss per token (N,), its gradient times half_gain (B, T, V_s), statistics (6, N), half_gain); each but the first may be
    empty."""
    spec = RowSpec.unpacked(whole, numbers, divergence)
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device) if want_grad else None
    problem = RowProblem(student, audio, text, target, alpha, kd_coef, ce_coef, spec, grad, want_stats)
    loss, stats, gain = solve_rows(problem, impl)
    return (
        loss,
        student.new_empty(0) if grad is None else grad,
        loss.new_empty(0) if stats is None else stats,
        loss.new_empty(0) if gain is None else gain,
    )


def solve_rows(problem: RowProblem, impl: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss per token, statistics or None, half_gain, by which the gradient in ``problem.grad`` is too large)"""
    student, audio, text, target, alpha, kd_coef, ce_coef, spec, grad, want_stats = problem
    check_values(target, alpha, spec.vocab, spec.ignore_index)
    gain = None if grad is None else half_gain(kd_coef, ce_coef, grad.dtype)
    result = row_launcher(impl)(
        _as_rows(student),
        _as_rows(audio),
        None if text is None else _as_rows(text),
        target,
        alpha,
        kd_coef if gain is None else kd_coef * gain,
        ce_coef if gain is None else ce_coef * gain,
        spec,
        grad=grad,
        want_stats=want_stats,
    )
    return weighted(result.kd, result.ce, kd_coef, ce_coef), all_stats(result) if want_stats else None, gain


def _as_rows(logits: Tensor) -> Tensor:
    """(B, T, V) with last stride 1, as the kernels want it: the input itself where its strides allow, else a copy."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@caad_rows.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, kd_coef, _, _, _, _, want_grad, want_stats, _ = others
    rows = student.shape[0] * student.shape[1]
    return (
        kd_coef.new_empty(rows),
        torch.empty(student.shape, dtype=student.dtype, device=student.device) if want_grad else student.new_empty(0),
        kd_coef.new_empty((_N_STATS, rows)) if want_stats else kd_coef.new_empty(0),
        kd_coef.new_empty(() if want_grad and student.dtype == torch.float16 else 0),
    )


def without_gradients(ctx: Any, outputs: Sequence[Tensor]) -> None:
    """``outputs`` are not differentiated. By default autograd would still pass a tensor of zeros for each to the backward, as
    large
    as a gradient of logits or of an LM head."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    without_gradients(ctx, output[1:])
    ctx.save_for_backward(output[1], output[3])
    ctx.leading, ctx.inputs = inputs[0].shape[:2], len(inputs)


def _rows_backward(ctx: Any, grad_loss: Tensor, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    grad, gain = ctx.saved_tensors
    factor = _without_gain(grad_loss, gain).reshape(ctx.leading)
    return _scaled(grad, factor), *[None] * (ctx.inputs - 1)


caad_rows.register_autograd(_rows_backward, setup_context=_rows_setup)


class InPlaceRows(torch.autograd.Function):
    """The same with the gradient written over the student's logits; eager only. The backward consumes that memory."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """The arguments of RowProblem up to spec; want_stats, impl"""
        *tensors, spec, want_stats, impl = others
        memory = student.detach()
        problem = RowProblem._make((memory, *tensors, spec, memory, want_stats))
        loss, stats, ctx.gain = solve_rows(problem, impl)
        # An operation that saved these logits for its backward has to learn that they are gone.
        torch.autograd.graph.increment_version(student)
        ctx.grad = memory
        stats = loss.new_empty(0) if stats is None else stats
        without_gradients(ctx, (stats,))
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _stats: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError(
                "inplace=True: the gradient was consumed by the first backward; a second one needs inplace=False"
            )
        grad_loss = grad_loss if ctx.gain is None else grad_loss / ctx.gain
        if _triton_scales(grad):
            _scale_rows(grad, grad_loss, out=grad)
        elif not _is_one(grad_loss):
            grad.mul_(grad_loss.reshape(*grad.shape[:2], 1))
        return grad, *[None] * 9


# -- hidden states in ----------------------------------------------------------------------------------------------------


@library.custom_op("kdkernels::linear_caad", mutates_args=())
def linear_caad(
    student_hidden: Tensor,  # (N, H_s)
    student_weight: Tensor,  # (V_s, H_s)
    student_bias: Tensor | None,
    audio_hidden: Tensor,  # (N, H_t)
    text_hidden: Tensor | None,
    teacher_weight: Tensor,  # (V_t, H_t)
    teacher_bias: Tensor | None,
    target: Tensor | None,
    alpha: Tensor,
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec_whole: Sequence[int],  # RowSpec.packed()
    spec_numbers: Sequence[float],
    divergence: str,
    wanted_whole: Sequence[int],  # LinearSettings.packed()
    logits_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss: () if reduced else (N,); gradients of hidden (times half_gain), weight and bias, each full or empty; statistics
    (6, N) or empty; half_gain or empty)."""
    student = (student_hidden, student_weight, student_bias)
    heads = LinearTensors(*student, audio_hidden, text_hidden, teacher_weight, teacher_bias)
    spec = RowSpec.unpacked(spec_whole, spec_numbers, divergence)
    wanted = LinearSettings.unpacked(wanted_whole, logits_dtype, impl)
    check_values(target, alpha, spec.vocab, spec.ignore_index)
    gain = None
    if wanted.any_grad:
        gain = half_gain(kd_coef, ce_coef, student_hidden.dtype, student_weight.dtype, logits_dtype)
    path, _ = choose_path(
        impl=impl,
        gradient=wanted.any_grad,
        divergence=divergence,
        want_stats=wanted.want_stats,
        chunk_tokens=wanted.chunk_tokens,
    )
    with torch.amp.autocast(student_hidden.device.type, enabled=False):
        if path == NO_LOGITS:
            from .triton_no_logits import linear_caad_no_logits

            rows = linear_caad_no_logits(*heads, target, alpha, spec, workspace_bytes=wanted.workspace_bytes)
            out = LinearResult(rows, None, None, None)
        else:
            out = linear_caad_chunks(
                heads,
                target,
                alpha,
                kd_coef,
                ce_coef,
                spec,
                rows=row_launcher(impl),
                survivors=survivors_launcher(impl),
                gain=gain,
                **wanted.chunks,
            )
    return linear_results(out, student, kd_coef, ce_coef, wanted.reduced, gain)


def linear_results(
    out: LinearResult,
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden states, weight, bias
    kd_coef: Tensor,
    ce_coef: Tensor,
    reduced: bool,
    gain: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What an operator over LM heads returns, empty where there is nothing."""
    hidden, weight, _ = student
    loss = weighted(out.rows.kd, out.rows.ce, kd_coef, ce_coef)
    return (
        loss.sum() if reduced else loss,
        hidden.new_empty(0) if out.hidden_grad is None else out.hidden_grad,
        weight.new_empty(0) if out.weight_grad is None else out.weight_grad,
        weight.new_empty(0) if out.bias_grad is None else out.bias_grad,
        loss.new_empty(0) if out.rows.stats is None else all_stats(out.rows),
        loss.new_empty(0) if gain is None else gain,
    )


def fake_linear_results(
    student: tuple[Tensor, Tensor, Tensor | None], kd_coef: Tensor, wanted: LinearSettings, n_stats: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The shapes of linear_results."""
    hidden, weight, bias = student
    n = hidden.shape[0]
    has_gain = torch.float16 in (hidden.dtype, weight.dtype, wanted.logits_dtype) and wanted.any_grad

    def gradient(x: Tensor | None, made: bool, like: Tensor) -> Tensor:
        made_of = x if made else None
        return like.new_empty(0) if made_of is None else torch.empty_like(made_of, memory_format=torch.contiguous_format)

    return (
        kd_coef.new_empty(() if wanted.reduced else (n,)),
        gradient(hidden, wanted.hidden_grad, hidden),
        gradient(weight, wanted.weight_grad, weight),
        gradient(bias, wanted.bias_grad, weight),
        kd_coef.new_empty((n_stats, n)) if wanted.want_stats else kd_coef.new_empty(0),
        kd_coef.new_empty(() if has_gain else 0),
    )


@linear_caad.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kd_coef = arguments[_LINEAR_TENSORS - 2]
    return fake_linear_results(arguments[:3], kd_coef, LinearSettings.unpacked(*arguments[-3:]), _N_STATS)


def register_linear_autograd(op: library.CustomOpDef, *, tensors: int) -> None:
    """Autograd of an operator over LM heads, whose first three inputs are the student's hidden states, weight and bias, and whose
    first ``tensors`` (lists of tensors among them) end with kd_coef and ce_coef. Its last three are LinearSettings; it returns
    what linear_caad does."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        without_gradients(ctx, output[1:])
        wanted = LinearSettings.unpacked(*inputs[-3:])
        ctx.structure = [_is_tensor_list(x) and len(x) for x in inputs]
        # The GEMM of dW needs each token's own factor. So an unreduced loss with a training head runs again, with the factors in
        # its coefficients. (The front end asked for no gradients in that forward.)
        ctx.again = not wanted.reduced and not wanted.any_grad
        if ctx.again:
            flat, ctx.tree = tree_flatten(list(inputs[:tensors]))
            # A teacher run under inference_mode gives tensors that autograd refuses to save.
            ctx.save_for_backward(*[x.clone() if x.is_inference() else x for x in flat if x is not None])
            ctx.absent = [x is None for x in flat]
            ctx.spec, ctx.wanted = inputs[tensors:-3], wanted
        else:
            ctx.save_for_backward(*output[1:4], output[5])

    def backward(ctx: Any, grad_loss: Tensor, *_others: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative()
        needs = ctx.needs_input_grad[:3]
        if ctx.again:
            saved = iter(ctx.saved_tensors)
            inputs = tree_unflatten([None if absent else next(saved) for absent in ctx.absent], ctx.tree)
            inputs[-2:] = [x * grad_loss for x in inputs[-2:]]
            hidden_grad, weight_grad, bias_grad = needs
            wanted = replace(
                ctx.wanted,
                reduced=True,
                hidden_grad=hidden_grad,
                weight_grad=weight_grad,
                bias_grad=bias_grad,
                want_stats=False,
            )
            _, *grads, _, gain = op(*inputs, *ctx.spec, *wanted.packed())
            if gain.numel() and needs[0]:
                grads[0] = _scaled(grads[0], 1.0 / gain)
        else:
            *grads, gain = ctx.saved_tensors
            factors = (_without_gain(grad_loss, gain), grad_loss, grad_loss)
            grads = [_scaled(g, f) if need else None for g, f, need in zip(grads, factors, needs, strict=True)]
        # Autograd wants a list of tensors answered by a list.
        nothing = [[None] * size if size else None for size in ctx.structure]
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing[3:])

    op.register_autograd(backward, setup_context=setup)


def _is_tensor_list(x: object) -> bool:
    return isinstance(x, list) and all(isinstance(item, Tensor) for item in x)


register_linear_autograd(linear_caad, tensors=_LINEAR_TENSORS)
