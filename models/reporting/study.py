"""The sections of a study: study.csv in long form, with several teachers, tasks and contexts, and the files beside it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from models.reporting.endpoints import Endpoints, endpoints_of
from models.reporting.figures import Figure, Value, draw_frontier, draw_intervals, draw_lines, frontier, percent
from models.reporting.headline import Headline, LongScores, Score, Verdict, long_headline, over_runs
from models.reporting.results_csv import ResultsError, ResultsTable
from models.reporting.systems import CONTEXTS, Palette, context_key, system_key, system_name
from models.reporting.tables import NOTHING, Cell, Column, Section, Table, narrow, points, share_cell

STUDY_FILE = "study.csv"
DEV_FILE = "study_dev.csv"
STEPS_FILE = "study_steps.csv"
_CURVES_FILE = re.compile(r"study_curves(?:_(\w+))?\.csv")  # study_curves_E3.csv has a row for each task
EXTERNAL = "external-"  # begins the teacher's name in rows about other games, which are no part of the study's own scores
_COLUMNS = ("teacher", "seed", "system", "task", "context", "accuracy")
_PARTS = ("category", "task", "teacher")
AXES = "axes"  # the experiment beyond the papers
_EXPERIMENT = re.compile(rf"(E\d+[A-Z]?|{AXES})-")  # how the names of the teachers of all experiments but the first begin
_FEW = 5  # systems that a headline shows
_ENOUGH = 3  # teachers that an axis needs (docs/protocol.md)


def study_sections(tables: dict[str, ResultsTable], palette: Palette) -> tuple[list[Section], Headline | None]:
    """The sections of a study and the headline of its first experiment. The files that they show are taken out of `tables`.

    Raises:
        ResultsError: a column is missing, or a row cannot be used.
    """
    sections, headline = [], None
    if STUDY_FILE in tables:
        table = tables.pop(STUDY_FILE)
        table.need(*_COLUMNS)
        found = {name: e for name in list(tables) if (e := endpoints_of(name)) is not None}
        tested = {experiment: Endpoints(tables.pop(name)) for name, experiment in found.items()}
        experiments: dict[str, list[Mapping[str, str]]] = {}
        for row in table.rows:
            if row["teacher"].startswith(EXTERNAL):
                continue
            match = _EXPERIMENT.match(row["teacher"])
            experiments.setdefault(match[1] if match else "", []).append(row)
        for experiment in sorted(experiments):
            section, of_it = _experiment(table, experiments[experiment], experiment, tested, palette)
            sections.append(section)
            if headline is None:
                headline = of_it
            elif of_it is not None and of_it.verdicts:
                headline = dataclasses.replace(headline, notes=(*headline.notes, _in_short(section.title, of_it.verdicts)))
    curves = [tables.pop(name) for name in sorted(tables) if _CURVES_FILE.fullmatch(name)]
    if DEV_FILE in tables or STEPS_FILE in tables or curves:
        sections.append(_on_dev(tables.pop(DEV_FILE, None), curves, tables.pop(STEPS_FILE, None), palette))
    return sections, headline


def _in_short(title: str, verdicts: Sequence[Verdict]) -> str:
    """How often each verdict stands in a section that is folded."""
    count = Counter(v.word for v in verdicts)
    return f"{title}, folded below: " + ", ".join(f"{word[0].lower() + word[1:]} {n}" for word, n in count.items()) + "."


def _experiment(
    table: ResultsTable, own: Sequence[Mapping[str, str]], experiment: str, tested: Mapping[str, Endpoints], palette: Palette
) -> tuple[Section, Headline | None]:
    """The section of one experiment, whose rows are `own`, and its headline."""
    scores = LongScores(own, name=table.name)
    endpoints = tested.get(experiment)
    headline = long_headline(scores, palette=palette, tested=None if endpoints is None else endpoints.verdict)
    rows = {system_name(system): {c: scores.score(system, c) for c in scores.contexts} for system in scores.systems}
    stem = f"study-{experiment.lower()}" if experiment else "study"
    blocks: list[Table | Figure] = []
    if headline:
        blocks = [
            _score_table("All systems: accuracy in %, 95% intervals below.", rows, scores.contexts),
            draw_intervals(
                stem, {label: _values(of) for label, of in rows.items()}, xlabel="accuracy, %", palette=palette,
                caption="Accuracy by context. The bars are the intervals of the table.",
            ),
            *_frontier(own, table.name, stem, palette),
            *_differences(scores, palette, stem),
        ]  # fmt: skip
    if endpoints is not None:
        caption = "Endpoints of the protocol. P1: no hint, P2: false hint, P3: true hint on clips above −8 dB (bound −1 point)."
        blocks.append(endpoints.table(caption))
    blocks += _parts(table, own, scores)
    notes = [
        "Each task counts the same within a run, and each teacher the same in the mean. A teacher of another fold is another "
        "teacher. The intervals are Student's t over teachers, or over seeds where there is one teacher. "
        "But for those of the endpoints they are not over actors, and they are not corrected for several claims.",
    ]
    if headline and experiment == AXES:  # its question is not CAAD against KD; the endpoints are its verdicts
        headline = dataclasses.replace(headline, verdicts=())
    if experiment and headline:
        notes = [*(f"{v.word}. {v.sentence}" for v in headline.verdicts), *notes]
    shown = [table, *([] if endpoints is None else [endpoints.source])]
    notes += [f"From {source.name}: {origin}." for source in shown if (origin := source.origin())]
    return Section(f"Study {experiment}".strip(), tuple(notes), tuple(blocks)), headline


def _frontier(own: Sequence[Mapping[str, str]], name: str, stem: str, palette: Palette) -> list[Figure | Table]:
    """Where there are more systems than a headline shows: all of them, on the teachers that they share."""
    kept, left_out = _on_shared_teachers(own)
    scores = LongScores(kept, name=name)
    placed = {}
    for system in scores.systems:
        x, y = (scores.score(system, context) for context in ("aligned", "conflict"))
        if x is not None and y is not None:
            placed[system_name(system)] = (100 * x.value, 100 * y.value)
    if len(placed) <= _FEW:
        return []
    count = scores.count("teachers")
    caption = (
        f"Systems over the {count} teacher{'' if count == 1 else 's'} that all of them have. Where the line bends, no other "
        "system is ahead under both texts. It has no intervals: near points may differ by chance."
    )
    if left_out:
        caption += f" Left out, since they have fewer than {_ENOUGH} teachers: {', '.join(map(system_name, left_out))}."
    figure = draw_frontier(
        f"{stem}-frontier", placed, xlabel="accuracy under a true (faithful) hint, %",
        ylabel="accuracy under a false (adversarial) hint, %", palette=palette, caption=caption,
    )  # fmt: skip
    best = frontier(placed)
    rows = tuple(
        (system, (Cell(f"{x:.1f}", value=x), Cell(f"{y:.1f}", value=y), Cell("yes" if system in best else "")))
        for system, (x, y) in sorted(placed.items(), key=lambda item: -item[1][1])
    )
    columns = (Column("system"), Column(CONTEXTS["aligned"]), Column(CONTEXTS["conflict"]), Column("no other ahead in both"))
    return [figure, Table("The points of the plot above: accuracy in %.", columns, rows, folded=True)]


def _on_shared_teachers(own: Sequence[Mapping[str, str]]) -> tuple[list[Mapping[str, str]], list[str]]:
    """The rows of the teachers that all systems share, and the systems that are left out for that.

    A comparison of systems by other teachers would be one of teachers. First the systems are left out that have too few teachers:
    they have only begun. Then the teachers that lack one of the others are left out.
    """
    taught: dict[str, set[tuple[str, str]]] = {}
    for row in own:
        taught.setdefault(system_key(row["system"]), set()).add((row.get("fold", ""), row["teacher"]))
    enough = min(_ENOUGH, max(map(len, taught.values())))
    systems = [system for system, teachers in taught.items() if len(teachers) >= enough]
    shared = set.intersection(*(taught[system] for system in systems))
    if not shared:  # no teacher has all of them: those of the one that has the most
        every = sorted(set().union(*taught.values()))
        shared = {max(every, key=lambda teacher: sum(teacher in teachers for teachers in taught.values()))}
        systems = [system for system, teachers in taught.items() if shared <= teachers]
    kept = [r for r in own if system_key(r["system"]) in systems and (r.get("fold", ""), r["teacher"]) in shared]
    return kept, [system for system in taught if system not in systems]


def _on_dev(
    dev: ResultsTable | None, curves: Sequence[ResultsTable], steps: ResultsTable | None, palette: Palette
) -> Section:
    """What was asked on dev, where settings are chosen: the tries of KD and CAAD, their curves over steps, and the numbers of
    steps that were tried."""
    blocks: list[Table | Figure] = []
    notes = ["Dev alone chooses the settings; nothing here is a result."]
    if dev is not None or curves:
        notes.append("The settings and the curves have one teacher, and the dev actors of one fold.")
    if dev is not None:
        dev.need("family", "try", "settings", "mean", "chosen")
        contexts = [c for c in ("none", "faithful", "adversarial", "irrelevant") if c in dev.columns]
        rows = []
        for i, row in enumerate(dev.rows):
            shares = [share_cell(dev.number(i, c)) for c in (*contexts, "mean")]
            rows.append((f"{row['family']}: {row['settings']}", (*shares, Cell(row["chosen"]))))
        columns = [Column("setting"), *(Column(CONTEXTS[context_key(c)]) for c in contexts), Column("mean"), Column("chosen")]
        blocks.append(Table("Settings that were tried: accuracy on dev in %.", tuple(columns), tuple(rows)))
    if curves:
        blocks += [_curves(table, palette) for table in curves]
        notes.append("The learning rate of the curves falls over all their steps. Their middle is not the student of the study.")
    if steps is not None:
        blocks.append(_steps(steps, palette))
    for table in (dev, *curves, steps):
        if table is not None and (origin := table.origin()):
            notes.append(f"From {table.name}: {origin}.")
    return Section("Study: settings and curves on dev", tuple(notes), tuple(blocks))


def _curves(table: ResultsTable, palette: Palette) -> Figure:
    """Accuracy over steps, a panel for each context."""
    table.need("teacher", "system", "step", "context", "accuracy", "items")
    if len({(row["teacher"], row.get("seed", "")) for row in table.rows}) > 1:
        raise ResultsError(f"{table.name}: expected the curves of one teacher and seed, got several")
    panels: dict[str, dict[str, dict[float, Value]]] = {}
    for i, row in enumerate(table.rows):
        task = f"{row['task'].replace('_', ' ')}, " if row.get("task") else ""
        panel = panels.setdefault(f"{task}{CONTEXTS[context_key(row['context'])]}, % right", {})
        accuracy, step = table.number(i, "accuracy"), table.number(i, "step")
        if accuracy is not None and step is not None:
            panel.setdefault(system_name(row["system"]), {})[step] = percent(accuracy)
    items = sorted({int(row["items"]) for row in table.rows})
    experiment = _CURVES_FILE.fullmatch(table.name)[1]
    caption = f"Accuracy on dev over steps of one training. A point has {' or '.join(map(str, items))} questions and no interval."
    caption += f" These are students of {experiment}." if experiment else ""
    stem = "study-curves" + (f"-{experiment.lower()}" if experiment else "")
    return draw_lines(stem, panels, xlabel="step", caption=caption, palette=palette)


def _steps(table: ResultsTable, palette: Palette) -> Figure:
    """Accuracy by the number of steps, a panel for each context."""
    table.need("teacher", "system", "steps", "context", "accuracy")
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for i, row in enumerate(table.rows):
        accuracy, steps = table.number(i, "accuracy"), table.number(i, "steps")
        if accuracy is not None and steps is not None:
            panel = found.setdefault(f"{CONTEXTS[context_key(row['context'])]}, % right", {})
            panel.setdefault(system_name(row["system"]), {}).setdefault(steps, []).append(accuracy)
    panels = {
        title: {system: {steps: _over_teachers(values) for steps, values in of.items()} for system, of in panel.items()}
        for title, panel in found.items()
    }
    count = len({row["teacher"] for row in table.rows})
    caption = f"Accuracy on dev by the number of steps, mean and 95% t interval over {count} teachers. Each point is a training."
    return draw_lines("study-steps", panels, xlabel="steps", caption=caption, palette=palette)


def _over_teachers(values: Sequence[float]) -> Value:
    found = over_runs([[value] for value in values])
    assert found is not None  # there is at least one
    return percent(*found[:3])


def _score_table(caption: str, rows: dict[str, dict[str, Score | None]], contexts: Sequence[str]) -> Table:
    columns = (Column("system"), *(Column(CONTEXTS[c]) for c in contexts))
    return Table(caption, columns, tuple((label, tuple(_cell(of[c]) for c in contexts)) for label, of in rows.items()))


def _cell(score: Score | None) -> Cell:
    return Cell(NOTHING) if score is None else share_cell(score.value, score.low, score.high)


def _values(of: dict[str, Score | None]) -> dict[str, Value]:
    return {CONTEXTS[c]: percent(*score[:3]) for c, score in of.items() if score is not None}


def _differences(scores: LongScores, palette: Palette, stem: str) -> list[Table | Figure]:
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
        f"{stem}-differences", {system_name(system): _values(of) for system, of in found.items()}, xlabel="points",
        limits=None, palette=palette, caption="Difference to standard KD. Right of 0 the system is better.",
    )  # fmt: skip
    return [table, figure]


def _difference_cell(score: Score | None) -> Cell:
    if score is None:
        return Cell(NOTHING)
    note = "" if score.low is None else f"{points(score.low)} to {points(score.high)}"
    return Cell(points(score.value), note, 100 * score.value)


def _parts(table: ResultsTable, own: Sequence[Mapping[str, str]], scores: LongScores) -> list[Table]:
    """Folded tables by category, task and teacher, one for each context; none for a part that has one value."""
    tables = []
    folds = {row.get("fold", "") for row in own}
    for part in _PARTS:
        of_value: dict[str, list[Mapping[str, str]]] = {}
        for row in own if part in table.columns else ():
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
