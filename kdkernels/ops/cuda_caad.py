"""The CUDA C++ row kernel (csrc/cuda): a cluster of thread blocks keeps a row in shared memory and reads it once.

The compiled library is loaded when first needed. What does not fit a cluster is for Triton; see :func:`misfit`. The kernel has
not run on a GPU yet: ``impl="auto"`` takes it only with KDKERNELS_CUDA_ROWS=1 (benchmarks/gpu/QUEUE.md: what has to pass first).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

import torch

from . import native
from .rows import DIVERGENCES, RowResult, RowSpec, check_overlap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the library's codes
_ALIGNMENT = 16  # bytes, of a bulk copy


@functools.cache
def load_library():
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
    """Why no row kernel can run on this CUDA device, or None: asked of the device, for the kernel itself."""
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
    problem: object,
    row_tensor: Callable,
    student: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor | None,
    target: torch.Tensor | None,
    alpha: torch.Tensor,
    kd_coef: torch.Tensor,
    ce_coef: torch.Tensor,
    spec: RowSpec,
    grad: torch.Tensor | None,
    kd: torch.Tensor,
    ce: torch.Tensor,
) -> list[torch.Tensor]:
    """Sets the fields of csrc/cuda/row_problem.h's RowProblem; returns the tensors whose addresses are in it."""
    keep = [student, audio, text, grad, kd, ce]

    def tensor(x: torch.Tensor) -> object:
        return row_tensor(x.data_ptr(), x.stride(0), x.stride(1), DTYPES.index(x.dtype))

    def vector(x: torch.Tensor, dtype: torch.dtype) -> int:
        keep.append(x := x.to(dtype).contiguous())
        return x.data_ptr()

    problem.outer, problem.inner, problem.student_width = student.shape
    problem.vocab = spec.vocab
    problem.student, problem.audio = tensor(student), tensor(audio)
    if text is not None:
        problem.text = tensor(text)
        problem.alpha, problem.alpha_stride = vector(alpha, torch.float32), int(alpha.numel() > 1)
    if grad is not None:
        problem.grad = tensor(grad)
    if target is not None:
        problem.target = vector(target, torch.int64)
    problem.kd_coef, problem.ce_coef = vector(kd_coef, torch.float32), vector(ce_coef, torch.float32)
    problem.kd, problem.ce = kd.data_ptr(), ce.data_ptr()
    problem.ignore_index = spec.ignore_index
    problem.divergence = DIVERGENCES.index(spec.divergence)
    problem.has_plausibility = int(spec.plausibility is not None)
    problem.log_plausibility = 0.0 if spec.plausibility is None else math.log(spec.plausibility)
    problem.with_kd, problem.with_ce = int(spec.with_kd), int(spec.with_ce and target is not None)
    problem.temperature, problem.jsd_beta = spec.temperature, spec.jsd_beta
    problem.student_scale, problem.teacher_scale = spec.student_scale, spec.teacher_scale
    problem.student_softcap, problem.teacher_softcap = spec.student_softcap or 0.0, spec.teacher_softcap or 0.0
    return [x for x in keep if x is not None]


def misfit(
    student: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor | None,
    grad: torch.Tensor | None,
    spec: RowSpec,
    *,
    want_stats: bool = False,
) -> str | None:
    """What of this call the kernel does not take (shared memory apart, which the library knows), naming the argument; or None.

    Rows are copied 16 bytes at a time: each must begin at a multiple of 16 bytes, and the last copy of a row, which may reach
    past the vocabulary, must stay inside the tensor's memory.
    """
    if want_stats:
        return "want_stats: expected False, got True: this kernel does not compute statistics"
    read = {"student": student}
    if spec.with_kd:
        read |= {"audio": audio} if text is None else {"audio": audio, "text": text}
    for name, x in (read if grad is None else read | {"grad": grad}).items():
        if x.dtype not in DTYPES:
            return f"{name}: expected float32, bfloat16 or float16, got {x.dtype}"
        steps = [x.stride(d) * x.element_size() for d in (0, 1) if x.shape[d] > 1]
        if any(byte % _ALIGNMENT for byte in (x.data_ptr(), *steps)):
            return (
                f"{name}: expected rows that begin at multiples of {_ALIGNMENT} bytes (a padded vocabulary has them), got "
                f"address {x.data_ptr():#x}, strides of {', '.join(map(str, steps)) or 'no'} bytes"
            )
    for name, x in read.items():
        item = x.element_size()
        row = -(-spec.vocab * item // _ALIGNMENT) * _ALIGNMENT
        last = x.storage_offset() + sum((x.shape[d] - 1) * x.stride(d) for d in (0, 1))
        if last * item + row > x.untyped_storage().nbytes():
            return (
                f"{name}: expected memory for whole {_ALIGNMENT} bytes at the end of its last row, got {spec.vocab} ids of "
                f"{item} bytes at the very end of the tensor's storage"
            )
    return None


def try_caad_rows(
    arguments: tuple, grad: torch.Tensor | None, want_stats: bool, blocks: int = 0
) -> RowResult | str:
    """The result of :func:`caad_rows`, or the reason why the kernel does not take the call."""
    student, audio, text, target, alpha, kd_coef, ce_coef, spec = arguments
    if student.device.type != "cuda":
        return f"student: expected a tensor on a CUDA device, got one on {student.device}"
    if grad is not None:
        check_overlap(student, grad)
    reason = unavailable(student.device.index) or misfit(student, audio, text, grad, spec, want_stats=want_stats)
    if reason is not None:
        return reason
    library = load_library()
    rows = student.shape[0] * student.shape[1]
    kd, ce = torch.empty(2, rows, dtype=torch.float32, device=student.device).unbind(0)
    problem = library.RowProblem()
    keep = fill_problem(
        problem, library.RowTensor, student, audio, text, target, alpha, kd_coef, ce_coef, spec, grad, kd, ce
    )
    with torch.cuda.device(student.device):
        plan = library.plan_rows(problem, student.device.index, blocks)
        if plan.blocks > 0:
            stream = torch.cuda.current_stream().cuda_stream
            library.caad_rows(problem, plan, student.device.index, stream)
    del keep  # the stream's order keeps this memory from being used again before the kernel is through with it
    if plan.blocks == 0:
        read = [student, audio, text] if spec.with_kd else [student]
        row = spec.vocab * sum(x.element_size() for x in read if x is not None)
        return (
            f"spec.vocab: expected a row that fits the shared memory of {blocks or 'at most 16'} thread blocks, got "
            f"{spec.vocab} ids, {row} bytes"
        )
    return RowResult(kd=kd, ce=ce, stats=None)


def caad_rows(
    student: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor | None,
    target: torch.Tensor | None,
    alpha: torch.Tensor,
    kd_coef: torch.Tensor,
    ce_coef: torch.Tensor,
    spec: RowSpec,
    *,
    grad: torch.Tensor | None = None,
    want_stats: bool = False,
    blocks: int = 0,
) -> RowResult:
    """The row problem of :mod:`kdkernels.ops.rows` on a CUDA device of compute capability 9.0 and up, in float32 arithmetic.

    Enqueued on torch's current stream; nothing is read back to the host. Extra memory: the (N,) results. Repeats to the bit.

    Args:
        blocks: of a cluster (1, 2, 4, 8 or 16); 0 takes the smallest that holds a row, or a larger one where rows are few.

    Raises:
        ValueError: the kernel does not take the call, saying what was expected and what it got: ``want_stats``, rows that are not
            aligned to 16 bytes, a row too large for a cluster's shared memory, a gradient that overlaps other rows.
        RuntimeError: the library is missing, or the launch failed.
    """
    if student.device.type == "cuda":
        load_library()
    result = try_caad_rows((student, audio, text, target, alpha, kd_coef, ce_coef, spec), grad, want_stats, blocks)
    if isinstance(result, str):
        raise ValueError(f"impl='cuda': {result}; impl='auto' and 'triton' have no such limit")
    return result
