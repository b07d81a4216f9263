"""The cost model: its sums by hand, and what it says of a run that does not fit."""

import csv

import pytest

from benchmarks import plan
from benchmarks.peers import Pair
from kdkernels.ops.chunking import DeviceModel

DEVICE = DeviceModel(132, 80 << 30, (9, 0), 3e12, 1e15, "made up")
PAIR = Pair("small", "large", 1000, 100, 1000, 200)


@pytest.fixture
def bodies(monkeypatch):
    monkeypatch.setitem(plan.BODIES, "made-up", (1e9, 4e9))
    monkeypatch.setattr(plan, "ENCODER_FLOP", 1e12)
    monkeypatch.setattr(plan, "CONNECTOR_PARAMETERS", 1e6)


def row(gpus=1, cached=False, **run):
    chosen = {"clips": 1000, "prompt_tokens": 90, "answer_tokens": 10, "clips_a_gpu": 10, "epochs": 2, "utilisation": 0.5} | run
    return plan.plan("made-up", PAIR, DEVICE, "H100", plan.Run(**chosen), gpus, cached=cached)


def test_sums_by_hand(bodies):
    found = row()
    assert found["student_s"] == pytest.approx(2 * 1e9 * 1000 * 2 / 5e14)  # forward, and the gradient to the input
    assert found["teacher_s"] == pytest.approx(2 * 4e9 * 2000 / 5e14)  # both paths
    assert found["encoder_s"] == pytest.approx(10 * 1e12 / 5e14)
    gemms = 2 * 100 * 1000 * (2 * 100 + 200) / 1e15
    moved = 100 * 1000 * (2 * 2 * 4 + 2) / 3e12
    assert found["loss_s"] == pytest.approx(gemms + moved)
    assert found["step_s"] == pytest.approx(sum(found[x] for x in ("student_s", "teacher_s", "encoder_s", "loss_s")))
    assert found["hours"] == pytest.approx(200 * found["step_s"] / 3600) and found["exchange_s"] == 0
    assert found["cache_gib"] == pytest.approx(1000 * 10 * (2 * 200 * 2 + 8) / 2**30)


def test_a_cache_takes_the_teacher_out_of_every_step_and_is_paid_once(bodies):
    live, cached = row(), row(cached=True)
    assert cached["step_s"] == pytest.approx(live["step_s"] - live["teacher_s"]) and cached["teacher_s"] == 0
    once = 100 * (live["teacher_s"] + live["encoder_s"]) / 3600
    assert cached["cache_hours"] == pytest.approx(once)
    assert cached["hours"] == pytest.approx(200 * cached["step_s"] / 3600 + once)
    assert live["gib_a_gpu"] - cached["gib_a_gpu"] == pytest.approx(2 * 4e9 / 2**30)


def test_training_all_of_the_student_and_many_gpus(bodies):
    assert row(train_student=True)["student_s"] == pytest.approx(1.5 * row()["student_s"])
    eight, sixteen = row(gpus=8), row(gpus=16)
    assert eight["exchange_s"] == pytest.approx(2 * 4e6 * 7 / 8 / 450e9)
    assert sixteen["exchange_s"] == pytest.approx(2 * 4e6 * 15 / 16 / 50e9)
    assert row(gpus=3)["hours"] == pytest.approx(2 * 34 * row(gpus=3)["step_s"] / 3600)  # the last step is not full


def test_the_command(tmp_path, capsys):
    plan.main(["llama", "--gpus", "8", "512", "--clips-a-gpu", "4000", "--out", str(tmp_path), "--device", "cpu"])
    with open(tmp_path / "plan_llama_cpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["gpus"], r["cached"]) for r in rows] == [("8", "False"), ("8", "True"), ("512", "False"), ("512", "True")]
    assert "do not fit a GPU's 80" in capsys.readouterr().out
    for words, message in (
        ([], "expected either a pair or --calibrate"), (["llama", "--gpus", "0"], "--gpus: expected at least 1, got 0"),
        (["llama", "--utilisation", "1.5"], "--utilisation: expected a number in"),
        (["llama", "--gpu", "T4"], "--gpu: expected a name"),
        (["llama", "--clips", "0"], "--clips: expected at least 1, got 0"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            plan.main(words)
        assert message in capsys.readouterr().err
