"""Answers that a student makes itself, for on-policy distillation: sampled tokens, a batch at a time, with a KV cache.

The random numbers are given, one for each row and token. So an answer depends on the weights, the prompt and its numbers: not on
the other rows of its batch, and not on a generator that something else draws from.

Legend: B rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import is_number, is_positive, is_whole, plain_numbers, shown
from .decoding import generate_with, kept_probabilities, plain_prompts, transformers_model
from .head_layers import is_partitioned
from .model_modes import audio_adapters_on, evaluating
from .paths import Inputs
from .positions import check_lengths

__all__ = ["Sampling", "TokenSampler", "own_answers", "uniform_draws", "unspoken_ids", "until_end"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits z (V,), in this order:

        softmax(z / temperature)  ->  the top_k likeliest  ->  the fewest of them that hold top_p of the rest  ->  one of these

    A value out of range raises ValueError or TypeError with its name.
    """

    temperature: float = 1.0  # 0 = always the likeliest token
    top_k: int = 0  # 0 = all tokens
    top_p: float = 1.0  # in (0, 1]; 1 = all tokens
    max_new_tokens: int = 64  # an answer that has not ended by then is cut off

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            if not is_number(getattr(self, name)):
                raise TypeError(f"{name}: expected a number, got {type(getattr(self, name)).__name__}")
        for name in ("top_k", "max_new_tokens"):
            if not is_whole(getattr(self, name)):
                raise TypeError(f"{name}: expected an int, got {type(getattr(self, name)).__name__}")
        if self.temperature != 0 and not is_positive(self.temperature):
            raise ValueError(f"temperature: expected a finite number >= 0, got {shown(self.temperature)}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected >= 1, got {self.max_new_tokens}")
        plain_numbers(self)


def uniform_draws(seeds: Sequence[int], count: int) -> Tensor:
    """(len(seeds), count) float64 in [0, 1), on the CPU: row r depends on `seeds[r]` alone, below 2^63."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.float64)


class TokenSampler:
    """Chooses the next token of each row; call it once for each new column.

    The token is the first one, in the order of ids, at which the summed probability exceeds the row's number.

    Args:
        sampling: temperature, top_k and top_p.
        draws: (B, T) float64 in [0, 1).
        suppressed: ids that are never chosen, such as placeholders of audio; ids beyond V are allowed here.
    """

    def __init__(self, sampling: Sampling, draws: Tensor, *, suppressed: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._draws = draws
        self._suppressed = sorted(set(suppressed))
        self._dropped: Tensor | None = None  # those of them that the logits have, where the logits are
        self._column = 0
        self._without: Tensor | None = None  # (B,) rows that once had no token to choose

    def choose(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B,) int64."""
        scores = logits.float()
        if self._dropped is None:
            known = [token for token in self._suppressed if token < scores.shape[1]]
            self._dropped = torch.tensor(known, dtype=torch.int64, device=scores.device)
            self._draws = self._draws.to(scores.device)
        scores = scores.index_fill(1, self._dropped, -torch.inf)
        draws = self._draws[:, self._column]
        self._column += 1
        if self._sampling.temperature == 0:
            best, token = scores.max(dim=-1)  # NaN where one of the row is NaN
            self._note(~best.isfinite())
            return token
        sampling = self._sampling
        kept = kept_probabilities(scores, sampling.temperature, top_k=sampling.top_k or None, top_p=sampling.top_p)
        sums = kept.double().cumsum(dim=-1)  # (B, V)
        total = sums[:, -1]
        self._note(~(total > 0))  # NaN where a logit is NaN or infinite, or all are -inf
        # Below the sum of all, so that the token found has a probability above 0.
        wanted = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(sums, wanted[:, None], right=True).squeeze(1).clamp_(max=scores.shape[1] - 1)

    def _note(self, without: Tensor) -> None:
        self._without = without if self._without is None else self._without | without

    def check(self) -> None:
        """ValueError where a row had a NaN or infinite logit, or -inf alone. Call it last: it waits for the device."""
        if self._without is not None and bool(self._without.any()):
            rows = self._without.nonzero()[:, 0].tolist()
            raise ValueError(f"logits: expected finite numbers, or -inf for some tokens; not so in rows {rows}")

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """As a logits processor of transformers: all but the chosen token is -inf."""
        return torch.full_like(logits, -torch.inf).scatter_(1, self.choose(logits)[:, None], 0.0)


def until_end(tokens: Tensor, end_ids: Iterable[int]) -> list[list[int]]:
    """Each row of (B, T) up to its first end token, which is kept; a row without one is cut off at T and stays whole."""
    ends = set(end_ids)
    rows = tokens.tolist()
    lengths = [next((n for n, token in enumerate(row, 1) if token in ends), len(row)) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@torch.no_grad()
def own_answers(
    model: nn.Module,
    inputs: Inputs,
    draws: Tensor,
    *,
    sampling: Sampling,
    end_ids: Sequence[int],
    suppressed: Iterable[int] = (),
) -> list[list[int]]:
    """Answers that `model` makes itself to a batch of prompts, by its own `generate`, in evaluation mode.

    The generation config of the model has no effect; its positions and caches are those of its family.

    Args:
        model: a transformers LM that can generate, with or without a LoRA of PEFT.
        inputs: the prompts, padded on either side; without `position_ids`, which follow from the attention mask.
        draws: (B, max_new_tokens), see `uniform_draws`.
        sampling: how tokens are chosen.
        end_ids: an answer ends with any of these.
        suppressed: ids that are never chosen.

    Returns:
        B lists of ids. One whose last id is no end was cut off after `sampling.max_new_tokens`.

    Raises:
        ValueError, TypeError: for a bad argument, with its name; for a model without `generate`; where a row's positions would
            depend on the longest row (rope types "longrope" and "dynamic"); where the model's logits are NaN or infinite.

    Memory: the KV cache of B rows.
    """
    base = transformers_model(model)
    prompts = plain_prompts(inputs)
    if draws.shape != (prompts.rows, sampling.max_new_tokens):
        raise ValueError(f"draws: expected ({prompts.rows}, {sampling.max_new_tokens}), got {tuple(draws.shape)}")
    if not end_ids:
        raise ValueError("end_ids: expected at least one id that ends an answer, got none")
    lengths = prompts.inputs["attention_mask"].sum(1)
    check_lengths(base, int(lengths.min()), int(lengths.max()) + sampling.max_new_tokens - 1)
    sampler = TokenSampler(sampling, draws, suppressed=set(suppressed) - set(end_ids))
    ends = [int(token) for token in end_ids]
    with evaluating(base), audio_adapters_on(base):
        tokens = generate_with(
            base, prompts, sampler, sampling.max_new_tokens, ends, ends[0], use_cache=True, synced_gpus=_synced(base)
        )
    sampler.check()
    return until_end(tokens, ends)


def _synced(model: nn.Module) -> bool | None:
    """transformers keeps the ranks of a sharded model in step. With whole weights a rank must not wait for the others."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    sharded = any(is_partitioned(parameter) or hasattr(parameter, "placements") for parameter in model.parameters())
    return None if sharded else False


def unspoken_ids(tokenizer: Any, end_ids: Iterable[int], vocab_size: int) -> set[int]:
    """Ids below `vocab_size` that no answer has: special tokens, tokens beside the vocabulary, and ids behind the last token.

    The ends of an answer are not among them. An answer with a placeholder of audio would be read as one more clip.
    """
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()  # mistral-common has none beside its special tokens
    beside = {*tokenizer.all_special_ids, *added.values()}
    # Not all ids are in get_vocab(): in mistral-common's several bytes have one name.
    last = max(len(tokenizer) - 1, *tokenizer.get_vocab().values(), *beside)
    return {*beside, *range(last + 1, vocab_size)} - set(end_ids)
