"""How the fused linear loss is cut up: which path runs, how many tokens a chunk has, and how long that should take.

With the table of devices one can plan, and predict the time, for a GPU that is not in this machine.

Legend: N tokens, C tokens of a chunk, V valid ids, H_s / H_t hidden widths, F_s = 2 N V H_s and F_t = 2 N V H_t FLOP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .dispatch import CUDA_OR_TRITON

# CPU: measured best for bf16 GEMMs into reused scratch on 2 cores; larger chunks leave the cache, smaller ones starve oneDNN.
CPU_CHUNK_TOKENS = 256
CPU_WORKSPACE_BYTES = 512 << 20  # memory kept for the next call; a larger chunk would get new pages in each call
# CUDA: a tenth of what is free, at most this. Longer chunks gain little once every multiprocessor is busy.
CUDA_WORKSPACE_BYTES = 2 << 30
CUDA_FREE_FRACTION = 0.1
TILE_ROWS, TILE_COLUMNS = 128, 256  # of the GEMM that writes dh, the smallest of the three
MAX_CUDA_CHUNK_TOKENS = 4096

# Items to which a row of scratch is padded, by type of device, where 16 does not divide the vocabulary. On CUDA a row then begins
# at a multiple of 128 bytes: kernels load 16 bytes at a time, and cuBLAS finds its operands aligned. CPUs need no alignment.
ROW_PADDING = {"cuda": 64}

# The paths of the fused linear loss, and the implementations that have the second.
CHUNKS, NO_LOGITS = "chunks", "no logits"
WITHOUT_LOGITS = ("triton", CUDA_OR_TRITON)


@dataclass(frozen=True)
class DeviceModel:
    """A GPU for the planner. The rates are what kernels reach, not what its data sheet says."""

    multiprocessors: int
    memory_bytes: int
    capability: tuple[int, int]  # compute capability
    bytes_per_second: float  # of device memory
    flop_per_second: float  # of bf16 GEMMs with fp32 accumulation
    source: str  # of the rates, in words


# No rate is measured where a call runs. The others are assumed to reach the same share of their data sheet as an H100 does (of
# 3.35 TB/s and 989 TFLOP/s).
_MEASURED = "measured once on an H100 SXM, not on this machine"
_DERATED = "data sheet, derated to the share that an H100 reaches of its own"
_REACHED_BANDWIDTH, _REACHED_FLOP = 3.0 / 3.35, 800 / 989


def _derated(
    multiprocessors: int, gib: int, capability: tuple[int, int], terabytes: float, teraflop: float
) -> DeviceModel:
    rates = terabytes * 1e12 * _REACHED_BANDWIDTH, teraflop * 1e12 * _REACHED_FLOP
    return DeviceModel(multiprocessors, gib << 30, capability, *rates, _DERATED)


# By a part of what torch.cuda.get_device_name returns. Multiprocessors, memory, capability, memory bandwidth, dense bf16 rate:
# - H100, H200: NVIDIA's data sheets "H100 Tensor Core GPU" and "H200 Tensor Core GPU", the SXM boards. (A GH200 of 96 GB is
#   called an H200 here. Its GPU has the same multiprocessors, and 4.0 TB/s instead of 4.8.)
# - A100: "NVIDIA A100 Tensor Core GPU", 80 GB SXM.
# - B200: "NVIDIA DGX B200", an eighth of the machine: 1440 GB, 64 TB/s and 36 PFLOP/s of bf16 with sparsity, half of it dense.
#   Multiprocessors: what its driver reports, 148.
# - RTX 4090, RTX 5090: the white papers "NVIDIA Ada GPU Architecture" and "NVIDIA RTX Blackwell GPU Architecture", bf16 with fp32
#   accumulation.
DEVICES = {
    "H100": DeviceModel(132, 80 << 30, (9, 0), 3.0e12, 800e12, _MEASURED),
    "H200": _derated(132, 141, (9, 0), 4.8, 989),
    "A100": _derated(108, 80, (8, 0), 2.039, 312),
    "B200": _derated(148, 180, (10, 0), 8.0, 2250),
    "RTX 4090": _derated(128, 24, (8, 9), 1.008, 165.2),
    "RTX 5090": _derated(170, 32, (12, 0), 1.792, 209.5),
}


def device_model(name: str) -> DeviceModel | None:
    """The entry of DEVICES whose name occurs in ``name`` ("NVIDIA H100 80GB HBM3"), or None."""
    return next((model for key, model in DEVICES.items() if key.lower() in name.lower()), None)


def known_device(name: str) -> DeviceModel:
    """:func:`device_model`, or a ValueError that lists the table."""
    model = device_model(name)
    if model is None:
        raise ValueError(f"device_name: expected a name with one of {', '.join(DEVICES)} in it, got {name!r}")
    return model


def row_items(vocab: int, device: torch.device) -> int:
    """Items of a row of scratch that holds ``vocab`` logits: V, or V and a padding that belongs to nobody."""
    padding = ROW_PADDING.get(device.type, 1)
    return vocab if vocab % 16 == 0 else -(-vocab // padding) * padding


@dataclass(frozen=True)
class ChunkPlan:
    """tokens a chunk, chunks, scratch in bytes, and the reason in words."""

    chunk_tokens: int
    chunks: int
    scratch_bytes: int
    reason: str


def plan_chunks(
    *,
    n_tokens: int,
    bytes_per_token: int,
    student_width: int,
    device: torch.device | None = None,
    device_name: str | None = None,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
) -> ChunkPlan:
    """Plans the chunks of ``n_tokens`` tokens whose logits take ``bytes_per_token`` scratch.

    Args:
        student_width: H_s, from which the tiles of dh follow.
        device: where it runs; or
        device_name: a GPU of DEVICES, which need not be in this machine. All its memory counts as free.
        chunk_tokens: fixes C. workspace_bytes: upper bound of the scratch.

    Raises ValueError where the workspace does not hold one token, and for a name that is not in the table.
    """
    if (device is None) == (device_name is None):
        raise ValueError(f"device: expected either a device or a device_name, got {device} and {device_name!r}")
    model = None if device_name is None else known_device(device_name)
    if chunk_tokens is not None:
        size, reason = chunk_tokens, "chunk_tokens given"
    else:
        budget = _default_budget(model, device) if workspace_bytes is None else workspace_bytes
        most = budget // bytes_per_token
        if most < 1:
            raise ValueError(
                f"workspace_bytes: expected at least {bytes_per_token} (the logits of one token), got {workspace_bytes}"
                if workspace_bytes is not None
                else f"out of memory: one token's logits take {bytes_per_token} bytes, the default workspace has {budget}"
            )
        processors = _processors(model, device)
        if processors is not None:
            size, use = _fill_machine(most, n_tokens, student_width, processors)
            reason = f"fits {budget} bytes; tiles of dh fill {processors} multiprocessors to {use:.0%}"
        else:
            size = min(CPU_CHUNK_TOKENS, most)
            reason = f"CPU default {CPU_CHUNK_TOKENS}, within {budget} bytes"
    size = max(1, min(size, n_tokens)) if n_tokens else 1
    return ChunkPlan(size, math.ceil(n_tokens / size), size * bytes_per_token, reason)


def _default_budget(model: DeviceModel | None, device: torch.device | None) -> int:
    if model is not None:
        return _share_of_free(model.memory_bytes)
    assert device is not None  # one of the two is given
    return default_workspace_bytes(device)


def _processors(model: DeviceModel | None, device: torch.device | None) -> int | None:
    """Multiprocessors of a GPU; None for the CPU."""
    if model is not None:
        return model.multiprocessors
    return _multiprocessors(device) if device is not None and device.type == "cuda" else None


def default_workspace_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_WORKSPACE_BYTES
    free, _ = torch.cuda.mem_get_info(device)  # a driver query, not a synchronisation
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _share_of_free(free + cached)


def _share_of_free(free_bytes: int) -> int:
    return max(1 << 26, min(CUDA_WORKSPACE_BYTES, int(free_bytes * CUDA_FREE_FRACTION)))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fill_machine(most: int, n_tokens: int, student_width: int, multiprocessors: int) -> tuple[int, float]:
    """(C, share of the multiprocessors that is busy). C is the multiple of TILE_ROWS up to ``most`` at which dh takes the fewest
    waves of tiles over all chunks. The last, shorter chunk counts too. Of equals it is the largest."""
    columns = math.ceil(student_width / TILE_COLUMNS)

    def waves(tokens: int) -> int:
        return math.ceil(math.ceil(tokens / TILE_ROWS) * columns / multiprocessors)

    best, fewest = min(most, TILE_ROWS), None
    for size in range(TILE_ROWS, min(most, MAX_CUDA_CHUNK_TOKENS) + 1, TILE_ROWS):
        whole, rest = divmod(n_tokens, size)
        total = whole * waves(size) + waves(rest)
        if fewest is None or total <= fewest:
            best, fewest = size, total
    whole, rest = divmod(n_tokens, best)
    total = whole * waves(best) + waves(rest)
    tiles = math.ceil(n_tokens / TILE_ROWS) * columns
    return best, tiles / (total * multiprocessors) if total else 1.0


def choose_path(
    *, impl: str, gradient: bool, divergence: str, want_stats: bool, chunk_tokens: int | None
) -> tuple[str, str]:
    """(CHUNKS or NO_LOGITS, the reason in words): the one place that decides how the fused linear loss runs.

    ``impl`` is the chosen implementation, never "auto". Without logits a call needs very little memory, and never fails because
    ``workspace_bytes`` is too small. That path has no gradient: dh needs every logit again once the row's sums are known, so the
    GEMMs of both heads would run twice. Where memory is short, short chunks are cheaper.
    """
    if impl not in WITHOUT_LOGITS:
        return CHUNKS, f"impl {impl!r} has no kernel that works without logits"
    if gradient:
        return CHUNKS, "a gradient is wanted, and it is computed from the logits"
    if divergence == "jsd":
        return CHUNKS, "the jsd needs p and q of the whole row twice"
    if want_stats:
        return CHUNKS, "statistics are wanted"
    if chunk_tokens is not None:
        return CHUNKS, "chunk_tokens given"
    return NO_LOGITS, "no gradient is wanted: GEMMs with the online softmax in their epilogue"


@dataclass(frozen=True)
class Prediction:
    """What a call should take on a device: FLOP and seconds of the GEMMs, bytes and seconds of the row kernel."""

    gemm_flop: float
    gemm_seconds: float
    row_bytes: float
    row_seconds: float

    @property
    def seconds(self) -> float:
        return self.gemm_seconds + self.row_seconds


def predict(
    model: DeviceModel,
    *,
    n_tokens: int,
    vocab: int,
    student_width: int,
    teacher_width: int,
    teacher_gemms: int = 1,
    teacher_tensors: int = 1,
    logits_bytes: int = 4,
    gradient_bytes: int = 2,
    gradient: bool = True,
    head_trains: bool = False,
    path: str = CHUNKS,
    passes: int = 2,
) -> Prediction:
    """Time at the device's rates, with every multiprocessor busy.

    The GEMMs take (1 + gradient + head_trains) F_s + teacher_gemms F_t. The row kernel reads the student's logits and
    ``teacher_tensors`` teacher logits ``passes`` times, and writes the gradient once.

    Args:
        logits_bytes, gradient_bytes: of one item.
        passes: 2 for the streaming kernel (1 without a gradient), 1 for one that keeps the row on the chip.
        path: NO_LOGITS has no row kernel.
    """
    logits = n_tokens * vocab
    student_gemms = 1 + gradient + (gradient and head_trains)
    flop = 2.0 * logits * (student_gemms * student_width + teacher_gemms * teacher_width)
    reads = passes if gradient else 1
    row_bytes = logits * (reads * (1 + teacher_tensors) * logits_bytes + gradient * gradient_bytes)
    moved = 0.0 if path == NO_LOGITS else float(row_bytes)
    return Prediction(flop, flop / model.flop_per_second, moved, moved / model.bytes_per_second)
