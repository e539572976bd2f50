"""The operators of the hybrid decoder: what ONNX Runtime computes is what the torch body computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from mcv_graphs import ops
from mcv_graphs import recurrent_ops as rec
from mcv_graphs.hybrid_decoder import HybridConfig, frequency_axes

Make = Callable[..., torch.Tensor]


class Body(nn.Module):
    """A function of tensors, as a module to trace."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def both(function: Callable[..., Any], tensors: tuple[torch.Tensor, ...], folder: Path) -> None:
    """Compare the two bodies of `function` on `tensors`."""
    with ops.emitting(), torch.no_grad():
        program = torch.export.export(Body(function), tensors, strict=False)
        traced = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    traced.save(folder / "graph.onnx")
    session = ort.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
    feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), tensors, strict=True)}
    expected = function(*tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = session.run(None, feeds)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=2e-5)


@pytest.fixture
def random() -> Make:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def test_l2_norm_of_heads(random: Make, tmp_path: Path) -> None:
    both(lambda x: rec.head_l2_norm(x, 3), (random(2, 5, 24),), tmp_path)
    x = random(1, 1, 8)
    torch.testing.assert_close(rec.head_l2_norm(x, 1), x / (x.square().sum() + 1e-6).sqrt())


@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolution_over_time(length: int, random: Make, tmp_path: Path) -> None:
    x, taps, past = random(2, length, 6), random(4, 6), random(2, 3, 6)
    both(rec.causal_conv, (x, taps, past), tmp_path)
    seen = torch.cat((past, x), dim=1).transpose(1, 2)
    expected = nn.functional.conv1d(seen, taps.T.unsqueeze(1), groups=6).transpose(1, 2)
    found, following = rec.causal_conv(x, taps, past)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(following, seen[..., -3:].transpose(1, 2))


def test_gate(random: Make, tmp_path: Path) -> None:
    both(rec.linear_attention_gate, (random(2, 5, 4), random(4), -random(4).exp(), random(2, 5, 4)), tmp_path)


@pytest.mark.parametrize(("key_heads", "value_heads"), [(4, 4), (2, 4)])
@pytest.mark.parametrize("length", [1, 70])
def test_delta_rule(key_heads: int, value_heads: int, length: int, random: Make, tmp_path: Path) -> None:
    """Keys and values of different widths, and a key head that serves two value heads."""
    query, key = (rec.head_l2_norm(random(2, length, key_heads * 16), key_heads) for _ in range(2))
    tensors = (
        query,
        key,
        random(2, length, value_heads * 8),
        random(2, value_heads, 16, 8),
        -random(2, length, value_heads).abs(),
        random(2, length, value_heads).sigmoid(),
    )
    both(lambda *t: rec.gated_delta_rule(*t, key_heads=key_heads, value_heads=value_heads), tensors, tmp_path)


def test_partial_rotation(random: Make, tmp_path: Path) -> None:
    angles = random(2 * 5, 4)
    rows = torch.arange(10).view(2, 5)
    tensors = (random(2, 5, 3 * 16), angles.cos(), angles.sin(), rows)
    both(lambda *t: rec.partial_rotary(*t, num_heads=3), tensors, tmp_path)


def test_axis_of_each_frequency() -> None:
    """The published sections: T, H, W in turn, until rows and columns have theirs."""
    sizes = dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "linear_key_heads",
         "linear_value_heads", "linear_key_dim", "linear_value_dim", "conv_kernel", "context_length"), 1
    )  # fmt: skip
    config = HybridConfig(**sizes, layer_kinds=(), rotary_dim=64, rms_norm_eps=1e-6, rope_theta=1e7, mrope_section=(11, 11, 10))
    axes = frequency_axes(config)
    assert (axes == 1).nonzero().flatten().tolist() == list(range(1, 32, 3))
    assert (axes == 2).nonzero().flatten().tolist() == list(range(2, 30, 3))
    assert (axes == 0).nonzero().flatten().tolist() == list(range(0, 31, 3))
