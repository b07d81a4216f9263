"""Checks the compiled Triton kernels without a GPU: `python -m benchmarks.aot`

It compiles every kernel and configuration for sm_80, sm_90 and sm_100 as a launch would, and disassembles the result. Then it
checks the result against limits: no stack, no local memory, 128-bit accesses of the rows, a cap on registers and shared memory,
row offsets in 64 bits. The figures of the same Triton (major.minor) in results/aot_triton.csv are a limit too. A regression is
more than 8 registers above them, more shared memory, a spill, or fewer wide accesses. The command names each breach, and its
exit status is 1.

    --quick     the configurations that matter most, in under a minute (CI); otherwise the whole grid, in some minutes
    --write     replaces this Triton's rows of results/aot_triton.csv; with --kernel NAME those alone (look at the diff)
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import triton

from models.arguments import Collect

from .aot_compiler import CAPABILITIES, FIGURES, TOOLS, breaches, compile_for, describe, regressions
from .aot_configurations import REGISTRY, Registry
from .common import RESULTS, print_table


def triton_series() -> str:
    """major.minor. The compiler's output changes with these two numbers."""
    return ".".join(triton.__version__.split(".")[:2])


def committed(path: Path, series: str) -> dict[tuple[str, str, str], dict]:
    """(kernel, configuration, sm) -> row of the CSV, for one Triton series."""
    if not path.exists():
        return {}
    with path.open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["triton"] == series]
    return {(row["kernel"], row["configuration"], row["sm"]): row for row in rows}


def write(path: Path, rows: list[dict], kernels: Sequence[str] | None = None) -> None:
    """Replaces this Triton's rows, or only those of some kernels. The other rows stay."""
    columns = ["kernel", "configuration", "sm", "warps", *FIGURES, "triton"]
    others = []
    if path.exists():
        with path.open(newline="") as f:
            others = [
                row
                for row in csv.DictReader(f)
                if row["triton"] != triton_series() or (kernels is not None and row["kernel"] not in kernels)
            ]
    merged = others + [{k: row[k] for k in columns} for row in rows]
    merged.sort(key=lambda row: [int(x) for x in row["triton"].split(".")])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)


def main(argv: list[str] | None = None, registry: Registry = REGISTRY) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a representative subset")
    parser.add_argument("--kernel", nargs="+", action=Collect, choices=sorted(registry), help="these kernels alone")
    parser.add_argument("--sm", nargs="+", action=Collect, type=int, default=CAPABILITIES, help="compute capabilities, like 90")
    parser.add_argument("--write", action="store_true", help="replace this Triton's rows of the committed CSV")
    parser.add_argument("--csv", type=Path, default=RESULTS / "aot_triton.csv", help="the committed figures")
    parser.add_argument("--json", type=Path, help="also write all figures into this file, with the memory instructions in order")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET: expected unset, got 1, which replaces the compiler")
    if not (TOOLS / "cuobjdump").exists():
        parser.error("this Triton has no cuobjdump, which is needed to look at compiled kernels")
    if args.write and (args.quick or tuple(args.sm) != CAPABILITIES):
        parser.error("--write: expected the whole grid (of all kernels, or of those given), without --quick or --sm")

    before = {} if args.write else committed(args.csv, triton_series())
    rows, wrong = [], []
    for kernel, sm in itertools.product(args.kernel or registry, args.sm):
        for configuration in registry[kernel](sm):
            if args.quick and not configuration.quick:
                continue
            row = {"kernel": kernel, "configuration": configuration.name, "sm": sm}
            try:
                compiled = compile_for(configuration.kernel, configuration.arguments, sm)
            except Exception as error:  # the compiler's errors have no common base
                wrong.append((row, [f"does not compile: {type(error).__name__}: {str(error).strip()[:500]}"]))
                continue
            row |= {"warps": compiled.metadata.num_warps, **describe(compiled), "triton": triton_series()}
            rows.append(row)
            found = breaches(row, configuration.limits)
            if before:
                old = before.get((kernel, configuration.name, str(sm)))
                found += regressions(row, old) if old else [f"not in {args.csv.name}: look at the figures, then use --write"]
            if found:
                wrong.append((row, found))
    if rows:
        shown = [{k: v for k, v in row.items() if k not in ("memory", "offsets", "triton")} for row in rows]
        print_table(f"Triton {triton.__version__}: registers in a thread, bytes in a block, instructions", shown)
    if args.json:
        args.json.write_text(json.dumps(rows))
    if not before and not args.write:
        print(f"{args.csv.name} has no figures of Triton {triton_series()}: only the limits are checked")
    for row, found in wrong:
        for breach in found:
            print(f"BREACH {row['kernel']} [{row['configuration']}] sm_{row['sm']}: {breach}")
    if not rows:
        print("BREACH nothing was compiled")
        return 1
    if args.write:  # a breach of the limits stays a breach, whatever the committed figures are
        write(args.csv, rows, args.kernel)
        print(args.csv)
    print(f"{len(rows)} kernels compiled, {sum(len(found) for _, found in wrong)} breaches")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
