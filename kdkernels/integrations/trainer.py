"""CAADTrainer: contrastive audio-aware distillation in transformers' Trainer.

A batch is what the student's forward takes, with `labels`, and these columns beside it, all of them optional:

    teacher_NAME     inputs of the teacher's positive path, where they are not the student's (teacher_labels among them)
    negative_NAME    inputs of its negative path, instead of those that the teacher makes itself (negative_labels among them)
    sample_id        strings, the samples' names in a ContrastCache or a ProjectionCache; of packed rows all names, in their order
    alpha, kd_token_weight, ce_token_weight     (B, L), aligned with `labels` and shifted with them

Legend: B rows of a batch, L columns, N positions that predict a label, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, RemoveColumnsCollator

from ..caad import CAADStats, fused_linear_caad_loss
from ..contrast_cache import ContrastCache
from ..head_capture import logit_post
from ..head_layers import is_partitioned
from ..head_loss import HeadLoss
from ..lm_head import LMHead
from ..loss_terms import valid_ids
from ..projection import fused_linear_projected_loss, head_fingerprint
from ..projection_cache import CachedProjections, ProjectionCache
from ..teacher import DualPathTeacher, answer_index
from ..whole_weights import whole_weights
from .batch_columns import (
    BY_TOKEN,
    IGNORE_INDEX,
    NEGATIVE,
    SAMPLE_ID,
    TEACHER,
    WithPrefixed,
    check_labels,
    check_targets,
    ids_named,
    labels_of,
    listed_samples,
    sample_names,
    split_columns,
    sums_of_weights,
    term_weights,
    token_values,
)
from .checkpoints import CheckpointLoading, base_fingerprint, weights_fingerprint
from .on_policy import OnPolicy, OwnAnswers
from .options import CAADOptions
from .projected import OF_THE_PROJECTED_LOSS, check_projections
from .run_records import check_options, write_card, write_options
from .teacher_model import check_apart, input_names, move, zero3_engine
from .trainer_checks import check_arguments, check_cached_samples, check_parallelism
from .vocabulary import check_same_tokens, head_rows, tokenizer_of

__all__ = ["CAADTrainer"]

logger = logging.getLogger(__name__)


class CAADTrainer(CheckpointLoading, Trainer):
    """transformers' Trainer with the loss of `kdkernels.fused_linear_caad_loss` against a frozen teacher.

        loss = kd_weight sum_i w_i kd_i / sum w + (1 - kd_weight) sum_i u_i ce_i / sum u

    Both sums of weights are those of the whole optimiser step: over gradient accumulation and, with
    args.average_tokens_across_devices (the default), over ranks. So 4 x 4 rows count as 16. Without weights it is the number of
    positions that predict a label.

    The student's loss is computed inside its own forward, in the place of its LM head (see `kdkernels.head_loss`). So DDP, FSDP
    and DeepSpeed ZeRO-3 gather the head as in any forward. Logits exist for one chunk of tokens at a time, in training and in
    evaluation.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, callbacks, optimizers: as for Trainer.
        teacher: a `DualPathTeacher`, or an open `ContrastCache` that one has written, or a `ProjectionCache` that
            `kdkernels.project_cache` has made of that. A DualPathTeacher is moved to args.device, or its LM head alone if a
            device_map has placed it. It may share frozen weights with the student, none that train. If ZeRO-3 has partitioned it,
            it gets an engine of its own and is frozen. A ProjectionCache needs the frozen LM head it was made for, without LoRA,
            and its alpha and temperature.
        teacher_head: the teacher's LM head, with a ContrastCache only.  `LMHead.from_model(teacher_model, gather=True)` makes a
            whole copy of a sharded one. If the cache has a sample of its teacher's head, another head raises ValueError.
        options: the loss's settings.
        teacher_processing_class: the teacher's tokenizer, or its processor. None takes the one beside the teacher's weights, if
            it is on this disk; so it is with `processing_class` and the student's weights. The tokens of the common ids are
            compared. Without one of them, heads that differ by more than 1,024 rows raise an error.
        on_policy: the student makes answers itself, and the teacher scores them (`kdkernels.integrations.OnPolicy`). It needs a
            DualPathTeacher. Under FSDP2 and ZeRO-3 all weights of the student are gathered on every rank while it answers; FSDP 1
            raises an error. Each step with such answers logs answer_tokens, their mean number, and answer_ends, the share that
            has ended.
        resume_with_other_options: True lets a checkpoint go on with another loss, teacher, cache or base of an adapter. Otherwise
            `train(resume_from_checkpoint=)` raises ValueError with what differs (chunk_tokens, workspace_bytes and impl may). Of
            a live teacher 64 values of each weight are compared, in their dtype; of one that ZeRO-3 has partitioned, none.
        assume_same_tokens: True leaves this check out: you know that the common ids mean the same tokens.

    What is logged in training also has kd, ce, student_entropy, teacher_entropy, top1_agreement, path_divergence (none without a
    negative path) and alpha (as path_divergence). They are means by token of the one step that is logged, over accumulation and
    ranks. That step computes the head twice. With logging_strategy="epoch" every step does, and the means are over the epoch.

    Each saved model has the options (caad_options.json) and a model card (README.md) beside it.

    `evaluate()` reports, by token over the whole dataset and all ranks: loss, kd, ce, student_entropy, teacher_entropy,
    top1_agreement, path_divergence (`kdkernels.CAADStats`).  `predict()` has no logits to return. Its `predictions` are each
    sample's weighted sums of these values, from kd on; its `label_ids` are the sample's two sums of weights.

    Resuming and args.load_best_model_at_end load every weight that trains, or raise (`CheckpointLoading`). Batch norms whose own
    weights are frozen stay in evaluation mode: a LoRA's checkpoint holds no running statistics.

    A loss or a gradient that is NaN or infinite stops the training before the optimiser's step, on all ranks, whatever
    args.logging_nan_inf_filter says. With args.fp16 the gradient scaler skips steps whose gradient is infinite.

    Each micro-batch waits for a CUDA device twice: to find positions from `labels`, and to look at the loss. Each step waits
    twice: for the number of labels and for the gradient's norm. Several ranks wait once more, to agree that they go on.

    Raises:
        ValueError, TypeError: for a bad argument, or for a column that a batch lacks, with its name. These raise at construction,
            because the loss could not follow them: compute_metrics, compute_loss_func, DataParallel, tensor, context or sequence
            parallelism, and of args label_smoothing_factor, torch_compile, use_liger_kernel, batch_eval_metrics,
            eval_do_concat_batches=False, eval_use_gather_object, predict_with_generate, debug="underflow_overflow", and
            greater_is_better (a default of transformers) with kd or ce as metric_for_best_model. An LM head with an active
            adapter other than LoRA, or with a hook that would get logits, raises when it is first used.
        FloatingPointError: the loss or the gradient is not finite. It names the step and the samples.
    """

    keeps_statistics = True

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        teacher: DualPathTeacher | ContrastCache | ProjectionCache,
        teacher_head: LMHead | None = None,
        options: CAADOptions | None = None,
        teacher_processing_class: Any = None,
        assume_same_tokens: bool = False,
        resume_with_other_options: bool = False,
        on_policy: OnPolicy | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        check_arguments(model, args, teacher, teacher_head, options)
        check_cached_samples(teacher, train_dataset=train_dataset, eval_dataset=eval_dataset)
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self._token_means,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_parallelism(self.accelerator)
        self._not_finite: list[tuple[str, list[str]]] = []  # of this rank's micro-batches of a step: what, samples
        self._step_samples: list[list[str]] = []
        self._resume_with_other_options = resume_with_other_options
        self._logged: Tensor | None = None  # (9,) sums over this rank's micro-batches that are logged
        self._contrasts = False  # whether they have a negative path
        self._teacher_takes_others = False  # inputs that its forward does not name
        self._grad_norm: Any = None
        self.add_callback(_BeforeStep(self._check_step))
        # The loss that compute_loss returns is a share of the whole step's: Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.options = CAADOptions() if options is None else options
        self.teacher = teacher
        student: Any = self.model
        if isinstance(teacher, DualPathTeacher) and any(map(is_partitioned, teacher.model.parameters())):
            self._teacher_engine = zero3_engine(teacher.model)
            teacher.head = teacher.head.to(args.device)
        elif isinstance(teacher, DualPathTeacher):
            check_apart(teacher, student)
            move(teacher, args.device)
        elif teacher_head is not None:
            self._cached_head = teacher_head.to(args.device)
        if not assume_same_tokens:
            self._check_vocabularies(processing_class, teacher_processing_class)
        softcap, scale = logit_post(student)
        if isinstance(teacher, ProjectionCache):
            check_projections(teacher, student, self.options, softcap=softcap, logit_scale=scale)
        self._student_rows = head_rows(student)  # before anything shards it
        self._made_of = self._fingerprints()
        self._student_post = {"student_softcap": softcap, "student_logit_scale": scale}
        self._at_head = HeadLoss(student, softcap=softcap, logit_scale=scale)
        self.on_policy = on_policy
        self._own_answers = None if on_policy is None else self._make_own_answers(on_policy, processing_class)

    def _fingerprints(self) -> dict[str, Any]:
        """Of what no option names and no checkpoint holds: the teacher, or its cache and head; the weights under an adapter."""
        found: dict[str, Any] = {}
        if isinstance(self.teacher, DualPathTeacher) and (weights := weights_fingerprint(self.teacher.model)) is not None:
            found["teacher"] = weights
        if isinstance(self.teacher, (ContrastCache, ProjectionCache)):
            found["teacher_cache"] = self.teacher.fingerprint
        if isinstance(self.teacher, ContrastCache):
            found["teacher_head"] = head_fingerprint(self._cached_head.weight, self._cached_head.bias)
        base = base_fingerprint(self.accelerator.unwrap_model(self.model))
        return found if base is None else {**found, "student_base": base}

    def _make_own_answers(self, on_policy: OnPolicy, processing_class: Any) -> OwnAnswers:
        if not isinstance(on_policy, OnPolicy):
            raise TypeError(f"on_policy: expected an OnPolicy or None, got {type(on_policy).__name__}")
        if not isinstance(self.teacher, DualPathTeacher):
            raise ValueError(
                f"on_policy: expected None with a {type(self.teacher).__name__}, which has no states of the student's new "
                "answers; pass a DualPathTeacher"
            )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "on_policy: expected None with FSDP version 1, which cannot generate with whole weights; set "
                "args.fsdp_config={'version': 2, ...}"
            )
        student: Any = self.model
        rows = [rows for rows in (head_rows(student), self.teacher.head.weight.shape[0], self.options.vocab_size) if rows]
        return OwnAnswers(
            on_policy, student, tokenizer=tokenizer_of(processing_class), vocab_size=min(rows), seed=self.args.seed,
            rank=self.accelerator.process_index,
        )  # fmt: skip

    def _check_vocabularies(self, processing_class: Any, teacher_processing_class: Any) -> None:
        student: Any = self.model
        live = self.teacher.model if isinstance(self.teacher, DualPathTeacher) else None
        if isinstance(self.teacher, ProjectionCache):
            teacher_rows = None  # the projections are as wide as the student's head
        else:
            head = self._cached_head if isinstance(self.teacher, ContrastCache) else self.teacher.head
            teacher_rows = head.weight.shape[0]
        check_same_tokens(
            student,
            teacher_rows,
            processing_class=processing_class,
            teacher_processing_class=teacher_processing_class,
            teacher_model=live,
            vocab_size=self.options.vocab_size,
        )

    # --- training -----------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The step's micro-batches and, as num_items_in_batch, its two sums of weights (kd, ce), (2,) float64."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._step_samples = [sample_names(batch) for batch in batches]
        if self._own_answers is not None:
            batches = [self._prepare_inputs(batch) for batch in batches]
            step = self.state.global_step + 1
            whole = whole_weights(self.model_wrapped) if self._own_answers.answers_in(step) else contextlib.nullcontext()
            with whole, self.compute_loss_context_manager():
                batches = self._own_answers.put_into(step, batches)
        if self.args.logging_strategy != IntervalStrategy.EPOCH:
            self._logged = None
        sums = torch.stack([sums_of_weights(batch).to(device) for batch in batches]).sum(0)
        if self.args.average_tokens_across_devices:
            sums = self.accelerator.reduce(sums, reduction="sum")
        if not bool(sums.any()):
            logger.warning(
                "optimiser step %d has nothing to learn from, and its loss is 0: labels are %d everywhere in samples %s",
                self.state.global_step + 1,
                IGNORE_INDEX,
                ", ".join(name for batch in self._step_samples for name in batch),
            )
        return batches, sums

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch as its share of the step's.

        Args:
            num_items_in_batch: the divisors of the two terms, (2,), or one number for both; None: the micro-batch's own.
        """
        kd_normalizer = ce_normalizer = num_items_in_batch
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() == 2:
            kd_normalizer, ce_normalizer = num_items_in_batch.unbind()
        if model.training:
            for norm in _frozen_batch_norms(model):
                norm.eval()
        loss = self._loss(
            model,
            inputs,
            step=self.state.global_step + 1,
            kd_normalizer=kd_normalizer,
            ce_normalizer=ce_normalizer,
        )
        ranks = self.accelerator.num_processes
        if ranks > 1 and model is self.model and self.accelerator.distributed_type.value.startswith("MULTI"):
            raise RuntimeError(
                "model: expected it in DistributedDataParallel, got it bare: accelerate does not wrap a model for training that "
                "evaluate() or predict() has prepared before; make a new CAADTrainer with a freshly loaded model"
            )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices and ranks > 1:
            loss = loss * ranks  # gradients are averaged over ranks
        if torch.is_grad_enabled() and not bool(torch.isfinite(loss)):
            self._not_finite.append((f"loss {loss.item()}", self._samples_not_finite(inputs)))
            if ranks == 1 or self.is_deepspeed_enabled:  # DeepSpeed makes the optimiser's step in the backward
                self._refuse_step(self._not_finite)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _logs_step(self, step: int) -> bool:
        if self.args.logging_strategy == IntervalStrategy.EPOCH:
            return True
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return False
        every = max(int(self.state.logging_steps or 1), 1)
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the last step to what is logged while training."""
        if "loss" in logs and self._logged is not None:
            sums, self._logged = self._logged, None
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, reduction="sum")
            *values, kd_total, ce_total = sums.tolist()
            for name, value in zip((*CAADStats._fields, "alpha"), values, strict=True):
                total = ce_total if name == "ce" else kd_total
                if total > 0 and (self._contrasts or name not in ("path_divergence", "alpha")):
                    logs[name] = value / total
        if "loss" in logs and self._own_answers is not None:
            counts = torch.tensor(self._own_answers.counts, dtype=torch.float64, device=self.args.device)
            if self.accelerator.num_processes > 1:
                counts = self.accelerator.reduce(counts, reduction="sum")
            answers, tokens, ended = counts.tolist()
            if answers:
                logs |= {"answer_tokens": tokens / answers, "answer_ends": ended / answers}
        super().log(logs, start_time)

    # --- what is saved ------------------------------------------------------------------------------------------------

    def _check_checkpoint(self, folder: Path) -> None:
        super()._check_checkpoint(folder)
        check_options(
            folder,
            self.options,
            on_policy=self._on_policy_json(),
            made_of=self._made_of,
            allow_others=self._resume_with_other_options,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:  # after the weights: a record that cannot be written must not cost them
            write_options(folder, self.options, on_policy=self._on_policy_json(), made_of=self._made_of)
            self._write_card(folder)

    def _on_policy_json(self) -> dict[str, Any] | None:
        return None if self.on_policy is None else self.on_policy.as_json()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._write_card(Path(str(self.args.output_dir)))

    def _write_card(self, folder: Path) -> None:
        data: Any = self.train_dataset
        if isinstance(self.teacher, (ContrastCache, ProjectionCache)):
            kept = "states" if isinstance(self.teacher, ContrastCache) else "projections"
            teacher = json.dumps(self.teacher.fingerprint, ensure_ascii=False)
            path = f"{kept} in a {type(self.teacher).__name__}"
        else:
            teacher, path = _name(self.teacher.model), "live"
        rows = len(data) if hasattr(data, "__len__") else None
        kind = getattr(getattr(data, "info", None), "dataset_name", None) or type(data).__name__
        write_card(
            folder,
            self.options,
            student=getattr(getattr(self.model, "config", None), "name_or_path", "") or "",
            teacher=teacher,
            data=kind if rows is None else f"{kind}, {rows:,} rows",
            path=path,
            on_policy=self._on_policy_json(),
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._grad_norm

    def _check_step(self) -> None:
        """Before the optimiser's step, on all ranks alike: one that stopped alone would leave the others waiting."""
        norm, self._grad_norm = self._grad_norm, None
        # A gradient scaler skips a step whose gradient is infinite; DeepSpeed has made its step by now.
        if norm is not None and self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
            if not math.isfinite(value) and not self._not_finite:
                # The loss is finite, so the samples that cause it are not known: all of the step's are named.
                self._not_finite.append((f"gradient norm {value}", [name for batch in self._step_samples for name in batch]))
        found = self._not_finite
        if self.accelerator.num_processes > 1:
            number = torch.tensor(float(len(found)), device=self.args.device)
            if bool(self.accelerator.reduce(number, reduction="sum")):
                found = gather_object(found)
        if found:
            self._refuse_step(found)

    def _refuse_step(self, found: list[tuple[str, list[str]]]) -> None:
        losses = [(what, names) for what, names in found if what.startswith("loss")]
        shown = losses or found  # the gradient is that of all ranks
        samples = ", ".join(name for _, names in shown for name in names)
        self._not_finite = []
        raise FloatingPointError(
            f"optimiser step {self.state.global_step + 1}: expected a finite loss and gradient, got {shown[0][0]}; nothing was "
            f"updated. Samples: {samples}"
        )

    def _samples_not_finite(self, inputs: Mapping[str, Any]) -> list[str]:
        """Names of the micro-batch's samples with a loss that is not finite, or of all samples if that is not known."""
        names = sample_names(inputs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return names  # the forward of a sharded model is every rank's
        with torch.no_grad():
            values, weights = self._by_row(self.accelerator.unwrap_model(self.model), inputs)
        kd_weight = self.options.kd_weight
        terms = [values[:, column] for column, share in enumerate((kd_weight, 1 - kd_weight)) if share > 0]
        finite = torch.isfinite(torch.stack([*terms, *weights.T])).all(0).tolist()
        return [name for name, good in zip(names, finite, strict=True) if not good] or names

    def _loss(self, model: nn.Module, inputs: Mapping[str, Any], *, step: int, **reduction: Any) -> Any:
        labels = labels_of(inputs, "")
        index, target = answer_index(labels)
        columns = split_columns(inputs)
        by_token = {name: token_values(inputs, name, labels) for name in BY_TOKEN if inputs.get(name) is not None}
        options = self.options.keywords(step)
        sink: list[CAADStats] = []
        measures = torch.is_grad_enabled() and "return_stats" not in reduction and self._logs_step(step)
        if isinstance(self.teacher, ProjectionCache):
            contrasts = False  # the divergence of the paths is not known any more
            given: dict[str, Any] = {**by_token, **reduction}
            compute: Callable[..., Any] = self._loss_from_projections(inputs, labels, index, target, options, given)
        else:
            states = self._teacher_states(inputs, *columns, index, target)
            contrasts = states[1] is not None
            if not contrasts:
                self.options.refuse_alpha(inputs.get("alpha"))
                options["alpha"] = 0.0
            widths = tuple(width for width in (self._student_rows, states[2].weight.shape[0]) if width)
            check_labels(target, index // labels.shape[1], valid_ids(self.options.vocab_size, widths), sample_names(inputs))
            compute = self._loss_from_states(states, target, {**options, **by_token, **reduction})

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            if measures:  # apart, because a loss with statistics rounds in another way: logging must not change the training
                with torch.no_grad():
                    sink.append(compute(hidden.detach(), weight, bias, return_stats=True)[1])
            return compute(hidden, weight, bias)

        with ids_named(self.accelerator.unwrap_model(model), sample_names(inputs), {"input_ids": inputs.get("input_ids")}):
            result = self._at_head(model, columns[0], index, loss)
        if sink:
            weights = torch.stack(term_weights(inputs, labels), 1).to(sink[0].kd.device)
            alpha = {**options, **by_token}["alpha"]
            alpha = alpha.to(weights) if isinstance(alpha, Tensor) else alpha
            alpha_sum = (weights[:, 0] * alpha).sum()[None]
            sums = torch.cat([_weighted(sink[0], weights).sum(0), alpha_sum, weights.sum(0)])
            self._logged = sums if self._logged is None else self._logged + sums
            self._contrasts = contrasts
        return result

    def _loss_from_states(
        self, states: tuple[Tensor, Tensor | None, LMHead], target: Tensor, keywords: Mapping[str, Any]
    ) -> Callable[..., Any]:
        audio_hidden, text_hidden, head = states

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Any:
            return fused_linear_caad_loss(
                hidden,
                weight,
                audio_hidden.to(hidden.device),
                None if text_hidden is None else text_hidden.to(hidden.device),
                target=target.to(hidden.device),
                student_bias=bias,
                **{**head.keywords("teacher"), **self._student_post, **keywords, **more},
            )

        return compute

    def _loss_from_projections(
        self,
        inputs: Mapping[str, Any],
        labels: Tensor,
        index: Tensor,
        target: Tensor,
        options: Mapping[str, Any],
        keywords: dict[str, Any],
    ) -> Callable[..., Any]:
        """`keywords`: of the batch; of the options the projections already have some."""
        if "alpha" in keywords:
            raise ValueError("inputs['alpha']: expected None with a ProjectionCache, whose alpha is fixed, got a tensor")
        keywords |= {name: options[name] for name in OF_THE_PROJECTED_LOSS}
        assert isinstance(self.teacher, ProjectionCache)
        samples = self._sample_ids(inputs)
        held = self.teacher.get(samples)
        packed = len(samples) != len(labels)
        lengths = held.lengths if packed else torch.bincount(index // labels.shape[1], minlength=len(labels))
        try:
            projection = held.spread(target, lengths).projection
        except ValueError as error:
            differing = sample_names(inputs) if packed else [
                name
                for name, ids, n in zip(samples, target.split(lengths.tolist()), lengths, strict=True)
                if not _spreads(self.teacher.get([name]), ids, n[None])
            ]
            raise ValueError(
                f"labels: expected the target tokens of the ProjectionCache, got others in {listed_samples(differing)} ({error})"
            ) from None

        def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None, **more: Any) -> Any:
            return fused_linear_projected_loss(
                hidden,
                weight,
                projection.to(hidden.device),
                target.to(hidden.device),
                student_bias=bias,
                **{**keywords, **more},
            )

        return compute

    def _sample_ids(self, inputs: Mapping[str, Any]) -> Any:
        cache = type(self.teacher).__name__
        if inputs.get(SAMPLE_ID) is None:
            raise ValueError(
                f"inputs: expected a column {SAMPLE_ID!r}, the samples' names in the {cache}, got {sorted(inputs)}; "
                "transformers' default collator drops strings"
            )
        for name in inputs[SAMPLE_ID]:
            if not isinstance(name, str):
                raise TypeError(f"inputs[{SAMPLE_ID!r}]: expected strings, the samples' names in the {cache}, got {name!r}")
        return inputs[SAMPLE_ID]

    def _teacher_states(
        self,
        inputs: Mapping[str, Any],
        student: dict[str, Any],
        teacher: dict[str, Any],
        negative: dict[str, Any],
        index: Tensor,
        target: Tensor,
    ) -> tuple[Tensor, Tensor | None, LMHead]:
        rows, names = index // inputs["labels"].shape[1], sample_names(inputs)
        if isinstance(self.teacher, ContrastCache):
            samples = self._sample_ids(inputs)
            states = self.teacher.get(samples)
            packed = len(samples) != len(inputs["labels"])
            own_rows = None if packed else torch.arange(len(samples)).repeat_interleave(states.lengths)
            check_targets(target, rows, states.target, own_rows, "the ContrastCache", names)
            dtype = self._cached_head.weight.dtype
            both = (states.audio_hidden, states.text_hidden)
            audio, text = (None if x is None else x.to(self.args.device, dtype) for x in both)
            assert audio is not None
            return audio, text, self._cached_head
        assert isinstance(self.teacher, DualPathTeacher)
        if teacher:
            theirs = labels_of(inputs, TEACHER)
            index, own = answer_index(theirs)
            check_targets(target, rows, own, index // theirs.shape[1], f"{TEACHER}labels", names)
        keywords: dict[str, Any] = {}
        if negative:
            theirs = labels_of(inputs, NEGATIVE)
            text_index, own = answer_index(theirs)
            check_targets(target, rows, own, text_index // theirs.shape[1], f"{NEGATIVE}labels", names)
            keywords = {"text_inputs": negative, "text_index": text_index}
        ids = {f"{TEACHER}input_ids" if teacher else "input_ids": (teacher or student).get("input_ids")}
        with ids_named(self.teacher.model, names, {**ids, f"{NEGATIVE}input_ids": negative.get("input_ids")}):
            live = self.teacher(teacher or student, index, **keywords)
        return live.audio_hidden, live.text_hidden, self.teacher.head

    # --- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """(None, weighted sums (B, 6) of each row's `CAADStats`, its sums of weights (B, 2)), float64."""
        inputs = self._prepare_inputs(dict(inputs))
        with self.compute_loss_context_manager():
            return None, *self._by_row(model, inputs)

    def _by_row(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Weighted sums (B, 6) of each row's `CAADStats`, its sums of weights (B, 2), float64."""
        _, stats = self._loss(model, inputs, step=max(self.state.global_step, 1), reduction="sum", return_stats=True)
        labels = labels_of(inputs, "")
        index, _ = answer_index(labels)
        rows = index // labels.shape[1]
        weights = torch.stack(term_weights(inputs, labels), 1)  # (N, 2): kd, ce
        weighted = _weighted(stats, weights)  # (N, 6)

        def by_row(values: Tensor) -> Tensor:
            return values.new_zeros(len(labels), values.shape[1]).index_add_(0, rows, values)

        return by_row(weighted), by_row(weights)

    def _token_means(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means by token from what `prediction_step` returned for all samples; duplicates of a last batch are gone."""
        predictions: Any = prediction.predictions  # one array each: prediction_step returns one tensor each
        label_ids: Any = prediction.label_ids
        kd_total, ce_total = (float(x) for x in label_ids.sum(0))
        kd_weight = self.options.kd_weight
        for name, share, total in (("kd", kd_weight, kd_total), ("ce", 1 - kd_weight, ce_total)):
            if share > 0 and not total > 0:
                raise ValueError(
                    f"labels: expected at least one position with a label and a {name}_token_weight above 0 in the dataset, got "
                    f"{name} weights that sum to {total:g}: labels are missing, or {IGNORE_INDEX} everywhere"
                )
        sums = dict(zip(CAADStats._fields, predictions.sum(0), strict=True))
        totals = {name: ce_total if name == "ce" else kd_total for name in sums}
        # A term without weight has no mean.
        means = {name: float(x / totals[name]) if totals[name] > 0 else math.nan for name, x in sums.items()}
        loss = sum(share * means[name] for name, share in (("kd", kd_weight), ("ce", 1 - kd_weight)) if share > 0)
        return {"loss": loss, **means}

    # --- columns ------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that Trainer leaves in the dataset (args.remove_unused_columns)."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            trainer: Any = self  # transformers says that this is None
            columns = trainer._signature_columns
            known = [*columns, "labels"]
            if isinstance(self.teacher, DualPathTeacher):
                names, self._teacher_takes_others = input_names(self.teacher.model)
                known += names
            prefixed = [prefix + name for prefix in (TEACHER, NEGATIVE) for name in dict.fromkeys(known)]
            trainer._signature_columns = [*columns, *prefixed, SAMPLE_ID, *BY_TOKEN]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        trainer: Any = self
        if self._teacher_takes_others:
            others = [name for name in dataset.column_names if name.startswith((TEACHER, NEGATIVE))]
            trainer._signature_columns = [*dict.fromkeys([*trainer._signature_columns, *others])]
        return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        collator: Any = super()._get_collator_with_removed_columns(data_collator, description)
        if self._teacher_takes_others and isinstance(collator, RemoveColumnsCollator):
            collator.signature_columns = WithPrefixed(collator.signature_columns)
        return collator


def _frozen_batch_norms(model: nn.Module) -> list[nn.Module]:
    """Those with weights of which none trains."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight is not None]
    return [m for m in norms if not any(p.requires_grad for p in m.parameters())]


class _BeforeStep(TrainerCallback):
    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
        self._check()


def _name(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__


def _weighted(stats: CAADStats, weights: Tensor) -> Tensor:
    """(N, 6) float64: each of `CAADStats` by the weights of its term, (N, 2) kd and ce."""
    of_each = [weights[:, int(name == "ce")] for name in CAADStats._fields]
    return torch.stack([w * x.to(w) for w, x in zip(of_each, stats, strict=True)], 1)


def _spreads(held: CachedProjections, target: Tensor, lengths: Tensor) -> bool:
    try:
        held.spread(target, lengths)
    except ValueError:
        return False
    return True
