"""The same acted lines in English and in Spanish, from the adventure game "Drascula" (Debian's drascula and drascula-spanish).

A file NAME.ALS is one line: bytes at 11,025 Hz, without a header. It has the same name in both languages. The letters of a name
say who speaks, and a name without letters is the hero's. The names S and F are sounds and not speech. The letter D stands for
three characters, and one line of it, D82, belongs to a fourth: it is left out.

The credits of the Spanish game are a film (CRD.BIN) that names who voices whom. drascula_cast.csv is what it shows, with the
number of an actor in place of the name; the Count "as himself" counts as an actor of his own. Several actors voice two
characters. The English credits name no voices, so an English actor may speak for more characters than are known here. Splits
go by the Spanish actors, for both languages.

The recordings differ between the languages in what is not speech: nearly all Spanish files end with a byte 0 or with the rest of
a wav header (a loud click), and their zero level is lower. `DrasculaLine.decode` takes both away.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.corpora.sources.queen import voices_of
from models.data.audio import AudioError

RATE_HZ = 11_025
CAST_FILE = Path(__file__).with_name("drascula_cast.csv")
_HERO = "HERO"
_NAME = re.compile(r"(?P<code>[A-Z]*)\d+")
_NOT_SPEECH = {"S", "F"}
_ANOTHERS = {"D82"}  # the bartender's, under the letter of others
_WAV_REST = b"fact\x04\0\0\0"
_WAV_REST_BYTES = 64  # it lies in the last bytes of a file


@dataclass(frozen=True)
class DrasculaLine:
    """One line in one language: the name of its file, who speaks, and the file."""

    name: str
    code: str
    language: str
    path: Path

    def seconds(self) -> float:
        """The length of the file in seconds, with its silence."""
        return self.path.stat().st_size / RATE_HZ

    def decode(self) -> tuple[np.ndarray, int]:
        """float32 (samples,) with mean 0, and the rate in Hz; raises AudioError."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise AudioError(f"{self.path.name}: cannot be read ({error.strerror})") from None
        at = data.rfind(_WAV_REST, max(0, len(data) - _WAV_REST_BYTES))
        data = (data[:at] if at >= 0 else data).rstrip(b"\0")
        if not data:
            raise AudioError(f"{self.path.name}: no samples")
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128.0
        return samples - samples.mean(), RATE_HZ


def read_lines(root: str | os.PathLike[str], language: str) -> list[DrasculaLine]:
    """The lines of one language whose speaker is known, sorted by name.

    Args:
        root: folder of the .ALS files.
        language: "English" or "Spanish".

    Raises:
        ValueError: `root` has no such lines.
    """
    known = read_genders()
    lines = []
    for path in sorted(Path(root).glob("*.ALS")):
        match = _NAME.fullmatch(path.stem)
        # The Spanish folder has links to the three English lines that were not spoken in Spanish.
        if match is None or path.is_symlink() or match["code"] in _NOT_SPEECH or path.stem in _ANOTHERS:
            continue
        code = match["code"] or _HERO
        if code in known:
            lines.append(DrasculaLine(path.stem, code, language, path))
    if not lines:
        raise ValueError(f"root: expected a folder with the lines of Drascula, got {root}")
    return lines


def read_genders() -> dict[str, str]:
    """Code of a character -> "man" or "woman", from drascula_cast.csv. All characters of one code have the same."""
    with open(CAST_FILE, newline="", encoding="utf-8") as file:
        return {row["code"]: row["gender"] for row in csv.DictReader(file)}


def drascula_voices(codes: Iterable[str]) -> dict[str, str]:
    """Code -> the actors who speak it, such as "a03". Characters that share an actor have one name: "a02+a08+a09"."""
    return voices_of(codes, CAST_FILE)
