"""The answers of a run of Stage 1 on disk, as they come: a killed run goes on from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from models.io_utils import append_bytes, fsync_dir, locked
from models.pseudo_gt.writers import Answer

_COMPLETE = {"stage1_complete": True}


class Stage1Error(RuntimeError):
    """Stage 1 cannot go on; the message says why and what to do."""


class Journal:
    """The file: a line that names the settings, then one line for each answer. Only one run can write to it at a time.

    Args:
        identity: fingerprint of the settings.
        clips: hash of what is heard, by id, where the answers depend on it. An answer that heard something else does not count.
        restart: discard what an earlier run left.
    """

    def __init__(self, path: Path, identity: str, *, clips: Mapping[str, str] | None = None, restart: bool = False):
        self._path = path
        self._identity = identity
        self._clips = clips or {}
        self._restart = restart
        self._held = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Journal:
        try:
            self._file = self._held.enter_context(locked(self._path, f"{self._path}: another run is writing here"))
        except BlockingIOError as error:
            raise Stage1Error(str(error)) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._path.exists() and not self._path.stat().st_size:  # locking made it, and nothing was begun
            self._path.unlink()
        self._held.close()

    def begun(self) -> bool:
        """Whether the file holds an answer of these settings. Nothing is changed."""
        assert self._file is not None
        self._file.seek(0)
        first, *answers = self._file.read().splitlines()[:2] or [b""]
        return bool(answers) and first + b"\n" == _lines([self._header()])

    def read(self, known: set[str]) -> dict[str, Answer]:
        """The answers so far, of the ids in `known`. A last line that a kill cut short is removed from the file.

        A file of other settings is replaced if it holds no answer, or if its run wrote every answer.

        Raises:
            Stage1Error: the file is damaged, or holds an unfinished run of other settings.
        """
        assert self._file is not None
        self._file.seek(0)
        data = b"" if self._restart else self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            self._file.truncate(len(whole))
        header = self._header()
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            begun = rows.pop(0) if rows else None
            if begun is not None and begun["stage1_journal"] != 1:
                raise ValueError
            complete = bool(rows) and rows[-1] == _COMPLETE
            if not rows or (complete and begun != header):
                self._file.truncate(0)
                self._write([header])
                fsync_dir(self._path.parent)
                return {}
            if begun != header:
                raise Stage1Error(
                    f"{self._path}: an unfinished run of other settings or rows; finish that run, or discard its answers "
                    "with --restart"
                )
            told = [row for row in rows if row != _COMPLETE]
            answers = {row["id"]: _answer(row) for row in told if row.get("clip") == self._clips.get(row["id"])}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Stage1Error(f"{self._path}: damaged, not only at its end; --restart discards it") from None
        return {name: answer for name, answer in answers.items() if name in known}

    def append(self, answers: Mapping[str, str]) -> None:
        """Add answers by id; they are on the disk when this returns."""
        self._write([self._row(name, text) for name, text in answers.items()])

    def complete(self) -> None:
        """Note that every answer is there. The file stays for a run of the same settings; one of others may replace it."""
        self._write([_COMPLETE])

    def discard(self) -> None:
        """Remove the file, once the result of the complete run is written."""
        self._path.unlink()
        fsync_dir(self._path.parent)

    def _header(self) -> dict[str, Any]:
        return {"stage1_journal": 1, "fingerprint": self._identity}

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        append_bytes(self._path, _lines(rows))

    def _row(self, name: str, text: str) -> dict[str, Any]:
        clip = {"clip": self._clips[name]} if name in self._clips else {}
        return {"id": name, "text": text, **clip} | ({} if getattr(text, "ended", True) else {"ended": False})


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _answer(row: Mapping[str, Any]) -> Answer:
    if not isinstance(row["text"], str):
        raise TypeError
    return Answer(row["text"], ended=row.get("ended", True))
