"""Scores of saved predictions: accuracy, Shift by both definitions, and how sure one can be of them.

Everything here is arithmetic on records that evaluate.py wrote; a saved file can be scored again at any time.

An answer is right when the label's words stand consecutively in the prediction, both normalised as Whisper's basic normaliser
does (lenient, Dynamic-SUPERB's rule). That rule lets a prediction pass which names every option; so strict accuracy stands
beside it: the answer's words are there and no other choice's are. Other rules can be plugged in (`Scorer`).

Two averages (Dynamic-SUPERB's tables): mean_of_tasks is the mean over TASKS of their accuracies, each task with the same weight
however many items it has, the tasks of category "audio" left out: the tables' ALL. A category is the mean of its own tasks, not
of its items. mean_of_items is over the same tasks' items, each item with the same weight.

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

from models.bootstrap import Bootstrap, Estimate, Statistic, mean_of

if TYPE_CHECKING:
    from models.data.manifest import Example
    from models.scorers import Scorer

KINDS = ("neutral", "aligned", "conflict", "irrelevant")
AUDIO_CATEGORY = "audio"  # sounds that are no speech: shown, but no part of ALL
_MAX_CLASSES = 20  # a task with more labels has free answers: a table by label would be as long as the data


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
    category: str = ""  # of the task: content, semantic, paralinguistic, degradation, speaker, audio
    clip: str = ""  # what was heard (models.features.clip_key): intervals resample it whole
    claim: str | None = None  # the choice that the text beside the sound names, if it names one
    question: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))

    def to_row(self) -> dict[str, Any]:
        """The JSON object of this prediction."""
        return asdict(self) | {"choices": list(self.choices)}

    def said(self) -> str | None:
        """The choice that was given as the answer: the likeliest, else the only one named; without choices the text."""
        if self.scores:
            return max(self.scores, key=self.scores.__getitem__)
        if not self.choices:
            return self.prediction if normalize(self.prediction) else None
        named = named_choices(self.prediction, self.choices)
        return named[0] if len(named) == 1 else None


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


def claimed_choice(example: Example) -> str | None:
    """The one choice that the text beside the sound claims, rightly or wrongly; None where it claims none, or several.

    What the words say of themselves (metadata "claimed_by_words") comes first. In a neutral context there is no other claim;
    else it is the choice that the context names, or the transcript where there is no context.
    """
    if said := example.metadata.get("claimed_by_words"):
        return str(said)
    if example.kind == "neutral":
        return None
    named = named_choices(example.context or example.transcription, example.choices)
    return named[0] if len(named) == 1 else None


@dataclass(frozen=True)
class Judged:
    """Predictions with their verdicts, and the draws that every interval is taken from; made by `judged`.

    Args:
        predictions: n of one system under one control.
        right: (n,) bool by the chosen scorer; `lenient` and `strict` are there beside it.
        scorer: its name.
        boot: draws of whole clips.
    """

    predictions: Sequence[Prediction]
    right: np.ndarray
    lenient: np.ndarray
    strict: np.ndarray
    scorer: str
    boot: Bootstrap

    def of(self, attribute: str, value: Any) -> np.ndarray:
        """(n,) bool: where a prediction's attribute has a value."""
        return np.array([getattr(p, attribute) == value for p in self.predictions])

    def accuracy(self, where: np.ndarray | None = None, verdicts: np.ndarray | None = None) -> Statistic:
        """Share of right answers among those in `where` (all)."""
        verdicts = self.right if verdicts is None else verdicts
        where = np.ones(len(verdicts), dtype=bool) if where is None else where
        return self.boot.ratio(verdicts & where, where)

    def mean_of_tasks(
        self, tasks: Iterable[np.ndarray], where: np.ndarray | None = None, verdicts: np.ndarray | None = None
    ) -> Statistic:
        """Mean over tasks, given as masks (n,), of the accuracy among those in `where` (all)."""
        return mean_of([self.accuracy(task if where is None else task & where, verdicts) for task in tasks])


def judged(
    predictions: Sequence[Prediction],
    *,
    scorer: str | Scorer = "lenient",
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> Judged:
    """Judge predictions once, for all the statistics that follow.

    Args:
        predictions: of one system under one control; every id once.
        scorer: "lenient", "strict" or an object (models/scorers.py).
        bootstrap_samples: resamples of a 95% interval. Whole clips are resampled with all their questions and contexts, since
            these are not independent.

    Raises:
        ValueError: no prediction, an id twice, or an unknown `scorer`.
    """
    if not predictions:
        raise ValueError("predictions: expected at least one, got none")
    seen: set[str] = set()
    for p in predictions:
        if p.id in seen:
            raise ValueError(f"predictions: id {p.id!r} twice")
        seen.add(p.id)
    lenient, strict = judge(predictions), judge(predictions, scorer="strict")
    own = scorer not in ("lenient", "strict")
    right = judge(predictions, scorer=scorer) if own else (lenient if scorer == "lenient" else strict)
    boot = Bootstrap([_clip(p) for p in predictions], bootstrap_samples, seed)
    return Judged(predictions, right, lenient, strict, scorer if isinstance(scorer, str) else scorer.name, boot)


def score(
    predictions: Sequence[Prediction],
    *,
    bootstrap_samples: int = 1000,
    seed: int = 0,
    scorer: str | Scorer = "lenient",
) -> dict[str, Any]:
    """`metrics` of the predictions of one system under one control; the arguments are those of `judged`."""
    return metrics(judged(predictions, scorer=scorer, bootstrap_samples=bootstrap_samples, seed=seed))


def metrics(j: Judged) -> dict[str, Any]:
    """All accuracies and both Shifts; see the module's docstring.

    Returns:
        count, scorer; accuracy (by the scorer), lenient_accuracy, strict_accuracy: over all items;
        mean_of_tasks, mean_of_items, strict_mean_of_tasks, mean_of_tasks_by_kind[kind]: without category "audio";
        by_kind[kind]; by_task[task]: category, all, strict, by_kind, and the task's own shift;
        by_category[category]: tasks (how many), mean_of_tasks, mean_of_items, by_kind[kind] (means of tasks);
        by_class[task][label][kind], for tasks of at most 20 labels; tir_adv, tir_adversarial_all, tir_faithful_all,
        tir_irrelevant_all. All of them Estimates but the count, the scorer's and the category's names.
    """
    of_task = {task: j.of("task", task) for task in sorted({p.task for p in j.predictions})}
    of_kind = {kind: j.of("kind", kind) for kind in KINDS if any(p.kind == kind for p in j.predictions)}
    category = {p.task: p.category for p in j.predictions}
    in_all = [mask for task, mask in of_task.items() if category[task] != AUDIO_CATEGORY]
    any_in_all = np.logical_or.reduce(in_all) if in_all else np.zeros(len(j.predictions), dtype=bool)
    masks = shift_masks(j.predictions, j.right)

    by_task = {
        task: {
            "category": category[task],
            "all": j.accuracy(mask).estimate(),
            "strict": j.accuracy(mask, j.strict).estimate(),
            "by_kind": {kind: j.accuracy(mask & k).estimate() for kind, k in of_kind.items()},
            "shift": {name: j.boot.ratio(top & mask, bottom & mask).estimate() for name, (top, bottom) in masks.items()},
        }
        for task, mask in of_task.items()
    }
    by_category = {}
    for name in dict.fromkeys(sorted(category.values())):
        tasks = [mask for task, mask in of_task.items() if category[task] == name]
        by_category[name] = {
            "tasks": len(tasks),
            "mean_of_tasks": j.mean_of_tasks(tasks).estimate(),
            "mean_of_items": j.accuracy(np.logical_or.reduce(tasks)).estimate(),
            "by_kind": {kind: j.mean_of_tasks(tasks, k).estimate() for kind, k in of_kind.items()},
        }
    by_class: dict[str, dict[str, dict[str, Estimate]]] = {}
    for task, mask in of_task.items():
        labels = sorted({p.answer for p in j.predictions if p.task == task})
        if len(labels) <= _MAX_CLASSES:
            by_class[task] = {
                label: {kind: j.accuracy(mask & k & j.of("answer", label)).estimate() for kind, k in of_kind.items()}
                for label in labels
            }
    return {
        "count": len(j.predictions),
        "scorer": j.scorer,
        "accuracy": j.accuracy().estimate(),
        "lenient_accuracy": j.accuracy(verdicts=j.lenient).estimate(),
        "strict_accuracy": j.accuracy(verdicts=j.strict).estimate(),
        "mean_of_tasks": j.mean_of_tasks(in_all).estimate(),
        "mean_of_items": j.accuracy(any_in_all).estimate(),
        "strict_mean_of_tasks": j.mean_of_tasks(in_all, verdicts=j.strict).estimate(),
        "mean_of_tasks_by_kind": {kind: j.mean_of_tasks(in_all, k).estimate() for kind, k in of_kind.items()},
        "by_kind": {kind: j.accuracy(k).estimate() for kind, k in of_kind.items()},
        "by_task": by_task,
        "by_category": by_category,
        "by_class": by_class,
        **{name: j.boot.ratio(top, bottom).estimate() for name, (top, bottom) in masks.items()},
    }


def shift_masks(predictions: Sequence[Prediction], right: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both Shift definitions over the pairs (see the module's docstring): name -> numerator, denominator, each (n,) bool.

    A pair is a `pair_id`; where it holds several items of one kind, the first counts. N of the `_all` forms is the number
    of pairs that have both contexts. A pair is noted at its neutral item, so that a resampled pair counts once.
    """
    pairs: dict[str, dict[str, int]] = defaultdict(dict)
    for i, p in enumerate(predictions):
        if p.pair_id is not None:
            pairs[p.pair_id].setdefault(p.kind, i)
    n = len(predictions)
    both_adv, neutral_right, fell = (np.zeros(n, dtype=bool) for _ in range(3))
    both_faithful, rose, both_irrelevant, moved = (np.zeros(n, dtype=bool) for _ in range(4))
    for kinds in pairs.values():
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
        "tir_adv": (fell, neutral_right),
        "tir_adversarial_all": (fell, both_adv),
        "tir_faithful_all": (rose, both_faithful),
        "tir_irrelevant_all": (moved, both_irrelevant),
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
    shared = [p for p in first if p.id in others and (kind is None or p.kind == kind)]
    if not shared:
        raise ValueError(f"first, second: no id in common (kind {kind})")
    difference = judge(shared).astype(np.float64) - judge([others[p.id] for p in shared])
    boot = Bootstrap([_clip(p) for p in shared], bootstrap_samples, seed)
    return boot.ratio(difference, np.ones(len(shared))).estimate()


def judge(predictions: Iterable[Prediction], *, scorer: str | Scorer = "lenient") -> np.ndarray:
    """(n,) bool: which predictions are right, by a rule's name or by an object (models/scorers.py).

    Raises:
        ValueError: the name is unknown, or the scorer's verdicts are not one bool a prediction.
    """
    predictions = list(predictions)
    if scorer == "lenient":
        return np.array([lenient_match(p.prediction, p.answer) for p in predictions], dtype=bool)
    if scorer == "strict":
        return np.array([strict_match(p.prediction, p.answer, p.choices) for p in predictions], dtype=bool)
    if isinstance(scorer, str):
        raise ValueError(f"scorer: expected 'lenient', 'strict' or a scorer, got {scorer!r}")
    verdicts = list(scorer.judge(predictions))
    if len(verdicts) != len(predictions):
        raise ValueError(f"scorer {scorer.name}: expected {len(predictions)} verdicts, got {len(verdicts)}")
    for p, verdict in zip(predictions, verdicts, strict=True):
        if not isinstance(verdict, (bool, np.bool_)):
            raise ValueError(f"scorer {scorer.name}: expected True or False for {p.id!r}, got {verdict!r}")
    return np.array(verdicts, dtype=bool)


def _clip(p: Prediction) -> str:
    """What is resampled whole. Files of earlier versions name no clip; their pairs are of one clip."""
    return p.clip or p.pair_id or p.id


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
