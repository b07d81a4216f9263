"""Says which implementation a call would run, why, in what chunks and about how long, without running it."""

from __future__ import annotations

import torch

from ..checks import is_whole
from ..loss_options import LinearLossOptions
from .chunking import (
    CHUNKS,
    DEVICES,
    ChunkPlan,
    DeviceModel,
    Prediction,
    choose_path,
    device_model,
    plan_chunks,
    predict,
)
from .dispatch import IMPLEMENTATIONS, choose, choose_on_absent


def explain(
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    n_tokens: int = 8192,
    vocab_size: int = 128256,
    student_hidden_size: int | None = None,
    teacher_hidden_size: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
    impl: str = "auto",
    gradient: bool = True,
    divergence: str = "forward_kl",
    return_stats: bool = False,
) -> str:
    """The plan of a loss call in words: the implementation and the reason for it.

    With ``student_hidden_size`` also the path and the chunks of the linear loss. With ``teacher_hidden_size`` too, on a GPU whose
    rates are known, also the time that it should take.

    Args:
        device: of the logits or hidden states; or a GPU's name ("A100", "H100", "H200", "B200", "RTX 4090", "RTX 5090"). That
            GPU need not be in this machine, and this machine is not asked: a CUDA build of PyTorch with Triton is assumed.
        dtype: of the hidden states and weights; n_tokens: N; vocab_size: V; student_hidden_size: H_s, or None for
            ``fused_caad_loss``; teacher_hidden_size: H_t.
        gradient: whether one is wanted (False: evaluation). The rest as in :func:`kdkernels.fused_linear_caad_loss`.

    For each implementation that cannot run the text says why. Nothing is allocated. No rate is measured by this call; the text
    says where a device's rates come from. Times are work divided by the device's
    rate, with every multiprocessor busy, the head frozen and the two teacher paths collapsed. Measured times are longer.

    Raises ValueError or TypeError for an option that the loss does not take.
    """
    name, device = _device(device)
    _check_sizes(n_tokens=n_tokens, student_hidden_size=student_hidden_size, teacher_hidden_size=teacher_hidden_size)
    LinearLossOptions(
        divergence=divergence, vocab_size=vocab_size, chunk_tokens=chunk_tokens, workspace_bytes=workspace_bytes,
        logits_dtype=logits_dtype, return_stats=return_stats,
    )  # fmt: skip
    model = None if name is None else device_model(name)

    def rule(impl: str) -> tuple[str, str]:
        if name is None or model is None:
            return choose(impl, device, [dtype])
        return choose_on_absent(impl, name, model.capability, [dtype])

    lines = []
    if name is not None:
        lines.append(f"{name}: taken from a table; Triton and a build for that GPU are assumed, this machine is not asked")
    chosen = None
    try:
        chosen, reason = rule(impl)
        lines.append(f"impl={impl!r} runs {chosen!r}: {reason}")
    except (RuntimeError, TypeError, ValueError) as error:
        lines.append(f"impl={impl!r} fails: {error}")
    for other in IMPLEMENTATIONS[1:]:
        try:
            _, reason = rule(other)
            lines.append(f"  {other}: available" if name is None or other != "cuda" else f"  {other}: {reason}")
        except (RuntimeError, TypeError, ValueError) as error:
            lines.append(f"  {other}: not {'here' if name is None else 'there'}: {error}")
    if student_hidden_size is None:
        return "\n".join(lines)
    path, reason = choose_path(
        impl=chosen or "reference",
        gradient=gradient,
        divergence=divergence,
        want_stats=return_stats,
        chunk_tokens=chunk_tokens,
    )
    lines.append(f"path: {path} ({reason})")
    if path == CHUNKS and name is None and device.type == "cuda" and not torch.cuda.is_available():
        lines.append(
            "chunks: not known without the CUDA device (its free memory and multiprocessors decide); name one, device='H100'"
        )
        return "\n".join(lines)
    teacher_tensors = 2 if return_stats else 1
    if path == CHUNKS:
        plan = plan_chunks(
            n_tokens=n_tokens,
            bytes_per_token=(1 + teacher_tensors) * vocab_size * logits_dtype.itemsize,
            student_width=student_hidden_size,
            device=None if name is not None else device,
            device_name=name,
            chunk_tokens=chunk_tokens,
            workspace_bytes=workspace_bytes,
        )
        lines.append(_chunks_in_words(plan, n_tokens, vocab_size))
    if name is None and device.type == "cuda" and torch.cuda.is_available():
        model = device_model(torch.cuda.get_device_name(device))
    if model is not None and teacher_hidden_size is not None:
        expected = predict(
            model,
            n_tokens=n_tokens,
            vocab=vocab_size,
            student_width=student_hidden_size,
            teacher_width=teacher_hidden_size,
            teacher_gemms=teacher_tensors,
            teacher_tensors=teacher_tensors,
            logits_bytes=logits_dtype.itemsize,
            gradient_bytes=min(dtype.itemsize, logits_dtype.itemsize),
            gradient=gradient,
            path=path,
        )
        lines += _times_in_words(expected, model, path)
        if dtype == torch.bfloat16 and logits_dtype == torch.float32 and not return_stats:
            half = 2.0 * n_tokens * vocab_size * teacher_hidden_size / model.flop_per_second
            lines.append(f"  and {half * 1e3:.1f} ms for the contrast's second bf16 summand, which float32 logits take")
    return "\n".join(lines)


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        least = 0 if name == "n_tokens" else 1
        if size is not None and not (is_whole(size) and size >= least):
            raise ValueError(f"{name}: expected a whole number >= {least}, got {size!r}")


def _device(device: str | torch.device) -> tuple[str | None, torch.device]:
    """(name in DEVICES or None, device)"""
    if isinstance(device, str) and device_model(device) is not None:
        return device, torch.device("cuda")
    try:
        return None, torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected a torch device or one of {', '.join(DEVICES)}, got {device!r}") from error


def _chunks_in_words(plan: ChunkPlan, n_tokens: int, vocab: int) -> str:
    naive = 3 * n_tokens * vocab * 4
    return (
        f"{plan.chunks} chunks of {plan.chunk_tokens} tokens, {plan.scratch_bytes / 2**20:.0f} MiB of logits at a time "
        f"({plan.reason}); three float32 logit tensors would be {naive / 2**20:.0f} MiB"
    )


def _times_in_words(expected: Prediction, model: DeviceModel, path: str) -> list[str]:
    tera, terabytes = model.flop_per_second / 1e12, model.bytes_per_second / 1e12
    lines = [
        f"predicted, at {tera:.0f} TFLOP/s and {terabytes:.1f} TB/s ({model.source}): {expected.seconds * 1e3:.1f} ms",
        f"  GEMMs {expected.gemm_seconds * 1e3:.1f} ms ({expected.gemm_flop / 1e12:.1f} TFLOP)",
    ]
    if path == CHUNKS:
        lines.append(f"  row kernel {expected.row_seconds * 1e3:.1f} ms ({expected.row_bytes / 1e9:.1f} GB)")
    return lines
