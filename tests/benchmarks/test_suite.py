"""Every benchmark command runs end to end at tiny sizes; contenders agree with float64, and a wrong one is never timed."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    accuracy,
    cache,
    common,
    contenders,
    contrast,
    layers,
    linear,
    memory,
    multi_teacher,
    parallel,
    peers,
    plots,
    projection,
    rows,
    step,
)
from benchmarks.contenders import CE, FULL, KD, Contender, LinearCase, Unavailable
from models.experiments.shared_steps import make_tiny_backbones

CPU = torch.device("cpu")
SIZES = ["--device", "cpu", "--tokens", "8", "--vocab", "64", "--student-width", "16", "--teacher-width", "24"]
PROVENANCE = ("device", "python", "torch", "triton", "liger", "commit", "date")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        found = list(csv.DictReader(f))
    assert found and all(found[0][column] for column in PROVENANCE)
    return found


def timed(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with a time, which must be in order and beside a floor and an error."""
    out = [row for row in found if row["median_ms"]]
    assert all(0 < float(x["low_ms"]) <= float(x["median_ms"]) <= float(x["high_ms"]) for x in out)
    return out


@pytest.fixture(scope="module")
def small():
    return LinearCase.random(8, 60, 16, 24, torch.float32, CPU)


@pytest.mark.parametrize("contender", contenders.contenders("cpu"), ids=lambda x: f"{x.name}, {x.objective.name}")
def test_contenders_agree_with_float64(contender, small):
    if contender.compiles:
        pytest.skip("its arithmetic is tested without compiling, in test_liger")
    try:
        step = contender.build()
    except Unavailable as why:
        pytest.skip(str(why))
    error = contenders.gradient_errors({"it": (contender.objective, step)}, small)["it"]
    assert error < (0.02 if "bf16" in contender.name else 1e-5)


@pytest.mark.parametrize("objective", contenders.OBJECTIVES, ids=lambda x: x.name)
@pytest.mark.parametrize("trains", [False, True])
def test_steps_give_the_gradients_of_states_and_of_a_head_that_trains(small, objective, trains, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # whose arithmetic is torch's own
    ours = functools.partial(contenders.ours_step, None)
    makers = {"compiled": contenders.compiled_step, "eager": contenders.naive_step, "ours": ours}
    steps = {name: (objective, make(objective=objective)) for name, make in makers.items()}
    errors = contenders.gradient_errors(steps, dataclasses.replace(small, trains=trains), check_tokens=5)
    assert max(errors.values()) < 1e-5
    assert contenders.exact_gradient(dataclasses.replace(small, trains=trains)).shape == (8 + 60 * trains, 16)


@pytest.mark.parametrize("objective", [FULL, KD], ids=lambda x: x.name)
def test_liger(small, objective):
    pytest.importorskip("liger_kernel")
    step = contenders.liger_step(4, compiled=False, objective=objective)
    assert contenders.gradient_errors({"it": (objective, step)}, small)["it"] < 1e-5


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_names_are_unique_within_an_objective(device_type):
    listed = [*contenders.contenders(device_type), *contenders.fixed_chunks(device_type)]
    assert len({(x.name, x.objective) for x in listed}) == len(listed)
    for objective in (FULL, KD, CE):
        names = {x.name for x in contenders.contenders(device_type, (objective,))}
        assert {"eager", "kdkernels bf16 logits", "kdkernels (default: fp32 logits)"} <= names


@pytest.mark.parametrize("objective", [FULL, KD, CE], ids=lambda x: x.name)
def test_the_reference_is_the_formula(small, objective):
    """exact_gradient goes by blocks of the vocabulary; here the formula in one piece, and by finite differences."""
    h = small.hidden.double().requires_grad_()

    def loss(h):
        z = 3 * small.audio.double() @ small.teacher_weight.double().T
        z = z - 2 * small.text.double() @ small.teacher_weight.double().T
        s = h @ small.weight.double().T
        p, log_q = torch.softmax(z / 2, -1), torch.log_softmax(s / 2, -1)
        kd = 4 * (p * (p.log() - log_q)).sum(-1).mean()
        ce = -torch.log_softmax(s, -1)[torch.arange(8), small.target].mean()
        return objective.kd_weight * kd + (1 - objective.kd_weight) * ce

    (expected,) = torch.autograd.grad(loss(h), h)
    assert common.relative_error(contenders.exact_gradient(small, objective), expected) < 1e-12
    direction = torch.randn(h.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        slope = (loss(h + 1e-5 * direction) - loss(h - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((expected * direction).sum(), slope, rtol=1e-7, atol=0)


def test_two_vocabularies():
    """As in the Qwen pair: the student's head is longer by padding that nobody may count."""
    case = LinearCase.random(6, 80, 16, 24, torch.float32, CPU, teacher_vocab=60)
    assert case.vocab == 60
    trimmed = case.trimmed()
    assert (trimmed.weight.shape[0], trimmed.teacher_weight.shape[0]) == (60, 60)
    steps = {"eager": (FULL, contenders.naive_step()), "ours": (FULL, contenders.ours_step(None))}
    assert max(contenders.gradient_errors(steps, case).values()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_convergence_is_near(dtype):
    case = LinearCase.near_convergence(16, 500, 32, dtype, CPU, kl=0.004)
    assert contenders.mean_kl(case) == pytest.approx(0.004, rel=0.2)


def test_rows(tmp_path):
    rows.main(["--device", "cpu", "--rows", "4", "--vocab", "64", "--no-compile", "--repeats", "2", "--out", str(tmp_path)])
    found = timed(read(tmp_path / "rows_cpu.csv"))
    assert {x["dtype"] for x in found} == {"float32", "bfloat16"}
    assert {x["contender"] for x in found} >= {"eager", "CAAD authors' form", "kdkernels", "kdkernels, in place", "copy"}
    for row in found:
        assert float(row["ns_per_position"]) == pytest.approx(float(row["median_ms"]) * 1e6 / (4 * 64))
        if row["contender"] == "copy":
            assert float(row["fraction_of_floor"]) == 1


def test_small_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SMALL", ((3, 7), (2, 33)))
    monkeypatch.setattr(rows, "SMALL_WARMUP", 1)
    rows.main(["--device", "cpu", "--small", "--no-compile", "--repeats", "2", "--out", str(tmp_path)])
    found = timed(read(tmp_path / "rows_small_cpu.csv"))
    assert {(x["rows"], x["vocab"]) for x in found} == {("3", "7"), ("2", "33")}


def test_linear(tmp_path):
    linear.main([*SIZES, "--no-compile", "--no-memory", "--repeats", "2", "--out", str(tmp_path)])
    found = timed(read(tmp_path / "linear_cpu.csv"))
    floors = [float(x["fraction_of_floor"]) for x in found if x["contender"].startswith("bare GEMMs")]
    assert max(floors) == 1
    row = next(x for x in found if x["contender"] == "kdkernels bf16 logits")
    flop = 2 * 8 * 64 * (16 + 16 + 24)
    assert float(row["gflop_per_s"]) == pytest.approx(flop / float(row["median_ms"]) / 1e6)
    assert float(row["times_floor"]) == pytest.approx(1 / float(row["fraction_of_floor"]))


def test_linear_sweeps_stand_side_by_side(tmp_path):
    for sweep, values in {"tokens": "4 9", "vocab": "64 96", "width": "16", "chunk": "3 8", "threads": "1"}.items():
        linear.main([*SIZES, "--repeats", "2", "--out", str(tmp_path), "--sweep", sweep, "--values", *values.split()])
    linear.main([*SIZES, "--repeats", "2", "--out", str(tmp_path), "--sweep", "chunk", "--values", "5"])  # replaces its own
    found = timed(read(tmp_path / "linear_sweep_cpu.csv"))
    points = {(x["sweep"], x["value"]) for x in found}
    assert points == {
        ("tokens", "4"), ("tokens", "9"), ("vocab", "64"), ("vocab", "96"), ("width", "16"), ("chunk", "5"), ("threads", "1")
    }  # fmt: skip
    assert len(found) == 3 * len(points)
    for row in found:
        shares = [float(row[x]) for x in ("gemm_share", "rows_share", "rest_share")]
        assert sum(shares) == pytest.approx(1)
        assert row["contender"] == "bare GEMMs" or min(shares[:2]) > 0
    assert {x["chunk"] for x in found if x["sweep"] == "chunk"} == {"5"}


def test_multi_teacher(tmp_path):
    multi_teacher.main([*SIZES, "--repeats", "2", "--out", str(tmp_path)])
    found = timed(read(tmp_path / "multi_teacher_cpu.csv"))
    for count in (1, 2, 3):
        rows_of = {x["contender"]: x for x in found if x["sources"] == str(count)}
        floors = [float(x["fraction_of_floor"]) for name, x in rows_of.items() if name.startswith("bare GEMMs")]
        assert max(floors) == 1
        one, separate = (rows_of[f"kdkernels {way}, bf16 logits"] for way in ("one call", "a call a teacher"))
        flop = 2 * 8 * 64 * (16 + 16 + count * 24)
        assert float(one["gflop_per_s"]) == pytest.approx(flop / float(one["median_ms"]) / 1e6)
        ratio = float(separate["median_ms"]) / float(one["median_ms"])
        assert float(one["speedup_over_separate"]) == pytest.approx(ratio)
        assert float(separate["speedup_over_separate"]) == 1


def test_projection(tmp_path, monkeypatch):
    monkeypatch.setattr(projection, "SHAPES", {"tiny": (8, 64, 16, 24)})
    for name, value in (("NEAR_TOKENS", 4), ("NEAR_VOCAB", 96), ("NEAR_WIDTH", 16)):
        monkeypatch.setattr(projection, name, value)
    projection.main(["--device", "cpu", "--shapes", "tiny", "--kl", "0.01", "--repeats", "2", "--out", str(tmp_path)])
    found = read(tmp_path / "projection_cpu.csv")
    of_shape = {x["contender"]: x for x in found if x["shape"] == "tiny"}
    assert float(of_shape["CE alone"]["times_ce"]) == 1
    assert float(of_shape["from states"]["speedup_over_states"]) == 1
    errors = {x["contender"]: float(x["gradient_error"]) for x in found if x["shape"] == "near convergence"}
    assert errors["from projections, 64 ids"] < 0.03
    two = errors["from projections, 64 ids, tail as two bf16 summands"]
    assert two == pytest.approx(errors["from projections, 64 ids"], rel=0.01) and len(errors) == 8


def test_contrast(tmp_path, monkeypatch):
    """The error of a rounded contrast follows the quotient; that of the default does not."""
    few = {"tokens": 16, "vocab": 512, "width": 64}
    problems = [contrast.Problem("far", kl=0.3, **few), contrast.Problem("near", kl=0.002, **few)]
    monkeypatch.setattr(contrast, "PROBLEMS", problems)
    monkeypatch.setattr(contrast, "SHAPES", {"tiny": (8, 64, 16, 24)})
    contrast.main(["--device", "cpu", "--shapes", "tiny", "--seeds", "1", "--repeats", "2", "--lm", "", "--out", str(tmp_path)])
    found = read(tmp_path / "contrast_cpu.csv")
    of = {(x["problem"], x["setting"]): x for x in found}
    assert float(of["tiny", "fp32 logits (default)"]["times_default"]) == 1
    far, near = (of[name, "fp32 logits, rounded contrast"] for name in ("far", "near"))
    assert float(near["kl"]) == pytest.approx(0.002, rel=0.2)
    assert float(near["gradient_error"]) > 5 * float(far["gradient_error"])
    for x in (far, near):
        assert 1e-3 < float(x["error_over_quotient"]) < 3e-3
        assert float(x["terms_std"]) == pytest.approx(float(x["logits_std"]), rel=0.3)  # of a random head
        quotient = float(x["terms_std"]) / (2 * (2 * float(x["kl"])) ** 0.5)
        assert float(x["size_over_distance"]) == pytest.approx(quotient, rel=1e-6)
    assert float(of["near", "fp32 logits (default)"]["gradient_error"]) < 6e-3


def test_roundings_of_the_contrast():
    x = torch.full((4096, 2), 1.0 + 2**-9)  # a quarter of the way to bf16's next number
    up = float((contrast._stochastically(x) > 1).float().mean())
    assert 0.2 < up < 0.3
    assert float(contrast._with_feedback(x).mean()) == pytest.approx(1.0 + 2**-9, abs=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_steps_with_several_teachers_agree_with_float64(count):
    cases = multi_teacher.random_cases(count, 8, 60, 16, 24, torch.float32, CPU)
    errors = multi_teacher.gradient_errors(multi_teacher.all_steps(), cases)
    assert len(errors) == 5
    for name, error in errors.items():
        assert error < (0.02 if "bf16" in name else 1e-5), name


@pytest.mark.slow
def test_parallel(tmp_path):
    parallel.main([*SIZES, "--repeats", "1", "--out", str(tmp_path)])
    found = timed(read(tmp_path / "parallel_cpu.csv"))
    assert len(found) == 8 and {x["contender"] for x in found} == {"eager", "kdkernels"}
    assert all(float(x["gradient_error"]) < (1e-5 if x["what"].startswith("rows") else 0.05) for x in found)


@pytest.mark.slow
def test_memory_in_own_processes(tmp_path):
    arguments = ["--tokens", "256", "--vocab", "16384", "--vocabs", "--student-width", "16", "--teacher-width", "24"]
    arguments += ["--no-compile", "--contenders", "eager", "bf16", "--out", str(tmp_path), "--device", "cpu"]
    memory.main(arguments)
    found = {x["contender"]: float(x["peak_extra_mib"]) for x in read(tmp_path / "memory_cpu.csv")}
    assert set(found) == {"eager", "kdkernels bf16 logits"}
    # Eager holds at least the three float32 tensors z_hat, log q and p of (256, 16384), 16 MiB each. Memory that the process has
    # freed before may serve a few MiB of it.
    assert 40 < found["eager"] < 300


def test_memory_that_is_not_there_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "peak_mib_in_own_process", lambda *_: math.nan)
    memory.main(["--device", "cpu", "--tokens", "8", "--vocabs", "--contenders", "eager", "--out", str(tmp_path)])
    assert [x["note"] for x in read(tmp_path / "memory_cpu.csv")] == ["did not fit"]
    monkeypatch.setattr(peers, "available_bytes", lambda device: 1 << 20)
    peers.main(["--device", "cpu", "--pairs", "llama", "--out", str(tmp_path)])
    (row,) = read(tmp_path / "peers_cpu.csv")
    assert row["note"].startswith("skipped: needs") and not row.get("median_ms")


def test_accuracy(tmp_path):
    arguments = ["--device", "cpu", "--tokens", "6", "--vocab", "200", "--width", "24", "--no-compile", "--out", str(tmp_path)]
    accuracy.main(arguments)
    found = read(tmp_path / "accuracy_cpu.csv")
    assert {x["dtype"] for x in found} == {"float32", "bfloat16", "float16"}
    measured = {
        (x["kind"], x["place"], x["objective"], x["contender"], x["dtype"]): float(x["gradient_error"])
        for x in found
        if not x["note"]
    }
    key = ("linear", "near convergence", "KD")
    ours = measured[(*key, "kdkernels (default: fp32 logits)", "bfloat16")]
    assert ours < 0.1 * measured[(*key, "eager", "bfloat16")]
    assert {x["contender"] for x in found if x["note"]} >= {"Liger fused_linear_jsd", "FLA fused_kl_div"}


def test_peers(tmp_path):
    pairs = ["qwen", "smollm2", "training_head"]
    arguments = ["--device", "cpu", "--pairs", *pairs, "--tokens", "8", "--shrink", "256", "--no-compile"]
    peers.main([*arguments, "--repeats", "2", "--out", str(tmp_path)])
    found = read(tmp_path / "peers_cpu.csv")
    timed(found)
    assert {x["pair"] for x in found} == {"Qwen2.5-Omni-7B from Qwen3-8B", "SmolLM2-135M from SmolLM2-360M"}
    assert {x["objective"] for x in found} == {"KD + CE", "KD", "CE"}
    assert {x["head"] for x in found} == {"frozen"}
    notes = {x["contender"]: x["note"] for x in found if x["note"]}
    assert notes["Liger fused_linear_jsd"] == notes["FLA fused_kl_div"] == "its kernels need a CUDA device"
    assert {"TRL chunked divergence", contenders.PROJECTED} <= {x["contender"] for x in found}
    shapes = read(tmp_path / "peers_shapes_cpu.csv")
    assert {x["head"] for x in shapes} == {"trains"} and contenders.PROJECTED not in {x["contender"] for x in shapes}


def test_a_missing_peer_is_a_row_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    listed = [Contender("Liger", FULL, lambda: contenders.liger_step(4)), Contender("eager", FULL, contenders.naive_step)]
    monkeypatch.setattr(linear, "contenders", lambda *_: listed)
    linear.main([*SIZES, "--no-memory", "--repeats", "1", "--out", str(tmp_path)])
    row = next(x for x in read(tmp_path / "linear_cpu.csv") if x["contender"] == "Liger")
    assert "not installed (pip install liger-kernel)" in row["note"] and not row["median_ms"]


def wrong_step(case: LinearCase) -> torch.Tensor:
    return 1.2 * contenders.naive_step()(case)


def nan_step(case: LinearCase) -> torch.Tensor:
    return math.nan * contenders.naive_step()(case)


@pytest.mark.parametrize("step", [wrong_step, nan_step])
@pytest.mark.parametrize("module", [linear, peers])
def test_a_wrong_contender_is_refused(module, step, tmp_path, monkeypatch):
    listed = [Contender("eager", FULL, contenders.naive_step), Contender("wrong", FULL, lambda: step)]
    monkeypatch.setattr(module, "contenders", lambda *_: listed)
    monkeypatch.setattr(module, "time_calls", lambda *_, **__: pytest.fail("was timed"))
    arguments = {linear: [*SIZES, "--no-memory"], peers: ["--device", "cpu", "--tokens", "8", "--shrink", "256"]}[module]
    with pytest.raises(SystemExit, match=r"not timed.*'wrong'"):
        module.main([*arguments, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_wrong_row_kernel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows.RowCase, "ours", lambda self, **_: torch.zeros_like(self.student))
    with pytest.raises(SystemExit, match=r"not timed.*'kdkernels'"):
        rows.main(["--device", "cpu", "--rows", "4", "--vocab", "64", "--no-compile", "--out", str(tmp_path)])


def test_a_wrong_step_with_several_teachers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_teacher, "eager_step", lambda cases: torch.zeros_like(cases[0].hidden))
    with pytest.raises(SystemExit, match=r"not timed.*'eager'"):
        multi_teacher.main([*SIZES, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_plots_are_drawn_from_the_results_and_from_nothing_else(tmp_path):
    results = tmp_path / "results"
    test_rows(results)
    test_linear(results)
    drawn = []
    for attempt in ("first", "second"):
        plots.main(["--results", str(results), "--out", str(tmp_path / attempt)])
        drawn.append({path.name: path.read_bytes() for path in (tmp_path / attempt).iterdir()})
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"rows_cpu.svg", "linear_cpu.svg", "tradeoff_cpu.svg"}
    assert b"kdkernels bf16 logits" in drawn[0]["linear_cpu.svg"]
    with pytest.raises(SystemExit, match="--results: expected a folder with CSV files"):
        plots.main(["--results", str(tmp_path)])


@pytest.mark.slow
def test_every_kind_of_plot(tmp_path):
    test_linear_sweeps_stand_side_by_side(tmp_path)
    test_accuracy(tmp_path)
    test_peers(tmp_path)
    common.write_csv(
        "memory",
        CPU,
        [{"contender": "eager", "over": over, "tokens": 8, "vocab": 64, "peak_extra_mib": 1.0} for over in ("tokens", "vocab")],
        folder=tmp_path,
    )
    plots.main(["--results", str(tmp_path)])
    names = {"sweep", "breakdown", "accuracy", "peers", "memory"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {f"{name}_cpu.svg" for name in names}


@pytest.mark.slow
def test_the_committed_results_can_be_drawn(tmp_path):
    plots.main(["--out", str(tmp_path)])
    assert {"rows_cpu.svg", "linear_cpu.svg"} <= {path.name for path in tmp_path.iterdir()}


def test_timing_stops_at_its_limit_after_three_rounds():
    calls = []
    timing = common.time_calls(
        {"call": lambda: calls.append(0)}, repeats=50, device=CPU, warmup=1, limit_seconds=0.0
    )["call"]  # fmt: skip
    assert (len(calls), timing.repeats) == (4, 3)
    assert timing.low <= timing.median <= timing.high


@pytest.mark.slow
def test_pytest_benchmark_entry_points():
    # Not a worker's: under xdist pytest-benchmark refuses to measure.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = ("test_rows[bfloat16-kdkernels, in place]", "test_rows_floor", "test_linear[kdkernels bf16 logits]")
    for name in (*names, "test_linear_floor"):
        assert name in done.stdout


@pytest.mark.slow
def test_step_times_the_teachers_apart_from_the_rest(monkeypatch, tmp_path):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path))
    case = step.StepCase(2, CPU, layers=(2, 4), config={"vocab_size": 300, "hidden_size": 36, "intermediate_size": 48})
    assert step.check_sum(case) < 1e-4
    first, last = timed(step.measure(case, 2, ["CAAD + text + acoustic, all layers"]))
    # Not the heads of one teacher against those of three: they take microseconds here, and two repeats do not tell them apart.
    assert first["heads_ms"] > 0 < last["heads_ms"] < last["median_ms"] and first["overhead_beyond_heads"] == 0
    assert first["overhead"] == 0 and first["teachers"] == 1 and math.isnan(first["text_teacher_ms"])
    spoken = last["own_teacher_ms"] + last["text_teacher_ms"] + last["acoustic_teacher_ms"]
    assert last["step_ms"] == pytest.approx(last["median_ms"] + spoken)


def test_step_refuses_a_loss_that_is_not_the_sum(monkeypatch):
    monkeypatch.setattr(step, "check_sum", lambda case: 0.01)
    with pytest.raises(SystemExit, match="several sources: expected the sum of their losses, got a relative difference of 1"):
        step.measure(None, 1)


def test_cache_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    tiny = make_tiny_backbones(tmp_path / "tiny")
    case = step.StepCase(2, CPU, layers=(2, 4), config={"vocab_size": 300, "hidden_size": 36, "intermediate_size": 48})
    monkeypatch.setattr(cache, "StepCase", lambda *_, **__: case)
    monkeypatch.setattr(cache, "TOP_K", (8, 258))  # 258 is the whole vocabulary
    cache.main(["--device", "cpu", "--lm", str(tiny / "lm"), "--sentences", "3", "--repeats", "2", "--out", str(tmp_path)])
    found = {row["kept"]: row for row in read(tmp_path / "cache_cpu.csv")}
    error = {name: float(row["total_variation"]) for name, row in found.items() if row["total_variation"]}
    exact, short, shorter = (error[f"hidden states, {x}"] for x in ("float32", "bfloat16", "float8"))
    assert exact < 1e-6 < short < shorter < 0.1
    assert error["top 8 logits"] > 0.5 and error["top 258 logits"] < 1e-3
    assert float(found["hidden states, bfloat16"]["bytes_a_token"]) > 2 * 64 * 2  # two paths of 64, and the target
    assert float(found["top 8 logits"]["bytes_a_token"]) == 64
    assert float(found["teacher in the step"]["times_faster"]) == 1
    steps = [row for row in read(tmp_path / "cache_cpu.csv") if "step" in row["kept"] or "from" in row["kept"]]
    assert len(timed(steps)) == 12 and len({row["kept"] for row in steps}) == 4
    every = str(len(case.batch.target))
    assert [row["tokens_in_the_loss"] for row in steps[::4]] == ["2", every, every]  # one of each answer, all
    assert [row["step"] for row in steps[::4]] == [cache.DEMO_STEP, cache.DEMO_STEP, cache.LONG_STEP]


def test_a_step_can_have_a_wider_teacher_and_longer_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path))
    tiny = {"vocab_size": 300, "hidden_size": 36, "intermediate_size": 48}
    wide = {"hidden_size": 72, "num_attention_heads": 9}
    case = step.StepCase(2, CPU, layers=(2, 3), config=tiny, teacher_config=wide, answer="a b c d " * 20, bf16_products=True)
    _, (source,) = case.sources("caad", (), False)
    states = source.teacher(case.batch, case.examples)
    assert states.audio_hidden.shape[1] == 72 and case.student.get_output_embeddings().weight.shape[1] == 36
    assert len(case.batch.target) >= 2 * 160
    assert type(case.student.lm.model.layers[0].mlp.up_proj).__name__ == "_FrozenLinear"


def test_a_cache_that_gives_another_loss_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    case = step.StepCase(2, CPU, layers=(2, 4), config={"vocab_size": 300, "hidden_size": 36, "intermediate_size": 48})
    real = case.rest
    monkeypatch.setattr(case, "rest", lambda recipe, sources: lambda: real(recipe, sources)() + len(str(sources[0].teacher)))
    monkeypatch.setattr(cache, "time_calls", lambda *_, **__: pytest.fail("was timed"))
    with pytest.raises(SystemExit, match=r"not timed: expected the teacher.s loss from the cache"):
        cache.measure_step(case, 1)


@pytest.mark.slow
def test_layers_end_to_end(tmp_path, monkeypatch):
    shapes = (layers.Shape("small", {"cpu": 16}, 2, 24, 40), layers.Shape("equal", {"cpu": 16}, 3, 24, 24))
    monkeypatch.setattr(layers, "SHAPES", shapes)
    options = ["--device", "cpu", "--no-compile", "--no-memory", "--repeats", "2", "--out", str(tmp_path)]
    layers.main(options)
    found = timed(read(tmp_path / "layers_cpu.csv"))
    assert [r["contender"] for r in found] == ["eager", "kdkernels", "floor"] * 8
    for row in found:
        assert (row["gradient_error"] == "nan") == (row["contender"] == "floor")
        assert float(row["times_floor"]) > 0
    assert [p.name for p in plots.draw_all(tmp_path, "cpu", tmp_path)] == ["layers_cpu.svg"]


def test_layers_wrong_gradients_are_not_timed(monkeypatch):
    monkeypatch.setattr(layers, "fused_loss", lambda case: 1.01 * layers.eager_loss(case))
    with pytest.raises(SystemExit, match="not timed"):
        layers.main(["--device", "cpu", "--no-compile", "--no-memory", "--shrink", "128", "--dtypes", "float32"])


@pytest.mark.slow
def test_layers_peak_memory_has_a_process_of_its_own(monkeypatch):
    request = {"name": "kdkernels", "shape": 0, "dtype": "float32", "normalize": False}
    args = argparse.Namespace(device="cpu", shrink=64)
    assert layers.peak_mib("kdkernels", 0, torch.float32, False, args) > 0
    assert layers.peak_of_one(request, args) >= 0


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_liger_has_each_of_its_chunks_in_every_comparison(device_type):
    for objective in (FULL, KD):
        names = {x.name for x in contenders.contenders(device_type, (objective,))}
        assert {f"Liger chunked JSD, compiled, chunk {n}" for n in contenders.LIGER_CHUNKS[device_type]} <= names
