"""Contrast strength by token: strong where the sound decides, weak where both paths of the teacher say the same anyway."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["adaptive_alpha"]


def adaptive_alpha(divergence: Tensor, alpha: float | Tensor, *, half_at: float) -> Tensor:
    """Contrast strength of each token from the divergence of the teacher's two paths.

        alpha_i = alpha * d_i / (d_i + half_at)          d_i = KL(softmax z_audio,i || softmax z_text,i)

    Where the paths agree (d 0) there is nothing to contrast, and extrapolating would only blow up the noise of both: alpha 0.
    Where they differ by `half_at` nats alpha is halved, beyond that it nears the full strength.

    Args:
        divergence: (...) floating, nats, >= 0; CAADStats.path_divergence is one such. Rounding below 0 counts as 0.
        alpha: the largest strength, >= 0; a number or a tensor that broadcasts to (...).
        half_at: nats, > 0.

    Returns:
        (...) in the dtype of `divergence`, without a gradient: to be given to a loss as its `alpha`.

    Raises:
        TypeError: `divergence` is not floating.
        ValueError: `half_at` or a number `alpha` outside its range.

    Source: the CAAD paper (arXiv 2606.23052) names an alpha that adapts to the acoustic conditions as future work; this form is
    ours.
    """
    if not divergence.is_floating_point():
        raise TypeError(f"divergence: expected a floating tensor, got {divergence.dtype}")
    if not 0 < half_at < math.inf:
        raise ValueError(f"half_at: expected a finite number of nats > 0, got {half_at}")
    if not isinstance(alpha, Tensor) and not 0 <= alpha < math.inf:
        raise ValueError(f"alpha: expected a finite number >= 0, got {alpha}")
    with torch.no_grad():
        divergence = divergence.clamp(min=0)
        return alpha * (divergence / (divergence + half_at))
