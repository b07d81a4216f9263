"""Does an LM head compute what the loss will, and would a hook on it get logits?

Legend: N positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .head_layers import computing_layer, plain_parameters, without_adapter
from .model_modes import evaluating


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
    plain = without_adapter(computing_layer(head))
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
