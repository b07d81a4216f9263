"""The manifest: one JSONL file that says everything about a data set except the sound itself.

Line 1 is the header, an object with "kdkernels_manifest": 1 (the version) and whatever else its maker wants to keep.
Each further line is one `Example` (example.py). Its keys are the names of that class's fields; a missing field has its
default value:

    {"kdkernels_manifest": 1, "sources": ["queen"]}
    {"id": "joe-1/neutral", "audio": "audio/joe-1.flac", "transcription": "Good luck.", "metadata": {"gender": "man"},
     "task": "gender", "question": "Is the speaker a man or a woman?", "choices": ["man", "woman"], "answer": "man",
     "target": "The speaker is a man.", "target_source": "template", "split": "train", "kind": "neutral"}

(one line each in the file). "more_audio" lists further clips of the same question. Audio paths are relative to the audio root.
That is the folder that the header names as "audio_root", relative to the manifest's own folder; without it, the manifest's
folder. The paths may not leave the root: not by "..", not as absolute paths, and through links only if the reader allows them
(`allow_links`).

Bad rows are skipped, counted and listed. More of them than `max_bad_fraction` are an error. `python -m models check FILE`
checks a manifest.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from models.data.audio import MAX_SECONDS, AudioError, AudioInfo
from models.data.example import AUDIO_PLACEHOLDER, KINDS, SPLITS, TARGET_SOURCES, Example, example_from_row
from models.data.json_rows import numbered_lines, parse_object
from models.data.problems import ManifestError, Problem, list_problems
from models.data.rows import AudioChecker, collect_examples
from models.io_utils import atomic_write_bytes

__all__ = [
    "AUDIO_PLACEHOLDER",
    "KINDS",
    "MANIFEST_VERSION",
    "ROOT_KEY",
    "SPLITS",
    "TARGET_SOURCES",
    "VERSION_KEY",
    "Example",
    "Manifest",
    "ManifestError",
    "Problem",
    "header_with_root",
    "manifest_bytes",
    "read_header",
    "read_manifest",
    "refuse_other_file",
    "refuse_other_rows",
    "write_manifest",
]

MANIFEST_VERSION = 1
VERSION_KEY = "kdkernels_manifest"
ROOT_KEY = "audio_root"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """What `read_manifest` returns: the good rows, the bad ones, and the folder of the audio.

    `row_count`: rows of the file, the bad ones too; None where every good row gave one example.
    """

    examples: list[Example]
    problems: list[Problem]
    audio_root: Path
    header: dict[str, Any]
    path: Path | None = None
    row_count: int | None = None

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

    @property
    def rows(self) -> int:
        """Rows of the file, the bad ones too."""
        return len(self.examples) + len(self.problems) if self.row_count is None else self.row_count

    def summary(self, *, problems: bool = True) -> str:
        """Counts by split, task and kind, and the bad rows by reason: a few lines for the terminal."""
        lines = [f"{len(self.examples)} examples, {len(self.problems)} rows skipped; audio root {self.audio_root}"]
        counts = Counter((example.split, example.task or "-", example.kind) for example in self.examples)
        lines += [f"  {split:5} {task:14} {kind:8} {count:6}" for (split, task, kind), count in sorted(counts.items())]
        return "\n".join(lines + (list_problems(self.problems) if problems else []))


def read_manifest(
    path: str | os.PathLike[str],
    *,
    audio_root: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = 0.05,
    check_audio: bool = True,
    max_seconds: float = MAX_SECONDS,
    allow_links: bool = False,
    infos: dict[str, AudioInfo | AudioError] | None = None,
) -> Manifest:
    """Read and check a manifest.

    Args:
        path: the JSONL file.
        audio_root: folder that audio paths are relative to; None is the one that the header names, or the manifest's own.
        max_bad_fraction: more bad rows than this fraction raise ManifestError.
        check_audio: read each clip's header too (nothing is decoded).
        max_seconds: longest span allowed; the header decides.
        allow_links: clips may be links that leave the audio root, as in a hub's cache, git-annex or DVC.
        infos: is filled with what each clip's header says, or why it cannot be read, by its path.

    Returns:
        Manifest with the good rows in file order, and a Problem for each bad one.

    Raises:
        ManifestError: the file is missing, has no header or another version, has no row, or too many bad ones. The
            message lists the first of them; `problems` has all.
        ValueError: `max_bad_fraction` lies outside [0, 1].
    """
    path = Path(path)
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction: expected a number from 0 to 1, got {max_bad_fraction}")
    if audio_root is not None and check_audio and not Path(audio_root).is_dir():
        raise ManifestError(f"audio_root: expected a folder, got {audio_root}")
    lines = numbered_lines(path)
    header = _parse_header(path, lines)
    root = Path(audio_root) if audio_root is not None else _named_root(path, header)
    if check_audio and not root.is_dir():
        raise ManifestError(f"{path}: expected a folder of audio, got {root}; --audio-root names another")
    examples, problems = collect_examples(
        path,
        lines,
        lambda _, row: [example_from_row(row)],
        checker=AudioChecker(root, max_seconds=max_seconds, allow_links=allow_links, known=infos) if check_audio else None,
        max_bad_fraction=max_bad_fraction,
    )
    return Manifest(examples, problems, root, header, path)


def write_manifest(
    path: str | os.PathLike[str], examples: Iterable[Example], *, header: Mapping[str, Any] | None = None
) -> Path:
    """Write a manifest atomically: readers see the old file or the whole new one. A name that ends with .gz is packed by gzip.

    Raises:
        ValueError: see `manifest_bytes`.
    """
    content = manifest_bytes(examples, header=header)
    return atomic_write_bytes(path, gzip.compress(content, mtime=0) if Path(path).suffix == ".gz" else content)


def manifest_bytes(examples: Iterable[Example], *, header: Mapping[str, Any] | None = None) -> bytes:
    """What `write_manifest` writes, not packed.

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
    return ("\n".join(lines) + "\n").encode()


def refuse_other_file(path: str | os.PathLike[str]) -> None:
    """Raise ManifestError if a command would write a manifest over a file that is none. An empty file is nothing."""
    path = Path(path)
    if path.exists() and (not path.is_file() or path.stat().st_size):
        try:
            read_header(path)
        except ManifestError:
            raise ManifestError(f"{path}: holds no manifest; choose another --out or --overwrite") from None


def refuse_other_rows(path: str | os.PathLike[str], content: BinaryIO) -> None:
    """Raise ManifestError if `path` holds something else than the manifest that `content` has, not packed."""
    path = Path(path)
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as there:
            same = True
            while same and (block := content.read(_BLOCK_BYTES)):
                same = there.read(len(block)) == block
            same = same and not there.read(1)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        same = False
    if not same:
        raise ManifestError(f"{path}: holds other rows or another header than these; choose another --out or --overwrite")


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header alone. Raises ManifestError as `read_manifest` does."""
    return _parse_header(Path(path), numbered_lines(Path(path)))


def _parse_header(path: Path, lines: Iterator[tuple[int, bytes | None]]) -> dict[str, Any]:
    """The header, which is the next of `lines`."""
    first = next(lines, None)
    if first is None:
        raise ManifestError(f"{path}: expected a header line with {VERSION_KEY!r}, got an empty file")
    expected = f'expected a first line like {{"{VERSION_KEY}": {MANIFEST_VERSION}}}'
    try:
        header = parse_object(first[1])
    except (ValueError, TypeError) as error:
        raise ManifestError(f"{path}: {expected}, got: {error}") from None
    if VERSION_KEY not in header:
        raise ManifestError(f"{path}: {expected}, got none; python -m models convert reads other layouts")
    if header[VERSION_KEY] != MANIFEST_VERSION:
        raise ManifestError(f"{path}: {expected}, got version {header[VERSION_KEY]!r}")
    return header


def _named_root(path: Path, header: Mapping[str, Any]) -> Path:
    """The audio root that a manifest names, or its own folder."""
    named = header.get(ROOT_KEY, "")
    if not isinstance(named, str) or "\0" in named:
        raise ManifestError(f"{path}: expected a folder as {ROOT_KEY!r} in the header, got {named!r}")
    return path.parent / named


def header_with_root(
    header: Mapping[str, Any], *, audio_root: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> dict[str, Any]:
    """The header of a manifest in `folder` whose audio paths are relative to `audio_root`; it names that root if it has to."""
    plain = {key: value for key, value in header.items() if key not in (VERSION_KEY, ROOT_KEY)}
    relative = os.path.relpath(Path(audio_root).resolve(), Path(folder).resolve())
    return plain if relative == os.curdir else {ROOT_KEY: relative.replace(os.sep, "/"), **plain}


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
