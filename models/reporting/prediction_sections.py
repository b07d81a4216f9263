"""What saved predictions say, as sections of a report: accuracy, Shift, controls, paired differences, classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models.evaluation.evaluate import summarize
from models.evaluation.predictions import KINDS, Prediction
from models.evaluation.scoring import Estimate, paired_difference
from models.reporting.figures import draw_intervals, percent
from models.reporting.headline import Headline, Score, make_headline
from models.reporting.systems import CONTEXTS, Palette
from models.reporting.tables import Cell, Column, Section, Table, difference_cell, estimate_cell, narrow

_TIRS = {
    "tir_adv": "TIR_adv",
    "tir_adversarial_all": "TIR_adversarial, all pairs",
    "tir_faithful_all": "TIR_faithful, all pairs",
    "tir_irrelevant_all": "TIR_irrelevant, all pairs",
}

# Label of a system -> what `summarize` says about its answers without a control.
Scores = Mapping[str, Mapping[str, Any]]


def prediction_sections(
    systems: Mapping[str, Sequence[Prediction]], *, reference: str | None = None, palette: Palette | None = None
) -> tuple[Headline | None, list[Section]]:
    """The headline, and accuracy, Shift, controls, paired differences and classes, of the systems that have predictions.

    Args:
        reference: label of the system that the others are compared with; None = the first.
        palette: of the report; None = made for these systems.

    Raises:
        ValueError: no system has the label `reference`.
    """
    if reference is not None and reference not in systems:
        raise ValueError(f"reference: expected one of {list(systems)}, got {reference!r}")
    summaries = {label: summarize(predictions) for label, predictions in systems.items() if predictions}
    plain = {label: s["plain"] for label, s in summaries.items() if "plain" in s}
    if not plain:
        return None, []
    palette = palette or Palette(plain)
    kinds = [k for k in KINDS if any(k in s["by_kind"] for s in plain.values())]
    reference = reference or next(iter(plain))
    sections = [
        _accuracy(plain, kinds, palette),
        _shift(plain),
        *_controls(plain, summaries),
        *_paired_differences(systems, plain, kinds, reference),
        _classes(plain, kinds),
    ]
    return _headline(systems, plain, reference, palette), sections


def _headline(
    systems: Mapping[str, Sequence[Prediction]], plain: Scores, reference: str, palette: Palette
) -> Headline | None:
    scores = {
        label: {k: Score(e.value, e.low, e.high, "clips") for k, e in s["by_kind"].items() if e.value is not None}
        for label, s in plain.items()
    }
    asked = {label: [p for p in systems[label] if not p.control] for label in plain}

    def difference(system: str, other: str, kind: str) -> Score | None:
        found = _paired(asked[system], asked[other], kind)
        if found is None or found.value is None:
            return None
        return Score(found.value, found.low, found.high, f"{found.count} answers")

    note = "One run of each system. The intervals are over clips, and do not say how another run or another teacher would do."
    return make_headline(
        scores, difference, palette=palette, names={label: label for label in plain}, notes=(note,), reference=reference,
        stem="predictions",
    )  # fmt: skip


def _accuracy(plain: Scores, kinds: Sequence[str], palette: Palette) -> Section:
    rows = []
    # Strict and lenient matching often agree on every answer.
    strict = any(str(s["accuracy"]) != str(s["strict_accuracy"]) for s in plain.values())
    for label, s in plain.items():
        estimates = [*(s["by_kind"].get(k) for k in kinds), s["accuracy"], *([s["strict_accuracy"]] if strict else [])]
        rows.append((label, _cells(estimates)))
    columns = (*_contexts(kinds), Column("all questions"), *([Column("strict")] if strict else []))
    table = Table("Accuracy in % by system and context, with 95% interval and number of answers.", columns, tuple(rows))
    drawn = {
        label: {CONTEXTS[k]: percent(e.value, e.low, e.high) for k, e in s["by_kind"].items() if e.value is not None}
        for label, s in plain.items()
    }
    caption = "Accuracy by system and context, with 95% intervals over clips."
    note = (
        "The columns say what the prompt claims. Below each figure stand its 95% bootstrap interval over clips and the "
        "number of answers. Lenient matching: the words of the label stand in the answer. Strict matching: the words of no "
        "other choice stand there as well."
    )
    notes = (note,) if strict else (note, "Strict matching gives the same in every row and is not repeated.")
    figure = draw_intervals("accuracy", drawn, xlabel="accuracy, %", caption=caption, palette=palette)
    return Section("Accuracy", notes, (table, figure))


def _shift(plain: Scores) -> Section:
    shown = [name for name in _TIRS if any(s[name].value is not None for s in plain.values())]
    rows = tuple((label, _cells(s[name] for name in shown)) for label, s in plain.items())
    columns = (Column("system"), *(Column(_TIRS[name]) for name in shown))
    note = (
        "TIR_adv counts the questions that are answered right without a hint and wrong under a false one. It divides them by "
        "those answered right without a hint (lower is better). The other columns divide by all pairs. They count the "
        "answers that a false hint turns from right to wrong, that a true hint turns from wrong to right, and that an "
        "irrelevant text changes."
    )
    table = Table("Shift in % by system, with 95% interval and number of pairs.", columns, rows)
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
    columns = (Column("system"), Column("with its audio, no hint"), *(Column(c.replace("_", " ")) for c in controls))
    note = (
        "The same questions without the audio, and with the audio of a clip that has another answer. A right answer there "
        "does not come from the sound. Without a hint, chance is the share of the more frequent class."
    )
    return [Section("Controls", (note,), (Table("Accuracy of the controls in %.", columns, tuple(rows)),))]


def _classes(plain: Scores, kinds: Sequence[str]) -> Section:
    classes = sorted({(task, label) for s in plain.values() for task, found in s["by_class"].items() for label in found})
    rows = []
    for label, s in plain.items():
        estimates = [s["by_class"].get(task, {}).get(name, {}).get(k) for task, name in classes for k in kinds]
        rows.append((label, _cells(estimates, brief=True)))
    columns = (Column("system"), *(Column(f"{name}, {CONTEXTS[k]}", task) for task, name in classes for k in kinds))
    note = (
        "The text path of the teacher may prefer one class, and contrast can amplify that. An average can hide that one "
        "class loses what the other gains."
    )
    return Section("By class", (note,), tuple(narrow(Table("Accuracy in % by true class and context.", columns, tuple(rows)))))


def _paired_differences(
    systems: Mapping[str, Sequence[Prediction]], plain: Scores, kinds: Sequence[str], reference: str
) -> list[Section]:
    """Every other system against `reference`; no section where there is nothing to compare."""
    others = [label for label in plain if label != reference]
    if not others or reference not in plain:
        return []
    asked = {label: [p for p in systems[label] if not p.control] for label in plain}
    rows = tuple(
        (label, tuple(difference_cell(_paired(asked[label], asked[reference], k)) for k in (*kinds, None))) for label in others
    )
    columns = (*_contexts(kinds), Column("all questions"))
    note = (
        f"Accuracy minus the accuracy of “{reference}” on the questions that both answered. The 95% intervals come from a "
        "paired bootstrap over clips."
    )
    return [Section("Paired differences", (note,), (Table(f"Difference to {reference} in points.", columns, rows),))]


def _paired(mine: Sequence[Prediction], others: Sequence[Prediction], kind: str | None) -> Estimate | None:
    """The difference on the questions that both answered; None where they share none of this context (None: of any)."""
    ids = {p.id for p in others if kind is None or p.kind == kind}
    if not any(p.id in ids and (kind is None or p.kind == kind) for p in mine):
        return None
    return paired_difference(mine, others, kind=kind)


def _contexts(kinds: Sequence[str]) -> tuple[Column, ...]:
    return (Column("system"), *(Column(CONTEXTS[k]) for k in kinds))


def _cells(estimates: Iterable[Estimate | None], *, brief: bool = False) -> tuple[Cell, ...]:
    return tuple(estimate_cell(estimate, brief=brief) for estimate in estimates)
