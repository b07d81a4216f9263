"""The t interval: its quantiles against the integral of the density, its ends by hand."""

import math

import numpy as np
import pytest

from models.evaluation.t_interval import T_QUANTILES, t_interval


@pytest.mark.parametrize("freedom", range(1, 31))
def test_a_quantile_is_right_to_its_last_place(freedom):
    def below(quantile):
        x = np.linspace(0, quantile, 200_001)
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        return 0.5 + np.sum((density[1:] + density[:-1]) / 2) * (x[1] - x[0])

    quantile = T_QUANTILES[freedom - 1]
    assert below(quantile - 0.00005) < 0.975 < below(quantile + 0.00005)


def test_three_values_by_hand():
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)))
    assert not found.excludes_zero
    assert t_interval([11.0, 12.0, 13.0]).excludes_zero and t_interval([-11.0, -12.0, -13.0]).excludes_zero


def test_one_value_and_equal_values():
    assert t_interval([0.3]) == (0.3, -math.inf, math.inf) and not t_interval([0.3]).excludes_zero
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5) and t_interval([0.5, 0.5, 0.5]).excludes_zero
    assert not t_interval([0.0, 0.0, 0.0]).excludes_zero
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        t_interval([])


def test_the_interval_of_many_values_is_not_too_narrow():
    values = [float(n % 7) for n in range(100)]
    found = t_interval(values)
    normal = 1.96 * np.std(values, ddof=1) / 10
    assert normal < found.high - found.mean < 1.05 * normal
