"""Hidden states of chosen layers at chosen positions, taken by hooks while a model runs.

transformers' `output_hidden_states=True` keeps every layer at every position, (L + 1) B S H items. Here a hook keeps only the
positions that are asked for, N H items for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_LAYER_LISTS = ("layers", "h", "block", "blocks")
_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of a causal LM's layers.

    Raises:
        ValueError: none is found under the names that transformers uses; the message lists them.
    """
    return _find(_decoder(model), _LAYER_LISTS, nn.ModuleList, "a list of layers")


def final_norm(model: nn.Module) -> nn.Module | None:
    """What a causal LM applies to the output of its last layer before its LM head; None where nothing is found."""
    return _find(_decoder(model), _FINAL_NORMS, nn.Module, "a final norm", default=None)


class LayerStates:
    """Takes the states of `layers` at `index` while the model runs inside the block.

    ::

        with LayerStates(model, [2, 4], index) as states:
            model(...)
        states.stacked()                     # (N, 2, H)

    Layers count as in transformers' `hidden_states`: 0 is the first layer's input, k the output of layer k, and the last one what
    the final norm makes of it.

    Args:
        model: a causal LM of transformers, or its decoder.
        layers: ascending or not, without repeats; negative counts from the end.
        index: (N,) int64, row * S + column of the (B, S) tokens that the model is run on.

    Raises:
        ValueError: no such layer; a repeated one; a model whose layers cannot be found.

    Gradients flow through the states. Activation checkpointing runs a layer without gradients first: do not combine.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], index: Tensor) -> None:
        self._decoder = _decoder(model)
        self._list = decoder_layers(model)
        self.layers = resolve_layers(layers, len(self._list))
        self._index = index
        self._taken: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> LayerStates:
        depth = len(self._list)
        for layer in self.layers:
            if layer == 0:
                handle = self._list[0].register_forward_pre_hook(self._take_input, with_kwargs=True)
            elif layer == depth:
                last = _find(self._decoder, _FINAL_NORMS, nn.Module, "a final norm", default=self._list[-1])
                handle = last.register_forward_hook(self._take_output(layer))
            else:
                handle = self._list[layer - 1].register_forward_hook(self._take_output(layer))
            self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def stacked(self) -> Tensor:
        """(N, K, H), in the order of `layers`.

        Raises:
            RuntimeError: the model did not run inside the block, or left a layer out.
        """
        missing = [layer for layer in self.layers if layer not in self._taken]
        if missing:
            raise RuntimeError(f"layers: expected the model to run layers {self.layers}, got nothing of {missing}")
        return torch.stack([self._taken[layer] for layer in self.layers], dim=1)

    def _take(self, layer: int, states: Tensor) -> None:
        self._taken[layer] = states.flatten(0, -2).index_select(0, self._index.to(states.device))

    def _take_input(self, _module: nn.Module, arguments: tuple, keywords: dict) -> None:
        self._take(0, arguments[0] if arguments else keywords["hidden_states"])

    def _take_output(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            self._take(layer, output[0] if isinstance(output, tuple) else output)

        return hook


def resolve_layers(layers: Sequence[int], depth: int) -> list[int]:
    """`layers` counted from 0, checked against the number of layers `depth`.

    Raises:
        ValueError: outside -depth - 1 to depth, or repeated.
    """
    resolved = []
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise ValueError(f"layers: expected 0 to {depth} (0 = the first layer's input), got {layer}")
        resolved.append(int(layer) % (depth + 1))
    if len(set(resolved)) != len(resolved):
        raise ValueError(f"layers: expected each layer once, got {list(layers)}")
    return resolved


def _decoder(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_decoder", None)
    found = get() if callable(get) else None
    return model if found is None else found


_REQUIRED = object()


def _find(module: nn.Module, names: Sequence[str], kind: type, what: str, default: Any = _REQUIRED) -> Any:
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, kind):
            return found
    if default is not _REQUIRED:
        return default
    raise ValueError(f"model: expected {what} ({', '.join(names)}) in {type(module).__name__}, got none")
