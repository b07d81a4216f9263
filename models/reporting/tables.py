"""The parts of a report: tables, cells and sections. Both templates, HTML and Markdown, show the same parts."""

from __future__ import annotations

from dataclasses import dataclass

from models.evaluation.scoring import Estimate
from models.reporting.figures import Figure

NOTHING = "–"
CONTEXTS = {"neutral": "no hint", "aligned": "true hint", "conflict": "false hint", "irrelevant": "irrelevant text"}


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
    """

    text: str
    note: str = ""
    value: float | None = None
    mark: str = ""


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


def estimate_cell(estimate: Estimate | None, *, brief: bool = False) -> Cell:
    """A share with its interval and its number of answers below it; a brief cell has the share alone."""
    if estimate is None or estimate.value is None:
        return Cell(NOTHING)
    note = "" if brief else f"{estimate.low:.3f} to {estimate.high:.3f}, n {estimate.count}"
    return Cell(f"{estimate.value:.3f}", note, estimate.value)


def difference_cell(estimate: Estimate | None) -> Cell:
    """A difference with its sign, and its interval below it."""
    if estimate is None or estimate.value is None:
        return Cell(NOTHING)
    notes = [] if estimate.low is None or estimate.high is None else [f"{estimate.low:+.3f} to {estimate.high:+.3f}"]
    notes += [f"n {estimate.count}"] if estimate.count else []
    return Cell(f"{estimate.value:+.3f}".replace("-", "−"), ", ".join(notes).replace("-", "−"), estimate.value)
