"""What stored results say (models/experiments/results/*.csv), as sections of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from models.evaluation.predictions import KINDS
from models.evaluation.scoring import Estimate
from models.reporting.figures import Figure, Value, draw_intervals, draw_lines, percent
from models.reporting.headline import Headline, LongScores, long_headline
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
from models.reporting.study import study_sections
from models.reporting.systems import ANCHORS, CONTEXTS, Palette, system_name
from models.reporting.tables import NOTHING, Cell, Column, Section, Table, difference_cell, narrow

# Column of a results file -> its heading in a table.
HEADINGS = CONTEXTS | {
    "all": "ALL",
    "shift_tir_adv": "Shift, lower is better",
    "tir_adv": "Shift, lower is better",
    "follows_hint": "repeats a false hint, lower is better",
    "strict": "ALL, strict matching",
    "latency_ms": "latency of an answer (ms)",
    "dev_nats": "loss on dev questions mixed as in the teacher's training (nats)",
    "no_audio": "control: no audio",
    "swapped_audio": "control: another's audio",
    "stage_seconds": "time of all stages (s)",
}
COUNTS = ("alpha", "questions", "clips", "answers", "seeds", "stage_seconds")
# Scores that have a column in any case.
_OWN = (*CONTEXTS, "all", "perception", "content", "shift_tir_adv", "tir_adv")
# What is shown in %; every other number has a unit of its own.
_SHARES = (*_OWN, "follows_hint", "strict", "no_audio", "swapped_audio", "accuracy")


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
            "answer. Shift (TIR_adv) is the share of the questions answered right without a hint that are answered wrong under "
            "a false hint.",
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
            "Whether a claim of the paper holds is judged by the p of a t test over the seeds, with Holm's correction over all "
            "claims. The command prints the judgement of each.",
        ),
    ),
    "study_followed.csv": StoredFile(
        "Study E3, tasks whose texts the teacher follows",
        "python -m models study E3 --collect --write",
        (
            "Shares, not points: the endpoints of E3 without the tasks in which a teacher gives one answer beside any text. "
            "Chosen after the results were known. folds_low and folds_high are a t interval over the means of the folds.",
        ),
    ),
    "study_sources_layers.csv": StoredFile(
        "Sources and layers, with unheard actors",
        "python -m models ablation --study --write",
        (
            "Five seeds of students from one teacher, on real recordings. The means are over the tasks that count: those that "
            "the audio-aware teacher has learned on dev and that leave room above.",
        ),
    ),
    "study_sources_claims.csv": StoredFile(
        "Claims about sources and layers, with unheard actors",
        "python -m models ablation --study --write",
        (
            "Shares, not points. The ends are the 95% t interval over seeds. The verdict is by the p of a t test with Holm's "
            "correction over all claims of this table. It says nothing about another teacher.",
        ),
    ),
    "study_sources_gate.csv": StoredFile("Tasks that count in sources and layers", "python -m models ablation --study --write"),
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
    "Mean ± standard deviation over seeds. Below it stands the 95% t interval over seeds. It says nothing about other test "
    "clips or another teacher. With one seed there is no deviation; an interval there is over clips and comes from the file."
)
SCORES = ("all", *KINDS, "shift_tir_adv")
_MAX_PLAIN_ROWS = 200


@dataclass
class Stored:
    """What a folder of results gave.

    Args:
        sections: one for each file.
        headline: of the study; without one of the six systems, else of the demo.
        curves: label -> training curve.
        missing: sentences about what is not there.
        palette: the styles of the folder's systems and of the others that the report shows.
    """

    sections: list[Section] = field(default_factory=list)
    headline: Headline | None = None
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    palette: Palette = field(default_factory=Palette)


def stored_sections(folder: str | Path, *, others: Sequence[str] = ()) -> Stored:
    """Everything that the CSV files of `folder` hold. `missing` names the known files that are not there.

    Args:
        others: systems that the report shows beside those of the folder.

    Raises:
        ResultsError: there is no such folder, or a file in it cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultsError(f"results: expected a folder, got {str(folder)!r}")
    tables = {path.name: read_results(path) for path in sorted(folder.glob("*.csv"))}
    seen = [name for table in tables.values() if "system" in table.columns for name in labels(table).values()]
    found = Stored(palette=Palette([*seen, *others]))
    curves = tables.pop(CURVES_FILE, None)
    if curves is None:
        found.missing.append(f"{CURVES_FILE} (curves of the training runs) is not among the results.")
    else:
        found.curves = read_curves(curves)
    of_study, found.headline = study_sections(tables, found.palette)
    found.sections += of_study
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
            blocks = _differences(table, names, found.palette)
        elif {"system", "seed"} <= set(table.columns):
            blocks, more = _by_system(table, found)
            notes += [*more, _SEED_NOTE]
        else:
            blocks = _plain(table, title, found)
        origin = table.origin()
        notes.append(f"From {name}" + (f", made by {command}" if command else "") + (f": {origin}." if origin else "."))
        found.sections.append(Section(title, tuple(notes), tuple(blocks)))
    for name in ("six_systems.csv", "demo.csv"):
        if found.headline is None and name in tables:
            found.headline = _table_headline(tables[name], found.palette)
    return found


def _table_headline(table: ResultsTable, palette: Palette) -> Headline | None:
    """The headline of a table with a row for each system and seed, and a column for each context."""
    rows = [
        {"system": row["system"], "seed": row.get("seed", ""), "context": context, "accuracy": row[context],
         "low": row.get(f"{context}_low"), "high": row.get(f"{context}_high")}
        for row in table.rows
        for context in KINDS
        if context in table.columns
    ]  # fmt: skip
    return long_headline(LongScores(rows, name=table.name), palette=palette, names=labels(table), notes=(_TEST_CLIPS,))


def _by_system(table: ResultsTable, found: Stored) -> tuple[list[Table | Figure], list[str]]:
    """Tables and figures of a file with a row for each system and seed, and notes about the columns that are not shown."""
    columns = _score_columns(table, found)
    groups, names = over_seeds(table, columns), labels(table)
    scores = {names[system]: summaries for (system,), summaries in groups.items()}
    seeds = {names[system]: len([row for row in table.rows if row["system"] == system]) for (system,) in groups}
    columns, notes = _without_repeats(table, columns)
    main = [c for c in columns if not c.startswith(("task_", "class_"))]
    shown = [c for c in main if c in _OWN] or main
    of_scores = _seed_table("Scores by system; shares in %.", scores, {c: _heading(c) for c in shown}, seeds)
    blocks: list[Table | Figure] = [*narrow(of_scores)]
    if rest := {c: _heading(c) for c in main if c not in shown}:
        blocks += narrow(_seed_table("Controls and costs by system; shares in %.", scores, rest, seeds, folded=True))
    contexts = [c for c in (*KINDS, "perception", "content") if c in main]
    stem = table.name.removesuffix(".csv").replace("_", "-")
    if contexts:
        rows = {label: _values(summaries, contexts) for label, summaries in scores.items()}
        caption = "Accuracy by system. The bars are the intervals of the table."
        blocks.append(draw_intervals(stem, rows, xlabel="accuracy, %", caption=caption, palette=found.palette))
    if "follows_hint" in main:
        blocks += _bias_figure(f"{stem}-bias", table.name, {system: s for (system,), s in groups.items()}, names, found)
    return blocks + [table for part in ("task", "class") for table in _part_tables(scores, columns, part)], notes


def _without_repeats(table: ResultsTable, columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """The columns that say something of their own, and sentences about the others.

    A column is left out if it repeats an earlier one in all rows, or is 1 minus an earlier one. The scores of _OWN stay: two of
    them may be equal by chance. A count that is the same in all rows goes into a sentence.
    """
    kept: dict[str, list[float | None]] = {}
    repeats, notes = [], []
    for column in columns:
        own = [table.number(i, column) for i in range(len(table.rows))]
        same = opposite = None
        if len(own) > 1 and column not in _OWN:
            if column in COUNTS and len(set(own)) == 1:
                notes.append(f"{_capital(_heading(column))}: {own[0]:g} in every row.")
                continue
            same = next((c for c, values in kept.items() if values == own), None)
            opposite = next((c for c, values in kept.items() if c in _SHARES and _add_to_one(values, own)), None)
        if same or opposite:
            what = _heading(same) if same else f"100% minus {_heading(opposite)}"
            repeats.append(f"{_heading(column)} (= {what})")
        else:
            kept[column] = own
    if repeats:
        notes.insert(0, f"Left out, since they repeat another column in every row: {'; '.join(repeats)}.")
    return list(kept), notes


def _add_to_one(first: Sequence[float | None], second: Sequence[float | None]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(a is not None and b is not None and abs(a + b - 1) < 1e-4 for a, b in pairs)


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
    return [
        draw_intervals(
            name, rows, xlabel="answers that repeat a false hint, %", palette=found.palette,
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
    tables = (
        _seed_table(f"By {part}{f', {CONTEXTS[kind]}' if kind else ''}: accuracy in %.", scores, headings, folded=True)
        for kind, headings in by_kind.items()
    )
    return [table for whole in tables for table in narrow(whole)]


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
        of_sweep = {key[1:]: summaries for key, summaries in groups.items() if key[0] == sweep}
        shown = [c for c in columns if any(s[c].mean is not None for s in of_sweep.values())]
        cells = {(value, names.get(system, system_name(system))): s for (value, system), s in of_sweep.items()}
        called = ANCHORS if sweep == "anchor" else {}
        rows = {f"{called.get(value, value)}, {system}": s for (value, system), s in cells.items()}
        if shown:
            blocks.append(_sweep_figure(sweep, title, axis, cells, rows, shown, found.palette))
        seeds = {label: max((s[c].seeds for c in columns), default=0) for label, s in rows.items()}
        headings = {c: _heading(c) for c in shown}
        blocks.append(_seed_table(f"{title}: scores in %.", rows, headings, seeds, first="value, system", folded=True))
    return blocks


def _sweep_figure(
    sweep: str,
    title: str,
    axis: str,
    cells: Mapping[tuple[str, str], Mapping[str, SeedSummary]],
    rows: Mapping[str, Mapping[str, SeedSummary]],
    shown: Sequence[str],
    palette: Palette,
) -> Figure:
    """A panel for each score. A line for each system where the values of the setting are numbers, else a mark for each value."""
    name = f"sweep-{re.sub(r'[^a-z0-9]+', '-', sweep.lower())}"
    if not _all_numbers([value for value, _ in cells]):
        drawn = {label: _values(summaries, shown) for label, summaries in rows.items()}
        systems = dict(zip(rows, (system for _, system in cells), strict=True))
        caption = f"{title}: accuracy and Shift by {axis}."
        return draw_intervals(name, drawn, xlabel="%", caption=caption, palette=palette, systems=systems)
    panels: dict[str, dict[str, dict[float, Value]]] = {}
    for (value, system), summaries in cells.items():
        for label, point in _values(summaries, shown).items():
            panels.setdefault(f"{label}, %", {}).setdefault(system, {})[float(value)] = point
    return draw_lines(name, panels, xlabel=axis, limits=(0, 100), palette=palette, caption=f"{title}: scores over {axis}.")


def _differences(table: ResultsTable, names: Mapping[str, str], palette: Palette) -> list[Table | Figure]:
    """A row for each pair of systems, a column for each context."""
    table.need("system", "minus", "context", "difference", "low", "high")
    pairs: dict[str, dict[str, Estimate]] = {}
    systems = {}
    for i, row in enumerate(table.rows):
        first, second = (names.get(row[c], system_name(row[c])) for c in ("system", "minus"))
        pair = f"{first} minus {second}"
        systems[pair] = first
        value, low, high = (table.number(i, c) for c in ("difference", "low", "high"))
        count = table.number(i, "answers")
        pairs.setdefault(pair, {})[row["context"]] = Estimate(value, low, high, int(count or 0))
    contexts = list(dict.fromkeys(context for estimates in pairs.values() for context in estimates))
    rows = tuple((pair, tuple(difference_cell(found.get(c)) for c in contexts)) for pair, found in pairs.items())
    columns = (Column("pair"), *(Column(_heading(c)) for c in contexts))
    drawn = {
        pair: {_heading(c): percent(e.value, e.low, e.high) for c, e in found.items() if e.value is not None}
        for pair, found in pairs.items()
    }
    figure = draw_intervals(
        "differences", drawn, xlabel="points", limits=None, palette=palette, systems=systems,
        caption="Difference in accuracy by context. Right of 0 the first system is better, and its colour is shown.",
    )  # fmt: skip
    return [Table("Difference in accuracy in points, 95% interval.", columns, rows), figure]


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
    return narrow(Table(f"{title}.", tuple(Column(c.replace("_", " ")) for c in shown), rows))


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
    scale = 100 if _is_share(column) else 1
    mean, low, high, deviation = (None if x is None else scale * x for x in (s.mean, s.low, s.high, s.deviation))

    def said(value: float) -> str:
        return f"{value:.1f}" if scale == 100 else _digits(value, like=mean)

    text = said(mean) + ("" if deviation is None else f" ± {said(deviation)}")
    if low is not None and high is not None and scale == 100:
        low, high = max(0.0, low), min(100.0, high)
    notes = [] if low is None or high is None else [f"{said(low)} to {said(high)}"]
    if seeds is not None and s.seeds != seeds:
        notes.append(f"{s.seeds} seed{'s' if s.seeds > 1 else ''}")
    return Cell(text, ", ".join(notes), mean)


def _is_share(column: str) -> bool:
    return column in _SHARES or column.startswith(("task_", "class_"))


def _digits(value: float, *, like: float) -> str:
    """Three decimals of a small number, fewer of a large one. The size of `like` decides how many."""
    size = abs(like)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def _heading(column: str) -> str:
    part, _, rest = column.partition("_")
    if part in ("task", "class"):
        name, _, kind = rest.rpartition("_")
        return f"{name.replace('_', ' ')}, {CONTEXTS[kind]}" if kind in CONTEXTS else rest.replace("_", " ")
    return HEADINGS.get(column, column.replace("_", " "))


def _short(column: str) -> str:
    return _heading(column).partition(",")[0]


def _values(summaries: Mapping[str, SeedSummary], columns: Sequence[str]) -> dict[str, Value]:
    found = {}
    for column in columns:
        s = summaries[column]
        if s.mean is not None:
            ends = (None if s.low is None else max(0.0, s.low), None if s.high is None else min(1.0, s.high))
            found[_short(column)] = percent(s.mean, *ends)
    return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _all_numbers(texts: Sequence[str]) -> bool:
    try:
        return all(float(t) == float(t) for t in texts)
    except ValueError:
        return False
