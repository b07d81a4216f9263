"""The mixture problem (:mod:`kdkernels.ops.mixture`) in Triton, in the manner of :mod:`kdkernels.ops.triton_caad`: one program a
row, blocks of G groups of E logits, a group's running sums in one thread, masked logits as finite sentinels.

Pass 1 walks a teacher's row downwards for its maximum and sums, pass 2 upwards for the mixture; before them a pass for the
plausibility mask's maximum, where there is one. A row whose share is 0 is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import RowSpec
from .triton_caad import launch_table
from .triton_shared import (
    _FLOOR,
    _LOG2E,
    _MASKED,
    _advance,
    _advance_moment,
    _alpha_stride,
    _columns,
    _device_of,
    _is_vectorisable,
    _merge_moment,
    _merge_weight,
    _read,
    _read_teacher,
    _readable,
    _reciprocal,
    _stride,
)

# Below it a probability counts as 0: the smallest normal float32.
_SMALLEST = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["stride_sums"])
def _mix_row_kernel(
    audio_ptr,
    text_ptr,
    target_ptr,
    alpha_ptr,
    share_ptr,
    total_ptr,
    sums_ptr,
    stride_audio,
    stride_text,
    stride_total,
    stride_alpha,
    stride_sums,
    vocab,
    readable,  # see _readable, or None
    ignore_index,
    inverse_temperature,
    log_plausibility,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    HAS_PLAUSIBILITY: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    BLOCK: tl.constexpr = GROUPS * GROUP
    row = tl.program_id(0)
    # 64 bits: row * stride passes 2^31 from 16k rows of a 128k vocabulary on.
    row64 = row.to(tl.int64)
    audio_ptr += row64 * stride_audio
    total_ptr += row64 * stride_total
    if HAS_TEXT:
        text_ptr += row64 * stride_text
    local = _columns(GROUPS, GROUP, CONTIGUOUS)  # (G, E)

    if FIRST:
        mass = 0.0
        rest = 0.0
    else:
        mass = tl.load(sums_ptr + row)
        rest = tl.load(sums_ptr + stride_sums + row)
    share = tl.load(share_ptr + row)
    ignored = row < 0
    if HAS_TARGET:
        ignored = tl.load(target_ptr + row) == ignore_index
    unread = ignored | (share == 0.0)
    nothing_to_do = ignored
    if not FIRST and not LAST:
        nothing_to_do = unread
    if nothing_to_do:
        tl.store(sums_ptr + row, mass)
        tl.store(sums_ptr + stride_sums + row, rest)
        return

    rate = inverse_temperature * _LOG2E
    read_vocab = tl.where(unread, 0, vocab)
    text_vocab = 0
    read_readable = None
    text_readable = None
    if readable is not None:
        read_readable = tl.where(unread, 0, readable)
    alpha = 0.0
    if HAS_TEXT:
        alpha = tl.load(alpha_ptr + row * stride_alpha)
        text_vocab = tl.where(alpha == 0.0, 0, read_vocab)
        if readable is not None:
            text_readable = tl.where(alpha == 0.0, 0, read_readable)
        share = tl.where(((alpha >= 0.0) & (alpha < float("inf"))) | unread, share, float("nan"))

    threshold = 0.0
    if HAS_PLAUSIBILITY:
        audio_max = tl.full([GROUPS], _FLOOR, tl.float32)
        for i in range(0, tl.cdiv(read_vocab, BLOCK)):
            columns = i * BLOCK + local
            audio = _read(audio_ptr, columns, columns < vocab, SCALE, SOFTCAP, readable)
            audio_max = tl.maximum(audio_max, tl.max(audio, axis=1))
        threshold = tl.max(audio_max, axis=0) + log_plausibility

    # Pass 1. All sums are (G,).
    z_max = tl.full([GROUPS], _FLOOR, tl.float32)
    z_sum = tl.zeros([GROUPS], tl.float32)
    moment = tl.zeros([GROUPS], tl.float32)  # sum e^z z, less the maximum
    blocks = tl.cdiv(read_vocab, BLOCK)
    for i in range(0, blocks):
        columns = (blocks - 1 - i) * BLOCK + local
        z = _read_teacher(
            audio_ptr, text_ptr, columns, columns < vocab, text_vocab, alpha, threshold, HAS_TEXT, HAS_PLAUSIBILITY, SCALE,
            SOFTCAP, read_readable, text_readable,
        )[2]  # fmt: skip
        old = z_max
        z_max, keep, shifted, z_exp = _advance(z_max, z, rate)
        if not GEOMETRIC:
            moment = _advance_moment(moment, z_sum, old, z_max, keep, z_exp, shifted)
        z_sum = z_sum * keep + tl.sum(z_exp, axis=1)
    z_row, weight = _merge_weight(z_max, rate)
    sum_row = tl.sum(z_sum * weight, axis=0)
    counts = sum_row != 0.0  # a row that is masked throughout, or not read, teaches nothing; NaN counts
    log_sum = tl.log(tl.where(counts, sum_row, 1.0))
    share = tl.where(counts, share, 0.0)
    mass += share
    if GEOMETRIC:
        rest += share * log_sum
    else:
        mean = _merge_moment(moment, z_sum, z_max, z_row, weight) * _reciprocal(sum_row)
        rest += share * (mean * inverse_temperature - log_sum)

    # Pass 2.
    factor = share * _reciprocal(sum_row)
    if LAST:
        inverse_mass = _reciprocal(mass)
        # Geometric: the online softmax of the mixture; else log_total: sum of total * log(total).
        m_max = tl.full([GROUPS], _FLOOR, tl.float32)
        m_sum = tl.zeros([GROUPS], tl.float32)
        log_total = tl.zeros([GROUPS], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + local
        inside = columns < vocab
        if readable is not None:
            inside = columns < readable  # what stands behind the last logit is masked, and the row kernel drops it
        z = _read_teacher(
            audio_ptr, text_ptr, columns, columns < read_vocab, text_vocab, alpha, threshold, HAS_TEXT, HAS_PLAUSIBILITY, SCALE,
            SOFTCAP, read_readable, text_readable,
        )[2]  # fmt: skip
        if GEOMETRIC:
            hidden = tl.where(counts, z, 0.0) == _MASKED
            total = tl.where(counts, share * (z - z_row), 0.0)
            if not FIRST:
                before = tl.load(total_ptr + columns, mask=inside, other=float("-inf"))
                hidden = hidden | (before < _FLOOR)
                total += tl.where(hidden, 0.0, before)
            if LAST:
                total = tl.where(mass == 0.0, _MASKED, tl.where(hidden | (columns >= vocab), _MASKED, total * inverse_mass))
                hidden = total == _MASKED
                m_max, keep, _, m_exp = _advance(m_max, total, rate)
                m_sum = m_sum * keep + tl.sum(m_exp, axis=1)
            total = tl.where(hidden, float("-inf"), total)
        else:
            total = factor * tl.exp2((z - z_row) * rate)
            if not FIRST:
                total += tl.load(total_ptr + columns, mask=inside, other=0.0)
            if LAST:
                none = total < _SMALLEST
                log_p = tl.log(tl.where(none, 1.0, total))
                log_total += tl.sum(total * log_p, axis=1)
                total = tl.where(none, float("-inf"), log_p / inverse_temperature)
        tl.store(total_ptr + columns, total, mask=inside)

    if LAST:
        if GEOMETRIC:
            m_row, weight = _merge_weight(m_max, rate)
            mixed = tl.sum(m_sum * weight, axis=0)
            empty = mixed == 0.0
            rest -= tl.where(empty, 0.0, mass * (m_row * inverse_temperature + tl.log(tl.where(empty, 1.0, mixed))))
        else:
            rest += mass * tl.log(tl.where(mass == 0.0, 1.0, mass)) - tl.sum(log_total, axis=0)
        rest = tl.where(rest < 0.0, 0.0, rest)  # rounding; NaN passes
    tl.store(sums_ptr + row, mass)
    tl.store(sums_ptr + stride_sums + row, rest)


def mix_rows(
    audio: torch.Tensor,
    text: torch.Tensor | None,
    target: torch.Tensor | None,
    alpha: torch.Tensor,
    share: torch.Tensor,
    spec: RowSpec,
    total: torch.Tensor,
    sums: torch.Tensor | None,
    *,
    last: bool,
) -> torch.Tensor:
    """See :mod:`kdkernels.ops.mixture`. All arithmetic and the sums are in float32. Nothing is read back to the host."""
    first = sums is None
    if sums is None:
        sums = torch.empty(2, share.numel(), dtype=torch.float32, device=share.device)
    if share.numel() == 0:
        return sums
    read = [audio] if text is None else [audio, text]
    readable = _readable([*read, total], None, spec.vocab)
    launch = launch_table(spec, min(x.element_size() for x in read), want_stats=False)
    launch["maxnreg"] = 128  # left to itself, ptxas spills a word to fit one more block
    with _device_of(audio, _mix_row_kernel):
        _mix_row_kernel[(share.numel(),)](
            audio_ptr=audio,
            text_ptr=text,
            target_ptr=target,
            alpha_ptr=alpha,
            share_ptr=share,
            total_ptr=total,
            sums_ptr=sums,
            stride_audio=_stride(audio, 1),
            stride_text=_stride(text, 1),
            stride_total=_stride(total, 1),
            stride_alpha=_alpha_stride(alpha),
            stride_sums=sums.stride(0),
            vocab=spec.vocab,
            readable=readable,
            ignore_index=spec.ignore_index,
            inverse_temperature=1.0 / spec.temperature,
            log_plausibility=spec.log_plausibility,
            CONTIGUOUS=readable is not None or all(_is_vectorisable(x, spec.vocab) for x in (*read, total)),
            GEOMETRIC=spec.divergence == "reverse_kl",
            FIRST=first,
            LAST=last,
            HAS_TEXT=text is not None,
            HAS_TARGET=target is not None,
            HAS_PLAUSIBILITY=spec.plausibility is not None,
            SCALE=float(spec.teacher_scale),
            SOFTCAP=spec.teacher_softcap,
            **launch,
        )
    return sums
