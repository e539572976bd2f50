"""GPTQ of one weight: the published procedure step by step, its error on correlated inputs, and inputs it must survive."""

import numpy as np
import pytest

from mcv_calibration.blocks import Blocks, dequantize_rows, quantize_rows
from mcv_calibration.gptq import gptq
from mcv_graphs.layers import WeightFormat
from mcv_runtime.errors import OptionError

FORMATS = [WeightFormat(bits=bits, block_size=size) for bits in (4, 8) for size in (16, 32, 256)]


def inputs(samples: int, width: int, rank: int, seed: int) -> np.ndarray:
    """Correlated channels of very different size, [samples, width]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, rank)) @ rng.normal(size=(rank, width)) + 0.3 * rng.normal(size=(samples, width))
    return (x * np.exp(rng.normal(size=width))).astype(np.float32)


def weight(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def error(x: np.ndarray, rows: np.ndarray, blocks: Blocks, weights: WeightFormat) -> float:
    return float(np.linalg.norm(x @ (dequantize_rows(blocks, weights, rows.shape[1]) - rows).T))


@pytest.mark.parametrize("shape", [(512, 256, 16), (2000, 200, 200), (100, 320, 8), (64, 96, 4)], ids=str)
@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_the_output_errs_less_than_by_rounding_to_nearest(weights: WeightFormat, shape: tuple[int, int, int]) -> None:
    samples, width, rank = shape
    x, rows = inputs(samples, width, rank, seed=width), weight(48, width)
    found = error(x, rows, gptq(rows, x.T @ x, weights), weights)
    for method in ("rtn", "k-quant"):
        assert found < error(x, rows, quantize_rows(rows, weights, method), weights)


@pytest.mark.parametrize("width", [32, 160, 200, 300])
def test_it_is_the_published_procedure(width: int) -> None:
    """Given the blocks' grids: optimal brain surgeon's updates on the inverse, in float64, from the last channel on."""
    weights, damping = WeightFormat(bits=4, block_size=32), 0.01
    x, rows = inputs(400, width, 12, seed=1), weight(24, width)
    hessian = x.T @ x
    blocks = gptq(rows, hessian, weights, damping)
    steps, zeros = (
        _nibbles(a).reshape(24, -1)[:, :n] for a, n in ((blocks.qweight, width), (blocks.zero_points, -(-width // 32)))
    )
    inverse = np.linalg.inv(hessian.astype(np.float64) + damping * np.diag(hessian).mean() * np.eye(width))
    values = rows.astype(np.float64)
    differing = 0
    for channel in reversed(range(width)):
        scale, zero = blocks.scales[:, channel // 32], zeros[:, channel // 32].astype(np.float64)
        wanted = np.clip(np.rint(values[:, channel] / scale) + zero, 0, 15)
        differing += int((wanted != steps[:, channel]).sum())
        # Follow what was found, so that one value at the border of two steps does not turn into many.
        wrong = values[:, channel] - (steps[:, channel] - zero) * scale
        values -= np.outer(wrong / inverse[channel, channel], inverse[channel])
        inverse -= np.outer(inverse[:, channel], inverse[channel]) / inverse[channel, channel]
        inverse[channel, channel] = 1
    assert differing <= 0.002 * steps.size


def test_a_channel_never_used_is_rounded_to_nearest_and_harms_no_other() -> None:
    weights = WeightFormat(bits=8, block_size=32)
    x, rows = inputs(300, 64, 8, seed=2), weight(16, 64)
    x[:, [5, 40]] = 0
    blocks = gptq(rows, x.T @ x, weights)
    back = dequantize_rows(blocks, weights, 64)
    step = blocks.scales[:, [0, 1]]
    assert (np.abs(back - rows)[:, [5, 40]] <= 0.5001 * step).all()
    assert error(x, rows, blocks, weights) < error(x, rows, quantize_rows(rows, weights), weights)


@pytest.mark.parametrize("hessian", [np.zeros((64, 64)), np.ones((64, 64)), -np.eye(64), np.ones((64, 64)) * 1e30])
def test_moments_that_say_little(hessian: np.ndarray) -> None:
    """No inputs, one direction only, none that could be: what comes out is still a quantization of the weight."""
    weights, rows = WeightFormat(bits=8, block_size=32), weight(16, 64)
    blocks = gptq(rows, hessian.astype(np.float32), weights, damping=0)
    back = dequantize_rows(blocks, weights, 64)
    assert np.isfinite(back).all()
    if not (hessian == 1e30).any() and not (hessian == 1).any():
        assert np.abs(back - rows).max() <= 0.5001 * blocks.scales.max()


def test_moments_that_are_not_positive_definite_lose_their_correlations() -> None:
    weights, rows = WeightFormat(bits=4, block_size=32), weight(16, 64)
    impossible = np.full((64, 64), 9, np.float32)
    np.fill_diagonal(impossible, 1)
    alone = gptq(rows, np.eye(64, dtype=np.float32), weights)
    np.testing.assert_array_equal(gptq(rows, impossible, weights).qweight, alone.qweight)


def test_moments_that_cannot_be_used() -> None:
    rows = weight(4, 64)
    with pytest.raises(OptionError, match="leave out the sample"):
        gptq(rows, np.full((64, 64), np.nan, np.float32), WeightFormat(bits=4))
    with pytest.raises(OptionError, match="measure this very layer"):
        gptq(rows, np.eye(32, dtype=np.float32), WeightFormat(bits=4))


def _nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack((packed & 15, packed >> 4), axis=-1)
