"""What the GPU compiler makes of the Triton kernels: no spills, 16-byte accesses, 64-bit row offsets. Needs no GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels.ops.rows import DIVERGENCES

triton = pytest.importorskip("triton", reason="needs Triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not (TOOLS / "cuobjdump").exists(), reason="this Triton ships no cuobjdump to look at compiled kernels with"
)

FP32 = {"student": "float32", "teacher": "float32", "grad": "float32"}
OVER_FP32 = {"student": "float32", "teacher": "float32", "grad": "bfloat16"}  # what the linear loss asks for
SOFTCAPS = {"student_softcap": 30.0, "teacher_softcap": 30.0}
# name: (case, most registers a thread). 128 leaves room for 16 warps on a multiprocessor.
CASES = {
    "bf16": ({"capability": 90}, 96),
    "fp32": ({"capability": 90, **FP32}, 128),
    "bf16 over fp32": ({"capability": 90, **OVER_FP32}, 128),
    "plain distillation over fp32": ({"capability": 90, **OVER_FP32, "text": False}, 128),
    "reverse_kl, tau 1": ({"capability": 90, "divergence": "reverse_kl", "temperature": 1.0}, 96),
    "jsd, tau 3": ({"capability": 90, "divergence": "jsd", "temperature": 3.0}, 128),
    "statistics, softcaps": ({"capability": 90, "stats": True, **SOFTCAPS}, 160),
    "no gradient": ({"capability": 90, "grad": None}, 96),
    "sm_80": ({"capability": 80, **FP32}, 128),
    "sm_100": ({"capability": 100, **OVER_FP32}, 128),
}


def compile_cases(cases: dict[str, dict], cache: Path) -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("triton_aot.py")),
            json.dumps([{"name": k, **v} for k, v in cases.items()]),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_cases({k: case for k, (case, _) in CASES.items()}, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", CASES)
def test_no_spills(name, compiled):
    kernel = compiled[name]
    assert (kernel["stack"], kernel["local"]) == (0, 0)
    assert not [x for x in kernel["memory"] if x.startswith(("LDL", "STL"))]
    assert kernel["registers"] <= CASES[name][1]
    assert kernel["shared"] <= 2048  # only for merging: nothing of a row is staged


@pytest.mark.parametrize("name", CASES)
def test_logits_move_16_bytes_at_a_time(name, compiled):
    loads = [x for x in compiled[name]["memory"] if x.startswith("LDG")]
    wide = [x for x in loads if ".128" in x]
    # What is left are the row's own scalars: target, alpha, two coefficients, the label's logit.
    assert len(wide) >= 4 and len(loads) - len(wide) <= 5, loads
    case = CASES[name][0]
    if case.get("grad", "") is not None:
        # A thread's group is 16 bytes of logits; bf16 gradients of float32 logits are half of that.
        width = ".64" if (case.get("student"), case.get("grad")) == ("float32", "bfloat16") else ".128"
        assert [x for x in compiled[name]["memory"] if x.startswith("STG") and width in x]


@pytest.mark.parametrize("name", [k for k, (case, _) in CASES.items() if case.get("grad", "") is not None])
def test_a_block_is_read_by_all_threads_before_it_is_overwritten(name, compiled):
    """In the gradient's loop, the last one: loads, barrier, stores. A barrier may also come with a change of layout."""
    memory = compiled[name]["memory"]
    last_load = max(i for i, x in enumerate(memory) if x.startswith("LDG") and ".128" in x)
    assert memory[last_load + 1].startswith("BAR"), memory[last_load:]
    assert memory[-1].startswith("STG"), memory[last_load:]


@pytest.mark.parametrize("name", CASES)
def test_row_offsets_are_64_bit(name, compiled):
    offsets = dict(reversed(compiled[name]["addresses"]))  # the first step of each pointer is the one to the row
    tensors = {"student", "audio"} | ({"grad"} if CASES[name][0].get("grad", "") is not None else set())
    tensors |= {"text"} if CASES[name][0].get("text", True) else set()
    assert {offsets[x] for x in tensors} == {"i64"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.environ.get("KDKERNELS_SLOW") != "1", reason="minutes of compiling: set KDKERNELS_SLOW=1")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spills_over_the_grid(capability, tmp_path):
    options = [{}, {"temperature": 3.0, "stats": True, **SOFTCAPS}]
    cases = {}
    for dtypes, divergence, vocab, option in itertools.product(
        ({}, FP32, OVER_FP32), DIVERGENCES, (128256, 50257), options
    ):
        case = {**dtypes, "divergence": divergence, "vocab": vocab, **option}
        cases[str(case)] = {"capability": capability, "sass": False, **case}
    kernels = compile_cases(cases, tmp_path)
    assert not {k: v for k, v in kernels.items() if v["stack"] or v["local"] or v["registers"] > 168}
