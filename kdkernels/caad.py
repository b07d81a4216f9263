"""The contrastive audio-aware distillation losses: public signatures, validation, dispatch. No kernel code here.

Legend: ... leading dimensions (their product is N tokens), V_s / V_t vocabulary widths of student and teacher, V valid ids,
H_s / H_t hidden widths.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_device, check_head, check_leading, check_shape, check_tensor, check_text_path, is_dtensor
from .loss_options import LinearLossOptions, LossOptions
from .loss_terms import LossTerms, accumulation_dtype, as_autocast, plain_terms
from .ops import reference as _reference
from .ops import schema as _schema
from .ops.dispatch import choose_for
from .ops.rows import LinearTensors, RowProblem


class CAADStats(NamedTuple):
    """Detached per-token statistics, each float32 (float64 for float64 inputs) of the targets' leading shape, 0 at ignored
    positions.

    kd               tau^2 D(p, q), unweighted
    ce               -log softmax(s)[y], unweighted (0 without a target)
    student_entropy  of q = softmax(s / tau), in nats
    teacher_entropy  of p = softmax(z_hat / tau), in nats
    top1_agreement   1 where argmax s == argmax z_hat, else 0
    path_divergence  KL(softmax(z_audio / tau) || softmax(z_text / tau)) in nats: how much the sound changes the teacher's
                     answer. 0 without a text path
    """

    kd: Tensor
    ce: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor
    path_divergence: Tensor


def fused_caad_loss(
    student_logits: Tensor,
    teacher_audio_logits: Tensor | None,
    teacher_text_logits: Tensor | None,
    target: Tensor | None = None,
    *,
    alpha: float | Tensor = 2.0,
    temperature: float = 2.0,
    kd_weight: float = 0.7,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    plausibility: float | None = None,
    mask: Tensor | None = None,
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
) -> Tensor | Any:  # Any: (Tensor, CAADStats) with return_stats
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
        teacher_audio_logits: (..., V_t), the positive path; its dtype may differ from the student's. Never gets a gradient. None
            with ``kd_weight`` 0: cross-entropy alone.
        teacher_text_logits: (..., V_t), the negative path, or None: plain distillation from the audio path.
        target: (...) int64 pseudo-ground-truth ids, or None: no CE term, ``kd_weight`` counts as 1, every position is valid.
        alpha: contrast strength >= 0; a number, or a tensor (...) per token. Where it is 0 the text path is not read.
        temperature: tau > 0 of the distillation term; the CE term has temperature 1. Beyond about 100 the value of a KL loses
            digits, since tau^2 magnifies its rounding. On CPU kernels 0.05% of it are lost at 300 and half of it at 10,000, for
            logits of size 1. The gradient is exact to 0.03% there.
        kd_weight: lambda in [0, 1].
        divergence: "forward_kl", "reverse_kl" or "jsd".
        jsd_beta: beta in [0, 1]; m = beta p + (1 - beta) q, jsd = beta KL(p || m) + (1 - beta) KL(q || m). At 0 and 1 it stands
            for KL(p || q) and KL(q || p), as in GKD, TRL and Liger; near them it tends to 0.
        plausibility: beta in (0, 1]; only tokens with z_audio_v >= max z_audio + log beta keep a probability in p.
        mask: (...) bool, or whole numbers that are 0 where a position does not count; None: ``target`` alone decides. With both a
            position counts where both say so.
        ignore_index: positions with this target do not count. Their logits are not read.
        kd_token_weight, ce_token_weight: (...) finite weights >= 0 of each term, or None: 1.
        kd_normalizer, ce_normalizer: divisors instead of the default. For gradient accumulation and data parallelism pass the
            sum of weights (or the number of valid positions) of the whole step. They divide under every reduction; 0 gives
            loss 0.
        reduction: "mean" divides each term by its sum of weights over valid positions; "sum" by 1; "none" returns (...).
        vocab_size: number of valid ids; default min(V_s, V_t). Logits beyond it count as -inf on both sides.
        impl: "auto", "reference", "cpu", "triton" or "cuda". An explicit choice never falls back to another one.
        inplace: the gradient may overwrite ``student_logits``' memory. The backward then raises RuntimeError if the same graph
            uses the logits elsewhere, before or after. What reads them without autograd after the loss sees the gradient.
            Ignored under torch.compile, by impl="reference", for leaves, for views that autograd does not let change
            (torch.chunk), for logits whose rows share memory or are not contiguous, and where the teacher's logits lie in the
            same memory.
        return_stats: also return :class:`CAADStats`.

    Returns:
        float32 loss (float64 for float64 inputs): () or, with reduction="none", (...); with ``return_stats`` a pair. Without a
        valid position it is 0 with zero gradients.

    -inf logits are legal: their probability, contribution and gradient are 0. A token masked on either teacher path has p = 0.
    A finite logit below -1e30 counts as -inf (libraries write masks as torch.finfo(dtype).min).
    forward_kl is +inf, never NaN, where p_v > 0 and the student has -inf. reverse_kl is +inf where q_v > 0 and p_v = 0; the
    distillation term of that position then has no gradient.

    Under torch.compile the float options may change from call to call (a ramp of alpha). The second value compiles a graph that
    serves all later ones. kd_weight 0 and 1, and None instead of a number, have graphs of their own. The other options are
    constants of the graph: a new value compiles again.

    Computes in float32 registers (float64 for the sums of a row on the CPU). Extra memory: the gradient, N * V_s items of the
    student's dtype (none with ``inplace``, none without a gradient), and on the CPU 12 bytes per vocabulary entry and thread.
    Gradients flow to the student alone: the teacher's logits, alpha and the weights get none, and no error says so.
    The forward computes the gradient; the backward scales it. Second derivatives and torch.func transforms work with
    impl="reference" alone: elsewhere a backward with create_graph=True, and a transform around a call that records a gradient,
    raise RuntimeError. A transform has no values to check, as on CUDA.

    Raises:
        ValueError, TypeError: for a bad argument, with its name, expected and got. On the CPU also for a target outside
            [0, vocab) or a bad alpha. On CUDA the loss of such a row is NaN, unless KDKERNELS_CHECK=1.
        RuntimeError: ``impl`` names something that is not installed.

    Source: CAAD, arXiv 2606.23052; generalised JSD as in GKD, arXiv 2306.13649; plausibility as in contrastive decoding,
    arXiv 2210.15097.
    """
    options = LossOptions(
        alpha=alpha, temperature=temperature, kd_weight=kd_weight, divergence=divergence, jsd_beta=jsd_beta,
        plausibility=plausibility, mask=mask, ignore_index=ignore_index, kd_token_weight=kd_token_weight,
        ce_token_weight=ce_token_weight, kd_normalizer=kd_normalizer, ce_normalizer=ce_normalizer, reduction=reduction,
        vocab_size=vocab_size, impl=impl, inplace=inplace, return_stats=return_stats,
    )  # fmt: skip
    if teacher_audio_logits is None:
        check_tensor("student_logits", student_logits, floating=True)
        _check_cross_entropy("teacher_audio_logits", teacher_text_logits, target, options)
        teacher_audio_logits = student_logits.detach()  # nobody reads it
    return _loss_of_logits(student_logits, teacher_audio_logits, teacher_text_logits, target, options)


def _loss_of_logits(
    student: Tensor, audio: Tensor, text: Tensor | None, target: Tensor | None, options: LossOptions
) -> Tensor | tuple[Tensor, CAADStats]:
    _check_logits(student, audio, text)
    dtypes = [x.dtype for x in (student, audio, text) if x is not None]
    chosen = choose_for("fused_caad_loss", options.impl, student.device, dtypes)
    audio, text = audio.detach(), None if text is None else text.detach()
    widths, want_stats = (student.shape[-1], audio.shape[-1]), options.return_stats
    want_grad = student.requires_grad and torch.is_grad_enabled()
    consumed = options.inplace and want_grad and not torch.compiler.is_compiling() and _may_overwrite(student, audio, text)
    directly = chosen != "reference" and not consumed and _schema.runs_directly(student, audio, text, target)
    if directly and chosen == "cpu" and not want_stats and student.dtype != torch.float16:  # whose gradient has a gain
        plain = plain_terms(options, target, leading=student.shape[:-1], device=student.device, widths=widths)
        if plain is not None:
            _schema.refuse_transforms(student)
            logits = (student.detach(), audio, text)
            solve = partial(_schema.solve_plain_rows, [x if x is None else _three_dimensional(x) for x in logits], plain)
            return _schema.direct_rows(student, solve)[0]
    terms = LossTerms.build(
        options,
        target,
        leading=student.shape[:-1],
        device=student.device,
        dtype=accumulation_dtype(dtypes),
        widths=widths,
    )
    spec = terms.spec
    if chosen == "reference":
        rows = _reference.caad_rows(
            student, audio, text, terms.target, terms.alpha, spec, want_stats=want_stats, counts=terms.counts()
        )
        return _for_caller(terms, *terms.weigh_reference(rows), want_stats)
    _schema.refuse_transforms(student)
    tail = (
        _three_dimensional(audio),
        None if text is None else _three_dimensional(text),
        terms.target,
        terms.alpha,
        terms.kd_coef,
        terms.ce_coef,
    )
    stats: Tensor | None
    if consumed:
        terms.check()
        loss, stats = _schema.consume_rows(student, _three_dimensional, *tail, spec, want_stats, chosen)
    elif directly:
        terms.check()
        problem = RowProblem(_three_dimensional(student.detach()), *tail, spec, None, want_stats)
        solve = partial(_schema.solve_new_rows, problem, impl=chosen, reduced=terms.is_reduced())
        loss, stats = _schema.direct_rows(student, solve)
    else:
        loss, _, stats, _ = _schema.differentiable(
            _schema.caad_rows, _three_dimensional(student), *tail, *spec.packed(), want_grad, want_stats, chosen
        )
    return _for_caller(terms, loss, stats, want_stats)


def _check_cross_entropy(name: str, text: Tensor | None, target: Tensor | None, options: LossOptions) -> None:
    """Raises ValueError for a call without a teacher, unless it asks for cross-entropy alone. ``name``: the missing tensor."""
    if options.kd_weight != 0:
        raise ValueError(f"{name}: expected a tensor with kd_weight={options.kd_weight!r}, got None (kd_weight=0: no teacher)")
    if text is not None:
        raise ValueError(f"{name.replace('audio', 'text')}: expected None without {name}, got a tensor")
    if target is None:
        raise ValueError(f"{name}: expected a tensor, or a target for cross-entropy alone, got None")
    if options.return_stats:
        raise ValueError(f"{name}: expected a tensor with return_stats=True, got None: most statistics need a teacher")


def _check_logits(student: Tensor, audio: Tensor, text: Tensor | None) -> None:
    check_tensor("student_logits", student, floating=True)
    check_tensor("teacher_audio_logits", audio, floating=True)
    if student.dim() < 1:
        raise ValueError("student_logits: expected (..., vocabulary), got a scalar")
    check_leading("teacher_audio_logits", audio, student.shape[:-1], "student_logits")
    check_device("teacher_audio_logits", audio, student)
    if text is not None:
        check_tensor("teacher_text_logits", text, floating=True)
        check_shape("teacher_text_logits", text, audio.shape)
        check_device("teacher_text_logits", text, student)


def _for_caller(
    terms: LossTerms, loss: Tensor, stats: Tensor | None, return_stats: bool
) -> Tensor | tuple[Tensor, CAADStats]:
    """From per-token (N,) or reduced losses and statistics (6, N) to what the caller gets."""
    loss = terms.shaped(loss)
    if not return_stats or stats is None:
        return loss
    return loss, CAADStats(*(row.reshape(terms.leading) for row in stats.detach().unbind(0)))


def fused_linear_caad_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_audio_hidden: Tensor | None,
    teacher_text_hidden: Tensor | None,
    teacher_weight: Tensor | None,
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
    round_contrast: bool = False,
    process_group: Any = None,
    alpha: float | Tensor = 2.0,
    temperature: float = 2.0,
    kd_weight: float = 0.7,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    plausibility: float | None = None,
    mask: Tensor | None = None,
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
) -> Tensor | Any:  # Any: (Tensor, CAADStats) with return_stats
    r"""The same loss from hidden states and LM heads, in token chunks: logits exist for one chunk at a time.

    ::

        s       = cap_s(scale_s (h_s W_s^T + b_s)),   cap(x) = softcap tanh(x / softcap), or x
        z_audio = cap_t(scale_t (h_audio W_t^T + b_t)),   z_text likewise
        loss    = fused_caad_loss(s, z_audio, z_text, target, ...)

    With neither ``teacher_softcap`` nor ``plausibility`` nor ``return_stats`` the two teacher paths collapse into one GEMM:
    z_hat = scale_t (W_t ((1 + alpha) h_audio - alpha h_text) + b_t), for per-token alpha too. With ``plausibility`` z_text is
    formed only at tokens that survive it (densely where those are many).

    Without a gradient (torch.no_grad, or no student tensor requires one) impl="triton" stores no logits at all: the GEMMs of both
    heads compute the online softmax in their epilogue. Scratch then has a bound for any N and V (281 MiB with H_t = 4096 on an
    H100, and workspace_bytes where that is less). The jsd, ``return_stats`` and a given ``chunk_tokens`` still run in chunks.
    ``kdkernels.explain`` says which path a call takes.

    Args:
        student_hidden: (..., H_s) float32, bfloat16 or float16: the LM head's inputs at the positions that predict ``target``.
        student_weight: (V_s, H_s). Its gradient is computed only if it requires one, so a frozen head costs nothing. For a head
            with a LoRA pass the merged weight, W + B A.
        teacher_audio_hidden, teacher_text_hidden: (..., H_t). With text None: plain distillation. They never get a gradient.
            Both None, and ``teacher_weight`` too, with ``kd_weight`` 0: cross-entropy alone.
        teacher_weight: (V_t, H_t), no gradient.
        target: (...) int64, or None (see :func:`fused_caad_loss`). On the CPU ignored positions are left out of the GEMMs. On
            CUDA they go through the GEMMs like the others, since counting them would wait for the device. So they cost as much
            time as the others; leave them out with an index (``kdkernels.answer_index`` makes one from labels).
        student_bias, teacher_bias: (V_s,), (V_t,) or None.
        student_softcap, teacher_softcap: > 0, as in Gemma 2; applied after the scale. None: none.
        student_logit_scale, teacher_logit_scale: factors on the logits (Cohere; 1 / logits_scaling for Granite).
        chunk_tokens: tokens of a chunk. None: chosen from ``workspace_bytes`` and from what keeps the GPU busy.
        workspace_bytes: upper bound of the scratch for logits. None: 512 MiB on the CPU; on CUDA a tenth of the free memory, at
            most 2 GiB. A chunk holds at least the logits of one token. A call that stores no logits holds at least one tile of 64
            or 128 tokens.
        logits_dtype: dtype in which a chunk's logits are stored. None: float32. bfloat16 is faster and less accurate: its
            gradient error is 2-5% instead of 0.6%, and far more near convergence. A dtype that is neither float32 nor that of the
            weights, such as float16 beside bfloat16, is made from float32 and rounded, which takes longer than float32 logits.
        round_contrast: for bfloat16 weights (on CUDA also float16) whose two teacher paths collapse. True: their contrast is
            rounded once to the weights' dtype. False: it is the sum of two such tensors, which takes two products with the
            teacher's head. On CPUs with AVX-512 BF16, from 32 tokens on, the sum and the head become 16-bit integers, and one
            product takes the place of two. The rounding to bfloat16 adds an error of about 0.17% of size / (temperature sqrt(2
            KL)) to the gradient, with KL in nats. The size is sqrt(sum_j c_j^2 Var_p(w_j)) of the contrast c and the head's
            columns w_j, about the standard deviation of z_hat over the ids. That is below 0.6% far from convergence, and often
            above 3% near it. It has no effect on logits of the weights' dtype, where no logits are stored, and with
            impl="reference".
        process_group: a ProcessGroup or a one-dimensional DeviceMesh makes the loss vocabulary-parallel. Weights and biases
            are then this rank's rows of the vocabulary, in rank order. Student and teacher shards start at the same ids; their
            sizes may differ (``kdkernels.parallel.vocabulary_rows`` cuts them). DTensors with placements (Shard(0),) need no
            process_group, and their gradients are DTensors. Everything else is the same on every rank. Every rank gets the whole
            loss and the whole gradient of student_hidden. The kernels are those of impl="cpu" or "triton". They need no scratch
            beside the shard's logits. impl="reference" computes the rows in eager PyTorch (about 8 float32 tensors of a chunk).
            torch.compile sees one operator, exchanges and all; every rank has to make the same calls in the same order.
        inplace: has no effect here: this loss overwrites no memory of the caller.
        The rest: as in :func:`fused_caad_loss`.

    Returns:
        As :func:`fused_caad_loss`. Gradients reach student_hidden, student_weight and student_bias only.

    Under torch.autocast hidden states, weights and biases are cast as F.linear casts them, on every device and by every ``impl``.
    The copies live until the backward. The loss stays float32, and a gradient has the dtype of the tensor that was passed. The
    two paths of a teacher are rounded before their contrast is formed.

    dW is accumulated in float32. With reduction="none" and a training head the backward runs the chunks a second time: the
    GEMM of dW needs each token's own grad_output.

    Extra memory: one chunk of logits (2 tensors; 3 with ``teacher_softcap`` and no ``plausibility``, or with ``return_stats``);
    N * H_s items for dh; V_s * H_s float32 for dW if the head trains; and on the CPU, for float32 logits of low-precision
    weights, one float32 block of 4096 weight rows. Only dh grows with N. On the CPU the process keeps up to 512 MiB of that
    scratch for the next call. On CUDA a row of logits takes a multiple of 64 items where 16 does not divide V. Logits of a dtype
    that is neither float32 nor that of the weights take a float32 block of 16,384 ids more.

    Raises:
        As :func:`fused_caad_loss`.

    Source: CAAD, arXiv 2606.23052; token chunks as in Liger Kernel, arXiv 2410.10989.
    """
    options = LinearLossOptions(
        student_softcap=student_softcap, teacher_softcap=teacher_softcap, student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale, chunk_tokens=chunk_tokens, workspace_bytes=workspace_bytes,
        logits_dtype=logits_dtype, round_contrast=round_contrast, alpha=alpha, temperature=temperature, kd_weight=kd_weight,
        divergence=divergence, jsd_beta=jsd_beta, plausibility=plausibility, mask=mask, ignore_index=ignore_index,
        kd_token_weight=kd_token_weight, ce_token_weight=ce_token_weight, kd_normalizer=kd_normalizer,
        ce_normalizer=ce_normalizer, reduction=reduction, vocab_size=vocab_size, impl=impl, inplace=inplace,
        return_stats=return_stats,
    )  # fmt: skip
    if teacher_audio_hidden is None:
        check_tensor("student_hidden", student_hidden, floating=True)
        check_tensor("student_weight", student_weight, floating=True)
        _check_cross_entropy("teacher_audio_hidden", teacher_text_hidden, target, options)
        if teacher_weight is not None or teacher_bias is not None:
            raise ValueError("teacher_weight, teacher_bias: expected None without teacher_audio_hidden, got a tensor")
        teacher_audio_hidden, teacher_weight = student_hidden.detach(), student_weight.detach()  # nobody reads them
    if teacher_weight is None:
        raise TypeError("teacher_weight: expected a tensor beside teacher_audio_hidden, got None")
    heads = LinearTensors(
        student_hidden, student_weight, student_bias, teacher_audio_hidden, teacher_text_hidden, teacher_weight, teacher_bias
    )
    return _loss_of_hidden_states(heads, target, options, process_group)


def _loss_of_hidden_states(
    heads: LinearTensors, target: Tensor | None, options: LinearLossOptions, process_group: Any
) -> Tensor | tuple[Tensor, CAADStats]:
    group = None
    if process_group is not None or any(is_dtensor(x) for x in heads):
        from . import parallel

        group, heads = parallel.local_heads(process_group, heads)
    _check_heads(heads, empty=group is not None)
    heads = LinearTensors(*as_autocast(*heads))
    hidden, student_weight, _, _, _, teacher_weight, _ = heads
    dtypes = [x.dtype for x in heads if x is not None]
    terms = LossTerms.build(
        options,
        target,
        leading=hidden.shape[:-1],
        device=hidden.device,
        dtype=accumulation_dtype(dtypes),
        widths=() if group is not None else (student_weight.shape[0], teacher_weight.shape[0]),
    )
    without_cuda = "" if group is None else "with a process_group"
    chosen = choose_for("fused_linear_caad_loss", options.impl, hidden.device, dtypes, without_cuda=without_cuda)
    heads = heads.flat()
    if group is None:
        loss, stats = linear_loss(terms, heads, options, chosen)
    else:
        loss, stats = parallel.parallel_loss(terms, heads, linear_settings(terms, options, heads[:3], chosen), group)
    return _for_caller(terms, loss, stats, options.return_stats)


def _check_heads(heads: LinearTensors, *, empty: bool) -> None:
    """``empty``: a rank of a process group may hold no rows."""
    hidden, weight, bias, audio, text, teacher_weight, teacher_bias = heads
    check_head("student_{}", hidden, weight, bias, hidden, empty=empty)
    check_head("teacher_{}", audio, teacher_weight, teacher_bias, hidden, "audio_hidden", empty=empty)
    check_leading("teacher_audio_hidden", audio, hidden.shape[:-1], "student_hidden")
    check_text_path("teacher_text_hidden", text, audio)


def linear_loss(
    terms: LossTerms, heads: LinearTensors, options: LinearLossOptions, chosen: str
) -> tuple[Tensor, Tensor]:
    """(loss per token or reduced, statistics (6, N) where wanted) of checked arguments, hidden states (N, H)."""
    want_stats = options.return_stats
    if chosen == "reference":
        rows = _reference.linear_caad(
            *heads, terms.target, terms.alpha, terms.spec, want_stats=want_stats, counts=terms.counts()
        )
        return terms.weigh_reference(rows)
    _schema.refuse_transforms(*heads[:3])
    wanted = linear_settings(terms, options, heads[:3], chosen)
    numbers = (*terms.spec.packed(), *wanted.packed())
    loss, _, _, _, stats, _ = _schema.differentiable(
        _schema.linear_caad, *heads, terms.target, terms.alpha, terms.kd_coef, terms.ce_coef, *numbers
    )
    return loss, stats


class CAADLoss(torch.nn.Module):
    """:func:`fused_caad_loss` with its options fixed, as a module.

    ``CAADLoss(alpha=1.0)(student_logits, teacher_audio_logits, teacher_text_logits, target)``; the options are the keyword
    arguments of :func:`fused_caad_loss`, checked at construction; ``alpha`` and the tensors among them may be given per call.
    Under torch.compile give a changing ``alpha`` per call: every new value in ``options`` compiles another graph.

    Raises TypeError for an option that does not exist, ValueError for a value out of range.
    """

    _PER_CALL = (
        "alpha",
        "mask",
        "kd_token_weight",
        "ce_token_weight",
        "kd_normalizer",
        "ce_normalizer",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = [field.name for field in dataclasses.fields(LossOptions)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"CAADLoss: expected options among {', '.join(known)}, got {', '.join(unknown)}")
        LossOptions(**options)  # checks them; the shapes of tensors can be judged only beside the logits
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_audio_logits: Tensor | None,
        teacher_text_logits: Tensor | None,
        target: Tensor | None = None,
        **per_call: Any,
    ) -> Tensor | Any:
        unknown = sorted(set(per_call) - set(self._PER_CALL))
        if unknown:
            raise TypeError(f"CAADLoss: expected per call only {', '.join(self._PER_CALL)}, got {', '.join(unknown)}")
        return fused_caad_loss(
            student_logits, teacher_audio_logits, teacher_text_logits, target, **{**self.options, **per_call}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


def linear_settings(
    terms: LossTerms, options: LinearLossOptions, student: tuple[Tensor, Tensor, Tensor | None], chosen: str
) -> _schema.LinearSettings:
    """What the operator is asked for. ``student``: hidden states, weight and bias."""
    hidden, weight, bias = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in student)
    if not terms.is_reduced() and (weight or bias):
        hidden = weight = bias = False  # the backward runs the chunks with each token's own factor
    logits_dtype, chunk_tokens, workspace_bytes = options.chunking
    return _schema.LinearSettings(
        chunk_tokens, workspace_bytes, terms.is_reduced(), hidden, weight, bias, options.return_stats, logits_dtype, chosen,
        options.round_contrast,
    )  # fmt: skip


def _three_dimensional(logits: Tensor) -> Tensor:
    """(B, T, V) without a copy where the strides allow it."""
    if logits.dim() == 3:
        return logits
    if logits.dim() < 3:
        return logits[(None,) * (3 - logits.dim())]
    return logits.reshape(-1, *logits.shape[-2:])


def _may_overwrite(given: Tensor, *teacher: Tensor | None) -> bool:
    rows = _three_dimensional(given)
    same_memory = rows.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    if any(x is not None and _overlap(given, x) for x in teacher):
        return False  # another row of the teacher would be read after the gradient has been written there
    return same_memory and _rows_are_apart(rows) and _schema.can_be_consumed(given)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last item of both has bytes in common."""
    ends = []
    for x in (a, b):
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        ends.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size() if x.numel() else x.data_ptr()))
    return max(ends[0][0], ends[1][0]) < min(ends[0][1], ends[1][1])


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
