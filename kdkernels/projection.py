"""A teacher's distribution as a frozen student head sees it: made once, then a step costs what cross-entropy costs.

Legend: ... leading dimensions (their product is N tokens), K likeliest ids, V_s / V_t vocabulary widths, V valid ids, H_s / H_t
hidden widths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .caad import CAADStats
from .checks import check_device, check_head, check_leading, check_shape, check_tensor, check_text_path, is_whole
from .loss_options import LinearLossOptions
from .loss_terms import LossTerms, accumulation_dtype, alpha_tensor, check_amounts, looked_at, valid_ids
from .ops import projection as _projection
from .ops import schema as _schema
from .ops.dispatch import choose_for
from .ops.projected import Projected

__all__ = ["TeacherProjection", "fused_linear_projected_loss", "project_teacher"]

_SAMPLED_ROWS = 64  # of a head, for its fingerprint
_TAIL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class TeacherProjection:
    """What a teacher's distribution p means to one frozen student head, for a forward KL at one temperature.

    ::

        tail      = sum over v outside ids of p_v W_s[v]          tail_bias likewise with the head's bias
        KL(p||q)  = negentropy - sum_ids p_v s_v / tau - scale (tail . h_s + tail_bias) / tau + mass lse(s / tau)

    Made by :func:`project_teacher`. A token takes 8 K + 4 H_s + 12 bytes with a float32 tail.

    Attributes:
        ids: (..., K) int32, the likeliest ids; -1 where there is none.
        probabilities: (..., K) float32, theirs at ``temperature``.
        tail: (..., H_s), the other ids' probabilities times the student's head.
        tail_bias: (...) float32.
        negentropy: (...) float32, sum_v p_v log p_v over all ids.
        mass: (...) float32, the sum of p: 1, or 0 where every id is masked. With several teachers the sum of their weights.
        temperature, student_logit_scale, vocab_size: what it was made for. The loss takes them from here.
        student_fingerprint: of the head's weight and bias.
        made_with: the teacher's settings in words, for a record.
    """

    ids: Tensor
    probabilities: Tensor
    tail: Tensor
    tail_bias: Tensor
    negentropy: Tensor
    mass: Tensor
    temperature: float
    student_logit_scale: float
    vocab_size: int
    student_fingerprint: str
    made_with: str = ""

    @property
    def leading(self) -> torch.Size:
        """The leading shape (...), one entry a token."""
        return self.mass.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the six tensors."""
        return sum(x.nbytes for x in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The six tensors by name."""
        return {name: getattr(self, name) for name in Projected._fields}

    def __getitem__(self, index: Any) -> TeacherProjection:
        """Some of the tokens; ``index`` as for a tensor of the leading shape."""
        return self._with({name: x[index] for name, x in self.tensors().items()})

    def to(self, device: torch.device | str) -> TeacherProjection:
        """The same on another device. Tensors that are there already are shared."""
        return self._with({name: x.to(device) for name, x in self.tensors().items()})

    def spread(self, where: Tensor, count: int) -> TeacherProjection:
        """Of ``count`` tokens: these ones at the places ``where`` (n,) int64, and in between tokens about which it says nothing.

        For projections with one leading dimension. A token in between has mass 0, so its kd and the gradient of that are 0.
        """
        check_tensor("where", where)
        if where.dtype != torch.int64:
            raise TypeError(f"where: expected int64 places, got {where.dtype}")
        if len(self.leading) != 1 or where.shape != self.leading:
            raise ValueError(f"where: expected one place for each of the tokens {tuple(self.leading)}, got {tuple(where.shape)}")

        def placed(name: str, x: Tensor) -> Tensor:
            empty = x.new_full((count, *x.shape[1:]), -1 if name == "ids" else 0)
            return empty.index_copy_(0, where.to(x.device), x)

        return self._with({name: placed(name, x) for name, x in self.tensors().items()})

    def _with(self, changes: dict[str, Any]) -> TeacherProjection:
        return replace(self, **changes)

    @classmethod
    def cat(cls, projections: Sequence[TeacherProjection]) -> TeacherProjection:
        """The tokens of several, one after the other along the first dimension; all made for the same student head.

        Where they have different numbers of ids, the shorter rows are filled up with id -1.
        """
        first = _alike(projections)
        k = max(p.ids.shape[-1] for p in projections)

        def widened(p: TeacherProjection, name: str) -> Tensor:
            x = p.tensors()[name]
            if name not in ("ids", "probabilities") or x.shape[-1] == k:
                return x
            filler = x.new_full((*x.shape[:-1], k - x.shape[-1]), -1 if name == "ids" else 0)
            return torch.cat([x, filler], -1)

        return first._with({name: torch.cat([widened(p, name) for p in projections]) for name in first.tensors()})

    @classmethod
    def mixture(
        cls, projections: Sequence[TeacherProjection], weights: Sequence[float | Tensor] | None = None
    ) -> TeacherProjection:
        """Several teachers of the same tokens as one: the loss is then tau^2 sum_k weight_k KL(p_k || q).

        Args:
            weights: numbers >= 0 or tensors (...), one for each; default 1 each.

        A training step with the mixture costs what it costs with one teacher. Each id is kept once, so a token may hold as many
        ids as all teachers together.

        Raises ValueError where they were made for different heads, temperatures or tokens, and for a negative weight.
        """
        first = _alike(projections)
        if not (weights is None or isinstance(weights, (Sequence, Tensor))):
            raise TypeError(f"weights: expected a list, one for each projection, or None, got {type(weights).__name__}")
        given = [1.0] * len(projections) if weights is None else list(weights)
        if len(given) != len(projections):
            raise ValueError(f"weights: expected {len(projections)}, one for each projection, got {len(given)}")
        for k, p in enumerate(projections):
            if p.leading != first.leading:
                raise ValueError(f"projections[{k}]: expected the tokens {tuple(first.leading)}, got {tuple(p.leading)}")
        device, leading = first.mass.device, first.leading
        omega = [
            alpha_tensor(f"weights[{k}]", w, leading, device, torch.float32).expand(leading.numel())
            for k, w in enumerate(given)
        ]
        for k, w in enumerate(omega):
            check_amounts(f"weights[{k}]", w)
        mixed = _projection.mixture([_flat(p) for p in projections], omega)
        made_with = " + ".join(p.made_with for p in projections)
        return first._with({**_unflat(mixed, leading), "made_with": made_with})


def _alike(projections: Sequence[TeacherProjection]) -> TeacherProjection:
    """The first; ValueError unless all were made for one head, temperature and vocabulary."""
    if not isinstance(projections, Sequence):
        raise TypeError(f"projections: expected a list of TeacherProjection, got {type(projections).__name__}")
    if not projections:
        raise ValueError("projections: expected at least one, got none")
    first = projections[0]
    for k, p in enumerate(projections):
        if not isinstance(p, TeacherProjection):
            raise TypeError(f"projections[{k}]: expected a TeacherProjection, got {type(p).__name__}")
        for name in ("temperature", "student_logit_scale", "vocab_size", "student_fingerprint"):
            if getattr(p, name) != getattr(first, name):
                raise ValueError(
                    f"projections[{k}].{name}: expected {getattr(first, name)!r} as the first has, got {getattr(p, name)!r}"
                )
    return first


def _flat(projection: TeacherProjection) -> Projected:
    lead = projection.leading
    return Projected(*(x.reshape(-1, *x.shape[len(lead) :]) for x in projection.tensors().values()))


def _unflat(projected: Projected, leading: torch.Size) -> dict[str, Tensor]:
    return {name: x.reshape((*leading, *x.shape[1:])) for name, x in projected._asdict().items()}


@torch.no_grad()
def project_teacher(
    teacher_audio_hidden: Tensor,
    teacher_text_hidden: Tensor | None,
    teacher_weight: Tensor,
    student_weight: Tensor,
    *,
    alpha: float | Tensor = 2.0,
    temperature: float = 2.0,
    top_k: int = 64,
    teacher_bias: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    student_logit_scale: float = 1.0,
    plausibility: float | None = None,
    vocab_size: int | None = None,
    tail_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
) -> TeacherProjection:
    r"""A frozen teacher's distribution as one frozen student head sees it, for :func:`fused_linear_projected_loss`.

    ::

        p    = softmax(z_hat / tau),  z_hat = (1 + alpha) z_audio - alpha z_text  as in fused_linear_caad_loss
        ids  = the top_k likeliest of p;   tail = sum over the others of p_v W_s[v]

    Args:
        teacher_audio_hidden, teacher_text_hidden, teacher_weight: (..., H_t), (..., H_t) or None, (V_t, H_t), as in
            :func:`kdkernels.fused_linear_caad_loss`; so are alpha, temperature, plausibility, vocab_size and what starts with
            ``teacher_``.
        student_weight: (V_s, H_s), the head that the student will have in training, frozen.
        top_k: K >= 1. More ids give a more exact gradient near convergence. At KL 0.0004 its error against float64 was 0.26% with
            64 ids, 0.38% with 16 and 3.2% with one, and 1.3% from states (random heads, V 32,000; projection_cpu.csv).
        student_bias: (V_s,), finite and frozen, or None. student_logit_scale: factor on the student's logits.
        tail_dtype: float32, or bfloat16 or float16: half the bytes. It costs accuracy near convergence where much of p lies
            outside ``ids``.
        chunk_tokens, workspace_bytes: as in the loss; about four float32 tensors (chunk, V) exist at a time.
        impl: "auto", "reference", "cpu" or "triton": how the products run. float64 inputs are computed in float64.

    Returns:
        :class:`TeacherProjection` of the leading shape of ``teacher_audio_hidden``, without gradient.

    One product with the teacher's head (two with a softcap and a contrast) and one with the student's, once for each token. In
    low precision p is the sum of two tensors, so the tail is exact to 1e-5.

    Raises ValueError or TypeError for a bad argument, with its name; ValueError for a student head that requires a gradient.

    Source: the sums follow from the definition of the KL divergence; CAAD, arXiv 2606.23052.
    """
    options = LinearLossOptions(
        teacher_softcap=teacher_softcap, teacher_logit_scale=teacher_logit_scale, student_logit_scale=student_logit_scale,
        chunk_tokens=chunk_tokens, workspace_bytes=workspace_bytes, alpha=alpha, temperature=temperature,
        plausibility=plausibility, vocab_size=vocab_size, impl=impl,
    )  # fmt: skip
    if not is_whole(top_k):
        raise TypeError(f"top_k: expected an int, got {type(top_k).__name__}")
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if tail_dtype not in _TAIL_DTYPES:
        raise ValueError(f"tail_dtype: expected float32, bfloat16 or float16, got {tail_dtype}")
    audio, text = teacher_audio_hidden, teacher_text_hidden
    check_head("teacher_{}", audio, teacher_weight, teacher_bias, audio, "audio_hidden")
    check_text_path("teacher_text_hidden", text, audio)
    _check_student_head(student_weight, student_bias, audio)
    if student_bias is not None and looked_at(audio.device) and not bool(torch.isfinite(student_bias).all()):
        raise ValueError("student_bias: expected finite values, got NaN or an infinity; leave masked ids out by vocab_size")
    vocab = valid_ids(vocab_size, (student_weight.shape[0], teacher_weight.shape[0]))
    spec = options.row_spec(vocab, has_target=False)
    dtypes = [x.dtype for x in (audio, text, teacher_weight, student_weight) if x is not None]
    chosen = choose_for("project_teacher", impl, audio.device, dtypes, without_cuda="for projections")
    leading = audio.shape[:-1]
    a = alpha_tensor("alpha", alpha, leading, audio.device, accumulation_dtype(dtypes))
    _schema.check_values(None, a, vocab, -100)
    head = _projection.teacher_head(
        audio.reshape(-1, audio.shape[-1]),
        None if text is None else text.reshape(-1, text.shape[-1]),
        teacher_weight,
        teacher_bias,
        a,
        spec,
        chosen,
    )
    with torch.amp.autocast(audio.device.type, enabled=False):
        projected = _projection.project_chunks(
            head,
            student_weight,
            student_bias,
            top_k=int(top_k),
            tail_dtype=tail_dtype,
            chunk_tokens=chunk_tokens,
            workspace_bytes=workspace_bytes,
        )
    shown = "by token" if isinstance(alpha, Tensor) and alpha.dim() else f"{float(alpha):g}"
    return TeacherProjection(
        **_unflat(projected, leading),
        temperature=float(temperature),
        student_logit_scale=float(student_logit_scale),
        vocab_size=vocab,
        student_fingerprint=head_fingerprint(student_weight, student_bias),
        made_with=f"alpha {shown}, plausibility {plausibility}, top_k {top_k}",
    )


def _check_student_head(weight: Tensor, bias: Tensor | None, like: Tensor) -> None:
    check_tensor("student_weight", weight, floating=True)
    check_device("student_weight", weight, like)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"student_weight: expected (vocabulary, width), got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("student_bias", bias, floating=True)
        check_shape("student_bias", bias, weight.shape[:1])
        check_device("student_bias", bias, like)
    for name, x in (("student_weight", weight), ("student_bias", bias)):
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: expected a frozen head (requires_grad False), got one that trains: its projection would be that of "
                "an older head. Use fused_linear_caad_loss for it"
            )


def head_fingerprint(weight: Tensor, bias: Tensor | None) -> str:
    """Of a head: its shape, its dtype, and 64 of its rows. Waits for a CUDA device."""
    digest = hashlib.blake2b(f"{tuple(weight.shape)} {weight.dtype} {bias is not None}".encode(), digest_size=16)
    rows = torch.linspace(0, weight.shape[0] - 1, min(_SAMPLED_ROWS, weight.shape[0]), dtype=torch.float64, device="cpu")
    rows = rows.round().long()
    for x in (weight, bias):
        if x is not None:
            digest.update(x.detach()[rows.to(x.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fused_linear_projected_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    projection: TeacherProjection,
    target: Tensor | None = None,
    *,
    kd_weight: float = 0.7,
    student_bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    kd_token_weight: Tensor | None = None,
    ce_token_weight: Tensor | None = None,
    kd_normalizer: float | Tensor | None = None,
    ce_normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    logits_dtype: torch.dtype | None = None,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    return_stats: bool = False,
) -> Tensor | Any:  # Any: (Tensor, CAADStats) with return_stats
    r"""The loss of :func:`kdkernels.fused_linear_caad_loss` from a teacher's projection: no teacher head, no teacher logits.

    ::

        s    = scale (W_s h_s + b_s),  q = softmax(s / tau)
        kd_i = tau^2 KL(p || q)                        with the sums over p that the projection holds
        loss = kd_weight sum_i w_i kd_i / norm_kd + (1 - kd_weight) sum_i u_i ce_i / norm_ce

    Args:
        student_hidden: (..., H_s) float32, bfloat16 or float16 (float64 with impl="reference").
        student_weight: (V_s, H_s), the head that the projection was made for. It must not require a gradient.
        projection: :func:`project_teacher` of the same tokens; temperature, scale and vocabulary come from it.
        target: (...) int64 or None, as in :func:`kdkernels.fused_caad_loss`.
        student_bias: (V_s,), frozen, or None.
        chunk_tokens, workspace_bytes, logits_dtype: as in :func:`kdkernels.fused_linear_caad_loss`; a chunk holds one tensor of
            logits.
        impl: "auto", "reference", "cpu" or "triton". There is no CUDA C++ kernel.
        return_stats: also return :class:`kdkernels.CAADStats`. A projection does not know the paths' divergence: it is NaN. Of a
            mixture, teacher_entropy is the weighted mean of the teachers' entropies.
        The rest: as in :func:`kdkernels.fused_caad_loss`.

    Returns:
        As :func:`kdkernels.fused_linear_caad_loss`. The gradient reaches student_hidden only.

    Two products a token instead of three: 2 N V H_s FLOP each, whatever the teacher's width. The value of kd is a difference of
    sums: its absolute error is about 1e-5 nats, which shows where kd itself is that small. The gradient does not suffer from it.

    Raises:
        ValueError: the head requires a gradient, or is not the one of the projection (64 of its rows are compared; on CUDA only
            with KDKERNELS_CHECK=1, because that waits for the device). Also for a bad argument, with its name.
        TypeError: ``projection`` is no TeacherProjection.

    Extra memory: one chunk of logits and N * H_s items for the gradient.

    Source: CAAD, arXiv 2606.23052; the sums follow from the definition of the KL divergence.
    """
    if not isinstance(projection, TeacherProjection):
        raise TypeError(f"projection: expected a TeacherProjection, got {type(projection).__name__}")
    options = LinearLossOptions(
        temperature=projection.temperature, student_logit_scale=projection.student_logit_scale, kd_weight=kd_weight,
        mask=mask, ignore_index=ignore_index, kd_token_weight=kd_token_weight, ce_token_weight=ce_token_weight,
        kd_normalizer=kd_normalizer, ce_normalizer=ce_normalizer, reduction=reduction, logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens, workspace_bytes=workspace_bytes, vocab_size=projection.vocab_size, impl=impl,
        return_stats=return_stats, alpha=0.0,
    )  # fmt: skip
    check_head("student_{}", student_hidden, student_weight, student_bias, student_hidden)
    _check_student_head(student_weight, student_bias, student_hidden)
    _check_projection(projection, student_hidden, student_weight, student_bias)
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    dtypes = [student_hidden.dtype, student_weight.dtype]
    terms = LossTerms.build(
        options,
        target,
        leading=student_hidden.shape[:-1],
        device=student_hidden.device,
        dtype=accumulation_dtype(dtypes),
        widths=(student_weight.shape[0],),
    )
    chosen = choose_for("fused_linear_projected_loss", impl, student_hidden.device, dtypes, without_cuda="for projections")
    student, projected = (hidden, student_weight, student_bias), _flat(projection)
    if chosen == "reference":
        rows = _projection.reference_rows(student, projected, terms.target, terms.spec, terms.counts(), want_stats=return_stats)
        loss, stats = terms.weigh_reference(rows)
    else:
        _schema.refuse_transforms(hidden)
        wanted = _schema.LinearSettings(
            chunk_tokens, workspace_bytes, terms.is_reduced(), torch.is_grad_enabled() and hidden.requires_grad, False, False,
            return_stats, options.chunking[0], chosen,
        )  # fmt: skip
        numbers = (*terms.spec.packed(), *wanted.packed())
        loss, _, _, _, stats, _ = _schema.differentiable(
            _projection.linear_projected, *student, *projected, terms.target, terms.kd_coef, terms.ce_coef, *numbers
        )
    loss = terms.shaped(loss)
    if not return_stats:
        return loss
    return loss, CAADStats(*(row.reshape(terms.leading) for row in stats.detach().unbind(0)))


def _check_projection(projection: TeacherProjection, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    leading = hidden.shape[:-1]
    if projection.leading != leading:
        raise ValueError(f"projection: expected one of the tokens {tuple(leading)}, got {tuple(projection.leading)}")
    check_leading("projection.ids", projection.ids, leading, "student_hidden")
    check_device("projection.tail", projection.tail, hidden)
    if projection.tail.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"projection.tail: expected a width of {hidden.shape[-1]} as student_hidden has, got {projection.tail.shape[-1]}"
        )
    if looked_at(hidden.device):
        found = head_fingerprint(weight, bias)
        if found != projection.student_fingerprint:
            raise ValueError(
                f"student_weight: expected the head that the projection was made for ({projection.student_fingerprint[:12]}), "
                f"got another one ({found[:12]}); project the teacher again"
            )
