"""The six-system table: its scores by hand, its differences, its verdicts, and the whole of it in small."""

import csv
import dataclasses
import math
from collections import Counter
from types import SimpleNamespace

import pytest

from models.evaluation.predictions import Prediction
from models.experiments.six_systems import main
from models.experiments.six_systems_settings import ADDITIONS, MILD, PLUS, SYSTEMS
from models.experiments.six_systems_tables import mixture_nats, paired_rows, score_row, strength_rows, verdicts


def answer(clip, kind, right, *, task="gender", control="", answer="man"):
    said = answer if right else {"man": "woman", "clean": "noisy"}[answer]
    choices = ("man", "woman") if task == "gender" else ("clean", "noisy")
    return Prediction(
        id=f"{task}{clip}{kind}" + (f"#{control}" if control else ""), task=task, kind=kind, answer=answer,
        prediction=f"The answer is {said}.", choices=choices, pair_id=f"{task}{clip}", control=control,
        claim={"aligned": answer, "conflict": {"man": "woman", "clean": "noisy"}[answer]}.get(kind),
    )  # fmt: skip


def test_scores_by_hand():
    predictions = [
        *(answer(i, "neutral", i < 3) for i in range(4)),  # 3 of 4
        *(answer(i, "aligned", True) for i in range(4)),
        *(answer(i, "conflict", i == 0) for i in range(4)),  # of the 3 right ones 1 stays
        *(answer(i, "neutral", True, task="noise", answer="clean") for i in range(2)),
        *(answer(i, "aligned", True, task="noise", answer="clean") for i in range(2)),
        *(answer(i, "conflict", i == 0, task="noise", answer="clean") for i in range(2)),
        *(answer(i, "neutral", i == 0, control="no_audio") for i in range(4)),
    ]
    row = score_row(predictions)
    assert row["neutral"] == pytest.approx((0.75 + 1) / 2) and row["aligned"] == 1
    assert row["conflict"] == pytest.approx((0.25 + 0.5) / 2) and row["irrelevant"] == ""
    assert row["all"] == pytest.approx(((0.75 + 1 + 0.25) / 3 + (1 + 1 + 0.5) / 3) / 2) == pytest.approx(row["strict"])
    assert row["shift_tir_adv"] == pytest.approx(3 / 5)  # five right without a hint, three of them fell
    assert row["follows_hint"] == pytest.approx(4 / 6)
    assert row["no_audio"] == 0.25 and row["swapped_audio"] == ""
    assert row["task_gender_conflict"] == 0.25 and row["questions"] == 18
    assert row["class_gender_man_conflict"] == 0.25 and row["class_noise_clean_neutral"] == 1


def test_a_loss_by_hand():
    """Of two choices, 3 to 1 for the right one without a hint, 1 to 7 under a false one."""

    def scored(kind, right, wrong, control=""):
        p = answer(0, kind, right > wrong, control=control)
        return dataclasses.replace(p, scores={"man": math.log(right), "woman": math.log(wrong)})

    predictions = [scored("neutral", 3, 1), scored("conflict", 1, 7), scored("neutral", 1, 9, control="no_audio")]
    nats = mixture_nats(predictions, {"neutral": 3, "conflict": 1})
    assert nats == pytest.approx((3 * math.log(4 / 3) + math.log(8)) / 4)


def found(shares):
    """system -> by seed, of 40 clips under a false hint the number right; all else right."""
    table = {}
    for system, counts in shares.items():
        for seed, right in enumerate(counts):
            predictions = [answer(i, kind, True) for kind in ("neutral", "aligned") for i in range(40)]
            predictions += [answer(i, "conflict", i < right) for i in range(40)]
            table[system, seed] = (system, 2.0, predictions)
    return table


def test_differences_are_of_the_same_questions_and_a_teacher_stands_beside_every_seed():
    rows = paired_rows(found({"kd": [10, 14], "caad2": [30, 34], "caad_plus": [40, 40], "teacher_cd1": [20]}))
    by_pair = {(r["system"], r["minus"], r["context"]): r for r in rows}
    conflict = by_pair["caad2", "kd", "conflict"]
    assert conflict["difference"] == pytest.approx(0.5) and conflict["low"] > 0.3 and conflict["answers"] == 80
    equal = by_pair["caad2", "kd", "neutral"]
    assert (equal["difference"], equal["low"], equal["high"]) == (0, None, None)
    assert by_pair["caad_plus", "teacher_cd1", "conflict"]["difference"] == pytest.approx(0.5)
    assert not any(r["minus"] == "ce_only" for r in rows)


def test_the_verdict_follows_the_numbers():
    def said(caad2):
        table = found({"kd": [10, 14], "caad1": [10, 14], "caad2": caad2, "caad_plus": [40, 40], "teacher_cd1": [20]})
        rows = [
            {"system": system, "latency_ms": 90.0 if system == "teacher_cd1" else 30.0} | score_row(predictions)
            for (system, _), (_, _, predictions) in table.items()
        ]
        return verdicts(rows, paired_rows(table))

    sentences = said([30, 34])
    assert "caad1 against standard KD, ALL: +0.0% relative; target +8%: MISSED." in sentences
    assert any(s.startswith("caad2 against standard KD, ALL: +21.7% relative; target +8%: met") for s in sentences)
    assert "caad2 against standard KD, Shift: -50.0 points; target -20: met." in sentences
    assert any(s.startswith("caad2 against standard KD, conflict: +50.0") and s.endswith("target up: met.") for s in sentences)
    assert "caad2 against standard KD, aligned: +0.0 points (no interval); target not down: not decided." in sentences
    assert sentences[-1].endswith("at 0.33 of its latency; target above 0 points at 0.50: met.")
    assert any(s.startswith("caad2 against standard KD, conflict") and s.endswith("MISSED.") for s in said([8, 12]))


def test_conflict_strength_is_by_the_clips_noise():
    table = found({"kd": [40, 0], "before": [0, 0]})
    ids = {p.id for _, _, predictions in table.values() for p in predictions}
    questions = [SimpleNamespace(id=i, metadata={"snr_db": -15.0 if "gender1" in i else 1.0}) for i in ids if "gender2" not in i]
    rows = strength_rows(table, questions)
    assert [(r["value"], r["system"], r["seed"]) for r in rows] == [(v, "kd", s) for v in (-15.5, -0.5) for s in (0, 1)]
    assert [r["conflict"] for r in rows] == [1, 0, 1, 0]
    assert rows[0]["questions"] == 3 * 11 and rows[2]["questions"] == 3 * 18  # clips 1 and 10 to 19; 2 and 20 to 29 are unknown


def test_only_the_whole_run_on_the_test_split_is_committed(capsys):
    for words in (["--write", "--split", "dev"], ["--write", "--fast-smoke"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "--write: the committed tables need the whole run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    assert "--seeds: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_table_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    assert main(["--fast-smoke", "--seeds", "1", "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "six_systems.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    students = [s.name for s in (*SYSTEMS, MILD, *ADDITIONS, PLUS)]
    teachers = ["teacher", "teacher_cd1", "teacher_cd2", "teacher_half", "teacher_long"]
    expected = [*teachers, "before", "before_cd1", *students, "kd_of_long", "caad2_of_long"]
    assert [r["system"] for r in rows] == expected
    assert all(float(r["latency_ms"]) > 0 and 0 <= float(r["all"]) <= 1 for r in rows)
    assert {r["system"] for r in rows if r["dev_nats"]} == {"teacher", "teacher_half", "teacher_long"}
    with open(tmp_path / "out" / "sweeps.csv", newline="") as file:
        sweeps = list(csv.DictReader(file))
    counts = Counter(r["sweep"] for r in sweeps)
    assert counts.pop("conflict_strength") > 0 and counts == {"alpha": 4, "lambda": 4, "tau": 3, "anchor": 6, "teacher_steps": 7}
    with open(tmp_path / "out" / "training.csv", newline="") as file:
        assert {r["system"] for r in csv.DictReader(file)} == set(students)
    assert "random models, the numbers mean nothing" in capsys.readouterr().out
