"""Vocabulary-parallel loss: each rank of a process group holds the rows of the LM heads for its slice of the vocabulary.

Hidden states, targets and options are the same on every rank. For each chunk of tokens the ranks exchange their row statistics
(maxima, and sums relative to them) in one collective. Each rank computes the gradient of its own slice of the logits, and dh is
summed over ranks once a call. So every rank has the whole loss and the whole dh, and dW is the gradient of the rank's own rows.

Legend: N tokens, C tokens of a chunk, V_r valid ids of this rank, W ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import is_dtensor
from .loss_options import LinearLossOptions
from .loss_terms import LossTerms
from .ops.linear import LinearResult, linear_caad_chunks
from .ops.reference import contrastive_logits
from .ops.rows import MASK_BELOW, LinearTensors, RowProblem, RowResult, RowSpec, row_launcher_of
from .ops.schema import (
    _scaled,
    all_stats,
    check_values,
    half_gain,
    refuse_second_derivative,
    weighted,
    without_gradients,
)

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


def local_heads(process_group: Any, heads: LinearTensors) -> tuple[dist.ProcessGroup, LinearTensors]:
    """The group, and the heads with this rank's rows of each weight and bias.

    A DTensor counts as its local shard, and its group is used if none is given. Its gradient is a DTensor again.

    Raises:
        TypeError: a DTensor that is not sharded by rows over a one-dimensional mesh, one beside plain tensors without a
            process_group, or one of another group.
    """
    group = None if process_group is None else as_group(process_group)
    names = ("student_weight", "teacher_weight", "student_bias", "teacher_bias")
    weights = {name: x for name in names if (x := getattr(heads, name)) is not None}
    sharded: dict[str, Any] = {name: x for name, x in weights.items() if is_dtensor(x)}
    for name, x in sharded.items():
        own = _group_of(name, x)
        if group is not None and dist.get_process_group_ranks(own) != dist.get_process_group_ranks(group):
            raise TypeError(
                f"{name}: expected a DTensor over the ranks of process_group, {dist.get_process_group_ranks(group)}, got one "
                f"over {dist.get_process_group_ranks(own)}"
            )
        group = own if group is None else group
    plain = [name for name in weights if name not in sharded]
    if sharded and plain and process_group is None:
        raise TypeError(
            f"{', '.join(plain)}: expected a DTensor beside the DTensor {next(iter(sharded))}, got a plain tensor; pass this "
            "rank's rows of it and process_group="
        )
    assert group is not None  # given, or named by a DTensor
    return group, heads._replace(**{name: x.to_local() for name, x in sharded.items()})


def _group_of(name: str, x: Any) -> dist.ProcessGroup:
    """The group of a DTensor that is sharded by rows."""
    if x.device_mesh.ndim != 1 or not x.placements[0].is_shard(0):
        raise TypeError(
            f"{name}: expected a plain tensor, or a DTensor with placements (Shard(dim=0),) over a one-dimensional mesh, "
            f"got {tuple(x.placements)} over a mesh of {x.device_mesh.ndim} dimensions; x.full_tensor() gathers it"
        )
    return x.device_mesh.get_group()


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


class _Shards(NamedTuple):
    """What the ranks compute a loss from beside its tensors."""

    spec: RowSpec  # vocab: V_r
    first: int  # first id of this rank
    group: dist.ProcessGroup
    chunking: tuple[torch.dtype, int | None, int | None]  # logits_dtype, chunk_tokens, workspace_bytes


def parallel_loss(
    terms: LossTerms, heads: LinearTensors, options: LinearLossOptions, group: dist.ProcessGroup, first: int
) -> tuple[Tensor, Tensor]:
    """(loss per token or reduced, statistics (6, N) where wanted) from this rank's shards; ``first``: its first id."""
    spec = terms.spec
    check_values(terms.target, terms.alpha, spec.vocab, spec.ignore_index)
    ids_here = min(max(spec.vocab - first, 0), heads.student_weight.shape[0], heads.teacher_weight.shape[0])
    shards = _Shards(dataclasses.replace(spec, vocab=ids_here), first, group, options.chunking)
    return VocabularyParallelCAAD.apply(
        *heads, terms.target, terms.alpha, terms.kd_coef, terms.ce_coef, shards, terms.reduced, options.return_stats
    )


class VocabularyParallelCAAD(torch.autograd.Function):
    """The fused linear loss over shards. Inputs 0 to 2 (hidden, weight, bias of the student) get gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """LinearTensors; target, alpha, kd_coef, ce_coef; shards, reduced, want_stats"""
        *tensors, shards, reduced, want_stats = inputs
        needs = ctx.needs_input_grad[:3]
        # A token's own factor reaches dW only inside the GEMM: then the backward runs the chunks.
        ctx.again = not reduced and (needs[1] or needs[2])
        out = _run(tensors, shards, (False,) * 3 if ctx.again else needs, want_stats)
        if ctx.again:
            # A teacher run under inference_mode gives tensors that autograd refuses to save.
            ctx.save_for_backward(*[x.clone() if x is not None and x.is_inference() else x for x in tensors])
            ctx.shards = shards
        else:
            ctx.save_for_backward(out.hidden_grad, out.weight_grad, out.bias_grad, out.gains)
        ctx.nothing = [None] * (len(inputs) - 3)
        loss = weighted(out.rows.kd, out.rows.ce, *tensors[-2:])
        loss = loss.sum() if reduced else loss
        stats = all_stats(out.rows) if want_stats else loss.new_empty(0)
        without_gradients(ctx, (stats,))
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _stats: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        if ctx.again:
            *tensors, kd_coef, ce_coef = ctx.saved_tensors
            scaled = (*tensors, kd_coef * grad_loss, ce_coef * grad_loss)
            out = _run(scaled, ctx.shards, ctx.needs_input_grad[:3], False)
            saved, gains, factor = (out.hidden_grad, out.weight_grad, out.bias_grad), out.gains, grad_loss.new_ones(())
        else:
            *saved, gains = ctx.saved_tensors
            factor = grad_loss
        factors = [factor] * 3 if gains is None else [factor / gain for gain in gains.unbind(0)]
        grads = [None if g is None else _scaled(g, f) for g, f in zip(saved, factors, strict=True)]
        return (*grads, *ctx.nothing)


def _run(tensors: Sequence[Any], shards: _Shards, grads: Sequence[bool], want_stats: bool) -> LinearResult:
    """``tensors``: LinearTensors, target, alpha, kd_coef, ce_coef."""
    heads, (target, alpha, kd_coef, ce_coef) = LinearTensors(*tensors[:7]), tensors[7:]
    logits_dtype, chunk_tokens, workspace_bytes = shards.chunking
    gain = half_gain(kd_coef, ce_coef, heads.student_hidden.dtype, heads.student_weight.dtype, logits_dtype)
    with torch.amp.autocast(heads.student_hidden.device.type, enabled=False):
        out = linear_caad_chunks(
            heads,
            target,
            alpha,
            kd_coef,
            ce_coef,
            shards.spec,
            rows=row_launcher_of(functools.partial(_solve_rows, group=shards.group, first=shards.first)),
            logits_dtype=logits_dtype,
            chunk_tokens=chunk_tokens,
            workspace_bytes=workspace_bytes,
            hidden_grad=grads[0],
            weight_grad=grads[1],
            bias_grad=grads[2],
            want_stats=want_stats,
            gain=gain,
        )
    if out.hidden_grad is not None:
        dist.all_reduce(out.hidden_grad, group=shards.group)
    return out


# -- rows over ranks -------------------------------------------------------------------------------------------------------


def _solve_rows(problem: RowProblem, *, group: dist.ProcessGroup, first: int) -> RowResult:
    """The row problem (see :mod:`kdkernels.ops.rows`) with every row spread over the ranks; eager PyTorch on the slices.

    ``problem``: logits (1, C, V_r), targets are global ids, ``spec.vocab`` is V_r.

    One collective, of 8 C float64 a rank (17 C with statistics): each rank sends its maxima and its sums relative to them, and
    every rank merges what all have sent. The plausibility mask needs the teacher's maximum before, the jsd two sums after: one
    more each.
    """
    here = _slice_of(problem, group, first)
    whole = _Whole.of(_all_ranks(here.summary(problem, first), group), problem.spec.temperature, dist.get_rank(group))
    kd, kd_grad = _kd_and_gradient(problem, here, whole, group)
    ce = _cross_entropy(problem, here, whole)
    if problem.grad is not None:
        gradient = _gradient(problem, here, whole, kd_grad)
        problem.grad[0, :, : problem.spec.vocab] = torch.where(here.valid[:, None], gradient, 0.0)
        problem.grad[0, :, problem.spec.vocab :] = 0
    stats = torch.where(here.valid, whole.stats(), 0.0).to(here.s.dtype) if problem.want_stats else None
    kd, ce = (torch.where(here.valid, x, 0.0).to(here.s.dtype) for x in (kd, ce))
    return RowResult(kd=kd, ce=ce, stats=stats)


@dataclass(frozen=True, eq=False)
class _Slice:
    """This rank's slice of the rows. Exponentials are relative to the slice's own maxima, at temperature tau.

    Without a teacher z is -inf throughout.
    """

    valid: Tensor  # (C,)
    s: Tensor  # (C, V_r) student
    z: Tensor  # (C, V_r) z_hat
    paths: tuple[Tensor, Tensor] | None  # z_audio and z_text
    s_max: Tensor  # (C,)
    z_max: Tensor
    ds: Tensor  # (C, V_r): (s - max s) / tau
    dz: Tensor
    q: Tensor  # (C, V_r): e^ds, without its sum
    q1: Tensor  # at temperature 1
    p: Tensor
    label_here: Tensor | None  # (C,) whether the target is in the slice
    label: Tensor | None  # (C,) its column, else 0

    def summary(self, problem: RowProblem, first: int) -> dict[str, Tensor]:
        """(C,) each: what the other ranks have to know of this slice."""
        label_logit = self.s.new_zeros(len(self.s))
        if self.label is not None and self.label_here is not None and problem.spec.vocab:
            label_logit = torch.where(self.label_here, self.s.gather(1, self.label[:, None])[:, 0], 0.0)
        told = {
            "s_max": self.s_max,
            "z_max": self.z_max,
            "q_sum": self.q.sum(-1),
            "q1_sum": self.q1.sum(-1),
            "p_sum": self.p.sum(-1),
            "p_cross": _weighted_sum(self.p, self.dz - self.ds),
            "q_cross": _weighted_sum(self.q, self.ds - self.dz),
            "label_logit": label_logit,
        }
        if problem.want_stats:
            told |= {"q_moment": _weighted_sum(self.q, self.ds), "p_moment": _weighted_sum(self.p, self.dz)}
            told |= {"s_top": _first_top(self.s, first), "z_top": _first_top(self.z, first)}
        if problem.want_stats and self.paths is not None:
            tau = problem.spec.temperature
            maxima = [_peak(x) for x in self.paths]
            da, dt = ((x - m[:, None]) / tau for x, m in zip(self.paths, maxima, strict=True))
            told |= {"audio_max": maxima[0], "text_max": maxima[1]}
            told |= {"audio_sum": da.exp().sum(-1), "text_sum": dt.exp().sum(-1)}
            told |= {"path_cross": _weighted_sum(da.exp(), da - dt)}
        return told


def _slice_of(problem: RowProblem, group: dist.ProcessGroup, first: int) -> _Slice:
    spec, target = problem.spec, problem.target
    dtype = torch.float64 if problem.student.dtype == torch.float64 else torch.float32
    valid = torch.ones(problem.rows, dtype=torch.bool, device=problem.student.device)
    valid = valid if target is None else target != spec.ignore_index

    def logits(x: Tensor, scale: float, softcap: float | None) -> Tensor:
        x = torch.where(valid[:, None], x[0, :, : spec.vocab].to(dtype), 0.0) * scale
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        return x.masked_fill(x < MASK_BELOW, -math.inf)

    s = logits(problem.student, spec.student_scale, spec.student_softcap)
    z, paths = s.new_full(s.shape, -math.inf), None
    if spec.with_kd or problem.want_stats:
        audio = logits(problem.audio, spec.teacher_scale, spec.teacher_softcap)
        text = None if problem.text is None else logits(problem.text, spec.teacher_scale, spec.teacher_softcap)
        paths = None if text is None else (audio, text)
        z = contrastive_logits(audio, text, problem.alpha, None)
        if spec.plausibility is not None:
            best = _peak(audio)
            dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
            z = z.masked_fill(audio < (best + spec.log_plausibility)[:, None], -math.inf)
    s_max, z_max = _peak(s), _peak(z)
    ds, dz = (s - s_max[:, None]) / spec.temperature, (z - z_max[:, None]) / spec.temperature
    label_here = label = None
    if target is not None:
        label_here = (target >= first) & (target < first + spec.vocab)
        label = torch.where(label_here, target - first, 0)
    q, q1, p = ds.exp(), (ds * spec.temperature).exp(), dz.exp()
    return _Slice(valid, s, z, paths, s_max, z_max, ds, dz, q, q1, p, label_here, label)


@dataclass(frozen=True, eq=False)
class _Whole:
    """The rows as a whole: every sum moved to the maximum of all ranks."""

    ranks: dict[str, Tensor]  # what each rank has told, (W, C) float64
    tau: float
    me: int
    s_max: Tensor  # (C,)
    z_max: Tensor
    s_shift: Tensor  # (W, C), <= 0: a rank's maximum less that of all, over tau
    z_shift: Tensor
    q_sum: Tensor  # (C,)
    q1_sum: Tensor
    p_sum: Tensor

    @classmethod
    def of(cls, ranks: dict[str, Tensor], tau: float, me: int) -> _Whole:
        s_max, z_max = ranks["s_max"].amax(0), ranks["z_max"].amax(0)
        s_shift, z_shift = (ranks["s_max"] - s_max) / tau, (ranks["z_max"] - z_max) / tau
        q_sum = (s_shift.exp() * ranks["q_sum"]).sum(0)
        q1_sum = ((s_shift * tau).exp() * ranks["q1_sum"]).sum(0)
        p_sum = (z_shift.exp() * ranks["p_sum"]).sum(0)
        return cls(ranks, tau, me, s_max, z_max, s_shift, z_shift, q_sum, q1_sum, p_sum)

    def share(self, shift: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
        """(C, 1): what turns this rank's exponentials into probabilities."""
        return torch.where(total > 0, shift[self.me].exp() / total, 0.0).to(dtype)[:, None]

    def forward_kl(self) -> Tensor:
        cross = _moved(self.z_shift.exp(), self.ranks["p_cross"], self.ranks["p_sum"], self.z_shift - self.s_shift)
        return torch.where(self.q_sum > 0, cross / self.p_sum - self.p_sum.log() + self.q_sum.log(), math.inf)

    def reverse_kl(self) -> Tensor:
        cross = _moved(self.s_shift.exp(), self.ranks["q_cross"], self.ranks["q_sum"], self.s_shift - self.z_shift)
        return torch.where(self.q_sum > 0, cross / self.q_sum - self.q_sum.log() + self.p_sum.log(), 0.0)

    def stats(self) -> Tensor:
        """The rows of STAT_NAMES, (4, C)."""
        ranks = self.ranks
        entropies = [
            torch.where(
                total > 0, total.log() - _moved(shift.exp(), ranks[f"{x}_moment"], ranks[f"{x}_sum"], shift) / total, 0.0
            )
            for total, shift, x in ((self.q_sum, self.s_shift, "q"), (self.p_sum, self.z_shift, "p"))
        ]
        tops = [
            torch.where(ranks[f"{x}_max"] == top, ranks[f"{x}_top"], math.inf).amin(0)
            for x, top in (("s", self.s_max), ("z", self.z_max))
        ]
        between = self._path_divergence() if "path_cross" in ranks else torch.zeros_like(self.q_sum)
        return torch.stack([*entropies, (tops[0] == tops[1]).to(between), between])

    def _path_divergence(self) -> Tensor:
        ranks = self.ranks
        audio_shift, text_shift = ((ranks[m] - ranks[m].amax(0)) / self.tau for m in ("audio_max", "text_max"))
        audio = (audio_shift.exp() * ranks["audio_sum"]).sum(0)
        text = (text_shift.exp() * ranks["text_sum"]).sum(0)
        cross = _moved(audio_shift.exp(), ranks["path_cross"], ranks["audio_sum"], audio_shift - text_shift)
        return torch.where(audio > 0, cross / audio - audio.log() + text.log(), 0.0).clamp_min(0.0)


def _kd_and_gradient(
    problem: RowProblem, here: _Slice, whole: _Whole, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """kd (C,) with its tau^2, and d kd / d s of the slice (C, V_r)."""
    spec, dtype, tau = problem.spec, here.s.dtype, problem.spec.temperature
    q_sum, p_sum = whole.q_sum, whole.p_sum
    if not spec.with_kd:
        return torch.zeros_like(q_sum), torch.zeros_like(here.s)
    q = here.q * whole.share(whole.s_shift, q_sum, dtype)
    p = here.p * whole.share(whole.z_shift, p_sum, dtype)
    if spec.divergence == "forward_kl":
        kd = whole.forward_kl()
        gradient = torch.where(torch.isneginf(here.s), 0.0, q - p)
    elif spec.divergence == "reverse_kl":
        kd = whole.reverse_kl()
        offset = (whole.s_shift - whole.z_shift)[whole.me] + p_sum.log() - q_sum.log() - kd
        gap = torch.where(q > 0, here.ds - here.dz, 0.0) + offset.to(dtype)[:, None]
        gradient = torch.where(torch.isinf(kd)[:, None] | (q == 0), 0.0, q * gap)
    else:
        beta = spec.jsd_beta
        m = beta * p + (1 - beta) * q
        m = torch.where(m > 0, m, 1.0)  # also where the smallest p or q times its share is 0
        log_pm, log_qm = (torch.where(x > 0, torch.log(x / m), 0.0) for x in (p, q))
        totals = torch.stack([(p * log_pm).sum(-1), (q * log_qm).sum(-1)]).double()
        dist.all_reduce(totals, group=group)
        kd = beta * totals[0] + (1 - beta) * totals[1]
        gradient = (1 - beta) * q * (log_qm - totals[1].to(dtype)[:, None])
    taught = p_sum > 0
    kd = torch.where(taught, tau**2 * torch.where(kd < 0, 0.0, kd), torch.where(torch.isnan(p_sum), math.nan, 0.0))
    if problem.text is not None:
        legal = (problem.alpha >= 0) & torch.isfinite(problem.alpha)
        kd = torch.where(legal, kd, math.nan)
    return kd, torch.where(taught[:, None], tau * gradient, 0.0)


def _cross_entropy(problem: RowProblem, here: _Slice, whole: _Whole) -> Tensor:
    """(C,)"""
    if not problem.with_ce:
        return torch.zeros_like(whole.q_sum)
    label_logit = whole.ranks["label_logit"].sum(0)  # 0 on all ranks but one
    ce = torch.where(torch.isneginf(label_logit), math.inf, whole.q1_sum.log() + (whole.s_max - label_logit))
    return torch.where(ce < 0, 0.0, ce)


def _gradient(problem: RowProblem, here: _Slice, whole: _Whole, kd_grad: Tensor) -> Tensor:
    """d loss / d what is stored of the student's logits, (C, V_r)."""
    spec, dtype = problem.spec, here.s.dtype
    kd_coef, ce_coef = problem.kd_coef[:, None], problem.ce_coef[:, None]
    total = torch.where(kd_coef == 0, 0.0, kd_coef * kd_grad)
    if problem.with_ce:
        ce_grad = here.q1 * whole.share(whole.s_shift * whole.tau, whole.q1_sum, dtype)
        if spec.vocab and here.label is not None and here.label_here is not None:
            hit = (here.label_here & ~torch.isneginf(whole.ranks["label_logit"].sum(0))).to(dtype)
            ce_grad.scatter_add_(1, here.label[:, None], -hit[:, None])
        total = total + torch.where(ce_coef == 0, 0.0, ce_coef * ce_grad)
    if spec.student_softcap is not None:
        total = torch.where(total == 0, 0.0, total * (1 - (here.s / spec.student_softcap) ** 2))
    return total * spec.student_scale


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
