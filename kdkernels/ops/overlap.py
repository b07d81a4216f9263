"""The row kernel of one chunk on a second CUDA stream, beside the products of the next chunk.

The row kernel waits for memory, the products for the tensor cores. On one stream they take turns. With two streams and two sets
of scratch the order is, for chunks 0, 1, 2:

    caller's stream     logits 0   logits 1   gradients 0   logits 2   gradients 1   gradients 2
    second stream                  rows 0                   rows 1                   rows 2

rows i wait for all that the caller's stream was asked for before them, gradients i for rows i. Logits i + 2 overwrite the scratch
of chunk i, and come after its gradients on the same stream.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from .rows import RowLauncher, RowResult

_streams = threading.local()  # so that no two threads, of which one may be capturing a CUDA graph, share a stream


class RowsBeside:
    """A :class:`RowLauncher` whose kernel runs on a second stream. It is a context manager: at the end the caller's stream waits.

    Memory. The caller's stream is made to wait for every launch: by :meth:`wait` before it reads the results, and at the end. So
    what a launch is given may go back to the allocator after that. Its results are allocated on the second stream, and marked as
    used on the caller's.
    """

    buffers = 2  # chunks that are under way at the same time

    def __init__(self, rows: RowLauncher, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.stream = _second_stream(device)

    def __call__(self, *arguments: Any, **options: Any) -> RowResult:
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            out = self.rows(*arguments, **options)
        for result in (out.kd, out.ce, out.stats):
            if result is not None:
                result.record_stream(caller)
        self.done = self.stream.record_event()
        return out

    def wait(self, done: torch.cuda.Event) -> None:
        """The caller's stream waits for the launch after which ``done`` was the event of that name."""
        torch.cuda.current_stream(self.device).wait_event(done)

    def __enter__(self) -> RowsBeside:
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a thread and device. Its blocks go first where both streams have some: the gradients wait for them."""
    known: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("of_device", {})
    if device not in known:
        known[device] = torch.cuda.Stream(device, priority=-1)
    return known[device]
