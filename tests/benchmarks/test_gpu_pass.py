"""The passes over a GPU: here each item's own code runs with the CPU for a GPU, QUEUE.md lists all, and none stops a pass."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import first_pass, launches, measure, ncu, second_pass, wheels
from kdkernels.ops import cuda_caad, native, schema

ROOT = Path(first_pass.__file__).parents[2]
QUEUE = Path(first_pass.__file__).with_name("QUEUE.md")
PASSES = {"first_pass": first_pass, "second_pass": second_pass}
CPU = torch.device("cpu")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def test_every_item_is_written_down():
    text, commands = QUEUE.read_text(), []
    for module in PASSES.values():
        for item in module.ITEMS:
            commands.append(item.command)
            assert f"| {item.name} | `python {item.command.format(out='gpu_results')}` | {item.target} |" in text
    for name in measure.MEASURES:
        assert any(f"benchmarks.gpu.measure {name}" in x for x in commands), name


def new_pass(tmp_path, seconds=60.0):
    (tmp_path / "work" / "logs").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    return first_pass.Pass("first_pass", tmp_path / "out", tmp_path / "work", time.monotonic() + seconds)


@pytest.fixture
def a_device_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a CPU")


@pytest.mark.parametrize(
    ("code", "outcome", "result"),
    [
        ("print('fine')", "met", "fine"),
        ("print('3 failed'); raise SystemExit(1)", "failed", "3 failed"),
        ("import time; print('begun', flush=True); time.sleep(60)", "cut", "over 2 s; begun"),
        ("""print('{{"met": false, "result": "slow"}}')""", "missed", "slow"),
    ],
)
def test_an_item_has_an_outcome_whatever_happens(code, outcome, result, tmp_path, a_device_name):
    run = new_pass(tmp_path)
    first_pass.run_item(first_pass.Item("x", f"-c {shlex.quote(code)}", "a target", 2 if outcome == "cut" else 60), run)
    [row] = run.rows
    assert (row["outcome"], row["result"]) == (outcome, result)
    # All of it is outside at once.
    assert (run.out / "summary.txt").read_text().startswith(f"x: {outcome}")
    with tarfile.open(run.out / "logs.tar.gz") as archive:
        assert "logs/x.log" in archive.getnames()


def test_tests_that_are_cut_say_what_has_failed(tmp_path):
    """Without it a pass that is short of time would show dots, and no reason."""
    run, begun, file = new_pass(tmp_path), tmp_path / "begun", tmp_path / "test_both.py"
    file.write_text(
        "import pathlib, time\n"
        "def test_one():\n    assert 1 == 2, 'the reason'\n"
        f"def test_two():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(600)\n"
    )
    process = run.start("x", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={run.logs / 'x.xml'}", str(file))
    try:
        while process.poll() is None and not begun.exists():
            time.sleep(0.1)
        assert first_pass.wait(process, 0.1, last_words=120) is None
    finally:
        process.kill()
    log = (run.logs / "x.log").read_text()
    assert "the reason" in log and "1 failed" in log and (run.logs / "x.xml").exists()


def test_no_item_begins_after_the_end(tmp_path, a_device_name):
    run = new_pass(tmp_path, seconds=first_pass.LEAST_SECONDS - 1)
    first_pass.run_item(first_pass.Item("x", "-c 1", "", 60), run)
    assert (run.rows[0]["outcome"], run.rows[0]["result"]) == ("cut", "not reached")


@needs_no_gpu
@pytest.mark.parametrize("main", [first_pass.main, second_pass.main, lambda _: measure.main(["rows"])])
def test_without_a_gpu_it_says_so(main):
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        main([])


def test_list(capsys):
    first_pass.main(["--list", "--only", "linear"])
    assert capsys.readouterr().out.startswith("linear: python -m benchmarks.gpu.measure linear")


# -- packages ------------------------------------------------------------------------------------------------------------


def test_missing_packages_are_named_with_the_command_that_gets_them():
    said = wheels.what_to_do(["soxr", "tenacity", "peft"])
    assert "missing: soxr, tenacity. `python -m benchmarks.gpu.wheels --python 3." in said
    assert "missing, and not in wheels.txt: peft." in said
    assert wheels.missing(["torch", "no-such-package"]) == ["no-such-package"]


def test_every_package_of_the_extras_is_looked_for():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    listed = [*project["build-system"]["requires"], *extras["train"], *extras["test"], *extras["triton"]]
    names = {re.split(r"[<>=;\[ ]", x)[0].replace("-", "_") for x in listed}
    # Linters, coverage, the decoder of containers that no item reads, and intervals over several seeds, which no item has.
    names -= {"kdkernels", "mypy", "ruff", "pytest_cov", "av", "scipy"}
    assert not names - {x.replace("-", "_") for x in (*wheels.NEEDED, *wheels.pinned())}


# -- the CPU for a GPU ---------------------------------------------------------------------------------------------------

FAKE_NCU = "\n".join(
    [
        "#!/bin/sh",
        "echo one read: 1000000 bytes",
        """echo '"ID","Metric Name","Metric Unit","Metric Value"'""",
        *(f"""echo '"0","{metric}","","1"'""" for metric in ncu.METRICS),
    ]
)
FAKE_SANITIZER = """#!/bin/sh
[ "$2" = racecheck ] && echo "========= RACECHECK SUMMARY: 0 hazards displayed" || echo "========= ERROR SUMMARY: 0 errors"
"""


def rows_of_clusters(*arguments, blocks=0, **options):
    """In place of the CUDA row kernel: the CPU's, with rows that do not fit eight blocks."""
    if blocks == 8:
        raise ValueError("spec.vocab: expected a row that fits")
    return native.caad_rows(*arguments, **options)


@pytest.fixture
def cpu_as_gpu(monkeypatch, tmp_path):
    """torch.cuda as far as the items ask for it, small sizes, and stand-ins of the CUDA kernel and of NVIDIA's tools.

    Returns the modes of synchronisation that were set.
    """
    modes = []
    nothing = SimpleNamespace(wait_stream=lambda other: None, record_event=lambda: None, wait_event=lambda event: None)
    for name, value in {
        "is_available": lambda: True,
        "get_device_name": lambda *_: "a CPU",
        "get_device_capability": lambda *_: (9, 0),
        "synchronize": lambda *_: None,
        "set_sync_debug_mode": modes.append,
        "Stream": lambda *_, **__: nothing,
        "current_stream": lambda *_: nothing,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": lambda _: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(schema, "overlap_wanted", lambda device: os.environ.get("KDKERNELS_OVERLAP") == "1")
    monkeypatch.setattr(cuda_caad, "caad_rows", rows_of_clusters)
    sizes = {"DEVICE": CPU, "VOCAB": 96, "STUDENT_WIDTH": 16, "TEACHER_WIDTH": 24, "CAPTURED": (8, 64)}
    for name, value in sizes.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "_copy_bytes_per_second", lambda repeats: 1e9)
    tokens = dict.fromkeys(measure.MEASURES, 1) | {"linear": 16}
    measures = {k: lambda *_, k=k, f=f: f(tokens[k], 1) for k, f in measure.MEASURES.items()}
    monkeypatch.setattr(measure, "MEASURES", measures)
    monkeypatch.setattr(launches, "DEVICE", CPU)
    for name, text in (("ncu", FAKE_NCU), ("compute-sanitizer", FAKE_SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return modes


COLLECT = """
import json, sys, pytest
for words in json.loads(sys.argv[1]):
    status = pytest.main([*words, "--collect-only", "-p", "no:xdist"])
    assert status == 0, (status, words)
"""


class InThisProcess:
    """In place of a subprocess: what `python WORDS` would do. Tests are only written down; pip makes an empty wheel."""

    pid = 0

    def __init__(self, log: Path, words: list[str], tests: list[list[str]]) -> None:
        assert words[0] == "-m"
        module, arguments, self.status = words[1], words[2:], 0
        if module == "pytest":
            tests.append(arguments)
        elif module == "pip" and arguments[0] == "wheel":
            folder = Path(arguments[arguments.index("--wheel-dir") + 1])
            folder.mkdir()
            (folder / "kdkernels-0-cp3-linux.whl").touch()
        elif module.startswith("benchmarks.gpu."):
            with log.open("w") as file, contextlib.redirect_stdout(file):
                importlib.import_module(module).main(arguments)
        else:  # tests/docs/test_commands.py looks at the arguments of the others, which have tests of their own
            assert module in ("pip", "models", "benchmarks.linear")
        log.touch()

    def wait(self, timeout: float | None = None) -> int:
        return self.status

    poll = wait


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_with_the_cpu_for_a_gpu(name, cpu_as_gpu, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="needs Triton")
    tests = []
    monkeypatch.setattr(
        first_pass.Pass, "start", lambda run, name, *words: InThisProcess(run.logs / f"{name}.log", list(words), tests)
    )
    PASSES[name].main(["--out", str(tmp_path / "out"), "--wheels", str(tmp_path / "wheels")])
    with (tmp_path / "out" / f"gpu_{name}_cuda.csv").open(newline="") as file:
        rows = {row["item"]: row for row in csv.DictReader(file)}
    assert list(rows)[: 1 + ("packages" in rows)] == ["wheels", "packages"][: 1 + ("packages" in rows)]
    for item in PASSES[name].ITEMS:
        assert rows[item.name]["outcome"] in ("met", "missed"), rows[item.name]
    names = {x.name for x in (tmp_path / "out").iterdir()}
    assert {"summary.txt", "logs.tar.gz", "kdkernels-0-cp3-linux.whl"} <= names and len(names) <= 8
    assert cpu_as_gpu == ["error", "default"] * (2 if name == "first_pass" else 0)
    for paths in [[x for x in words if x.startswith("tests/")] for words in tests]:
        assert paths and all((ROOT / x).exists() for x in paths)
    # Each item chooses some tests of its files. All in one process, which imports torch once; a folder would take long.
    chosen = [
        [x for x in words if not x.startswith("--junitxml") and x not in ("-n", "8", "4")]
        for words in tests
        if not any((ROOT / x).is_dir() for x in words)
    ]
    command = [sys.executable, "-c", COLLECT, json.dumps(chosen)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_the_launches_that_tools_watch(cpu_as_gpu, capsys):
    launches.small()
    launches.large()
    assert re.search(r"one read: \d+ bytes", capsys.readouterr().out)
