"""Rows of JSON from files that may hold anything: parsed strictly, in bounded memory.

A file holds one JSON object a line, or one JSON array of objects. Files that end in .gz are unpacked while they are read.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from models.data.problems import ManifestError

# A row of text has a few kilobytes. A longer line is from another kind of file and is not read into memory as a whole.
_MAX_LINE_BYTES = 1 << 20
# An array has to be in memory as a whole, where it takes some ten times its size.
_MAX_ARRAY_BYTES = 1 << 29
# Users of metadata recurse into it (fingerprints, JSON again), on top of their callers' own frames.
_MAX_DEPTH = 64
_READ_ERRORS = (OSError, EOFError, zlib.error)  # the latter two: a damaged .gz


def parse_object(line: bytes | None) -> dict[str, Any]:
    """One row as an object; None is a line that is too long for a row. Raises ValueError or TypeError."""
    if line is None:
        raise ValueError(f"line longer than {_MAX_LINE_BYTES} bytes")
    value = _parse(line)
    if not isinstance(value, dict):
        raise TypeError(f"bad JSON: expected an object, got {type(value).__name__}")
    return value


def read_json(path: str | os.PathLike[str]) -> Any:
    """A whole file as one JSON value, parsed as strictly as a row by `parse_object`.

    Raises:
        ManifestError: the file cannot be read, is larger than 512 MiB, or is not JSON.
    """
    try:
        data = bytearray()
        with _open(Path(path)) as file:  # read(limit) takes as much memory as the limit, even for a small file
            while len(data) <= _MAX_ARRAY_BYTES and (part := file.read(1 << 20)):
                data += part
    except _READ_ERRORS as error:
        raise ManifestError(f"{path}: cannot be read ({_reason(error)})") from None
    if len(data) > _MAX_ARRAY_BYTES:
        raise ManifestError(
            f"{path}: more than {_MAX_ARRAY_BYTES} bytes in one JSON value; write one row a line instead"
        )
    try:
        return _parse(data)
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from None


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes | dict[str, Any] | None]]:
    """Numbered rows of a file of JSON lines (as bytes, see `parse_object`) or of one JSON array of objects (parsed).

    Raises:
        ManifestError: the file cannot be read, or its array holds other values than objects.
    """
    path = Path(path)
    numbered = numbered_lines(path)
    first = next(numbered, None)
    if first is None:
        return
    if first[1] is None or not first[1].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield first
        yield from numbered
        return
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ManifestError(f"{path}: expected an array of objects")
    yield from enumerate(rows, 1)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines without the blank ones; None is a line that is too long for a row."""
    try:
        file = _open(path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        number = 0
        try:
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_MAX_LINE_BYTES)
                    yield number, None
                elif line.strip():
                    yield number, line
        except _READ_ERRORS as error:
            raise ManifestError(f"{path}: cannot be read ({_reason(error)})") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _parse(data: bytes | bytearray) -> Any:
    """A JSON value whose numbers are finite, whose keys are unique, and which is not nested too deeply."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_finite_int,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("bad JSON: nested too deeply") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError("bad JSON: nested too deeply")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"bad JSON: key {repeated!r} twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"bad JSON: {name} is not a number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # 1e999 is legal JSON, but cannot be written again
        raise ValueError(f"bad JSON: {text[:20]} is too large a number")
    return value


def _finite_int(text: str) -> int:
    _finite_float(text)  # larger integers overflow in arithmetic with floats
    return int(text)
