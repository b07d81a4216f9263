"""SIGINT and SIGTERM ask a training run to stop after its present step; they do not end it in the middle of one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noted_signals(*, again: bool) -> Iterator[list[int | None]]:
    """Within the block SIGINT or SIGTERM only puts its number into the list, which holds None before.

    Args:
        again: a second signal acts as usual. Leave it off under torchrun: a terminal sends its signal to all processes, and
            torchrun sends it to them once more.
    """
    caught: list[int | None] = [None]
    before: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        caught[0] = number
        if again:
            for each, handler in before.items():
                signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # outside of the main thread the host program owns the signals
        pass
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
