"""Products of 8-bit integers whose rows have ranges of their own: what a row of far larger values costs it and the others."""

import numpy as np
import pytest
import torch

from mcv_graphs.layers import Int8Format, Linear

ROWS, WIDTH, OUT = 64, 96, 48
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, ROWS, WIDTH)).astype(np.float32)
WEIGHT = RNG.normal(size=(WIDTH, OUT)).astype(np.float32)
BIAS = RNG.normal(size=OUT).astype(np.float32)


def layer(kind: Int8Format) -> Linear:
    """The weight rounded to a scale for each output channel."""
    linear = Linear(WIDTH, OUT)
    linear.set_format(kind)
    scales = np.abs(WEIGHT).max(0) / kind.largest
    linear.qweight = torch.from_numpy(np.rint(WEIGHT / scales).astype(np.int8))
    linear.weight_scales = torch.from_numpy(scales)
    linear.bias = torch.nn.Parameter(torch.from_numpy(BIAS), requires_grad=False)
    return linear


def errors(kind: Int8Format, x: np.ndarray) -> np.ndarray:
    """Relative error of each row of the product."""
    exact = x.astype(np.float64) @ WEIGHT
    linear = layer(kind)
    linear.bias = None
    found = linear(torch.from_numpy(x)).numpy().astype(np.float64)
    return np.sqrt(((found - exact) ** 2).sum(-1) / np.maximum((exact**2).sum(-1), 1e-300))


@pytest.mark.parametrize("kind", [Int8Format(activations="token"), Int8Format(activations="token", signed=True)])
def test_a_row_of_huge_values_takes_no_levels_from_the_others(kind: Int8Format) -> None:
    """Registers of vision transformers and the sinks of language models: a few rows, in a few channels 50 times the rest."""
    spiked = X.copy()
    spiked[0, :2, :3] *= 50
    plain, with_spikes = errors(kind, X), errors(kind, spiked)
    assert plain.max() < 0.02
    np.testing.assert_array_equal(with_spikes[0, 2:], plain[0, 2:])
    np.testing.assert_array_equal(with_spikes[1], plain[1])
    assert with_spikes[0, :2].max() < 0.05
    assert np.median(errors(Int8Format(activations="dynamic"), spiked)[0, 2:]) > 10 * np.median(plain)


def test_rows_of_zeros_and_of_any_size() -> None:
    kind = Int8Format(activations="token")
    sizes = 10.0 ** np.linspace(-28, 34, ROWS)
    x = (X[0] * sizes[:, None]).astype(np.float32)
    assert errors(kind, x).max() < 0.02
    x[:] = 0
    np.testing.assert_array_equal(layer(kind)(torch.from_numpy(x)).numpy(), np.broadcast_to(BIAS, (ROWS, OUT)))
    assert layer(kind)(torch.empty(0, WIDTH)).shape == (0, OUT)


def test_what_is_not_finite_stays_so() -> None:
    x = X.copy()
    x[0, 3, 4] = np.nan
    found = layer(Int8Format(activations="token"))(torch.from_numpy(x))
    assert not torch.isfinite(found[0, 3]).any()
    assert torch.isfinite(found[0, 4:]).all() and torch.isfinite(found[1]).all()
