"""Intervals by resampling: whole clips are drawn with replacement, and every statistic is computed again on each draw.

The questions on one clip (its contexts, its tasks) are not independent, so a clip is drawn with all of them or with none.
All statistics use the same draws, so the intervals of their means and differences are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number, its 95% bootstrap interval, and how many items it is computed from; the value is None if there are none.

    The ends are None where all draws are equal: one clip, or clips that agree. Nothing says how much others would differ.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        return self.text()

    def text(self, sign: str = "") -> str:
        """The number and its interval for the terminal; `sign` is that of a format, such as "+"."""
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:{sign}.3f} (no interval)"
        return f"{self.value:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


@dataclass(frozen=True)
class Statistic:
    """A number, its value on each draw, and how many items it is computed from; NaN where there is no item.

    Args:
        value: on the data itself.
        draws: (samples,).
        count: items.
    """

    value: float
    draws: np.ndarray
    count: int

    def estimate(self) -> Estimate:
        """The number with its percentile interval, if its draws differ. Draws without an item do not count."""
        if np.isnan(self.value):
            return Estimate(None, None, None, 0)
        defined = self.draws[~np.isnan(self.draws)]
        if not defined.size or np.ptp(defined) < 1e-12:
            return Estimate(float(self.value), None, None, self.count)
        low, high = np.quantile(defined, [0.025, 0.975])
        return Estimate(float(self.value), float(low), float(high), self.count)

    def __sub__(self, other: Statistic) -> Statistic:
        """The difference on the same draws: what both share does not widen its interval."""
        return Statistic(self.value - other.value, self.draws - other.draws, self.count)


def mean_of(statistics: Sequence[Statistic]) -> Statistic:
    """The mean of statistics, each with the same weight. A draw's mean leaves out the statistics without an item on it.

    `count` is the number of statistics that have items.
    """
    known = [s for s in statistics if not np.isnan(s.value)]
    if not known:
        return Statistic(np.nan, np.full(1, np.nan), 0)
    draws = np.stack([s.draws for s in known])  # (statistics, samples)
    there = ~np.isnan(draws)
    counts = there.sum(0)
    means = np.where(counts > 0, np.where(there, draws, 0.0).sum(0) / np.maximum(counts, 1), np.nan)
    return Statistic(float(np.mean([s.value for s in known])), means, len(known))


class Bootstrap:
    """Draws of groups of items.

    Args:
        groups: (items,) name of each item's group.
        samples: draws.
        seed: equal seeds and groups give equal draws.
    """

    def __init__(self, groups: Sequence[str], samples: int, seed: int) -> None:
        names = {g: i for i, g in enumerate(dict.fromkeys(groups))}
        self._group = np.array([names[g] for g in groups])
        self._count = len(names)
        # Multinomial counts are resampling with replacement, as one matrix: (groups, samples).
        draws = np.random.default_rng(seed).multinomial(self._count, np.full(self._count, 1 / self._count), size=samples)
        self._draws = np.ascontiguousarray(draws.T, dtype=np.float64)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(samples,) the sum of `values` (items,) on each draw."""
        by_group = np.bincount(self._group, weights=values, minlength=self._count)
        there = np.flatnonzero(by_group)  # most statistics are about one task, which has few of the groups
        return by_group[there] @ self._draws[there]

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray) -> Statistic:
        """sum(numerator) / sum(denominator) over items; a denominator of 0 has no ratio.

        Args:
            numerator, denominator: (items,), bool or float; the denominator from 0.
        """
        numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
        tops, bottoms = self.sums(numerator), self.sums(denominator)
        draws = np.divide(tops, bottoms, out=np.full(tops.shape, np.nan), where=bottoms > 0)
        bottom = denominator.sum()
        value = numerator.sum() / bottom if bottom > 0 else np.nan
        return Statistic(float(value), draws, round(float(bottom)))
