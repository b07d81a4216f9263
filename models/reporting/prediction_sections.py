"""What saved predictions say, as sections of a report: accuracy, Shift, controls, paired differences, classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models.evaluation.evaluate import summarize
from models.evaluation.predictions import KINDS, Prediction
from models.evaluation.scoring import Estimate, paired_difference
from models.reporting.figures import Value, draw_intervals
from models.reporting.tables import CONTEXTS, Cell, Column, Section, Table, difference_cell, estimate_cell

_TIRS = {
    "tir_adv": "TIR_adv",
    "tir_adversarial_all": "TIR_adversarial, all pairs",
    "tir_faithful_all": "TIR_faithful, all pairs",
    "tir_irrelevant_all": "TIR_irrelevant, all pairs",
}

# Label of a system -> what `summarize` says about its answers without a control.
Scores = Mapping[str, Mapping[str, Any]]


def prediction_sections(systems: Mapping[str, Sequence[Prediction]], *, reference: str | None = None) -> list[Section]:
    """Accuracy, Shift, controls, paired differences and classes of the systems that have predictions.

    Args:
        reference: label of the system that the others are compared with; None = the first.

    Raises:
        ValueError: no system has the label `reference`.
    """
    if reference is not None and reference not in systems:
        raise ValueError(f"reference: expected one of {list(systems)}, got {reference!r}")
    summaries = {label: summarize(predictions) for label, predictions in systems.items() if predictions}
    plain = {label: s["plain"] for label, s in summaries.items() if "plain" in s}
    if not plain:
        return []
    kinds = [k for k in KINDS if any(k in s["by_kind"] for s in plain.values())]
    return [
        _accuracy(plain, kinds),
        _shift(plain),
        *_controls(plain, summaries),
        *_paired_differences(systems, plain, kinds, reference or next(iter(plain))),
        _classes(plain, kinds),
    ]


def _accuracy(plain: Scores, kinds: Sequence[str]) -> Section:
    rows = []
    for label, s in plain.items():
        estimates = [*(s["by_kind"].get(k) for k in kinds), s["accuracy"], s["strict_accuracy"]]
        rows.append((label, _cells(estimates)))
    columns = (Column("system"), *(Column(k, CONTEXTS[k]) for k in kinds), Column("all"), Column("strict"))
    table = Table("Accuracy by system and context, with 95% interval and number of answers.", columns, tuple(rows))
    drawn = {
        label: {k: Value(e.value, e.low, e.high) for k, e in s["by_kind"].items() if e.value is not None}
        for label, s in plain.items()
    }
    caption = "Accuracy by system and context, with 95% intervals over clips."
    note = (
        "The columns say what the prompt claims. Below each figure stand its 95% bootstrap interval over clips and the "
        "number of answers. Lenient matching: the words of the label stand in the answer. Strict matching: the words of no "
        "other choice stand there as well."
    )
    return Section("Accuracy", (note,), (table, draw_intervals("accuracy", drawn, xlabel="accuracy", caption=caption)))


def _shift(plain: Scores) -> Section:
    rows = tuple((label, _cells(s[name] for name in _TIRS)) for label, s in plain.items())
    columns = (Column("system"), *(Column(heading) for heading in _TIRS.values()))
    note = (
        "TIR_adv counts the questions that are answered right without a hint and wrong under a false one. It divides them by "
        "those answered right without a hint (lower is better). The other columns divide by all pairs. They count the "
        "answers that a false hint turns from right to wrong, that a true hint turns from wrong to right, and that an "
        "irrelevant text changes."
    )
    table = Table("Shift by system, with 95% interval and number of pairs.", columns, rows)
    return Section("Shift: how much a false text moves the answer", (note,), (table,))


def _controls(plain: Scores, summaries: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """The section of the controls; none where no system was asked one."""
    controls = sorted({name for s in summaries.values() for name in s} - {"plain"})
    if not controls:
        return []
    rows = []
    for label, s in plain.items():
        asked = [summaries[label][c]["accuracy"] if c in summaries[label] else None for c in controls]
        rows.append((label, _cells([s["by_kind"].get("neutral"), *asked])))
    columns = (Column("system"), Column("neutral, as it is"), *(Column(c.replace("_", " ")) for c in controls))
    note = (
        "The same questions without the audio, and with the audio of a clip that has another answer. A right answer there "
        "does not come from the sound. Without a hint, chance is the share of the more frequent class."
    )
    return [Section("Controls", (note,), (Table("Accuracy of the controls.", columns, tuple(rows)),))]


def _classes(plain: Scores, kinds: Sequence[str]) -> Section:
    classes = sorted({(task, label) for s in plain.values() for task, found in s["by_class"].items() for label in found})
    rows = []
    for label, s in plain.items():
        estimates = [s["by_class"].get(task, {}).get(name, {}).get(k) for task, name in classes for k in kinds]
        rows.append((label, _cells(estimates, brief=True)))
    columns = (Column("system"), *(Column(f"{name}, {k}", task) for task, name in classes for k in kinds))
    note = (
        "The text path of the teacher may prefer one class, and contrast can amplify that. An average can hide that one "
        "class loses what the other gains."
    )
    return Section("By class", (note,), (Table("Accuracy by true class and context.", columns, tuple(rows)),))


def _paired_differences(
    systems: Mapping[str, Sequence[Prediction]], plain: Scores, kinds: Sequence[str], reference: str
) -> list[Section]:
    """Every other system against `reference`; no section where there is nothing to compare."""
    others = [label for label in plain if label != reference]
    if not others or reference not in plain:
        return []
    asked = {label: [p for p in systems[label] if not p.control] for label in plain}

    def difference(label: str, kind: str | None) -> Estimate | None:
        ids = {p.id for p in asked[reference] if kind is None or p.kind == kind}
        if not any(p.id in ids and (kind is None or p.kind == kind) for p in asked[label]):
            return None
        return paired_difference(asked[label], asked[reference], kind=kind)

    rows = tuple((label, tuple(difference_cell(difference(label, k)) for k in (*kinds, None))) for label in others)
    columns = (Column("system"), *(Column(k, CONTEXTS[k]) for k in kinds), Column("all"))
    note = (
        f"Accuracy minus the accuracy of “{reference}” on the questions that both answered. The 95% intervals come from a "
        "paired bootstrap over clips."
    )
    return [Section("Paired differences", (note,), (Table(f"Difference to {reference}.", columns, rows),))]


def _cells(estimates: Iterable[Estimate | None], *, brief: bool = False) -> tuple[Cell, ...]:
    return tuple(estimate_cell(estimate, brief=brief) for estimate in estimates)
