"""Runs the queue of QUEUE.md on a CUDA machine in under nine minutes: `python -m benchmarks.gpu.one_pass`.

Every item is a command of its own with its own time limit, most telling first, so that a pass that is cut short has shown the
most. Results go to results/gpu_queue_cuda.csv after every item, with device, versions, commit and date.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from models.arguments import Collect

from ..common import RESULTS, write_csv

TOTAL_SECONDS = 530


@dataclass(frozen=True)
class Item:
    name: str
    command: str  # after `python`
    target: str
    limit_seconds: int


QUEUE = [
    Item(
        "rows-correct",
        "-m pytest -q -x tests/kdkernels/test_triton_caad.py tests/kdkernels/test_multi_teacher.py -k triton",
        "every test passes on the device",
        300,
    ),
    Item("rows-speed", "-m benchmarks.gpu.measure rows", "two-pass traffic at >= 80% of a copy's bandwidth", 60),
    Item(
        "cuda-rows-correct",
        "-m pytest -q -x tests/kdkernels/test_cuda_caad.py",
        "every test passes on the device, none is skipped but for the undefined",
        120,
    ),
    Item(
        "cuda-rows-speed",
        "-m benchmarks.gpu.measure cuda-rows",
        "one read's traffic at >= 90% of a copy's bandwidth",
        60,
    ),
    Item("linear", "-m benchmarks.gpu.measure linear", "bf16 logits <= 1.25x bare GEMMs; scratch independent of N", 90),
    Item("capture", "-m benchmarks.gpu.measure capture", "CUDA graph and torch.compile give the eager bits", 90),
    Item(
        "capture-linear",
        "-m pytest -q -m gpu tests/kdkernels/test_graphs.py",
        "linear loss and backward in a CUDA graph, replayed on other values",
        60,
    ),
    Item("gpu-tests", "-m pytest -q -m gpu tests", "every test marked gpu passes", 120),
    Item("demo-smoke", "-m models demo --fast-smoke --device cuda", "ends with the table and a report", 150),
    Item("table", "-m benchmarks.gpu.measure table", "launch table within 5% of the best", 90),
    Item("ncu", "-m benchmarks.gpu.ncu", "the CUDA row kernel reads its inputs from DRAM once, within 5%", 90),
    Item("sanitizer", "-m benchmarks.gpu.sanitizer", "memcheck, racecheck and synccheck find nothing", 200),
]


def run_item(item: Item, limit_seconds: float) -> dict:
    """outcome: met, missed, failed (no answer) or cut (out of time); result: its figures or its last line."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *shlex.split(item.command)],
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"outcome": "cut", "result": f"over {limit_seconds:.0f} s", "seconds": time.monotonic() - started}
    lines = [x for x in done.stdout.splitlines() if x.strip()] or [x for x in done.stderr.splitlines() if x.strip()]
    last = lines[-1].strip() if lines else ""
    outcome = "met" if done.returncode == 0 else "failed"
    if done.returncode != 0:
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
    elif last.startswith("{"):
        report = json.loads(last)
        outcome, last = ("met" if report["met"] else "missed"), report["result"]
        print(json.dumps(report, indent=1))
    return {"outcome": outcome, "result": last, "seconds": time.monotonic() - started}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.one_pass", description=__doc__)
    parser.add_argument("--only", nargs="+", action=Collect, choices=[x.name for x in QUEUE], help="these items alone")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="time for the whole pass")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args(argv)
    items = [x for x in QUEUE if args.only is None or x.name in args.only]
    if args.list:
        for item in items:
            print(f"{item.name}: python {item.command}  # {item.target}")
        return
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    deadline = time.monotonic() + args.seconds
    rows, path = [], RESULTS
    for item in items:
        left = deadline - time.monotonic()
        reached = left > 10
        answer = (
            run_item(item, min(left, item.limit_seconds)) if reached else {"outcome": "cut", "result": "not reached"}
        )
        row = {
            "item": item.name,
            "outcome": "",
            "target": item.target,
            "result": "",
            "seconds": 0.0,
            "command": item.command,
        }
        rows.append(row | answer)
        print(f"{item.name}: {answer['outcome']}: {answer['result']}", flush=True)
        path = write_csv("gpu_queue", torch.device("cuda"), rows)
    print(path)


if __name__ == "__main__":
    main()
