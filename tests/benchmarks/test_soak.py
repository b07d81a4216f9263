"""`benchmarks.soak` for a few seconds; and a leak, which it has to find."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak


def run(tmp_path, call):
    """What `call` returns for the words of some seconds, for which the bound is 100 MiB a minute, and the rows it has written.

    A busy machine may do one iteration in these seconds, so a dozen are asked for.
    """
    words = ["--device", "cpu", "--load", "1", "--out", str(tmp_path), "--minutes", "0.05", "--bound-kib-a-minute", "100000"]
    words += ["--least-iterations", "12"]
    status = call(words)
    with (tmp_path / "soak_cpu.csv").open(newline="") as file:
        return status, list(csv.DictReader(file))


@pytest.mark.slow
def test_some_seconds_of_it(monkeypatch, tmp_path):
    """In a process of its own, whose caches have seen no product yet. So short a time says nothing of kibibytes."""
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "benchmarks.soak"]
    status, rows = run(tmp_path, lambda words: subprocess.run([*command, *words], cwd=Path(__file__).parents[2]).returncode)
    assert status == 0 and sum(int(row["iterations"]) for row in rows) > 3 and rows[0]["commit"]
    for row in rows:
        low, middle, high = (float(row[f"resident_mib{end}"]) for end in ("_low", "", "_high"))
        assert 50 < low <= middle <= high


def test_a_leak_is_found(monkeypatch, tmp_path, capsys):
    kept = []
    step = soak.Iteration.train_step

    def leaking(self):
        step(self)
        kept.append(bytearray(b"x" * (4 << 20)))

    monkeypatch.setattr(soak.Iteration, "train_step", leaking)
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    for name in soak.CACHES_BY_SHAPE:
        monkeypatch.setenv(name, "1")
    status, rows = run(tmp_path, soak.main)
    iterations = len(kept)
    assert status == 1 and "memory grows by" in capsys.readouterr().err
    expected = 4096 * iterations / float(rows[-1]["to_minute"])  # KiB a minute
    assert 0.5 * expected < float(rows[0]["kib_a_minute"]) < 2 * expected


def test_the_slope_is_of_what_grows_after_the_first_third():
    minutes = [i / 10 for i in range(1, 91)]
    flat = [(m, 1000.0 + (500 * m if m < 2 else 1000)) for m in minutes]
    assert soak.slope(flat) == 0
    jump = [(m, 1000.0 + 5000 * (m > 8)) for m in minutes]
    assert soak.slope(jump) == 0  # one jump is no leak
    assert soak.slope([(m, 1000.0 + 7 * m + (m * 10 % 2)) for m in minutes]) == pytest.approx(7, abs=0.3)
    assert soak.slope([(m, 1000.0 + 7 * m) for m in (i / 300 for i in range(1, 3001))]) == pytest.approx(7)
    with pytest.raises(ValueError, match="expected two after the first third"):
        soak.slope([(1.0, 1000.0)])


def test_it_rests_as_it_is_told(monkeypatch):
    now, cpu, slept = [0.0], [0.0], []
    monkeypatch.setattr(soak.time, "sleep", lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds)))

    def call():
        now[0] += 3.0  # of which it has had the processor for one
        cpu[0] += 1.0

    samples = soak.soak(call, minutes=1, load=0.1, clock=lambda: now[0], cpu_clock=lambda: cpu[0])
    assert slept == [pytest.approx(7.0)] * 6 and len(samples) == 6


def test_bad_arguments_are_named(capsys):
    for options, message in (
        (["--device", "cuda"], "--device: expected cpu"),
        (["--device", "cpu", "--load", "0"], "--load, --minutes: expected"),
        (["--device", "cpu", "--minutes", "-1"], "--load, --minutes: expected"),
    ):
        with pytest.raises(SystemExit):
            soak.main(options)
        assert message in capsys.readouterr().err
