"""Take an LM head's input without running it, and find out what a model does to its output.

Legend: N positions, H hidden width, V vocabulary, P probe values.
"""

from __future__ import annotations

import contextlib
import math
import re
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .head_layers import head_module, modules_around
from .model_modes import evaluating


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
