"""The same objective in every way it is written today: eager PyTorch, torch.compile, Liger, and ours.

All minimise  kd_weight tau^2 KL(softmax(z_hat / tau) || softmax(s / tau)) + (1 - kd_weight) CE(s, y), averaged over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA, TEMPERATURE, KD_WEIGHT = 2.0, 2.0, 0.7


def eager_loss(student: Tensor, audio: Tensor, text: Tensor, target: Tensor) -> Tensor:
    """The loss as one writes it: logits in float32, torch's own softmax, kl_div and cross_entropy."""
    student = student.float()
    z_hat = (1 + ALPHA) * audio.float() - ALPHA * text.float()
    kd = F.kl_div(F.log_softmax(student / TEMPERATURE, -1), F.softmax(z_hat / TEMPERATURE, -1), reduction="batchmean")
    return KD_WEIGHT * TEMPERATURE**2 * kd + (1 - KD_WEIGHT) * F.cross_entropy(student, target)


def exact_loss(student: Tensor, audio: Tensor, text: Tensor, target: Tensor) -> Tensor:
    """The same in float64."""
    student, z_hat = student.double(), (1 + ALPHA) * audio.double() - ALPHA * text.double()
    kd = F.kl_div(F.log_softmax(student / TEMPERATURE, -1), F.softmax(z_hat / TEMPERATURE, -1), reduction="batchmean")
    return KD_WEIGHT * TEMPERATURE**2 * kd + (1 - KD_WEIGHT) * F.cross_entropy(student, target)


@dataclass
class LinearCase:
    """Hidden states (N, H), heads (V, H) and targets of one shape; the head is frozen, as in the paper."""

    hidden: Tensor
    weight: Tensor
    audio: Tensor
    text: Tensor
    teacher_weight: Tensor
    target: Tensor

    @classmethod
    def random(
        cls, n: int, vocab: int, width: int, teacher_width: int, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> LinearCase:
        g = torch.Generator().manual_seed(seed)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            return (torch.randn(rows, columns, generator=g) * scale).to(device=device, dtype=dtype)

        # Logits with a standard deviation near 3, as language models have.
        return cls(
            hidden=normal(n, width, 1.0),
            weight=normal(vocab, width, 3.0 * width**-0.5),
            audio=normal(n, teacher_width, 1.0),
            text=normal(n, teacher_width, 1.0),
            teacher_weight=normal(vocab, teacher_width, 3.0 * teacher_width**-0.5),
            target=torch.randint(0, vocab, (n,), generator=g).to(device),
        )

    def head(self, n: int) -> LinearCase:
        return LinearCase(
            self.hidden[:n], self.weight, self.audio[:n], self.text[:n], self.teacher_weight, self.target[:n]
        )


Step = Callable[[LinearCase], Tensor]  # returns dL/dh


def _gradient(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    hidden = hidden.detach().requires_grad_()
    loss(hidden).backward()
    return hidden.grad


def naive_step(loss_function: Callable[..., Tensor] = eager_loss) -> Step:
    def step(c: LinearCase) -> Tensor:
        with torch.no_grad():
            audio, text = c.audio @ c.teacher_weight.T, c.text @ c.teacher_weight.T
        return _gradient(lambda h: loss_function(h @ c.weight.T, audio, text, c.target), c.hidden)

    return step


def ours_step(logits_dtype: torch.dtype | None, **options) -> Step:
    from kdkernels import fused_linear_caad_loss

    def step(c: LinearCase) -> Tensor:
        return _gradient(
            lambda h: fused_linear_caad_loss(
                h, c.weight, c.audio, c.text, c.teacher_weight, c.target, alpha=ALPHA, temperature=TEMPERATURE,
                kd_weight=KD_WEIGHT, logits_dtype=logits_dtype, **options,
            ),
            c.hidden,
        )  # fmt: skip

    return step


def liger_step(chunk_size: int, compiled: bool = True) -> Step:
    """Liger's chunked JSD at beta 0 (forward KL), fed the collapsed teacher state, so that it runs one teacher GEMM like ours.

    Its soft loss lacks tau^2, which goes into the weight. Raises ImportError where Liger is not installed.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - KD_WEIGHT,
        weight_soft_loss=KD_WEIGHT * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=compiled,
        chunk_size=chunk_size,
    )

    def step(c: LinearCase) -> Tensor:
        contrast = ((1 + ALPHA) * c.audio.float() - ALPHA * c.text.float()).to(c.audio.dtype)
        return _gradient(lambda h: loss(h, c.weight, contrast, c.teacher_weight, c.target), c.hidden)

    return step


def exact_gradient(c: LinearCase) -> Tensor:
    """dL/dh by the formula in float64 on the CPU."""
    double = LinearCase(*(x.cpu().double() if x.is_floating_point() else x.cpu() for x in vars(c).values()))

    audio, text = double.audio @ double.teacher_weight.T, double.text @ double.teacher_weight.T
    return _gradient(lambda h: exact_loss(h @ double.weight.T, audio, text, double.target), double.hidden)


def bare_gemms(c: LinearCase, chunk: int) -> Callable[[], None]:
    """The floor: the three GEMMs of a frozen head, in chunks into reused scratch, and nothing else."""
    n, vocab = c.hidden.shape[0], c.weight.shape[0]
    chunk = min(chunk, n)
    student, teacher = (torch.empty(chunk, vocab, dtype=c.weight.dtype, device=c.weight.device) for _ in range(2))
    out = torch.empty_like(c.hidden)

    def run() -> None:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            torch.mm(c.hidden[rows], c.weight.T, out=student[:size])
            torch.mm(c.audio[rows], c.teacher_weight.T, out=teacher[:size])
            torch.mm(student[:size], c.weight, out=out[rows])

    return run
