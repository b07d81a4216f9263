"""The section of a study: study.csv in long form, with several teachers, tasks and contexts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from models.reporting.figures import Figure, Value, draw_intervals, percent
from models.reporting.headline import Headline, LongScores, Score, long_headline
from models.reporting.results_csv import ResultsTable
from models.reporting.systems import CONTEXTS, Palette, system_name
from models.reporting.tables import NOTHING, Cell, Column, Section, Table, narrow, points, share_cell

STUDY_FILE = "study.csv"
EXTERNAL = "external-"  # begins the teacher's name in rows about other games, which are no part of the study's own scores
_COLUMNS = ("teacher", "seed", "system", "task", "context", "accuracy")
_PARTS = ("category", "task", "teacher")


def study_section(table: ResultsTable, palette: Palette) -> tuple[Section, Headline | None]:
    """The section and the headline of a study.

    Raises:
        ResultsError: a column is missing, or a row cannot be used.
    """
    table.need(*_COLUMNS)
    table = dataclasses.replace(table, rows=tuple(row for row in table.rows if not row["teacher"].startswith(EXTERNAL)))
    scores = LongScores(table.rows, name=table.name)
    headline = long_headline(scores, palette=palette)
    rows = {system_name(system): {c: scores.score(system, c) for c in scores.contexts} for system in scores.systems}
    blocks: list[Table | Figure] = []
    if headline:
        blocks = [
            _score_table("All systems: accuracy in %, 95% intervals below.", rows, scores.contexts),
            draw_intervals(
                "study", {label: _values(of) for label, of in rows.items()}, xlabel="accuracy, %", palette=palette,
                caption="Accuracy by context. The bars are the intervals of the table.",
            ),
            *_differences(scores, palette),
            *_parts(table, scores),
        ]  # fmt: skip
    notes = [
        "Each task counts the same within a run, and each teacher the same in the mean. A teacher of another fold is another "
        "teacher. The intervals are Student's t over teachers, or over seeds where there is one teacher. They are not over "
        "actors, and they are not corrected for several claims.",
    ]
    if origin := table.origin():
        notes.append(f"From {table.name}: {origin}.")
    return Section("Study", tuple(notes), tuple(blocks)), headline


def _score_table(caption: str, rows: dict[str, dict[str, Score | None]], contexts: Sequence[str]) -> Table:
    columns = (Column("system"), *(Column(CONTEXTS[c]) for c in contexts))
    return Table(caption, columns, tuple((label, tuple(_cell(of[c]) for c in contexts)) for label, of in rows.items()))


def _cell(score: Score | None) -> Cell:
    return Cell(NOTHING) if score is None else share_cell(score.value, score.low, score.high)


def _values(of: dict[str, Score | None]) -> dict[str, Value]:
    return {CONTEXTS[c]: percent(*score[:3]) for c, score in of.items() if score is not None}


def _differences(scores: LongScores, palette: Palette) -> list[Table | Figure]:
    """Every other system against standard KD."""
    if "kd" not in scores.systems:
        return []
    found = {
        system: {c: d for c in scores.contexts if (d := scores.difference(system, "kd", c)) is not None}
        for system in scores.systems
        if system != "kd"
    }
    found = {system: of for system, of in found.items() if of}
    if not found:
        return []
    columns = (Column("system"), *(Column(CONTEXTS[c]) for c in scores.contexts))
    rows = tuple(
        (system_name(system), tuple(_difference_cell(of.get(c)) for c in scores.contexts)) for system, of in found.items()
    )
    table = Table("Difference to standard KD in points, with 95% interval.", columns, rows)
    figure = draw_intervals(
        "study-differences", {system_name(system): _values(of) for system, of in found.items()}, xlabel="points",
        limits=None, palette=palette, caption="Difference to standard KD. Right of 0 the system is better.",
    )  # fmt: skip
    return [table, figure]


def _difference_cell(score: Score | None) -> Cell:
    if score is None:
        return Cell(NOTHING)
    note = "" if score.low is None else f"{points(score.low)} to {points(score.high)}"
    return Cell(points(score.value), note, 100 * score.value)


def _parts(table: ResultsTable, scores: LongScores) -> list[Table]:
    """Folded tables by category, task and teacher, one for each context; none for a part that has one value."""
    tables = []
    folds = {row.get("fold", "") for row in table.rows}
    for part in _PARTS:
        of_value: dict[str, list[Mapping[str, str]]] = {}
        for row in table.rows if part in table.columns else ():
            value = row[part].replace("_", " ")
            of_value.setdefault(f"fold {row['fold']}, {value}" if part == "teacher" and len(folds) > 1 else value, []).append(row)
        if len(of_value) < 2:
            continue
        by_value = {value: LongScores(rows, name=table.name) for value, rows in of_value.items()}
        for context in scores.contexts:
            rows = []
            for system in scores.systems:
                found = (of.score(system, context) for of in by_value.values())
                rows.append((system_name(system), tuple(Cell(NOTHING) if s is None else share_cell(s.value) for s in found)))
            caption = f"By {part}, {CONTEXTS[context]}: accuracy in %."
            columns = (Column("system"), *(Column(value or NOTHING) for value in by_value))
            tables += narrow(Table(caption, columns, tuple(rows), folded=True))
    return tables
