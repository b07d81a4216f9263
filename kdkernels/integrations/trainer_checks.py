"""What CAADTrainer refuses before transformers' Trainer sets anything up."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from ..contrast_cache import ContrastCache
from ..lm_head import LMHead
from ..projection_cache import ProjectionCache
from ..teacher import DualPathTeacher
from .batch_columns import SAMPLE_ID
from .options import CAADOptions

# Arguments that have no effect on this loss, or the wrong one: what is expected of each, and why.
_REFUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0, "the teacher's distribution takes its place"),
    "torch_compile": (
        False,
        "a compiled model hides its LM head; compile what lies below it: `student.get_decoder().compile()`. The loss has kernels "
        "of its own",
    ),
    "use_liger_kernel": (False, "it replaces the model's forward and loss; apply the kernels you want to the model yourself"),
    "batch_eval_metrics": (False, "evaluation is by token over the whole dataset"),
    "eval_do_concat_batches": (True, "evaluation is by token over the whole dataset"),
    "eval_use_gather_object": (False, "what evaluation gathers are tensors"),
    "predict_with_generate": (False, "predict() returns sums of the loss; call model.generate() yourself"),
}


def check_arguments(model: Any, args: TrainingArguments, teacher: Any, teacher_head: LMHead | None, options: Any) -> None:
    """Before Trainer sets anything up."""
    if options is not None and not isinstance(options, CAADOptions):
        raise TypeError(f"options: expected a CAADOptions or None, got {type(options).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "model: expected it without torch.compile, which hides its LM head, got a compiled one; compile what lies below: "
            "`student.get_decoder().compile()`"
        )
    if not isinstance(teacher, (DualPathTeacher, ContrastCache, ProjectionCache)):
        raise TypeError(
            f"teacher: expected a DualPathTeacher, a ContrastCache or a ProjectionCache, got {type(teacher).__name__}"
        )
    cached = isinstance(teacher, ContrastCache)
    if cached != isinstance(teacher_head, LMHead):
        wanted = "the teacher's LMHead with a ContrastCache" if cached else f"None with a {type(teacher).__name__}"
        raise TypeError(f"teacher_head: expected {wanted}, got {type(teacher_head).__name__}")
    if isinstance(teacher_head, LMHead) and cached and teacher_head.weight.shape[1] != teacher.hidden_size:
        raise ValueError(
            f"teacher_head: expected a weight (V, {teacher.hidden_size}) as wide as the ContrastCache, got "
            f"{tuple(teacher_head.weight.shape)}"
        )
    if isinstance(teacher, ContrastCache) and teacher_head is not None:
        teacher.check_head(teacher_head)
    for name, (expected, reason) in _REFUSED.items():
        if getattr(args, name, expected) != expected:
            raise ValueError(f"args.{name}: expected {expected!r} with CAADTrainer, got {getattr(args, name)!r}: {reason}")
    if any(str(getattr(option, "value", option)) == "underflow_overflow" for option in args.debug):
        raise ValueError(
            "args.debug: expected no 'underflow_overflow' with CAADTrainer, got it: its hooks look at logits, which are not built"
        )
    metric = str(args.metric_for_best_model)
    if args.greater_is_better and metric.rpartition("_")[2] in ("kd", "ce"):
        raise ValueError(
            f"args.greater_is_better: expected False with metric_for_best_model={metric!r}, which is a loss, got True, "
            "transformers' default for names that do not end in 'loss': the worst model would count as the best one"
        )
    if args.n_gpu > 1:
        raise ValueError(f"args.n_gpu: expected one GPU a process (start with torchrun), got {args.n_gpu}: DataParallel")


def check_cached_samples(teacher: Any, **datasets: Any) -> None:
    """ValueError if a dataset names a sample that the teacher's cache lacks: training would stop at the step that draws it.

    A `datasets.Dataset` with the column "sample_id" says its names before it is read. Those of others are looked up by batch.
    """
    if not isinstance(teacher, (ContrastCache, ProjectionCache)):
        return
    for argument, given in datasets.items():
        for key, dataset in given.items() if isinstance(given, dict) else [(None, given)]:
            if SAMPLE_ID in (getattr(dataset, "column_names", None) or ()) and hasattr(dataset, "unique"):
                try:
                    teacher.check_samples(dataset.select_columns([SAMPLE_ID]).unique(SAMPLE_ID))
                except ValueError as error:
                    raise ValueError(f"{argument}{'' if key is None else f'[{key!r}]'}: {error}") from error


def check_parallelism(accelerator: Any) -> None:
    config = getattr(accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        size = getattr(config, f"{name}_size", 1)
        if size > 1:
            raise ValueError(
                f"args.parallelism_config: expected {name}_size 1 with CAADTrainer, got {size}; a vocabulary-parallel head is "
                "kdkernels.fused_linear_caad_loss(..., process_group=) in a loop of its own"
            )
