import csv
import dataclasses
import io
import json
import os
import re
import signal
import sys
import threading
import time

import pytest
from rich.console import Console

from models.evaluation.predictions import Prediction
from models.experiments.demo import COHORTS, FULL, STUDENTS, main, make_stages, verdict
from models.experiments.pipeline import DONE_NAME, Stage, StageError, run_stages, run_stages_here, stage_folders
from models.io_utils import exclusive


def answers(share_right, count=200):
    """Neutral all right; of the false hints the given share."""
    made = []
    for i in range(count):
        for kind, right in (("neutral", True), ("conflict", i < share_right * count)):
            made.append(
                Prediction(
                    id=f"{i}/{kind}", task="gender", kind=kind, answer="man", choices=("man", "woman"), pair_id=str(i),
                    prediction="a man" if right else "a woman",
                )
            )  # fmt: skip
    return made


def systems(caad1, caad2, kd=0.4, sharpened=0.4, ce=0.4):
    shares = {"ce_only": ce, "kd": kd, "sharpened2": sharpened, "caad1": caad1, "caad2": caad2}
    return {name: answers(shares[name]) for name, _, _ in STUDENTS}


@pytest.mark.parametrize(
    ("caad1", "caad2", "headline"),
    [
        (0.6, 0.7, r"CAAD \(alpha 1 and alpha 2\) follows a false hint less often than plain KD does\."),
        (0.4, 0.7, r"CAAD \(alpha 2\) follows a false hint less often"),
        (0.4, 0.4, r"CAAD does NOT show an advantage"),
        (0.2, 0.1, r"CAAD does NOT show an advantage"),
    ],
)
def test_the_verdict_follows_the_numbers(caad1, caad2, headline):
    assert re.match(headline, verdict(systems(caad1, caad2))[0])


def test_the_verdict_names_every_control_and_its_direction():
    sentences = verdict(systems(0.7, 0.2))
    assert len(sentences) == 7
    first, second = sentences[1:3]
    assert "CAAD alpha 1 against standard KD: under a false hint +30.0 points" in first and "better; without" in first
    assert "CAAD alpha 2 against standard KD: under a false hint -20.0 points" in second and "worse; without" in second
    assert any("against sharpened KD alpha 2 (control)" in s for s in sentences)
    assert any("against CE only (control)" in s for s in sentences)


def test_the_verdict_says_what_it_costs():
    predictions = systems(0.7, 0.7)
    predictions["caad1"] = [
        dataclasses.replace(p, prediction="a woman") if p.kind == "neutral" and int(p.pair_id) < 50 else p
        for p in predictions["caad1"]
    ]
    assert verdict(predictions)[0].endswith("but is less accurate without a hint (alpha 1).")


def test_a_setting_renames_the_stages_that_depend_on_it_and_no_others(tmp_path):
    stages = make_stages()
    before = stage_folders(stages, FULL, tmp_path)
    after = stage_folders(stages, dataclasses.replace(FULL, student_steps=7), tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    students = {f"students_{number}" for number in range(1, len(COHORTS) + 1)}
    assert changed == students
    after = stage_folders(stages, dataclasses.replace(FULL, teacher_steps=7), tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"teacher", "pool", "answers_teacher"} | students
    after = stage_folders(stages, dataclasses.replace(FULL, corpus_size="full"), tmp_path)
    assert {name for name in before if before[name] == after[name]} == {"backbones"}


def test_every_student_is_in_one_cohort():
    assert sorted(name for names in COHORTS for name in names) == sorted(name for name, *_ in STUDENTS)


def test_every_setting_is_part_of_some_fingerprint(tmp_path):
    stages = make_stages()
    used = {name for stage in stages for name in stage.settings}
    assert used == {f.name for f in dataclasses.fields(FULL)}


def stage(name, *needs):
    return Stage(name, name, needs, (), lambda context: {})


WRITES = "import json,sys,time; time.sleep(0.3); json.dump({'result': {}, 'seconds': 1.0}, open(sys.argv[1], 'w'))"


def run(stages, tmp_path, *, code=WRITES, workers=2):
    folders = {s.name: tmp_path / s.name for s in stages}
    text = io.StringIO()
    started = []

    def command(s):
        started.append(s.name)
        return [sys.executable, "-c", code, str(folders[s.name] / DONE_NAME)]

    console = Console(file=text, width=120)
    seconds = run_stages(stages, folders, command=command, workers=workers, threads=1, console=console)
    return started, seconds, text.getvalue()


def test_stages_run_in_order_of_need_and_are_cached(tmp_path):
    stages = [stage("d", "b", "c"), stage("b", "a"), stage("c", "a"), stage("a")]
    started, seconds, _ = run(stages, tmp_path)
    assert started[0] == "a" and set(started[1:3]) == {"b", "c"} and started[3] == "d"
    assert seconds == {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}
    started, _, text = run(stages, tmp_path)
    assert started == [] and text.count("cached") == 4
    (tmp_path / "c" / DONE_NAME).unlink()
    assert run(stages, tmp_path)[0] == ["c"]


def test_a_failed_stage_stops_the_demo_with_the_end_of_its_log(tmp_path):
    with pytest.raises(StageError, match=r"(?s)a: status 3; the end of .*log\.txt:\nwhat went wrong"):
        run([stage("a"), stage("b", "a")], tmp_path, code="print('what went wrong'); raise SystemExit(3)")
    assert not (tmp_path / "b").exists()


def test_a_stage_that_ends_without_its_result_is_not_done(tmp_path):
    with pytest.raises(StageError, match="a: status 0"):
        run([stage("a")], tmp_path, code="print('gone')")


@pytest.mark.parametrize(("number", "background"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGTERM, True)])
def test_a_stop_is_passed_on_once_and_waited_for(tmp_path, number, background):
    # As a shell starts it; these tests may be in the background themselves.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    code = (
        "import signal, sys, time, pathlib\n"
        "note = pathlib.Path(sys.argv[1]).with_name('signals')\n"
        "signal.signal(signal.SIGINT, lambda *_: note.open('a').write('x'))\n"
        "note.write_text('')\n"
        "while not note.read_text(): time.sleep(0.02)\n"
        "time.sleep(0.5); note.open('a').write('saved')\n"
    )
    note = tmp_path / "a" / "signals"

    def stop():
        while not note.exists():
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run([stage("a"), stage("b", "a")], tmp_path, code=code)
    finally:
        signal.signal(signal.SIGINT, before)
    assert note.read_text() == "xsaved"
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_smoke_run_twice(tmp_path, monkeypatch, capsys):
    """The whole path on synthetic clips and tiny random models; the second time everything is cached."""
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    assert main(["--fast-smoke", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "random models, the numbers mean nothing" in text and "report:" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    with (tmp_path / "out" / "results.csv").open() as f:
        table = {row["system"]: row for row in csv.DictReader(f)}
    assert table.keys() == results["scores"].keys()
    for system, row in table.items():
        by_kind = results["scores"][system]["plain"]["by_kind"]
        assert [float(row[kind]) for kind in by_kind] == [round(x["value"], 4) for x in by_kind.values()]
    assert set(results["scores"]) == {
        "teacher", "teacher_cd1", "teacher_cd2", *(name for name, _, _ in STUDENTS)
    }
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<audio" in html and "Divergence of the teacher" in html
    assert main(["--fast-smoke", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("cached") == len(make_stages())
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_a_stage_that_another_pipeline_makes_is_not_made_twice(tmp_path):
    stage = Stage("slow", "slow stage", (), (), lambda context: {"made": True})
    folders = stage_folders([stage], FULL, tmp_path)
    at_work = pytest.raises(StageError, match="'slow' is at work there already")
    with exclusive(folders["slow"] / "running", "stage 'slow'"), at_work:
        run_stages_here([stage], folders, settings=FULL, console=Console(file=io.StringIO()))
    assert not (folders["slow"] / DONE_NAME).exists()
    run_stages_here([stage], folders, settings=FULL, console=Console(file=io.StringIO()))
    assert json.loads((folders["slow"] / DONE_NAME).read_text())["result"] == {"made": True}
