"""One measurement on a CUDA device: `python -m benchmarks.gpu.measure rows` (`--help` lists the others).

Correctness first, then time; the last line printed is JSON with `met`, `result` and the figures. Needs torch and Triton alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ..common import PeakMemory, relative_error, time_calls
from ..contenders import CE, FULL, LinearCase, bare_gemms, exact_gradient, ours_step

# Width and sizes of the design's example: Llama 3.2 3B as the student, 8B-sized states as the teacher.
VOCAB, STUDENT_WIDTH, TEACHER_WIDTH = 128256, 3072, 4096
CAPTURED = (256, 32000)  # of logits: small enough that launches count
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEVICE = torch.device("cuda")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=__doc__)
    parser.add_argument("what", choices=sorted(MEASURES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    print(json.dumps(MEASURES[args.what](args.tokens, args.repeats)))


class Rows:
    """The row problem over random logits (1, N, V), with or without a text path; the gradient goes over the student.

    ``impl``: "triton", which reads every input in each of its two passes, or "cuda", which reads them once.
    """

    def __init__(
        self, tokens: int, dtype: torch.dtype, grad_dtype: torch.dtype, *, text: bool, impl: str = "triton"
    ) -> None:
        from kdkernels.ops.dispatch import row_launcher
        from kdkernels.ops.rows import RowSpec

        g = torch.Generator(device=DEVICE).manual_seed(0)

        def logits() -> torch.Tensor:
            return torch.randn(1, tokens, VOCAB, generator=g, device=DEVICE, dtype=dtype).mul_(3)

        self.spec = RowSpec(vocab=VOCAB)
        self.student, self.audio, self.text = logits(), logits(), logits() if text else None
        self.target = torch.randint(0, VOCAB, (tokens,), generator=g, device=DEVICE)
        self.alpha = torch.full((1,), 2.0, device=DEVICE)
        self.coef = torch.full((tokens,), 0.5, device=DEVICE)
        self.grad_dtype = grad_dtype
        self.launch = row_launcher(impl)
        # Each pass reads every input, the last writes the gradient as well.
        self.read_bytes = tokens * VOCAB * (3 if text else 2) * dtype.itemsize * (2 if impl == "triton" else 1)
        self.bytes = self.read_bytes + tokens * VOCAB * grad_dtype.itemsize

    def into(self, memory: torch.Tensor, **options: int) -> torch.Tensor:
        """Runs the kernel on the student's logits in ``memory`` and leaves the gradient there."""
        items = memory.element_size() // self.grad_dtype.itemsize
        grad = memory.view(self.grad_dtype).as_strided(memory.shape, (0, VOCAB * items, 1))
        arguments = (self.audio, self.text, self.target, self.alpha, self.coef, self.coef, self.spec)
        self.launch(memory, *arguments, grad=grad, **options)
        return grad

    def error(self, rows: int = 8) -> float:
        """Relative error of the gradient of the first rows against the formula in float64."""
        from kdkernels.ops import reference

        leaf = self.student[:, :rows].double().requires_grad_()
        text = None if self.text is None else self.text[:, :rows].double()
        exact = reference.caad_rows(
            leaf, self.audio[:, :rows].double(), text, self.target[:rows], self.alpha.double(), self.spec
        )
        (0.5 * (exact.kd + exact.ce)).sum().backward()
        return relative_error(self.into(self.student.clone())[:, :rows], leaf.grad)


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    return time_calls({"call": call}, repeats=repeats, device=DEVICE)["call"].median


def _copy_bytes_per_second(repeats: int) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    out = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: out.copy_(source), repeats)


CASES = [
    ("bf16", "bf16", False),
    ("bf16", "bf16", True),
    ("fp32", "fp32", False),
    ("fp32", "bf16", False),
    ("fp32", "fp32", True),
]


def measure_rows(tokens: int, repeats: int) -> dict:
    """Target: the two passes' traffic at no less than 80% of a copy's bandwidth, gradient within one rounding."""
    copy = _copy_bytes_per_second(repeats)
    rows, met = [], True
    for name, grad_name, text in CASES:
        case = Rows(tokens, DTYPES[name], DTYPES[grad_name], text=text)
        error = case.error()
        memory = case.student.clone()
        # Timed on what the last run left: the time does not depend on the values, and restoring them would be timed too.
        seconds = _median_seconds(lambda case=case, memory=memory: case.into(memory), repeats)
        share = case.bytes / seconds / copy
        met &= share >= 0.8 and error < (1e-5 if grad_name == "fp32" else 4e-3)
        label = f"{name}{' + text' if text else ''} -> {grad_name}"
        rows.append({"case": label, "ms": seconds * 1e3, "gbytes_per_s": case.bytes / seconds / 1e9})
        rows[-1] |= {"share_of_copy": share, "gradient_error": error}
        del case, memory
    result = "; ".join(f"{r['case']} {r['ms']:.2f} ms, {r['share_of_copy']:.0%} of copy" for r in rows)
    return {"met": met, "result": result, "copy_gbytes_per_s": copy / 1e9, "rows": rows}


def measure_cuda_rows(tokens: int, repeats: int) -> dict:
    """Target: one read's traffic at no less than 90% of a copy's bandwidth, gradient within one rounding.

    Every size of cluster that holds a row is timed too, to see whether the smallest is the best one to take.
    """
    copy = _copy_bytes_per_second(repeats)
    rows, met = [], True
    for name, grad_name, text in CASES:
        case = Rows(tokens, DTYPES[name], DTYPES[grad_name], text=text, impl="cuda")
        error = case.error()
        memory = case.student.clone()
        seconds = {0: _median_seconds(lambda case=case, memory=memory: case.into(memory), repeats)}
        for blocks in (2, 4, 8, 16):
            try:
                seconds[blocks] = _median_seconds(
                    lambda case=case, memory=memory, blocks=blocks: case.into(memory, blocks=blocks), repeats
                )
            except ValueError:  # the row does not fit so few blocks
                continue
        share = case.bytes / seconds[0] / copy
        best = min(seconds, key=seconds.get)
        met &= share >= 0.9 and error < (1e-5 if grad_name == "fp32" else 4e-3)
        label = f"{name}{' + text' if text else ''} -> {grad_name}"
        rows.append({"case": label, "ms": seconds[0] * 1e3, "gbytes_per_s": case.bytes / seconds[0] / 1e9})
        rows[-1] |= {"share_of_copy": share, "gradient_error": error, "best_blocks": best}
        rows[-1] |= {f"ms_{b}_blocks": s * 1e3 for b, s in seconds.items() if b}
        del case, memory
    result = "; ".join(
        f"{r['case']} {r['ms']:.2f} ms, {r['share_of_copy']:.0%} of copy"
        + (f" (best: {r['best_blocks']} blocks)" if r["best_blocks"] else "")
        for r in rows
    )
    return {"met": met, "result": result, "copy_gbytes_per_s": copy / 1e9, "rows": rows}


def measure_table(tokens: int, repeats: int, warps: Sequence[int] = (2, 4, 8, 16)) -> dict:
    """Target: the fixed launch table within 5% of the best of its neighbours."""
    from kdkernels.ops import triton_caad

    own = triton_caad.launch_table
    worst, notes, rows = 1.0, [], []
    for name, grad_name, text in (("bf16", "bf16", True), ("fp32", "bf16", False)):
        case = Rows(tokens, DTYPES[name], DTYPES[grad_name], text=text)
        memory = case.student.clone()
        group = 16 // DTYPES[name].itemsize
        tables = {"table": own}
        for elements, count in itertools.product((8, 16, 32), warps):
            launch = {"GROUPS": 32 * count * elements // group, "GROUP": group, "num_warps": count, "enable_fp_fusion": True}
            tables[f"{elements} logits, {count} warps"] = lambda *_, launch=launch: launch
        seconds = {}
        for label, table in tables.items():
            triton_caad.launch_table = table
            try:
                seconds[label] = _median_seconds(lambda case=case, memory=memory: case.into(memory), repeats)
            finally:
                triton_caad.launch_table = own
        best = min(seconds, key=seconds.get)
        worst = max(worst, seconds["table"] / seconds[best])
        notes.append(f"{name}: table {seconds['table'] * 1e3:.2f} ms, best {best} {seconds[best] * 1e3:.2f} ms")
        rows += [{"case": name, "launch": k, "ms": v * 1e3} for k, v in seconds.items()]
        del case, memory
    return {"met": worst <= 1.05, "result": "; ".join(notes), "rows": rows}


def measure_wide_table(tokens: int, repeats: int) -> dict:
    """The same against programs of 32 warps."""
    return measure_table(tokens, repeats, warps=(32,))


def _linear_case(tokens: int, vocab: int = 0) -> LinearCase:
    sizes = (tokens, vocab or VOCAB, STUDENT_WIDTH, TEACHER_WIDTH)
    return LinearCase.random(*sizes, torch.bfloat16, DEVICE)


# What is timed, its objective and logits' dtype, the most error of its gradient, and the most time over the bare GEMMs.
LINEAR_CASES = [
    ("bf16 logits", FULL, torch.bfloat16, 6e-2, 1.10),
    ("fp32 logits", FULL, None, 6e-3, 1.25),
    ("CE alone, bf16 logits", CE, torch.bfloat16, 6e-2, 1.05),
]


def measure_linear(tokens: int, repeats: int) -> dict:
    """Targets: LINEAR_CASES; extra memory of 2N tokens no more than of N, but for dh; nothing synchronises."""
    from kdkernels import fused_linear_caad_loss

    double = _linear_case(2 * tokens)
    case = double.head(tokens)
    check = case.head(16)
    floors = {
        objective: min(_median_seconds(bare_gemms(case, chunk, objective), repeats) for chunk in (1408, 2048))
        for objective in (FULL, CE)
    }
    figures, met = {}, True
    for name, objective, dtype, budget, most in LINEAR_CASES:
        step, floor = ours_step(dtype, objective), floors[objective]
        error = relative_error(step(check).cpu(), exact_gradient(check, objective))
        seconds = _median_seconds(lambda step=step: step(case), repeats)
        peaks = []
        for sized in (case, double):
            with PeakMemory(DEVICE) as memory:
                step(sized)
            peaks.append(memory.bytes - 2 * sized.hidden.numel() * 2)  # dh and its copy in .grad are the caller's
        met &= error < budget and peaks[1] <= 1.05 * peaks[0] + (1 << 24) and seconds <= most * floor
        figures[name] = {"ms": seconds * 1e3, "floor_ms": floor * 1e3, "times_floor": seconds / floor, "gradient_error": error}
        figures[name] |= {"peak_mib": peaks[0] / 2**20, "peak_mib_2n": peaks[1] / 2**20}
    # The chunk loop with its backward, and the path without logits, which a call without a gradient takes.
    for gradient in (True, False):
        leaf = case.hidden.detach().requires_grad_(gradient)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # raises at a hidden synchronisation
        try:
            loss = fused_linear_caad_loss(leaf, case.weight, case.audio, case.text, case.teacher_weight, case.target)
            if gradient:
                torch.autograd.grad(loss, leaf)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    result = "; ".join(
        f"{k} {v['ms']:.1f} ms ({v['times_floor']:.2f}x GEMMs {v['floor_ms']:.1f}), error {v['gradient_error']:.1e}, "
        f"{v['peak_mib']:.0f} MiB (2N: {v['peak_mib_2n']:.0f})"
        for k, v in figures.items()
    )
    return {"met": met, "result": result, **figures}


@contextlib.contextmanager
def _changed(switches: Sequence[str] = (), **replaced: object) -> Iterator[None]:
    """Environment variables set to 1, and names of kdkernels.ops.triton_gemm_sums replaced."""
    from kdkernels.ops import triton_gemm_sums

    before = {name: getattr(triton_gemm_sums, name) for name in replaced}
    try:
        os.environ.update(dict.fromkeys(switches, "1"))
        for name, value in replaced.items():
            setattr(triton_gemm_sums, name, value)
        yield
    finally:
        for name in switches:
            del os.environ[name]
        for name, value in before.items():
            setattr(triton_gemm_sums, name, value)


SUMS, OVERLAP = "KDKERNELS_GEMM_SUMS", "KDKERNELS_OVERLAP"


def _tilings() -> dict[str, dict]:
    """Tiles of the GEMM with sums: the launcher's own, and two programs a multiprocessor, whose epilogues and loops overlap."""
    from kdkernels.ops.triton_gemm_sums import _Tiles

    twice = _Tiles(128, 128, 64, 2, 2, warps=4, programs=2)
    return {"sums": {}, "sums, two programs": {"_tiles": lambda *_, **__: twice}}


def measure_gemm_sums(tokens: int, repeats: int) -> dict:
    """Target: a step whose GEMMs leave the rows' sums is ahead of cuBLAS with two reads, and within the targets of `linear`.

    The student's GEMM alone is timed too, for one chunk.
    """
    from kdkernels.ops import triton_gemm_sums
    from kdkernels.ops.gemm import gemm
    from kdkernels.ops.rows import LinearTensors, RowSpec

    case = _linear_case(tokens)
    check = case.head(16)
    figures, met = {}, True
    for name, objective, dtype, budget, most in LINEAR_CASES:
        step = ours_step(dtype, objective, impl="triton")
        out = torch.empty(min(tokens, 1408), VOCAB, dtype=dtype or torch.float32, device=DEVICE)
        states = case.hidden[: len(out)]
        heads = LinearTensors(states, case.weight, None, case.audio, case.text, case.teacher_weight, None)
        spec = RowSpec(vocab=VOCAB, with_kd=objective is FULL)
        steps = {"cuBLAS": lambda step=step: step(case)}
        products = {"cuBLAS": lambda out=out, states=states: gemm(states, case.weight, None, out)}
        exact, errors = exact_gradient(check, objective), {}
        for label, tiling in _tilings().items():

            def changed(of: LinearCase = case, step=step, tiling=tiling) -> torch.Tensor:
                with _changed([SUMS], **tiling):
                    return step(of)

            with _changed([SUMS], **tiling):
                kernels = triton_gemm_sums.summed_rows(heads, spec, out.dtype, with_ce=True, want_stats=False)
            steps[label] = changed
            products[label] = lambda kernels=kernels, out=out, states=states: kernels.student(states, case.weight, None, out)
            errors[label] = relative_error(changed(check).cpu(), exact)
        seconds = {k: x.median for k, x in time_calls(steps, repeats=repeats, device=DEVICE).items()}
        alone = {k: x.median for k, x in time_calls(products, repeats=repeats, device=DEVICE).items()}
        floor = min(_median_seconds(bare_gemms(case, chunk, objective), repeats) for chunk in (1408, 2048))
        best = min(seconds, key=seconds.get)
        met &= best != "cuBLAS" and seconds[best] <= most * floor and max(errors.values()) < budget
        figures[name] = {"best": best, "times_floor": seconds[best] / floor, "floor_ms": floor * 1e3}
        figures[name]["ways"] = {k: {"ms": seconds[k] * 1e3, "student_gemm_ms": alone[k] * 1e3} for k in seconds}
        figures[name] |= {"gradient_error": max(errors.values())}
        del out
    notes = []
    for name, found in figures.items():
        ways = [f"{k} {x['ms']:.1f} ms (student's GEMM {x['student_gemm_ms']:.2f})" for k, x in found["ways"].items()]
        notes.append(f"{name}: {', '.join(ways)}; best {found['best']}, {found['times_floor']:.2f}x GEMMs")
    return {"met": met, "result": "; ".join(notes), **figures}


def measure_overlap(tokens: int, repeats: int) -> dict:
    """Target: a step with the row kernels on a second stream is ahead of one stream in the same workspace, with equal gradients.

    Also with the GEMMs that leave sums, on all multiprocessors and on some fewer, which leaves the rest to the row kernels.
    """
    from kdkernels.ops import triton_gemm_sums

    limits = triton_gemm_sums._device_limits(DEVICE)
    fewer = replace(limits, processors=max(1, limits.processors - 12))
    ways = {
        "one stream": ([], {}),
        "two streams": ([OVERLAP], {}),
        "one stream, sums": ([SUMS], {}),
        "two streams, sums": ([OVERLAP, SUMS], {}),
        "two streams, sums on 12 fewer": ([OVERLAP, SUMS], {"_device_limits": lambda _: fewer}),
    }
    case = _linear_case(tokens)
    check = case.head(16)
    figures, met = {}, True
    for name, _, dtype, _, _ in LINEAR_CASES[:2]:  # of the full objective
        steps, gradients = {}, {}
        for label, (switches, replaced) in ways.items():

            def step(of: LinearCase = case, way=(switches, replaced), dtype=dtype, **options) -> torch.Tensor:
                with _changed(way[0], **way[1]):
                    return ours_step(dtype, impl="triton", **options)(of)

            steps[label] = step
            gradients[label] = step(check, chunk_tokens=5)
        same = torch.equal(gradients["one stream"], gradients["two streams"])
        same &= torch.equal(gradients["one stream, sums"], gradients["two streams, sums"])
        seconds = {k: x.median for k, x in time_calls(steps, repeats=repeats, device=DEVICE).items()}
        best = min(seconds, key=seconds.get)
        met &= same and best.startswith("two streams")
        figures[name] = {"best": best, "same": same, "ms": {k: v * 1e3 for k, v in seconds.items()}}
    notes = []
    for name, found in figures.items():
        times = ", ".join(f"{k} {ms:.1f} ms" for k, ms in found["ms"].items())
        notes.append(f"{name}: {times}; best {found['best']}, same gradient {found['same']}")
    return {"met": met, "result": "; ".join(notes), **figures}


def _compared(steps: dict[str, Callable[[], object]], repeats: int, most: float) -> dict:
    """Times two steps in turn. Target: the second takes at most ``most`` times as long as the first."""
    (first, base), (second, changed) = (
        (name, x.median) for name, x in time_calls(steps, repeats=repeats, device=DEVICE).items()
    )
    ratio = changed / base
    result = f"{second} {changed * 1e3:.1f} ms, {ratio:.2f}x {first} {base * 1e3:.1f} ms"
    return {"met": ratio <= most, "result": result, "ratio": ratio}


def measure_unaligned(tokens: int, repeats: int) -> dict:
    """Target: one id more, for which the chunk loop has to pad its rows, costs at most 10%."""
    step, steps = ours_step(torch.bfloat16), {}
    for vocab in (VOCAB, VOCAB + 1):
        case = _linear_case(tokens, vocab)
        steps[f"{vocab:,} ids"] = lambda case=case: step(case)
    return _compared(steps, repeats, 1.10)


def measure_autocast(tokens: int, repeats: int) -> dict:
    """Target: float32 states and heads under autocast to bf16 take at most 1.15 times as long as bf16 ones."""
    case, step = _linear_case(tokens), ours_step(torch.bfloat16)
    wide = replace(case, **{k: getattr(case, k).float() for k in ("hidden", "weight", "audio", "text", "teacher_weight")})

    def autocast() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            step(wide)

    return _compared({"bf16": lambda: step(case), "float32 under autocast": autocast}, repeats, 1.15)


def measure_capture(tokens: int, repeats: int) -> dict:
    """Target: the loss and its backward in one CUDA graph, and under torch.compile(fullgraph=True), with the eager bits."""
    from kdkernels import fused_caad_loss

    g = torch.Generator(device=DEVICE).manual_seed(0)
    student, audio, text = (torch.randn(*CAPTURED, generator=g, device=DEVICE).mul_(3) for _ in range(3))
    target = torch.randint(0, CAPTURED[1], CAPTURED[:1], generator=g, device=DEVICE)
    student.requires_grad_()

    def step(function: Callable = fused_caad_loss) -> torch.Tensor:
        return torch.autograd.grad(function(student, audio, text, target), student)[0]

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured.fill_(float("nan"))
    graph.replay()
    same_graph = torch.equal(captured, expected)
    same_compiled = torch.equal(step(torch.compile(fused_caad_loss, fullgraph=True)), expected)
    eager = statistics.median(_median_seconds(step, 5) for _ in range(3))
    replay = statistics.median(_median_seconds(graph.replay, 5) for _ in range(3))
    return {
        "met": same_graph and same_compiled,
        "result": f"graph {same_graph}, compiled {same_compiled}; {eager * 1e6:.0f} us eager, {replay * 1e6:.0f} us replayed",
    }


MEASURES = {
    "rows": measure_rows,
    "cuda-rows": measure_cuda_rows,
    "table": measure_table,
    "wide-table": measure_wide_table,
    "linear": measure_linear,
    "unaligned": measure_unaligned,
    "autocast": measure_autocast,
    "gemm-sums": measure_gemm_sums,
    "overlap": measure_overlap,
    "capture": measure_capture,
}

if __name__ == "__main__":
    main()
