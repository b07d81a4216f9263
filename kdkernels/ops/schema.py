"""The custom operators: one for each of the two hot paths, with fake and autograd, so that torch.compile can trace them.

Everything is computed in the forward; the backward only scales. Registered at import; torch is all that is needed for that.

Legend: B, T leading dimensions, N = B * T tokens, V_s / V_t vocabulary widths, H_s / H_t hidden widths.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import native
from .chunking import NO_LOGITS, choose_path
from .dispatch import checks_enabled, overlap_wanted, row_launcher
from .linear import LinearResult, linear_caad_chunks, summed_rows_for, survivors_launcher
from .rows import STAT_NAMES, LinearTensors, PlainTerms, RowProblem, RowResult, RowSpec

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
    round_contrast: bool = False

    def packed(self) -> tuple[list[int], torch.dtype, str]:
        """The operator's last arguments, see :meth:`RowSpec.packed`."""
        grads = (self.hidden_grad, self.weight_grad, self.bias_grad)
        flags = (self.reduced, *grads, self.want_stats, self.round_contrast)
        sizes = (self.chunk_tokens or 0, self.workspace_bytes or 0)
        return [*sizes, *map(int, flags)], self.logits_dtype, self.impl

    @classmethod
    def unpacked(cls, whole: Sequence[int], logits_dtype: torch.dtype, impl: str) -> LinearSettings:
        chunk_tokens, workspace_bytes, reduced, hidden_grad, weight_grad, bias_grad, want_stats, round_contrast = whole
        grads = (bool(hidden_grad), bool(weight_grad), bool(bias_grad))
        sizes = (chunk_tokens or None, workspace_bytes or None)
        return cls(*sizes, bool(reduced), *grads, bool(want_stats), logits_dtype, impl, bool(round_contrast))

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
        low, high = torch.aminmax(torch.where(target == ignore_index, 0, target))
        if int(low) < 0 or int(high) >= vocab:
            bad = (target != ignore_index) & ((target < 0) | (target >= vocab))
            raise ValueError(
                f"target: expected ids in [0, {vocab}) or ignore_index {ignore_index}, got {int(target[bad][0])} "
                f"at {int(bad.sum())} of {target.numel()} positions"
            )
    if checks_enabled(alpha.device) and (illegal := first_illegal(alpha)) is not None:
        raise ValueError(f"{source}alpha: expected finite values >= 0, got {illegal}")


def first_illegal(x: Tensor) -> float | None:
    """The first value that is negative or not finite; None: there is none. Waits for the device."""
    if not x.numel():
        return None
    least, most = (x, x) if x.numel() == 1 else torch.aminmax(x)
    if 0 <= float(least) <= float(most) < math.inf:  # NaN would be in both
        return None
    return float(x[~((x >= 0) & torch.isfinite(x))][0])


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


def refuse_transforms(*student: Tensor | None) -> None:
    """RuntimeError under forward_ad, and with a gradient inside a transform of torch.func. The operators have no forward mode:
    the result would be 0. A transform would fail with a message about the inside of this library."""
    if torch.compiler.is_compiling():
        return
    forward_mode = forward_ad._current_level >= 0
    if forward_mode and any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in student):
        raise RuntimeError("forward-mode derivatives (torch.func.jvp): only impl='reference' computes them")
    private: Any = torch._C
    if private._are_functorch_transforms_active() and torch.is_grad_enabled():
        raise RuntimeError(
            "transforms of torch.func (grad, vjp, jacrev, vmap): only impl='reference' supports them where a gradient is recorded"
        )


def _has_values(x: Tensor) -> bool:
    """Whether the numbers in ``x`` can be looked at: not while tracing, and not under vmap or is_grads_batched=True."""
    private: Any = torch._C
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    return not (private._are_functorch_transforms_active() or private._functorch.is_legacy_batchedtensor(x))


def _is_one(grad_output: Tensor) -> bool:
    """Whether scaling can be skipped. Asked only on the CPU and not while tracing: elsewhere it would wait for the device."""
    if grad_output.device.type != "cpu" or not _has_values(grad_output):
        return False
    if grad_output.numel() == 1:
        return float(grad_output) == 1
    return bool((grad_output == 1).all())


def _without_gain(grad_output: Tensor, gain: Tensor) -> Tensor:
    """``gain`` as the operators return it: half_gain, or empty for none."""
    return grad_output / gain if gain.numel() else grad_output


def _triton_scales(grad: Tensor) -> bool:
    """Whether the Triton kernel scales a gradient: one read and one write, and no float32 copy of a narrower one. Not while
    tracing: the compiler fuses what it sees there."""
    return grad.is_cuda and _has_values(grad) and grad.stride(-1) == 1 and importlib.util.find_spec("triton") is not None


def _scale_rows(grad: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
    """grad * factor in ``out``, which may be ``grad``; factor () or of grad's leading shape."""
    from .triton_caad import scale_rows

    rows = grad if grad.dim() == 3 else grad[None]
    scale_rows(rows, factor.reshape(-1), out=rows if out is grad else out.view(rows.shape))
    return out


def _scaled(grad: Tensor, grad_output: Tensor) -> Tensor:
    """grad * grad_output, () or of grad's leading shape, in float32, rounded to grad's dtype.

    In the memory of ``grad`` if no graph is kept: then nobody can ask for the saved tensor again. Else in a new tensor, even
    where the factor is 1: what a backward hands out its receiver may change (clipping, all_reduce of .grad).
    """
    if not _has_values(grad_output):
        return _widened(grad, grad_output)
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    return _scale_into(torch.empty_like(grad) if kept else grad, grad, grad_output)


def _scale_into(out: Tensor, grad: Tensor, grad_output: Tensor) -> Tensor:
    """``out``, which may be ``grad``, with what :func:`_scaled` says. No float32 copy of a narrower gradient is made."""
    if not grad.numel() or _is_one(grad_output):
        return grad if out is grad else out.copy_(grad)
    if grad.dim() in (2, 3) and _triton_scales(grad):
        return _scale_rows(grad, grad_output, out=out)
    # A factor without dimensions does not widen a narrower gradient.
    if grad_output.numel() == 1 or not any(grad_output.stride()):
        return torch.mul(grad, grad_output.flatten()[0], out=out)
    if grad.numel() <= _SCALED_AT_ONCE:
        return out.copy_(_widened(grad, grad_output))
    for into, part, factor in zip(*(_rows_of(x, grad.dim() - 1) for x in (out, grad, grad_output)), strict=True):
        torch.mul(part, factor, out=into)
    return out


def _widened(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor with a float32 copy of a narrower gradient."""
    factor = factor.to(torch.promote_types(grad.dtype, torch.float32))
    return (grad * factor.reshape(factor.shape + (1,) * (grad.dim() - factor.dim()))).to(grad.dtype)


_SCALED_AT_ONCE = 1 << 20  # numbers of a gradient that may be copied to float32


def _rows_of(x: Tensor, leading: int) -> Iterator[Tensor]:
    """``x`` at each index of its first ``leading`` dimensions."""
    for part in x.unbind(0):
        yield from _rows_of(part, leading - 1) if leading > 1 else (part,)


# -- logits in -----------------------------------------------------------------------------------------------------------


# The operators read the numbers of a RowSpec on the host, from a tensor on the CPU. A CUDA graph that the compiler captures would
# keep the numbers of the first call; so it leaves these operators out.
_tags_known = hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(library.custom_op).parameters
READS_ON_HOST: Any = {"tags": (torch.Tag.cudagraph_unsafe,)} if _tags_known else {}


@library.custom_op("kdkernels::caad_rows", mutates_args=(), **READS_ON_HOST)
def caad_rows(
    student: Tensor,  # (B, T, V_s)
    audio: Tensor,  # (B, T, V_t)
    text: Tensor | None,
    target: Tensor | None,  # (N,)
    alpha: Tensor,  # (1,) or (N,) float32
    kd_coef: Tensor,  # (N,) float32
    ce_coef: Tensor,
    whole: Sequence[int],  # RowSpec.packed()
    numbers: Tensor,
    divergence: str,
    want_grad: bool,
    want_stats: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss per token (N,), its gradient times half_gain (B, T, V_s), statistics (6, N), half_gain); each but the first may be
    empty."""
    spec = RowSpec.unpacked(whole, numbers, divergence)
    check_values(target, alpha, spec.vocab, spec.ignore_index)
    problem = RowProblem(student, audio, text, target, alpha, kd_coef, ce_coef, spec, None, want_stats)
    loss, grad, stats, gain = solve_new_rows(problem, want_grad, impl)
    return (
        loss,
        student.new_empty(0) if grad is None else grad,
        loss.new_empty(0) if stats is None else stats,
        loss.new_empty(0) if gain is None else gain,
    )


# (loss per token or its sum, gradient in new memory or None, statistics or None, half_gain), see solve_rows
_Solved = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def solve_new_rows(problem: RowProblem, want_grad: bool, impl: str, reduced: bool = False) -> _Solved:
    """See :func:`solve_rows`; ``problem`` has no gradient yet, and its values are checked."""
    student = problem.student
    grad = torch.empty(student.shape, dtype=student.dtype, device=student.device) if want_grad else None
    loss, stats, gain = solve_rows(problem._replace(grad=grad), impl)
    return loss.sum() if reduced else loss, grad, stats, gain


def solve_plain_rows(logits: Sequence[Tensor | None], terms: PlainTerms, want_grad: bool) -> _Solved:
    """The same in one call of the native library, from student, audio and text of a :class:`RowProblem`. No gradient of float16.

    Raises ValueError for a target outside [0, vocab).
    """
    student, audio, text = (x if x is None else _as_rows(x) for x in logits)
    assert student is not None and audio is not None
    grad = torch.empty(student.shape, dtype=student.dtype, device="cpu") if want_grad else None
    loss, bad = native.plain_rows(student, audio, text, terms, grad=grad)
    if bad:
        check_values(terms.target, torch.tensor([terms.alpha]), terms.spec.vocab, terms.spec.ignore_index)
    return loss.sum(), grad, None, None


def solve_rows(problem: RowProblem, impl: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(loss per token, statistics or None, half_gain, by which the gradient in ``problem.grad`` is too large)

    Somebody has called check_values before.
    """
    student, audio, text, target, alpha, kd_coef, ce_coef, spec, grad, want_stats = problem
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
    loss = result.loss if gain is None else None
    loss = weighted(result.kd, result.ce, kd_coef, ce_coef) if loss is None else loss
    return loss, all_stats(result) if want_stats else None, gain


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


_FORMULAS: dict[Any, tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]] = {}  # of each operator


def register_formulas(
    op: library.CustomOpDef, setup: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> None:
    """The autograd of an operator: for torch's dispatcher, and for :func:`differentiable`, which leaves that out."""
    op.register_autograd(backward, setup_context=setup)
    _FORMULAS[op] = setup, backward


register_formulas(caad_rows, _rows_setup, _rows_backward)


def runs_directly(*inputs: Any) -> bool:
    """Whether a call may leave out torch's dispatcher, whose way to a custom operator takes longer than the loss of few tokens.

    Not where anybody has to see the operator: the compiler, a tracer, a transform of torch.func, a dispatch mode (fake tensors,
    a counter of operations), a profiler, or a subclass of Tensor.
    """
    private: Any = torch._C
    if torch.compiler.is_compiling() or private._len_torch_dispatch_stack() or private._are_functorch_transforms_active():
        return False
    if torch.jit.is_tracing() or private._autograd._profiler_enabled():
        return False
    for x in inputs:
        if isinstance(x, list) and not runs_directly(*x):
            return False
        if isinstance(x, Tensor) and type(x) not in _PLAIN:
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)


def differentiable(operator: Any, *inputs: Any) -> Any:
    """``operator(*inputs)``. An eager call with a gradient does not use the autograd of torch's custom operators.

    That fills in default arguments in each call, and its time grows with the square of their number (caad_rows has 13).
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _call(operator, *inputs)
    return _Eager.apply(*inputs, operator)


def _call(operator: Any, *inputs: Any) -> Any:
    # Where torch does not keep the function under this private name, its dispatcher finds it.
    function = getattr(operator, "_init_fn", operator) if runs_directly(*inputs) else operator
    return function(*inputs)


class _Eager(torch.autograd.Function):
    """An operator with its formulas in _FORMULAS."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        *inputs, operator = given
        output = _call(operator, *inputs)
        setup, ctx.formula = _FORMULAS[operator]
        setup(ctx, tuple(inputs), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return *ctx.formula(ctx, *grads), None


class DirectRows(torch.autograd.Function):
    """See :func:`direct_rows`. Few arguments: autograd looks at each one in Python."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, solve: Callable[[bool], _Solved]) -> tuple[Tensor, Tensor | None]:
        loss, grad, stats, ctx.gain = solve(True)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad)
        ctx.shape = student.shape
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _stats: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (grad,) = ctx.saved_tensors
        factor = grad_loss if ctx.gain is None else grad_loss / ctx.gain
        factor = factor.reshape(grad.shape[:2]) if factor.dim() else factor
        return _scaled(grad, factor).view(ctx.shape), None


def direct_rows(student: Tensor, solve: Callable[[bool], _Solved]) -> tuple[Tensor, Tensor | None]:
    """(loss per token (N,) or its sum, statistics or None) where :func:`runs_directly` says so.

    ``solve`` gets whether a gradient is wanted, and uses ``student`` as (B, T, V) and without a history.
    """
    if student.requires_grad and torch.is_grad_enabled():
        return DirectRows.apply(student, solve)
    loss, _, stats, _ = solve(False)
    return loss, stats


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
        ctx.version = memory._version
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
        if grad._version != ctx.version:
            raise _used_later()
        grad_loss = grad_loss if ctx.gain is None else grad_loss / ctx.gain
        return _scale_into(grad, grad, grad_loss.reshape(grad.shape[:2])), *[None] * 9


def _used_later() -> RuntimeError:
    return RuntimeError(
        "inplace=True: expected no use of student_logits after the loss, which has overwritten them (modified by an inplace "
        "operation), got one; use them before, or pass inplace=False"
    )


class _Consumed(torch.autograd.Function):
    """Logits that InPlaceRows overwrites. Every later use of them has this as its history, so that a backward finds it.

    A version number cannot do that. It tells only that a tensor changed after an operation had saved it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, memory: Tensor | None) -> Tensor:
        """``memory``: what the gradient of the loss will lie in; None: no gradient comes through here."""
        ctx.mark_dirty(logits)
        ctx.memory = memory
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The gradient of another use has been added to that of the loss: then the sum lies elsewhere.
        if ctx.memory is None or grad.data_ptr() != ctx.memory.data_ptr():
            raise _used_later()
        return grad, None


def can_be_consumed(logits: Tensor) -> bool:
    """Whether autograd lets an operation overwrite these logits: not a leaf, and not a view such as torch.chunk returns."""
    if logits.is_leaf:
        return False
    if not logits._is_view():
        return True
    private: Any = torch._C._autograd
    return not logits.retains_grad and private._get_creation_meta(logits) == private.CreationMeta.DEFAULT


def consume_rows(
    logits: Tensor, as_rows: Callable[[Tensor], Tensor], *others: Any
) -> tuple[Tensor, Tensor]:
    """InPlaceRows of the logits, which ``as_rows`` views as (B, T, V)."""
    if logits._is_view():
        # Autograd would copy a gradient that comes through a change of a part of something larger. So none comes.
        loss, stats = InPlaceRows.apply(as_rows(logits), *others)
        _Consumed.apply(logits, None)
        if loss.grad_fn is not None:
            loss.grad_fn.version = logits._version
        return loss, stats
    logits = _Consumed.apply(logits, logits.detach())
    return InPlaceRows.apply(as_rows(logits), *others)


# -- hidden states in ----------------------------------------------------------------------------------------------------


@library.custom_op("kdkernels::linear_caad", mutates_args=(), **READS_ON_HOST)
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
    spec_numbers: Tensor,
    divergence: str,
    wanted_whole: Sequence[int],  # LinearSettings.packed()
    logits_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss: () if reduced else (N,); gradients of hidden, weight and bias, each full or empty; statistics (6, N) or empty; by
    what the three gradients are too large, (3,) or empty)."""
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
            beside = overlap_wanted(student_hidden.device)
            sums = None
            if wanted.any_grad:
                sums = summed_rows_for(impl, heads, target, spec, logits_dtype, wanted.want_stats, 1 + beside)
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
                round_contrast=wanted.round_contrast,
                sums=sums,
                beside=beside,
                **wanted.chunks,
            )
    return linear_results(out, student, kd_coef, ce_coef, wanted.reduced)


def linear_results(
    out: LinearResult,
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden states, weight, bias
    kd_coef: Tensor,
    ce_coef: Tensor,
    reduced: bool,
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
        loss.new_empty(0) if out.gains is None else out.gains,
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
        kd_coef.new_empty(3 if has_gain else 0),
    )


@linear_caad.register_fake
def fake_linear_caad(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kd_coef = arguments[_LINEAR_TENSORS - 2]
    return fake_linear_results(arguments[:3], kd_coef, LinearSettings.unpacked(*arguments[-3:]), _N_STATS)


def register_linear_autograd(op: library.CustomOpDef, *, tensors: int) -> None:
    """Autograd of an operator over LM heads, whose first three inputs are the student's hidden states, weight and bias, and whose
    first ``tensors`` (lists of tensors among them) end with kd_coef and ce_coef. Then come RowSpec.packed() or packed_specs, what
    else the operator takes, and LinearSettings.packed(). It returns what linear_caad does."""

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
            ctx.spec_whole, numbers, *ctx.others = inputs[tensors:-3]
            given = [x for x in (*flat, numbers) if x is not None]
            ctx.save_for_backward(*[x.clone() if x.is_inference() else x for x in given])
            ctx.absent, ctx.wanted = [x is None for x in flat], wanted
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
            _, *grads, _, gains = op(*inputs, ctx.spec_whole, next(saved), *ctx.others, *wanted.packed())
            if gains.numel():
                factors = (1.0 / gains).unbind(0)
                grads = [_scaled(g, f) if need else None for g, f, need in zip(grads, factors, needs, strict=True)]
        else:
            *grads, gains = ctx.saved_tensors
            factors = [grad_loss / gain for gain in gains.unbind(0)] if gains.numel() else [grad_loss] * 3
            grads = [_scaled(g, f) if need else None for g, f, need in zip(grads, factors, needs, strict=True)]
        # Autograd wants a list of tensors answered by a list.
        nothing = [[None] * size if size else None for size in ctx.structure]
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing[3:])

    register_formulas(op, setup, backward)


def _is_tensor_list(x: object) -> bool:
    return isinstance(x, list) and all(isinstance(item, Tensor) for item in x)


register_linear_autograd(linear_caad, tensors=_LINEAR_TENSORS)
