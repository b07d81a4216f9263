"""Compares a cache of hidden states with a cache of top-k logits, and times a step with and without the teacher.

`python -m benchmarks.cache`

The teacher reads each sequence twice: with a hint before it, in the place of the audio, and without. Both caches hold what it
says. Hidden states (kdkernels.ContrastCache) give the whole vocabulary through the LM head. Other libraries keep top-k logits:
the k likeliest tokens of the first path, with both paths' logits (an int32 id and two float16). The other tokens get
probability 0. The error is the total variation distance to the exact target softmax(z_hat / tau) at alpha 2 and tau 2. That is
the share of the mass that lies in the wrong place.

The step is that of the training loop, on SmolLM2-135M's shapes with random weights (benchmarks/step.py). It runs the teacher's
two paths, or it reads their states from a cache on the disk, or the projections of the states (kdkernels.ProjectionCache).
One step has the demo's short answers and a teacher as wide as the student. The other has long answers and a teacher of
SmolLM2-360M's shapes, and its bodies multiply in bfloat16: there the heads take most of the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kdkernels import ContrastCache, LMHead, ProjectionCache, project_cache
from models.backbones.causal_lm import read_head

from .common import benchmark_parser, finish, time_calls, time_columns
from .step import StepCase

ALPHA, TEMPERATURE = 2.0, 2.0
TOP_K = (8, 32, 128, 512, 2048, 8192)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


def sentences(count: int) -> list[tuple[str, str]]:
    """Pairs (hint, sentence), made up from parts."""
    who, did = ("teacher", "sailor", "painter", "doctor"), ("found", "sold", "dropped", "repaired")
    what, where = ("window", "mirror", "camera", "hammer"), ("near the river", "at the market", "on the train", "in the garden")
    made = []
    for i in range(count):
        subject, verb, thing, place = who[i % 4], did[i // 4 % 4], what[i // 16 % 4], where[(i + i // 64) % 4]
        made.append((f"Note: this is about a {thing} {place}.\n", f"The {subject} {verb} the {thing} {place}."))
    return made


@torch.no_grad()
def two_paths(lm: Any, tokenizer: Any, count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(h_hint, h_plain, target) of each sentence: (n, H), (n, H), (n,)."""
    found = []
    for hint, sentence in sentences(count):
        target = tokenizer.encode(sentence, add_special_tokens=False)
        states = []
        for prompt in (hint, "\n"):
            start = tokenizer.encode(prompt, add_special_tokens=False)
            hidden = lm.get_decoder()(input_ids=torch.tensor([start + target])).last_hidden_state[0]
            states.append(hidden[len(start) - 1 : -1])
        found.append((*states, torch.tensor(target)))
    return found


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return float(0.5 * (p - q).abs().sum(-1).mean())


def target_distribution(z_first: torch.Tensor, z_second: torch.Tensor) -> torch.Tensor:
    return (((1 + ALPHA) * z_first - ALPHA * z_second).double() / TEMPERATURE).softmax(-1)


@torch.no_grad()
def measure_errors(lm: Any, tokenizer: Any, count: int, ks: Sequence[int]) -> list[dict]:
    """A row for each representation: its bytes on the disk for each token, and its error."""
    samples = two_paths(lm, tokenizer, count)
    head = read_head(lm).logits  # with the scale and the soft cap of the model's logits
    first, second = (torch.cat([sample[i] for sample in samples]) for i in (0, 1))
    z_first, z_second = head(first), head(second)
    exact = target_distribution(z_first, z_second)
    rows = []
    for name, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            with ContrastCache.writer(folder, fingerprint={}, hidden_size=first.shape[1], dtype=dtype) as writer:
                for number, sample in enumerate(samples):
                    writer.add(str(number), *sample)
            cache = ContrastCache(folder)
            held = cache.get([str(number) for number in range(len(samples))])
            size = cache.bytes / len(first)
        found = target_distribution(head(held.audio_hidden.float()), head(held.text_hidden.float()))
        rows.append({"kept": f"hidden states, {name}", "bytes_a_token": size, "total_variation": total_variation(exact, found)})
    for k in ks:
        ids = z_first.topk(min(k, z_first.shape[1])).indices
        kept = target_distribution(*(z.gather(1, ids).half().float() for z in (z_first, z_second)))
        found = torch.zeros_like(exact).scatter(1, ids, kept)
        rows.append({"kept": f"top {k} logits", "bytes_a_token": 8.0 * k, "total_variation": total_variation(exact, found)})
    return rows


# The second step: SmolLM2-360M's shapes, and answers of about 400 tokens of a byte-level tokenizer.
WIDE = {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5}
LONG_ANSWER = "The speaker sounds tired, and somebody walks in the next room. " * 6
DEMO_STEP, LONG_STEP = "short answers, teacher as wide", "long answers, wider teacher"


def measure_steps(examples: int, device: torch.device, repeats: int, clock: Callable[[], float]) -> list[dict]:
    """The rows of both steps. The long one has an eighth of the examples."""
    rows = measure_step(StepCase(examples, device), repeats, clock)
    long = {"layers": (10, 32), "teacher_config": WIDE, "answer": LONG_ANSWER, "bf16_products": device.type == "cpu"}
    case = StepCase(max(1, examples // 8), device, **long)
    return rows + measure_step(case, repeats, clock, name=LONG_STEP, counted=("uniform",))


def measure_step(
    case: StepCase,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    name: str = DEMO_STEP,
    counted: Sequence[str] = ("choice", "uniform"),
) -> list[dict]:
    """Times the same step with the teacher in it, from its states and from projections, in turn. The losses must be equal.

    Args:
        counted: which tokens the loss counts: one of each answer, as in the demo ("choice"), or all of them ("uniform").
    """
    from models.training.projected_teacher import ProjectedTeacher
    from models.training.teachers import CachedTeacher

    recipe, (live,) = case.sources("caad", (), False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        states = live.teacher(case.batch, case.examples)
        options = {"fingerprint": {}, "hidden_size": states.audio_hidden.shape[1], "dtype": torch.float32}
        with ContrastCache.writer(folder, **options) as writer:
            for row, example in enumerate(case.examples):
                here = (case.batch.target_row == row).nonzero()[:, 0]
                writer.add(example.id, states.audio_hidden[here], states.text_hidden[here], case.batch.target[here])
        student = read_head(case.student)
        settings = {"alpha": recipe.loss.alpha, "temperature": recipe.loss.temperature}
        project_cache(ContrastCache(folder), f"{folder}/p", teacher_head=states.head, student_head=student, **settings)
        projections = ProjectionCache(f"{folder}/p")
        steps = {
            "teacher in the step": live.teacher,
            "states from the cache": CachedTeacher(ContrastCache(folder), states.head, device=case.device),
            "projections from the cache": ProjectedTeacher(projections.get, device=case.device),
        }
        for tokens in counted:
            loss = dataclasses.replace(recipe.loss, kd_token_weight=tokens)
            asked = dataclasses.replace(recipe, loss=loss, teacher=dataclasses.replace(recipe.teacher, projection=64))
            with _one_choice_token(case.batch):
                first_epoch = _projecting(asked, live.teacher, student, case.batch)
                all_steps = {**steps, "teacher in the step, and projected": first_epoch}
                rows += _time_steps(case, asked, live, all_steps, repeats, clock)
    return [{"step": name, **row} for row in rows]


def _projecting(recipe: Any, teacher: Any, student: LMHead, batch: Any) -> Any:
    """A teacher that runs and projects what the loss counts, as the first epoch does with teacher.projection_on_the_way."""
    from models.training.objective import counted_positions
    from models.training.projections import project_states
    from models.training.teacher_states import ProjectedStates

    counted = counted_positions(recipe, batch)
    positions = torch.arange(len(batch.target)) if counted is None else counted

    def call(batch: Any, examples: Sequence[Any]) -> Any:
        projection = project_states(recipe, teacher(batch, examples), positions, student)
        return ProjectedStates(projection.spread(positions, len(batch.target)))

    return call


@contextlib.contextmanager
def _one_choice_token(batch: Any) -> Iterator[None]:
    """Inside, the last token of each answer is its choice: the smoke run's tokenizer makes a token of each letter."""
    whole, rows = batch.choice_mask, batch.target_row
    batch.choice_mask = torch.cat([rows[1:] != rows[:-1], whole.new_ones(1)])
    try:
        yield
    finally:
        batch.choice_mask = whole


def _time_steps(
    case: StepCase, recipe: Any, live: Any, teachers: dict[str, Any], repeats: int, clock: Callable[[], float]
) -> list[dict]:
    from models.training.objective import counted_positions

    rests = {name: case.rest(recipe, [dataclasses.replace(live, teacher=teacher)]) for name, teacher in teachers.items()}
    losses = {name: float(rest()) for name, rest in rests.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
        raise SystemExit(f"not timed: expected the teacher's loss from the caches, got {losses}")

    def step(teacher: Any, rest: Any) -> None:
        teacher(case.batch, case.examples)
        rest()

    calls = {name: (lambda t=teacher, r=rests[name]: step(t, r)) for name, teacher in teachers.items()}
    timings = time_calls(calls, repeats=repeats, device=case.device, warmup=1, clock=clock)
    positions = counted_positions(recipe, case.batch)
    tokens = len(case.batch.target) if positions is None else len(positions)
    slowest, of_states = (timings[name].median for name in list(teachers)[:2])
    return [
        {
            "kept": name,
            "tokens_in_the_loss": tokens,
            "clock": "processor" if clock is time.process_time else "wall",
            **time_columns(t),
            "times_faster": slowest / t.median,
            "times_faster_than_states": of_states / t.median,
        }
        for name, t in timings.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("cache", __doc__, repeats=7)
    parser.add_argument(
        "--lm", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id or folder of the model that fills the caches"
    )
    parser.add_argument("--sentences", type=int, default=48, help="sentences that the caches hold")
    parser.add_argument("--examples", type=int, default=16, help="examples in the step")
    parser.add_argument("--cpu-time", action="store_true", help="time the processor, not the clock, for a machine that is busy")
    parser.add_argument("--steps-only", action="store_true", help="time the steps; rows of the errors stay as they are")
    args = parser.parse_args(argv)
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.steps_only:
        rows = measure_steps(args.examples, torch.device(args.device), args.repeats, clock)
        finish(args, "cache", "a training step", rows, keep=lambda row: bool(row["bytes_a_token"]))
        return
    from models.backbones.resolve import load_causal_lm

    lm, tokenizer = load_causal_lm(args.lm)
    rows = measure_errors(lm, tokenizer, args.sentences, TOP_K)
    rows += measure_steps(args.examples, torch.device(args.device), args.repeats, clock)
    lm_name = Path(args.lm).name
    finish(args, "cache", "what it costs to keep a teacher's answer", [{"lm": lm_name, **row} for row in rows])


if __name__ == "__main__":
    main()
