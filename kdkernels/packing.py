"""Several samples side by side in one row, instead of one sample in each row with padding behind it.

transformers keeps the samples apart. Without an attention mask, and with position ids that restart, its masks are block-diagonal
(SDPA, eager, flex), and flash-attention runs its varlen kernel.

Legend: B samples, one a row of L columns with padding; R packed rows of P columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .paths import SEQUENCE_PADDING, PathBatch, tokens_of


def fill_bins(lengths: Sequence[int], capacity: int, *, keep_order: bool = False) -> list[list[int]]:
    """Numbers of the samples in each bin of at most `capacity` tokens; a longer sample makes that the capacity.

    First-fit decreasing, or with `keep_order` next-fit, which leaves the samples in their order. The fullest bin is then made
    as small as the number of bins allows, since the others are padded to it.

    Raises:
        ValueError: no sample, or a capacity below 1.
    """
    if not lengths:
        raise ValueError("lengths: expected at least one sample, got none")
    if capacity < 1:
        raise ValueError(f"capacity: expected at least 1 token, got {capacity}")
    order = list(range(len(lengths)))
    if not keep_order:
        order.sort(key=lambda sample: -lengths[sample])  # a stable sort: the same bins every time

    def fitted(size: int) -> list[list[int]]:
        bins: list[list[int]] = []
        room: list[int] = []
        for sample in order:
            first = max(0, len(bins) - 1) if keep_order else 0
            found = next((b for b in range(first, len(bins)) if room[b] >= lengths[sample]), None)
            if found is None:
                found = len(bins)
                bins.append([])
                room.append(size)
            bins[found].append(sample)
            room[found] -= lengths[sample]
        return bins

    low, high = max(lengths), max(capacity, *lengths)
    fewest = len(fitted(high))
    while low < high:
        middle = (low + high) // 2
        if len(fitted(middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return fitted(high)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of B padded rows stand in R packed ones.

    Attributes:
        bins: the samples of each packed row, in their order there.
        lengths: tokens of each sample.
        place: (B, L) int64, row * P + column of each token in the packed rows; -1 where there is padding.
        source: (R, P) int64, row * L + column of the token that stands there; -1 behind the last one.
        number: (R, P) int64, 1 for the tokens of a row's first sample, 2 for the second's, ...; 0 behind the last one.
    """

    bins: list[list[int]]
    lengths: list[int]
    place: Tensor
    source: Tensor
    number: Tensor

    @classmethod
    def of_mask(cls, mask: Tensor, capacity: int | None, *, keep_order: bool = False) -> Packing:
        """Packs the tokens where `mask` (B, L) is not 0 into bins of at most `capacity` tokens (`fill_bins`); None = one row.

        Reads the number of tokens of each row, which is one wait for a CUDA device.
        """
        mask = mask.bool()
        lengths = mask.sum(1).tolist()
        bins = [list(range(len(lengths)))] if capacity is None else fill_bins(lengths, capacity, keep_order=keep_order)
        columns = max(1, max(sum(lengths[sample] for sample in samples) for samples in bins))
        starts, numbers = [0] * len(lengths), [0] * len(lengths)
        for row, samples in enumerate(bins):
            column = 0
            for n, sample in enumerate(samples, start=1):
                starts[sample], numbers[sample] = row * columns + column, n
                column += lengths[sample]
        device, size = mask.device, len(bins) * columns
        start, number = torch.tensor([starts, numbers], device=device)[..., None].unbind(0)  # (B, 1)
        place = (start + mask.cumsum(1) - 1).where(mask, -1)

        def laid(values: Tensor, behind: int) -> Tensor:
            """(B, L) of the tokens as (R, P); padding goes to one more place, which is cut off."""
            out = values.new_full((size + 1,), behind)
            out.scatter_(0, place.where(mask, size).flatten(), values.flatten())
            return out[:size].view(len(bins), columns)

        source = laid(torch.arange(mask.numel(), device=device).view(mask.shape), -1)
        return cls(bins, lengths, place, source, laid(number.expand(mask.shape), 0))

    def take(self, values: Tensor, *, fill: float | None = None) -> Tensor:
        """(B, L, ...) of the padded rows as (R, P, ...); behind the last sample `fill`, or any value for None."""
        taken = values.flatten(0, 1)[self.source.clamp(min=0)]
        if fill is None:
            return taken
        behind = self.source < 0
        return taken.masked_fill(behind.view(behind.shape + (1,) * (taken.dim() - 2)), fill)

    def positions(self) -> Tensor:
        """(R, P) int64: every sample counts from 0; 0 behind the last one."""
        counted = (self.place >= 0).cumsum(1) - 1
        return self.take(counted, fill=0)

    def at(self, index: Tensor) -> Tensor:
        """Positions (N,), row * L + column of the padded rows, as row * P + column of the packed ones.

        Raises:
            ValueError: one of them is padding; looked at on the CPU only.
        """
        found = self.place.flatten()[index.to(self.place.device)]
        if found.device.type == "cpu" and (found < 0).any():
            wrong = int(index[(found < 0).to(index.device)][0])
            row, column = divmod(wrong, self.place.shape[1])
            raise ValueError(f"index: expected positions of tokens, got padding at row {row}, column {column}")
        return found

    def cumulative_lengths(self) -> Tensor:
        """(B + 1,) int32 on the device, where each sample begins in one packed row: flash-attention's cu_seqlens."""
        lengths = [self.lengths[sample] for samples in self.bins for sample in samples]
        return torch.tensor([0, *lengths], device=self.place.device).cumsum(0, dtype=torch.int32)


def pack_batch(batch: PathBatch, capacity: int | None, *, position_grids: int = 1) -> tuple[PathBatch, Packing]:
    """A model's inputs in packed rows, and where its tokens went.

    The rows keep their order: transformers' audio LMs take features in the order of their placeholders.

    Args:
        batch: with input_ids or inputs_embeds, and an attention mask (B, L) or none.
        capacity: see `Packing.of_mask`.
        position_grids: 4 for multimodal rotary positions (text, time, height, width); all count alike here, as they do for
            audio and text.

    Raises:
        ValueError: positions given by the caller, or a mask that is not (B, L).
    """
    inputs = dict(batch.inputs)
    if "position_ids" in inputs:
        raise ValueError("inputs['position_ids']: expected none with pack_tokens, which makes them, got a tensor")
    tokens = tokens_of(inputs, "inputs")
    mask = inputs.pop("attention_mask", None)
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if tuple(mask.shape) != (batch.rows, batch.length):
        raise ValueError(
            f"inputs['attention_mask']: expected ({batch.rows}, {batch.length}) with pack_tokens, got {tuple(mask.shape)}"
        )
    packing = Packing.of_mask(mask, capacity, keep_order=True)
    packed: dict[str, Any] = {
        key: packing.take(value, fill=SEQUENCE_PADDING[key]) if key in SEQUENCE_PADDING else value
        for key, value in inputs.items()
    }
    positions = packing.positions()
    packed["position_ids"] = positions if position_grids == 1 else positions.expand(position_grids, -1, -1)
    return PathBatch(packed, *positions.shape), packing
