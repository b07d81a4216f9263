"""An hour of training steps, losses and cache reading in one process: does its memory grow? `python -m benchmarks.soak`

An iteration has three parts. One is a whole step of the loop in models/training/loop.py on a tiny random speech LM (teacher,
student, loss, backward, AdamW). One is every public loss of kdkernels, forward and backward, on random inputs of new random
shapes. One opens, reads and closes a cache. The process sleeps between iterations, so it takes at most --load of a core's time.

For each shape of a product torch and oneDNN keep what they made for it. Each keeps 1024 shapes, which is hundreds of MiB in
all. Here they keep one shape (LRU_CACHE_CAPACITY, ONEDNN_PRIMITIVE_CACHE_CAPACITY), unless the environment sets these. So the
growth that is measured is not theirs.

The resident set is read after every iteration. Allocators and caches take some memory once, which is no leak. So the first
third of the time is left out. The slope of the rest is the median over all pairs of samples (Theil-Sen), which no single jump
moves. The exit status is 1 if the slope is above --bound-kib-a-minute.

resident_mib    lowest, median and highest of the samples of each tenth of the time
kib_a_minute    slope after the first third; the same in every row
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .common import benchmark_parser, finish, resident_bytes
from .stress import TinyCase

CACHES_BY_SHAPE = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

_WINDOWS = 10
_MOST_SAMPLES = 600  # of the slope: pairs of them are formed


def losses(rng: random.Random) -> None:
    """Every public loss, forward and backward, once; up to 64 tokens over up to 400 ids."""
    from kdkernels import (
        TeacherSource,
        fused_caad_loss,
        fused_layer_mse_loss,
        fused_linear_caad_loss,
        fused_linear_multi_teacher_loss,
    )

    n, vocab, width = rng.randint(1, 64), rng.randint(2, 400), rng.randint(2, 48)
    dtype = rng.choice((torch.float32, torch.bfloat16))
    target = torch.randint(0, vocab, (n,))
    hidden, audio, text = (torch.randn(n, width, dtype=dtype) for _ in range(3))
    weight, teacher = (torch.randn(vocab, width, dtype=dtype) for _ in range(2))
    logits = torch.randn(n, vocab, dtype=dtype).requires_grad_()
    divergence = rng.choice(("forward_kl", "reverse_kl", "jsd"))
    fused_caad_loss(logits, *torch.randn(2, n, vocab, dtype=dtype), target, divergence=divergence).backward()
    hidden.requires_grad_()
    fused_linear_caad_loss(hidden, weight, audio, text, teacher, target, divergence=divergence).backward()
    sources = [TeacherSource(audio, teacher, text_hidden=text), TeacherSource(text, weight, divergence=divergence)]
    fused_linear_multi_teacher_loss(hidden, weight, sources, target, return_stats=True)[0].backward()
    fused_layer_mse_loss([hidden, hidden], [audio, text], normalize=rng.random() < 0.5).backward()


class Iteration:
    """The work that is repeated.

    Args:
        folder: for the cache and the trainings. The caller empties it.
    """

    def __init__(self, folder: Path) -> None:
        from models.training.fill_cache import fill_cache
        from models.training.recipe_files import load_recipe
        from models.training.teachers import LiveTeacher
        from models.training.training_data import make_training_data

        self._rng = random.Random(0)
        self._case = case = TinyCase()
        self._cache = folder / "cache"
        fill_cache(self._cache, case.teacher, case.store, case.examples, made_from={"teacher": "tiny"}, progress_bar=False)
        self._data, heard = (make_training_data(model, case.examples, case.store) for model in (case.student, case.teacher))
        self._teacher = LiveTeacher(case.teacher, heard, device=torch.device("cpu"))
        self._recipe = load_recipe("caad", ["teacher.folder=tiny"])
        self._optimizer = torch.optim.AdamW([p for p in case.student.parameters() if p.requires_grad], lr=1e-4)
        self._cursor = 0

    def __call__(self) -> None:
        self.train_step()
        losses(self._rng)
        self.read_cache()

    def train_step(self) -> None:
        from models.training.build_sources import OWN_TEACHER
        from models.training.objective import counted_positions, objective_loss, select_positions, token_weights

        rows = self._data.draw(self._cursor, 4, seed=0)
        self._cursor += len(rows)
        examples = [self._data.examples[row] for row in rows]
        batch = self._data.make_batch(examples)
        states = {OWN_TEACHER: self._teacher(batch, examples)}
        batch, states = select_positions(batch, states, counted_positions(self._recipe, batch))
        batch = self._data.crop(batch) if self._data.crop else batch
        weights = token_weights(self._recipe.loss, batch, states[OWN_TEACHER])
        model = self._case.student.train()
        hidden = model.hidden_states_at(batch.target_index, **self._data.model_inputs(batch))
        self._optimizer.zero_grad(set_to_none=True)
        normalizers = weights.kd.sum(), weights.ce.sum()
        objective_loss(self._recipe, 1, model, hidden, batch.target, states, weights, *normalizers)[0].backward()
        self._optimizer.step()

    def read_cache(self) -> None:
        from kdkernels.contrast_cache import ContrastCache

        cache = ContrastCache(self._cache)
        ids = list(cache)
        cache.get(self._rng.choices(ids, k=8))


def soak(
    call: Callable[[], None],
    *,
    minutes: float,
    least_iterations: int = 0,
    load: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
    cpu_clock: Callable[[], float] = time.process_time,
) -> list[tuple[float, float]]:
    """(minute, KiB of the resident set) after each call, for the given minutes and calls. They take a share `load` of a core."""
    samples: list[tuple[float, float]] = []
    started = clock()
    while (now := clock()) - started < 60 * minutes or len(samples) < least_iterations:
        before = cpu_clock()
        call()
        taken = cpu_clock() - before
        samples.append(((clock() - started) / 60, resident_bytes() / 1024))
        time.sleep(max(0.0, now + taken / load - clock()))  # on a busy machine the call itself has waited for the processor
    return samples


def slope(samples: Sequence[tuple[float, float]]) -> float:
    """Theil-Sen slope in KiB a minute after the first third of the time. At least two samples have to lie there."""
    settled = [s for s in samples if s[0] > samples[-1][0] / 3]
    if len(settled) < 2:
        raise ValueError(f"samples: expected two after the first third, got {len(settled)} of {len(samples)}; soak for longer")
    some = settled[:: -(-len(settled) // _MOST_SAMPLES)]
    pairs = ((b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(some) for b in some[i + 1 :] if b[0] > a[0])
    return statistics.median(pairs)


def summarise(samples: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """A row for each tenth of the time."""
    rows, whole = [], samples[-1][0]
    for window in range(_WINDOWS):
        first, last = whole * window / _WINDOWS, whole * (window + 1) / _WINDOWS
        here = [kib / 1024 for minute, kib in samples if first < minute <= last]
        if here:
            rows.append(
                {
                    "to_minute": last,
                    "iterations": len(here),
                    "resident_mib_low": min(here),
                    "resident_mib": statistics.median(here),
                    "resident_mib_high": max(here),
                }
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line. The module's docstring describes it."""
    parser = benchmark_parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long it runs")
    parser.add_argument(
        "--least-iterations", type=int, default=0, help="least number of iterations; they may take more than the minutes"
    )
    parser.add_argument("--load", type=float, default=0.08, help="largest share of a core's time, in (0, 1]")
    parser.add_argument("--bound-kib-a-minute", type=float, default=50.0, help="a steeper slope is a leak")
    args = parser.parse_args(argv)
    if args.device != "cpu":
        parser.error(f"--device: expected cpu (the resident set is the process's, not the device's), got {args.device}")
    if not (0 < args.load <= 1 and args.minutes > 0):
        parser.error(f"--load, --minutes: expected a share in (0, 1] and a number above 0, got {args.load} and {args.minutes}")
    for name in CACHES_BY_SHAPE:  # read at the first product
        os.environ.setdefault(name, "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kdkernels-soak-") as folder:
        samples = soak(Iteration(Path(folder)), minutes=args.minutes, least_iterations=args.least_iterations, load=args.load)
    steepness = slope(samples)
    common = {"minutes": args.minutes, "kib_a_minute": steepness, "bound_kib_a_minute": args.bound_kib_a_minute}
    finish(args, "soak", "resident memory over time", [{**row, **common} for row in summarise(samples)])
    if steepness > args.bound_kib_a_minute:
        print(
            f"memory grows by {steepness:.1f} KiB a minute, expected at most {args.bound_kib_a_minute:g}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
