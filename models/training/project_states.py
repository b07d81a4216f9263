"""Project the states of a cache for the frozen LM head of a recipe's student: `python -m models cache --project RECIPE`.

The projections lie in a folder of their own inside that of the states, one for each pair (alpha, temperature) and head. A run
with `teacher.projection` finds them there (models/training/projected_teacher.py).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from kdkernels import ContrastCache, LMHead, ProjectionCache, ProjectionSettings, project_cache
from models.backbones.causal_lm import read_head
from models.speech_lm.listeners import is_speech_lm, load_listener
from models.training.cache_identity import CacheError, teacher_fingerprint
from models.training.projected_teacher import needs_states, recipe_settings, student_head
from models.training.recipe import Recipe
from models.training.recipe_checks import ConfigError
from models.training.recipe_files import load_recipe
from models.training.student import build_model
from models.training.teacher_states import SourceError

_TOP_K = 64  # where the recipe says nothing


def projected_recipe(words: Sequence[str], teacher: str, cache: Path) -> Recipe:
    """The recipe of `words` (its name, then key=value) with this teacher, its cache, and projections.

    Raises:
        CacheError: the recipe is wrong, or no projections made before the run can serve it.
    """
    own = [f"teacher.{'folder' if is_speech_lm(teacher) else 'model'}={teacher}", f"teacher.cache={cache}"]
    if not any(word.startswith("teacher.projection=") for word in words[1:]):
        own.append(f"teacher.projection={_TOP_K}")
    try:
        recipe = load_recipe(words[0], [*words[1:], *own])
    except ConfigError as error:
        raise CacheError(f"--project: {error}") from error
    if (why := needs_states(recipe)) is not None:
        raise CacheError(f"--project: expected a recipe whose projections can be made before the run, but {why}")
    return recipe


def project_states(
    recipe: Recipe,
    *,
    device: torch.device,
    tail_dtype: torch.dtype = torch.float32,
    part: int = 0,
    parts: int = 1,
    say: Callable[[str], None] = print,
    progress_bar: bool = True,
) -> tuple[Path, int]:
    """Make the projections that are not there yet.

    Args:
        recipe: that of the run to come, with `teacher.cache`: the states.
        device: computes.
        tail_dtype, part, parts: as in `kdkernels.project_cache`.
        say: is told the size before the first sample.

    Returns:
        the folder of the projections, samples written now.

    Raises:
        CacheError: the student's head trains or has a softcap, or the disk has no room.
        ValueError: the states come from another teacher; or the folder has projections of another size, dtype or number of ids.
    """
    folder = Path(str(recipe.teacher.cache))
    made_from = teacher_fingerprint(recipe.teacher_spec, hears=recipe.teacher.hears, negative=recipe.teacher.negative)
    states = ContrastCache(folder, fingerprint=made_from)
    try:
        head = _placed(student_head(recipe, build_model(recipe)), device)
    except SourceError as error:
        raise CacheError(f"--project: {error}") from error
    model = load_listener(recipe.teacher_spec, torch.device("cpu"), dtype=recipe.teacher.dtype, negative=recipe.teacher.negative)
    teacher = _placed(read_head(model), device)
    settings = recipe_settings(recipe, head, min(len(teacher.weight), len(head.weight)))
    top_k = min(recipe.teacher.projection, settings.vocab_size)
    width, tokens = head.weight.shape[1], sum(map(states.rows, states))
    needed = ProjectionCache.estimate_bytes(tokens=tokens, hidden_size=width, top_k=top_k, dtype=tail_dtype)
    free = shutil.disk_usage(folder).free
    say(
        f"{len(states)} samples, {tokens} tokens: {needed / max(1, tokens):.0f} bytes a token as projections, "
        f"{states.bytes / max(1, tokens):.0f} as states; {needed / 2**20:.1f} MiB; {free / 2**20:.0f} MiB are free"
    )
    if needed > free:
        raise CacheError(f"--project: {folder} has room for {free} bytes, the projections need {needed}")
    out = folder / folder_name(settings)
    with tqdm(total=len(states), desc="projections of the teacher", unit="example", disable=not progress_bar) as bar:
        written = project_cache(
            states, out, teacher_head=teacher, student_head=head, alpha=settings.alpha, temperature=settings.temperature,
            contrast=settings.contrast, plausibility=settings.plausibility, vocab_size=settings.vocab_size, top_k=top_k,
            tail_dtype=tail_dtype, part=part, parts=parts, on_group=bar.update,
        )  # fmt: skip
    return out, written


def folder_name(settings: ProjectionSettings) -> str:
    """Such as "projections-alpha2-tau2-1f3a9c02": one folder for each pair of numbers, kind of target and student head."""
    kind = {"paths": f"alpha{settings.alpha:g}", "none": "kd", "zeros": f"sharpened{settings.alpha:g}"}[settings.contrast]
    cut = "" if settings.plausibility is None else f"-plausibility{settings.plausibility:g}"
    return f"projections-{kind}-tau{settings.temperature:g}{cut}-{settings.student_fingerprint[:8]}"


def _placed(head: LMHead, device: torch.device) -> LMHead:
    """The head alone on `device`, frozen."""
    return dataclasses.replace(
        head,
        weight=head.weight.detach().to(device),
        bias=None if head.bias is None else head.bias.detach().to(device),
    )
