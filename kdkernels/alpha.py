"""Contrast strength by token: strong where the sound decides, weak where both paths of the teacher agree."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_not_negative, check_tensor, is_positive, shown
from .loss_terms import check_amounts, values_on

__all__ = ["adaptive_alpha"]


def adaptive_alpha(divergence: Tensor, alpha: float | Tensor, *, half_at: float) -> Tensor:
    """Contrast strength of each token from the divergence of the teacher's two paths.

        alpha_i = alpha * d_i / (d_i + half_at)          d_i = KL(softmax z_audio,i || softmax z_text,i)

    Where the paths agree (d = 0) alpha is 0: there is nothing to contrast, and extrapolation would only amplify noise. Where they
    differ by `half_at` nats alpha is halved. For larger differences it approaches the full strength, and for an infinite one (the
    text path masks what the audio path allows) it is that.

    Args:
        divergence: (...) floating, nats, >= 0, for example CAADStats.path_divergence. Values below 0 (rounding) count as 0.
        alpha: the largest strength, >= 0; a number or a tensor that broadcasts to (...).
        half_at: nats, > 0.

    Returns:
        (...) in the dtype of `divergence`, without a gradient. Pass it to a loss as `alpha`.

    Raises:
        TypeError: `divergence` is not floating.
        ValueError: `half_at` or `alpha` is outside its range, or `alpha` does not broadcast to (...). The numbers in a tensor
            `alpha` are looked at on the CPU, and with KDKERNELS_CHECK=1.

    Source: the CAAD paper (arXiv 2606.23052) leaves an alpha that adapts to the acoustic conditions to future work. This
    formula is our own.
    """
    check_tensor("divergence", divergence, floating=True)
    if not is_positive(half_at):
        raise ValueError(f"half_at: expected a finite number of nats > 0, got {shown(half_at)}")
    if not isinstance(alpha, Tensor):
        check_not_negative("alpha", alpha)
    else:
        sizes = zip(reversed(alpha.shape), reversed(divergence.shape), strict=False)
        if alpha.dim() > divergence.dim() or any(n not in (1, m) for n, m in sizes):
            raise ValueError(
                f"alpha: expected a tensor that broadcasts to divergence's {tuple(divergence.shape)}, got {tuple(alpha.shape)}"
            )
        alpha = values_on("alpha", alpha, divergence.device, divergence.dtype)
        check_amounts("alpha", alpha)
    with torch.no_grad():
        divergence = divergence.clamp(min=0)
        share = divergence / (divergence + half_at)
        return alpha * torch.where(torch.isposinf(divergence), 1.0, share)
