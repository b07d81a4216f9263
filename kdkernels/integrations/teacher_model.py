"""A live teacher in a Trainer: on its device, apart from the student, and with the columns that it takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..placement import is_placed
from ..teacher import DualPathTeacher

__all__ = ["check_apart", "input_names", "move"]


def move(teacher: DualPathTeacher, device: torch.device) -> None:
    """To the device; of a model that is placed the LM head alone, which the loss needs there."""
    if is_placed(teacher.model):
        teacher.head = teacher.head.to(device)
    else:
        teacher.to(device)


def check_apart(teacher: DualPathTeacher, student: nn.Module) -> None:
    """Raises ValueError where a weight of the teacher is one of the student that trains. Frozen weights may be shared."""
    own = {id(parameter) for parameter in teacher.model.parameters()}
    shared = [name for name, parameter in student.named_parameters() if parameter.requires_grad and id(parameter) in own]
    if shared:
        raise ValueError(
            f"teacher: expected frozen weights, got the student's own {shared[0]}, which trains ({len(shared)} such weights); "
            "load the teacher separately, or take copy.deepcopy(model) before an adapter is added"
        )


def input_names(model: Any) -> tuple[list[str], bool]:
    """The names of a model's inputs, below the wrappers of PEFT and torch.compile, and whether it takes others as well."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            break
    names: list[str] = []
    takes_others = False
    for name in ("forward", "hidden_states_at"):
        if callable(method := getattr(model, name, None)):
            parameters = inspect.signature(method).parameters.values()
            names += [parameter.name for parameter in parameters]
            takes_others |= any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return names, takes_others


def zero3_engine(model: nn.Module) -> Any:
    """An engine whose hooks gather a frozen, partitioned model's weights, module by module, in each forward.

    transformers partitions every model that is loaded after TrainingArguments with a ZeRO-3 configuration; only the one that
    trains gets Trainer's engine.
    """
    import deepspeed

    dtype = next(model.parameters()).dtype
    config = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; without an optimiser it does nothing
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    model.requires_grad_(False)
    return deepspeed.initialize(model=model, config=config)[0]
