"""The answers of a run of Stage 1 on disk, as they come: a killed run goes on from them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from models.io_utils import append_bytes, fsync_dir


class Stage1Error(RuntimeError):
    """Stage 1 cannot go on; the message says why and what to do."""


class Journal:
    """The file: a line that names the settings, then one line for each answer. Only one run can write to it at a time."""

    def __init__(self, path: Path, identity: str):
        self._path = path
        self._identity = identity
        self._file: BinaryIO | None = None

    def __enter__(self) -> Journal:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a+b")  # closed in __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise Stage1Error(f"{self._path}: another run is writing here") from None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()  # this releases the lock too

    def read(self, known: set[str]) -> dict[str, str]:
        """The answers so far, of the ids in `known`. A last line that a kill cut short is removed from the file."""
        assert self._file is not None
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            self._file.truncate(len(whole))
        lines = whole.splitlines()
        header = {"stage1_journal": 1, "fingerprint": self._identity}
        answers: dict[str, str] = {}
        try:
            begun = json.loads(lines[0]) if lines else None
            if len(lines) < 2 and (begun is None or begun["stage1_journal"] == 1):
                self._file.truncate(0)  # it holds no answer yet, so its settings do not matter
                self._write([header])
                fsync_dir(self._path.parent)
                return {}
            if begun != header:
                raise Stage1Error(
                    f"{self._path}: an unfinished run of other settings or rows; finish that run or delete the file"
                )
            for line in lines[1:]:
                row = json.loads(line)
                if not isinstance(row["text"], str):
                    raise TypeError
                if row["id"] in known:
                    answers[row["id"]] = row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Stage1Error(f"{self._path}: damaged, not only at its end; delete the file to start again") from None
        return answers

    def append(self, answers: Mapping[str, str]) -> None:
        """Add answers by id; they are on the disk when this returns."""
        self._write([{"id": name, "text": text} for name, text in answers.items()])

    def discard(self) -> None:
        """Remove the file, once the result of the complete run is written."""
        self._path.unlink()
        fsync_dir(self._path.parent)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_bytes(self._path, b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
