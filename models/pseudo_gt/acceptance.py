"""Decides which answers become targets, says why the others are rejected, and writes the rejected ones down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from models.data.answers import named_choices
from models.data.manifest import TARGET_SOURCES, Example
from models.io_utils import atomic_write_text
from models.pseudo_gt.commands import DEFAULT_MAX_CHARACTERS
from models.pseudo_gt.writers import has_ended


def check_answer(text: str, example: Example, *, max_characters: int = DEFAULT_MAX_CHARACTERS) -> str | None:
    """Why `text` cannot be the target of `example`; None if it can.

    An answer that its writer could not end is "cut off": a target teaches the end as well.

    The check looks for the choices as whole words; case and punctuation do not matter. If one choice's words are part
    of another's ("fast" in "very fast"), the longer choice counts.
    """
    if not text.strip():
        return "empty"
    if not has_ended(text):
        return "cut off"
    if len(text) > max_characters:
        return "too long"
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
