"""Samples of tensors in a folder of checked shards: what caches have in common.

A folder:

    cache.json                     format version, fingerprint, and what the kind of cache adds
    shard-PART-00000.safetensors   tensors of R rows: whole samples, one after another
    index-PART.jsonl               one line a finished shard: file, bytes, sha256, [sample id, first row, rows, content] ...

A shard is written to a temporary file, synced and renamed, and only then named in the index.  So after a kill the folder holds
every finished shard and nothing half-written.

A sample's content is a fingerprint that the caller makes of what its rows depend on: prompt, audio, Y. It shows whether the
sample has changed since it was stored.

Legend: R rows of a shard, n rows of a sample, N rows asked for, B samples asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import is_number

if TYPE_CHECKING:
    from typing_extensions import TypeIs

__all__ = ["CorruptCacheError", "Kind", "ShardReader", "ShardWriter"]

_MIB = 1 << 20
# Far beyond any fingerprint or shard of samples. A larger file is of another kind, and is not read into memory.
_MAX_HEADER_BYTES = 16 * _MIB
_MAX_INDEX_LINE_BYTES = 64 * _MIB
# A writer stays far below: it closes a shard at this length of its line, and one sample adds at most two texts. (JSON may write a
# byte of them as six.)
_INDEX_LINE_BYTES, _MAX_TEXT_BYTES = 4 * _MIB, _MIB
_SHOWN = 5  # samples in an error
_log = logging.getLogger(__name__)

Header = dict[str, Any]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # of one row: shape and dtype by the tensor's name


class CorruptCacheError(ValueError):
    """A file of the cache is missing, truncated or altered; the message names it."""


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Attributes:
        mark: the header's key of the format version; it says which kind a folder holds.
        versions: those that are read; the first is the one that messages name.
        title: of the kind, for messages.
        needs: what a header holds beside the fingerprint, for messages.
        layout: header -> the tensors of a row; None for a damaged header.
        same: keys that a writer and the folder must have in common, beside mark and fingerprint.
    """

    mark: str
    versions: tuple[int, ...]
    title: str
    needs: str
    layout: Callable[[Header], Layout | None]
    same: tuple[str, ...]


class ShardReader:
    """Reader of a folder, memory-mapped: only the rows asked for are read. See the class of each kind."""

    kind: Kind

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        fingerprint: Mapping[str, Any] | None = None,
        verify_checksums: bool = True,
    ):
        _safetensors()
        self.folder = Path(folder)
        self._header = read_header(self.folder, self.kind)
        if fingerprint is not None:
            check_fingerprint(self.folder, expected=canonical(fingerprint), got=self._header["fingerprint"])
        self.fingerprint: dict[str, Any] = self._header["fingerprint"]
        self._layout = _layout_of(self._header, self.kind)
        self.bytes = 0
        self._where: dict[str, tuple[str, int, int]] = {}  # sample id -> shard, first row, rows
        self._content: dict[str, str] = {}
        self._rows: dict[str, int] = {}  # shard -> its rows
        self._open_shards: dict[str, dict[str, Tensor]] = {}
        for index_path in sorted(self.folder.glob("index-*.jsonl")):
            for record in _read_index(index_path, self._layout)[0]:
                problem = _shard_problem(self.folder, record, verify_checksums=verify_checksums)
                if problem:
                    raise CorruptCacheError(
                        f"{problem}; write the cache again with the same arguments: its writer keeps the good shards"
                    )
                self._add_record(record)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def rows(self, sample_id: str) -> int:
        """n, the positions of a sample, without reading them."""
        return self._locate(sample_id)[2]

    def content(self, sample_id: str) -> str:
        """The fingerprint of a sample's content that its writer was given; "" if none."""
        self._locate(sample_id)
        return self._content[sample_id]

    def check_samples(self, sample_ids: Iterable[str]) -> None:
        """Says before a training what it would stop at: samples that the cache lacks.

        Raises:
            ValueError: the cache lacks some of the samples; the message names the first of them.
        """
        asked = dict.fromkeys(sample_ids)
        missing = [sample_id for sample_id in asked if sample_id not in self._where]
        if missing:
            shown = ", ".join(map(repr, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
            raise ValueError(
                f"expected all of the {len(asked)} samples asked for, got the cache {self.folder} without {len(missing)} of "
                f"them: {shown}; a writer with the same arguments adds what is missing"
            )

    def _places(self, sample_ids: Sequence[str]) -> tuple[list[tuple[str, int, int]], Tensor]:
        """Where the samples are, and their lengths (B,)."""
        if isinstance(sample_ids, str):
            raise TypeError(f"sample_ids: expected a sequence of ids, got the string {sample_ids!r}")
        places = [self._locate(sample_id) for sample_id in sample_ids]
        return places, torch.tensor([rows for _, _, rows in places], dtype=torch.int64)

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

    def _shard(self, name: str) -> dict[str, Tensor]:
        if name not in self._open_shards:
            self._open_shards[name] = self._opened(name)
        return self._open_shards[name]

    def _opened(self, name: str) -> dict[str, Tensor]:
        """A shard's tensors, mapped, those that the cache's header promises; without checksums nobody else has looked."""
        path = self.folder / name
        try:
            # get_tensor's rows are read when they are copied; get_slice reads no more, but safetensors 0.8 leaks its bounds.
            file = _safetensors().safe_open(str(path), framework="pt", device="cpu")
            got = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, _safetensors().SafetensorError) as error:
            raise CorruptCacheError(f"shard {path} is altered: {error}") from error
        rows, found = self._rows[name], {key: (tuple(t.shape), t.dtype) for key, t in got.items()}
        if found != {key: ((rows, *shape), dtype) for key, (shape, dtype) in self._layout.items()}:
            raise CorruptCacheError(f"shard {path} is altered: expected {rows} rows of {self._layout}, got {found}")
        return got


class ShardWriter(AbstractContextManager):
    """Writes a folder, shard by shard; started again on the same folder it goes on after the last finished shard.

    Args:
        header: the kind's own part of the header; the mark and the fingerprint with it.
        shard_mib, part, verify_checksums: see the class of each kind.
    """

    kind: Kind

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        header: Header,
        shard_mib: float,
        part: str,
        verify_checksums: bool,
    ):
        _safetensors()
        if not (is_number(shard_mib) and 0 < shard_mib < math.inf):
            raise ValueError(f"shard_mib: expected a positive number, got {shard_mib!r}")
        if not isinstance(part, str):
            raise TypeError(f"part: expected a string, got {type(part).__name__}")
        if not part or not all(letter.isalnum() or letter == "_" for letter in part):
            raise ValueError(f"part: expected letters, digits and underscores, got {part!r}")
        self.folder = Path(folder)
        self.part = part
        self._shard_bytes = int(shard_mib * _MIB)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._process = _lock(self.folder / f"lock-{part}"), os.getpid()
        try:
            self._match_header(header)
            self._records, self._known = self._resume(verify_checksums)
            self._elsewhere = self._of_other_parts()
        except BaseException:
            self._unlock()
            raise
        self._buffer: list[tuple[str, str, dict[str, Tensor]]] = []  # sample id, content, tensors
        self._buffered_bytes = self._line_bytes = 0  # of the tensors, and of the line in the index

    def __contains__(self, sample_id: object) -> bool:
        """Finished or waiting in this writer's memory, or finished by another part when this writer was opened."""
        return sample_id in self._known or sample_id in self._elsewhere

    def contains(self, sample_id: str) -> bool:
        return sample_id in self

    def __len__(self) -> int:
        return len(self._known)

    def content(self, sample_id: str) -> str | None:
        """The fingerprint of a sample's content that the cache holds; None if it does not hold the sample (see `in`)."""
        return self._known.get(sample_id, self._elsewhere.get(sample_id))

    def _check_open(self) -> None:
        if self._lock.closed:
            raise ValueError("writer: expected an open one, got one that is closed")

    def _check_sample(self, sample_id: str, content: str) -> None:
        self._check_open()
        check_text("sample_id", sample_id)
        check_text("content", content)
        if not sample_id:
            raise TypeError("sample_id: expected a string that is not empty, got ''")
        if sample_id in self:
            raise ValueError(
                f"sample_id: expected an id the cache does not hold yet, got {sample_id!r}; skip what is `in writer`"
            )

    def _take(self, sample_id: str, content: str, tensors: dict[str, Tensor]) -> None:
        """A sample whose tensors are as the layout says, and nobody else's."""
        self._buffer.append((sample_id, content, tensors))
        self._known[sample_id] = content
        self._buffered_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._line_bytes += len(_as_json([sample_id, 0, 0, content])) + 2 * 20  # with two numbers of up to 20 digits
        if self._buffered_bytes >= self._shard_bytes or self._line_bytes >= _INDEX_LINE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory as a shard (a smaller one than usual) and names it in the index."""
        if not self._buffer:
            return
        self._check_open()
        name = self._next_name()
        samples, first = [], 0
        for sample_id, content, tensors in self._buffer:
            samples.append([sample_id, first, len(tensors["target"]), content])
            first += len(tensors["target"])
        joined = {key: torch.cat([tensors[key] for _, _, tensors in self._buffer]) for key in self._buffer[0][2]}
        record = {"shard": name, **_write_shard(self.folder / name, joined), "rows": first, "samples": samples}
        _append(self._index_path, _as_json(record) + b"\n")
        _sync_folder(self.folder)
        self._records.append(record)
        self._buffer, self._buffered_bytes, self._line_bytes = [], 0, 0

    def close(self) -> None:
        """Flushes and lets another writer have the folder."""
        if not self._lock.closed:
            try:
                self.flush()
            finally:
                self._unlock()

    def _unlock(self) -> None:
        """Gives the lock up; a process forked meanwhile, such as a DataLoader's worker, has the file open and would keep it."""
        with suppress(ImportError):
            import fcntl

            if os.getpid() == self._process:
                fcntl.flock(self._lock, fcntl.LOCK_UN)
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

    def _match_header(self, header: Header) -> Header:
        """The folder's header, written if there is none; ValueError where it is another."""
        path = self.folder / "cache.json"
        self._layout = _layout_of(header, self.kind)
        if not path.exists():
            data = _as_json(header, indent=1)
            if len(data) > _MAX_HEADER_BYTES:
                raise ValueError(f"fingerprint: expected at most {_MAX_HEADER_BYTES} bytes of JSON, got {len(data)}")
            _write_atomically(path, data)
        got = read_header(self.folder, self.kind)  # also after writing: the parts of one cache may start at the same time
        check_fingerprint(self.folder, expected=header["fingerprint"], got=got["fingerprint"])
        self._compare_versions(header[self.kind.mark], got[self.kind.mark])
        for name in self.kind.same:
            if header[name] != got[name]:
                raise ValueError(
                    f"{name}: the cache {self.folder} has another; expected {header[name]}, got {got[name]}"
                )
        return got

    def _compare_versions(self, own: int, found: int) -> None:
        """ValueError where the folder has another version than this writer."""

    def _resume(self, verify_checksums: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """This part's finished shards without bad ones, and their samples' contents; the index is put in order if need be."""
        records, torn = _read_index(self._index_path, self._layout)
        good = []
        for record in records:
            problem = _shard_problem(self.folder, record, verify_checksums=verify_checksums)
            if problem:
                _log.warning("%s; its %d samples will be written again", problem, len(record["samples"]))
            else:
                good.append(record)
        if torn or len(good) != len(records):
            lines = [_as_json(record) + b"\n" for record in good]
            _write_atomically(self._index_path, b"".join(lines))
        named = {record["shard"] for record in good}
        for path in self.folder.glob(f"shard-{self.part}-*.safetensors*"):
            if path.is_dir():  # being written at a kill
                shutil.rmtree(path)
            elif path.name not in named:  # bad, or renamed just before a kill
                path.unlink()
        return good, {sample_id: content for record in good for sample_id, _, _, content in record["samples"]}

    def _of_other_parts(self) -> dict[str, str]:
        """The contents of the samples that other parts have finished. A reader refuses a sample that two parts have."""
        paths = (path for path in sorted(self.folder.glob("index-*.jsonl")) if path != self._index_path)
        records = (record for path in paths for record in _read_index(path, self._layout)[0])
        return {sample_id: content for record in records for sample_id, _, _, content in record["samples"]}


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"the cache stores its shards with safetensors, which cannot be imported ({error}); "
            "get it with: pip install safetensors"
        ) from error
    return safetensors


def canonical(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint as JSON gives it back, so that tuples and lists, or int keys and strings, compare equal."""
    if not isinstance(fingerprint, Mapping):
        raise TypeError(f"fingerprint: expected a mapping of JSON values, got {type(fingerprint).__name__}")
    try:
        return json.loads(_as_json(dict(fingerprint), sort_keys=True))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"fingerprint: expected JSON values only, got {error}") from error


def check_text(name: str, text: Any) -> None:
    """For a string that a file of the cache is to hold."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected a string, got {text!r}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected a string that UTF-8 can hold, got {text[:80]!r} ({error.reason})") from error
    if size > _MAX_TEXT_BYTES:
        raise ValueError(f"{name}: expected at most {_MAX_TEXT_BYTES} bytes, got {size}, {text[:80]!r} ...")


def _as_json(value: Any, **options: Any) -> bytes:
    """Raises ValueError for what a reader would refuse: numbers that are not finite, strings that UTF-8 cannot hold."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **options).encode()


def check_fingerprint(folder: Path, *, expected: dict[str, Any], got: dict[str, Any]) -> None:
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


def read_header(folder: Path, kind: Kind) -> Header:
    """The header of a cache of this kind; ValueError for another kind or version, CorruptCacheError for a damaged one."""
    path = folder / "cache.json"
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_HEADER_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"folder: expected a {kind.title}, got {folder} without cache.json") from None
    if len(data) > _MAX_HEADER_BYTES:
        raise CorruptCacheError(f"{path} is no cache's header: it has more than {_MAX_HEADER_BYTES} bytes")
    header = _parsed(data, str(path))
    version = header.get(kind.mark)
    if version not in kind.versions:
        raise ValueError(f"folder: expected a {kind.title} of format {kind.versions[0]} in {folder}, got {version}")
    if not isinstance(header.get("fingerprint"), dict) or kind.layout(header) is None:
        raise CorruptCacheError(f"{path} is damaged: expected fingerprint, {kind.needs}")
    return header


def _layout_of(header: Header, kind: Kind) -> Layout:
    layout = kind.layout(header)
    assert layout is not None  # read_header has looked, or the writer at its arguments
    return layout


def row_bytes(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def _read_index(path: Path, layout: Layout) -> tuple[list[dict[str, Any]], bool]:
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
            if problem := _record_problem(record, part, layout):
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


def _record_problem(record: Mapping[str, Any], part: str, layout: Layout) -> str | None:
    """Says what is wrong with a line of the index of `part`, before it is used: names leave no folder, rows fit."""
    name, size, rows, samples = (record.get(key) for key in ("shard", "bytes", "rows", "samples"))
    stem = name.removeprefix(f"shard-{part}-").removesuffix(".safetensors") if isinstance(name, str) else ""
    if not (stem.isascii() and stem.isdigit()) or name != f"shard-{part}-{stem}.safetensors":
        return f"expected shard-{part}-NUMBER.safetensors, got {name!r}"
    if not (is_count(size) and is_count(rows) and isinstance(record.get("sha256"), str) and isinstance(samples, list)):
        return "expected bytes, sha256, rows and samples"
    least = rows * row_bytes(layout)
    if size < least:
        return f"{rows} rows need at least {least} bytes, it says {size}"
    for sample in samples:
        if not (
            isinstance(sample, list)
            and len(sample) == 4
            and isinstance(sample[0], str)
            and is_count(sample[1])
            and is_count(sample[2])
            and sample[1] + sample[2] <= rows
            and isinstance(sample[3], str)
        ):
            return f"expected [id, first row, rows, content] within {rows} rows, got {str(sample)[:80]}"
    return None


def is_count(value: object, *, least: int = 0) -> TypeIs[int]:
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
            _safetensors().torch.save_file(tensors, temporary, metadata={"kdkernels_shard": "1"})
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
        with _naming(path):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RuntimeError(
            f"another writer is at work in {path.parent} (lock {path.name}); give it another part"
        ) from None
    except OSError:  # a file system without locks
        file.close()
        raise
    return file
