"""The parts of a report: tables, cells and sections. Both templates, HTML and Markdown, show the same parts.

A reader sees shares in %, and differences of shares in points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.evaluation.scoring import Estimate
from models.reporting.figures import Figure

NOTHING = "–"
# What a screen of 1,280 pixels shows beside the names of the rows.
MAX_COLUMNS = 8


@dataclass(frozen=True)
class Column:
    """Heading of a column. `note` stands below it in small print."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        text: what it says.
        note: stands below it in small print.
        value: number to sort by; None = the table sorts by the text.
        mark: "right", "wrong" or "".
        best: it is the best of its column, and stands in bold.
    """

    text: str
    note: str = ""
    value: float | None = None
    mark: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """The first column holds the headings of the rows. A folded table is closed until the reader opens it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, sentences below it, then tables and figures in order."""

    title: str
    notes: tuple[str, ...] = ()
    blocks: tuple[Table | Figure, ...] = ()


def narrow(table: Table) -> list[Table]:
    """The table in parts of at most MAX_COLUMNS columns beside the first. Each part names its rows."""
    columns = table.columns[1:]
    if len(columns) <= MAX_COLUMNS:
        return [table]
    count = -(-len(columns) // MAX_COLUMNS)
    size = -(-len(columns) // count)
    parts = []
    for number in range(count):
        own = slice(number * size, (number + 1) * size)
        caption = f"{table.caption.rstrip('.')}, part {number + 1} of {count}."
        rows = tuple((label, cells[own]) for label, cells in table.rows)
        parts.append(Table(caption, (table.columns[0], *columns[own]), rows, table.folded))
    return parts


def with_best(table: Table) -> Table:
    """Mark the highest cell of each column, by what a reader sees: cells with the same text share the first place."""
    marked = [list(cells) for _, cells in table.rows]
    for place in range(len(table.columns) - 1):
        values = [cells[place].value for cells in marked if cells[place].value is not None]
        best = f"{max(values):.1f}" if len(values) > 1 else None
        for cells in marked:
            value = cells[place].value
            if value is not None and f"{value:.1f}" == best:
                cells[place] = replace(cells[place], best=True)
    rows = tuple((label, tuple(cells)) for (label, _), cells in zip(table.rows, marked, strict=True))
    return replace(table, rows=rows)


def share_cell(mean: float | None, low: float | None = None, high: float | None = None, *, note: str = "") -> Cell:
    """A share in % with its interval below it. `note` follows the interval."""
    if mean is None:
        return Cell(NOTHING)
    notes = [] if low is None or high is None else [f"{100 * low:.1f} to {100 * high:.1f}"]
    return Cell(f"{100 * mean:.1f}", ", ".join([*notes, *([note] if note else [])]), 100 * mean)


def points(value: float) -> str:
    """A difference of shares in points, with its sign: +3.9, −3.1."""
    return f"{100 * value:+.1f}".replace("-", "−")


def estimate_cell(estimate: Estimate | None, *, brief: bool = False) -> Cell:
    """A share in % with its interval and its number of answers below it; a brief cell has the share alone."""
    if estimate is None or estimate.value is None:
        return Cell(NOTHING)
    if brief:
        return share_cell(estimate.value)
    return share_cell(estimate.value, estimate.low, estimate.high, note=f"n {estimate.count}")


def difference_cell(estimate: Estimate | None) -> Cell:
    """A difference in points with its sign, and its interval below it."""
    if estimate is None or estimate.value is None:
        return Cell(NOTHING)
    has_interval = estimate.low is not None and estimate.high is not None
    notes = [f"{points(estimate.low)} to {points(estimate.high)}"] if has_interval else []
    notes += [f"n {estimate.count}"] if estimate.count else []
    return Cell(points(estimate.value), ", ".join(notes), 100 * estimate.value)
