"""A data set turned into a manifest while it is read, with one row in memory: `python -m models convert ... --streaming`.

Training needs every row in any order, and the same order again after a stop. A shuffle buffer over a stream gives neither. So a
stream is read once: its clips become files, and its rows a manifest, which all later runs read.

What is read goes into a journal beside the manifest, MANIFEST.part, one JSON line a row. Every `COMMIT_ROWS` rows it is flushed
to the disk, with the position of the data set. A run that was killed goes on from there. At the end the journal becomes the
manifest. If too many rows are bad, the journal stays. It stays too if another manifest is in the way.

A run that finds a journal checks the clips of its bad rows again: one that was missing may be there now. The journal belongs to
the files of rows as they were, by their sizes, times and ends.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from models.data.example import Example, example_from_row
from models.data.hf_datasets import listed_clips
from models.data.json_rows import parse_object
from models.data.manifest import MANIFEST_VERSION, VERSION_KEY, header_with_root, refuse_other_file, refuse_other_rows
from models.data.problems import ManifestError, Problem, list_problems, refuse_if_all_bad, refuse_if_too_bad
from models.data.readers import ForeignRows, row_files
from models.data.rows import AudioChecker, reason_of
from models.io_utils import fingerprint, fsync_dir, locked, naming

COMMIT_ROWS = 500
_END_BYTES = 1 << 20  # of a file of rows, hashed at its beginning and at its end
_CLIPS_REMEMBERED = 10_000  # headers that need not be read again, for clips with many rows


def stream_into_manifest(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: str = "auto",
    audio_root: str | os.PathLike[str] | None = None,
    split: str | None = None,
    max_bad_fraction: float = 0.05,
    allow_links: bool = False,
    overwrite: bool = False,
) -> str:
    """Write the manifest `out` of the rows in `path`; other arguments as in `models.data.readers.read_foreign`.

    Args:
        overwrite: write over an `out` that holds something else.

    Returns:
        a summary for the terminal.

    Raises:
        ManifestError: as there; or the journal beside `out` is of other rows or other arguments, or is damaged; or `out` holds
            something else.
        BlockingIOError: another process is writing that journal.

    Memory: about 0.3 KiB a row for the ids, which have to be unique, and the list of the bad rows; no texts and no clips.
    """
    if not 0.0 <= max_bad_fraction <= 1.0:
        raise ValueError(f"max_bad_fraction: expected a number from 0 to 1, got {max_bad_fraction}")
    out = Path(out)
    if not overwrite:
        refuse_other_file(out)
    rows = ForeignRows(path, form=form, audio_root=audio_root, split=split)
    if not rows.root.is_dir():
        raise ManifestError(f"audio_root: expected a folder, got {rows.root}")
    settings = [str(Path(path).resolve()), rows.form, str(rows.root.resolve()), split, allow_links, _identity(rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    checker = AudioChecker(rows.root, allow_links=allow_links, known=_Recent())
    journal = _Journal(out.with_name(f"{out.name}.part"), fingerprint(settings), rows, checker)
    with locked(journal.path, f"{journal.path}: another conversion is writing here"):
        with journal:
            for number, line in journal.left():
                journal.add(number, *_converted(rows, number, line))
        if not journal.rows:
            raise ManifestError(f"{path}: expected at least one row, got none")
        try:
            refuse_if_too_bad(path, journal.problems, journal.rows, max_bad_fraction, audio_root=rows.root)
            refuse_if_all_bad(path, journal.problems, journal.good)
        except ManifestError as error:
            raise ManifestError(
                f"{error}\n{journal.path} keeps the rows that were read: the same command checks only their bad clips again; "
                "remove it if the rows change",
                error.problems,
            ) from None
        header = header_with_root({"form": rows.form}, audio_root=rows.root, folder=out.parent)
        journal.write_manifest(out, {**header, VERSION_KEY: MANIFEST_VERSION}, overwrite=overwrite)
    return journal.summary(rows.root)


def _identity(rows: ForeignRows) -> list[Any]:
    """What differs if the rows do: of each of their files the name, size, time and a hash of both ends; the listed clips."""
    known: list[Any] = []
    for path in row_files(rows.path, rows.form):
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ManifestError(f"{path}: expected a file that can be read again, got a pipe or a folder")
            with path.open("rb") as file:
                ends = hashlib.sha256(file.read(_END_BYTES))
                file.seek(max(0, status.st_size - _END_BYTES))
                ends.update(file.read(_END_BYTES))
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error.strerror})") from None
        known.append([str(path.resolve()), status.st_size, status.st_mtime_ns, ends.hexdigest()])
    return [*known, *([] if rows.dataset is None else listed_clips(rows.path, rows.dataset.kind))]


def _converted(rows: ForeignRows, number: int, line: Any) -> tuple[str | None, list[Example], str | None]:
    """The row's id, its examples, and why there are none."""
    row_id: str | None = None
    try:
        row = line if isinstance(line, dict) else parse_object(line)
        row_id = str(row["id"]) if isinstance(row.get("id"), (str, int)) else None
        return row_id, rows.convert(number, row), None
    except (ValueError, TypeError) as error:
        return row_id, [], reason_of(error)


class _Recent(dict):
    """The last entries; older ones are forgotten."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > _CLIPS_REMEMBERED:
            del self[next(iter(self))]


class _Journal:
    """The rows that were read so far, on disk, and what has to be known of all of them.

    Its lines: {"settings": fingerprint}; for each row {"n", "id", "examples"}, and "problem" if it was bad then, which is judged
    again; {"at": position} after every `COMMIT_ROWS` rows.
    """

    def __init__(self, path: Path, settings: str, rows: ForeignRows, checker: AudioChecker) -> None:
        self.path, self._settings, self._rows, self._checker = path, settings, rows, checker
        self._file: BinaryIO | None = None
        self._position: dict[str, Any] | None = None
        self._ids: set[int] = set()
        self.rows = 0
        self.problems: list[Problem] = []
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def __enter__(self) -> _Journal:
        good = self._recall() if self.path.is_file() else 0
        self._file = self.path.open("r+b" if good else "wb")
        self._file.truncate(good)
        self._file.seek(good)
        if not good:
            self._write({"settings": self._settings})
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        with naming(self.path), self._file:
            self._commit()

    def left(self) -> Iterator[tuple[int, Any]]:
        """The rows that are not in the journal."""
        dataset = self._rows.dataset
        numbered = self._rows.rows() if dataset is None else dataset.rows_from(self._position)
        known = self.rows
        return ((number, line) for number, line in numbered if number > known)

    def add(self, number: int, row_id: str | None, examples: list[Example], problem: str | None) -> None:
        problem = problem or self._problem_of(examples, check_clips=True)
        what = {"examples": [e.to_row() for e in examples], **({} if problem is None else {"problem": problem})}
        self._write({"n": number, "id": row_id, **what})
        self._count(number, row_id, examples, problem)
        if number % COMMIT_ROWS == 0:
            if self._rows.dataset is not None:
                self._write({"at": self._rows.dataset.position()})
            self._commit()

    def write_manifest(self, out: Path, header: dict[str, Any], *, overwrite: bool) -> None:
        """The journal becomes the manifest: readers see the old file or the whole new one. ManifestError if that is another."""
        bad = {problem.row for problem in self.problems}
        made = out.with_name(f".{out.name}.tmp")
        with naming(made), _removed_on_errors(made), made.open("wb") as file:
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) if out.suffix == ".gz" else nullcontext(file) as lines:
                lines.write(_line(header))
                for entry, _ in self._entries():
                    if entry.get("n") not in bad:
                        lines.writelines(_line(row) for row in entry.get("examples", ()))
            file.flush()
            os.fsync(file.fileno())
        with _removed_on_errors(made):
            if not overwrite:
                with gzip.open(made) if out.suffix == ".gz" else made.open("rb") as content:
                    refuse_other_rows(out, content)
            made.replace(out)
        self.path.unlink()
        fsync_dir(out.parent)

    @property
    def good(self) -> int:
        """How many examples there are."""
        return sum(self._counts.values())

    def summary(self, root: Path) -> str:
        """As `Manifest.summary`."""
        lines = [f"{self.good} examples, {len(self.problems)} rows skipped; audio root {root}"]
        lines += [f"  {split:5} {task:14} {kind:8} {n:6}" for (split, task, kind), n in sorted(self._counts.items())]
        return "\n".join(lines + list_problems(self.problems))

    def _recall(self) -> int:
        """Read the journal of a run that was stopped; the bytes of its whole lines."""
        good = 0
        for entry, end in self._entries():
            if not good and entry.get("settings") != self._settings:
                raise ManifestError(
                    f"{self.path}: expected the journal of these rows and arguments, got that of others, or the files of "
                    "rows have changed since; remove it to begin again"
                )
            good = end
            if "at" in entry:
                self._position = entry["at"]
            elif "n" in entry:
                examples, problem = [example_from_row(row) for row in entry["examples"]], entry.get("problem")
                if examples and entry["id"] is not None:
                    self._rows.numbers.remember(entry["id"], examples)
                if examples:
                    problem = self._problem_of(examples, check_clips=problem is not None)
                self._count(entry["n"], entry["id"], examples, problem)
        return good

    def _entries(self) -> Iterator[tuple[dict[str, Any], int]]:
        """(entry, where its line ends); a line that was cut off ends them."""
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    entry = json.loads(line)
                except ValueError:
                    raise ManifestError(
                        f"{self.path}: expected a journal's line at byte {end}, got {line[:40]!r}; remove the file to begin again"
                    ) from None
                end += len(line)
                yield entry, end

    def _problem_of(self, examples: list[Example], *, check_clips: bool) -> str | None:
        """Why a row with these examples is a bad one."""
        try:
            for example in examples:
                if hash(example.id) in self._ids:
                    raise ValueError(f"duplicate id {example.id!r}")
                if check_clips:
                    self._checker.check(example)
        except ValueError as error:
            return reason_of(error)
        return None

    def _count(self, number: int, row_id: str | None, examples: list[Example], problem: str | None) -> None:
        self.rows = number
        if problem is not None:
            self.problems.append(Problem(number, row_id, problem, str(self._rows.path)))
            return
        for example in examples:
            self._ids.add(hash(example.id))
            self._counts[example.split, example.task or "-", example.kind] += 1

    def _write(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        with naming(self.path):
            self._file.write(_line(entry))

    def _commit(self) -> None:
        assert self._file is not None
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def _removed_on_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n").encode()
