"""What stored results say (models/experiments/results/*.csv), as sections of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from models.evaluation.predictions import KINDS
from models.evaluation.scoring import Estimate
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
from models.reporting.tables import CONTEXTS, NOTHING, Cell, Column, Section, Table, difference_cell

# Column of a results file -> its heading in a table.
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


class StoredFile(NamedTuple):
    """A results file that the report knows: its heading, the command that makes it, and sentences about what it holds."""

    title: str
    command: str
    notes: tuple[str, ...] = ()


_TEST_CLIPS = (
    "All 176 test recordings are real: acted speech from one game. No training clip is of the same character, but some of "
    "the actors also voice characters of the training set. The recordings were seen while settings were tuned."
)
STORED = {
    "six_systems.csv": StoredFile(
        "Systems of the CAAD paper, on the built-in corpus",
        "python -m models six-systems --write",
        (
            "ALL is the mean over tasks of the mean over contexts. Accuracy is lenient: the words of the label stand in the "
            "answer. Shift is the share of the questions answered right without a hint that are answered wrong under a false "
            "hint.",
            "One task, the speaker's gender, and one teacher; the control rows have two more. The teacher's bias was induced: "
            "nearly all of its training hints were true. The size of the gain differs between teachers: with the longer one, "
            "and with those of three of the four demo runs, it is smaller. With an earlier teacher the student by true labels "
            "was ahead of CAAD alpha 2.",
            "One question in three of ALL has a false hint. No question of the CAAD paper's ALL has one, so the two gains "
            "cannot be compared.",
            _TEST_CLIPS + " Each was asked with three draws of noise.",
        ),
    ),
    "six_systems_paired.csv": StoredFile(
        "Differences between systems",
        "python -m models six-systems --write",
        (
            "Accuracy of one system minus the accuracy of another on the same questions, all seeds together. The 95% "
            "intervals come from a paired bootstrap over clips. They hold for this teacher alone, and they are too narrow "
            "for other speakers: several clips share a recording, and several recordings share an actor. They are not "
            "corrected for the number of comparisons.",
        ),
    ),
    "sweeps.csv": StoredFile(
        "Sweeps",
        "python -m models six-systems --write",
        (
            "One setting is changed, the others stay. All sweeps but the first and the last have one seed.",
            "The CAAD paper writes the pseudo ground truth from the metadata. With it CAAD gains less than with the "
            "teacher's own answers. Where the noise is strong (left in the first figure) little can be heard, and a true "
            "hint is information.",
        ),
    ),
    "sources_layers.csv": StoredFile(
        "Sources and layers",
        "python -m models ablation --write",
        (
            "Perception is the mean over the tasks that only the sound answers, content is the mean over the tasks that the "
            "words answer, and ALL is the mean over both. The questions have no hint, except in the column “false hint”.",
            "Whether a difference between two rows is more than noise is judged by a 95% t interval over the seeds. The "
            "command prints the judgement of each claim of the paper.",
        ),
    ),
    "demo.csv": StoredFile(
        "Demo",
        "python -m models demo",
        ("One task, the speaker's gender against a misleading hint. One teacher, one seed.", _TEST_CLIPS),
    ),
    "demo_earlier.csv": StoredFile(
        "Demo at an earlier commit", "python -m models demo", ("On the same kind of processor, with another teacher.",)
    ),
    "demo_avx2.csv": StoredFile(
        "Demo without AVX-512", "python -m models demo", ("In float32, with another teacher, which is less biased.",)
    ),
    "demo_amx.csv": StoredFile("Demo with AMX", "python -m models demo", ("Another teacher, which is less biased.",)),
    "demo_seconds.csv": StoredFile("Time of the demo's stages", "python -m models demo"),
}
CURVES_FILE = "training.csv"
BIAS_SYSTEMS = ("teacher", "before", "kd", "caad1", "caad2", "caad_plus")
# Sweep -> (heading, label of the x axis)
SWEEPS = {
    "conflict_strength": ("Accuracy against conflict strength", "signal-to-noise ratio of the clips, dB"),
    "alpha": ("Contrast strength alpha", "contrast strength alpha"),
    "lambda": ("Weight of the KD term, lambda", "weight of the KD term, lambda"),
    "tau": ("Temperature tau", "temperature tau"),
    "anchor": ("Who writes the pseudo ground truth", "writer of the pseudo ground truth"),
    "teacher_steps": ("Training of the teacher", "steps that the teacher was trained for"),
}
_SEED_NOTE = (
    "Mean ± standard deviation over seeds. Below it stands the 95% interval by bootstrap over seeds. With few seeds this "
    "interval is too narrow, and it says nothing about other test clips or another teacher. With one seed there is no "
    "deviation; an interval there is over clips and comes from the file."
)
SCORES = ("all", *KINDS, "shift_tir_adv")
_MAX_PLAIN_ROWS = 200


@dataclass
class Stored:
    """What a folder of results gave: sections, training curves by label, findings, and sentences about what is missing."""

    sections: list[Section] = field(default_factory=list)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def stored_sections(folder: str | Path) -> Stored:
    """Everything that the CSV files of `folder` hold. `missing` names the known files that are not there.

    Raises:
        ResultsError: there is no such folder, or a file in it cannot be used.
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
            found.missing.append(f"{name} is not among the results; {STORED[name].command} makes it.")
            continue
        table = tables[name]
        title, command, known_notes = STORED.get(name, StoredFile(name, ""))
        notes = list(known_notes)
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


def _by_system(table: ResultsTable, found: Stored) -> list[Table | Figure]:
    """Tables and figures of a file with a row for each system and seed."""
    columns = _score_columns(table, found)
    groups, names = over_seeds(table, columns), labels(table)
    scores = {names[system]: summaries for (system,), summaries in groups.items()}
    seeds = {names[system]: len([row for row in table.rows if row["system"] == system]) for (system,) in groups}
    main = [c for c in columns if not c.startswith(("task_", "class_"))]
    blocks: list[Table | Figure] = [_seed_table("Scores by system.", scores, {c: _heading(c) for c in main}, seeds)]
    contexts = [c for c in (*KINDS, "perception", "content") if c in main]
    stem = table.name.removesuffix(".csv").replace("_", "-")
    if contexts:
        rows = {label: _values(summaries, contexts) for label, summaries in scores.items()}
        caption = "Accuracy by system. The bars are the intervals of the table."
        blocks.append(draw_intervals(stem, rows, xlabel="accuracy", caption=caption))
    if "follows_hint" in main:
        blocks += _bias_figure(f"{stem}-bias", table.name, {system: s for (system,), s in groups.items()}, names, found)
    return blocks + [table for part in ("task", "class") for table in _part_tables(scores, columns, part)]


def _score_columns(table: ResultsTable, found: Stored) -> list[str]:
    """The columns that hold scores. `found.missing` names the empty ones and those that six_systems.csv lacks."""
    skipped = ("system", "label", "seed", *ORIGIN_COLUMNS)
    ends = [c for c in table.columns if re.fullmatch(r"(.*)_(low|high)", c) and c.rpartition("_")[0] in table.columns]
    columns = [c for c in table.columns if c not in skipped and c not in ends]
    blank = [c for c in columns if not any(row[c].strip() for row in table.rows)]
    if blank:
        found.missing.append(f"{table.name}: no value in the columns {', '.join(blank)}.")
    if table.name == "six_systems.csv":
        scores = (*SCORES, "follows_hint", "strict", "latency_ms")
        absent = [c for c in scores if c not in table.columns]
        if absent:
            found.missing.append(f"{table.name}: no column {', '.join(absent)}.")
    return [c for c in columns if c not in blank]


def _bias_figure(
    name: str, file: str, groups: Mapping[str, Mapping[str, SeedSummary]], names: Mapping[str, str], found: Stored
) -> list[Figure]:
    """How often a false hint is repeated, before and after distillation. No figure where no such system has the score."""
    lacking = [system for system in BIAS_SYSTEMS if system not in groups]
    if lacking:
        found.missing.append(f"{file}: no rows of {', '.join(lacking)} for the figure of the bias before and after.")
    rows = {
        names[system]: _values(groups[system], ["follows_hint"])
        for system in BIAS_SYSTEMS
        if system in groups and groups[system]["follows_hint"].mean is not None
    }
    if not rows:
        return []
    said = "; ".join(f"{label} {next(iter(v.values())).value:.3f}" for label, v in rows.items())
    found.findings.append(f"Share of the answers under a false hint that repeat it: {said}.")
    return [
        draw_intervals(
            name, rows, xlabel="share of the answers that repeat a false hint",
            caption="Bias before and after: share of the answers under a false hint that repeat it (lower is better).",
        )
    ]  # fmt: skip


def _part_tables(scores: Mapping[str, Mapping[str, SeedSummary]], columns: Sequence[str], part: str) -> list[Table]:
    """A table for each context. Columns are <part>_<name>_<context>, or <part>_<name> where there is one context."""
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
    """A table and a figure for each sweep."""
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
    """Lines where the values of the setting are numbers, rows of marks where they are names.

    The sweep of the conflict strength has a line for each system, the others a line for each score.
    """
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
    """A row for each pair of systems, a column for each context."""
    table.need("system", "minus", "context", "difference", "low", "high")
    pairs: dict[str, dict[str, Estimate]] = {}
    for i, row in enumerate(table.rows):
        pair = f"{names.get(row['system'], row['system'])} minus {names.get(row['minus'], row['minus'])}"
        value, low, high = (table.number(i, c) for c in ("difference", "low", "high"))
        count = table.number(i, "answers")
        pairs.setdefault(pair, {})[row["context"]] = Estimate(value, low, high, int(count or 0))
    contexts = list(dict.fromkeys(context for estimates in pairs.values() for context in estimates))
    rows = tuple((pair, tuple(difference_cell(found.get(c)) for c in contexts)) for pair, found in pairs.items())
    columns = (Column("pair"), *(Column(CONTEXTS.get(c, c)) for c in contexts))
    drawn = {
        pair: {CONTEXTS.get(c, c): Value(e.value, e.low, e.high) for c, e in found.items() if e.value is not None}
        for pair, found in pairs.items()
    }
    figure = draw_intervals(
        "differences", drawn, xlabel="difference in accuracy", limits=None,
        caption="Difference in accuracy by context. Right of 0 the first system is better.",
    )  # fmt: skip
    return [Table("Difference in accuracy (share of the questions), 95% interval.", columns, rows), figure]


def _plain(table: ResultsTable, title: str, found: Stored) -> list[Table]:
    """Any other file, unchanged."""
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
    """A row for each label and a column for each of `headings`. Where `seeds` is given, the first column says how many."""
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
    """Three decimals of a share, fewer of a large number. With `like` its size decides how many."""
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
