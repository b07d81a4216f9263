"""The modes of a model in which it is asked: evaluation, the adapters of its audio, an output without states."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .head_layers import head_module, modules_around


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode back afterwards (a teacher may share modules with the student)."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def adapters_of_audio(model: nn.Module) -> list[Any]:
    """PEFT's layers in models whose own generate() turns them on with audio and off without (Granite Speech).

    The switch stays as the last call left it, and a forward does not touch it.
    """
    try:
        around = modules_around(model, head_module(model))
    except TypeError:
        around = [model]  # contrastive_generate takes a model whose head has no name
    owners = [
        module
        for module in around
        if getattr(vars(module).get("config"), "has_lora_adapter", False) and getattr(module, "_hf_peft_config_loaded", False)
    ]
    return [
        module
        for owner in owners
        for module in owner.modules()
        if callable(getattr(module, "enable_adapters", None)) and isinstance(getattr(module, "disable_adapters", None), bool)
    ]


@contextlib.contextmanager
def audio_adapters_on(model: nn.Module) -> Iterator[None]:
    """Inside, `adapters_of_audio` are on; afterwards each is on or off as it was, and trains or does not as it did."""
    layers = adapters_of_audio(model)
    before = [(layer, layer.disable_adapters, [(p, p.requires_grad) for p in layer.parameters()]) for layer in layers]
    try:
        for layer in layers:
            if layer.disable_adapters:
                layer.enable_adapters(True)
        yield
    finally:
        for layer, disabled, parameters in before:
            if layer.disable_adapters != disabled:
                layer.enable_adapters(not disabled)
            for parameter, trains in parameters:
                parameter.requires_grad_(trains)


# Outputs that a teacher does not need. Each of them costs memory.
_LEAN_OUTPUT = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}


@contextlib.contextmanager
def hearing(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in the modes of an evaluation with audio. Afterwards its modes are as they were before.

    These are: evaluation mode, the audio's adapters on, and an output without cache, states of layers and attentions.
    """
    configs = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    changed = [
        (config, name, getattr(config, name))
        for config in configs.values()
        if not isinstance(config, Mapping)
        for name, value in _LEAN_OUTPUT.items()
        if getattr(config, name, value) not in (None, value)
    ]
    with evaluating(model), audio_adapters_on(model):
        try:
            for config, name, _ in changed:
                setattr(config, name, _LEAN_OUTPUT[name])
            yield
        finally:
            for config, name, value in changed:
                setattr(config, name, value)


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes a keyword of this name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
