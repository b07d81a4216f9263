"""The frozen teacher, seen with and without the audio: synchronised teacher forcing (CAAD, arXiv 2606.23052).

The pseudo ground truth Y is forced through the teacher twice, once with the audio (positive path) and once without
(negative path).  Both paths are the rows of ONE batched pass, and what leaves the teacher are the hidden states at the
positions that predict Y, never logits: those are rebuilt chunk by chunk inside `fused_linear_caad_loss`.

Legend: B rows of a batch, L columns of its longest row, N positions that predict Y, H hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DropKey",
    "DualPathStates",
    "DualPathTeacher",
    "LMHead",
    "MarkAbsent",
    "MaskFeatures",
    "answer_index",
]

Inputs = Mapping[str, Any]

# Inputs with one entry a token and the value that pads them.  Everything else is padded nowhere: its trailing shape
# has to agree between the paths.
_SEQUENCE_PADDING: dict[str, float | int] = {
    "input_ids": 0,
    "attention_mask": 0,
    "inputs_embeds": 0.0,
    "position_ids": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
}
# Keys that make no sense where no logits are built.
_IGNORED_KEYS = frozenset({"labels", "logits_to_keep", "num_logits_to_keep", "use_cache", "return_dict"})
# Keys that would silently change what the rows mean.
_REFUSED_KEYS = frozenset({"past_key_values", "cache_position", "decoder_input_ids"})


# --------------------------------------------------------------------------------------------------------------------
# Where Y is predicted
# --------------------------------------------------------------------------------------------------------------------


def answer_index(labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Flat positions whose hidden states predict the labels, and the labels there: the next-token shift.

        index[n] = row * L + column   with   labels[row, column + 1] == target[n] != ignore_index

    Args:
        labels: (B, L) int64, aligned with `input_ids` (not shifted); `ignore_index` where nothing is to be predicted.
        ignore_index: the label that means "no target here".

    Returns:
        index (N,) int64 and target (N,) int64, ordered by row, then by column.  A label in column 0 has no position
        that predicts it and is left out, as in transformers' own shift.

    Raises:
        TypeError: labels are not int64.
        ValueError: labels are not two-dimensional.

    On CUDA this waits for the device (the number N is not known before); a collator calls it on the CPU.
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    if labels.ndim != 2:
        raise ValueError(f"labels: expected shape (B, L), got {tuple(labels.shape)}")
    length = labels.shape[1]
    shifted = labels[:, 1:]  # (B, L - 1)
    row, column = (shifted != ignore_index).nonzero(as_tuple=True)
    return row * length + column, shifted[row, column]


# --------------------------------------------------------------------------------------------------------------------
# The negative path
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, init=False)
class MaskFeatures:
    """Negative path: the same inputs with the named feature tensors filled with `value`.

    What CAAD's authors do: the log-mel features are zeroed, the length, the placeholders and the words stay.

    Args:
        keys: names of float tensors in the inputs, for example "input_features".
        value: what they are filled with.
    """

    keys: tuple[str, ...]
    value: float

    def __init__(self, *keys: str, value: float = 0.0):
        if not keys:
            raise ValueError("keys: expected at least one name of an input, got none")
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "value", value)

    def __call__(self, inputs: Inputs) -> dict[str, Any]:
        _require_keys(inputs, self.keys)
        masked = {key: torch.full_like(inputs[key], self.value) for key in self.keys}
        return {**inputs, **masked}


@dataclass(frozen=True, init=False)
class DropKey:
    """Negative path: the same inputs without the named entries.

    The placeholders of the audio stay in `input_ids`, so the model has to accept placeholders without features (some
    embed them as tokens, some refuse).  The two paths cannot share a batch then: each runs in a pass of its own.
    """

    keys: tuple[str, ...]

    def __init__(self, *keys: str):
        if not keys:
            raise ValueError("keys: expected at least one name of an input, got none")
        object.__setattr__(self, "keys", keys)

    def __call__(self, inputs: Inputs) -> dict[str, Any]:
        _require_keys(inputs, self.keys)
        return {key: value for key, value in inputs.items() if key not in self.keys}


@dataclass(frozen=True)
class MarkAbsent:
    """Negative path for models with a (B,) bool input that says which rows hear their audio: all False.

    On the positive path an absent flag becomes all True; a flag given by the caller is kept.
    """

    key: str = "audio_present"

    def positive(self, inputs: Inputs) -> dict[str, Any]:
        if inputs.get(self.key) is not None:
            return dict(inputs)
        return {**inputs, self.key: self._rows(inputs, True)}

    def __call__(self, inputs: Inputs) -> dict[str, Any]:
        return {**inputs, self.key: self._rows(inputs, False)}

    @staticmethod
    def _rows(inputs: Inputs, value: bool) -> Tensor:
        tokens = _tokens(inputs, "inputs")
        return torch.full((tokens.shape[0],), value, dtype=torch.bool, device=tokens.device)


def _require_keys(inputs: Inputs, keys: tuple[str, ...]) -> None:
    for key in keys:
        if inputs.get(key) is None:
            raise ValueError(f"negative: expected the inputs to have {key!r}, got {sorted(inputs)}")
        if not isinstance(inputs[key], Tensor):
            raise TypeError(f"negative: expected inputs[{key!r}] to be a tensor, got {type(inputs[key]).__name__}")


# --------------------------------------------------------------------------------------------------------------------
# The head
# --------------------------------------------------------------------------------------------------------------------


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
    def from_model(cls, model: nn.Module, *, merge_lora: bool = False, probe: bool = True) -> LMHead:
        """Reads weight, bias, soft cap and scale from a model.

        The numbers in a config do not always say what the model does (Granite divides by `logits_scaling`, HyperCLOVA
        X multiplies by it, Granite Speech ignores it), so where the config names a soft cap or a scale the model is
        asked: one forward of a single token, with the head's output replaced by known numbers, shows what happens to
        logits after the head.  Where that forward cannot run, the config is read by transformers' usual meaning.

        Args:
            model: any module with `get_output_embeddings()`.
            merge_lora: a LoRA on the head is merged into a copy of its weight instead of being refused.
            probe: False reads the config alone and runs nothing.

        Raises:
            TypeError: the head is not a plain linear layer in floating point (quantised, sharded, adapted, absent).
            ValueError: its weight is not here (FSDP / ZeRO-3 shards, offloaded to the meta device).
        """
        head = _head_module(model)
        weight, bias = _head_weight(head, merge_lora=merge_lora)
        owner = _head_owner(model, head)
        hints = _config_numbers(owner)
        softcap, scale = _config_post(hints)
        if probe and hints:
            measured = _probe_with_one_token(owner, head, weight.device)
            if measured is not None:
                softcap, scale = _snap(measured, hints)
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


def _head_module(model: nn.Module) -> nn.Module:
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


def _head_weight(head: nn.Module, *, merge_lora: bool) -> tuple[Tensor, Tensor | None]:
    saved = getattr(head, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict):  # PEFT's fully trained copy of the head
        active = getattr(head, "active_adapter", None)
        enabled = not getattr(head, "disable_adapters", False)
        inner = saved[active] if enabled and isinstance(active, str) and active in saved else head.original_module
        return _head_weight(inner, merge_lora=merge_lora)
    if hasattr(head, "base_layer"):
        return _adapted_weight(head, merge_lora=merge_lora)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"LM head: expected a linear layer with a weight, got {type(head).__name__}")
    return _plain(weight, head, "weight"), _plain_bias(head)


def _adapted_weight(head: nn.Module, *, merge_lora: bool) -> tuple[Tensor, Tensor | None]:
    """The head under a PEFT adapter.  Its base weight alone would be a silently wrong teacher."""
    base_weight, base_bias = _head_weight(head.base_layer, merge_lora=merge_lora)
    if getattr(head, "merged", False) or getattr(head, "disable_adapters", False):
        return base_weight, base_bias  # merged: the base already holds it; disabled: it plays no part
    active = [name for name in getattr(head, "active_adapters", ()) if name in getattr(head, "lora_A", {})]
    variants = getattr(head, "lora_variant", None) or getattr(head, "use_dora", None) or {}
    plain_lora = bool(active) and hasattr(head, "get_delta_weight") and not any(variants.get(name) for name in active)
    if not plain_lora:
        raise TypeError(
            f"LM head: a {type(head).__module__}.{type(head).__name__} adapter sits on it, expected a plain linear "
            "layer; merge it first (model.merge_and_unload())"
        )
    if not merge_lora:
        raise TypeError(
            f"LM head: LoRA adapter {active} of PEFT sits on it, expected a plain linear layer; pass merge_lora=True "
            "to merge it into a copy of the weight, or call model.merge_and_unload()"
        )
    if getattr(head, "lora_bias", None) and any(head.lora_bias.get(name) for name in active):
        raise TypeError(f"LM head: LoRA adapter {active} has a bias of its own, which merge_lora cannot merge")
    merged = base_weight
    for name in active:
        merged = merged + head.get_delta_weight(name).detach().to(merged)
    return merged, base_bias


def _plain_bias(head: nn.Module) -> Tensor | None:
    bias = getattr(head, "bias", None)
    return None if bias is None else _plain(bias, head, "bias")


def _plain(tensor: Tensor, head: nn.Module, what: str) -> Tensor:
    """`tensor` detached, or an error that says which kind of tensor it is instead of a plain one."""
    name = f"LM head: its {what}"
    if hasattr(tensor, "placements"):  # torch.distributed.tensor.DTensor, told by its own attribute to save the import
        if all(placement.is_replicate() for placement in tensor.placements):
            return tensor.to_local().detach()
        raise TypeError(
            f"{name} is a DTensor sharded as {tuple(tensor.placements)}, expected a whole tensor; gather it "
            "(tensor.full_tensor()), or pass head=LMHead(local shard) and process_group= to the loss"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device (offloaded?), expected it in memory; pass head=LMHead(...)")
    if tensor.numel() == 0:
        raise ValueError(
            f"{name} is empty, shape {tuple(tensor.shape)}: FSDP or ZeRO-3 has sharded it away; gather it first "
            "(FSDP.summon_full_params, deepspeed.zero.GatheredParameters) and pass head=LMHead(...)"
        )
    plain_type = type(tensor) in (Tensor, nn.Parameter)
    if not plain_type or not tensor.is_floating_point() or tensor.element_size() < 2:
        raise TypeError(
            f"{name} is quantised or wrapped: {type(tensor).__name__} of {tensor.dtype} in {type(head).__name__}, "
            "expected a plain float32, float16 or bfloat16 tensor; load the model with its LM head left as it is"
        )
    return tensor.detach()


def _head_owner(model: nn.Module, head: nn.Module) -> nn.Module:
    """The innermost module with a config whose head this is: it is the one that treats the logits after the head."""
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
# Asking the model what it does to logits
# --------------------------------------------------------------------------------------------------------------------

# All of them survive a model that casts its logits to fp16 or bf16.
_PROBE = (2.0**-10, 2.0**14, 1.0, -1.0, 7.5, -7.5, 40.0, -40.0, 300.0, -300.0)


def _probe_values() -> Tensor:
    return torch.tensor(_PROBE, dtype=torch.float32)


def _fit_post(seen: Tensor) -> tuple[float | None, float]:
    """Soft cap and scale from what became of the probe values; ValueError if it is not that family of functions.

    Both orders (scale then cap, cap then scale) are the same family: s * c * tanh(x / c) = c' tanh(s x / c'), c' = s c.
    """
    y = seen.detach().double().cpu()
    x = torch.tensor(_PROBE, dtype=torch.float64)
    scale = float(y[0] / x[0])
    top = float(y[1])
    softcap = None if not scale > 0 or abs(top / (scale * _PROBE[1]) - 1) < 1e-2 else top
    fitted = x * scale if softcap is None else torch.tanh(x * scale / softcap) * softcap
    # 1e-2: the model may do this arithmetic in bf16, whose rounding is 2^-9.
    if not scale > 0 or not torch.isfinite(y).all() or not torch.allclose(y, fitted, rtol=1e-2, atol=1e-6):
        pairs = ", ".join(f"{a:g} -> {b:g}" for a, b in zip(_PROBE, y.tolist(), strict=True))
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
    capture = _HeadCapture(head, probe=_probe_values())
    try:
        with torch.no_grad(), _evaluating(owner), capture:
            output = owner(input_ids=token, attention_mask=torch.ones_like(token))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None  # a model that takes no bare token; DualPathTeacher checks again on its first real pass
    seen = capture.seen(output)
    return None if seen is None else _fit_post(seen)


class _HeadCapture(contextlib.AbstractContextManager):
    """Takes the LM head's input and lets the head compute nothing, for the calls of one thread.

    A forward pre-hook keeps the head's input and hands the head a view of zero rows, so its GEMM and whatever the model
    does to logits afterwards cost nothing.  Hooks are used (rather than an exception that leaves the forward early) so
    that the hooks of FSDP, accelerate and PEFT around the head run as ever.

    With `probe` (P,) the head's output is replaced by these P numbers at every position, so that the model's own output
    shows what it does to logits.
    """

    def __init__(self, head: nn.Module, *, probe: Tensor | None = None):
        self._head = head
        self._probe = probe
        self._thread = threading.get_ident()
        self._handles: list[Any] = []
        self.inputs: list[Tensor] = []

    def __enter__(self) -> _HeadCapture:
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
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode back afterwards (a teacher may share modules with the student)."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# --------------------------------------------------------------------------------------------------------------------
# Both paths as rows of one batch
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Model inputs of `rows` rows and `length` columns."""

    inputs: dict[str, Any]
    rows: int
    length: int

    def batch_dimension(self, key: str) -> int:
        return _batch_dimension(key, self.inputs[key])

    def slice(self, start: int, stop: int) -> _Batch:
        if (start, stop) == (0, self.rows):
            return self
        part: dict[str, Any] = {}
        for key, value in self.inputs.items():
            if isinstance(value, Tensor) and value.ndim:
                dimension = self.batch_dimension(key)
                if value.shape[dimension] != self.rows:
                    raise ValueError(
                        f"rows_per_pass: expected one entry a row in inputs[{key!r}] to split by, got "
                        f"{value.shape[dimension]} entries for {self.rows} rows; pass rows_per_pass=None"
                    )
                part[key] = value.narrow(dimension, start, stop - start)
            elif isinstance(value, list):
                part[key] = value[start:stop]
            else:
                part[key] = value
        return _Batch(part, stop - start, self.length)


def _batch_dimension(key: str, value: Tensor) -> int:
    return 1 if key == "position_ids" and value.ndim == 3 else 0  # (3, B, L): multimodal rotary positions


def _tokens(inputs: Inputs, name: str) -> Tensor:
    tokens = inputs.get("input_ids")
    if tokens is None:
        tokens = inputs.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ValueError(
            f"{name}: expected a tensor 'input_ids' (B, L) or 'inputs_embeds' (B, L, H), got {sorted(inputs)}"
        )
    return tokens


def _clean(inputs: Inputs, name: str) -> dict[str, Any]:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{name}: expected a mapping of the model's inputs, got {type(inputs).__name__}")
    refused = sorted(_REFUSED_KEYS & inputs.keys())
    if refused:
        raise ValueError(f"{name}: expected the inputs of a whole sequence, got {refused}")
    return {key: value for key, value in inputs.items() if value is not None and key not in _IGNORED_KEYS}


def _as_batch(inputs: dict[str, Any], name: str) -> _Batch:
    tokens = _tokens(inputs, name)
    return _Batch(inputs, tokens.shape[0], tokens.shape[1])


def _join(audio: _Batch, text: _Batch, *, pad_left: bool = False) -> _Batch:
    """The rows of both paths as one batch, the shorter path padded to the longer one's length.

    Tensors are concatenated along the batch; features of audio need not have one entry a row (transformers' audio LMs
    take them flattened, in the order of their placeholders), and may be missing on the negative path.  Anything that is
    not a tensor has to be the same on both paths.
    """
    length = max(audio.length, text.length)
    need_mask = audio.length != text.length
    first = _pad(audio, length, left=pad_left, need_mask=need_mask)
    second = _pad(text, length, left=pad_left, need_mask=need_mask)
    if ("attention_mask" in first) != ("attention_mask" in second):
        for batch, inputs in ((audio, first), (text, second)):
            inputs.setdefault("attention_mask", _ones_mask(batch))
    joined: dict[str, Any] = {}
    for key in [*first, *(key for key in second if key not in first)]:
        if key not in first or key not in second:
            if key in _SEQUENCE_PADDING:
                raise ValueError(f"text_inputs: expected {key!r} on both paths or on neither, got it on one only")
            joined[key] = first.get(key, second.get(key))
            continue
        joined[key] = _join_values(key, first[key], second[key])
    return _Batch(joined, audio.rows + text.rows, length)


def _join_values(key: str, first: Any, second: Any) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.ndim:
        dimension = _batch_dimension(key, first)
        mine, other = list(first.shape), list(second.shape)
        if len(mine) == len(other):
            mine[dimension] = other[dimension] = 0
        if mine != other:
            raise ValueError(
                f"text_inputs[{key!r}]: expected the trailing shape of the positive path, {tuple(first.shape)}, "
                f"got {tuple(second.shape)}"
            )
        return torch.cat([first, second.to(first.device)], dim=dimension)
    if isinstance(first, list) and isinstance(second, list):
        return [*first, *second]
    if first is not second and not (type(first) is type(second) and bool(first == second)):
        raise ValueError(f"text_inputs[{key!r}]: expected the value of the positive path, {first!r}, got {second!r}")
    return first


def _ones_mask(batch: _Batch) -> Tensor:
    tokens = _tokens(batch.inputs, "inputs")
    return torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)


def _pad(batch: _Batch, length: int, *, left: bool, need_mask: bool) -> dict[str, Any]:
    inputs = dict(batch.inputs)
    if need_mask and "attention_mask" not in inputs:
        inputs["attention_mask"] = _ones_mask(batch)
    missing = length - batch.length
    if not missing:
        return inputs
    for key, padding in _SEQUENCE_PADDING.items():
        value = inputs.get(key)
        if value is None:
            continue
        dimension = _batch_dimension(key, value) + 1
        one_a_token = value.ndim > dimension and value.shape[dimension] == batch.length
        if not one_a_token or (key == "attention_mask" and value.ndim > 2):
            raise ValueError(
                f"inputs[{key!r}]: expected one entry a token ({batch.rows}, {batch.length}) to pad to {length} "
                f"columns, got shape {tuple(value.shape)}"
            )
        shape = list(value.shape)
        shape[dimension] = missing
        filler = value.new_full(shape, padding)
        inputs[key] = torch.cat([filler, value] if left else [value, filler], dim=dimension)
    return inputs


# --------------------------------------------------------------------------------------------------------------------
# The teacher
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DualPathStates:
    """The LM head's inputs at the N positions that predict Y, on both paths: (N, H) each, in the model's dtype."""

    audio_hidden: Tensor
    text_hidden: Tensor


class DualPathTeacher(nn.Module):
    """A frozen audio LM seen on two paths, with the audio and without, in one batched pass.

        z_audio = head(audio_hidden),  z_text = head(text_hidden)      at the positions that predict Y

    Works with any causal LM of transformers (the LM head's input is taken by hooks, the head itself computes nothing)
    and with any module that has `hidden_states_at(index, **inputs) -> (N, H)`, index being row * L + column.

    Args:
        model: the teacher.  It is used in evaluation mode and without gradients; `freeze()` also clears requires_grad.
        negative: makes the inputs of the negative path from those of the positive one:
            `MaskFeatures("input_features")`, `DropKey(...)`, `MarkAbsent()`, or any callable mapping -> mapping that
            keeps the tokens' positions.  None where text_inputs is given on each call.
        rows_per_pass: None runs the 2 B rows of both paths at once; a number splits them into passes of as many rows,
            with one wait for a CUDA device each.
        head: the LM head, where it cannot be read from the model (`LMHead.from_model` says why).
        merge_lora: see `LMHead.from_model`.

    Attributes:
        head: `LMHead`; `teacher.head.keywords("teacher")` are the keywords of `fused_linear_caad_loss`.

    Raises:
        TypeError, ValueError: see `LMHead.from_model`; rows_per_pass is not a positive int.

    Memory beyond the model's own activations: rows_per_pass * L * H for one pass's hidden states, 2 N H for the result.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        negative: Callable[[Inputs], Inputs] | None,
        rows_per_pass: int | None = None,
        head: LMHead | None = None,
        merge_lora: bool = False,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if negative is not None and not callable(negative):
            raise TypeError(f"negative: expected a callable inputs -> inputs or None, got {type(negative).__name__}")
        if rows_per_pass is not None and (not isinstance(rows_per_pass, int) or rows_per_pass < 1):
            raise ValueError(f"rows_per_pass: expected a positive int or None, got {rows_per_pass!r}")
        self.model = model
        self.negative = negative
        self.rows_per_pass = rows_per_pass
        self.head = head if head is not None else LMHead.from_model(model, merge_lora=merge_lora)
        self._post_checked = False
        self.eval()

    def freeze(self) -> DualPathTeacher:
        """Clears requires_grad of every parameter of the teacher (do not share modules with a trained student)."""
        self.model.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> DualPathTeacher:
        """A teacher has no training mode: `student_and_teacher.train()` leaves it in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        inputs: Inputs,
        index: Tensor,
        *,
        text_inputs: Inputs | None = None,
        text_index: Tensor | None = None,
    ) -> DualPathStates:
        """Hidden states of both paths at the positions that predict Y.

        Args:
            inputs: keyword arguments of the model for the positive path, Y forced: `input_ids` (B, L), attention mask,
                audio features.  `labels` and `logits_to_keep` are ignored: there are no logits.
            index: (N,) int64, row * L + column, the positions whose hidden states predict Y (see `answer_index`).
            text_inputs: inputs of the negative path, of another length if need be (the shorter path is padded on the
                right); None makes them with `negative`.  Audio features may be missing if no placeholder is left.
            text_index: (N,) int64 in text_inputs' own length; needed with text_inputs, refused without.

        Returns:
            DualPathStates: audio_hidden and text_hidden, (N, H), without gradient, not aliasing the model's memory.

        Raises:
            ValueError, TypeError: naming the argument; the index is checked against B * L on the CPU only, where
                reading it costs no wait for a device.
        """
        audio = self._positive(inputs)
        if text_inputs is None:
            if self.negative is None:
                raise ValueError("text_inputs: expected the negative path's inputs, as negative is None, got None")
            if text_index is not None:
                raise ValueError("text_index: expected None without text_inputs, got a tensor")
            text = _as_batch(_clean(self.negative(audio.inputs), "negative(inputs)"), "negative(inputs)")
            if (text.rows, text.length) != (audio.rows, audio.length):
                raise ValueError(
                    f"negative: expected it to keep the tokens' shape {(audio.rows, audio.length)}, got "
                    f"{(text.rows, text.length)}; pass text_inputs and text_index instead"
                )
            text_index = index
            same_batch = text.inputs.keys() == audio.inputs.keys()
        else:
            if text_index is None:
                raise ValueError("text_index: expected (N,) positions in text_inputs, got None")
            text = _as_batch(_clean(text_inputs, "text_inputs"), "text_inputs")
            # Rows without audio can share a batch where features are flattened, as in transformers; a model with its
            # own hidden_states_at may want one entry a row.
            same_batch = text.inputs.keys() == audio.inputs.keys() or not self._has_protocol
        _check_index(index, "index", audio)
        _check_index(text_index, "text_index", text)
        if index.shape != text_index.shape:
            raise ValueError(f"text_index: expected as many positions as index, {len(index)}, got {len(text_index)}")
        if not same_batch:
            return DualPathStates(self._states(audio, index), self._states(text, text_index))
        both = _join(audio, text)
        positions = [
            _relocate(index, audio, both, first_row=0),
            _relocate(text_index.to(index.device), text, both, first_row=audio.rows),
        ]
        states = self._states(both, torch.cat(positions))
        return DualPathStates(states[: len(index)], states[len(index) :])

    @property
    def _has_protocol(self) -> bool:
        return callable(getattr(self.model, "hidden_states_at", None))

    def _positive(self, inputs: Inputs) -> _Batch:
        cleaned = _clean(inputs, "inputs")
        positive = getattr(self.negative, "positive", None)
        return _as_batch(cleaned if positive is None else positive(cleaned), "inputs")

    def _states(self, batch: _Batch, index: Tensor) -> Tensor:
        """(N, H) at `index`, in passes of at most rows_per_pass rows."""
        if batch.rows == 0:
            raise ValueError("inputs: expected at least one row, got none")
        if self.rows_per_pass is None or self.rows_per_pass >= batch.rows:
            return self._one_pass(batch, index)
        result: Tensor | None = None
        for start in range(0, batch.rows, self.rows_per_pass):
            stop = min(start + self.rows_per_pass, batch.rows)
            part = batch.slice(start, stop)
            local = index - start * batch.length
            here = ((local >= 0) & (local < part.rows * part.length)).nonzero().squeeze(1)  # waits for a CUDA device
            if len(here):
                states = self._one_pass(part, local[here])
                if result is None:
                    result = states.new_empty(len(index), states.shape[-1])
                result[here.to(states.device)] = states
        return self._one_pass(batch.slice(0, 1), index) if result is None else result  # no position at all: (0, H)

    def _one_pass(self, batch: _Batch, index: Tensor) -> Tensor:
        with _evaluating(self.model):
            if self._has_protocol:
                states = self.model.hidden_states_at(index, **batch.inputs)
                if states.shape[:-1] != index.shape:
                    raise ValueError(
                        f"model.hidden_states_at: expected shape ({len(index)}, H), got {tuple(states.shape)}"
                    )
                return states.detach()
            hidden = self._captured(batch)
        if hidden.shape[:-1] not in ((batch.rows, batch.length), (batch.rows * batch.length,)):
            raise ValueError(
                f"model: expected its LM head to see ({batch.rows}, {batch.length}, H), got {tuple(hidden.shape)}; if "
                "it expands an audio placeholder into several positions, expand placeholders in input_ids beforehand"
            )
        hidden = hidden.reshape(-1, hidden.shape[-1])  # (B * L, H)
        return hidden.index_select(0, index.to(hidden.device))

    def _captured(self, batch: _Batch) -> Tensor:
        options = {"use_cache": False} if _accepts(self.model, "use_cache") else {}
        head = _head_module(self.model)
        probe = None if self._post_checked else _probe_values()
        with _HeadCapture(head, probe=probe) as capture:
            output = self.model(**batch.inputs, **options)
        hidden = capture.hidden()
        if probe is not None:
            self._check_post(capture.seen(output))
        return hidden

    def _check_post(self, seen: Tensor | None) -> None:
        """Once: does the model treat logits after its head as `self.head` says?  (Reads the device that one time.)"""
        if seen is not None:
            expected = self.head.post(_probe_values()).double()
            if not torch.allclose(seen.double().cpu(), expected, rtol=1e-2, atol=1e-6):
                softcap, scale = _fit_post(seen)
                raise ValueError(
                    f"head: expected what the model does to its logits, softcap={softcap} logit_scale={scale:.6g}, got "
                    f"softcap={self.head.softcap} logit_scale={self.head.logit_scale:.6g}; pass head=LMHead(...)"
                )
        self._post_checked = True


def _accepts(model: nn.Module, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _check_index(index: Tensor, name: str, batch: _Batch) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: expected a tensor of torch.int64, got {got}")
    if index.ndim != 1:
        raise ValueError(f"{name}: expected shape (N,), got {tuple(index.shape)}")
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= batch.rows * batch.length:
            raise ValueError(
                f"{name}: expected positions in [0, {batch.rows * batch.length}), {batch.rows} rows of "
                f"{batch.length}, got {low if low < 0 else high}"
            )


def _relocate(index: Tensor, path: _Batch, both: _Batch, *, first_row: int) -> Tensor:
    """A path's own positions as positions in the joined batch, which is padded on the right."""
    row = torch.div(index, max(path.length, 1), rounding_mode="floor")
    return (row + first_row) * both.length + (index - row * path.length)
