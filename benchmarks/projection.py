"""From a teacher's projection: hidden states in, dL/dh out, frozen head. `python -m benchmarks.projection`

Correctness first: every contender's gradient against float64 on the first tokens. Then time, in turn in one process: the loss
from projections made before, the same loss from the teacher's states, cross-entropy alone, and the floor of a projection, the two
bare GEMMs of the student's head at their best chunk. A run makes the projection once for each token; that is timed apart.

Last the error of the gradient near convergence, for several numbers of ids and dtypes of the tail. There the student's divergence
from the teacher is about as large as asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.arguments import Collect

from .common import benchmark_parser, finish, relative_error, time_calls, time_columns
from .contenders import (
    CE,
    CHUNKS,
    FULL,
    KD,
    LinearCase,
    Objective,
    ProjectedStep,
    Step,
    exact_gradient,
    gradient_errors,
    mean_kl,
    naive_step,
    ours_step,
    project,
    refuse_wrong_gradients,
)

# name -> N, V, H_s, H_t
SHAPES = {
    "SmolLM2": (1024, 49152, 576, 960),
    "Llama 3": (256, 128256, 2048, 4096),
    "Qwen2.5": (256, 151936, 1536, 3584),
}
# How the tail is stored. Two bf16 summands take the bytes of fp32.
TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": lambda x: x,
    "bf16": lambda x: x.bfloat16(),
    "two bf16 summands": lambda x: x.bfloat16().float() + (x - x.bfloat16().float()).bfloat16().float(),
}
NEAR_TOKENS, NEAR_VOCAB, NEAR_WIDTH = 64, 32000, 576


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("projection", __doc__, repeats=7)
    parser.add_argument("--shapes", nargs="+", action=Collect, default=list(SHAPES), choices=list(SHAPES), help="pairs of models")
    parser.add_argument("--tokens", type=int, help="N, instead of the shapes' own")
    parser.add_argument("--errors-only", action="store_true", help="only the errors near convergence; the times stay as they are")
    parser.add_argument("--kl", type=float, nargs="*", action=Collect, default=[0.0004, 0.01, 0.3], help="near convergence")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows = []
    for name in () if args.errors_only else args.shapes:
        n, *sizes = SHAPES[name]
        rows += compare(name, (args.tokens or n, *sizes), device, args.repeats)
    for kl in args.kl:
        rows += near_convergence(kl, device)
    finish(args, "projection", "bf16, frozen head", rows, keep=lambda row: args.errors_only and bool(row["median_ms"]))


def compare(shape: str, sizes: tuple[int, int, int, int], device: torch.device, repeats: int) -> list[dict]:
    case = LinearCase.random(*sizes, torch.bfloat16, device)
    steps: dict[str, tuple[Objective, Step]] = {
        "from projections, 64 ids": (FULL, ProjectedStep()),
        "from projections, 16 ids": (FULL, ProjectedStep(top_k=16)),
        "from states": (FULL, ours_step(None)),
        "CE alone": (CE, ours_step(None, CE)),
    }
    if sizes[0] * sizes[1] <= 1 << 26:  # full logits of three tensors
        steps["eager"] = (FULL, naive_step())
    errors = gradient_errors(steps, case)
    refuse_wrong_gradients(errors, torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {name: (lambda step=step: step(case)) for name, (_, step) in steps.items()}
    floors = {f"two bare GEMMs, chunk {c}": two_gemms(case, c) for c in CHUNKS[device.type]}
    calls |= {**floors, "making the projection": lambda: project(case)}
    timings = time_calls(calls, repeats=repeats, device=device, warmup=1)
    floor = min(timings[name].median for name in floors)
    return [
        {
            "contender": name,
            "shape": shape,
            "tokens": sizes[0],
            "vocab": sizes[1],
            "student_width": sizes[2],
            "teacher_width": sizes[3],
            **time_columns(timing),
            "times_two_gemms": timing.median / floor,
            "times_ce": timing.median / timings["CE alone"].median,
            "speedup_over_states": timings["from states"].median / timing.median,
            "kl": "",
            "gradient_error": errors.get(name, float("nan")),
        }
        for name, timing in timings.items()
    ]


def two_gemms(c: LinearCase, chunk: int) -> Callable[[], None]:
    """The student's logits and dh, in chunks into reused scratch."""
    n, vocab = c.hidden.shape[0], c.weight.shape[0]
    chunk = min(chunk, n)
    logits = torch.empty(chunk, vocab, dtype=c.weight.dtype, device=c.weight.device)
    out = torch.empty_like(c.hidden)

    def run() -> None:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            torch.mm(c.hidden[rows], c.weight.T, out=logits[:size])
            torch.mm(logits[:size], c.weight, out=out[rows])

    return run


def near_convergence(kl: float, device: torch.device) -> list[dict]:
    """Relative errors of dL/dh of the divergence alone, at a divergence of about ``kl`` nats."""
    case = LinearCase.near_convergence(NEAR_TOKENS, NEAR_VOCAB, NEAR_WIDTH, torch.bfloat16, device, kl=kl)
    exact, reached = exact_gradient(case, KD), mean_kl(case)
    steps = {"from states": ours_step(None, KD), "from states, bf16 logits": ours_step(torch.bfloat16, KD)}
    for k in (1, 16, 64, 256):
        for tail in TAILS if k == 64 else ("fp32",):
            suffix = {"fp32": "", "bf16": ", bf16 tail"}.get(tail, f", tail as {tail}")
            steps[f"from projections, {k} ids{suffix}"] = ProjectedStep(KD, top_k=k, store=TAILS[tail])
    sizes = {"tokens": NEAR_TOKENS, "vocab": NEAR_VOCAB, "student_width": NEAR_WIDTH, "teacher_width": NEAR_WIDTH}
    blank = dict.fromkeys(("median_ms", "low_ms", "high_ms", "repeats", "times_two_gemms", "times_ce", "speedup_over_states"), "")
    return [
        {"contender": name, "shape": "near convergence", **sizes, **blank, "kl": reached,
         "gradient_error": relative_error(step(case).cpu(), exact)}
        for name, step in steps.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
