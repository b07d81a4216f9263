"""Scores of saved predictions: accuracy and Shift by both definitions, with their intervals.

Everything here is arithmetic on records that evaluate.py wrote. A saved file can be scored again at any time.

An answer is right if the label's words stand side by side in the prediction (lenient, Dynamic-SUPERB's rule).
models/data/answers.py says which words count. By that rule a prediction that names every choice is right. So strict accuracy is
reported too: the answer's words are there, and no other choice's words. `Scorer` is the way to use other rules.

There are two averages, as in Dynamic-SUPERB's tables. mean_of_tasks, the tables' ALL, is the mean over TASKS of their accuracies.
Each task has the same weight however many items it has, and the tasks of category "audio" are left out. A category is the mean
of its tasks, not of its items. mean_of_items is over the same tasks' items, each item with the same weight.

Shift is the influence of a text that contradicts the sound. MCR-BENCH uses two definitions; both are reported:

    tir_adv              #(right under neutral and wrong under conflict) / #(right under neutral)
    tir_adversarial_all  #(right under neutral and wrong under conflict) / N
    tir_faithful_all     #(wrong under neutral and right under aligned) / N
    tir_irrelevant_all   #(right under one of neutral and irrelevant, wrong under the other) / N

The last one needs a manifest that marks irrelevant contexts (metadata "context_type", see models/data/readers.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from models.data.answers import lenient_match, strict_match
from models.evaluation.bootstrap import Bootstrap, Estimate, Statistic, mean_of
from models.evaluation.predictions import KINDS, Prediction
from models.evaluation.published_scores import RULES, listen_metrics

if TYPE_CHECKING:
    from models.evaluation.scorers import Scorer

AUDIO_CATEGORY = "audio"  # sounds other than speech: shown, but not part of ALL
_MAX_CLASSES = 20  # a task with more labels has free answers; its table by label would be as long as the data


@dataclass(frozen=True)
class Judged:
    """Predictions with their verdicts, and the draws of every interval; `judged` makes it.

    Args:
        predictions: n of one system under one control.
        right: (n,) bool by the chosen scorer; `lenient` and `strict` are the verdicts of the built-in rules.
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
        """(n,) bool: which predictions have this value of an attribute."""
        return np.array([getattr(p, attribute) == value for p in self.predictions])

    def accuracy(self, where: np.ndarray | None = None, verdicts: np.ndarray | None = None) -> Statistic:
        """Share of right answers among those in `where` (None: all)."""
        verdicts = self.right if verdicts is None else verdicts
        where = np.ones(len(verdicts), dtype=bool) if where is None else where
        return self.boot.ratio(verdicts & where, where)

    def mean_of_tasks(
        self, tasks: Iterable[np.ndarray], where: np.ndarray | None = None, verdicts: np.ndarray | None = None
    ) -> Statistic:
        """Mean over tasks, given as masks (n,), of the accuracy among those in `where` (None: all)."""
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
        scorer: one of BUILT_IN of models/evaluation/scorers.py, or an object.
        bootstrap_samples: resamples of a 95% interval. Whole clips are resampled with all their questions and contexts,
            because these are not independent.

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
        A dictionary. All figures are Estimates, except the count and the names of scorer and category.

        - count, scorer
        - over all items: accuracy (by the scorer), lenient_accuracy, strict_accuracy, by_kind[kind]
        - without category "audio": mean_of_tasks, mean_of_items, strict_mean_of_tasks, mean_of_tasks_by_kind[kind]
        - by_task[task]: category, all, strict, by_kind, and the task's own shift
        - by_category[category]: tasks (how many), mean_of_tasks, mean_of_items, by_kind[kind] (means of tasks)
        - by_class[task][label][kind], for tasks of at most 20 labels
        - by_group[kind of group][group], of a benchmark whose metric shows groups
        - listen[task], with scorer "listen": `listen_metrics`
        - tir_adv, tir_adversarial_all, tir_faithful_all, tir_irrelevant_all
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
        "by_group": {
            kind: {group: j.accuracy(mask).estimate() for group, mask in masks_of.items()}
            for kind, masks_of in _groups(j.predictions).items()
        },
        **({"listen": _by_task(j.predictions)} if j.scorer == "listen" else {}),
        **{name: j.boot.ratio(top, bottom).estimate() for name, (top, bottom) in masks.items()},
    }


def _groups(predictions: Sequence[Prediction]) -> dict[str, dict[str, np.ndarray]]:
    """Kind of group -> group -> its mask (n,)."""
    kinds = sorted({kind for p in predictions for kind in p.groups})
    return {
        kind: {
            group: np.array([p.groups.get(kind) == group for p in predictions])
            for group in sorted({p.groups[kind] for p in predictions if kind in p.groups})
        }
        for kind in kinds
    }


def _by_task(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    tasks = sorted({p.task for p in predictions})
    return {task: listen_metrics([p for p in predictions if p.task == task]) for task in tasks}


def shift_masks(predictions: Sequence[Prediction], right: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both Shift definitions over the pairs (see the module's docstring): name -> numerator, denominator, each (n,) bool.

    A pair is all items of one `pair_id`; of several items of one kind the first counts. N of the `_all` forms is the number
    of pairs that have both contexts. The masks are True at a pair's neutral item, so that a resampled pair counts once.
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
    """(n,) bool: which predictions are right, by the rule of that name or by an object (models/evaluation/scorers.py).

    Raises:
        ValueError: the name is unknown, the scorer does not give one bool for each prediction, or a prediction cannot be judged:
            its choices cannot be told apart. The message names the prediction.
        EvaluationError: the likelihoods of a prediction's choices are no numbers.
    """
    predictions = list(predictions)
    rule = _rule(scorer) if isinstance(scorer, str) else None
    if rule is not None:
        return np.fromiter((_verdict(rule, p) for p in predictions), dtype=bool, count=len(predictions))
    if isinstance(scorer, str):
        raise ValueError(f"scorer: expected 'lenient', 'strict', {', '.join(map(repr, RULES))} or a scorer, got {scorer!r}")
    verdicts = list(scorer.judge(predictions))
    if len(verdicts) != len(predictions):
        raise ValueError(f"scorer {scorer.name}: expected {len(predictions)} verdicts, got {len(verdicts)}")
    for p, verdict in zip(predictions, verdicts, strict=True):
        if not isinstance(verdict, (bool, np.bool_)):
            raise ValueError(f"scorer {scorer.name}: expected True or False for {p.id!r}, got {verdict!r}")
    return np.array(verdicts, dtype=bool)


def _rule(scorer: str) -> Callable[[Prediction], bool] | None:
    """A built-in rule by its name; None for another name."""
    match = {"lenient": lenient_match, "strict": strict_match}.get(scorer)
    if match is None:
        return RULES.get(scorer)
    # If the choices were ranked, the likeliest one is the answer, whatever its sentence says.
    return lambda p: p.said() == p.answer if p.scores else match(p.prediction, p.answer, p.choices)


def _verdict(rule: Callable[[Prediction], bool], p: Prediction) -> bool:
    try:
        return rule(p)
    except ValueError as error:
        raise ValueError(f"prediction {p.id!r}: {error}") from error


def _clip(p: Prediction) -> str:
    """The name of what is resampled as a whole. Files of earlier versions name no clip, but a pair has one clip."""
    return p.clip or p.pair_id or p.id
