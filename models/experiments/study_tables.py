"""What came out of the study: rows of its tables, packed predictions, and what of a teacher's stages is complete."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.experiments.pipeline import Stage, read_done, stage_folders
from models.experiments.shared_steps import predictions_name
from models.experiments.study_endpoints import MIN_TEACHERS
from models.experiments.study_gate import accuracy, in_study
from models.experiments.study_settings import (
    CONTEXTS,
    EXTERNAL_SOURCES,
    TEACHER_ALPHAS,
    TRIED,
    StudySettings,
    tried_systems,
)
from models.io_utils import atomic_write_text, source_commit

COLUMNS = (
    "teacher", "fold", "seed", "system", "task", "category", "context", "accuracy", "items", "commit", "date",
)  # fmt: skip
PROBE_COLUMNS = (
    "fold", "task", "description", "size", "train", "dev", "test", "balanced_accuracy", "commit", "date",
)  # fmt: skip
STEP_COLUMNS = ("teacher", "system", "steps", "context", "accuracy", "items", "commit", "date")
GATE_COLUMNS = ("teacher", "task", "heard", "shift", "text_effect", "in_study", "weights", "commit", "date")


def finished(settings: StudySettings, stages: Sequence[Stage], root: Path, *, part: str = "test") -> dict[str, list[Any]]:
    """System -> predictions on `part`, of everything of this teacher that is complete."""
    from models.evaluation.predictions import read_predictions

    folders = stage_folders(stages, settings, root)
    found: dict[str, list[Any]] = {}
    if part == "test" and read_done(folders["answers_teacher"]) is not None:
        for alpha in TEACHER_ALPHAS:
            name = "teacher" if alpha is None else f"teacher_cd{alpha:g}"
            found[name] = read_predictions(folders["answers_teacher"] / predictions_name(part, alpha))[1]
    for stage in stages:
        for name, *_ in (stage.extra or {}).get("systems", ()):
            folder = folders[stage.name] / name
            if stage.extra["part"] == part and (folder / "asked.json").exists():
                found[name] = read_predictions(folder / predictions_name(part))[1]
    return {name: [p for p in predictions if not p.control] for name, predictions in found.items()}


def finished_external(settings: StudySettings, stages: Sequence[Stage], root: Path) -> dict[str, dict[str, list[Any]]]:
    """Game -> system -> predictions, of all models of this teacher that were asked about other games."""
    from models.evaluation.predictions import read_predictions

    folders = stage_folders(stages, settings, root)
    files: dict[str, Path] = {}
    if read_done(folders["external_teacher"]) is not None:
        for alpha in TEACHER_ALPHAS:
            name = "teacher" if alpha is None else f"teacher_cd{alpha:g}"
            files[name] = folders["external_teacher"] / predictions_name("test", alpha)
    for stage in stages:
        for name in (stage.extra or {}).get("students", ()):
            if (folders[stage.name] / name / "asked.json").exists():
                files[name] = folders[stage.name] / name / predictions_name("test")
    answers = {system: read_predictions(path)[1] for system, path in files.items()}
    return {
        source: {system: [p for p in own if p.speaker.startswith(f"{source}-")] for system, own in answers.items()}
        for source in EXTERNAL_SOURCES
    }


def table_rows(settings: StudySettings, found: Mapping[str, Sequence[Any]], *, prefix: str = "") -> list[dict[str, Any]]:
    """The rows of study.csv of one teacher: accuracy by system, task and context."""
    from models.data.prompts import TASKS

    origin = row_origin()
    rows = []
    for system, predictions in found.items():
        for task in dict.fromkeys(p.task for p in predictions):
            for kind, context in CONTEXTS.items():
                own = [p for p in predictions if p.task == task and p.kind == kind]
                if own:
                    rows.append(
                        {
                            "teacher": prefix + settings.teacher, "fold": settings.fold, "seed": settings.seed, "system": system,
                            "task": task, "category": TASKS[task].category, "context": context,
                            "accuracy": f"{accuracy(own):.4f}", "items": len(own), **origin,
                        }
                    )  # fmt: skip
    return rows


def row_origin() -> dict[str, str]:
    """Commit and date of a row."""
    return {"commit": source_commit("models", "kdkernels", "csrc"), "date": datetime.date.today().isoformat()}


def merge_rows(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str] = COLUMNS,
    keys: Sequence[str] = ("teacher", "system", "task", "context"),
    values: Sequence[str] = ("accuracy", "items"),
) -> int:
    """Add rows to the CSV, which keeps its other rows. An equal result keeps its commit and date. Returns the number of rows.

    Args:
        keys: the columns that say which row of the file a row replaces.
        values: the columns that make the result.
    """
    held: dict[tuple[str, ...], Mapping[str, Any]] = {tuple(row[name] for name in keys): row for row in read_rows(path)}
    for row in rows:
        key = tuple(str(row[name]) for name in keys)
        if key not in held or any(held[key].get(name) != str(row[name]) for name in values):
            held[key] = row
    _write_csv(path, [held[name] for name in sorted(held, key=lambda k: k[0])], columns)
    return len(held)


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


def replace_teacher(folder: Path, gate: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the gate's rows of one teacher into the tables of `folder`. If the tables have another teacher of the same name (the
    training on another machine rounds differently), its rows and predictions are removed: students of two teachers do not
    compare. Returns a sentence that says so, if it was the case."""
    path, said = folder / "study_gate.csv", []
    name, weights = gate[0]["teacher"], gate[0]["weights"]
    if any(row["teacher"] == name and row.get("weights", "") != weights for row in read_rows(path)):
        rows = read_rows(folder / "study.csv")
        kept = [row for row in rows if row["teacher"] != name]
        if len(kept) < len(rows):
            _write_csv(folder / "study.csv", kept, COLUMNS)
        steps = read_rows(folder / "study_steps.csv")
        if any(row["teacher"] == name for row in steps):
            _write_csv(folder / "study_steps.csv", [row for row in steps if row["teacher"] != name], STEP_COLUMNS)
        for packed in (folder / "study").glob(f"{name}-*.jsonl.gz"):
            packed.unlink()
        _write_csv(path, [row for row in read_rows(path) if row["teacher"] != name], GATE_COLUMNS)
        said = [f"{name} was trained again: {len(rows) - len(kept)} rows of the earlier teacher of this name are removed"]
    merge_rows(path, gate, columns=GATE_COLUMNS, keys=("teacher", "task"), values=("heard", "shift", "text_effect"))
    return said


def pack_all(folder: Path, teacher: str, found: Mapping[str, Sequence[Any]]) -> None:
    """Write the predictions of each system to TEACHER-SYSTEM.jsonl.gz. Scores have three places where that changes no answer."""
    from models.evaluation.predictions import pack_predictions

    def rounded(p: Any) -> Any:
        short = dataclasses.replace(p, scores={choice: round(score, 3) for choice, score in p.scores.items()})
        return short if short.said() == p.said() else p

    for system, predictions in found.items():
        rows = [rounded(p) for p in sorted(predictions, key=lambda p: p.id)]
        pack_predictions(folder / f"{teacher}-{system}.jsonl.gz", {"teacher": teacher, "system": system}, rows)


def dev_rows(found: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows of study_dev.csv: what each try of E5 scores on dev, and the best of each family by the mean of the contexts."""
    words = {s.name: s.words for s in tried_systems()}
    rows: list[dict[str, Any]] = []
    for name, predictions in found.items():
        scores = {c: accuracy([p for p in predictions if p.kind == kind]) for kind, c in CONTEXTS.items()}
        mean = statistics.mean(scores.values())
        settings = " ".join(words[name]) or "as kd and caad2 of the study"
        rows.append({"family": name.split("_")[0], "try": name, "settings": settings} | scores | {"mean": mean, "chosen": ""})
    for family, tries in TRIED.items():
        own = [row for row in rows if row["family"] == family]
        if len(own) == len(tries):
            max(own, key=lambda row: row["mean"])["chosen"] = "yes"
    return rows


def step_rows(settings: StudySettings, found: Mapping[str, Sequence[Any]], *, prefix: str) -> list[dict[str, Any]]:
    """The rows of study_steps.csv of one teacher: accuracy on dev by system, steps and context, the mean over its tasks."""
    rows = []
    for name, predictions in found.items():
        system, steps = name.rsplit("_", 1)
        for kind, context in CONTEXTS.items():
            own = [p for p in predictions if p.kind == kind]
            by_task = [accuracy([p for p in own if p.task == task]) for task in dict.fromkeys(p.task for p in own)]
            row = {"teacher": prefix + settings.teacher, "system": system, "steps": steps, "context": context}
            rows.append(row | {"accuracy": f"{statistics.mean(by_task):.4f}", "items": len(own)} | row_origin())
    return rows


def chosen_steps(rows: Sequence[Mapping[str, str]], tried: Sequence[str]) -> list[str]:
    """Of each system that one of `tried`, such as "kd_60", with the best mean over contexts and teachers in the rows of
    study_steps.csv; with equal ones that of the fewest steps. Empty until all teachers have been asked with all of them."""
    scores: dict[str, list[float]] = {name: [] for name in tried}
    for row in rows:
        scores[f"{row['system']}_{row['steps']}"].append(float(row["accuracy"]))
    if any(len(values) != MIN_TEACHERS * len(CONTEXTS) for values in scores.values()):
        return []
    families = dict.fromkeys(name.rsplit("_", 1)[0] for name in tried)
    own = ([name for name in tried if name.rsplit("_", 1)[0] == family] for family in families)
    return [max(names, key=lambda name: statistics.mean(scores[name])) for names in own]


def gate_rows(settings: StudySettings, gate: Mapping[str, Any], *, prefix: str = "") -> list[dict[str, Any]]:
    """The rows of study_gate.csv of one teacher: by task what it hears on dev, its Shift and text effect there, and whether the
    task is in the study; and a hash of the teacher's weights."""
    return [
        {
            "teacher": prefix + settings.teacher, "task": task, "heard": f"{seen['heard']:.4f}", "shift": f"{seen['shift']:.4f}",
            "text_effect": f"{seen['text_effect']:.4f}", "in_study": "yes" if task in in_study(gate, settings) else "no",
            "weights": gate.get("weights", ""), **row_origin(),
        }
        for task, seen in gate["tasks"].items()
    ]  # fmt: skip


def print_table(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy in %, systems by contexts, as the mean over teachers and tasks."""
    teachers = {row["teacher"] for row in rows}
    table = Table(title=f"accuracy in %, mean over {len(teachers)} teacher(s)")
    for column in ("system", *CONTEXTS.values(), "teachers"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        cells = []
        for context in CONTEXTS.values():
            values = [100 * float(row["accuracy"]) for row in own if row["context"] == context]
            cells.append(f"{statistics.mean(values):.1f}" if values else "-")
        table.add_row(system, *cells, str(len({row["teacher"] for row in own})))
    console.print(table)
