"""The ahead-of-time gate fails when a kernel spills, loads narrowly, offsets rows in 32 bits, or gets worse than committed."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
from benchmarks import aot, aot_compiler, aot_configurations

ROOT = Path(__file__).parents[2]
needs_cuobjdump = pytest.mark.skipif(
    not (aot_compiler.TOOLS / "cuobjdump").exists(), reason="this Triton ships no cuobjdump to look at compiled kernels with"
)


def run_gate(*arguments: str) -> tuple[int, str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("bad_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script), "--sm", "90", *arguments], env=environment, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Status and the breaches of all the kernels, without committed figures."""
    status, output = run_gate("--csv", str(tmp_path_factory.mktemp("aot") / "none.csv"))
    return status, [line for line in output.splitlines() if line.startswith("BREACH")]


@needs_cuobjdump
@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("spills", "spills:"),
        ("registers", "registers, expected at most 128"),
        ("narrow", "0 128-bit loads, expected at least 1"),
        ("narrow", "loads narrower than 128 bits"),
        ("narrow", "0 128-bit stores"),
        ("offsets", "row offset of source in i32, expected i64"),
        ("shared", "bytes of shared memory, expected at most 0"),
        ("broken", "does not compile"),
    ],
)
def test_a_bad_kernel_is_a_breach_by_name(bad, kernel, what):
    status, lines = bad
    assert status == 1
    assert [line for line in lines if line.startswith(f"BREACH {kernel} [{kernel}] sm_90") and what in line], lines


@pytest.mark.slow
@needs_cuobjdump
def test_a_good_kernel_passes_until_its_figures_regress(bad, tmp_path):
    assert not [line for line in bad[1] if line.startswith("BREACH good")]
    figures = tmp_path / "figures.csv"
    status, output = run_gate("--kernel", "good", "--csv", str(figures))
    assert (status, "has no figures" in output) == (0, True)
    # As if a narrower, leaner kernel had been committed.
    row = {"kernel": "good", "configuration": "good", "sm": 90, "warps": 4, **dict.fromkeys(aot_compiler.FIGURES, 0)}
    row |= {"ldg_128": 99, "triton": aot.triton_series()}
    aot.write(figures, [row])
    status, output = run_gate("--kernel", "good", "--csv", str(figures))
    assert status == 1
    assert "BREACH good [good] sm_90: " in output
    assert "128-bit loads, 99 committed" in output
    assert "registers, 0 committed" in output


BEFORE = {"registers": 80, "shared": 1024, "stack": 0, "local": 0, "ldg_128": 12, "ldg_narrow": 5}
BEFORE |= {"stg_128": 16, "stg_narrow": 4, "ldl": 0, "stl": 0, "bar": 14}


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({}, False),
        ({"registers": 88}, False),
        ({"registers": 89}, True),
        ({"registers": 40, "shared": 512, "ldg_128": 24, "stg_128": 17, "bar": 30}, False),
        ({"shared": 1025}, True),
        ({"stack": 8}, True),
        ({"stl": 1}, True),
        ({"ldl": 1}, True),
        ({"ldg_128": 11}, True),
        ({"stg_128": 15}, True),
    ],
)
def test_what_a_regression_is(change, worse):
    committed = {k: str(v) for k, v in BEFORE.items()}  # as a CSV has them
    assert bool(aot_compiler.regressions({**BEFORE, **change}, committed)) == worse


def test_writing_keeps_the_figures_of_other_tritons(tmp_path):
    figures = tmp_path / "figures.csv"
    row = {"kernel": "k", "configuration": "c", "sm": 90, "warps": 4, **BEFORE}
    for series, registers in (("3.10", 1), ("3.2", 2)):
        other = tmp_path / f"{series}.csv"
        aot.write(other, [{**row, "registers": registers, "triton": series}])
        with figures.open("a") as f:
            f.writelines(other.read_text().splitlines(keepends=True)[figures.stat().st_size > 0 :])
    aot.write(figures, [{**row, "triton": aot.triton_series()}])
    aot.write(figures, [{**row, "registers": 81, "triton": aot.triton_series()}])
    with figures.open() as f:
        rows = list(csv.DictReader(f))
    assert [(x["triton"], x["registers"]) for x in rows] == [("3.2", "2"), (aot.triton_series(), "81"), ("3.10", "1")]
    assert aot.committed(figures, "3.2")[("k", "c", "90")]["registers"] == "2"
    assert aot.committed(tmp_path / "absent.csv", "3.2") == {}
    aot.write(figures, [{**row, "kernel": "another", "triton": aot.triton_series()}], ["another"])
    assert {kernel for kernel, _, _ in aot.committed(figures, aot.triton_series())} == {"k", "another"}
    aot.write(figures, [{**row, "kernel": "another", "triton": aot.triton_series()}])
    assert {kernel for kernel, _, _ in aot.committed(figures, aot.triton_series())} == {"another"}


def test_a_covering_array_covers():
    factors = {"a": [0, 1, 2], "b": [0, 1], "c": [0, 1, 2], "d": [0, 1]}

    def legal(setting):
        return not (setting.get("a") == 2 and setting.get("b") == 1)

    rows = aot_configurations.covering_array(factors, legal, strength=3)
    assert rows == aot_configurations.covering_array(factors, legal, strength=3)
    assert all(legal(x) for x in rows)
    assert len(rows) < 3 * 2 * 3 * 2
    seen = {(x["a"], x["c"], x["d"]) for x in rows}
    assert len(seen) == 3 * 3 * 2
    assert len({(x["a"], x["b"], x["c"]) for x in rows}) == 3 * 2 * 3 - 3


TTIR = """
tt.func public @kernel(%source_ptr: !tt.ptr<f32> {tt.divisibility = 16 : i32}, %table_ptr: !tt.ptr<bf16>, %n: i32) {
  %source_ptr_0 = tt.addptr %source_ptr, %row : !tt.ptr<f32>, i64
  %1 = tt.addptr %source_ptr_0, %n : !tt.ptr<f32>, i32
  %2 = tt.splat %table_ptr : !tt.ptr<bf16> -> tensor<64x32x!tt.ptr<bf16>>
  %3 = tt.addptr %2, %offsets : tensor<64x32x!tt.ptr<bf16>>, tensor<64x32xi32>
"""


def test_first_offsets():
    assert aot_compiler.first_offsets(TTIR) == {"source": "i64", "table": "i32"}


def test_counts():
    memory = ["LDG.E.128", "LDGSTS.E.BYPASS.128", "UTMALDG.2D", "LDG.E.64", "LDG.E.U16", "STG.E.ENL2.256", "STG.E.64"]
    counts = aot_compiler.count_accesses([*memory, "LDL.LU", "STL.64", "BAR.SYNC.DEFER_BLOCKING", "BAR.SYNC"])
    assert counts == {
        "ldg_128": 3, "ldg_narrow": 2, "stg_128": 1, "stg_narrow": 1, "ldl": 1, "stl": 1, "bar": 2
    }  # fmt: skip
