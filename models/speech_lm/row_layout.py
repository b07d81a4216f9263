"""How the rows of a batch are laid out for the language model's body: padded, after cached prefixes, or packed.

    plain_layout      rows as the caller gave them, or packed side by side
    prefixed_layout   the text before the audio comes as cached keys and values, the rest as tokens
    continued_layout  new tokens after a call with cached prefixes

Legend: B rows, L columns of the caller, S columns that are run, P columns of cached states before them; R packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kdkernels.packing import Packing
from models.speech_lm.prefix_cache import PrefixCache

Packer = Callable[[Tensor], Packing]  # (B, S) mask -> how its rows are packed


class PrefixedCache(DynamicCache):
    """A KV cache that begins with cached prefixes; its columns are not the caller's, so it brings its own mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask  # (B, columns of the cache), or (R, 1, P, columns of the cache) of packed rows


@dataclass
class RowLayout:
    """How rows are laid out.

    Attributes:
        ids, own_mask: (B, S) tokens that are run, and where there are some.
        mask: (B, P + S) over the cached columns and the own ones; None = transformers makes it from the positions.
        position_ids: (B, S).
        past: KV cache or None.
        start: (B,) the caller's column of each row's first token that is run; None = column 0 and S = L.
        continues: the call continues from the caller's own KV cache, which holds the audio.
        packing: how the B rows are packed before they are run; `mask` and `position_ids` are then those of the packed rows.
        grows: more tokens follow behind the cached prefixes and the own tokens.
    """

    ids: Tensor
    own_mask: Tensor
    mask: Tensor | None
    position_ids: Tensor
    past: Any
    start: Tensor | None
    continues: bool
    packing: Packing | None = None
    grows: bool = False

    def scatter(self, hidden: Tensor, columns: int) -> Tensor:
        """Back to the caller's columns, zeros elsewhere."""
        offset = torch.arange(hidden.shape[1], device=hidden.device)
        target = (self.start[:, None] + offset).clamp(max=columns)  # padding goes to an extra column that is cut off
        target = torch.where(self.own_mask.bool(), target, columns)
        out = hidden.new_zeros(hidden.shape[0], columns + 1, hidden.shape[2])
        return out.scatter(1, target[..., None].expand(-1, -1, hidden.shape[2]), hidden)[:, :columns]

    def close_gaps(self) -> None:
        """Move the padding between the columns of each row's tokens in front of them, in the cache and in its mask.

        A sliding window counts columns: tokens that follow must stand right behind the last token of their row.
        """
        order = (self.mask != 0).long().argsort(dim=1, stable=True)  # (B, columns)
        for layer in self.past.layers:
            where = order[:, None, :, None]
            layer.keys, layer.values = (
                states.gather(2, where.expand(-1, states.shape[1], -1, states.shape[3])) for states in (layer.keys, layer.values)
            )
        self.mask = self.past.mask = self.mask.gather(1, order)

    def positions_of(self, index: Tensor, columns: int, limit: int) -> Tensor:
        """`index` (N,), row * L + column of the caller, as numbers among the positions that are run.

        Args:
            columns, limit: L, and B * L.

        Raises:
            ValueError: (on the CPU) out of range, or inside a cached prefix.
        """
        row, column = index // columns, index % columns
        if self.start is not None:
            column = column - self.start[row]
        if index.device.type == "cpu" and len(index):  # elsewhere a look at the values would stall the device
            if index.min() < 0 or index.max() >= limit:
                raise ValueError(f"index: expected values in [0, {limit}), got {index.min()} to {index.max()}")
            if column.min() < 0:
                raise ValueError(
                    "index: expected positions after the first audio token, got some inside the cached prefix"
                )
        index = row * self.ids.shape[1] + column
        return index if self.packing is None else self.packing.at(index)


def check_packable(lm_config: Any, pack_tokens: int, prefix_cache: PrefixCache | None) -> None:
    """ValueError where a language model of this config cannot run packed rows, or not together with a prefix cache."""
    if not isinstance(pack_tokens, int) or pack_tokens < 1:
        raise ValueError(f"pack_tokens: expected a positive int or None, got {pack_tokens!r}")
    kinds = set(getattr(lm_config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"pack_tokens: expected layers of attention, which keep samples apart, got {sorted(kinds)}")
    if prefix_cache is not None and (got := why_not_packed_with_prefixes(lm_config)):
        raise ValueError(f"prefix_cache: expected SDPA without a sliding window where pack_tokens is given, got {got}")


def why_not_packed_with_prefixes(lm_config: Any) -> str | None:
    """What keeps a language model of this config from packed rows behind cached prefixes; None where nothing does."""
    kinds = set(getattr(lm_config, "layer_types", None) or ())
    sliding = "sliding_attention" in kinds or (not kinds and getattr(lm_config, "sliding_window", None) is not None)
    if sliding:
        return "a sliding window"
    return None if lm_config._attn_implementation == "sdpa" else lm_config._attn_implementation


def left_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L) with each row's tokens at its end, whatever side their padding was on."""
    order = (attention_mask != 0).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def full_mask(input_ids: Tensor, attention_mask: Tensor | None, past_columns: int) -> Tensor:
    """(B, past + L) int64; None = no padding."""
    rows, columns = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones(rows, past_columns + columns, dtype=torch.int64, device=input_ids.device)
    if tuple(attention_mask.shape) != (rows, past_columns + columns):
        raise ValueError(
            f"attention_mask: expected ({rows}, {past_columns + columns}), got {tuple(attention_mask.shape)}"
        )
    return attention_mask.long()


def plain_layout(
    input_ids: Tensor, attention_mask: Tensor, past: Any, past_columns: int, pack: Packer | None
) -> RowLayout:
    """Rows in the caller's columns, after those of `past` if it has any; with `pack` packed instead."""
    own_mask = attention_mask[:, past_columns:]
    if pack is not None:
        packing = pack(own_mask)
        return RowLayout(input_ids, own_mask, None, packing.positions(), None, None, False, packing)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past_columns:]
    return RowLayout(input_ids, own_mask, attention_mask, positions, past, None, past_columns > 0)


def prefixed_layout(
    input_ids: Tensor,
    attention_mask: Tensor,
    prefix_cache: PrefixCache,
    placeholder_token_id: int,
    pack: Packer | None,
) -> RowLayout:
    """Each row's text before the audio goes to the left as cached states, the rest to the right as tokens."""
    prefixes, starts, lengths = _split_rows(input_ids, attention_mask, placeholder_token_id)
    device = input_ids.device
    start = torch.tensor(starts, device=device)
    length = torch.tensor(lengths, device=device)
    offset = torch.arange(max(lengths), device=device)
    own_mask = (offset < length[:, None]).long()  # (B, S)
    ids = input_ids.gather(1, (start[:, None] + offset).clamp(max=input_ids.shape[1] - 1))
    positions = torch.tensor([[len(prefix)] for prefix in prefixes], device=device) + offset
    packing = None
    if pack is None:
        cached = prefix_cache.rows(prefixes)
        mask = torch.cat([cached.mask, own_mask], 1)
    else:
        packing = pack(own_mask)
        cached = prefix_cache.packed_rows([[prefixes[sample] for sample in samples] for samples in packing.bins])
        positions = packing.take(positions, fill=0)
        # A query sees its own sample's prefix, and its own sample's tokens up to itself.
        same = packing.number[:, :, None] == torch.cat([cached.mask, packing.number], 1)[:, None]  # (R, P, prefixes + P)
        mask = same.tril(cached.mask.shape[1])[:, None]
    past = PrefixedCache(mask)
    for layer, (keys, values) in enumerate(zip(cached.keys, cached.values, strict=True)):
        past.update(keys, values, layer)
    return RowLayout(ids, own_mask, past.mask, positions, past, start, False, packing)


def _split_rows(
    input_ids: Tensor, attention_mask: Tensor, placeholder_token_id: int
) -> tuple[Sequence[list[int]], list[int], list[int]]:
    """For each row: the tokens before its first audio position, that position's column, and how many tokens follow from there."""
    prefixes: list[list[int]] = []
    starts: list[int] = []
    lengths: list[int] = []
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
        count = sum(mask)
        first = mask.index(1) if count else 0
        if any(value != 1 for value in mask[first : first + count]):
            raise ValueError(f"attention_mask: expected each row's tokens side by side, got gaps in row {row}")
        ids = ids[first : first + count]
        split = ids.index(placeholder_token_id) if placeholder_token_id in ids else 0
        prefixes.append(ids[:split])
        starts.append(first + split)
        lengths.append(count - split)
    return prefixes, starts, lengths


def continued_layout(input_ids: Tensor, attention_mask: Tensor | None, past: PrefixedCache) -> RowLayout:
    """New tokens after a call with `prefix_cache`: of the caller's mask only their own columns are of use."""
    rows, columns = input_ids.shape
    if attention_mask is None:
        attention_mask = past.mask.new_ones(rows, columns)
    if attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
        raise ValueError(f"attention_mask: expected ({rows}, at least {columns}), got {tuple(attention_mask.shape)}")
    own_mask = attention_mask[:, -columns:].long()
    positions = past.mask.sum(1, keepdim=True) + own_mask.cumsum(1) - 1
    past.mask = torch.cat([past.mask, own_mask], 1)
    return RowLayout(input_ids, own_mask, past.mask, positions.clamp(min=0), past, None, True)
