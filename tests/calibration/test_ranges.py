"""Each method against the same definition applied to the values themselves."""

import itertools
import math

import numpy as np
import pytest

from mcv_calibration.histogram import Histogram
from mcv_calibration.measured import Range
from mcv_calibration.ranges import LEVELS, METHODS, find_range, percentile
from mcv_calibration.recipe import Ranges
from mcv_runtime.errors import OptionError

RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=(200, 300))
TENSORS = {
    "normal": NORMAL,
    "gelu": NORMAL * (1 + np.vectorize(math.erf)(NORMAL / math.sqrt(2))) / 2,
    "skewed": RNG.gamma(1.5, size=(200, 300)) - 1,
    "rare and large": np.append(NORMAL, RNG.normal(0, 12, 30)),
    "positive": np.abs(NORMAL) + 3,
}
CASES = {name: values.astype(np.float32) for name, values in TENSORS.items()}


def of(values: np.ndarray, method: Ranges) -> Range:
    histogram = Histogram()
    histogram.add(values)
    return find_range(histogram, method)


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    """Of spreading 256 levels from `low` to `high`, zero one of them."""
    step = (high - low) / (LEVELS - 1)
    zero = round(-low / step)
    rounded = (np.clip(np.round(values / step) + zero, 0, LEVELS - 1) - zero) * step
    return float(np.mean((values - rounded) ** 2))


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_minmax(values: np.ndarray) -> None:
    assert of(values, "minmax") == Range(min(values.min(), 0.0), max(values.max(), 0.0))


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99])
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_percentile(values: np.ndarray, percent: float) -> None:
    histogram = Histogram()
    histogram.add(values)
    cut = values.size * (100 - percent) / 200
    low, high = percentile(histogram, percent)
    for inwards, outermost in ((values, low), (-values, -high)):  # right to a bin's width
        assert np.sum(inwards < outermost - histogram.width) <= cut + 1e-6
        assert np.sum(inwards < outermost + histogram.width) >= cut - 1e-6


def test_percentile_cuts_the_outermost() -> None:
    values = np.append(np.tile(CASES["normal"].ravel(), 5), np.float32(100))  # one of 300,001: fewer than 99.999 % let out
    assert of(values, "percentile").high < 6
    assert of(values, "minmax").high == 100


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_mse_is_near_the_least_there_is(values: np.ndarray) -> None:
    found = of(values, "mse")
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    shares = np.linspace(0.1, 1, 25)
    least = min(squared_error(values, low * a, high * b) for a, b in itertools.product(shares, shares))
    assert squared_error(values, found.low, found.high) <= least * 1.02


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constants(method: Ranges, value: float) -> None:
    found = of(np.full(5, value, np.float32), method)
    assert (found.low, found.high) == (pytest.approx(min(value, 0), abs=1e-6), pytest.approx(max(value, 0), abs=1e-6))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_no_method_goes_past_the_extremes(method: Ranges, values: np.ndarray) -> None:
    found = of(values, method)
    step = (found.high - found.low) / (LEVELS - 1) if method == "mse" else 0.0  # there the ends are levels
    assert min(values.min(), 0) - step <= found.low <= 0 <= found.high <= max(values.max(), 0) + step


def test_an_unknown_method() -> None:
    with pytest.raises(OptionError, match="choose one of minmax, percentile, mse"):
        of(CASES["normal"], "median")  # type: ignore[arg-type]
