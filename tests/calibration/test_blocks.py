"""Block quantization: the error it makes, and that ONNX Runtime reads the blocks as we wrote them."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mcv_calibration.blocks import METHODS, Method, dequantize_rows, quantize_rows
from mcv_calibration.k_quant import k_quant
from mcv_export.plan import GraphPlan
from mcv_export.storage import Storage
from mcv_export.trace import trace
from mcv_graphs.contract import GraphIO
from mcv_graphs.layers import Embedding, Linear, WeightFormat
from mcv_graphs.ops import dequantize
from mcv_runtime.bundle.manifest import TensorSpec
from mcv_runtime.errors import OptionError
from mcv_runtime.sessions.graphs import cpu_session, session_options

FORMATS = [WeightFormat(bits=bits, block_size=size) for bits in (4, 8) for size in (16, 32, 64, 128)]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(24, 256)).astype(np.float32)
    rows[3] = 0  # a block without any value
    rows[4] = np.abs(rows[4]) + 1  # one-sided
    rows[5, 7] = 100  # an outlier
    return rows


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_error_is_at_most_half_a_step(weights: WeightFormat, rows: np.ndarray) -> None:
    back = _dequantize(rows, weights)
    values = rows.reshape(24, -1, weights.block_size)
    low, high = np.minimum(values.min(2), 0), np.maximum(values.max(2), 0)
    step = np.maximum(-low, high) / (2 ** (weights.bits - 1) - 1) if weights.symmetric else (high - low) / (2**weights.bits - 1)
    # A rounded zero point moves both ends by up to half a step more.
    bound = step * (0.5 if weights.symmetric else 1.0)
    assert (np.abs(back - rows).reshape(values.shape).max(2) <= bound * 1.001 + 1e-9).all()


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_a_width_that_is_no_multiple_of_the_block(weights: WeightFormat, rows: np.ndarray) -> None:
    """SigLIP's MLP is 4304 wide: the last block is padded, and its padding changes nothing."""
    whole = weights.block_size * (200 // weights.block_size)
    np.testing.assert_array_equal(_dequantize(rows[:, :200], weights)[:, :whole], _dequantize(rows, weights)[:, :whole])


@pytest.mark.parametrize("width", [256, 200])
@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_onnxruntime_multiplies_as_the_eager_body_does(
    weights: WeightFormat, width: int, rows: np.ndarray, tmp_path: Path
) -> None:
    io = GraphIO(
        inputs={"x": TensorSpec(dtype="float32", shape=("rows", width))},
        outputs={"y": TensorSpec(dtype="float32", shape=("rows", 24))},
    )
    plan = GraphPlan(name="resampler", module=lambda: Linear(width, 24), io=io, weights={})
    layer = Linear(width, 24)
    layer.set_format(weights)
    bias = np.linspace(-1, 1, 24, dtype=np.float32)
    path = _export(plan, weights, layer, rows[:, :width], tmp_path, bias=bias)
    x = np.random.default_rng(1).normal(size=(7, width)).astype(np.float32)
    (found,) = cpu_session(path, session_options(1)).run(None, {"x": x})
    expected = layer(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    exact = x @ _dequantize(rows[:, :width], weights).T + bias
    assert np.abs(found - exact).max() > 1e-4 * np.abs(exact).max(), "accuracy_level 4 rounds x too"


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_onnxruntime_looks_rows_up_exactly(weights: WeightFormat, rows: np.ndarray, tmp_path: Path) -> None:
    io = GraphIO(
        inputs={"x": TensorSpec(dtype="int64", shape=("a", "b"))},
        outputs={"y": TensorSpec(dtype="float32", shape=("a", "b", 256))},
    )
    plan = GraphPlan(name="resampler", module=lambda: Embedding(24, 256), io=io, weights={})
    layer = Embedding(24, 256)
    layer.set_format(weights)
    path = _export(plan, weights, layer, rows, tmp_path)
    indices = np.array([[3, 4, 5], [23, 0, 5]])
    (found,) = cpu_session(path, session_options(1)).run(None, {"x": indices})
    np.testing.assert_allclose(found, _dequantize(rows, weights)[indices], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_numpy_reads_blocks_as_torch_does(weights: WeightFormat, method: Method, rows: np.ndarray) -> None:
    for width in (256, 200):
        blocks = quantize_rows(rows[:, :width], weights, method)
        expected = _dequantize(rows[:, :width], weights, method)
        np.testing.assert_array_equal(dequantize_rows(blocks, weights, width), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_rows_do_not_depend_on_the_rows_beside_them(weights: WeightFormat, method: Method, rows: np.ndarray) -> None:
    """A weight is quantized a few rows at a time."""
    many = np.concatenate([rows] * 30)[:, :200]  # more than are worked on at once
    alone = _dequantize(rows[:, :200], weights, method)
    np.testing.assert_array_equal(_dequantize(many, weights, method), np.concatenate([alone] * 30))


@pytest.mark.parametrize("weights", FORMATS, ids=str)
def test_k_quant_has_the_least_squared_error(weights: WeightFormat, rows: np.ndarray) -> None:
    errors = {method: _block_errors(rows, weights, method, 2).sum() for method in METHODS}
    assert errors["k-quant"] < errors["rtn"]
    nearest = _block_errors(rows, weights, "rtn", 2)
    assert (_block_errors(rows, weights, "k-quant", 2) <= nearest * 1.001 + 1e-9).all()


def test_k_quant_is_close_to_the_best_of_all_grids() -> None:
    """Of 40 spans and 16 zero points for each block: its error is within a hundredth of the best's."""
    weights = WeightFormat(bits=4, block_size=32)
    rows = np.random.default_rng(3).normal(size=(64, 32)).astype(np.float32)
    steps = (rows.max(1) - rows.min(1))[:, None, None] * np.linspace(0.5, 1.1, 40)[None, :, None] / 15
    zeros = np.arange(16)[None, None]
    q = np.clip(np.rint(rows[..., None, None] / steps[:, None]) + zeros, 0, 15) - zeros
    fitted = (q * rows[..., None, None]).sum(1) / np.maximum(np.square(q).sum(1), 1e-9)
    best = np.square(q * fitted[:, None] - rows[..., None, None]).sum(1).min((1, 2)).sum()
    assert best * 0.99 <= _block_errors(rows, weights, "k-quant", 2).sum() <= best * 1.01


def test_k_quant_heeds_importance(rows: np.ndarray) -> None:
    for weights in FORMATS:
        values = np.ascontiguousarray(rows.reshape(-1, weights.block_size).T)
        importance = np.random.default_rng(5).exponential(size=values.shape).astype(np.float32) ** 3
        grids = k_quant(values, weights), k_quant(values, weights, importance)
        plain, weighted = (float((np.square(grid.values(grid.steps(values)) - values) * importance).sum()) for grid in grids)
        assert weighted < plain


def test_a_method_that_is_none(rows: np.ndarray) -> None:
    with pytest.raises(OptionError, match="none of rtn, k-quant"):
        quantize_rows(rows, FORMATS[0], "best")  # type: ignore[arg-type]


def _block_errors(rows: np.ndarray, weights: WeightFormat, method: Method, power: float) -> np.ndarray:
    errors = np.abs(_dequantize(rows, weights, method) - rows).astype(np.float64) ** power
    return errors.reshape(len(rows), -1, min(weights.block_size, rows.shape[1])).sum(2)


def _dequantize(rows: np.ndarray, weights: WeightFormat, method: Method = "rtn") -> np.ndarray:
    blocks = quantize_rows(rows, weights, method)
    zeros = None if blocks.zero_points is None else torch.from_numpy(blocks.zero_points)
    back = dequantize(torch.from_numpy(blocks.qweight), torch.from_numpy(blocks.scales), zeros, weights.bits)
    return back[:, : rows.shape[1]].numpy()


def _export(
    plan: GraphPlan, weights: WeightFormat, layer: Linear | Embedding, rows: np.ndarray, folder: Path, **others: np.ndarray
) -> Path:
    """Fill `layer` and an exported graph with the same blocks."""
    blocks = quantize_rows(rows, weights, "rtn")
    values = {"qweight": blocks.qweight, "scales": blocks.scales, "zero_points": blocks.zero_points, **others}
    model, _ = trace(plan, Storage(formats={"": weights}))
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(layer, Embedding):
            value = value.reshape(len(value), -1)
        tensor = torch.from_numpy(value)
        setattr(layer, name, torch.nn.Parameter(tensor) if name in others else tensor)
        model.graph.initializers[name].const_value = ir.tensor(value, name=name)
    ir.save(model, folder / "graph.onnx")
    return folder / "graph.onnx"
