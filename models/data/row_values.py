"""What readers of foreign rows share: the defaults of a row, its clip's path, and the text of a turn without the clip's mark."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.data.example import SPLITS

# Where the clip stands in a turn: a placeholder, alone or between two marks; or its name, or a path without blanks, between two
# marks. Other words between two marks are prose about the marks, and stay.
_PLACEHOLDER = r"<\|?audio\|?>"
_OPENING = r"(?:<start_audio>|<\|audio_(?:bos|start)\|>|<audio>)"
_CLOSING = r"(?:<end_audio>|<\|audio_(?:eos|end)\|>|</audio>)"
_MARKED = re.compile(
    rf"{_OPENING}([^<]{{0,1024}}(?:{_PLACEHOLDER}[^<]{{0,1024}}){{0,4}}){_CLOSING}", re.IGNORECASE
)  # bounded: a turn may consist of openings or blanks
_PATH = re.compile(r"\S*(?:/\S+|\.\w{2,5})")
MARK = re.compile(r"<audio>", re.IGNORECASE)  # of a clip in a conversation
_LONE_TOKEN = re.compile(r"<\|audio\|>", re.IGNORECASE)
_LONE_TAG = re.compile(r"(?:^|(?<=[\n.:;?!]))[ \t]*<audio>|<audio>[ \t]*(?=\n|$)", re.IGNORECASE)
_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)
_SPLIT_NAMES = {
    "training": "train",
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "eval": "dev",
    "testing": "test",
}
# Names under which a row has its clip, and an object of a clip its path.
CLIP_COLUMNS = ("audio", "audio_filepath", "audio_path", "path", "file", "file_name", "wav", "clip")
_PATH_KEYS = ("path", "audio", "audio_filepath", "audio_url", "url")
# Attributes of a clip that rows of any form may carry. Stage 1 tells a language model what the metadata hold, so columns of
# other names, which may be anything, stay out.
_ATTRIBUTES = ("speaker", "gender", "sex", "age", "accent", "language", "lang", "emotion", "dataset", "source")


class Defaults:
    """The values of what a row may leave out."""

    def __init__(self, number: int, root: Path, split: str, target_source: str, several_clips: bool = False):
        self.number = number
        self.root = root
        self.split = split
        self.target_source = target_source
        self.several_clips = several_clips

    def name(self, row: Mapping[str, Any], audio: str | None) -> str:
        return text_of(row, "id") if "id" in row else f"{self.number}" + (f"/{audio}" if audio else "")

    def clip(self, value: Any, name: str = "audio") -> str:
        """The path of a clip relative to the root. `value`: a path, or an object with one; `name` is its key, for messages.

        Raises:
            ValueError, TypeError: there is no path, an address, or an absolute path outside of the root.
        """
        path = _path_in(value, name)
        if _ADDRESS.match(path):
            raise ValueError(f"{name}: expected a file, got the address {path[:80]!r}; download the clips first")
        if os.path.isabs(path):
            relative = os.path.relpath(path, self.root.absolute()).replace(os.sep, "/")
            if relative.split("/")[0] == "..":
                raise ValueError(
                    f"{name}: expected a path inside the audio root {self.root}, got {path!r}; --audio-root (in a recipe "
                    "data.audio_root) names another root"
                )
            return relative
        return path

    def clip_or_none(self, value: Any, name: str = "audio") -> str | None:
        """`clip`; null is a row of text only."""
        return None if value is None else self.clip(value, name)


def _path_in(value: Any, name: str) -> str:
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            raise ValueError(f"{name}: expected a path, got a clip's bytes; write them to a file and name that file")
        if (found := first_of(value, _PATH_KEYS)) is not None:
            return _path_in(found, name)
        if value.get("array") is not None:
            raise ValueError(f"{name}: expected a path, got a clip's samples; write them to a file and name that file")
        keys = ", ".join(map(str, value)) or "no key"
        raise ValueError(f"{name}: expected a path under one of {', '.join(_PATH_KEYS)}, got an object with {keys}")
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a path, got {'null' if value is None else type(value).__name__}")
    return value


def first_of(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of these keys that is there and not null; None without one."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without its null values, which count as absent; those of clips stay, since they say that there is no clip."""
    return {key: value for key, value in row.items() if value is not None or key in CLIP_COLUMNS}


def as_list(value: Any) -> list[Any]:
    """A list as it is, another value as a list of one, null as an empty list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def as_text(value: Any, name: str) -> str:
    """A text, or a number as its text. Raises TypeError that begins with `name` for another value."""
    if isinstance(value, bool):
        word = str(value).lower()
        raise TypeError(f'{name}: expected text, got the JSON value {word}, which is not the text "{word}"')
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"{name}: expected text, got {'null' if value is None else type(value).__name__}")
    return str(value)


def text_or_none(row: Mapping[str, Any], *names: str) -> str | None:
    """The text of the first of these keys that is there and not null; None without one."""
    found = next((name for name in names if row.get(name) is not None), None)
    return None if found is None else as_text(row[found], found)


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """`text_or_none`, and an empty text without one."""
    return text_or_none(row, *names) or ""


def split_name(name: Any) -> Any:
    """This project's name of a split ("validation" is dev); other names as they are."""
    if not isinstance(name, str) or name in SPLITS:
        return name
    return _SPLIT_NAMES.get(name.lower(), name)


def attributes(row: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a clip (speaker, gender, language ...) that stand in a row under their own names."""
    return {key: row[key] for key in _ATTRIBUTES if isinstance(row.get(key), (str, int, float))}


def listed_choices(choices: Any, answer: str | None) -> tuple[tuple[str, ...], str | None]:
    """Choices as texts, and the answer by its words: {"A": "happy", "B": "sad"} with "B" gives ("happy", "sad") and "sad"."""
    if not isinstance(choices, (Mapping, list, tuple)):
        raise TypeError(f"choices: expected a list or an object, got {type(choices).__name__}")
    letters = choices if isinstance(choices, Mapping) else {}
    texts = tuple(as_text(choice, "choices") for choice in letters.values() or choices)
    return texts, answer if answer in texts or answer not in letters else str(letters[answer])


def turn_text(message: Mapping[str, Any], clips: Sequence[str]) -> str:
    """The text of a turn, without the marks of the clips."""
    return without_clips(_content(message), clips).strip()


def clip_marks(message: Mapping[str, Any]) -> int:
    """How many clips a turn marks, by openings and closings or by placeholders."""
    text = _content(message)
    return len(_MARKED.findall(text)) or len(_LONE_TOKEN.findall(text))


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise TypeError(f"messages: expected content to be a string, got {type(content).__name__}")
    return content


def without_clips(text: str, clips: Sequence[str]) -> str:
    """`text` without the marks of the clips, which are paths. Where no mark is around a clip, a lone placeholder is the mark."""
    names = [name for clip in clips for name in (clip, Path(clip).name, Path(clip).stem)]
    without = _MARKED.sub(lambda match: " " if _is_clip(match[1], names) else match[0], text)
    if without != text:
        return without
    return _LONE_TAG.sub(" ", _LONE_TOKEN.sub(" ", text).strip())


def _is_clip(between: str, names: Sequence[str]) -> bool:
    """Whether the text between two marks is nothing but placeholders, a path without blanks, or one of the clip's `names`."""
    name = re.sub(_PLACEHOLDER, "", between, flags=re.IGNORECASE).strip()
    return name in ("", *names) or _PATH.fullmatch(name) is not None
