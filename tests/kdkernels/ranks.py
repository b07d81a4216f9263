"""Several processes of a gloo group for a test, forked from a server that has imported torch once."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ("torch", "torch.distributed.tensor", "torch.distributed.fsdp", "kdkernels.parallel", "transformers.modeling_utils")
multiprocessing.set_forkserver_preload(list(PRELOADED))


def run_ranks(task: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `task(failures, *arguments)` returns on every rank; fails with what any of them put into `failures`, or raised."""
    context = mp.get_context("forkserver")
    failures, results = context.SimpleQueue(), context.SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(
        _started,
        args=(world_size, port, results, task, failures, *arguments),
        nprocs=world_size,
        start_method="forkserver",
    )
    found = _drained(failures)
    assert not found, "\n".join(found)
    return [torch.load(io.BytesIO(data), weights_only=True) for _, data in sorted(_drained(results))]


def _drained(queue: Any) -> list[Any]:
    items = []
    while not queue.empty():
        items.append(queue.get())
    return items


def _started(rank: int, world_size: int, port: int, results: Any, task: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}  # as torchrun does
    dist.init_process_group("gloo")
    try:
        data = io.BytesIO()  # a tensor itself would travel in memory that goes with its process
        torch.save(task(*arguments), data)
        results.put((rank, data.getvalue()))
    finally:
        dist.destroy_process_group()
