"""Peak extra memory of one loss and its gradient, over tokens and over the vocabulary. `python -m benchmarks.memory`

Each figure comes from a process of its own. It is the growth beyond a warm start: on the CPU that of the resident set, on CUDA
that of the allocator's count. A contender that compiles warms up with the whole case. The others warm up with a few tokens, so
the memory that they keep for the next call is counted.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from models.arguments import Collect

from .common import PeakMemory, available_bytes, benchmark_parser, finish
from .contenders import (
    FULL,
    Contender,
    LinearCase,
    ProjectedStep,
    Unavailable,
    contenders,
    fixed_chunks,
    gradient_errors,
    refuse_wrong_gradients,
)

SIZES = ("tokens", "vocab", "student_width", "teacher_width", "dtype")
TOKENS = {"cpu": (256, 1024, 4096), "cuda": (1024, 4096, 16384)}
VOCABS = {"cpu": (131072,), "cuda": (65536, 262144)}
WIDTHS = {"cpu": (576, 960), "cuda": (3072, 4096)}
VOCAB = {"cpu": 49152, "cuda": 128256}


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("memory", __doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", action=Collect, help="N of the first sweep; the second sweep takes the smallest"
    )
    parser.add_argument("--vocab", type=int, help="V of the first sweep")
    parser.add_argument("--vocabs", type=int, nargs="*", action=Collect, help="V of the second sweep")
    parser.add_argument("--student-width", type=int, help="width of the student's hidden states")
    parser.add_argument("--teacher-width", type=int, help="width of the teacher's hidden states")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of states and heads")
    parser.add_argument("--no-compile", action="store_true", help="leave out the contenders that torch.compile makes")
    parser.add_argument("--contenders", nargs="+", action=Collect, help="only contenders with one of these words in the name")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # contender, objective and sizes as JSON, for a child process
    args = parser.parse_args(argv)
    device_type = torch.device(args.device).type
    if args.one:
        print(json.dumps(measure_one(json.loads(args.one), torch.device(args.device))))
        return
    tokens = args.tokens or TOKENS[device_type]
    vocab = args.vocab or VOCAB[device_type]
    vocabs = VOCABS[device_type] if args.vocabs is None else args.vocabs
    widths = args.student_width or WIDTHS[device_type][0], args.teacher_width or WIDTHS[device_type][1]
    smallest = min(tokens)
    points = [(n, vocab, "tokens") for n in tokens]
    points += [(smallest, v, "vocab") for v in ([vocab, *vocabs] if vocabs else [])]
    listed = [x for x in contenders(device_type, (FULL,)) if not (args.no_compile and x.compiles)]
    if args.contenders:
        listed = [x for x in listed if any(word in x.name for word in args.contenders)]
    rows = []
    for contender in listed:
        note = ""
        try:
            contender.build()
        except Unavailable as why:
            note = str(why)
        known: dict[tuple[int, int], float] = {}
        for n, v, over in points if not note else [(math.nan, math.nan, "")]:
            row = {"contender": contender.name, "over": over, "tokens": n, "vocab": v}
            row |= {"student_width": widths[0], "teacher_width": widths[1], "dtype": args.dtype}
            if not note and (n, v) not in known:
                sizes = {key: row[key] for key in SIZES}
                known[n, v] = peak_mib_in_own_process(contender.name, FULL.name, sizes, args.device)
            peak = known.get((n, v), math.nan)
            rows.append({**row, "peak_extra_mib": peak, "note": note or ("" if peak == peak else "did not fit")})
    finish(args, "memory", "peak extra memory, MiB", rows)


def peak_mib_in_own_process(name: str, objective: str, sizes: dict, device: str) -> float:
    """NaN if the process ran out of memory, or if there was too little to try."""
    request = json.dumps({"contender": name, "objective": objective, **sizes})
    command = [sys.executable, "-m", "benchmarks.memory", "--device", str(device), "--one", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode != 0:
        print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return math.nan
    return json.loads(done.stdout.splitlines()[-1])["peak_extra_mib"]


def measure_one(request: dict, device: torch.device) -> dict[str, float]:
    listed = [*contenders(device.type), *fixed_chunks(device.type)]
    contender = next(x for x in listed if (x.name, x.objective.name) == (request["contender"], request["objective"]))
    dtype = getattr(torch, request["dtype"])
    needed = naive_bytes(request["tokens"], request["vocab"]) + head_bytes(request, dtype)
    if needed > available_bytes(device):
        raise SystemExit(f"expected room for up to {needed >> 20} MiB, got {available_bytes(device) >> 20} MiB")
    case = LinearCase.random(
        request["tokens"], request["vocab"], request["student_width"], request["teacher_width"], dtype, device
    )
    return {"peak_extra_mib": peak_bytes(contender, case, device) / 2**20}


def naive_bytes(tokens: int, vocab: int) -> int:
    """Bytes of the contender that takes most: about twelve (N, V) tensors of four bytes."""
    return 12 * 4 * tokens * vocab


def head_bytes(sizes: dict, dtype: torch.dtype) -> int:
    return sizes["vocab"] * (sizes["student_width"] + sizes["teacher_width"]) * dtype.itemsize


def peak_bytes(contender: Contender, case: LinearCase, device: torch.device) -> int:
    """Growth beyond a warm start. The gradient of the warm start is checked."""
    step = contender.build()
    warm = case if contender.compiles else case.head(min(16, case.hidden.shape[0]))
    errors = gradient_errors({contender.name: (contender.objective, step)}, warm, check_tokens=16)
    refuse_wrong_gradients(errors, case.hidden.dtype)
    if isinstance(step, ProjectedStep):
        step.prepare(case)
    with PeakMemory(device) as memory:
        step(case)
    return memory.bytes


if __name__ == "__main__":
    main()
