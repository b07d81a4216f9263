"""Scores of saved predictions: accuracy, Shift by both definitions, and how sure one can be of them.

Everything here is arithmetic on records that evaluate.py wrote; a saved file can be scored again at any time.

An answer is right when the label's words stand consecutively in the prediction, both normalised as Whisper's basic normaliser
does (lenient, Dynamic-SUPERB's rule). That rule lets a prediction pass which names every option; so strict accuracy stands
beside it: the answer's words are there and no other choice's are.

Shift, the influence of a text that contradicts the sound, is in use under two definitions (MCR-BENCH), both reported:

    tir_adv              #(right under neutral and wrong under conflict) / #(right under neutral)
    tir_adversarial_all  #(right under neutral and wrong under conflict) / N
    tir_faithful_all     #(wrong under neutral and right under aligned) / N
    tir_irrelevant_all   #(right under one of neutral and irrelevant, wrong under the other) / N

where a manifest tells irrelevant contexts from none (metadata "context_type", see models/data/readers.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from models.data.manifest import Example

KINDS = ("neutral", "aligned", "conflict", "irrelevant")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer of one system, with what is needed to score it."""

    id: str
    task: str
    kind: str  # one of KINDS
    answer: str
    prediction: str
    choices: tuple[str, ...] = ()
    pair_id: str | None = None
    control: str = ""  # "" | no_audio | swapped_audio
    scores: dict[str, float] = field(default_factory=dict)  # log-likelihood of each choice, where it was computed

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))

    def to_row(self) -> dict[str, Any]:
        """The JSON object of this prediction."""
        return asdict(self) | {"choices": list(self.choices)}


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% bootstrap interval and the number of items it stands on; value None where there are none."""

    value: float | None
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def normalize(text: str) -> str:
    """Whisper's basic normalisation: lower case, no brackets' content, no symbols or punctuation, single spaces."""
    return _normalizer()(text).strip()


def lenient_match(prediction: str, label: str) -> bool:
    """The label's words stand consecutively in the prediction ("a woman." matches "woman"; "woman" does not match "man")."""
    return _contains(normalize(prediction).split(), normalize(label).split())


def strict_match(prediction: str, label: str, choices: Sequence[str] = ()) -> bool:
    """`lenient_match`, and no other choice is named (`named_choices`). Without choices the prediction has to be the label."""
    if not choices:
        return normalize(prediction) == normalize(label)
    return {normalize(c) for c in named_choices(prediction, (label, *choices))} == {normalize(label)}


def named_choices(text: str, choices: Sequence[str], *, normalizer: Callable[[str], str] = normalize) -> list[str]:
    """The choices whose words stand in `text`, in the order of `choices`.

    Where one choice's words are part of another's ("fast" in "very fast") the longer one counts: its words are taken out
    before the shorter one is looked for.
    """
    words = normalizer(text).split()
    parts = {choice: normalizer(choice).split() for choice in choices}
    found = set()
    for choice in sorted(parts, key=lambda choice: -len(parts[choice])):
        if _contains(words, parts[choice]):
            found.add(choice)
            words = _without(words, parts[choice])
    return [choice for choice in parts if choice in found]


def context_kind(example: Example) -> str:
    """Under which of KINDS an example is scored: an irrelevant context is of kind neutral, but not the one to compare with."""
    return "irrelevant" if example.metadata.get("context_type") == "irrelevant" else example.kind


def score(
    predictions: Sequence[Prediction], *, bootstrap_samples: int = 1000, seed: int = 0, match: str = "lenient"
) -> dict[str, Any]:
    """All numbers of one system under one control.

    Args:
        predictions: of one system; every id once.
        bootstrap_samples: resamples of a 95% interval. Whole pairs are resampled (the clip with all its contexts), since
            the contexts of one clip are not independent.
        match: "lenient" or "strict"; accuracy and Shift use it. Both accuracies are in the result anyway.

    Returns:
        accuracy, strict_accuracy, by_kind[kind], by_task[task] (each with by_kind), by_class[task][label][kind] -> Estimate;
        tir_adv, tir_adversarial_all, tir_faithful_all, tir_irrelevant_all -> Estimate; mean_of_tasks -> float
        (Dynamic-SUPERB's ALL).

    Raises:
        ValueError: no prediction, an id twice, or an unknown `match`.
    """
    if not predictions:
        raise ValueError("predictions: expected at least one, got none")
    seen: set[str] = set()
    for p in predictions:
        if p.id in seen:
            raise ValueError(f"predictions: id {p.id!r} twice")
        seen.add(p.id)
    right = judge(predictions, match=match)
    strict = judge(predictions, match="strict")
    groups = [p.pair_id or p.id for p in predictions]
    boot = _Bootstrap(groups, bootstrap_samples, seed)

    def accuracy(keep: Callable[[Prediction], bool], verdict: np.ndarray = right) -> Estimate:
        mask = np.array([keep(p) for p in predictions])
        return boot.ratio(verdict & mask, mask)

    tasks = sorted({p.task for p in predictions})
    kinds = [k for k in KINDS if any(p.kind == k for p in predictions)]
    by_task = {
        task: {
            "all": accuracy(lambda p, t=task: p.task == t),
            "by_kind": {k: accuracy(lambda p, t=task, k=k: p.task == t and p.kind == k) for k in kinds},
        }
        for task in tasks
    }
    by_class: dict[str, dict[str, dict[str, Estimate]]] = defaultdict(dict)
    for task, label in sorted({(p.task, p.answer) for p in predictions}):
        by_class[task][label] = {
            k: accuracy(lambda p, t=task, a=label, k=k: p.task == t and p.answer == a and p.kind == k) for k in kinds
        }
    return {
        "count": len(predictions),
        "accuracy": accuracy(lambda p: True),
        "strict_accuracy": accuracy(lambda p: True, strict),
        "mean_of_tasks": float(np.mean([by_task[t]["all"].value for t in tasks])),
        "by_kind": {k: accuracy(lambda p, k=k: p.kind == k) for k in kinds},
        "by_task": by_task,
        "by_class": dict(by_class),
        **shift(predictions, right, boot),
    }


def shift(predictions: Sequence[Prediction], right: np.ndarray, boot: _Bootstrap) -> dict[str, Estimate]:
    """Both Shift definitions over the pairs (see the module's docstring).

    A pair is a `pair_id`; where it holds several items of one kind, the first counts. N of the `_all` forms is the number
    of pairs that have both contexts.
    """
    pairs: dict[str, dict[str, int]] = defaultdict(dict)
    for i, p in enumerate(predictions):
        if p.pair_id is not None:
            pairs[p.pair_id].setdefault(p.kind, i)
    n = len(predictions)
    both_adv, neutral_right, fell = (np.zeros(n, dtype=bool) for _ in range(3))
    both_faithful, rose, both_irrelevant, moved = (np.zeros(n, dtype=bool) for _ in range(4))
    for kinds in pairs.values():  # each pair is noted at its neutral item, so that a resampled pair counts once
        at = kinds.get("neutral")
        if at is None:
            continue
        if "conflict" in kinds:
            both_adv[at] = True
            neutral_right[at] = right[at]
            fell[at] = right[at] and not right[kinds["conflict"]]
        if "aligned" in kinds:
            both_faithful[at] = True
            rose[at] = not right[at] and right[kinds["aligned"]]
        if "irrelevant" in kinds:
            both_irrelevant[at] = True
            moved[at] = right[at] != right[kinds["irrelevant"]]
    return {
        "tir_adv": boot.ratio(fell, neutral_right),
        "tir_adversarial_all": boot.ratio(fell, both_adv),
        "tir_faithful_all": boot.ratio(rose, both_faithful),
        "tir_irrelevant_all": boot.ratio(moved, both_irrelevant),
    }


def paired_difference(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    *,
    kind: str | None = None,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Accuracy of `first` minus that of `second` on the ids they share, with a paired bootstrap over clips.

    Args:
        kind: only items of this kind; None = all.

    Raises:
        ValueError: the two have no such id in common.
    """
    others = {p.id: p for p in second}
    shared = [(p, others[p.id]) for p in first if p.id in others and (kind is None or p.kind == kind)]
    if not shared:
        raise ValueError(f"first, second: no id in common (kind {kind})")
    right_first = judge([a for a, _ in shared]).astype(np.float64)
    right_second = judge([b for _, b in shared]).astype(np.float64)
    boot = _Bootstrap([a.pair_id or a.id for a, _ in shared], bootstrap_samples, seed)
    return boot.ratio(right_first - right_second, np.ones(len(shared)))


def judge(predictions: Iterable[Prediction], *, match: str = "lenient") -> np.ndarray:
    """(n,) bool: which predictions are right by the named rule."""
    if match == "lenient":
        return np.array([lenient_match(p.prediction, p.answer) for p in predictions], dtype=bool)
    if match == "strict":
        return np.array([strict_match(p.prediction, p.answer, p.choices) for p in predictions], dtype=bool)
    raise ValueError(f"match: expected 'lenient' or 'strict', got {match!r}")


class _Bootstrap:
    """95% percentile intervals by resampling groups of items."""

    def __init__(self, groups: Sequence[str], samples: int, seed: int) -> None:
        names = {g: i for i, g in enumerate(dict.fromkeys(groups))}
        self._group = np.array([names[g] for g in groups])
        self._count = len(names)
        # Multinomial counts are resampling with replacement, as one matrix: (samples, groups).
        draws = np.random.default_rng(seed).multinomial(self._count, np.full(self._count, 1 / self._count), size=samples)
        self._draws = draws.astype(np.float64)

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
        """sum(numerator) / sum(denominator) with its interval; resamples with an empty denominator are left out."""
        top = np.bincount(self._group, weights=numerator, minlength=self._count)
        bottom = np.bincount(self._group, weights=denominator, minlength=self._count)
        count = round(float(bottom.sum()))
        if count == 0:
            return Estimate(None, None, None, 0)
        tops, bottoms = self._draws @ top, self._draws @ bottom
        some = bottoms > 0
        low, high = np.quantile(tops[some] / bottoms[some], [0.025, 0.975]) if some.any() else (np.nan, np.nan)
        return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), count)


@lru_cache(maxsize=1)
def _normalizer() -> Callable[[str], str]:
    # Imported at first use: transformers costs seconds, and reading saved scores needs none of it.
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


def _find(words: Sequence[str], part: Sequence[str]) -> int:
    if not part:
        return -1
    return next((i for i in range(len(words) - len(part) + 1) if list(words[i : i + len(part)]) == list(part)), -1)


def _contains(words: Sequence[str], part: Sequence[str]) -> bool:
    return _find(words, part) >= 0


def _without(words: Sequence[str], part: Sequence[str]) -> list[str]:
    # A separator stays where words were taken out: the neighbours must not become a phrase that nobody wrote.
    rest = list(words)
    while (at := _find(rest, part)) >= 0:
        rest[at : at + len(part)] = ["\0"]
    return rest
