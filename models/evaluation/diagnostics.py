"""More than accuracy: calibration, agreement with the text prior, and the difference between two systems.

As in scoring.py, everything is arithmetic on saved predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models.data.answers import lenient_match, same_choice
from models.evaluation.bootstrap import Statistic
from models.evaluation.predictions import KINDS, Prediction, likeliest
from models.evaluation.scoring import AUDIO_CATEGORY, Judged, judged, shift_masks

if TYPE_CHECKING:
    from models.evaluation.scorers import Scorer

BINS = 10


def calibration(j: Judged, *, bins: int = BINS) -> dict[str, Any] | None:
    """How well the likelihoods of the choices say how often they are right.

    With p = softmax of a prediction's choice scores, confidence = max p, and "right" where the likeliest choice is the answer:

        ece   = sum over bins b of n_b / n * | share right in b - mean confidence in b |      (bins of equal width on [0, 1])
        brier = mean over predictions of sum over choices c of (p_c - [c is the answer])^2    (0 to 2, Brier 1950)

    With few items ECE is too high, since chance alone leaves a gap in each bin. Compare systems on the same items.

    Args:
        bins: how many, of equal width. A confidence on an edge belongs to the bin below, 0 to the first.

    Returns:
        count, ece, brier (Estimates), accuracy, confidence (means), and bins: a list of low, high, count, accuracy and
        confidence by name (the last two are None in an empty bin). None if no prediction has scores of two choices with
        the answer among them.

    Raises:
        ValueError: `bins` is below 1.
        EvaluationError: the scores of a prediction are no numbers.
    """
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    n = len(j.predictions)
    scored, right = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    confidence, brier = np.zeros(n), np.zeros(n)
    for i, p in enumerate(j.predictions):
        logs = np.array(list(p.scores.values()), dtype=np.float64)
        if len(logs) < 2 or p.answer not in p.scores:
            continue
        probabilities = np.exp(logs - p.scores[likeliest(p.scores, p.id)])
        probabilities /= probabilities.sum()
        is_answer = np.array([choice == p.answer for choice in p.scores])
        scored[i] = True
        confidence[i] = probabilities.max()
        right[i] = is_answer[probabilities.argmax()]
        brier[i] = ((probabilities - is_answer) ** 2).sum()
    if not scored.any():
        return None
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")  # an edge belongs to the lower bin
    gap, gap_draws = 0.0, 0.0
    table = []
    for b in range(bins):
        here = scored & (place == b)
        count = int(here.sum())
        row: dict[str, Any] = {"low": b / bins, "high": (b + 1) / bins, "count": count, "accuracy": None, "confidence": None}
        if count:
            row |= {"accuracy": float(right[here].mean()), "confidence": float(confidence[here].mean())}
            difference = np.where(here, right - confidence, 0.0)
            gap += abs(difference.sum())
            gap_draws = gap_draws + np.abs(j.boot.sums(difference))
        table.append(row)
    counts = j.boot.sums(scored)
    draws = np.divide(gap_draws, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    total = int(scored.sum())
    return {
        "count": total,
        "ece": Statistic(gap / total, draws, total).estimate(),
        "brier": j.boot.ratio(brier, scored).estimate(),
        "accuracy": float(right[scored].mean()),
        "confidence": float(confidence[scored].mean()),
        "bins": table,
    }


def prior_confusion(j: Judged, priors: Mapping[str, str]) -> dict[str, Any] | None:
    """How often a wrong answer is the one that the text alone suggests.

    Args:
        priors: id -> answer of the text prior. It may be the model's answer without the audio, another text-only model's
            answer, or what the hint claims. Predictions without one are left out.

    Returns:
        {"all": table, "by_task": {task: table}}, or None if no prediction has a prior. A table counts

            prior_right:  {"right", "wrong"}              the prior names the answer
            prior_wrong:  {"right", "as_prior", "other"}  it names another choice; `as_prior`: the prediction says the same

        and has wrong_as_prior, an Estimate: as_prior / all wrong answers. With two choices, every wrong answer under a wrong
        prior is the prior's. Then only the split of the wrong answers between the two rows says something.
    """
    known = np.array([p.id in priors for p in j.predictions])
    if not known.any():
        return None
    prior_right, same = np.zeros_like(known), np.zeros_like(known)
    for i in np.flatnonzero(known):
        p = j.predictions[i]
        prior_right[i] = _is_answer(priors[p.id], p)
        same[i] = _says(p, priors[p.id])
    wrong = known & ~j.right
    as_prior = wrong & ~prior_right & same

    def table(where: np.ndarray) -> dict[str, Any]:
        def count(mask: np.ndarray) -> int:
            return int((mask & where).sum())

        return {
            "prior_right": {"right": count(known & prior_right & j.right), "wrong": count(wrong & prior_right)},
            "prior_wrong": {
                "right": count(known & ~prior_right & j.right),
                "as_prior": count(as_prior),
                "other": count(wrong & ~prior_right & ~same),
            },
            "wrong_as_prior": j.boot.ratio(as_prior & where, wrong & where).estimate(),
        }

    tasks = {task: j.of("task", task) for task in sorted({p.task for p in j.predictions})}
    return {
        "all": table(known),
        "by_task": {task: table(mask) for task, mask in tasks.items() if (mask & known).any()},
    }


def compare(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    *,
    scorer: str | Scorer = "lenient",
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every figure of `first` minus that of `second`, on the questions they share, by a paired bootstrap over clips.

    Args:
        first, second: predictions of two systems; those of controls are left out.

    Returns:
        count, only_first, only_second (questions); accuracy, strict_accuracy, mean_of_tasks, by_kind[kind], by_task[task],
        and the four Shifts: Estimates of the difference. An interval without 0 is a difference at the 5% level, for one
        figure alone.

    Raises:
        ValueError: no question in common, or the true answer to one differs: then they are of different manifests.
    """
    asked = {p.id: p for p in first if not p.control}
    others = {p.id: p for p in second if not p.control}
    shared = [name for name in asked if name in others]
    if not shared:
        raise ValueError(f"no question in common: {len(asked)} in the first file, {len(others)} in the second")
    for name in shared:
        if asked[name].answer != others[name].answer:
            raise ValueError(
                f"question {name!r}: expected the same answer in both files, got {asked[name].answer!r} and "
                f"{others[name].answer!r}; they are of different manifests"
            )
    options: dict[str, Any] = {"scorer": scorer, "bootstrap_samples": bootstrap_samples, "seed": seed}
    a = judged([asked[name] for name in shared], **options)
    b = judged([others[name] for name in shared], **options)
    # Both use the same draws, and the same tasks and clips of the questions.
    b = Judged(a.predictions, b.right, b.lenient, b.strict, b.scorer, a.boot)
    tasks = {task: a.of("task", task) for task in sorted({p.task for p in a.predictions})}
    audio = {p.task for p in a.predictions if p.category == AUDIO_CATEGORY}
    in_all = [mask for task, mask in tasks.items() if task not in audio]
    kinds = {kind: a.of("kind", kind) for kind in KINDS if any(p.kind == kind for p in a.predictions)}
    masks = shift_masks(a.predictions, a.right), shift_masks(a.predictions, b.right)
    return {
        "count": len(shared),
        "only_first": len(asked) - len(shared),
        "only_second": len(others) - len(shared),
        "accuracy": (a.accuracy() - b.accuracy()).estimate(),
        "strict_accuracy": (a.accuracy(verdicts=a.strict) - b.accuracy(verdicts=b.strict)).estimate(),
        "mean_of_tasks": (a.mean_of_tasks(in_all) - b.mean_of_tasks(in_all)).estimate(),
        "by_kind": {kind: (a.accuracy(mask) - b.accuracy(mask)).estimate() for kind, mask in kinds.items()},
        "by_task": {task: (a.accuracy(mask) - b.accuracy(mask)).estimate() for task, mask in tasks.items()},
        **{name: (a.boot.ratio(*masks[0][name]) - a.boot.ratio(*masks[1][name])).estimate() for name in masks[0]},
    }


def control_priors(predictions: Sequence[Prediction], control: str = "no_audio") -> dict[str, str]:
    """id of the plain question -> answer under a control. Questions whose answer there names no single choice are left out."""
    end = f"#{control}"
    said = {p.id.removesuffix(end): p.said() for p in predictions if p.control == control}
    return {name: answer for name, answer in said.items() if answer is not None}


def hint_priors(predictions: Sequence[Prediction]) -> dict[str, str]:
    """id -> the choice that the text beside the sound claims; only of questions with such a claim."""
    return {p.id: p.claim for p in predictions if p.claim is not None}


def _is_answer(prior: str, p: Prediction) -> bool:
    return same_choice(prior, p.answer, p.choices) if p.choices else lenient_match(prior, p.answer)


def _says(p: Prediction, prior: str) -> bool:
    said = p.said()
    if said is None:
        return False
    return same_choice(said, prior, p.choices) if p.choices else lenient_match(said, prior)
