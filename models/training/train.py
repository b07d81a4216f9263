"""Train a speech LM's connector: one loop for every objective.

    python -m models train RECIPE [key=value ...]

    python -m models train sft_teacher data.manifest=corpus/teacher.jsonl model.folder=base run.out_dir=runs/teacher
    python -m models train caad data.manifest=pool.jsonl model.folder=student teacher.folder=runs/teacher/final loss.alpha=1

The whole story of a step: draw examples; the frozen teachers' hidden states at the positions that predict the target; the
student's; `fused_linear_multi_teacher_loss` (of one teacher that is `fused_linear_caad_loss`); AdamW on the connector. Ctrl-C or
SIGTERM finishes the step, saves, and prints the command that goes on (`run.resume=auto`): on a CPU that continuation is the
undisturbed run, bit for bit.

    torchrun --nproc-per-node 4 -m models train caad run.parallel=ddp ...

trains on several devices (models/training/distributed.py); each rank has its share of every step's examples. Weights
and optimiser are
sharded with fsdp2, frozen teachers are whole on every rank. A checkpoint goes on with ddp or fsdp2 on any number of ranks that
divides the batch; what is drawn at random inside the model (dropout) then is another draw, all else is the same step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kdkernels import TeacherSource, adaptive_alpha, fused_linear_multi_teacher_loss
from kdkernels.ops.dispatch import choose
from models.backbones.device import pick_device
from models.io_utils import atomic_write_json, exclusive, fingerprint
from models.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    restore_model,
    restore_optimizer,
    restore_rng,
    save_checkpoint,
    set_aside,
    trainable_state,
)
from models.training.commands import train_parser
from models.training.curves import MetricsLogger
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
from models.training.recipe import ConfigError, LossConfig, Recipe, describe_keys, load_recipe, to_dict
from models.training.run_setup import (
    OWN_TEACHER,
    TrainingData,
    build_data,
    build_model,
    build_sources,
    check_folders,
    read_examples,
)
from models.training.teachers import LayerDistillation, Source, SourceError, TeacherStates


class NonFiniteError(RuntimeError):
    """The loss or the gradient's norm is NaN or infinite; nothing was updated."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int  # optimiser steps done
    folder: Path  # run.out_dir
    stopped_by: int | None = None  # the signal that stopped it; None = all steps done


def train(
    recipe: Recipe,
    *,
    model: torch.nn.Module,
    data: TrainingData,
    sources: Sequence[Source] = (),
    resume_command: str | None = None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Run a recipe to its end, or to the next whole step after SIGINT / SIGTERM.

    Args:
        recipe: the settings.
        model: a SpeechLM, or anything with `hidden_states_at(index, **inputs) -> (N, H)`, `get_output_embeddings()` and
            `save_pretrained(folder)`; what requires grad is trained.
        data: examples and how a batch is made of them.
        sources: the teachers; kd, sharpened and caad need their own, named `OWN_TEACHER`. The projections of a source's layers
            train, lie in the checkpoints, and are not in run.out_dir/final.
        resume_command: printed when a signal stops the run.
        ranks: this process among those of the run; all of them make the call, with models of equal weights. None = alone.

    Returns:
        the step reached and why it ended; checkpoints lie in run.out_dir/checkpoints, the result in run.out_dir/final.

    Raises:
        ValueError: no teacher though the objective needs one, no example, or nothing to train.
        ConfigError: settings that do not go with the number of ranks or with run.parallel.
        NonFiniteError: naming the examples, on every rank alike; before the optimiser's step.
        RankError: ranks have come to different gradients.
        CheckpointError: the checkpoint to resume from is damaged or of another recipe.
    """
    wanted = [OWN_TEACHER] * recipe.needs_teacher + list(recipe.sources)
    if [source.name for source in sources] != wanted:
        got = [source.name for source in sources]
        raise ValueError(f"sources: objective {recipe.objective!r} with this recipe needs {wanted}, got {got}")
    if len(data) == 0:
        raise ValueError("data: expected at least one example, got none")
    optim, run = recipe.optim, recipe.run
    ranks = Ranks(pick_device(run.device, name="run.device")) if ranks is None else ranks
    _check_ranks(recipe, ranks)
    device = ranks.device
    model.to(device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected a parameter that requires grad, got none")
    compared = {source.name: source.layers for source in sources if source.layers is not None}
    if compared:  # one state dict, one list of parameters, for optimiser and checkpoints
        model.layer_distillation = torch.nn.ModuleDict(compared).to(device)
    objective = _Objective(recipe, model, data, compared)
    objective = parallelize(objective, run.parallel, ranks, lm=getattr(model, "lm", None))
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameter_groups(list(names)), lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay
    )
    out_dir = Path(run.out_dir)
    settings = _settings_that_matter(recipe)
    drawn_from = fingerprint([example.id for example in data.examples])  # the cursor means nothing in another list

    if run.resume == "never" and ranks.is_first:
        set_aside(out_dir / "checkpoints")
    alone = run.parallel == "none"
    done, root = 0, out_dir / "checkpoints"
    checkpoint = find_checkpoint(root, run.resume) if alone else find_distributed(root, run.resume, ranks)
    if checkpoint is not None:
        done, state = checkpoint.step, checkpoint.trainer["state"]
        _check_same_settings(state["recipe"], settings, checkpoint.path)
        if state["examples"] != drawn_from:
            raise CheckpointError(f"{checkpoint.path}: made with other examples than the {len(data)} that were read now")
        if alone:
            restore_model(model, checkpoint)
            restore_optimizer(optimizer, checkpoint, names)
        else:
            load_distributed(checkpoint, model=model, optimizer=optimizer)
    metrics = MetricsLogger(
        out_dir,
        tensorboard=run.tensorboard,
        resume_step=None if checkpoint is None else done,
        total=ranks.sum if ranks.size > 1 else None,
        writes=ranks.is_first,
    )
    if checkpoint is not None:
        metrics.load_state_dict(state["metrics"], device=device)
        if alone:
            restore_rng(checkpoint)  # last: building things above may have drawn numbers
    if ranks.is_first:
        atomic_write_json(out_dir / "recipe.json", to_dict(recipe))

    def save(step: int) -> None:
        saved = {"recipe": settings, "examples": drawn_from, "metrics": metrics.state_dict()}
        options = {"optimizer": optimizer, "trainer_state": saved, "keep_last": run.keep_last_checkpoints}
        if alone:
            weights = trainable_state(model)
            save_checkpoint(root, step, model_state=weights, parameter_names=names, **options)
        else:
            save_distributed(root, step, model=model, ranks=ranks, **options)

    model.train()
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    micro_examples = optim.micro_batch_examples or optim.batch_examples
    parts_alone = math.ceil(optim.batch_examples / micro_examples)
    share = ranks.own(range(optim.batch_examples))  # which of a step's examples are this rank's
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.bf16 and device.type == "cuda")
    shows = run.progress_bar and ranks.is_first
    bar = tqdm(total=optim.steps, initial=done, desc=recipe.objective, unit="step", disable=not shows)
    with _stop_signals(again=alone) as stopped, bar:
        for step in range(done + 1, optim.steps + 1):
            # 1. The step's examples. The cursor alone decides which: that is what makes a resumed run the same run.
            rows = data.draw((step - 1) * optim.batch_examples, optim.batch_examples, seed=run.seed)
            if not alone:  # all ranks draw the same, on however many the run goes on
                torch.manual_seed(_seed_of(run.seed, step))
            hears = torch.rand(len(rows)) >= optim.audio_dropout
            charged = torch.rand(len(rows)) < recipe.loss.ce_background_fraction
            if not alone:  # dropout is a rank's own
                torch.manual_seed(_seed_of(run.seed, step, ranks.rank))
            parts = []
            for start in range(0, len(share), micro_examples):
                here = share[start : start + micro_examples]
                examples = [data.examples[rows[number]] for number in here]
                batch = data.make_batch(examples)
                # What is not needed is left out before the batch moves: decided on a GPU it would be a wait.
                counted = counted_positions(recipe, batch, charged[here])
                states = {source.name: source.teacher(batch, examples) for source in sources}
                batch, states = select_positions(batch, states, counted)
                if recipe.loss.needs_divergence and OWN_TEACHER in states:
                    states[OWN_TEACHER] = states[OWN_TEACHER].with_divergence()
                batch = (data.crop(batch) if data.crop else batch).to(device)
                weights = token_weights(recipe.loss, batch, states.get(OWN_TEACHER), charged[here].to(device))
                parts.append((batch, states, weights, hears[here].to(device)))

            # 2. Divisors of the whole step, so that 4 x 4 examples give the gradient of 16.
            weights_of_step = [w for _, _, w, _ in parts]
            sums = [torch.stack([x.sum() for x in each]).sum() for each in zip(*map(_counts, weights_of_step), strict=True)]
            kd_normalizer, ce_normalizer, layer_normalizer = (ranks.sum(x) for x in sums)

            # 3. Forward and backward, part by part.
            logged = step % run.log_every_steps == 0 or step == optim.steps
            optimizer.zero_grad(set_to_none=True)
            losses = []
            for number, (batch, states, weights, present) in enumerate(parts):
                with gradient_sync(objective, number == len(parts) - 1):
                    with autocast:
                        loss, values, layer_losses = objective(
                            step, batch, states, weights, present, kd_normalizer, ce_normalizer, layer_normalizer, logged
                        )
                    (loss * ranks.size).backward()  # gradients are averaged over ranks
                losses.append(loss.detach())
                for name, value in layer_losses:
                    # A part's share of the step's mean; steps weigh the same on any number of ranks.
                    metrics.add(name, value * len(parts) * ranks.size, parts_alone / (len(parts) * ranks.size))
                for name, value, weight in values:
                    metrics.add(name, value, weight)

            # 4. One update, unless something is not finite. This is the loop's one read of the device a step.
            grad_norm = clip_grad_norm(list(names), optim.max_grad_norm)
            total, norms = ranks.sum(torch.stack([torch.stack(losses).sum().double(), grad_norm.double()]))
            apart = (norms - ranks.size * grad_norm).abs() > 1e-3 * norms  # ranks have one gradient, or go different ways
            if not bool(torch.isfinite(total + norms) & ~apart):
                metrics.close()
                found = ranks.gather([(loss.item(), batch.ids) for loss, (batch, *_) in zip(losses, parts, strict=True)])
                _refuse_step(step, [part for of_rank in found for part in of_rank], ranks.gather(grad_norm.item()))
            learning_rate = optim.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()

            metrics.add("loss", total, 1 / ranks.size)
            metrics.add("grad_norm", grad_norm, 1 / ranks.size)
            bar.update()
            if logged:
                alpha = {} if recipe.objective not in ("sharpened", "caad", "caad+") else {"alpha": recipe.loss.alpha_at(step)}
                line = metrics.flush(step, learning_rate=learning_rate, **alpha)
                bar.set_postfix(loss=f"{line['loss']:.4f}")
            stop_now = ranks.any(stopped[0] is not None) and step < optim.steps
            if stop_now or step % run.save_every_steps == 0 or step == optim.steps:
                save(step)
            if stop_now:
                metrics.close()
                if resume_command and ranks.is_first:
                    bar.write(f"Stopped after step {step}, saved. Go on with:\n  {resume_command}", file=sys.stderr)
                return TrainResult(step, out_dir, stopped[0] or int(signal.SIGTERM))  # another rank's
    metrics.close()
    if compared:
        del model.layer_distillation  # serves training alone
    model.eval()
    if run.parallel == "fsdp2":
        make_whole(model, ranks)
    if ranks.is_first:
        model.save_pretrained(out_dir / "final")
    ranks.any(False)  # nobody leaves before it is written
    return TrainResult(optim.steps, out_dir)


class _Objective(torch.nn.Module):
    """A part's loss from its batch, in one forward: what `parallelize` needs.

    Args:
        compared: the layers of the sources that have some, which train; part of `model` already.
    """

    def __init__(
        self, recipe: Recipe, model: torch.nn.Module, data: TrainingData, compared: Mapping[str, LayerDistillation]
    ) -> None:
        super().__init__()
        self.model = model
        self._recipe = recipe
        self._data = data
        self._compared = dict(compared)  # not a submodule a second time
        self._student_layers = sorted({layer for layers in compared.values() for layer in layers.student_layers})

    def forward(
        self,
        step: int,
        batch: Any,
        states: Mapping[str, TeacherStates],
        weights: TokenWeights,
        present: torch.Tensor,
        kd_normalizer: torch.Tensor,
        ce_normalizer: torch.Tensor,
        layer_normalizer: torch.Tensor,
        with_stats: bool,
    ) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor, torch.Tensor]], list[tuple[str, torch.Tensor]]]:
        """Loss, curves as `objective_loss` gives them, and (curve, loss) of each source's layers."""
        inputs = self._data.model_inputs(batch)
        inputs["audio_present"] = inputs["audio_present"] & present if "audio_present" in inputs else present
        layer_states: dict[int, torch.Tensor] = {}
        if not self._compared:
            hidden = self.model.hidden_states_at(batch.target_index, **inputs)  # (N, H_s)
        else:
            taken = self.model.hidden_states_at(batch.target_index, **inputs, layers=self._student_layers)
            hidden, *by_layer = taken.unbind(1)
            layer_states = dict(zip(self._student_layers, by_layer, strict=True))
        loss, values = objective_loss(
            self._recipe, step, self.model, hidden, batch.target, states, weights, kd_normalizer, ce_normalizer, with_stats
        )
        layer_losses = []
        for name, layers in self._compared.items():
            layer_loss = layers.loss(layer_states, states[name], weights.kd > 0, layer_normalizer)
            loss = loss + layers.settings.weight * layer_loss
            layer_losses.append(("layers" if name == OWN_TEACHER else f"layers_{name}", layer_loss))
        return loss, values, layer_losses


def _counts(weights: TokenWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What kd, ce and layers are divided by, token by token."""
    return weights.kd, weights.ce, weights.kd > 0


def _seed_of(*numbers: int) -> int:
    return random.Random(" ".join(map(str, numbers))).getrandbits(63)


def _check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    if recipe.optim.batch_examples % ranks.size:
        raise ConfigError(
            f"optim.batch_examples: expected a multiple of the {ranks.size} ranks, got {recipe.optim.batch_examples}"
        )
    if recipe.run.parallel == "fsdp2" and recipe.model.prefix_cache_mib:
        # A rank that has a prefix runs fewer layers than one that does not, and would leave it waiting for its shards.
        raise ConfigError(f"model.prefix_cache_mib: expected 0 with run.parallel=fsdp2, got {recipe.model.prefix_cache_mib}")


@dataclass(frozen=True)
class TokenWeights:
    """Weight of each target token in the two terms; (N,) float32."""

    kd: torch.Tensor
    ce: torch.Tensor


def token_weights(
    loss: LossConfig, batch: Any, states: TeacherStates | None, charged: torch.Tensor | None = None
) -> TokenWeights:
    """Weights of the N target tokens by `loss.kd_token_weight` and `loss.ce_token_weight`.

    uniform: 1. choice: 1 on the tokens that spell the answer, the background weight elsewhere (an example without such
    tokens counts uniformly). divergence: KL(p_audio || p_text), which says how much of the token is decided by the sound.

    Args:
        charged: (B,) bool, the examples whose background tokens are in the CE term; None = all (see
            `loss.ce_background_fraction`).
    """
    mask, rows = batch.choice_mask, batch.target_row
    spelled = torch.zeros(len(batch.ids), dtype=torch.bool, device=mask.device).index_put((rows[mask],), mask.new_tensor(True))

    def choice(background: float | torch.Tensor) -> torch.Tensor:
        return torch.where(mask | ~spelled[rows], 1.0, background)

    ce_background: float | torch.Tensor = loss.ce_background_weight
    if charged is not None and loss.ce_background_fraction < 1:
        ce_background = charged[rows] * (loss.ce_background_weight / loss.ce_background_fraction)
    ones = torch.ones(batch.target.shape, device=batch.target.device)
    if loss.kd_token_weight == "divergence" and states is not None:
        kd = states.divergence
    else:
        kd = choice(loss.kd_background_weight) if loss.kd_token_weight == "choice" else ones
    ce = choice(ce_background) if loss.ce_token_weight == "choice" else ones
    return TokenWeights(kd=kd, ce=ce)


def counted_positions(recipe: Recipe, batch: Any, charged: torch.Tensor | None = None) -> torch.Tensor | None:
    """(n,) int64 numbers of the target tokens with a weight above 0 in some term; None = all of them.

    With KD and CE on the answer's tokens alone seven in eight rows of logits would be made for nothing.
    """
    if recipe.loss.kd_token_weight == "divergence":
        return None  # known only when the teacher has run
    weights = token_weights(recipe.loss, batch, None, charged)
    counts = weights.ce > 0 if not recipe.distils or recipe.loss.kd_weight < 1 else torch.zeros_like(batch.choice_mask)
    if recipe.distils and recipe.loss.kd_weight > 0:
        counts = counts | (weights.kd > 0)
    return None if bool(counts.all()) else counts.nonzero()[:, 0]


def select_positions(
    batch: Any, states: dict[str, TeacherStates], positions: torch.Tensor | None
) -> tuple[Any, dict[str, TeacherStates]]:
    """`batch` and each teacher's `states` with only these target tokens."""
    if positions is None:
        return batch, states
    names = ("target_index", "target", "target_row", "choice_mask")
    batch = dataclasses.replace(batch, **{name: getattr(batch, name)[positions] for name in names})
    return batch, {name: one.at(positions) for name, one in states.items()}


def objective_loss(
    recipe: Recipe,
    step: int,
    model: torch.nn.Module,
    hidden: torch.Tensor,
    target: torch.Tensor,
    states: Mapping[str, TeacherStates],
    weights: TokenWeights,
    kd_normalizer: torch.Tensor,
    ce_normalizer: torch.Tensor,
    with_stats: bool = True,
) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """The objective on one part of a step, divided by the normalizers of the whole step.

    Args:
        hidden: (N, H_s) what the student's LM head reads at the positions that predict `target` (N,).
        states: of every teacher, by its name; with `divergence` where the recipe's loss needs it.
        with_stats: also the curves of the statistics. The divergence of the teacher's two paths needs both of their logits,
            a product with the whole vocabulary that the loss itself does without: ask for them at logged steps only.

    Returns:
        the loss, and (name, mean, weight) of each curve to log.
    """
    head = model.get_output_embeddings()
    hidden = hidden.to(head.weight.dtype)  # autocast hands out bfloat16 states of a float32 model
    if not recipe.distils:
        logits = F.linear(hidden, head.weight, head.bias)  # (N, V)
        token_loss = F.cross_entropy(logits.float(), target, reduction="none")  # (N,)
        loss = (token_loss * weights.ce).sum() / ce_normalizer
        right = (logits.argmax(-1) == target).double()
        total = weights.ce.sum()
        return loss, [("ce", _mean(token_loss, weights.ce), total), ("top1_target", _mean(right, weights.ce), total)]

    settings = recipe.loss
    result = fused_linear_multi_teacher_loss(  # of one teacher: fused_linear_caad_loss, to the bit
        hidden,
        head.weight,
        [_teacher_source(recipe, name, step, one) for name, one in states.items()],
        target,
        student_bias=head.bias,
        temperature=settings.temperature,
        kd_weight=settings.kd_weight,
        kd_token_weight=weights.kd,
        ce_token_weight=weights.ce,
        kd_normalizer=kd_normalizer,
        ce_normalizer=ce_normalizer,
        chunk_tokens=settings.chunk_tokens,
        impl=settings.impl,
        return_stats=with_stats,
    )
    if not with_stats:
        return result, []
    loss, stats = result
    kd_total, ce_total = weights.kd.sum(), weights.ce.sum()
    curves = [("kd", _mean(stats.kd, weights.kd), kd_total), ("ce", _mean(stats.ce, weights.ce), ce_total)]
    by_token = {"student_entropy": stats.student_entropy}
    for k, name in enumerate(states):
        suffix = "" if len(states) == 1 else f"_{name}"
        by_token |= {f"kd{suffix}": stats.source_kd[k]} if suffix else {}
        by_token |= {f"teacher_entropy{suffix}": stats.source_entropy[k]}
        by_token |= {f"top1_agreement{suffix}": stats.top1_agreement[k]}
        by_token |= {f"path_divergence{suffix}": stats.path_divergence[k]}
    return loss, curves + [(name, _mean(values, weights.kd), kd_total) for name, values in by_token.items()]


def _teacher_source(recipe: Recipe, name: str, step: int, states: TeacherStates) -> TeacherSource:
    """A teacher at optimiser step `step`, as the losses take it."""
    text_hidden = states.text_hidden
    if name == OWN_TEACHER:
        loss = recipe.loss
        alpha, weight, divergence, jsd_beta = loss.alpha_at(step), 1.0, loss.divergence, loss.jsd_beta
        plausibility = loss.plausibility
        if loss.alpha_half_divergence is not None:
            alpha = adaptive_alpha(states.divergence, alpha, half_at=loss.alpha_half_divergence)
        if recipe.objective == "kd":
            alpha, text_hidden = 0.0, None
        elif recipe.objective == "sharpened":
            text_hidden = torch.zeros_like(states.audio_hidden)  # logits 0: (1 + alpha) z_audio, nothing subtracted
    else:
        source = recipe.sources[name]
        alpha, weight, divergence, jsd_beta = source.alpha, source.weight_at(step), source.divergence, source.jsd_beta
        plausibility = None
        if alpha == 0:
            text_hidden = None
    return TeacherSource(
        hidden=states.audio_hidden,
        weight=states.head.weight,
        text_hidden=text_hidden,
        bias=states.head.bias,
        softcap=states.head.softcap,
        logit_scale=states.head.logit_scale,
        alpha=alpha,
        source_weight=weight if states.speaks is None else weight * states.speaks,
        divergence=divergence,
        jsd_beta=jsd_beta,
        plausibility=plausibility,
    )


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
        check_folders(recipe)
        examples, audio_root = read_examples(recipe)
        with Ranks.started_by_torchrun(device, recipe.run.parallel) as ranks:
            result = _train_on(ranks, recipe, examples, audio_root, [arguments.recipe, *arguments.overrides])
    except (ValueError, OSError, CheckpointError, SourceError, NonFiniteError, RankError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the loop took over the signal, or the second one
        print("Stopped; run.resume=auto goes on from the last checkpoint, if there is one.", file=sys.stderr)
        return 128 + signal.SIGINT
    if result.stopped_by is not None:
        return 128 + result.stopped_by
    if ranks.is_first:
        print(f"{recipe.objective}: {result.step} steps -> {result.folder / 'final'}")
    return 0


def _train_on(ranks: Ranks, recipe: Recipe, examples: Sequence[Any], audio_root: Any, words: Sequence[str]) -> TrainResult:
    """Builds model, data and teachers on this rank and trains; `words`: recipe and overrides as they were given."""
    _check_ranks(recipe, ranks)
    if not ranks.is_first:
        recipe = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, progress_bar=False))
    seed_everything(recipe.run.seed)
    model = build_model(recipe)
    data = build_data(recipe, model, examples, audio_root)
    sources = build_sources(recipe, data, model, device=ranks.device)
    seed_everything(recipe.run.seed)  # the run must not depend on what was drawn while these were built
    kept = [word for word in words if not word.startswith("run.resume=")]
    started = ["python"] if recipe.run.parallel == "none" else ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    command = shlex.join([*started, "-m", "models", "train", *kept, "run.resume=auto"])
    with exclusive(recipe.run.out_dir, "a training") if ranks.is_first else nullcontext():
        return train(recipe, model=model, data=data, sources=sources, resume_command=command, ranks=ranks)


def _check_impl(impl: str, device: torch.device) -> None:
    """Whether the loss can run as asked for: known now, not after the clips have been encoded."""
    try:
        choose(impl, device, [torch.float32])
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"loss.impl: {error}") from None


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _stop_signals(*, again: bool) -> Iterator[list[int | None]]:
    """Within the block SIGINT or SIGTERM only leaves its number in the list.

    Args:
        again: a second one acts as usual. Not under torchrun, which passes on what a terminal has sent to all processes already.
    """
    caught: list[int | None] = [None]
    before: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        caught[0] = number
        if again:
            for each, handler in before.items():
                signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: the host program owns the signals
        pass
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _settings_that_matter(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what may differ between a run and its continuation."""
    settings = json.loads(json.dumps(to_dict(recipe)))
    ignored = ("resume", "out_dir", "progress_bar", "tensorboard", "save_every_steps", "keep_last_checkpoints", "parallel")
    for name in ignored:
        del settings["run"][name]
    return settings


def _check_same_settings(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    if fingerprint(saved) == fingerprint(now):
        return
    flat_saved, flat_now = dict(_flatten(saved)), dict(_flatten(now))
    different = [
        f"{key} was {flat_saved.get(key)!r}, is {flat_now.get(key)!r}"
        for key in sorted(flat_saved.keys() | flat_now.keys())
        if flat_saved.get(key) != flat_now.get(key)
    ]
    raise CheckpointError(f"{path}: of another recipe: {'; '.join(different)}")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values.double() * weights).sum() / weights.sum().clamp(min=1e-12)  # all weights 0: mean 0, not NaN


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
