"""The gate of the study: which tasks a teacher hears on dev and is misled in. The others are not taught."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.experiments.shared_steps import predictions_name
from models.experiments.study_settings import StudySettings

# The gate of a task: a teacher that does not hear it cannot teach it. A bias that is not there cannot be cured.
MIN_HEARD = 0.8
MIN_SHIFT = 0.1


def gate_tasks(folder: Path) -> dict[str, dict[str, float]]:
    """What the answers on dev in the gate's folder say about each task."""
    from models.evaluation.predictions import read_predictions

    _, predictions = read_predictions(folder / predictions_name("dev"))
    found = {}
    for task in dict.fromkeys(p.task for p in predictions):
        own = [p for p in predictions if p.task == task]
        heard = accuracy([p for p in own if p.kind == "neutral"])
        found[task] = {"heard": heard, "shift": shift(own), "text_effect": text_effect(own)}
    return found


def accuracy(predictions: Sequence[Any]) -> float:
    from models.evaluation.scoring import judge

    return float(judge(predictions).mean()) if predictions else float("nan")


def shift(predictions: Sequence[Any]) -> float:
    """TIR_adv: of the questions that are right without a text, the share that is wrong under a false one."""
    from models.evaluation.scoring import judge

    right = {(p.pair_id, p.kind): bool(r) for p, r in zip(predictions, judge(predictions), strict=True)}
    known = [pair for pair, kind in right if kind == "neutral" and right[pair, kind]]
    fallen = [not right[pair, "conflict"] for pair in known if (pair, "conflict") in right]
    return statistics.mean(fallen) if fallen else float("nan")


def text_effect(predictions: Sequence[Any]) -> float:
    """Accuracy under faithful minus accuracy under adversarial text. A constant answer has 0, however large its Shift is."""
    faithful, adversarial = (accuracy([p for p in predictions if p.kind == kind]) for kind in ("aligned", "conflict"))
    return faithful - adversarial


def in_study(gate: Mapping[str, Any], settings: StudySettings) -> set[str]:
    """The tasks that pass the gate."""
    return {task for task, seen in gate["tasks"].items() if not _faults(seen, settings)}


def _faults(seen: Mapping[str, float], settings: StudySettings) -> list[str]:
    """Why a task does not pass the gate, in words; empty if it passes."""
    least = settings.min_text_effect
    faults = {
        f"it hears less than {MIN_HEARD:.0%}": seen["heard"] < MIN_HEARD,
        f"Shift below {MIN_SHIFT:.0%}": seen["shift"] < MIN_SHIFT,
        f"text effect below {least or 0:.0%}": least is not None and seen["text_effect"] < least,
    }
    return [fault for fault, found in faults.items() if found]


def gate_sentences(settings: StudySettings, gate: Mapping[str, Any]) -> list[str]:
    """Per task: whether the teacher hears it and is misled on dev, and what follows."""
    sentences = []
    for task, seen in gate["tasks"].items():
        faults = _faults(seen, settings)
        verdict = f"NOT in the study: {', '.join(faults)}" if faults else "in the study"
        effect = f", text effect {seen['text_effect']:.1%}" if "text_effect" in seen else ""  # earlier versions had none
        sentences.append(
            f"{settings.teacher}, {task}: dev without a hint {seen['heard']:.1%}, Shift {seen['shift']:.1%}{effect}; {verdict}"
        )
    return sentences
