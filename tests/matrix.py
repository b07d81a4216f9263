"""Runs the tests as other processors would: python tests/matrix.py [--all] [--legs NAME ...] [FILE OR FOLDER ...]

A leg is one run of pytest under one choice of instructions: the project's own kernels (KDKERNELS_CPU_ISA), oneDNN's products
(ONEDNN_MAX_CPU_ISA) and PyTorch's own loops (ATEN_CPU_CAPABILITY). The last leg runs beside processes that keep every core busy.
One line a leg is printed; the exit status is 1 if a leg fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
CPU_ISAS = ("generic", "avx2", "avx512", "avx512_bf16")  # from the oldest to the newest
VARIABLES = ("KDKERNELS_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@dataclass(frozen=True)
class Leg:
    name: str
    cpu_isa: str | None = None
    """The project's kernels. None: the best that this processor has."""
    onednn_isa: str | None = None
    aten: str | None = None
    loaded: bool = False

    @property
    def settings(self) -> dict[str, str]:
        values = dict(zip(VARIABLES, (self.cpu_isa, self.onednn_isa, self.aten), strict=True))
        return {k: v for k, v in values.items() if v is not None}


LEGS = (
    Leg("oldest", "generic", "AVX2", "default"),
    Leg("avx2", "avx2", "AVX2", "avx2"),
    Leg("avx512", "avx512", "AVX512_CORE", "avx512"),
    Leg("avx512_bf16", "avx512_bf16", "AVX512_CORE_BF16", "avx512"),
    # Old kernels alone and old products alone: they show which of the two makes "oldest" fail.
    Leg("generic-kernels", "generic"),
    Leg("old-products", None, "AVX2"),
    Leg("this-processor"),
    Leg("loaded", loaded=True),
)


@dataclass
class Outcome:
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    note: str = ""
    """Why pytest itself failed."""


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_leg(leg: Leg, pytest_arguments: Sequence[str]) -> Outcome:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | leg.settings
    environment.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # torch.compile keeps C++ on disk whose loops have one vector width, and does not see that ATEN_CPU_CAPABILITY is another.
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *pytest_arguments]
        with busy_cores(os.cpu_count() or 1) if leg.loaded else contextlib.nullcontext():
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        outcome = read_report(report) if report.exists() else Outcome()
    if done.returncode not in (0, 1) or (done.returncode == 1 and not outcome.failed):
        lines = (done.stdout + done.stderr).strip().splitlines()
        outcome.note = f"pytest ended with status {done.returncode}: {lines[-1] if lines else 'no output'}"
    return outcome


def read_report(path: Path) -> Outcome:
    outcome = Outcome()
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return outcome


def best_cpu_isa() -> str:
    sys.path.insert(0, str(ROOT))
    from kdkernels.ops import native

    return native.load_library().best_isa()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/matrix.py", description=__doc__.splitlines()[0])
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--only", choices=["fast", "slow"], default="fast", help="the tier to run (default: fast)")
    tier.add_argument("--all", action="store_true", help="run both tiers")
    parser.add_argument("--legs", nargs="+", choices=[x.name for x in LEGS], metavar="NAME",
                        help=f"run these legs only: {', '.join(x.name for x in LEGS)}")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest-xdist (default: 2)")
    parser.add_argument("paths", nargs="*", help="test files or folders (default: all)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    pytest_arguments = ["-n", str(options.workers), *options.paths]
    if not options.all:
        pytest_arguments += ["-m", "slow" if options.only == "slow" else "not slow"]
    known = CPU_ISAS[: CPU_ISAS.index(best_cpu_isa()) + 1]
    failed = 0
    for leg in LEGS:
        if options.legs and leg.name not in options.legs:
            continue
        settings = " ".join(f"{k}={v}" for k, v in leg.settings.items()) or "no settings"
        title = f"{leg.name} ({settings}{', beside busy processes' if leg.loaded else ''})"
        if leg.cpu_isa is not None and leg.cpu_isa not in known:
            print(f"{title}: left out, this processor has no {leg.cpu_isa}", flush=True)
            continue
        start = time.monotonic()
        outcome = run_leg(leg, pytest_arguments)
        bad = bool(outcome.failed or outcome.note)
        failed += bad
        print(
            f"{title}: {'FAILED' if bad else 'passed'}; {outcome.passed} passed, {len(outcome.failed)} failed, "
            f"{outcome.skipped} skipped in {time.monotonic() - start:.0f} s",
            *outcome.failed,
            *([outcome.note] if outcome.note else []),
            sep="\n    ",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
