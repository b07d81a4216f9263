"""Czech lines of a woman and a man, the two fish of the game "Fish Fillets" (Debian's fillets-ng-data-cs and fillets-ng-data).

A recording lies in LEVEL/cs/NAME.ogg. "-m-" in its name is the small fish, whom a woman speaks, and "-v-" is the big fish, whom
a man speaks. The scripts of the game (LEVEL/dialogs_cs.lua) say the same by the font of a line, and give its words. A recording
is used only if both agree; the others have no line in the script of their level.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

GENDERS = {"m": "woman", "v": "man"}
_FONTS = {"font_small": "m", "font_big": "v"}
_SPEAKER = re.compile(r"-([mv])-")
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_LINE = re.compile(rf"dialogId\({_QUOTED},\s*{_QUOTED},\s*{_QUOTED}\)\s*dialogStr\({_QUOTED}\)")


@dataclass(frozen=True)
class Dialog:
    """One line of a script: its level, its name, who says it ("m", "v" or "" for another), and the Czech words."""

    level: str
    name: str
    voice: str
    text: str


@dataclass(frozen=True)
class FilletsClip:
    """One recording: its level and name, who speaks ("m" or "v"), the words, and the file."""

    level: str
    name: str
    voice: str
    text: str
    path: Path

    @property
    def gender(self) -> str:
        return GENDERS[self.voice]


def read_dialogs(root: str | os.PathLike[str]) -> list[Dialog]:
    """All lines of the Czech scripts below `root`, sorted by level.

    Raises:
        ValueError: `root` has no scripts.
    """
    dialogs = []
    for path in sorted(Path(root).rglob("dialogs_cs.lua")):
        level = path.parent.relative_to(root).as_posix()
        for match in _LINE.finditer(path.read_text("utf-8", errors="replace")):
            dialogs.append(Dialog(level, match[1], _FONTS.get(match[2], ""), " ".join(match[4].split())))
    if not dialogs:
        raise ValueError(f"root: expected a folder with the scripts of Fish Fillets, got {root}")
    return dialogs


def read_clips(root: str | os.PathLike[str], dialogs: Iterable[Dialog]) -> list[FilletsClip]:
    """The recordings of the two fish whose name and script name the same speaker, sorted by path.

    Raises:
        ValueError: `root` has no such recordings.
    """
    said = {(d.level, d.name): d for d in dialogs}
    clips = []
    for path in sorted(Path(root).rglob("*.ogg")):
        match = _SPEAKER.search(path.stem)
        if match is None or path.is_symlink() or path.parent.name != "cs":
            continue
        dialog = said.get((path.parent.parent.relative_to(root).as_posix(), path.stem))
        if dialog is not None and dialog.voice == match[1]:
            clips.append(FilletsClip(dialog.level, dialog.name, dialog.voice, dialog.text, path))
    if not clips:
        raise ValueError(f"root: expected a folder with the Czech lines of Fish Fillets, got {root}")
    return clips
