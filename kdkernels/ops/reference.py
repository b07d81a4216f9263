"""The formula in eager PyTorch: the oracle of tests and benchmarks (in float64), and an implementation that runs on any device.

Written to be read beside the maths. It does not save memory: it holds several (N, V) tensors in the compute dtype. Its gradients
come from autograd, so they are independent of the analytic ones in the kernels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from .rows import MASK_BELOW, RowResult, RowSpec, joined_stats

_NEG_INF = float("-inf")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For products that keep the dtype of their operands under torch.autocast."""
    available = device.type != "meta"
    return torch.amp.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


def savable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of what was made under torch.inference_mode: autograd keeps no such tensor for a backward."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the compiler cannot ask
        return x
    return x.clone() if x.is_inference() else x


def _maths_of(x: Any) -> Any:
    """The module with log and log1p for a number of a RowSpec, which is a tensor while torch.compile traces."""
    return torch if isinstance(x, torch.Tensor) else math


def _logits(raw: torch.Tensor, spec: RowSpec, scale: float, softcap: float | None, dtype: torch.dtype) -> torch.Tensor:
    logits = raw[..., : spec.vocab].reshape(-1, spec.vocab).to(dtype) * scale  # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(logits < MASK_BELOW, _NEG_INF)


def contrastive_logits(
    audio: torch.Tensor, text: torch.Tensor | None, alpha: torch.Tensor, plausibility: float | None
) -> torch.Tensor:
    """z_hat = (1 + alpha) z_audio - alpha z_text over (N, V), alpha (1,) or (N,).

    A token that is -inf on either path is -inf in z_hat. Where alpha is 0 the text path is not read.
    """
    target = audio
    if text is not None:
        a = alpha.to(audio.dtype).reshape(-1, 1)
        masked = torch.isneginf(audio) | torch.isneginf(text)
        # 1 + alpha is folded into the difference so that alpha = 0 gives z_audio exactly.
        mixed = audio + a * (audio.masked_fill(masked, 0.0) - text.masked_fill(masked, 0.0))
        target = torch.where(a == 0, audio, mixed.masked_fill(masked, _NEG_INF))
    if plausibility is not None:
        threshold = audio.amax(dim=-1, keepdim=True) + _maths_of(plausibility).log(plausibility)
        target = target.masked_fill(audio < threshold, _NEG_INF)
    return target


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """log_softmax that stays -inf (not NaN) in a row that is -inf throughout."""
    empty = torch.isneginf(logits).all(dim=-1, keepdim=True)
    return torch.log_softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, _NEG_INF)


def _relative_entropy(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum_v p_v (log p_v - log q_v) with 0 log 0 = 0; +inf, with no gradient, where p_v > 0 meets q_v = 0."""
    p = log_p.exp()
    support = p > 0
    # Double `where`: autograd multiplies what is masked by 0, and 0 * inf would be NaN.
    safe_p, safe_q = (torch.where(support & ~torch.isneginf(x), x, torch.zeros_like(x)) for x in (log_p, log_q))
    value = torch.where(support, p * (safe_p - safe_q), torch.zeros_like(p)).sum(dim=-1)
    infinite = (support & torch.isneginf(log_q)).any(dim=-1)
    return torch.where(infinite, torch.full_like(value, math.inf), value)


def _forward_kl(log_p: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(p || softmax(student)) whose gradient is softmax(student) - p, and 0 at a masked student token, also where it is inf."""
    masked = torch.isneginf(student)
    p = log_p.exp()
    visible = torch.where(masked, torch.zeros_like(student), student)
    log_q = visible - torch.logsumexp(torch.where(masked.all(dim=-1, keepdim=True), visible, student), -1, keepdim=True)
    safe_p = torch.where(p > 0, log_p, torch.zeros_like(log_p))
    value = (p * (safe_p - log_q)).sum(dim=-1)
    return value + torch.where((masked & (p > 0)).any(dim=-1), math.inf, 0.0).to(value.dtype)


def divergence(log_p: torch.Tensor, student: torch.Tensor, kind: str, jsd_beta: float) -> torch.Tensor:
    """D(p, q) per row with q = softmax(student), without tau^2. A row in which p has no support gives 0."""
    if kind == "forward_kl":
        value = _forward_kl(log_p, student)
    elif kind == "reverse_kl":
        value = _relative_entropy(_log_softmax(student), log_p)
    else:
        log_q = _log_softmax(student)
        empty = torch.isneginf(log_p) & torch.isneginf(log_q)
        maths = _maths_of(jsd_beta)
        log_m = torch.logaddexp(
            log_p.masked_fill(empty, 0.0) + maths.log(jsd_beta), log_q.masked_fill(empty, 0.0) + maths.log1p(-jsd_beta)
        ).masked_fill(empty, _NEG_INF)
        value = jsd_beta * _relative_entropy(log_p, log_m) + (1 - jsd_beta) * _relative_entropy(log_q, log_m)
    return torch.where(torch.isneginf(log_p).all(dim=-1), torch.zeros_like(value), value)


def caad_rows(
    student: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor | None,
    target: torch.Tensor | None,
    alpha: torch.Tensor,
    spec: RowSpec,
    *,
    want_stats: bool = False,
    counts: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> RowResult:
    """kd and ce per row (see :mod:`kdkernels.ops.rows`), differentiable in ``student``.

    ``counts``: (N,) bool each, whether the row's kd and its ce have a factor. A term without one has no gradient, not even NaN.

    Computes in float64 where an input is float64, else in float32.
    """
    inputs = [x for x in (student, audio, text) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    tau = spec.temperature
    valid = None if target is None else target != spec.ignore_index  # (N,)

    s = _logits(student, spec, spec.student_scale, spec.student_softcap, dtype)
    used = _used_rows(valid, counts)
    if used is not None:
        # The slope at NaN is NaN: rows without a gradient go through the formula as constants.
        s = _values_of(used, _logits(_only(used, student), spec, spec.student_scale, spec.student_softcap, dtype), s)
    s = torch.where(torch.isneginf(s), s.detach(), s)  # a masked token gets no gradient, not even as the label
    a = _logits(audio.detach(), spec, spec.teacher_scale, spec.teacher_softcap, dtype)
    t = None if text is None else _logits(text.detach(), spec, spec.teacher_scale, spec.teacher_softcap, dtype)
    if valid is not None:
        # Ignored rows may hold anything, NaN included.
        s = torch.where(valid[:, None], s, torch.zeros_like(s))
        a = torch.where(valid[:, None], a, torch.zeros_like(a))
        t = None if t is None else torch.where(valid[:, None], t, torch.zeros_like(t))
    z = contrastive_logits(a, t, alpha.detach(), spec.plausibility)

    rows = s.shape[0]
    zeros = s.new_zeros(rows)
    log_p = _log_softmax(z / tau)
    s_kd, s_ce = (s, s) if counts is None else (_values_of(x, s, s) for x in counts)
    kd = tau**2 * divergence(log_p, s_kd / tau, spec.divergence, spec.jsd_beta) if spec.with_kd else zeros
    ce = zeros
    if target is not None and spec.with_ce:
        inside = (target >= 0) & (target < spec.vocab)
        picked = _log_softmax(s_ce).gather(-1, torch.where(inside, target, 0)[:, None])[:, 0]
        ce = torch.where(inside, -picked, math.nan)
    if text is not None:
        kd = torch.where((alpha >= 0) & torch.isfinite(alpha), kd, math.nan)
    stats = None
    if want_stats:
        with torch.no_grad():
            stats = torch.stack(
                [
                    _entropy(_log_softmax(s / tau)),
                    _entropy(log_p),
                    (s.argmax(dim=-1) == z.argmax(dim=-1)).to(dtype),
                    zeros
                    if t is None
                    else _relative_entropy(_log_softmax(a / tau), _log_softmax(t / tau)).clamp_min(0.0),
                ]
            )
    if valid is not None:
        kd, ce = torch.where(valid, kd, 0.0), torch.where(valid, ce, 0.0)
        stats = None if stats is None else torch.where(valid, stats, 0.0)
    return RowResult(kd=kd, ce=ce, stats=stats)


def _used_rows(
    valid: torch.Tensor | None, counts: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor | None:
    """(N,) bool: the rows that have a gradient; None: all."""
    if counts is None:
        return valid
    used = counts[0] | counts[1]
    return used if valid is None else used & valid


def _only(used: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows (..., H) of N in all, with zeros where ``used`` (N,) is False."""
    return torch.where(used.reshape(*rows.shape[:-1], 1), rows, torch.zeros_like(rows))


def _values_of(used: torch.Tensor, differentiable: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(N, V): ``values``, differentiated as ``differentiable`` where ``used`` (N,), and nowhere else."""
    return torch.where(used[:, None], differentiable, values.detach())


def _entropy(log_p: torch.Tensor) -> torch.Tensor:
    return -torch.where(torch.isneginf(log_p), 0.0, log_p.exp() * log_p).sum(dim=-1)


def linear_caad(
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
    want_stats: bool = False,
    counts: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> RowResult:
    """The row problem behind two LM heads, logits in full: float64 where an input is float64, else float32.

    ``counts``: as in :func:`caad_rows`.
    """
    given = [student_hidden, student_weight, student_bias, audio_hidden, text_hidden, teacher_weight, teacher_bias]
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in given) else torch.float32

    def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        bias = None if bias is None else bias[: spec.vocab].to(dtype)
        return torch.nn.functional.linear(hidden.to(dtype), savable(weight[: spec.vocab].to(dtype)), bias)[None]

    with without_autocast(student_hidden.device):
        student = logits(student_hidden, student_weight, student_bias)
        used = _used_rows(None if target is None else target != spec.ignore_index, counts)
        if used is not None:  # hidden states that are NaN would reach the weight's gradient, though they are multiplied by 0
            clean = logits(_only(used, student_hidden), student_weight, student_bias)
            student = _values_of(used, clean[0], student[0])[None]
        audio = logits(audio_hidden, teacher_weight, teacher_bias)
        text = None if text_hidden is None else logits(text_hidden, teacher_weight, teacher_bias)
    return caad_rows(student, audio, text, target, alpha, spec, want_stats=want_stats, counts=counts)


def linear_multi_teacher(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    student_bias: torch.Tensor | None,
    teachers: Sequence[tuple[Any, ...]],
    target: torch.Tensor | None,
    omega: torch.Tensor,
    *,
    want_stats: bool = False,
    counts: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> RowResult:
    """kd_i = sum_k omega_ki tau^2 D_k, teacher by teacher; ce as against any one of them.

    Args:
        teachers: for each audio_hidden, text_hidden, weight, bias, alpha and RowSpec, as :func:`linear_caad` takes them.
        omega: (K, N).
        counts: as in :func:`caad_rows`.
    """
    student = (student_hidden, student_weight, student_bias)
    results = []
    for share, (audio, text, weight, bias, alpha, spec) in zip(omega, teachers, strict=True):
        tensors = (*student, audio, text, weight, bias)
        own = None if counts is None else (counts[0] & (share != 0), counts[1])
        results.append(linear_caad(*tensors, target, alpha, spec, want_stats=want_stats, counts=own))
    reverse = other = torch.zeros_like(results[0].kd)
    for share, result, (*_, spec) in zip(omega, results, teachers, strict=True):
        weighted = torch.where(share == 0, 0.0, share * result.kd)
        if spec.divergence == "reverse_kl":
            reverse = reverse + weighted
        else:
            other = other + weighted
    # An infinite reverse KL takes its token's gradient, and the gradients of what it is added to.
    reverse = torch.where(torch.isinf(reverse), reverse.detach(), reverse)
    stats = joined_stats(results) if want_stats else None
    return RowResult(kd=reverse + other, ce=results[0].ce, stats=stats)
