"""The headline of a report: one table of the main systems, one plot, and a verdict for each claim.

Accuracies come in long form: a row for each teacher, seed, system, task and context, as a study's CSV has them. Tasks have the
same weight within a run, runs within a teacher, and teachers within the mean. The 95% intervals are Student's t over teachers.
With one teacher they are over the seeds of its students. A difference of two systems is taken within teacher, seed and task.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from models.evaluation.t_interval import t_interval
from models.reporting.figures import Figure, draw_trade_off, percent
from models.reporting.results_csv import ResultsError
from models.reporting.systems import CONTEXTS, Palette, context_key, in_order, main_systems, system_key, system_name
from models.reporting.tables import NOTHING, Cell, Column, Table, points, share_cell, with_best


class Score(NamedTuple):
    """A share, or a difference of two.

    Args:
        value, low, high: the share and its 95% interval, from 0 to 1; no ends = no interval.
        over: what the interval is over, as a reader is told ("8 teachers").
    """

    value: float
    low: float | None = None
    high: float | None = None
    over: str = ""


class Claim(NamedTuple):
    """What is expected: `better` is ahead of `worse` in a context, or behind by `margin` at most."""

    better: str
    worse: str
    context: str
    margin: float = 0.0


class Verdict(NamedTuple):
    """What the numbers say about a claim: a word or two, and a sentence."""

    word: str
    sentence: str


@dataclass(frozen=True)
class Headline:
    """What a report says first."""

    verdicts: tuple[Verdict, ...]
    table: Table
    figure: Figure | None
    notes: tuple[str, ...]


Difference = Callable[[str, str, str], "Score | None"]
Tested = Callable[[Claim, Callable[[str], str]], "Verdict | None"]
# The first three are the endpoints of the study; the others compare with what else could do the same.
_AGAINST_KD = (("neutral", 0.0), ("conflict", 0.0), ("aligned", 0.01))
_AGAINST_OTHERS = (
    ("hint_stripped", "neutral"), ("hint_stripped", "conflict"), ("ce_true", "conflict"), ("before", "conflict"),
    ("sharpened2", "conflict"),
)  # fmt: skip
_BASELINES = ("hint_stripped", "ce_true")
BEGINNINGS = {
    "neutral": "Without a hint", "aligned": "Under a true hint", "conflict": "Under a false hint",
    "irrelevant": "Beside an irrelevant text",
}  # fmt: skip


class LongScores:
    """Accuracies in long form.

    Args:
        rows: dictionaries with system, context and accuracy (0 to 1, or its text), and where they are known teacher, fold, seed
            and task. A row may have an interval over clips, low and high. A blank accuracy was not measured. Contexts have the
            names of MCR-BENCH (none, faithful, adversarial, irrelevant) or those of this project. A teacher of another fold is
            another teacher.
        name: of the table, for error messages.

    Raises:
        ResultsError: a row lacks a column, is not readable, or stands twice.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, name: str = "rows") -> None:
        # (system, context) -> teacher -> seed -> task -> accuracy
        self._cells: dict[tuple[str, str], dict[tuple[str, str], dict[str, dict[str, float]]]] = {}
        self._ends: dict[tuple[str, str], tuple[float, float]] = {}
        for number, row in enumerate(rows, start=2):
            try:
                system, context = system_key(str(row["system"])), context_key(str(row["context"]))
                text = str(row["accuracy"]).strip()
                if text in ("", "nan"):
                    continue
                accuracy = _share(text)
            except KeyError as error:
                raise ResultsError(f"{name}: row {number}: expected a column {error}") from error
            except ValueError as error:
                raise ResultsError(f"{name}: row {number}: {error}") from error
            fold, name_of_teacher, seed, task = (str(row.get(column, "")) for column in ("fold", "teacher", "seed", "task"))
            teacher = (fold, name_of_teacher)
            tasks = self._cells.setdefault((system, context), {}).setdefault(teacher, {}).setdefault(seed, {})
            if task in tasks:
                raise ResultsError(
                    f"{name}: row {number}: expected each teacher, seed, system, task and context once, got "
                    f"{', '.join(filter(None, (*teacher, seed, system, task, context)))} twice"
                )
            tasks[task] = accuracy
            if row.get("low") and row.get("high"):
                self._ends[system, context] = (float(row["low"]), float(row["high"]))
        self.systems = in_order(system for system, _ in self._cells)
        found = {context for _, context in self._cells}
        self.contexts = [context for context in CONTEXTS if context in found]

    def count(self, part: str) -> int:
        """How many teachers, seeds (at most, of one teacher) or tasks there are."""
        by_teacher: dict[Any, set[str]] = {}
        tasks = set()
        for teachers in self._cells.values():
            for teacher, seeds in teachers.items():
                by_teacher.setdefault(teacher, set()).update(seeds)
                tasks.update(task for of_seed in seeds.values() for task in of_seed)
        return {"teachers": len(by_teacher), "seeds": max(map(len, by_teacher.values()), default=0), "tasks": len(tasks)}[part]

    def score(self, system: str, context: str) -> Score | None:
        """The accuracy of a system in a context."""
        teachers = self._cells.get((system, context), {})
        means = [[statistics.mean(tasks.values()) for tasks in seeds.values()] for seeds in teachers.values()]
        found = over_runs(means)
        if found is None or found.low is None:
            ends = self._ends.get((system, context))
            return found if found is None or ends is None else found._replace(low=ends[0], high=ends[1], over="clips")
        return found._replace(low=max(0.0, found.low), high=min(1.0, found.high))

    def difference(self, system: str, other: str, context: str) -> Score | None:
        """The accuracy of `system` minus that of `other`, on the same teachers, seeds and tasks."""
        mine, theirs = self._cells.get((system, context), {}), self._cells.get((other, context), {})
        pairs = [_paired(mine[teacher], theirs[teacher]) for teacher in mine if teacher in theirs]
        return over_runs([differences for differences in pairs if differences])

    def scores(self) -> dict[str, dict[str, Score]]:
        """System -> context -> accuracy."""
        found = {system: {c: self.score(system, c) for c in self.contexts} for system in self.systems}
        return {system: {c: s for c, s in of.items() if s is not None} for system, of in found.items()}


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"accuracy: expected a share from 0 to 1, got {text}")
    return value


def _paired(mine: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Differences of the runs of two systems, over the tasks that both have. A single run meets each of the other's."""
    if len(theirs) == 1 or len(mine) == 1:
        runs = [(a, b) for a in mine.values() for b in theirs.values()]
    else:
        runs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    shared = [[a[task] - b[task] for task in a if task in b] for a, b in runs]
    return [statistics.mean(differences) for differences in shared if differences]


def over_runs(by_teacher: Sequence[Sequence[float]]) -> Score | None:
    """Mean and t interval over teachers; with one teacher over its runs."""
    if not by_teacher:
        return None
    means = [statistics.mean(runs) for runs in by_teacher]
    over = means if len(means) > 1 else by_teacher[0]
    if len(over) == 1:
        return Score(over[0], over="one run")
    found = t_interval(over)
    ends = (found.low, found.high) if found.is_known else (None, None)
    return Score(found.mean, *ends, f"{len(over)} {'teachers' if len(means) > 1 else 'seeds of one teacher'}")


def long_headline(
    scores: LongScores, *, palette: Palette | None = None, names: Mapping[str, str] | None = None, notes: Sequence[str] = (),
    tested: Tested | None = None,
) -> Headline | None:  # fmt: skip
    """The headline of accuracies in long form.

    Args:
        scores: of a study, or of any table that is brought into its form.
        palette: of the report; None = made for these systems.
        names: system -> name, for systems that the common table does not know.
        notes: sentences to add below.
        tested: as of `make_headline`.
    """
    teachers, tasks, seeds = (scores.count(part) for part in ("teachers", "tasks", "seeds"))
    counts = {"teacher": teachers, "task": tasks, "seed": seeds}
    said = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for word, count in counts.items())
    scope = f"This table has {said} for each teacher at most."
    if teachers == 1:
        scope += " With another teacher the sizes differ, and these intervals do not say by how much."
    return make_headline(
        scores.scores(), scores.difference, palette=palette, names=names, notes=(scope, *notes), stem="headline", tested=tested
    )  # fmt: skip


def make_headline(
    scores: Mapping[str, Mapping[str, Score]],
    difference: Difference,
    *,
    palette: Palette | None = None,
    names: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    reference: str | None = None,
    stem: str = "headline",
    tested: Tested | None = None,
) -> Headline | None:
    """The headline of any scores; None where there are none.

    Args:
        scores: system -> context -> accuracy.
        difference: (system, other, context) -> accuracy of the one minus that of the other.
        reference: the system that others are compared with where the systems of the claims are not there.
        stem: beginning of the names of figures.
        tested: the verdict on a claim that was tested with a correction for several claims, or None. Other claims are judged by
            `difference`.
    """
    scores = {system: of for system, of in scores.items() if of}
    if not scores:
        return None
    palette = palette or Palette(scores)

    def called(system: str) -> str:
        return (names or {}).get(system) or system_name(system)

    made = claims(scores, reference)
    corrected = {claim: found for claim in made if tested is not None and (found := tested(claim, called))}
    verdicts = [v for claim in made if (v := corrected.get(claim) or verdict(claim, difference, called))]
    said = list(notes)
    if corrected:
        said.append(
            "Holm's p is corrected over the three endpoints of the claim against standard KD tuned on dev, and over all other "
            "comparisons together. A claim holds where both intervals are on its side too."
        )
    if (others := len(verdicts) - len(corrected)) and len(verdicts) > 1:
        claimed = f"the other {others} claims" if corrected else f"the {others} claims"
        said.append(f"The intervals are not corrected for {claimed}.")
    known = {system_key(system) for system in scores}
    absent = [system_name(system) for system in _BASELINES if system not in known]
    if "kd" in known and absent:
        said.append(f"Not compared here: {' and '.join(absent)}.")
    return Headline(tuple(verdicts), _table(scores, called), _figure(stem, scores, called, palette), tuple(said))


def claims(scores: Mapping[str, Mapping[str, Score]], reference: str | None = None) -> list[Claim]:
    """The claims about the systems that are there. Without CAAD and KD every other system is compared with `reference`."""
    by_key = {system_key(system): system for system in scores}
    ours = next((by_key[key] for key in ("caad2", "caad1", "caad") if key in by_key), None)
    kd = next((by_key[key] for key in ("kd_tuned", "kd") if key in by_key), None)
    found = []
    if ours and kd:
        found = [Claim(ours, kd, context, margin) for context, margin in _AGAINST_KD]
        found += [Claim(ours, by_key[key], context) for key, context in _AGAINST_OTHERS if key in by_key]
    elif reference in scores:
        others = [system for system in main_systems(scores) if system != reference]
        found = [Claim(other, reference, context) for other in others for context in ("neutral", "conflict")]
    return [c for c in found if c.context in scores[c.better] and c.context in scores[c.worse]]


def verdict(claim: Claim, difference: Difference, called: Callable[[str], str] = system_name) -> Verdict | None:
    """Holds, if the whole interval is on the claim's side of its margin; does not, if it is on the other side.

    Where the interval is not over teachers, the first words say so.

    Returns:
        None where the two systems share nothing.
    """
    found = difference(claim.better, claim.worse, claim.context)
    if found is None:
        return None
    better, worse = called(claim.better), called(claim.worse)
    relation = f"at most {100 * claim.margin:g} point behind {worse}" if claim.margin else f"ahead of {worse}"
    sentence = f"{BEGINNINGS[claim.context]}, {better} is {relation}: {points(found.value)} points"
    if found.low is None or found.high is None or not math.isfinite(found.low + found.high):
        return Verdict("Not decided", f"{sentence} ({found.over or 'one run'}, no interval).")
    sentence += f" (95% {points(found.low)} to {points(found.high)}, {found.over})."
    scope = "" if found.over.endswith(" teachers") else " for this teacher" if found.over.endswith("teacher") else " in this run"
    if found.low > -claim.margin:
        return Verdict(f"Holds{scope}", sentence)
    if found.high < -claim.margin:
        return Verdict(("Does not hold" if claim.margin else "The opposite holds") + scope, sentence)
    return Verdict("Not decided", sentence)


def _table(scores: Mapping[str, Mapping[str, Score]], called: Callable[[str], str]) -> Table:
    shown = main_systems(scores)
    contexts = [c for c in CONTEXTS if any(c in scores[system] for system in shown)]
    rows = []
    for system in shown:
        found = (scores[system].get(context) for context in contexts)
        rows.append((called(system), tuple(Cell(NOTHING) if s is None else share_cell(s.value, s.low, s.high) for s in found)))
    overs = dict.fromkeys(s.over for system in shown for s in scores[system].values() if s.low is not None)
    interval = f" Below them stand 95% intervals over {' or '.join(overs)}." if overs else ""
    caption = f"Accuracy in %, the best of each column in bold.{interval}"
    columns = (Column("system"), *(Column(CONTEXTS[c]) for c in contexts))
    return with_best(Table(caption, columns, tuple(rows)))


def _figure(
    stem: str, scores: Mapping[str, Mapping[str, Score]], called: Callable[[str], str], palette: Palette
) -> Figure | None:
    placed = {
        called(system): (percent(*of["aligned"][:3]), percent(*of["conflict"][:3]))
        for system, of in scores.items()
        if "aligned" in of and "conflict" in of
    }
    if not placed:
        return None
    return draw_trade_off(
        f"{stem}-trade-off", {"": placed}, xlabel="accuracy under a true (faithful) hint, %",
        ylabel="accuracy under a false (adversarial) hint, %", palette=palette,
        caption="What is gained under false hints, and what it costs under true ones. The best corner is the upper right.",
    )  # fmt: skip

