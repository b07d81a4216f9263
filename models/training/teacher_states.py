"""What a teacher hands to the loss: hidden states of the target tokens and the LM head that reads them, or projections.

Legend: N target tokens of a batch, H_t hidden width of the teacher, K layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels import TeacherProjection


class SourceError(RuntimeError):
    """Data or a model of the recipe is missing or unusable; the message names it and says what was expected."""


@dataclass(frozen=True)
class TeacherStates:
    """What a frozen teacher says about the N target tokens of a batch, before its LM head.

    Attributes:
        audio_hidden: (N, H_t), the path with the audio, or with what this teacher reads in its place.
        text_hidden: (N, H_t), the path without the audio, or None.
        head: weight, bias, softcap, logit_scale of the LM head.
        audio_layers, text_layers: (N, K, H_t), the layers that the recipe compares, or None.
        speaks: (N,) bool, False at tokens about which this teacher says nothing; None = it speaks about all.
        divergence: (N,) float32, nats, between the two paths; None where nothing needs it.
    """

    audio_hidden: torch.Tensor
    text_hidden: torch.Tensor | None
    head: Any
    audio_layers: torch.Tensor | None = None
    text_layers: torch.Tensor | None = None
    speaks: torch.Tensor | None = None
    divergence: torch.Tensor | None = None

    TENSORS = ("audio_hidden", "text_hidden", "audio_layers", "text_layers", "speaks", "divergence")

    @classmethod
    def of_one_path(cls, states: torch.Tensor, head: Any) -> TeacherStates:
        """Of a teacher without a text path, made from (N, H) or, with layers, (N, 1 + K, H)."""
        if states.dim() == 2:
            return cls(states, None, head)
        return cls(states[:, 0], None, head, states[:, 1:])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are not None, by name; each has N rows."""
        return {name: getattr(self, name) for name in self.TENSORS if getattr(self, name) is not None}

    def at(self, positions: torch.Tensor) -> TeacherStates:
        """The states of the target tokens `positions`, (n,) int64."""
        positions = positions.to(self.audio_hidden.device, non_blocking=True)
        return dataclasses.replace(self, **{name: x[positions] for name, x in self.tensors().items()})

    def with_divergence(self) -> TeacherStates:
        """The same with `divergence`."""
        return dataclasses.replace(self, divergence=path_divergence(self))


@dataclass(frozen=True)
class ProjectedStates:
    """What a teacher says about the N target tokens of a batch, for one frozen LM head of the student.

    Attributes:
        projection: of the N tokens; mass 0 at those that have no weight in the KD term.
        divergence: as in `TeacherStates`.
    """

    projection: TeacherProjection
    divergence: torch.Tensor | None = None

    def at(self, positions: torch.Tensor) -> ProjectedStates:
        """The states of the target tokens `positions`, (n,) int64."""
        positions = positions.to(self.projection.mass.device, non_blocking=True)
        return ProjectedStates(self.projection[positions], None if self.divergence is None else self.divergence[positions])

    def with_divergence(self) -> ProjectedStates:
        return self


Teacher = Callable[[Any, Sequence[Any]], Any]  # -> TeacherStates, or ProjectedStates (models/training/projections.py)


@torch.no_grad()
def path_divergence(states: TeacherStates, *, chunk_tokens: int = 256) -> torch.Tensor:
    """KL(softmax z_audio || softmax z_text) of each token, (N,) float32, in chunks of `chunk_tokens` rows of logits."""
    if states.text_hidden is None:
        raise ValueError("states: expected both paths, got no text_hidden")
    out = []
    for start in range(0, len(states.audio_hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        audio, text = (
            F.log_softmax(states.head.logits(hidden[rows]).float(), dim=-1)
            for hidden in (states.audio_hidden, states.text_hidden)
        )
        out.append((audio.exp() * (audio - text)).sum(-1).clamp(min=0))
    return torch.cat(out) if out else states.audio_hidden.new_zeros(0)
