"""Cries and short sentences of fighting hedgehogs, from Debian's hedgewars-data: 15 voice sets with the same names.

A set is a folder (British), a recording is a file of it (Laugh.ogg). The name says what is cried: some are words ("Hello") and
some are not ("Ow1", "Laugh"). Where the sets differ in that ("Jump1", "Nooo"), the recording is left out.

Nobody says who speaks a set. Sets that share a recording byte by byte count as one voice, and a recording is used once. The set
Robot is left out: it is a machine's voice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from models.io_utils import sha256_file

# Sets that have a recording in common; the other sets have none with each other.
SHARED_VOICES = (("Classic", "Default", "Default_uk", "HillBilly"), ("Default_pl", "Russian_pl"))
_LEFT_OUT = ("Robot",)
_WORDLESS = (*(f"Ow{n}" for n in range(1, 5)), *(f"Ooff{n}" for n in range(1, 4)), "Laugh", "Hmm", "PoisonCough", "PoisonMoan")
# Shouts that are words in one set and none in another.
_EITHER = ("Jump1", "Jump2", "Jump3", "Ouch", "Nooo", "Uh-oh", "Oops", *(f"Firepunch{n}" for n in range(1, 7)))


@dataclass(frozen=True)
class Cry:
    """One recording: the set, its name, and the file."""

    voice_set: str
    name: str
    path: Path

    @property
    def kind(self) -> str:
        """"wordless" or "spoken"."""
        return "wordless" if self.name in _WORDLESS else "spoken"

    @property
    def voice(self) -> str:
        """The set, or all sets that may have the same voice: "Default_pl+Russian_pl"."""
        return "+".join(next((sets for sets in SHARED_VOICES if self.voice_set in sets), (self.voice_set,)))


def read_cries(root: str | os.PathLike[str]) -> list[Cry]:
    """The recordings that are clearly words or clearly none, sorted by set and name; of equal files only the first.

    Raises:
        ValueError: `root` has no voice sets.
    """
    cries, seen = [], set()
    for path in sorted(Path(root).glob("*/*.ogg")):
        if path.is_symlink() or path.parent.name in _LEFT_OUT or path.stem in _EITHER:
            continue
        digest = sha256_file(path)
        if digest not in seen:
            seen.add(digest)
            cries.append(Cry(path.parent.name, path.stem, path))
    if not cries:
        raise ValueError(f"root: expected a folder with the voices of Hedgewars, got {root}")
    return cries
