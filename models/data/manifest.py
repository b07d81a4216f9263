"""The manifest: one JSONL file that says everything about a data set except the sound itself.

Line 1 is the header, an object with "kdkernels_manifest": 1 (the version) and whatever else its maker wants to keep.
Each further line is one `Example`; its keys are the names of that class's fields, and fields left out have defaults:

    {"kdkernels_manifest": 1, "sources": ["queen"]}
    {"id": "joe-1/neutral", "audio": "audio/joe-1.flac", "transcription": "Good luck.", "metadata": {"gender": "man"},
     "task": "gender", "question": "Is the speaker a man or a woman?", "choices": ["man", "woman"], "answer": "man",
     "target": "The speaker is a man.", "target_source": "template", "split": "train", "kind": "neutral"}

(one line each in the file). Audio paths are relative to the audio root, by default the manifest's folder, and may not
leave it, neither by "..", nor as absolute paths, nor through links. Bad rows are skipped, counted and listed; beyond
`max_bad_fraction` of them reading stops with the list. `python -m models check FILE` checks a manifest.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from models.data.audio import MAX_SECONDS, AudioError, AudioInfo, check_span, probe_audio
from models.data.commands import check_parser
from models.io_utils import atomic_write_text

MANIFEST_VERSION = 1
VERSION_KEY = "kdkernels_manifest"
SPLITS = ("train", "dev", "test")
KINDS = ("aligned", "neutral", "conflict")
TARGET_SOURCES = ("text_backbone", "template", "teacher", "human")
# A row of text is a few kilobytes; a longer line is another kind of file, and must not be taken into memory whole.
_MAX_LINE_BYTES = 1 << 20
# An array has to be taken into memory whole, at some ten times its size.
_MAX_ARRAY_BYTES = 1 << 29
# Readers recurse into metadata (fingerprints, JSON again), on top of their callers' own frames.
_MAX_DEPTH = 64
_MAX_REASON_CHARACTERS = 500
_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question on one clip.

    Args:
        id: unique in the manifest.
        audio: path relative to the audio root, with forward slashes; None is a text-only example.
        start_seconds, end_seconds: the span of the file; end None is the file's end.
        transcription: the words, as the model is shown them.
        metadata: attributes of the clip ({"gender": "man", "speaker": "JOE", "snr_db": -3.0}).
        task: "gender", "language", ...; accuracy is reported by it.
        context: text shown beside the transcript: the hint.
        question: what is asked.
        choices: the possible answers as full strings; () for a free answer.
        answer: the true label, one of `choices` where these are given.
        target: Y, the pseudo ground truth that is forced through teacher and student.
        target_source: who wrote `target`: text_backbone, template, teacher or human.
        split: train, dev or test.
        kind: aligned (the context agrees with the sound), neutral (says nothing), conflict (contradicts it).
        pair_id: shared by the same clip and question under different contexts.

    Raises:
        ValueError, TypeError: a field has a wrong type or value; the message starts with its name.
    """

    id: str
    audio: str | None
    start_seconds: float = 0.0
    end_seconds: float | None = None
    transcription: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    task: str = ""
    context: str = ""
    question: str = ""
    choices: tuple[str, ...] = ()
    answer: str | None = None
    target: str | None = None
    target_source: str | None = None
    split: str = "train"
    kind: str = "neutral"
    pair_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "transcription", "task", "context", "question", "split", "kind"):
            _check_text(name, getattr(self, name))
        for name in ("audio", "answer", "target", "target_source", "pair_id"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if not self.id.strip():
            raise ValueError("id: expected a name, got an empty string")
        for name in ("transcription", "context", "question"):
            if AUDIO_PLACEHOLDER in getattr(self, name):
                raise ValueError(f"{name}: expected plain text, got the audio placeholder {AUDIO_PLACEHOLDER!r} in it")
        _check_span_fields(self.start_seconds, self.end_seconds)
        if not isinstance(self.metadata, Mapping):
            raise TypeError(f"metadata: expected an object, got {type(self.metadata).__name__}")
        if isinstance(self.choices, str) or not isinstance(self.choices, (list, tuple)):
            raise TypeError(f"choices: expected a list of strings, got {type(self.choices).__name__}")
        object.__setattr__(self, "choices", tuple(self.choices))
        for choice in self.choices:
            _check_text("choices", choice)
            if not choice.strip():
                raise ValueError("choices: expected labels, got an empty string among them")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError(f"choices: expected different labels, got {list(self.choices)}")
        if self.choices and self.answer is not None and self.answer not in self.choices:
            raise ValueError(f"answer: expected one of {list(self.choices)}, got {self.answer!r}")
        _check_one_of("split", self.split, SPLITS)
        _check_one_of("kind", self.kind, KINDS)
        if self.target_source is not None:
            _check_one_of("target_source", self.target_source, TARGET_SOURCES)
        if self.audio is not None:
            _check_relative(self.audio)

    def to_row(self) -> dict[str, Any]:
        """The JSON object of this example, without the fields that have their default value."""
        row: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
            if value != default:
                row[item.name] = list(value) if item.name == "choices" else value
        return row


FIELD_NAMES = tuple(item.name for item in dataclasses.fields(Example))
_REQUIRED = ("id", "audio")


@dataclass(frozen=True)
class Problem:
    """A row that was skipped: its line number in the file (the header is line 1), its id if it has one, and why.

    The reason is cut to 500 characters and the id to 200: a bad row may be all of one field.
    """

    row: int
    id: str | None
    reason: str

    def __post_init__(self) -> None:
        if len(self.reason) > _MAX_REASON_CHARACTERS:
            object.__setattr__(self, "reason", self.reason[:_MAX_REASON_CHARACTERS] + " ...")
        if self.id is not None and len(self.id) > 200:
            object.__setattr__(self, "id", self.id[:200] + " ...")

    def __str__(self) -> str:
        return f"row {self.row}" + (f" ({self.id})" if self.id else "") + f": {self.reason}"


class ManifestError(ValueError):
    """A manifest that cannot be used as a whole; `problems` lists the bad rows if these are the cause."""

    def __init__(self, message: str, problems: Iterable[Problem] = ()):
        self.problems = list(problems)
        super().__init__(message)


@dataclass(frozen=True)
class Manifest:
    """What `read_manifest` returns: the good rows, the bad ones, and where the audio lies."""

    examples: list[Example]
    problems: list[Problem]
    audio_root: Path
    header: dict[str, Any]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def audio_path(self, example: Example) -> Path | None:
        """Where the example's file lies; None for a text-only example."""
        return None if example.audio is None else self.audio_root / example.audio

    def select(self, *, split: str | None = None, task: str | None = None, **metadata: Any) -> list[Example]:
        """The examples of a split and task, and with the given metadata (`pool="teacher"`)."""
        return [
            example
            for example in self.examples
            if (split is None or example.split == split)
            and (task is None or example.task == task)
            and all(example.metadata.get(key) == value for key, value in metadata.items())
        ]

    def summary(self) -> str:
        """Counts by split, task and kind, and the bad rows by reason: a few lines for the terminal."""
        lines = [f"{len(self.examples)} rows, {len(self.problems)} skipped; audio root {self.audio_root}"]
        counts = Counter((example.split, example.task or "-", example.kind) for example in self.examples)
        lines += [f"  {split:5} {task:14} {kind:8} {count:6}" for (split, task, kind), count in sorted(counts.items())]
        return "\n".join(lines + list_problems(self.problems))


def read_manifest(
    path: str | os.PathLike[str],
    *,
    audio_root: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = 0.05,
    check_audio: bool = True,
    max_seconds: float = MAX_SECONDS,
) -> Manifest:
    """Read and check a manifest.

    Args:
        path: the JSONL file.
        audio_root: folder that audio paths are relative to; None is the manifest's own folder.
        max_bad_fraction: above this fraction of bad rows the manifest is refused.
        check_audio: look at each clip's file and header too (nothing is decoded).
        max_seconds: longest span allowed; decided from the header.

    Returns:
        Manifest with the good rows in file order, and a Problem for each bad one.

    Raises:
        ManifestError: the file is missing, has no header or another version, holds no row, or too many bad ones; the
            message lists the first of them and `problems` has all.
        ValueError: `max_bad_fraction` lies outside [0, 1].
    """
    path = Path(path)
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction: expected a number from 0 to 1, got {max_bad_fraction}")
    root = Path(audio_root) if audio_root is not None else path.parent
    if check_audio and not root.is_dir():
        raise ManifestError(f"audio_root: expected a folder, got {root}")
    checker = AudioChecker(root, max_seconds=max_seconds) if check_audio else None
    examples: list[Example] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    header: dict[str, Any] | None = None
    rows = 0
    for number, line in _lines(path):
        if header is None:
            header = _parse_header(path, line)
            continue
        rows += 1
        row_id: str | None = None
        try:
            row = parse_object(line)
            row_id = row["id"] if isinstance(row.get("id"), str) else None
            example = example_from_row(row)
            if example.id in seen:
                raise ValueError(f"duplicate id, first in row {seen[example.id]}")
            if checker is not None:
                checker.check(example)
        except AudioError as error:
            problems.append(Problem(number, row_id, f"audio: {error.reason}"))
        except (ValueError, TypeError) as error:
            problems.append(Problem(number, row_id, str(error)))
        else:
            seen[example.id] = number
            examples.append(example)
    if header is None:
        raise ManifestError(f"{path}: expected a header line with {VERSION_KEY!r}, got an empty file")
    if rows == 0:
        raise ManifestError(f"{path}: expected at least one row after the header, got none")
    refuse_if_too_bad(path, problems, rows, max_bad_fraction)
    return Manifest(examples, problems, root, header, path)


def write_manifest(
    path: str | os.PathLike[str], examples: Iterable[Example], *, header: Mapping[str, Any] | None = None
) -> Path:
    """Write a manifest atomically: readers see the old file or the whole new one.

    Raises:
        ValueError: two examples share an id, `header` sets the version key, or a value has no JSON form (NaN).
    """
    header = dict(header or {})
    if header.get(VERSION_KEY, MANIFEST_VERSION) != MANIFEST_VERSION:
        raise ValueError(f"header: expected {VERSION_KEY} {MANIFEST_VERSION}, got {header[VERSION_KEY]!r}")
    lines = [_dump({**header, VERSION_KEY: MANIFEST_VERSION})]
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise ValueError(f"examples: expected unique ids, got {example.id!r} twice")
        seen.add(example.id)
        lines.append(_dump(example.to_row()))
    return atomic_write_text(path, "\n".join(lines) + "\n")


def example_from_row(row: Mapping[str, Any]) -> Example:
    """An `Example` from a parsed JSON object.

    Raises:
        ValueError, TypeError: a required field is missing, one is unknown (the nearest name is given), a value is bad.
    """
    for name in row:
        if name not in FIELD_NAMES:
            near = difflib.get_close_matches(name, FIELD_NAMES, n=1)
            raise ValueError(f"unknown field {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    for name in _REQUIRED:
        if name not in row:
            raise ValueError(f"missing field {name!r}")
    return Example(**row)


def parse_object(line: bytes | None) -> dict[str, Any]:
    """One row as an object; None stands for a line too long to be one. Raises ValueError or TypeError."""
    if line is None:
        raise ValueError(f"line longer than {_MAX_LINE_BYTES} bytes")
    value = _parse(line)
    if not isinstance(value, dict):
        raise TypeError(f"bad JSON: expected an object, got {type(value).__name__}")
    return value


def read_json(path: str | os.PathLike[str]) -> Any:
    """A whole file as one JSON value, as strictly as `parse_object` takes a row.

    Raises:
        ManifestError: the file cannot be read, is larger than 512 MiB, or is no JSON.
    """
    try:
        data = bytearray()
        with open(path, "rb") as file:  # read(limit) would take as much memory as the limit, however small the file
            while len(data) <= _MAX_ARRAY_BYTES and (part := file.read(1 << 20)):
                data += part
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > _MAX_ARRAY_BYTES:
        raise ManifestError(f"{path}: more than {_MAX_ARRAY_BYTES} bytes in one JSON value; write one row a line instead")
    try:
        return _parse(data)
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from None


def _parse(data: bytes | bytearray) -> Any:
    """A JSON value in which every number is finite, no key stands twice, and nothing is nested beyond use."""
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


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes | dict[str, Any] | None]]:
    """Numbered rows of a file of JSON lines (as bytes, see `parse_object`) or of one JSON array of objects (parsed).

    Raises:
        ManifestError: the file cannot be read, or its array is no array of objects.
    """
    path = Path(path)
    numbered = _lines(path)
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


class AudioChecker:
    """Checks examples' files against an audio root; each file's header is read once however many rows use it."""

    def __init__(self, root: str | os.PathLike[str], *, max_seconds: float = MAX_SECONDS):
        self._root = Path(root)
        self._resolved_root = self._root.resolve()
        self._max_seconds = max_seconds
        self._known: dict[str, AudioInfo | AudioError] = {}

    def check(self, example: Example) -> None:
        """Raises AudioError if the example's span cannot be used."""
        if example.audio is None:
            return
        if example.audio not in self._known:
            self._known[example.audio] = self._probe(example.audio)
        known = self._known[example.audio]
        if isinstance(known, AudioError):
            raise known
        check_span(
            known, start_seconds=example.start_seconds, end_seconds=example.end_seconds, max_seconds=self._max_seconds
        )

    def _probe(self, audio: str) -> AudioInfo | AudioError:
        path = self._root / audio
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError):  # a loop of links
            return AudioError("path cannot be resolved")
        if not resolved.is_relative_to(self._resolved_root):
            return AudioError("path leaves the audio root through a link")
        try:
            return probe_audio(path)
        except AudioError as error:
            return error


def refuse_if_too_bad(
    path: str | os.PathLike[str], problems: list[Problem], rows: int, max_bad_fraction: float
) -> None:
    """Raise ManifestError with the list if more than `max_bad_fraction` of `rows` are bad."""
    if len(problems) > max_bad_fraction * rows:
        raise ManifestError(
            "\n".join(
                [
                    f"{path}: {len(problems)} of {rows} rows are bad, more than max_bad_fraction {max_bad_fraction:g}",
                    *list_problems(problems),
                ]
            ),
            problems,
        )


def list_problems(problems: list[Problem], *, limit: int = _PROBLEMS_SHOWN) -> list[str]:
    """The first problems as indented lines, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Check a manifest from the command line; exit status 1 and one message if it cannot be used."""
    arguments = check_parser().parse_args(argv)
    try:
        manifest = read_manifest(
            arguments.manifest,
            audio_root=arguments.audio_root,
            max_bad_fraction=arguments.max_bad_fraction,
            max_seconds=arguments.max_seconds,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(manifest.summary())
    return 0


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Numbered non-blank lines; None stands for one longer than any row can be."""
    try:
        file = path.open("rb")
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
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error.strerror})") from None


def _parse_header(path: Path, line: bytes | None) -> dict[str, Any]:
    expected = f'expected a first line like {{"{VERSION_KEY}": {MANIFEST_VERSION}}}'
    try:
        header = parse_object(line)
    except (ValueError, TypeError) as error:
        raise ManifestError(f"{path}: {expected}, got: {error}") from None
    if VERSION_KEY not in header:
        raise ManifestError(f"{path}: {expected}, got none; models.data.readers converts other forms")
    if header[VERSION_KEY] != MANIFEST_VERSION:
        raise ManifestError(f"{path}: {expected}, got version {header[VERSION_KEY]!r}")
    return header


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"bad JSON: key {repeated!r} twice")
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"bad JSON: {name} is no number")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # 1e999 is legal JSON, but could not be written back
        raise ValueError(f"bad JSON: {text[:20]} is too large a number")
    return value


def _finite_int(text: str) -> int:
    _finite_float(text)  # beyond it arithmetic with floats would overflow
    return int(text)


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is legal JSON, but no text
        raise ValueError(f"{name}: expected text, got half of a surrogate pair") from None


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        raise ValueError(
            f"{name}: expected one of {list(allowed)}, got {value!r}" + (f", did you mean {near[0]!r}?" if near else "")
        )


def _check_span_fields(start: object, end: object) -> None:
    for name, value in (("start_seconds", start), ("end_seconds", end)):
        if value is None and name == "end_seconds":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number of seconds, got {type(value).__name__}")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}: expected a finite number from 0, got {value}")
    if end is not None and end <= start:
        raise ValueError(f"end_seconds: expected more than start_seconds {start:g}, got {end:g}")


def _check_relative(audio: str) -> None:
    """Refuse absolute paths of either kind of system, drive letters, "..", and null bytes."""
    windows = PureWindowsPath(audio)  # knows both separators
    if not audio.strip() or "\0" in audio:
        raise ValueError(f"audio: expected a relative path or null, got {audio!r}")
    if windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"audio: expected a path inside the audio root, got {audio!r}")


AUDIO_PLACEHOLDER = "<|audio|>"
