"""Figures of scoring.py and diagnostics.py as tables on the terminal, and as plain values for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.evaluation.bootstrap import Estimate

if TYPE_CHECKING:
    from rich.table import Table

_SHIFTS = ("tir_adv", "tir_adversarial_all", "tir_faithful_all", "tir_irrelevant_all")
_PRIOR_TITLES = {
    "no_audio": "what is said without the audio",
    "hint": "what the text beside the sound claims",
    "priors": "the priors file",
}


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the result of `summary.summarize` as tables."""
    from rich.console import Console

    console = Console()
    for name, s in summary.items():
        console.print(_accuracies(name, s))
        # These lines are for grep, and the console would wrap them.
        print(
            f"by {s['scorer']}; lenient accuracy {s['lenient_accuracy']}; strict accuracy {s['strict_accuracy']}",
            f"mean of {s['mean_of_tasks'].count} tasks (ALL) {s['mean_of_tasks']}; mean of their items {s['mean_of_items']}",
            *(f"{key} {s[key]}" for key in _SHIFTS if s[key].value is not None),
            *(f"{kind}: {group} {a} of {a.count}" for kind, groups in s["by_group"].items() for group, a in groups.items()),
            *(f"{task}: {_listen(figures)}" for task, figures in s.get("listen", {}).items()),
            sep="\n  ",
        )
        if c := s.get("calibration"):
            print(
                f"  calibration: ECE {c['ece']}; Brier {c['brier']}; the likeliest choice is right {c['accuracy']:.3f} of the "
                f"time at a mean confidence of {c['confidence']:.3f}"
            )
            if name == "plain":
                console.print(_reliability(c))
        for source, confusion in s.get("confusion", {}).items():
            console.print(_confusion(source, confusion))


def _listen(figures: Mapping[str, Any]) -> str:
    shown = [f"{name} {value:.3f}" for name, value in figures.items() if name not in ("answered", "count")]
    return f"{', '.join(shown)} over the {figures['answered']} of {figures['count']} answers that name a letter"


def print_comparison(comparison: Mapping[str, Any], first: str, second: str) -> None:
    """Print the result of `diagnostics.compare` as a table."""
    from rich.console import Console
    from rich.markup import escape

    table = _table(
        f"{escape(first)} minus {escape(second)}: {comparison['count']} shared questions, paired bootstrap over clips",
        "",
        "difference [95%]",
        "items",
    )
    for name in ("accuracy", "strict_accuracy", "mean_of_tasks", *_SHIFTS):
        if comparison[name].value is not None:
            table.add_row(name, _signed(comparison[name]), str(comparison[name].count))
    for part in ("by_kind", "by_task"):
        for name, difference in comparison[part].items():
            table.add_row(f"{part[3:]} {escape(name or '(no name)')}", _signed(difference), str(difference.count))
    Console().print(table)
    if comparison["only_first"] or comparison["only_second"]:
        print(f"not compared: {comparison['only_first']} questions of the first alone, {comparison['only_second']} of the second")


def to_json(value: Any) -> Any:
    """Estimates as objects and NaN as None, for JSON."""
    if isinstance(value, Estimate):
        return {name: to_json(v) for name, v in dataclasses.asdict(value).items()}
    if isinstance(value, Mapping):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _accuracies(name: str, s: Mapping[str, Any]) -> Table:
    from rich.markup import escape

    table = _table(f"{name}: {s['count']} answers (95% intervals over clips)", "", "accuracy", "strict", *s["by_kind"])
    table.add_row("all items", str(s["accuracy"]), str(s["strict_accuracy"]), *map(str, s["by_kind"].values()))
    means = [str(s["mean_of_tasks_by_kind"].get(kind, "-")) for kind in s["by_kind"]]
    table.add_row("mean of tasks", str(s["mean_of_tasks"]), str(s["strict_mean_of_tasks"]), *means)
    for category, c in s["by_category"].items():
        if category:
            label = f"{escape(category)} (mean of {c['tasks']})"
            table.add_row(label, str(c["mean_of_tasks"]), "", *map(str, c["by_kind"].values()))
    for task, t in s["by_task"].items():
        table.add_section()
        table.add_row(escape(task), str(t["all"]), str(t["strict"]), *map(str, t["by_kind"].values()))
        for label, kinds in s["by_class"].get(task, {}).items():
            table.add_row(f"  {escape(label)}", "", "", *map(str, kinds.values()))
    return table


def _reliability(c: Mapping[str, Any]) -> Table:
    table = _table("confidence of the likeliest choice, and how often it is right", "confidence", "answers", "mean", "right")
    for b in c["bins"]:
        if b["count"]:
            span = f"{b['low']:.1f} to {b['high']:.1f}"
            table.add_row(span, str(b["count"]), f"{b['confidence']:.3f}", f"{b['accuracy']:.3f}")
    return table


def _confusion(source: str, confusion: Mapping[str, Any]) -> Table:
    from rich.markup import escape

    table = _table(
        f"answers against the text prior: {_PRIOR_TITLES[source]}",
        "",
        "prior right: right",
        "wrong",
        "prior wrong: right",
        "as the prior",
        "other",
        "wrong answers that are the prior's",
    )
    for name, t in {"all tasks": confusion["all"], **confusion["by_task"]}.items():
        counts = [*t["prior_right"].values(), *t["prior_wrong"].values()]
        table.add_row(escape(name), *map(str, counts), str(t["wrong_as_prior"]))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    return table


def _signed(e: Estimate) -> str:
    return e.text("+")
