"""Acted English speech from the adventure game "Flight of the Amazon Queen" (Debian's flight-of-the-amazon-queen).

The game's one resource file (queen.1c) holds 6,745 spoken lines as mp3, and their texts in the tables of its dialogues. A
table numbers its sentences. The name of a sound, such as 02 0006 J 1, has four fields: the number of the dialogue, the number
of the sentence, who speaks it ("J" the hero Joe, "P" the other person), and the part of the sentence. Sentences of several
parts are cut at the stage directions ("*" and a code) between the parts. Only sentences with as many parts as sounds are kept.

A speaker here is a character. Who voices whom stands in the file's voice credits (CREDIT2.CRD), which `read_credits` reads.
queen_actors.csv is what it read, with the number of an actor in place of the name, in the order of the credits. The column `code`
is ours: the name of the character's dialogues in the file. LARIS is the bellboy, LOU is Skip, TAM is Mary-Lou Cook, DEATH is
Charon, and ORACLE is the temple's guardian. Characters without a code have no line here whose text is known.

LOLA and KLUNK are credited to two actors each. `voices_of` joins actors that share a character, so that splits by actor hold
whoever spoke a line.
"""

from __future__ import annotations

import csv
import io
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from models.data.audio import AudioError

# Decided by the characters' names, the credits and words ("I'm Mary-Lou Cook. My husband Jimmy and I run this mission.") and by
# their pitch. Characters of unclear voice (children, ghosts, animals) are left out.
SPEAKER_GENDER = {
    **dict.fromkeys(("JOE", "BOB", "SPARKY", "JIM", "KLUNK", "DEATH", "HENRY", "BUD", "FRANK", "LARIS", "IAN"), "man"),
    **dict.fromkeys(("CHIEF", "AND", "WEDGE", "CHEF", "JOHN"), "man"),
    **dict.fromkeys(("FAYE", "NAOMI", "PRIN", "LOLA", "TAM"), "woman"),
    **dict.fromkeys(("SEC", "ZOMBIE", "ORACLE", "SHOWERAM"), "woman"),
}
ACTORS_FILE = Path(__file__).with_name("queen_actors.csv")
_CREDITS = "CREDIT2.CRD"
_HERO = "JOE"
_TABLE_ENTRY_BYTES = 21
_BANK_HEADER_BYTES = 20
_LEVEL_BYTES = 96
_FIRST_LEVEL = 32
_STAGE_DIRECTION = re.compile(r"\*[A-Z0-9]{2}\d{0,4}")


@dataclass(frozen=True)
class QueenLine:
    """One spoken line: its sound's name, who speaks, the words, and the mp3 in the resource file."""

    clip_id: str
    speaker: str
    text: str
    mp3: bytes

    def duration_seconds(self) -> float:
        """The length in seconds, from the mp3's headers; raises AudioError."""
        try:
            return sf.info(io.BytesIO(self.mp3)).duration
        except Exception as error:  # libsndfile raises several unrelated types
            raise AudioError(f"{self.clip_id}: corrupt mp3 ({type(error).__name__})") from None

    def decode(self) -> tuple[np.ndarray, int]:
        """float32 (samples,) and the rate in Hz; raises AudioError."""
        try:
            samples, rate_hz = sf.read(io.BytesIO(self.mp3), dtype="float32", always_2d=True)
        except Exception as error:  # as above
            raise AudioError(f"{self.clip_id}: corrupt mp3 ({type(error).__name__})") from None
        return samples.mean(1), rate_hz


def read_lines(path: str | os.PathLike[str]) -> list[QueenLine]:
    """All lines of the resource file whose text is known, sorted by clip id.

    Raises:
        ValueError: the file is not the game's resource file, or its tables point outside it.
    """
    data = Path(path).read_bytes()
    entries = _entries(data)
    sounds: dict[str, list[str]] = defaultdict(list)
    for name in entries:
        if name.endswith(".SB") and len(name) == len("020006J1.SB"):
            sounds[name[:7]].append(name)
    lines: dict[str, QueenLine] = {}
    for name in sorted(entries):
        if not name.endswith(".DOG"):
            continue
        offset, size = entries[name]
        for prefix, speaker, text in _sentences(name, data[offset : offset + size]):
            names = sorted(sounds.get(prefix, ()))
            parts = [part for part in (" ".join(part.split()) for part in _STAGE_DIRECTION.split(text)) if part]
            if len(names) != len(parts):
                continue
            for sound, part in zip(names, parts, strict=True):
                start, length = entries[sound]
                lines[sound] = QueenLine(sound[:-3], speaker, part, data[start : start + length])
    return [lines[sound] for sound in sorted(lines)]


def read_credits(path: str | os.PathLike[str]) -> list[list[str]]:
    """The characters of each voice artist, in the order of the file's credits. The artists' names are left out.

    In the credits ".i 15" begins a heading, ".i 30" a name and ".i 222" the characters of the name before it.

    Raises:
        ValueError: the file is not the game's resource file, or has no voice credits.
    """
    data = Path(path).read_bytes()
    entries = _entries(data)
    if _CREDITS not in entries:
        raise ValueError(f"path: expected the entry {_CREDITS} with the credits, got none")
    offset, size = entries[_CREDITS]
    artists: list[list[str]] = []
    style, heading = "", ""
    for line in data[offset : offset + size].decode("latin-1").splitlines():
        text = line.strip()
        if text.startswith(".i "):
            style = text
        elif not text or text.startswith("."):
            continue
        elif style == ".i 15":
            heading = text
        elif heading == "Voice Artists" and style == ".i 30":
            artists.append([])
        elif artists and heading == "Voice Artists" and style == ".i 222":
            artists[-1].append(text)
    return artists


def read_actors(path: str | os.PathLike[str] = ACTORS_FILE) -> dict[str, tuple[str, ...]]:
    """Code of a character -> the actors that the credits name for it, from queen_actors.csv."""
    credited: dict[str, tuple[str, ...]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["code"]:
                credited[row["code"]] = (*credited.get(row["code"], ()), row["actor"])
    return credited


def voices_of(codes: Iterable[str], path: str | os.PathLike[str] = ACTORS_FILE) -> dict[str, str]:
    """Code -> the actor who speaks it, such as "a02". Actors who share one of these characters count as one: "a04+a12".

    Raises:
        ValueError: the credits do not name an actor for a code.
    """
    credited = read_actors(path)
    codes = list(codes)
    if unknown := sorted(set(codes) - credited.keys()):
        raise ValueError(f"codes: expected characters of {Path(path).name}, got {', '.join(unknown)} as well")
    groups: list[set[str]] = []
    for code in codes:
        joined = set(credited[code]).union(*(g for g in groups if g & set(credited[code])))
        groups = [g for g in groups if not g & joined] + [joined]
    return {code: "+".join(sorted(next(g for g in groups if credited[code][0] in g))) for code in codes}


def _entries(data: bytes) -> dict[str, tuple[int, int]]:
    """name -> (offset, size) from the table at the start of the resource file."""
    if data[:4] != b"QTBL" or len(data) < 15:
        raise ValueError("path: expected the game's resource file (QTBL), got another file")
    (count,) = struct.unpack_from(">H", data, 13)
    entries = {}
    for index in range(count):
        at = 15 + index * _TABLE_ENTRY_BYTES
        if at + _TABLE_ENTRY_BYTES > len(data):
            raise ValueError(f"path: the table of {count} entries ends after the file's {len(data)} bytes")
        name = data[at : at + 12].split(b"\0")[0].decode("latin-1")
        offset, size = struct.unpack_from(">II", data, at + 13)
        if offset + size > len(data):
            raise ValueError(f"path: entry {name} ends at {offset + size}, after the file's {len(data)} bytes")
        entries[name] = (offset, size)
    return entries


def _sentences(name: str, bank: bytes) -> Iterator[tuple[str, str, str]]:
    """(first seven letters of the sound's name, speaker, text) for each sentence of a dialogue."""
    data = bank[_BANK_HEADER_BYTES:]
    levels, _, dialogue, hero_sentences, other_sentences = struct.unpack_from(">5h", data, 0)
    (others_at,) = struct.unpack_from(">H", data, 22)
    other = re.match(r"[A-Z]*", name)
    for speaker, code, at, count in (
        (_HERO, "J", _FIRST_LEVEL + abs(levels) * _LEVEL_BYTES, hero_sentences),
        (other.group() if other else name, "P", others_at, other_sentences),
    ):
        for number, text in _strings(data, at, count):
            if number >= 0:
                yield f"{dialogue:02d}{number:04X}{code}", speaker, text


def _strings(data: bytes, at: int, count: int) -> Iterator[tuple[int, str]]:
    """(sentence number, text): a record is two 16-bit numbers, a length byte and the text, padded to four bytes."""
    for _ in range(count):
        if at + 5 > len(data):
            return
        (number,) = struct.unpack_from(">h", data, at + 2)
        length = data[at + 4]
        yield number, data[at + 5 : at + 5 + length].decode("latin-1")
        at = (at + 5 + length + 3) // 4 * 4
