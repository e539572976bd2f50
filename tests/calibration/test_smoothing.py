"""Factors against outlier channels: what they do to the error of an 8-bit product, and when there are none."""

import numpy as np
import pytest

from mcv_calibration.blocks import dequantize_rows, quantize_rows
from mcv_calibration.channels import Channels
from mcv_calibration.smoothing import smoothing_factors, unseen_factors
from mcv_graphs.formats import WeightFormat
from mcv_runtime.errors import OptionError

RNG = np.random.default_rng(0)
ROWS, WIDTH, OUT = 400, 96, 64
X = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
WEIGHTS = {name: RNG.normal(size=(OUT, WIDTH)).astype(np.float32) for name in ("q", "k")}


def with_outliers(count: int, seed: int = 1) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Some channels 30 to 300 times as large, and the weights' columns as much smaller: the same product."""
    rng = np.random.default_rng(seed)
    scale = np.ones(WIDTH, np.float32)
    scale[rng.choice(WIDTH, count, replace=False)] = rng.uniform(30, 300, count)
    return X * scale, {name: weight / scale for name, weight in WEIGHTS.items()}


def factors(x: np.ndarray, weights: dict[str, np.ndarray], alpha: float = 0.5, *, folded: bool = True) -> np.ndarray | None:
    halves = lambda path: (weights[path][: OUT // 2], weights[path][OUT // 2 :])  # noqa: E731
    return smoothing_factors(Channels.of(x), tuple(weights), halves, alpha=alpha, folded=folded)


def error(x: np.ndarray, weights: dict[str, np.ndarray], s: np.ndarray | None) -> float:
    """Root mean square of static INT8's error over that of the product: one step for x, one for each row of a weight."""
    x, weight = x.astype(np.float64), np.concatenate(list(weights.values())).astype(np.float64)
    exact = x @ weight.T
    if s is not None:
        x, weight = x / s, weight * s
    step = (x.max() - x.min()) / 255
    zero = round(-x.min() / step)
    rounded = (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
    steps = np.abs(weight).max(axis=1, keepdims=True) / 127
    found = rounded @ (np.round(weight / steps) * steps).T
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_outliers_cost_nothing_any_more(count: int, alpha: float) -> None:
    x, weights = with_outliers(count)
    s = factors(x, weights, alpha)
    undisturbed = error(X, WEIGHTS, None)
    assert s is not None
    assert s.dtype == np.float32
    assert error(x, weights, None) > 10 * undisturbed
    assert error(x, weights, s) < 1.2 * undisturbed


def test_a_layer_that_is_scaled_gets_the_factors_scaled() -> None:
    """Whatever a norm's weight was multiplied by and the columns divided by, the smoothed layer is the same."""
    before, after = (factors(*with_outliers(count)) for count in (5, 20))
    assert before is not None
    assert after is not None
    small, large = (x / s for (x, _), s in ((with_outliers(5), before), (with_outliers(20), after)))
    ratio = large / small
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-5)


@pytest.mark.parametrize("folded", [True, False])
def test_none_where_there_is_nothing_to_gain(folded: bool) -> None:
    even = np.sign(X)  # all channels alike
    weights = {name: np.sign(weight) for name, weight in WEIGHTS.items()}
    assert factors(even, weights, folded=folded) is None


def test_a_product_more_has_to_be_worth_it() -> None:
    x = X * np.linspace(1, 1.2, WIDTH, dtype=np.float32)
    assert factors(x, WEIGHTS, folded=True) is not None
    assert factors(x, WEIGHTS, folded=False) is None
    assert factors(*with_outliers(3), folded=False) is not None


def test_off() -> None:
    assert factors(*with_outliers(3), alpha=0.0) is None


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(OptionError, match="0 \\(off\\) to 1"):
        factors(X, WEIGHTS, alpha)


def test_channels_and_columns_of_zeros() -> None:
    x, weights = with_outliers(4)
    x[:, 0] = 0  # never used in calibration: no reason to change it
    x[:, 1] *= 1000
    weights = {name: weight * (np.arange(WIDTH) != 1) for name, weight in weights.items()}  # an outlier that nothing reads
    s = factors(x, weights)
    assert s is not None
    assert np.isfinite(s).all()
    assert s[0] == 1
    assert error(x, weights, s) < 1.5 * error(X, WEIGHTS, None)


def test_an_input_of_zeros_is_left_alone() -> None:
    assert factors(np.zeros_like(X), WEIGHTS) is None


def test_behind_a_norm_nothing_needs_to_be_seen() -> None:
    """A norm's outlier channels, and small columns behind them, would cost the weights that share a block with those."""
    gain = RNG.uniform(0.5, 2, WIDTH).astype(np.float32)
    scale = with_outliers(6)[0][0] / X[0]
    weights = {name: weight / scale for name, weight in WEIGHTS.items()}
    same, scaled = (
        unseen_factors(np.hypot(g, g / 3).astype(np.float64), sum(np.square(one).sum(0) for one in w.values()), alpha=0.5)
        for g, w in ((gain, WEIGHTS), (gain * scale, weights))
    )
    ratio = scaled / same / scale
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-4)

    def lost(s: np.ndarray) -> float:
        """Relative error of the product with this norm's output, its weight in 8-bit blocks, both smoothed by `s`."""
        kind, x, weight = WeightFormat(bits=8), X * gain * scale / s, weights["q"] * s
        rounded = dequantize_rows(quantize_rows(weight, kind), kind, WIDTH)
        return float(np.sqrt(np.mean((x @ (rounded - weight).T) ** 2) / np.mean((x @ weight.T) ** 2)))

    assert lost(np.ones_like(scaled)) > 10 * lost(scaled)


def test_columns_that_share_a_channel_share_its_factor() -> None:
    """As the heads of grouped-query attention that read one value: the channel has their energy together."""
    shared = np.tile(np.arange(WIDTH // 4), 4)
    typical, energy = RNG.uniform(0.1, 10, WIDTH), RNG.uniform(0.1, 10, WIDTH)
    found = unseen_factors(typical, energy, alpha=0.5, shared=shared)
    np.testing.assert_array_equal(found, found[shared])
    together = unseen_factors(
        np.sqrt(np.square(typical).reshape(4, -1).sum(0)), energy.reshape(4, -1).sum(0), alpha=0.5
    )  # fmt: skip
    np.testing.assert_allclose(found[: WIDTH // 4], together, rtol=1e-6)
    x = np.tile(with_outliers(5)[0][:, : WIDTH // 4], 4)
    seen = smoothing_factors(Channels.of(x), ("q",), lambda path: [WEIGHTS[path]], alpha=0.5, folded=True, shared=shared)
    assert seen is not None
    np.testing.assert_array_equal(seen, seen[shared])


def test_channels_merge_and_keep() -> None:
    parts = Channels.of(X[:150].copy())
    parts.merge(Channels.of(X[150:]))
    for one in (parts, Channels.from_arrays(parts.arrays())):
        np.testing.assert_array_equal(one.low, X.min(axis=0))
        np.testing.assert_array_equal(one.high, X.max(axis=0))
        np.testing.assert_array_equal(one.reach, np.abs(X).max(axis=0))
        np.testing.assert_allclose(one.squares, np.square(X, dtype=np.float64).sum(axis=0), rtol=1e-5)
        assert one.rows == ROWS
