"""What the GPU compiler makes of the Triton kernels: the gate of benchmarks/aot.py, and the order of accesses. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not (TOOLS / "cuobjdump").exists(), reason="this Triton ships no cuobjdump to look at compiled kernels with"
)


def run_gate(*arguments: str) -> subprocess.CompletedProcess:
    """A process of its own, because TRITON_INTERPRET=1, under which the tests run, replaces the compiler at import."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    figures = tmp_path_factory.mktemp("aot") / "figures.json"
    return run_gate("--quick", "--json", str(figures)), figures


@pytest.mark.slow
def test_the_gate_passes(quick):
    """No spills, 16-byte accesses, 64-bit row offsets, and nothing worse than the committed figures."""
    done, _ = quick
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert ", 0 breaches" in done.stdout


@pytest.mark.slow
def test_a_block_is_read_by_all_threads_before_it_is_overwritten(quick):
    """In the gradient's loop, the last one: loads, barrier, stores. A barrier may also come with a change of layout."""
    kernels = json.loads(quick[1].read_text())
    checked = [
        x["memory"]
        for x in kernels
        if x["kernel"] == "caad_rows" and x["ldg_128"] and "grad False" not in x["configuration"]
    ]
    assert len(checked) >= 12
    for memory in checked:
        last_load = max(i for i, x in enumerate(memory) if x.startswith("LDG") and ".128" in x)
        assert memory[last_load + 1].startswith("BAR"), memory[last_load:]
        assert memory[-1].startswith("STG"), memory[last_load:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.environ.get("KDKERNELS_SLOW") != "1", reason="minutes of compiling: set KDKERNELS_SLOW=1")
def test_the_gate_passes_over_the_grid():
    done = run_gate()
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
