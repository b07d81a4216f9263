"""Several processes of a gloo group for a test, forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ("torch", "torch.distributed.tensor", "torch.distributed.fsdp", "kdkernels.parallel", "transformers.modeling_utils")
multiprocessing.set_forkserver_preload(list(PRELOADED))


def run_ranks(task: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """What `task(failures, *arguments)` returns on every rank; fails with what any of them put into `failures`, or raised."""
    failures = mp.get_context("forkserver").SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:  # a queue's pipe holds 64 KiB, and is read when all have ended
        mp.start_processes(
            _started,
            args=(world_size, port, folder, task, failures, *arguments),
            nprocs=world_size,
            start_method="forkserver",
        )
        found = []
        while not failures.empty():
            found.append(failures.get())
        assert not found, "\n".join(found)
        return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(world_size)]


def _started(rank: int, world_size: int, port: int, folder: str, task: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}  # as torchrun does
    dist.init_process_group("gloo")
    try:
        torch.save(task(*arguments), Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()
