"""Kernels that each break one rule of the ahead-of-time gate, and the gate run on them: `python bad_kernels.py --sm 90`.

A process of its own, because TRITON_INTERPRET=1, under which the other tests run, replaces the compiler at import.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from benchmarks import aot, aot_compiler


@triton.jit
def _centre_rows_kernel(source_ptr, out_ptr, stride, WIDE: tl.constexpr, CHECKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if not CHECKED:
        columns += tl.arange(0, 100)  # not a power of two: does not compile
    value = tl.load(source_ptr + row * stride + columns)
    tl.store(out_ptr + row * stride + columns, value - tl.max(value, axis=0))


def centre_rows(name: str, *, stride=4096, wide=True, checked=True, warps=4, maxnreg=255, block=4096, shared=2048):
    rows = torch.empty(8, stride, device="meta")
    arguments = {
        "source_ptr": rows,
        "out_ptr": rows,
        "stride": stride,
        "WIDE": wide,
        "CHECKED": checked,
        "BLOCK": block,
        "num_warps": warps,
        "maxnreg": maxnreg,
    }
    limits = aot_compiler.Limits(
        registers=128, shared=shared, wide_loads=1, narrow_loads=1, wide_stores=1, rows=("source", "out")
    )
    return aot_compiler.Configuration(name, _centre_rows_kernel, arguments, limits, quick=True)


REGISTRY = {
    "good": lambda sm: [centre_rows("good")],
    "spills": lambda sm: [centre_rows("spills", warps=1, maxnreg=32)],
    "registers": lambda sm: [centre_rows("registers", warps=1)],
    "narrow": lambda sm: [centre_rows("narrow", stride=4097)],
    "offsets": lambda sm: [centre_rows("offsets", wide=False)],
    "shared": lambda sm: [centre_rows("shared", shared=0)],
    "broken": lambda sm: [centre_rows("broken", checked=False)],
}

if __name__ == "__main__":
    sys.exit(aot.main(registry=REGISTRY))
