"""What a projection holds of the teacher, as the operators and kernels take it.

Legend: N tokens, K likeliest ids, H_s hidden width of the student.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .linear import picked


class Projected(NamedTuple):
    """A projected teacher at N tokens; see :class:`kdkernels.TeacherProjection`."""

    ids: Tensor  # (N, K) int32, below 0: none
    probabilities: Tensor  # (N, K) float32
    tail: Tensor  # (N, H_s)
    tail_bias: Tensor  # (N,) float32
    negentropy: Tensor  # (N,) float32
    mass: Tensor  # (N,) float32

    def at(self, chunk: slice) -> Projected:
        return Projected(*(x[chunk] for x in self))

    def picked(self, keep: Tensor | None) -> Projected:
        return Projected(*(picked(keep, x) for x in self))
