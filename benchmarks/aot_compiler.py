"""Compile a Triton kernel for a GPU that is not here, read the result, and hold it against limits."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

# compute capability -> multiprocessors, and bytes of shared memory that a block may use: A100, H100, B200.
MACHINES = {80: (108, 163 << 10), 90: (132, 227 << 10), 100: (148, 227 << 10)}
CAPABILITIES = tuple(MACHINES)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
POINTERS |= {torch.float64: "*fp64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1"}
# These keywords of a launch go to the compiler, not to the kernel.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg")
FIGURES = ("registers", "shared", "stack", "local", "ldg_128", "ldg_narrow", "stg_128", "stg_narrow", "ldl", "stl", "bar")
REGISTERS_SLACK = 8


@dataclass(frozen=True)
class Limits:
    """What a compiled kernel may use and must do.

    Attributes:
        registers: largest number of registers in a thread.
        shared: largest number of bytes of static shared memory in a block.
        wide_loads: smallest number of 128-bit global loads (LDG, LDGSTS, or a bulk copy of any size).
        narrow_loads: largest number of narrower ones, which read a row's scalars. None: any number.
        wide_stores: smallest number of 128-bit global stores.
        rows: pointer arguments that need 64 bits for their first offset, the one to the row.
    """

    registers: int
    shared: int
    wide_loads: int = 0
    narrow_loads: int | None = None
    wide_stores: int = 0
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Configuration:
    """A kernel with the arguments of one launch (meta tensors stand for memory) and its limits."""

    name: str
    kernel: triton.JITFunction
    arguments: dict[str, object]
    limits: Limits
    quick: bool = False


def compile_for(kernel: triton.JITFunction, arguments: dict[str, object], capability: int):
    """The kernel as a launch with these arguments would compile it: pointers are multiples of 16, and so are some integers."""
    options = {k: arguments[k] for k in OPTIONS if k in arguments and k not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        specialise = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialise and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def describe(compiled) -> dict:
    """FIGURES of a compiled kernel, its memory instructions in order, and the index type of each pointer's first offset."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run_tool("-res-usage", file.name)
        listing = _run_tool("-sass", file.name)
    registers, stack, shared, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage).groups()
    )
    # Kernels that pipeline ask for their shared memory at launch. The cubin does not hold that number.
    shared = max(shared, compiled.metadata.shared)
    # Each match is the mnemonic of one instruction, without its address, predicate and operands.
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", listing)
    memory = [x for x in operations if x.split(".")[0] in ("LDG", "LDGSTS", "UTMALDG", "STG", "UTMASTG", "LDL", "STL", "BAR")]
    figures = {"registers": registers, "shared": shared, "stack": stack, "local": local, **count_accesses(memory)}
    return figures | {"memory": memory, "offsets": first_offsets(compiled.asm["ttir"])}


def _run_tool(*arguments: str) -> str:
    done = subprocess.run([str(TOOLS / "cuobjdump"), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def count_accesses(memory: Sequence[str]) -> dict[str, int]:
    """Instructions by kind; wide: 128 or 256 bits, or a bulk copy (UTMA*)."""

    def count(families: tuple[str, ...], *, wide: bool | None = None) -> int:
        chosen = [x for x in memory if x.split(".")[0] in families]
        return sum(wide is None or wide == bool(re.search(r"\.128|\.256|ENL2|^UTMA", x)) for x in chosen)

    loads, stores = ("LDG", "LDGSTS", "UTMALDG"), ("STG", "UTMASTG")
    return {
        "ldg_128": count(loads, wide=True),
        "ldg_narrow": count(loads, wide=False),
        "stg_128": count(stores, wide=True),
        "stg_narrow": count(stores, wide=False),
        "ldl": count(("LDL",)),
        "stl": count(("STL",)),
        "bar": count(("BAR",)),
    }


def first_offsets(ttir: str) -> dict[str, str]:
    """pointer argument (without _ptr) -> type of the index in the first `tt.addptr` on it, also through a splat."""
    roots = {name: name.lstrip("%") for name in re.findall(r"(%\w+): !tt\.ptr<", ttir)}
    found: dict[str, str] = {}
    for line in ttir.splitlines():
        if match := re.match(r"\s*(%\w+) = tt\.(?:splat|broadcast|expand_dims) (%\w+)\b.*!tt\.ptr<", line):
            result, source = match.groups()
            if source in roots:
                roots[result] = roots[source]
        elif match := re.match(r"\s*%\w+ = tt\.addptr (%\w+), .*?: .*, (?:tensor<[\dx]*)?(i\d+)", line):
            source, index = match.groups()
            if source in roots:
                found.setdefault(roots[source].removesuffix("_ptr"), index)
    return found


def breaches(figures: dict, limits: Limits) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty if all is well."""
    out = []
    if figures["stack"] or figures["local"]:
        out.append(f"{figures['stack']} bytes of stack, {figures['local']} of local memory, expected none")
    if figures["ldl"] or figures["stl"]:
        out.append(f"spills: {figures['ldl']} loads from and {figures['stl']} stores to local memory")
    if figures["registers"] > limits.registers:
        out.append(f"{figures['registers']} registers, expected at most {limits.registers}")
    if figures["shared"] > limits.shared:
        out.append(f"{figures['shared']} bytes of shared memory, expected at most {limits.shared}")
    if figures["ldg_128"] < limits.wide_loads:
        out.append(f"{figures['ldg_128']} 128-bit loads, expected at least {limits.wide_loads}")
    if limits.narrow_loads is not None and figures["ldg_narrow"] > limits.narrow_loads:
        out.append(f"{figures['ldg_narrow']} loads narrower than 128 bits, expected at most {limits.narrow_loads}")
    if figures["stg_128"] < limits.wide_stores:
        out.append(f"{figures['stg_128']} 128-bit stores, expected at least {limits.wide_stores}")
    for name in limits.rows:
        if figures["offsets"].get(name) != "i64":
            out.append(f"row offset of {name} in {figures['offsets'].get(name, 'nothing')}, expected i64")
    return out


def regressions(figures: dict, before: dict) -> list[str]:
    """What got worse against committed figures (FIGURES as numbers or text)."""
    old = {name: int(before[name]) for name in FIGURES}
    out = []
    if figures["registers"] > old["registers"] + REGISTERS_SLACK:
        out.append(f"{figures['registers']} registers, {old['registers']} committed")
    for name, what in (("shared", "bytes of shared memory"), ("stack", "bytes of stack"), ("local", "bytes of local memory"),
                       ("ldl", "local loads"), ("stl", "local stores")):  # fmt: skip
        if figures[name] > old[name]:
            out.append(f"{figures[name]} {what}, {old[name]} committed")
    for name, what in (("ldg_128", "loads"), ("stg_128", "stores")):
        if figures[name] < old[name]:
            out.append(f"{figures[name]} 128-bit {what}, {old[name]} committed")
    return out
