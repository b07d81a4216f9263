"""`benchmarks.stress` at a few rounds; and work that is not safe, which it has to find out."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import stress

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process has none of its parent's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_kind_of_work_survives(tmp_path):
    """In a process of its own, which starts no thread before it forks."""
    command = [sys.executable, "-m", "benchmarks.stress", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KDKERNELS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "stress_cpu.csv").open(newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["stage1", "cache", "training", "checkpoint"]
    for row in rows.values():
        assert (row["resumed"], row["bitwise_equal"], row["lost"], row["doubled"]) == ("3", "3", "0", "0")
        assert int(row["kills"]) >= 3 and row["device"] and row["commit"]


class Log:
    """Writes ten lines, one after the other, in a time that depends little on the machine's load; an item is a line."""

    name = "log"

    def run(self, folder: Path, done: stress.Done) -> None:
        path = folder / "log"
        there = len(path.read_bytes().split(b"\n")) - 1 if path.exists() else 0
        if path.exists():
            os.truncate(path, 3 * there)
        with open(path, "ab") as file:
            for number in range(there, 10):
                file.write(f"{number:02d}\n".encode())
                file.flush()
                os.fsync(file.fileno())
                done([f"{number:02d}"])
                time.sleep(0.005)

    def held(self, folder: Path) -> list[str]:
        path = folder / "log"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def result(self, folder: Path) -> dict[str, str]:
        return {"log": (folder / "log").read_text()}


class PromisesTooEarly(Log):
    def run(self, folder: Path, done: stress.Done) -> None:
        done([f"{number:02d}" for number in range(10)])
        super().run(folder, done)


class KeepsTornLines(Log):
    def run(self, folder: Path, done: stress.Done) -> None:
        if (folder / "log").exists():
            with open(folder / "log", "a") as file:
                file.write("\n")
        super().run(folder, done)


class WritesAnewWhatIsThere(Log):
    def run(self, folder: Path, done: stress.Done) -> None:
        with open(folder / "log", "a") as file:
            for number in range(10):
                file.write(f"{number:02d}\n")
                file.flush()
                done([f"{number:02d}"])


class Fails(Log):
    def run(self, folder: Path, done: stress.Done) -> None:
        if (folder / "log").exists():
            raise ValueError("cannot go on")
        super().run(folder, done)


class FailsWhenFinished(Log):
    def run(self, folder: Path, done: stress.Done) -> None:
        if len(self.held(folder)) == 10:
            raise ValueError("is finished")
        super().run(folder, done)


@pytest.mark.slow
def test_safe_work_is_found_safe():
    row, problems = stress.stress(Log(), 12, progress_bar=False)
    assert problems == [] and row["kills"] >= 12 and row["at_calls"] >= 6 and row["calls_a_run"] == 20
    assert (row["resumed"], row["bitwise_equal"], row["lost"], row["doubled"]) == (12, 12, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "shows"),
    [
        (PromisesTooEarly, lambda row: row["lost"] > 0 and row["bitwise_equal"] == 8),
        (KeepsTornLines, lambda row: row["bitwise_equal"] < 8),
        (WritesAnewWhatIsThere, lambda row: row["doubled"] > 0 and row["bitwise_equal"] < 8),
        (Fails, lambda row: row["resumed"] < 8),
        (FailsWhenFinished, lambda row: row["resumed"] == 0),
    ],
)
def test_work_that_is_not_safe_is_found_out(work, shows):
    row, problems = stress.stress(work(), 8, progress_bar=False)
    assert shows(row) and problems, row


def test_a_checkpoint_that_is_not_written_atomically_is_found_out(monkeypatch, tmp_path, capsys):
    """What a writer without temporary folder and rename would do."""
    import contextlib

    import models.training.checkpoint

    @contextlib.contextmanager
    def in_place(path):
        path.mkdir(parents=True, exist_ok=True)
        yield path

    monkeypatch.setattr(models.training.checkpoint, "atomic_dir", in_place)
    status = stress.main(["--only", "checkpoint", "--rounds", "6", "--device", "cpu", "--out", str(tmp_path)])
    assert status == 1 and "checkpoint, round" in capsys.readouterr().err
    with (tmp_path / "stress_cpu.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert int(row["lost"]) > 0 and int(row["resumed"]) < 6


def test_the_index_of_a_shard_that_is_not_there_yet_is_found_out(monkeypatch, tmp_path):
    from kdkernels import shards

    write_shard = shards._write_shard

    def names_it_first(path, tensors):
        record = {"shard": path.name, "bytes": 1, "sha256": "", "rows": 0, "samples": [["e0", 0, 0, ""]]}
        with open(path.parent / "index-0.jsonl", "a") as file:
            file.write(stress.json.dumps(record) + "\n")
        return write_shard(path, tensors)

    monkeypatch.setattr(shards, "_write_shard", names_it_first)
    monkeypatch.setenv("KDKERNELS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit, match="cache: the undisturbed run lost"):
        stress.stress(stress.Cache(), 2, progress_bar=False)


def test_other_kinds_of_work_keep_their_rows(tmp_path):
    options = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "1", "--only", "checkpoint"]
    (tmp_path / "stress_cpu.csv").write_text("what,rounds\nstage1,100\ncheckpoint,100\n")
    assert stress.main(options) == 0
    with (tmp_path / "stress_cpu.csv").open(newline="") as file:
        assert [(row["what"], row["rounds"]) for row in csv.DictReader(file)] == [("stage1", "100"), ("checkpoint", "1")]


def test_bad_arguments_are_named(capsys):
    for rounds, device, message in (("0", "cpu", "--rounds: expected at least 1"), ("1", "cuda", "--device: expected cpu")):
        with pytest.raises(SystemExit):
            stress.main(["--rounds", rounds, "--device", device])
        assert message in capsys.readouterr().err
