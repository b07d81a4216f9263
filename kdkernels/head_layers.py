"""The layers of an LM head: which module computes the logits, and its weights, with adapters and shards.

Legend: N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def head_module(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is None:
        head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"model: expected a causal LM whose get_output_embeddings() returns its LM head, "
            f"got {type(model).__name__} without one"
        )
    return head


def head_parameters(
    head: nn.Module, *, merge_lora: bool = False, gather: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) of a head as it is at the moment, detached; see `LMHead.from_model`."""
    layer: Any = computing_layer(head)  # with an adapter: attributes that nn.Module does not have
    if not hasattr(layer, "base_layer"):
        weight, bias = plain_parameters(layer, gather=gather)
        return weight.detach(), None if bias is None else bias.detach()
    # Under a PEFT adapter the base weight alone would be a silently wrong teacher.
    base_weight, base_bias = head_parameters(layer.base_layer, merge_lora=merge_lora, gather=gather)
    active = active_lora(layer)
    if active and not merge_lora:
        raise TypeError(
            f"LM head: LoRA adapter {active} of PEFT sits on it, expected a plain linear layer; pass merge_lora=True "
            "to merge it into a copy of the weight, or call model.merge_and_unload()"
        )
    if any(layer.lora_B[name].bias is not None for name in active):
        raise TypeError(f"LM head: LoRA adapter {active} has a bias of its own, which merge_lora cannot merge")
    for name in active:
        base_weight = base_weight + layer.get_delta_weight(name).detach().to(base_weight)
    return base_weight, base_bias


def linear_of(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden (N, H'), weight (V, H'), bias) whose product is what `head` computes from `hidden` (N, H), with gradients.

    A LoRA on the head adds columns to both, H' = H + r:  h W^T + s (A h) B^T = [h, s A h] [W, B]^T.  So its dropout works, and no
    update is rounded to the precision of W.  Each call copies the weight, V (H + r) items; if A or B train, their gradient needs
    as many.

    Raises:
        TypeError, ValueError: as `LMHead.from_model`.
    """
    layer: Any = computing_layer(head)  # with a LoRA: attributes that nn.Module does not have
    active = active_lora(layer)
    weight, bias = plain_parameters(without_adapter(layer))
    columns, rows = [hidden.to(weight.dtype)], [weight]
    for name in active:
        lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
        low = lora_a(layer.lora_dropout[name](hidden.to(lora_a.weight.dtype))) * layer.scaling[name]  # (N, r)
        columns.append(low.to(weight.dtype))
        rows.append(_plain(lora_b.weight, layer, f"LoRA {name!r}").to(weight.dtype))
        if lora_b.bias is not None:
            added = lora_b.bias.to(weight.dtype) * layer.scaling[name]
            bias = added if bias is None else bias + added
    return (torch.cat(columns, 1), torch.cat(rows, 1), bias) if active else (columns[0], weight, bias)


def computing_layer(head: Any) -> nn.Module:
    """The layer inside a PEFT wrapper that turns hidden states into logits: its fully trained copy, or the original."""
    saved = getattr(head, "modules_to_save", None)
    if not isinstance(saved, nn.ModuleDict):
        return head
    active = [name for name in getattr(head, "active_adapters", ()) if name in saved]
    enabled = bool(active) and not getattr(head, "disable_adapters", False)
    return computing_layer(saved[active[0]] if enabled else head.original_module)


def active_lora(head: Any) -> list[str]:
    """Names of the LoRA adapters that take part in what `head` computes; TypeError for an active adapter of another kind."""
    if not hasattr(head, "base_layer"):
        return []
    if getattr(head, "disable_adapters", False):
        if getattr(head, "merged", False):
            head.unmerge()  # as the head's own forward does before it multiplies
        return []
    if getattr(head, "merged", False):
        return []  # the base holds it
    active = [name for name in getattr(head, "active_adapters", ()) if name in _adapters_here(head)]
    variants = getattr(head, "lora_variant", None) or getattr(head, "use_dora", None) or {}
    lora = isinstance(getattr(head, "lora_A", None), nn.ModuleDict) and hasattr(head, "get_delta_weight")
    other = [name for name in active if not lora or name not in head.lora_A or variants.get(name)]
    if other:
        kind = next((f", a {type(variants[name]).__name__}" for name in other if variants.get(name)), "")
        raise TypeError(
            f"LM head: a {type(head).__module__}.{type(head).__name__} adapter sits on it, expected a plain linear layer; merge "
            f"it first (model.merge_and_unload()), or keep it off the LM head, where only a plain LoRA works; got {other}{kind}"
        )
    return active


def _adapters_here(layer: nn.Module) -> set[str]:
    """Names of the adapters that a PEFT layer holds, active or not."""
    names = [name for name in (*getattr(layer, "adapter_layer_names", ()), "lora_A") if "." not in name]
    holders = [getattr(layer, name, None) for name in names]
    return {key for holder in holders if holder is not None and hasattr(holder, "keys") for key in holder}


def without_adapter(head: nn.Module) -> nn.Module:
    while (inner := getattr(head, "base_layer", None)) is not None:
        head = computing_layer(inner)
    return head


def plain_parameters(head: nn.Module, *, gather: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain linear layer as they are, not detached."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"LM head: expected a linear layer with a weight, got {type(head).__name__}")
    return _plain(weight, head, "weight", gather), None if bias is None else _plain(bias, head, "bias", gather)


def _plain(tensor: Any, head: nn.Module, what: str, gather: bool = False) -> Tensor:
    """`tensor`, or an error that says which kind of tensor it is instead of a plain one."""
    name = f"LM head: its {what}"
    if hasattr(tensor, "placements"):  # a DTensor; asking for its class would import torch.distributed.tensor
        if all(placement.is_replicate() for placement in tensor.placements):
            return tensor.to_local()
        if gather:
            return tensor.full_tensor()
        raise TypeError(
            f"{name} is a DTensor sharded as {tuple(tensor.placements)}, expected a whole tensor; gather it "
            "(LMHead.from_model(model, gather=True)), or pass head=LMHead(local shard) and process_group= to the loss"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device (offloaded?), expected it in memory; pass head=LMHead(...)")
    if tensor.numel() == 0:
        raise ValueError(
            f"{name} is empty, shape {tuple(tensor.shape)}: FSDP or ZeRO-3 has sharded it away; gather it first "
            "(LMHead.from_model(model, gather=True); of FSDP 1 FSDP.summon_full_params and head=LMHead(...))"
        )
    plain_type = type(tensor) in (Tensor, nn.Parameter)
    if not plain_type or not tensor.is_floating_point() or tensor.element_size() < 2:
        raise TypeError(
            f"{name} is quantised or wrapped: {type(tensor).__name__} of {tensor.dtype} in {type(head).__name__}, "
            "expected a plain float32, float16 or bfloat16 tensor; load the model with its LM head left as it is"
        )
    return tensor


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 holds it in parts at the moment."""
    return hasattr(parameter, "ds_id") and tuple(parameter.shape) != tuple(parameter.ds_shape)


@contextlib.contextmanager
def gathered(*parameters: Tensor, enabled: bool = True) -> Iterator[list[Tensor]]:
    """Inside, parameters that DeepSpeed ZeRO-3 has partitioned are whole on every rank; yields those that were not.

    Uses `deepspeed.zero.GatheredParameters`, the documented way. Parameters that are whole already stay as they are, for example
    inside the forward of their own module under DeepSpeed's engine.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not enabled or not partitioned:
        yield []
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield partitioned


def head_state(head: nn.Module) -> tuple[Any, ...]:
    """All that decides how `head` computes, except values. As long as it is equal, an answer of `ask_head` holds."""
    state: list[Any] = []
    for name, module in head.named_modules():
        adapters = (getattr(module, flag, None) for flag in ("merged", "disable_adapters", "active_adapters"))
        parameters = [(key, id(p), p.dtype, p.requires_grad) for key, p in module._parameters.items() if p is not None]
        state.append((name, id(module), vars(module).get("forward"), module.training, *map(repr, adapters), *parameters))
    return tuple(state)


def modules_around(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules that `head` is inside, from `model` down.  Level by level, since a head is near the top."""
    level: list[list[nn.Module]] = [[model]]
    while level:
        below = []
        for path in level:
            if path[-1] is head:
                return path[:-1]
            below += [[*path, child] for child in path[-1].children()]
        level = below
    return [model]  # held by no module
