"""The 95% t interval of a mean over a few seeds.

Twice the standard error is too narrow an interval for few seeds: with three, 18% of such intervals miss a true mean of 0, not 5%.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# 97.5% quantiles of Student's t distribution for 1 to 30 degrees of freedom.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean and the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def t_interval(values: Sequence[float]) -> Interval:
    """mean +- t * s / sqrt(n), with the standard deviation s and n - 1 degrees of freedom.

    One value has an infinite interval. Beyond 31 values the quantile stays that of 30 degrees of freedom, which is a little wide.

    Raises:
        ValueError: values is empty.
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    mean = statistics.mean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    reach = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)
