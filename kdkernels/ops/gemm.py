"""The products of the linear and of the layer loss, with float32 sums of low-precision operands, and their scratch.

Legend: N tokens, C tokens of a chunk, V ids (or the width that is projected to), H hidden width.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import native
from .rows import legal_alpha

# Rows of the weight upcast at a time where a GEMM needs float32 operands: 4096 x 4096 float32 is 64 MiB.
VOCAB_BLOCK = 4096


# On the CPU torch asks the system for new memory in every call, and touching fresh pages costs as much as the GEMM that fills
# them. So the last call's scratch is kept for the next. (CUDA's allocator does this by itself.)
KEPT_SCRATCH_BYTES = 512 << 20  # CPU_WORKSPACE_BYTES: what a call takes by default
_kept_scratch: list[Tensor] = []
_scratch_lock = threading.Lock()


def take_scratch(size: int, device: torch.device) -> Tensor:
    """(at least `size`,) uint8"""
    if device.type == "cpu":
        with _scratch_lock:
            memory = _kept_scratch.pop() if _kept_scratch else None
        if memory is not None and memory.numel() >= size:
            return memory
    return torch.empty(size, dtype=torch.uint8, device=device)


def return_scratch(memory: Tensor) -> None:
    if memory.device.type == "cpu" and 0 < memory.numel() <= KEPT_SCRATCH_BYTES and not memory.is_inference():
        with _scratch_lock:
            if not _kept_scratch:
                _kept_scratch.append(memory)


def spread(x: Tensor, keep: Tensor, n_total: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = n_total
    return x.new_zeros(shape).index_copy_(dim, keep, x)


def contrastive_summands(
    audio: Tensor, text: Tensor, alpha: Tensor, dtype: torch.dtype, count: int
) -> list[Tensor]:
    """(1 + alpha) h_audio - alpha h_text, (C, H_t): both paths share W_t, so one GEMM serves the contrast.

    Computed in float32, and returned as a sum of ``count`` tensors (1 or 2) of ``dtype``: the second holds what the first rounds
    away. NaN where alpha is negative or not finite: the row kernel, which gets the contrast's logits alone, cannot tell.
    """
    contrast_in_one_pass = _contrast_kernel_for(audio.device)
    if contrast_in_one_pass is not None and alpha.dtype == torch.float32:
        return contrast_in_one_pass(audio, text, alpha, dtype, count)
    audio = audio.float()
    a = legal_alpha(alpha)[:, None]
    # Where alpha is 0 the text path is not read: it may hold anything.
    contrast = torch.where(a == 0, audio, audio + a * (audio - text.float()))
    return _summands(contrast, dtype)[:count]


def contrast_format(
    hidden_dtype: torch.dtype, weight: Tensor, out_dtype: torch.dtype, *, rounded: bool = False
) -> tuple[torch.dtype, int]:
    """(dtype, number of summands) in which the contrast of two paths is multiplied with ``weight``.

    Beside low-precision weights the sum of two low-precision tensors is exact enough (relative error 1e-5 with bf16, and
    6e-5 where the CPU makes integers of the sum). Two float16 tensors save nothing on the CPU, and can overflow. A product that
    is stored in the weight's dtype takes one, and so does one whose caller wants the contrast ``rounded``.
    """
    if out_dtype == weight.dtype:
        return weight.dtype, 1
    splits = weight.dtype == torch.bfloat16 or (weight.dtype == torch.float16 and weight.device.type != "cpu")
    if splits and rounded:
        return weight.dtype, 1
    return (weight.dtype, 2) if splits and hidden_dtype == weight.dtype else (torch.float32, 1)


def _contrast_kernel_for(device: torch.device) -> Callable[..., list[Tensor]] | None:
    """The kernel that reads both paths once and writes the summands: on CUDA, where Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(".triton_no_logits", __package__).contrastive_summands


def gradient_view(logits: Tensor, weight_dtype: torch.dtype) -> Tensor:
    """Where the row kernel leaves d loss / d logits: the logits' own rows, in the weight's dtype if that is narrower."""
    if weight_dtype.itemsize >= logits.dtype.itemsize:
        return logits
    ratio = logits.dtype.itemsize // weight_dtype.itemsize
    return logits.view(weight_dtype).as_strided(logits.shape, (logits.stride(0) * ratio, 1))


def has_mixed_gemm(device: torch.device) -> bool:
    """Whether torch.mm writes float32 from low-precision operands."""
    return device.type == "cuda" and "dtype_out" in torch.ops.aten.mm.overloads()


@functools.cache
def _has_mixed_sum(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds a product of two tensors of ``dtype`` to a float32 tensor in place. Tried once a device."""
    if "dtype_out" not in torch.ops.aten.addmm.overloads():
        return False
    a, total = (torch.zeros((16, 16), dtype=x, device=device) for x in (dtype, torch.float32))
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # refused before anything runs on the device
        return False
    return True


# Columns of a product that has to be made before it is added: beside 1408 tokens 88 MiB of float32.
MIXED_BLOCK = 16384


def mixed_gemm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """out float32 = a @ b, or += with ``accumulate``, of low-precision operands; where :func:`has_mixed_gemm`."""
    if not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif _has_mixed_sum(out.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        for start in range(0, out.shape[1], MIXED_BLOCK):
            block = slice(start, start + MIXED_BLOCK)
            out[:, block] += torch.mm(a, b[:, block], out_dtype=torch.float32)


_precision_lock = threading.Lock()
_precision_users = 0
_precision_before = "none"


@contextlib.contextmanager
def _bf16_inner_precision() -> Iterator[None]:
    """float32 GEMMs multiply in bf16 and add in float32: exact for operands that hold bf16 values, and 3-4 times as fast.

    The setting belongs to the process. Threads that are in here at the same time share it, and the last one restores it.
    """
    global _precision_users, _precision_before
    mkldnn: Any = torch.backends.mkldnn  # whose stubs lack this setting
    setting = mkldnn.matmul
    with _precision_lock:
        if _precision_users == 0:
            _precision_before = setting.fp32_precision
            setting.fp32_precision = "bf16"
        _precision_users += 1
    try:
        yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0:
                setting.fp32_precision = _precision_before


def _float32_gemm(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool, bf16_values: bool) -> None:
    with _bf16_inner_precision() if bf16_values else contextlib.nullcontext():
        if accumulate:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)


def gemm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *more: Tensor, each_summand: bool = False
) -> Tensor:
    """out (C, V) = hidden (C, H) @ weight (V, H).T + bias, in out's dtype, with float32 accumulation.

    ``more``: what ``hidden`` leaves of the states, as summands of the weight's dtype; a GEMM each, into the same float32. The
    native product of the CPU may make 16-bit integers of the sum, and multiply once, with a relative error near 6e-5. Not with
    ``each_summand``: then it takes two products, and has one near 3e-6.
    An ``out`` of another low precision than the weight's is made from float32, MIXED_BLOCK ids at a time.
    """
    if out.dtype == weight.dtype and not more:
        torch.mm(_whole_rows(hidden.to(weight.dtype)), weight.T, out=out)
    elif out.dtype != torch.float32:
        for start in range(0, out.shape[1], MIXED_BLOCK):
            ids = slice(start, start + MIXED_BLOCK)
            wide = torch.empty(out[:, ids].shape, dtype=torch.float32, device=out.device)
            out[:, ids] = gemm(hidden, weight[ids], None, wide, *more, each_summand=each_summand)
    elif hidden.dtype == weight.dtype and has_mixed_gemm(out.device):
        for i, part in enumerate((hidden, *more)):
            mixed_gemm(part, weight.T, out, accumulate=i > 0)
    else:
        _gemm_by_vocabulary_blocks([hidden, *more], weight, out, as_items=not each_summand)
    return out if bias is None else out.add_(bias)


def _summands(hidden: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """hidden as a sum of tensors of a low precision: the second holds what the first rounds away."""
    if hidden.dtype == dtype:
        return [hidden]
    high = hidden.to(dtype)
    return [high, (hidden - high).to(dtype)]


def _gemm_by_vocabulary_blocks(parts: list[Tensor], weight: Tensor, out: Tensor, *, as_items: bool) -> None:
    """out = sum of parts @ weight.T in float32, the weight upcast a block of rows at a time."""
    bf16 = out.device.type == "cpu" and all(x.dtype == torch.bfloat16 for x in (weight, *parts))
    if bf16 and _native_gemm_takes(parts, weight, out):
        native.bf16_gemm(parts, weight, out, as_items=as_items)
        return
    parts = [p.float() for p in parts]
    widest = min(VOCAB_BLOCK, weight.shape[0])
    block = torch.empty(widest, weight.shape[1], dtype=torch.float32, device=weight.device)
    product = torch.empty(out.shape[0] * widest, dtype=torch.float32, device=out.device)
    for start in range(0, weight.shape[0], VOCAB_BLOCK):
        stop = min(start + VOCAB_BLOCK, weight.shape[0])
        w = block[: stop - start].copy_(weight[start:stop])
        # Into contiguous memory first: oneDNN writes a slice of the rows at half the speed.
        dense = product[: out.shape[0] * (stop - start)].view(out.shape[0], stop - start)
        for i, part in enumerate(parts):
            _float32_gemm(part, w.T, dense, accumulate=i > 0, bf16_values=bf16)
        out[:, start:stop] = dense


def _native_gemm_takes(parts: list[Tensor], weight: Tensor, out: Tensor) -> bool:
    beside_each_other = all(x.stride(1) == 1 for x in (*parts, weight, out))
    return native.multiplies_bf16() and weight.shape[1] % 2 == 0 and beside_each_other


def _whole_rows(x: Tensor) -> Tensor:
    """x, copied where oneDNN would read past the ends of its rows.

    Its AMX products of bf16 read 32 columns at a time and multiply what lies behind the last one by zero. Where that memory holds
    NaN, the result is NaN.  Rows that follow each other directly give correct results.
    """
    reads_on = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[1] % 32 and native.has_amx()
    return x.contiguous() if reads_on else x


def hidden_gradient(grad: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (C, H) = grad (C, V) @ weight (V, H)"""
    if grad.dtype == weight.dtype == out.dtype != torch.float32 and has_mixed_gemm(out.device):
        # V is large and C may be small: cuBLAS would split the sum, and by torch's default add its parts in out's dtype.
        whole = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        mixed_gemm(grad, weight, whole, accumulate=False)
        out.copy_(whole)
        return
    if grad.dtype == weight.dtype == out.dtype:
        torch.mm(_whole_rows(grad), weight, out=out)
        return
    total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for start in range(0, weight.shape[0], VOCAB_BLOCK):
        stop = min(start + VOCAB_BLOCK, weight.shape[0])
        total.addmm_(grad[:, start:stop].float(), weight[start:stop].float())
    out.copy_(total)


def empty_weight_gradient(weight: Tensor, *, at_once: bool = False) -> Tensor:
    """(V, H) float32, not yet written. Where the native product adds to it, its memory has the order of (H, V).

    ``at_once``: one product of tensors of the weight's dtype will make it. Where the native product is used it is then in that
    dtype, and rounded once as well: fresh memory for a float32 sum costs as much time as the product of few tokens.
    """
    native_order = _native_weight_gradient(weight)
    if native_order and at_once:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    shape = weight.shape[::-1] if native_order else weight.shape
    total = torch.empty(shape, dtype=torch.float32, device=weight.device)
    return total.T if native_order else total


def finish_weight_gradient(total: Tensor, dtype: torch.dtype) -> Tensor:
    """`total` in the weight's dtype, contiguous."""
    lies_transposed = total.stride(0) == 1 and total.dtype == torch.float32 and total.device.type == "cpu"
    if lies_transposed and dtype == torch.bfloat16 and native.multiplies_bf16():  # torch's own is 4-6 times as slow
        return native.transpose_to_bf16(total.T)
    return total.to(dtype).contiguous()


def _native_weight_gradient(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and native.multiplies_bf16()


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor, *, accumulate: bool) -> None:
    """total (V, H), as empty_weight_gradient gave it, += grad (C, V).T @ hidden (C, H).

    Without ``accumulate`` it is = instead of +=, and total is not read.
    """
    beta = float(accumulate)  # 0: total is not read
    if total.dtype == grad.dtype == hidden.dtype == torch.bfloat16:
        assert not accumulate
        torch.mm(grad.T, hidden, out=total)
        return
    if grad.dtype == hidden.dtype == torch.float32:
        total.addmm_(grad.T, hidden, beta=beta)
        return
    if _native_weight_gradient(grad) and hidden.dtype == grad.dtype and total.stride(0) == 1 and grad.stride(1) == 1:
        pairs = grad.shape[0] // 2 * 2
        if pairs:
            summand = hidden[:pairs].T.contiguous()
            native.bf16_gemm([summand], grad[:pairs], total.T, accumulate=accumulate, weight_by_rows=True)
        if pairs < len(grad):
            total.T.addmm_(hidden[pairs:].T.float(), grad[pairs:].float(), beta=1.0 if pairs else beta)
        return
    bf16 = grad.dtype == hidden.dtype == torch.bfloat16 and grad.device.type == "cpu"
    if grad.dtype == hidden.dtype and has_mixed_gemm(total.device):
        mixed_gemm(grad.T, hidden, total, accumulate=accumulate)
        return
    h = hidden.float()
    for start in range(0, total.shape[0], VOCAB_BLOCK):
        stop = min(start + VOCAB_BLOCK, total.shape[0])
        product = grad[:, start:stop].float().T
        _float32_gemm(product, h, total[start:stop], accumulate=accumulate, bf16_values=bf16)
