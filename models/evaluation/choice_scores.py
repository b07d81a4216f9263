"""The likelihood of each choice of a question, by the tokens that spell it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kdkernels.teacher import DualPathTeacher, MarkAbsent
from models.backbones.causal_lm import read_head
from models.data.manifest import Example
from models.data.prompts import target_template
from models.speech_lm.collation import crop_to_targets


@torch.no_grad()
def choice_scores(
    model: torch.nn.Module,
    examples: Sequence[Example],
    features: torch.Tensor,
    *,
    collate: Callable[..., Any],
    alphas: Sequence[float] = (0.0,),
    formula: str = "extrapolate",
    hears: bool = True,
    extra_inputs: dict[str, Any] | None = None,
) -> list[list[dict[str, float]]]:
    """Log-likelihood of each choice of each example, for several contrast strengths from the same forward passes.

        score(c) = sum over the tokens t that spell c of  log softmax((1 + alpha) z_audio - alpha z_text)[t]

    With formula "authors" it is log softmax(z_audio - alpha z_text), what CAAD's authors decode with.

    The tokens that spell c are those of its sentence, without the common beginning and end of all choices' sentences.

    Args:
        model: a SpeechLM or an `AudioLM`, in evaluation mode.
        features: (B, K, T, D), or for an `AudioLM` (B,) clips.
        collate: examples, features -> batch (collation.py of models/speech_lm or models/audio_lms).
        alphas: contrast strengths. 0 is plain likelihood and needs no second path.
        hears: False masks the audio on the path with audio too (the no-audio control).

    Returns:
        [alpha][example] -> {choice: score}.

    Raises:
        ValueError: an example without choices.
    """
    # One row for each choice. If the choices differ in a single token, one row serves all of them.
    rows: list[tuple[int, list[tuple[str, int, list[int]]], Example]] = []  # example, (choice, first token, ids), forced
    for i, example in enumerate(examples):
        if not example.choices:
            raise ValueError(f"example {example.id}: expected choices, got none; use mode 'generate'")
        forced = [dataclasses.replace(example, target=target_template(example, c)) for c in example.choices]
        ids = [collate.target_ids(e) for e in forced]
        at = _single_difference(ids)
        if at is not None:
            rows.append((i, [(c, at, t[at : at + 1]) for c, t in zip(example.choices, ids, strict=True)], forced[0]))
        else:
            start, end = _common_start(ids), _common_end(ids)
            if min(map(len, ids)) == start + end:
                end = 0  # one choice ends another ("man", "woman" by letters) and would have no token left to score
            for choice, tokens, one in zip(example.choices, ids, forced, strict=True):
                rows.append((i, [(choice, start, tokens[start : len(tokens) - end])], one))
    batch = collate([row[2] for row in rows], features[[row[0] for row in rows]])
    first = torch.zeros(len(rows), dtype=torch.int64)  # where in the batch's N positions each row's target starts
    first[1:] = torch.bincount(batch.target_row, minlength=len(rows)).cumsum(0)[:-1]
    wanted = [first[r] + start + n for r, (_, spelled, _) in enumerate(rows) for start, n in _positions(spelled)]
    batch = dataclasses.replace(batch, target_index=batch.target_index[torch.stack(wanted)])
    batch = crop_to_targets(batch).to(model.get_output_embeddings().weight.device)
    index = batch.target_index
    inputs = {**batch.model_inputs(), **(extra_inputs or {})}
    if not hears:
        inputs["audio_present"] = torch.zeros_like(inputs["audio_present"])

    head = read_head(model)
    if any(alphas):
        states = DualPathTeacher(model, negative=MarkAbsent(), head=head)(inputs, index)
        audio, text = head.logits(states.audio_hidden).float(), head.logits(states.text_hidden).float()
    else:
        audio, text = head.logits(model.hidden_states_at(index, **inputs)).float(), None

    result = []
    for alpha in alphas:
        weight = 1 if formula == "authors" else 1 + alpha
        logits = audio if text is None or alpha == 0 else weight * audio - alpha * text  # (positions, V)
        log_p = logits.log_softmax(-1).cpu()
        scores: list[dict[str, float]] = [{} for _ in examples]
        at = 0
        for i, spelled, _ in rows:
            places = {place: at + n for n, place in enumerate(_positions(spelled))}
            for choice, start, tokens in spelled:
                scores[i][choice] = float(sum(log_p[places[start, n], t] for n, t in enumerate(tokens)))
            at += len(places)
        result.append(scores)
    return result


def _positions(spelled: Sequence[tuple[str, int, list[int]]]) -> list[tuple[int, int]]:
    """(start, offset) of each distinct position that a row is scored at."""
    return list(dict.fromkeys((start, n) for _, start, tokens in spelled for n in range(len(tokens))))


def _single_difference(ids: Sequence[list[int]]) -> int | None:
    if len({len(t) for t in ids}) != 1:
        return None
    different = [n for n, column in enumerate(zip(*ids, strict=True)) if len(set(column)) > 1]
    return different[0] if len(different) == 1 else None


def _common_start(ids: Sequence[list[int]]) -> int:
    return next((n for n, c in enumerate(zip(*ids, strict=False)) if len(set(c)) > 1), min(map(len, ids)))


def _common_end(ids: Sequence[list[int]]) -> int:
    # At most what follows the common start; a repeated token would count on both sides otherwise.
    return min(_common_start([t[::-1] for t in ids]), min(map(len, ids)) - _common_start(ids))
