"""Accuracy on dev over the steps of one training by KD and of one by CAAD: has either stopped learning when the study stops?

Both train for twice the steps of the study's students, with the settings of `kd` and `caad2`, the same batches and the same
start. They are asked at a quarter, a half, three quarters, once, one and a half times and twice the steps of the study. The
learning rate falls over the whole of the longer training. So the point in the middle is not the student of the study, whose
learning rate has fallen to its minimum by then.

Only the questions without a text and under a false one are asked: what is learned and what misleads shows in these two.

E3 asks the same of its students, for each task by itself, and of the control that sharpens the teacher without a contrast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.evaluation.predictions import read_predictions
from models.evaluation.scoring import judge
from models.experiments.pipeline import Context
from models.experiments.shared_steps import predictions_name
from models.experiments.student_group import StudentGroup

KINDS = {"neutral": "none", "conflict": "adversarial"}
_QUARTERS = (1, 2, 3, 4, 6, 8)
ASKED_FILE = "asked.json"


def curve_steps(student_steps: int) -> list[int]:
    """The steps at which the students are asked: 30, 60, 90, 120, 180 and 240 where the study's students have 120."""
    return [max(1, student_steps // 4) * quarters for quarters in _QUARTERS]


def train_and_ask(
    context: Context,
    name: str,
    recipe: str,
    *,
    group: StudentGroup,
    manifest: Path,
    start: Path,
    words: Sequence[str],
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """Train one student, and ask it dev at each of `curve_steps`. What was asked before is not asked again.

    Args:
        name: of its folder in that of the stage.
        group: keeps what the students share.
        manifest, start, words: as in `StudentGroup.run`.
        tasks: of the questions; empty = all.
    """
    steps, folder = curve_steps(context.settings.student_steps), context.folder / name
    kept = [f"optim.steps={steps[-1]}", f"run.save_every_steps={steps[0]}", f"run.keep_last_checkpoints={_QUARTERS[-1]}"]
    group.train(folder, recipe, manifest=manifest, start=start, words=[*words, *kept])
    asked = {"part": "dev", "kinds": tuple(KINDS), "tasks": tasks, "controls": False}
    return {str(step): group.ask_at(folder / str(step), folder, step, **asked) for step in steps}


def curve_rows(
    folder: Path, names: Sequence[str], student_steps: int, origin: Mapping[str, Any], *, by_task: bool = False
) -> list[dict[str, Any]]:
    """The rows of study_curves.csv: accuracy by system, step and context, of every student that has been asked.

    Args:
        folder: of the stage.
        origin: columns that stand first in each row, such as the teacher.
        by_task: a row for each task, with the column "task".
    """
    rows = []
    for name in names:
        for step in curve_steps(student_steps):
            if not (folder / name / str(step) / ASKED_FILE).exists():
                continue
            _, predictions = read_predictions(folder / name / str(step) / predictions_name("dev"))
            for task in dict.fromkeys(p.task for p in predictions) if by_task else (None,):
                for kind, context in KINDS.items():
                    own = [p for p in predictions if p.kind == kind and task in (None, p.task)]
                    if own:
                        told = {"system": name, "step": step, **({"task": task} if by_task else {}), "context": context}
                        rows.append({**origin, **told, "accuracy": float(judge(own).mean()), "items": len(own)})
    return rows
