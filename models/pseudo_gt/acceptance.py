"""Decides which answers become targets, says why the others are rejected, and writes the rejected ones down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from models.data.answers import named_choices, plain_words
from models.data.manifest import TARGET_SOURCES, Example
from models.io_utils import atomic_write_text
from models.pseudo_gt.commands import DEFAULT_MAX_CHARACTERS
from models.pseudo_gt.writers import has_ended

_LOOP_TIMES, _LOOP_WORDS = 3, 9


def check_answer(
    text: str, example: Example, *, max_characters: int = DEFAULT_MAX_CHARACTERS, accept: str = "choice"
) -> str | None:
    """Why `text` cannot be the target of `example`; None if it can.

    An answer that its writer could not end is "cut off": a target teaches the end as well.

    With accept "choice" the answer names one of the example's choices, and the right one if that is known. The check looks for
    the choices as whole words; case and punctuation do not matter. If one choice's words are part of another's ("fast" in "very
    fast"), the longer choice counts.

    With accept "free" no choice is looked for. An answer "repeats itself" that says the same words three times in a row, at least
    nine in all: so decoding fails where a model finds no end.
    """
    if not text.strip():
        return "empty"
    if not has_ended(text):
        return "cut off"
    if len(text) > max_characters:
        return "too long"
    if accept == "free":
        return "repeats itself" if _repeats_itself(text) else None
    if not example.choices:
        return None
    named = named_choices(text, example.choices, skip_brackets=False)
    if not named:
        return "no choice named"
    if len(named) > 1:
        return "several choices named"
    if example.answer is not None and named != [example.answer]:
        return "wrong choice named"
    return None


def _repeats_itself(text: str) -> bool:
    words = plain_words(text, skip_brackets=False)
    for length in range(1, len(words) // _LOOP_TIMES + 1):
        run = 0  # how many words in a row are those of `length` words before
        for word, earlier in zip(words[length:], words, strict=False):
            run = run + 1 if word == earlier else 0
            if run >= (_LOOP_TIMES - 1) * length and run + length >= _LOOP_WORDS:
                return True
    return False


def set_targets(
    examples: Iterable[Example], targets: Mapping[str, str], *, target_source: str = "teacher"
) -> list[Example]:
    """The examples, with the target that `targets` holds for their id; the others keep their own.

    Raises:
        ValueError: `target_source` is unknown, a target is empty, or an id belongs to no example.
    """
    if target_source not in TARGET_SOURCES:
        raise ValueError(f"target_source: expected one of {list(TARGET_SOURCES)}, got {target_source!r}")
    examples = list(examples)
    unknown = set(targets) - {example.id for example in examples}
    if unknown:
        raise ValueError(f"targets: expected ids of the examples, got {len(unknown)} others, such as {min(unknown)!r}")
    for name, text in targets.items():
        if not text.strip():
            raise ValueError(f"targets: expected text, got an empty one for {name!r}")
    return [
        dataclasses.replace(example, target=" ".join(targets[example.id].split()), target_source=target_source)
        if example.id in targets
        else example
        for example in examples
    ]


def write_rejects(out: Path, rejects: list[dict[str, str]]) -> None:
    """Write the rejected answers with their reasons beside `out`; without any, remove the file of an earlier run."""
    path = out.with_name(out.name + ".rejects.jsonl")
    if rejects:
        atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejects))
    else:
        path.unlink(missing_ok=True)
