"""Triton's own launch path for an H100, without a GPU: `python sm90_launches.py` prints what each loss launches, as JSON.

A driver that stands for the GPU answers Triton. So every kernel is specialised, compiled to machine code, held against the limits
of the device and packed with its arguments as on a GPU. Only the last step differs: the launch is written down. The tensors lie
on the CPU, and `take_cpu_for_cuda` replaces what would refuse them. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from kdkernels import (
    TeacherSource,
    fused_caad_loss,
    fused_layer_mse_loss,
    fused_linear_caad_loss,
    fused_linear_multi_teacher_loss,
    fused_linear_projected_loss,
    project_teacher,
)
from kdkernels.ops import (
    dispatch,
    linear,
    schema,
    triton_caad,
    triton_gemm_sums,
    triton_layers,
    triton_mixture,
    triton_no_logits,
    triton_projection,
    triton_shards,
    triton_survivors,
)
from kdkernels.ops.rows import RowProblem, RowSpec

MODULES = (
    triton_caad,
    triton_gemm_sums,
    triton_layers,
    triton_mixture,
    triton_no_logits,
    triton_projection,
    triton_shards,
    triton_survivors,
)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = 232448  # of a block, on compute capability 9.0
REGISTERS = 65536  # of a multiprocessor
LARGEST_GRID = (2**31 - 1, 65535, 65535)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.uint8: "*u8"}
POINTERS |= {torch.float64: "*fp64", torch.int32: "*i32"}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, V, H_S, H_T = 24, 2048, 64, 128


class Launcher:
    """In place of Triton's compiled launcher: checks the arguments as that does, and writes them down."""

    def __init__(self, source, metadata) -> None:
        self.types, self.metadata = list(source.signature.values()), metadata

    def __call__(self, x, y, z, stream, function, packed, metadata, enter_hook, exit_hook, *arguments) -> None:
        assert len(arguments) == len(self.types), "arguments do not fit the signature"
        for kind, value in zip(self.types, arguments, strict=True):
            if kind.startswith("*"):
                assert POINTERS[value.dtype] == kind, (kind, value.dtype)
            elif kind in ("i32", "i64"):
                assert isinstance(value, int) and -(2 ** (int(kind[1:]) - 1)) <= value < 2 ** (int(kind[1:]) - 1)
            elif kind.startswith("tensordesc"):
                block = ",".join(map(str, value.block_shape))
                assert kind.replace(" ", "") == f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>", kind
            elif kind == "fp32":
                assert isinstance(value, float)
            else:
                assert kind == "constexpr", kind
        assert all(0 < size <= most for size, most in zip((x, y, z), LARGEST_GRID, strict=True)), (x, y, z)
        driver.launches.append(
            {
                "kernel": self.metadata.name,
                "grid": [x, y, z],
                "warps": self.metadata.num_warps,
                "stages": self.metadata.num_stages,
                "maxnreg": self.metadata.maxnreg,
                "fused": self.metadata.enable_fp_fusion,
                "shared": self.metadata.shared,
                "registers": function,  # what load_binary gave
            }
        )


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "max_num_regs": REGISTERS, "warpSize": 32}

    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, most threads of a block) of the machine code, as the CUDA driver tells them."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", said.stdout + said.stderr).groups())
        driver.compiled.append(name)
        # A warp gets its registers in blocks of 8 a thread.
        most_threads = min(1024, REGISTERS // (8 * -(-registers // 8)) // 32 * 32)
        return name, registers, registers, stack + local, most_threads

    def unload_module(self, module):
        pass


class Sm90:
    """What Triton asks of a driver."""

    launcher_cls, utils = Launcher, Utils()

    def __init__(self) -> None:
        self.launches: list[dict] = []
        self.compiled: list[str] = []

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


driver = Sm90()


def take_cpu_for_cuda() -> None:
    triton.runtime.driver.set_active(driver)
    dispatch.triton_interpreted = lambda: True  # impl="triton" takes CPU tensors
    schema._triton_scales = lambda grad: grad.stride(-1) == 1
    linear.kept_tokens = lambda target, ignore_index: None  # ignored tokens are not left out
    for module in MODULES:
        module._device_of = lambda tensor, kernel: contextlib.nullcontext()


def normal(*shape, dtype=BF16, trains=False):
    return torch.randn(*shape).to(dtype).requires_grad_(trains)


def target(n=N, vocab=V):
    return torch.arange(n) % vocab


def from_logits(n=N, vocab=V, dtype=BF16, **options):
    student, teacher = normal(n, vocab, dtype=dtype, trains=True), [normal(n, vocab, dtype=dtype) for _ in range(2)]
    loss = fused_caad_loss(student, *teacher, target(n, vocab), impl="triton", **options)
    (loss[0] if isinstance(loss, tuple) else loss).backward()


def from_hidden(n=N, vocab=V, dtype=BF16, *, gradient=True, bias=False, **options):
    heads = [normal(n, H_S, dtype=dtype, trains=gradient), normal(vocab, H_S, dtype=dtype, trains=gradient)]
    heads += [normal(n, H_T, dtype=dtype), normal(n, H_T, dtype=dtype), normal(vocab, H_T, dtype=dtype)]
    if bias:
        options |= {"student_bias": normal(vocab, dtype=dtype), "teacher_bias": normal(vocab, dtype=dtype)}
    loss = fused_linear_caad_loss(*heads, target(n, vocab), impl="triton", **options)
    if gradient:
        loss.backward()


def with_sums(**options):
    """From hidden states, by GEMMs that leave the rows' sums."""
    os.environ["KDKERNELS_GEMM_SUMS"] = "1"
    from_hidden(**options)
    del os.environ["KDKERNELS_GEMM_SUMS"]


def from_teachers(divergence="forward_kl", n=N, **options):
    sources = [
        TeacherSource(normal(n, H_T), normal(V, H_T), normal(n, H_T) if k else None, divergence=divergence, **options)
        for k in range(3)
    ]
    loss = fused_linear_multi_teacher_loss(normal(n, H_S, trains=True), normal(V, H_S), sources, target(n), impl="triton")
    loss.backward()


def from_layers(dtype=BF16, direction="student_to_teacher", n=N, **options):
    weight = normal(*((H_T, H_S) if direction == "student_to_teacher" else (H_S, H_T)), dtype=dtype, trains=True)
    fused_layer_mse_loss(
        [normal(n, H_S, dtype=dtype, trains=True)],
        [normal(n, H_T, dtype=dtype)],
        [weight],
        teacher_text_hidden=[normal(n, H_T, dtype=dtype)],
        alpha=1.5,
        direction=direction,
        impl="triton",
        **options,
    ).backward()


def from_projection(n=N, **options):
    heads = [normal(n, H_T), normal(n, H_T), normal(V, H_T), normal(V, H_S)]
    projection = project_teacher(*heads, top_k=16)
    loss = fused_linear_projected_loss(normal(n, H_S, trains=True), heads[-1], projection, target(n), impl="triton", **options)
    (loss[0] if isinstance(loss, tuple) else loss).backward()


def one_rank(n=N, **options):
    """All that a rank computes of its slice, which begins at id 64."""
    logits, ones = [normal(1, n, V, dtype=FP32) for _ in range(3)], torch.ones(n)
    spec = RowSpec(vocab=V, **options)
    shard = triton_shards.TritonShard(RowProblem(*logits, target(n), ones[:1], ones, ones, spec, logits[0], True), 64)
    shard.sums(shard.audio_max())
    shard.jsd_sums(torch.ones(2, n))
    shard.gradient(torch.ones(7, n))


def some_layer_rows():
    """Rows that do not count: on the CPU they are left out before the kernel, on a GPU they are not."""
    u, v = (normal(N, H_T) for _ in range(2))
    valid, ones = torch.arange(N) > 2, torch.ones(N)
    triton_layers.layer_rows(u, v, None, valid, ones[:1], ones, normalize=False, grad_u=u, grad_v=torch.empty_like(v))


CALLS = {
    "logits": lambda: from_logits(),
    "logits in place, fp16": lambda: fused_caad_loss(
        normal(N, V, dtype=FP16, trains=True) * 1.0, normal(N, V, dtype=FP16), None, target(), impl="triton", inplace=True
    ).backward(),
    "logits, statistics": lambda: from_logits(dtype=FP32, vocab=2047, divergence="jsd", temperature=3.0, return_stats=True),
    "hidden": lambda: from_hidden(),
    "hidden, bf16 logits": lambda: from_hidden(logits_dtype=BF16, student_softcap=30.0, teacher_softcap=30.0, bias=True),
    "hidden, survivors": lambda: from_hidden(plausibility=0.1, bias=True),
    "hidden, survivors, fp32": lambda: from_hidden(plausibility=0.1, dtype=FP32),
    "sums": lambda: with_sums(),
    "sums, bf16 logits": lambda: with_sums(logits_dtype=BF16, student_softcap=30.0, bias=True, temperature=1.0),
    "sums, odd vocabulary": lambda: with_sums(vocab=2047, kd_weight=1.0),
    "no logits": lambda: from_hidden(gradient=False),
    "no logits, plausibility": lambda: from_hidden(gradient=False, plausibility=0.1, bias=True, divergence="forward_kl"),
    "no logits, fp32": lambda: from_hidden(gradient=False, dtype=FP32, divergence="reverse_kl"),
    "teachers": lambda: from_teachers(),
    "teachers, reverse": lambda: from_teachers("reverse_kl", softcap=30.0),
    "layers": lambda: from_layers(),
    "layers, teacher projected": lambda: from_layers(FP32, "teacher_to_student", normalize=True),
    "layer rows": some_layer_rows,
    "projection": lambda: from_projection(),
    "projection, statistics": lambda: from_projection(return_stats=True),
    "rank": lambda: one_rank(divergence="jsd", plausibility=0.1),
    "rank, reverse": lambda: one_rank(divergence="reverse_kl", temperature=3.0, student_softcap=30.0),
    # What was compiled serves other numbers of tokens, and other vocabularies that 16 divides.
    "again: logits": lambda: from_logits(n=3, vocab=128256),
    "again: hidden": lambda: from_hidden(n=2 * N + 1),
    "again: sums": lambda: with_sums(n=6 * N + 1),
    "again: no logits": lambda: from_hidden(n=2 * N + 1, gradient=False),
    "again: layers": lambda: from_layers(n=N + 1),
    "again: projection": lambda: from_projection(n=N + 1),
    # 16 divides these numbers and not N.
    "again: logits, statistics": lambda: from_logits(
        n=2 * N, dtype=FP32, vocab=2047, divergence="jsd", temperature=3.0, return_stats=True
    ),
    "again: projection, statistics": lambda: from_projection(n=2 * N, return_stats=True),
    "again: teachers": lambda: from_teachers(n=2 * N),
    "again: rank": lambda: one_rank(n=2 * N, divergence="jsd", plausibility=0.1),
}


def main() -> None:
    torch.manual_seed(0)
    take_cpu_for_cuda()
    found = {}
    for name, call in CALLS.items():
        driver.launches, driver.compiled = [], []
        call()
        found[name] = {"launches": driver.launches, "compiled": driver.compiled}
    functions = {k for module in MODULES for k, v in vars(module).items() if isinstance(v, triton.JITFunction)}
    print(json.dumps({"kernels": sorted(k for k in functions if k.endswith("_kernel")), "calls": found}))


if __name__ == "__main__":
    main()
