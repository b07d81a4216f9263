"""Rows of JSON from files that may hold anything: parsed strictly, in bounded memory.

A file holds one JSON object a line, or one JSON array of objects. Files that end in .gz are unpacked while they are read.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from models.data.problems import ManifestError

# A row of text has a few kilobytes. A longer line is from another kind of file and is not read into memory as a whole.
_MAX_LINE_BYTES = 1 << 20
# The text of an array has to be in memory as a whole.
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


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes | dict[str, Any] | None]]:
    """Numbered rows of a file of JSON lines (see `parse_object`), or of one JSON array of objects (parsed where they are good).

    Raises:
        ManifestError: the file cannot be read, or its array is no JSON or larger than 512 MiB.
    """
    path = Path(path)
    if _first_byte(path) == b"[":
        yield from ((number, row) for number, (_, row) in enumerate(_members(path), 1))
    else:
        yield from numbered_lines(path)


def read_named_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Names and rows of a file that is one JSON object of objects.

    Raises:
        ManifestError: the file cannot be read, is larger than 512 MiB, is no such object, or a name is there twice.
    """
    path = Path(path)
    if (first := _first_byte(path)) not in (b"{", b""):
        raise ManifestError(f"{path}: expected an object of rows by clip, got {first.decode(errors='replace')!r} first")
    seen: set[str] = set()
    for name, row in _members(path):
        if name in seen:
            raise ManifestError(f"{path}: bad JSON: key {name!r} twice")
        seen.add(name)
        yield name, row


def _members(path: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """(key, value) of the object or array that is the whole file; keys of an array are empty.

    A value that is a good row is parsed, another one is given as its text: `parse_object` says what is wrong with it.
    """
    text = _whole_text(path)
    number, at = 0, _behind_blanks(text, 0)
    opening = text[at : at + 1]
    closing = {"[": "]", "{": "}"}.get(opening, "")
    try:
        at = _behind_blanks(text, at + 1)
        while number or text[at : at + 1] != closing:
            number += 1
            key = ""
            if opening == "{":
                if text[at : at + 1] != '"':
                    raise json.JSONDecodeError("Expecting a name in quotes", text, at)
                key, at = _ANY.raw_decode(text, at)
                at = _behind(":", text, at)
            value, end = _row_at(text, at)
            yield key, value
            at = _behind_blanks(text, end)
            if text[at : at + 1] == closing:
                break
            at = _behind(",", text, at)
        if (at := _behind_blanks(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path}: row {number}: {_bad_json(error)}") from None
    except RecursionError:
        raise ManifestError(f"{path}: row {number}: bad JSON: nested too deeply") from None


def _row_at(text: str, at: int) -> tuple[bytes | dict[str, Any], int]:
    """The value that begins at `at`, and where it ends."""
    try:
        value, end = _STRICT.raw_decode(text, at)
        if isinstance(value, dict) and not _too_deep(value):
            return value, end
    except json.JSONDecodeError:
        raise
    except ValueError:  # JSON, but of a kind that no row may have
        _, end = _ANY.raw_decode(text, at)
    return text[at:end].encode(), end


def _behind(mark: str, text: str, at: int) -> int:
    at = _behind_blanks(text, at)
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r} delimiter", text, at)
    return _behind_blanks(text, at + 1)


def _behind_blanks(text: str, at: int) -> int:
    return _BLANKS.match(text, at).end()


def _whole_text(path: Path) -> str:
    data = bytearray()
    try:
        with _open(path) as file:  # read(limit) takes as much memory as the limit, even for a small file
            while len(data) <= _MAX_ARRAY_BYTES and (part := file.read(1 << 20)):
                data += part
    except _READ_ERRORS as error:
        raise ManifestError(f"{path}: cannot be read ({_reason(error)})") from None
    if len(data) > _MAX_ARRAY_BYTES:
        raise ManifestError(
            f"{path}: more than {_MAX_ARRAY_BYTES} bytes in one JSON value; write one row a line instead"
        )
    try:
        return _decoded(data)
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from None


def _first_byte(path: Path) -> bytes:
    """The first byte that is neither blank nor a byte order mark."""
    try:
        with _open(path) as file:
            while part := file.read(1 << 16):
                if part := part.lstrip(b"\xef\xbb\xbf \t\r\n"):
                    return part[:1]
    except _READ_ERRORS as error:
        raise ManifestError(f"{path}: cannot be read ({_reason(error)})") from None
    return b""


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


def _parse(data: bytes) -> Any:
    """A JSON value whose numbers are finite, whose keys are unique, and which is not nested too deeply."""
    try:
        value = _STRICT.decode(_decoded(data).rstrip())  # an error in a line that was cut off stands in that line
    except json.JSONDecodeError as error:
        raise ValueError(_bad_json(error)) from None
    except RecursionError:
        raise ValueError("bad JSON: nested too deeply") from None
    if _too_deep(value):
        raise ValueError("bad JSON: nested too deeply")
    return value


def _decoded(data: bytes | bytearray) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def _bad_json(error: json.JSONDecodeError) -> str:
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    return f"bad JSON: {error.msg} at {line}column {error.colno}"


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


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


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float, parse_int=_finite_int
)
_ANY = json.JSONDecoder(parse_float=str, parse_int=str)  # finds where a value ends
_BLANKS = re.compile(r"[ \t\r\n]*")
