"""The loss of a training step: which target tokens count, how much each weighs, and what the teachers say about them.

    TokenWeights        weight of each target token in the two terms, KD and CE
    counted_positions   the target tokens that have a weight; only those are worth rows of logits
    objective_loss      the loss of one part of a step, from hidden states
    PartLoss            the same from the batch, in one forward: what data parallelism needs

Legend: N target tokens of a part, B examples, H_s hidden width of the student, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kdkernels import (
    TeacherSource,
    adaptive_alpha,
    fused_linear_multi_teacher_loss,
    fused_linear_projected_loss,
)
from kdkernels.head_layers import linear_of
from kdkernels.lm_head import apply_post
from kdkernels.ops.gemm import gemm
from models.backbones.answer_noise import AnswerNoise
from models.backbones.causal_lm import logit_post
from models.training.build_sources import OWN_TEACHER
from models.training.layer_distillation import Examples, LayerDistillation
from models.training.recipe import Recipe
from models.training.recipe_sections import LossConfig
from models.training.teacher_states import ProjectedStates, TeacherStates
from models.training.training_data import TrainingData

Curve = tuple[str, torch.Tensor, torch.Tensor]  # name, mean, weight


@dataclass(frozen=True)
class TokenWeights:
    """Weight of each target token in the two terms; (N,) float32."""

    kd: torch.Tensor
    ce: torch.Tensor

    def sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The divisors of the terms KD, CE and layers: sums over the tokens."""
        return self.kd.sum(), self.ce.sum(), (self.kd > 0).sum()


@dataclass(frozen=True)
class Normalizers:
    """The divisors of the loss's terms: sums over a whole step, all its parts and all ranks."""

    kd: torch.Tensor
    ce: torch.Tensor
    layers: torch.Tensor

    @classmethod
    def of(cls, weights: Sequence[TokenWeights], sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> Normalizers:
        """The divisors of a step. `weights` are those of its parts on this rank."""
        sums = [torch.stack(each).sum() for each in zip(*(part.sums() for part in weights), strict=True)]
        return cls(*map(sum_over_ranks, sums))


@dataclass(frozen=True)
class Part:
    """The examples of one forward pass, on the device.

    Attributes:
        batch: with the target tokens that count, and no others.
        states: of every teacher by its name, at those tokens.
        present: (B,) bool, False where audio dropout masks the audio.
        noise: on the embeddings of the answers, or None.
        longest: the most target tokens of one example.
    """

    batch: Any
    states: Mapping[str, TeacherStates]
    weights: TokenWeights
    present: torch.Tensor
    noise: AnswerNoise | None = None
    longest: int = 1


def token_weights(
    loss: LossConfig,
    batch: Any,
    states: TeacherStates | None,
    charged: torch.Tensor | None = None,
    answered: torch.Tensor | None = None,
) -> TokenWeights:
    """Weights of the N target tokens by `loss.kd_token_weight` and `loss.ce_token_weight`.

    - uniform: 1.
    - choice: 1 on the tokens that spell the answer, the background weight on the others. An example without such tokens has
      weight 1 on all of them.
    - divergence: KL(p_audio || p_text), which says how much the sound decides about the token.

    Args:
        charged: (B,) bool, the examples whose background tokens are in the CE term; None = all (see
            `loss.ce_background_fraction`).
        answered: (B,) bool, the examples whose answer the student has made itself. It is no label, so it has no CE term unless
            the teacher labels it (`loss.ce_target`). None = none of them.

    With `loss.kd_average` or `loss.ce_average` "samples" the weights of each example are divided by their sum. All target tokens
    with a weight have to be in the batch.
    """
    mask, rows = batch.choice_mask, batch.target_row
    spelled = torch.zeros(len(batch.ids), dtype=torch.bool, device=mask.device).index_put((rows[mask],), mask.new_tensor(True))

    def choice(background: float | torch.Tensor) -> torch.Tensor:
        return torch.where(mask | ~spelled[rows], 1.0, background)

    ce_background: float | torch.Tensor = loss.ce_background_weight
    if charged is not None and loss.ce_background_fraction < 1:
        ce_background = charged[rows] * (loss.ce_background_weight / loss.ce_background_fraction)
    ones = torch.ones(batch.target.shape, device=batch.target.device)
    if loss.kd_token_weight == "divergence" and states is not None:
        kd = states.divergence
    else:
        kd = choice(loss.kd_background_weight) if loss.kd_token_weight == "choice" else ones
    ce = choice(ce_background) if loss.ce_token_weight == "choice" else ones
    if answered is not None and loss.ce_target == "answer":
        ce = ce * ~answered[rows]
    if loss.kd_average == "samples":
        kd = _by_sample(kd, rows, len(batch.ids))
    if loss.ce_average == "samples":
        ce = _by_sample(ce, rows, len(batch.ids))
    return TokenWeights(kd=kd, ce=ce)


def _by_sample(weights: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """`weights` (N,) divided by their sum in each example: an example with a weight weighs 1, so their sum counts examples."""
    sums = weights.new_zeros(count).index_add(0, rows, weights)
    return weights / torch.where(sums > 0, sums, 1.0)[rows]


def counted_positions(
    recipe: Recipe, batch: Any, charged: torch.Tensor | None = None, answered: torch.Tensor | None = None
) -> torch.Tensor | None:
    """(n,) int64 numbers of the target tokens with a weight above 0 in some term; None = all of them.

    Where only the answer's tokens have a weight, seven in eight rows of logits would have no use.
    """
    if recipe.loss.kd_token_weight == "divergence":
        return None  # known only when the teacher has run
    weights = token_weights(recipe.loss, batch, None, charged, answered)
    counts = weights.ce > 0 if not recipe.distils or recipe.loss.kd_weight < 1 else torch.zeros_like(batch.choice_mask)
    if recipe.distils and recipe.loss.kd_weight > 0:
        counts = counts | (weights.kd > 0)
    return None if bool(counts.all()) else counts.nonzero()[:, 0]


def select_positions(
    batch: Any, states: dict[str, TeacherStates], positions: torch.Tensor | None
) -> tuple[Any, dict[str, TeacherStates]]:
    """`batch` and each teacher's `states` with only these target tokens."""
    if positions is None:
        return batch, states
    names = ("target_index", "target", "target_row", "choice_mask")
    batch = dataclasses.replace(batch, **{name: getattr(batch, name)[positions] for name in names})
    return batch, {name: one.at(positions) for name, one in states.items()}


def objective_loss(
    recipe: Recipe,
    step: int,
    model: torch.nn.Module,
    hidden: torch.Tensor,
    target: torch.Tensor,
    states: Mapping[str, TeacherStates],
    weights: TokenWeights,
    kd_normalizer: torch.Tensor,
    ce_normalizer: torch.Tensor,
    with_stats: bool = True,
) -> tuple[torch.Tensor, list[Curve]]:
    """The objective on one part of a step, divided by the normalizers of the whole step.

    Args:
        hidden: (N, H_s) what the student's LM head reads at the positions that predict `target` (N,).
        states: of every teacher, by its name; with `divergence` where the recipe's loss needs it.
        with_stats: also the curves of the statistics. The divergence of the teacher's two paths needs the logits of both,
            a product with the whole vocabulary that the loss itself does without. So ask for them only at logged steps.

    Returns:
        the loss, and (name, mean, weight) of each curve to log.
    """
    post = logit_post(model)
    # In the head's dtype: autocast hands out bfloat16 states of a float32 model.
    hidden, weight, bias = linear_of(model.get_output_embeddings(), hidden)
    if not recipe.distils:
        return _cross_entropy(post(F.linear(hidden, weight, bias)), target, weights.ce, ce_normalizer)
    settings = recipe.loss
    shared: dict[str, Any] = {
        "student_bias": bias,
        "kd_weight": settings.kd_weight,
        "kd_token_weight": weights.kd,
        "ce_token_weight": weights.ce,
        "kd_normalizer": kd_normalizer,
        "ce_normalizer": ce_normalizer,
        "chunk_tokens": settings.chunk_tokens,
        "impl": settings.impl,
        "return_stats": with_stats,
    }
    own = states.get(OWN_TEACHER)
    if isinstance(own, ProjectedStates):
        result = fused_linear_projected_loss(hidden, weight, own.projection, target, **shared)
    else:
        sources = {name: teacher_source(recipe, name, step, one) for name, one in states.items()}
        if settings.ce_target == "teacher" and settings.kd_weight < 1:
            target = teacher_labels(sources[OWN_TEACHER], weight.shape[0])
        result = fused_linear_multi_teacher_loss(  # of one teacher: fused_linear_caad_loss, to the bit
            hidden,
            weight,
            list(sources.values()),
            target,
            student_softcap=post.softcap,
            student_logit_scale=post.scale,
            temperature=settings.temperature,
            round_contrast=settings.round_contrast,
            **shared,
        )
    if not with_stats:
        return result, []
    loss, stats = result
    if isinstance(own, ProjectedStates):
        return loss, _projected_curves(stats, weights)
    return loss, _distillation_curves(stats, weights, list(states))


def _cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, normalizer: torch.Tensor
) -> tuple[torch.Tensor, list[Curve]]:
    """The objective without any teacher, from logits (N, V), and its curves."""
    token_loss = F.cross_entropy(logits.float(), target, reduction="none")  # (N,)
    loss = (token_loss * weights).sum() / normalizer
    right = (logits.argmax(-1) == target).double()
    total = weights.sum()
    return loss, [("ce", _mean(token_loss, weights), total), ("top1_target", _mean(right, weights), total)]


def _distillation_curves(stats: Any, weights: TokenWeights, names: Sequence[str]) -> list[Curve]:
    """`stats` of the loss as curves; those of each source carry its name where there are several."""
    kd_total, ce_total = weights.kd.sum(), weights.ce.sum()
    curves = [("kd", _mean(stats.kd, weights.kd), kd_total), ("ce", _mean(stats.ce, weights.ce), ce_total)]
    by_token = {"student_entropy": stats.student_entropy}
    for k, name in enumerate(names):
        suffix = "" if len(names) == 1 else f"_{name}"
        by_token |= {f"kd{suffix}": stats.source_kd[k]} if suffix else {}
        by_token |= {f"teacher_entropy{suffix}": stats.source_entropy[k]}
        by_token |= {f"top1_agreement{suffix}": stats.top1_agreement[k]}
        by_token |= {f"path_divergence{suffix}": stats.path_divergence[k]}
    return curves + [(name, _mean(values, weights.kd), kd_total) for name, values in by_token.items()]


def _projected_curves(stats: Any, weights: TokenWeights) -> list[Curve]:
    """As `_distillation_curves`, but for the divergence of the teacher's two paths, which a projection does not know."""
    kd_total = weights.kd.sum()
    by_token = {name: getattr(stats, name) for name in ("kd", "student_entropy", "teacher_entropy", "top1_agreement")}
    curves = [(name, _mean(values, weights.kd), kd_total) for name, values in by_token.items()]
    return [*curves, ("ce", _mean(stats.ce, weights.ce), weights.ce.sum())]


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values.double() * weights).sum() / weights.sum().clamp(min=1e-12)  # all weights 0: mean 0, not NaN


def teacher_source(recipe: Recipe, name: str, step: int, states: TeacherStates) -> TeacherSource:
    """The teacher `name` at optimiser step `step`, in the form that the losses take."""
    text_hidden = states.text_hidden
    if name == OWN_TEACHER:
        loss = recipe.loss
        alpha, weight, divergence, jsd_beta = loss.alpha_at(step), 1.0, loss.divergence, loss.jsd_beta
        plausibility = loss.plausibility
        if loss.alpha_half_divergence is not None:
            alpha = adaptive_alpha(states.divergence, alpha, half_at=loss.alpha_half_divergence)
        if recipe.objective == "kd":
            alpha, text_hidden = 0.0, None
        elif recipe.objective == "sharpened":
            text_hidden = torch.zeros_like(states.audio_hidden)  # logits 0: (1 + alpha) z_audio, nothing subtracted
    else:
        source = recipe.sources[name]
        alpha, weight, divergence, jsd_beta = source.alpha, source.weight_at(step), source.divergence, source.jsd_beta
        plausibility = None
        if alpha == 0:
            text_hidden = None
    return TeacherSource(
        hidden=states.audio_hidden,
        weight=states.head.weight,
        text_hidden=text_hidden,
        bias=states.head.bias,
        softcap=states.head.softcap,
        logit_scale=states.head.logit_scale,
        alpha=alpha,
        source_weight=weight if states.speaks is None else weight * states.speaks,
        divergence=divergence,
        jsd_beta=jsd_beta,
        plausibility=plausibility,
    )


@torch.no_grad()
def teacher_labels(source: TeacherSource, vocab_size: int, *, chunk_tokens: int = 256) -> torch.Tensor:
    """(N,) int64: the id below `vocab_size` that the teacher's contrasted distribution likes best at each position.

    Ids that the plausibility mask leaves out are not taken. The logits are float32, `chunk_tokens` rows at a time.
    """

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        raw = torch.empty(len(hidden), len(source.weight), device=hidden.device)
        gemm(hidden.to(source.weight.dtype), source.weight, source.bias, raw)
        return apply_post(raw, source.softcap, source.logit_scale)[:, :vocab_size]

    labels = []
    for start in range(0, len(source.hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        audio = scores = logits(source.hidden[rows])
        if source.text_hidden is not None:
            alpha = source.alpha[rows, None] if isinstance(source.alpha, torch.Tensor) else source.alpha
            scores = audio + alpha * (audio - logits(source.text_hidden[rows]))
        if source.plausibility is not None:
            scores = scores.masked_fill(audio < audio.amax(-1, keepdim=True) + math.log(source.plausibility), -torch.inf)
        labels.append(scores.argmax(-1))
    return torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64, device=source.hidden.device)


class PartLoss(torch.nn.Module):
    """A part's loss from its batch, in one forward: what `parallelize` needs.

    Args:
        compared: the layers of the sources that have some, which train; `model` holds them already.
    """

    def __init__(
        self, recipe: Recipe, model: torch.nn.Module, data: TrainingData, compared: Mapping[str, LayerDistillation]
    ) -> None:
        super().__init__()
        logit_post(model)  # asked here, before the weights may be sharded
        self.model = model
        self._recipe = recipe
        self._data = data
        self._compared = dict(compared)  # a plain dict: as a submodule they would be in the model twice
        self._student_layers = sorted({layer for layers in compared.values() for layer in layers.student_layers})

    def forward(
        self, step: int, part: Part, normalizers: Normalizers, with_stats: bool
    ) -> tuple[torch.Tensor, list[Curve], list[tuple[str, torch.Tensor]]]:
        """Loss, curves as `objective_loss` gives them, and (curve, loss) of each source's layers."""
        hidden, by_layer = self._student_states(part)
        loss, curves = objective_loss(
            self._recipe, step, self.model, hidden, part.batch.target, part.states, part.weights, normalizers.kd,
            normalizers.ce, with_stats,
        )  # fmt: skip
        layer_losses = []
        examples = Examples(part.batch.target_row, len(part.batch.ids), part.longest)
        for name, layers in self._compared.items():
            layer_loss = layers.loss(by_layer, part.states[name], part.weights.kd > 0, normalizers.layers, examples)
            loss = loss + layers.settings.weight * layer_loss
            layer_losses.append(("layers" if name == OWN_TEACHER else f"layers_{name}", layer_loss))
        return loss, curves, layer_losses

    def _student_states(self, part: Part) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """(N, H_s) what the LM head reads, and the states of the compared layers by their numbers."""
        inputs = self._data.model_inputs(part.batch)
        inputs["audio_present"] = inputs["audio_present"] & part.present if "audio_present" in inputs else part.present
        if part.noise is not None:
            inputs["answer_noise"] = part.noise
        if not self._compared:
            return self.model.hidden_states_at(part.batch.target_index, **inputs), {}
        taken = self.model.hidden_states_at(part.batch.target_index, **inputs, layers=self._student_layers)
        hidden, *by_layer = taken.unbind(1)
        return hidden, dict(zip(self._student_layers, by_layer, strict=True))
