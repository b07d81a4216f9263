"""Every figure of a set of predictions in one dictionary: those of scoring.py and diagnostics.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from models.evaluation.diagnostics import calibration, control_priors, hint_priors, prior_confusion
from models.evaluation.predictions import Prediction
from models.evaluation.scorers import Scorer
from models.evaluation.scoring import judged, metrics


def summarize(
    predictions: Sequence[Prediction], *, scorer: str | Scorer = "lenient", priors: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Every figure of the plain predictions under "plain", and of each control under its name.

    Args:
        scorer: one of BUILT_IN of models/evaluation/scorers.py, or an object.
        priors: id -> answer of a text prior, beside what the predictions themselves hold.

    Returns:
        {control: `scoring.metrics` and "calibration" (None without choice scores)}. "plain" has "confusion" too:
        `diagnostics.prior_confusion` for each of "no_audio", "hint" and "priors" that is known.
    """
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for p in predictions:
        groups[p.control or "plain"].append(p)
    summary = {}
    for name, group in groups.items():
        j = judged(group, scorer=scorer)
        summary[name] = metrics(j) | {"calibration": calibration(j)}
        if name == "plain":
            known = {"no_audio": control_priors(predictions), "hint": hint_priors(group), "priors": priors or {}}
            tables = {source: prior_confusion(j, answers) for source, answers in known.items()}
            summary[name]["confusion"] = {source: table for source, table in tables.items() if table is not None}
    return summary
