"""Fused linear loss: hidden states in, dL/dh out, frozen head. `python -m benchmarks.linear`

Correctness first: every contender's gradient against float64 on the first tokens. Then time, in turn in one process, beside the
floor (the three bare GEMMs at their best chunk), and peak extra memory of each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from .common import PeakMemory, print_table, relative_error, time_calls, write_csv
from .contenders import LinearCase, Step, bare_gemms, eager_loss, exact_gradient, liger_step, naive_step, ours_step

FLOOR = "bare GEMMs"
CHUNKS = {"cpu": (128, 256, 512), "cuda": (1024, 1408, 2048)}
LIGER_CHUNKS = {"cpu": (256, 1024), "cuda": (1024, 2048)}


def builders(device: str, *, compile_naive: bool) -> dict[str, Callable[[], Step]]:
    """name -> a function that makes the step, or raises ImportError where its package is missing."""
    out: dict[str, Callable[[], Step]] = {"eager": naive_step}
    if compile_naive:
        out["torch.compile"] = lambda: naive_step(torch.compile(eager_loss))
    for size in LIGER_CHUNKS[device]:
        out[f"Liger chunked JSD, compiled, chunk {size}"] = lambda size=size: liger_step(size)
    for size in CHUNKS[device]:
        out[f"kdkernels bf16 logits, chunk {size}"] = lambda size=size: ours_step(torch.bfloat16, chunk_tokens=size)
    out["kdkernels bf16 logits"] = lambda: ours_step(torch.bfloat16)
    out["kdkernels (default: fp32 logits)"] = lambda: ours_step(None)
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--student-width", type=int, default=576)
    parser.add_argument("--teacher-width", type=int, default=960)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile-naive", action="store_true", help="also time torch.compile of the naive loss")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory runs (one process each)")
    parser.add_argument("--write", action="store_true", help="replace benchmarks/results/linear_<device>.csv")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    case = LinearCase.random(
        args.tokens, args.vocab, args.student_width, args.teacher_width, getattr(torch, args.dtype), device
    )
    made = builders(device.type, compile_naive=args.compile_naive)
    if args.peak_of:
        print(json.dumps(peak_bytes(made[args.peak_of](), case, device)))
        return

    steps, missing = {}, {}
    for name, make in made.items():
        try:
            steps[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    check_tokens = min(args.tokens, 64)
    exact = exact_gradient(case.head(check_tokens))
    # The mean over fewer tokens is another loss; the gradient of these tokens differs by that factor alone.
    errors = {
        name: relative_error(step(case)[:check_tokens].cpu() * (args.tokens / check_tokens), exact)
        for name, step in steps.items()
    }
    wrong = {name: e for name, e in errors.items() if not e < 0.1}
    if wrong:
        raise SystemExit(f"not timed: gradient error against float64 beyond 10%: {wrong}")

    calls = {name: (lambda step=step: step(case)) for name, step in steps.items()}
    floors = {f"{FLOOR}, chunk {c}": bare_gemms(case, c) for c in CHUNKS[device.type]}
    timings = time_calls({**calls, **floors}, repeats=args.repeats, device=device)
    best_floor = min(timings[name].median for name in floors)
    rows = []
    for name, timing in timings.items():
        memory = float("nan")
        if name in steps and not args.no_memory:
            memory = _peak_in_own_process(name, args) / 2**20
        rows.append(
            {
                "contender": name,
                "tokens": args.tokens,
                "vocab": args.vocab,
                "student_width": args.student_width,
                "teacher_width": args.teacher_width,
                "dtype": args.dtype,
                "median_ms": timing.median * 1e3,
                "low_ms": timing.low * 1e3,
                "high_ms": timing.high * 1e3,
                "times_floor": timing.median / best_floor,
                "speedup_over_eager": timings["eager"].median / timing.median,
                "gradient_error": errors.get(name, float("nan")),
                "peak_extra_mib": memory,
                "note": "",
            }
        )
    empty = dict.fromkeys(rows[0], "")
    rows += [{**empty, "contender": name, "note": f"not installed: {why}"} for name, why in missing.items()]
    print_table(f"N {args.tokens}, V {args.vocab}, H {args.student_width}/{args.teacher_width}, {args.dtype}", rows)
    if args.write:
        print(write_csv("linear", device, rows))


def peak_bytes(step: Step, case: LinearCase, device: torch.device) -> int:
    """Growth over a warm start: the first tokens go through beforehand, so that library buffers are not counted."""
    step(case.head(min(16, case.hidden.shape[0])))
    with PeakMemory(device) as memory:
        step(case)
    return memory.bytes


def _peak_in_own_process(name: str, args: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.linear", "--peak-of", name]
    for option in ("device", "tokens", "vocab", "student_width", "teacher_width", "dtype"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    if args.compile_naive:
        command.append("--compile-naive")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else float("nan")


if __name__ == "__main__":
    main()
