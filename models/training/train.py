"""Train a speech LM's connector: one loop for every objective.

    python -m models train RECIPE [key=value ...]

    python -m models train sft_teacher data.manifest=corpus/teacher.jsonl model.folder=base run.out_dir=runs/teacher
    python -m models train caad data.manifest=pool.jsonl model.folder=student teacher.folder=runs/teacher/final loss.alpha=1

What a step does is in models/training/loop.py, what it minimises in models/training/objective.py. Ctrl-C or SIGTERM ends the run
after the present step: it saves, and prints the command that continues (`run.resume=auto`). On a CPU the continued run is the
undisturbed run, bit for bit.

    torchrun --nproc-per-node 4 -m models train caad run.parallel=ddp ...

trains on several devices (models/training/distributed.py). Each rank, that is each process, has its share of every step's
examples. With fsdp2 weights and optimiser are sharded; frozen teachers are whole on every rank. A run can continue with ddp or
fsdp2 on any number of ranks that divides the batch. Random numbers inside the model (dropout) then differ; all else is the same.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdkernels.ops.dispatch import choose
from models.backbones.device import pick_device
from models.io_utils import exclusive
from models.training.build_sources import build_sources
from models.training.check_folders import check_folders
from models.training.checkpoint import RESULT_NAME, CheckpointError
from models.training.commands import train_parser
from models.training.distributed import RankError, Ranks
from models.training.loop import NonFiniteError, TrainingLoop, TrainResult, check_ranks
from models.training.publish import PublishError, check_recipe, open_repository, publish
from models.training.recipe import Recipe
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.recipe_keys import describe_keys
from models.training.run_identity import run_identity
from models.training.student import build_model
from models.training.teacher_states import SourceError
from models.training.teachers import Source
from models.training.training_data import TrainingData, build_data, read_examples


def train(
    recipe: Recipe,
    *,
    model: torch.nn.Module,
    data: TrainingData,
    sources: Sequence[Source] = (),
    resume_command: str | None = None,
    ranks: Ranks | None = None,
    identity: Mapping[str, str] | None = None,
) -> TrainResult:
    """Run a recipe to its end, or to the next whole step after SIGINT / SIGTERM.

    Args:
        recipe: the settings.
        model: a SpeechLM, or anything with `hidden_states_at(index, **inputs) -> (N, H)`, `get_output_embeddings()` and
            `save_pretrained(folder)`; what requires grad is trained. With data.on_policy_fraction it also has `own_answers`,
            `end_ids` and `tokenizer`, and `data` has `make_prompts`. With optim.answer_noise `hidden_states_at` takes
            `answer_noise`.
        data: examples and how a batch is made of them.
        sources: the teachers; kd, sharpened and caad need their own, named `OWN_TEACHER`. The projections of a source's layers
            train and are saved in the checkpoints, but not in run.out_dir/final.
        resume_command: printed when a signal stops the run.
        identity: what the run is made of beside its recipe (`run_identity`): a checkpoint with another one is refused. None = not
            compared.
        ranks: this process among those of the run; all of them make the call, with models of equal weights. None = alone.

    Returns:
        the step reached and why it ended; checkpoints lie in run.out_dir/checkpoints, the result in run.out_dir/final.

    Raises:
        ValueError: no teacher though the objective needs one, no example, or nothing to train.
        ConfigError: settings that the number of ranks or run.parallel does not allow.
        NonFiniteError: before the optimiser's step, on every rank; it names the examples.
        RankError: the ranks have different gradients.
        CheckpointError: the checkpoint to resume from is damaged or of another recipe.
    """
    loop = TrainingLoop(
        recipe, model=model, data=data, sources=sources, resume_command=resume_command, ranks=ranks, identity=identity
    )
    return loop.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 0, 1, 2 for an error in the recipe, or 128 + the signal that stopped the run."""
    parser = train_parser()
    arguments = parser.parse_args(argv)
    if arguments.keys:
        print(describe_keys())
        return 0
    if arguments.recipe is None:
        parser.error("expected the name or the file of a recipe, got none")
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        device = pick_device(recipe.run.device, name="run.device")
        if recipe.distils:
            _check_impl(recipe.loss.impl, device)
        _check_start(recipe, device)
        check_folders(recipe)
        check_recipe(recipe)
        with Ranks.started_by_torchrun(device, recipe.run.parallel) as ranks:
            with nullcontext() if ranks.is_first else redirect_stdout(None):  # all ranks would print the same
                examples, audio_root = read_examples(recipe)
            # before anything is written: the features of the clips are saved in the folder too
            with exclusive(recipe.run.out_dir, "a training") if ranks.is_first else nullcontext():
                result = _train_on(ranks, recipe, examples, audio_root, [arguments.recipe, *arguments.overrides])
    except (ValueError, OSError, CheckpointError, SourceError, NonFiniteError, RankError, PublishError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the signal came before the loop handled it, or it is a second one
        print("Stopped; run.resume=auto continues from the last checkpoint, if there is one.", file=sys.stderr)
        return 128 + signal.SIGINT
    if result.stopped_by is not None:
        return 128 + result.stopped_by
    if ranks.is_first:
        print(f"{recipe.objective}: {result.step} steps -> {result.folder / RESULT_NAME}")
        return _push(recipe, result.folder / RESULT_NAME)
    return 0


def _push(recipe: Recipe, folder: Path) -> int:
    """Push the result if the recipe says so. It stays here if that fails, and the command that repeats it is printed."""
    name, private = recipe.run.push_to_hub, recipe.run.hub_private
    if name is None:
        return 0
    try:
        print(publish(folder, name, private=private))
    except PublishError as error:
        words = shlex.join(["python", "-m", "models", "push", str(folder), name, *([] if private else ["--public"])])
        print(f"error: {error}\nThe result is in {folder}. Push it with:\n  {words}", file=sys.stderr)
        return 1
    return 0


def _train_on(ranks: Ranks, recipe: Recipe, examples: Sequence[Any], audio_root: Any, words: Sequence[str]) -> TrainResult:
    """Build model, data and teachers on this rank, and train; `words`: recipe and overrides as the user gave them."""
    check_ranks(recipe, ranks)
    if recipe.run.push_to_hub is not None and ranks.is_first:
        open_repository(recipe.run.push_to_hub, private=recipe.run.hub_private)
    if not ranks.is_first:
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, progress_bar=False))
    seed_everything(recipe.run.seed)
    model = build_model(recipe)
    data = build_data(recipe, model, examples, audio_root, ranks=ranks)
    placed = getattr(model, "is_placed", False)
    sources = build_sources(recipe, data, model, device=model.device if placed else ranks.device, ranks=ranks)
    seed_everything(recipe.run.seed)  # the run must not depend on the numbers drawn above
    command = _resume_command(recipe, words)
    identity = ranks.from_first(lambda: run_identity(recipe, data.examples))
    return train(recipe, model=model, data=data, sources=sources, resume_command=command, ranks=ranks, identity=identity)


def _resume_command(recipe: Recipe, words: Sequence[str]) -> str:
    """The words that a person types to continue the run."""
    kept = [word for word in words if not word.startswith("run.resume=")]
    started = ["python"]
    if recipe.run.parallel != "none":
        local = os.environ["LOCAL_WORLD_SIZE"]
        nodes = int(os.environ.get("WORLD_SIZE", local)) // int(local)
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT"]  # torchrun does not tell its processes
        started = ["torchrun", *(["--nnodes", str(nodes)] if nodes > 1 else []), "--nproc-per-node", local]
        started += where if nodes > 1 else []
    return shlex.join([*started, "-m", "models", "train", *kept, "run.resume=auto"])


def _check_start(recipe: Recipe, device: torch.device) -> None:
    """ConfigError where the recipe does not fit this device or the processes that torchrun started."""
    started = int(os.environ.get("WORLD_SIZE", 0))
    parallel, batch = recipe.run.parallel, recipe.optim.batch_examples
    if parallel != "none" and not started:
        raise ConfigError(f"run.parallel: expected none in a process that torchrun did not start, got {parallel!r}")
    if parallel != "none" and batch % started:
        raise ConfigError(
            f"optim.batch_examples: expected a multiple of the {started} processes of run.parallel={parallel}, got {batch}"
        )
    if device.type == "cuda" and recipe.model.bf16_products:
        raise ConfigError(f"model.bf16_products: expected false on CUDA, got run.device={recipe.run.device}; it is for CPUs")
    if device.type != "cuda" and recipe.data.packing == "varlen":
        raise ConfigError(f"data.packing: varlen needs CUDA, got run.device={recipe.run.device} without a CUDA device")
    resume = recipe.run.resume
    if resume not in ("never", "auto", "fallback") and not os.path.isdir(resume):
        raise ConfigError(f"run.resume: expected never, auto, fallback or a checkpoint's folder, got {resume!r}")


def _check_impl(impl: str, device: torch.device) -> None:
    """Whether the loss can run as `impl` says: asked before the clips are encoded, which takes long."""
    try:
        choose(impl, device, [torch.float32])
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"loss.impl: {error}") from None


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
