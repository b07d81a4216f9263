"""How many tokens one chunk of the fused linear loss takes: from the scratch it may use, and from what fills the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# CPU: measured best for bf16 GEMMs into reused scratch on 2 cores; larger chunks leave the cache, smaller ones starve oneDNN.
CPU_CHUNK_TOKENS = 256
CPU_WORKSPACE_BYTES = 1 << 30
# CUDA: a tenth of what is free, at most this. Longer chunks gain little once every multiprocessor is busy.
CUDA_WORKSPACE_BYTES = 2 << 30
CUDA_FREE_FRACTION = 0.1
TILE_ROWS, TILE_COLUMNS = 128, 256  # of the GEMM that writes dh, the smallest of the three
MAX_CUDA_CHUNK_TOKENS = 4096


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
    device: torch.device,
    chunk_tokens: int | None = None,
    workspace_bytes: int | None = None,
) -> ChunkPlan:
    """Plans the chunks of ``n_tokens`` tokens whose logits take ``bytes_per_token`` scratch.

    ``chunk_tokens`` fixes the size; ``workspace_bytes`` bounds the scratch. Raises ValueError where the workspace does not hold
    one token.
    """
    if chunk_tokens is not None:
        size, reason = chunk_tokens, "chunk_tokens given"
    else:
        budget = workspace_bytes if workspace_bytes is not None else default_workspace_bytes(device)
        most = budget // bytes_per_token
        if most < 1:
            raise ValueError(
                f"workspace_bytes: expected at least {bytes_per_token} (the logits of one token), got {workspace_bytes}"
                if workspace_bytes is not None
                else f"out of memory: one token's logits take {bytes_per_token} bytes, the default workspace has {budget}"
            )
        if device.type == "cuda":
            size = _fill_machine(most, student_width, _multiprocessors(device))
            reason = f"fits {budget} bytes; tiles of dh fill {_multiprocessors(device)} multiprocessors best"
        else:
            size = min(CPU_CHUNK_TOKENS, most)
            reason = f"CPU default {CPU_CHUNK_TOKENS}, within {budget} bytes"
    size = max(1, min(size, n_tokens)) if n_tokens else 1
    return ChunkPlan(size, math.ceil(n_tokens / size), size * bytes_per_token, reason)


def default_workspace_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_WORKSPACE_BYTES
    free, _ = torch.cuda.mem_get_info(device)  # a driver query, not a synchronisation
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1 << 26, min(CUDA_WORKSPACE_BYTES, int((free + cached) * CUDA_FREE_FRACTION)))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fill_machine(most: int, student_width: int, multiprocessors: int) -> int:
    """The multiple of TILE_ROWS up to ``most`` whose last wave of tiles is fullest; the largest of equals."""
    columns = math.ceil(student_width / TILE_COLUMNS)
    best, best_use = min(most, TILE_ROWS), 0.0
    for size in range(TILE_ROWS, min(most, MAX_CUDA_CHUNK_TOKENS) + 1, TILE_ROWS):
        tiles = size // TILE_ROWS * columns
        use = tiles / (math.ceil(tiles / multiprocessors) * multiprocessors)
        if use >= best_use:
            best, best_use = size, use
    return best
