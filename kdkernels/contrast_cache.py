"""The teacher's hidden states of both paths on disk: for another epoch, alpha or lambda the teacher does not run again.

The teacher is frozen and Y is fixed, so audio_hidden and text_hidden at the N positions that predict Y say all about it.  With
the teacher's LM head they give the exact distribution over the whole vocabulary, in 2 * H * 2 bytes a token (bf16). Stored logits
would take 2 * V * 2.

A cache is a folder:

    cache.json                     format version (2; 3 with one path), fingerprint, hidden size, dtype, layers
    shard-PART-00000.safetensors   audio_hidden (R, H), text_hidden (R, H), target (R,): whole samples, one by one; with layers
                                   audio_layers and text_layers (R, K, H); in float8 the scale of each row beside each.
                                   A cache of one path (plain distillation) has no text_hidden and no text_layers
    index-PART.jsonl               one line a finished shard: file, bytes, sha256, [sample id, first row, rows, content] ...

A shard is written to a temporary file, synced and renamed, and only then named in the index.  So after a kill the cache holds
every finished shard and nothing half-written.

A sample's content is a fingerprint that the caller makes of what its states depend on: prompt, audio, Y. It shows whether the
sample has changed since it was stored.

Legend: R rows of a shard, n rows of a sample, N rows asked for, B samples asked for, K layers, H hidden width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = ["CachedStates", "ContrastCache", "ContrastCacheWriter", "CorruptCacheError"]

FORMAT_VERSION = 2
_ONE_PATH_VERSION = 3  # a reader of format 2 would look for text_hidden
_MARK = "kdkernels_contrast_cache"
_MIB = 1 << 20
# Far beyond any fingerprint or shard of samples. A larger file is of another kind, and is not read into memory.
_MAX_HEADER_BYTES = 16 * _MIB
_MAX_INDEX_LINE_BYTES = 64 * _MIB
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8_e4m3fn": torch.float8_e4m3fn}
_FLOAT8_MAX = 448.0
_log = logging.getLogger(__name__)


class CorruptCacheError(ValueError):
    """A file of the cache is missing, truncated or altered; the message names it."""


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


class ContrastCache:
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
        CorruptCacheError: names the shard that is missing, truncated or altered.
        ImportError: safetensors is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any] | None = None,
        verify_checksums: bool = True,
    ):
        _safetensors()
        self.folder = Path(folder)
        header = _read_header(self.folder)
        if fingerprint is not None:
            _check_fingerprint(self.folder, expected=_canonical(fingerprint), got=header["fingerprint"])
        self.fingerprint: dict[str, Any] = header["fingerprint"]
        self.hidden_size: int = header["hidden_size"]
        self.dtype: torch.dtype = _DTYPES[header["dtype"]]
        self.layers: tuple[int, ...] = tuple(header["layers"])
        self.text_path: bool = header[_MARK] != _ONE_PATH_VERSION
        self.bytes = 0
        self._where: dict[str, tuple[str, int, int]] = {}  # sample id -> shard, first row, rows
        self._content: dict[str, str] = {}
        self._rows: dict[str, int] = {}  # shard -> its rows
        self._open_shards: dict[str, dict[str, Tensor]] = {}
        for index_path in sorted(self.folder.glob("index-*.jsonl")):
            for record in _read_index(index_path, header)[0]:
                problem = _shard_problem(self.folder, record, verify_checksums=verify_checksums)
                if problem:
                    raise CorruptCacheError(
                        f"{problem}; write the cache again with the same arguments: its writer keeps the good shards"
                    )
                self._add_record(record)

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

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, sample_id: str) -> CachedStates:
        return self.get([sample_id])

    def rows(self, sample_id: str) -> int:
        """n, the positions of a sample, without reading them."""
        return self._locate(sample_id)[2]

    def content(self, sample_id: str) -> str:
        """The fingerprint of a sample's content that its writer was given; "" if none."""
        self._locate(sample_id)
        return self._content[sample_id]

    def get(self, sample_ids: Sequence[str]) -> CachedStates:
        """The states of some samples, in the order given; an id may be asked for more than once.

        Returns:
            CachedStates: fresh tensors.

        Raises:
            KeyError: an id the cache does not hold.
            TypeError: sample_ids is a single string.
        """
        if isinstance(sample_ids, str):
            raise TypeError(f"sample_ids: expected a sequence of ids, got the string {sample_ids!r}")
        places = [self._locate(sample_id) for sample_id in sample_ids]
        lengths = torch.tensor([rows for _, _, rows in places], dtype=torch.int64)
        total = sum(rows for _, _, rows in places)
        packed = self.dtype == torch.float8_e4m3fn
        dtype = torch.float32 if packed else self.dtype
        found = {name: torch.empty(total, *shape, dtype=dtype) for name, shape in self._state_shapes().items()}
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_shards": {}}  # a DataLoader's worker maps the files itself

    def _add_record(self, record: Mapping[str, Any]) -> None:
        self.bytes += record["bytes"]
        self._rows[record["shard"]] = record["rows"]
        for sample_id, first, rows, content in record["samples"]:
            if sample_id in self._where:
                raise CorruptCacheError(
                    f"{self.folder}: sample {sample_id!r} is in shard {self._where[sample_id][0]} and in "
                    f"{record['shard']}; two parts have written it"
                )
            self._where[sample_id] = (record["shard"], first, rows)
            self._content[sample_id] = content

    def _locate(self, sample_id: str) -> tuple[str, int, int]:
        try:
            return self._where[sample_id]
        except KeyError:
            raise KeyError(f"sample {sample_id!r} is not in the cache {self.folder} ({len(self)} samples)") from None

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one position, by the tensor's name."""
        paths = ("audio", "text") if self.text_path else ("audio",)
        shapes: dict[str, tuple[int, ...]] = {f"{path}_hidden": (self.hidden_size,) for path in paths}
        if self.layers:
            shapes |= {f"{path}_layers": (len(self.layers), self.hidden_size) for path in paths}
        return shapes

    def _shard(self, name: str) -> dict[str, Tensor]:
        if name not in self._open_shards:
            self._open_shards[name] = self._opened(name)
        return self._open_shards[name]

    def _opened(self, name: str) -> dict[str, Tensor]:
        """A shard's tensors, mapped, those that the cache's header promises; without checksums nobody else has looked."""
        path = self.folder / name
        packed = self.dtype == torch.float8_e4m3fn
        states = self._state_shapes()
        expected = {"target": ((), torch.int64), **{key: (shape, self.dtype) for key, shape in states.items()}}
        if packed:
            expected |= {f"{key}_scale": (shape[:-1], torch.float32) for key, shape in states.items()}
        try:
            # get_tensor's rows are read when they are copied; get_slice reads no more, but safetensors 0.8 leaks its bounds.
            file = _safetensors().safe_open(str(path), framework="pt", device="cpu")
            got = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, _safetensors().SafetensorError) as error:
            raise CorruptCacheError(f"shard {path} is altered: {error}") from error
        rows, found = self._rows[name], {key: (tuple(t.shape), t.dtype) for key, t in got.items()}
        if found != {key: ((rows, *shape), dtype) for key, (shape, dtype) in expected.items()}:
            raise CorruptCacheError(f"shard {path} is altered: expected {rows} rows of {expected}, got {found}")
        return got


class ContrastCacheWriter(AbstractContextManager):
    """Writes a cache, shard by shard; started again on the same folder it goes on after the last finished shard.

        with ContrastCache.writer(folder, fingerprint={...}, hidden_size=576) as writer:
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
        layers: numbers of the teacher's layers whose states are stored as well.
        text_path: False stores one path, for plain distillation: half the bytes.
        shard_mib: size at which a shard is closed. This much is held in memory, and a kill can lose it.
        part: name of this writer's own shards and index, where several processes write one cache ("rank0", ...).
        verify_checksums: read the existing shards and compare their sha256. A bad one is dropped with a warning, and its samples
            count as missing.

    Raises:
        ValueError: another fingerprint, hidden size, dtype or format version than the folder's.
        RuntimeError: another writer of this part is at work in the folder.
        ImportError: safetensors is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any],
        hidden_size: int,
        dtype: torch.dtype = torch.bfloat16,
        layers: Sequence[int] = (),
        text_path: bool = True,
        shard_mib: float = 256.0,
        part: str = "0",
        verify_checksums: bool = True,
    ):
        _safetensors()
        if not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size: expected a positive int, got {hidden_size!r}")
        if not shard_mib > 0:
            raise ValueError(f"shard_mib: expected a positive number, got {shard_mib!r}")
        if not part or not all(letter.isalnum() or letter == "_" for letter in part):
            raise ValueError(f"part: expected letters, digits and underscores, got {part!r}")
        dtype_name, _ = _dtype_name(dtype, "dtype")
        self.folder = Path(folder)
        self.hidden_size, self.dtype, self.part, self.layers = hidden_size, dtype, part, tuple(layers)
        self.text_path = text_path
        self._shard_bytes = int(shard_mib * _MIB)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder / f"lock-{part}")
        try:
            header = {
                _MARK: FORMAT_VERSION if text_path else _ONE_PATH_VERSION,
                "fingerprint": _canonical(fingerprint),
                "hidden_size": hidden_size,
                "dtype": dtype_name,
                "layers": list(self.layers),
            }
            self._match_header(header)
            self._records, self._known = self._resume(verify_checksums)
        except BaseException:
            self._lock.close()
            raise
        self._buffer: list[tuple[str, str, dict[str, Tensor]]] = []  # sample id, content, tensors
        self._buffered_bytes = 0

    def __contains__(self, sample_id: object) -> bool:
        """Finished or waiting in this writer's memory."""
        return sample_id in self._known

    def contains(self, sample_id: str) -> bool:
        return sample_id in self

    def __len__(self) -> int:
        return len(self._known)

    def content(self, sample_id: str) -> str | None:
        """The fingerprint of a sample's content that this part of the cache holds; None if it does not hold the sample."""
        return self._known.get(sample_id)

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
        if not isinstance(sample_id, str) or not sample_id:
            raise TypeError(f"sample_id: expected a string that is not empty, got {sample_id!r}")
        if sample_id in self:
            raise ValueError(f"sample_id: expected an id the cache does not hold yet, got {sample_id!r}")
        if not isinstance(content, str):
            raise TypeError(f"content: expected a string, got {content!r}")
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
        self._buffer.append((sample_id, content, tensors))
        self._known[sample_id] = content
        self._buffered_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._buffered_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory as a shard (a smaller one than usual) and names it in the index."""
        if not self._buffer:
            return
        name = self._next_name()
        samples, first = [], 0
        for sample_id, content, tensors in self._buffer:
            samples.append([sample_id, first, len(tensors["target"]), content])
            first += len(tensors["target"])
        joined = {key: torch.cat([tensors[key] for _, _, tensors in self._buffer]) for key in self._buffer[0][2]}
        record = {"shard": name, **_write_shard(self.folder / name, joined), "rows": first, "samples": samples}
        _append(self._index_path, json.dumps(record, ensure_ascii=False).encode() + b"\n")
        _sync_folder(self.folder)
        self._records.append(record)
        self._buffer, self._buffered_bytes = [], 0

    def close(self) -> None:
        """Flushes and lets another writer have the folder."""
        if not self._lock.closed:
            try:
                self.flush()
            finally:
                self._lock.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()  # samples taken before an error are complete: they are kept

    @property
    def _index_path(self) -> Path:
        return self.folder / f"index-{self.part}.jsonl"

    def _next_name(self) -> str:
        taken = {record["shard"] for record in self._records}
        number = len(taken)
        while (name := f"shard-{self.part}-{number:05d}.safetensors") in taken:
            number += 1
        return name

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

    def _match_header(self, header: dict[str, Any]) -> None:
        path = self.folder / "cache.json"
        if not path.exists():
            _write_atomically(path, json.dumps(header, indent=1, ensure_ascii=False).encode())
        got = _read_header(self.folder)  # also after writing: the parts of one cache may start at the same time
        _check_fingerprint(self.folder, expected=header["fingerprint"], got=got["fingerprint"])
        if header[_MARK] != got[_MARK]:
            got_path = not self.text_path
            raise ValueError(f"text_path: the cache {self.folder} has another; expected {self.text_path}, got {got_path}")
        for name in ("hidden_size", "dtype", "layers"):
            if header[name] != got[name]:
                raise ValueError(
                    f"{name}: the cache {self.folder} has another; expected {header[name]}, got {got[name]}"
                )

    def _resume(self, verify_checksums: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """This part's finished shards without bad ones, and their samples' contents; the index is put in order if need be."""
        records, torn = _read_index(self._index_path, _read_header(self.folder))
        good = []
        for record in records:
            problem = _shard_problem(self.folder, record, verify_checksums=verify_checksums)
            if problem:
                _log.warning("%s; its %d samples will be written again", problem, len(record["samples"]))
            else:
                good.append(record)
        if torn or len(good) != len(records):
            lines = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in good]
            _write_atomically(self._index_path, b"".join(lines))
        named = {record["shard"] for record in good}
        for path in self.folder.glob(f"shard-{self.part}-*.safetensors*"):
            if path.is_dir():  # being written at a kill
                shutil.rmtree(path)
            elif path.name not in named:  # bad, or renamed just before a kill
                path.unlink()
        return good, {sample_id: content for record in good for sample_id, _, _, content in record["samples"]}


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"ContrastCache stores its shards with safetensors, which cannot be imported ({error}); "
            "get it with: pip install safetensors"
        ) from error
    return safetensors


def _dtype_name(dtype: torch.dtype, argument: str) -> tuple[str, int]:
    for name, known in _DTYPES.items():
        if dtype == known:
            return name, known.itemsize
    raise ValueError(f"{argument}: expected torch.bfloat16, torch.float32 or torch.float8_e4m3fn, got {dtype}")


def _canonical(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint as JSON gives it back, so that tuples and lists, or int keys and strings, compare equal."""
    if not isinstance(fingerprint, Mapping):
        raise TypeError(f"fingerprint: expected a mapping of JSON values, got {type(fingerprint).__name__}")
    try:
        return json.loads(json.dumps(dict(fingerprint), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise TypeError(f"fingerprint: expected JSON values only, got {error}") from error


def _check_fingerprint(folder: Path, *, expected: dict[str, Any], got: dict[str, Any]) -> None:
    nothing = object()
    differing = [
        f"{key}: expected {_shown(expected, key)}, got {_shown(got, key)}"
        for key in sorted(expected.keys() | got.keys())
        if expected.get(key, nothing) != got.get(key, nothing)
    ]
    if differing:
        raise ValueError(f"fingerprint: the cache {folder} was made from something else; {'; '.join(differing)}")


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "no such key"


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / "cache.json"
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_HEADER_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"folder: expected a contrast cache, got {folder} without cache.json") from None
    if len(data) > _MAX_HEADER_BYTES:
        raise CorruptCacheError(f"{path} is no cache's header: it has more than {_MAX_HEADER_BYTES} bytes")
    header = _parsed(data, str(path))
    version = header.get(_MARK)
    if version not in (FORMAT_VERSION, _ONE_PATH_VERSION):
        raise ValueError(f"folder: expected a contrast cache of format {FORMAT_VERSION} in {folder}, got {version}")
    layers = header.get("layers")
    if not (
        isinstance(header.get("fingerprint"), dict)
        and _is_count(header.get("hidden_size"), least=1)
        and isinstance(header.get("dtype"), str)
        and header["dtype"] in _DTYPES
        and isinstance(layers, list)
        and all(_is_count(layer) for layer in layers)
    ):
        raise CorruptCacheError(
            f"{path} is damaged: expected fingerprint, hidden_size, one of {', '.join(_DTYPES)} as dtype, and layers"
        )
    return header


def _read_index(path: Path, header: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Records of the finished shards, and whether the last line was torn by a kill."""
    if not path.exists():
        return [], False
    part = path.stem.removeprefix("index-")
    records: list[dict[str, Any]] = []
    with open(path, "rb") as file:
        while line := file.readline(_MAX_INDEX_LINE_BYTES + 1):
            where = f"{path}, line {len(records) + 1}"
            if len(line) > _MAX_INDEX_LINE_BYTES:
                raise CorruptCacheError(f"{where} has more than {_MAX_INDEX_LINE_BYTES} bytes")
            if not line.endswith(b"\n"):
                return records, True
            record = _parsed(line, where)
            if problem := _record_problem(record, part, header):
                raise CorruptCacheError(f"{where} is damaged: {problem}")
            records.append(record)
    return records, False


def _parsed(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object of a file that anybody may have written."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{where} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCacheError(f"{where} is not readable JSON: expected an object, got {type(value).__name__}")
    return value


def _record_problem(record: Mapping[str, Any], part: str, header: Mapping[str, Any]) -> str | None:
    """Says what is wrong with a line of the index of `part`, before it is used: names leave no folder, rows fit."""
    name, size, rows, samples = (record.get(key) for key in ("shard", "bytes", "rows", "samples"))
    stem = name.removeprefix(f"shard-{part}-").removesuffix(".safetensors") if isinstance(name, str) else ""
    if not (stem.isascii() and stem.isdigit()) or name != f"shard-{part}-{stem}.safetensors":
        return f"expected shard-{part}-NUMBER.safetensors, got {name!r}"
    if not (_is_count(size) and _is_count(rows) and isinstance(record.get("sha256"), str) and isinstance(samples, list)):
        return "expected bytes, sha256, rows and samples"
    least = ContrastCache.estimate_bytes(
        tokens=rows,
        hidden_size=header["hidden_size"],
        dtype=_DTYPES[header["dtype"]],
        layers=len(header["layers"]),
        text_path=header[_MARK] != _ONE_PATH_VERSION,
    )
    if size < least:
        return f"{rows} rows need at least {least} bytes, it says {size}"
    for sample in samples:
        if not (
            isinstance(sample, list)
            and len(sample) == 4
            and isinstance(sample[0], str)
            and _is_count(sample[1])
            and _is_count(sample[2])
            and sample[1] + sample[2] <= rows
            and isinstance(sample[3], str)
        ):
            return f"expected [id, first row, rows, content] within {rows} rows, got {str(sample)[:80]}"
    return None


def _is_count(value: object, *, least: int = 0) -> TypeIs[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _shard_problem(folder: Path, record: Mapping[str, Any], *, verify_checksums: bool) -> str | None:
    path = folder / record["shard"]
    if not path.exists():
        return f"shard {path} is missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"shard {path} is truncated or altered: expected {record['bytes']} bytes, got {size}"
    if verify_checksums and (got := _sha256(path)) != record["sha256"]:
        return f"shard {path} is altered: expected sha256 {record['sha256']}, got {got}"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    """hashlib.file_digest of Python 3.11, for 3.10."""
    digest = hashlib.sha256()
    while block := file.read(_MIB):
        digest.update(block)
    return digest.hexdigest()


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes in a folder of its own: safetensors uses a file with a random name, and a kill would leave that file behind."""
    folder = path.with_name(f"{path.name}.tmp")
    temporary = folder / path.name
    folder.mkdir(exist_ok=True)
    try:
        try:
            _safetensors().torch.save_file(tensors, temporary, metadata={_MARK: str(FORMAT_VERSION)})
        except _safetensors().SafetensorError as error:  # which names no file
            raise OSError(f"shard {path} cannot be written: {error}") from error
        os.chmod(temporary, folder.stat().st_mode & 0o666)  # that file is its owner's alone; the folder knows the umask
        with _naming(path), open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        described = {"bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _sync_folder(path.parent)
    return described


def _append(path: Path, data: bytes) -> None:
    """Writes all of `data` at the file's end, on the disk, or none of it: half a line would spoil the next one."""
    with _naming(path), open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(path, end)
            raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name into errors of its descriptor (a full disk), which have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with _naming(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes renames durable. Windows cannot open a folder and has nothing to sync there."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(path: Path) -> Any:
    """An open file that holds the lock until it is closed, by a kill as well."""
    file = open(path, "ab")  # noqa: SIM115 (its life is the writer's)
    try:
        import fcntl
    except ImportError:  # not POSIX: the caller has to avoid two writers of one part
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"another writer is at work in {path.parent} (lock {path.name}); give it another part"
        ) from None
    return file
