"""Inputs and measures the loss tests share."""

from __future__ import annotations

import dataclasses

import torch

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU it is Triton's interpreter
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def device_of(impl: str) -> torch.device:
    """Where tensors for ``impl`` have to lie: on the GPU for Triton's kernels where there is one, for all else on the CPU."""
    return TRITON_DEVICE if impl == "triton" else torch.device("cpu")


def on_device(x, impl: str):
    """A tensor, or a list, dict or dataclass of them, where ``impl`` runs. Leaves stay leaves; anything else stays as it is."""
    if isinstance(x, torch.Tensor):
        device = device_of(impl)
        return x if x.device.type in (device.type, "meta") else x.detach().to(device).requires_grad_(x.requires_grad)
    if isinstance(x, dict):
        return {k: on_device(y, impl) for k, y in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(on_device(y, impl) for y in x)
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: on_device(getattr(x, f.name), impl) for f in dataclasses.fields(x)})
    return x


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; NaN stays NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def logits(
    n: int = 6, vocab: int = 97, *, teacher_vocab: int | None = None, dtype=FP32, seed: int = 0, scale: float = 3.0
):
    """(student (n, vocab) requiring grad, audio, text (n, teacher_vocab), target (n,) with one ignored position)."""
    g = torch.Generator().manual_seed(seed)
    width = vocab if teacher_vocab is None else teacher_vocab
    student = (torch.randn(n, vocab, generator=g) * scale).to(dtype).requires_grad_()
    audio, text = ((torch.randn(n, width, generator=g) * scale).to(dtype) for _ in range(2))
    target = torch.randint(0, min(vocab, width), (n,), generator=g)
    if n > 1:
        target[1] = -100
    return student, audio, text, target


def hidden(n=23, vocab=61, width_s=12, width_t=20, *, dtype=FP32, seed=0, teacher_vocab=None, scale=1.0):
    """Keyword arguments of fused_linear_caad_loss; the student's hidden states require grad."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    target = torch.randint(0, vocab, (n,), generator=g)
    target[n // 2] = -100
    return {
        "student_hidden": normal(n, width_s).requires_grad_(),
        "student_weight": normal(vocab, width_s),
        "teacher_audio_hidden": normal(n, width_t),
        "teacher_text_hidden": normal(n, width_t),
        "teacher_weight": normal(vocab if teacher_vocab is None else teacher_vocab, width_t),
        "target": target,
    }


def to_double(arguments: dict) -> dict:
    """The same values in float64, as fresh leaves."""
    return {
        k: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for k, x in arguments.items()
    }
