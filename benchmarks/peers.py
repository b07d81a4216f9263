"""All contenders at the shapes of real model pairs, and at a few other shapes. `python -m benchmarks.peers`

A pair is a student and its teacher, with the vocabularies and hidden widths of their public configurations, and frozen heads.
The other shapes are those that are hard for this library: a head that trains beside a wide teacher, and few tokens.
Each objective (KD + CE, KD alone, CE alone) is a comparison of its own, since a library is compared on the terms that it has.
If a peer is not installed or needs a GPU, its row says so. If a pair does not fit into memory, its row says so too. All
gradients are checked before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import math
from dataclasses import dataclass, replace

import torch

from models.arguments import Collect

from .common import PeakMemory, available_bytes, benchmark_parser, finish, time_calls, time_columns
from .contenders import (
    CHUNKS,
    OBJECTIVES,
    LinearCase,
    Objective,
    bare_gemms,
    build,
    contenders,
    gradient_errors,
    refuse_wrong_gradients,
)
from .linear import FLOOR, rates
from .memory import naive_bytes


@dataclass(frozen=True)
class Pair:
    """Vocabulary and hidden width of the two LM heads."""

    student: str
    teacher: str
    vocab: int
    width: int
    teacher_vocab: int
    teacher_width: int
    tokens: int | None = None  # None: that of the command
    trains: bool = False  # the student's head
    file: str = "peers"  # its CSV

    def head_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of both heads, and the student's twice more, because Liger accumulates its gradient even if it does not train."""
        return dtype.itemsize * (3 * self.vocab * self.width + self.teacher_vocab * self.teacher_width)


SHAPES = "peers_shapes"  # that are hard for this library
PAIRS = {
    "smollm2": Pair("SmolLM2-135M", "SmolLM2-360M", 49152, 576, 49152, 960),
    "llama": Pair("Llama-3.2-3B", "Llama-3.1-8B", 128256, 3072, 128256, 4096),
    # The heads are padded differently: they share 151,936 ids.
    "qwen": Pair("Qwen2.5-Omni-7B", "Qwen3-8B", 152064, 3584, 151936, 4096),
    "gemma": Pair("Gemma-3-1B", "Gemma-3-4B", 262144, 1152, 262208, 2560),
    "training_head": Pair("a head that trains", "a wide teacher", 32000, 512, 32000, 2048, tokens=2048, trains=True, file=SHAPES),
    "tokens_64": Pair("64 tokens", "an equal teacher", 32000, 512, 32000, 512, tokens=64, file=SHAPES),
    "tokens_8": Pair("8 tokens", "an equal teacher", 32000, 512, 32000, 512, tokens=8, file=SHAPES),
}
TOKENS = {"cpu": 256, "cuda": 8192}


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("peers", __doc__, repeats=7)
    parser.add_argument(
        "--pairs", nargs="+", action=Collect, choices=list(PAIRS), default=list(PAIRS), help="only these model pairs"
    )
    parser.add_argument("--tokens", type=int, help="N; 256 on the CPU, 8192 on CUDA, but of some shapes their own")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="dtype of states and heads")
    parser.add_argument("--objectives", nargs="+", action=Collect, choices=[x.name for x in OBJECTIVES], help="only these")
    parser.add_argument("--shrink", type=int, default=1, help="divide vocabularies and widths by this (to try it out)")
    parser.add_argument("--limit-seconds", type=float, default=10, help="longest time for one objective of one pair")
    parser.add_argument("--no-compile", action="store_true", help="leave out the contenders that torch.compile makes")
    args = parser.parse_args(argv)
    usual = TOKENS[torch.device(args.device).type]
    by_file: dict[str, list[dict]] = {}
    for name in args.pairs:
        torch.compiler.reset()  # after some shapes the compiler would leave the next ones to eager PyTorch
        pair = shrunk(PAIRS[name], args.shrink)
        by_file.setdefault(pair.file, []).extend(measure(args, pair, args.tokens or pair.tokens or usual))
        gc.collect()
    for file, rows in by_file.items():
        measured = {row["pair"] for row in rows}
        title = "shapes that are hard for this library" if file == SHAPES else "model pairs"
        finish(args, file, title, rows, keep=lambda row, measured=measured: row["pair"] not in measured)


def shrunk(pair: Pair, by: int) -> Pair:
    sizes = ("vocab", "width", "teacher_vocab", "teacher_width")
    return replace(pair, **{name: max(8, getattr(pair, name) // by) for name in sizes})


def measure(args: argparse.Namespace, pair: Pair, tokens: int) -> list[dict]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sizes = {"pair": f"{pair.student} from {pair.teacher}", "dtype": args.dtype, "tokens": tokens}
    sizes |= {"vocab": min(pair.vocab, pair.teacher_vocab)}
    sizes |= {"student_width": pair.width, "teacher_width": pair.teacher_width, "head": "trains" if pair.trains else "frozen"}
    needed = pair.head_bytes(dtype) + naive_bytes(tokens, sizes["vocab"])
    if needed > available_bytes(device):
        note = f"skipped: needs {needed / 2**30:.1f} GiB, {available_bytes(device) / 2**30:.1f} available"
        return [{**sizes, "objective": "", "contender": "all", "note": note}]
    case = LinearCase.random(
        tokens, pair.vocab, pair.width, pair.teacher_width, dtype, device, teacher_vocab=pair.teacher_vocab
    )
    case.trains = pair.trains
    chosen = [x for x in OBJECTIVES if args.objectives is None or x.name in args.objectives]
    return [{**sizes, **row} for objective in chosen for row in compare(args, case, objective)]


def compare(args: argparse.Namespace, case: LinearCase, objective: Objective) -> list[dict]:
    device = torch.device(args.device)
    listed = contenders(device.type, (objective,))
    listed = [x for x in listed if not ((args.no_compile and x.compiles) or (case.trains and x.frozen_head))]
    steps, missing = build(listed)
    errors = gradient_errors({name: (objective, step) for name, step in steps.items()}, case, check_tokens=16)
    refuse_wrong_gradients(errors, case.hidden.dtype)
    peaks = {}
    for name, step in steps.items() if device.type == "cuda" else ():
        # On the CPU this would leave out what a step keeps for the next one. benchmarks.memory has a process for each.
        with PeakMemory(device) as memory:
            step(case)
        peaks[name] = memory.bytes / 2**20
    calls = {name: (lambda step=step: step(case)) for name, step in steps.items()}
    floor_calls = {}
    if objective.kd_weight > 0:  # the floor of CE alone has no teacher GEMM: two of the three
        floor_calls = {f"{FLOOR}, chunk {c}": bare_gemms(case, c) for c in CHUNKS[device.type] if c <= 2 * case.hidden.shape[0]}
    timings = time_calls(
        {**calls, **floor_calls}, repeats=args.repeats, device=device, warmup=0, limit_seconds=args.limit_seconds
    )
    floor = min((timings[name].median for name in floor_calls), default=math.nan)
    rows = []
    for name, timing in timings.items():
        row = {"objective": objective.name, "contender": name, **time_columns(timing), **rates(case, timing.median, floor)}
        row["speedup_over_eager"] = timings["eager"].median / timing.median
        row |= {"gradient_error": errors.get(name, math.nan), "peak_extra_mib": peaks.get(name, math.nan), "note": ""}
        rows.append(row)
    empty = dict.fromkeys(rows[0], "")
    return rows + [{**empty, "objective": objective.name, "contender": x, "note": why} for x, why in missing.items()]


if __name__ == "__main__":
    main()
