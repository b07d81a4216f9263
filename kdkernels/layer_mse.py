"""Layer-wise distillation: squared error between projected hidden states of student and teacher, and the projections.

Legend: ... leading dimensions (their product is N tokens), L pairs of layers, H_s / H_t hidden widths of student and teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_device, check_leading, check_not_negative, check_shape, check_tensor, is_whole
from .layer_checks import check_states, initial_weight, layer_weight_tensor, layer_widths, pair_count
from .loss_options import REDUCTIONS
from .loss_terms import accumulation_dtype, alpha_tensor
from .ops import layers as _layers
from .ops.dispatch import choose_for
from .ops.schema import check_values, differentiable, refuse_transforms

DIRECTIONS = ("student_to_teacher", "teacher_to_student")
LAYER_MAPS = ("top", "skip", "all")


def fused_layer_mse_loss(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    projections: Sequence[Tensor | None] | None = None,
    *,
    teacher_text_hidden: Sequence[Tensor] | None = None,
    alpha: float | Tensor = 0.0,
    direction: str = "student_to_teacher",
    normalize: bool = False,
    mask: Tensor | None = None,
    layer_weight: Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""Mean squared error between L pairs of layers, projections included, in token chunks.

    ::

        t_l    = (1 + alpha) h_audio_l - alpha h_text_l          (h_audio_l without a text path)
        e_li   = |P_l s_li - t_li|^2 / H_t       direction student_to_teacher, P_l (H_t, H_s)
                 |s_li - P_l t_li|^2 / H_s       direction teacher_to_student, P_l (H_s, H_t)
        loss   = sum_l layer_weight_l sum_{i valid} e_li / (number of valid tokens)

    With ``normalize`` both sides of the difference are divided by their Euclidean norms: e = (2 - 2 cos) / width. A zero vector
    stays zero there, and gets no gradient.

    Args:
        student_hidden: L tensors (..., H_s) float32, bfloat16 or float16 (float64 with impl="reference").
        teacher_hidden: L tensors (..., H_t), the audio path. Their dtype may differ. They never get a gradient. Widths may differ
            from layer to layer, leading dimensions may not.
        projections: L weights (no bias), with None for a pair of equal widths. None: no projection at all.
            :class:`LayerProjections` holds trainable ones.
        teacher_text_hidden: L tensors like ``teacher_hidden``, the path without audio, or None.
        alpha: contrast strength >= 0 of the layer target: a number, or a tensor (...) per token. Where it is 0 the text path is
            not read.
        direction: which side is projected.
        normalize: compare directions only.
        mask: (...) bool, True where a token counts; None: everywhere. Other tokens are not read.
        layer_weight: L numbers >= 0, or a tensor (L,); None: 1 each.
        reduction: "mean" divides by the number of valid tokens, "sum" does not, "none" returns sum_l layer_weight_l e_li per
            token. All three divide by the width.
        impl: "auto", "reference", "cpu" or "triton"; an explicit choice never falls back.

    Returns:
        float32 loss (float64 for float64 inputs): () or (...). Without a valid token it is 0 with zero gradients. Gradients reach
        ``student_hidden`` and ``projections`` only.

    GEMMs accumulate in float32, and differences are computed in float32. Extra memory: the gradients, and one chunk of projected
    states (float32; on the CPU 16 MiB) for any N and L. The forward computes the gradients; the backward scales them. With
    reduction="none" and trainable projections the backward runs the chunks a second time. Only impl="reference" has second
    derivatives.

    Raises:
        ValueError, TypeError: for a bad argument, with its name and pair, expected and got. On the CPU also for a negative
            alpha. On CUDA the loss of such a token is NaN, unless KDKERNELS_CHECK=1.
        RuntimeError: ``impl`` names something that is not installed.

    Source: source- and layer-wise distillation, arXiv 2509.18579; the contrastive layer target, CAAD, arXiv 2606.23052.
    """
    students = check_states("student_hidden", student_hidden)
    if not students:
        raise ValueError("student_hidden: expected at least one layer, got none")
    teachers = check_states("teacher_hidden", teacher_hidden, len(students))
    texts = None if teacher_text_hidden is None else check_states("teacher_text_hidden", teacher_text_hidden, len(students))
    if not (projections is None or isinstance(projections, Iterable)):
        raise TypeError(f"projections: expected a list of weights, one a layer, or None, got {type(projections).__name__}")
    weights: list[Tensor | None] = [None] * len(students) if projections is None else list(projections)
    if len(weights) != len(students):
        raise ValueError(f"projections: expected {len(students)} as student_hidden has layers, got {len(weights)}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
    leading, device = students[0].shape[:-1], students[0].device
    project_teacher = direction == "teacher_to_student"
    _check_pairs(students, teachers, texts, weights, project_teacher)
    dtypes = [x.dtype for x in (*students, *teachers, *(texts or []), *weights) if x is not None]
    dtype = accumulation_dtype(dtypes)
    n = math.prod(leading)
    valid = None
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, got {mask.dtype}")
        check_shape("mask", mask, leading)
        check_device("mask", mask, students[0])
        valid = mask.reshape(-1)
    alphas = alpha_tensor("alpha", alpha, leading, device, dtype)
    layer_weights = layer_weight_tensor(layer_weight, len(students), device, dtype)
    counts = torch.ones(n, dtype=dtype, device=device) if valid is None else valid.to(dtype)
    if reduction == "mean":
        counts = counts / counts.sum().clamp_min(1)

    chosen = choose_for("fused_layer_mse_loss", impl, device, dtypes, without_cuda="for layers")
    if chosen == "reference" and not torch.compiler.is_compiling():  # the operator checks by itself
        check_values(None, alphas, 0, 0)
    total = torch.zeros(n if reduction == "none" else (), dtype=dtype, device=device)
    for i, (s, t, p) in enumerate(zip(students, teachers, weights, strict=True)):
        coef = counts * (layer_weights[i] / (s if project_teacher else t).shape[-1])
        hidden, audio = _dense(s.reshape(-1, s.shape[-1])), _dense(t.detach().reshape(-1, t.shape[-1]))
        text = None if texts is None else _dense(texts[i].detach().reshape(audio.shape))
        pair = (hidden, audio, text, p, valid, alphas, coef)
        if chosen == "reference":
            loss = _layers.reference_layer_mse(*pair, project_teacher=project_teacher, normalize=normalize)
            loss = loss if reduction == "none" else loss.sum()
        else:
            loss = _fused_pair(*pair, impl=chosen, project_teacher=project_teacher, normalize=normalize, reduction=reduction)
        total = total + loss
    return total.reshape(leading) if reduction == "none" else total


def _check_pairs(
    students: Sequence[Tensor], teachers: Sequence[Tensor], texts: Sequence[Tensor] | None, weights: Sequence[Tensor | None],
    project_teacher: bool,
) -> None:  # fmt: skip
    """ValueError or TypeError unless the tensors of each pair fit together, and those of all pairs have one leading shape."""
    first = students[0]
    for i, (s, t, p) in enumerate(zip(students, teachers, weights, strict=True)):
        for name, x in ((f"student_hidden[{i}]", s), (f"teacher_hidden[{i}]", t)):
            check_leading(name, x, first.shape[:-1], "student_hidden[0]")
            check_device(name, x, first)
        if texts is not None:
            check_shape(f"teacher_text_hidden[{i}]", texts[i], t.shape)
            check_device(f"teacher_text_hidden[{i}]", texts[i], first)
        _check_projection(f"projections[{i}]", p, s, t, project_teacher)


def _fused_pair(
    hidden: Tensor, audio: Tensor, text: Tensor | None, projection: Tensor | None, valid: Tensor | None, alphas: Tensor,
    coef: Tensor, *, impl: str, project_teacher: bool, normalize: bool, reduction: str,
) -> Tensor:  # fmt: skip
    """The loss of one pair by the operator: (N,) with reduction "none", else ()."""
    refuse_transforms(hidden, projection)
    enabled = torch.is_grad_enabled()
    grads = [enabled and hidden.requires_grad, enabled and projection is not None and projection.requires_grad]
    reduced = reduction != "none"
    if not reduced and grads[1]:
        grads = [False, False]  # the backward runs the chunks with each token's own factor
    projection = None if projection is None else _dense(projection)
    loss, _, _ = differentiable(
        _layers.layer_mse, hidden, audio, text, projection, valid, alphas, coef, project_teacher, normalize, reduced, *grads,
        impl,
    )  # fmt: skip
    return loss


def layer_map(
    student_layers: int,
    teacher_layers: int,
    kind: str | Iterable[tuple[int, int]] = "all",
    *,
    every: int = 7,
    embeddings: bool = False,
) -> list[tuple[int, int]]:
    """Which layers of student and teacher are compared, as indices into transformers' ``hidden_states``.

    There 0 is the embeddings' output and k that of layer k; the last one is behind the final norm in most models.

    Args:
        student_layers, teacher_layers: number of layers of each.
        kind: "top": the last of each. "all": every student layer k with the teacher's at the same relative depth,
            round(k * teacher_layers / student_layers). "skip": of those, one in ``every``, counted down from the top. Or explicit
            (student, teacher) pairs.
        every: stride of "skip".
        embeddings: also (0, 0); not with explicit pairs.

    Returns:
        pairs in ascending order of the student's layer.

    Raises:
        ValueError, TypeError: naming the argument; for a pair out of range also the range.
    """
    for name, x in (("student_layers", student_layers), ("teacher_layers", teacher_layers), ("every", every)):
        if not is_whole(x):
            raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
        if x < 1:
            raise ValueError(f"{name}: expected at least 1, got {x}")
    if isinstance(kind, str):
        if kind not in LAYER_MAPS:
            raise ValueError(f"kind: expected one of {', '.join(LAYER_MAPS)} or (student, teacher) pairs, got {kind!r}")
        steps = {"top": [student_layers], "all": range(1, student_layers + 1), "skip": range(student_layers, 0, -every)}
        chosen = sorted(steps[kind])
        pairs = [(k, max(1, (2 * k * teacher_layers + student_layers) // (2 * student_layers))) for k in chosen]
        return [(0, 0), *pairs] if embeddings else pairs
    if not isinstance(kind, Iterable):
        raise TypeError(f"kind: expected one of {', '.join(LAYER_MAPS)} or (student, teacher) pairs, got {type(kind).__name__}")
    if embeddings:
        raise ValueError("embeddings: expected False with explicit pairs (add (0, 0) to them), got True")
    pairs = []
    for pair in kind:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(is_whole(x) for x in pair)):
            raise TypeError(f"kind: expected pairs (student layer, teacher layer) of ints, got {pair!r}")
        s, t = pair
        if not (0 <= s <= student_layers and 0 <= t <= teacher_layers):
            raise ValueError(f"kind: expected pairs in 0..{student_layers} and 0..{teacher_layers}, got {tuple(pair)}")
        pairs.append((int(s), int(t)))
    if not pairs:
        raise ValueError("kind: expected at least one pair, got none")
    return pairs


class LayerProjections(torch.nn.Module):
    """The projections of :func:`fused_layer_mse_loss`, one a pair of layers, as parameters that an optimiser finds.

    They are made here, so they are in ``parameters()`` and ``state_dict()`` from the first step on. They serve training only: an
    exported student does without them.

    Args:
        student_width, teacher_width: H_s, H_t of all pairs, or one number a pair.
        pairs: number of pairs L, or what :func:`layer_map` returned (kept as ``pairs``).
        direction: as in :func:`fused_layer_mse_loss`; decides the weights' shapes.
        identity_where_equal: no projection (and no parameter) for pairs of equal widths.
        bias: each projection also adds a vector, 0 at first: P h + b. It costs a copy of the projected side's states, one column
            wider, since b is the weight of a state that is always 1.
        generator: of the random initialisation.
        dtype, device: of the weights.

    Initialisation: orthonormal rows (or columns, if there are fewer of them), and the identity for equal widths. Lengths then
    stay the same on average. :meth:`fit` replaces it by the least-squares solution on given states.

    ``LayerProjections(576, 960, 4)(student_states, teacher_states, mask=mask)`` is the loss.
    """

    def __init__(
        self,
        student_width: int | Sequence[int],
        teacher_width: int | Sequence[int],
        pairs: int | Sequence[tuple[int, int]],
        *,
        direction: str = "student_to_teacher",
        identity_where_equal: bool = False,
        bias: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if direction not in DIRECTIONS:
            raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
        count = pair_count(pairs)
        self.direction = direction
        self.pairs = None if is_whole(pairs) else [tuple(p) for p in pairs]
        student_widths = layer_widths("student_width", student_width, count)
        widths = zip(student_widths, layer_widths("teacher_width", teacher_width, count), strict=True)
        weights: list[torch.nn.Parameter | None] = []
        biases: list[torch.nn.Parameter | None] = []
        for s, t in widths:
            if identity_where_equal and s == t:
                weights.append(None)
                biases.append(None)
                continue
            shape = (t, s) if direction == "student_to_teacher" else (s, t)
            empty = torch.empty(shape, dtype=dtype, device=device)
            weights.append(torch.nn.Parameter(initial_weight(empty, generator)))
            biases.append(torch.nn.Parameter(empty.new_zeros(shape[0])) if bias else None)
        # ParameterList takes no None.
        for i, weight in enumerate(weights):
            self.register_parameter(f"weight_{i}", weight)
        for i, vector in enumerate(biases if bias else ()):
            self.register_parameter(f"bias_{i}", vector)
        self._count = count

    @property
    def weights(self) -> list[torch.nn.Parameter | None]:
        """The L weights in order, None where widths are equal and ``identity_where_equal`` was given."""
        return [getattr(self, f"weight_{i}") for i in range(self._count)]

    @property
    def biases(self) -> list[torch.nn.Parameter | None]:
        """The L biases in order, (H_t,) or (H_s,), None where there is none."""
        return [getattr(self, f"bias_{i}", None) for i in range(self._count)]

    def forward(self, student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], **options: Any) -> Tensor:
        """:func:`fused_layer_mse_loss` with these weights; ``options`` are its other keywords."""
        if "direction" in options:
            raise TypeError(f"direction: expected at construction ({self.direction!r} there), got it in the call")
        weights: list[Tensor | None] = list(self.weights)
        biases = self.biases
        if any(b is not None for b in biases):
            students = check_states("student_hidden", student_hidden, self._count)
            teachers = check_states("teacher_hidden", teacher_hidden, self._count)
            texts = options.get("teacher_text_hidden")
            texts = None if texts is None else check_states("teacher_text_hidden", texts, self._count)
            for i, (weight, vector) in enumerate(zip(weights, biases, strict=True)):
                if weight is None or vector is None:
                    continue
                _check_projection(f"projections[{i}]", weight, students[i], teachers[i], self._projects_teacher)
                weights[i] = torch.cat([weight, vector[:, None]], 1)
                for states in [teachers, texts] if self._projects_teacher else [students]:
                    if states is not None:
                        states[i] = torch.nn.functional.pad(states[i], (0, 1), value=1.0)
            student_hidden, teacher_hidden = students, teachers
            options = options if texts is None else {**options, "teacher_text_hidden": texts}
        return fused_layer_mse_loss(student_hidden, teacher_hidden, weights, direction=self.direction, **options)

    @property
    def _projects_teacher(self) -> bool:
        return self.direction == "teacher_to_student"

    @torch.no_grad()
    def fit(self, student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], *, ridge: float = 1e-3) -> None:
        """Sets each weight to the least-squares solution on these states: P = argmin |X P^T - Y|^2 + ridge |X|^2 |P|^2 / N.

        With biases X and Y are taken without their means, and the bias is what their means need. The ridge does not touch it.

        Args:
            student_hidden, teacher_hidden: L tensors each, (..., H_s) and (..., H_t); X is the projected side's, Y the other's.
            ridge: >= 0, relative to the mean square of X. Needed with fewer tokens than X is wide.

        Raises:
            ValueError: shapes that do not fit, naming the pair; states that are not finite.
        """
        students = check_states("student_hidden", student_hidden, self._count)
        teachers = check_states("teacher_hidden", teacher_hidden, self._count)
        check_not_negative("ridge", ridge)
        for i, (weight, vector, s, t) in enumerate(zip(self.weights, self.biases, students, teachers, strict=True)):
            if weight is None:
                continue
            project_teacher = self._projects_teacher
            _check_projection(f"projections[{i}]", weight, s, t, project_teacher)
            check_leading(f"teacher_hidden[{i}]", t, s.shape[:-1], f"student_hidden[{i}]")
            x, y = (h.reshape(-1, h.shape[-1]).double() for h in ((t, s) if project_teacher else (s, t)))
            if not bool(x.isfinite().all() and y.isfinite().all()):
                raise ValueError(f"student_hidden[{i}], teacher_hidden[{i}]: expected finite states")
            # The best bias moves the mean of P x to that of y: so P fits what is left without the means.
            means = (x.mean(0), y.mean(0)) if vector is not None else (torch.zeros_like(x[0]), torch.zeros_like(y[0]))
            x, y = x - means[0], y - means[1]
            gram = x.T @ x
            gram.diagonal().add_(ridge * gram.diagonal().mean() + torch.finfo(torch.float64).tiny)
            weight.copy_(torch.linalg.lstsq(gram, x.T @ y, driver="gelsd" if gram.device.type == "cpu" else None).solution.T)
            if vector is not None:
                vector.copy_(means[1] - weight.double() @ means[0])

    def extra_repr(self) -> str:
        shapes = ", ".join("equal widths" if w is None else "x".join(map(str, w.shape)) for w in self.weights)
        return f"direction={self.direction!r}, weights: {shapes}"


def _dense(x: Tensor) -> Tensor:
    """The kernels want the items of a row beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_projection(name: str, p: Tensor | None, s: Tensor, t: Tensor, project_teacher: bool) -> None:
    widths = s.shape[-1], t.shape[-1]
    if p is None:
        if widths[0] != widths[1]:
            raise ValueError(f"{name}: expected a weight for widths {widths[0]} (student) and {widths[1]} (teacher), got None")
        return
    check_tensor(name, p, floating=True)
    check_shape(name, p, torch.Size(widths if project_teacher else widths[::-1]))
    check_device(name, p, s)
