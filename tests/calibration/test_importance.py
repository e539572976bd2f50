"""Sums over a layer's inputs, and the channels of a feed-forward block that they speak for."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mcv_calibration.importance import ffn_importance, kept_channels
from mcv_calibration.moments import mean_squares, second_moments
from mcv_graphs.layers import Linear
from mcv_runtime.errors import OptionError

LINEARS = ("gate_proj", "up_proj", "down_proj")


class Block(nn.Module):
    def __init__(self, width: int = 16, inner: int = 96) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_proj, self.up_proj = Linear(width, inner, bias=False), Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)
        for name in LINEARS:
            weight = self.get_submodule(name).weight
            weight.data = torch.randn(weight.shape, generator=generator) * torch.rand(weight.shape[1], generator=generator)

    def inner(self, x: Tensor) -> Tensor:
        return self.gate_proj(x).sigmoid() * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x))


@pytest.fixture
def block() -> Block:
    return Block().requires_grad_(False)


@pytest.fixture
def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, 16, generator=generator) for length in (7, 30, 11)]


def test_sums_are_those_of_all_samples_together(block: Block, samples: list[Tensor]) -> None:
    with second_moments(block, LINEARS) as moments, mean_squares(block, LINEARS) as squares:
        for sample in samples:
            block(sample)
    whole = torch.cat([sample.flatten(0, 1) for sample in samples])
    for names, x in (("gate_proj", "up_proj"), whole), (("down_proj",), block.inner(whole)):
        for name in names:
            np.testing.assert_allclose(moments[name], x.T @ x, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(squares[name].value, x.square().mean(0), rtol=1e-5)
    assert np.shares_memory(moments["gate_proj"], moments["up_proj"])
    before = moments["down_proj"].copy()
    block(samples[0])  # nothing is watched any more
    np.testing.assert_array_equal(moments["down_proj"], before)


def test_layers_take_one_array_only_for_the_very_same_input(block: Block, samples: list[Tensor]) -> None:
    with second_moments(block, LINEARS) as moments:
        for sample in samples:
            block.gate_proj(sample)
            block.up_proj(2 * sample)
    np.testing.assert_allclose(moments["up_proj"], 4 * moments["gate_proj"], rtol=1e-5)


def test_nothing_seen(block: Block) -> None:
    with mean_squares(block, LINEARS) as squares:
        pass
    with pytest.raises(ValueError, match="run the samples"):
        _ = squares["gate_proj"].value


def test_importance_is_what_leaving_a_channel_out_costs(block: Block, samples: list[Tensor]) -> None:
    x = samples[1]
    with mean_squares(block, ["down_proj"]) as squares:
        output = block(x)
    importance = ffn_importance(squares["down_proj"].value, block.down_proj.weight.T.numpy())
    for channel in (0, 40, 95):
        inner = block.inner(x)
        inner[..., channel] = 0
        cost = (block.down_proj(inner) - output).square().sum(-1).mean()
        assert importance[channel] == pytest.approx(float(cost), rel=1e-4)


@pytest.mark.parametrize(("width", "fraction", "kept"), [(160, 0.2, 128), (160, 0.3, 128), (4304, 0.2, 3456), (96, 0.0, 96)])
def test_the_kept_width_is_a_multiple_of_32(width: int, fraction: float, kept: int) -> None:
    importance = np.random.default_rng(0).random(width).astype(np.float32)
    channels = kept_channels(importance, fraction)
    assert len(channels) == kept
    assert (np.diff(channels) > 0).all()
    assert importance[channels].min() >= np.delete(importance, channels).max(initial=0)


@pytest.mark.parametrize(("width", "fraction"), [(96, 0.2), (32, 0.9), (4304, 0.002)])
def test_widths_that_cannot_be_pruned_so(width: int, fraction: float) -> None:
    with pytest.raises(OptionError, match=f"{width} channels are too few"):
        kept_channels(np.ones(width, np.float32), fraction)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_share_that_makes_no_sense(fraction: float) -> None:
    with pytest.raises(OptionError, match="prune_ffn"):
        kept_channels(np.ones(64, np.float32), fraction)
