"""What the Triton kernels share: device functions over one row of logits, and the host side's small helpers.

Masked logits. A logit below -1e30, -inf above all, is masked: the finite _MASKED replaces it right after its load.
Running maxima start at _FLOOR > _MASKED, so e^(_MASKED - max) is 0 also in a row where everything is masked, and no
inf - inf or 0 * inf arises. NaN compares false and passes through all of it.

Device functions are inlined: a kernel gets the same instructions as if their text stood in it. But ptxas also counts the line
info of inlined functions when it gives out registers. As functions, the steps of the row kernel's first pass need 94 registers
instead of 80 on sm_80, and its pass for the plausibility mask 116 instead of 105 on sm_90. So these passes stand as plain code
in each kernel.

Legend: G groups of E logits, each group with running maxima and sums of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .rows import DIVERGENCES

_MASKED = tl.constexpr(-2e30)
_FLOOR = tl.constexpr(-1e30)
_LOG2E = tl.constexpr(math.log2(math.e))
_FORWARD = tl.constexpr(DIVERGENCES.index("forward_kl"))
_REVERSE = tl.constexpr(DIVERGENCES.index("reverse_kl"))
_JSD = tl.constexpr(DIVERGENCES.index("jsd"))


@triton.jit
def _columns(GROUPS: tl.constexpr, GROUP: tl.constexpr, CONTIGUOUS: tl.constexpr):
    """Columns of a block's logits relative to its first, (G, E); CONTIGUOUS: those of a thread are neighbours."""
    if CONTIGUOUS:
        return tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    else:
        return tl.arange(0, GROUPS)[:, None] + tl.arange(0, GROUP)[None, :] * GROUPS


@triton.jit
def _rates(inverse_temperature, TEMPERATURE: tl.constexpr):
    """log2(e) / tau and 1 / tau. TEMPERATURE is 1, 2, or 0 for any other."""
    inverse_tau = inverse_temperature
    if TEMPERATURE == 1:
        inverse_tau = 1.0
    elif TEMPERATURE == 2:
        inverse_tau = 0.5
    return inverse_tau * _LOG2E, inverse_tau


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0, to fp32 relative accuracy also near 0."""
    series = 1.0 + x * (1.0 / 7.0)
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = x * (1.0 + x * 0.5 * series)
    return tl.where(x > -0.3, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    """log(1 + x) for -1 < x <= 0: the rounding of 1 + x is divided out again."""
    rounded = 1.0 + x
    exact = rounded == 1.0
    return tl.where(exact, x, tl.log(rounded) * (x / tl.where(exact, 1.0, rounded - 1.0)))


@triton.jit
def _logit_with_slope(value, inside, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits (masked, or not inside: _MASKED) and d logit / d value from fp32 values, -inf where not inside."""
    value *= SCALE
    slope = SCALE
    if SOFTCAP is not None:
        x = value * (1.0 / SOFTCAP)
        twice = -2.0 * tl.abs(x)
        decay = tl.exp(twice)
        minus = _expm1(twice)
        tanh = -minus / (2.0 + minus)
        value = tl.where(inside, tl.where(x < 0, -SOFTCAP, SOFTCAP) * tanh, _MASKED)
        slope = SCALE * (4.0 * decay / ((1.0 + decay) * (1.0 + decay)))  # 1 - tanh^2 without its cancellation
    return tl.where(value < _FLOOR, _MASKED, value), slope


@triton.jit
def _read_with_slope(row_ptr, columns, inside, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, readable=None):
    """``readable``: see :func:`_readable`; None where only ``inside`` may be loaded."""
    if readable is None:
        value = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        value = tl.load(row_ptr + columns, mask=columns < readable, other=float("-inf")).to(tl.float32)
        value = tl.where(inside, value, float("-inf"))
    return _logit_with_slope(value, inside, SCALE, SOFTCAP)


@triton.jit
def _read(row_ptr, columns, inside, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, readable=None):
    return _read_with_slope(row_ptr, columns, inside, SCALE, SOFTCAP, readable)[0]


@triton.jit
def _legal_alpha(alpha):
    """kdkernels.ops.rows.legal_alpha"""
    return tl.where((alpha >= 0.0) & (alpha < float("inf")), alpha, float("nan"))


@triton.jit
def _contrast(audio, text, alpha):
    """z_hat"""
    z = audio + alpha * (audio - text)  # not (1 + alpha) audio - alpha text: a constant in both cancels first
    z = tl.where((audio == _MASKED) | (text == _MASKED) | (z < _FLOOR), _MASKED, z)
    return tl.where(alpha == 0.0, audio, z)


@triton.jit
def _read_teacher(
    audio_ptr,
    text_ptr,
    columns,
    inside,
    text_vocab,
    alpha,
    threshold,
    HAS_TEXT: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    readable=None,
    text_readable=None,
):
    """z_audio, z_text and z_hat."""
    audio = _read(audio_ptr, columns, inside, SCALE, SOFTCAP, readable)
    text = audio
    z = audio
    if HAS_TEXT:
        text = _read(text_ptr, columns, columns < text_vocab, SCALE, SOFTCAP, text_readable)
        z = _contrast(audio, text, alpha)
    if HAS_THRESHOLD:
        z = tl.where(audio < threshold, _MASKED, z)
    return audio, text, z


@triton.jit
def _read_pair(
    student_ptr,
    audio_ptr,
    text_ptr,
    columns,
    inside,
    text_vocab,
    alpha,
    threshold,
    WITH_TEACHER: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    readable=None,
    text_readable=None,
):
    """s, d s / d stored value, and z_hat (s itself without a teacher)."""
    s, slope = _read_with_slope(student_ptr, columns, inside, STUDENT_SCALE, STUDENT_SOFTCAP, readable)
    z = s
    if WITH_TEACHER:
        z = _read_teacher(
            audio_ptr,
            text_ptr,
            columns,
            inside,
            text_vocab,
            alpha,
            threshold,
            HAS_TEXT,
            HAS_THRESHOLD,
            TEACHER_SCALE,
            TEACHER_SOFTCAP,
            readable,
            text_readable,
        )[2]
    return s, slope, z


@triton.jit
def _advance(maximum, values, rate):
    """One block of an online softmax: new maxima (G,), factors of the older sums (G,), values - maxima, their e^."""
    new_maximum = tl.maximum(maximum, tl.max(values, axis=1))
    keep = tl.exp2((maximum - new_maximum) * rate)
    shifted = values - new_maximum[:, None]  # (G, E)
    return new_maximum, keep, shifted, tl.exp2(shifted * rate)


@triton.jit
def _advance_moment(moment, x_sum, x_old, x_max, x_keep, x_exp, x_shifted):
    """One more block of sum e^(x - max x) (x - max x)."""
    return x_keep * (moment + x_sum * (x_old - x_max)) + tl.sum(x_exp * x_shifted, axis=1)


@triton.jit
def _merge_weight(maximum, rate):
    """Maximum of the row and the factor that carries each group's sums to it."""
    row_maximum = tl.max(maximum, axis=0)
    return row_maximum, tl.exp2((maximum - row_maximum) * rate)


@triton.jit
def _merge_cross(cross, weight_sum, x_maximum, y_maximum, x_row, y_row, x_weight):
    """sum e^(x - max x) ((x - max x) - (y - max y)) of the row from the groups' own."""
    return tl.sum(x_weight * (cross + weight_sum * ((x_maximum - x_row) - (y_maximum - y_row))), axis=0)


@triton.jit
def _merge_moment(moment, x_sum, x_maximum, x_row, x_weight):
    """sum e^(x - max x) (x - max x) of the row from the groups' own."""
    return tl.sum(x_weight * (moment + x_sum * (x_maximum - x_row)), axis=0)


@triton.jit
def _first(maximum, index, row_maximum):
    """Lowest column that holds the row's maximum."""
    return tl.min(tl.where(maximum == row_maximum, index, 2147483647), axis=0)


@triton.jit
def _latest_argmax(values, columns, old_maximum, old_index):
    """Column of the running maximum when blocks descend: of equal ones the lowest column wins."""
    top = tl.max(values, axis=1)  # (G,)
    index = tl.min(tl.where(values == top[:, None], columns, 2147483647), axis=1)
    return tl.where(top >= old_maximum, index, old_index)


@triton.jit
def _reciprocal(x):
    return tl.where(x == 0.0, 0.0, 1.0 / tl.where(x == 0.0, 1.0, x))


@triton.jit
def _kl(cross, x_sum, hole, x_max, y_max, x_row, y_row, x_weight, inverse_x, log_sums, inverse_tau, rate):
    """KL(x || y) of the row from the groups' sums, and whether it is infinite; log_sums: log of sum e^y / sum e^x."""
    mean = _merge_cross(cross, x_sum, x_max, y_max, x_row, y_row, x_weight) * inverse_x
    return mean * inverse_tau + log_sums, tl.exp2((tl.max(hole, axis=0) - x_row) * rate) > 0.0


@triton.jit
def _log_ratio_of_sums(p_row, q_row):
    """log(p_row / q_row); where a side is masked throughout, any number will do."""
    return tl.log(tl.where((p_row == 0.0) | (q_row == 0.0), 1.0, p_row / tl.where(q_row == 0.0, 1.0, q_row)))


@triton.jit
def _kl_of_row(
    cross, hole, q_sum, p_sum, s_max, z_max, s_row, z_row, s_weight, z_weight, q_row, p_row, log_z, inverse_tau, rate,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """The forward or reverse KL of the row, and whether it is infinite; log_z: log of p_row / q_row."""
    if DIVERGENCE == _REVERSE:
        inverse = _reciprocal(q_row)
        kl, infinite = _kl(
            cross, q_sum, hole, s_max, z_max, s_row, z_row, s_weight, inverse, log_z, inverse_tau, rate
        )
        kl = tl.where(q_row == 0.0, 0.0, kl)
    else:
        inverse = _reciprocal(p_row)
        kl, infinite = _kl(
            cross, p_sum, hole, z_max, s_max, z_row, s_row, z_weight, inverse, -log_z, inverse_tau, rate
        )
    return kl, infinite


@triton.jit
def _entropy(total, mean):
    """log of the row's sum less the mean; 0 for a row that is masked throughout."""
    return tl.where(total == 0.0, 0.0, tl.log(tl.where(total == 0.0, 1.0, total)) - mean)


@triton.jit
def _finish_kd(kd, inverse_tau, infinite, empty, alpha_legal):
    """tau^2 D with its limits."""
    kd = kd / (inverse_tau * inverse_tau)
    kd = tl.where(kd < 0.0, 0.0, kd)
    kd = tl.where(infinite, kd + float("inf"), kd)  # a sum, so that a NaN elsewhere in the row stays one
    kd = tl.where(empty, 0.0, kd)
    return tl.where(alpha_legal, kd, float("nan"))


@triton.jit
def _cross_entropy(q1_row, s_row, label_logit, label_inside):
    # A masked label is +inf, also in a row that is masked throughout (where the sum is 0).
    ce = tl.log(tl.where(q1_row == 0.0, 1.0, q1_row)) - (label_logit - s_row)
    ce = tl.where(label_logit == _MASKED, ce + float("inf"), tl.where(ce < 0.0, 0.0, ce))
    return tl.where(label_inside, ce, float("nan"))


@triton.jit
def _jsd_terms(log_ratio, jsd_beta):
    """log(p / m) and log(q / m) from log(p / q), m = beta p + (1 - beta) q.

    The larger of the two is -log(1 + c (e^-|log p/q| - 1)), c being the other one's share of m; the smaller is
    |log p/q| less.
    """
    distance = tl.abs(log_ratio)
    p_larger = log_ratio >= 0.0
    larger = -_log1p(tl.where(p_larger, 1.0 - jsd_beta, jsd_beta) * _expm1(-distance))
    smaller = larger - distance
    return tl.where(p_larger, larger, smaller), tl.where(p_larger, smaller, larger)


def _is_vectorisable(tensor: torch.Tensor, vocab: int) -> bool:
    """Whether Triton can prove 16-byte accesses: it distinguishes integers only by whether 16 divides them."""
    return all(x % 16 == 0 for x in (tensor.data_ptr(), _stride(tensor, 0), _stride(tensor, 1), vocab))


def _readable(tensors: Sequence[torch.Tensor], grad: torch.Tensor | None, vocab: int) -> int | None:
    """Columns that a kernel may load where 16 does not divide V: V rounded up to 16, if all rows have that many and are aligned.

    A mask that ends within 16 bytes makes Triton load item by item. So the kernel loads what stands behind the last logit too,
    and drops it. None: this is not needed, or not possible.
    """
    columns = -(-vocab // 16) * 16
    rows = [*tensors] if grad is None else [*tensors, grad]
    padded = columns > vocab and all(x.shape[-1] >= columns and _is_vectorisable(x, columns) for x in rows)
    return columns if padded else None


def _stride(tensor: torch.Tensor | None, dim: int) -> int:
    """Stride of a leading dimension; 0 for a dimension of size 1, whose stride has no meaning."""
    return 0 if tensor is None or tensor.shape[dim] == 1 else tensor.stride(dim)


def _alpha_stride(alpha: torch.Tensor) -> int:
    """0 where one number serves all tokens."""
    return 0 if alpha.numel() == 1 else alpha.stride(0)


def _temperature_code(temperature: float) -> int:
    """TEMPERATURE of the kernels, see :func:`_rates`."""
    return int(temperature) if temperature in (1.0, 2.0) else 0


def _device_of(tensor: torch.Tensor, kernel: object) -> contextlib.AbstractContextManager:
    """The context in which ``kernel`` can be launched on ``tensor``'s device."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"the Triton kernels need CUDA tensors, got a tensor on {tensor.device}; to run them on the CPU in "
            "Triton's interpreter, set TRITON_INTERPRET=1 before Triton is imported"
        )
    return contextlib.nullcontext()
