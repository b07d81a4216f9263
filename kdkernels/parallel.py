"""Vocabulary-parallel loss: each rank of a process group holds the rows of the LM heads for its slice of the vocabulary.

Hidden states, targets and options are the same on every rank. For each chunk of tokens the ranks exchange their row statistics
in one collective, maxima and the sums taken relative to them together; each leaves the gradient of its own slice of the logits,
and dh is summed over ranks once a call, so that loss and dh are complete on every rank and dW is the gradient of the rank's own
rows.

Legend: N tokens, C tokens of a chunk, V_r valid ids of this rank, W ranks.
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


def local_shards(
    process_group: Any, **weights: Tensor | None
) -> tuple[dist.ProcessGroup | None, list[Tensor | None]]:
    """The group, and this rank's rows of each weight or bias, by its name.

    A DTensor counts as its local shard, and names the group where none is given; its gradient is a DTensor again.

    Raises:
        TypeError: a DTensor that is not sharded by rows over a one-dimensional mesh, one beside plain tensors without a
            process_group, or one of another group.
    """
    group = None if process_group is None else as_group(process_group)
    sharded = {name: x for name, x in weights.items() if hasattr(x, "placements")}
    for name, x in sharded.items():
        if x.device_mesh.ndim != 1 or not x.placements[0].is_shard(0):
            raise TypeError(
                f"{name}: expected a plain tensor, or a DTensor with placements (Shard(dim=0),) over a one-dimensional mesh, "
                f"got {tuple(x.placements)} over a mesh of {x.device_mesh.ndim} dimensions; x.full_tensor() gathers it"
            )
        own = x.device_mesh.get_group()
        if group is not None and dist.get_process_group_ranks(own) != dist.get_process_group_ranks(group):
            raise TypeError(
                f"{name}: expected a DTensor over the ranks of process_group, {dist.get_process_group_ranks(group)}, got one "
                f"over {dist.get_process_group_ranks(own)}"
            )
        group = own if group is None else group
    plain = [name for name, x in weights.items() if x is not None and name not in sharded]
    if sharded and plain and process_group is None:
        raise TypeError(
            f"{', '.join(plain)}: expected a DTensor beside the DTensor {next(iter(sharded))}, got a plain tensor; pass this "
            "rank's rows of it and process_group="
        )
    return group, [x.to_local() if name in sharded else x for name, x in weights.items()]


def vocabulary_rows(vocab: int, process_group: Any, *, rows: int | None = None) -> slice:
    """This rank's rows of an LM head: `vocab` ids cut into equal slices, as DTensor's Shard(0) cuts them.

    Student and teacher shards have to start at the same ids. Where their vocabularies differ in length, `vocab` is the
    student's for both and `rows` the length of the head that is cut: its last rank takes what is left.

        W_s[vocabulary_rows(len(W_s), group)],  W_t[vocabulary_rows(len(W_s), group, rows=len(W_t))]

    Raises ValueError for a `vocab` or `rows` below 1.
    """
    for name, value in (("vocab", vocab), ("rows", rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    group = as_group(process_group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = vocab if rows is None else rows
    each = -(-vocab // size)
    last = (vocab - 1) // each  # the last rank with rows of the student
    stop = (rank + 1) * each if rank < last else rows if rank == last else 0
    start = min(rank * each, rows)
    return slice(start, max(start, min(stop, rows)))


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
    """The row problem (see :mod:`kdkernels.ops.rows`) with every row spread over the ranks; eager PyTorch on the slices.

    One collective, of 8 C float64 a rank (17 C with statistics): each rank sends its maxima and its sums relative to them, and
    every rank merges what all have sent. The plausibility mask needs the teacher's maximum before, the jsd two sums after: one
    more each.
    """
    tau, rows = spec.temperature, student.shape[1]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    valid = torch.ones(rows, dtype=torch.bool, device=student.device) if target is None else target != spec.ignore_index

    def logits(x: Tensor, scale: float, softcap: float | None) -> Tensor:
        x = torch.where(valid[:, None], x[0, :, : spec.vocab].to(dtype), 0.0) * scale
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    s = logits(student, spec.student_scale, spec.student_softcap)
    need_teacher = spec.with_kd or want_stats
    a = t = None
    z = s.new_full(s.shape, -math.inf)
    if need_teacher:
        a = logits(audio, spec.teacher_scale, spec.teacher_softcap)
        t = None if text is None else logits(text, spec.teacher_scale, spec.teacher_softcap)
        z = contrastive_logits(a, t, alpha, None)
        if spec.plausibility is not None:
            best = _peak(a)
            dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
            z = z.masked_fill(a < (best + math.log(spec.plausibility))[:, None], -math.inf)

    # What this rank knows of its slice, relative to its own maxima.
    m_s, m_z = _peak(s), _peak(z)
    ds, dz = (s - m_s[:, None]) / tau, (z - m_z[:, None]) / tau
    e_s, e_z, e_1 = ds.exp(), dz.exp(), (ds * tau).exp()
    here, local, s_y = None, None, s.new_zeros(rows)
    if target is not None:
        here = (target >= first) & (target < first + spec.vocab)
        local = torch.where(here, target - first, 0)
        if spec.vocab:
            s_y = torch.where(here, s.gather(1, local[:, None])[:, 0], 0.0)
    mine = {
        "m_s": m_s,
        "m_z": m_z,
        "S_s": e_s.sum(-1),
        "S_1": e_1.sum(-1),
        "S_z": e_z.sum(-1),
        "X_z": _weighted_sum(e_z, dz - ds),
        "X_s": _weighted_sum(e_s, ds - dz),
        "s_y": s_y,
    }
    paths = want_stats and t is not None
    if want_stats:
        mine |= {"E_s": _weighted_sum(e_s, ds), "E_z": _weighted_sum(e_z, dz)}
        mine |= {"top_s": _first_top(s, first), "top_z": _first_top(z, first)}
    if paths:
        m_a, m_t = _peak(a), _peak(t)
        da, dt = (a - m_a[:, None]) / tau, (t - m_t[:, None]) / tau
        e_a = da.exp()
        mine |= {"m_a": m_a, "m_t": m_t, "S_a": e_a.sum(-1), "S_t": dt.exp().sum(-1), "X_a": _weighted_sum(e_a, da - dt)}
    ranks = _all_ranks(mine, group)  # of each: (W, C) float64

    # The rows as a whole: every sum moved to the maximum of all ranks.
    M_s, M_z = ranks["m_s"].amax(0), ranks["m_z"].amax(0)
    up_s, up_z = ((ranks[m] - M) / tau for m, M in (("m_s", M_s), ("m_z", M_z)))  # <= 0
    f_s, f_z, f_1 = up_s.exp(), up_z.exp(), (up_s * tau).exp()
    Ss, S1, Sz = ((f * ranks[name]).sum(0) for f, name in ((f_s, "S_s"), (f_1, "S_1"), (f_z, "S_z")))
    me = dist.get_rank(group)
    share_s, share_1, share_z = (
        torch.where(total > 0, f[me] / total, 0.0).to(dtype)[:, None] for f, total in ((f_s, Ss), (f_1, S1), (f_z, Sz))
    )

    taught = Sz > 0
    q = e_s * share_s
    p = e_z * share_z
    kd = Ss.new_zeros(rows)
    kd_grad = torch.zeros_like(s)
    if spec.with_kd:
        if spec.divergence == "forward_kl":
            cross = _moved(f_z, ranks["X_z"], ranks["S_z"], up_z - up_s)
            kd = torch.where(Ss > 0, cross / Sz - Sz.log() + Ss.log(), math.inf)
            kd_grad = torch.where(torch.isneginf(s), 0.0, q - p)
        elif spec.divergence == "reverse_kl":
            cross = _moved(f_s, ranks["X_s"], ranks["S_s"], up_s - up_z)
            kd = torch.where(Ss > 0, cross / Ss - Ss.log() + Sz.log(), 0.0)
            offset = (up_s - up_z)[me] + Sz.log() - Ss.log() - kd
            gap = torch.where(q > 0, ds - dz, 0.0) + offset.to(dtype)[:, None]
            kd_grad = torch.where(torch.isinf(kd)[:, None] | (q == 0), 0.0, q * gap)
        else:
            beta = spec.jsd_beta
            m = beta * p + (1 - beta) * q
            m = torch.where(m > 0, m, 1.0)  # also where the smallest p or q times its share is 0
            log_pm, log_qm = (torch.where(x > 0, torch.log(x / m), 0.0) for x in (p, q))
            totals = torch.stack([(p * log_pm).sum(-1), (q * log_qm).sum(-1)]).double()
            dist.all_reduce(totals, group=group)
            kd = beta * totals[0] + (1 - beta) * totals[1]
            kd_grad = (1 - beta) * q * (log_qm - totals[1].to(dtype)[:, None])
        bad_alpha = torch.zeros_like(taught) if text is None else ~((alpha >= 0) & torch.isfinite(alpha)).expand(rows)
        kd = torch.where(taught, tau**2 * torch.where(kd < 0, 0.0, kd), torch.where(torch.isnan(Sz), math.nan, 0.0))
        kd = torch.where(bad_alpha, math.nan, kd)
        kd_grad = torch.where(taught[:, None], tau * kd_grad, 0.0)
    ce = Ss.new_zeros(rows)
    s_y = ranks["s_y"].sum(0)  # 0 on all ranks but one
    if target is not None and spec.with_ce:
        ce = torch.where(torch.isneginf(s_y), math.inf, S1.log() + (M_s - s_y))
        ce = torch.where(ce < 0, 0.0, ce)
    if grad is not None:
        total = torch.where(kd_coef == 0, 0.0, kd_coef)[:, None] * kd_grad
        if target is not None and spec.with_ce:
            ce_grad = e_1 * share_1
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
        entropies = [
            torch.where(total > 0, total.log() - _moved(f, ranks[x], ranks[n], up) / total, 0.0)
            for total, f, x, n, up in ((Ss, f_s, "E_s", "S_s", up_s), (Sz, f_z, "E_z", "S_z", up_z))
        ]
        tops = [
            torch.where(ranks[m] == M, ranks[top], math.inf).amin(0)
            for m, M, top in (("m_s", M_s, "top_s"), ("m_z", M_z, "top_z"))
        ]
        between = Ss.new_zeros(rows)
        if paths:
            up_a, up_t = ((ranks[m] - ranks[m].amax(0)) / tau for m in ("m_a", "m_t"))
            Sa, St = ((up.exp() * ranks[n]).sum(0) for up, n in ((up_a, "S_a"), (up_t, "S_t")))
            cross = _moved(up_a.exp(), ranks["X_a"], ranks["S_a"], up_a - up_t)
            between = torch.where(Sa > 0, cross / Sa - Sa.log() + St.log(), 0.0).clamp_min(0.0)
        stats = torch.stack([*entropies, (tops[0] == tops[1]).to(between), between])
        stats = torch.where(valid, stats, 0.0).to(dtype)
    return RowResult(
        kd=torch.where(valid, kd, 0.0).to(dtype), ce=torch.where(valid, ce, 0.0).to(dtype), stats=stats
    )


def _peak(x: Tensor) -> Tensor:
    """Maximum of each row's slice, finite; (C,)."""
    return x.amax(-1).clamp_min(_FLOOR) if x.shape[1] else x.new_full(x.shape[:1], _FLOOR)


def _weighted_sum(e: Tensor, d: Tensor) -> Tensor:
    """sum_v e_v d_v with 0 * (anything) = 0; (C,)."""
    return torch.where(e > 0, e * d, 0.0).sum(-1)


def _first_top(x: Tensor, first: int) -> Tensor:
    """Id of the first maximum of each row's slice; (C,)."""
    return x.argmax(-1) + first if x.shape[1] else x.new_full(x.shape[:1], math.inf)


def _all_ranks(mine: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Each of `mine` (C,) from every rank, (W, C) float64: one collective."""
    together = torch.stack([x.double() for x in mine.values()])  # (K, C)
    every = together.new_empty(dist.get_world_size(group), *together.shape)
    dist.all_gather(list(every.unbind(0)), together, group=group)
    return dict(zip(mine, every.unbind(1), strict=True))


def _moved(factor: Tensor, weighted: Tensor, total: Tensor, shift: Tensor) -> Tensor:
    """sum over ranks of factor * (weighted + total * shift): of sums of e * d whose d move by `shift`; without mass: 0."""
    mass = factor * total > 0
    return torch.where(mass, factor * (weighted + torch.where(mass, total * shift, 0.0)), 0.0).sum(0)
