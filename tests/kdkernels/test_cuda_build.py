"""What nvcc makes of the one-read row kernel, on a machine without a GPU: no spills, bulk copies, 16-byte accesses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "caad_rows.cu"
ARCHITECTURES = ("90a", "100a")
KERNELS = 12  # three divergences; logits as they lie in memory, scaled and softcapped, and two common cases of dtypes
REGISTERS = 128  # of a thread: what two blocks of 256 threads leave
HOMES = [os.environ[x] for x in ("CUDA_HOME", "CUDA_PATH") if x in os.environ] + ["/usr/local/cuda"]


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or next((x for x in (shutil.which(f"{home}/bin/nvcc") for home in HOMES) if x), None)


def find_disassembler() -> str | None:
    """nvdisasm of the toolkit, or the one that Triton brings along."""
    found = shutil.which("nvdisasm") or next((x for x in (shutil.which(f"{h}/bin/nvdisasm") for h in HOMES) if x), None)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        found = shutil.which(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"))
    return found


NVCC, NVDISASM = find_nvcc(), find_disassembler()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="needs nvcc")]


@dataclass
class Kernel:
    name: str
    stack: int
    spills: int
    registers: int
    sass: list[str] = field(default_factory=list)  # opcodes


def compile_for(architecture: str, folder: Path) -> list[Kernel]:
    cubin = folder / f"{architecture}.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin", str(SOURCE)]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "Unsupported gpu architecture" in done.stderr:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    assert done.returncode == 0, done.stderr[-4000:]
    report = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.stdout + done.stderr,
        re.DOTALL,
    )
    kernels = {name: Kernel(name, int(a), int(b) + int(c), int(d)) for name, a, b, c, d in report}
    if NVDISASM is not None:
        text = subprocess.run([NVDISASM, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        name = None
        for line in text.splitlines():
            if section := re.search(r"\.text\.(\w+)", line):
                name = section[1]
            elif opcode := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
                kernels[name].sass.append(opcode[1])
    return list(kernels.values())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory):
    return compile_for(request.param, tmp_path_factory.mktemp("cubin"))


def test_registers_and_no_spills(kernels):
    assert len(kernels) == KERNELS
    for kernel in kernels:
        assert (kernel.stack, kernel.spills) == (0, 0), kernel.name
        assert kernel.registers <= REGISTERS, kernel.name


@pytest.mark.skipif(NVDISASM is None, reason="needs nvdisasm, of the CUDA toolkit or of Triton")
def test_memory_is_accessed_as_planned(kernels):
    for kernel in kernels:
        sass = kernel.sass
        assert len(sass) > 1000, kernel.name
        assert not [x for x in sass if x.startswith(("LDL", "STL"))], "local memory"
        assert [x for x in sass if x.startswith("UBLKCP")], "no bulk copies into shared memory"
        assert [x for x in sass if x.startswith("SYNCS.PHASECHK")], "nobody waits for the copies"
        assert [x for x in sass if x.startswith("UCGABAR")], "no cluster barrier"
        assert sum(x == "LDS.128" for x in sass) >= 8, "logits are not read 16 bytes at a time"
        # Two or three chunks' gradient (fp32 halves, packed items) and the zeros, in 16 bytes.
        assert sum(x == "STG.E.128" for x in sass) >= 4, "gradients are not written 16 bytes at a time"
        assert not [x for x in sass if x.startswith("LDG") and ".128" in x], "logits are read around shared memory"
        assert not [x for x in sass if x.startswith(("ATOM", "RED.", "REDG"))], "an order that is not fixed"
