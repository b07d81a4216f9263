"""Keys and values of the text that stands before the audio, computed once for a frozen language model.

The prompt's text comes first (models/data/prompts.py). So its states in the language model depend neither on the clip nor on the
connector's weights, and a training run of many epochs computes them once. Prefixes are looked up by their token ids.

On a CPU each prefix is computed alone. A product with other rows beside it, or with padding, rounds differently. Then the states
would depend on which prefixes were computed together, and a resumed run would have other states than an undisturbed one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from kdkernels.model_modes import evaluating
from models.backbones.causal_lm import cache_keyword, has_only_attention, pad_rows
from models.io_utils import atomic_write_bytes

_MIB = 1 << 20


_FORMAT_VERSION = "1"
_BATCH_SIZE = 16  # prefixes a forward pass, on devices other than the CPU


@dataclass(frozen=True)
class PrefixRows:
    """Prefixes of a batch, one or several a row, padded on the left to the longest row (P tokens; it may be 0).

    Attributes:
        keys, values: one tensor a layer, (B, heads, P, head width), in the language model's dtype; zeros where padded.
        mask: (B, P) int64, 1 at the tokens of a row's first prefix, 2 at those of its second, ...; 0 where padded.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor


@torch.no_grad()
def why_not_cached(lm: nn.Module) -> str | None:
    """Why a `PrefixCache` cannot serve `lm`; None where it can. The model is asked: three tokens at once and in two parts.

    Layers with another state than keys and values (Mamba, linear attention, convolutions) forget the first part.
    """
    decoder, keyword = lm.get_decoder(), cache_keyword(lm.get_decoder())
    if not has_only_attention(lm):
        return "it has other layers than those of full or sliding attention"
    ids = torch.arange(3, device=lm.get_input_embeddings().weight.device)[None]
    mask = torch.ones_like(ids)
    try:
        with evaluating(decoder):
            whole = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, 2]
            past, again = DynamicCache(), DynamicCache()
            decoder(input_ids=ids[:, :2], attention_mask=mask[:, :2], use_cache=True, **{keyword: past})
            states = [(layer.keys, layer.values) for layer in past.layers]
            torch.stack([torch.stack(pair) for pair in states])  # one shape, as `PrefixCache` stores them
            for number, pair in enumerate(states):
                again.update(*pair, number)
            inputs = {"input_ids": ids[:, 2:], "attention_mask": mask, "position_ids": ids[:, 2:], keyword: again}
            parts = decoder(**inputs, use_cache=True).last_hidden_state[:, 0]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        return f"a text in two parts raises {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    # 2e-2: in bfloat16 each side rounds by 2^-9 in every layer.
    if not (parts - whole).double().norm() <= 2e-2 * whole.double().norm():
        return "a text in two parts gives it other states than the whole text"
    return None


class PrefixCache:
    """Store of key/value states by token ids.

    Args:
        lm: the frozen causal language model that computes them.
        max_bytes: limit of the stored tensors' bytes. Prefixes beyond it are computed again each time. Dropping old ones instead
            would empty the cache once an epoch, since training visits all in turn.
        dtype: storage dtype. bfloat16 halves the memory; it rounds keys and values by up to 2^-9 of their size.
        batch_size: prefixes in a forward pass, when missing ones are computed. None = 1 on a CPU: then a prefix's states depend
            on its tokens alone, bit for bit. None = 16 on another device, where small passes are slow.
        autocast_dtype: compute under autocast, for example in bfloat16, where that is faster; None = as the model is.

    Attributes:
        hits, misses: prefixes found and computed so far.
    """

    def __init__(
        self,
        lm: nn.Module,
        *,
        max_bytes: int = 4096 * _MIB,
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: expected >= 0, got {max_bytes}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected >= 1 or None, got {batch_size}")
        self.lm = lm
        self.max_bytes, self.dtype, self.batch_size = max_bytes, dtype, batch_size
        self.autocast_dtype = autocast_dtype
        self.hits = self.misses = 0
        self.nbytes = 0
        self._states: dict[tuple[int, ...], Tensor] = {}  # (layers, 2, heads, P, head width)

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, token_ids: Sequence[int]) -> bool:
        return tuple(token_ids) in self._states

    def fill(self, prefixes: Iterable[Sequence[int]], *, progress: bool = False) -> int:
        """Compute and store the prefixes that are missing, similar lengths together.

        Args:
            prefixes: token ids, duplicates allowed.
            progress: show a bar.

        Returns:
            how many of them are not stored because `max_bytes` is reached.
        """
        wanted = {tuple(prefix) for prefix in prefixes} - {()} - self._states.keys()
        missing = sorted(wanted, key=lambda prefix: (len(prefix), prefix))
        batches = self._batches(missing)
        if progress:
            from tqdm import tqdm

            batches = tqdm(batches, desc="text prefixes", unit="batch")
        for batch in batches:
            if self.nbytes >= self.max_bytes:
                break
            self._compute(batch)
        return sum(prefix not in self._states for prefix in missing)

    def rows(self, prefixes: Sequence[Sequence[int]]) -> PrefixRows:
        """States of the prefixes of a batch, one a row, computed where missing; see `PrefixRows`."""
        return self.packed_rows([[prefix] for prefix in prefixes])

    def packed_rows(self, groups: Sequence[Sequence[Sequence[int]]]) -> PrefixRows:
        """The same with the prefixes of each group side by side in a row."""
        rows = [[tuple(prefix) for prefix in group] for group in groups]
        keys = [key for row in rows for key in row]
        missing = sorted({key for key in keys if key and key not in self._states}, key=len)
        fresh: dict[tuple[int, ...], Tensor] = {}
        for batch in self._batches(missing):
            fresh |= self._compute(batch)
        self.hits += sum(key not in fresh for key in keys if key)
        weight = self.lm.get_input_embeddings().weight
        lengths = [sum(map(len, row)) for row in rows]
        longest = max(lengths, default=0)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        if longest == 0:
            return PrefixRows([], [], mask.to(weight.device))
        states = {key: fresh[key] if key in fresh else self._states[key] for key in set(keys) if key}
        layers, _, heads, _, width = next(iter(states.values())).shape
        padded = torch.zeros(layers, 2, len(rows), heads, longest, width, dtype=self.dtype)
        for row, group in enumerate(rows):
            column = longest - lengths[row]
            for number, key in enumerate(group, start=1):
                if key:
                    padded[:, :, row, :, column : column + len(key)] = states[key]
                    mask[row, column : column + len(key)] = number
                    column += len(key)
        padded = padded.to(weight.device, non_blocking=True).to(weight.dtype)
        return PrefixRows(list(padded[:, 0]), list(padded[:, 1]), mask.to(weight.device))

    def save(self, path: str | os.PathLike[str], *, lm_sha256: str) -> Path:
        """Write the stored prefixes as one safetensors file, atomically, with the identity of the language model."""
        tensors: dict[str, Tensor] = {}
        for number, (ids, state) in enumerate(self._states.items()):
            tensors[f"{number}.ids"] = torch.tensor(ids, dtype=torch.int32)
            tensors[f"{number}.states"] = state.contiguous()
        metadata = {"format": "kdkernels_prefix_cache", "version": _FORMAT_VERSION, "lm_sha256": lm_sha256}
        return atomic_write_bytes(path, save(tensors, metadata=metadata))

    def load(self, path: str | os.PathLike[str], *, lm_sha256: str) -> int:
        """Add the prefixes of a saved file, up to `max_bytes`.

        Returns:
            how many were added.

        Raises:
            ValueError: the file is none of ours, or was made with another language model or dtype.
        """
        added = 0
        with safe_open(path, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            if metadata.get("format") != "kdkernels_prefix_cache" or metadata.get("version") != _FORMAT_VERSION:
                raise ValueError(f"path: {path} is no prefix cache of version {_FORMAT_VERSION}")
            if metadata.get("lm_sha256") != lm_sha256:
                raise ValueError(
                    f"path: {path} belongs to the language model {metadata.get('lm_sha256')}, expected {lm_sha256}"
                )
            numbers = sorted({int(key.split(".")[0]) for key in tensors.keys()})  # noqa: SIM118 - no mapping
            for number in numbers:
                state = tensors.get_tensor(f"{number}.states")
                if state.dtype != self.dtype:
                    raise ValueError(f"path: {path} holds {state.dtype}, expected {self.dtype}")
                ids = tuple(tensors.get_tensor(f"{number}.ids").tolist())
                added += ids not in self._states and self._store(ids, state)
        return added

    def _batches(self, prefixes: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        size = self.batch_size
        if size is None:  # asked here, since the model may have moved since the cache was made
            size = 1 if self.lm.get_input_embeddings().weight.device.type == "cpu" else _BATCH_SIZE
        return [prefixes[start : start + size] for start in range(0, len(prefixes), size)]

    @torch.no_grad()
    def _compute(self, prefixes: list[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """One forward pass over prefixes padded on the right, where causal attention never looks."""
        self.misses += len(prefixes)
        device = self.lm.get_input_embeddings().weight.device
        ids, mask = pad_rows(prefixes)
        decoder = self.lm.get_decoder()
        was_training = decoder.training
        decoder.eval()
        autocast = torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
        try:
            with autocast:
                cache = DynamicCache()  # without a config: it keeps all columns, also those outside a sliding window
                inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), cache_keyword(decoder): cache}
                decoder(**inputs, use_cache=True)
        finally:
            decoder.train(was_training)
        # One copy to the host a batch; (layers, 2, B, heads, P, head width)
        states = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers]).to("cpu", self.dtype)
        result = {}
        for row, prefix in enumerate(prefixes):
            result[prefix] = states[:, :, row, :, : len(prefix)].clone()
            self._store(prefix, result[prefix])
        return result

    def _store(self, ids: tuple[int, ...], state: Tensor) -> bool:
        size = state.numel() * state.element_size()
        if self.nbytes + size > self.max_bytes:
            return False
        self._states[ids] = state
        self.nbytes += size
        return True
