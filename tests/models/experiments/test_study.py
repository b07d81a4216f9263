"""The study: its stages by teacher, rows that add up over runs, settings chosen on dev, and the whole of it in small."""

from __future__ import annotations

import csv
import dataclasses
import json
from types import SimpleNamespace

import pytest

from models.corpora.plans.base import SPLITS
from models.corpora.plans.benchmark import plan_benchmark
from models.corpora.plans.recorded import HEDGEWARS_FOLDS
from models.corpora.recordings import Material
from models.corpora.sources.queen import QueenLine
from models.data.manifest import Example, read_manifest, write_manifest
from models.evaluation.predictions import Prediction, append_predictions, read_predictions, write_header
from models.experiments import study_settings, study_stages
from models.experiments.learning_curves import curve_rows, curve_steps
from models.experiments.pipeline import Context, stage_folders
from models.experiments.shared_steps import write_pseudo_gt
from models.experiments.study import main
from models.experiments.study_gate import gate_sentences, gate_tasks, in_study
from models.experiments.study_settings import (
    AXES,
    AXES_PAIRS,
    EXPERIMENTS,
    SYSTEMS,
    chosen_teachers,
    step_systems,
    tried_systems,
)
from models.experiments.study_stages import (
    check_actors,
    gated_tasks,
    healing_examples,
    make_stages,
    stepped_systems,
    taught,
    tuned_systems,
)
from models.experiments.study_tables import (
    COLUMNS,
    GATE_COLUMNS,
    dev_rows,
    gate_rows,
    merge_rows,
    pack_all,
    replace_teacher,
    step_rows,
    table_rows,
)
from models.reporting.results_csv import rows_csv
from models.reporting.systems import SYSTEMS as NAMES
from tests.models.corpora.test_build import make_settings
from tests.models.corpora.test_recorded import make_recorded_packages, use_packages
from tests.models.corpora.test_recordings import _mp3


def answers(rights):
    """Ten questions of each context, of which `rights` are right."""
    return [
        Prediction(
            id=f"{n}/{kind}", task="gender", kind=kind, answer="man", choices=("man", "woman"), pair_id=str(n),
            prediction=f"The speaker is a {'man' if n < right else 'woman'}.",
        )
        for kind, right in zip(("neutral", "aligned", "conflict", "irrelevant"), rights, strict=True)
        for n in range(10)
    ]  # fmt: skip


def test_a_teacher_of_another_fold_or_seed_shares_only_what_does_not_depend_on_it(tmp_path):
    first, other_fold, other_seed = chosen_teachers("E1", [0, 1], 2, smoke=False, device="cpu")[:3]
    assert [s.teacher for s in (first, other_fold, other_seed)] == ["f0s0", "f1s0", "f0s1"]

    def folders(settings):
        return stage_folders(make_stages(settings, "E1"), settings, tmp_path)

    a, b, c = map(folders, (first, other_fold, other_seed))
    assert {name for name in a if a[name] == b[name]} == {"backbones", "student_lm"}
    assert {name for name in a if a[name] == c[name]} == {"backbones", "student_lm", "corpus"}
    assert all(s.fold == 0 for s in chosen_teachers("E5", [0, 1], 2, smoke=False, device="cpu"))
    tuning = stage_folders(make_stages(first, "E5"), first, tmp_path)  # its teacher is that of E1, and dev is all it asks
    assert tuning["teacher"] == a["teacher"] and "answers_teacher" in tuning
    assert all(stage.extra["part"] == "dev" for stage in make_stages(first, "E5") if "part" in (stage.extra or {}))


def test_rows_of_several_runs_add_up_and_keep_their_origin(tmp_path):
    path = tmp_path / "study.csv"
    rows = table_rows(EXPERIMENTS["E1"], {"kd": answers((9, 10, 2, 8))})
    assert [(r["context"], r["accuracy"], r["items"]) for r in rows] == [
        ("none", "0.9000", 10), ("faithful", "1.0000", 10), ("adversarial", "0.2000", 10), ("irrelevant", "0.8000", 10),
    ]  # fmt: skip
    assert merge_rows(path, [{**row, "commit": "old"} for row in rows]) == 4
    other = dataclasses.replace(EXPERIMENTS["E1"], fold=1)
    changed = table_rows(EXPERIMENTS["E1"], {"kd": answers((9, 10, 3, 8))})
    changed += table_rows(other, {"kd": answers((1, 1, 1, 1))})
    assert merge_rows(path, [{**row, "commit": "new"} for row in changed]) == 8
    with open(path, newline="") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == COLUMNS
    first = [(r["accuracy"], r["commit"]) for r in written if r["teacher"] == "f0s0"]
    assert first == [("0.9000", "old"), ("1.0000", "old"), ("0.3000", "new"), ("0.8000", "old")]


def test_dev_chooses_one_setting_of_each_family_from_equally_many(tmp_path):
    names = [s.name for s in tried_systems()]
    assert sum(n.startswith("kd_") for n in names) == sum(n.startswith("caad_") for n in names) == 8
    rights = {name: (5, 5, 5, 5) for name in names} | {"kd_2": (9, 9, 9, 9), "caad_1": (8, 8, 8, 8)}
    path = tmp_path / "study_dev.csv"
    path.write_text(rows_csv(dev_rows({name: answers(r) for name, r in rights.items()})))
    tuned = tuned_systems(path)
    assert [(s.name, s.words) for s in tuned] == [("kd_tuned", ("loss.kd_weight=0.9",)), ("caad_tuned", ("loss.alpha=1",))]
    path.write_text(rows_csv(dev_rows({name: answers(r) for name, r in rights.items() if name != "kd_7"})))
    assert [s.name for s in tuned_systems(path)] == ["caad_tuned"]  # KD has not had all its runs yet
    assert tuned_systems(tmp_path / "none.csv") == []


def test_dev_of_e2_chooses_the_steps_of_kd_and_of_caad_for_all_teachers_together(tmp_path):
    names = [s.name for s in step_systems(120)]
    assert [s.name for s in step_systems(2)] == ["kd_1", "kd_2", "kd_3", "kd_4", "caad2_1", "caad2_2", "caad2_3", "caad2_4"]
    assert names == [f"{system}_{steps}" for system in ("kd", "caad2") for steps in (30, 60, 90, 120, 180, 240)]
    found = {name: answers((5, 5, 5, 5)) for name in names} | {"kd_60": answers((4, 9, 9, 4)), "caad2_90": answers((6, 5, 5, 5))}
    path, rows = tmp_path / "study_steps.csv", []
    for fold in range(4):
        for seed in range(2):
            rows += step_rows(dataclasses.replace(EXPERIMENTS["E2"], fold=fold, seed=seed), found, prefix="E2-")
    assert [(r["teacher"], r["system"], r["steps"], r["context"], r["accuracy"]) for r in rows[4:8]] == [
        ("E2-f0s0", "kd", "60", context, accuracy)
        for context, accuracy in (("none", "0.4000"), ("faithful", "0.9000"), ("adversarial", "0.9000"), ("irrelevant", "0.4000"))
    ]
    path.write_text(rows_csv(rows))
    assert [(s.name, s.words) for s in stepped_systems(EXPERIMENTS["E2"], path, "E2")] == [
        ("kd_steps", ("optim.steps=60",)), ("caad2_steps", ("optim.steps=90",)),
    ]  # fmt: skip
    assert stepped_systems(EXPERIMENTS["E2"], path, "E1B") == []  # each study chooses for itself
    path.write_text(rows_csv(rows[:-1]))
    assert stepped_systems(EXPERIMENTS["E2"], path, "E2") == []  # one teacher has not been asked in all contexts yet
    assert stepped_systems(EXPERIMENTS["E2"], tmp_path / "none.csv", "E2") == []
    two = [*answers((8, 8, 8, 8)), *(dataclasses.replace(p, task="noise") for p in answers((6, 6, 6, 6))[::2])]
    first = step_rows(EXPERIMENTS["E2"], {"kd_30": two}, prefix="E2-")[0]
    assert first["accuracy"] == "0.7000" and first["items"] == 15  # 8 of 10 and 3 of 5: the tasks have equal weights


def test_what_an_earlier_version_wrote_beside_the_corpus_is_written_again(tmp_path):
    examples = [Example(id=str(n), audio=None, task="gender", choices=("man", "woman"), answer="man") for n in range(3)]
    asked, out = tmp_path / "asked.jsonl", tmp_path / "told.jsonl"
    write_manifest(asked, examples)
    words = [str(asked), "--source", "template"]
    for there in ("", "of another kind\n"):
        out.write_text(there)
        write_pseudo_gt(words, out)
        assert [e.target for e in read_manifest(out, check_audio=False)] == ["The speaker is a man."] * 3
    write_manifest(asked, examples[:2])  # another corpus
    write_pseudo_gt(words, out)
    assert len(read_manifest(out, check_audio=False)) == 2


def test_a_repeated_study_has_new_seeds_and_all_systems():
    first, again = (chosen_teachers(name, [0, 1], 2, smoke=False, device="cpu") for name in ("E1", "E1B"))
    assert [s.teacher for s in first] == ["f0s0", "f1s0", "f0s1", "f1s1"]
    assert [s.teacher for s in again] == ["f0s4", "f1s4", "f0s5", "f1s5"]
    assert [dataclasses.replace(s, seed=s.seed + 4) for s in first] == again
    asked = {name for stage in make_stages(again[0], "E1B") for name, *_ in (stage.extra or {}).get("systems", ())}
    assert asked >= {*(s.name for s in SYSTEMS), "sharpened2", "kd_tuned", "caad_tuned", "kd_30", "caad2_240"}


def test_the_studies_whose_dev_chooses_try_steps():
    def names(experiment):
        return {stage.name for stage in make_stages(EXPERIMENTS[experiment], experiment)}

    studies = ("E1", "E1B", "E2", "E3")
    assert {e for e in studies if "tried_steps" in names(e)} == {"E1B", "E2"}
    assert {e for e in studies if "students_control" in names(e)} == {"E1B", "E2", "E3"}
    (tried,) = [stage for stage in make_stages(EXPERIMENTS["E2"], "E2") if stage.name == "tried_steps"]
    assert tried.extra["part"] == "dev" and tried.extra["gated"]


def test_curves_are_of_the_students_that_were_asked(tmp_path):
    steps = curve_steps(120)
    assert steps == [30, 60, 90, 120, 180, 240] and curve_steps(2) == [1, 2, 3, 4, 6, 8]
    for name, step, rights in (("kd", 30, (6, 9, 3, 9)), ("kd", 60, (8, 9, 4, 9)), ("caad2", 30, (7, 9, 7, 9))):
        folder = tmp_path / name / str(step)
        folder.mkdir(parents=True)
        write_header(folder / "dev-greedy.jsonl", {})
        append_predictions(folder / "dev-greedy.jsonl", answers(rights))
        (folder / "asked.json").write_text("{}")
    (tmp_path / "kd" / "60" / "asked.json").unlink()  # stopped while it was asked
    rows = curve_rows(tmp_path, ["kd", "caad2"], 120, {"teacher": "f0s0"})
    assert [(r["system"], r["step"], r["context"], r["accuracy"]) for r in rows] == [
        ("kd", 30, "none", 0.6), ("kd", 30, "adversarial", 0.3), ("caad2", 30, "none", 0.7), ("caad2", 30, "adversarial", 0.7),
    ]  # fmt: skip
    assert all(r["teacher"] == "f0s0" and r["items"] == 10 for r in rows)
    by_task = curve_rows(tmp_path, ["caad2"], 120, {}, by_task=True)
    seen = [(r["task"], r["context"], r["accuracy"]) for r in by_task]
    assert seen == [("gender", "none", 0.7), ("gender", "adversarial", 0.7)]


def test_one_teacher_of_the_natural_bias_has_curves_with_the_sharpened_control():
    first, other = chosen_teachers("E3", [0, 1], 1, smoke=False, device="cpu")
    (curves,) = [stage for stage in make_stages(first, "E3") if stage.name == "curves"]
    assert [name for name, *_ in curves.extra["curves"]] == ["kd", "caad2", "sharpened2"] and curves.extra["gated"]
    assert "curves" not in {stage.name for stage in make_stages(other, "E3")}
    (dev,) = [stage for stage in make_stages(first, "E5") if stage.name == "curves"]
    assert [name for name, *_ in dev.extra["curves"]] == ["kd", "caad2"] and "gated" not in dev.extra


def test_the_axes_are_compared_with_caad_and_a_better_ear_with_its_own_kd():
    made = {s.name for s in (*SYSTEMS, *AXES)}
    assert {name for pair in AXES_PAIRS for name in pair} <= made
    assert {first for first, second in AXES_PAIRS if second == "caad2"} == {s.name for s in AXES} - {"kd_clean_teacher"}
    assert ("caad2_clean_teacher", "kd_clean_teacher") in AXES_PAIRS
    stages = {stage.name: stage for stage in make_stages(EXPERIMENTS["axes"], "axes")}
    assert set(stages["pool_clean"].needs) >= {"corpus_clean", "teacher"} and "pool_own" not in stages["pool_clean"].needs
    assert "pool_own" in stages["pool_flat"].needs


def test_every_system_has_a_name_for_readers():
    assert {system.name for system in (*SYSTEMS, *AXES)} <= set(NAMES)


def test_the_gate_names_what_is_missing(tmp_path):
    seen = {
        "gender": {"heard": 0.9, "shift": 0.3, "text_effect": 0.05},
        "noise": {"heard": 0.7, "shift": 0.02, "text_effect": 0.1},
    }
    first, second = EXPERIMENTS["E1"], EXPERIMENTS["E2"]
    said = gate_sentences(first, {"tasks": seen})
    assert said[0].endswith("dev without a hint 90.0%, Shift 30.0%, text effect 5.0%; in the study")
    assert in_study({"tasks": seen}, first) == {"gender"} and in_study({"tasks": seen}, second) == set()
    assert gate_sentences(second, {"tasks": seen})[0].endswith("NOT in the study: text effect below 10%")
    assert said[1].endswith("NOT in the study: it hears less than 80%, Shift below 10%")
    rows = gate_rows(EXPERIMENTS["E1"], {"tasks": seen, "weights": "abc"}, prefix="E2-")
    assert [tuple(row[name] for name in GATE_COLUMNS[:7]) for row in rows] == [
        ("E2-f0s0", "gender", "0.9000", "0.3000", "0.0500", "yes", "abc"),
        ("E2-f0s0", "noise", "0.7000", "0.0200", "0.1000", "no", "abc"),
    ]
    path = tmp_path / "study_gate.csv"
    options = {"columns": GATE_COLUMNS, "keys": ("teacher", "task"), "values": ("heard", "shift", "text_effect")}
    assert merge_rows(path, [rows[0] | {"commit": "old"}], **options) == 1 and merge_rows(path, rows, **options) == 2
    with open(path, newline="") as file:
        assert [row["commit"] for row in csv.DictReader(file)] == ["old", rows[1]["commit"]]


def test_a_constant_answer_has_a_shift_of_a_half_and_no_text_effect(tmp_path):
    """A teacher that hears everything without a text, and says "man" beside any text, follows none."""
    def asked(kind, label, said):
        return Prediction(
            id=f"{label}/{kind}", task="gender", kind=kind, answer=label, choices=("man", "woman"), pair_id=label,
            prediction=f"It is a {said}.",
        )  # fmt: skip

    constant = [asked(k, label, label if k == "neutral" else "man") for k in ("neutral", "aligned", "conflict") for label in
                ("man", "woman")]  # fmt: skip
    follows = [asked(k, label, {"man": "woman", "woman": "man"}[label] if k == "conflict" else label)
               for k in ("neutral", "aligned", "conflict") for label in ("man", "woman")]  # fmt: skip
    for predictions, shift, effect in ((constant, 0.5, 0.0), (follows, 1.0, 1.0)):
        folder = tmp_path / str(shift)
        folder.mkdir()
        write_header(folder / "dev-greedy.jsonl", {})
        append_predictions(folder / "dev-greedy.jsonl", predictions)
        assert gate_tasks(folder) == {"gender": {"heard": 1.0, "shift": shift, "text_effect": effect}}


def test_students_of_a_teacher_that_was_trained_again_replace_those_of_the_earlier_one(tmp_path):
    settings = [EXPERIMENTS["E3"], dataclasses.replace(EXPERIMENTS["E3"], fold=1)]

    def gate(setting, heard, weights):
        seen = {"tasks": {"gender": {"heard": heard, "shift": 0.3, "text_effect": 0.6}}, "weights": weights}
        return gate_rows(setting, seen, prefix="E3-")

    for setting in settings:
        found = {"kd": answers((9, 9, 2, 9))}
        assert replace_teacher(tmp_path, gate(setting, 0.8, "old")) == []
        merge_rows(tmp_path / "study.csv", table_rows(setting, found, prefix="E3-"))
        pack_all(tmp_path / "study", f"E3-{setting.teacher}", found)
    assert replace_teacher(tmp_path, gate(settings[0], 0.8, "old")) == []  # collected again: nothing is lost
    assert len((tmp_path / "study.csv").read_text().splitlines()) == 9
    (said,) = replace_teacher(tmp_path, gate(settings[0], 0.8, "new"))  # dev has the same accuracy by chance
    assert said == "E3-f0s0 was trained again: 4 rows of the earlier teacher of this name are removed"
    with open(tmp_path / "study.csv", newline="") as file:
        assert {row["teacher"] for row in csv.DictReader(file)} == {"E3-f1s0"}
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["E3-f1s0-kd.jsonl.gz"]
    with open(tmp_path / "study_gate.csv", newline="") as file:
        assert {(row["teacher"], row["weights"]) for row in csv.DictReader(file)} == {("E3-f0s0", "new"), ("E3-f1s0", "old")}


def test_an_actor_on_two_sides_stops_the_study():
    def heard(*actors):
        return [SimpleNamespace(metadata={"actor": actor}) for actor in actors]

    parts = {"teacher": heard("a", "b"), "distill": heard("a"), "dev": heard("c"), "test": heard("d")}
    check_actors(parts)
    for name, actor in (("dev", "d"), ("dev", "a"), ("test", "b")):
        with pytest.raises(SystemExit, match=f"no actor in two parts, got {actor}"):
            check_actors(parts | {name: heard(actor)})


def test_questions_about_other_games_change_no_stage_of_e1b_and_choose_nothing(tmp_path):
    settings = EXPERIMENTS["E1B"]
    own, external = make_stages(settings, "E1B"), make_stages(settings, "external")
    assert external[: len(own)] == own
    before, after = (stage_folders(stages, settings, tmp_path) for stages in (own, external))
    assert before.items() <= after.items()
    # The folders in which hours of training lie.
    assert after["teacher"].name == "teacher-52140717ed31" and after["students_own"].name == "students_own-2556f4b6990b"
    added = external[len(own) :]
    assert all(stage.name.startswith("external_") for stage in added)
    assert {name for stage in added for name in (stage.extra or {}).get("students", ())} >= {s.name for s in SYSTEMS}
    other = dataclasses.replace(settings, fold=1)
    elsewhere = stage_folders(make_stages(other, "external"), other, tmp_path)
    shared = {"external_corpus", "external_features"}
    assert shared <= {name for name in after if after[name] == elsewhere[name]}


def test_a_student_language_model_is_healed_on_both_languages():
    examples = healing_examples(("language", "cry"), 40)
    assert {e.choices for e in examples} == {("English", "Spanish"), ("spoken", "wordless")}
    assert all(e.answer in e.choices for e in examples)


@pytest.mark.parametrize("experiment", ["E2", "E3"])
def test_the_corpus_of_several_tasks_has_them_all_in_each_split(experiment, tmp_path, monkeypatch):
    settings, mp3 = EXPERIMENTS[experiment], _mp3(1.2)
    make_recorded_packages(tmp_path)
    use_packages(monkeypatch, tmp_path)
    lines = [
        QueenLine(f"{code}{n}", code, f"Temple line {n} of {code}{'?' if n % 2 else '.'}", mp3)
        for code in ("FAYE", "JOE", "BOB", "ORACLE", "NAOMI", "BUD")
        for n in range(320)
    ]
    options = {"size": settings.corpus_size, "sources": settings.sources, "tasks": settings.tasks, "fold": 0}
    material = Material.gather(make_settings(**options))
    material.lines += lines
    planned = plan_benchmark(make_settings(**options), material)
    assert {(r.task, r.split) for r in planned} == {(task, split) for task in settings.tasks for split in SPLITS}


@pytest.mark.slow
def test_the_whole_study_in_small_and_again_from_its_cache(tmp_path, monkeypatch, capsys):
    pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    words = ["E1", "--smoke", "--teachers", "1", "--folds", "0", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    with open(tmp_path / "out" / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    systems = {"teacher", "teacher_cd1", "teacher_cd2", *(s.name for s in SYSTEMS)}
    assert {r["system"] for r in rows} == systems
    assert {r["context"] for r in rows} == {"none", "faithful", "adversarial", "irrelevant"}
    assert {(r["teacher"], r["task"]) for r in rows} == {("f0s0", "gender"), ("f0s0", "noise")}
    _, kept = read_predictions(tmp_path / "out" / "study" / "f0s0-kd.jsonl.gz")
    assert len(kept) == sum(int(r["items"]) for r in rows if r["system"] == "kd")
    assert all(p.actor.startswith("espeak-") and p.draw == "0" and not p.control for p in kept)
    before = (tmp_path / "out" / "study.csv").read_bytes()
    capsys.readouterr()
    assert main([*words, "--collect"]) == 0
    assert (tmp_path / "out" / "study.csv").read_bytes() == before
    assert "cached" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_recorded_tasks_in_small(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    make_recorded_packages(tmp_path / "packages")
    use_packages(monkeypatch, tmp_path / "packages")
    tasks = ("language", "speaking_rate", "cry")
    small = {"sources": EXPERIMENTS["E2"].sources, "corpus_size": "study_tasks", "tasks": tasks, "max_clips": 6}
    monkeypatch.setattr(study_settings, "_SMOKE", study_settings._SMOKE | small)
    monkeypatch.setattr(study_stages, "SYSTEMS", [s for s in SYSTEMS if s.name in ("caad2", "ce_true")])
    monkeypatch.setattr(study_stages, "POOLS", ("own", "true"))
    assert main(["E2", "--smoke", "--teachers", "1", "--folds", "1", "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["teacher"], r["task"]) for r in rows} == {("E2-f1s0", task) for task in tasks}
    assert {r["system"] for r in rows} == {"teacher", "teacher_cd1", "teacher_cd2", "caad2", "ce_true", "sharpened2"}
    with open(tmp_path / "out" / "study_steps.csv", newline="") as file:
        tried = {(r["teacher"], r["system"], r["steps"], r["context"]) for r in csv.DictReader(file)}
    systems = [(system, steps) for system in ("kd", "caad2") for steps in "1234"]
    assert tried == {("E2-f1s0", *system, context) for system in systems for context in study_settings.CONTEXTS.values()}
    _, kept = read_predictions(tmp_path / "out" / "study" / "E2-f1s0-caad2.jsonl.gz")
    tested = {f"hedgewars-{voice}" for voice in HEDGEWARS_FOLDS[1]["test"]}
    assert {p.actor for p in kept} <= tested | {"drascula-a03", "drascula-a04", "queen-a02", "queen-a11"}


@pytest.mark.slow
def test_other_games_are_asked_about_after_the_study_and_train_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("espeakng_loader", reason="the wheel espeakng-loader is not installed")
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    make_recorded_packages(tmp_path / "packages")
    use_packages(monkeypatch, tmp_path / "packages")
    monkeypatch.setattr(study_settings, "_SMOKE", study_settings._SMOKE | {"tasks": ("gender",), "max_clips": 24})
    monkeypatch.setattr(study_stages, "SYSTEMS", [s for s in SYSTEMS if s.name in ("kd", "ce_true")])
    monkeypatch.setattr(study_stages, "POOLS", ("own", "true"))
    words = ["--smoke", "--teachers", "1", "--folds", "0", "--out", str(tmp_path / "out")]
    assert main(["external", *words]) == 0
    said = capsys.readouterr().out
    assert "not asked, since E1B has not finished them: students_own, students_true, students_control" in said
    assert not (tmp_path / "out").exists()
    assert main(["E1B", *words]) == 0
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "study").glob("[!e]*/**/*") if path.is_file()}
    for _ in range(2):  # the second time nothing is asked again
        assert main(["external", *words]) == 0
    assert trained == {path: path.stat().st_mtime_ns for path in trained}
    with open(tmp_path / "out" / "study.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["teacher"].startswith("external-")]
    assert {r["teacher"] for r in rows} == {"external-fillets-f0s4", "external-drascula-f0s4"}
    assert {r["system"] for r in rows} == {"teacher", "teacher_cd1", "teacher_cd2", "kd", "ce_true", "sharpened2"}
    assert {r["task"] for r in rows} == {"gender"} and len({r["context"] for r in rows}) == 4
    _, kept = read_predictions(tmp_path / "out" / "study" / "external-fillets-f0s4-kd.jsonl.gz")
    assert {p.actor for p in kept} <= {"fillets-m", "fillets-v"} and kept


def test_only_a_study_of_several_tasks_leaves_out_what_fails_the_gate():
    by_name = {e: {s.name: s for s in make_stages(EXPERIMENTS[e], e)} for e in ("E1", "E2", "E3")}
    assert by_name["E1"]["pool_own"].extra == {"pool": "own"} and "gate" not in by_name["E1"]["pool_own"].needs
    for experiment in ("E2", "E3"):
        assert by_name[experiment]["answers_teacher"].extra["gated"]
        for pool in ("own", "stripped", "true", "metadata"):
            for stage in (by_name[experiment][f"pool_{pool}"], by_name[experiment][f"students_{pool}"]):
                assert stage.extra["gated"] and "gate" in stage.needs
    assert by_name["E1"]["answers_teacher"].extra is None and "gated" not in by_name["E1"]["students_own"].extra
    assert by_name["E3"]["students_tuned"].extra["gated"]


def test_the_gated_pool_has_the_tasks_that_the_teacher_hears_and_is_misled_in(tmp_path):
    seen = {
        "cry": {"heard": 0.9, "shift": 0.3}, "gender": {"heard": 0.6, "shift": 0.5}, "language": {"heard": 0.9, "shift": 0.0},
    }  # fmt: skip
    (tmp_path / "done.json").write_text(json.dumps({"result": {"tasks": seen}}))
    examples = [SimpleNamespace(task=task) for task in ("cry", "gender", "language", "cry")]
    gated, free = (
        Context(settings=EXPERIMENTS["E3"], folder=tmp_path, folders={"gate": tmp_path}, extra=extra)
        for extra in ({"pool": "own", "gated": True}, {"pool": "own"})
    )
    assert taught(gated, examples) == [examples[0], examples[3]]
    assert taught(free, examples) == examples
    assert gated_tasks(gated) == ("cry",) and gated_tasks(free) == ()
    seen["cry"]["heard"] = 0.7
    (tmp_path / "done.json").write_text(json.dumps({"result": {"tasks": seen}}))
    with pytest.raises(SystemExit, match="gate: expected a task that f0s0 hears and is misled in, got none"):
        gated_tasks(gated)
