"""One question on one clip: the fields of a manifest's row, and the checks of their values."""

from __future__ import annotations

import dataclasses
import difflib
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PureWindowsPath
from typing import Any

from models.data.answers import check_choices

AUDIO_PLACEHOLDER = "<|audio|>"
SPLITS = ("train", "dev", "test")
KINDS = ("aligned", "neutral", "conflict")
TARGET_SOURCES = ("text_backbone", "template", "audio_lm", "teacher", "human")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question on one clip.

    Args:
        id: unique in the manifest.
        audio: path relative to the audio root, with forward slashes; None is a text-only example.
        start_seconds, end_seconds: the span of the file. An end of None is the file's end.
        more_audio: further clips of the same question, whole files, in the order in which they are heard after `audio`.
        transcription: the words that the prompt shows.
        metadata: attributes of the clip ({"gender": "man", "speaker": "JOE", "snr_db": -3.0}).
        task: "gender", "language", ...; accuracy is reported by task.
        context: text shown beside the transcript: the hint.
        question: what is asked.
        system: the system turn before the question, as it is; an audio LM's chat template puts it in its place.
        choices: the possible answers as full strings; () for a free answer.
        answer: the true label; one of `choices`, if there are any.
        target: Y, the pseudo ground truth that teacher and student are forced to say.
        target_source: who wrote `target`: text_backbone, template, audio_lm, teacher or human.
        split: train, dev or test.
        kind: aligned (the context agrees with the sound), neutral (says nothing), conflict (contradicts it).
        pair_id: the same for one clip and question under different contexts.

    Raises:
        ValueError, TypeError: a field has a wrong type or value; the message starts with its name.
    """

    id: str
    audio: str | None
    start_seconds: float = 0.0
    end_seconds: float | None = None
    transcription: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    task: str = ""
    context: str = ""
    question: str = ""
    choices: tuple[str, ...] = ()
    answer: str | None = None
    target: str | None = None
    target_source: str | None = None
    split: str = "train"
    kind: str = "neutral"
    pair_id: str | None = None
    more_audio: tuple[str, ...] = ()
    system: str = ""

    def __post_init__(self) -> None:
        for name in ("id", "transcription", "task", "context", "question", "split", "kind", "system"):
            _check_text(name, getattr(self, name))
        for name in ("audio", "answer", "target", "target_source", "pair_id"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        if not self.id.strip():
            raise ValueError("id: expected a name, got an empty string")
        for name in ("transcription", "context", "question", "system"):
            if AUDIO_PLACEHOLDER in getattr(self, name):
                raise ValueError(f"{name}: expected plain text, got the audio placeholder {AUDIO_PLACEHOLDER!r} in it")
        _check_span_fields(self.start_seconds, self.end_seconds)
        if not isinstance(self.metadata, Mapping):
            raise TypeError(f"metadata: expected an object, got {type(self.metadata).__name__}")
        if isinstance(self.choices, str) or not isinstance(self.choices, (list, tuple)):
            raise TypeError(f"choices: expected a list of strings, got {type(self.choices).__name__}")
        object.__setattr__(self, "choices", tuple(self.choices))
        for choice in self.choices:
            _check_text("choices", choice)
            if not choice.strip():
                raise ValueError("choices: expected labels, got an empty string among them")
        # Published benchmarks repeat a choice now and then (27 of 1,000 questions of MMAU); it stands once.
        object.__setattr__(self, "choices", tuple(dict.fromkeys(self.choices)))
        check_choices(self.choices)
        if self.choices and self.answer is not None and self.answer not in self.choices:
            same = unicodedata.normalize("NFC", self.answer) in (unicodedata.normalize("NFC", c) for c in self.choices)
            why = "; one of them is the same in another Unicode form (NFC or NFD)" if same else ""
            raise ValueError(f"answer: expected one of {list(self.choices)}, got {self.answer!r}{why}")
        _check_one_of("split", self.split, SPLITS)
        _check_one_of("kind", self.kind, KINDS)
        if self.target_source is not None:
            _check_one_of("target_source", self.target_source, TARGET_SOURCES)
        if self.audio is not None:
            _check_relative(self.audio)
        if isinstance(self.more_audio, str) or not isinstance(self.more_audio, (list, tuple)):
            raise TypeError(f"more_audio: expected a list of paths, got {type(self.more_audio).__name__}")
        object.__setattr__(self, "more_audio", tuple(self.more_audio))
        for path in self.more_audio:
            _check_text("more_audio", path)
            _check_relative(path, "more_audio")
        if self.more_audio and self.audio is None:
            raise ValueError(f"more_audio: expected none without audio, got {list(self.more_audio)}")

    @property
    def clips(self) -> tuple[tuple[str, float, float | None], ...]:
        """(file, start, end) of every clip in the order in which they are heard; () for a text-only example."""
        if self.audio is None:
            return ()
        return ((self.audio, self.start_seconds, self.end_seconds), *((path, 0.0, None) for path in self.more_audio))

    def to_row(self) -> dict[str, Any]:
        """The JSON object of this example, without fields that have their default value."""
        row: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
            if value != default:
                row[item.name] = list(value) if isinstance(value, tuple) else value
        return row


FIELD_NAMES = tuple(item.name for item in dataclasses.fields(Example))


@dataclass(frozen=True, kw_only=True)
class AnsweredExample(Example):
    """An example with an answer that a student has made itself; it stands in no manifest.

    Args:
        answer_tokens: ids in the place of the target's. The end of the answer is among them only if the student has ended it.
    """

    answer_tokens: tuple[int, ...]

    @classmethod
    def of(cls, example: Example, tokens: Iterable[int]) -> AnsweredExample:
        """`example` with these tokens as its answer."""
        return cls(**{name: getattr(example, name) for name in FIELD_NAMES}, answer_tokens=tuple(tokens))


_REQUIRED = ("id", "audio")


def example_from_row(row: Mapping[str, Any]) -> Example:
    """An `Example` from a parsed JSON object.

    Raises:
        ValueError, TypeError: a required field is missing, a field is unknown (the message has the nearest name), or a value
            is bad.
    """
    for name in row:
        if name not in FIELD_NAMES:
            near = difflib.get_close_matches(name, FIELD_NAMES, n=1)
            raise ValueError(f"unknown field {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    for name in _REQUIRED:
        if name not in row:
            raise ValueError(f"missing field {name!r}")
    return Example(**row)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # "\ud800" is legal JSON, but not text
        raise ValueError(f"{name}: expected text, got half of a surrogate pair") from None


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        raise ValueError(
            f"{name}: expected one of {list(allowed)}, got {value!r}" + (f", did you mean {near[0]!r}?" if near else "")
        )


def _check_span_fields(start: object, end: object) -> None:
    for name, value in (("start_seconds", start), ("end_seconds", end)):
        if value is None and name == "end_seconds":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number of seconds, got {type(value).__name__}")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}: expected a finite number from 0, got {value}")
    if end is not None and end <= start:
        raise ValueError(f"end_seconds: expected more than start_seconds {start:g}, got {end:g}")


def _check_relative(audio: str, name: str = "audio") -> None:
    """Raise ValueError for absolute paths (of POSIX and Windows), drive letters, ".." and null bytes."""
    windows = PureWindowsPath(audio)  # knows both separators
    if not audio.strip() or "\0" in audio:
        raise ValueError(f"{name}: expected a relative path or null, got {audio!r}")
    if windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{name}: expected a path inside the audio root, got {audio!r}")
