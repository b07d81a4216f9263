"""The endpoints of a study (docs/protocol.md), as a study's file of endpoints has them: verdicts, and a table.

An endpoint holds where both units of inference exclude its bound after Holm's correction: the t interval over teachers, and the
bootstrap over teachers and actors. The file says whether it does. P3 is asked on clips that are loud enough to be heard, which
study.csv does not tell apart. So a verdict on it comes from here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from models.reporting.headline import BEGINNINGS, Claim, Verdict
from models.reporting.results_csv import ResultsTable
from models.reporting.systems import system_key, system_name
from models.reporting.tables import NOTHING, Cell, Column, Table, points

# Endpoint -> the context that it is asked in, and how its sentence begins.
ENDPOINTS = {
    "P1": ("neutral", BEGINNINGS["neutral"]),
    "P2": ("conflict", BEGINNINGS["conflict"]),
    "P3": ("aligned", f"{BEGINNINGS['aligned']}, on clips above −8 dB"),
}
_COLUMNS = ("name", "first", "second", "teachers", "actors", "difference", "t_low", "t_high", "p_holm", "actors_low",
            "actors_high", "bound", "verdict")  # fmt: skip
_FILE = re.compile(r"study_endpoints(?:_(\w+))?\.csv")


def endpoints_of(name: str) -> str | None:
    """The experiment of a file of endpoints: "" of study_endpoints.csv, "E2" of study_endpoints_E2.csv. None = another file."""
    match = _FILE.fullmatch(name)
    return None if match is None else match[1] or ""


class Endpoints:
    """The rows of a file of endpoints, and the file itself as `source`.

    Raises:
        ResultsError: a column is missing, or a cell is not a number.
    """

    def __init__(self, table: ResultsTable) -> None:
        table.need(*_COLUMNS)
        self.source = table
        numbers = [c for c in _COLUMNS if c not in ("name", "first", "second", "verdict")]
        self._rows = [
            {**row, **{column: table.number(i, column) for column in numbers}} for i, row in enumerate(table.rows)
        ]

    def verdict(self, claim: Claim, called: Callable[[str], str] = system_name) -> Verdict | None:
        """What the file says about a claim; None where it does not have it."""
        for row in self._rows:
            context, beginning = ENDPOINTS.get(row["name"], ("", ""))
            pair = (system_key(row["first"]), system_key(row["second"]))
            if (*pair, context) == (system_key(claim.better), system_key(claim.worse), claim.context):
                return _verdict(row, beginning, called(claim.better), called(claim.worse))
        return None

    def table(self, caption: str) -> Table:
        """All endpoints: a row for each pair of systems and endpoint."""
        columns = ("comparison", "endpoint", "difference, points", "95% over teachers", "95% over teachers and actors",
                   "Holm's p", "teachers, actors", "verdict")  # fmt: skip
        rows = []
        for row in self._rows:
            cells = (
                Cell(row["name"]),
                Cell(points(row["difference"]), value=100 * row["difference"]),
                Cell(_ends(row, "t") or NOTHING),
                Cell(_ends(row, "actors") or NOTHING),
                Cell(NOTHING if row["t_low"] is None else f"{row['p_holm']:.3f}"),
                Cell(f"{row['teachers']:.0f}, {row['actors']:.0f}"),
                Cell(row["verdict"]),
            )
            rows.append((f"{system_name(row['first'])} minus {system_name(row['second'])}", cells))
        return Table(caption, tuple(map(Column, columns)), tuple(rows))


def _verdict(row: Mapping, beginning: str, better: str, worse: str) -> Verdict:
    margin = -100 * row["bound"]
    relation = f"at most {margin:g} point behind {worse}" if margin else f"ahead of {worse}"
    over = _ends(row, "t")
    said = [f"95% over teachers {over}" if over else "no t interval"]
    said.append(f"over teachers and actors {_ends(row, 'actors')}")
    if over:
        said.append(f"Holm's p {row['p_holm']:.3f}")
    said.append(f"{_count(row['teachers'], 'teacher')}, {_count(row['actors'], 'actor')}")
    sentence = f"{beginning}, {better} is {relation}: {points(row['difference'])} points ({'; '.join(said)})."
    if row["verdict"] == "holds":
        return Verdict("Holds", sentence)
    if row["verdict"] == "the opposite holds":
        return Verdict("Does not hold" if margin else "The opposite holds", sentence)
    if row["verdict"] != "failed":
        return Verdict("Not decided", f"{sentence[:-1]}; {row['verdict']}.")
    return Verdict("Failed", sentence)


def _ends(row: Mapping, unit: str) -> str:
    low, high = row[f"{unit}_low"], row[f"{unit}_high"]
    return "" if low is None or high is None else f"{points(low)} to {points(high)}"


def _count(number: float, word: str) -> str:
    return f"{number:.0f} {word}{'' if number == 1 else 's'}"
