"""The t interval: its ends by hand."""

import math

import numpy as np
import pytest

from models.evaluation.t_interval import t_interval


def test_three_values_by_hand():
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert not found.excludes_zero
    assert t_interval([11.0, 12.0, 13.0]).excludes_zero and t_interval([-11.0, -12.0, -13.0]).excludes_zero


def test_one_value_and_equal_values():
    for values in ([0.3], [0.5, 0.5, 0.5], [0.0, 0.0]):
        found = t_interval(values)
        assert found == (values[0], -math.inf, math.inf) and not found.excludes_zero and not found.is_known
    assert t_interval([0.5, 0.5, 0.6]).is_known
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        t_interval([])


def test_the_interval_of_many_values_is_not_too_narrow():
    values = [float(n % 7) for n in range(100)]
    found = t_interval(values)
    normal = 1.96 * np.std(values, ddof=1) / 10
    assert normal < found.high - found.mean < 1.05 * normal
