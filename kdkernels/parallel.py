"""Vocabulary-parallel loss: each rank of a process group holds the rows of the LM heads for its slice of the vocabulary.

Hidden states, targets and options are the same on every rank. For each chunk of tokens the ranks exchange their row statistics
(maxima, and sums relative to them) in one collective. A chunk is as long as the rank with the least room allows. Each rank
computes the gradient of its own slice of the logits, and dh is summed over ranks once a call. So every rank has the whole loss
and the whole dh, and dW is the gradient of the rank's own rows.

The kernels before and after the exchange are those of :mod:`kdkernels.ops.shards`. All of a call, its collectives too, is one
operator, so torch.compile can trace it. Every rank has to run the same calls in the same order, compiled or not.

Legend: N tokens, C tokens of a chunk, V_r valid ids of this rank, W ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.distributed.distributed_c10d import _resolve_process_group

from .checks import is_dtensor
from .loss_terms import LossTerms, valid_ids
from .ops.chunking import ChunkPlan
from .ops.dispatch import shard_launcher
from .ops.linear import linear_caad_chunks
from .ops.rows import LinearTensors, RowProblem, RowResult, RowSpec, row_launcher_of
from .ops.schema import (
    READS_ON_HOST,
    LinearSettings,
    check_values,
    fake_linear_caad,
    half_gain,
    linear_results,
    refuse_transforms,
    register_linear_autograd,
)
from .ops.shards import STAT_SUMS, SUMS, ShardRows


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
    group: dist.ProcessGroup, student_rows: int, teacher_rows: int, student_hidden: Tensor
) -> tuple[int, int, int]:
    """(first id of this rank, V_s over all ranks, V_t over all ranks).

    Reads the sizes of all ranks back (one small exchange a call). Raises ValueError, on every rank alike, where student and
    teacher shards do not start at the same ids, or where the ranks have other numbers of tokens.
    """
    mine = torch.tensor([student_rows, teacher_rows, len(student_hidden)], dtype=torch.int64, device=student_hidden.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    told = [x.tolist() for x in every]
    tokens = [n for _, _, n in told]
    if len(set(tokens)) > 1:
        raise ValueError(f"student_hidden: expected the same tokens on every rank of process_group, got {tokens} of them")
    sizes = [(rows_s, rows_t) for rows_s, rows_t, _ in told]
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


def parallel_loss(
    terms: LossTerms, heads: LinearTensors, wanted: LinearSettings, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """(loss per token or reduced, statistics (6, N) where wanted) from this rank's shards.

    ``terms.spec.vocab``: vocab_size, or 0 where all ids of the shards are valid.
    """
    refuse_transforms(*heads[:3])
    loss, _, _, _, stats, _ = parallel_linear_caad(
        *heads, *terms[1:5], *terms.spec.packed(), group.group_name, *wanted.packed()
    )
    return loss, stats


@library.custom_op("kdkernels::parallel_linear_caad", mutates_args=(), **READS_ON_HOST)
def parallel_linear_caad(
    student_hidden: Tensor,  # (N, H_s)
    student_weight: Tensor,  # this rank's rows of (V_s, H_s)
    student_bias: Tensor | None,
    audio_hidden: Tensor,  # (N, H_t)
    text_hidden: Tensor | None,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    alpha: Tensor,
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec_whole: Sequence[int],  # RowSpec.packed()
    spec_numbers: Tensor,
    divergence: str,
    group_name: str,
    wanted_whole: Sequence[int],  # LinearSettings.packed()
    logits_dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As linear_caad, over the ranks of a process group."""
    resolve: Any = _resolve_process_group  # torch 2.13 gives names a type of their own
    group = resolve(group_name)
    student = (student_hidden, student_weight, student_bias)
    heads = LinearTensors(*student, audio_hidden, text_hidden, teacher_weight, teacher_bias)
    spec = RowSpec.unpacked(spec_whole, spec_numbers, divergence)
    wanted = LinearSettings.unpacked(wanted_whole, logits_dtype, impl)
    first, *widths = shard_range(group, student_weight.shape[0], teacher_weight.shape[0], student_hidden)
    vocab = valid_ids(spec.vocab or None, tuple(widths))
    check_values(target, alpha, vocab, spec.ignore_index)
    ids_here = min(max(vocab - first, 0), student_weight.shape[0], teacher_weight.shape[0])
    gain = None
    if wanted.any_grad:
        gain = half_gain(kd_coef, ce_coef, student_hidden.dtype, student_weight.dtype, logits_dtype)
    rows = functools.partial(_solve_rows, group=group, first=first, vocab=vocab, shard=shard_launcher(impl))
    with torch.amp.autocast(student_hidden.device.type, enabled=False):
        out = linear_caad_chunks(
            heads,
            target,
            alpha,
            kd_coef,
            ce_coef,
            dataclasses.replace(spec, vocab=ids_here),
            rows=row_launcher_of(rows),
            gain=gain,
            round_contrast=wanted.round_contrast,
            agree=functools.partial(_common_plan, group=group, device=student_hidden.device),
            **wanted.chunks,
        )
    if out.hidden_grad is not None:
        dist.all_reduce(out.hidden_grad, group=group)
    return linear_results(out, student, kd_coef, ce_coef, wanted.reduced)


parallel_linear_caad.register_fake(fake_linear_caad)
register_linear_autograd(parallel_linear_caad, tensors=len(LinearTensors._fields) + 4)


def _common_plan(planned: Callable[..., ChunkPlan], *, group: dist.ProcessGroup, device: torch.device) -> ChunkPlan:
    """The plan of the rank with the smallest chunks: all ranks make the same exchanges, whatever memory each has.

    Raises ValueError on every rank where one of them has no room for a token.
    """
    plan, failure = None, None
    try:
        plan = planned()
    except ValueError as error:
        failure = error
    size = torch.tensor(0 if plan is None else plan.chunk_tokens, device=device)
    dist.all_reduce(size, op=dist.ReduceOp.MIN, group=group)
    if failure is not None:
        raise failure
    if not (smallest := int(size)):
        raise ValueError("workspace_bytes: expected room for the logits of one token on every rank, got none on another")
    return planned(chunk_tokens=smallest)


# -- rows over ranks -------------------------------------------------------------------------------------------------------


def _solve_rows(
    problem: RowProblem,
    *,
    group: dist.ProcessGroup,
    first: int,
    vocab: int,
    shard: Callable[[RowProblem, int], ShardRows],
) -> RowResult:
    """The row problem (see :mod:`kdkernels.ops.rows`) with every row spread over the ranks, ``vocab`` ids in all.

    ``problem``: logits (1, C, V_r), targets are global ids, ``spec.vocab`` is V_r.

    One collective, of 7 C float64 a rank (16 C with statistics): each rank sends its maxima and its sums relative to them, and
    every rank merges what all have sent. The plausibility mask needs the teacher's maximum before, the jsd two sums after: one
    more each. Extra memory: O(C) a rank.
    """
    here, spec, target = shard(problem, first), problem.spec, problem.target
    audio_max = None
    if problem.masked:
        audio_max = here.audio_max()
        dist.all_reduce(audio_max, op=dist.ReduceOp.MAX, group=group)
    whole = _Whole.of(_all_ranks(here.sums(audio_max), group), spec.temperature, dist.get_rank(group))
    kd, centre = whole.divergence(problem, here, group)
    ce = whole.cross_entropy() if problem.with_ce else torch.zeros_like(kd)
    if problem.with_ce and target is not None:
        ce = torch.where((target >= 0) & (target < vocab), ce, math.nan)
    if spec.with_kd and problem.text is not None:
        kd = torch.where((problem.alpha >= 0) & torch.isfinite(problem.alpha), kd, math.nan)
    if problem.grad is not None:
        here.gradient(whole.factors(problem, kd, ce, centre))
    stats = whole.stats() if problem.want_stats else None
    if target is not None:
        valid = target != spec.ignore_index
        kd, ce = torch.where(valid, kd, 0.0), torch.where(valid, ce, 0.0)
        stats = None if stats is None else torch.where(valid, stats, 0.0)
    return RowResult(kd=spec.temperature**2 * kd.float(), ce=ce.float(), stats=None if stats is None else stats.float())


@dataclass(frozen=True, eq=False)
class _Whole:
    """The rows as a whole: every sum moved to the maximum of all ranks. All float64; a shift is <= 0."""

    ranks: dict[str, Tensor]  # what each rank has told, (W, C)
    tau: float
    me: int
    s_max: Tensor  # (C,), over tau like all that follows
    z_max: Tensor
    s_shift: Tensor  # (W, C): a rank's maximum less that of all
    z_shift: Tensor
    q_sum: Tensor  # (C,)
    q1_sum: Tensor
    p_sum: Tensor

    @classmethod
    def of(cls, ranks: dict[str, Tensor], tau: float, me: int) -> _Whole:
        s_max, z_max = ranks["s_max"].amax(0), ranks["z_max"].amax(0)
        s_shift, z_shift = ranks["s_max"] - s_max, ranks["z_max"] - z_max
        q_sum = (s_shift.exp() * ranks["q_sum"]).sum(0)
        q1_sum = ((s_shift * tau).exp() * ranks["q1_sum"]).sum(0)
        p_sum = (z_shift.exp() * ranks["p_sum"]).sum(0)
        return cls(ranks, tau, me, s_max, z_max, s_shift, z_shift, q_sum, q1_sum, p_sum)

    def share(self, shift: Tensor, total: Tensor) -> Tensor:
        """(C,): what turns this rank's exponentials into probabilities."""
        return torch.where(total == 0, 0.0, shift[self.me].exp() / total)

    def divergence(self, problem: RowProblem, here: ShardRows, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """(D(p, q) of the rows without tau^2, what the gradient is centred by: the last of FACTORS), (C,) each."""
        spec, q_sum, p_sum = problem.spec, self.q_sum, self.p_sum
        centre = torch.zeros_like(q_sum)
        if not spec.with_kd:
            return centre, centre
        if spec.divergence == "forward_kl":
            cross = _moved(self.z_shift.exp(), self.ranks["cross"], self.ranks["p_sum"], self.z_shift - self.s_shift)
            kd = torch.where(q_sum == 0, math.inf, cross / p_sum - p_sum.log() + q_sum.log())
        elif spec.divergence == "reverse_kl":
            cross = _moved(self.s_shift.exp(), self.ranks["cross"], self.ranks["q_sum"], self.s_shift - self.z_shift)
            kd = torch.where(q_sum == 0, 0.0, cross / q_sum - q_sum.log() + p_sum.log())
            centre = (self.s_shift - self.z_shift)[self.me] + p_sum.log() - q_sum.log() - kd
        else:
            shares = torch.stack([self.share(self.s_shift, q_sum), self.share(self.z_shift, p_sum)]).float()
            of_p, centre = _all_reduced(here.jsd_sums(shares), group).unbind(0)
            kd = spec.jsd_beta * of_p + (1 - spec.jsd_beta) * centre
        kd = torch.where(kd < 0, 0.0, kd)  # rounding; NaN stays
        return torch.where(p_sum == 0, 0.0, kd), centre

    def cross_entropy(self) -> Tensor:
        """(C,)"""
        label = self.ranks["label"].sum(0)  # 0 on all ranks but one
        ce = torch.where(torch.isneginf(label), math.inf, self.q1_sum.log() + (self.s_max - label) * self.tau)
        return torch.where(ce < 0, 0.0, ce)

    def factors(self, problem: RowProblem, kd: Tensor, ce: Tensor, centre: Tensor) -> Tensor:
        """FACTORS of this rank, (7, C) float32."""
        spec = problem.spec
        q_share, p_share = self.share(self.s_shift, self.q_sum), self.share(self.z_shift, self.p_sum)
        silent = (problem.kd_coef == 0) | (self.p_sum == 0)
        if spec.divergence != "forward_kl":
            silent |= torch.isinf(kd)
        of_kd = problem.kd_coef * self.tau * ((1 - spec.jsd_beta) if spec.divergence == "jsd" else 1.0)
        of_kd, of_ce = (
            torch.where(torch.isnan(d), math.nan, c) for d, c in ((kd, of_kd), (ce, problem.ce_coef.double()))
        )
        nothing = torch.zeros_like(kd)
        of_q, of_p = (
            torch.where(silent, 0.0, of_kd * share) if spec.with_kd else nothing for share in (q_share, p_share)
        )
        of_label = of_q1 = nothing
        if problem.with_ce:
            of_label = torch.where(problem.ce_coef == 0, 0.0, of_ce)
            of_q1 = torch.where(of_label == 0, 0.0, of_label * self.share(self.s_shift * self.tau, self.q1_sum))
        return torch.stack([q_share, p_share, of_q, of_p, of_q1, of_label, centre]).float()

    def stats(self) -> Tensor:
        """The rows of STAT_NAMES, (4, C)."""
        ranks = self.ranks
        entropies = [
            torch.where(
                total > 0,
                total.log() - _moved(shift.exp(), ranks[f"{x}_moment"], ranks[f"{x}_sum"], shift) / total,
                0.0,
            )
            for total, shift, x in ((self.q_sum, self.s_shift, "q"), (self.p_sum, self.z_shift, "p"))
        ]
        tops = [
            torch.where(ranks[f"{x}_max"] == top, ranks[f"{x}_top"], math.inf).amin(0)
            for x, top in (("s", self.s_max), ("z", self.z_max))
        ]
        return torch.stack([*entropies, (tops[0] == tops[1]).to(self.q_sum), self._path_divergence()])

    def _path_divergence(self) -> Tensor:
        ranks = self.ranks
        audio_shift, text_shift = (ranks[m] - ranks[m].amax(0) for m in ("audio_max", "text_max"))
        audio = (audio_shift.exp() * ranks["audio_sum"]).sum(0)
        text = (text_shift.exp() * ranks["text_sum"]).sum(0)
        cross = _moved(audio_shift.exp(), ranks["path_cross"], ranks["audio_sum"], audio_shift - text_shift)
        return torch.where(audio > 0, cross / audio - audio.log() + text.log(), 0.0).clamp_min(0.0)


def _all_ranks(mine: Tensor, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Each of SUMS (and STAT_SUMS) from every rank, (W, C): one collective."""
    every = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather(list(every.unbind(0)), mine, group=group)
    return dict(zip((*SUMS, *STAT_SUMS)[: len(mine)], every.unbind(1), strict=True))


def _all_reduced(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(mine, group=group)
    return mine


def _moved(factor: Tensor, weighted: Tensor, total: Tensor, shift: Tensor) -> Tensor:
    """sum over ranks of factor * (weighted + total * shift): of sums of e * d whose d move by `shift`; without mass: 0."""
    mass = factor * total > 0
    return torch.where(mass, factor * (weighted + torch.where(mass, total * shift, 0.0)), 0.0).sum(0)
