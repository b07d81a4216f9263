"""Training curves: one JSON object a line, and TensorBoard.

Values are added as tensors and stay on their device. They are read only when a line is written, so the CPU does not wait for a
GPU in every step. Sums that are not written yet are part of a checkpoint: a continued run writes the same lines as an undisturbed
one, except for their times.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from models.io_utils import atomic_write_text

METRICS_NAME = "metrics.jsonl"


class MetricsLogger:
    """Averages values between two log lines and writes them to `folder/metrics.jsonl` and TensorBoard.

    Args:
        folder: where it writes; made if missing.
        tensorboard: also write event files to `folder/tensorboard`.
        resume_step: drop the lines after this step: an interrupted run has written them, and this one writes them again. None
            starts an empty file.
        total: sums a tensor over the processes of a run, on each of them; None = there is one process.
        writes: True on one process, False on the others.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
        total: Callable[[torch.Tensor], torch.Tensor] | None = None,
        writes: bool = True,
    ) -> None:
        self.path = Path(folder) / METRICS_NAME
        self._sums: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._total = total
        self._writes = writes
        self._since = time.perf_counter()
        self._writer = None
        if not writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else [line for line in read_metrics(self.path) if line["step"] <= resume_step]
        atomic_write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))  # atomic: a kill here loses no line
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        if tensorboard:
            # Imported here: the import takes a second, and evaluation and tests do not need it.
            from torch.utils.tensorboard import SummaryWriter

            purge = 0 if resume_step is None else resume_step + 1  # the folder may hold event files of an earlier run
            self._writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=purge)

    def add(self, name: str, value: torch.Tensor | float, weight: torch.Tensor | float = 1.0) -> None:
        """Add `value`, itself the mean of `weight` items, to the mean of `name`. It never waits for a device."""
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        weight = torch.as_tensor(weight, dtype=torch.float64, device=value.device).detach()
        if name in self._sums:
            self._sums[name] += value * weight
            self._weights[name] += weight
        else:
            self._sums[name] = value * weight
            self._weights[name] = weight.clone()

    def flush(self, step: int, **now: float) -> dict[str, Any]:
        """Write a line: the means since the last line, and the values of `now` as they are. Reads the device once."""
        line: dict[str, Any] = {"step": step}
        if self._sums:
            means = zip(self._sums, *self._totals().tolist(), strict=True)
            line.update({name: total / weight for name, total, weight in means if weight})  # no items have no mean
        line.update(now)
        line["seconds"] = round(time.perf_counter() - self._since, 3)
        self._since = time.perf_counter()
        self._sums.clear()
        self._weights.clear()
        if self._writes:
            self._write_line(line)
        if self._writer is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)
        return line

    def state_dict(self) -> dict[str, list[float]]:
        """Sums that are not written yet, over all processes, for a checkpoint."""
        if not self._sums:
            return {}
        return dict(zip(self._sums, self._totals().T.tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, list[float]], *, device: torch.device | str = "cpu") -> None:
        """Continue with the sums of `state_dict()`; the process that writes takes them, the others start at 0."""
        if not self._writes:
            state = {name: [0.0, 0.0] for name in state}
        self._sums = {n: torch.tensor(s, dtype=torch.float64, device=device) for n, (s, _) in state.items()}
        self._weights = {n: torch.tensor(w, dtype=torch.float64, device=device) for n, (_, w) in state.items()}

    def close(self) -> None:
        """Flush both files."""
        if self._writes:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _totals(self) -> torch.Tensor:
        """(2, names): sums and weights, over all processes."""
        both = torch.stack([torch.stack(list(x.values())) for x in (self._sums, self._weights)])
        return both if self._total is None else self._total(both)

    def _write_line(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to the first that a kill has cut off. A missing file has none."""
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
