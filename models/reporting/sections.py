"""What a report says, as tables and figures: from stored results (models/experiments/results/*.csv) and from saved predictions.

Both templates, HTML and Markdown, render the same sections, so that neither can show what the other lacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.evaluation.predictions import KINDS, Prediction
from models.evaluation.scoring import Estimate, paired_difference
from models.evaluation.summary import summarize
from models.reporting.figures import Figure, Value, draw_intervals, draw_lines
from models.reporting.results_csv import (
    ORIGIN_COLUMNS,
    ResultsError,
    ResultsTable,
    SeedSummary,
    labels,
    over_seeds,
    read_curves,
    read_results,
)

NOTHING = "–"
CONTEXTS = {"neutral": "no hint", "aligned": "true hint", "conflict": "false hint", "irrelevant": "irrelevant text"}
# Column of a results file -> how a table calls it.
HEADINGS = CONTEXTS | {
    "all": "ALL",
    "shift_tir_adv": "Shift (TIR_adv), lower is better",
    "tir_adv": "Shift (TIR_adv), lower is better",
    "follows_hint": "repeats a false hint, lower is better",
    "strict": "ALL, strict matching",
    "latency_ms": "latency of an answer (ms)",
    "dev_nats": "loss on dev questions mixed as in the teacher's training (nats)",
    "no_audio": "control: no audio",
    "swapped_audio": "control: another's audio",
    "stage_seconds": "time of all stages (s)",
}
COUNTS = ("alpha", "questions", "clips", "answers", "seeds", "stage_seconds")
# File -> (heading, the command that makes it, what it holds).
STORED = {
    "six_systems.csv": (
        "Systems of the CAAD paper, on the built-in corpus",
        "python -m models six-systems --write",
        "ALL is the mean over tasks of the mean over contexts. Accuracy is lenient: the label's words stand in the answer. Shift "
        "is the share of the questions answered rightly without a hint that a false hint turns wrong.",
    ),
    "six_systems_paired.csv": (
        "Differences between systems",
        "python -m models six-systems --write",
        "Accuracy of one system minus another's on the same questions, all seeds together; 95% intervals by paired bootstrap "
        "over clips.",
    ),
    "sweeps.csv": ("Sweeps", "python -m models six-systems --write", "One setting is changed, the others stay."),
    "sources_layers.csv": (
        "Sources and layers",
        "python -m models ablation --write",
        "Perception is the mean over tasks that only the sound answers, content over tasks that the words answer, ALL over both; "
        "without a hint, but for the column that says so.",
    ),
    "demo.csv": ("Demo", "python -m models demo", "One task, the speaker's gender against a misleading hint."),
    "demo_avx2.csv": ("Demo without AVX-512", "python -m models demo", "In float32; its teacher came out less biased."),
    "demo_amx.csv": ("Demo with AMX", "python -m models demo", "Its teacher came out less biased."),
    "demo_seconds.csv": ("Time of the demo's stages", "python -m models demo", ""),
}
CURVES_FILE = "training.csv"
BIAS_SYSTEMS = ("teacher", "before", "kd", "caad1", "caad2", "caad_plus")
# Sweep -> (heading, what the x axis says)
SWEEPS = {
    "conflict_strength": ("Accuracy against conflict strength", "signal-to-noise ratio of the clips, dB"),
    "alpha": ("Contrast strength alpha", "contrast strength alpha"),
    "lambda": ("Weight of the KD term, lambda", "weight of the KD term, lambda"),
    "tau": ("Temperature tau", "temperature tau"),
    "anchor": ("Who writes the pseudo ground truth", "pseudo ground truth by"),
    "teacher_steps": ("Training of the teacher", "steps that the teacher was trained for"),
}
SCORES = ("all", *KINDS, "shift_tir_adv")
_MAX_PLAIN_ROWS = 200


@dataclass(frozen=True)
class Column:
    """Heading of a column; `note` stands small under it."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what it says.
        note: stands small under it.
        value: number to sort by; None = sort by the text.
        mark: "right", "wrong" or "".
    """

    text: str
    note: str = ""
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """The first column holds the rows' headings. A folded table is opened by the reader."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, sentences under it, then tables and figures in order."""

    title: str
    notes: tuple[str, ...] = ()
    blocks: tuple[Table | Figure, ...] = ()


@dataclass
class Stored:
    """What a folder of results gave: sections, training curves by label, sentences, and what was looked for and not found."""

    sections: list[Section] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------------------
# Stored results
# --------------------------------------------------------------------------------------------------------------------


def stored_sections(folder: str | Path) -> Stored:
    """Everything that the CSV files of `folder` hold; a known one that is not there is named in `missing`.

    Raises:
        ResultsError: no such folder, or a file in it that cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultsError(f"results: expected a folder, got {str(folder)!r}")
    tables = {path.name: read_results(path) for path in sorted(folder.glob("*.csv"))}
    found = Stored()
    curves = tables.pop(CURVES_FILE, None)
    if curves is None:
        found.missing.append(f"{CURVES_FILE} (curves of the training runs) is not among the results.")
    else:
        found.curves = read_curves(curves)
    names = labels(tables["six_systems.csv"]) if "six_systems.csv" in tables else {}
    for name in (*STORED, *sorted(tables.keys() - STORED.keys())):
        if name not in tables:
            found.missing.append(f"{name} is not among the results; {STORED[name][1]} makes it.")
            continue
        table = tables[name]
        title, command, what = STORED.get(name, (name, "", ""))
        notes = [what] if what else []
        if name == "sweeps.csv":
            blocks = _sweeps(table, names, found)
        elif name == "six_systems_paired.csv":
            blocks = _differences(table, names)
        elif {"system", "seed"} <= set(table.columns):
            blocks = _by_system(table, found)
            notes.append(_SEED_NOTE)
        else:
            blocks = _plain(table, title, found)
        origin = table.origin()
        notes.append(f"From {name}" + (f", made by {command}" if command else "") + (f": {origin}." if origin else "."))
        found.sections.append(Section(title, tuple(notes), tuple(blocks)))
    return found


_SEED_NOTE = (
    "Mean ± standard deviation over seeds, under it the 95% interval by bootstrap over seeds: with few seeds it is too narrow, "
    "and says nothing about other test clips. With one seed there is no deviation; an interval is then the file's, over clips."
)


def _by_system(table: ResultsTable, found: Stored) -> list[Table | Figure]:
    """Tables and figures of a file with a row a system and seed."""
    skipped = ("system", "label", "seed", *ORIGIN_COLUMNS)
    ends = [c for c in table.columns if re.fullmatch(r"(.*)_(low|high)", c) and c.rpartition("_")[0] in table.columns]
    columns = [c for c in table.columns if c not in skipped and c not in ends]
    blank = [c for c in columns if not any(row[c].strip() for row in table.rows)]
    if blank:
        found.missing.append(f"{table.name}: no value in the columns {', '.join(blank)}.")
    columns = [c for c in columns if c not in blank]
    if table.name == "six_systems.csv":
        absent = [c for c in (*SCORES, "follows_hint", "strict", "latency_ms") if c not in table.columns]
        if absent:
            found.missing.append(f"{table.name}: no column {', '.join(absent)}.")
    groups, names = over_seeds(table, columns), labels(table)
    scores = {names[system]: summaries for (system,), summaries in groups.items()}
    seeds = {names[system]: len([row for row in table.rows if row["system"] == system]) for (system,) in groups}
    main = [c for c in columns if not c.startswith(("task_", "class_"))]
    blocks: list[Table | Figure] = [_seed_table("Scores by system.", scores, {c: _heading(c) for c in main}, seeds)]
    contexts = [c for c in (*KINDS, "perception", "content") if c in main]
    stem = table.name.removesuffix(".csv").replace("_", "-")
    if contexts:
        rows = {label: _values(summaries, contexts) for label, summaries in scores.items()}
        caption = "Accuracy by system; bars are the intervals of the table."
        blocks.append(draw_intervals(stem, rows, xlabel="accuracy", caption=caption))
    if "follows_hint" in main:
        rows = {
            names[system]: _values(groups[system,], ["follows_hint"])
            for system in BIAS_SYSTEMS
            if (system,) in groups and groups[system,]["follows_hint"].mean is not None
        }
        lacking = [system for system in BIAS_SYSTEMS if (system,) not in groups]
        if lacking:
            found.missing.append(f"{table.name}: no rows of {', '.join(lacking)} for the figure of the bias before and after.")
        if rows:
            figure = draw_intervals(
                f"{stem}-bias", rows, xlabel="share of the answers that repeat a false hint",
                caption="Bias before and after: share of the answers under a false hint that repeat it (lower is better).",
            )  # fmt: skip
            blocks.append(figure)
            said = "; ".join(f"{label} {next(iter(v.values())).value:.3f}" for label, v in rows.items())
            found.findings.append(f"Share of the answers under a false hint that repeat it: {said}.")
    return blocks + [table for part in ("task", "class") for table in _part_tables(scores, columns, part)]


def _part_tables(scores: Mapping[str, Mapping[str, SeedSummary]], columns: Sequence[str], part: str) -> list[Table]:
    """A table a context; columns are <part>_<name>_<context>, or <part>_<name> where there is one context."""
    by_kind: dict[str, dict[str, str]] = {}
    for column in (c for c in columns if c.startswith(f"{part}_")):
        name, _, kind = column.removeprefix(f"{part}_").rpartition("_")
        if kind not in KINDS:
            name, kind = column.removeprefix(f"{part}_"), ""
        by_kind.setdefault(kind, {})[column] = name.replace("_", " ")
    return [
        _seed_table(f"By {part}{f', {CONTEXTS[kind]}' if kind else ''}: accuracy.", scores, headings, folded=True)
        for kind, headings in by_kind.items()
    ]


def _sweeps(table: ResultsTable, names: Mapping[str, str], found: Stored) -> list[Table | Figure]:
    """A table and a figure for each sweep; that of the conflict strength has a line a system, the others one a score."""
    table.need("sweep", "value", "system", "seed")
    columns = [c for c in SCORES if c in table.columns]
    absent = [c for c in SCORES if c not in table.columns and c != "irrelevant"]
    if absent:
        found.missing.append(f"{table.name}: no column {', '.join(absent)}.")
    groups = over_seeds(table, columns, by=("sweep", "value", "system"))
    present = list(dict.fromkeys(sweep for sweep, _, _ in groups))
    for sweep in SWEEPS:
        if sweep not in present:
            found.missing.append(f"{table.name}: no rows of the sweep {sweep} ({SWEEPS[sweep][0]}).")
    blocks: list[Table | Figure] = []
    for sweep in (*(s for s in SWEEPS if s in present), *(s for s in present if s not in SWEEPS)):
        title, axis = SWEEPS.get(sweep, (sweep, sweep))
        cells = {
            (value, names.get(system, system)): summaries
            for (name, value, system), summaries in groups.items()
            if name == sweep
        }  # fmt: skip
        shown = [c for c in columns if any(s[c].mean is not None for s in cells.values())]
        rows = {f"{value}, {system}": s for (value, system), s in cells.items()}
        if shown:
            blocks.append(_sweep_figure(sweep, title, axis, cells, rows, shown))
        seeds = {label: max((s[c].seeds for c in columns), default=0) for label, s in rows.items()}
        headings = {c: _heading(c) for c in shown}
        blocks.append(_seed_table(f"{title}: scores.", rows, headings, seeds, first="value, system", folded=True))
    return blocks


def _sweep_figure(
    sweep: str,
    title: str,
    axis: str,
    cells: Mapping[tuple[str, str], Mapping[str, SeedSummary]],
    rows: Mapping[str, Mapping[str, SeedSummary]],
    shown: Sequence[str],
) -> Figure:
    """Lines over numbers, rows of marks over names."""
    name = f"sweep-{re.sub(r'[^a-z0-9]+', '-', sweep.lower())}"
    if not _all_numbers([value for value, _ in cells]):
        drawn = {label: _values(summaries, shown) for label, summaries in rows.items()}
        return draw_intervals(name, drawn, xlabel="accuracy, Shift", caption=f"{title}: accuracy and Shift by {axis}.")
    systems = list(dict.fromkeys(system for _, system in cells))
    if sweep == "conflict_strength" and "conflict" in shown:
        shown, what = ["conflict"], "accuracy under a false hint"
    elif len(systems) > 1:
        shown, what = [c for c in ("all", "conflict") if c in shown], "accuracy"
    else:
        what = "accuracy, Shift" if "shift_tir_adv" in shown else "accuracy"
    series: dict[str, dict[float, Value]] = {}
    for (value, system), summaries in cells.items():
        for label, point in _values(summaries, shown).items():
            own = [system] if len(systems) > 1 else []
            own += [label] if len(shown) > 1 or not own else []
            series.setdefault(", ".join(own), {})[float(value)] = point
    return draw_lines(name, series, xlabel=axis, ylabel=what, limits=(0, 1), caption=f"{title}: {what} over {axis}.")


def _differences(table: ResultsTable, names: Mapping[str, str]) -> list[Table | Figure]:
    """A row a pair of systems, a column a context."""
    table.need("system", "minus", "context", "difference", "low", "high")
    pairs: dict[str, dict[str, Estimate]] = {}
    for i, row in enumerate(table.rows):
        pair = f"{names.get(row['system'], row['system'])} minus {names.get(row['minus'], row['minus'])}"
        value, low, high = (table.number(i, c) for c in ("difference", "low", "high"))
        count = table.number(i, "answers")
        pairs.setdefault(pair, {})[row["context"]] = Estimate(value, low, high, int(count or 0))
    contexts = list(dict.fromkeys(context for estimates in pairs.values() for context in estimates))
    rows = tuple((pair, tuple(_difference_cell(found.get(c)) for c in contexts)) for pair, found in pairs.items())
    columns = (Column("pair"), *(Column(CONTEXTS.get(c, c)) for c in contexts))
    drawn = {
        pair: {CONTEXTS.get(c, c): Value(e.value, e.low, e.high) for c, e in found.items() if e.value is not None}
        for pair, found in pairs.items()
    }
    figure = draw_intervals(
        "differences", drawn, xlabel="difference in accuracy", limits=None,
        caption="Difference in accuracy by context; right of 0 the first system is better.",
    )  # fmt: skip
    return [Table("Difference in accuracy (share of the questions), 95% interval.", columns, rows), figure]


def _plain(table: ResultsTable, title: str, found: Stored) -> list[Table]:
    """Any other file as it stands."""
    if len(table.rows) > _MAX_PLAIN_ROWS:
        found.missing.append(f"{table.name}: the first {_MAX_PLAIN_ROWS} of its {len(table.rows)} rows are shown.")
    shown = [c for c in table.columns if c not in ORIGIN_COLUMNS]
    numeric = {c: table.numeric(c) for c in shown}
    rows = tuple(
        (row[shown[0]], tuple(Cell(row[c] or NOTHING, value=float(row[c]) if numeric[c] and row[c] else None) for c in shown[1:]))
        for row in table.rows[:_MAX_PLAIN_ROWS]
    )
    return [Table(f"{title}.", tuple(Column(c.replace("_", " ")) for c in shown), rows)]


def _seed_table(
    caption: str,
    scores: Mapping[str, Mapping[str, SeedSummary]],
    headings: Mapping[str, str],
    seeds: Mapping[str, int] | None = None,
    *,
    first: str = "system",
    folded: bool = False,
) -> Table:
    """A row a label, the number of seeds where it is given, and a column for each of `headings`."""
    columns = [Column(first), *([] if seeds is None else [Column("seeds")]), *(Column(name) for name in headings.values())]
    rows = []
    for label, summaries in scores.items():
        cells = [_seed_cell(summaries[c], c, None if seeds is None else seeds[label]) for c in headings]
        if seeds is not None:
            cells.insert(0, Cell(str(seeds[label]), value=seeds[label]))
        rows.append((label, tuple(cells)))
    return Table(caption, tuple(columns), tuple(rows), folded)


def _seed_cell(s: SeedSummary, column: str, seeds: int | None) -> Cell:
    if s.mean is None:
        return Cell(NOTHING)
    if column in COUNTS:
        return Cell(f"{s.mean:g}", value=s.mean)
    text = _digits(s.mean) + ("" if s.deviation is None else f" ± {_digits(s.deviation, like=s.mean)}")
    notes = [] if s.low is None or s.high is None else [f"{_digits(s.low, like=s.mean)} to {_digits(s.high, like=s.mean)}"]
    if seeds is not None and s.seeds != seeds:
        notes.append(f"{s.seeds} seed{'s' if s.seeds > 1 else ''}")
    return Cell(text, ", ".join(notes), s.mean)


def _digits(value: float, *, like: float | None = None) -> str:
    """Three decimals of a share; fewer of what is large. `like` decides instead of the value itself."""
    size = abs(value if like is None else like)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def _heading(column: str) -> str:
    return HEADINGS.get(column, column.replace("_", " "))


def _short(column: str) -> str:
    return _heading(column).partition(" (")[0]


def _value(s: SeedSummary) -> Value:
    return Value(s.mean, s.low, s.high)


def _values(summaries: Mapping[str, SeedSummary], columns: Sequence[str]) -> dict[str, Value]:
    return {_short(c): _value(summaries[c]) for c in columns if summaries[c].mean is not None}


def _all_numbers(texts: Sequence[str]) -> bool:
    try:
        return all(float(t) == float(t) for t in texts)
    except ValueError:
        return False


# --------------------------------------------------------------------------------------------------------------------
# Saved predictions
# --------------------------------------------------------------------------------------------------------------------


def prediction_sections(systems: Mapping[str, Sequence[Prediction]], *, reference: str | None = None) -> list[Section]:
    """Accuracy, Shift, controls, classes and paired differences of the systems that have predictions.

    Args:
        reference: label of the system that the others are compared with; None = the first.

    Raises:
        ValueError: no system is called `reference`.
    """
    if reference is not None and reference not in systems:
        raise ValueError(f"reference: expected one of {list(systems)}, got {reference!r}")
    summaries = {label: summarize(predictions) for label, predictions in systems.items() if predictions}
    plain = {label: s["plain"] for label, s in summaries.items() if "plain" in s}
    if not plain:
        return []
    kinds = [k for k in KINDS if any(k in s["by_kind"] for s in plain.values())]
    kind_columns = tuple(Column(k, CONTEXTS[k]) for k in kinds)

    def rows(cells: Any) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
        return tuple((label, tuple(cells(label, s))) for label, s in plain.items())

    accuracy = Table(
        "Accuracy by system and context, with 95% interval and number of answers.",
        (Column("system"), *kind_columns, Column("all"), Column("strict")),
        rows(
            lambda _, s: (
                *(_estimate_cell(s["by_kind"].get(k)) for k in kinds),
                _estimate_cell(s["accuracy"]),
                _estimate_cell(s["strict_accuracy"]),
            )
        ),
    )
    bars = draw_intervals(
        "accuracy",
        {
            label: {k: Value(e.value, e.low, e.high) for k, e in s["by_kind"].items() if e.value is not None}
            for label, s in plain.items()
        },
        xlabel="accuracy",
        caption="Accuracy by system and context, with 95% intervals over clips.",
    )
    tirs = ("tir_adv", "tir_adversarial_all", "tir_faithful_all", "tir_irrelevant_all")
    shift = Table(
        "Shift by system, with 95% interval and number of pairs.",
        (
            Column("system"), Column("TIR_adv"), Column("TIR_adversarial, all pairs"), Column("TIR_faithful, all pairs"),
            Column("TIR_irrelevant, all pairs"),
        ),
        rows(lambda _, s: (_estimate_cell(s[t]) for t in tirs)),
    )  # fmt: skip
    sections = [
        Section(
            "Accuracy",
            (
                "By what the prompt claims. Under each figure its 95% bootstrap interval over clips and the number of answers. "
                "Lenient: the label's words stand in the answer; strict: and no other choice does.",
            ),
            (accuracy, bars),
        ),
        Section(
            "Shift: how much a false text moves the answer",
            (
                "TIR_adv = right without a hint and wrong under a false one, over those right without a hint (lower is better). "
                "The others count over all pairs: right to wrong under a false hint, wrong to right under a true one, either "
                "under one that says nothing to the point.",
            ),
            (shift,),
        ),
    ]
    controls = sorted({name for s in summaries.values() for name in s} - {"plain"})
    if controls:
        asked = rows(
            lambda label, s: (
                _estimate_cell(s["by_kind"].get("neutral")),
                *(_estimate_cell(summaries[label][c]["accuracy"] if c in summaries[label] else None) for c in controls),
            )
        )
        columns = (Column("system"), Column("neutral, as it is"), *(Column(c.replace("_", " ")) for c in controls))
        sections.append(
            Section(
                "Controls",
                (
                    "The same questions with no audio, and with the audio of a clip that has another answer (right would then "
                    "mean: not from the sound). Without a hint chance is the share of the more frequent class.",
                ),
                (Table("Accuracy of the controls.", columns, asked),),
            )
        )
    sections += _paired_section(systems, plain, kinds, reference or next(iter(plain)))
    classes = sorted({(task, label) for s in plain.values() for task, found in s["by_class"].items() for label in found})
    by_class = rows(
        lambda _, s: (
            _estimate_cell(s["by_class"].get(task, {}).get(name, {}).get(k), brief=True) for task, name in classes for k in kinds
        )
    )
    columns = (Column("system"), *(Column(f"{name}, {k}", task) for task, name in classes for k in kinds))
    sections.append(
        Section(
            "By class",
            (
                "Contrast can amplify a class offset of the teacher's text path: an average may hide that one class pays for "
                "the other.",
            ),
            (Table("Accuracy by true class and context.", columns, by_class),),
        )
    )
    return sections


def _paired_section(
    systems: Mapping[str, Sequence[Prediction]], plain: Mapping[str, Any], kinds: Sequence[str], reference: str
) -> list[Section]:
    others = [label for label in plain if label != reference]
    if not others or reference not in plain:
        return []
    asked = {label: [p for p in systems[label] if not p.control] for label in plain}

    def difference(label: str, kind: str | None) -> Estimate | None:
        ids = {p.id for p in asked[reference] if kind is None or p.kind == kind}
        if not any(p.id in ids and (kind is None or p.kind == kind) for p in asked[label]):
            return None
        return paired_difference(asked[label], asked[reference], kind=kind)

    rows = tuple((label, tuple(_difference_cell(difference(label, k)) for k in (*kinds, None))) for label in others)
    columns = (Column("system"), *(Column(k, CONTEXTS[k]) for k in kinds), Column("all"))
    note = f"Accuracy minus that of “{reference}” on the questions both answered; 95% intervals by paired bootstrap over clips."
    return [Section("Paired differences", (note,), (Table(f"Difference to {reference}.", columns, rows),))]


def _estimate_cell(estimate: Estimate | None, *, brief: bool = False) -> Cell:
    if estimate is None or estimate.value is None:
        return Cell(NOTHING)
    note = "" if brief else f"{estimate.low:.3f} to {estimate.high:.3f}, n {estimate.count}"
    return Cell(f"{estimate.value:.3f}", note, estimate.value)


def _difference_cell(estimate: Estimate | None) -> Cell:
    if estimate is None or estimate.value is None:
        return Cell(NOTHING)
    notes = [] if estimate.low is None or estimate.high is None else [f"{estimate.low:+.3f} to {estimate.high:+.3f}"]
    notes += [f"n {estimate.count}"] if estimate.count else []
    return Cell(f"{estimate.value:+.3f}".replace("-", "−"), ", ".join(notes).replace("-", "−"), estimate.value)
