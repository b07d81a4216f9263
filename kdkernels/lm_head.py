"""The LM head: what turns hidden states into logits, and how to take its input without running it.

Legend: B rows, L columns, N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class LMHead:
    """What turns a hidden state into logits, as `fused_linear_caad_loss` takes it.

        z = logit_scale * (hidden @ weight^T + bias);   z = softcap * tanh(z / softcap)   where softcap is given

    Attributes:
        weight: (V, H), detached; shares the model's memory (except a merged LoRA, which is a copy).
        bias: (V,) or None.
        softcap: Gemma's final_logit_softcapping, or None.
        logit_scale: Cohere's logit_scale, 1 / logits_scaling for Granite; 1.0 for most models.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight: expected shape (V, H), got {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({self.weight.shape[0]},), got {tuple(self.bias.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: expected a positive number or None, got {self.softcap}")
        if not self.logit_scale > 0:
            raise ValueError(f"logit_scale: expected a positive number, got {self.logit_scale}")

    @classmethod
    def from_model(
        cls, model: nn.Module, *, merge_lora: bool = False, gather: bool = False, probe: bool = True
    ) -> LMHead:
        """Reads weight, bias, soft cap and scale from a model.

        The numbers in a config do not always say what the model does: Granite divides by `logits_scaling`, HyperCLOVA X
        multiplies by it, Granite Speech ignores it.  So if the config has a soft cap or a scale, the model runs one forward of
        a single token whose head returns known numbers. Its output shows what it does to logits.  If that forward cannot run,
        the config counts, with the meaning that transformers usually gives it.

        Args:
            model: any module with `get_output_embeddings()`.
            merge_lora: True merges a LoRA on the head into a copy of its weight; False raises TypeError for it.
            gather: True gathers a sharded head (DTensor of FSDP2 or tensor parallelism, DeepSpeed ZeRO-3) into a whole copy on
                every rank. Then every rank has to make the call. False raises an error for a sharded head.
            probe: False reads the config alone and runs nothing.

        Raises:
            TypeError: the head is no plain linear layer in floating point: it is quantised, sharded, adapted or absent, or its
                forward computes something else. Or a hook on it would get logits.
            ValueError: its weight is not in this process (FSDP / ZeRO-3 shards, offloaded to the meta device).
        """
        head = head_module(model)
        refuse_hooks(head)
        with hearing(model):
            with gathered(*head.parameters(), enabled=gather) as copies:
                weight, bias = head_parameters(head, merge_lora=merge_lora, gather=gather)
                check_linear(head, weight, bias, partitioned=bool(copies))
                if copies:
                    weight, bias = weight.clone(), None if bias is None else bias.clone()
            softcap, scale = logit_post(model, device=weight.device, probe=probe)
        return cls(weight, bias, softcap, scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V), in the weight's dtype.  For checks and small decoders: it builds the logits."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self.post(logits)

    def post(self, logits: Tensor) -> Tensor:
        """Scale and soft cap, applied to the head's raw output of any shape."""
        return apply_post(logits, self.softcap, self.logit_scale)

    def to(self, device: torch.device | str) -> LMHead:
        """The same head on another device. If it is there already, it shares memory."""
        bias = None if self.bias is None else self.bias.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias=bias)

    def keywords(self, side: str) -> dict[str, Any]:
        """The keywords of `fused_linear_caad_loss` for this head; side is "teacher" or "student"."""
        if side not in ("teacher", "student"):
            raise ValueError(f"side: expected 'teacher' or 'student', got {side!r}")
        return {
            f"{side}_weight": self.weight,
            f"{side}_bias": self.bias,
            f"{side}_softcap": self.softcap,
            f"{side}_logit_scale": self.logit_scale,
        }


def apply_post(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Scale and soft cap of raw logits."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


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
    weight, bias = plain_parameters(_without_adapter(layer))
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


def _without_adapter(head: nn.Module) -> nn.Module:
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


# --------------------------------------------------------------------------------------------------------------------
# Asking it what it computes
# --------------------------------------------------------------------------------------------------------------------


def ask_head(
    head: nn.Module,
    read: Callable[[Tensor], Tensor],
    *,
    partitioned: bool = False,
    hint: str = "",
) -> None:
    """Does `head`'s own forward compute `read(hidden)`?  Some rows are asked; reads the device.

    Both may round as the head's dtype and device do, and no more: by some 1e-6 of the logits in float32; in bfloat16 by 1%, and
    by 0.4% on average. Where gradients are on, trained parameters are asked too: an adapter that starts at 0 changes no logit.

    Args:
        head: the module whose forward is asked, without its hooks.
        read: hidden (N, H) -> logits (N, V), what the loss will compute.
        partitioned: ZeRO-3 has its parameters in parts, gathered at the moment.  Modules inside would free them.
        hint: what to do, for the error message.

    Raises:
        TypeError: it computes something else.
    """
    plain = _without_adapter(computing_layer(head))
    replaced = "forward" in vars(head)
    if (partitioned and plain is not head) or any(hasattr(p, "placements") for p in head.parameters()):
        if type(plain).forward is nn.Linear.forward and "forward" not in vars(plain) and not replaced:
            return
        raise TypeError(
            f"LM head: expected a plain linear layer where the head is sharded, got a {type(plain).__module__}."
            f"{type(plain).__name__} with a forward of its own, which cannot be asked there; {hint}"
        )
    weight, _ = plain_parameters(plain)
    hidden = _some_hidden_states(weight)
    tolerance = _rounding(hidden, weight)
    trained = [p for p in head.parameters() if p.requires_grad]
    if (type(head).forward is nn.Linear.forward and not replaced) or not torch.is_grad_enabled():
        trained = []
    device = hidden.device.type
    results = []
    for compute in (head.forward, read):
        # Both draw the same dropout, or none on devices whose generator is not known.  Under autocast they would round otherwise.
        with (
            torch.set_grad_enabled(bool(trained)),
            torch.random.fork_rng([hidden.device] if device == "cuda" else []),
            contextlib.nullcontext() if device in ("cpu", "cuda") else evaluating(head),
            torch.autocast(device, enabled=False),
        ):
            logits = compute(hidden).double()
        gradients: Sequence[Tensor | None] = ()
        if trained and logits.requires_grad:
            direction = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype, device=logits.device).expand_as(logits)
            gradients = torch.autograd.grad(logits, trained, direction, allow_unused=True)
        results.append((logits.detach(), gradients))
    (seen, seen_gradients), (expected, gradients) = results
    same = seen.shape == expected.shape and _same_logits(seen, expected, tolerance)
    if trained and same:
        nothing: list[Tensor | None] = [None] * len(trained)
        pairs = zip(seen_gradients or nothing, gradients or nothing, strict=True)
        same = all(_close(mine, other, 3 * tolerance) for mine, other in pairs)
    if not same:
        where = ", replaced on this module," if replaced else ""
        raise TypeError(
            f"LM head: expected hidden @ weight^T + bias, got a {type(head).__module__}.{type(head).__name__} whose "
            f"forward{where} computes something else{'; ' if hint else ''}{hint}"
        )


@torch.no_grad()
def check_linear(head: nn.Module, weight: Tensor, bias: Tensor | None, *, partitioned: bool = False) -> None:
    """Does `head` compute hidden @ weight^T + bias at the moment?  TypeError where it does not."""
    ask_head(head, lambda hidden: F.linear(hidden, weight, bias), partitioned=partitioned, hint="pass head=LMHead(...)")


def _some_hidden_states(weight: Tensor) -> Tensor:
    """(4, H) in the weight's dtype, of several directions and sizes: a head may be linear in small numbers alone."""
    columns = torch.linspace(-1, 1, weight.shape[1], dtype=torch.float64)
    rows = [columns, 8 * torch.cos(7 * columns + 1), torch.sin(31 * columns) / 8, 1 - columns.abs()]
    return torch.stack(rows).to(weight)


@torch.no_grad()
def _rounding(hidden: Tensor, weight: Tensor) -> float:
    """By how much of their size two ways to compute the same logits may differ, in the weight's dtype on its device.

    A product is measured, because float32 products may run in TF32 or bfloat16. At most 1e-2.
    """
    few = weight[:64].detach()
    with torch.autocast(weight.device.type, enabled=False):
        product = F.linear(hidden, few).double()
    exact = F.linear(hidden.cpu().double(), few.cpu().double()).to(product.device)
    error = float((product - exact).norm() / exact.norm())
    eps = torch.finfo(weight.dtype).eps
    return min(1e-2, 4 * eps + (8 * error if math.isfinite(error) else 0.0))


def _same_logits(seen: Tensor, expected: Tensor, tolerance: float) -> bool:
    finite = expected.isfinite()  # the loss reports weights that are not finite
    if not bool((seen.isfinite() == finite).all()):
        return False
    seen, expected = seen.masked_fill(~finite, 0.0), expected.masked_fill(~finite, 0.0)
    size = expected.norm(dim=-1)  # (N,)
    near = ((seen - expected).norm(dim=-1) <= tolerance * size).all()
    # Rounding has no direction: a factor close to 1 shows in the mean although it is less than the rounding of one logit.
    factor = ((seen - expected) * expected).sum(-1) / (size * size).clamp_min(torch.finfo(torch.float64).tiny)
    return bool(near & (factor.mean().abs() <= 0.4 * tolerance))


def _close(seen: Tensor | None, expected: Tensor | None, tolerance: float) -> bool:
    """Whether two gradients are equal up to rounding. None counts as 0."""
    if seen is None or expected is None:
        return all(x is None or not bool(x.any()) for x in (seen, expected))
    # A LoRA in float32 on a bfloat16 head is rounded at other places.
    return bool((seen.double() - expected.double()).norm() <= tolerance * expected.double().norm())


def head_state(head: nn.Module) -> tuple[Any, ...]:
    """All that decides how `head` computes, except values. As long as it is equal, an answer of `ask_head` holds."""
    state: list[Any] = []
    for name, module in head.named_modules():
        adapters = (getattr(module, flag, None) for flag in ("merged", "disable_adapters", "active_adapters"))
        parameters = [(key, id(p), p.dtype, p.requires_grad) for key, p in module._parameters.items() if p is not None]
        state.append((name, id(module), vars(module).get("forward"), module.training, *map(repr, adapters), *parameters))
    return tuple(state)


# Hooks of these gather weights, compute them, move tensors or record layers.  They neither read logits nor change them.
_ENGINES = ("torch.distributed", "torch.nn.utils", "deepspeed", "accelerate", "transformers.utils.output_capturing", "kdkernels")


def refuse_hooks(
    head: nn.Module,
    *,
    captured: Sequence[nn.Module] = (),
    backward: bool = False,
    ancestors: Sequence[nn.Module] = (),
) -> None:
    """TypeError for a hook on the LM head that would get no logits, since none are built.

    Args:
        captured: modules whose input is taken, `head` itself by default: forward pre-hooks there get the hidden states as ever.
        backward: refuse backward hooks as well, which would get no gradient of the logits.
        ancestors: modules around the head whose output has no logits either.
    """
    for module in ancestors:
        _refuse(module, "_forward_hooks", f"model: {type(module).__name__}")
    for module in head.modules():
        _refuse(module, "_forward_hooks", "LM head")
        if module not in (captured or (head,)):
            _refuse(module, "_forward_pre_hooks", "LM head")
        for kind in ("_backward_hooks", "_backward_pre_hooks") if backward else ():
            _refuse(module, kind, "LM head")


def _refuse(module: nn.Module, kind: str, where: str) -> None:
    for hook in getattr(module, kind).values():
        function = hook.func if isinstance(hook, functools.partial) else hook
        origin = getattr(function, "__module__", None) or type(function).__module__
        if not origin.startswith(_ENGINES):
            name = getattr(function, "__qualname__", type(function).__name__)
            raise TypeError(
                f"{where}: expected no {kind.strip('_').replace('_', ' ')[:-1]} on it, got {origin}.{name}: no logits are built "
                "that it could read or change; remove it (its handle's remove())"
            )


def logit_post(
    model: nn.Module, *, device: torch.device | None = None, probe: bool = True
) -> tuple[float | None, float]:
    """(soft cap, scale) that `model` applies to its LM head's output; see `LMHead.from_model`."""
    head = head_module(model)
    owner = _head_owner(model, head)
    hints = post_numbers(model, head)
    if probe and hints:
        device = next(head.parameters()).device if device is None else device
        measured = _probe_with_one_token(owner, head, device)
        if measured is not None:
            return _snap(measured, hints)
    return _config_post(hints)


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


def _head_owner(model: nn.Module, head: nn.Module) -> nn.Module:
    """The innermost module with a config whose head this is: its forward gets the logits first."""
    for module in reversed(modules_around(model, head)):
        getter = getattr(module, "get_output_embeddings", None)
        if hasattr(module, "config") and callable(getter) and getter() is head:
            return module
    return model


# The names of such numbers in transformers' configs, and what they mean where the model cannot be asked.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
# A number of a name like these in any other config is a reason to ask the model.
_LIKE_THESE = re.compile(r"(logit|lm_head|output).*(cap|scal|multipl)")


def post_numbers(model: nn.Module, head: nn.Module) -> dict[str, float]:
    """The numbers of a config that concern the logits; empty for most models."""
    owner = _head_owner(model, head)
    config = getattr(owner, "config", None)
    text_config = getattr(config, "text_config", None)
    numbers: dict[str, float] = {}
    for source in (config, text_config):
        names = source if isinstance(source, Mapping) else getattr(source, "__dict__", ())
        for name in (*_CAPS, *_FACTORS, *_DIVISORS, *filter(_LIKE_THESE.search, map(str, names))):
            value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.setdefault(name, float(value))
    return numbers


def _config_post(numbers: dict[str, float]) -> tuple[float | None, float]:
    scale = math.prod(numbers.get(name, 1.0) for name in _FACTORS)
    scale /= math.prod(numbers.get(name, 1.0) for name in _DIVISORS)
    return next((numbers[name] for name in _CAPS if name in numbers), None), scale


# --------------------------------------------------------------------------------------------------------------------
# Taking its input, asking the model what it does to its output
# --------------------------------------------------------------------------------------------------------------------


# All of them survive a model that casts its logits to fp16 or bf16.
PROBE = (2.0**-10, 2.0**14, 1.0, -1.0, 7.5, -7.5, 40.0, -40.0, 300.0, -300.0)


def probe_values() -> Tensor:
    return torch.tensor(PROBE, dtype=torch.float32)


def fit_post(seen: Tensor) -> tuple[float | None, float]:
    """Soft cap and scale from what became of the probe values; ValueError if it is not that family of functions.

    Both orders (scale then cap, cap then scale) are the same family: s * c * tanh(x / c) = c' tanh(s x / c'), c' = s c.
    """
    y = seen.detach().double().cpu()
    x = torch.tensor(PROBE, dtype=torch.float64)
    scale = float(y[0] / x[0])
    top = float(y[1])
    softcap = None if not scale > 0 or abs(top / (scale * PROBE[1]) - 1) < 1e-2 else top
    fitted = x * scale if softcap is None else torch.tanh(x * scale / softcap) * softcap
    # 1e-2: the model may do this arithmetic in bf16, whose rounding is 2^-9.
    if not scale > 0 or not torch.isfinite(y).all() or not torch.allclose(y, fitted, rtol=1e-2, atol=1e-6):
        pairs = ", ".join(f"{a:g} -> {b:g}" for a, b in zip(PROBE, y.tolist(), strict=True))
        raise ValueError(
            f"model: what it does to its LM head's output is neither a scale nor a tanh soft cap ({pairs}); "
            "fused_linear_caad_loss cannot rebuild such logits"
        )
    return softcap, scale


def _snap(measured: tuple[float | None, float], numbers: dict[str, float]) -> tuple[float | None, float]:
    """Measured numbers replaced by the exact ones they come from, where such a one is within the fit's accuracy."""
    softcap, scale = measured
    exact = [1.0, *numbers.values(), *(1.0 / value for value in numbers.values() if value), _config_post(numbers)[1]]
    scale = next((value for value in exact if abs(value / scale - 1) < 1e-2), scale)
    caps = [value * factor for value in numbers.values() for factor in (1.0, scale)]
    if softcap is not None:
        softcap = next((value for value in caps if abs(value / softcap - 1) < 1e-2), softcap)
    return softcap, scale


def _probe_with_one_token(owner: nn.Module, head: nn.Module, device: torch.device) -> tuple[float | None, float] | None:
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    capture = HeadCapture(head, probe=probe_values())
    try:
        with torch.no_grad(), evaluating(owner), capture:
            output = owner(input_ids=token, attention_mask=torch.ones_like(token))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None  # the model takes no bare token; DualPathTeacher checks again on its first real pass
    seen = capture.seen(output)
    return None if seen is None else fit_post(seen)


class HeadCapture(contextlib.AbstractContextManager):
    """Takes the LM head's input and lets the head compute nothing, for the calls of one thread.

    A forward pre-hook keeps the head's input and gives the head a view of zero rows. So its GEMM, and what the model does to
    logits afterwards, cost nothing.  An exception could leave the forward early as well, but then the hooks of FSDP,
    accelerate and PEFT around the head would not run.

    With `probe` (P,) the head's output is replaced by these P numbers at every position, so that the model's own output
    shows what it does to logits.
    """

    def __init__(self, head: nn.Module, *, probe: Tensor | None = None):
        self._head = head
        self._probe = probe
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self.inputs: list[Tensor] = []

    def __enter__(self) -> HeadCapture:
        # Appended: a pre-hook that changes the hidden states has had its turn.
        self._handles = [
            self._head.register_forward_pre_hook(self._before, with_kwargs=True),
            self._head.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, _head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return None  # another thread uses the model as usual
        hidden, empty = without_rows(args, kwargs)
        self.inputs.append(hidden)
        return empty

    def _after(self, _head: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._probe is None or threading.get_ident() != self._thread:
            return None
        return self._probe.to(output.device).expand(*self.inputs[-1].shape[:-1], -1)

    def hidden(self) -> Tensor:
        if len(self.inputs) != 1:
            raise ValueError(
                f"model: expected its forward to call its LM head ({type(self._head).__name__}) once, got "
                f"{len(self.inputs)} calls; compiled models hide it (pass the uncompiled one), others can offer "
                "hidden_states_at(index, **inputs)"
            )
        return self.inputs[0]

    def seen(self, output: Any) -> Tensor | None:
        """(P,) what the model made of the probe, or None where its output cannot be read."""
        logits = logits_of(output)
        if self._probe is None or not isinstance(logits, Tensor) or logits.shape[-1:] != self._probe.shape:
            return None
        return logits.reshape(-1, logits.shape[-1])[-1]


def without_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The hidden states that a head is called with, and the same arguments with none of their rows.

    Raises:
        ValueError: it is called with more than hidden states (PEFT's adapter_names, which pick an adapter a row).
    """
    given: list[tuple[int | str, Any]] = [*enumerate(args), *((key, value) for key, value in kwargs.items() if value is not None)]
    name, hidden = given[0] if len(given) == 1 else (0, None)
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"model: expected it to call its LM head with hidden states alone, got {len(args)} arguments and {sorted(kwargs)}"
        )
    nothing = hidden[..., :0, :]
    return hidden, (((nothing,), kwargs) if isinstance(name, int) else (args, {**kwargs, name: nothing}))


def logits_of(output: Any) -> Any:
    """The logits in a model's output: an object with `.logits`, or a tuple that begins with them."""
    logits = getattr(output, "logits", None)
    return output[0] if logits is None and isinstance(output, (tuple, list)) and output else logits


# --------------------------------------------------------------------------------------------------------------------
# A model's modes
# --------------------------------------------------------------------------------------------------------------------


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
