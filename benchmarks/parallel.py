"""The vocabulary-parallel loss on the CPU: ranks of a gloo group, one thread each. `python -m benchmarks.parallel`

Every rank holds an equal slice of the vocabulary. Timed are the rows alone (logits in, their gradient out, all exchanges
between), for each divergence, and the whole loss (hidden states in, dL/dh out, frozen heads). The contenders are the kernels
and the eager PyTorch form, impl="reference". Correctness first: each contender's gradient against float64 on the first tokens.
Then time, in turn in the same processes; every call has an exchange, so the first rank's time is that of all.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from .common import benchmark_parser, finish, refuse_wrong, relative_error, time_calls, time_columns
from .contenders import ALPHA, ERROR_BUDGETS, KD_WEIGHT, TEMPERATURE, LinearCase, exact_gradient

CHECK_TOKENS = 8
CONTENDERS = {"eager": "reference", "kdkernels": "auto"}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("parallel", __doc__, repeats=7)
    parser.set_defaults(device="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=128256, help="of all ranks together")
    parser.add_argument("--student-width", type=int, default=576)
    parser.add_argument("--teacher-width", type=int, default=960)
    args = parser.parse_args(argv)
    if args.device != "cpu":
        parser.error(f"--device: expected cpu, got {args.device}")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(args, folder), nprocs=args.ranks)
        rows = json.loads((Path(folder) / "rows.json").read_text())
    title = f"N {args.tokens}, V {args.vocab} over {args.ranks} ranks of one thread"
    finish(args, "parallel", title, rows)


def _rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    # As models/training/distributed.py: imported later it holds the group to the end, and a thread of gloo may end the process.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.ranks)
    try:
        rows = [row for divergence in DIVERGENCES for row in compare_rows(args, divergence)] + compare_losses(args)
        gc.collect()
        dist.barrier()  # no thread of gloo frees tensors of the last exchange while the group ends
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))


def compare_rows(args: argparse.Namespace, divergence: str) -> list[dict]:
    """The rows alone: kd and ce and the gradient of float32 logits."""
    from kdkernels.ops import reference
    from kdkernels.ops.dispatch import choose, shard_launcher
    from kdkernels.ops.rows import RowProblem, RowSpec
    from kdkernels.parallel import _solve_rows, vocabulary_rows

    n, vocab, mine = args.tokens, args.vocab, vocabulary_rows(args.vocab, dist.group.WORLD)
    generator = torch.Generator().manual_seed(0)
    student, audio, text = (torch.randn(1, n, vocab, generator=generator).mul_(3) for _ in range(3))
    target = torch.randint(0, vocab, (n,), generator=generator)
    alpha, kd_coef, ce_coef = (
        torch.tensor([ALPHA]),
        torch.full((n,), KD_WEIGHT / n),
        torch.full((n,), (1 - KD_WEIGHT) / n),
    )

    few = slice(0, CHECK_TOKENS)
    leaf = student[:, few].double().requires_grad_()
    others = audio[:, few].double(), text[:, few].double()
    exact = reference.caad_rows(leaf, *others, target[few], alpha, RowSpec(vocab, TEMPERATURE, divergence))
    (exact.kd * kd_coef[few] + exact.ce * ce_coef[few]).sum().backward()

    here = [x[:, :, mine].contiguous() for x in (student, audio, text)]
    grad = torch.empty_like(here[0])
    del student, audio, text
    spec = RowSpec(mine.stop - mine.start, TEMPERATURE, divergence)
    problem = RowProblem(*here, target, alpha, kd_coef, ce_coef, spec, grad)
    calls = {}
    for name, impl in CONTENDERS.items():
        launcher = shard_launcher(choose(impl, grad.device, [grad.dtype])[0])
        calls[name] = functools.partial(
            _solve_rows, problem, group=dist.group.WORLD, first=mine.start, vocab=vocab, shard=launcher
        )
    errors = {}
    for name, call in calls.items():
        call()
        errors[name] = relative_error(grad[0, few], leaf.grad[0, :, mine])
    refuse_wrong(errors, ERROR_BUDGETS[torch.float32])
    return _timed(args, f"rows, {divergence}", calls, errors)


def compare_losses(args: argparse.Namespace) -> list[dict]:
    """The whole loss, bfloat16."""
    from kdkernels import fused_linear_caad_loss
    from kdkernels.parallel import vocabulary_rows

    n, mine = args.tokens, vocabulary_rows(args.vocab, dist.group.WORLD)
    case = LinearCase.random(n, args.vocab, args.student_width, args.teacher_width, torch.bfloat16, torch.device("cpu"))
    few = min(CHECK_TOKENS, n)
    exact = exact_gradient(case.head(few))
    weight, teacher_weight = case.weight[mine].clone(), case.teacher_weight[mine].clone()

    def step(impl: str) -> Tensor:
        hidden = case.hidden.detach().requires_grad_()
        fused_linear_caad_loss(
            hidden, weight, case.audio, case.text, teacher_weight, case.target, alpha=ALPHA, temperature=TEMPERATURE,
            kd_weight=KD_WEIGHT, impl=impl, process_group=dist.group.WORLD,
        ).backward()  # fmt: skip
        return hidden.grad

    calls = {name: functools.partial(step, impl) for name, impl in CONTENDERS.items()}
    errors = {name: relative_error(call()[:few] * (n / few), exact) for name, call in calls.items()}
    refuse_wrong(errors, ERROR_BUDGETS[torch.bfloat16])
    return _timed(args, "loss, forward_kl", calls, errors)


def _timed(args: argparse.Namespace, what: str, calls: dict[str, Callable], errors: dict[str, float]) -> list[dict]:
    dist.barrier()
    timings = time_calls(calls, repeats=args.repeats, device=torch.device("cpu"), warmup=1)
    return [
        {
            "what": what,
            "contender": name,
            "ranks": args.ranks,
            "tokens": args.tokens,
            "vocab": args.vocab,
            "student_width": args.student_width if what.startswith("loss") else "",
            "teacher_width": args.teacher_width if what.startswith("loss") else "",
            **time_columns(timing),
            "ns_per_position_and_rank": timing.median / (args.tokens * args.vocab / args.ranks) * 1e9,
            "speedup_over_eager": timings["eager"].median / timing.median,
            "gradient_error": errors[name],
        }
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
