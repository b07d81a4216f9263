"""Layer distillation: L pairs of layers, gradients for the student's states and the projections. `python -m benchmarks.layers`

First every contender's gradients are compared with float64. Then the contenders are timed in turn in one process, beside the
floor. The floor is the bare GEMMs of the projections (forward, dh and dP) into reused scratch. Without projections it is one
read of both sides and one write of the gradient. Each contender's peak extra memory comes from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdkernels import fused_layer_mse_loss
from models.arguments import Collect

from .common import PeakMemory, benchmark_parser, finish, refuse_wrong, relative_error, time_calls, time_columns

FLOOR = "floor"
BUDGETS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """Models, N, L, H_s, H_t. States are projected if widths differ or `projected` says so."""

    pair: str
    tokens: dict[str, int]  # by device type
    layers: int
    student_width: int
    teacher_width: int

    @property
    def projected(self) -> bool:
        return self.student_width != self.teacher_width


SHAPES = (
    Shape("SmolLM2-135M, ten layers", {"cpu": 2048, "cuda": 16384}, 10, 576, 576),
    Shape("SmolLM2-135M from SmolLM2-360M", {"cpu": 2048, "cuda": 16384}, 10, 576, 960),
    Shape("Llama-3.2-3B from Llama-3.1-8B", {"cpu": 512, "cuda": 8192}, 4, 3072, 4096),
)
Gradients = list[Tensor]


class LayerCase:
    """Random states and projections of a shape. The student's states and the projections require a gradient."""

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, *, normalize: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        self.shape, self.tokens, self.normalize = shape, tokens, normalize
        self.student = [random(tokens, shape.student_width).requires_grad_() for _ in range(shape.layers)]
        self.teacher = [random(tokens, shape.teacher_width) for _ in range(shape.layers)]
        scale = shape.student_width**-0.5
        self.weights: list[Tensor | None] = [
            (random(shape.teacher_width, shape.student_width) * scale).requires_grad_() if shape.projected else None
            for _ in range(shape.layers)
        ]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.student, *(w for w in self.weights if w is not None)]

    @property
    def flop(self) -> float:
        """Operations of the projection, dh and dP."""
        shape = self.shape
        return 6.0 * self.tokens * shape.layers * shape.student_width * shape.teacher_width if shape.projected else 0.0

    @property
    def least_bytes(self) -> float:
        """Bytes to read both sides once and to write the states' gradient."""
        items = self.tokens * self.shape.layers * (2 * self.shape.student_width + self.shape.teacher_width)
        return float(items * self.student[0].element_size())

    def double(self) -> LayerCase:
        other = object.__new__(LayerCase)
        other.shape, other.tokens, other.normalize = self.shape, self.tokens, self.normalize
        other.student = [x.detach().double().requires_grad_() for x in self.student]
        other.teacher = [x.double() for x in self.teacher]
        other.weights = [None if w is None else w.detach().double().requires_grad_() for w in self.weights]
        return other

    def gradients(self, loss: Callable[[LayerCase], Tensor]) -> Gradients:
        return list(torch.autograd.grad(loss(self), self.leaves))


def eager_loss(case: LayerCase) -> Tensor:
    """The formula in the states' dtype, written in the usual way."""
    total = 0.0
    for s, t, w in zip(case.student, case.teacher, case.weights, strict=True):
        u = s if w is None else s @ w.T
        if case.normalize:
            u, t = torch.nn.functional.normalize(u, dim=-1), torch.nn.functional.normalize(t, dim=-1)
        total = total + torch.nn.functional.mse_loss(u, t)
    return total


def fused_loss(case: LayerCase) -> Tensor:
    return fused_layer_mse_loss(case.student, case.teacher, case.weights, normalize=case.normalize)


def contenders(*, compiled: bool) -> dict[str, Callable[[LayerCase], Tensor]]:
    losses = {"eager": eager_loss, "kdkernels": fused_loss}
    return {**losses, "torch.compile": torch.compile(eager_loss, dynamic=False)} if compiled else losses


def gradient_errors(losses: dict[str, Callable[[LayerCase], Tensor]], case: LayerCase) -> dict[str, float]:
    """The error of each contender's worst gradient, relative to float64."""
    exact = case.double().gradients(eager_loss)
    return {
        name: max(relative_error(x, y) for x, y in zip(case.gradients(loss), exact, strict=True))
        for name, loss in losses.items()
    }


def floor(case: LayerCase) -> Callable[[], None]:
    """The work that no implementation can leave out, into memory that is there already."""
    states, teacher = case.student[0].detach(), case.teacher[0]
    projected, dh = torch.empty_like(teacher), torch.empty_like(states)
    weights = [None if w is None else (w.detach(), torch.empty_like(w)) for w in case.weights]

    def run() -> None:
        for s, t, w in zip(case.student, case.teacher, weights, strict=True):
            if w is None:
                torch.sub(s.detach(), t, out=dh)
                continue
            torch.mm(s.detach(), w[0].T, out=projected)
            torch.mm(projected, w[0], out=dh)
            torch.mm(projected.T, s.detach(), out=w[1])

    return run


def measure(args: argparse.Namespace, shape: Shape, dtype: torch.dtype, normalize: bool) -> list[dict]:
    device = torch.device(args.device)
    tokens = max(1, shape.tokens[device.type] // args.shrink)
    case = LayerCase(shape, tokens, dtype, device, normalize=normalize)
    calls = contenders(compiled=not args.no_compile)
    refuse_wrong(errors := gradient_errors(calls, case), BUDGETS[dtype])
    timed = {name: (lambda loss=loss: case.gradients(loss)) for name, loss in calls.items()}
    timings = time_calls({**timed, FLOOR: floor(case)}, repeats=args.repeats, device=device, limit_seconds=20)
    least = timings[FLOOR].median
    rows = []
    for name, timing in timings.items():
        peak = math.nan
        if name != FLOOR and not args.no_memory:
            peak = peak_mib(name, SHAPES.index(shape), dtype, normalize, args)
        rows.append(
            {
                "pair": shape.pair,
                "contender": name,
                "dtype": str(dtype).removeprefix("torch."),
                "normalize": normalize,
                "tokens": tokens,
                "layers": shape.layers,
                "student_width": shape.student_width,
                "teacher_width": shape.teacher_width,
                **time_columns(timing),
                "gflop_per_s": case.flop / timing.median / 1e9,
                "gbytes_per_s": case.least_bytes / timing.median / 1e9,
                "times_floor": timing.median / least,
                "speedup_over_eager": timings["eager"].median / timing.median,
                "gradient_error": errors.get(name, math.nan),
                "peak_extra_mib": peak,
            }
        )
    return rows


def peak_mib(name: str, shape: int, dtype: torch.dtype, normalize: bool, args: argparse.Namespace) -> float:
    request = {"name": name, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "normalize": normalize}
    command = [sys.executable, "-m", "benchmarks.layers", "--device", args.device, "--shrink", str(args.shrink)]
    command += ["--one", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_one(request: dict, args: argparse.Namespace) -> float:
    """MiB of growth beyond a warm start. A contender that compiles warms up with the same case, the others with a few tokens."""
    device, shape, dtype = torch.device(args.device), SHAPES[request["shape"]], getattr(torch, request["dtype"])
    loss = contenders(compiled=request["name"] == "torch.compile")[request["name"]]
    tokens = max(1, shape.tokens[device.type] // args.shrink)
    case = LayerCase(shape, tokens, dtype, device, normalize=request["normalize"])
    warm = case if request["name"] == "torch.compile" else LayerCase(shape, 8, dtype, device, normalize=request["normalize"])
    warm.gradients(loss)
    with PeakMemory(device) as memory:
        case.gradients(loss)
    return memory.bytes / 2**20


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("layers", __doc__, repeats=9)
    parser.add_argument(
        "--dtypes", nargs="+", action=Collect, default=["bfloat16", "float32"], choices=["bfloat16", "float32"],
        help="dtypes of states and projections",
    )  # fmt: skip
    parser.add_argument("--shrink", type=int, default=1, help="divide the numbers of tokens by this (to try it out)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the contenders that torch.compile makes")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, which takes a process for each contender")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process measures, as JSON
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(peak_of_one(json.loads(args.one), args)))
        return
    rows = []
    for shape in SHAPES:
        for dtype in args.dtypes:
            for normalize in (False, True):
                rows += measure(args, shape, getattr(torch, dtype), normalize)
    finish(args, "layers", "layer distillation: states' and projections' gradients", rows)


if __name__ == "__main__":
    main()
