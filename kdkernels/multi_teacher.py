"""Distillation from several teachers in one pass over the student's logits: public signature, checks, dispatch.

Legend: ... leading dimensions (their product is N tokens), K sources, V_s / V_k vocabulary widths of the student and of source k,
V valid ids, H_s / H_k hidden widths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .caad import linear_loss, linear_settings
from .checks import check_head, check_leading, check_not_negative, check_tensor, check_text_path
from .loss_options import LinearLossOptions, check_divergence, check_head_options, limit_of_jsd
from .loss_terms import LossTerms, accumulation_dtype, alpha_tensor, as_autocast, token_weight
from .ops import multi_teacher as _multi_teacher
from .ops import reference as _reference
from .ops import schema as _schema
from .ops.dispatch import choose_for
from .ops.rows import LinearTensors, RowSpec, filled, scalar


@dataclass(frozen=True, eq=False)
class TeacherSource:
    """One teacher of :func:`fused_linear_multi_teacher_loss`, which checks it. None of its tensors gets a gradient.

    Args:
        hidden: (..., H_k) float32, bfloat16 or float16: the LM head's inputs (with the audio, for a dual-path teacher).
        weight: (V_k, H_k), the LM head.
        text_hidden: (..., H_k), the negative path, or None: no contrast.
        bias: (V_k,) or None.
        softcap: > 0, as in Gemma 2, applied after the scale; or None.
        logit_scale: factor on the logits.
        alpha: contrast strength >= 0, a number or a tensor (...) per token. Not used where ``text_hidden`` is None.
        source_weight: omega >= 0, a number or a tensor (...) per token. Where it is 0 the source may hold any finite values.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        jsd_beta: beta in [0, 1] of the jsd.
        plausibility: beta in (0, 1] of the plausibility mask, or None; not with "reverse_kl".
    """

    hidden: Tensor
    weight: Tensor
    text_hidden: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    alpha: float | Tensor = 2.0
    source_weight: float | Tensor = 1.0
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    plausibility: float | None = None


class MultiTeacherStats(NamedTuple):
    """Detached per-token statistics, float32, of the targets' leading shape or (K, ...), 0 at ignored positions.

    kd               (...) tau^2 sum_k omega_k D_k(p_k, q)
    ce               (...) -log softmax(s)[y] (0 without a target)
    source_kd        (K, ...) tau^2 D_k(p_k, q), without omega_k
    student_entropy  (...) of q = softmax(s / tau), in nats
    source_entropy   (K, ...) of p_k, in nats
    top1_agreement   (K, ...) 1 where argmax s == argmax z_k, else 0
    path_divergence  (K, ...) KL(softmax(z_audio / tau) || softmax(z_text / tau)) of source k in nats; 0 without a text path
    """

    kd: Tensor
    ce: Tensor
    source_kd: Tensor
    student_entropy: Tensor
    source_entropy: Tensor
    top1_agreement: Tensor
    path_divergence: Tensor


def fused_linear_multi_teacher_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    sources: Sequence[TeacherSource],
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    round_contrast: bool = False,
    temperature: float = 2.0,
    kd_weight: float = 0.7,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    kd_token_weight: Tensor | None = None,
    ce_token_weight: Tensor | None = None,
    kd_normalizer: float | Tensor | None = None,
    ce_normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Tensor | Any:  # Any: (Tensor, MultiTeacherStats) with return_stats
    r"""Distillation from K teachers at once, from hidden states and LM heads, in token chunks: one gradient for what mixes.

    ::

        z_k  = (1 + alpha_k) z_audio,k - alpha_k z_text,k       (z_audio,k without a text path)
        p_k  = softmax(z_k / tau),  q = softmax(s / tau)
        kd_i = tau^2 sum_k omega_ki D_k(p_ki, q_i)
        loss = kd_weight sum_i w_i kd_i / norm_kd + (1 - kd_weight) sum_i u_i ce_i / norm_ce

    A weighted sum of forward KLs is W = sum_k omega_k times the KL of one distribution, p = sum_k omega_k p_k / W, plus a term
    that does not depend on the student. The same holds for reverse KLs, with the mean of the logits. So all forward_kl sources
    share one gradient and all reverse_kl sources share another; each jsd source has its own. With one source the result is
    that of :func:`fused_linear_caad_loss`, to the bit.

    Args:
        student_hidden: (..., H_s) float32, bfloat16 or float16 (float64 with impl="reference").
        student_weight: (V_s, H_s). Its gradient is computed only if it requires one.
        sources: one or more :class:`TeacherSource`. Widths, dtypes and padded vocabularies may differ. An id must mean the
            same token in all of them.
        target: (...) int64 or None, as in :func:`fused_caad_loss`. On the CPU ignored positions are left out of the GEMMs.
        student_bias, student_softcap, student_logit_scale, chunk_tokens, workspace_bytes: as in :func:`fused_linear_caad_loss`.
        logits_dtype: dtype of the student's and of one source's logits of a chunk; None: float32. The mixture is float32 always.
        round_contrast: as in :func:`fused_linear_caad_loss`, for every source.
        temperature, kd_weight, ignore_index, kd_token_weight, ce_token_weight: as in :func:`fused_caad_loss`.
        kd_normalizer, ce_normalizer, reduction: as in :func:`fused_caad_loss`. The sources' weights do not enter the normalizers.
        vocab_size: number of valid ids; default the smallest of V_s and all V_k. Logits beyond it count as -inf on all sides.
        impl: "auto", "reference", "cpu", "triton" or "cuda" (row kernel in CUDA C++, mixing in Triton).
        return_stats: also return :class:`MultiTeacherStats`. This computes both paths of each source and one more row pass for
            each.

    There is no process_group: a vocabulary-parallel head works with one teacher (:func:`fused_linear_caad_loss`).

    Returns:
        float32 loss (float64 for float64 inputs): () or, with reduction="none", (...); with ``return_stats`` a pair. Gradients
        reach student_hidden, student_weight and student_bias only. A token at which all omega are 0 has kd 0.

    -inf logits are legal as in :func:`fused_caad_loss`. Where a reverse KL is infinite, the token gets no gradient from any
    reverse_kl source. A source whose logits are all masked at a token contributes nothing there.

    Extra memory: one chunk of logits for any K and N: the student's and one source's in ``logits_dtype`` and the mixture in
    float32. One more in ``logits_dtype`` where a source needs both paths (a softcap with a contrast, or ``return_stats``). One
    more in float32 where several forward_kl and several reverse_kl sources are given. Then N * H_s items for dh, and V_s * H_s
    float32 for dW if the head trains. Computes in float32 (float64 for the sums of a row on the CPU).

    Raises:
        ValueError, TypeError: for a bad argument, with its name (``sources[1].weight``), expected and got. On the CPU also for a
            target outside [0, vocab), a bad alpha or source_weight. On CUDA the loss of such a row is NaN, unless
            KDKERNELS_CHECK=1.
        RuntimeError: ``impl`` names something that is not installed.

    Source: source- and layer-wise distillation, arXiv 2509.18579; CAAD, arXiv 2606.23052.
    """
    options = LinearLossOptions(
        student_softcap=student_softcap, student_logit_scale=student_logit_scale, chunk_tokens=chunk_tokens,
        workspace_bytes=workspace_bytes, logits_dtype=logits_dtype, round_contrast=round_contrast, temperature=temperature,
        kd_weight=kd_weight, mask=mask, ignore_index=ignore_index, kd_token_weight=kd_token_weight,
        ce_token_weight=ce_token_weight,
        kd_normalizer=kd_normalizer, ce_normalizer=ce_normalizer, reduction=reduction, vocab_size=vocab_size, impl=impl,
        return_stats=return_stats,
    )  # fmt: skip
    return _loss_of_sources((student_hidden, student_weight, student_bias), _check_sources(sources), target, options)


class _Taught(NamedTuple):
    """What one source's teaching is computed from, checked."""

    heads: LinearTensors  # the student's among them
    alpha: Tensor  # (1,) or (N,)
    omega: Tensor  # (N,)
    spec: RowSpec


def _loss_of_sources(
    student: tuple[Tensor, Tensor, Tensor | None],
    sources: list[TeacherSource],
    target: Tensor | None,
    options: LinearLossOptions,
) -> Tensor | tuple[Tensor, MultiTeacherStats]:
    hidden, weight, bias = student
    check_head("student_{}", hidden, weight, bias, hidden)
    leading, device = hidden.shape[:-1], hidden.device
    for k, source in enumerate(sources):
        _check_source(f"sources[{k}].", source, hidden)
    hidden, weight, bias = as_autocast(*student)
    student = (hidden, weight, bias)
    sources = [_as_autocast(source) for source in sources]
    given = [*student, *(x for s in sources for x in (s.hidden, s.weight, s.text_hidden, s.bias))]
    dtypes = [x.dtype for x in given if x is not None]
    dtype = accumulation_dtype(dtypes)
    terms = LossTerms.build(
        dataclasses.replace(options, alpha=0.0),  # each source has its own
        target,
        leading=leading,
        device=device,
        dtype=dtype,
        widths=(weight.shape[0], *(x.weight.shape[0] for x in sources)),
    )
    taught = [_taught(f"sources[{k}].", source, student, terms, device, dtype) for k, source in enumerate(sources)]
    chosen = choose_for("fused_linear_multi_teacher_loss", options.impl, device, dtypes)
    # The operator of several sources looks at alpha itself, and knows the source's name.
    for k, x in enumerate(taught if len(taught) == 1 or chosen == "reference" else ()):
        if not torch.compiler.is_compiling():
            _schema.check_values(None, x.alpha, x.spec.vocab, x.spec.ignore_index, source=f"sources[{k}].")
    loss, stats = (_one if len(sources) == 1 else _several)(terms, taught, options, chosen)
    loss = terms.shaped(loss)
    if not options.return_stats:
        return loss
    kd, ce, student_entropy, *others = (row.reshape(leading) for row in stats.detach().float().unbind(0))
    source_kd, *others = torch.stack(others).unflatten(0, (-1, len(sources))).unbind(0)
    return loss, MultiTeacherStats(kd, ce, source_kd, student_entropy, *others)


def _as_autocast(source: TeacherSource) -> TeacherSource:
    hidden, text_hidden, weight, bias = as_autocast(source.hidden, source.text_hidden, source.weight, source.bias)
    return dataclasses.replace(source, hidden=hidden, text_hidden=text_hidden, weight=weight, bias=bias)


def _check_source(name: str, source: TeacherSource, student_hidden: Tensor) -> None:
    check_head(name + "{}", source.hidden, source.weight, source.bias, student_hidden)
    check_head_options(name + "{}", source.softcap, source.logit_scale)
    check_leading(f"{name}hidden", source.hidden, student_hidden.shape[:-1], "student_hidden")
    check_text_path(f"{name}text_hidden", source.text_hidden, source.hidden)
    check_divergence(source.divergence, source.jsd_beta, source.plausibility, name)


def _taught(
    name: str,
    source: TeacherSource,
    student: tuple[Tensor, Tensor, Tensor | None],
    terms: LossTerms,
    device: torch.device,
    dtype: torch.dtype,
) -> _Taught:
    spec = dataclasses.replace(
        terms.spec,
        divergence=limit_of_jsd(source.divergence, source.jsd_beta),
        jsd_beta=scalar(source.jsd_beta),
        plausibility=None if source.plausibility is None else scalar(source.plausibility),
        teacher_scale=scalar(source.logit_scale),
        teacher_softcap=None if source.softcap is None else scalar(source.softcap),
    )
    alpha = 0.0 if source.text_hidden is None else source.alpha
    return _Taught(
        LinearTensors(*student, source.hidden, source.text_hidden, source.weight, source.bias).flat(),
        alpha_tensor(f"{name}alpha", alpha, terms.leading, device, dtype),
        _omega(f"{name}source_weight", source.source_weight, terms.leading, device, dtype),
        spec,
    )


def _one(terms: LossTerms, taught: list[_Taught], options: LinearLossOptions, chosen: str) -> tuple[Tensor, Tensor]:
    """(loss per token or reduced, statistics where wanted) of one source."""
    heads, alpha, omega, spec = taught[0]
    weighted = terms._replace(spec=spec, alpha=alpha, kd_coef=terms.kd_coef * omega)
    loss, stats = linear_loss(weighted, heads, options, chosen)
    if options.return_stats:
        kd, ce, student_entropy, *others = stats.unbind(0)
        stats = torch.stack([torch.where(omega == 0, 0.0, omega * kd), ce, student_entropy, kd, *others])
    return loss, stats


def _several(
    terms: LossTerms, taught: list[_Taught], options: LinearLossOptions, chosen: str
) -> tuple[Tensor, Tensor]:
    """(loss per token or reduced, statistics where wanted) of checked arguments."""
    student = taught[0].heads[:3]
    omega = torch.stack([x.omega for x in taught])
    if chosen == "reference":
        teachers = [(*x.heads[3:], x.alpha, x.spec) for x in taught]
        result = _reference.linear_multi_teacher(
            *student, teachers, terms.target, omega, want_stats=options.return_stats, counts=terms.counts()
        )
        return terms.weigh_reference(result)
    _schema.refuse_transforms(*student)
    heads = [list(x) for x in zip(*(x.heads[3:] for x in taught), strict=True)]
    loss, _, _, _, stats, _ = _multi_teacher.linear_multi_teacher(
        *student, *heads, [x.alpha for x in taught], terms.target, omega, terms.kd_coef, terms.ce_coef,
        *_multi_teacher.packed_specs([x.spec for x in taught]), *linear_settings(terms, options, student, chosen).packed(),
    )  # fmt: skip
    return loss, stats


def _check_sources(sources: Any) -> list[TeacherSource]:
    if isinstance(sources, Tensor) or not isinstance(sources, Sequence):
        raise TypeError(f"sources: expected a list of TeacherSource, got {type(sources).__name__}")
    if not sources:
        raise ValueError("sources: expected at least one TeacherSource, got none")
    for k, source in enumerate(sources):
        if not isinstance(source, TeacherSource):
            raise TypeError(f"sources[{k}]: expected a TeacherSource, got {type(source).__name__}")
    return list(sources)


def _omega(
    name: str, weight: float | Tensor, leading: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(N,)"""
    if not isinstance(weight, Tensor):
        check_not_negative(name, weight)
        return filled((math.prod(leading),), weight, dtype=dtype, device=device)
    check_tensor(name, weight)
    if weight.dim() == 0:
        weight = weight.expand(leading)
    return token_weight(name, weight, leading, None, device, dtype)
