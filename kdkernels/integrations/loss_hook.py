"""The loss of this package in a Trainer that is not CAADTrainer: TRL's SFTTrainer, GKDTrainer and DistillationTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..caad import fused_linear_caad_loss
from ..head_capture import logit_post
from ..head_loss import HeadLoss
from ..teacher import DualPathTeacher, answer_index
from .batch_columns import labels_of
from .checkpoints import CheckpointLoading
from .options import CAADOptions
from .teacher_model import check_apart, move
from .vocabulary import check_same_tokens

__all__ = ["CAADLossMixin"]

# What goes to the model; SFT's packed rows have position_ids.
_NOT_FOR_THE_MODEL = (
    "labels", "num_items_in_batch", "prompts", "prompt_attention_mask", "prompt_ids", "prompt_mask", "completion_ids",
    "completion_mask", "tool_mask", "num_images", "num_tiles",
)  # fmt: skip
_IGNORED = -100


class CAADLossMixin(CheckpointLoading):
    """Mix-in: `compute_loss` is `fused_linear_caad_loss` against a teacher, and no logits are built.

        class Distilling(CAADLossMixin, SFTTrainer): ...
        trainer = Distilling(student, args=args, train_dataset=dataset)
        trainer.use_teacher(DualPathTeacher(teacher, negative=None), CAADOptions(temperature=1.0, kd_weight=1.0))

    The batch is the trainer's own: the model's inputs and `labels`; or, in DistillationTrainer, prompts and completions, which
    the student may have written. Their completion_mask, and tool_mask if there is one, says which tokens count. The loss is
    divided by the trainer's number of labels, as its own loss is, over accumulation and ranks. What the trainer computes from
    logits (its own metrics) is not logged.
    """

    _caad_teacher: DualPathTeacher | None = None

    def use_teacher(
        self,
        teacher: DualPathTeacher,
        options: CAADOptions | None = None,
        *,
        teacher_processing_class: Any = None,
        assume_same_tokens: bool = False,
    ) -> None:
        """Before `train()`: the teacher, moved to args.device, and the loss's settings.

        If a device_map has placed the teacher, its LM head alone is moved. ValueError where the student trains a weight of it, or
        where the ids of the two are not the same tokens. It is found as in `CAADTrainer`, which explains the last two arguments.
        """
        student: Any = self.accelerator.unwrap_model(self.model)
        check_apart(teacher, student)
        if not assume_same_tokens:
            check_same_tokens(
                student,
                teacher.head.weight.shape[0],
                processing_class=self.processing_class,
                teacher_processing_class=teacher_processing_class,
                teacher_model=teacher.model,
                vocab_size=None if options is None else options.vocab_size,
            )
        move(teacher, self.args.device)
        softcap, scale = logit_post(student)
        self._caad_teacher = teacher
        self._caad_options = CAADOptions() if options is None else options
        self._caad_post = {"student_softcap": softcap, "student_logit_scale": scale}
        self._caad_head = HeadLoss(student, softcap=softcap, logit_scale=scale)
        self.model_accepts_loss_kwargs = True  # the loss is a share of the step's already

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch; with return_outputs also a dict without logits."""
        teacher = self._caad_teacher
        if teacher is None:
            raise ValueError("teacher: expected use_teacher(...) to be called before the trainer computes a loss, got no teacher")
        given = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        own_count = "completion_ids" in inputs  # which the trainer makes after its completions are there
        if own_count:
            given |= _joined(inputs)
            labels = _completion_labels(inputs)
            if model.training and inputs.get("num_items_in_batch") is not None:
                num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1)
        else:
            labels = labels_of(inputs, "")
        index, target = answer_index(labels)
        states = teacher(given, index)
        options = self._caad_options.keywords(self.state.global_step + 1)
        if states.text_hidden is None:
            self._caad_options.refuse_alpha()
            options["alpha"] = 0.0

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            text = states.text_hidden
            return fused_linear_caad_loss(
                hidden,
                weight,
                states.audio_hidden.to(hidden.device),
                None if text is None else text.to(hidden.device),
                target=target.to(hidden.device),
                student_bias=bias,
                kd_normalizer=num_items_in_batch,
                ce_normalizer=num_items_in_batch,
                **{**teacher.head.keywords("teacher"), **self._caad_post, **options},
            )

        value = self._caad_head(model, given, index, loss)
        if num_items_in_batch is not None and (own_count or self.args.average_tokens_across_devices):
            value = value * self.accelerator.num_processes  # gradients are averaged over ranks
        return (value, {"loss": value.detach()}) if return_outputs else value


def _joined(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Each row's prompt (padded on the left) and completion (padded on the right) as model inputs, (B, P + C)."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    }


def _completion_labels(inputs: Mapping[str, Any]) -> Tensor:
    """(B, P + C): the completions' tokens that count, and -100 elsewhere."""
    counts = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    answer = inputs["completion_ids"].masked_fill(counts == 0, _IGNORED)
    return torch.cat([torch.full_like(inputs["prompt_ids"], _IGNORED), answer], dim=1)
