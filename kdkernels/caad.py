"""The contrastive audio-aware distillation losses: public signatures, validation, dispatch. No kernel code here.

Legend: ... leading dimensions (their product is N tokens), V_s / V_t vocabulary widths of student and teacher, V valid ids,
H_s / H_t hidden widths.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import reference as _reference
from .ops import schema as _schema
from .ops.dispatch import IMPLEMENTATIONS, checks_enabled, choose, logger
from .ops.rows import DIVERGENCES, RowResult, RowSpec

REDUCTIONS = ("mean", "sum", "none")


class CAADStats(NamedTuple):
    """Detached per-token statistics, each float32 of the targets' leading shape, 0 at ignored positions.

    kd               tau^2 D(p, q), unweighted
    ce               -log softmax(s)[y], unweighted (0 without a target)
    student_entropy  of q = softmax(s / tau), in nats
    teacher_entropy  of p = softmax(z_hat / tau), in nats
    top1_agreement   1 where argmax s == argmax z_hat, else 0
    path_divergence  KL(softmax(z_audio / tau) || softmax(z_text / tau)) in nats: how much the sound changes the teacher's
                     answer; 0 without a text path
    """

    kd: Tensor
    ce: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    path_divergence: Tensor


def fused_caad_loss(
    student_logits: Tensor,
    teacher_audio_logits: Tensor,
    teacher_text_logits: Tensor | None,
    target: Tensor | None = None,
    *,
    alpha: float | Tensor = 2.0,
    temperature: float = 2.0,
    kd_weight: float = 0.7,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    plausibility: float | None = None,
    ignore_index: int = -100,
    kd_token_weight: Tensor | None = None,
    ce_token_weight: Tensor | None = None,
    kd_normalizer: float | Tensor | None = None,
    ce_normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    impl: str = "auto",
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CAADStats]:
    r"""Contrastive audio-aware distillation loss from logits, one fused pass, no distribution held.

    ::

        z_hat = (1 + alpha) z_audio - alpha z_text
        p = softmax(z_hat / tau),  q = softmax(s / tau),  q1 = softmax(s)
        kd_i = tau^2 D(p, q)       D: KL(p || q) forward_kl, KL(q || p) reverse_kl, or jsd
        ce_i = -log q1[target_i]
        loss = kd_weight sum_i w_i kd_i / norm_kd + (1 - kd_weight) sum_i u_i ce_i / norm_ce

    No shift is applied: row i of the logits is scored against ``target[i]``.

    Args:
        student_logits: (..., V_s) float32, bfloat16 or float16 (float64 with impl="reference"); any strides.
        teacher_audio_logits: (..., V_t), the positive path; its dtype may differ from the student's. Never gets a gradient.
        teacher_text_logits: (..., V_t), the negative path, or None: plain distillation from the audio path.
        target: (...) int64 pseudo-ground-truth ids, or None: no CE term, ``kd_weight`` counts as 1, every position is valid.
        alpha: contrast strength >= 0; a number, or a tensor (...) per token. Where it is 0 the text path is not read.
        temperature: tau > 0 of the distillation term; the CE term has temperature 1.
        kd_weight: lambda in [0, 1].
        divergence: "forward_kl", "reverse_kl" or "jsd".
        jsd_beta: beta in (0, 1); m = beta p + (1 - beta) q, jsd = beta KL(p || m) + (1 - beta) KL(q || m).
        plausibility: beta in (0, 1]; only tokens with z_audio_v >= max z_audio + log beta keep a probability in p.
        ignore_index: positions with this target count nowhere; their logits are not read.
        kd_token_weight, ce_token_weight: (...) weights >= 0 of each term, or None: 1.
        kd_normalizer, ce_normalizer: divisors instead of the default (gradient accumulation, data parallel): pass the sum of
            weights (or number of valid positions) of the whole step. They divide under every reduction; 0 gives loss 0.
        reduction: "mean" divides each term by its sum of weights over valid positions; "sum" by 1; "none" returns (...).
        vocab_size: number of valid ids; default min(V_s, V_t). Logits beyond it count as -inf on both sides.
        impl: "auto", "reference", "cpu", "triton" or "cuda"; an explicit choice never falls back.
        inplace: allow the gradient to overwrite ``student_logits``' memory (eager only; ignored under torch.compile and by
            impl="reference", and for logits whose rows share memory or are not contiguous). Another use of the logits in the
            same graph is then an error.
        return_stats: also return :class:`CAADStats`.

    Returns:
        float32 loss (float64 for float64 inputs): () or, with reduction="none", (...); with ``return_stats`` a pair. Without a
        valid position it is 0 with zero gradients.

    -inf logits are legal: probability, contribution and gradient 0. A token masked on either teacher path has p = 0.
    forward_kl with p_v > 0 where the student has -inf is +inf, never NaN; so is reverse_kl where q_v > 0 meets p_v = 0, and then
    that token's distillation term has no gradient.

    Computes in float32 registers (float64 for the sums of a row on the CPU). Extra memory: the gradient, N * V_s items of the
    student's dtype (none with ``inplace``, none without a gradient), and on the CPU 12 bytes per vocabulary entry and thread.
    The gradient is made in the forward; the backward scales it. Second derivatives and torch.func transforms are not available
    (impl="reference" has both): a backward with create_graph=True is a RuntimeError.

    Raises:
        ValueError, TypeError: naming the argument, expected and got. On the CPU also for a target outside [0, vocab) or a bad
            alpha; on CUDA such a row's loss is NaN, unless KDKERNELS_CHECK=1.
        RuntimeError: where ``impl`` names something that is not installed.

    Source: CAAD, arXiv 2606.23052; generalised JSD as in GKD, arXiv 2306.13649; plausibility as in contrastive decoding,
    arXiv 2210.15097.
    """
    _check_tensor("student_logits", student_logits, floating=True)
    _check_tensor("teacher_audio_logits", teacher_audio_logits, floating=True)
    if student_logits.dim() < 1:
        raise ValueError("student_logits: expected (..., vocabulary), got a scalar")
    leading = student_logits.shape[:-1]
    _check_leading("teacher_audio_logits", teacher_audio_logits, leading, "student_logits")
    _check_device("teacher_audio_logits", teacher_audio_logits, student_logits)
    if teacher_text_logits is not None:
        _check_tensor("teacher_text_logits", teacher_text_logits, floating=True)
        _check_shape("teacher_text_logits", teacher_text_logits, teacher_audio_logits.shape)
        _check_device("teacher_text_logits", teacher_text_logits, student_logits)
    dtypes = [x.dtype for x in (student_logits, teacher_audio_logits, teacher_text_logits) if x is not None]
    terms = _Terms.build(
        leading=leading,
        device=student_logits.device,
        dtype=_accumulation_dtype(dtypes),
        widths=(student_logits.shape[-1], teacher_audio_logits.shape[-1]),
        has_text=teacher_text_logits is not None,
        target=target,
        alpha=alpha,
        temperature=temperature,
        kd_weight=kd_weight,
        divergence=divergence,
        jsd_beta=jsd_beta,
        plausibility=plausibility,
        ignore_index=ignore_index,
        kd_token_weight=kd_token_weight,
        ce_token_weight=ce_token_weight,
        kd_normalizer=kd_normalizer,
        ce_normalizer=ce_normalizer,
        reduction=reduction,
        vocab_size=vocab_size,
        want_stats=return_stats,
    )
    chosen = _choose(impl, student_logits.device, dtypes, "fused_caad_loss")
    audio = teacher_audio_logits.detach()
    text = None if teacher_text_logits is None else teacher_text_logits.detach()
    if chosen == "reference":
        result = _reference.caad_rows(
            student_logits, audio, text, terms.target, terms.alpha, terms.spec, want_stats=return_stats
        )
        return terms.finish(*terms.weigh_reference(result, return_stats), return_stats)
    student = _three_dimensional(student_logits)
    audio = _three_dimensional(audio)
    text = None if text is None else _three_dimensional(text)
    want_grad = student_logits.requires_grad and torch.is_grad_enabled()
    spec = terms.spec
    tail = (audio, text, terms.target, terms.alpha, terms.kd_coef, terms.ce_coef)
    if inplace and want_grad and not torch.compiler.is_compiling() and _rows_are_apart(student):
        loss, stats = _schema.InPlaceRows.apply(student, *tail, spec, return_stats, chosen)
    else:
        loss, _, stats, _ = _schema.caad_rows(
            student, *tail, spec.vocab, spec.temperature, spec.divergence, spec.jsd_beta, spec.plausibility,
            spec.ignore_index, spec.with_kd, spec.with_ce, want_grad, return_stats, chosen,
        )  # fmt: skip
    return terms.finish(loss, stats, return_stats)


def fused_linear_caad_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_audio_hidden: Tensor,
    teacher_text_hidden: Tensor | None,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    process_group: Any = None,
    alpha: float | Tensor = 2.0,
    temperature: float = 2.0,
    kd_weight: float = 0.7,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    plausibility: float | None = None,
    ignore_index: int = -100,
    kd_token_weight: Tensor | None = None,
    ce_token_weight: Tensor | None = None,
    kd_normalizer: float | Tensor | None = None,
    ce_normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    impl: str = "auto",
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CAADStats]:
    r"""The same loss from hidden states and LM heads, in token chunks: logits exist for one chunk at a time.

    ::

        s       = cap_s(scale_s (h_s W_s^T + b_s)),   cap(x) = softcap tanh(x / softcap), or x
        z_audio = cap_t(scale_t (h_audio W_t^T + b_t)),   z_text likewise
        loss    = fused_caad_loss(s, z_audio, z_text, target, ...)

    With neither ``teacher_softcap`` nor ``plausibility`` nor ``return_stats`` the two teacher paths collapse into one GEMM:
    z_hat = scale_t (W_t ((1 + alpha) h_audio - alpha h_text) + b_t), for per-token alpha too. With ``plausibility`` z_text is
    formed only at tokens that survive it (densely where those are many).

    Without a gradient (torch.no_grad, or no input of the student's requires one) impl="triton" forms no logits at all: both
    heads' GEMMs carry the online softmax in their epilogue, with a few tens of MiB of scratch whatever N and V. Not so for the
    jsd, ``return_stats`` and a given ``chunk_tokens``, which run in chunks. ``kdkernels.explain`` says which path a call takes.

    Args:
        student_hidden: (..., H_s) float32, bfloat16 or float16: the LM head's inputs at the positions that predict ``target``.
        student_weight: (V_s, H_s). Its gradient is computed only if it requires one; a frozen head costs nothing. A LoRA on the
            head is honoured by passing the merged weight, W + B A.
        teacher_audio_hidden, teacher_text_hidden: (..., H_t); the second None: plain distillation. Never get a gradient.
        teacher_weight: (V_t, H_t), no gradient.
        target: (...) int64, or None (see :func:`fused_caad_loss`). On the CPU ignored positions are left out of the GEMMs.
        student_bias, teacher_bias: (V_s,), (V_t,) or None.
        student_softcap, teacher_softcap: > 0, as in Gemma 2; applied after the scale. None: none.
        student_logit_scale, teacher_logit_scale: factors on the logits (Cohere; 1 / logits_scaling for Granite).
        chunk_tokens: tokens a chunk; None: from ``workspace_bytes`` and what fills the machine.
        workspace_bytes: bound on the scratch for logits; None: 512 MiB on the CPU; on CUDA a tenth of free memory, at most 2 GiB.
            A chunk holds at least one token's logits, a call without logits at least one tile of 64 or 128 tokens.
        logits_dtype: dtype in which a chunk's logits are stored; None: float32. bfloat16 is faster and coarser (gradient error
            2-5%, far more near convergence, against 0.6%).
        process_group: a ProcessGroup or one-dimensional DeviceMesh: vocabulary-parallel. Weights and biases are then this rank's
            rows of the vocabulary, in rank order, student and teacher shards starting at the same ids (uneven sizes are fine;
            ``kdkernels.parallel.vocabulary_rows`` cuts them), or DTensors with placements (Shard(0),), which need no
            process_group and whose gradients are DTensors; everything else is the same on every rank. Loss and
            student_hidden's gradient come out complete on every rank. Eager row arithmetic (about 8 float32 tensors of a
            chunk), impl="auto" or "reference", not under torch.compile.
        inplace: accepted for symmetry; nothing of the caller's memory is overwritten here.
        The rest: as in :func:`fused_caad_loss`.

    Returns:
        As :func:`fused_caad_loss`. Gradients reach student_hidden, student_weight and student_bias only.

    dW is accumulated in float32. With reduction="none" and a training head the backward runs the chunks a second time, since a
    token's own grad_output reaches dW only inside the GEMM. Extra memory: one chunk of logits (2 tensors; 3 with
    ``teacher_softcap`` and no ``plausibility``, or with ``return_stats``), N * H_s items for dh, V_s * H_s float32 for dW where
    the head trains, and on the CPU, for float32 logits of low-precision weights, one float32 block of 4096 weight rows:
    independent of N but for dh.
    On the CPU up to 512 MiB of that scratch stay with the process for the next call.

    Raises:
        As :func:`fused_caad_loss`.

    Source: CAAD, arXiv 2606.23052; token chunks as in Liger Kernel, arXiv 2410.10989.
    """
    group = None
    if process_group is not None or any(_is_dtensor(x) for x in (student_weight, teacher_weight, student_bias, teacher_bias)):
        from . import parallel

        group, (student_weight, teacher_weight, student_bias, teacher_bias) = parallel.local_shards(
            process_group,
            student_weight=student_weight,
            teacher_weight=teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
        )
    empty = group is not None  # a rank may hold no rows
    _check_head("student_{}", student_hidden, student_weight, student_bias, student_hidden, empty=empty)
    _check_head("teacher_{}", teacher_audio_hidden, teacher_weight, teacher_bias, student_hidden, "audio_hidden", empty=empty)
    _check_head_options("student_{}", student_softcap, student_logit_scale)
    _check_head_options("teacher_{}", teacher_softcap, teacher_logit_scale)
    leading = student_hidden.shape[:-1]
    _check_leading("teacher_audio_hidden", teacher_audio_hidden, leading, "student_hidden")
    _check_text_hidden("teacher_text_hidden", teacher_text_hidden, teacher_audio_hidden)
    _check_chunks(chunk_tokens, workspace_bytes, logits_dtype)
    teacher = (teacher_audio_hidden, teacher_text_hidden, teacher_weight, teacher_bias)
    dtypes = [x.dtype for x in (student_hidden, student_weight, student_bias, *teacher) if x is not None]

    first, widths = 0, (student_weight.shape[0], teacher_weight.shape[0])
    if group is not None:
        first, *widths = parallel.shard_range(group, *widths, student_hidden.device)
    terms = _Terms.build(
        leading=leading,
        device=student_hidden.device,
        dtype=_accumulation_dtype(dtypes),
        widths=tuple(widths),
        has_text=teacher_text_hidden is not None,
        target=target,
        alpha=alpha,
        temperature=temperature,
        kd_weight=kd_weight,
        divergence=divergence,
        jsd_beta=jsd_beta,
        plausibility=plausibility,
        ignore_index=ignore_index,
        kd_token_weight=kd_token_weight,
        ce_token_weight=ce_token_weight,
        kd_normalizer=kd_normalizer,
        ce_normalizer=ce_normalizer,
        reduction=reduction,
        vocab_size=vocab_size,
        want_stats=return_stats,
        student_scale=float(student_logit_scale),
        teacher_scale=float(teacher_logit_scale),
        student_softcap=None if student_softcap is None else float(student_softcap),
        teacher_softcap=None if teacher_softcap is None else float(teacher_softcap),
    )
    if group is not None and impl not in ("auto", "reference"):
        raise ValueError(
            f"impl: expected 'auto' or 'reference' with a process_group (its rows are eager PyTorch), got {impl!r}"
        )
    chosen = _choose(impl, student_hidden.device, dtypes, "fused_linear_caad_loss")
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    audio = teacher_audio_hidden.detach().reshape(-1, teacher_audio_hidden.shape[-1])
    text = None if teacher_text_hidden is None else teacher_text_hidden.detach().reshape(audio.shape)
    teacher_weight = teacher_weight.detach()
    teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    logits_dtype = torch.float32 if logits_dtype is None else logits_dtype
    if group is not None:
        _schema.check_values(terms.target, terms.alpha, terms.spec.vocab, ignore_index)
        ids_here = min(max(terms.spec.vocab - first, 0), student_weight.shape[0], teacher_weight.shape[0])
        settings = {"logits_dtype": logits_dtype, "chunk_tokens": chunk_tokens, "workspace_bytes": workspace_bytes}
        loss, stats = parallel.VocabularyParallelCAAD.apply(
            hidden, student_weight, student_bias, audio, text, teacher_weight, teacher_bias, terms.target, terms.alpha,
            terms.kd_coef, terms.ce_coef, dataclasses.replace(terms.spec, vocab=ids_here), first, group,
            reduction != "none", return_stats, settings,
        )  # fmt: skip
        return terms.finish(loss, stats, return_stats)
    loss, stats = _linear_loss(
        terms, hidden, student_weight, student_bias, audio, text, teacher_weight, teacher_bias, logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens, workspace_bytes=workspace_bytes, want_stats=return_stats, chosen=chosen,
    )  # fmt: skip
    return terms.finish(loss, stats, return_stats)


def _linear_loss(
    terms: _Terms,
    hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    audio: Tensor,
    text: Tensor | None,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    *,
    logits_dtype: torch.dtype,
    chunk_tokens: int | None,
    workspace_bytes: int | None,
    want_stats: bool,
    chosen: str,
) -> tuple[Tensor, Tensor]:
    """(loss per token or reduced, statistics (6, N) where wanted) of checked arguments, hidden states (N, H)."""
    if chosen == "reference":
        result = _reference.linear_caad(
            hidden, student_weight, student_bias, audio, text, teacher_weight, teacher_bias, terms.target, terms.alpha,
            terms.spec, want_stats=want_stats,
        )  # fmt: skip
        return terms.weigh_reference(result, want_stats)
    spec = terms.spec
    reduced = terms.reduction != "none"
    grads = _wanted_gradients(hidden, student_weight, student_bias, reduced)
    loss, _, _, _, stats, _ = _schema.linear_caad(
        hidden, student_weight, student_bias, audio, text, teacher_weight, teacher_bias, terms.target, terms.alpha,
        terms.kd_coef, terms.ce_coef, spec.vocab, spec.temperature, spec.divergence, spec.jsd_beta, spec.plausibility,
        spec.ignore_index, spec.with_kd, spec.with_ce, spec.student_scale, spec.teacher_scale, spec.student_softcap,
        spec.teacher_softcap, logits_dtype, chunk_tokens, workspace_bytes,
        reduced, *grads, want_stats, chosen,
    )  # fmt: skip
    return loss, stats


class CAADLoss(torch.nn.Module):
    """:func:`fused_caad_loss` with its options fixed, as a module.

    ``CAADLoss(alpha=1.0)(student_logits, teacher_audio_logits, teacher_text_logits, target)``; the options are the keyword
    arguments of :func:`fused_caad_loss`, checked at construction; ``alpha`` and the tensors among them may be given per call.

    Raises TypeError for an option that does not exist, ValueError for a value out of range.
    """

    _PER_CALL = (
        "alpha",
        "kd_token_weight",
        "ce_token_weight",
        "kd_normalizer",
        "ce_normalizer",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(fused_caad_loss.__kwdefaults__))
        if unknown:
            known = ", ".join(fused_caad_loss.__kwdefaults__)
            raise TypeError(f"CAADLoss: expected options among {known}, got {', '.join(unknown)}")
        self.options = options
        self._validate()

    def _validate(self) -> None:
        options = {**fused_caad_loss.__kwdefaults__, **self.options}
        impl = options.pop("impl")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
        del options["inplace"]
        for name in self._PER_CALL:  # a tensor's shape can be judged only beside the logits
            if isinstance(options[name], Tensor):
                options[name] = fused_caad_loss.__kwdefaults__[name]
        _Terms.build(
            leading=torch.Size([1]),
            device=torch.device("cpu"),
            dtype=torch.float32,
            widths=(sys.maxsize, sys.maxsize),
            has_text=True,
            target=torch.zeros(1, dtype=torch.int64, device="cpu"),
            want_stats=options.pop("return_stats"),
            **options,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_audio_logits: Tensor,
        teacher_text_logits: Tensor | None,
        target: Tensor | None = None,
        **per_call: Any,
    ) -> Tensor | tuple[Tensor, CAADStats]:
        unknown = sorted(set(per_call) - set(self._PER_CALL))
        if unknown:
            raise TypeError(f"CAADLoss: expected per call only {', '.join(self._PER_CALL)}, got {', '.join(unknown)}")
        return fused_caad_loss(
            student_logits, teacher_audio_logits, teacher_text_logits, target, **{**self.options, **per_call}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


# -- shared by both fronts -------------------------------------------------------------------------------------------------


class _Terms(NamedTuple):
    """The checked options of one call as tensors and a RowSpec, and the way back to what the caller sees."""

    spec: RowSpec
    target: Tensor | None  # (N,)
    alpha: Tensor  # (1,) or (N,)
    kd_coef: Tensor  # (N,): d loss / d kd_i
    ce_coef: Tensor
    leading: torch.Size
    reduction: str

    @classmethod
    def build(
        cls,
        *,
        leading: torch.Size,
        device: torch.device,
        dtype: torch.dtype,
        widths: tuple[int, ...],
        has_text: bool,
        target: Tensor | None,
        alpha: float | Tensor,
        temperature: float,
        kd_weight: float,
        divergence: str,
        jsd_beta: float,
        plausibility: float | None,
        ignore_index: int,
        kd_token_weight: Tensor | None,
        ce_token_weight: Tensor | None,
        kd_normalizer: float | Tensor | None,
        ce_normalizer: float | Tensor | None,
        reduction: str,
        vocab_size: int | None,
        want_stats: bool,
        **head: Any,
    ) -> _Terms:
        _check_divergence(divergence, jsd_beta, plausibility)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if not (_is_number(temperature) and 0 < temperature < math.inf):
            raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
        if not (_is_number(kd_weight) and 0 <= kd_weight <= 1):
            raise ValueError(f"kd_weight: expected a number in [0, 1], got {kd_weight!r}")
        if not isinstance(want_stats, bool):
            raise TypeError(f"return_stats: expected a bool, got {type(want_stats).__name__}")
        if not _is_whole(ignore_index):
            raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
        vocab = min(widths)
        if vocab_size is not None:
            if not _is_whole(vocab_size):
                raise TypeError(f"vocab_size: expected an int or None, got {type(vocab_size).__name__}")
            if not 1 <= vocab_size <= vocab:
                teachers = ", ".join(map(str, widths[1:]))
                raise ValueError(
                    f"vocab_size: expected 1 to {vocab} (student {widths[0]}, teacher {teachers}), got {vocab_size}"
                )
            vocab = vocab_size if isinstance(vocab_size, (int, torch.SymInt)) else int(vocab_size)
        if vocab < 1:
            raise ValueError(
                f"student_logits: expected a vocabulary of at least 1, got widths {' and '.join(map(str, widths))}"
            )

        if target is not None:
            _check_tensor("target", target)
            if target.dtype != torch.int64:
                raise TypeError(f"target: expected int64 ids, got {target.dtype}")
            _check_shape("target", target, leading)
            if target.device != device:
                raise ValueError(f"target: expected device {device}, got {target.device}")
            target = target.reshape(-1).contiguous()
        alpha = _alpha_tensor("alpha", alpha, leading, device, dtype)

        n = math.prod(leading)
        valid = None if target is None else target != ignore_index
        lam = 1.0 if target is None else float(kd_weight)
        coefficients = []
        for name, share, weight, normalizer in (
            ("kd", lam, kd_token_weight, kd_normalizer),
            ("ce", 1.0 - lam, ce_token_weight, ce_normalizer),
        ):
            w = _token_weight(f"{name}_token_weight", weight, leading, valid, n, device, dtype)
            norm = _normalizer(f"{name}_normalizer", normalizer, device, dtype)
            if norm is None and reduction == "mean":
                norm = w.sum()
            coefficients.append(share * w if norm is None else share * torch.where(norm > 0, w / norm, 0.0))
        spec = RowSpec(
            vocab=vocab,
            temperature=float(temperature),
            divergence=divergence,
            jsd_beta=float(jsd_beta),
            plausibility=None if plausibility is None else float(plausibility),
            ignore_index=int(ignore_index),
            with_kd=lam > 0 or want_stats,
            with_ce=target is not None and (lam < 1 or want_stats),
            **head,
        )
        return cls(spec, target, alpha, coefficients[0], coefficients[1], leading, reduction)

    def finish(self, loss: Tensor, stats: Tensor, return_stats: bool) -> Tensor | tuple[Tensor, CAADStats]:
        """From per-token (N,) or reduced losses to the caller's shapes."""
        if self.reduction == "none":
            loss = loss.reshape(self.leading)
        elif loss.dim():
            loss = loss.sum()
        if not return_stats:
            return loss
        return loss, CAADStats(*(row.reshape(self.leading) for row in stats.detach().unbind(0)))

    def weigh_reference(self, result: RowResult, want_stats: bool) -> tuple[Tensor, Tensor]:
        """(loss per token, statistics where wanted), values checked."""
        if not torch.compiler.is_compiling():
            _schema.check_values(self.target, self.alpha, self.spec.vocab, self.spec.ignore_index)
        loss = _schema.weighted(result.kd, result.ce, self.kd_coef, self.ce_coef)
        return loss, _schema.all_stats(result) if want_stats else loss


def _check_divergence(divergence: str, jsd_beta: float, plausibility: float | None, source: str = "") -> None:
    """``source``: what precedes the arguments' names where there are several."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"{source}divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if not (_is_number(jsd_beta) and 0 < jsd_beta < 1):
        raise ValueError(f"{source}jsd_beta: expected a number in (0, 1), got {jsd_beta!r}")
    if plausibility is not None:
        if not (_is_number(plausibility) and 0 < plausibility <= 1):
            raise ValueError(f"{source}plausibility: expected a number in (0, 1] or None, got {plausibility!r}")
        if divergence == "reverse_kl":
            raise ValueError(
                f"{source}plausibility: expected None with divergence='reverse_kl' (KL(q || p) is infinite where p is cut to "
                f"0), got {plausibility!r}"
            )


def _alpha_tensor(
    name: str, alpha: float | Tensor, leading: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(1,) or (N,)"""
    if not isinstance(alpha, Tensor):
        if not (_is_number(alpha) and 0 <= alpha < math.inf):
            raise ValueError(f"{name}: expected a finite number >= 0, got {alpha!r}")
        return torch.full((1,), float(alpha), dtype=dtype, device=device)
    if not (alpha.is_floating_point() or alpha.dtype in (torch.int32, torch.int64)):
        raise TypeError(f"{name}: expected a floating-point tensor, got {alpha.dtype}")
    if alpha.dim() and alpha.shape != leading:
        raise ValueError(f"{name}: expected a number or a tensor {tuple(leading)}, got {tuple(alpha.shape)}")
    return alpha.detach().to(device=device, dtype=dtype).reshape(-1)


def _check_head(
    pattern: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    like: Tensor,
    hidden_name: str = "hidden",
    *,
    empty: bool = False,
) -> None:
    """Hidden states (..., H), weight (V, H) and bias (V,) on ``like``'s device; ``pattern`` makes names: "student_{}"."""
    names = [pattern.format(x) for x in (hidden_name, "weight", "bias")]
    for name, x in zip(names, (hidden, weight, bias), strict=True):
        if x is None and name == names[2]:
            continue
        _check_tensor(name, x, floating=True)
        _check_device(name, x, like)
    if hidden.dim() < 1:
        raise ValueError(f"{names[0]}: expected (..., width), got a scalar")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{names[1]}: expected (vocabulary, {width}) to match {names[0]}, got {tuple(weight.shape)}")
    if weight.shape[0] == 0 and not empty:
        raise ValueError(f"{names[1]}: expected a vocabulary, got 0 rows (is the head sharded by FSDP or ZeRO-3?)")
    if bias is not None:
        _check_shape(names[2], bias, weight.shape[:1])


def _check_text_hidden(name: str, text: Tensor | None, audio: Tensor) -> None:
    if text is not None:
        _check_tensor(name, text, floating=True)
        _check_shape(name, text, audio.shape)
        _check_device(name, text, audio)


def _check_head_options(pattern: str, softcap: float | None, logit_scale: float) -> None:
    for name, x in (("softcap", softcap), ("logit_scale", logit_scale)):
        optional = name == "softcap"
        if not (x is None and optional) and not (_is_number(x) and 0 < x < math.inf):
            expected = f"a finite number > 0{' or None' if optional else ''}"
            raise ValueError(f"{pattern.format(name)}: expected {expected}, got {x!r}")


def _check_chunks(chunk_tokens: int | None, workspace_bytes: int | None, logits_dtype: torch.dtype | None) -> None:
    for name, x in (("chunk_tokens", chunk_tokens), ("workspace_bytes", workspace_bytes)):
        if x is not None and not (_is_whole(x) and x >= 1):
            raise ValueError(f"{name}: expected a whole number >= 1 or None, got {x!r}")
    if chunk_tokens is not None and workspace_bytes is not None:
        raise ValueError("workspace_bytes: expected None where chunk_tokens is given, got both")
    if logits_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits_dtype: expected None, float32, bfloat16 or float16, got {logits_dtype}")


def _wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, reduced: bool) -> list[bool]:
    """Of hidden states, weight and bias: which gradients the forward makes."""
    grads = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if not reduced and (grads[1] or grads[2]):
        return [False] * 3  # the backward runs the chunks with each token's own factor
    return grads


def _choose(impl: str, device: torch.device, dtypes: list[torch.dtype], caller: str) -> str:
    chosen, reason = choose(impl, device, dtypes)
    logger.debug("%s: impl=%r (%s)", caller, chosen, reason)
    return chosen


# Decided while tracing: it imports libraries, which cannot be traced. This is what torch.compiler.assume_constant_result sets;
# calling that would import all of torch._dynamo, over a second, with kdkernels.
_choose._dynamo_marked_constant = True


def _accumulation_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _three_dimensional(logits: Tensor) -> Tensor:
    """(B, T, V) without a copy where the strides allow it."""
    if logits.dim() == 3:
        return logits
    if logits.dim() < 3:
        return logits[(None,) * (3 - logits.dim())]
    return logits.reshape(-1, *logits.shape[-2:])


def _rows_are_apart(logits: Tensor) -> bool:
    """Whether every row of (B, T, V) is a run of memory of its own (not so for an expanded tensor)."""
    if logits.stride(-1) != 1:
        return False
    free_from = logits.shape[-1]
    for stride, size in sorted(zip(logits.stride()[:2], logits.shape[:2], strict=True)):
        if size > 1:
            if stride < free_from:
                return False
            free_from = stride * (size - 1) + free_from
    return True


def _token_weight(
    name: str,
    weight: Tensor | None,
    leading: torch.Size,
    valid: Tensor | None,
    n: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(N,) weights, 0 at ignored positions."""
    if weight is None:
        return torch.ones(n, dtype=dtype, device=device) if valid is None else valid.to(dtype)
    _check_tensor(name, weight)
    _check_shape(name, weight, leading)
    if weight.device != device:
        raise ValueError(f"{name}: expected device {device}, got {weight.device}")
    weight = weight.detach().reshape(-1).to(dtype)
    weight = weight if valid is None else torch.where(valid, weight, 0.0)
    if not torch.compiler.is_compiling() and checks_enabled(device) and not bool((weight >= 0).all()):
        raise ValueError(f"{name}: expected weights >= 0, got {float(weight[~(weight >= 0)][0])}")
    return weight


def _normalizer(name: str, value: float | Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor of one element, got {tuple(value.shape)}")
        value = value.detach().reshape(()).to(device=device, dtype=dtype)
        if not torch.compiler.is_compiling() and checks_enabled(device) and not bool(value >= 0):
            raise ValueError(f"{name}: expected a number >= 0, got {float(value)}")
        return value
    if not (_is_number(value) and 0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
    return torch.full((), float(value), dtype=dtype, device=device)


def _is_number(x: Any) -> bool:
    """Python's numbers and NumPy's scalars."""
    return isinstance(x, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)) and not isinstance(x, bool)


def _is_whole(x: Any) -> bool:
    return isinstance(x, (int, torch.SymInt, numbers.Integral)) and not isinstance(x, bool)


def _is_dtensor(x: Any) -> bool:
    """Told by its own attribute: asking torch.distributed.tensor would import it."""
    return hasattr(x, "placements")


def _check_tensor(name: str, x: Any, *, floating: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if _is_dtensor(x):
        raise TypeError(
            f"{name}: expected a plain tensor, the same on every rank, got a DTensor placed as {tuple(x.placements)}; "
            "x.full_tensor() gathers it"
        )
    if floating and not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def _check_shape(name: str, x: Tensor, expected: torch.Size) -> None:
    if x.shape != expected:
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(x.shape)}")


def _check_leading(name: str, x: Tensor, leading: torch.Size, like: str) -> None:
    if x.dim() < 1 or x.shape[:-1] != leading:
        raise ValueError(f"{name}: expected leading shape {tuple(leading)} as {like} has, got {tuple(x.shape)}")


def _check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as the student has, got {x.device}")
