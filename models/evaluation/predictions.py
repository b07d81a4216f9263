"""Predictions (one is one answer of one system), and the JSONL file that holds them, as it is or packed by gzip."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from models.data.answers import named_choices
from models.data.json_rows import parse_object
from models.data.manifest import Example
from models.io_utils import append_bytes, atomic_write_bytes, atomic_write_text, fingerprint

KINDS = ("neutral", "aligned", "conflict", "irrelevant")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer of one system, with all that scoring needs."""

    id: str
    task: str
    kind: str  # one of KINDS
    answer: str
    prediction: str
    choices: tuple[str, ...] = ()
    pair_id: str | None = None
    control: str = ""  # "" | no_audio | swapped_audio
    scores: dict[str, float] = field(default_factory=dict)  # log-likelihood of each choice, if it was computed
    category: str = ""  # of the task: content, semantic, paralinguistic, degradation, speaker, audio
    clip: str = ""  # what was heard (models.speech_lm.features.clip_key); intervals resample whole clips
    claim: str | None = None  # the choice that the text beside the sound names, if any
    question: str = ""
    groups: dict[str, str] = field(default_factory=dict)  # what else a published metric shows the accuracy of, by name
    speaker: str = ""  # the voice as the corpus names it, such as a character of a game
    actor: str = ""  # who speaks: one actor may be several speakers; intervals for other people resample actors
    snr_db: float | None = None  # speech over noise, in dB; None = no noise was added, or it is not known
    draw: str = ""  # which draw of the noise of one recording

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))

    def to_row(self) -> dict[str, Any]:
        """The JSON object of this prediction."""
        return asdict(self) | {"choices": list(self.choices)}

    def said(self) -> str | None:
        """The choice that the answer means: the likeliest, else the only one it names; without choices its text.

        Raises:
            EvaluationError: see `likeliest`.
        """
        if self.scores:
            return likeliest(self.scores, self.id)
        if not self.choices:
            return self.prediction if any(c.isalnum() for c in self.prediction) else None
        named = named_choices(self.prediction, self.choices)
        return named[0] if len(named) == 1 else None


def likeliest(scores: Mapping[str, float], example_id: str) -> str:
    """The choice of the highest log-likelihood.

    Raises:
        EvaluationError: a score is NaN, or none is finite: then the model has no answer.
    """
    best = max(scores, key=scores.__getitem__)
    if any(map(math.isnan, scores.values())) or not math.isfinite(scores[best]):
        listed = ", ".join(f"{choice!r} {score}" for choice, score in scores.items())
        raise EvaluationError(f"example {example_id!r}: expected log-likelihoods of the choices that are numbers, got {listed}")
    return best


def context_kind(example: Example) -> str:
    """Which of KINDS an example counts as. An irrelevant context has kind neutral, but it is not the neutral one of its pair."""
    return "irrelevant" if example.metadata.get("context_type") == "irrelevant" else example.kind


def groups_of(example: Example) -> dict[str, str]:
    """Groups of a published benchmark that an example belongs to, by the names of their kinds ("difficulty")."""
    groups = example.metadata.get("groups")
    return {str(name): str(group) for name, group in groups.items()} if isinstance(groups, dict) else {}


def heard(example: Example) -> dict[str, Any]:
    """The fields of a Prediction that say who speaks and in how much noise, from the example's metadata."""
    known = example.metadata
    speaker, snr_db = str(known.get("speaker", "")), known.get("snr_db")
    return {
        "speaker": speaker,
        "actor": str(known.get("actor", speaker)),
        "snr_db": float(snr_db) if isinstance(snr_db, (int, float)) else None,
        "draw": str(known.get("draw", "")),
    }


FILE_KEY = "kdkernels_predictions"
FILE_VERSION = 1
_QUESTIONS = "questions"
_GO_ON = "run the same evaluate command again, it goes on"


class EvaluationError(RuntimeError):
    """The predictions file or the input cannot be used; the message says why."""


def write_header(path: str | Path, settings: dict[str, Any], *, questions: int | None = None) -> None:
    """Start a predictions file; arguments as in `header_line`."""
    atomic_write_text(path, header_line(settings, questions=questions))


def append_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Add predictions to a file, flushed to the disk. EvaluationError where a number is NaN or infinite, which JSON has not."""
    append_bytes(path, "".join(map(_line, predictions)).encode())


def pack_predictions(path: str | Path, settings: dict[str, Any], predictions: Sequence[Prediction]) -> Path:
    """Write a whole predictions file packed by gzip. Its name ends with .gz, and equal predictions give equal bytes."""
    text = header_line(settings) + "".join(map(_line, predictions))
    return atomic_write_bytes(path, gzip.compress(text.encode(), mtime=0))


def header_line(settings: Mapping[str, Any], *, questions: int | None = None) -> str:
    """The first line of a predictions file.

    Args:
        questions: how many answers the whole file has, those of the controls too; None = the file does not say.
    """
    # Not one of the settings: files without it are continued.
    expected = {} if questions is None else {_QUESTIONS: questions}
    header = {FILE_KEY: FILE_VERSION, "fingerprint": fingerprint(settings), **expected, "settings": settings}
    return json.dumps(header) + "\n"


def _line(p: Prediction) -> str:
    try:
        return json.dumps(p.to_row(), ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise EvaluationError(f"prediction {p.id!r}: cannot be written as JSON: {error}") from error


def read_predictions(
    path: str | Path, *, unfinished: bool = False, repair: bool = False
) -> tuple[dict[str, Any], list[Prediction]]:
    """Header and predictions of a file.

    Args:
        path: a file packed by gzip has a name that ends with .gz.
        unfinished: the reader adds what is missing. So the file may have fewer answers than its header says, and a last line
            that a kill cut short is left out.
        repair: remove such a line from the file too, so that more can be appended; not of a packed file.

    Raises:
        EvaluationError: no such file, another kind of file, or a damaged line, such as one with NaN, with a value of another
            type than its field has, or with an id that was there before. Unless `unfinished`, also a last line that is cut
            short, and fewer answers than the header says.
    """
    path = Path(path)
    try:
        # Bytes: a kill may cut a character in two, and some line separators of Unicode do not end a line of JSONL.
        packed = path.suffix == ".gz"
        content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        lines = content.splitlines(keepends=True)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise EvaluationError(f"{path}: damaged: {error}") from error
    except OSError as error:
        raise EvaluationError(f"{path}: not readable: {error.strerror}") from error
    if not lines:  # of an evaluation that was killed before its first answer
        raise EvaluationError(f"{path}: no question is answered; {_GO_ON}")
    try:
        header = parse_object(lines[0])
        known = header.get(FILE_KEY) == FILE_VERSION
    except (ValueError, TypeError):
        known = False
    if not known:
        raise EvaluationError(f'{path}: expected a first line with "{FILE_KEY}": {FILE_VERSION}')
    if unfinished and not lines[-1].endswith(b"\n"):
        cut = lines.pop()
        if repair and not packed:
            os.truncate(path, len(content) - len(cut))
    predictions = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            p = Prediction(**_checked(parse_object(line)))
            if p.id in first_line:
                raise ValueError(f"id {p.id!r} twice, first in line {first_line[p.id]}")
            first_line[p.id] = number
            predictions.append(p)
        except (ValueError, TypeError) as error:
            if line.endswith(b"\n"):
                raise EvaluationError(f"{path}: line {number} is damaged: {error}") from error
            raise EvaluationError(f"{path}: line {number}, the last one, is cut short; {_GO_ON}") from error
    if not unfinished:
        _check_whole(path, header, len(predictions))
    return header, predictions


def _check_whole(path: Path, header: Mapping[str, Any], answers: int) -> None:
    """Compare the number of answers with the header's. Files of earlier versions and packed ones do not say it."""
    expected = header.get(_QUESTIONS)
    if expected is None:
        return
    if not isinstance(expected, int) or isinstance(expected, bool):
        got = json.dumps(expected, ensure_ascii=False)[:80]
        raise EvaluationError(f"{path}: line 1: {_QUESTIONS}: expected a whole number, got {got}")
    if answers < expected:
        raise EvaluationError(f"{path}: {answers} of {expected} questions are answered; {_GO_ON}")


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row, whose values have the types of `Prediction`. Raises TypeError or ValueError that begins with the field's name."""
    for name, value in row.items():
        expected, fits = _TYPES.get(name, ("a string", _is_text))
        if not fits(value):
            raise TypeError(f"{name}: expected {expected}, got {json.dumps(value, ensure_ascii=False)[:80]}")
    if row.get("kind") not in (None, *KINDS):
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {row['kind']!r}")
    return row


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# What a field of a line may hold, where that is not a string.
_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "choices": ("a list of strings", lambda x: isinstance(x, list) and all(map(_is_text, x))),
    "scores": ("an object of numbers", lambda x: isinstance(x, dict) and all(map(_is_number, x.values()))),
    "groups": ("an object of strings", lambda x: isinstance(x, dict) and all(map(_is_text, x.values()))),
    "pair_id": ("a string or null", _is_text_or_null),
    "claim": ("a string or null", _is_text_or_null),
    "snr_db": ("a number or null", lambda x: x is None or _is_number(x)),
}


def claimed_choice(example: Example) -> str | None:
    """The one choice that the text beside the sound claims, rightly or wrongly; None if it claims none, or several.

    A claim of the spoken words (metadata "claimed_by_words") comes first. In a neutral context there is no other claim.
    Otherwise the claim is the choice that the context names; without a context, the one that the transcript names.
    """
    if said := example.metadata.get("claimed_by_words"):
        return str(said)
    if example.kind == "neutral":
        return None
    named = named_choices(example.context or example.transcription, example.choices)
    return named[0] if len(named) == 1 else None
