"""What came out of `models six-systems`: rows of its tables, and its targets, met or missed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.experiments.pipeline import Context
from models.experiments.shared_steps import interval_words, predictions_name, read_items
from models.experiments.six_systems_settings import (
    ANCHORS,
    BEFORE_ALPHAS,
    LONG,
    OF_LONG,
    SWEEPS,
    TEACHER_ALPHAS,
    TIMES,
    SixSettings,
    distilled_students,
)
from models.reporting.systems import system_name


def collect(folders: Mapping[str, Path], settings: SixSettings) -> dict[tuple[str, int], tuple[str, float, list[Any]]]:
    """(system, seed) -> label, alpha, predictions with their controls, in the order of the table."""
    from models.evaluation.predictions import read_predictions

    found: dict[tuple[str, int], tuple[str, float, list[Any]]] = {}

    def add(system: str, alpha: float, seed: int, folder: Path, decoding: float | None = None) -> None:
        path = folder / predictions_name(settings.split, decoding)
        found[system, seed] = (system_name(system), alpha, read_predictions(path)[1])

    for alpha in TEACHER_ALPHAS:
        name = "teacher" if alpha is None else f"teacher_cd{alpha:g}"
        add(name, alpha or 0.0, 0, folders["answers_teacher"], alpha)
    for name in TIMES if settings.sweep_seeds else ():
        add(name, 0.0, 0, folders[f"answers_{name}"])
    for alpha in BEFORE_ALPHAS:
        name = "before" if alpha is None else f"before_cd{alpha:g}"
        for seed in range(settings.seeds):
            add(name, alpha or 0.0, seed, folders["answers_before"] / str(seed), alpha)
    for system, seed, stage in distilled_students(settings):
        add(system.name, system.alpha, seed, folders[f"answers_{stage}"] / f"{system.name}-{seed}")
    for system in OF_LONG if settings.sweep_seeds else ():
        for seed in range(settings.seeds):
            add(system.name, system.alpha, seed, folders[f"answers_of_{LONG}"] / f"{system.name}-{seed}")
    return found


def score_row(predictions: Sequence[Any]) -> dict[str, Any]:
    """Scores of one system under one seed.

        all                 mean over tasks of the mean over contexts of the accuracy
        neutral, aligned, conflict, irrelevant    mean over tasks of the accuracy in that context
        shift_tir_adv       #(right under neutral and wrong under conflict) / #(right under neutral), over all pairs
        strict              as `all`, by strict matching
        follows_hint        share of the answers under a false hint that repeat it
        class_*             accuracy on the questions with that answer
        no_audio, swapped_audio    accuracy on the neutral questions without the clip, or with another clip; blank if not asked
    """
    from models.evaluation.predictions import KINDS
    from models.evaluation.scoring import judge, score

    plain = [p for p in predictions if not p.control]
    scores = {rule: score(plain, scorer=rule, bootstrap_samples=1) for rule in ("lenient", "strict")}
    tasks, kinds = list(scores["lenient"]["by_task"]), list(scores["lenient"]["by_kind"])

    def rate(task: str, kind: str, rule: str = "lenient") -> float:
        return scores[rule]["by_task"][task]["by_kind"][kind].value

    def over_contexts(rule: str) -> float:
        return statistics.mean(statistics.mean(rate(task, kind, rule) for kind in kinds) for task in tasks)

    row: dict[str, Any] = {"all": over_contexts("lenient")}
    for kind in KINDS:
        row[kind] = statistics.mean(rate(task, kind) for task in tasks) if kind in kinds else ""
    tir = scores["lenient"]["tir_adv"].value
    row |= {"shift_tir_adv": "" if tir is None else tir, "strict": over_contexts("strict")}
    followed = [p.said() == p.claim for p in plain if p.kind == "conflict" and p.claim is not None]
    row["follows_hint"] = statistics.mean(followed) if followed else ""
    for control in ("no_audio", "swapped_audio"):
        asked = [p for p in predictions if p.control == control]
        row[control] = float(np.mean(judge(asked))) if asked else ""
    row |= {f"task_{task}_{kind}": rate(task, kind) for task in tasks for kind in kinds}
    row |= {
        f"class_{task}_{label}_{kind}": estimate.value
        for task, labels in scores["lenient"]["by_class"].items()
        for label, of_kind in labels.items()
        for kind, estimate in of_kind.items()
    }
    return row | {"questions": len(plain)}


def mixture_nats(predictions: Sequence[Any], kinds: Mapping[str, int]) -> float:
    """Mean -log p(answer) among the choices, in nats, of questions that are mixed in the proportions of `kinds`.

    With the counts of the teacher's training set and dev questions it is the loss that early stopping watches. Before its minimum
    the teacher has not learned everything yet, hints included. After the minimum it overfits.
    """

    def loss(p: Any) -> float:
        top = max(p.scores.values())
        return top + math.log(sum(math.exp(score - top) for score in p.scores.values())) - p.scores[p.answer]

    losses = {kind: statistics.mean(loss(p) for p in predictions if p.kind == kind and not p.control) for kind in kinds}
    return sum(count * losses[kind] for kind, count in kinds.items()) / sum(kinds.values())


def dev_nats(folders: Mapping[str, Path], settings: SixSettings) -> dict[str, float]:
    """System -> `mixture_nats` of each teacher on the dev questions."""
    from models.evaluation.predictions import read_predictions

    taught = read_items(Context(settings, Path(), folders, None), "teacher")
    kinds = Counter(e.kind for e in taught)
    names = ("teacher", *TIMES) if settings.sweep_seeds else ("teacher",)
    return {n: mixture_nats(read_predictions(folders[f"answers_{n}"] / predictions_name("dev"))[1], kinds) for n in names}


def table_rows(
    found: Mapping[tuple[str, int], tuple[str, float, list[Any]]], latency: Mapping[str, float], nats: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The rows of six_systems.csv. `nats` is what `dev_nats` returns."""
    rows = []
    for (system, seed), (label, alpha, predictions) in found.items():
        model = "teacher" if system.startswith("teacher") else "student"
        decoding = "contrastive" if "_cd" in system else "greedy"
        scores = score_row(predictions)
        start = {"system": system, "label": label, "seed": seed, "alpha": alpha}
        rows.append(start | scores | {"dev_nats": nats.get(system, ""), "latency_ms": latency[f"{model}_{decoding}"]})
    return rows


def sweep_rows(
    found: Mapping[tuple[str, int], tuple[str, float, list[Any]]], folders: Mapping[str, Path], settings: SixSettings
) -> list[dict[str, Any]]:
    """The rows of sweeps.csv: one setting is changed, the others stay as in CAAD alpha 2. `found` has the table's systems."""
    from models.evaluation.predictions import read_predictions

    rows = []

    def add(sweep: str, value: Any, system: str, seed: int, predictions: Sequence[Any]) -> None:
        rows.append({"sweep": sweep, "value": value, "system": system, "seed": seed} | score_row(predictions))

    def swept(folder: Path) -> list[Any]:
        return read_predictions(folder / predictions_name(settings.split))[1]

    for seed in range(settings.sweep_seeds):
        for name, _, values in SWEEPS:
            for value, system in values.items():
                folder = folders["answers_sweeps"] / f"{name}-{value:g}-{seed}"
                add(name, value, "caad", seed, found[system, seed][2] if system else swept(folder))
        for system, in_table in (("kd", "kd"), ("caad", "caad2")):
            add("anchor", ANCHORS[0], system, seed, found[in_table, seed][2])
            for anchor in ANCHORS[1:]:
                add("anchor", anchor, system, seed, swept(folders[f"answers_anchor_{anchor}"] / f"{system}-{seed}"))
    if settings.sweep_seeds:
        for name, times in (("teacher", 1), *((name, times) for name, (times, _) in TIMES.items())):
            add("teacher_steps", int(times * settings.teacher_steps), "teacher", 0, found[name, 0][2])
        for seed in range(settings.seeds):
            for system, of_long in zip(("kd", "caad2"), OF_LONG, strict=True):
                for times, name in ((1, system), (2, of_long.name)):
                    add("teacher_steps", times * settings.teacher_steps, of_long.recipe, seed, found[name, seed][2])
    return rows


STRENGTH_SYSTEMS = ("teacher", "kd", "caad1", "caad2", "caad_plus")
STRENGTH_EDGES_DB = (-18.0, -13.0, -8.0, -3.0, 2.0)


def strength_rows(
    found: Mapping[tuple[str, int], tuple[str, float, list[Any]]], questions: Sequence[Any]
) -> list[dict[str, Any]]:
    """Rows of sweeps.csv about the strength of the conflict, one for each bin of the clips' signal-to-noise ratio in dB.

    The more noise a clip has, the less its sound contradicts a false hint.
    """
    snr_db = {e.id: e.metadata["snr_db"] for e in questions if "snr_db" in e.metadata}
    rows = []
    for low, high in itertools.pairwise(STRENGTH_EDGES_DB):
        for (system, seed), (_, _, predictions) in found.items():
            inside = [p for p in predictions if not p.control and low <= snr_db.get(p.id, -100.0) < high]
            if system in STRENGTH_SYSTEMS and inside:
                start = {"sweep": "conflict_strength", "value": (low + high) / 2, "system": system, "seed": seed}
                rows.append(start | score_row(inside))
    return rows


def training_csv(folders: Mapping[str, Path], settings: SixSettings) -> str:
    """The text of training.csv: the curves of the distilled students, every seed."""
    from models.reporting.results_csv import curves_csv
    from models.training.curves import read_metrics

    return curves_csv(
        {
            (system.name, system.label, seed): read_metrics(folders[stage] / f"{system.name}-{seed}" / "metrics.jsonl")
            for system, seed, stage in distilled_students(settings)
        }
    )


PAIRS = (
    ("caad05", "kd"), ("caad1", "kd"), ("caad2", "kd"), ("caad2_plausible", "kd"), ("caad_plus", "kd"), ("caad2", "sharpened2"),
    ("caad2", "ce_only"), ("caad_plus", "caad2"), ("caad2_adaptive", "caad2"), ("caad2_ramp", "caad2"),
    ("caad2_weighted", "caad2"), ("caad2_centered", "caad2"), ("caad2_plausible", "caad2"), ("caad2_layers", "caad2"),
    ("caad_plus", "teacher_cd1"), ("caad2_of_long", "kd_of_long"),
)  # fmt: skip


def paired_rows(found: Mapping[tuple[str, int], tuple[str, float, list[Any]]]) -> list[dict[str, Any]]:
    """The rows of six_systems_paired.csv: accuracy of one system minus that of another on the same questions, 95% intervals.

    All seeds together. The bootstrap resamples clips, each with all its contexts and seeds, so that neither counts twice. The
    draws of noise of one recording count as clips of their own, and so do the recordings of one actor.
    """
    from models.evaluation.scoring import paired_difference

    def of_all_seeds(system: str, seeds: Sequence[int]) -> list[Any]:
        only = [seed for name, seed in found if name == system]
        return [
            dataclasses.replace(p, id=f"{seed}/{p.id}", pair_id=p.pair_id or p.id)
            for seed in seeds
            for p in found[system, seed if seed in only else only[0]][2]
            if not p.control
        ]

    rows = []
    for first, second in PAIRS:
        if not {first, second} <= {name for name, _ in found}:
            continue
        seeds = sorted({seed for name, seed in found if name == first})
        mine, theirs = of_all_seeds(first, seeds), of_all_seeds(second, seeds)
        for kind in ("all", *dict.fromkeys(p.kind for p in mine)):
            estimate = paired_difference(mine, theirs, kind=None if kind == "all" else kind)
            rows.append(
                {
                    "system": first, "minus": second, "context": kind, "difference": estimate.value, "low": estimate.low,
                    "high": estimate.high, "answers": estimate.count, "seeds": len(seeds),
                }
            )  # fmt: skip
    return rows


def verdicts(rows: Sequence[Mapping[str, Any]], paired: Sequence[Mapping[str, Any]]) -> list[str]:
    """The targets, met or missed by this one teacher, in sentences computed from the rows."""

    def mean(system: str, column: str) -> float:
        return statistics.mean(float(row[column]) for row in rows if row["system"] == system and row[column] != "")

    def interval(system: str, minus: str, context: str) -> Mapping[str, Any]:
        return next(r for r in paired if (r["system"], r["minus"], r["context"]) == (system, minus, context))

    def said(met: bool) -> str:
        return "met" if met else "MISSED"

    sentences = ["One teacher and one task: the intervals are over clips and do not say how another teacher would do."]
    known = {row["system"] for row in rows}
    compared = dict.fromkeys(("caad05", "caad1", "caad2", "caad2_plausible", "caad_plus"), "kd") | {"caad2_of_long": "kd_of_long"}
    for system, kd in ((system, kd) for system, kd in compared.items() if system in known):
        against = f"{system} against " + ("standard KD" if kd == "kd" else kd)
        gain = 100 * (mean(system, "all") / mean(kd, "all") - 1)
        sentences.append(f"{against}, ALL: {gain:+.1f}% relative; target +8%: {said(gain >= 8)}.")
        fall = 100 * (mean(kd, "shift_tir_adv") - mean(system, "shift_tir_adv"))
        sentences.append(f"{against}, Shift: {-fall:+.1f} points; target -20: {said(fall >= 20)}.")
        for context, ok in (("conflict", lambda d: d["low"] > 0), ("aligned", lambda d: d["high"] >= 0)):
            d = interval(system, kd, context)
            decided = d["low"] is not None
            points = f"{100 * d['difference']:+.1f} points ({interval_words(d['low'], d['high'])})"
            wanted = "up" if context == "conflict" else "not down"
            sentences.append(f"{against}, {context}: {points}; target {wanted}: {said(ok(d)) if decided else 'not decided'}.")
    if known >= {"teacher", *TIMES}:
        names = ("teacher_half", "teacher", "teacher_long")
        nats, shifts = ([mean(name, column) for name in names] for column in ("dev_nats", "shift_tir_adv"))
        listed = ", ".join(f"{x:.3f} ({100 * shift:.1f})" for x, shift in zip(nats, shifts, strict=True))
        sentences.append(f"The teacher's loss on dev in nats (its Shift) at half, once and twice the steps: {listed}.")
    gap = 100 * (mean("caad_plus", "all") - mean("teacher_cd1", "all"))
    ratio = mean("caad_plus", "latency_ms") / mean("teacher_cd1", "latency_ms")
    sentences.append(
        f"CAAD+ against the teacher's contrastive decoding: ALL {gap:+.1f} points at {ratio:.2f} of its latency; target above 0 "
        f"points at 0.50: {said(gap > 0 and ratio <= 0.5)}."
    )
    return sentences
