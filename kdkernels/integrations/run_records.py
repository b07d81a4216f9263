"""What a run leaves beside its weights: the options of the loss, and a model card."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .options import ALPHA, CAADOptions

__all__ = ["check_options", "write_card", "write_options"]

logger = logging.getLogger(__name__)

OPTIONS_NAME = "caad_options.json"
# How the loss is computed, not what it is: another machine may need others.
_OF_THE_MACHINE = ("chunk_tokens", "workspace_bytes", "impl")
_START, _END = "<!-- kdkernels: start -->", "<!-- kdkernels: end -->"
_PAPERS = (
    "Contrastive audio-aware distillation (CAAD): [arXiv 2606.23052](https://arxiv.org/abs/2606.23052)",
    "Distilling the knowledge in a neural network: [arXiv 1503.02531](https://arxiv.org/abs/1503.02531)",
)


def _as_json(options: CAADOptions, on_policy: dict[str, Any] | None) -> dict[str, Any]:
    """What is compared and shown; a run whose answers are the dataset's has no entry on_policy."""
    values = dataclasses.asdict(options)
    dtype = values["logits_dtype"]
    alpha = ALPHA if options.alpha is None else options.alpha
    more = {} if on_policy is None else {"on_policy": on_policy}
    return {**values, "alpha": alpha, "logits_dtype": None if dtype is None else str(dtype), **more}


def write_options(
    folder: Path, options: CAADOptions, *, on_policy: dict[str, Any] | None = None, made_of: Mapping[str, Any] | None = None
) -> None:
    """`made_of`: fingerprints of what the run's states depend on beside its options, each a string or a JSON object."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**_as_json(options, on_policy), **(made_of or {})}
    (folder / OPTIONS_NAME).write_text(json.dumps(values, indent=1) + "\n")


def check_options(
    folder: Path,
    options: CAADOptions,
    *,
    on_policy: dict[str, Any] | None = None,
    made_of: Mapping[str, Any] | None = None,
    allow_others: bool = False,
) -> None:
    """Raises ValueError, with both values, where the checkpoint was trained with another loss or made of something else.

    An older one has no file, or no fingerprints: a warning says that they were not compared. With allow_others a warning says
    what differs. A file that is no JSON object raises ValueError.
    """
    file = folder / OPTIONS_NAME
    if not file.is_file():
        logger.warning("%s has no %s: the options were not compared with those of the checkpoint", folder, OPTIONS_NAME)
        return
    try:
        saved, now = json.loads(file.read_text()), _as_json(options, on_policy)
    except ValueError as error:
        raise ValueError(f"{file}: expected a JSON object of CAADOptions, got {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file}: expected a JSON object of CAADOptions, got {type(saved).__name__}")
    differing = [
        f"{name} was {saved[name]!r} and is {now[name]!r}"
        for name in now
        if name not in _OF_THE_MACHINE and name in saved and saved[name] != now[name]
    ]
    if ("on_policy" in saved) != ("on_policy" in now):
        differing.append(f"on_policy was {saved.get('on_policy')!r} and is {now.get('on_policy')!r}")
    made_of = made_of or {}
    if unknown := [name for name in made_of if name not in saved]:
        logger.warning("%s has no %s: it was not compared with that of this run", file, ", ".join(unknown))
    for name in made_of.keys() - unknown:
        differing += _entries_that_differ(name, saved[name], made_of[name])
    if not differing:
        return
    message = f"options: expected those of the checkpoint {folder}, got others: {'; '.join(differing)}."
    if not allow_others:
        raise ValueError(f"{message} Pass resume_with_other_options=True to go on with the new ones")
    logger.warning("%s Training goes on with the new ones", message)


def _entries_that_differ(name: str, saved: Any, now: Any) -> list[str]:
    if saved == now:
        return []
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return [f"{name} was {saved!r} and is {now!r}"]
    keys = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    return [f"{name}[{key!r}] was {saved.get(key)!r} and is {now.get(key)!r}" for key in keys[:3]]


def write_card(
    folder: Path,
    options: CAADOptions,
    *,
    student: str,
    teacher: str,
    data: str,
    path: str,
    on_policy: dict[str, Any] | None = None,
) -> None:
    """Adds a section on the distillation to the folder's README.md, or writes one. Nothing is asked from the hub."""
    card_path = folder / "README.md"
    lines = [
        f"Distilled with kdkernels from the teacher `{teacher}` ({path}).",
        "",
        *(f"- {paper}" for paper in _PAPERS),
        f"- data: {data}",
        "",
        "| option | value |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _as_json(options, on_policy).items() if name not in _OF_THE_MACHINE),
    ]
    section = "\n".join([_START, "## Distillation", "", *lines, _END])
    if card_path.is_file():
        card = ModelCard.load(card_path)
        before, _, rest = card.text.partition(_START)
        card.text = f"{before.rstrip()}\n\n{section}{rest.partition(_END)[2]}\n"
    else:
        header = ModelCardData(base_model=student or None).to_yaml()
        card = ModelCard(f"---\n{header}\n---\n\n# {folder.resolve().name}\n\n{section}\n")
    card.data.tags = sorted({*(card.data.tags or []), "distillation", "kdkernels"})
    card.save(card_path)
