"""The CUDA C++ row kernel (csrc/cuda): a cluster of thread blocks keeps a row in shared memory and reads it once.

The compiled library is loaded when first needed. Triton computes what does not fit a cluster; see :func:`misfit`. The kernel has
not run on a GPU yet: ``impl="auto"`` takes it only with KDKERNELS_CUDA_ROWS=1 (benchmarks/gpu/QUEUE.md: what has to pass first).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from . import native
from .rows import DIVERGENCES, RowProblem, RowResult, check_overlap, row_launcher_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the library's codes
_ALIGNMENT = 16  # bytes, of a bulk copy


@functools.cache
def load_library() -> Any:
    """The extension module ``kdkernels._native_cuda``. Raises RuntimeError saying why it is missing and how to get it."""
    try:
        return native.import_extension("_native_cuda")
    except ImportError as error:
        raise RuntimeError(
            f"kdkernels' CUDA library (kdkernels._native_cuda) could not be loaded: {error}. "
            "`pip install .` compiles it where it finds nvcc and an NVIDIA GPU. To get it elsewhere, put nvcc (CUDA toolkit "
            "12.0 or newer) on PATH and run `pip install . -C cmake.define.KDKERNELS_CUDA=ON` in the checkout of kdkernels. "
            "Or use impl='triton'."
        ) from error


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why no row kernel can run on this CUDA device, or None. The device is asked for this very kernel."""
    try:
        library = load_library()
        with torch.cuda.device(device_index) if torch.cuda.is_available() else contextlib.nullcontext():
            probe = library.probe(device_index)
    except RuntimeError as error:
        return str(error)
    if probe.max_cluster_blocks == 0:
        return (
            "expected a device that holds clusters of the row kernel (compute capability 9.0 and up, compiled for "
            f"{library.architectures}), got compute capability {probe.capability // 10}.{probe.capability % 10}"
        )
    return None


def fill_problem(
    native_problem: Any, row_tensor: Callable[..., Any], problem: RowProblem, out: RowResult
) -> list[torch.Tensor]:
    """Sets the fields of csrc/cuda/row_problem.h's RowProblem; returns the tensors whose addresses are in it."""
    spec, p = problem.spec, native_problem
    keep = [problem.student, problem.audio, problem.text, problem.grad, out.kd, out.ce]

    def tensor(x: torch.Tensor) -> Any:
        return row_tensor(x.data_ptr(), x.stride(0), x.stride(1), DTYPES.index(x.dtype))

    def vector(x: torch.Tensor, dtype: torch.dtype) -> int:
        keep.append(x := x.to(dtype).contiguous())
        return x.data_ptr()

    p.outer, p.inner, p.student_width = problem.student.shape
    p.vocab = spec.vocab
    p.student, p.audio = tensor(problem.student), tensor(problem.audio)
    if problem.text is not None:
        p.text = tensor(problem.text)
        p.alpha, p.alpha_stride = vector(problem.alpha, torch.float32), int(problem.alpha.numel() > 1)
    if problem.grad is not None:
        p.grad = tensor(problem.grad)
    if problem.target is not None:
        p.target = vector(problem.target, torch.int64)
    p.kd_coef, p.ce_coef = vector(problem.kd_coef, torch.float32), vector(problem.ce_coef, torch.float32)
    p.kd, p.ce = out.kd.data_ptr(), out.ce.data_ptr()
    p.ignore_index = spec.ignore_index
    p.divergence = DIVERGENCES.index(spec.divergence)
    p.has_plausibility, p.log_plausibility = int(spec.plausibility is not None), spec.log_plausibility
    p.with_kd, p.with_ce = int(spec.with_kd), int(problem.with_ce)
    p.temperature, p.jsd_beta = spec.temperature, spec.jsd_beta
    p.student_scale, p.teacher_scale = spec.student_scale, spec.teacher_scale
    p.student_softcap, p.teacher_softcap = spec.student_softcap or 0.0, spec.teacher_softcap or 0.0
    return [x for x in keep if x is not None]


def misfit(problem: RowProblem) -> str | None:
    """The argument that the kernel does not take, and why; or None. (The library itself checks shared memory.)

    Rows are copied 16 bytes at a time, so each row must begin at a multiple of 16 bytes. The last copy of a row may reach past
    the vocabulary. It must stay inside the tensor's memory.
    """
    if problem.want_stats:
        return "want_stats: expected False, got True: this kernel does not compute statistics"
    read = problem.read
    for name, x in (read if problem.grad is None else read | {"grad": problem.grad}).items():
        if x.dtype not in DTYPES:
            return f"{name}: expected float32, bfloat16 or float16, got {x.dtype}"
        steps = [x.stride(d) * x.element_size() for d in (0, 1) if x.shape[d] > 1]
        if any(byte % _ALIGNMENT for byte in (x.data_ptr(), *steps)):
            return (
                f"{name}: expected rows that begin at multiples of {_ALIGNMENT} bytes (a padded vocabulary has them), got "
                f"address {x.data_ptr():#x}, strides of {', '.join(map(str, steps)) or 'no'} bytes"
            )
    vocab = problem.spec.vocab
    for name, x in read.items():
        item = x.element_size()
        row = -(-vocab * item // _ALIGNMENT) * _ALIGNMENT
        last = x.storage_offset() + sum((x.shape[d] - 1) * x.stride(d) for d in (0, 1))
        if last * item + row > x.untyped_storage().nbytes():
            return (
                f"{name}: expected memory for whole {_ALIGNMENT} bytes at the end of its last row, got {vocab} ids of "
                f"{item} bytes at the very end of the tensor's storage"
            )
    return None


def try_rows(problem: RowProblem, blocks: int = 0) -> RowResult | str:
    """The result of :func:`caad_rows`, or the reason why the kernel does not take the call."""
    device = problem.student.device
    if device.type != "cuda":
        return f"student: expected a tensor on a CUDA device, got one on {device}"
    if problem.grad is not None:
        check_overlap(problem.student, problem.grad)
    reason = unavailable(device.index) or misfit(problem)
    if reason is not None:
        return reason
    library, out = load_library(), problem.empty_result()
    native_problem = library.RowProblem()
    keep = fill_problem(native_problem, library.RowTensor, problem, out)
    with torch.cuda.device(device):
        plan = library.plan_rows(native_problem, device.index, blocks)
        if plan.blocks > 0:
            stream = torch.cuda.current_stream().cuda_stream
            library.caad_rows(native_problem, plan, device.index, stream)
    del keep  # the order of the stream protects this memory until the kernel has finished
    if plan.blocks == 0:
        row = problem.spec.vocab * sum(x.element_size() for x in problem.read.values())
        return (
            f"spec.vocab: expected a row that fits the shared memory of {blocks or 'at most 16'} thread blocks, got "
            f"{problem.spec.vocab} ids, {row} bytes"
        )
    return out


def _solve_rows(problem: RowProblem, *, blocks: int = 0) -> RowResult:
    """The row problem of :mod:`kdkernels.ops.rows` on a CUDA device of compute capability 9.0 and up, in float32 arithmetic.

    Enqueued on torch's current stream; nothing is read back to the host. Extra memory: the (N,) results. Repeats to the bit.

    Args:
        blocks: of a cluster (1, 2, 4, 8 or 16); 0 takes the smallest that holds a row, or a larger one where rows are few.

    Raises:
        ValueError: the kernel does not take the call, saying what was expected and what it got: ``want_stats``, rows that are not
            aligned to 16 bytes, a row too large for a cluster's shared memory, a gradient that overlaps other rows.
        RuntimeError: the library is missing, or the launch failed.
    """
    if problem.student.device.type == "cuda":
        load_library()
    result = try_rows(problem, blocks)
    if isinstance(result, str):
        raise ValueError(f"impl='cuda': {result}; impl='auto' and 'triton' have no such limit")
    return result


caad_rows = row_launcher_of(_solve_rows)
