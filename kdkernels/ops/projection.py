"""The linear loss against a projected teacher: of its distribution p, what a frozen student head lets through.

With logits s = scale (W_s h + b_s) and a frozen head the teacher enters the forward KL only by sums against p:

    KL(p || q) = sum_v p_v log p_v - sum_v p_v s_v / tau + lse(s / tau)
    d KL / d h = scale (q - p) W_s / tau

The K likeliest ids keep their probabilities. The tail is the rest of p times the head, so the sums over it are products of
vectors as wide as the student. Near convergence q W_s and p W_s are two large vectors that almost cancel. So the probabilities of
the likeliest ids are subtracted from q before the product, and the tail from the product while that is still float32.

Legend: N tokens, C tokens of a chunk, V = ``spec.vocab`` valid ids, K likeliest ids, H_s width of the student's hidden states.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library

from . import native
from .chunking import plan_chunks, row_items
from .gemm import (
    VOCAB_BLOCK,
    _float32_gemm,
    gemm,
    gradient_view,
    has_mixed_gemm,
    mixed_gemm,
    return_scratch,
    spread,
    take_scratch,
)
from .linear import LinearResult, TeacherHead, kept_tokens, picked, spread_rows, survivors_launcher
from .projected import Projected
from .reference import contrastive_logits, savable, without_autocast
from .rows import MASK_BELOW, STAT_NAMES, RowResult, RowSpec, legal_alpha
from .schema import (
    READS_ON_HOST,
    LinearSettings,
    check_values,
    fake_linear_results,
    half_gain,
    linear_results,
    register_linear_autograd,
)

_N_STATS = 2 + len(STAT_NAMES)


_TENSORS = 3 + len(Projected._fields) + 3  # the student's, the teacher's, target and both coefficients

# student (1, C, V), projected, rest (C,), target, kd_coef, ce_coef, spec, grad (1, C, V) or None, want_stats
ProjectedRows = Callable[..., RowResult]


# --- rows ---------------------------------------------------------------------------------------------------------------


def projected_rows_launcher(impl: str) -> ProjectedRows:
    """The row kernel of an implementation.

    ``rest`` (C,) holds sum p log p - (the tail's sum of p s) / tau. The statistics (2, C) are the student's entropy and the
    agreement.
    """
    if impl == "cpu":
        return _native_rows
    return importlib.import_module(".triton_projection", __package__).projected_rows


def _native_rows(
    student: Tensor,
    projected: Projected,
    rest: Tensor,
    target: Tensor | None,
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec: RowSpec,
    *,
    grad: Tensor | None,
    want_stats: bool,
) -> RowResult:
    out = RowResult.empty(student.shape[1], 2 if want_stats else 0, student.device)
    native.projected_rows(student, *projected[:2], projected.mass, rest, target, kd_coef, ce_coef, spec, grad=grad, out=out)
    return out


# --- the chunk loop -----------------------------------------------------------------------------------------------------


def linear_projected_chunks(
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden states (N, H_s), weight, bias
    projected: Projected,
    target: Tensor | None,
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec: RowSpec,
    *,
    rows: ProjectedRows,
    settings: LinearSettings,
    gain: Tensor | None,
) -> LinearResult:
    """Two products a chunk: the student's logits, and dh = gradient of the logits times the head, less the tail."""
    n_total, device = student[0].shape[0], student[0].device
    keep = kept_tokens(target, spec.ignore_index)
    hidden, projected = picked(keep, student[0]), projected.picked(keep)
    target, kd_coef, ce_coef = picked(keep, target), picked(keep, kd_coef), picked(keep, ce_coef)
    if gain is not None:
        kd_coef, ce_coef = kd_coef * gain, ce_coef * gain
    n, width = hidden.shape
    weight, bias = student[1][: spec.vocab], None if student[2] is None else student[2][: spec.vocab]
    items = row_items(spec.vocab, device)
    plan = plan_chunks(
        n_tokens=n,
        bytes_per_token=settings.logits_dtype.itemsize * items,
        student_width=width,
        device=device,
        chunk_tokens=settings.chunk_tokens,
        workspace_bytes=settings.workspace_bytes,
    )
    shape = (min(plan.chunk_tokens, max(n, 1)), items)
    memory = take_scratch(settings.logits_dtype.itemsize * math.prod(shape), device)
    scratch = memory[: settings.logits_dtype.itemsize * math.prod(shape)].view(settings.logits_dtype).view(shape)
    result = RowResult.empty(n, len(STAT_NAMES) if settings.want_stats else 0, device)
    hidden_grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if settings.hidden_grad else None
    per_nat = spec.student_scale / spec.temperature
    for start in range(0, n, plan.chunk_tokens):
        chunk = slice(start, min(start + plan.chunk_tokens, n))
        part, h = projected.at(chunk), hidden[chunk]
        logits = scratch[: len(h)]
        gemm(h, weight, bias, logits[:, : spec.vocab])
        tail = part.tail.float()
        rest = part.negentropy - per_nat * ((tail * h.float()).sum(1) + part.tail_bias)
        grad = None if hidden_grad is None else gradient_view(logits, weight.dtype)
        out = rows(
            logits[None],
            part,
            rest,
            None if target is None else target[chunk],
            kd_coef[chunk],
            ce_coef[chunk],
            spec,
            grad=None if grad is None else grad[None],
            want_stats=settings.want_stats,
        )
        result.kd[chunk], result.ce[chunk] = out.kd, out.ce
        if result.stats is not None and out.stats is not None:
            valid = None if target is None else target[chunk] != spec.ignore_index
            result.stats[:, chunk] = projected_stats(part, out.stats, valid)
        if hidden_grad is not None and grad is not None:
            factor = (kd_coef[chunk] * (spec.temperature * spec.student_scale))[:, None]
            # A token without a factor may have a tail that is NaN.
            less = torch.where(factor == 0, 0.0, factor * tail)
            hidden_grad[chunk] = float32_product([grad[:, : spec.vocab]], weight).sub_(less)
    return_scratch(memory)
    if hidden_grad is not None and keep is not None:
        hidden_grad = spread(hidden_grad, keep, n_total, 0)
    gains = None if gain is None else torch.stack([gain, torch.ones_like(gain), torch.ones_like(gain)])
    return LinearResult(spread_rows(result, keep, n_total), hidden_grad, None, None, gains)


def projected_stats(part: Projected, of_kernel: Tensor, valid: Tensor | None) -> Tensor:
    """(4, C) as STAT_NAMES has them, from the row kernel's (2, C). The paths' divergence is unknown, NaN."""
    mass = part.mass.clamp_min(torch.finfo(torch.float32).tiny)
    teacher = torch.stack([-part.negentropy / mass, torch.full_like(mass, math.nan)])
    if valid is not None:
        teacher = torch.where(valid, teacher, 0.0)
    return torch.stack([of_kernel[0], teacher[0], of_kernel[1], teacher[1]])


def float32_product(parts: Sequence[Tensor], weight: Tensor) -> Tensor:
    """(C, H) float32 = sum of parts (C, V) @ weight (V, H), accumulated in float32; parts in the weight's dtype or in float32."""
    out = torch.empty(parts[0].shape[0], weight.shape[1], dtype=torch.float32, device=weight.device)
    alike = all(x.dtype == weight.dtype for x in parts)
    if alike and weight.dtype == torch.float32:
        return torch.mm(parts[0], weight, out=out)
    if alike and has_mixed_gemm(weight.device):
        for i, part in enumerate(parts):
            mixed_gemm(part, weight, out, accumulate=i > 0)
        return out
    bf16 = alike and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    beside_each_other = all(x.stride(1) == 1 for x in (*parts, weight))
    if bf16 and beside_each_other and native.multiplies_bf16():
        pairs = weight.shape[0] // 2 * 2
        if pairs:
            native.bf16_gemm([x[:, :pairs] for x in parts], weight[:pairs], out, weight_by_rows=True)
        else:
            out.zero_()
        for part in parts if pairs < weight.shape[0] else ():
            out.addmm_(part[:, pairs:].float(), weight[pairs:].float())
        return out
    out.zero_()
    for start in range(0, weight.shape[0], VOCAB_BLOCK):
        block = slice(start, min(start + VOCAB_BLOCK, weight.shape[0]))
        w = weight[block].float()
        for part in parts:
            _float32_gemm(part[:, block].float(), w, out, accumulate=True, bf16_values=bf16)
    return out


# --- the operator -------------------------------------------------------------------------------------------------------


@library.custom_op("kdkernels::linear_projected", mutates_args=(), **READS_ON_HOST)
def linear_projected(
    student_hidden: Tensor,  # (N, H_s)
    student_weight: Tensor,  # (V_s, H_s)
    student_bias: Tensor | None,
    ids: Tensor,  # Projected from here on
    probabilities: Tensor,
    tail: Tensor,
    tail_bias: Tensor,
    negentropy: Tensor,
    mass: Tensor,
    target: Tensor | None,
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec_whole: Sequence[int],  # RowSpec.packed()
    spec_numbers: Tensor,
    divergence: str,
    wanted_whole: Sequence[int],  # LinearSettings.packed()
    logits_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As kdkernels::linear_caad; the gradients of weight and bias are empty."""
    student = (student_hidden, student_weight, student_bias)
    projected = Projected(ids, probabilities, tail, tail_bias, negentropy, mass)
    spec = RowSpec.unpacked(spec_whole, spec_numbers, divergence)
    wanted = LinearSettings.unpacked(wanted_whole, logits_dtype, impl)
    check_values(target, kd_coef.new_zeros(0), spec.vocab, spec.ignore_index)
    gain = None
    if wanted.any_grad:
        gain = half_gain(kd_coef * mass, ce_coef, student_hidden.dtype, student_weight.dtype, logits_dtype)
    with torch.amp.autocast(student_hidden.device.type, enabled=False):
        out = linear_projected_chunks(
            student,
            projected,
            target,
            kd_coef,
            ce_coef,
            spec,
            rows=projected_rows_launcher(impl),
            settings=wanted,
            gain=gain,
        )
    return linear_results(out, student, kd_coef, ce_coef, wanted.reduced)


@linear_projected.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = LinearSettings.unpacked(*arguments[-3:])
    return fake_linear_results(arguments[:3], arguments[_TENSORS - 2], wanted, _N_STATS)


register_linear_autograd(linear_projected, tensors=_TENSORS)


def reference_rows(
    student: tuple[Tensor, Tensor, Tensor | None],
    projected: Projected,
    target: Tensor | None,
    spec: RowSpec,
    counts: tuple[Tensor, Tensor],
    *,
    want_stats: bool,
) -> RowResult:
    """kd and ce (N,) in eager PyTorch, differentiable in the student's hidden states; float64 where those are."""
    hidden, weight, bias = student
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    valid = torch.ones_like(counts[0]) if target is None else target != spec.ignore_index
    used = valid & (counts[0] | counts[1])
    hidden = torch.where(used[:, None], hidden, hidden.detach()).to(dtype)
    w, b = savable(weight[: spec.vocab].detach().to(dtype)), None if bias is None else bias[: spec.vocab].detach().to(dtype)
    projected = Projected(*map(savable, projected))
    with without_autocast(hidden.device):
        s = torch.nn.functional.linear(torch.where(valid[:, None], hidden, 0.0), w, b) * spec.student_scale
    s = torch.where(s < MASK_BELOW, -math.inf, s)
    x = s / spec.temperature
    p = projected.probabilities.to(dtype) * (projected.ids >= 0)
    seen = x.gather(1, projected.ids.clamp_min(0).long())
    infinite = ((p > 0) & torch.isneginf(seen)).any(1)
    seen = torch.where(p > 0, seen.masked_fill(torch.isneginf(seen), 0.0), 0.0)
    along = (projected.tail.to(dtype) * torch.where(valid[:, None], hidden, 0.0)).sum(1) + projected.tail_bias.to(dtype)
    kd = projected.mass * torch.logsumexp(x, 1) + projected.negentropy.to(dtype)
    kd = kd - (p * seen).sum(1) - along * (spec.student_scale / spec.temperature)
    kd = torch.where(infinite, math.inf, torch.where(projected.mass == 0, 0.0, kd)) * spec.temperature**2
    kd = torch.where(kd < 0, kd - kd.detach(), kd)  # rounding; the gradient stays
    ce = torch.zeros_like(kd)
    if target is not None and spec.with_ce:
        inside = (target >= 0) & (target < spec.vocab)
        picked_logit = s.gather(1, torch.where(inside, target, 0)[:, None])[:, 0]
        ce = torch.where(inside, torch.logsumexp(s, 1) - picked_logit, math.nan)
    stats = None
    if want_stats:
        log_q = torch.log_softmax(x.detach(), 1)
        entropy = -(log_q.exp() * log_q.masked_fill(torch.isneginf(log_q), 0.0)).sum(1)
        likeliest = projected.ids.gather(1, p.argmax(1, keepdim=True))[:, 0]
        same = (s.argmax(1) == likeliest) & (p.amax(1) > 0)
        of_student = torch.where(valid, torch.stack([entropy, same.to(dtype)]), 0.0)
        stats = projected_stats(projected, of_student, valid).to(dtype)
    return RowResult(torch.where(valid, kd, 0.0), torch.where(valid, ce, 0.0), stats)


# --- making one ---------------------------------------------------------------------------------------------------------


def project_chunks(
    head: TeacherHead,
    student_weight: Tensor,
    student_bias: Tensor | None,
    *,
    top_k: int,
    tail_dtype: torch.dtype,
    chunk_tokens: int | None,
    workspace_bytes: int | None,
) -> Projected:
    """The teacher's distribution at the head's temperature, chunk by chunk, as a :class:`Projected`."""
    n, spec, device = head.audio_hidden.shape[0], head.spec, head.audio_hidden.device
    k, width = min(top_k, spec.vocab), student_weight.shape[1]
    dtype = torch.float64 if head.audio_hidden.dtype == torch.float64 else torch.float32
    plan = plan_chunks(
        n_tokens=n,
        bytes_per_token=_FLOAT32_TENSORS * dtype.itemsize * spec.vocab,
        student_width=width,
        device=device,
        chunk_tokens=chunk_tokens,
        workspace_bytes=workspace_bytes,
    )
    of_token: dict[str, Any] = {"dtype": dtype, "device": device}
    result = Projected(
        torch.empty(n, k, dtype=torch.int32, device=device),
        torch.empty(n, k, **of_token),
        torch.empty(n, width, dtype=tail_dtype, device=device),
        torch.zeros(n, **of_token),
        torch.empty(n, **of_token),
        torch.empty(n, **of_token),
    )
    w, b = student_weight[: spec.vocab], None if student_bias is None else student_bias[: spec.vocab]
    for start in range(0, n, plan.chunk_tokens):
        chunk = slice(start, min(start + plan.chunk_tokens, n))
        z = _contrast(head, chunk, dtype).div_(spec.temperature)
        empty = torch.isneginf(z).all(1)
        z.masked_fill_(empty[:, None], 0.0)
        below = z.sub_(z.amax(1, keepdim=True))
        p = torch.exp(below)
        total = p.sum(1, keepdim=True, dtype=torch.float64)
        # p sums to 1 as closely as its dtype can. exp(log_softmax) misses that by 1e-5, and the loss takes that times the logits.
        p.div_(total.to(dtype))
        negentropy = below.clamp_min_(torch.finfo(dtype).min).mul_(p).sum(1, dtype=torch.float64)
        result.negentropy[chunk] = (negentropy - total[:, 0].log()).to(dtype)
        top = p.topk(k, dim=1)
        result.ids[chunk], result.probabilities[chunk] = top.indices, top.values
        p.scatter_(1, top.indices, 0.0)
        if b is not None:
            result.tail_bias[chunk] = p @ b.to(dtype)
        result.tail[chunk] = _times_head(p, w)
        result.mass[chunk] = (~empty).to(dtype)
        for x in result:
            x[chunk][empty] = 0
    return result


_FLOAT32_TENSORS = 4  # of a chunk's logits at a time, while a teacher is projected


def _contrast(head: TeacherHead, chunk: slice, dtype: torch.dtype) -> Tensor:
    """z_hat (C, V) of a chunk, after scale, softcap and plausibility mask."""
    c, spec = chunk.stop - chunk.start, head.row_spec
    if dtype == torch.float64:
        w = head.weight[: spec.vocab].to(dtype)
        b = None if head.bias is None else head.bias[: spec.vocab].to(dtype)
        states = (head.audio_hidden, head.text_hidden)
        audio, text = (None if x is None else torch.nn.functional.linear(x[chunk].to(dtype), w, b) for x in states)
        spec = head.spec
    else:
        scratch = torch.empty(1 + head.two_paths, c, spec.vocab, dtype=torch.float32, device=head.weight.device)
        # Its errors stay for the whole training, and each token is projected once: so it takes the more exact product.
        audio, text = head.logits(chunk, None, scratch, functools.partial(gemm, each_summand=True))
    assert audio is not None
    for path in (audio, text):
        if path is not None:
            path.mul_(spec.teacher_scale)
            if spec.teacher_softcap is not None:
                path.div_(spec.teacher_softcap).tanh_().mul_(spec.teacher_softcap)
    if text is None and spec.plausibility is None:
        return audio
    return contrastive_logits(audio, text, head.alpha_of(chunk), spec.plausibility)


def _times_head(p: Tensor, weight: Tensor) -> Tensor:
    """p (C, V) @ weight (V, H_s); p as the sum of two bfloat16 tensors where the weight is bfloat16 (relative error 1e-5).

    p is overwritten.
    """
    if p.dtype == torch.float64:
        return p @ weight.double()
    if weight.dtype != torch.bfloat16:
        return float32_product([p], weight)
    high = p.to(torch.bfloat16)
    return float32_product([high, p.sub_(high).to(torch.bfloat16)], weight)


def teacher_head(
    audio: Tensor, text: Tensor | None, weight: Tensor, bias: Tensor | None, alpha: Tensor, spec: RowSpec, impl: str
) -> TeacherHead:
    survivors = None if impl == "reference" else survivors_launcher(impl)
    return TeacherHead(audio, text, weight, bias, legal_alpha(alpha), spec, False, torch.float32, survivors)


def mixture(projections: Sequence[Projected], weights: Sequence[Tensor]) -> Projected:
    """sum_k weight_k times the k-th, token by token: sum_k weight_k KL(p_k || q) is what the loss makes of it."""
    ids = torch.cat([x.ids for x in projections], 1)
    shares = [w[:, None] for w in weights]
    probabilities = torch.cat([w * x.probabilities for w, x in zip(shares, projections, strict=True)], 1)
    ids, probabilities = _joined_ids(ids, probabilities)

    def added(name: str) -> Tensor:
        total: Any = 0
        for share, projection in zip(weights, projections, strict=True):
            x = getattr(projection, name).float()
            total = total + share.reshape(-1, *[1] * (x.dim() - 1)) * x
        return total

    return Projected(ids, probabilities, added("tail"), added("tail_bias"), added("negentropy"), added("mass"))


def _joined_ids(ids: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Each id once a row: its probabilities added up, the places that become free -1."""
    ids, order = ids.sort(dim=1, stable=True)
    p = probabilities.gather(1, order)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = first.cumsum(1) - 1
    summed = torch.zeros_like(p).scatter_add_(1, place, p)
    unique = torch.full_like(ids, -1).scatter_(1, place, ids)
    return torch.where(summed > 0, unique, -1), summed
