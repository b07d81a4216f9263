"""Says which implementation a call would run, why, and in what chunks, without running it."""

from __future__ import annotations

import torch

from .chunking import plan_chunks
from .dispatch import IMPLEMENTATIONS, choose


def explain(
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    n_tokens: int = 8192,
    vocab_size: int = 128256,
    student_hidden_size: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
) -> str:
    """The plan of a loss call in words: implementation and reason; with ``student_hidden_size`` the chunks of the linear loss.

    Args:
        device, dtype: of the logits or hidden states; n_tokens: N; vocab_size: V; student_hidden_size: H_s, or None for
            ``fused_caad_loss``. The rest as in :func:`kdkernels.fused_linear_caad_loss`.

    Every implementation is listed with what stands in its way. Nothing is allocated.
    """
    device = torch.device(device)
    lines = []
    try:
        chosen, reason = choose(impl, device, [dtype])
        lines.append(f"impl={impl!r} runs {chosen!r}: {reason}")
    except (RuntimeError, TypeError, ValueError) as error:
        lines.append(f"impl={impl!r} fails: {error}")
    for name in IMPLEMENTATIONS[1:]:
        try:
            choose(name, device, [dtype])
            lines.append(f"  {name}: available")
        except (RuntimeError, TypeError, ValueError) as error:
            lines.append(f"  {name}: not here: {error}")
    if student_hidden_size is not None and device.type == "cuda" and not torch.cuda.is_available():
        lines.append("chunks: not known without the CUDA device (its free memory and multiprocessors decide)")
    elif student_hidden_size is not None:
        plan = plan_chunks(
            n_tokens=n_tokens,
            bytes_per_token=2 * vocab_size * logits_dtype.itemsize,
            student_width=student_hidden_size,
            device=device,
            chunk_tokens=chunk_tokens,
            workspace_bytes=workspace_bytes,
        )
        naive = 3 * n_tokens * vocab_size * 4
        lines.append(
            f"{plan.chunks} chunks of {plan.chunk_tokens} tokens, {plan.scratch_bytes / 2**20:.0f} MiB of logits at a time "
            f"({plan.reason}); three float32 logit tensors would be {naive / 2**20:.0f} MiB"
        )
    return "\n".join(lines)
