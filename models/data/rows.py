"""Turns rows into checked examples. Every row gives its examples or a `Problem`."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from models.data.audio import MAX_SECONDS, AudioError, AudioInfo, check_span, probe_audio
from models.data.example import Example
from models.data.json_rows import parse_object
from models.data.problems import MISSING_CLIP, ManifestError, Problem, refuse_if_too_bad


def collect_examples(
    path: str | os.PathLike[str],
    rows: Iterable[tuple[int, bytes | dict[str, Any] | None]],
    convert: Callable[[int, dict[str, Any]], list[Example]],
    *,
    checker: AudioChecker | None,
    max_bad_fraction: float,
) -> tuple[list[Example], list[Problem]]:
    """The examples of all good rows in order, and a Problem for each bad row.

    Args:
        path: the file, for messages.
        rows: numbered lines, or objects that are parsed already.
        convert: (number, row) -> the row's examples. A row with a bad example gives none at all.
        checker: checks the audio; None does not.
        max_bad_fraction: the largest fraction of bad rows that is accepted.

    Raises:
        ManifestError: there is no row, or too many are bad.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    first_row: dict[str, int] = {}
    count = 0
    for number, line in rows:
        count += 1
        row_id: str | None = None
        try:
            row = line if isinstance(line, dict) else parse_object(line)
            row_id = str(row["id"]) if isinstance(row.get("id"), (str, int)) else None
            converted = convert(number, row)
            for example in converted:
                if example.id in first_row:
                    raise ValueError(f"duplicate id {example.id!r}, first in row {first_row[example.id]}")
                if checker is not None:
                    checker.check(example)
        except (ValueError, TypeError) as error:
            problems.append(Problem(number, row_id, reason_of(error), str(path)))
        else:
            first_row.update((example.id, number) for example in converted)
            examples += converted
    if count == 0:
        raise ManifestError(f"{path}: expected at least one row, got none")
    refuse_if_too_bad(path, problems, count, max_bad_fraction, audio_root=None if checker is None else checker.root)
    return examples, problems


def reason_of(error: ValueError | TypeError) -> str:
    """What a `Problem` says of the error that made its row a bad one."""
    return f"audio: {error.reason}" if isinstance(error, AudioError) else str(error)


ALLOW_LINKS = "--allow-links (in Python allow_links=True, in a recipe data.allow_links=true)"


def link_problem(root: Path, audio: str, *, allow_links: bool) -> str | None:
    """Why a clip's path may not be followed: a link in it leaves the audio root. None if it may."""
    try:
        resolved = (root / audio).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links
        return "path cannot be resolved"
    if allow_links or resolved.is_relative_to(root.resolve()):
        return None
    return f"path leaves the audio root through a link; {ALLOW_LINKS} permits that"


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


class AudioChecker:
    """Checks the audio of examples: each file lies in the audio root, and its header is read once however many rows use it.

    Args:
        allow_links: a file may lie elsewhere if a link in the audio root leads there.
        known: is filled with what the header of each file says, by its path; None keeps that inside.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        max_seconds: float = MAX_SECONDS,
        allow_links: bool = False,
        known: dict[str, AudioInfo | AudioError] | None = None,
    ):
        self.root = Path(root)
        self._allow_links = allow_links
        self._max_seconds = max_seconds
        self._known: dict[str, AudioInfo | AudioError] = {} if known is None else known

    def check(self, example: Example) -> None:
        """Raise AudioError, which names the clip, if one of the example's clips, or its span, cannot be used."""
        for audio, start, end in example.clips:
            if audio not in self._known:
                self._known[audio] = self._probe(audio)
            known = self._known[audio]
            try:
                if isinstance(known, AudioError):
                    raise known
                check_span(known, start_seconds=start, end_seconds=end, max_seconds=self._max_seconds)
            except AudioError as error:
                raise AudioError(f"{error.reason} ({audio!r})") from None

    def _probe(self, audio: str) -> AudioInfo | AudioError:
        if problem := link_problem(self.root, audio, allow_links=self._allow_links):
            return AudioError(problem)
        try:
            return probe_audio(self.root / audio)
        except AudioError as error:
            if error.reason == MISSING_CLIP and "\\" in audio:
                return AudioError(f"{MISSING_CLIP}; a path has / between its folders, this one has \\")
            if error.reason == MISSING_CLIP:
                for form in ("NFC", "NFD"):
                    name = unicodedata.normalize(form, audio)
                    if name != audio and _is_there(self.root / name):
                        return AudioError(f"{MISSING_CLIP}; its name is there in another Unicode form ({form})")
            return error
