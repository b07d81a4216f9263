"""Spoken names of pictures in many languages, from Debian's tuxpaint-stamps-default.

A picture NAME has its English name in the first line of NAME.txt and translations in the other lines ("fr.utf8=Un
corbeau."). NAME_desc.ogg is the English recording and NAME_desc_fr.ogg the French one. One voice speaks nearly all of a
language, so a model can tell the languages by their voices. Corpora are split by picture, not by voice.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# Languages with several hundred recordings. The others have too few, or no texts.
LANGUAGES = {
    "fr": "French",
    "es": "Spanish",
    "ca": "Catalan",
    "ro": "Romanian",
    "bg": "Bulgarian",
    "ru": "Russian",
    "el": "Greek",
    "da": "Danish",
}
_RECORDING = re.compile(r"(?P<stamp>.+)_desc_(?P<code>[a-z]{2})\.ogg")
_MAX_TEXT_BYTES = 1 << 16


@dataclass(frozen=True)
class StampRecording:
    """One recording: the picture's path without suffix, the language, the file, its text and the English name."""

    stamp: str
    code: str
    path: Path
    text: str
    english: str

    @property
    def language(self) -> str:
        return LANGUAGES[self.code]


def read_stamps(root: str | os.PathLike[str]) -> list[StampRecording]:
    """All recordings in LANGUAGES that have an English name, sorted by picture and language.

    Raises:
        ValueError: `root` has no spoken stamps.
    """
    root = Path(root)
    recordings = []
    for path in sorted(root.rglob("*_desc_??.ogg")):
        match = _RECORDING.fullmatch(path.name)
        if match is None or match["code"] not in LANGUAGES or path.is_symlink():
            continue
        english, translations = _texts(path.with_name(f"{match['stamp']}.txt"))
        if not english:
            continue
        stamp = path.with_name(match["stamp"]).relative_to(root).as_posix()
        text = translations.get(match["code"], english)
        recordings.append(StampRecording(stamp, match["code"], path, text, english))
    if not recordings:
        raise ValueError(f"root: expected a folder with spoken Tux Paint stamps, got {root}")
    return recordings


def _texts(path: Path) -> tuple[str, dict[str, str]]:
    """The English name and the translations by language code; empty if the file cannot be read."""
    try:
        lines = path.read_bytes()[:_MAX_TEXT_BYTES].decode("utf-8", errors="replace").splitlines()
    except OSError:
        return "", {}
    pairs = (line.partition(".utf8=") for line in lines[1:])
    translations = {code: " ".join(text.split()) for code, separator, text in pairs if separator}
    return " ".join(lines[0].split()) if lines else "", translations
