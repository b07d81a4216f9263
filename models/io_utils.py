"""Files that are either complete or absent: atomic writes, content hashes, the cache folder.

A plain `open(path, "w")` leaves a half-written file behind if the process is killed, and its readers cannot know. Here a file
is written under a temporary name in the same folder (a rename is atomic only within one file system), flushed to the disk, and
renamed. The folder is flushed too; without that a power cut could undo the rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

_HASH_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """The system's errors in the block name this file where they name none: that for a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path`. A reader sees the old file or the whole new one, never a part.

    Args:
        path: the final name. Missing parent folders are created.
        data: the whole content.

    Returns:
        `path` as a Path.

    Raises:
        TypeError: `data` is not bytes-like.
        OSError: the folder cannot be written. The temporary file is removed, and an old file stays as it was.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"data: expected bytes, got {type(data).__name__}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes 0600, unlike open()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_dir(path.parent)
    return path


def append_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Put all of `data` at the end of a file, flushed to the disk, or none of it.

    Raises:
        OSError: names the file. If a full disk cut the data off, the part is removed: it would spoil the next line.
    """
    with naming(path), open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, end)
            raise


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """`atomic_write_bytes` for UTF-8 text. Line ends are written as they are."""
    if not isinstance(text, str):
        raise TypeError(f"text: expected str, got {type(text).__name__}")
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON with sorted keys. NaN and infinity raise ValueError, since JSON has neither."""
    return atomic_write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def save_tensors(tensors: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """safetensors' `save_file` of torch tensors. Its error names no file, so it is raised as an OSError that does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error


@contextlib.contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder under a temporary name; it gets its final name when the block ends without an exception.

    Before the rename every file in it is flushed to the disk and gets the permissions of the umask (safetensors gives fewer).
    An existing folder at `path` is replaced: it is renamed first and removed last. So at each moment one complete folder
    exists under `path` or beside it, as `.NAME.*.old/NAME`.

    Yields:
        the temporary folder to write into.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        with naming(path):
            yield temporary
            _settle_tree(temporary)
        replaced = None
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name
            os.replace(path, replaced)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced.parent, ignore_errors=True)


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Keep other processes that use `exclusive` out of `folder`. The lock ends with the process, even with a killed one.

    Args:
        folder: created if missing; gets an empty file `.lock`.
        what: what works there, for the message.

    Raises:
        BlockingIOError: another process holds it.
    """
    with locked(Path(folder) / ".lock", f"{folder}: {what} is at work there already, in another process"):
        yield


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], refusal: str) -> Iterator[BinaryIO]:
    """Keep other users of `locked` out of a file. The lock ends with the process, even with a killed one.

    Args:
        path: created if missing, with its folder. It must not be replaced meanwhile: a rename takes the lock away.
        refusal: the message where another holds it.

    Yields:
        the file, open for reading and appending.

    Raises:
        BlockingIOError: another holds it.
        OSError: the file cannot be opened, or its file system has no locks; names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            import fcntl

            with naming(path):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not POSIX: the caller has to see that no two run at once
            pass
        except BlockingIOError:
            raise BlockingIOError(refusal) from None
        yield file


def same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two paths name one file: by links and `..` too, and where it is not there yet."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return os.path.realpath(first) == os.path.realpath(second)


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Flush a folder's own entries (names), which a rename changes. Systems that cannot do it do nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems have no fsync for folders
        pass
    finally:
        os.close(descriptor)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content as 64 hex digits, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(obj: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of `obj`. The order of keys does not matter.

    `obj` may hold dataclasses, mappings, lists, tuples, paths, strings, numbers, booleans and None, nested in any way. A tuple
    and a list of the same items are equal, as in JSON.

    Raises:
        TypeError: other values (a set has no order, a tensor no canonical text), or a mapping key that is not a string.
        ValueError: NaN or infinity, which JSON does not have.
    """
    text = json.dumps(_canonical(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def source_commit(*paths: str) -> str:
    """Commit of the checkout that holds this file, with "+changes" if tracked files differ from it; "unknown" without one.

    Args:
        paths: relative to the checkout's root. Only differences in them count; without paths, all differences count. Folders
            of results never count, because an earlier run may have written them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    counted = [*(paths or ["."]), *(f":(exclude){folder}/results" for folder in ("benchmarks", "models/experiments"))]
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no", "--", *counted) else "")


def cache_dir() -> Path:
    """The folder for downloads and computed features: $KDKERNELS_CACHE, else ~/.cache/kdkernels. Created if missing."""
    configured = os.environ.get("KDKERNELS_CACHE")
    path = Path(configured).expanduser() if configured else Path.home() / ".cache" / "kdkernels"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _canonical(obj: Any) -> Any:
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: _canonical(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str):
                raise TypeError(f"fingerprint: expected string keys, got {key!r} ({type(key).__name__})")
        return {key: _canonical(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_canonical(value) for value in obj]
    raise TypeError(f"fingerprint: expected JSON-like values or dataclasses, got {type(obj).__name__}")


def _settle_tree(root: Path) -> None:
    readable = 0o666 & ~_umask()
    for folder, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                if stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600:
                    os.fchmod(descriptor, readable)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_dir(folder)


def _umask() -> int:
    # Only setting the mask returns it, so it is set and put back at once.
    mask = os.umask(0)
    os.umask(mask)
    return mask
