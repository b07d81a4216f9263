"""The layers of student and teacher that a recipe compares.

Legend: N target tokens of a batch, B examples, H_s / H_t hidden widths of student and teacher, K layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kdkernels.layer_attention import LayerAttention
from kdkernels.layer_mse import LayerProjections
from models.training.recipe_checks import ConfigError
from models.training.recipe_sections import LayersConfig
from models.training.teacher_states import TeacherStates


@dataclass(frozen=True)
class Examples:
    """Which of a batch's N target tokens belong to which example.

    Attributes:
        target_row: (N,) int64, ascending.
        count: number of examples B.
        longest: the most target tokens of one of them, known without asking the device.
    """

    target_row: torch.Tensor
    count: int
    longest: int

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) as (B, longest, ...), with zeros behind an example's tokens."""
        rows = self.target_row
        lengths = rows.new_zeros(self.count).index_add(0, rows, torch.ones_like(rows))
        columns = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths)[rows]
        return x.new_zeros(self.count, self.longest, *x.shape[1:]).index_put((rows, columns), x)


class LayerDistillation(torch.nn.Module):
    """Which layers of student and teacher are compared, and the projections between their widths, which train.

    Args:
        settings: the recipe's `layers`.
        pairs: (student, teacher) layers; one layer may stand in several pairs.
        projections: of those pairs, or their attention with the form "attention".
    """

    def __init__(
        self, settings: LayersConfig, pairs: Sequence[tuple[int, int]], projections: LayerProjections | LayerAttention
    ) -> None:
        super().__init__()
        self.settings = settings
        self.pairs = list(pairs)
        self.projections = projections
        self.student_layers, self.teacher_layers = (sorted(set(side)) for side in zip(*pairs, strict=True))

    @classmethod
    def build(cls, settings: LayersConfig, *, depths: Sequence[int], widths: Sequence[int]) -> LayerDistillation:
        """For these `depths` and `widths`, each of (student, teacher).

        Raises:
            ConfigError: a pair out of range, or heads that do not divide the student's width.
        """
        pairs = settings.layer_pairs(*depths)
        if settings.form == "attention":
            try:
                return cls(settings, pairs, LayerAttention(*widths, pairs, heads=settings.heads, bias=settings.bias))
            except ValueError as error:
                raise ConfigError(f"layers.{error}") from None
        projections = LayerProjections(
            *widths, pairs, direction=settings.direction, identity_where_equal=True, bias=settings.bias
        )
        return cls(settings, pairs, projections)

    def loss(
        self,
        student: Mapping[int, torch.Tensor],
        states: TeacherStates,
        counts: torch.Tensor,
        normalizer: torch.Tensor,
        examples: Examples | None = None,
    ) -> torch.Tensor:
        """Mean over pairs of the squared errors of the tokens that count, divided by `normalizer`.

        With `normalize` a pair's error is 2 - 2 cos for any width: of order 1, like a divergence. Without it the error grows with
        the size of the states. In the middle of a language model they are tens of times as large as in its last layer.

        Args:
            student: its layers' states by number, (N, H_s) each; at least `student_layers`.
            counts: (N,) bool, True at the tokens that count.
            examples: which tokens belong together; the form "attention" needs it.
        """

        def take(stacked: torch.Tensor) -> list[torch.Tensor]:
            return [stacked[:, self.teacher_layers.index(pair[1])] for pair in self.pairs]

        text = self.settings.alpha > 0 and states.text_layers is not None
        students, teachers = [student[pair[0]] for pair in self.pairs], take(states.audio_layers)
        texts = take(states.text_layers) if text else None
        mask = counts if states.speaks is None else counts & states.speaks
        attends = self.settings.form == "attention"
        compared = teachers if self.settings.direction == "student_to_teacher" and not attends else students
        widths = [x.shape[-1] if self.settings.normalize else 1 for x in compared]  # the loss divides by them
        if attends:
            if examples is None:
                raise ValueError("examples: expected which tokens belong together with the form 'attention', got None")
            students, teachers = ([examples.padded(x) for x in side] for side in (students, teachers))
            texts = None if texts is None else [examples.padded(x) for x in texts]
            mask = examples.padded(mask)
        total = self.projections(
            students,
            teachers,
            teacher_text_hidden=texts,
            alpha=self.settings.alpha if text else 0.0,
            normalize=self.settings.normalize,
            mask=mask,
            layer_weight=[width / len(self.pairs) for width in widths],
            reduction="sum",
        )
        return total / normalizer.clamp_min(1)
