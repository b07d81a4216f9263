"""A teacher's projections for the student's frozen LM head, read from disk in the steps of a run.

`python -m models cache --project` makes them beside the teacher's states, for every target token. A run makes its own where there
are none that fit (models/training/projections.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kdkernels import LMHead, ProjectionCache, ProjectionSettings, TeacherProjection
from kdkernels.projection_cache import CachedProjections
from kdkernels.shards import CorruptCacheError
from models.backbones.causal_lm import read_head
from models.training.recipe import Recipe
from models.training.teacher_states import ProjectedStates, SourceError
from models.training.teachers import ContentCheck

CONTRASTS = {"kd": "none", "sharpened": "zeros"}  # of the objectives; the others contrast the two paths


def student_head(recipe: Recipe, model: torch.nn.Module) -> LMHead:
    """The student's LM head, for projections. SourceError where it trains, or where its logits have a softcap."""
    if any(p.requires_grad for p in model.get_output_embeddings().parameters()):
        raise SourceError(
            "teacher.projection: expected 0 with an LM head that trains, whose projection would be that of an older head"
        )
    head = read_head(model)
    if head.softcap is not None:
        raise SourceError("teacher.projection: expected 0 with a student whose logits have a softcap")
    return head


def recipe_settings(recipe: Recipe, head: LMHead, vocab_size: int) -> ProjectionSettings:
    """What the projections of this run are made for."""
    from kdkernels.projection import head_fingerprint

    contrast = CONTRASTS.get(recipe.objective, "paths")
    return ProjectionSettings(
        head_fingerprint(head.weight, head.bias), vocab_size, 0.0 if contrast == "none" else recipe.loss.alpha,
        recipe.loss.temperature, recipe.loss.plausibility, head.logit_scale, contrast,
    )  # fmt: skip


def find_projections(
    recipe: Recipe, model: torch.nn.Module, say: Callable[[str], None], made_from: Callable[[], dict[str, Any]]
) -> ProjectionCache | None:
    """The projections in `teacher.cache` that fit the recipe and its student; None where there are none that fit.

    Args:
        say: is told why projections that are there do not fit.
        made_from: the teacher's fingerprint, which the projections must have.

    Raises:
        SourceError: none fits, and the folder has no states from which others could be made.
    """
    found = [] if recipe.teacher.cache is None else ProjectionCache.beside(recipe.teacher.cache)
    if not recipe.teacher.projection or not found:
        return None
    head = student_head(recipe, model)
    reasons = [needs_states(recipe)] if needs_states(recipe) else []
    for folder in found if not reasons else ():
        try:
            cache = ProjectionCache(folder, verify_checksums=False)
            cache.check(recipe_settings(recipe, head, cache.settings.vocab_size))
            if cache.top_k < min(recipe.teacher.projection, cache.settings.vocab_size):
                raise ValueError(f"{folder} has {cache.top_k} ids a token, {recipe.teacher.projection} are asked for")
        except CorruptCacheError as error:
            raise SourceError(f"teacher.cache: {error}") from error
        except ValueError as error:
            reasons.append(str(error))
            continue
        try:
            return ProjectionCache(folder, fingerprint=made_from())
        except ValueError as error:
            raise SourceError(f"teacher.cache: {error}") from error
    why = "; ".join(reasons)
    if Path(str(recipe.teacher.cache)) in found:
        raise SourceError(f"teacher.cache: expected projections that fit this run, got others: {why}")
    say(f"teacher.projection: new projections are made from the states in teacher.cache, because {why}")
    return None


def needs_states(recipe: Recipe) -> str | None:
    """Why no projections of `cache --project` can serve the recipe."""
    loss = recipe.loss
    if loss.center_text:
        return "loss.center_text moves the teacher's states"
    if loss.alpha_half_divergence is not None:
        return "loss.alpha_half_divergence gives each token an alpha of its own"
    if loss.kd_token_weight == "divergence":
        return "loss.kd_token_weight=divergence needs both paths of the teacher"
    return None


class ProjectedTeacher:
    """Reads a teacher's projections; the teacher does not run.

    Args:
        read: ids -> what a ProjectionCache holds of them, such as its `get`.
        device: where a batch's projections go.
        content: an example -> the fingerprint that the cache must hold for it, or the beginning of that; None = not compared.
        held: id -> the fingerprint that the cache holds.
    """

    def __init__(
        self,
        read: Callable[[Sequence[str]], CachedProjections],
        *,
        device: torch.device,
        content: Callable[[Any], str] | None = None,
        held: Callable[[str], str] = lambda _id: "",
    ) -> None:
        self._read = read
        self._device = device
        self._check = ContentCheck(held, content)

    def __call__(self, batch: Any, examples: Sequence[Any]) -> ProjectedStates:
        try:
            self._check(examples)
            held = self._read(batch.ids)
        except KeyError as error:
            raise SourceError(f"teacher.cache: {error.args[0] if error.args else error}") from error
        lengths = torch.bincount(batch.target_row.cpu(), minlength=len(batch.ids))
        try:
            held = held.spread(batch.target, lengths)
        except ValueError:
            raise SourceError(f"teacher.cache: made for other targets than those of the batch {batch.ids[0]} ...") from None
        apart = held.divergence
        apart = None if apart is None else apart.to(self._device, non_blocking=True)
        return ProjectedStates(held.projection.to(self._device), apart)


def joined(parts: Sequence[CachedProjections]) -> CachedProjections:
    """Several samples one after another."""
    projection = TeacherProjection.cat([part.projection for part in parts])
    names = [field.name for field in dataclasses.fields(CachedProjections) if field.name != "projection"]
    others = {name: [getattr(part, name) for part in parts] for name in names}
    return CachedProjections(projection, **{n: None if x[0] is None else torch.cat(x) for n, x in others.items()})
