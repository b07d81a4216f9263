"""Row kernels: the loss and its gradient from three logit tensors. `python -m benchmarks.rows`"""

from __future__ import annotations

import argparse

import torch

from kdkernels import fused_caad_loss

from .common import print_table, relative_error, time_calls, write_csv
from .contenders import ALPHA, KD_WEIGHT, TEMPERATURE, eager_loss, exact_loss


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=256, help="tokens")
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary width")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a minute)")
    parser.add_argument("--write", action="store_true", help="replace benchmarks/results/rows_<device>.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    results = [row for name in args.dtypes for row in measure(args, device, getattr(torch, name))]
    print_table(f"{args.rows} rows x {args.vocab}", results)
    if args.write:
        print(write_csv("rows", device, results))


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict]:
    g = torch.Generator().manual_seed(0)
    student, audio, text = (
        (torch.randn(args.rows, args.vocab, generator=g) * 3).to(device=device, dtype=dtype) for _ in range(3)
    )
    target = torch.randint(0, args.vocab, (args.rows,), generator=g).to(device)
    student.requires_grad_()

    def ours(impl: str, **options):
        return lambda: torch.autograd.grad(
            fused_caad_loss(
                student,
                audio,
                text,
                target,
                alpha=ALPHA,
                temperature=TEMPERATURE,
                kd_weight=KD_WEIGHT,
                impl=impl,
                **options,
            ),
            student,
        )[0]

    contenders = {"eager": lambda: torch.autograd.grad(eager_loss(student, audio, text, target), student)[0]}
    if not args.no_compile:
        compiled = torch.compile(eager_loss)
        contenders["torch.compile"] = lambda: torch.autograd.grad(compiled(student, audio, text, target), student)[0]
    impl = "triton" if device.type == "cuda" else "cpu"
    contenders["kdkernels"] = ours(impl)
    memory = torch.empty_like(student.detach())

    def in_place() -> torch.Tensor:
        # The logits are restored first, so the copy of the row above is counted against it.
        logits = memory.copy_(student.detach()).detach().requires_grad_()
        loss = fused_caad_loss(
            logits, audio, text, target, alpha=ALPHA, temperature=TEMPERATURE, kd_weight=KD_WEIGHT, impl=impl, inplace=True
        )
        return torch.autograd.grad(loss, logits)[0]

    contenders["kdkernels, in place"] = in_place

    exact_student = student.detach().double().requires_grad_()  # a float64 leaf: its gradient is not rounded to `dtype`
    exact = torch.autograd.grad(exact_loss(exact_student, audio, text, target), exact_student)[0]
    errors = {name: relative_error(call(), exact) for name, call in contenders.items()}
    budget = 1e-4 if dtype == torch.float32 else 2e-2
    wrong = {name: e for name, e in errors.items() if not e < budget}
    if wrong:
        raise SystemExit(f"not timed: gradient error against float64 beyond {budget}: {wrong}")

    # What must move: three inputs read, one gradient written. A plain copy of as much is the yardstick.
    copies = [torch.empty_like(student.detach()) for _ in range(2)]

    def copy() -> None:
        copies[0].copy_(student.detach())
        copies[1].copy_(audio)

    timings = time_calls({**contenders, "copy": copy}, repeats=args.repeats, device=device)
    positions = args.rows * args.vocab
    item_bytes = student.element_size()
    rows = []
    for name, timing in timings.items():
        rows.append(
            {
                "contender": name,
                "dtype": str(dtype).removeprefix("torch."),
                "rows": args.rows,
                "vocab": args.vocab,
                "median_ms": timing.median * 1e3,
                "low_ms": timing.low * 1e3,
                "high_ms": timing.high * 1e3,
                "ns_per_position": timing.median / positions * 1e9,
                "gbytes_per_s": 4 * positions * item_bytes / timing.median / 1e9,
                "speedup_over_eager": timings["eager"].median / timing.median,
                "gradient_error": errors.get(name, float("nan")),
            }
        )
    return rows


if __name__ == "__main__":
    main()
