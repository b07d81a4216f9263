"""The 95% t interval of a mean over a few seeds, and the t test that goes with it.

Twice the standard error is too narrow an interval for few seeds: with three, 18% of such intervals miss a true mean of 0, not 5%.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def is_known(self) -> bool:
        return math.isfinite(self.low)


def t_interval(values: Sequence[float]) -> Interval:
    """mean +- t * s / sqrt(n), with the standard deviation s and n - 1 degrees of freedom.

    One value has an infinite interval, and so have equal values: nothing says how much others would differ.

    Raises:
        ValueError: values is empty.
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    mean = statistics.mean(values)
    if max(values) - min(values) < 1e-12:
        return Interval(mean, -math.inf, math.inf)
    from scipy import stats  # its import takes half a second

    reach = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)


def p_value(values: Sequence[float], bound: float = 0.0) -> float:
    """Two-sided p of the t test of a mean against `bound`; 1 where `t_interval` is infinite, which excludes nothing.

    Raises:
        ValueError: values is empty.
    """
    if not t_interval(values).is_known:
        return 1.0
    from scipy import stats

    return float(stats.ttest_1samp(values, bound).pvalue)
