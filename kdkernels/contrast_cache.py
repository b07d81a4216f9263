"""The teacher's hidden states of both paths on disk: for another epoch, alpha or lambda the teacher does not run again.

The teacher is frozen and Y is fixed, so audio_hidden and text_hidden at the N positions that predict Y say all about it.  With
the teacher's LM head they give the exact distribution over the whole vocabulary, in 2 * H * 2 bytes a token (bf16). Stored logits
would take 2 * V * 2.

A cache is a folder of shards (kdkernels/shards.py):

    cache.json                     format version (2; 3 with one path), fingerprint, hidden size, dtype, layers; a sample of the
                                   teacher's LM head, if the writer was given it
    shard-PART-00000.safetensors   audio_hidden (R, H), text_hidden (R, H), target (R,): whole samples, one by one; with layers
                                   audio_layers and text_layers (R, K, H); in float8 the scale of each row beside each.
                                   A cache of one path (plain distillation) has no text_hidden and no text_layers
    index-PART.jsonl               one line a finished shard

Legend: R rows of a shard, n rows of a sample, N rows asked for, B samples asked for, K layers, H hidden width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .lm_head import LMHead
from .shards import CorruptCacheError, Header, Kind, Layout, ShardReader, ShardWriter, canonical, is_count

__all__ = ["CachedStates", "ContrastCache", "ContrastCacheWriter", "CorruptCacheError"]

FORMAT_VERSION = 2
_ONE_PATH_VERSION = 3  # a reader of format 2 would look for text_hidden
_MARK = "kdkernels_contrast_cache"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8_e4m3fn": torch.float8_e4m3fn}
_FLOAT8_MAX = 448.0
_HEAD = "teacher_head"
_HEAD_VALUES = 64
_HEAD_RTOL, _HEAD_ATOL = 2**-7, 1e-6  # the rounding of a head to bfloat16 or float16, and of what is subnormal there


def _layout(header: Header) -> Layout | None:
    layers, dtype = header.get("layers"), header.get("dtype")
    if not (
        is_count(header.get("hidden_size"), least=1)
        and isinstance(dtype, str)
        and dtype in _DTYPES
        and isinstance(layers, list)
        and all(is_count(layer) for layer in layers)
    ):
        return None
    paths = ("audio",) if header[_MARK] == _ONE_PATH_VERSION else ("audio", "text")
    shapes: dict[str, tuple[int, ...]] = {f"{path}_hidden": (header["hidden_size"],) for path in paths}
    if layers:
        shapes |= {f"{path}_layers": (len(layers), header["hidden_size"]) for path in paths}
    layout: Layout = {"target": ((), torch.int64), **{name: (shape, _DTYPES[dtype]) for name, shape in shapes.items()}}
    if _DTYPES[dtype] == torch.float8_e4m3fn:
        layout |= {f"{name}_scale": (shape[:-1], torch.float32) for name, shape in shapes.items()}
    return layout


STATES = Kind(
    _MARK, (FORMAT_VERSION, _ONE_PATH_VERSION), "contrast cache",
    f"hidden_size, one of {', '.join(_DTYPES)} as dtype, and layers", _layout, ("hidden_size", "dtype", "layers"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class CachedStates:
    """What the cache holds of B samples, concatenated in the order asked for.

    Attributes:
        audio_hidden, text_hidden: (N, H) on the CPU, in the cache's dtype (float32 where that is float8).
        target: (N,) int64, the tokens of Y that the rows predict.
        lengths: (B,) int64, rows of each sample; N is their sum.
        audio_layers, text_layers: (N, K, H) of the cache's layers; None in a cache without.
        text_hidden and text_layers are None in a cache of one path.
    """

    audio_hidden: Tensor
    text_hidden: Tensor | None
    target: Tensor
    lengths: Tensor
    audio_layers: Tensor | None = None
    text_layers: Tensor | None = None


class ContrastCache(ShardReader):
    """Reader of a cache folder, memory-mapped: only the rows asked for are read.

    Args:
        folder: a folder that a `ContrastCacheWriter` has written. If a writer is still at work, its finished shards can be read.
        fingerprint: the dict that the writer has to have got, or None to accept any.
        verify_checksums: read every shard once and compare its sha256 (about 1 s a GB); otherwise sizes alone.

    Attributes:
        fingerprint (dict), hidden_size (int), dtype (torch.dtype), layers (tuple of int), bytes (int, of all shards),
        text_path (bool, whether the negative path is stored).

    Raises:
        ValueError: no cache in the folder, another format version, or another fingerprint (differing keys are listed).
        CorruptCacheError: a ValueError of kdkernels.shards; names the shard that is missing, truncated or altered.
        ImportError: safetensors is not installed.
    """

    kind = STATES

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any] | None = None,
        verify_checksums: bool = True,
    ):
        super().__init__(folder, fingerprint=fingerprint, verify_checksums=verify_checksums)
        self.hidden_size: int = self._header["hidden_size"]
        self.dtype: torch.dtype = _DTYPES[self._header["dtype"]]
        self.layers: tuple[int, ...] = tuple(self._header["layers"])
        self.text_path: bool = self._header[_MARK] != _ONE_PATH_VERSION

    @staticmethod
    def writer(folder: str | os.PathLike[str], **options: Any) -> ContrastCacheWriter:
        """`ContrastCacheWriter(folder, **options)`."""
        return ContrastCacheWriter(folder, **options)

    @staticmethod
    def estimate_bytes(
        *, tokens: int, hidden_size: int, dtype: torch.dtype = torch.bfloat16, layers: int = 0, text_path: bool = True
    ) -> int:
        """Bytes on disk of `tokens` positions: the paths, `layers` layers of each, targets; without the shards' headers."""
        row = hidden_size * _dtype_name(dtype, "dtype")[1] + (4 if dtype == torch.float8_e4m3fn else 0)
        return tokens * ((2 if text_path else 1) * (1 + layers) * row + 8)

    def check_head(self, head: LMHead) -> None:
        """Is this the LM head of the teacher whose states these are? See `teacher_head` of the writer.

        Does nothing where the cache has no sample of its teacher's head. Waits for a CUDA device.

        Raises:
            ValueError: `teacher_head` has another shape, or other values than rounding to bfloat16 explains.
        """
        if (held := self._header.get(_HEAD)) is not None:
            _check_head(self.folder, _head_sample(head), held)

    def __getitem__(self, sample_id: str) -> CachedStates:
        return self.get([sample_id])

    def get(self, sample_ids: Sequence[str]) -> CachedStates:
        """The states of some samples, in the order given; an id may be asked for more than once.

        Returns:
            CachedStates: fresh tensors.

        Raises:
            KeyError: an id the cache does not hold.
            TypeError: sample_ids is a single string.
        """
        places, lengths = self._places(sample_ids)
        total = int(lengths.sum())
        packed = self.dtype == torch.float8_e4m3fn
        dtype = torch.float32 if packed else self.dtype
        found = {name: torch.empty(total, *shape, dtype=dtype) for name, shape in self._states().items()}
        found["target"] = torch.empty(total, dtype=torch.int64)
        filled = 0
        for shard, first, rows in places:
            mapped = self._shard(shard)
            here, there = slice(filled, filled + rows), slice(first, first + rows)
            for name, destination in found.items():
                stored = mapped[name][there]
                if packed and name != "target":
                    stored = stored.float() * mapped[f"{name}_scale"][there][..., None]
                destination[here] = stored
            filled += rows
        return CachedStates(text_hidden=found.pop("text_hidden", None), **found, lengths=lengths)

    def _states(self) -> dict[str, tuple[int, ...]]:
        """The shape of one position, by the tensor's name."""
        return {name: shape for name, (shape, _) in self._layout.items() if name.endswith(("_hidden", "_layers"))}


class ContrastCacheWriter(ShardWriter):
    """Writes a cache, shard by shard; started again on the same folder it goes on after the last finished shard.

        with ContrastCache.writer(folder, fingerprint={...}, hidden_size=576, teacher_head=teacher.head) as writer:
            for batch in batches:
                if all(sample_id in writer for sample_id in batch.ids): continue
                ...
                writer.add(sample_id, audio_hidden, text_hidden, target)

    Args:
        folder: made if missing.
        fingerprint: what determines the states, JSON values by name: model, tokenizer, prompt, Y, ... A folder with another
            fingerprint raises ValueError.
        hidden_size: H.
        dtype: of the stored states. torch.float32 gives float32 states back bit for bit. torch.bfloat16 takes half of the bytes.
            torch.float8_e4m3fn with a float32 scale for each row takes a quarter; `python -m models cache --measure` says what
            that costs in accuracy.
        layers: numbers of the teacher's layers whose states are stored as well, from 0 on. A negative one raises ValueError: the
            cache does not know how many layers the teacher has.
        text_path: False stores one path, for plain distillation: half the bytes.
        teacher_head: the LM head that goes with the states, or None. 64 values of its weight are written, so that `CAADTrainer`
            and `project_cache` refuse the head of another teacher. They accept one that differs by less than 1% there, such as
            the same head in another dtype.
        shard_mib: size at which a shard is closed. This much is held in memory, and a kill can lose it.
        part: name of this writer's own shards and index, where several processes write one cache ("rank0", ...). Samples that
            other parts have finished before this writer is opened are in the cache for it too.
        verify_checksums: read the existing shards and compare their sha256. A bad one is dropped with a warning, and its samples
            count as missing.

    Raises:
        ValueError: another fingerprint, hidden size, dtype, teacher_head or format version than the folder's.
        RuntimeError: another writer of this part is at work in the folder.
        ImportError: safetensors is not installed.
    """

    kind = STATES

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any],
        hidden_size: int,
        dtype: torch.dtype = torch.bfloat16,
        layers: Sequence[int] = (),
        text_path: bool = True,
        teacher_head: LMHead | None = None,
        shard_mib: float = 256.0,
        part: str = "0",
        verify_checksums: bool = True,
    ):
        if not is_count(hidden_size, least=1):
            raise ValueError(f"hidden_size: expected a positive int, got {hidden_size!r}")
        if not (isinstance(layers, Sequence) and all(is_count(layer) for layer in layers)):
            raise ValueError(f"layers: expected numbers of layers from 0 on, got {layers!r}")
        dtype_name, _ = _dtype_name(dtype, "dtype")
        self.hidden_size, self.dtype, self.layers, self.text_path = hidden_size, dtype, tuple(layers), text_path
        header = {
            _MARK: FORMAT_VERSION if text_path else _ONE_PATH_VERSION,
            "fingerprint": canonical(fingerprint),
            "hidden_size": hidden_size,
            "dtype": dtype_name,
            "layers": list(self.layers),
        }
        if teacher_head is not None:
            if not isinstance(teacher_head, LMHead):
                raise TypeError(f"teacher_head: expected an LMHead or None, got {type(teacher_head).__name__}")
            if teacher_head.weight.shape[1] != hidden_size:
                raise ValueError(
                    f"teacher_head: expected a weight (V, {hidden_size}), got {tuple(teacher_head.weight.shape)}"
                )
            header[_HEAD] = _head_sample(teacher_head)
        super().__init__(folder, header=header, shard_mib=shard_mib, part=part, verify_checksums=verify_checksums)

    def add(
        self,
        sample_id: str,
        audio_hidden: Tensor,
        text_hidden: Tensor | None,
        target: Tensor,
        *,
        audio_layers: Tensor | None = None,
        text_layers: Tensor | None = None,
        content: str = "",
    ) -> None:
        """Takes a sample; it is on disk when its shard is full, or after `flush()`.

        Args:
            sample_id: not in the cache yet.
            audio_hidden, text_hidden: (n, H) floating point on any device, rounded to the cache's dtype. text_hidden is None in a
                cache of one path.
            target: (n,) int64, the tokens of Y they predict.
            audio_layers, text_layers: (n, K, H), where the cache has layers.
            content: a fingerprint of what the states depend on, to be compared later.

        Raises:
            TypeError, ValueError: for a bad argument, with its name. States that are not finite raise ValueError.
        """
        self._check_sample(sample_id, content)
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            raise TypeError(f"target: expected a tensor of torch.int64, got {getattr(target, 'dtype', type(target))}")
        if target.ndim != 1:
            raise ValueError(f"target: expected shape (n,), got {tuple(target.shape)}")
        states: dict[str, Any] = {"audio_hidden": audio_hidden}
        if self.text_path:
            states["text_hidden"] = text_hidden
        for name, given in (("text_hidden", text_hidden), ("text_layers", text_layers)):
            if not self.text_path and given is not None:
                raise ValueError(f"{name}: expected None, in a cache of one path (text_path=False), got a tensor")
        for name, layers in (("audio_layers", audio_layers), ("text_layers", text_layers)):
            if not self.text_path and name == "text_layers":
                continue
            if (layers is not None) != bool(self.layers):
                expected = f"the states of layers {list(self.layers)}" if self.layers else "none, in a cache without layers"
                raise ValueError(f"{name}: expected {expected}, got {'none' if layers is None else 'some'}")
            states |= {name: layers} if self.layers else {}
        tensors = {"target": target.detach().to("cpu", copy=True)}
        for name, hidden in states.items():
            shape = (len(target), len(self.layers), self.hidden_size)
            tensors |= self._stored(name, hidden, sample_id, shape if name.endswith("layers") else (shape[0], shape[2]))
        self._take(sample_id, content, tensors)

    def _compare_versions(self, own: int, found: int) -> None:
        if own != found:
            raise ValueError(
                f"text_path: the cache {self.folder} has another; expected {self.text_path}, got {not self.text_path}"
            )

    def _match_header(self, header: Header) -> Header:
        found = super()._match_header(header)
        if _HEAD in header and _HEAD in found:
            _check_head(self.folder, header[_HEAD], found[_HEAD])
        return found

    def _stored(self, name: str, hidden: Tensor, sample_id: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The tensors that are stored for some states, by their names in the shard."""
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
            got = getattr(hidden, "dtype", type(hidden).__name__)
            raise TypeError(f"{name}: expected a floating point tensor, got {got}")
        if hidden.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(hidden.shape)}")
        if self.dtype != torch.float8_e4m3fn:
            stored = hidden.detach().to("cpu", self.dtype, copy=True)
            finite, tensors = stored, {name: stored}
        else:
            finite = hidden.detach().to("cpu", torch.float32)
            scale = (finite.abs().amax(-1) / _FLOAT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
            tensors = {name: (finite / scale[..., None]).to(self.dtype), f"{name}_scale": scale}
        if not torch.isfinite(finite).all():
            raise ValueError(f"{name}: expected finite states, got inf or NaN in sample {sample_id!r}")
        return tensors


def _head_sample(head: LMHead) -> dict[str, Any]:
    """Values of the weight from its first corner to its last, and its shape."""
    rows, columns = (torch.linspace(0, n - 1, _HEAD_VALUES, dtype=torch.float64).round().long() for n in head.weight.shape)
    device = head.weight.device
    values = head.weight.detach()[rows.to(device), columns.to(device)].to("cpu", torch.float64)
    return {"shape": list(head.weight.shape), "values": values.tolist()}


def _check_head(folder: Path, got: dict[str, Any], held: Any) -> None:
    """ValueError where the sample that a header holds is not of the head that `got` is of."""
    try:
        shape, values = tuple(held["shape"]), torch.tensor(held["values"], dtype=torch.float64)
    except (TypeError, ValueError, KeyError) as error:
        raise CorruptCacheError(f"{folder / 'cache.json'} is damaged: teacher_head has no shape and values") from error
    if shape != tuple(got["shape"]):
        raise ValueError(f"teacher_head: expected that of the cache {folder}, of shape {shape}, got {tuple(got['shape'])}")
    mine = torch.tensor(got["values"], dtype=torch.float64)
    if mine.shape != values.shape or not torch.allclose(mine, values, rtol=_HEAD_RTOL, atol=_HEAD_ATOL):
        raise ValueError(f"teacher_head: expected that of the teacher whose states the cache {folder} holds, got other weights")


def _dtype_name(dtype: torch.dtype, argument: str) -> tuple[str, int]:
    for name, known in _DTYPES.items():
        if dtype == known:
            return name, known.itemsize
    raise ValueError(f"{argument}: expected torch.bfloat16, torch.float32 or torch.float8_e4m3fn, got {dtype}")
