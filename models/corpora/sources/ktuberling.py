"""Spoken names of toys in many languages, from Debian's ktuberling-data (the potato game).

LANGUAGE.soundtheme names the file of each word: <sound name="hat" file="en/hat.ogg" />. The names are English and the same
in every language. Each language has one voice or a few.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

# The languages of the language task. The other folders hold a dozen words or less, or other languages.
LANGUAGES = {"en": "English", "fr": "French", "ru": "Russian"}
_SOUND = re.compile(r'<sound\s+name="(?P<name>[^"]+)"\s+file="(?P<file>[^"]+)"')


@dataclass(frozen=True)
class WordRecording:
    """One word: its English name ("egypt_camel"), the language, and the file."""

    name: str
    code: str
    path: Path

    @property
    def language(self) -> str:
        return LANGUAGES[self.code]

    @property
    def gloss(self) -> str:
        """The English word or words: "egypt camel"."""
        return " ".join(self.name.replace("_", " ").split())


def read_words(root: str | os.PathLike[str]) -> list[WordRecording]:
    """All words of LANGUAGES whose file is there, sorted by language and name.

    Raises:
        ValueError: `root` has no sound theme with recordings.
    """
    root = Path(root)
    recordings = []
    for code in sorted(LANGUAGES):
        try:
            theme = (root / f"{code}.soundtheme").read_text("utf-8", errors="replace")
        except OSError:
            continue
        files = {match["name"]: root / match["file"] for match in _SOUND.finditer(theme)}
        for name, path in sorted(files.items()):
            # The themes are not ours, so only regular files in the language's own folder are read.
            if path.parent == root / code and path.is_file() and not path.is_symlink():
                recordings.append(WordRecording(name, code, path))
    if not recordings:
        raise ValueError(f"root: expected a folder with KTuberling sounds, got {root}")
    return recordings
