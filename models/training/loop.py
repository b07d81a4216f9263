"""The training loop: the same steps for every objective, saved, stopped and continued without a trace.

A step draws its examples, asks the teachers for their states, sums up what the loss is divided by, goes forward and backward
part by part, and makes one update. Then it logs, saves, and stops if a signal has come: `TrainingLoop.run`.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from models.backbones.answer_noise import AnswerNoise
from models.backbones.device import pick_device
from models.corpora.hearing import write_hears
from models.data.example import AnsweredExample
from models.io_utils import atomic_write_bytes, atomic_write_json, fingerprint
from models.training.build_sources import OWN_TEACHER
from models.training.checkpoint import (
    RESULT_NAME,
    Checkpoint,
    CheckpointError,
    check_same_settings,
    find_checkpoint,
    restore_model,
    restore_optimizer,
    restore_rng,
    save_checkpoint,
    set_aside,
    trainable_state,
)
from models.training.continued_settings import saved_settings_to_continue, settings_to_continue
from models.training.curves import METRICS_NAME, MetricsLogger
from models.training.distributed import (
    RankError,
    Ranks,
    clip_grad_norm,
    find_distributed,
    gradient_sync,
    load_distributed,
    make_whole,
    parallelize,
    parameter_groups,
    save_distributed,
)
from models.training.model_card import write_card
from models.training.objective import Normalizers, Part, PartLoss, counted_positions, select_positions, token_weights
from models.training.on_policy import OnPolicy
from models.training.projections import RunProjections, project_own_teacher
from models.training.recipe import Recipe, to_dict
from models.training.recipe_checks import ConfigError
from models.training.run_identity import check_identity
from models.training.seeds import seed_of
from models.training.stop_signals import noted_signals
from models.training.teachers import Source, check_packing
from models.training.training_data import TrainingData


class NonFiniteError(RuntimeError):
    """The loss or the gradient's norm is NaN or infinite; nothing was updated."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int  # optimiser steps done
    folder: Path  # run.out_dir
    stopped_by: int | None = None  # the signal that stopped it; None = all steps done


class TrainingLoop:
    """One run of a recipe; the arguments are those of `models.training.train.train`.

    The objective (`PartLoss`) holds the model; model, optimiser, curves and the number of the last step are what a checkpoint
    keeps. The step number alone decides which examples are drawn, so a continued run is the same run.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        model: torch.nn.Module,
        data: TrainingData,
        sources: Sequence[Source] = (),
        resume_command: str | None = None,
        ranks: Ranks | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        _check_arguments(recipe, data, sources)
        self.recipe, self.optim, self.run_config = recipe, recipe.optim, recipe.run
        self.model, self.data = model, data
        self.resume_command, self.identity = resume_command, identity
        self.ranks = Ranks(pick_device(recipe.run.device, name="run.device")) if ranks is None else ranks
        check_ranks(recipe, self.ranks)
        # A device_map may have placed the student's head elsewhere: the loss is computed there.
        self.device = model.device if getattr(model, "is_placed", False) else self.ranks.device
        self.alone = recipe.run.parallel == "none"
        model.to(self.device)
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: expected a parameter that requires grad, got none")
        self.compared = {source.name: source.layers for source in sources if source.layers is not None}
        if self.compared:  # in the model: one state dict and one list of parameters, for optimiser and checkpoints
            model.layer_distillation = torch.nn.ModuleDict(self.compared).to(self.device)
        check_packing(model, data, self.device)
        self.sources = project_own_teacher(recipe, sources, data, model, self.device, self.ranks)
        stores = {id(store): store for store in (data.store, *(source.store for source in self.sources))}
        self.read_ahead = [store for store in stores.values() if hasattr(store, "prefetch")]
        objective = PartLoss(recipe, model, data, self.compared)
        self.objective = parallelize(objective, recipe.run.parallel, self.ranks, lm=getattr(model, "lm", None))
        self.on_policy = None
        if recipe.data.on_policy_fraction:
            self.on_policy = OnPolicy(recipe, model, data, self.device, self.objective)
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(list(self.names)),
            lr=self.optim.learning_rate,
            betas=(self.optim.beta1, self.optim.beta2),
            weight_decay=self.optim.weight_decay,
        )
        self.out_dir = Path(recipe.run.out_dir)
        self.checkpoints = self.out_dir / "checkpoints"
        self.must_match = settings_to_continue(recipe)
        self.drawn_from = fingerprint([example.id for example in data.examples])  # the cursor means nothing in another list
        self.part_examples = self.optim.micro_batch_examples or self.optim.batch_examples
        self.share = self.ranks.own(range(self.optim.batch_examples))  # which of a step's examples are this rank's

    def run(self) -> TrainResult:
        """All steps that are left, or those up to a signal."""
        try:
            return self.run_steps()
        finally:
            for source in self.sources:
                if isinstance(source.teacher, RunProjections):
                    source.teacher.close()

    def run_steps(self) -> TrainResult:
        done = self.resume()
        self.model.train()
        if self.run_config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        last = self.optim.steps
        with noted_signals(again=self.alone) as caught, self.progress_bar(done) as bar:
            for step in range(done + 1, last + 1):
                logged = step % self.run_config.log_every_steps == 0 or step == last
                self.step(step, logged)
                bar.update()
                if logged:
                    bar.set_postfix(loss=f"{self.log(step):.4f}")
                stop = self.ranks.any(caught[0] is not None) and step < last
                if stop or step % self.run_config.save_every_steps == 0 or step == last:
                    self.save(step)
                if stop:
                    return self.stopped(step, caught[0] or int(signal.SIGTERM), bar)  # or: another rank's signal
        return self.finished()

    # --- before the first step --------------------------------------------------------------------------------------

    def resume(self) -> int:
        """Continue from the checkpoint that `run.resume` asks for, if there is one; the number of its step, or 0."""
        if self.run_config.resume == "never" and self.ranks.is_first:
            set_aside(self.checkpoints, self.out_dir / METRICS_NAME, self.out_dir / RESULT_NAME)
        if self.alone:
            checkpoint = find_checkpoint(self.checkpoints, self.run_config.resume)
        else:
            checkpoint = find_distributed(self.checkpoints, self.run_config.resume, self.ranks)
        if checkpoint is not None:
            self.restore(checkpoint)
            if self.ranks.is_first and (curves := checkpoint.path.parent / METRICS_NAME).is_file():  # was set aside
                atomic_write_bytes(self.out_dir / METRICS_NAME, curves.read_bytes())
        self.metrics = MetricsLogger(
            self.out_dir,
            tensorboard=self.run_config.tensorboard,
            resume_step=None if checkpoint is None else checkpoint.step,
            total=self.ranks.sum if self.ranks.size > 1 else None,
            writes=self.ranks.is_first,
        )
        if checkpoint is not None:
            self.metrics.load_state_dict(checkpoint.trainer["state"]["metrics"], device=self.device)
            if self.alone:
                restore_rng(checkpoint)  # last: what was built above may have drawn numbers
        if self.ranks.is_first:
            atomic_write_json(self.out_dir / "recipe.json", to_dict(self.recipe))
        return 0 if checkpoint is None else checkpoint.step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights and optimiser of a checkpoint, which must be of the same settings and examples."""
        state = checkpoint.trainer["state"]
        saved = saved_settings_to_continue(state["recipe"])
        check_same_settings(saved, self.must_match, checkpoint.path)
        if state["examples"] != self.drawn_from:
            raise CheckpointError(
                f"{checkpoint.path}: made with other examples than the {len(self.data)} that were read now"
            )
        if self.identity is not None and state.get("identity") is not None:
            check_identity(checkpoint.path, state["identity"], self.identity)
        elif self.identity is not None and self.ranks.is_first:
            tqdm.write(
                f"{checkpoint.path}: an older checkpoint, which does not say what its models, prompts and targets were; they were"
                " not compared"
            )
        if self.alone:
            restore_model(self.model, checkpoint)
            restore_optimizer(self.optimizer, checkpoint, self.names)
        else:
            load_distributed(checkpoint, model=self.model, optimizer=self.optimizer)

    def progress_bar(self, done: int) -> tqdm:
        shows = self.run_config.progress_bar and self.ranks.is_first
        return tqdm(total=self.optim.steps, initial=done, desc=self.recipe.objective, unit="step", disable=not shows)

    # --- a step -----------------------------------------------------------------------------------------------------

    def step(self, step: int, logged: bool) -> None:
        """Step `step`, the first is 1; `logged`: with the statistics of the loss, which cost more."""
        parts = self.draw(step)
        normalizers = Normalizers.of([part.weights for part in parts], self.ranks.sum)
        losses = self.forward_backward(step, parts, normalizers, logged)
        self.update(step, parts, losses)

    def draw(self, step: int) -> list[Part]:
        """This rank's share of the step's examples in parts, each with its teachers' states and its weights."""
        optim, seed = self.optim, self.run_config.seed
        rows = self.data.draw((step - 1) * optim.batch_examples, optim.batch_examples, seed=seed)
        if not self.alone:  # every rank draws the same numbers, however many ranks there are
            torch.manual_seed(seed_of(seed, step))
        examples = {number: self.data.examples[rows[number]] for number in self.share}
        if self.on_policy is not None:
            with self.autocast():
                examples = self.on_policy.answered(step, examples)
            for name, value, weight in self.on_policy.curves(list(examples.values())):
                self.metrics.add(name, torch.tensor(value, device=self.device), weight)  # all curves are on one device
        hears = torch.rand(len(rows)) >= optim.audio_dropout
        charged = torch.rand(len(rows)) < self.recipe.loss.ce_background_fraction
        if not self.alone:  # dropout inside the model is each rank's own
            torch.manual_seed(seed_of(seed, step, self.ranks.rank))
        parts = []
        for start in range(0, len(self.share), self.part_examples):
            here = self.share[start : start + self.part_examples]
            parts.append(self.part(step, {number: examples[number] for number in here}, hears[here], charged[here]))
        if step < optim.steps and self.read_ahead:
            following = self.data.draw(step * optim.batch_examples, optim.batch_examples, seed=seed)
            for store in self.read_ahead:
                store.prefetch([self.data.examples[following[number]] for number in self.share])
        return parts

    def part(self, step: int, numbered: Mapping[int, object], hears: torch.Tensor, charged: torch.Tensor) -> Part:
        """The part of these examples, by their numbers in the step.

        Args:
            hears: (B,) bool, the audio is kept.
            charged: (B,) bool, background tokens count.
        """
        examples = list(numbered.values())
        batch = self.data.make_batch(examples)
        noise = self.answer_noise(step, list(numbered), batch) if self.optim.answer_noise else None
        # Unneeded positions are left out before the batch moves, because deciding it on a GPU would make the CPU wait.
        answered = None
        if self.on_policy is not None:
            answered = torch.tensor([isinstance(example, AnsweredExample) for example in examples])
        counted = counted_positions(self.recipe, batch, charged, answered)
        states = {source.name: source.teacher(batch, examples) for source in self.sources}
        batch, states = select_positions(batch, states, counted)
        if self.recipe.loss.needs_divergence and OWN_TEACHER in states:
            states[OWN_TEACHER] = states[OWN_TEACHER].with_divergence()
        longest = int(torch.bincount(batch.target_row).max()) if len(batch.target_row) else 1
        batch = (self.data.crop(batch) if self.data.crop else batch).to(self.device)
        answered = None if answered is None else answered.to(self.device)
        weights = token_weights(self.recipe.loss, batch, states.get(OWN_TEACHER), charged.to(self.device), answered)
        return Part(batch, states, weights, hears.to(self.device), noise, longest)

    def answer_noise(self, step: int, numbers: Sequence[int], batch: Any) -> AnswerNoise:
        """The noise of a part, from a batch with all of its target tokens; `numbers`: of its examples in the step."""
        columns, width = batch.input_ids.shape[1], self.model.get_input_embeddings().weight.shape[-1]
        lengths = torch.bincount(batch.target_row, minlength=len(numbers))
        first = batch.target_index[lengths.cumsum(0) - lengths]  # of each row; it stands one column before the token it predicts
        seeds = [seed_of(self.run_config.seed, step, "noise", number) for number in numbers]
        noise = AnswerNoise.drawn(self.optim.answer_noise, first % columns + 1, lengths.tolist(), width, seeds)
        return noise.to(self.device)

    def forward_backward(
        self, step: int, parts: Sequence[Part], normalizers: Normalizers, logged: bool
    ) -> list[torch.Tensor]:
        """The gradient of the whole step: 4 parts of 4 examples give that of 16. Returns each part's share of the loss."""
        size = self.ranks.size
        parts_alone = math.ceil(self.optim.batch_examples / self.part_examples)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, part in enumerate(parts):
            with gradient_sync(self.objective, number == len(parts) - 1):
                with self.autocast():
                    loss, curves, layer_losses = self.objective(step, part, normalizers, logged)
                (loss * size).backward()  # gradients are averaged over ranks
            losses.append(loss.detach())
            for name, value in layer_losses:
                # A part's share of the step's mean; steps weigh the same on any number of ranks.
                self.metrics.add(name, value * len(parts) * size, parts_alone / (len(parts) * size))
            for name, value, weight in curves:
                self.metrics.add(name, value, weight)
        return losses

    def autocast(self) -> torch.autocast:
        """Around what the student computes."""
        enabled = self.run_config.bf16 and self.device.type == "cuda"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def update(self, step: int, parts: Sequence[Part], losses: Sequence[torch.Tensor]) -> None:
        """One step of the optimiser. The loop reads the device here, once a step.

        Raises:
            NonFiniteError, RankError: something is not finite, or ranks have different gradients; nothing is updated.
        """
        ranks = self.ranks
        grad_norm = clip_grad_norm(list(self.names), self.optim.max_grad_norm)
        total, norms = ranks.sum(torch.stack([torch.stack(losses).sum().double(), grad_norm.double()]))
        apart = (norms - ranks.size * grad_norm).abs() > 1e-3 * norms  # with different gradients, ranks would drift apart
        if not bool(torch.isfinite(total + norms) & ~apart):
            self.metrics.close()
            found = ranks.gather([(loss.item(), part.batch.ids) for loss, part in zip(losses, parts, strict=True)])
            _refuse_step(step, [part for of_rank in found for part in of_rank], ranks.gather(grad_norm.item()))
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.learning_rate_at(step)
        self.optimizer.step()
        self.metrics.add("loss", total, 1 / ranks.size)
        self.metrics.add("grad_norm", grad_norm, 1 / ranks.size)

    def log(self, step: int) -> float:
        """Write a line of the curves; returns its loss."""
        now = {"learning_rate": self.optim.learning_rate_at(step)}
        if self.recipe.objective in ("sharpened", "caad", "caad+"):
            now["alpha"] = self.recipe.loss.alpha_at(step)
        return self.metrics.flush(step, **now)["loss"]

    def save(self, step: int) -> None:
        """Write the checkpoint of this step."""
        for source in self.sources:
            if isinstance(source.teacher, RunProjections):
                source.teacher.flush()
        options = {
            "optimizer": self.optimizer,
            "trainer_state": {
                "recipe": self.must_match,
                "examples": self.drawn_from,
                "identity": None if self.identity is None else dict(self.identity),
                "metrics": self.metrics.state_dict(),
            },
            "keep_last": self.run_config.keep_last_checkpoints,
        }
        if self.alone:
            weights = trainable_state(self.model)
            save_checkpoint(self.checkpoints, step, model_state=weights, parameter_names=self.names, **options)
        else:
            save_distributed(self.checkpoints, step, model=self.model, ranks=self.ranks, **options)

    # --- the end ----------------------------------------------------------------------------------------------------

    def stopped(self, step: int, number: int, bar: tqdm) -> TrainResult:
        """Stop for the signal `number`, after step `step` was saved."""
        self.metrics.close()
        if self.resume_command and self.ranks.is_first:
            bar.write(f"Stopped after step {step}, saved. Continue with:\n  {self.resume_command}", file=sys.stderr)
        return TrainResult(step, self.out_dir, number)

    def finished(self) -> TrainResult:
        """All steps are done: the result goes to run.out_dir/final."""
        self.metrics.close()
        if self.compared:
            del self.model.layer_distillation  # only training needs it
        self.model.eval()
        if self.run_config.parallel == "fsdp2":
            make_whole(self.model, self.ranks)
        if self.ranks.is_first:
            result = self.out_dir / RESULT_NAME
            self.model.save_pretrained(result)
            write_card(result, self.recipe)
            write_hears(result, self.recipe.student.hears)
        self.ranks.any(False)  # no rank leaves before the result is written
        return TrainResult(self.optim.steps, self.out_dir)


def _check_arguments(recipe: Recipe, data: TrainingData, sources: Sequence[Source]) -> None:
    wanted = [OWN_TEACHER] * recipe.needs_teacher + list(recipe.sources)
    if [source.name for source in sources] != wanted:
        got = [source.name for source in sources]
        raise ValueError(f"sources: objective {recipe.objective!r} with this recipe needs {wanted}, got {got}")
    if len(data) == 0:
        raise ValueError("data: expected at least one example, got none")


def check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Whether the recipe can run on these ranks; ConfigError otherwise."""
    if recipe.optim.batch_examples % ranks.size:
        raise ConfigError(
            f"optim.batch_examples: expected a multiple of the {ranks.size} ranks, got {recipe.optim.batch_examples}"
        )


def _refuse_step(step: int, parts: Sequence[tuple[float, Sequence[str]]], grad_norms: Sequence[float]) -> None:
    """Raises the same on every rank, from each part's (loss, examples) and each rank's gradient norm."""
    bad = [(loss, ids) for loss, ids in parts if not math.isfinite(loss)]
    if not bad and all(map(math.isfinite, grad_norms)) and len(set(grad_norms)) > 1:
        raise RankError(
            f"step {step}: expected one gradient on all ranks, got norms {grad_norms}: some weights took no part in the last "
            "part's loss on any rank; nothing was updated"
        )
    # A finite loss with a non-finite gradient cannot be traced to one part: the gradients are summed by then.
    what = f"loss {bad[0][0]}" if bad else f"gradient norm {grad_norms[0]}"
    named = [example_id for _, ids in bad or parts for example_id in ids]
    raise NonFiniteError(f"step {step}: {what}; nothing was updated. Examples of the batch: {', '.join(named)}")
