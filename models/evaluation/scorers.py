"""Who decides whether an answer is right: a built-in rule, or your own, such as a language model as judge.

    python -m models evaluate --rescore predictions.jsonl --scorer my_judge:judge

A scorer is an object with a name and `judge(predictions) -> one bool for each prediction`. A class of such objects that needs
no arguments works too, and so does the bare function. A `Prediction` (models/evaluation/predictions.py) has the question,
choices, answer and prediction that a judge needs. The project has no such judge: its verdicts depend on its model and wording.
Name both in `name`, and do not compare its figures with those of the published rule. `judge` is called once for each control
with all predictions, so it can ask in batches and store earlier verdicts.

    # my_judge.py
    def judge(predictions):
        return [ask(p.question, p.answer, p.prediction) for p in predictions]
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    from models.evaluation.predictions import Prediction

BUILT_IN = ("lenient", "strict", "mmau", "listen")  # the last two: models/evaluation/published_scores.py


@runtime_checkable
class Scorer(Protocol):
    """An object that judges answers."""

    name: str

    def judge(self, predictions: Sequence[Prediction]) -> Sequence[bool]:
        """One verdict for each prediction, in the same order."""
        ...


@dataclass(frozen=True)
class _Function:
    """A bare function as a scorer."""

    name: str
    judge: Callable[[Sequence[Prediction]], Sequence[bool]]


def load_scorer(spec: str) -> str | Scorer:
    """The scorer that `spec` names: one of BUILT_IN (the name is returned), or "module:function" to import.

    The module is imported as usual; `python -m` looks in the current folder too.

    Raises:
        ValueError: another form, no such module, no such name in it, or an object that is not a scorer.
    """
    if spec in BUILT_IN:
        return spec
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"--scorer: expected one of {', '.join(BUILT_IN)}, or MODULE:FUNCTION, got {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module can raise anything at import
        raise ValueError(f"--scorer {spec}: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    try:
        found: Any = getattr(module, attribute)
    except AttributeError:
        raise ValueError(f"--scorer {spec}: module {module_name!r} has no {attribute!r}") from None
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise ValueError(f"--scorer {spec}: cannot be made without arguments: {error}") from error
    if isinstance(found, Scorer):
        return found
    if callable(found):
        return _Function(spec, found)
    raise ValueError(
        f"--scorer {spec}: expected a function of predictions, or an object with `name` and `judge`, got {type(found).__name__}"
    )
