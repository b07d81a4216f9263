"""A sharded model with whole weights for a while: what generation needs.

A sharded model gathers each layer's weights in each forward, and every rank has to take part. Ranks whose answers differ in
length would wait for each other forever. So all weights are gathered once before a generation, and freed after it. Each rank then
makes as many forwards as its rows need, or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .head_layers import is_partitioned

__all__ = ["whole_weights"]


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the weights of `model` are whole on every rank, and its forward exchanges nothing between ranks.

    Every rank has to enter it, also one that runs nothing inside. Weights that are whole already stay as they are.

    Args:
        model: the root of FSDP2 (`fully_shard`), DeepSpeed's engine, or any other module.

    Memory: all weights on each rank while inside, in the dtype of the forward.

    Raises:
        TypeError: the model is FSDP 1's, which can run nothing with whole weights.
    """
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise TypeError("model: expected FSDP version 2 (torch's fully_shard), got version 1")
    if isinstance(model, FSDPModule):
        with _whole_by_fsdp2(model):
            yield
    elif any(map(is_partitioned, model.parameters())):
        with _whole_by_zero3(model):
            yield
    else:
        yield


@contextlib.contextmanager
def _whole_by_fsdp2(root: Any) -> Iterator[None]:
    from torch.distributed.fsdp import FSDPModule

    _find_root(root)
    sharded = [module for module in root.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in sharded for group in _groups(module)]
    before = [group.post_forward_mesh_info for group in groups]
    # accelerate makes `generate` a forward of FSDP2, which would free the root's weights behind it.
    wrapped = [(module, vars(module).pop("generate")) for module in sharded if "generate" in vars(module)]
    try:
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module, generate in wrapped:
            vars(module)["generate"] = generate
        for group, mesh_info in zip(groups, before, strict=True):  # a user's own setting, which only the group remembers
            group.post_forward_mesh_info = mesh_info
            # FSDP2 gathers ahead in the next backward, in the order of the forwards before it. That order differs between ranks
            # here. Ranks that gather different weights would wait for each other forever.
            group.comm_ctx.post_forward_order.clear()
            group._post_forward_indices.clear()
        for module in sharded:
            module.reshard()


def _find_root(root: Any) -> None:
    """FSDP2 takes the first module that runs for its root: a layer must not be that."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    name = "_kdkernels_nothing"
    setattr(root, name, lambda: None)
    register_fsdp_forward_method(root, name)
    try:
        with torch.no_grad():
            getattr(root, name)()
    finally:
        delattr(root, name)


def _groups(module: Any) -> list[Any]:
    """What FSDP2 shards together of a module's own; torch 2.9 has one group a module, later releases several."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    return [group for group in (several or [getattr(state, "_fsdp_param_group", None)]) if group is not None]


@contextlib.contextmanager
def _whole_by_zero3(engine: Any) -> Iterator[None]:
    """As in TRL: the engine's hooks would free each layer behind its forward, so they are taken off meanwhile."""
    import deepspeed

    optimizer = getattr(engine, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)
    if offload is None:
        raise TypeError(f"model: expected DeepSpeed's engine with an optimiser, got {type(engine).__name__}")
    parameters = list(engine.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        # One hook is in neither list: it counts forwards, and compares them between ranks.
        hooks = offload.module._forward_pre_hooks
        counting = {key: hook for key, hook in hooks.items() if (hook.__module__ or "").startswith("deepspeed.")}
        for key in counting:
            del hooks[key]
        try:
            yield
        finally:
            hooks.update(counting)
            coordinator = getattr(offload, "param_coordinator", None)
            if coordinator is not None and not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
            offload._register_deepspeed_module(offload.module)
