"""How to call any causal LM of transformers: rows of one length, the name of its KV cache, and what its LM head computes."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdkernels.teacher import LMHead


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, L) int64, padded on the right with id 0."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def cache_keyword(model: nn.Module) -> str:
    """The argument of `model.forward` that takes its cache: transformers 5.24 renamed `past_key_values` to `cache`."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in parameters), "past_key_values")


def has_only_attention(lm: nn.Module) -> bool:
    """Whether keys and values are all that `lm` keeps of a text, as far as its config says."""
    kinds = set(getattr(lm.config, "layer_types", None) or ())
    return kinds <= {"full_attention", "sliding_attention"} and cache_keyword(lm.get_decoder()) != "cache_params"


def check_token_ids(ids: Iterable[int], lm: nn.Module, tokenizer: PreTrainedTokenizerBase, *, what: str = "") -> None:
    """ValueError where a token has no row in the embeddings of `lm`; `what` begins the message."""
    highest, rows = max(ids, default=0), lm.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise ValueError(
            f"{what}tokenizer: expected ids below {rows}, the number of the language model's embeddings, got {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)!r}) from a tokenizer of {len(tokenizer)} tokens"
        )


def named_ends(lm: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end a text: the tokenizer's end of text, and all that the checkpoint's generation config names."""
    from kdkernels.decoding import eos_ids_of

    named = eos_ids_of(lm, None) if getattr(lm, "generation_config", None) is not None else []
    return {int(token) for token in (tokenizer.eos_token_id, *named) if token is not None}


class LogitPost(NamedTuple):
    """What a language model does to the output of its LM head: softcap * tanh(scale * z / softcap), or scale * z."""

    softcap: float | None
    scale: float

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


_ASKED: weakref.WeakKeyDictionary[nn.Module, LogitPost] = weakref.WeakKeyDictionary()


def logit_post(model: nn.Module) -> LogitPost:
    """What `model` (a causal LM, or a speech LM around one) does to its LM head's output.

    The model is asked the first time, by forward passes of one token; so ask before its weights are sharded.

    Raises:
        ValueError: its logits are not those of its LM head on its decoder's last states, so nothing here can rebuild them.
    """
    from kdkernels.head_capture import logit_post as ask

    lm = getattr(model, "lm", model)
    if lm not in _ASKED:
        post = LogitPost(*ask(lm))
        _check_logits(lm, post)
        _ASKED[lm] = post
    return _ASKED[lm]


def read_head(model: nn.Module) -> LMHead:
    """The LM head of `model` as it is now, for the losses; arguments and errors as in `logit_post`, and those of `LMHead`."""
    from kdkernels.teacher import LMHead

    post = logit_post(model)
    head = LMHead.from_model(getattr(model, "lm", model), probe=False)
    return dataclasses.replace(head, softcap=post.softcap, logit_scale=post.scale)


class CurrentHead:
    """The LM head of `model` as it is at each call, on its device and in its precision; arguments and errors as in `read_head`.

    It is asked what it computes when it is made, and again after its modules, parameters or adapters have changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state: Any = None
        self()

    def __call__(self) -> LMHead:
        from kdkernels.head_layers import head_module, head_parameters, head_state

        module = head_module(getattr(self._model, "lm", self._model))
        state = head_state(module)
        if state != self._state:
            self._read, self._state = read_head(self._model), state
        weight, bias = head_parameters(module)
        return dataclasses.replace(self._read, weight=weight, bias=bias)


@torch.no_grad()
def _check_logits(lm: nn.Module, post: LogitPost) -> None:
    from kdkernels.model_modes import evaluating

    if not hasattr(lm, "get_decoder"):
        return
    head = lm.get_output_embeddings()
    token = torch.zeros((1, 1), dtype=torch.int64, device=next(head.parameters()).device)
    inputs = {"input_ids": token, "attention_mask": torch.ones_like(token), "use_cache": False}
    try:
        with evaluating(lm):
            seen = lm(**inputs).logits.double()
            rebuilt = post(head(lm.get_decoder()(**inputs).last_hidden_state)).double()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return  # a model that takes no bare token
    # 2e-2: in bfloat16 each side rounds by 2^-9 in every layer.
    if seen.shape != rebuilt.shape or not (seen - rebuilt).norm() <= 2e-2 * seen.norm():
        raise ValueError(
            f"lm: expected a language model whose logits are those of its LM head on its decoder's last states, with "
            f"softcap={post.softcap} and logit_scale={post.scale:g}; got other logits from {type(lm).__name__}"
        )
