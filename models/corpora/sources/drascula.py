"""The same acted lines in English and in Spanish, from the adventure game "Drascula" (Debian's drascula and drascula-spanish).

A file NAME.ALS is one line: bytes at 11,025 Hz, without a header. It has the same name in both languages. The letters of a name
say who speaks, and a name without letters is the hero's. The names S and F are sounds and not speech. The letter D stands for
three characters, and one line of it, D82, belongs to a fourth: it is left out.

The credits of the Spanish game are a film (CRD.BIN) that names who voices whom. drascula_cast.csv is what it shows, with the
number of an actor in place of the name; the Count "as himself" counts as an actor of his own. Several actors voice two
characters. The English credits name no voices, so an English actor may speak for more characters than are known here. Splits
go by the Spanish actors, for both languages.

The recordings differ between the languages in what is not speech. Nearly all Spanish files end with a byte 0 or with the rest of
a wav header (a loud click), and their zero level is lower. The mean spectra differ by up to 5 dB. `DrasculaLine.decode` takes all
of this away: it filters both languages half way towards each other. So the mean colour of a language as such is lost too.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.corpora.degrade import trim_silence
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
_COLOUR_STEP_HZ = 125
# The mean spectrum of the English lines minus that of the Spanish ones in dB, at 0, 125, 250 ... Hz: `mean_spectrum_db`.
COLOUR_DB = (
    -4.3, 1.0, 0.8, -1.1, -1.5, -0.7, -1.4, -1.3, -0.8, -1.0, -1.6, -0.8, 0.5, 1.5, 2.3,
    3.6, 4.1, 3.6, 3.2, 2.1, 1.1, 1.0, 1.9, 2.9, 2.9, 1.7, -0.1, -1.6, -2.3, -2.3,
    -1.4, -1.0, -0.9, -0.5, 0.0, 0.4, 0.7, 1.2, 1.6, 1.9, 2.5, 3.4, 4.2, 4.9, 5.1,
)  # fmt: skip
_LOWEST_HZ = 60.0  # below is no voice, and the Spanish recordings rumble
_FILTER_PAD = 512


@dataclass(frozen=True)
class DrasculaLine:
    """One line in one language: the name of its file, who speaks, and the file."""

    name: str
    code: str
    language: str
    path: Path

    def decode(self) -> tuple[np.ndarray, int]:
        """float32 (samples,) in the colour that both languages share, and the rate in Hz; raises AudioError."""
        samples = self.recorded()
        size = len(samples) + _FILTER_PAD
        frequency = np.fft.rfftfreq(size, 1.0 / RATE_HZ)
        half_db = np.interp(frequency, _COLOUR_STEP_HZ * np.arange(len(COLOUR_DB)), COLOUR_DB) / 2
        gain = 10.0 ** ((half_db if self.language == "Spanish" else -half_db) / 20.0)
        gain[frequency < _LOWEST_HZ] = 0.0
        filtered = np.fft.irfft(np.fft.rfft(samples, size) * gain, size)[: len(samples)]
        return filtered.astype(np.float32), RATE_HZ

    def recorded(self) -> np.ndarray:
        """float32 (samples,) with mean 0, as they were recorded; raises AudioError."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise AudioError(f"{self.path.name}: cannot be read ({error.strerror})") from None
        at = data.rfind(_WAV_REST, max(0, len(data) - _WAV_REST_BYTES))
        data = (data[:at] if at >= 0 else data).rstrip(b"\0")
        if not data:
            raise AudioError(f"{self.path.name}: no samples")
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128.0
        return samples - samples.mean()


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


def mean_spectrum_db(lines: Iterable[DrasculaLine]) -> np.ndarray:
    """The mean over lines of their power around 0, 125, 250 ... 5500 Hz, in dB above the mean power of the line.

    What COLOUR_DB was made with: the lines that both languages have, without the silence at their ends.
    """
    rows = []
    for line in lines:
        samples = trim_silence(line.recorded(), RATE_HZ)
        power = np.abs(np.fft.rfft(samples.astype(np.float64))) ** 2
        frequency = np.fft.rfftfreq(len(samples), 1.0 / RATE_HZ)
        near = [np.abs(frequency - f) <= _COLOUR_STEP_HZ for f in np.arange(0, RATE_HZ / 2, _COLOUR_STEP_HZ)]
        rows.append([10.0 * np.log10(power[at].mean() / power.mean() + 1e-6) for at in near])
    return np.mean(rows, axis=0)


def read_genders() -> dict[str, str]:
    """Code of a character -> "man" or "woman", from drascula_cast.csv. All characters of one code have the same."""
    with open(CAST_FILE, newline="", encoding="utf-8") as file:
        return {row["code"]: row["gender"] for row in csv.DictReader(file)}


def drascula_voices(codes: Iterable[str]) -> dict[str, str]:
    """Code -> the actors who speak it, such as "a03". Characters that share an actor have one name: "a02+a08+a09"."""
    return voices_of(codes, CAST_FILE)
