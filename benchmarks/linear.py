"""Fused linear loss: hidden states in, dL/dh out, frozen head. `python -m benchmarks.linear`

First every contender's gradient is compared with float64, on the first tokens. Then the contenders are timed in turn in one
process, beside the floor (the three bare GEMMs at their best chunk). Each one's peak extra memory comes from a process of its
own.

`--sweep tokens|vocab|width|chunk|threads` varies one size instead. It times ours with float32 and with bf16 logits beside the
bare GEMMs. It also says where the time goes: bare GEMMs of the same chunk, the row kernel alone, and the rest. Each part is
timed by itself in the same run. Float32 logits cost more than the bare bf16 GEMMs, and that counts as rest. A fused path may
make the rest negative.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection, Iterator

import torch

from models.arguments import Collect

from . import memory
from .common import benchmark_parser, finish, time_calls, time_columns
from .contenders import (
    CHUNKS,
    FULL,
    KD,
    TEMPERATURE,
    LinearCase,
    bare_gemms,
    build,
    contenders,
    fixed_chunks,
    gradient_errors,
    ours_step,
    refuse_wrong_gradients,
)

FLOOR = "bare GEMMs"
# size -> values. The other sizes stay at the command's own, but large vocabularies and widths take fewer tokens.
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "tokens": (128, 1024, 8192, 16384),
        "vocab": (16384, 49152, 131072, 262144),
        "width": (576, 1152, 2304, 4096),
        "chunk": (64, 128, 256, 512, 1024),
        "threads": (1, 2, 4, 8),
    },
    "cuda": {
        "tokens": (1024, 4096, 16384, 32768),
        "vocab": (32768, 65536, 128256, 262144),
        "width": (1024, 2048, 4096, 8192),
        "chunk": (512, 1024, 1408, 2048, 4096),
    },
}
SWEEP_TOKENS = {"cpu": 512, "cuda": 4096}


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("linear", __doc__, repeats=7)
    parser.add_argument("--tokens", type=int, default=1024, help="number of tokens N")
    parser.add_argument("--vocab", type=int, default=49152, help="number of ids V")
    parser.add_argument("--student-width", type=int, default=576, help="width of the student's hidden states")
    parser.add_argument("--teacher-width", type=int, default=960, help="width of the teacher's hidden states")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of states and heads")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile's contenders (they take a minute)")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, which takes a process for each contender")
    parser.add_argument(
        "--sweep", choices=("tokens", "vocab", "width", "chunk", "threads"), help="the size that varies"
    )
    parser.add_argument("--values", type=int, nargs="+", action=Collect, help="values of the sweep, instead of its own")
    args = parser.parse_args(argv)
    if args.sweep:
        rows = sweep(args)
        finish(args, "linear_sweep", f"over {args.sweep}, {args.dtype}", rows, keep=lambda row: row["sweep"] != args.sweep)
    else:
        title = f"N {args.tokens}, V {args.vocab}, H {args.student_width}/{args.teacher_width}, {args.dtype}"
        finish(args, "linear", title, compare(args))


def compare(args: argparse.Namespace) -> list[dict]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    case = LinearCase.random(args.tokens, args.vocab, args.student_width, args.teacher_width, dtype, device)
    listed = [*contenders(device.type, (FULL,)), *fixed_chunks(device.type)]
    headline = {x.name for x in contenders(device.type, (FULL,))}  # the contender that a child process measures
    steps, missing = build(x for x in listed if not (args.no_compile and x.compiles))
    errors = gradient_errors({name: (FULL, step) for name, step in steps.items()}, case)
    refuse_wrong_gradients(errors, dtype)
    near = errors_near_convergence(args, steps)

    calls = {name: (lambda step=step: step(case)) for name, step in steps.items()}
    floors = {f"{FLOOR}, chunk {c}": bare_gemms(case, c) for c in CHUNKS[device.type]}
    timings = time_calls({**calls, **floors}, repeats=args.repeats, device=device, warmup=1)
    floor = min(timings[name].median for name in floors)
    sizes = {
        "tokens": args.tokens,
        "vocab": args.vocab,
        "student_width": args.student_width,
        "teacher_width": args.teacher_width,
        "dtype": args.dtype,
    }
    rows = []
    for name, timing in timings.items():
        peak = float("nan")
        if name in headline and not args.no_memory:
            peak = memory.peak_mib_in_own_process(name, FULL.name, sizes, args.device)
        rows.append(
            {
                "contender": name,
                **sizes,
                **time_columns(timing),
                **rates(case, timing.median, floor),
                "speedup_over_eager": timings["eager"].median / timing.median,
                "gradient_error": errors.get(name, float("nan")),
                "gradient_error_near": near.get(name, float("nan")),
                "peak_extra_mib": peak,
                "note": "",
            }
        )
    empty = dict.fromkeys(rows[0], "")
    return rows + [{**empty, "contender": name, "note": why} for name, why in missing.items()]


def errors_near_convergence(args: argparse.Namespace, measured: Collection[str]) -> dict[str, float]:
    """Gradient errors of the divergence alone, as in benchmarks/accuracy.py, of the measured contenders that have it alone."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    case = LinearCase.near_convergence(min(64, args.tokens), args.vocab, args.student_width, dtype, device)
    steps, _ = build(x for x in contenders(device.type, (KD,)) if x.name in measured)
    return gradient_errors({name: (KD, step) for name, step in steps.items()}, case)


def rates(case: LinearCase, seconds: float, floor_seconds: float) -> dict[str, float]:
    """Figures for each logit pair. FLOP and bytes are the least that a step with a frozen head needs."""
    return {
        "ns_per_position": seconds / (case.hidden.shape[0] * case.vocab) * 1e9,
        "gflop_per_s": case.flop / seconds / 1e9,
        "gbytes_per_s": case.least_bytes / seconds / 1e9,
        "fraction_of_floor": floor_seconds / seconds,
        "times_floor": seconds / floor_seconds,
    }


def sweep_points(args: argparse.Namespace) -> Iterator[tuple[int, dict, int | None, int | None]]:
    """The points of a sweep: value, sizes, chunk (None: ours chooses), threads (None: unchanged)."""
    device_type = torch.device(args.device).type
    values = args.values or SWEEPS[device_type].get(args.sweep)
    if not values:
        raise SystemExit(f"--sweep: expected a size that is swept on {device_type}, got {args.sweep}")
    if args.sweep == "threads" and not args.values:
        values = [v for v in values if v <= len(os.sched_getaffinity(0))]
    for value in values:
        tokens = min(args.tokens, SWEEP_TOKENS[device_type]) if args.sweep in ("vocab", "width") else args.tokens
        sizes = {
            "tokens": value if args.sweep == "tokens" else tokens,
            "vocab": value if args.sweep == "vocab" else args.vocab,
            "student_width": value if args.sweep == "width" else args.student_width,
            "teacher_width": value if args.sweep == "width" else args.teacher_width,
        }
        yield value, sizes, value if args.sweep == "chunk" else None, value if args.sweep == "threads" else None


def sweep(args: argparse.Namespace) -> list[dict]:
    before = torch.get_num_threads()
    try:
        return [row for point in sweep_points(args) for row in sweep_one(args, *point)]
    finally:
        torch.set_num_threads(before)


def sweep_one(args: argparse.Namespace, value: int, sizes: dict, chunk: int | None, threads: int | None) -> list[dict]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    case = LinearCase.random(**{_ARGUMENTS[k]: v for k, v in sizes.items()}, dtype=dtype, device=device)
    own_chunk = chunk or planned_chunk(case)
    logits = {"kdkernels (default: fp32 logits)": None, "kdkernels bf16 logits": torch.bfloat16}
    steps = {name: ours_step(x, chunk_tokens=chunk) for name, x in logits.items()}
    errors = gradient_errors({name: (FULL, step) for name, step in steps.items()}, case, check_tokens=16)
    refuse_wrong_gradients(errors, dtype)
    calls: dict[str, Callable[[], object]] = {name: (lambda step=step: step(case)) for name, step in steps.items()}
    calls[FLOOR] = bare_gemms(case, own_chunk)
    rows_alone = {name: row_kernel(case, own_chunk, x or torch.float32) for name, x in logits.items()}
    calls |= {f"{name}: rows": call for name, call in rows_alone.items()}
    timings = time_calls(calls, repeats=args.repeats, device=device, warmup=1, limit_seconds=6)
    floor = timings[FLOOR].median
    out = []
    for name in (*steps, FLOOR):
        total = timings[name].median
        row = {"sweep": args.sweep, "value": value, "contender": name, **sizes, "dtype": args.dtype, "chunk": own_chunk}
        row |= {"threads": torch.get_num_threads(), **time_columns(timings[name]), **rates(case, total, floor)}
        row["gradient_error"] = errors.get(name, float("nan"))
        rows_share = timings[f"{name}: rows"].median / total if name in steps else 0.0
        row |= {"gemm_share": floor / total, "rows_share": rows_share, "rest_share": 1 - floor / total - rows_share}
        out.append(row)
    return out


_ARGUMENTS = {"tokens": "n", "vocab": "vocab", "student_width": "width", "teacher_width": "teacher_width"}


def planned_chunk(case: LinearCase) -> int:
    """The number of tokens in a chunk that the default plan takes for float32 logits."""
    from kdkernels.ops.chunking import plan_chunks

    plan = plan_chunks(
        n_tokens=case.hidden.shape[0],
        bytes_per_token=2 * case.vocab * torch.float32.itemsize,
        student_width=case.weight.shape[1],
        device=case.hidden.device,
    )
    return plan.chunk_tokens


def row_kernel(case: LinearCase, chunk: int, logits_dtype: torch.dtype) -> Callable[[], None]:
    """The row kernel alone, as the linear loss calls it: over as many rows as the case has tokens, in scratch of one chunk."""
    from kdkernels.ops import dispatch
    from kdkernels.ops.rows import RowSpec

    device, n = case.hidden.device, case.hidden.shape[0]
    chunk = min(chunk, n)
    implementation, _ = dispatch.choose("auto", device, [logits_dtype])
    launch = dispatch.row_launcher(implementation)
    student, contrast = (
        torch.empty(1, chunk, case.vocab, dtype=logits_dtype, device=device).normal_(0, 3) for _ in range(2)
    )
    memory_of_student = student.clone()
    items = logits_dtype.itemsize // case.weight.dtype.itemsize or 1
    grad_dtype = case.weight.dtype if items > 1 else logits_dtype
    grad = memory_of_student.view(grad_dtype).as_strided(student.shape, (0, case.vocab * items, 1))
    alpha, coef = torch.full((1,), 2.0, device=device), torch.full((chunk,), 1 / n, device=device)
    spec = RowSpec(vocab=case.vocab, temperature=TEMPERATURE)

    def run() -> None:
        for start in range(0, n, chunk):
            # It reads what the last call left there. The time does not depend on the values.
            size = min(chunk, n - start)
            launch(
                memory_of_student[:, :size], contrast[:, :size], None, case.target[start : start + size], alpha,
                coef[:size], coef[:size], spec, grad=grad[:, :size],
            )  # fmt: skip

    return run


if __name__ == "__main__":
    main()
