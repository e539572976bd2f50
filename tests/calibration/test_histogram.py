"""The growing histogram against numpy's, which is told the bins beforehand."""

import numpy as np
import pytest

from mcv_calibration.histogram import BINS, Histogram

RNG = np.random.default_rng(0)
TENSORS = {
    "normal": RNG.normal(size=20000),
    "growing": RNG.normal(size=20000) * np.geomspace(1e-4, 1e4, 20000),
    "far from zero": RNG.normal(1000, 0.01, 20000),
    "one outlier": np.append(RNG.normal(size=20000), 300),
    "negative": -RNG.exponential(size=20000),
    "constant": np.full(10, 5.0),
    "zeros": np.zeros(10),
    "huge": RNG.normal(size=1000) * 1e30,
    "tiny": RNG.normal(size=1000) * 1e-35,
}


def whole(values: np.ndarray, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values.astype(np.float32), parts):
        histogram.add(part)
    return histogram


@pytest.mark.parametrize("values", TENSORS.values(), ids=TENSORS)
def test_counts_are_those_of_numpy(values: np.ndarray) -> None:
    histogram = whole(values, 7)
    values = values.astype(np.float32).astype(np.float64)
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert len(histogram.counts) <= BINS
    # numpy's last bin includes its right edge; ours has nothing there
    expected = np.histogram(values, np.append(histogram.edges, np.inf))[0][:-1]
    np.testing.assert_array_equal(histogram.counts, expected)
    assert histogram.total == values.size


@pytest.mark.parametrize("name", ["normal", "growing", "one outlier", "far from zero"])
def test_bins_are_as_narrow_as_the_range_allows(name: str) -> None:
    assert len(whole(TENSORS[name], 7).counts) > BINS / 2 - 2


@pytest.mark.parametrize("values", TENSORS.values(), ids=TENSORS)
def test_portions_order_and_merging_change_nothing(values: np.ndarray) -> None:
    expected = whole(values).arrays()
    merged = Histogram()
    for part in np.array_split(values[::-1], 5):
        merged.merge(whole(part, 2))
    merged.merge(Histogram())
    for other in (whole(values[::-1], 13), merged, Histogram.from_arrays(expected)):
        for name, array in other.arrays().items():
            np.testing.assert_array_equal(array, expected[name])


def test_extremes_of_the_whole_of_which_values_are_a_sample() -> None:
    values = TENSORS["normal"].astype(np.float32)
    histogram = Histogram()
    histogram.add(values[::7], float(values.min()), float(values.max()))
    assert (histogram.low, histogram.high) == (values.min(), values.max())
    assert histogram.total == len(values[::7])


def test_nothing_is_nothing() -> None:
    histogram = Histogram()
    histogram.add(np.zeros((0, 4), np.float32))
    assert histogram.total == 0
