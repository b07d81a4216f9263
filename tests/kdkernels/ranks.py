"""Several processes of a gloo group for a test, forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "kdkernels.parallel"])


def run_ranks(task: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Runs `task(failures, *arguments)` on every rank; fails with what any of them put into `failures`, or raised."""
    context = mp.get_context("forkserver")
    failures = context.SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(
        _started, args=(world_size, port, task, failures, *arguments), nprocs=world_size, start_method="forkserver"
    )
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert not found, "\n".join(found)


def _started(rank: int, world_size: int, port: int, task: Callable[..., None], failures: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        task(failures, *arguments)
    finally:
        dist.destroy_process_group()
