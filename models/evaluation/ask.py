"""Asks a model every question: by ranking the choices or by free answers, with and without the controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from kdkernels.checks import check_not_negative
from models.corpora.hearing import PLAIN, Hearing
from models.data.manifest import Example
from models.data.prompts import target_template
from models.evaluation.choice_scores import choice_scores
from models.evaluation.commands import CONTROLS
from models.evaluation.controls import control_id, with_controls
from models.evaluation.predictions import Prediction, claimed_choice, context_kind, groups_of, heard, likeliest
from models.io_utils import fingerprint
from models.speech_lm.features import FeatureStore, clip_key
from models.speech_lm.listeners import answer_ids


@dataclass(frozen=True)
class Decoding:
    """How a contrast is decoded, beside its strength; see `kdkernels.contrastive_generate`.

    Attributes:
        formula: "extrapolate" or "authors"; the only field that mode "choice" has a use for.
        temperature: None = always the best token.
        top_k, top_p: of sampling; None = all tokens.
        seed: of sampling. A batch's answers depend on it and on the ids of its questions.
    """

    formula: str = "extrapolate"
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def options(self, device: torch.device, asked: Sequence[str]) -> dict[str, Any]:
        """Keywords of `contrastive_generate` for a batch of questions."""
        generator = None
        if self.temperature is not None:
            seed = int(fingerprint([self.seed, *asked])[:15], 16)  # so that a continued evaluation draws the same numbers
            generator = torch.Generator(device).manual_seed(seed)
        chosen = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return {"formula": self.formula, **chosen, "generator": generator}


PLAIN_CONTRAST = Decoding()


def evaluate(
    model: torch.nn.Module,
    examples: Sequence[Example],
    store: FeatureStore,
    *,
    collate: Callable[..., Any],
    mode: str = "choice",
    alphas: Sequence[float | None] = (None,),
    controls: Sequence[str] = (),
    plain: bool = True,
    batch_examples: int = 32,
    max_new_tokens: int = 16,
    decoding: Decoding = PLAIN_CONTRAST,
    extra_inputs: dict[str, Any] | None = None,
    done: Iterable[Prediction] = (),
    on_batch: Callable[[float | None, list[Prediction]], None] | None = None,
    progress_bar: bool = True,
    hears: Hearing = PLAIN,
) -> dict[float | None, list[Prediction]]:
    """Predictions for every example, with and without the controls.

    Args:
        model: a SpeechLM or an `AudioLM`.
        store: what it hears: `rows(examples)` gives the input of `collate` (models/speech_lm/listeners.py).
        mode: "choice" or "generate".
        alphas: None is plain (greedy) decoding. A number is contrastive decoding with that strength. In mode "choice" all
            strengths use the same forward passes.
        controls: any of "no_audio", "swapped_audio". Their predictions have `control` set and "#control" in the id.
        plain: False asks only the controls.
        decoding: of the contrast, where an alpha is not None.
        done: predictions made before, which are not made again (only with a single alpha).
        hears: what the model's prompts show; `store` hears accordingly.
        on_batch: called with (alpha, new predictions) after each batch, to save them.

    Returns:
        predictions by alpha, those of `done` first.

    Raises:
        ValueError: an argument outside its range, an example without an answer to score against, or a free answer that would
            be chosen from logits that are NaN.
        EvaluationError: the likelihoods of an example's choices are no numbers.
    """
    _check_options(examples, mode, alphas, controls, batch_examples)
    made = {p.id for p in done}
    result: dict[float | None, list[Prediction]] = {alpha: list(done) if len(alphas) == 1 else [] for alpha in alphas}
    model.eval()
    # Rows of similar length stand together, because most of the work is padding otherwise.
    work = sorted(examples, key=lambda e: (len(e.choices), len(e.transcription) + len(e.context)))
    todo = [(c, e, h) for c, e, h in with_controls(work, controls, plain=plain) if control_id(e.id, c) not in made]
    options = {"collate": collate, "mode": mode, "max_new_tokens": max_new_tokens, "extra_inputs": extra_inputs}
    options["decoding"] = decoding
    for control, group in _batches(todo, batch_examples, done=len(made), progress_bar=progress_bar):
        asked, features = [hears.shown(e) for e, _ in group], store.rows([h for _, h in group])
        for alpha, texts, scores in _answers(model, asked, features, alphas, hears=control != "no_audio", **options):
            new = [
                Prediction(
                    id=control_id(e.id, control), task=e.task, kind=context_kind(e), answer=e.answer, choices=e.choices,
                    prediction=text, pair_id=e.pair_id, control=control, scores=s, question=e.question,
                    category=str(e.metadata.get("category", "")), claim=claimed_choice(e), clip=clip_key(h),
                    groups=groups_of(e), **heard(e),
                )
                for (e, h), text, s in zip(group, texts, scores, strict=True)
            ]  # fmt: skip
            result[alpha] += new
            if on_batch is not None:
                on_batch(alpha, new)
    return result


def has_answer(example: Example) -> bool:
    """Whether there is an answer to score against. One of white space is none: no text could name it."""
    return bool((example.answer or "").strip())


@torch.no_grad()
def generate_answers(
    model: torch.nn.Module,
    examples: Sequence[Example],
    features: torch.Tensor,
    *,
    collate: Callable[..., Any],
    alpha: float | None = None,
    hears: bool = True,
    max_new_tokens: int = 16,
    decoding: Decoding = PLAIN_CONTRAST,
) -> list[str]:
    """Free answers by greedy decoding; with `alpha` by contrastive decoding of the paths with and without audio."""
    device = model.get_output_embeddings().weight.device
    batch = collate(examples, features, with_target=False).to(device)
    options = {} if alpha is None else decoding.options(device, [e.id for e in examples] + ["" if hears else "no audio"])
    if not hears:
        batch = dataclasses.replace(batch, audio_present=torch.zeros_like(batch.audio_present))
    return written_answers(model, batch, max_new_tokens=max_new_tokens, alpha=alpha, **options)


def written_answers(model: torch.nn.Module, batch: Any, **options: Any) -> list[str]:
    """The answers of `answer_ids` as texts, without special tokens and outer white space."""
    rows, _ = answer_ids(model, batch, **options)
    return [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def _check_options(
    examples: Sequence[Example], mode: str, alphas: Sequence[float | None], controls: Sequence[str], batch_examples: int
) -> None:
    if mode not in ("choice", "generate"):
        raise ValueError(f"mode: expected 'choice' or 'generate', got {mode!r}")
    for control in controls:
        if control not in CONTROLS:
            raise ValueError(f"controls: expected some of {CONTROLS}, got {control!r}")
    if batch_examples < 1:
        raise ValueError(f"batch_examples: expected at least 1, got {batch_examples}")
    for alpha in alphas:
        if alpha is not None:
            check_not_negative("alpha", alpha)
    for example in examples:
        if not has_answer(example):
            raise ValueError(f"example {example.id}: expected an answer to score against, got none")


def _answers(
    model: torch.nn.Module,
    asked: Sequence[Example],
    features: torch.Tensor,
    alphas: Sequence[float | None],
    *,
    collate: Callable[..., Any],
    mode: str,
    hears: bool,
    max_new_tokens: int,
    extra_inputs: dict[str, Any] | None,
    decoding: Decoding,
) -> Iterator[tuple[float | None, list[str], list[dict[str, float]]]]:
    """(alpha, answers, scores of the choices) of a batch; in mode "generate" the scores are empty."""
    if mode == "generate":
        for alpha in alphas:
            texts = generate_answers(
                model, asked, features, collate=collate, alpha=alpha, hears=hears, max_new_tokens=max_new_tokens,
                decoding=decoding,
            )  # fmt: skip
            yield alpha, texts, [{} for _ in asked]
        return
    strengths = [a or 0.0 for a in alphas]
    all_scores = choice_scores(
        model, asked, features, collate=collate, alphas=strengths, formula=decoding.formula, hears=hears,
        extra_inputs=extra_inputs,
    )  # fmt: skip
    for alpha, scores in zip(alphas, all_scores, strict=True):
        yield alpha, [target_template(e, likeliest(s, e.id)) for e, s in zip(asked, scores, strict=True)], scores


def _batches(
    todo: Sequence[tuple[str, Example, Example]], size: int, *, done: int, progress_bar: bool
) -> Iterator[tuple[str, list[tuple[Example, Example]]]]:
    with tqdm(total=done + len(todo), initial=done, desc="evaluate", unit="answer", disable=not progress_bar) as bar:
        start = 0
        while start < len(todo):
            control = todo[start][0]
            group = [(e, h) for c, e, h in todo[start : start + size] if c == control]
            yield control, group
            start += len(group)
            bar.update(len(group))
