"""The second pass on a CUDA machine: what the first has no time for. `python -m benchmarks.gpu.second_pass`.

It works as the first pass does (benchmarks/gpu/first_pass.py). Put the wheel that the first pass built into .whl/: without it the
CUDA part is built again.
"""

from __future__ import annotations

from .first_pass import Item, run_command

LARGE = "--tokens 8192 --vocab 128256 --student-width 3072 --teacher-width 4096"
ITEMS = [
    Item("racecheck", "-m benchmarks.gpu.sanitizer racecheck", "racecheck finds no hazard in shared memory", 120),
    Item("synccheck", "-m benchmarks.gpu.sanitizer synccheck", "synccheck finds no misused barrier", 90),
    Item("autocast", "-m benchmarks.gpu.measure autocast", "float32 heads under autocast <= 1.15x of bf16 ones", 90),
    Item("unaligned", "-m benchmarks.gpu.measure unaligned", "128,257 ids <= 1.10x of 128,256", 60),
    Item(
        "opt-in-tests",
        "-m pytest -n 8 tests/kdkernels/test_gemm_sums.py tests/kdkernels/test_overlap.py",
        "every test passes on the device: GEMMs with sums, rows on a second stream",
        90,
    ),
    Item(
        "gemm-sums",
        "-m benchmarks.gpu.measure gemm-sums --tokens 8192 --repeats 7",
        "faster than cuBLAS with two reads; bf16 <= 1.10x, fp32 <= 1.25x, CE alone <= 1.05x of the bare GEMMs",
        90,
    ),
    Item(
        "overlap",
        "-m benchmarks.gpu.measure overlap --tokens 8192 --repeats 7",
        "two streams faster than one in the same workspace, with the same gradient",
        90,
    ),
    Item("wide-table", "-m benchmarks.gpu.measure wide-table", "no table with 32 warps is 5% ahead", 60),
    Item("model-tests", "-m pytest -n 4 -m gpu tests/models", "every test marked gpu passes", 120),
    Item("demo-smoke", "-m models demo --fast-smoke --device cuda", "ends with the table and the path of the report", 150),
    Item(
        "peers",
        f"-m benchmarks.linear --device cuda {LARGE} --no-memory --repeats 5 --out {{out}}",
        "ahead of eager, torch.compile and Liger",
        180,
    ),
]


def main(argv: list[str] | None = None) -> None:
    run_command(argv, "second_pass", __doc__, ITEMS, build=False)


if __name__ == "__main__":
    main()
