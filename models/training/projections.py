"""The objective's own teacher, projected for the student's frozen LM head (`teacher.projection`).

The teacher runs once for each example, as it would in a step. `kdkernels.project_teacher` makes of its states what a forward KL
needs for this one head. A step then costs what cross-entropy costs.

A run keeps its projections in the folder "projections" of run.out_dir, so a run that goes on finds them there. Several ranks make
them together: each projects every N-th group of examples, and all of them read the others' groups.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kdkernels import LMHead, ProjectionCache, TeacherProjection, project_teacher
from kdkernels.projection_cache import CachedProjections
from models.io_utils import fingerprint
from models.training.build_sources import OWN_TEACHER
from models.training.continued_settings import settings_to_continue
from models.training.distributed import Ranks
from models.training.objective import teacher_source, token_weights
from models.training.projected_teacher import ProjectedTeacher, joined, recipe_settings, student_head
from models.training.recipe import Recipe
from models.training.teacher_states import SourceError, Teacher, TeacherStates
from models.training.teachers import Source
from models.training.training_data import TrainingData

_EXAMPLES = 32  # at a time, where they are made before the first step
_PENDING_BYTES = 64 << 20  # of projections that are in memory and not yet on the disk


def project_own_teacher(
    recipe: Recipe,
    sources: Sequence[Source],
    data: TrainingData,
    model: torch.nn.Module,
    device: torch.device,
    ranks: Ranks | None = None,
) -> list[Source]:
    """`sources` with the objective's own teacher projected, where the recipe asks for it and the source is not projected yet.

    Raises:
        SourceError: the student's LM head trains, or its logits have a softcap; or the disk has no room for the projections.
    """
    own = [source for source in sources if source.name == OWN_TEACHER]
    if not recipe.teacher.projection or (own and isinstance(own[0].teacher, ProjectedTeacher)):
        return list(sources)
    head, ranks = student_head(recipe, model), ranks or Ranks(device)
    folder = Path(recipe.run.out_dir) / "projections"

    def projected(source: Source) -> Source:
        made = RunProjections(recipe, source.teacher, data, head, folder, device=device, ranks=ranks)
        if not recipe.teacher.projection_on_the_way:
            made.make_all()
            return dataclasses.replace(source, teacher=made, store=None)
        return dataclasses.replace(source, teacher=made)

    return [projected(source) if source.name == OWN_TEACHER else source for source in sources]


def project_states(recipe: Recipe, states: TeacherStates, positions: torch.Tensor, head: LMHead) -> TeacherProjection:
    """The objective's own distribution at the target tokens `positions`, for the student's head."""
    source = teacher_source(recipe, OWN_TEACHER, 1, states.at(positions))
    return project_teacher(
        source.hidden, source.text_hidden, source.weight, head.weight, alpha=source.alpha, temperature=recipe.loss.temperature,
        top_k=recipe.teacher.projection, teacher_bias=source.bias, student_bias=head.bias, teacher_softcap=source.softcap,
        teacher_logit_scale=source.logit_scale, student_logit_scale=head.logit_scale, plausibility=source.plausibility,
    )  # fmt: skip


class RunProjections:
    """A teacher's projections of a run's examples: made once, by `make_all` or when a step first needs an example.

    Only target tokens with a weight in the KD term are projected. Of the others the loss needs nothing.

    Args:
        teacher: called for the examples that have no projection yet; it returns `TeacherStates`.
        data: the TrainingData that the run draws from.
        head: of the student.
        folder: of the projections. What another recipe has left there is deleted.
        device: where a batch's projections go.
        ranks: those that make the projections together.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        data: TrainingData,
        head: LMHead,
        folder: Path,
        *,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self._recipe, self._teacher, self._data, self._head, self._ranks = recipe, teacher, data, head, ranks
        self._folder, self._device = folder, device
        self._pending: dict[str, CachedProjections] = {}
        self._writer: Any = None
        self._cache: ProjectionCache | None = None
        self._reader = ProjectedTeacher(self._held, device=device)
        if ranks.is_first and folder.exists() and not self._is_of_this_run():
            shutil.rmtree(folder)
        ranks.any(False)  # no rank writes before that
        if ProjectionCache.beside(folder):
            self._reopen()

    def make_all(self) -> None:
        """Every example's projection, before the first step: this rank's share, and a wait for the others."""
        groups = [self._data.examples[start : start + _EXAMPLES] for start in range(0, len(self._data), _EXAMPLES)]
        own = self._ranks.own(groups)
        bar = tqdm(
            total=sum(map(len, own)), desc="projections of the teacher", unit="example",
            disable=not self._recipe.run.progress_bar or not self._ranks.is_first,
        )  # fmt: skip
        with bar:
            for group in own:
                if not all(self._has(example.id) for example in group):
                    self._make(self._data.make_batch(group), group)
                bar.update(len(group))
        self.close()
        self._ranks.any(False)  # all of them are on the disk
        self._reopen()

    def __call__(self, batch: Any, examples: Sequence[Any]) -> Any:
        if not all(map(self._has, batch.ids)):
            self._make(batch, examples)
        return self._reader(batch, examples)

    def flush(self) -> None:
        """What is made is on the disk: a run that goes on from here does not make it again."""
        if self._pending:
            self._writer.flush()
            self._pending.clear()
            self._reopen()

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _make(self, batch: Any, examples: Sequence[Any]) -> None:
        """Project a whole batch, and keep what is new of it: a part of a batch would have other bits."""
        recipe = self._recipe
        states = self._teacher(batch, examples)
        if recipe.loss.needs_divergence:
            states = states.with_divergence()
        positions = torch.arange(len(batch.target))
        if recipe.loss.kd_token_weight != "divergence":
            positions = positions[(token_weights(recipe.loss, batch, None).kd > 0).cpu()]
        projection = project_states(recipe, states, positions, self._head).to("cpu")
        apart = states.divergence if self._keeps_divergence else None
        apart = None if apart is None else apart[positions.to(apart.device)].cpu()
        target, rows = batch.target.cpu()[positions], batch.target_row.cpu()
        lengths = torch.bincount(rows, minlength=len(batch.ids))
        firsts = lengths.cumsum(0) - lengths  # an example's target tokens follow each other
        if self._writer is None:
            self._writer = self._opened(projection, states, len(batch.ids))
        for row, name in enumerate(batch.ids):
            if self._has(name):
                continue
            taken = rows[positions] == row
            one = CachedProjections(
                projection[taken], target[taken], positions[taken] - firsts[row], taken.sum()[None],
                None if apart is None else apart[taken],
            )  # fmt: skip
            self._writer.add(name, one.projection, one.target, position=one.position, divergence=one.divergence)
            self._pending[name] = one
        if sum(one.projection.nbytes for one in self._pending.values()) >= _PENDING_BYTES:
            self.flush()

    @property
    def _keeps_divergence(self) -> bool:
        """Whether a token's weight is the divergence of the teacher's paths."""
        return self._recipe.loss.kd_token_weight == "divergence"

    def _has(self, name: str) -> bool:
        return name in self._pending or (self._cache is not None and name in self._cache)

    def _held(self, names: Sequence[str]) -> CachedProjections:
        pending = [name for name in names if name in self._pending]
        if not pending and self._cache is not None:
            return self._cache.get(names)
        return joined([self._pending[name] if name in self._pending else self._cache.get([name]) for name in names])

    def _reopen(self) -> None:
        self._cache = ProjectionCache(self._folder, verify_checksums=False)

    @functools.cached_property
    def _made_from(self) -> dict[str, str]:
        settings = fingerprint(settings_to_continue(self._recipe))
        return {"recipe": settings, "examples": fingerprint([example.id for example in self._data.examples])}

    def _is_of_this_run(self) -> bool:
        if self._recipe.run.resume == "never":
            return False
        try:
            ProjectionCache(self._folder, fingerprint=self._made_from)
        except ValueError:  # another run's, or damaged
            return False
        return True

    def _opened(self, projection: TeacherProjection, states: TeacherStates, examples: int) -> Any:
        """This rank's writer; `projection` and `states` are those of the first `examples`.

        Raises:
            SourceError: the disk has no room for all of them.
        """
        tokens = max(1, len(projection.mass))
        theirs = sum(x.nbytes for x in states.tensors().values()) / max(1, len(states.audio_hidden))
        needed = projection.nbytes * len(self._data) / examples
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if self._ranks.is_first:
            tqdm.write(
                f"projections of the teacher in {self._folder}: about {needed / 2**20:.1f} MiB, {projection.nbytes / tokens:.0f} "
                f"bytes a token (its states take {theirs:.0f}); {free / 2**20:.0f} MiB are free"
            )
        if needed > free:
            raise SourceError(f"run.out_dir: expected room for {needed:.0f} bytes of projections, got {free}")
        return ProjectionCache.writer(
            self._folder, fingerprint=self._made_from, settings=recipe_settings(self._recipe, self._head, projection.vocab_size),
            hidden_size=self._head.weight.shape[1], top_k=projection.ids.shape[-1], divergence=self._keeps_divergence,
            shard_mib=1 << 20, part=f"rank{self._ranks.rank}",
        )  # fmt: skip
