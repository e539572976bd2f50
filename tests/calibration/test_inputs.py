"""Which layers read one input: declared by a block, else each its own."""

from typing import ClassVar

from torch import Tensor, nn

from mcv_calibration.inputs import LayerInput, layer_inputs
from mcv_graphs.folds import behind_norm
from mcv_graphs.layers import LayerNorm, Linear
from mcv_graphs.siglip import SiglipConfig, SiglipTower


class Block(nn.Module):
    folds: ClassVar = (behind_norm("norm", "a", "b"),)

    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(8, 1e-6)
        self.a, self.b, self.c = (Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.c(self.a(y) + self.b(y))


def test_of_a_block_and_of_a_model_of_blocks() -> None:
    assert layer_inputs(Block()) == (LayerInput(("a", "b"), folded=True), LayerInput(("c",)))
    names = [one.layers for one in layer_inputs(nn.Sequential(Block(), Block()))]
    assert names == [("0.a", "0.b"), ("0.c",), ("1.a", "1.b"), ("1.c",)]


def test_of_a_tower() -> None:
    """Patch embeddings stay in float."""
    config = SiglipConfig(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, patch_size=2, position_table_side=4)
    found = layer_inputs(SiglipTower(config))
    first = [
        LayerInput(("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"), folded=True),
        LayerInput(("layers.0.out_proj",), folded=True),
        LayerInput(("layers.0.fc1",), folded=True),
        LayerInput(("layers.0.fc2",)),
    ]
    assert list(found[:4]) == first
    assert len(found) == 8
