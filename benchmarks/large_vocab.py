"""Training steps with the vocabularies of Llama 3, Qwen 2.5 and Gemma 3. `python -m benchmarks.large_vocab`

Student and teacher are transformers' real classes with small random bodies and LM heads of full length. If the family pads its
teacher's head in another way, so does this one. A step is that of a training loop: the teacher on both paths, the student, the
loss, AdamW. With `fused` the loss is computed in the place of the student's head (kdkernels.head_loss). `naive` builds both
models' logits and writes the formula in torch. Each method runs in a process of its own. The two have to agree step by step, in
the loss and in the gradient's norm, or nothing is printed. peak_extra_mib is the peak of the first step beyond what the models
and one step of a single row take.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels import DualPathTeacher, answer_index, fused_linear_caad_loss
from kdkernels.head_capture import logit_post
from kdkernels.head_loss import HeadLoss

from .common import PeakMemory, available_bytes, benchmark_parser, finish
from .contenders import FULL, eager_loss

METHODS = ("fused", "naive")
# Both compute in the given dtype. They differ in the order of sums and, in bfloat16, in the rounding of the naive logits.
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class VocabularyRecipe:
    """A family's classes and vocabularies: ids of the student's head and of the teacher's, which may be padded further."""

    family: str
    model_type: str
    student_vocab: int
    teacher_vocab: int


RECIPES = {
    "128k": VocabularyRecipe("Llama 3", "llama", 128_256, 128_256),
    "152k": VocabularyRecipe("Qwen 2.5", "qwen2", 151_936, 152_064),
    "262k": VocabularyRecipe("Gemma 3", "gemma3_text", 262_144, 262_208),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the bodies and of a batch. `predicted` columns of a row predict a token of the answer."""

    rows: int = 8
    columns: int = 48
    predicted: int = 32
    student_width: int = 128
    teacher_width: int = 192
    layers: int = 2


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser("large_vocab", __doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"some of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps of each method")
    parser.add_argument("--dtype", choices=list(AGREEMENT), default="float32", help="dtype of weights and states")
    parser.add_argument("--train-head", action="store_true", help="train the student's LM head as well")
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"(default: {value})")
    parser.add_argument("--vocab", type=int, help="take this many ids instead (to try it out)")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a child process runs, as JSON
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(run_one(**json.loads(args.one))))
        return
    unknown = [name for name in args.recipes if name not in RECIPES]
    if unknown:
        parser.error(f"RECIPE: expected some of {', '.join(RECIPES)}, got {', '.join(unknown)}")
    if args.steps < 1:
        parser.error(f"--steps: expected >= 1, got {args.steps}")
    if not 1 <= args.predicted < args.columns:
        parser.error(f"--predicted: expected 1 to {args.columns - 1}, fewer than --columns, got {args.predicted}")
    table = []
    for name in args.recipes or RECIPES:
        request = {
            "name": name,
            "vocab": args.vocab,
            "sizes": {key: getattr(args, key) for key in asdict(Sizes())},
            "steps": args.steps,
            "dtype": args.dtype,
            "train_head": args.train_head,
            "device": str(args.device),
        }
        table += rows_of(request, {method: in_own_process({**request, "method": method}) for method in METHODS})
    finish(args, "large_vocab", "distillation steps by vocabulary", table)


def rows_of(request: dict[str, Any], measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's rows of one recipe. Raises SystemExit if the two methods disagree."""
    recipe = RECIPES[request["name"]]
    if all("losses" in result for result in measured.values()):
        refuse_disagreement(request["name"], *(measured[method] for method in METHODS), budget=AGREEMENT[request["dtype"]])
    rows = []
    for method, result in measured.items():
        row = {"recipe": request["name"], "family": recipe.family, "method": method}
        row |= {"student_vocab": recipe.student_vocab, "teacher_vocab": recipe.teacher_vocab}
        if request["vocab"] is not None:
            row |= {"student_vocab": request["vocab"], "teacher_vocab": request["vocab"]}
        row |= {**request["sizes"], "dtype": request["dtype"], "head": "trained" if request["train_head"] else "frozen"}
        row |= {"tokens": request["sizes"]["rows"] * request["sizes"]["predicted"]}
        losses = result.get("losses", [math.nan])
        row |= {"first_loss": losses[0], "last_loss": losses[-1], "peak_extra_mib": result.get("peak_extra_mib", math.nan)}
        rows.append({**row, "step_ms": result.get("step_ms", math.nan), "note": result.get("note", "")})
    return rows


def refuse_disagreement(name: str, fused: dict[str, Any], naive: dict[str, Any], *, budget: float) -> None:
    for what in ("losses", "gradient_norms"):
        for step, (ours, theirs) in enumerate(zip(fused[what], naive[what], strict=True), 1):
            if not abs(ours - theirs) <= budget * abs(theirs):
                raise SystemExit(
                    f"{name}: {what} of step {step}: expected a difference of at most {budget}, "
                    f"got fused {ours}, naive {theirs}"
                )


def in_own_process(request: dict[str, Any]) -> dict[str, Any]:
    """What `run_one` returns, or a note if there is not enough memory."""
    command = [sys.executable, "-m", "benchmarks.large_vocab", "--one", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if not last.startswith("did not fit"):
        raise SystemExit(f"{request['name']}, {request['method']}: {done.stderr.strip()}")
    return {"note": last}


def run_one(
    *, name: str, method: str, vocab: int | None, sizes: dict[str, int], steps: int, dtype: str, train_head: bool, device: str
) -> dict[str, Any]:
    """Losses, norms of the gradient, milliseconds of each step after the first, and the peak memory of the first step."""
    recipe, shape, place = RECIPES[name], Sizes(**sizes), torch.device(device)
    vocabs = (recipe.student_vocab, recipe.teacher_vocab) if vocab is None else (vocab, vocab)
    needed = needed_bytes(method, vocabs, shape, train_head)
    if needed > available_bytes(place):
        raise SystemExit(f"did not fit: expected room for up to {needed >> 20} MiB, got {available_bytes(place) >> 20} MiB")
    student = make_model(recipe.model_type, vocabs[0], shape.student_width, shape, seed=0).to(place, getattr(torch, dtype))
    teacher_model = make_model(recipe.model_type, vocabs[1], shape.teacher_width, shape, seed=1).to(place, getattr(torch, dtype))
    student.get_input_embeddings().requires_grad_(False)
    student.get_output_embeddings().requires_grad_(train_head)
    teacher = DualPathTeacher(teacher_model, negative=silence).freeze()
    step_loss = {"fused": fused_step(student, teacher), "naive": naive_step(student, teacher_model)}[method]
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    batches = [make_batch(min(vocabs), shape, generator, place) for _ in range(steps)]
    # One row goes first, and its update is undone. So libraries and their scratch count for neither method.
    step_loss(*(x[:1] for x in batches[0])).backward()
    optimizer.zero_grad(set_to_none=True)

    losses, norms, seconds, peak = [], [], [], 0
    for number, batch in enumerate(batches):
        started = time.perf_counter()
        with PeakMemory(place) as memory:
            loss = step_loss(*batch)
            loss.backward()
            losses.append(loss.item())
        norms.append(float(nn.utils.get_total_norm([p.grad for p in trained])))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number == 0:
            peak = memory.bytes
        seconds.append(time.perf_counter() - started)
    later = sorted(seconds[1:] or seconds)
    return {
        "losses": losses,
        "gradient_norms": norms,
        "step_ms": later[len(later) // 2] * 1e3,
        "peak_extra_mib": peak / 2**20,
    }


def needed_bytes(method: str, vocabs: tuple[int, int], sizes: Sizes, train_head: bool) -> int:
    """An upper bound: embeddings and heads of both models, a trained head's gradient and AdamW's states, and the logits."""
    heads = 4 * 2 * (vocabs[0] * sizes.student_width + vocabs[1] * sizes.teacher_width)
    heads += train_head * 4 * 4 * vocabs[0] * sizes.student_width
    tokens = sizes.rows * sizes.columns if method == "naive" else 256
    return heads + 12 * 4 * tokens * max(vocabs)


def make_model(model_type: str, vocab: int, width: int, sizes: Sizes, *, seed: int) -> nn.Module:
    """A causal LM of transformers with an untied head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=max(64, sizes.columns),
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def make_batch(vocab: int, sizes: Sizes, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and labels, (rows, columns) each."""
    ids = torch.randint(2, vocab, (sizes.rows, sizes.columns), generator=generator)
    labels = ids.clone()
    labels[:, : sizes.columns - sizes.predicted] = -100
    return ids.to(device), labels.to(device)


def silence(inputs: dict[str, Any]) -> dict[str, Any]:
    """The negative path of a model without audio: token 0 replaces the first quarter of each row."""
    ids = inputs["input_ids"].clone()
    ids[:, : ids.shape[1] // 4] = 0
    return {**inputs, "input_ids": ids}


StepLoss = Callable[[Tensor, Tensor], Tensor]


def fused_step(student: nn.Module, teacher: DualPathTeacher) -> StepLoss:
    softcap, scale = logit_post(student)
    at_head = HeadLoss(student, softcap=softcap, logit_scale=scale)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        index, target = answer_index(labels)
        states = teacher({"input_ids": ids}, index)

        def in_place_of_the_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return fused_linear_caad_loss(
                hidden,
                weight,
                states.audio_hidden,
                states.text_hidden,
                target=target,
                student_bias=bias,
                student_softcap=softcap,
                student_logit_scale=scale,
                alpha=FULL.alpha,
                temperature=FULL.temperature,
                kd_weight=FULL.kd_weight,
                **teacher.head.keywords("teacher"),
            )

        return at_head(student, {"input_ids": ids}, index, in_place_of_the_head)

    return loss


def naive_step(student: nn.Module, teacher: nn.Module) -> StepLoss:
    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        index, target = answer_index(labels)
        logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)[index]
        with torch.no_grad():
            audio, text = (
                teacher(**path, use_cache=False).logits.flatten(0, 1)[index, : logits.shape[1]]
                for path in ({"input_ids": ids}, silence({"input_ids": ids}))
            )
        return eager_loss(logits, audio, text, target)

    return loss


if __name__ == "__main__":
    main()
