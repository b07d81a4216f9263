"""Which implementation runs, and why. `impl="auto"` chooses; an explicit choice never falls back to another.

On CUDA "auto" means Triton. With KDKERNELS_CUDA_ROWS=1 it takes the CUDA C++ row kernel for every call that fits it, and
Triton for the others. This is not the default, because that kernel has never run on a GPU (benchmarks/gpu/QUEUE.md: what has
to pass first).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from . import cuda_caad, native
from .rows import RowLauncher, RowProblem, RowResult, row_launcher_of
from .shards import EagerShard, ShardRows

logger = logging.getLogger("kdkernels")
_Function = TypeVar("_Function", bound=Callable[..., Any])

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "cuda")
CUDA_OR_TRITON = "cuda_or_triton"  # what "auto" may choose, beside the names above


def checks_enabled(device: torch.device) -> bool:
    """Whether values of tensors are checked: always on the CPU; on other devices, where it waits, with KDKERNELS_CHECK=1.

    Not inside a transform of torch.func: vmap has no values to look at.
    """
    private: Any = torch._C
    if private._are_functorch_transforms_active():
        return False
    return device.type == "cpu" or os.environ.get("KDKERNELS_CHECK", "0") == "1"


def load_triton(module: str, function: str, user: str) -> Any:
    """A launcher of ``kdkernels.ops.<module>``. Raises RuntimeError: ``user`` needs Triton, why it is missing, how to get it."""
    try:
        return getattr(importlib.import_module(f".{module}", __package__), function)
    except ImportError as error:
        raise RuntimeError(
            f"{user} needs Triton, which could not be imported: {error}. Install it with "
            "`pip install triton` (Linux; a CUDA build of PyTorch brings it along)."
        ) from error


@functools.cache
def load_triton_rows() -> RowLauncher:
    return load_triton("triton_caad", "caad_rows", "impl='triton'")


def triton_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def cuda_rows_wanted() -> bool:
    return os.environ.get("KDKERNELS_CUDA_ROWS", "0") == "1"


def gemm_sums_wanted() -> bool:
    return os.environ.get("KDKERNELS_GEMM_SUMS", "0") == "1"


def overlap_wanted(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get("KDKERNELS_OVERLAP", "0") == "1"


def check_implementation(impl: str, without_cuda: str = "") -> None:
    """ValueError for an unknown ``impl``. ``without_cuda``: what the CUDA part has no kernel for, such as "for layers"."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if without_cuda and impl == "cuda":
        raise ValueError(
            f"impl: expected 'auto', 'reference', 'cpu' or 'triton' {without_cuda}, got 'cuda', which has no such kernel"
        )


def choose_on_absent(
    impl: str, name: str, capability: tuple[int, int], dtypes: Sequence[torch.dtype], *, without_cuda: str = ""
) -> tuple[str, str]:
    """As :func:`choose`, for a GPU that need not be in this machine: nothing of this machine is asked.

    Assumed is a machine with that GPU, a CUDA build of PyTorch and the Triton that comes with it. There the CUDA C++ kernel's own
    probe has the last word. KDKERNELS_CUDA_ROWS is not read.
    """
    check_implementation(impl, without_cuda)
    unsupported = [d for d in dtypes if d not in native.DTYPES]
    if impl == "reference" or (impl == "auto" and unsupported):
        return "reference", f"{unsupported[0]} has only the eager formula" if unsupported else "given by the caller"
    if impl == "cpu":
        raise ValueError(f"impl='cpu': expected tensors on the CPU, got a CUDA device ({name})")
    if unsupported:
        raise _unsupported_dtype(impl, unsupported[0])
    if impl == "cuda":
        if capability < (9, 0):
            raise RuntimeError(
                "impl='cuda': expected a device that holds clusters of the row kernel (compute capability 9.0 and up), got "
                f"{name} with {capability[0]}.{capability[1]}"
            )
        return impl, "where kdkernels is built for that GPU, and its probe accepts it"
    return "triton", "given by the caller" if impl == "triton" else f"tensors on a CUDA device ({name}) with Triton"


def _unsupported_dtype(impl: str, dtype: torch.dtype) -> TypeError:
    return TypeError(
        f"impl={impl!r}: expected tensors of float32, bfloat16 or float16, got {dtype}; impl='reference' computes in float64"
    )


def choose(
    impl: str, device: torch.device, dtypes: Sequence[torch.dtype], *, without_cuda: str = ""
) -> tuple[str, str]:
    """Returns (implementation, reason) for tensors of these dtypes on this device.

    The implementation is one of IMPLEMENTATIONS but "auto", or CUDA_OR_TRITON. With ``without_cuda``, which says what the CUDA
    part has no kernel for ("for layers"), it is neither "cuda" nor CUDA_OR_TRITON.

    Raises ValueError for an unknown ``impl`` or one that cannot run on ``device``, TypeError for a dtype that it does not
    support, RuntimeError where it is not installed.
    """
    check_implementation(impl, without_cuda)
    if impl == "auto":
        return _automatic(device, dtypes, cuda_rows=cuda_rows_wanted() and not without_cuda)
    if impl in ("cpu", "triton", "cuda"):
        unsupported = [d for d in dtypes if d not in native.DTYPES]
        if unsupported:
            raise _unsupported_dtype(impl, unsupported[0])
    if impl == "cpu":
        if device.type != "cpu":
            raise ValueError(f"impl='cpu': expected tensors on the CPU, got {device}")
        native.load_library()
    elif impl == "triton":
        if device.type == "cpu" and not triton_interpreted():
            raise ValueError(
                "impl='triton': expected tensors on a CUDA device, got cpu; TRITON_INTERPRET=1 runs Triton's interpreter there"
            )
        load_triton_rows()
    elif impl == "cuda":
        if device.type != "cuda":
            raise ValueError(f"impl='cuda': expected tensors on a CUDA device, got {device}")
        reason = cuda_caad.unavailable(_index(device))
        if reason is not None:
            raise RuntimeError(f"impl='cuda': {reason}")
    return impl, "given by the caller"


def _automatic(device: torch.device, dtypes: Sequence[torch.dtype], *, cuda_rows: bool) -> tuple[str, str]:
    unsupported = [d for d in dtypes if d not in native.DTYPES]
    if unsupported:
        return "reference", f"{unsupported[0]} has only the eager formula"
    if device.type == "cpu":
        if native.available():
            return "cpu", f"tensors on the CPU; native kernel ({native.instruction_set()})"
        return "reference", "tensors on the CPU, and the native library is missing (`pip install .` in the checkout builds it)"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is not None:
            if not cuda_rows:
                return "triton", "tensors on a CUDA device"
            reason = cuda_caad.unavailable(_index(device))
            if reason is not None:
                return "triton", f"tensors on a CUDA device; KDKERNELS_CUDA_ROWS=1, but {reason}"
            return (
                CUDA_OR_TRITON,
                "tensors on a CUDA device; KDKERNELS_CUDA_ROWS=1, Triton for what does not fit a cluster",
            )
        return "reference", "tensors on a CUDA device, and Triton is missing (pip install triton)"
    return "reference", f"no kernel for device type {device.type!r}"


def decided_while_tracing(function: _Function) -> _Function:
    """For a function that imports libraries, which cannot be traced: torch.compile calls it and takes its result for a constant.

    This sets what torch.compiler.assume_constant_result sets. Calling that would import all of torch._dynamo, over a second, with
    kdkernels.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@decided_while_tracing
def choose_for(
    caller: str, impl: str, device: torch.device, dtypes: list[torch.dtype], *, without_cuda: str = ""
) -> str:
    """The implementation of :func:`choose` for a call of the loss ``caller``; the reason goes to the debug log."""
    chosen, reason = choose(impl, device, dtypes, without_cuda=without_cuda)
    logger.debug("%s: impl=%r (%s)", caller, chosen, reason)
    return chosen


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def row_launcher(impl: str) -> RowLauncher:
    """The ``caad_rows`` function (see :mod:`kdkernels.ops.rows`) of a kernel implementation."""
    if impl == "triton":
        return load_triton_rows()
    return {"cpu": native.caad_rows, "cuda": cuda_caad.caad_rows, CUDA_OR_TRITON: caad_rows_or_triton}[impl]


def shard_launcher(impl: str) -> Callable[[RowProblem, int], ShardRows]:
    """The :class:`~kdkernels.ops.shards.ShardRows` of an implementation; of the CUDA C++ kernel it is that of Triton."""
    if impl == "reference":
        return EagerShard
    if impl == "cpu":
        return native.NativeShard
    return load_triton("triton_shards", "TritonShard", "impl='triton' with a process_group")


def _solve_rows(problem: RowProblem) -> RowResult:
    """The CUDA C++ kernel, and the Triton kernel for a call that it does not take."""
    result = cuda_caad.try_rows(problem)
    if isinstance(result, str):
        return load_triton_rows()(*problem[:8], grad=problem.grad, want_stats=problem.want_stats)
    return result


caad_rows_or_triton = row_launcher_of(_solve_rows)
