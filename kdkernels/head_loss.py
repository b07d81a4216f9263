"""The student's loss where its LM head would run: inside the model's own forward, with the head's weights in hand.

A loss that reads `model.lm_head.weight` from outside sees a shard of it under FSDP, and nothing under ZeRO-3. So the loss runs
here in the place of the head, between the hooks that gather its weight and those that free it. The model returns the loss as
its output: DDP, FSDP and DeepSpeed see an ordinary forward whose result is differentiated.

Legend: B rows of a batch, L columns, N positions that predict a target, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .head_capture import fit_post, logits_of, post_numbers, probe_values, without_rows
from .head_checks import ask_head, refuse_hooks
from .head_layers import computing_layer, gathered, head_module, head_state, linear_of, modules_around
from .lm_head import apply_post
from .model_modes import accepts, adapters_of_audio

__all__ = ["HeadLoss"]

LossFunction = Callable[[Tensor, Tensor, "Tensor | None"], Any]


class HeadLoss:
    """Calls a model and computes `loss(hidden, weight, bias)` in the place of its LM head.

        hidden (N, H) = the head's input at `index`;   head(hidden) = hidden @ weight^T + bias

    A LoRA on the head works; hidden and weight then have H + r columns (see `kdkernels.head_layers.linear_of`). Other active
    adapters, and heads that are no linear layers, raise TypeError.

    Args:
        model: any causal LM of transformers, or a module that calls the head of its `get_output_embeddings()` once and
            returns an output with `.logits`.  FSDP2, FSDP 1 and DDP may have been applied, or DeepSpeed's engine.
        softcap, logit_scale: what the model does to logits after its head. The first call checks them.

    The first call waits for the device: it checks what the head computes, and what the model does to the head's output. So does
    the first call after modules, parameters or adapters of the head have changed.

    A forward pre-hook on the head gets the hidden states, and may change them. A hook that would get logits raises TypeError:
    a forward or backward hook on the head, or a forward hook on a module around it.
    """

    def __init__(self, model: nn.Module, *, softcap: float | None = None, logit_scale: float = 1.0) -> None:
        self._root = _unwrapped(model)
        self._post = (softcap, logit_scale)
        self._known_states: dict[bool, Any] = {}  # of the head, in training and in evaluation: see head_state
        self._no_cache = {"use_cache": False} if accepts(self._root, "use_cache") else {}

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], index: Tensor, loss: LossFunction) -> Any:
        """`loss`'s result: a tensor, or a tuple of tensors.

        Args:
            model: the one given to the constructor, or a wrapper around it (DDP, an engine).
            inputs: its keyword arguments, without labels.
            index: (N,) int64, row * L + column of the positions wanted.
            loss: called with hidden (N, H), weight (V, H) and bias (V,) or None, all in the weight's dtype and whole.

        Raises:
            ValueError: the model does not call its head exactly once, or does something else to its logits than `softcap` and
                `logit_scale` say; adapters that belong to its audio are off.
            TypeError: the head is neither a plain linear layer nor one with a LoRA; a hook would get logits.
        """
        if _unwrapped(model) is not self._root:
            raise ValueError(f"model: expected the {type(self._root).__name__} given to HeadLoss, or a wrapper around it")
        self._head = head_module(self._root)
        layer = computing_layer(self._head)
        refuse_hooks(
            self._head,
            captured=(self._head, layer),
            backward=torch.is_grad_enabled(),
            ancestors=modules_around(self._root, self._head),
        )
        self._check_audio_adapters()
        results: list[Any] = []
        hooked: list[Any] = []
        state = (head_state(self._head), post_numbers(self._root, self._head))
        known = self._known_states.get(self._head.training) == state
        probe = None if known else probe_values()

        def before(head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Appended behind the hooks that gather the weights, so they are whole here.
            hidden, empty = without_rows(args, kwargs)
            results.append(self._compute(hidden, inputs, index, loss, ask=not known))
            return empty

        def hand_out(_head: nn.Module, _args: Any, _output: Any) -> Any:
            return results[-1]  # runs before the hooks that free the weights, so FSDP gathers them again in the backward

        def as_logits(_head: nn.Module, _args: Any, output: Any) -> Tensor:
            hooked.append(output)  # DeepSpeed's copy of the output: its backward gathers the weights again
            # The model goes on with no logits, or with the numbers that show what it does to them.
            tensor = index.new_empty(1, 0, 1, dtype=torch.float32)
            return tensor if probe is None else probe.to(index.device).expand(1, 1, -1)

        def result(_model: nn.Module, _args: Any, output: Any) -> Any:
            self._check_calls(results)
            if probe is not None:
                self._check_post(output, len(probe))
            return hooked[-1]

        with contextlib.ExitStack() as hooks:
            for handle in (
                layer.register_forward_pre_hook(before, with_kwargs=True),
                layer.register_forward_hook(hand_out, prepend=True),
                layer.register_forward_hook(as_logits),
                self._root.register_forward_hook(result, prepend=True),
            ):
                hooks.callback(handle.remove)
            output = model(**inputs, **self._no_cache)
        self._known_states[self._head.training] = state
        return _in_full_precision(output, results[-1])

    def _compute(
        self, hidden: Tensor, inputs: Mapping[str, Any], index: Tensor, loss: LossFunction, *, ask: bool
    ) -> Any:
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is not None and hidden.shape[:-1].numel() != tokens.shape[:2].numel():
            raise ValueError(
                f"model: expected its LM head to see {tokens.shape[:2].numel()} positions, one a token of "
                f"{tuple(tokens.shape[:2])}, got {tuple(hidden.shape)}; if it expands an audio placeholder into several "
                "positions, expand placeholders in input_ids beforehand"
            )
        hidden = hidden.flatten(0, -2).index_select(0, index.to(hidden.device))
        layer = computing_layer(self._head)
        with gathered(*layer.parameters()) as partitioned:
            if torch.is_grad_enabled() and any(p.requires_grad for p in partitioned):
                raise TypeError(
                    "LM head: its weights train and ZeRO-3 has them partitioned inside their module's own forward, expected "
                    "DeepSpeed's engine to have gathered them; call the engine, and keep a LoRA off the head"
                )
            if ask:
                ask_head(layer, lambda row: _logits(*linear_of(layer, row)), partitioned=bool(partitioned))
            return loss(*linear_of(layer, hidden))

    def _check_audio_adapters(self) -> None:
        if any(layer.disable_adapters for layer in adapters_of_audio(self._root)):
            raise ValueError(
                f"model: expected the adapters of {type(self._root).__name__} that belong to its audio to be on, got them off, "
                "as its generate() without audio leaves them; call model.enable_adapters(), or set config.has_lora_adapter=False "
                "to train without them"
            )

    def _check_calls(self, results: list[Any]) -> None:
        if len(results) != 1:
            raise ValueError(
                f"model: expected its forward to call its LM head ({type(self._head).__name__}) once, got {len(results)} "
                "calls; compiled models hide it (train the uncompiled one)"
            )

    def _check_post(self, output: Any, width: int) -> None:
        logits = logits_of(output)
        if not isinstance(logits, Tensor) or logits.shape[-1:] != (width,):
            raise ValueError(
                f"model: expected an output with .logits of what its LM head returned, got {type(output).__name__}"
            )
        softcap, scale = self._post
        seen = logits.reshape(-1, width)[-1]
        expected = apply_post(probe_values(), softcap, scale)
        # 1e-2: the model may do this arithmetic in bf16, whose rounding is 2^-9.
        if not torch.allclose(seen.double().cpu(), expected.double(), rtol=1e-2, atol=1e-6):
            found = fit_post(seen)
            raise ValueError(
                f"softcap, logit_scale: expected what the model does to its logits, {found[0]} and {found[1]:.6g}, got "
                f"{softcap} and {scale:.6g}"
            )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight, bias)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP 1 or an engine.  (FSDP2 wraps nothing; a wrapper may pass attributes through.)"""
    while not hasattr(type(model), "get_output_embeddings"):
        inner = model._modules.get("module", model._modules.get("_fsdp_wrapped_module"))
        if inner is None:
            break
        model = inner
    return model


def _in_full_precision(output: Any, computed: Any) -> Any:
    """`output` with the values of `computed`: mixed precision policies round what leaves a model (FSDP's output_dtype)."""
    if not isinstance(output, Tensor) or output.dtype == computed.dtype:
        return output
    wide = output.to(computed.dtype)
    return computed.detach() + (wide - wide.detach())
