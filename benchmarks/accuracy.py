"""Gradient error of every contender against float64. `python -m benchmarks.accuracy`

The error is measured at two places of a training: at random states, and near convergence. Near convergence the student's
divergence from the contrast is about 0.004 nats, and the gradient is a small difference of large numbers. `rows` is dL/d
logits, from logits of the dtype. `linear` is dL/dh, from hidden states and heads of the dtype. The reference takes the same
rounded inputs, so the error is the contender's own. Nothing is timed, so the figures do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.arguments import Collect

from .common import benchmark_parser, finish, relative_error
from .contenders import (
    ALPHA,
    FULL,
    KD,
    TEMPERATURE,
    Contender,
    LinearCase,
    Objective,
    Unavailable,
    authors_loss,
    contenders,
    eager_loss,
    exact_loss,
    gradient_errors,
    liger_step,
    mean_kl,
)

NEAR_KL = 0.004


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("accuracy", __doc__)
    parser.add_argument("--tokens", type=int, default=64, help="number of tokens N")
    parser.add_argument("--vocab", type=int, default=49152, help="number of ids V")
    parser.add_argument("--width", type=int, default=576, help="hidden width of both models")
    parser.add_argument(
        "--dtypes", nargs="+", action=Collect, default=["float32", "bfloat16", "float16"], help="dtypes of logits and states"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the contenders that torch.compile makes")
    args = parser.parse_args(argv)
    rows = []
    for name in args.dtypes:
        rows += row_errors(args, getattr(torch, name)) + linear_errors(args, getattr(torch, name))
    finish(args, "accuracy", "relative gradient error against float64", rows)


def _row(args, kind: str, dtype: torch.dtype, place: str, kl: float, objective: Objective, name: str) -> dict:
    row = {"kind": kind, "place": place, "objective": objective.name, "contender": name}
    row |= {"dtype": str(dtype).removeprefix("torch."), "tokens": args.tokens, "vocab": args.vocab}
    return row | {"width": args.width if kind == "linear" else "", "kl": kl}


def linear_errors(args: argparse.Namespace, dtype: torch.dtype) -> list[dict]:
    device = torch.device(args.device)
    shape = (args.tokens, args.vocab, args.width)
    cases = {
        "random": LinearCase.random(*shape, args.width, dtype, device),
        "near convergence": LinearCase.near_convergence(*shape, dtype, device, kl=NEAR_KL),
    }
    # Compilation changes Liger's arithmetic only in what inductor keeps in float32.
    listed = [
        *contenders(device.type, (FULL, KD)),
        *(
            Contender("Liger chunked JSD, not compiled", o, lambda o=o: liger_step(1024, compiled=False, objective=o))
            for o in (FULL, KD)
        ),
    ]
    steps, out = {}, []
    for contender in listed:
        if (contender.compiles and args.no_compile) or ("bf16" in contender.name and dtype != torch.bfloat16):
            continue  # with float32 or float16 weights nobody stores logits in bf16
        try:
            steps[(contender.name, contender.objective)] = (contender.objective, contender.build())
        except Unavailable as why:
            row = _row(args, "linear", dtype, "", math.nan, contender.objective, contender.name)
            out.append({**row, "gradient_error": math.nan, "note": str(why)})
    for place, case in cases.items():
        kl = mean_kl(case)
        for (name, objective), error in gradient_errors(steps, case, check_tokens=args.tokens).items():
            row = _row(args, "linear", dtype, place, kl, objective, name)
            out.append({**row, "gradient_error": error, "note": ""})
    return out


def row_cases(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """place -> student, audio and text logits (N, V)"""
    g = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.empty(args.tokens, args.vocab, device=device).normal_(0, 3, generator=g)

    student, audio, text = (normal().to(dtype) for _ in range(3))
    z_hat, noise, scale = (1 + ALPHA) * audio.float() - ALPHA * text.float(), normal(), 0.05
    target = torch.zeros(args.tokens, dtype=torch.int64, device=device)
    for _ in range(6):
        near = (z_hat + scale * noise).to(dtype)
        kl = float(exact_loss(near, audio, text, target, KD)) / TEMPERATURE**2
        scale *= math.sqrt(NEAR_KL / max(kl, 1e-12))
    return {"random": (student, audio, text), "near convergence": (near, audio, text)}


def row_errors(args: argparse.Namespace, dtype: torch.dtype) -> list[dict]:
    from kdkernels import fused_caad_loss

    device = torch.device(args.device)
    target = torch.randint(0, args.vocab, (args.tokens,), generator=torch.Generator().manual_seed(0)).to(device)

    def ours(student: Tensor, audio: Tensor, text: Tensor, target: Tensor, objective: Objective) -> Tensor:
        return fused_caad_loss(
            student, audio, text, target, alpha=objective.alpha, temperature=objective.temperature,
            kd_weight=objective.kd_weight,
        )  # fmt: skip

    losses: dict[str, Callable[..., Tensor]] = {"eager": eager_loss, "CAAD authors' form": authors_loss}
    if not args.no_compile:
        losses["torch.compile"] = torch.compile(eager_loss)
    losses["kdkernels"] = ours

    def gradient(loss: Callable[..., Tensor], student: Tensor, *rest: object) -> Tensor:
        leaf = student.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, *rest), leaf)[0]

    out = []
    for place, (student, audio, text) in row_cases(args, dtype, device).items():
        kl = float(exact_loss(student, audio, text, target, KD)) / TEMPERATURE**2
        for objective in (FULL, KD):
            exact = gradient(exact_loss, student.double(), audio, text, target, objective)
            for name, loss in losses.items():
                row = _row(args, "rows", dtype, place, kl, objective, name)
                error = relative_error(gradient(loss, student, audio, text, target, objective), exact)
                out.append({**row, "gradient_error": error, "note": ""})
    return out


if __name__ == "__main__":
    main()
