"""Who decides whether an answer is right: the two built-in rules, or one of the user's, such as a language model as judge.

    python -m models evaluate --rescore predictions.jsonl --scorer my_judge:judge

A scorer is an object with a name and `judge(predictions) -> one bool a prediction`; a class of such objects that needs no
argument, or the bare function, will do as well. A `Prediction` (models/evaluation/scoring.py) has the question,
choices, answer and
prediction that a judge needs. None is shipped: what a judge says depends on its model and wording, so name both in `name`, and
do not compare its figures with those of the published rule. `judge` is called once for each control with all predictions, so
it can ask in batches, and may keep what it was told before.

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

BUILT_IN = ("lenient", "strict")


@runtime_checkable
class Scorer(Protocol):
    """What `load_scorer` takes and gives."""

    name: str

    def judge(self, predictions: Sequence[Prediction]) -> Sequence[bool]:
        """One verdict a prediction, in order."""
        ...


@dataclass(frozen=True)
class _Function:
    """A bare function as a scorer."""

    name: str
    judge: Callable[[Sequence[Prediction]], Sequence[bool]]


def load_scorer(spec: str) -> str | Scorer:
    """The scorer that `spec` names: one of BUILT_IN (returned as it is), or "module:function" to import.

    The module is looked for where Python does, the current folder included when run by `python -m`.

    Raises:
        ValueError: another form, no such module or name in it, or something that is no scorer.
    """
    if spec in BUILT_IN:
        return spec
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"--scorer: expected one of {', '.join(BUILT_IN)}, or MODULE:FUNCTION, got {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # what a user's module raises at import can be anything
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
