"""Predicts what a distillation run costs: step time, memory, cache, communication. `python -m benchmarks.plan llama --gpus 8`

Time is work divided by a rate. For the bodies the work is parameters times tokens: 2 FLOP for each forward, as many again for
the gradient of the input, and again for weights that train. For the loss it is three GEMMs and the row kernel
(kdkernels/ops/chunking.py). The rates are those of kdkernels' device table, and the bodies reach --utilisation of the GEMM
rate. The quadratic part of attention, the input pipeline and waiting are left out. So the result is an estimate from below, not
a promise.

    python -m benchmarks.plan llama --gpus 8 512 --clips 1000000     # the same run on 8 and on 512 GPUs
    python -m benchmarks.plan --calibrate                            # this machine: predicted against measured

--calibrate measures this machine's GEMM rate and its step (benchmarks/step.py, SmolLM2-135M's shapes). It prints the
utilisation at which the prediction would have been right.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from kdkernels.contrast_cache import ContrastCache
from kdkernels.ops.chunking import DEVICES, DeviceModel, known_device, plan_chunks, predict
from models.arguments import Collect

from .common import benchmark_parser, finish
from .peers import PAIRS, Pair

# Parameters of the bodies without embeddings and head, from the public configurations (rounded).
BODIES = {
    "smollm2": (106e6, 315e6),
    "llama": (2.82e9, 6.98e9),
    "qwen": (6.53e9, 6.95e9),
    "gemma": (0.70e9, 3.21e9),
}
CONNECTOR_PARAMETERS = 32e6  # the Q-Former of the CAAD paper
ENCODER_FLOP = 2 * 637e6 * 1500  # Whisper large's encoder, a window of 30 s
GPUS_A_NODE = 8
NODE_BYTES_PER_SECOND = 450e9  # NVLink of an H100, in one direction
NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gbit/s for each GPU


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        prompt_tokens: number of text and audio tokens before the answer.
        answer_tokens: number of tokens of Y, which the loss sees.
        clips_a_gpu: clips that a GPU takes in one step.
        epochs: passes over the clips.
        utilisation: share of the GEMM rate that the bodies reach.
        train_student: all of the student's weights train, not the connector alone.
    """

    clips: int = 1_000_000
    prompt_tokens: int = 192
    answer_tokens: int = 48
    clips_a_gpu: int = 64
    epochs: int = 5
    utilisation: float = 0.45
    train_student: bool = False


def body_flop(parameters: float, tokens: float, *, backward: bool = False, weights: bool = False) -> float:
    """FLOP of one pass over `tokens` positions. `backward` adds the gradient of the input, `weights` that of the weights."""
    return 2.0 * parameters * tokens * (1 + backward + weights)


def plan(name: str, pair: Pair, device: DeviceModel, device_name: str, run: Run, gpus: int, *, cached: bool) -> dict:
    """One row: seconds of a step by part, GiB on each GPU, hours of the whole run, GiB of the cache.

    Args:
        cached: the teacher's states come from a ContrastCache. It is written once, and its hours have a column of their own.
    """
    student, teacher = BODIES[name]
    tokens = run.clips_a_gpu * (run.prompt_tokens + run.answer_tokens)
    answers = run.clips_a_gpu * run.answer_tokens
    vocab = min(pair.vocab, pair.teacher_vocab)
    rate = device.flop_per_second * run.utilisation
    student_seconds = body_flop(student, tokens, backward=True, weights=run.train_student) / rate
    encoder_seconds = ENCODER_FLOP * run.clips_a_gpu / rate  # the student's encoder runs in every epoch
    teacher_seconds = body_flop(teacher, 2 * tokens) / rate  # both paths
    loss = predict(
        device, n_tokens=answers, vocab=vocab, student_width=pair.width, teacher_width=pair.teacher_width,
        head_trains=run.train_student,
    ).seconds  # fmt: skip
    trained = CONNECTOR_PARAMETERS + (student + pair.vocab * pair.width if run.train_student else 0)
    exchange = _all_reduce_seconds(4 * trained, gpus)
    step = student_seconds + encoder_seconds + loss + exchange + (0.0 if cached else teacher_seconds)
    steps = math.ceil(run.clips / (run.clips_a_gpu * gpus)) * run.epochs
    once = math.ceil(run.clips / (run.clips_a_gpu * gpus)) * (teacher_seconds + encoder_seconds)
    return {
        "pair": f"{pair.student} from {pair.teacher}", "device_planned": device_name, "gpus": gpus, "cached": cached,
        "clips": run.clips, "epochs": run.epochs,
        "teacher_s": 0.0 if cached else teacher_seconds, "encoder_s": encoder_seconds, "student_s": student_seconds,
        "loss_s": loss, "exchange_s": exchange, "step_s": step,
        "gib_a_gpu": _memory_bytes(pair, student, teacher, trained, tokens, answers, device_name, cached=cached) / 2**30,
        "cache_gib": ContrastCache.estimate_bytes(tokens=run.clips * run.answer_tokens, hidden_size=pair.teacher_width) / 2**30,
        "cache_hours": once / 3600 if cached else 0.0, "hours": steps * step / 3600 + (once / 3600 if cached else 0.0),
    }  # fmt: skip


def _all_reduce_seconds(size: float, gpus: int) -> float:
    """Seconds of a ring all-reduce of `size` bytes. With more GPUs than a node has, the network's rate counts."""
    if gpus == 1:
        return 0.0
    rate = NODE_BYTES_PER_SECOND if gpus <= GPUS_A_NODE else NETWORK_BYTES_PER_SECOND
    return 2 * size * (gpus - 1) / gpus / rate


def _memory_bytes(
    pair: Pair, student: float, teacher: float, trained: float, tokens: int, answers: int, device_name: str, *, cached: bool
) -> float:
    """Weights in bf16, float32 copies of the trained ones, Adam's two moments, activations, and one chunk of logits.

    Activations take 34 bytes times the width for each token and layer, with a fused attention (Korthikanti et al. 2022, arXiv
    2205.05198). The number of layers comes from the parameters (12 width^2 each).
    """
    heads = 2.0 * (pair.vocab * pair.width + pair.teacher_vocab * pair.teacher_width)
    weights = 2.0 * (student + (0 if cached else teacher)) + heads + 16.0 * trained
    layers = student / (12 * pair.width**2)
    vocab = min(pair.vocab, pair.teacher_vocab)
    scratch = plan_chunks(
        n_tokens=answers, bytes_per_token=8 * vocab, student_width=pair.width, device_name=device_name
    ).scratch_bytes
    return weights + 34.0 * pair.width * tokens * layers + scratch


def calibrate(examples: int, rounds: int = 3) -> list[dict]:
    """On this machine: the seconds of a CAAD step, predicted at the measured GEMM rate and measured, and their ratio."""
    from .step import StepCase

    a, b = torch.randn(512, 576), torch.randn(576, 1536)
    rate = 2 * 512 * 576 * 1536 / _seconds(lambda: torch.mm(a, b), 30)
    case = StepCase(examples, torch.device("cpu"))
    recipe, sources = case.sources("caad", (), False)
    rest, (source,) = case.rest(recipe, sources), sources
    both = _seconds(lambda: source.teacher(case.batch, case.examples), rounds)
    alone = _seconds(rest, rounds)

    def parameters(lm: torch.nn.Module) -> float:
        return float(sum(p.numel() for p in lm.model.layers.parameters()))

    def rows(data: Any, model: torch.nn.Module) -> int:
        return case.tokens_run(model, cached="prefix_cache" in data.extra_inputs)

    predicted = {
        "teacher, both paths": body_flop(parameters(case.teacher.lm), 2 * rows(case.teacher_data, case.teacher)) / rate,
        "student and loss": body_flop(parameters(case.student.lm), rows(case.data, case.student), backward=True) / rate,
    }
    measured = {"teacher, both paths": both, "student and loss": alone}
    return [
        {
            "part": part, "gemm_gflop_per_s": rate / 1e9, "predicted_s": predicted[part], "measured_s": measured[part],
            "utilisation": predicted[part] / measured[part],
        }
        for part in predicted
    ]  # fmt: skip


def _seconds(call, rounds: int) -> float:
    """Median seconds of `rounds` calls, after one call to warm up."""
    call()
    times = []
    for _ in range(rounds):
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("plan", __doc__)
    parser.add_argument("pair", nargs="?", choices=list(BODIES), help="student from teacher, as in benchmarks.peers")
    parser.add_argument("--gpu", default="H100", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--gpus", type=int, nargs="+", action=Collect, default=[8], help="numbers of GPUs")
    parser.add_argument("--clips", type=int, default=Run.clips, help="clips of the corpus")
    parser.add_argument("--clips-a-gpu", type=int, default=Run.clips_a_gpu, help="clips in a step of one GPU")
    parser.add_argument(
        "--prompt-tokens", type=int, default=Run.prompt_tokens, help="text and audio tokens before the answer"
    )
    parser.add_argument("--answer-tokens", type=int, default=Run.answer_tokens, help="tokens of the answer")
    parser.add_argument("--epochs", type=int, default=Run.epochs, help="passes over the clips")
    parser.add_argument(
        "--utilisation", type=float, default=Run.utilisation, help="share of the GEMM rate that the bodies reach, in (0, 1]"
    )
    parser.add_argument("--train-student", action="store_true", help="train all of the student, not the connector alone")
    parser.add_argument("--calibrate", action="store_true", help="compare predicted and measured times on this machine's CPU")
    args = parser.parse_args(argv)
    if args.calibrate == (args.pair is not None):
        parser.error("expected either a pair or --calibrate, got both or neither")
    if args.calibrate:
        finish(args, "plan_calibration", "a CAAD step of SmolLM2-135M's shapes, 16 clips", calibrate(16))
        return
    for name in ("clips", "clips_a_gpu", "prompt_tokens", "answer_tokens", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if min(args.gpus) < 1:
        parser.error(f"--gpus: expected at least 1, got {min(args.gpus)}")
    if not 0 < args.utilisation <= 1:
        parser.error(f"--utilisation: expected a number in (0, 1], got {args.utilisation}")
    try:
        device = known_device(args.gpu)
    except ValueError as error:
        parser.error(str(error).replace("device_name", "--gpu"))
    run = Run(
        clips=args.clips, prompt_tokens=args.prompt_tokens, answer_tokens=args.answer_tokens, clips_a_gpu=args.clips_a_gpu,
        epochs=args.epochs, utilisation=args.utilisation, train_student=args.train_student,
    )  # fmt: skip
    rows = [
        plan(args.pair, PAIRS[args.pair], device, args.gpu, run, gpus, cached=cached)
        for gpus in args.gpus
        for cached in (False, True)
    ]
    over = [r for r in rows if r["gib_a_gpu"] * 2**30 > device.memory_bytes]
    finish(args, f"plan_{args.pair}", f"predicted, not measured: {args.gpu}, {run.clips:,} clips", rows)
    for row in over:
        kind = "from the cache" if row["cached"] else "with the teacher in the step"
        print(
            f"{kind}: {row['gib_a_gpu']:.0f} GiB do not fit a GPU's {device.memory_bytes / 2**30:.0f} GiB: "
            "shard the models, or take fewer clips"
        )


if __name__ == "__main__":
    main()
