"""Several teachers in one pass: hidden states in, dL/dh out, frozen head. `python -m benchmarks.multi_teacher`

The student learns by forward KL from K teachers of equal weight. Each teacher has its own head and contrast. First every
contender's gradient is compared with float64, on the first tokens. Then these are timed in turn in one process:

- ours in one call;
- ours with one call of the single-teacher loss for each teacher, where only the first call has the CE term;
- eager PyTorch over full logits;
- the floor: the 2 + K bare GEMMs of the same work at their best chunk.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.arguments import Collect

from .common import benchmark_parser, finish, relative_error, time_calls, time_columns
from .contenders import (
    ALPHA,
    CE,
    CHUNKS,
    KD,
    KD_WEIGHT,
    TEMPERATURE,
    LinearCase,
    eager_loss,
    exact_gradient,
    refuse_wrong_gradients,
)

FLOOR = "bare GEMMs"
CHECK_TOKENS = 64
LOGITS = {"bf16 logits": torch.bfloat16, "fp32 logits": None}

# One case for each teacher. They share the student: its hidden states, head and targets.
Cases = Sequence[LinearCase]
Step = Callable[[Cases], Tensor]  # returns dL/dh


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("multi_teacher", __doc__, repeats=7)
    parser.add_argument("--sources", type=int, nargs="+", action=Collect, default=[1, 2, 3], help="numbers of teachers K")
    parser.add_argument("--tokens", type=int, default=1024, help="number of tokens N")
    parser.add_argument("--vocab", type=int, default=49152, help="number of ids V")
    parser.add_argument("--student-width", type=int, default=576, help="width of the student's hidden states")
    parser.add_argument("--teacher-width", type=int, default=960, help="width of the teachers' hidden states")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of states and heads")
    args = parser.parse_args(argv)
    title = f"N {args.tokens}, V {args.vocab}, H {args.student_width}/{args.teacher_width}, {args.dtype}"
    finish(args, "multi_teacher", title, [row for count in args.sources for row in compare(args, count)])


def compare(args: argparse.Namespace, count: int) -> list[dict]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sizes = (args.tokens, args.vocab, args.student_width, args.teacher_width)
    cases = random_cases(count, *sizes, dtype, device)
    steps = all_steps()
    errors = gradient_errors(steps, cases)
    refuse_wrong_gradients(errors, dtype)

    calls = {name: (lambda step=step: step(cases)) for name, step in steps.items()}
    floors = {f"{FLOOR}, chunk {c}": bare_gemms(cases, c) for c in CHUNKS[device.type]}
    timings = time_calls({**calls, **floors}, repeats=args.repeats, device=device, warmup=1)
    floor = min(timings[name].median for name in floors)
    flop = 2.0 * args.tokens * args.vocab * (2 * args.student_width + count * args.teacher_width)
    rows = []
    for name, timing in timings.items():
        seconds = timing.median
        separate = timings.get(name.replace("one call,", "a call a teacher,"))
        rows.append(
            {
                "contender": name,
                "sources": count,
                "tokens": args.tokens,
                "vocab": args.vocab,
                "student_width": args.student_width,
                "teacher_width": args.teacher_width,
                "dtype": args.dtype,
                **time_columns(timing),
                "ns_per_position": seconds / (args.tokens * args.vocab) * 1e9,
                "gflop_per_s": flop / seconds / 1e9,
                "fraction_of_floor": floor / seconds,
                "times_floor": seconds / floor,
                "speedup_over_eager": timings["eager"].median / seconds,
                # of the same logits dtype
                "speedup_over_separate": separate.median / seconds if name.startswith("kdkernels") else float("nan"),
                "gradient_error": errors.get(name, float("nan")),
            }
        )
    return rows


def random_cases(
    count: int, n: int, vocab: int, width: int, teacher_width: int, dtype: torch.dtype, device: torch.device
) -> list[LinearCase]:
    first, *others = (LinearCase.random(n, vocab, width, teacher_width, dtype, device, seed=k) for k in range(count))
    student = {"hidden": first.hidden, "weight": first.weight, "target": first.target}
    return [first, *(replace(x, **student) for x in others)]


def all_steps() -> dict[str, Step]:
    steps: dict[str, Step] = {"eager": eager_step}
    steps |= {f"kdkernels a call a teacher, {name}": separate_step(dtype) for name, dtype in LOGITS.items()}
    steps |= {f"kdkernels one call, {name}": one_call_step(dtype) for name, dtype in LOGITS.items()}
    return steps


def eager_step(cases: Cases) -> Tensor:
    """GEMMs for all logits, then the loss from them. The student's logits are computed once."""
    hidden, weight, target = cases[0].hidden.detach().requires_grad_(), cases[0].weight, cases[0].target
    student = hidden @ weight.T
    loss = (1 - KD_WEIGHT) * eager_loss(student, None, None, target, CE)
    for c in cases:
        kd = eager_loss(student, c.audio @ c.teacher_weight.T, c.text @ c.teacher_weight.T, target, KD)
        loss = loss + KD_WEIGHT / len(cases) * kd
    loss.backward()
    return hidden.grad


def separate_step(logits_dtype: torch.dtype | None) -> Step:
    """One call of the single-teacher loss for each teacher."""
    from kdkernels import fused_linear_caad_loss

    def step(cases: Cases) -> Tensor:
        hidden = cases[0].hidden.detach().requires_grad_()
        for k, c in enumerate(cases):
            kd, ce = KD_WEIGHT / len(cases), 0.0 if k else 1 - KD_WEIGHT
            loss = fused_linear_caad_loss(
                hidden, c.weight, c.audio, c.text, c.teacher_weight, c.target, alpha=ALPHA, temperature=TEMPERATURE,
                kd_weight=kd / (kd + ce), logits_dtype=logits_dtype,
            )  # fmt: skip
            ((kd + ce) * loss).backward()
        return hidden.grad

    return step


def one_call_step(logits_dtype: torch.dtype | None) -> Step:
    from kdkernels import TeacherSource, fused_linear_multi_teacher_loss

    def step(cases: Cases) -> Tensor:
        hidden = cases[0].hidden.detach().requires_grad_()
        sources = [
            TeacherSource(c.audio, c.teacher_weight, text_hidden=c.text, alpha=ALPHA, source_weight=1 / len(cases))
            for c in cases
        ]
        fused_linear_multi_teacher_loss(
            hidden, cases[0].weight, sources, cases[0].target, temperature=TEMPERATURE, kd_weight=KD_WEIGHT,
            logits_dtype=logits_dtype,
        ).backward()  # fmt: skip
        return hidden.grad

    return step


def gradient_errors(steps: dict[str, Step], cases: Cases) -> dict[str, float]:
    """Relative error against float64 of each step's gradient, for the first tokens."""
    n = cases[0].hidden.shape[0]
    few = min(CHECK_TOKENS, n)
    # The weights sum to 1, so the loss is the mean of the single-teacher losses. Over fewer tokens it differs only by a factor.
    exact = sum(exact_gradient(c.head(few)) for c in cases) / len(cases)
    return {name: relative_error(step(cases)[:few].cpu() * (n / few), exact) for name, step in steps.items()}


def bare_gemms(cases: Cases, chunk: int) -> Callable[[], None]:
    """The floor: the student's logits, every teacher's logits, and dh, in chunks into reused scratch, and nothing else."""
    hidden, weight = cases[0].hidden, cases[0].weight
    n, vocab = hidden.shape[0], weight.shape[0]
    chunk = min(chunk, n)
    student, teacher = (torch.empty(chunk, vocab, dtype=weight.dtype, device=weight.device) for _ in range(2))
    out = torch.empty_like(hidden)

    def run() -> None:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            torch.mm(hidden[rows], weight.T, out=student[:size])
            for c in cases:
                torch.mm(c.audio[rows], c.teacher_weight.T, out=teacher[:size])
            torch.mm(student[:size], weight, out=out[rows])

    return run


if __name__ == "__main__":
    main()
