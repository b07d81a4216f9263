"""The objective's own teacher, projected for the student's frozen LM head (`teacher.projection`).

The teacher runs once for each example, as it would in a step. `kdkernels.project_teacher` makes of its states what a forward KL
needs for this one head. A step then costs what cross-entropy costs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from kdkernels import TeacherProjection, project_teacher
from kdkernels.lm_head import linear_of
from models.backbones.causal_lm import logit_post
from models.training.objective import teacher_source, token_weights
from models.training.recipe import Recipe
from models.training.run_setup import OWN_TEACHER, TrainingData
from models.training.teachers import ProjectedStates, Source, SourceError, Teacher, TeacherStates

_EXAMPLES = 32  # at a time


def project_own_teacher(
    recipe: Recipe, sources: Sequence[Source], data: TrainingData, model: torch.nn.Module, device: torch.device
) -> list[Source]:
    """`sources` with the objective's own teacher projected, where the recipe asks for it.

    Raises:
        SourceError: the student's LM head trains, or its logits have a softcap.
    """
    if not recipe.teacher.projection:
        return list(sources)
    head, post = model.get_output_embeddings(), logit_post(model)
    if any(p.requires_grad for p in head.parameters()):
        raise SourceError(
            "teacher.projection: expected 0 with an LM head that trains, whose projection would be that of an older head"
        )
    if post.softcap is not None:
        raise SourceError("teacher.projection: expected 0 with a student whose logits have a softcap")
    nothing = torch.zeros(1, head.weight.shape[1], dtype=head.weight.dtype, device=head.weight.device)
    _, weight, bias = linear_of(head, nothing)

    def project(states: TeacherStates, positions: torch.Tensor) -> TeacherProjection:
        return project_states(recipe, states, positions, weight, bias, post.scale)

    def counted(batch: Any) -> torch.Tensor | None:
        if recipe.loss.kd_token_weight == "divergence":
            return None
        return (token_weights(recipe.loss, batch, None).kd > 0).nonzero()[:, 0]

    def projected(source: Source) -> Source:
        teacher = ProjectedTeacher(
            source.teacher, data, project=project, counted=counted, divergence=recipe.loss.needs_divergence, device=device,
            progress_bar=recipe.run.progress_bar,
        )  # fmt: skip
        return dataclasses.replace(source, teacher=teacher, store=None)

    return [projected(source) if source.name == OWN_TEACHER else source for source in sources]


def project_states(
    recipe: Recipe, states: TeacherStates, positions: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> TeacherProjection:
    """The objective's own distribution at the target tokens `positions`, for the student's head (weight, bias, logit scale)."""
    source = teacher_source(recipe, OWN_TEACHER, 1, states.at(positions))
    return project_teacher(
        source.hidden, source.text_hidden, source.weight, weight, alpha=source.alpha, temperature=recipe.loss.temperature,
        top_k=recipe.teacher.projection, teacher_bias=source.bias, student_bias=bias, teacher_softcap=source.softcap,
        teacher_logit_scale=source.logit_scale, student_logit_scale=scale, plausibility=source.plausibility,
    )  # fmt: skip


class ProjectedTeacher:
    """A teacher's projections of all examples for the student's frozen LM head, computed once, in the examples' order.

    Only target tokens with a weight in the KD term are projected. Of the others the loss needs nothing.

    Args:
        teacher: called once for every example; it returns `TeacherStates`.
        data: the TrainingData that the run draws from.
        project: states, (n,) numbers of the target tokens -> their projection.
        counted: batch -> numbers of the target tokens with a weight in the KD term; None = all.
        divergence: keep the divergence of the teacher's two paths as well.
        device: where a batch's projections go.
    """

    def __init__(
        self,
        teacher: Teacher,
        data: Any,
        *,
        project: Callable[[TeacherStates, torch.Tensor], TeacherProjection],
        counted: Callable[[Any], torch.Tensor | None],
        divergence: bool,
        device: torch.device,
        progress_bar: bool = True,
    ) -> None:
        self._device = device
        self._kept: dict[str, tuple[torch.Tensor, TeacherProjection, torch.Tensor | None]] = {}
        self.bytes = 0
        with tqdm(total=len(data), desc="projections of the teacher", unit="example", disable=not progress_bar) as bar:
            for start in range(0, len(data), _EXAMPLES):
                chosen = data.examples[start : start + _EXAMPLES]
                batch = data.make_batch(chosen)
                states = teacher(batch, chosen)
                if divergence:
                    states = states.with_divergence()
                apart = states.divergence
                counts = counted(batch)
                positions = torch.arange(len(batch.target)) if counts is None else counts.cpu()
                projection = project(states, positions).to("cpu")
                for row, name in enumerate(batch.ids):
                    here = (batch.target_row == row).cpu()
                    taken = here[positions]
                    first = int(here.nonzero()[0]) if here.any() else 0  # an example's target tokens follow each other
                    own = None if apart is None else apart[here.to(apart.device)].cpu()
                    self._kept[name] = (positions[taken] - first, projection[taken], own)
                    self.bytes += self._kept[name][1].nbytes
                bar.update(len(chosen))

    def __call__(self, batch: Any, examples: Sequence[Any]) -> ProjectedStates:
        kept = [self._kept[name] for name in batch.ids]
        lengths = torch.bincount(batch.target_row.cpu(), minlength=len(batch.ids)).tolist()
        starts = [0, *itertools.accumulate(lengths)][:-1]
        where = torch.cat([at + start for start, (at, _, _) in zip(starts, kept, strict=True)])
        projection = TeacherProjection.cat([p for _, p, _ in kept]).spread(where, len(batch.target))
        apart = None
        if kept[0][2] is not None:
            apart = torch.cat([own for _, _, own in kept]).to(self._device, non_blocking=True)
        return ProjectedStates(projection.to(self._device), apart)
