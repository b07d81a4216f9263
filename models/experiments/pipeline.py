"""Pipelines of stages. Each stage has a process and a folder of its own, is made once, and continues after a stop.

The name of a folder is the fingerprint of the settings and inputs of its stage. What is there is not made again, and a stopped
pipeline continues where it stopped. Independent stages run side by side, each on its share of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from models.io_utils import atomic_write_json, exclusive, fingerprint

DONE_NAME = "done.json"
# Goes up whenever the code of a stage makes something else from the same settings, or a format of the kept files changes.
STAGES_VERSION = 3


@dataclass(frozen=True)
class Stage:
    """One stage: the stages that it needs, the settings that it depends on, and the function that fills its folder."""

    name: str
    title: str
    needs: tuple[str, ...]
    settings: tuple[str, ...]
    run: Callable[[Context], dict[str, Any]]
    extra: Any = None  # further input, part of the fingerprint


@dataclass(frozen=True)
class Context:
    """What the function of a stage gets: settings, its own folder, and the folders and results of the stages it needs."""

    settings: Any
    folder: Path
    folders: Mapping[str, Path]
    extra: Any

    def result(self, stage: str) -> dict[str, Any]:
        """What the function of a needed stage returned."""
        return read_done(self.folders[stage])["result"]


class StageError(RuntimeError):
    """A stage failed. The message has the end of its log."""


def stage_folders(stages: Sequence[Stage], settings: Any, root: Path) -> dict[str, Path]:
    """The folder of each stage. Its fingerprint covers the version, the settings it depends on, and the folders it reads."""
    folders: dict[str, Path] = {}
    for stage in stages:
        key = {
            "version": STAGES_VERSION,
            "settings": {name: getattr(settings, name) for name in stage.settings},
            "needs": [folders[name].name for name in stage.needs],
            "extra": stage.extra,
        }
        folders[stage.name] = root / f"{stage.name}-{fingerprint(key)[:12]}"
    return folders


def read_done(folder: Path) -> dict[str, Any] | None:
    """The result and the seconds that a finished stage wrote down. None = not finished."""
    try:
        return json.loads((folder / DONE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def run_stages(
    stages: Sequence[Stage],
    folders: Mapping[str, Path],
    *,
    command: Callable[[Stage], list[str]],
    workers: int,
    threads: int,
    console: Console,
) -> dict[str, float]:
    """Run the stages that are not done, in at most `workers` processes at a time.

    Args:
        command: makes the command line that runs a stage in its own process.
        threads: threads of each process.

    Returns:
        seconds of each stage, measured when it was made.

    Raises:
        StageError: a stage failed. The other running stages were stopped and continue next time.
        KeyboardInterrupt: Ctrl-C. The running stages have saved their state.
    """
    done = {s.name for s in stages if read_done(folders[s.name]) is not None}
    for stage in stages:
        if stage.name in done:
            console.print(f"  [dim]{stage.title:34} cached ({folders[stage.name].name})[/dim]")
    running: dict[str, _Running] = {}
    with _sigterm_as_ctrl_c(), console.status("") if console.is_terminal else nullcontext() as status:
        try:
            while len(done) < len(stages):
                ready = [s for s in stages if s.name not in done and s.name not in running and set(s.needs) <= done]
                for stage in ready[: workers - len(running)]:
                    running[stage.name] = _start(command(stage), folders[stage.name], threads)
                    if status is None:
                        console.print(f"  {stage.title:34} started")
                for stage in [s for s in stages if s.name in running and running[s.name].process.poll() is not None]:
                    ended = running.pop(stage.name)
                    if ended.process.returncode != 0 or read_done(folders[stage.name]) is None:
                        fault = f"{stage.title}: status {ended.process.returncode}"
                        raise StageError(f"{fault}; the end of {ended.log}:\n{_tail(ended.log)}")
                    done.add(stage.name)
                    console.print(f"  {stage.title:34} {ended.seconds():5.0f} s")
                if status is not None:
                    told = [f"{name} {one.seconds():.0f} s {_progress(one.log)}" for name, one in running.items()]
                    status.update("; ".join(told))
                time.sleep(0.1)
        except BaseException:
            _stop([one.process for one in running.values()])
            raise
    return {s.name: read_done(folders[s.name])["seconds"] for s in stages}


@dataclass(frozen=True)
class _Running:
    """The process of a stage, its log, and when it was started."""

    process: subprocess.Popen
    log: Path
    started: float

    def seconds(self) -> float:
        return time.monotonic() - self.started


def _start(command: list[str], folder: Path, threads: int) -> _Running:
    """Start the process of a stage."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with open(log, "ab") as file:
        # In a session of its own, so that Ctrl-C in the terminal reaches only this process, which passes it on once. A second
        # signal would interrupt the saving.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    return _Running(process, log, time.monotonic())


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Interrupt the processes, which save their state, and wait for them."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in processes:
        process.wait()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C does."""
    try:
        before = signal.signal(signal.SIGTERM, _interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    # raise_signal(SIGINT) would not do: a process that a shell starts in the background ignores that signal.
    raise KeyboardInterrupt


def run_stages_here(
    stages: Sequence[Stage], folders: Mapping[str, Path], *, settings: Any, console: Console
) -> dict[str, float]:
    """Like `run_stages`, but in this process, one stage after the other."""
    seconds = {}
    for stage in stages:
        cached = read_done(folders[stage.name]) is not None
        if not cached:
            folders[stage.name].mkdir(parents=True, exist_ok=True)
            try:
                run_one_stage(stages, stage.name, settings, folders)
            except SystemExit as error:
                raise StageError(f"{stage.title}: {error}") from error
        seconds[stage.name] = read_done(folders[stage.name])["seconds"]
        console.print(f"  {stage.title:34} " + ("cached" if cached else f"{seconds[stage.name]:5.0f} s"))
    return seconds


def run_one_stage(stages: Sequence[Stage], name: str, settings: Any, folders: Mapping[str, Path]) -> None:
    """Run one stage and write down that it is done: the work of its process."""
    by_name = {s.name: s for s in stages}
    if name not in by_name:
        raise ValueError(f"stage: expected one of {', '.join(by_name)}, got {name!r}")
    stage = by_name[name]
    started = time.monotonic()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    needed = {need: folders[need] for need in stage.needs}
    try:
        with exclusive(folders[name] / "running", f"stage {name!r}"):  # a training in the folder has another lock
            result = stage.run(Context(settings, folders[name], needed, stage.extra))
    except BlockingIOError as error:
        raise SystemExit(str(error)) from error
    # CPU seconds as well: the time of the stage on a machine without other work.
    noted = {"result": result, "seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time(), 1)}
    atomic_write_json(folders[name] / DONE_NAME, noted)


def _tail(log: Path, lines: int = 25) -> str:
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


def _progress(log: Path) -> str:
    """The counter of the last progress bar in a log, such as "120/300"."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        text = file.read().decode("utf-8", errors="replace")
    words = [w for line in text.replace("\r", "\n").splitlines() for w in line.replace("|", " ").split() if "/" in w]
    counters = [w for w in words if all(part.isdigit() for part in w.split("/", 1))]
    return counters[-1] if counters else ""


def check_status(what: str, status: int) -> None:
    """Raise SystemExit for a stage whose command ended with a `status` other than 0."""
    if status:
        raise SystemExit(status if status > 128 else f"{what} ended with status {status}")


def log_console() -> Console:
    """The console of a pipeline. In a log file it is 160 columns wide: 80, the default, would break the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def run_pipeline(
    arguments: argparse.Namespace,
    stages: Sequence[Stage],
    settings: Any,
    root: Path,
    *,
    command: str,
    argv: Sequence[str] | None,
    console: Console,
) -> tuple[dict[str, Path], dict[str, float]]:
    """Run a pipeline, or with --run-stage one stage of it. Two stages run at a time, unless --workers is given.

    Args:
        arguments: from a parser of models/experiments/commands.py.
        command, argv: the command and its words (None: those of the command line). The process of a stage gets the same words
            and --run-stage NAME.

    Returns:
        the folder of each stage, and its seconds.

    Raises:
        SystemExit: with status 0 after a --run-stage, 1 for a failed stage (its log is shown), 130 for Ctrl-C.
    """
    folders = stage_folders(stages, settings, root)
    if arguments.run_stage:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it otherwise
        try:
            run_one_stage(stages, arguments.run_stage, settings, folders)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        raise SystemExit(0)
    if arguments.fresh:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    # A stage of a smoke run takes less time than the imports of another process.
    workers = 0 if arguments.fast_smoke else 2
    command = [sys.executable, "-m", "models", command, *(sys.argv[1:] if argv is None else argv)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, cores) if arguments.workers is None else arguments.workers
    threads = max(1, cores // max(1, workers))
    console.print(f"{workers or 1} stage(s) at a time, {threads} thread(s) each; the stages are in", root, soft_wrap=True)
    try:
        if workers:
            seconds = run_stages(
                stages,
                folders,
                command=lambda s: [*command, "--run-stage", s.name],
                workers=workers,
                threads=threads,
                console=console,
            )
        else:
            seconds = run_stages_here(stages, folders, settings=settings, console=console)
    except StageError as error:
        console.print(f"error: {error}", markup=False)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        console.print("Stopped. The same command continues from here.")
        raise SystemExit(130) from None
    return folders, seconds
