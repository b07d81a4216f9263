"""Bad rows: each is skipped and named; too many of them are an error."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

_MAX_REASON_CHARACTERS = 500
_MAX_ID_CHARACTERS = 200
_PROBLEMS_SHOWN = 20
_SKIPPED_SHOWN = 20


@dataclass(frozen=True)
class Problem:
    """A skipped row: its line number in the file (a header is line 1), its id if it has one, the reason, and the file.

    The reason is cut to 500 characters and the id to 200, since one field of a bad row may be very long.
    """

    row: int
    id: str | None
    reason: str
    file: str | None = None

    def __post_init__(self) -> None:
        if len(self.reason) > _MAX_REASON_CHARACTERS:
            object.__setattr__(self, "reason", self.reason[:_MAX_REASON_CHARACTERS] + " ...")
        if self.id is not None and len(self.id) > _MAX_ID_CHARACTERS:
            object.__setattr__(self, "id", self.id[:_MAX_ID_CHARACTERS] + " ...")

    def __str__(self) -> str:
        where = f"{self.file}: row {self.row}" if self.file else f"row {self.row}"
        return where + (f" ({self.id})" if self.id else "") + f": {self.reason}"


class ManifestError(ValueError):
    """A manifest cannot be used as a whole; `problems` lists the bad rows if they are the cause."""

    def __init__(self, message: str, problems: Iterable[Problem] = ()):
        self.problems = list(problems)
        super().__init__(message)


MISSING_CLIP = "missing file"  # opens the reason of a clip that is not there


def refuse_if_too_bad(
    path: str | os.PathLike[str],
    problems: list[Problem],
    rows: int,
    max_bad_fraction: float,
    *,
    audio_root: str | os.PathLike[str] | None = None,
) -> None:
    """Raise ManifestError with the list of bad rows if these are more than `max_bad_fraction` of `rows`.

    audio_root: where the clips were looked for; it is named if one is missing.
    """
    if len(problems) > max_bad_fraction * rows:
        missing = audio_root is not None and any(p.reason.startswith(f"audio: {MISSING_CLIP}") for p in problems)
        where = f"  clips were looked for in {audio_root}; --audio-root (in a recipe data.audio_root) names another folder"
        raise ManifestError(
            "\n".join(
                [
                    f"{path}: {len(problems)} of {rows} rows are bad, more than max_bad_fraction {max_bad_fraction:g}",
                    *list_problems(problems),
                    *([where] if missing else []),
                ]
            ),
            problems,
        )


def refuse_if_all_bad(path: str | os.PathLike[str], problems: list[Problem], good: int) -> None:
    """Raise ManifestError with the list of bad rows if `good` is 0: a manifest without rows cannot be read again."""
    if not good:
        raise ManifestError("\n".join([f"{path}: all {len(problems)} rows are bad", *list_problems(problems)]), problems)


def list_problems(problems: list[Problem], *, limit: int | None = _PROBLEMS_SHOWN, how: str = "") -> list[str]:
    """The first problems as indented lines, and how many more there are.

    Args:
        limit: None = all of them.
        how: follows the number of those that are not listed: how to see them.
    """
    lines = [f"  {problem}" for problem in problems[:limit]]
    if limit is not None and len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more{how}")
    return lines


def print_skipped(reasons: Iterable[object], *, file: TextIO | None = None) -> None:
    """Print a line for each of the first bad rows or examples, and how many more there are."""
    lines = [f"skipped {reason}" for reason in reasons]
    if len(lines) > _SKIPPED_SHOWN:
        lines[_SKIPPED_SHOWN:] = [f"skipped {len(lines) - _SKIPPED_SHOWN} more"]
    print(*lines, sep="\n", end="\n" if lines else "", file=file)
