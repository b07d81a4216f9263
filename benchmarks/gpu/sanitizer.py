"""compute-sanitizer over small launches of the CUDA row kernel: `python -m benchmarks.gpu.sanitizer [TOOL ...]`.

memcheck: accesses outside of the tensors and of shared memory; racecheck: hazards in shared memory; synccheck: misused barriers.
The last line printed is JSON with `met`, `result` and what each tool said.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck")
# Refused attributes are how the probe asks; they are no errors of the kernel.
OPTIONS = ("--kernel-name", "kns=caad_rows_kernel", "--report-api-errors", "no", "--error-exitcode", "9")


def errors_of(output: str) -> int | None:
    """The number in a tool's summary; None where there is no summary."""
    found = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    return None if found is None else int(found[1] or found[2])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitizer", description=__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"some of {', '.join(TOOLS)} (default: all)")
    tools = parser.parse_args(argv).tools or TOOLS
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"TOOL: expected some of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        raise SystemExit("needs compute-sanitizer (CUDA toolkit)")
    said, met = {}, True
    for tool in tools:
        command = [program, "--tool", tool, *OPTIONS, sys.executable, "-m", "benchmarks.gpu.launches"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        errors = errors_of(done.stdout + done.stderr)
        said[tool] = f"{errors} errors" if errors is not None else f"no answer, exit status {done.returncode}"
        if errors != 0 or done.returncode != 0:
            met = False
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
    print(json.dumps({"met": met, "result": "; ".join(f"{k}: {v}" for k, v in said.items()), **said}))


if __name__ == "__main__":
    main()
