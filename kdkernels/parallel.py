"""Vocabulary-parallel loss: each rank of a process group holds the rows of the LM heads for its slice of the vocabulary.

Hidden states, targets and options are the same on every rank. The ranks exchange row statistics (maxima, then sums), each leaves
the gradient of its own slice of the logits, and dh is summed over ranks, so that loss and dh are complete on every rank and dW
is the gradient of the rank's own rows.

Legend: N tokens, C tokens of a chunk, V_r valid ids of this rank.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.linear import linear_caad_chunks
from .ops.reference import contrastive_logits
from .ops.rows import RowResult, RowSpec
from .ops.schema import all_stats, refuse_second_derivative, weighted

# As in the CPU kernel: a finite start of every maximum, so that no difference of maxima is inf - inf.
_FLOOR = -1e30


def as_group(process_group: Any) -> dist.ProcessGroup:
    """The process group itself, or that of a one-dimensional DeviceMesh. Raises TypeError for anything else."""
    if isinstance(process_group, dist.ProcessGroup):
        return process_group
    if hasattr(process_group, "get_group") and getattr(process_group, "ndim", None) == 1:
        return process_group.get_group()
    raise TypeError(
        "process_group: expected a torch.distributed.ProcessGroup, a one-dimensional DeviceMesh or None, "
        f"got {type(process_group).__name__}"
    )


def shard_range(
    group: dist.ProcessGroup, student_rows: int, teacher_rows: int, device: torch.device
) -> tuple[int, int, int]:
    """(first id of this rank, V_s over all ranks, V_t over all ranks).

    Reads the sizes of all ranks back (one small exchange a call). Raises ValueError, on every rank alike, where student and
    teacher shards do not start at the same ids.
    """
    mine = torch.tensor([student_rows, teacher_rows], dtype=torch.int64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    sizes = [tuple(x.tolist()) for x in every]
    starts = [0, 0]
    for rank, (rows_s, rows_t) in enumerate(sizes):
        if starts[0] != starts[1] and rows_s and rows_t:
            raise ValueError(
                f"student_weight, teacher_weight: expected shards that start at the same id on every rank, got {starts[0]} and "
                f"{starts[1]} on rank {rank} (rows of student and teacher by rank: {sizes})"
            )
        if rank == dist.get_rank(group):
            first = starts[0] if rows_s else starts[1]
        starts = [starts[0] + rows_s, starts[1] + rows_t]
    return first, starts[0], starts[1]


class VocabularyParallelCAAD(torch.autograd.Function):
    """The fused linear loss over shards. Inputs 0 to 2 (hidden, weight, bias of the student) get gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, audio, text, teacher_weight, teacher_bias, target, alpha, kd_coef, ce_coef,
                spec, first, group, reduced, want_stats, settings):  # fmt: skip
        needs = ctx.needs_input_grad[:3]
        # A token's own factor reaches dW only inside the GEMM: then the backward runs the chunks.
        ctx.again = not reduced and (needs[1] or needs[2])
        tensors = (hidden, weight, bias, audio, text, teacher_weight, teacher_bias, target, alpha, kd_coef, ce_coef)
        grads = (False,) * 3 if ctx.again else needs
        out = _run(tensors, spec, first, group, grads, want_stats, settings)
        if ctx.again:
            # A teacher run under inference_mode gives tensors that autograd refuses to save.
            ctx.save_for_backward(*[x.clone() if x is not None and x.is_inference() else x for x in tensors])
            ctx.rest = (spec, first, group, settings)
        else:
            ctx.save_for_backward(out.hidden_grad, out.weight_grad, out.bias_grad)
        loss = weighted(out.rows.kd, out.rows.ce, kd_coef, ce_coef)
        loss = loss.sum() if reduced else loss
        stats = all_stats(out.rows) if want_stats else loss.new_empty(0)
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss, _stats):
        refuse_second_derivative()
        if ctx.again:
            *tensors, kd_coef, ce_coef = ctx.saved_tensors
            spec, first, group, settings = ctx.rest
            scaled = (*tensors, kd_coef * grad_loss, ce_coef * grad_loss)
            out = _run(scaled, spec, first, group, ctx.needs_input_grad[:3], False, settings)
            return (out.hidden_grad, out.weight_grad, out.bias_grad) + (None,) * 14
        grads = []
        for grad in ctx.saved_tensors:
            factor = grad_loss if grad is None or not grad_loss.dim() else grad_loss[:, None]
            grads.append(None if grad is None else (grad * factor).to(grad.dtype))
        return tuple(grads) + (None,) * 14


def _run(tensors, spec, first, group, grads, want_stats, settings):
    with torch.amp.autocast(tensors[0].device.type, enabled=False):
        out = linear_caad_chunks(
            *tensors,
            spec,
            rows=functools.partial(parallel_rows, group=group, first=first),
            hidden_grad=grads[0],
            weight_grad=grads[1],
            bias_grad=grads[2],
            want_stats=want_stats,
            **settings,
        )
    if out.hidden_grad is not None:
        dist.all_reduce(out.hidden_grad, group=group)
    return out


def parallel_rows(
    student: Tensor,  # (1, C, V_r)
    audio: Tensor,
    text: Tensor | None,
    target: Tensor | None,  # (C,) global ids
    alpha: Tensor,
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec: RowSpec,  # vocab: V_r
    *,
    group: dist.ProcessGroup,
    first: int,
    grad: Tensor | None = None,
    want_stats: bool = False,
) -> RowResult:
    """The row problem (see :mod:`kdkernels.ops.rows`) with every row spread over the ranks; eager PyTorch on the slices."""
    tau, rows = spec.temperature, student.shape[1]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    valid = torch.ones(rows, dtype=torch.bool, device=student.device) if target is None else target != spec.ignore_index

    def logits(x: Tensor, scale: float, softcap: float | None) -> Tensor:
        x = torch.where(valid[:, None], x[0, :, : spec.vocab].to(dtype), 0.0) * scale
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    def reduce(parts: list[Tensor], op: Any) -> tuple[Tensor, ...]:
        together = torch.stack(parts)
        dist.all_reduce(together, op=op, group=group)
        return together.unbind(0)

    def peak(x: Tensor) -> Tensor:
        return x.amax(-1).clamp_min(_FLOOR) if x.shape[1] else x.new_full((rows,), _FLOOR)

    s = logits(student, spec.student_scale, spec.student_softcap)
    need_teacher = spec.with_kd or want_stats
    a = t = None
    z = s.new_full(s.shape, -math.inf)
    if need_teacher:
        a = logits(audio, spec.teacher_scale, spec.teacher_softcap)
        t = None if text is None else logits(text, spec.teacher_scale, spec.teacher_softcap)
        z = contrastive_logits(a, t, alpha, None)
        if spec.plausibility is not None:
            (best,) = reduce([peak(a)], dist.ReduceOp.MAX)
            z = z.masked_fill(a < (best + math.log(spec.plausibility))[:, None], -math.inf)
    paths = want_stats and t is not None
    maxima = reduce([peak(s), peak(z)] + ([peak(a), peak(t)] if paths else []), dist.ReduceOp.MAX)
    ds, dz = ((x - m[:, None]) / tau for x, m in zip((s, z), maxima, strict=False))
    e_s, e_z, e_1 = ds.exp(), dz.exp(), (ds * tau).exp()

    def cross(e: Tensor, d: Tensor, other: Tensor) -> Tensor:
        """sum e (d - other) with 0 log 0 = 0"""
        return torch.where(e > 0, e * (d - other), 0.0).sum(-1)

    sums = [e_s.sum(-1), e_1.sum(-1), e_z.sum(-1), cross(e_z, dz, ds), cross(e_s, ds, dz)]
    s_y = s.new_zeros(rows)
    here = None
    if target is not None:
        here = (target >= first) & (target < first + spec.vocab)
        local = torch.where(here, target - first, 0)
        if spec.vocab:
            s_y = torch.where(here, s.gather(1, local[:, None])[:, 0], 0.0)
    sums.append(s_y)
    if want_stats:
        zero = torch.zeros_like
        sums += [cross(e_s, ds, zero(ds)), cross(e_z, dz, zero(dz))]
        if paths:
            da, dt = ((x - m[:, None]) / tau for x, m in zip((a, t), maxima[2:], strict=True))
            e_a, e_t = da.exp(), dt.exp()
            sums += [e_a.sum(-1), e_t.sum(-1), cross(e_a, da, dt)]
    Ss, S1, Sz, cross_z, cross_s, s_y, *more = reduce(sums, dist.ReduceOp.SUM)

    taught = Sz > 0
    q = torch.where(Ss[:, None] > 0, e_s / Ss[:, None], 0.0)
    p = torch.where(taught[:, None], e_z / Sz[:, None], 0.0)
    kd = s.new_zeros(rows)
    kd_grad = torch.zeros_like(s)
    if spec.with_kd:
        if spec.divergence == "forward_kl":
            kd = torch.where(Ss > 0, cross_z / Sz - Sz.log() + Ss.log(), math.inf)
            kd_grad = torch.where(torch.isneginf(s), 0.0, q - p)
        elif spec.divergence == "reverse_kl":
            kd = torch.where(Ss > 0, cross_s / Ss - Ss.log() + Sz.log(), 0.0)
            gap = torch.where(q > 0, ds - dz, 0.0) + (Sz.log() - Ss.log() - kd)[:, None]
            kd_grad = torch.where(torch.isinf(kd)[:, None] | (q == 0), 0.0, q * gap)
        else:
            beta = spec.jsd_beta
            m = torch.where((p > 0) | (q > 0), beta * p + (1 - beta) * q, 1.0)
            log_pm, log_qm = (torch.where(x > 0, torch.log(x / m), 0.0) for x in (p, q))
            total_p, total_q = reduce([(p * log_pm).sum(-1), (q * log_qm).sum(-1)], dist.ReduceOp.SUM)
            kd = beta * total_p + (1 - beta) * total_q
            kd_grad = (1 - beta) * q * (log_qm - total_q[:, None])
        bad_alpha = torch.zeros_like(taught) if text is None else ~((alpha >= 0) & torch.isfinite(alpha)).expand(rows)
        kd = torch.where(taught, tau**2 * torch.where(kd < 0, 0.0, kd), torch.where(torch.isnan(Sz), math.nan, 0.0))
        kd = torch.where(bad_alpha, math.nan, kd)
        kd_grad = torch.where(taught[:, None], tau * kd_grad, 0.0)
    ce = s.new_zeros(rows)
    if target is not None and spec.with_ce:
        ce = torch.where(torch.isneginf(s_y), math.inf, S1.log() + (maxima[0] - s_y))
        ce = torch.where(ce < 0, 0.0, ce)
    if grad is not None:
        total = torch.where(kd_coef == 0, 0.0, kd_coef)[:, None] * kd_grad
        if target is not None and spec.with_ce:
            ce_grad = torch.where(S1[:, None] > 0, e_1 / S1[:, None], 0.0)
            if spec.vocab:
                hit = (here & ~torch.isneginf(s_y)).to(dtype)
                ce_grad.scatter_add_(1, local[:, None], -hit[:, None])
            total = total + ce_coef[:, None] * ce_grad
        if spec.student_softcap is not None:
            total = total * (1 - (s / spec.student_softcap) ** 2)
        grad[0, :, : spec.vocab] = torch.where(valid[:, None], total * spec.student_scale, 0.0)
        grad[0, :, spec.vocab :] = 0
    stats = None
    if want_stats:
        entropy_s, entropy_z = (
            torch.where(n > 0, n.log() - x / n, 0.0) for n, x in zip((Ss, Sz), more[:2], strict=True)
        )
        between = s.new_zeros(rows)
        if paths:
            Sa, St, cross_a = more[2:]
            between = torch.where(Sa > 0, cross_a / Sa - Sa.log() + St.log(), 0.0).clamp_min(0.0)
        stats = torch.stack([entropy_s, entropy_z, _same_top(s, z, maxima, first, group).to(dtype), between])
    kd, ce = torch.where(valid, kd, 0.0), torch.where(valid, ce, 0.0)
    return RowResult(kd=kd, ce=ce, stats=None if stats is None else torch.where(valid, stats, 0.0))


def _same_top(s: Tensor, z: Tensor, maxima: tuple[Tensor, ...], first: int, group: dist.ProcessGroup) -> Tensor:
    """Whether student and contrast have their (first) maximum at the same id, (C,)."""
    nowhere = torch.iinfo(torch.int64).max
    tops = []
    for x, m in zip((s, z), maxima, strict=False):
        if x.shape[1]:
            value, index = x.max(-1)
            tops.append(torch.where(value == m, index + first, nowhere))
        else:
            tops.append(torch.full((x.shape[0],), nowhere, device=x.device))
    together = torch.stack(tops)
    dist.all_reduce(together, op=dist.ReduceOp.MIN, group=group)
    return together[0] == together[1]
