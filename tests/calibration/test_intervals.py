"""Intervals against published ones, and against the shares that they are about."""

import numpy as np
import pytest

from mcv_calibration.intervals import Share, bootstrap, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe, Two-sided confidence intervals for the single proportion (Statistics in Medicine 17, 1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(hits: int, total: int, low: float, high: float) -> None:
    found = wilson(hits, total)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(total - hits, total)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=5e-5)


def test_of_nothing_nothing_is_known() -> None:
    nothing = Share.of(0, 0)
    assert (nothing.value, nothing.interval.low, nothing.interval.high) == (0, 0, 1)
    assert bootstrap([1.0], [2.0]) is None


def test_a_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    """Means of 40 samples of an exponential distribution: of 200 intervals about 95 % hold its mean."""
    draws = np.random.default_rng(1).exponential(3.0, (200, 40))
    found = [bootstrap(list(row), [1.0] * 40) for row in draws]
    assert 0.88 < np.mean([one is not None and one.low <= 3.0 <= one.high for one in found]) < 0.98
