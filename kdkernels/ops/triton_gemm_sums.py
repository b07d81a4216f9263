"""Logits whose GEMM leaves each row's maximum and sums beside them, in Triton, so that the row kernel reads the logits once.

The row kernel of :mod:`kdkernels.ops.triton_caad` reads a chunk's logits twice: for the maxima and sums, then for the gradient.
Here the GEMM's epilogue takes the first pass, while a tile is still in registers:

    _summed_gemm_kernel     logits = hidden W^T + b, and of each tile and row: max l, sum e^((l - max)/tau), sum e^(l - max)
    _one_read_kernel        joins a row's tiles, then reads its logits once: the gradient, and the cross term of KL(p || q)

Maxima and sums are those of the logits as stored: rounded, scaled and capped. So p and q are what the two passes would see.

GEMM. A program a multiprocessor. Tiles go tokens first: programs side by side share a tile of the weight, which leaves device
memory once, and the chunk's hidden states stay in L2. From compute capability 9.0 on operands and logits are moved by tensor
descriptors (bulk copies), and the first operands of the next tile arrive during the epilogue. Elsewhere by pointers.

One stream is not enough where the gradient needs a number that takes another pass: reverse KL, jsd, a plausibility mask. Nor
where the logits of two paths meet in the row kernel, or where statistics are wanted. :func:`summed_rows` returns None there.

Legend: C tokens of a chunk, V valid ids, H hidden width, M x E a tile of tokens and ids, K a step of H, S tiles beside each other
in a row, G groups of X logits in a block of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .chunking import row_items
from .gemm import contrast_format
from .rows import LinearTensors, RowLauncher, RowProblem, RowResult, RowSpec, check_overlap, row_launcher_of
from .triton_caad import launch_table
from .triton_no_logits import _device_limits, _Limits
from .triton_shared import (
    _FLOOR,
    _LOG2E,
    _MASKED,
    _columns,
    _cross_entropy,
    _device_of,
    _finish_kd,
    _is_vectorisable,
    _log_ratio_of_sums,
    _logit_with_slope,
    _merge_weight,
    _rates,
    _read,
    _read_with_slope,
    _readable,
    _reciprocal,
    _stride,
    _temperature_code,
)

# Fields of a tile's result, each (C, S) float32.
_MAX, _SUM, _UNIT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # _UNIT: the sum at temperature 1
FIELDS = 3
_BARRIER_BYTES = 1024  # room for the barriers of bulk copies in shared memory


@triton.jit
def _operand(
    source, rows, stride, row_start, start, width, STEP: tl.constexpr, BULK: tl.constexpr, UPCAST: tl.constexpr
):
    """(rows, K) of an operand (rows, H); 0 beyond H."""
    if BULK:
        block = source.load([row_start, start])
    else:
        inner = start + tl.arange(0, STEP)
        block = tl.load(source + rows[:, None] * stride + inner[None, :], mask=(inner < width)[None, :], other=0.0)
    return block.to(tl.float32) if UPCAST else block


@triton.jit
def _part(value, PARTS: tl.constexpr, INDEX: tl.constexpr):
    """One of the PARTS (1 or 2) of a tile's columns that lie beside each other."""
    part = value
    if PARTS == 2:
        halves = tl.permute(tl.reshape(value, (value.shape[0], 2, value.shape[1] // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        part = first if INDEX == 0 else second
    return part


@triton.jit(do_not_specialize=["tokens", "stride_sums"])
def _summed_gemm_kernel(
    hidden,  # (SUMMANDS * C, H): a descriptor, or a pointer
    weight,  # (V, H)
    bias_ptr,
    logits,  # (C, V)
    sums_ptr,  # (FIELDS, C, S)
    stride_hidden,
    stride_weight,
    stride_logits,
    stride_sums,  # of a field
    tokens,
    vocab,
    width,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # in which the epilogue stores a tile
    SUMMANDS: tl.constexpr,  # of the hidden states; they lie below each other
    BULK: tl.constexpr,
    UPCAST: tl.constexpr,
    TEMPERATURE: tl.constexpr,  # 1, 2, or 0 for any other
    WITH_TAU: tl.constexpr,
    WITH_UNIT: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    PART: tl.constexpr = BLOCK_E // PARTS
    token_tiles = tl.cdiv(tokens, BLOCK_M)
    vocab_tiles = tl.cdiv(vocab, BLOCK_E)
    steps = tl.cdiv(width, BLOCK_K)
    rate = _rates(inverse_temperature, TEMPERATURE)[0]
    for tile in tl.range(tl.program_id(0), token_tiles * vocab_tiles, tl.num_programs(0), flatten=BULK):
        row_start = (tile % token_tiles) * BLOCK_M
        vocab_tile = tile // token_tiles
        column_start = vocab_tile * BLOCK_E
        # Beyond the last token or id, the last one is read again. 64 bits: a head of 262k ids and width 8192 has 2^31 weights.
        row = (row_start + tl.arange(0, BLOCK_M)).to(tl.int64)
        token = tl.minimum(row, tokens - 1)
        ids = tl.minimum(column_start + tl.arange(0, BLOCK_E), vocab - 1).to(tl.int64)
        total = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        for step in range(SUMMANDS * steps):
            start = step * BLOCK_K
            below = 0  # where the summand begins
            if SUMMANDS > 1:
                start = (step % steps) * BLOCK_K
                below = (step // steps) * tokens
            h = _operand(hidden, token + below, stride_hidden, row_start + below, start, width, BLOCK_K, BULK, UPCAST)
            w = _operand(weight, ids, stride_weight, column_start, start, width, BLOCK_K, BULK, UPCAST)
            total = tl.dot(h, w.T, total, input_precision="ieee")

        maximum = tl.full([BLOCK_M], _FLOOR, tl.float32)
        tau_sum = tl.zeros([BLOCK_M], tl.float32)
        unit_sum = tl.zeros([BLOCK_M], tl.float32)
        if bias_ptr is not None:
            column = column_start + tl.arange(0, BLOCK_E)
            total += tl.load(bias_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
        rounded = total.to(logits.dtype if BULK else logits.dtype.element_ty)  # before it is cut: in pairs
        for index in tl.static_range(PARTS):
            column = column_start + index * PART + tl.arange(0, PART)
            inside = (column < vocab)[None, :]
            stored = _part(rounded, PARTS, index)
            if BULK:
                logits.store([row_start, column_start + index * PART], stored)
            else:
                written = (row < tokens)[:, None] & inside
                tl.store(logits + row[:, None] * stride_logits + column[None, :], stored, mask=written)
            # No sentinel replaces a masked logit: less a maximum of at least _FLOOR it is so low that its power is 0.
            if SOFTCAP is None:
                logit = tl.where(inside, stored.to(tl.float32) * SCALE, float("-inf"))
            else:
                seen = tl.where(inside, stored.to(tl.float32), float("-inf"))
                logit = _logit_with_slope(seen, inside, SCALE, SOFTCAP)[0]
            new_maximum = tl.maximum(maximum, tl.max(logit, axis=1))
            shifted = logit - new_maximum[:, None]
            if WITH_TAU:
                powers = tl.exp2(shifted * rate)
                tau_sum = tau_sum * tl.exp2((maximum - new_maximum) * rate) + tl.sum(powers, axis=1)
            if WITH_UNIT:
                # At temperature 2 e^l = (e^(l/2))^2.
                unit = powers * powers if WITH_TAU and TEMPERATURE == 2 else tl.exp2(shifted * _LOG2E)
                unit_sum = unit_sum * tl.exp2((maximum - new_maximum) * _LOG2E) + tl.sum(unit, axis=1)
            maximum = new_maximum
        sums = sums_ptr + row * vocab_tiles + vocab_tile
        written = row < tokens
        tl.store(sums + _MAX * stride_sums, maximum, mask=written)
        if WITH_TAU:
            tl.store(sums + _SUM * stride_sums, tau_sum, mask=written)
        if WITH_UNIT:
            tl.store(sums + _UNIT * stride_sums, unit_sum, mask=written)


@triton.jit
def _joined(sums_ptr, stride_sums, tiles, rate, TILES: tl.constexpr, SUM: tl.constexpr):
    """A row's maximum and sum from those of its tiles."""
    tile = tl.arange(0, TILES)
    maximum = tl.load(sums_ptr + _MAX * stride_sums + tile, mask=tile < tiles, other=_FLOOR)
    total = tl.load(sums_ptr + SUM * stride_sums + tile, mask=tile < tiles, other=0.0)
    row_maximum, weight = _merge_weight(maximum, rate)
    return row_maximum, tl.sum(total * weight, axis=0)


@triton.jit(do_not_specialize=["stride_sums"])
def _one_read_kernel(
    student_ptr,
    teacher_ptr,
    target_ptr,
    kd_coef_ptr,
    ce_coef_ptr,
    grad_ptr,
    kd_ptr,
    ce_ptr,
    student_sums_ptr,  # (FIELDS, C, S)
    teacher_sums_ptr,
    stride_student,
    stride_teacher,
    stride_grad,
    stride_sums,  # of a field
    tiles,  # S
    vocab,
    readable,  # see _readable, or None
    width,
    ignore_index,
    inverse_temperature,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    TILES: tl.constexpr,  # a power of two
    TEMPERATURE: tl.constexpr,  # 1, 2, or 0 for any other
    HAS_TARGET: tl.constexpr,
    WITH_KD: tl.constexpr,
    WITH_CE: tl.constexpr,
    STUDENT_SCALE: tl.constexpr,
    TEACHER_SCALE: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    student_ptr += row64 * stride_student
    grad_ptr += row64 * stride_grad
    student_sums_ptr += row64 * tiles
    if WITH_KD:
        teacher_ptr += row64 * stride_teacher
        teacher_sums_ptr += row64 * tiles
    local = _columns(GROUPS, GROUP, CONTIGUOUS)  # (G, X)

    if HAS_TARGET:
        target = tl.load(target_ptr + row)
        if target == ignore_index:
            tl.store(kd_ptr + row, 0.0)
            tl.store(ce_ptr + row, 0.0)
            for start in range(0, width, BLOCK):
                columns = start + local
                zero = tl.zeros([GROUPS, GROUP], tl.float32)
                tl.store(grad_ptr + columns, zero.to(grad_ptr.dtype.element_ty), mask=columns < width)
            return

    rate, inverse_tau = _rates(inverse_temperature, TEMPERATURE)
    if WITH_CE:
        # Before the gradient: it may overwrite the row.
        label_inside = (target >= 0) & (target < vocab)
        label = tl.where(label_inside, target, 0).to(tl.int32)
        label_logit = _read(student_ptr, label, label_inside, STUDENT_SCALE, STUDENT_SOFTCAP)
        s_row, q1_row = _joined(student_sums_ptr, stride_sums, tiles, _LOG2E, TILES, _UNIT)
        tl.store(ce_ptr + row, _cross_entropy(q1_row, s_row, label_logit, label_inside))
    else:
        tl.store(ce_ptr + row, 0.0)

    # A NaN of the row is in its sums. From there it goes into the results, and into the gradient by the factors. The logits
    # themselves become at most their maximum, which drops NaN. So a factor of 0 meets finite numbers alone.
    unused = True
    if WITH_KD:
        s_row, q_row = _joined(student_sums_ptr, stride_sums, tiles, rate, TILES, _SUM)
        z_row, p_row = _joined(teacher_sums_ptr, stride_sums, tiles, rate, TILES, _SUM)
        empty = p_row == 0.0
        # tau^2 from kd, 1 / tau from d (s / tau) / d s.
        kd_scale = tl.where(empty, 0.0, tl.load(kd_coef_ptr + row) / inverse_tau)
        unused = kd_scale == 0.0
        inverse_p = tl.where(unused, 0.0, _reciprocal(p_row))
        cross = tl.zeros([GROUPS], tl.float32)  # sum e^z (z - s), each less its maximum
        hole = tl.full([GROUPS], _MASKED, tl.float32)  # largest z where s is masked
    if WITH_CE:
        ce_scale = tl.load(ce_coef_ptr + row)
        ce_scale = tl.where(label_inside | (ce_scale == 0.0), ce_scale, float("nan"))
        unused = unused & (ce_scale == 0.0)
        inverse_q1 = tl.where(unused, 0.0, _reciprocal(q1_row))
    if WITH_KD:
        inverse_q = tl.where(unused, 0.0, _reciprocal(q_row))

    for start in range(0, width, BLOCK):
        columns = start + local
        inside = columns < vocab
        s, slope = _read_with_slope(student_ptr, columns, inside, STUDENT_SCALE, STUDENT_SOFTCAP, readable)
        s_below = tl.minimum(s - s_row, 0.0)
        gradient = tl.zeros([GROUPS, GROUP], tl.float32)
        if WITH_KD:
            z = _read(teacher_ptr, columns, inside, TEACHER_SCALE, TEACHER_SOFTCAP, readable)
            z_below = tl.minimum(z - z_row, 0.0)
            s_exp = tl.exp2(s_below * rate)
            z_exp = tl.exp2(z_below * rate)
            q = s_exp * inverse_q
            gradient = kd_scale * (q - z_exp * inverse_p)
            cross += tl.sum(z_exp * (z_below - s_below), axis=1)
            hole = tl.maximum(hole, tl.max(tl.where(s == _MASKED, z, _MASKED), axis=1))
        if WITH_CE:
            if WITH_KD and TEMPERATURE == 1:
                q1 = q
            elif WITH_KD and TEMPERATURE == 2:
                q1 = s_exp * s_exp * inverse_q1
            else:
                q1 = tl.exp2(s_below * _LOG2E) * inverse_q1
            gradient += ce_scale * (q1 - tl.where(columns == label, 1.0, 0.0))
        masked = s == _MASKED
        if STUDENT_SOFTCAP is not None:
            masked = masked | (gradient == 0.0)  # the slope at NaN is NaN
        gradient = tl.where(masked, 0.0, gradient * slope)
        tl.debug_barrier()  # all of this block is read before any of it is overwritten
        tl.store(grad_ptr + columns, gradient.to(grad_ptr.dtype.element_ty), mask=columns < width)

    if WITH_KD:
        log_z = _log_ratio_of_sums(p_row, q_row)
        kd = tl.sum(cross, axis=0) * _reciprocal(p_row) * inverse_tau - log_z
        infinite = tl.exp2((tl.max(hole, axis=0) - z_row) * rate) > 0.0
        tl.store(kd_ptr + row, _finish_kd(kd, inverse_tau, infinite, empty, True))
    else:
        tl.store(kd_ptr + row, 0.0)


@dataclass(frozen=True)
class _Tiles:
    """How the GEMM is cut up."""

    rows: int  # M
    columns: int  # E
    inner: int  # K
    parts: int
    stages: int
    warps: int = 8
    programs: int = 1  # a multiprocessor

    def launch(self) -> dict[str, Any]:
        blocks = {"BLOCK_M": self.rows, "BLOCK_E": self.columns, "BLOCK_K": self.inner, "PARTS": self.parts}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def _tiles(limits: _Limits, itemsize: int, *, heavy: bool, aligned: bool) -> _Tiles:
    """The tile for logits of ``itemsize`` bytes. Fixed, because a tuner would have to synchronise.

    On compute capability 9.0 it is 128 x 256. Its accumulators take 128 of a thread's registers, and the epilogue takes 40 to 130
    more. There are as many stages as the shared memory holds beside the part that is being stored. The tile is half as wide
    elsewhere, and where the epilogue needs more registers (``heavy``: a softcap or a bias). It is smaller still where addresses
    need them (rows that are not ``aligned``).
    """
    if limits.capability != 9 or heavy or not aligned:
        rows = 128 if aligned else 64
        for parts, stages in ((2 if heavy else 1, 3), (2, 3), (2, 2)):
            operands = stages * (rows + 128) * 64 * 2
            stored = rows * 128 * itemsize // parts if limits.capability >= 9 else 0  # bulk stores go through shared memory
            if operands + stored + _BARRIER_BYTES <= limits.shared_bytes:
                break
        return _Tiles(rows, 128, 64, parts, stages)
    return _Tiles(128, 256, 64, 2, 4 if itemsize == 2 else 3)


def _bulk(limits: _Limits, *tensors: Tensor) -> bool:
    """Whether descriptors can describe these tensors (rows, width)."""
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in tensors)
    return limits.capability >= 9 and aligned


def summed_rows(
    heads: LinearTensors, spec: RowSpec, logits_dtype: torch.dtype, *, with_ce: bool, want_stats: bool, buffers: int = 1
) -> SummedRows | None:
    """The kernels for a chunk loop with a gradient over these heads; None where they do not serve it: see above.

    ``buffers``: chunks that are under way at the same time.
    """
    student, weight, student_bias, audio, text, teacher_weight, teacher_bias = heads
    pairs = [(student.dtype, weight)]
    if spec.with_kd:
        dtype = audio.dtype if text is None else contrast_format(audio.dtype, teacher_weight, logits_dtype)[0]
        pairs.append((dtype, teacher_weight))
    low = all(
        x.dtype in (torch.bfloat16, torch.float16) and x.dtype == dtype and x.stride(1) == 1 for dtype, x in pairs
    )
    one_stream = spec.divergence == "forward_kl" and spec.plausibility is None and not want_stats
    two_paths = spec.with_kd and text is not None and spec.teacher_softcap is not None
    if not low or not one_stream or two_paths:
        return None
    extra = (spec.student_softcap, spec.teacher_softcap, student_bias, teacher_bias)
    limits = _device_limits(weight.device)
    row_bytes = [x.stride(0) * x.element_size() for _, x in pairs]
    row_bytes.append(row_items(spec.vocab, weight.device) * logits_dtype.itemsize)
    tiles = _tiles(
        limits,
        logits_dtype.itemsize,
        heavy=any(x is not None for x in extra),
        aligned=all(x % 16 == 0 for x in row_bytes),
    )
    return SummedRows(spec, with_ce, limits, tiles, buffers)


class SummedRows:
    """The products and the row kernel of the chunk loop, for logits whose GEMMs left their sums here.

    :meth:`student` and :meth:`teacher` take the place of :func:`kdkernels.ops.gemm.gemm`, and :attr:`rows` that of ``caad_rows``.
    In a chunk the student comes first, then the teacher (with a distillation term), then the rows. All tensors are on a CUDA
    device, or on the CPU under TRITON_INTERPRET=1. Nothing is read back to the host.
    """

    def __init__(self, spec: RowSpec, with_ce: bool, limits: _Limits, tiles: _Tiles, buffers: int) -> None:
        self.spec, self.with_ce, self.limits, self.tiles, self.buffers = spec, with_ce, limits, tiles, buffers
        self.row_tiles = math.ceil(spec.vocab / tiles.columns)
        self.sums: Tensor | None = None  # (buffers, heads, FIELDS, C, S) float32
        self.chunk = -1

    @property
    def bytes_per_token(self) -> int:
        """Of the sums of one chunk."""
        return 4 * (1 + self.spec.with_kd) * FIELDS * self.row_tiles

    def student(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        self.chunk += 1
        if self.sums is None:  # the first chunk is the longest
            shape = (self.buffers, 1 + self.spec.with_kd, FIELDS, len(hidden), self.row_tiles)
            self.sums = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        spec = self.spec
        self._gemm([hidden], weight, bias, out, 0, self.with_ce, float(spec.student_scale), spec.student_softcap)
        return out

    def teacher(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *more: Tensor) -> Tensor:
        spec = self.spec
        self._gemm([hidden, *more], weight, bias, out, 1, False, float(spec.teacher_scale), spec.teacher_softcap)
        return out

    def _sums_of(self, head: int) -> Tensor:
        """(FIELDS, C, S) of the chunk that is under way."""
        assert self.sums is not None, "rows before their products"
        return self.sums[self.chunk % self.buffers, head]

    def _gemm(
        self,
        summands: list[Tensor],
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        head: int,
        with_unit: bool,
        scale: float,
        softcap: float | None,
    ) -> None:
        hidden = summands[0] if len(summands) == 1 else torch.cat(summands)
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        tokens, (vocab, width), tiles = len(out), weight.shape, self.tiles
        bulk = _bulk(self.limits, hidden, weight, out)
        operands: list[Any] = [hidden, weight, out]
        if bulk:
            blocks = [
                [tiles.rows, tiles.inner],
                [tiles.columns, tiles.inner],
                [tiles.rows, tiles.columns // tiles.parts],
            ]
            operands = [TensorDescriptor.from_tensor(x, block) for x, block in zip(operands, blocks, strict=True)]
        sums = self._sums_of(head)
        programs = min(tiles.programs * self.limits.processors, math.ceil(tokens / tiles.rows) * self.row_tiles)
        interpreted = not isinstance(_summed_gemm_kernel, triton.JITFunction)
        with _device_of(out, _summed_gemm_kernel):
            _summed_gemm_kernel[(programs,)](
                hidden=operands[0],
                weight=operands[1],
                bias_ptr=bias,
                logits=operands[2],
                sums_ptr=sums,
                stride_hidden=hidden.stride(0),
                stride_weight=weight.stride(0),
                stride_logits=out.stride(0),
                stride_sums=sums.stride(0),
                tokens=tokens,
                vocab=vocab,
                width=width,
                inverse_temperature=1.0 / self.spec.temperature,
                SUMMANDS=len(summands),
                BULK=bulk,
                UPCAST=interpreted and weight.dtype == torch.bfloat16,  # the interpreter multiplies bf16 as bits
                TEMPERATURE=_temperature_code(self.spec.temperature),
                WITH_TAU=self.spec.with_kd,
                WITH_UNIT=with_unit,
                SCALE=scale,
                SOFTCAP=softcap,
                **tiles.launch(),
            )

    def _solve_rows(self, problem: RowProblem) -> RowResult:
        """The row problem of :mod:`kdkernels.ops.rows` for the logits (1, C, V) of the last products, with a gradient."""
        student, audio, _, target, _, kd_coef, ce_coef, spec, grad, _ = problem
        assert grad is not None
        check_overlap(student, grad)
        out = problem.empty_result()
        read = list(problem.read.values())
        readable = _readable(read, grad, spec.vocab)
        own = self._sums_of(0)
        with _device_of(student, _one_read_kernel):
            _one_read_kernel[(problem.rows,)](
                student_ptr=student,
                teacher_ptr=audio if spec.with_kd else None,
                target_ptr=target,
                kd_coef_ptr=kd_coef,
                ce_coef_ptr=ce_coef,
                grad_ptr=grad,
                kd_ptr=out.kd,
                ce_ptr=out.ce,
                student_sums_ptr=own,
                teacher_sums_ptr=self._sums_of(1) if spec.with_kd else None,
                stride_student=_stride(student, 1),
                stride_teacher=_stride(audio, 1),
                stride_grad=_stride(grad, 1),
                stride_sums=own.stride(0),
                tiles=self.row_tiles,
                vocab=spec.vocab,
                readable=readable,
                width=student.shape[2],
                ignore_index=spec.ignore_index,
                inverse_temperature=1.0 / spec.temperature,
                CONTIGUOUS=readable is not None or all(_is_vectorisable(x, spec.vocab) for x in (*read, grad)),
                TILES=triton.next_power_of_2(self.row_tiles),
                TEMPERATURE=_temperature_code(spec.temperature),
                HAS_TARGET=target is not None,
                WITH_KD=spec.with_kd,
                WITH_CE=problem.with_ce,
                STUDENT_SCALE=float(spec.student_scale),
                TEACHER_SCALE=float(spec.teacher_scale),
                STUDENT_SOFTCAP=spec.student_softcap,
                TEACHER_SOFTCAP=spec.teacher_softcap,
                **launch_table(spec, min(x.element_size() for x in read), want_stats=False),
            )
        return out

    @property
    def rows(self) -> RowLauncher:
        return row_launcher_of(self._solve_rows)
