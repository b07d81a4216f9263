"""Instructions of the CUDA row kernel, counted without a GPU: `python -m benchmarks.aot_cuda`. Needs nvcc and Triton's nvdisasm.

Compiles csrc/cuda/caad_rows.cu for sm_90a and disassembles it. For the forward KL at temperature 2 it counts what a thread issues
for a column in the loop of the sums and in that of the gradient. The count is the shortest way round the loop that does the work:
16-byte loads of all tensors, two exponentials a column, the multiply-adds of the formula, and 16-byte stores of the gradient. So
branches for masks and for other dtypes, which the usual chunk does not take, do not count.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import triton

from .common import RESULTS, print_table

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "caad_rows.cu"
NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
ARCHITECTURE = "90a"
GROUP = 8  # columns of one access
MOST_INSTRUCTIONS = 2000  # of a loop over columns; the loop over rows has more
# 16-byte loads a tensor and group; whose logits with a bf16 gradient
LOADS = {"bf16": 1, "float32": 2}
Blocks = list[tuple[list[str], list[int]]]  # opcodes and successors of each basic block


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot_cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=SOURCE, help="caad_rows.cu, for example of an older checkout")
    parser.add_argument("--design", default="256 threads, two blocks", help="the name of this source in the table")
    parser.add_argument("--write", action="store_true", help="replace this design's rows of results/aot_cuda.csv")
    args = parser.parse_args(argv)
    rows = counts(args.source, args.design)
    print_table(f"sm_{ARCHITECTURE}, forward KL, instructions a column", rows)
    if args.write:
        path = RESULTS / "aot_cuda.csv"
        kept = []
        if path.exists():
            with path.open(newline="") as f:
                kept = [row for row in csv.DictReader(f) if row["design"] != args.design]
        with path.open("w", newline="") as f:
            writer = csv.DictWriter(f, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows([*kept, *rows])
        print(path)


def counts(source: Path, design: str) -> list[dict]:
    """A row for each pair of logits and text path: the kernel that needs the fewest instructions for it."""
    registers, functions = compile_and_disassemble(source)
    rows = []
    for logits, loads in LOADS.items():
        for text in (False, True):
            found = []
            for name, blocks in functions.items():
                if "caad_rows_kernelILi0E" not in name:  # forward_kl
                    continue
                sums = of_loop(blocks, loads, text, gradient=False)
                gradient = of_loop(blocks, loads, text, gradient=True)
                if sums is not None and gradient is not None:
                    found.append((sums + gradient, sums, gradient, registers[name]))
            _, sums, gradient, used = min(found)
            rows.append(
                {"design": design, "logits": logits, "text": text, "sm": ARCHITECTURE, "registers": used, "sums": sums,
                 "gradient": gradient, "both": sums + gradient}
            )  # fmt: skip
    return rows


def compile_and_disassemble(source: Path) -> tuple[dict[str, int], dict[str, Blocks]]:
    """(registers, basic blocks) of each kernel by its mangled name."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        code = ["-gencode", f"arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"]
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", str(source), *code, "-o", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        text = subprocess.run([str(NVDISASM), "-c", file.name], capture_output=True, text=True, check=True).stdout
    report = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", done.stdout + done.stderr, re.DOTALL)
    sections: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if section := re.search(r"\.text\.(\w+)", line):
            name = section[1]
        elif name is not None:
            sections.setdefault(name, []).append(line)
    return {name: int(used) for name, used in report}, {name: basic_blocks(lines) for name, lines in sections.items()}


def basic_blocks(lines: list[str]) -> Blocks:
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            blocks[-1].append(instruction[1].strip())
            if _opcode(instruction[1].strip()).split(".")[0] in ("BRA", "EXIT"):
                blocks.append([])
    out: Blocks = []
    for i, instructions in enumerate(blocks):
        last = instructions[-1] if instructions else ""
        operation = _opcode(last).split(".")[0] if last else ""
        conditional = last.startswith("@") or re.search(r"BRA\S*\s+!?U?P\w+,", last)
        following = [i + 1] if i + 1 < len(blocks) and (operation not in ("BRA", "EXIT") or conditional) else []
        target = re.search(r"`\((\.L_x_\d+)\)", last) if operation == "BRA" else None
        jump = [labels[target[1]]] if target else []
        out.append(([_opcode(x) for x in instructions], jump + following))
    return out


def _opcode(instruction: str) -> str:
    found = re.match(r"(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", instruction)
    assert found is not None, instruction
    return found[1]


def of_loop(blocks: Blocks, loads: int, text: bool, *, gradient: bool) -> float | None:
    """Instructions a column, of the widest loop that is there: of two groups a thread, or of one."""
    for groups in (2, 1):
        exactly = {"LDS.128": loads * (2 + text) * groups, "MUFU.EX2": 2 * GROUP * groups + 2 * (not gradient)}
        at_least = {"FFMA": (4 + text) * GROUP * groups}
        if gradient:
            exactly["STG.E.128"] = groups
            at_least["F2FP"] = 4 * groups
        loops: dict[int, int] = {}  # first block -> last one
        for i, (_, successors) in enumerate(blocks):
            loops.update({t: i for t in successors if t <= i})
        found = [
            n
            for first, last in loops.items()
            if sum(len(x) for x, _ in blocks[first : last + 1]) <= MOST_INSTRUCTIONS
            and (n := shortest_way_round(blocks, first, last, exactly, at_least)) is not None
        ]
        if found:
            return min(found) / (GROUP * groups)
    return None


def shortest_way_round(
    blocks: Blocks, header: int, last: int, exactly: dict[str, int], at_least: dict[str, int]
) -> int | None:
    """Fewest instructions from a block back to itself with the given numbers of opcodes (by their beginning)."""
    names, limits = [*exactly, *at_least], (*exactly.values(), *at_least.values())

    here = {b: [sum(x.startswith(name) for x in blocks[b][0]) for name in names] for b in range(header, last + 1)}

    def plus(counted: tuple[int, ...], block: int) -> tuple[int, ...] | None:
        out = []
        for k, (name, limit) in enumerate(zip(names, limits, strict=True)):
            total = counted[k] + here[block][k]
            if total > limit and name in exactly:
                return None
            out.append(min(total, limit))
        return tuple(out)

    start = plus((0,) * len(names), header)
    queue = [] if start is None else [(len(blocks[header][0]), header, start, frozenset([header]))]
    seen = set()
    while queue:
        length, block, counted, path = heapq.heappop(queue)
        if (block, counted) in seen:
            continue
        seen.add((block, counted))
        for successor in blocks[block][1]:
            if successor == header and counted == limits:
                return length
            outside = successor in path or not header <= successor <= last
            more = None if outside else plus(counted, successor)
            if more is not None:
                heapq.heappush(queue, (length + len(blocks[successor][0]), successor, more, path | {successor}))
    return None


if __name__ == "__main__":
    main()
