"""What all benchmarks share: timing, peak memory, the check of gradients, and CSV files that name their origin."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from models.backbones.device import has_fast_bfloat16
from models.io_utils import source_commit

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over `repeats`."""

    median: float
    low: float
    high: float
    repeats: int


def time_calls(
    calls: dict[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    warmup: int = 2,
    limit_seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times the calls in turn, round after round. So a slow minute of the machine slows all of them.

    ``clock`` is used on a CPU. time.process_time counts this process alone, with all of its threads. After ``limit_seconds`` no
    further round begins. At least three rounds always run, or ``repeats`` if that is less.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - started > limit_seconds:
            break
        for name, call in calls.items():
            seconds[name].append(_one_call(call, device, clock))
    return {name: _summary(values) for name, values in seconds.items()}


def _one_call(call: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    before = clock()
    call()
    return clock() - before


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    if len(ordered) < 2:
        return Timing(ordered[0], ordered[0], ordered[0], 1)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")  # never beyond what was measured
    return Timing(statistics.median(ordered), low, high, len(ordered))


class PeakMemory:
    """Measures the peak extra bytes while the block runs.

    On CUDA it is the allocator's figure, on the CPU the growth of the resident set. The resident set is read every 2 ms. An
    allocator keeps freed memory, and that memory counts only once. So on the CPU warm up first only if you want the growth
    beyond a warm allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._before, self._peak, self._stop = resident_bytes(), 0, threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, resident_bytes())
            self._stop.wait(0.002)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._stop.set()
            self._thread.join()
            self.bytes = max(self._peak, resident_bytes()) - self._before


def resident_bytes() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def available_bytes(device: torch.device) -> int:
    """Memory that is free without swapping, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def refuse_wrong(errors: dict[str, float], budget: float) -> None:
    """Stops the benchmark before it times anything, if a gradient has an error above ``budget`` or is NaN."""
    wrong = {name: e for name, e in errors.items() if not e < budget}
    if wrong:
        raise SystemExit(f"not timed: expected relative gradient errors of at most {budget} against float64, got {wrong}")


def time_columns(timing: Timing) -> dict[str, float]:
    """The columns of a time: median and quartiles in milliseconds, and the number of rounds."""
    columns = {"median_ms": timing.median * 1e3, "low_ms": timing.low * 1e3, "high_ms": timing.high * 1e3}
    return {**columns, "repeats": timing.repeats}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            lines = (line.partition(":") for line in f.read().split("\n\n")[0].splitlines())
        told = {key.strip(): value.strip() for key, _, value in lines}
        # In the cloud one model name stands for several generations. The numbers of family and model tell them apart.
        model = f"{told['model name']} (family {told['cpu family']}, model {told['model']})"
    except (OSError, KeyError):  # not Linux, or not x86
        pass
    instructions = torch.backends.cpu.get_cpu_capability() + (" BF16" if has_fast_bfloat16(device) else "")
    return f"{model} {instructions}, {torch.get_num_threads()} threads"


def provenance(device: torch.device) -> dict[str, str]:
    """The columns that say where a row comes from: device, versions, commit and date."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "absent"

    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "liger": version("liger-kernel"),
        "trl": version("trl"),
        "fla": version("fla-core"),
        "cce": version("cut-cross-entropy"),
        "commit": source_commit("kdkernels", "csrc", "benchmarks"),
        "date": datetime.date.today().isoformat(),
    }


def write_csv(
    name: str,
    device: torch.device,
    rows: list[dict],
    *,
    folder: Path = RESULTS,
    keep: Callable[[dict[str, str]], bool] = lambda row: False,
) -> Path:
    """Writes results/<name>_<cpu|cuda>.csv. Old rows stay where ``keep`` says so. Every row carries its provenance."""
    origin = provenance(device)
    path = folder / f"{name}_{device.type}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[dict] = []
    if path.exists():
        with path.open(newline="") as f:
            kept = [row for row in csv.DictReader(f) if keep(row)]
    columns = list(dict.fromkeys(key for row in (*rows, *kept) for key in row if key not in origin))
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=[*columns, *origin], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *({**row, **origin} for row in rows)])
    return path


def benchmark_parser(module: str, description: str | None, *, repeats: int | None = None) -> argparse.ArgumentParser:
    """The parser of a benchmark, with --device, --write and --out. `repeats` adds --repeats with that default."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--write", action="store_true", help="write the CSV into benchmarks/results")
    parser.add_argument("--out", type=Path, help="write the CSV into this folder instead")
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="largest number of rounds of timing")
    return parser


def finish(
    args: argparse.Namespace,
    name: str,
    title: str,
    rows: list[dict],
    *,
    keep: Callable[[dict[str, str]], bool] = lambda row: False,
) -> None:
    """Prints the table, and writes the CSV if --write or --out asks for it."""
    print_table(title, rows)
    folder = args.out or (RESULTS if args.write else None)
    if folder is not None:
        print(write_csv(name, torch.device(args.device), rows, folder=folder, keep=keep))


def print_table(title: str, rows: list[dict]) -> None:
    """Prints a table of the columns that differ between rows. Columns that do not differ stand in the title."""
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    same = [c for c in columns if len(rows) > 1 and len({str(row.get(c, "")) for row in rows}) == 1]
    words = [f"{c} {rows[0][c]}" for c in same if str(rows[0][c]) not in ("", "nan")]
    table = Table(title="; ".join([title, *words]))
    shown = [c for c in columns if c not in same]
    for column in shown:
        first = next(row[column] for row in rows if column in row)
        table.add_column(column, justify="left" if isinstance(first, str) else "right", overflow="fold")
    for row in rows:
        values = ("" if row.get(c, "") != row.get(c, "") else row.get(c, "") for c in shown)  # NaN: nothing to show
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
