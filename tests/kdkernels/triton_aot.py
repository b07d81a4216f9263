"""Compiles Triton kernels for GPUs that need not be there and prints what came out, as JSON. Run by test_triton_aot.py.

A process of its own, because TRITON_INTERPRET=1, under which the other tests run, replaces the compiler at import:

    python tests/kdkernels/triton_aot.py '[{"name": "a", "capability": 90, "student": "bfloat16", ...}, ...]'
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdkernels.ops import triton_caad
from kdkernels.ops.rows import RowSpec

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")


def compile_for(kernel, arguments: dict, capability: int):
    """The kernel as a launch with these arguments would compile it: 16 divides pointers, and integers where it does."""
    options = {k: arguments[k] for k in OPTIONS if k in arguments}
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        specialise = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialise and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def row_arguments(
    *,
    student="bfloat16",
    teacher="bfloat16",
    grad="bfloat16",
    batch=8,
    seq=1024,
    vocab=128256,
    text=True,
    stats=False,
    **spec,
) -> dict:
    """Arguments of the row kernel's launch; meta tensors stand for memory."""

    def logits(dtype: str) -> torch.Tensor:
        return torch.empty(batch, seq, vocab, dtype=getattr(torch, dtype), device="meta")

    n = batch * seq
    per_row = torch.empty(n, device="meta")
    return triton_caad._row_arguments(
        logits(student),
        logits(teacher),
        logits(teacher) if text else None,
        torch.empty(n, dtype=torch.int64, device="meta"),
        per_row,
        per_row,
        per_row,
        RowSpec(vocab=vocab, **spec),
        None if grad is None else logits(grad),
        per_row,
        per_row,
        torch.empty(4, n, device="meta") if stats else None,
    )


def run_tool(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def describe(compiled, *, sass: bool) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool(str(TOOLS / "cuobjdump"), "-res-usage", file.name)
        listing = run_tool(str(TOOLS / "cuobjdump"), "-sass", file.name) if sass else ""
    registers, stack, shared, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage).groups()
    )
    # One letter-dotted mnemonic an instruction, without its address, predicate and operands.
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", listing)
    memory = [x for x in operations if x.split(".")[0] in ("LDG", "STG", "LDL", "STL", "BAR")]
    addresses = re.findall(r"tt\.addptr %(\w+?)_ptr, .*?: !tt\.ptr<\w+>, (i\d+)", compiled.asm["ttir"])
    return {
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "local": local,
        "memory": memory,
        "addresses": addresses,
    }


def main() -> None:
    report = {}
    for case in json.loads(sys.argv[1]):
        name, capability, sass = case.pop("name"), case.pop("capability"), case.pop("sass", True)
        compiled = compile_for(triton_caad._caad_row_kernel, row_arguments(**case), capability)
        report[name] = describe(compiled, sass=sass)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
