"""The first pass on a CUDA machine, in under ten minutes: `python -m benchmarks.gpu.first_pass`.

Every item is a command of its own with its own time limit. The most telling come first, so that a pass that is cut short has
shown the most. Tests run several at a time, measurements one at a time. An item that fails stops nothing. After every item the
folder --out holds summary.txt, the results as a CSV, logs.tar.gz (each item's output, and JUnit XML of the tests), and the wheel
that was built. QUEUE.md beside this file says what each item has to show. No network is needed: `python -m benchmarks.gpu.wheels`
fetches packages before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models.arguments import Collect

from ..common import write_csv
from . import wheels

SECONDS = 560
LEAST_SECONDS = 15  # an item that has less than this left does not begin
BUILD_SECONDS = 150  # that the other items wait for the CUDA part, after the first of them
LAST_WORDS = 20  # seconds that tests get beyond their limit, to print what has failed
PYTEST = "--tb=short -q -p no:cacheprovider --maxfail=25"


@dataclass(frozen=True)
class Item:
    name: str
    command: str  # after `python`; {out} stands for the folder of the results
    target: str
    limit_seconds: int


OTHERS = "graphs no_logits gather scaling layer_mse uncounted_rows caad teacher projection shards"
OTHER_TESTS = " ".join(f"tests/kdkernels/test_{x}.py" for x in OTHERS.split())
ITEMS = [
    Item(
        "triton-tests",
        "-m pytest -n 8 tests/kdkernels/test_triton_caad.py tests/kdkernels/test_multi_teacher.py -k triton",
        "every test passes on the device",
        200,
    ),
    Item("rows", "-m benchmarks.gpu.measure rows", "the traffic of two passes at >= 80% of a copy's bandwidth", 60),
    Item(
        "linear",
        "-m benchmarks.gpu.measure linear --tokens 8192 --repeats 7",
        "bf16 <= 1.10x, fp32 <= 1.25x, CE alone <= 1.05x of the bare GEMMs; extra memory independent of N; no synchronisation",
        90,
    ),
    Item(
        "cuda-tests",
        "-m pytest -n 4 -m gpu tests/kdkernels/test_cuda_caad.py",
        "every test passes on the device, with the CUDA part built",
        90,
    ),
    Item("cuda-rows", "-m benchmarks.gpu.measure cuda-rows", "the traffic of one read at >= 90% of a copy's bandwidth", 60),
    Item(
        "other-tests",
        f'-m pytest -n 8 {OTHER_TESTS} -k "gpu or triton or no_logits or scaling or nothing_waits"',
        "every test passes on the device: graphs, the loss without logits, survivors, scaling, layers, teachers",
        150,
    ),
    Item("table", "-m benchmarks.gpu.measure table", "launch table within 5% of the best of 12 others", 60),
    Item("capture", "-m benchmarks.gpu.measure capture", "CUDA graph and torch.compile give the eager bits", 80),
    Item("ncu", "-m benchmarks.gpu.ncu", "the CUDA row kernel reads its inputs from DRAM once, within 5%", 60),
    Item("memcheck", "-m benchmarks.gpu.sanitizer memcheck", "memcheck finds nothing in the CUDA row kernel", 90),
]


@dataclass
class Pass:
    """Where a pass runs: a temporary folder for packages, caches and logs, and the folder of its results."""

    name: str
    out: Path
    work: Path
    deadline: float
    rows: list[dict] = field(default_factory=list)

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def environment(self) -> dict[str, str]:
        paths = [str(self.work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": os.pathsep.join(["/usr/local/cuda/bin", os.environ.get("PATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(self.work / "triton"),  # of its own: compiling is part of what is timed out
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        }

    def start(self, name: str, *arguments: str) -> subprocess.Popen:
        """A Python process whose output goes to the item's log."""
        with (self.logs / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_can_be_interrupted,
            )

    def lines(self, name: str) -> list[str]:
        return [x.rstrip() for x in (self.logs / f"{name}.log").read_text(errors="replace").splitlines() if x.strip()]

    def write(self, item: str, outcome: str, result: str, seconds: float, *, target: str = "", command: str = "") -> None:
        """A row of the summary, and everything so far into the folder of the results."""
        row = {"item": item, "outcome": outcome, "target": target, "result": result}
        self.rows.append(row | {"seconds": round(seconds, 1), "command": command})
        line = f"{item}: {outcome}, {seconds:.0f} s: {result[:600]}"
        print(line, flush=True)
        with (self.out / "summary.txt").open("a") as f:
            f.write(line + "\n")
        write_csv(f"gpu_{self.name}", torch.device("cuda"), self.rows, folder=self.out)
        with tarfile.open(self.out / "part.tar.gz", "w:gz") as archive:
            archive.add(self.logs, "logs")
        (self.out / "part.tar.gz").replace(self.out / "logs.tar.gz")


def wait(process: subprocess.Popen, seconds: float, last_words: float = 0.0) -> int | None:
    """Its exit status; None where it took longer, and was killed with its children.

    ``last_words``: seconds that it gets after an interrupt, to say what it has found. pytest then prints the failures so far.
    """
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        if last_words:
            os.killpg(process.pid, signal.SIGINT)  # pytest's workers too: it waits for them before it prints
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=last_words)
        _kill(process)
        return None
    finally:
        if process.poll() is None:
            _kill(process)


def _can_be_interrupted() -> None:
    """A pass that a shell has put into the background ignores interrupts, and its children would too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _kill(process: subprocess.Popen) -> None:
    """The process, if it still runs, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_item(item: Item, run: Pass) -> None:
    """outcome: met, missed, failed (no answer) or cut (out of time); result: its figures or its last line."""
    limit = min(run.seconds_left, item.limit_seconds)
    words = shlex.split(item.command.format(out=run.out))
    tests = words[:2] == ["-m", "pytest"]
    if tests:
        words += [*shlex.split(PYTEST), f"--junitxml={run.logs / item.name}.xml"]
    answer, started = ("cut", "not reached"), time.monotonic()
    if limit >= min(LEAST_SECONDS, item.limit_seconds):
        status = wait(run.start(item.name, *words), limit, LAST_WORDS if tests else 0.0)
        answer = outcome_of(status, run.lines(item.name), limit)
    run.write(item.name, *answer, time.monotonic() - started, target=item.target, command=item.command)


def outcome_of(status: int | None, lines: Sequence[str], limit: float) -> tuple[str, str]:
    last = lines[-1].strip() if lines else ""
    if status is None:
        return "cut", f"over {limit:.0f} s; {last}"
    if status != 0:
        return "failed", last
    try:
        report = json.loads(last)
    except ValueError:
        return "met", last
    if not isinstance(report, dict):
        return "met", last
    return "met" if report["met"] else "missed", report["result"]


def install(run: Pass, wheel_files: Sequence[Path]) -> tuple[str, str]:
    """Puts wheels into the pass's own folder. Returns outcome and result."""
    if not wheel_files:
        return "met", "none"
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
    target = ["--target", str(run.work / "site"), *map(str, wheel_files)]
    status = wait(run.start("install", "-m", "pip", "install", *options, *target), 120)
    lines = run.lines("install")
    return ("met", f"{len(wheel_files)} wheels") if status == 0 else ("failed", lines[-1] if lines else "pip failed")


def build_command(run: Pass) -> list[str]:
    """The wheel with the CUDA part for this GPU. -lineinfo lets Nsight Compute name source lines."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if (major, minor) in ((9, 0), (10, 0)) else "")
    defines = {"KDKERNELS_CUDA": "ON", "KDKERNELS_CUDA_ARCHS": arch, "CMAKE_CUDA_FLAGS": "-lineinfo"}
    settings = [word for k, v in defines.items() for word in ("-C", f"cmake.define.{k}={v}")]
    options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", str(run.work / "built")]
    return ["-m", "pip", "wheel", *options, ".", "-C", f"build-dir={run.work / 'build'}", *settings]


def finish_build(run: Pass, build: subprocess.Popen, started: float) -> None:
    status = wait(build, max(min(run.seconds_left, BUILD_SECONDS), 1))
    built = sorted((run.work / "built").glob("kdkernels-*.whl"))
    if status == 0 and built:
        shutil.copy(built[-1], run.out)
        outcome, result = install(run, built[-1:])
    else:
        lines = run.lines("build")
        outcome, result = "failed", lines[-1] if lines else "no output"
    run.write("build", outcome, result, time.monotonic() - started)


def describe_machine(run: Pass) -> None:
    query = "name,driver_version,memory.total,clocks.sm,power.limit"
    commands = [
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
        ["nvcc", "--version"],
        [sys.executable, "-m", "pip", "list", "--format=freeze"],
    ]
    with (run.logs / "machine.log").open("w") as log:
        for command in commands:
            log.write(f"$ {shlex.join(command)}\n")
            try:
                done = subprocess.run(command, env=run.environment(), capture_output=True, text=True, check=False, timeout=60)
                log.write(done.stdout + done.stderr)
            except (OSError, subprocess.TimeoutExpired) as error:
                log.write(f"{error}\n")
        log.write(f"{os.cpu_count()} processors\n")


def run_pass(run: Pass, items: Sequence[Item], folder: Path, *, build: bool) -> None:
    """``folder``: of wheels. ``build``: the project's own wheel is built here, and one among the others is left alone."""
    given = sorted(folder.glob("*.whl"))
    own = [x for x in given if x.name.startswith("kdkernels-")]
    build = build or not own
    started = time.monotonic()
    outcome, result = install(run, [x for x in given if x not in own] if build else given)
    run.write("wheels", outcome, result, time.monotonic() - started)
    sys.path.append(str(run.work / "site"))
    try:
        absent = wheels.missing([*wheels.NEEDED, *wheels.pinned()])
    finally:
        sys.path.remove(str(run.work / "site"))
    if absent:
        run.write("packages", "missed", wheels.what_to_do(absent), 0.0)
    describe_machine(run)
    compiling, started = (run.start("build", *build_command(run)) if build else None), time.monotonic()
    for item in items:
        run_item(item, run)
        if compiling is not None:  # beside the first item, which are tests: a measurement has the machine for itself
            finish_build(run, compiling, started)
            compiling = None


def main(argv: list[str] | None = None) -> None:
    run_command(argv, "first_pass", __doc__, ITEMS, build=True)


def run_command(argv: list[str] | None, name: str, description: str | None, items: Sequence[Item], *, build: bool) -> None:
    """A pass as a command: `python -m benchmarks.gpu.NAME`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{name}", description=description)
    parser.add_argument("--only", nargs="+", action=Collect, choices=[x.name for x in items], help="these items alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after this time no item begins or goes on")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_results")), help="folder of the results")
    parser.add_argument("--wheels", type=Path, default=wheels.FOLDER, help=f"folder of wheels (default: {wheels.FOLDER})")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    chosen = [x for x in items if args.only is None or x.name in args.only]
    if args.list:
        for item in chosen:
            print(f"{item.name}: python {item.command.format(out=args.out)}  # {item.target}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "summary.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as work:
        run = Pass(name, args.out, Path(work), time.monotonic() + args.seconds)
        run.logs.mkdir()
        run_pass(run, chosen, args.wheels, build=build)
        for item in chosen:
            if (run.logs / f"{item.name}.log").exists():
                failed = [x for x in run.lines(item.name) if x.startswith(("FAILED", "ERROR"))]
                print(*(f"  {x[:200]}" for x in failed[:20]), sep="\n", end="\n" if failed else "")
    print((args.out / "summary.txt").read_text())


if __name__ == "__main__":
    main()
