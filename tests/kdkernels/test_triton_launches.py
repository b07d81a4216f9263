"""What the losses launch on an H100: the real compiler and launch path of Triton, and a driver that writes launches down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="this Triton ships no cuobjdump to read registers with"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """In a process of its own, because TRITON_INTERPRET=1, under which the tests run, replaces the compiler at import."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # what Triton 3.10 takes where a launch says nothing
    script = Path(__file__).with_name("sm90_launches.py")
    done = subprocess.run([sys.executable, script], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout)


WITH_TILES = ("_no_logits_kernel", "_audio_max_kernel", "_survivors_kernel", "_summed_gemm_kernel")


def test_every_kernel_is_launched_within_the_limits(found):
    launches = [x for call in found["calls"].values() for x in call["launches"]]
    assert {x["kernel"] for x in launches} == set(found["kernels"]) and len(found["kernels"]) == 16
    for x in launches:  # Triton itself refuses more shared memory or threads than the device has
        assert x["registers"] <= (x["maxnreg"] or 255), x
        assert x["shared"] <= 4096 or x["kernel"] in WITH_TILES, x
        assert x["fused"], f"{x['kernel']}: not asked for, so Triton 3.9 warns and 3.10 multiplies and adds apart"


def kernels_of(found, call):
    return [(x["kernel"].strip("_").removesuffix("_kernel"), x["grid"][0]) for x in found["calls"][call]["launches"]]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("logits", [("caad_row", 24)]),
        ("logits in place, fp16", [("caad_row", 24), ("scale_rows", 24)]),
        ("hidden", [("caad_row", 24)]),
        ("hidden, survivors", [("survivors", 1), ("caad_row", 24)]),
        ("sums", [("summed_gemm", 8), ("summed_gemm", 8), ("one_read", 24)]),
        ("sums, bf16 logits", [("summed_gemm", 16), ("summed_gemm", 16), ("one_read", 24)]),
        ("again: sums", [("summed_gemm", 16), ("summed_gemm", 16), ("one_read", 145)]),
        ("no logits", [("contrast", 24), ("no_logits", 1), ("merge", 24)]),
        ("no logits, plausibility", [("audio_max", 1), ("no_logits", 1), ("merge", 24)]),
        ("teachers", [("mix_row", 24)] * 3 + [("caad_row", 24)]),
        ("layers", [("layer_row", 24)]),
        ("layer rows", [("layer_row", 24)]),
        ("projection", [("projected_row", 24)]),
        ("rank", [(f"shard_{x}", 24) for x in ("max", "sums", "jsd", "gradient")]),
        ("again: hidden", [("caad_row", 49)]),
    ],
)
def test_kernels_and_programs_of_a_call(call, expected, found):
    assert kernels_of(found, call) == expected


def test_nothing_is_compiled_for_another_number_of_tokens(found):
    again = {k: v for k, v in found["calls"].items() if k.startswith("again")}
    assert len(again) == 10 and all(v["launches"] for v in again.values())
    assert {k: v["compiled"] for k, v in again.items() if v["compiled"]} == {}
