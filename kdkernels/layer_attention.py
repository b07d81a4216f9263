"""Layer distillation by cross-attention: the student's states attend over the teacher's, and are compared with what they find.

The CAAD authors' code has such a form of its layer loss. The public digests of the paper give no formula for it, so the form here
is a choice: the plainest one that needs no output of its own.

Legend: B rows (examples), S positions of the student in a row, T of the teacher, H_s / H_t hidden widths, h heads, L pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_device, check_leading, check_shape, check_tensor, is_whole
from .layer_checks import check_states, initial_weight, layer_weight_tensor, layer_widths, pair_count
from .loss_options import REDUCTIONS
from .loss_terms import accumulation_dtype, alpha_tensor
from .ops.rows import legal_alpha
from .ops.schema import check_values

_PARTS = ("query", "key", "value")


class LayerAttention(nn.Module):
    r"""Squared error between a student's states and the teacher's states that they attend to, for L pairs of layers.

    ::

        t_l  = (1 + alpha) h_audio_l - alpha h_text_l                          (h_audio_l without a text path)
        q_i  = W_q s_i / rms(s_i)      k_j = W_k t_j / rms(t_j)      v_j = W_v t_j (+ b)
        a_i  = sum_j softmax_j(q_i . k_j / sqrt(H_s / h)) v_j                  j: the valid positions of the teacher in i's row
        e_li = |s_i - a_i|^2 / H_s
        loss = sum_l layer_weight_l sum_{i valid} e_li / (number of valid positions of the student)

    W_q (H_s, H_s), W_k (H_s, H_t) and W_v (H_s, H_t) are parameters of each pair, also where widths are equal. Each of h heads
    has H_s / h columns of q, k and v, and a softmax of its own. rms(x) = sqrt(mean x^2 + 1e-6): states grow with depth, and
    without it the softmax would choose one position from the start. Unlike a projection, a position is not tied to the
    teacher's position of the same number: student and teacher may have other tokens, and other numbers of them. A position sees
    all of its row, later positions too. With ``normalize`` both sides of the difference are divided by their norms: e = (2 - 2
    cos) / H_s. A zero vector stays zero there, and gets no gradient.

    Args:
        student_width, teacher_width: H_s, H_t of all pairs, or one number a pair.
        pairs: number of pairs L, or what :func:`kdkernels.layer_map` returned (kept as ``pairs``).
        heads: h, a divisor of every H_s.
        bias: the values also get a vector b, 0 at first.
        generator: of the random initialisation.
        dtype, device: of the weights.

    The parameters are made here, so they are in ``parameters()`` and ``state_dict()`` from the first step on. They serve training
    only. W_q begins as the identity; W_k and W_v begin with orthonormal rows or columns, or as the identity.

    Raises:
        ValueError, TypeError: for a bad argument, with its name.

    ``LayerAttention(576, 960, 4)(student_states, teacher_states, mask=mask)`` is the loss, see :meth:`forward`.

    Source: CAAD, arXiv 2606.23052 (its code; see above).
    """

    def __init__(
        self,
        student_width: int | Sequence[int],
        teacher_width: int | Sequence[int],
        pairs: int | Sequence[tuple[int, int]],
        *,
        heads: int = 1,
        bias: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        count = pair_count(pairs)
        self.pairs = None if is_whole(pairs) else [tuple(p) for p in pairs]
        self.heads = heads
        self._count = count
        widths = (layer_widths("student_width", student_width, count), layer_widths("teacher_width", teacher_width, count))
        for i, (s, t) in enumerate(zip(*widths, strict=True)):
            if not is_whole(heads) or heads < 1 or s % heads:
                raise ValueError(f"heads: expected a divisor of the student's width {s}, got {heads!r}")
            for part, width in zip(_PARTS, (s, t, t), strict=True):
                empty = torch.empty((s, width), dtype=dtype, device=device)
                self.register_parameter(f"{part}_{i}", nn.Parameter(initial_weight(empty, generator)))
            self.register_parameter(f"bias_{i}", nn.Parameter(empty.new_zeros(s)) if bias else None)

    def forward(
        self,
        student_hidden: Sequence[Tensor],
        teacher_hidden: Sequence[Tensor],
        *,
        teacher_text_hidden: Sequence[Tensor] | None = None,
        alpha: float | Tensor = 0.0,
        mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        normalize: bool = False,
        layer_weight: Sequence[float] | Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss; see the class.

        Args:
            student_hidden: L tensors (B, S, H_s), floating point.
            teacher_hidden: L tensors (B, T, H_t), the audio path. They never get a gradient.
            teacher_text_hidden: L tensors like ``teacher_hidden``, the path without audio, or None.
            alpha: contrast strength >= 0 of the layer target: a number, or a tensor (B, T).
            mask: (B, S) bool, True where a position of the student counts; None: everywhere. Others are not read.
            teacher_mask: (B, T) bool, True where a position of the teacher may be attended to. Others are not read. None:
                ``mask`` where S = T, else everywhere.
            normalize: compare directions only.
            layer_weight: L numbers >= 0, or a tensor (L,); None: 1 each.
            reduction: "mean" divides by the number of valid positions of the student, "sum" does not, "none" returns
                sum_l layer_weight_l e_li as (B, S).

        Returns:
            float32 loss (float64 for float64 inputs): () or (B, S). Positions in a row without a valid position of the teacher do
            not count. Without a position that counts it is 0 with zero gradients. Gradients reach ``student_hidden`` and the
            parameters.

        Products run in the weights' dtype (autocast applies), by ``torch.nn.functional.scaled_dot_product_attention``;
        differences in float32. Extra memory of a pair, kept for the backward: q, a (B S H_s) and k, v (B T H_s) in the weights'
        dtype, some copies of the states, and up to B h S T weights of the attention, depending on the backend that torch chooses.

        Raises:
            ValueError, TypeError: for a bad argument, with its name and pair, expected and got.
        """
        students = check_states("student_hidden", student_hidden, self._count)
        teachers = check_states("teacher_hidden", teacher_hidden, self._count)
        texts = None if teacher_text_hidden is None else check_states("teacher_text_hidden", teacher_text_hidden, self._count)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
        first = students[0]
        for name, x in (("student_hidden[0]", first), ("teacher_hidden[0]", teachers[0])):
            if x.dim() != 3:
                raise ValueError(f"{name}: expected (rows, positions, width), got {tuple(x.shape)}")
        if len(first) != len(teachers[0]):
            raise ValueError(f"teacher_hidden[0]: expected {len(first)} rows as student_hidden[0] has, got {len(teachers[0])}")
        for i in range(self._count):
            self._check_pair(i, students, teachers, texts)
        leading, seen = first.shape[:-1], teachers[0].shape[:-1]
        same_places = teacher_mask is None and leading == seen
        valid = _mask("mask", mask, leading, first)
        keys = valid if same_places else _mask("teacher_mask", teacher_mask, seen, first)
        dtype = accumulation_dtype([x.dtype for x in (*students, *teachers, *(texts or []), *self.parameters())])
        alphas = alpha_tensor("alpha", alpha, seen, first.device, dtype)
        if not torch.compiler.is_compiling():
            check_values(None, alphas, 0, 0)
        alphas = legal_alpha(alphas)  # for what is not checked
        contrasted = texts is not None and (isinstance(alpha, Tensor) or alpha != 0)
        has_keys = keys.any(1, keepdim=True)  # (B, 1)
        valid = valid & has_keys
        attended = keys | ~has_keys  # of a row without any all are open: its result is not used, and a softmax over none is NaN
        weights = layer_weight_tensor(layer_weight, self._count, first.device, dtype)
        total = torch.zeros(leading, dtype=dtype, device=first.device)
        for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
            s = s.masked_fill(~valid[..., None], 0)
            t = t.detach().masked_fill(~keys[..., None], 0)
            if contrasted and texts is not None:
                text = texts[i].detach().masked_fill(~keys[..., None], 0).to(dtype)
                strength = alphas if len(alphas) == 1 else alphas.reshape(*seen, 1)
                t = t.to(dtype) + torch.where(keys[..., None], strength, 0) * (t.to(dtype) - text)
            found = self._attend(i, s, t, attended).to(dtype)
            mine = s.to(dtype)
            if normalize:
                mine, found = _direction(mine), _direction(found)
            error = (mine - found).square().sum(-1) / s.shape[-1]
            total = total + weights[i] * error.masked_fill(~valid, 0)
        if reduction == "none":
            return total
        return total.sum() / valid.sum().clamp_min(1) if reduction == "mean" else total.sum()

    def _attend(self, i: int, s: Tensor, t: Tensor, attended: Tensor) -> Tensor:
        """(B, S, H_s) what the student's states `s` find in the teacher's states `t`."""
        query, key, value = (getattr(self, f"{part}_{i}") for part in _PARTS)
        made = [
            F.linear(_unit(s).to(query.dtype), query),
            F.linear(_unit(t).to(key.dtype), key),
            F.linear(t.to(value.dtype), value, getattr(self, f"bias_{i}")),
        ]
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in made)  # (B, h, S or T, H_s / h)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=attended[:, None, None, :])
        return found.transpose(1, 2).flatten(-2)

    def _check_pair(self, i: int, students: list[Tensor], teachers: list[Tensor], texts: list[Tensor] | None) -> None:
        s, t = students[i], teachers[i]
        check_leading(f"student_hidden[{i}]", s, students[0].shape[:-1], "student_hidden[0]")
        check_leading(f"teacher_hidden[{i}]", t, teachers[0].shape[:-1], "teacher_hidden[0]")
        width, of_teacher = getattr(self, f"key_{i}").shape
        for name, x, expected in ((f"student_hidden[{i}]", s, width), (f"teacher_hidden[{i}]", t, of_teacher)):
            check_device(name, x, students[0])
            if x.shape[-1] != expected:
                raise ValueError(f"{name}: expected width {expected}, got {x.shape[-1]}")
        if texts is not None:
            check_shape(f"teacher_text_hidden[{i}]", texts[i], t.shape)
            check_device(f"teacher_text_hidden[{i}]", texts[i], students[0])

    def extra_repr(self) -> str:
        shapes = ", ".join("x".join(map(str, getattr(self, f"key_{i}").shape)) for i in range(self._count))
        return f"heads={self.heads}, keys: {shapes}"


def _unit(x: Tensor) -> Tensor:
    """`x` (..., H) divided by its root mean square, in float32 at least."""
    x = x.to(accumulation_dtype([x.dtype]))
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def _direction(x: Tensor) -> Tensor:
    """`x` (..., H) divided by its norm; zeros stay zeros without a gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (norm > 0) / torch.where(norm > 0, norm, 1)


def _mask(name: str, mask: Tensor | None, leading: Any, like: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(leading, dtype=torch.bool, device=like.device)
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {mask.dtype}")
    check_shape(name, mask, leading)
    check_device(name, mask, like)
    return mask
