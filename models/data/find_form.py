"""Finds the form of a file or folder of rows by what is in it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

from models.data.commands import FORMS
from models.data.example import FIELD_NAMES
from models.data.json_rows import parse_object, read_rows
from models.data.manifest import VERSION_KEY
from models.data.problems import ManifestError
from models.data.row_values import CLIP_COLUMNS, without_nulls

MANIFEST_FORM = "manifest"
_ROWS_LOOKED_AT = 20
_KEYS_SHOWN = 20


def find_form(path: str | os.PathLike[str]) -> str:
    """ "manifest", or the one of FORMS that the first rows of a file have.

    Raises:
        ManifestError: the file cannot be read, or its rows have no form that is known.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "wav.scp").is_file():
            return "kaldi"
        raise ManifestError(
            f"{path}: expected a file of rows, Kaldi's wav.scp in the folder, or a data set of the package datasets in it"
        )
    if path.suffix == ".scp":
        return "kaldi"
    if path.name == "metadata.json":
        return "dynamic_superb"
    first: dict[str, object] = {}
    bad = ""
    for number, line in itertools.islice(read_rows(path), _ROWS_LOOKED_AT):
        try:
            row = line if isinstance(line, dict) else parse_object(line)
        except (ValueError, TypeError) as error:
            bad = bad or f"row {number}: {error}"
            continue
        if VERSION_KEY in row:
            return MANIFEST_FORM
        if form := form_of_row(row):
            return form
        first = first or row
    if path.is_file() and not path.stat().st_size:
        bad = "an empty file"
    raise ManifestError(
        f'{path}: expected a first line like {{"{VERSION_KEY}": 1}}, or rows of a known form, got {_what_else(first, bad)}'
    )


def _what_else(first: Mapping[str, object], bad: str) -> str:
    """What a file of no known form holds, by its first good row and what is wrong with its first bad one; and what to do."""
    if not first:
        return f"{bad or 'no row'}; a file of rows is UTF-8 text, one JSON object a line or one JSON array of objects"
    also = f"; {bad}" if bad else ""
    if _is_manifest_row(set(first)):
        return (
            f"rows of a manifest without that line{also}; write it before them, or read them by --form columns (in a recipe "
            "data.form=columns)"
        )
    keys = ", ".join(list(first)[:_KEYS_SHOWN])
    return f"rows with the keys {keys}{also}; --form (in a recipe data.form) names one of {', '.join(FORMS)}"


def form_of_row(row: Mapping[str, object]) -> str | None:
    """The form of rows like this one; None if it is not known."""
    row = without_nulls(row)
    keys = set(row)
    if keys & {"messages", "conversations"}:
        return "desta" if _is_desta(keys, row) else "messages"
    if keys & {"audios", "audio"} and ("query" in keys or {"instruction", "output"} <= keys):
        return "messages"
    if "recording" in keys and ("supervisions" in keys or "channel" in keys):
        return "lhotse"
    if "audio_filepath" in keys:
        return "nemo"
    if {"instruction", "label"} <= keys:
        return "dynamic_superb"
    if {"gt", "neutral"} <= keys or keys & {"contexts", "context_type"}:
        return "mcr_bench"
    if keys & set(CLIP_COLUMNS) and not _is_manifest_row(keys):
        return "columns"
    return None


def _is_manifest_row(keys: set[str]) -> bool:
    return "id" in keys and keys <= set(FIELD_NAMES)


def _is_desta(keys: set[str], row: Mapping[str, object]) -> bool:
    """Whether an answer stands beside the messages, or the clips have their words with them."""
    if "conversations" in keys:
        return False
    if "seed_description" in keys:
        return True
    messages = row.get("messages")
    turns = [turn for turn in messages if isinstance(turn, Mapping)] if isinstance(messages, list) else []
    answered = any(turn.get("role") == "assistant" for turn in turns)
    clips = row.get("audios") or next((turn["audios"] for turn in turns if turn.get("audios")), None)
    described = isinstance(clips, list) and any(
        isinstance(clip, Mapping) and "audio_filepath" in clip for clip in clips
    )
    return not answered and (described or bool(keys & {"target", "response"}))
