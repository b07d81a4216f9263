"""The LM head: what turns hidden states into logits, and how to take its input without running it.

Legend: B rows, L columns, N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Iterator, Mapping
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
                every rank, and every rank has to make the call; False raises an error for it.
            probe: False reads the config alone and runs nothing.

        Raises:
            TypeError: the head is no plain linear layer in floating point: it is quantised, sharded, adapted or absent, or its
                forward computes something else.
            ValueError: its weight is not in this process (FSDP / ZeRO-3 shards, offloaded to the meta device).
        """
        head = head_module(model)
        with gathered(*head.parameters(), enabled=gather) as copies:
            weight, bias = _head_weight(head, merge_lora=merge_lora, gather=gather)
            _check_forward(head, weight, bias)
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
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def to(self, device: torch.device | str) -> LMHead:
        """The same on another device; shares memory where it is there already."""
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


def _head_weight(head: nn.Module, *, merge_lora: bool, gather: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) of a head that stays as it is: detached."""
    layer: Any = computing_layer(head)  # with an adapter: attributes that nn.Module does not have
    if not hasattr(layer, "base_layer"):
        weight, bias = plain_parameters(layer, gather=gather)
        return weight.detach(), None if bias is None else bias.detach()
    # Under a PEFT adapter the base weight alone would be a silently wrong teacher.
    base_weight, base_bias = _head_weight(layer.base_layer, merge_lora=merge_lora, gather=gather)
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


def active_lora(head: nn.Module) -> list[str]:
    """Names of the LoRA adapters that take part in what `head` computes; TypeError for any other kind of adapter."""
    if not hasattr(head, "base_layer") or getattr(head, "merged", False) or getattr(head, "disable_adapters", False):
        return []  # merged: the base already holds it; disabled: it has no effect
    active = [name for name in getattr(head, "active_adapters", ()) if name in getattr(head, "lora_A", {})]
    variants = getattr(head, "lora_variant", None) or getattr(head, "use_dora", None) or {}
    if not active or not hasattr(head, "get_delta_weight") or any(variants.get(name) for name in active):
        raise TypeError(
            f"LM head: a {type(head).__module__}.{type(head).__name__} adapter sits on it, expected a plain linear "
            "layer; merge it first (model.merge_and_unload())"
        )
    return active


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


@torch.no_grad()
def _check_forward(head: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """TypeError if the head has a forward of its own and that computes no linear layer."""
    layer = computing_layer(head)
    own_forward = type(layer).forward is not nn.Linear.forward or "forward" in vars(layer)
    if not own_forward or hasattr(layer, "base_layer"):
        return
    hidden = torch.linspace(-1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)[None]
    expected, seen = F.linear(hidden, weight, bias), layer.forward(hidden)
    if seen.shape != expected.shape or not (seen.double() - expected.double()).norm() <= 1e-2 * expected.double().norm():
        raise TypeError(
            f"LM head: expected hidden @ weight^T + bias, got a {type(layer).__module__}.{type(layer).__name__} whose "
            "forward computes something else; pass head=LMHead(...)"
        )


def logit_post(
    model: nn.Module, *, device: torch.device | None = None, probe: bool = True
) -> tuple[float | None, float]:
    """(soft cap, scale) that `model` applies to its LM head's output; see `LMHead.from_model`."""
    head = head_module(model)
    owner = _head_owner(model, head)
    hints = _config_numbers(owner)
    if probe and hints:
        device = next(head.parameters()).device if device is None else device
        measured = _probe_with_one_token(owner, head, device)
        if measured is not None:
            return _snap(measured, hints)
    return _config_post(hints)


def _head_owner(model: nn.Module, head: nn.Module) -> nn.Module:
    """The innermost module with a config whose head this is: its forward gets the logits first."""
    owner = model
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if module is not head and hasattr(module, "config") and callable(getter) and getter() is head:
            owner = module
    return owner


def _config_numbers(owner: nn.Module) -> dict[str, float]:
    """The numbers of a config that concern the logits; empty for most models."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    config = getattr(owner, "config", None)
    text_config = getattr(config, "text_config", None)
    numbers: dict[str, float] = {}
    for source in (config, text_config):
        for name in names:
            value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.setdefault(name, float(value))
    return numbers


def _config_post(numbers: dict[str, float]) -> tuple[float | None, float]:
    scale = numbers.get("logit_scale", 1.0) * numbers.get("lm_head_multiplier", 1.0)
    scale /= numbers.get("logits_scaling", 1.0)
    return numbers.get("final_logit_softcapping"), scale


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
        # prepend: PEFT's or accelerate's own hooks on the head then see the empty rows as well.
        self._handles = [
            self._head.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
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
        if args:
            self.inputs.append(args[0])
            return (args[0][..., :0, :], *args[1:]), kwargs
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        self.inputs.append(kwargs[name])
        return args, {**kwargs, name: kwargs[name][..., :0, :]}

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
        logits = getattr(output, "logits", None)
        if logits is None and isinstance(output, (tuple, list)) and output:
            logits = output[0]
        if self._probe is None or not isinstance(logits, Tensor) or logits.shape[-1:] != self._probe.shape:
            return None
        return logits.reshape(-1, logits.shape[-1])[-1]


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


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes a keyword of this name."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
