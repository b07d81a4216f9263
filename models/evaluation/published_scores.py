"""The metrics of MMAU, MMAR and LISTEN, by the rules of their published scripts.

MMAU and MMAR (string_match of evaluation.py in both repositories): the words of an answer must hold all words of the right
choice, and no word that stands in another choice only. Words are runs of letters, digits and underscores, in lower case.
Their order and number do not count. A choice with the same set of words as the right one is no other choice. So a question
that repeats a choice loses nothing.

LISTEN (scripts/evaluation_utils.py): the first letter of an answer that is one of the question's letters is what it says.
Weighted accuracy, unweighted average recall and F1 are over the answers that name a letter; those that name none are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from models.evaluation.predictions import Prediction

_WORD = re.compile(r"\b\w+\b")
# LISTEN's names for one emotion.
_SAME_EMOTION = {"angry": "anger", "happy": "happiness", "sad": "sadness", "pleasant_surprise": "surprise"}


def mmau_match(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """Whether an answer in words is right by the rule of MMAU and MMAR."""
    said, right = _words(prediction), _words(answer)
    others = [words for choice in choices if (words := _words(choice)) != right]
    wrong = set().union(*others) - right
    return bool(said) and right <= said and not said & wrong


def listen_choice(prediction: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names by its letter; None if it names none."""
    letters = {chr(ord("A") + number): choice for number, choice in enumerate(choices)}
    return next((letters[c] for c in prediction.upper() if c in letters), None)


def _right_by_mmau(p: Prediction) -> bool:
    said = (p.said() or "") if p.scores else p.prediction  # of ranked choices the likeliest is the answer
    return mmau_match(said, p.answer, p.choices)


def _listen_said(p: Prediction) -> str | None:
    return p.said() if p.scores else listen_choice(p.prediction, p.choices)


# Rules by name, beside "lenient" and "strict".
RULES: dict[str, Callable[[Prediction], bool]] = {
    "mmau": _right_by_mmau,
    "listen": lambda p: _listen_said(p) == p.answer,
}
OF_BENCHMARK = {"mmau": "mmau", "mmar": "mmau", "listen": "listen"}


def listen_metrics(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """LISTEN's figures of one experiment.

    Returns:
        weighted_accuracy, uar (mean recall of the labels that occur), macro_f1 (mean over the labels of answers and truth),
        micro_f1, chance_accuracy, chance_macro_f1 and chance_micro_f1 (of guesses with the same shares of labels), answered and
        count. The figures are 0 where no answer names a letter.
    """
    pairs = [(_emotion(p.answer), _emotion(said)) for p in predictions if (said := _listen_said(p)) is not None]
    shares = {"answered": len(pairs), "count": len(predictions)}
    labels = sorted({label for pair in pairs for label in pair})
    table = np.zeros((len(labels), len(labels)))  # truth by answer, as shares
    for (truth, said), count in Counter(pairs).items():
        table[labels.index(truth), labels.index(said)] = count / len(pairs)
    chance = np.outer(table.sum(1), table.sum(0))
    recall = np.divide(table.diagonal(), table.sum(1), out=np.zeros(len(labels)), where=table.sum(1) > 0)
    occurs = table.sum(1) > 0
    return {
        "weighted_accuracy": float(table.trace()),
        "uar": float(recall[occurs].mean()) if occurs.any() else 0.0,
        "macro_f1": _macro_f1(table),
        "micro_f1": float(table.trace()),  # every question has one label and one answer
        "chance_accuracy": float(chance.trace()),
        "chance_macro_f1": _macro_f1(chance),
        "chance_micro_f1": float(chance.trace()),
        **shares,
    }


def _macro_f1(table: np.ndarray) -> float:
    """Mean over labels of 2 TP / (truth + answers)."""
    sums = table.sum(0) + table.sum(1)
    f1 = np.divide(2 * table.diagonal(), sums, out=np.zeros(len(sums)), where=sums > 0)
    return float(f1.mean()) if len(f1) else 0.0


def _emotion(label: str) -> str:
    label = label.strip().lower()
    return _SAME_EMOTION.get(label, label)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
