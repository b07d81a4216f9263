"""The fused linear loss in token chunks: GEMM, row kernel, GEMM. Scratch is that of one chunk for any number of tokens.

Per chunk of C tokens: GEMMs write the student's logits and the contrast of the teacher's logits into scratch. One row kernel
overwrites the student's logits with their gradient. One GEMM turns that into dh, and one into dW (accumulated in float32) if the
head trains.

Legend: N tokens, C tokens of a chunk, V valid ids, H_s / H_t hidden widths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .chunking import WITHOUT_LOGITS, ChunkPlan, plan_chunks, row_items
from .dispatch import gemm_sums_wanted
from .gemm import (
    VOCAB_BLOCK,
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
from .overlap import RowsBeside
from .rows import MASK_BELOW, STAT_NAMES, LinearTensors, RowLauncher, RowResult, RowSpec

if TYPE_CHECKING:
    from .triton_gemm_sums import SummedRows

_MaybeTensor = TypeVar("_MaybeTensor", Tensor, "Tensor | None")
# See student_chunks: chunk, student logits, scratch in the logits' dtype and in float32, gradient or None.
ChunkRows = Callable[[slice, Tensor, Tensor, Tensor, "Tensor | None"], RowResult]
# A planner of one rank, whose keyword chunk_tokens fixes the chunks -> the plan that all ranks have. The planner may raise.
Agree = Callable[[Callable[..., ChunkPlan]], ChunkPlan]


@dataclass(frozen=True)
class LinearResult:
    rows: RowResult
    hidden_grad: Tensor | None  # (N, H_s)
    weight_grad: Tensor | None  # (V_s, H_s)
    bias_grad: Tensor | None  # (V_s,)
    gains: Tensor | None = None  # (3,): by which the three gradients are too large; None: by nothing


@dataclass(frozen=True)
class TeacherHead:
    """A teacher in the chunk loop: what its logits are made of, and how.

    ``spec`` describes the logits of its own products; ``row_spec`` what :meth:`logits` leaves for the row kernel.
    """

    audio_hidden: Tensor  # (N, H_t)
    text_hidden: Tensor | None
    weight: Tensor  # (V_t, H_t)
    bias: Tensor | None
    alpha: Tensor  # (1,) or (N,)
    spec: RowSpec
    want_stats: bool
    logits_dtype: torch.dtype
    survivors: Callable[..., None] | None
    round_contrast: bool = False

    @property
    def collapse(self) -> bool:
        # Statistics compare the two paths, a softcap is not linear, plausibility looks at the audio path alone.
        linear = self.spec.teacher_softcap is None and self.spec.plausibility is None
        return self.text_hidden is not None and linear and not self.want_stats

    @property
    def at_survivors(self) -> bool:
        masked = self.spec.plausibility is not None and not self.want_stats
        masked = masked and self.logits_dtype != torch.float16  # z_hat could overflow
        return self.text_hidden is not None and masked and self.survivors is not None

    @property
    def two_paths(self) -> bool:
        return self.text_hidden is not None and not self.collapse and not self.at_survivors

    @property
    def row_spec(self) -> RowSpec:
        if not self.at_survivors:
            return self.spec
        return dataclasses.replace(self.spec, plausibility=None, teacher_scale=1.0, teacher_softcap=None)

    def pick(self, keep: Tensor | None) -> TeacherHead:
        """The same teacher at some of the tokens."""
        alpha = picked(keep, self.alpha) if self.alpha.numel() > 1 else self.alpha
        audio, text = picked(keep, self.audio_hidden), picked(keep, self.text_hidden)
        return dataclasses.replace(self, audio_hidden=audio, text_hidden=text, alpha=alpha)

    def alpha_of(self, chunk: slice) -> Tensor:
        return self.alpha[chunk] if self.alpha.numel() > 1 else self.alpha

    def logits(
        self, chunk: slice, labels: Tensor | None, scratch: Tensor, product: Callable[..., Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """A chunk's logits in ``scratch`` (1 + two_paths, C, V or more): (audio path or contrast, text path or None).

        ``product``: what takes the place of :func:`gemm` for the first of them.
        """
        vocab = self.spec.vocab
        w, b = self.weight[:vocab], None if self.bias is None else self.bias[:vocab]
        audio, alpha = self.audio_hidden[chunk], self.alpha_of(chunk)
        text = None if self.text_hidden is None else self.text_hidden[chunk]
        more: list[Tensor] = []
        if self.collapse and text is not None:
            dtype, summands = contrast_format(audio.dtype, w, scratch.dtype, rounded=self.round_contrast)
            audio, *more = contrastive_summands(audio, text, alpha, dtype, summands)
        audio_logits = (product or gemm)(audio, w, b, scratch[0, :, :vocab], *more)
        if self.at_survivors and self.survivors is not None:
            self.survivors(audio_logits, text, w, b, labels, alpha, self.spec)
        if text is None or not self.two_paths:
            return scratch[0], None
        gemm(text, w, b, scratch[1, :, :vocab])
        return scratch[0], scratch[1]


def linear_caad_chunks(
    heads: LinearTensors,
    target: Tensor | None,
    alpha: Tensor,
    kd_coef: Tensor,
    ce_coef: Tensor,
    spec: RowSpec,
    *,
    rows: RowLauncher,
    logits_dtype: torch.dtype,
    want_stats: bool,
    gain: Tensor | None = None,
    survivors: Callable[..., None] | None = None,
    round_contrast: bool = False,
    sums: SummedRows | None = None,
    beside: bool = False,
    **chunks: Any,
) -> LinearResult:
    """``gain``: a factor on the gradients inside (see half_gain); LinearResult.gains tells what is left of it.

    ``survivors`` (see :func:`contrast_at_survivors`) forms the contrast under a plausibility mask. None: both paths densely.
    ``sums``: products that leave the rows' sums, with their row kernel in place of ``rows``. ``beside``: see :mod:`.overlap`.
    ``chunks``: keywords of :func:`student_chunks`.
    """
    if sums is not None:
        rows = sums.rows
    launcher = RowsBeside(rows, heads.student_hidden.device) if beside else None
    rows = launcher or rows
    if gain is not None:
        kd_coef, ce_coef = kd_coef * gain, ce_coef * gain
    keep = kept_tokens(target, spec.ignore_index)
    target, kd_coef, ce_coef = picked(keep, target), picked(keep, kd_coef), picked(keep, ce_coef)
    counts = counted_tokens(target, spec.ignore_index, kd_coef, ce_coef)
    teacher = TeacherHead(*heads[3:], alpha, spec, want_stats, logits_dtype, survivors, round_contrast).pick(keep)
    need_teacher = spec.with_kd or want_stats

    def chunk_rows(
        chunk: slice, student_logits: Tensor, scratch: Tensor, _float32: Tensor, grad: Tensor | None
    ) -> RowResult:
        labels = None if target is None else target[chunk]
        audio_logits, text_logits = student_logits, None
        if need_teacher:
            product = None if sums is None else sums.teacher
            audio_logits, text_logits = teacher.logits(chunk, labels, scratch, product)
        return rows(
            student_logits[None],
            audio_logits[None],
            None if text_logits is None else text_logits[None],
            labels,
            teacher.alpha_of(chunk),
            kd_coef[chunk],
            ce_coef[chunk],
            teacher.row_spec,
            grad=None if grad is None else grad[None],
            want_stats=want_stats,
        )

    return student_chunks(
        *heads[:3],
        chunk_rows,
        keep=keep,
        counts=counts,
        vocab=spec.vocab,
        logits_dtype=logits_dtype,
        teacher_buffers=need_teacher * (1 + teacher.two_paths),
        n_stats=len(STAT_NAMES) if want_stats else 0,
        gain=gain,
        sums=sums,
        beside=launcher,
        **chunks,
    )


def student_chunks(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    chunk_rows: ChunkRows,
    *,
    keep: Tensor | None,
    counts: Tensor | None,
    vocab: int,
    logits_dtype: torch.dtype,
    teacher_buffers: int,
    float32_buffers: int = 0,
    n_stats: int,
    chunk_tokens: int | None,
    workspace_bytes: int | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    gain: Tensor | None,
    sums: SummedRows | None = None,
    beside: RowsBeside | None = None,
    agree: Agree | None = None,
) -> LinearResult:
    """The loop over chunks on the student's side: logits into scratch, ``chunk_rows``, then the GEMMs of the gradients.

    ``chunk_rows(chunk, student logits (C, R), scratch (teacher_buffers, C, R) in logits_dtype and (float32_buffers, C, R) in
    float32, grad (C, R) or None)`` fills ``grad``, which lies over the student's logits. R is :func:`row_items`; behind the V
    logits of a row anything may stand. ``keep``: the tokens that ``chunk`` indexes (see :func:`kept_tokens`). ``counts``: which
    of these count (see :func:`counted_tokens`). With ``beside`` two chunks are under way, in two sets of scratch, and the
    gradients of one come after the logits of the next. ``agree``: for ranks whose loops have to be alike.
    """
    device, n_total = student_hidden.device, student_hidden.shape[0]
    student_hidden = picked(keep, student_hidden)
    n = student_hidden.shape[0]
    buffers, items = 1 + teacher_buffers, row_items(vocab, device)
    sets = 1 if beside is None else beside.buffers
    bytes_per_token = (buffers * logits_dtype.itemsize + 4 * float32_buffers) * items
    bytes_per_token += 0 if sums is None else sums.bytes_per_token
    planned = functools.partial(
        plan_chunks,
        n_tokens=n,
        bytes_per_token=max(1, sets * bytes_per_token),
        student_width=student_hidden.shape[1],
        device=device,
        chunk_tokens=chunk_tokens,
        workspace_bytes=workspace_bytes,
    )
    plan = planned() if agree is None else agree(planned)
    shape = (min(plan.chunk_tokens, max(n, 1)), items)
    float32_bytes = 4 * float32_buffers * math.prod(shape)
    sets = min(sets, max(plan.chunks, 1))
    logits_bytes = sets * buffers * logits_dtype.itemsize * math.prod(shape)
    memory = take_scratch(float32_bytes + logits_bytes, device)
    totals = memory[:float32_bytes].view(torch.float32).view(float32_buffers, *shape)
    scratch = memory[float32_bytes : float32_bytes + logits_bytes].view(logits_dtype).view(sets, buffers, *shape)

    rows = RowResult.empty(n, n_stats, device)
    at_once = plan.chunks == 1 and gain is None and student_hidden.dtype == student_weight.dtype
    gradients = _Gradients.empty(student_hidden, student_weight, student_bias, hidden_grad, weight_grad, bias_grad, at_once)
    if gradients.weight is not None:
        gradients.weight[vocab if n else 0 :].zero_()  # what no product writes
    w_s, b_s = student_weight[:vocab], None if student_bias is None else student_bias[:vocab]

    def finish(chunk: slice, out: RowResult, grad: Tensor | None, done: Any) -> None:
        if beside is not None:
            beside.wait(done)
        rows.kd[chunk], rows.ce[chunk] = out.kd, out.ce
        if rows.stats is not None and out.stats is not None:
            rows.stats[:, chunk] = out.stats
        if grad is not None:
            gradients.add(chunk, grad[:, :vocab], student_hidden[chunk], w_s, None if counts is None else counts[chunk])

    unfinished: list[Callable[[], None]] = []
    with beside or contextlib.nullcontext():
        for number, start in enumerate(range(0, n, plan.chunk_tokens)):
            chunk = slice(start, min(start + plan.chunk_tokens, n))
            mine = scratch[number % sets, :, : chunk.stop - start]
            product = gemm if sums is None else sums.student
            student_logits = mine[0]  # (C, R)
            product(student_hidden[chunk], w_s, b_s, student_logits[:, :vocab])
            grad = gradient_view(student_logits, student_weight.dtype) if gradients.wanted else None
            out = chunk_rows(chunk, student_logits, mine[1:], totals[:, : chunk.stop - start], grad)
            unfinished.append(functools.partial(finish, chunk, out, grad, None if beside is None else beside.done))
            if len(unfinished) == sets:
                unfinished.pop(0)()
        for last in unfinished:
            last()

    return_scratch(memory)
    return LinearResult(spread_rows(rows, keep, n_total), *gradients.finished(keep, n_total, gain))


@dataclass(frozen=True, eq=False)
class _Gradients:
    """Gradients of the student's hidden states (C by C) and head (accumulated in float32); None: not wanted."""

    hidden: Tensor | None  # (N, H_s)
    weight: Tensor | None  # (V_s, H_s), see empty_weight_gradient
    bias: Tensor | None  # (V_s,) float32
    dtypes: tuple[torch.dtype, torch.dtype]  # of weight and bias

    @classmethod
    def empty(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        hidden_grad: bool,
        weight_grad: bool,
        bias_grad: bool,
        at_once: bool,
    ) -> _Gradients:
        """``at_once``: all tokens are in one chunk, and the states have the weight's dtype."""
        return cls(
            torch.empty_like(hidden, memory_format=torch.contiguous_format) if hidden_grad else None,
            empty_weight_gradient(weight, at_once=at_once) if weight_grad else None,
            torch.zeros(weight.shape[0], dtype=torch.float32, device=hidden.device) if bias_grad else None,
            (weight.dtype, weight.dtype if bias is None else bias.dtype),
        )

    @property
    def wanted(self) -> bool:
        return any(x is not None for x in (self.hidden, self.weight, self.bias))

    def add(self, chunk: slice, grad: Tensor, hidden: Tensor, weight: Tensor, counts: Tensor | None) -> None:
        """Adds one chunk's gradients. ``grad`` is that of its logits (C, V); its rows are 0 for tokens that do not count."""
        vocab = weight.shape[0]
        if self.hidden is not None:
            hidden_gradient(grad, weight, self.hidden[chunk])
        if self.weight is not None:
            hidden = rows_that_count(hidden, counts)
            add_weight_gradient(self.weight[:vocab], grad, hidden, accumulate=chunk.start > 0)
        if self.bias is not None:
            self.bias[:vocab] += grad.sum(0, dtype=torch.float32)

    def finished(
        self, keep: Tensor | None, n_total: int, gain: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of all tokens in their dtypes, and LinearResult.gains."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden is not None and keep is not None:
            hidden = spread(hidden, keep, n_total, 0)
        gains = None
        if gain is not None:
            # Before they are rounded.
            of_head = [_fit_half(x, gain, dtype) for x, dtype in zip((weight, bias), self.dtypes, strict=True)]
            gains = torch.stack([gain, *of_head])
        return (
            hidden,
            None if weight is None else finish_weight_gradient(weight, self.dtypes[0]),
            None if bias is None else bias.to(self.dtypes[1]),
            gains,
        )


def _fit_half(total: Tensor | None, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies ``total``, which is too large by ``gain``, by a power of two. Returns the factor by which it is then too large.

    For float16 its largest item comes to lie between 2^13 and 2^14: the gain that fits one token could make a sum over many
    overflow. For other dtypes nothing is left of the gain.
    """
    if total is None:
        return torch.ones_like(gain)
    if dtype != torch.float16:
        total.div_(gain)
        return torch.ones_like(gain)
    largest = total.abs().amax()
    fits = torch.isfinite(largest) & (largest > 0)
    # No more than 2^100 in all: the factor has to stay a float32.
    exponent = (14 - torch.frexp(torch.where(fits, largest, 1.0)).exponent).clamp(max=60)
    shift = torch.ldexp(torch.ones_like(gain), exponent)
    total.mul_(shift)
    return gain * shift


def spread_rows(rows: RowResult, keep: Tensor | None, n_total: int) -> RowResult:
    """The kept tokens' results among all tokens, 0 elsewhere."""
    if keep is None:
        return rows
    stats = None if rows.stats is None else spread(rows.stats, keep, n_total, 1)
    return RowResult(spread(rows.kd, keep, n_total, 0), spread(rows.ce, keep, n_total, 0), stats)


def kept_tokens(target: Tensor | None, ignore_index: int) -> Tensor | None:
    """Indices of the valid tokens, or None for all of them. On the CPU only: elsewhere their number would need a sync."""
    if target is None or target.device.type != "cpu":
        return None
    valid = target != ignore_index
    return None if bool(valid.all()) else valid.nonzero()[:, 0]


def counted_tokens(
    target: Tensor | None, ignore_index: int, kd_coef: Tensor, ce_coef: Tensor
) -> Tensor | None:
    """(N,) bool: False where a token is ignored or neither of its terms has a factor. None: all count (known on the CPU only).

    A kernel leaves a gradient of 0 at such a token, but its hidden states may be NaN, and 0 * NaN would reach dW.
    """
    counts = (kd_coef != 0) | (ce_coef != 0)
    if target is not None:
        counts &= target != ignore_index
    return None if counts.device.type == "cpu" and bool(counts.all()) else counts


def rows_that_count(hidden: Tensor, counts: Tensor | None) -> Tensor:
    """hidden (C, H) with zeros where ``counts`` (C,) is False; None stands for all."""
    return hidden if counts is None else hidden.masked_fill(~counts[:, None], 0.0)


def picked(keep: Tensor | None, x: _MaybeTensor, dim: int = 0) -> _MaybeTensor:
    """The kept tokens of x; ``keep`` None stands for all."""
    return x if x is None or keep is None else x.index_select(dim, keep)


# Share of the vocabulary that survives at some token of the chunk. Above it, gathering those weights costs more than it saves:
# both ways take the same time at 0.6 on one core (bf16, chunks of 256, H_t 1024).
DENSE_SHARE = 0.5


def survivors_launcher(impl: str) -> Callable[..., None] | None:
    """The implementation of :func:`contrast_at_survivors`; None where there is none (a CUDA device without Triton)."""
    if impl == "cpu":
        return contrast_at_survivors
    try:
        return importlib.import_module(".triton_survivors", __package__).contrast_at_survivors
    except ImportError:
        return None


def summed_rows_for(
    impl: str,
    heads: LinearTensors,
    target: Tensor | None,
    spec: RowSpec,
    logits_dtype: torch.dtype,
    want_stats: bool,
    buffers: int,
) -> SummedRows | None:
    """The products that leave the rows' sums, for a call with a gradient; None where they are not asked for, or do not fit."""
    if not gemm_sums_wanted() or impl not in WITHOUT_LOGITS:
        return None
    with_ce = spec.with_ce and target is not None
    make = importlib.import_module(".triton_gemm_sums", __package__).summed_rows
    return make(heads, spec, logits_dtype, with_ce=with_ce, want_stats=want_stats, buffers=buffers)


def contrast_at_survivors(
    audio_logits: Tensor,  # (C, V)
    text_hidden: Tensor,  # (C, H_t)
    weight: Tensor,  # (V, H_t)
    bias: Tensor | None,
    target: Tensor | None,
    alpha: Tensor,
    spec: RowSpec,
) -> None:
    """z_audio becomes z_hat in place, on the CPU: z_text = h_text W_t^T + b_t only at ids that some token of the chunk keeps.

    ``spec``'s teacher scale and softcap are applied; what plausibility drops becomes -inf. Where the chunk keeps more than
    DENSE_SHARE of the vocabulary, the weights are not gathered but read as they are, a block at a time. Extra memory: C * V bytes
    for the mask, and one block of VOCAB_BLOCK ids.
    """
    _as_logits(audio_logits, spec)
    threshold = audio_logits.amax(1).float().clamp_min_(MASK_BELOW) + spec.log_plausibility
    dropped = audio_logits < threshold[:, None]
    unread = alpha[:, None] == 0  # the text path is not read there
    ids = (dropped | unread).all(0).logical_not_().nonzero()[:, 0]
    vocab = audio_logits.shape[1]
    gather = ids.numel() <= DENSE_SHARE * vocab
    for start in range(0, ids.numel() if gather else vocab, VOCAB_BLOCK):
        block = ids[start : start + VOCAB_BLOCK] if gather else slice(start, min(start + VOCAB_BLOCK, vocab))
        w, audio = weight[block], audio_logits[:, block]
        text = torch.empty(audio.shape, dtype=audio.dtype, device=audio.device)
        _as_logits(gemm(text_hidden, w, None if bias is None else bias[block], text), spec)
        contrast = torch.where(text < MASK_BELOW, -math.inf, audio + alpha[:, None] * (audio - text))
        audio_logits[:, block] = torch.where(unread, audio, contrast).to(audio.dtype)
    audio_logits.masked_fill_(dropped, -math.inf)


def _as_logits(stored: Tensor, spec: RowSpec) -> Tensor:
    """The teacher's scale and softcap, in place."""
    if spec.teacher_scale != 1.0:
        stored.mul_(spec.teacher_scale)
    return (
        stored if spec.teacher_softcap is None else stored.div_(spec.teacher_softcap).tanh_().mul_(spec.teacher_softcap)
    )
