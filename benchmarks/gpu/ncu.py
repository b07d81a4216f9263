"""Nsight Compute on the CUDA row kernel: `python -m benchmarks.gpu.ncu`.

Bytes that really came from DRAM against one read of the inputs, bank conflicts, and what the multiprocessors were busy with. The
last line printed is JSON with `met`, `result` and the metrics.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys

METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "smsp__inst_executed_op_shared_ld.sum",
)
UNITS = {
    "": 1.0,
    "byte": 1.0,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
    "ns": 1e-9,
    "us": 1e-6,
    "ms": 1e-3,
    "%": 1.0,
    "inst": 1.0,
}


def read_metrics(output: str) -> dict[str, float]:
    """Metric: value, in bytes, seconds, per cent or counts, from what `ncu --csv --metrics ...` prints: a row a metric."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    values = {}
    for row in csv.DictReader(lines[start:]):
        number = float(row["Metric Value"].replace(",", ""))
        values[row["Metric Name"]] = number * UNITS.get(row["Metric Unit"], 1.0)
    return values


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.gpu.ncu", description=__doc__).parse_args(argv)
    program = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if program is None:
        raise SystemExit("needs ncu (Nsight Compute)")
    # The clocks are left as they are found.
    command = [program, "--clock-control", "none", "--kernel-name", "regex:caad_rows_kernel", "--launch-skip", "1"]
    command += ["--launch-count", "1", "--csv", "--metrics", ",".join(METRICS)]
    command += [sys.executable, "-m", "benchmarks.gpu.launches", "--large"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = read_metrics(done.stdout)
    expected = re.search(r"one read: (\d+) bytes", done.stdout)
    if done.returncode != 0 or not values or expected is None:
        print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
        raise SystemExit("no metrics")
    reads = values["dram__bytes_read.sum"] / int(expected[1])
    result = (
        f"{reads:.3f} of one read from DRAM, {values['dram__throughput.avg.pct_of_peak_sustained_elapsed']:.0f}% of its peak, "
        f"{values['smsp__issue_active.avg.pct_of_peak_sustained_active']:.0f}% of issue slots, "
        f"{values['l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum']:.0f} bank conflicts in "
        f"{values['smsp__inst_executed_op_shared_ld.sum']:.0f} shared loads"
    )
    print(json.dumps({"met": reads <= 1.05, "result": result, **values}))


if __name__ == "__main__":
    main()
