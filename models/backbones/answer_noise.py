"""Noise on the embeddings of an answer's tokens, as in NEFTune (arXiv 2310.05914): no student can lean on their exact words.

Legend: B rows, A tokens of the longest answer, H width of the embeddings, S columns that are embedded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnswerNoise:
    """What is added to the embeddings of each row's answer.

    Attributes:
        values: (B, A, H) float32, 0 behind a row's answer.
        start: (B,) int64, the column of each row's first answer token.
    """

    values: Tensor
    start: Tensor

    @classmethod
    def drawn(cls, strength: float, start: Tensor, lengths: Sequence[int], width: int, seeds: Sequence[int]) -> AnswerNoise:
        """Uniform in +-strength / sqrt(length * H); a row's numbers depend on its seed, its length and H alone."""
        rows = []
        for length, seed in zip(lengths, seeds, strict=True):
            drawn = torch.rand(length, width, generator=torch.Generator().manual_seed(seed))
            rows.append((2 * drawn - 1) * (strength / max(length * width, 1) ** 0.5))
        return cls(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), start)

    def to(self, device: torch.device) -> AnswerNoise:
        """A copy on `device`."""
        return AnswerNoise(self.values.to(device), self.start.to(device))

    def added(self, embeddings: Tensor, first: Tensor | None = None) -> Tensor:
        """`embeddings` (B, S, H) with the noise. `first` (B,): the column of each row's first embedded token; None = 0."""
        start = self.start if first is None else self.start - first
        token = torch.arange(embeddings.shape[1], device=embeddings.device) - start[:, None]  # (B, S)
        inside = (token >= 0) & (token < self.values.shape[1])
        where = token.clamp(0, self.values.shape[1] - 1)[..., None].expand(-1, -1, self.values.shape[2])
        return embeddings + (self.values.gather(1, where) * inside[..., None]).to(embeddings.dtype)
