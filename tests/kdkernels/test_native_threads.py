"""The native library's threads are those of PyTorch's OpenMP, and a forked child, which has lost them, still gets its rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdkernels.ops import native

FORKING = """
import os
import torch
from kdkernels import fused_caad_loss
from kdkernels.ops import native

torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
logits = [torch.randn(64, 4096, generator=g) for _ in range(3)]
target = torch.zeros(64, dtype=torch.int64)
(logits[0] @ logits[1].T).sum()  # PyTorch's threads start
loss = float(fused_caad_loss(*logits, target, impl="cpu"))
print("parent", native.load_library().uses_openmp(), flush=True)
child = os.fork()
if child == 0:
    same = float(fused_caad_loss(*logits, target, impl="cpu")) == loss
    print("child", native.load_library().uses_openmp(), same, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.skipif(sys.platform != "linux" or not native.available(), reason="needs Linux and the native library")
def test_a_forked_child_starts_threads_of_its_own():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    parent, child = run.stdout.splitlines()
    assert child == "child False True"
    beside = Path(torch.__file__).parent
    found = [*beside.glob("lib/lib*omp*"), *beside.parent.glob("torch.libs/lib*omp*")]
    assert parent == f"parent {bool(found)}"
