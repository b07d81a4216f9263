"""Row kernels: the loss and its gradient from three logit tensors. `python -m benchmarks.rows`

First every contender is compared with float64. Then the contenders are timed in turn, beside the floor: a plain copy that moves
as many bytes as the loss must (it reads three inputs and writes one gradient).

`--small` takes shapes whose arithmetic is over at once. There the time of a call itself counts, from Python to the kernel and
back.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from kdkernels import fused_caad_loss
from kdkernels.ops.dispatch import choose, row_launcher
from kdkernels.ops.rows import RowSpec
from models.arguments import Collect

from .common import PeakMemory, benchmark_parser, finish, refuse_wrong, relative_error, time_calls, time_columns
from .contenders import ALPHA, KD_WEIGHT, TEMPERATURE, authors_loss, eager_loss, exact_loss

FLOOR = "copy"
SMALL = ((64, 101), (16, 1024), (64, 4096))  # rows and ids
SMALL_REPEATS, SMALL_WARMUP = 2000, 200
BUDGETS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("rows", __doc__)
    parser.add_argument(
        "--repeats", type=int, help=f"rounds of timing (default: 15, with --small {SMALL_REPEATS:,})"
    )
    parser.add_argument("--rows", type=int, default=256, help="number of rows (tokens)")
    parser.add_argument("--vocab", type=int, default=49152, help="number of ids V")
    parser.add_argument(
        "--dtypes", nargs="+", action=Collect, default=["float32", "bfloat16"], help="dtypes of the logits"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a minute)")
    parser.add_argument("--small", action="store_true", help="a few small shapes, instead of --rows and --vocab")
    args = parser.parse_args(argv)
    shapes = SMALL if args.small else [(args.rows, args.vocab)]
    results = [row for shape in shapes for name in args.dtypes for row in measure(args, shape, getattr(torch, name))]
    finish(args, "rows_small" if args.small else "rows", "from logits", results)


class RowCase:
    """Logits (N, V) with a standard deviation of 3 and targets; every contender's gradient with respect to the student's."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        shape = (rows, vocab)
        self.student, self.audio, self.text = (
            torch.empty(shape, device=device, dtype=dtype).normal_(0, 3, generator=g) for _ in range(3)
        )
        self.target = torch.randint(0, vocab, (rows,), generator=g, device=device)
        self.memory = torch.empty_like(self.student)

    def gradient(self, loss: Callable[..., Tensor], student: Tensor | None = None) -> Tensor:
        leaf = (self.student if student is None else student).detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, self.audio, self.text, self.target), leaf)[0]

    def ours(self, *, inplace: bool = False) -> Tensor:
        # In place, each call restores the logits first, so this copy counts as part of its time.
        student = self.memory.copy_(self.student) if inplace else self.student
        keywords = {"alpha": ALPHA, "temperature": TEMPERATURE, "kd_weight": KD_WEIGHT, "inplace": inplace}
        return self.gradient(lambda *x: fused_caad_loss(*x, **keywords), student)

    def kernel_alone(self) -> Tensor:
        """The row kernel as a chunk of the linear loss runs it: its gradient goes into memory that is there already."""
        device, rows = self.student.device, self.student.shape[0]
        chosen, _ = choose("auto", device, [self.student.dtype])
        of_each = torch.full((2, rows), 1 / rows, device=device)
        spec = RowSpec(vocab=self.student.shape[1], temperature=TEMPERATURE)
        row_launcher(chosen)(
            self.student[None], self.audio[None], self.text[None], self.target, torch.full((1,), ALPHA, device=device),
            KD_WEIGHT * of_each[0], (1 - KD_WEIGHT) * of_each[1], spec, grad=self.memory[None],
        )  # fmt: skip
        return self.memory

    def contenders(self, *, compiled: bool = True) -> dict[str, Callable[[], Tensor]]:
        losses = {"eager": eager_loss, "CAAD authors' form": authors_loss}
        if compiled:
            losses["torch.compile"] = torch.compile(eager_loss, dynamic=False)
        calls = {name: (lambda loss=loss: self.gradient(loss)) for name, loss in losses.items()}
        ours = {"kdkernels": self.ours, "kdkernels, in place": lambda: self.ours(inplace=True)}
        return {**calls, **ours, "kdkernels, row kernel alone": self.kernel_alone}

    def copies(self) -> Callable[[], None]:
        """The floor: it moves as many bytes as it takes to read three inputs and write one gradient."""
        outs = [torch.empty_like(self.student) for _ in range(2)]

        def copy() -> None:
            outs[0].copy_(self.student)
            outs[1].copy_(self.audio)

        return copy


def measure(args: argparse.Namespace, shape: tuple[int, int], dtype: torch.dtype) -> list[dict]:
    device = torch.device(args.device)
    case = RowCase(*shape, dtype, device)
    contenders = case.contenders(compiled=not args.no_compile)
    exact = case.gradient(exact_loss, case.student.double())
    refuse_wrong(errors := {name: relative_error(call(), exact) for name, call in contenders.items()}, BUDGETS[dtype])
    del exact
    peaks = {}
    for name, call in contenders.items():
        with PeakMemory(device) as memory:
            call()
        peaks[name] = memory.bytes / 2**20

    rounds = {"repeats": args.repeats or 15} if not args.small else {
        "repeats": args.repeats or SMALL_REPEATS, "warmup": SMALL_WARMUP,
    }  # fmt: skip
    timings = time_calls({**contenders, FLOOR: case.copies()}, device=device, **rounds)
    positions = shape[0] * shape[1]
    least_bytes = 4 * positions * case.student.element_size()
    rows = []
    for name, timing in timings.items():
        rows.append(
            {
                "contender": name,
                "dtype": str(dtype).removeprefix("torch."),
                "rows": shape[0],
                "vocab": shape[1],
                **time_columns(timing),
                "ns_per_position": timing.median / positions * 1e9,
                "gbytes_per_s": least_bytes / timing.median / 1e9,
                "fraction_of_floor": timings[FLOOR].median / timing.median,
                "speedup_over_eager": timings["eager"].median / timing.median,
                "gradient_error": errors.get(name, float("nan")),
                "peak_extra_mib": peaks.get(name, float("nan")),
            }
        )
    return rows


if __name__ == "__main__":
    main()
