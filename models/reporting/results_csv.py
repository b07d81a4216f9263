"""Reads the tables of models/experiments/results, with a row for each system and seed, and summarises them over seeds.

A report must not be drawn from half a table. So a cell that is not a number, a row with too few cells, or a seed that stands
twice raises an error that names file, row and column. A blank cell is a value that was not measured. It stays blank.

`rows_csv` writes such a table. `curves_csv` writes training.csv, the curves of training runs, from metrics files
(models/training/curves.py).
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.evaluation.t_interval import t_interval
from models.io_utils import source_commit
from models.reporting.systems import names_of

ORIGIN_COLUMNS = ("torch", "commit", "date")
_RUN_COLUMNS = ("system", "label", "seed", "step")


class ResultsError(ValueError):
    """A results file cannot be used. The message names file, row and column."""


@dataclass(frozen=True)
class ResultsTable:
    """One CSV file as it is: `name` is its file name, the rows are dictionaries of text."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]

    def number(self, index: int, column: str) -> float | None:
        """The finite number in a cell. None where the cell is blank or the table has no such column.

        Raises:
            ResultsError: the cell holds something else.
        """
        text = (self.rows[index].get(column) or "").strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ResultsError(f"{self.name}: row {index + 2}, column {column}: expected a finite number, got {text!r}")
        return value

    def numeric(self, column: str) -> bool:
        """Whether the column holds only numbers and blanks, and at least one number."""
        found = False
        for row in self.rows:
            if row[column].strip():
                try:
                    found = math.isfinite(float(row[column]))
                except ValueError:
                    return False
                if not found:
                    return False
        return found

    def need(self, *columns: str) -> None:
        """Raises ResultsError if one of these columns is missing."""
        absent = [c for c in columns if c not in self.columns]
        if absent:
            raise ResultsError(f"{self.name}: expected columns {list(columns)}, got none called {absent}")

    def origin(self) -> str:
        """Which torch, commit and date the rows come from, as a part of a sentence; "" where the table does not say."""
        parts = []
        for column in ORIGIN_COLUMNS:
            values = sorted({row[column] for row in self.rows if row.get(column)})
            if values:
                parts.append(", ".join(values) if column == "date" else f"{column} {', '.join(values)}")
        return "; ".join(parts)


@dataclass(frozen=True)
class SeedSummary:
    """A number over seeds.

    Args:
        mean: over the seeds that have a value; None where no seed has one.
        deviation: standard deviation over seeds (n - 1 in the denominator); None for fewer than two seeds.
        low, high: 95% t interval over seeds. With one seed it is the interval over clips that the file gives.
        seeds: how many seeds have a value.
    """

    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None
    seeds: int


def read_results(path: str | Path) -> ResultsTable:
    """Read one CSV.

    Raises:
        ResultsError: the file cannot be read, holds no row, or holds a column twice or a row of another width.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path.name}: not readable: {getattr(error, 'strerror', None) or error}") from error
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
    except csv.Error as error:
        raise ResultsError(f"{path.name}: expected comma-separated values: {error}") from error
    if len(lines) < 2:
        raise ResultsError(f"{path.name}: expected a header and at least one row, got {len(lines)} lines")
    columns = lines[0]
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        raise ResultsError(f"{path.name}: expected each column once, got {twice} twice")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(columns):
            raise ResultsError(f"{path.name}: row {number}: expected {len(columns)} cells, got {len(line)}")
    return ResultsTable(path.name, tuple(columns), tuple(dict(zip(columns, line, strict=True)) for line in lines[1:]))


def summarize_seeds(values: Iterable[float | None], interval: tuple[float | None, float | None] = (None, None)) -> SeedSummary:
    """Mean, spread and 95% t interval over seeds.

    Args:
        values: one for each seed; None is not counted.
        interval: the interval to use for a single seed, which has no spread.
    """
    kept = [v for v in values if v is not None]
    if not kept:
        return SeedSummary(None, None, None, None, 0)
    if len(kept) == 1:
        return SeedSummary(kept[0], None, *interval, 1)
    found = t_interval(kept)
    ends = (found.low, found.high) if found.is_known else (None, None)
    return SeedSummary(found.mean, statistics.stdev(kept), *ends, len(kept))


def over_seeds(
    table: ResultsTable, columns: Sequence[str], *, by: Sequence[str] = ("system",)
) -> dict[tuple[str, ...], dict[str, SeedSummary]]:
    """`summarize_seeds` of each column, for each group of rows that agree in the columns `by`. Groups keep the order of the file.

    Where a group has one row and the file has `<column>_low` and `<column>_high`, these are its interval.

    Raises:
        ResultsError: a cell is not a number, or a seed stands twice in a group.
    """
    table.need(*by, "seed")
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(table.rows):
        groups.setdefault(tuple(row[c] for c in by), []).append(i)
    result = {}
    for key, indices in groups.items():
        seen: dict[str, int] = {}
        for i in indices:
            seed = table.rows[i]["seed"]
            if seed in seen:
                group = ", ".join(key)
                raise ResultsError(
                    f"{table.name}: row {i + 2}: expected each seed of {group} once, got seed {seed} in row {seen[seed]} too"
                )
            seen[seed] = i + 2
        result[key] = {
            c: summarize_seeds(
                [table.number(i, c) for i in indices],
                (table.number(indices[0], f"{c}_low"), table.number(indices[0], f"{c}_high")),
            )
            for c in columns
        }
    return result


def labels(table: ResultsTable) -> dict[str, str]:
    """System -> its name: that of the common table (models/reporting/systems.py), else its label, else the system itself."""
    return names_of({row["system"]: row.get("label") or row["system"] for row in table.rows})


def rows_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a table: fractions to four places, a column for each key of any row, and the origin of the rows."""
    import torch

    origin = dict(zip(ORIGIN_COLUMNS, (torch.__version__, source_commit(), datetime.date.today().isoformat()), strict=True))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *origin], restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} | origin)
    return text.getvalue()


def curves_csv(runs: Mapping[tuple[str, str, int], Sequence[Mapping[str, Any]]]) -> str:
    """The text of training.csv.

    Args:
        runs: (system, label, seed) -> lines of its metrics file.
    """
    columns = list(dict.fromkeys(name for lines in runs.values() for line in lines for name in line if name != "step"))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_RUN_COLUMNS, *columns], restval="", lineterminator="\n")
    writer.writeheader()
    for (system, label, seed), lines in runs.items():
        for line in lines:
            shown = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()}
            writer.writerow({"system": system, "label": label, "seed": seed} | shown)
    return text.getvalue()


def read_curves(table: ResultsTable) -> dict[str, list[dict[str, float]]]:
    """Label -> lines of its metrics, from a table that `curves_csv` wrote. Each step is a mean over seeds."""
    table.need(*_RUN_COLUMNS)
    names = labels(table)
    metrics = [c for c in table.columns if c not in (*_RUN_COLUMNS, *ORIGIN_COLUMNS)]
    curves: dict[str, list[dict[str, float]]] = {}
    for (system, step), summaries in over_seeds(table, metrics, by=("system", "step")).items():
        line = {name: s.mean for name, s in summaries.items() if s.mean is not None}
        try:
            line["step"] = int(step)
        except ValueError:
            raise ResultsError(f"{table.name}: system {system}: expected a whole number of steps, got {step!r}") from None
        curves.setdefault(names[system], []).append(line)
    return {label: sorted(lines, key=lambda line: line["step"]) for label, lines in curves.items()}
