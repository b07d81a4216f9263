"""What a run is made of, beside its recipe: the files of its models and the words of its examples. A recipe only names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.backbones.resolve import resolve_backbone
from models.io_utils import fingerprint
from models.speech_lm.listeners import listener_hashes
from models.training.cache_identity import sample_content
from models.training.checkpoint import CheckpointError
from models.training.recipe import Recipe

EXAMPLES = "data.manifest"


def run_identity(recipe: Recipe, examples: Sequence[Any]) -> dict[str, str]:
    """A fingerprint for each key of the recipe that names a model, and one of all prompts and targets.

    All files of the models are read.
    """
    listeners = {"student.model": recipe.student.model, "model.folder": recipe.model.folder}
    if recipe.needs_teacher:
        listeners["teacher.model" if recipe.teacher.model else "teacher.folder"] = recipe.teacher_spec
    sources = {f"sources.{name}.folder": source for name, source in recipe.sources.items()}
    listeners |= {key: source.folder for key, source in sources.items() if source.role != "text"}
    found = {key: fingerprint(listener_hashes(spec)) for key, spec in listeners.items() if spec is not None}
    for key, source in sources.items():
        if source.role == "text" and source.folder is not None:
            found[key] = resolve_backbone(source.folder, kind="causal_lm").sha256()
    heard = [recipe.student.hears, *([recipe.teacher.hears] if recipe.needs_teacher else [])]
    heard += [source.hears for source in recipe.sources.values()]
    readers = list({fingerprint(hears.settings()): hears for hears in heard}.values())
    words = [[e.id, *(sample_content(hears.shown(e), None) for hears in readers)] for e in examples]
    return {**found, EXAMPLES: fingerprint(words)}


def check_identity(path: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises CheckpointError, with the recipe's keys, where the checkpoint `path` was trained with other models or words."""
    changed = [key for key in now if key in saved and saved[key] != now[key]]
    if not changed:
        return
    what = [f"{key} has other {'prompts or targets' if key == EXAMPLES else 'files'} now" for key in changed]
    raise CheckpointError(
        f"{path}: expected the models and examples that it was trained with, got others: {'; '.join(what)}. Put the former ones "
        "back, or start a run with run.resume=never"
    )
