"""The SigLIP vision towers of the resampler generation: the graph `vision_encoder`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mcv_graphs import ops
from mcv_graphs.folds import Fold, behind_norm
from mcv_graphs.layers import Embedding, FeedForward, LayerNorm, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipConfig:
    """Sizes of a tower; `position_table_side` squared is the number of learned positions. `gelu`: approximate, or exact."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    position_table_side: int
    layer_norm_eps: float = 1e-6
    gelu: Literal["tanh", "erf"] = "tanh"


class SiglipTower(nn.Module):
    """Patches to features: pre-norm blocks, tanh GELU, a final norm; no class token, no pooling head."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        # Patch and position embeddings stay in float: a fraction of a percent of the weights, and the input of everything.
        self.patch_embedding = Linear(3 * config.patch_size**2, width, quantizable=False)
        self.position_embedding = Embedding(config.position_table_side**2, width, quantizable=False)
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_layers))
        self.post_layernorm = LayerNorm(width, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, position_ids: Tensor) -> Tensor:
        """pixel_values [S, L, 3 * P * P] (a patch flattened in C, P, P order), position_ids [S, L] -> [S, L, hidden]."""
        return self.encode(self.patch_embedding(pixel_values) + self.position_embedding(position_ids))

    def encode(self, x: Tensor) -> Tensor:
        """Embedded patches [S, L, hidden] through all layers and the final norm."""
        layers = cast(list[SiglipLayer], self.layers)
        normed = layers[0].layer_norm1(x)
        following = [layer.layer_norm1 for layer in layers[1:]] + [self.post_layernorm]
        for layer, next_norm in zip(layers, following, strict=True):
            normed, x = layer.layer_norm2.skip(x, layer.attention(normed))
            normed, x = next_norm.skip(x, layer.mlp(normed))
        return normed


class ResizedSiglipTower(SiglipTower):
    """A tower of fixed size whose table of positions is resized to each slice's grid: by weights, a product along each axis."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__(config)
        self.side = config.position_table_side

    def forward(  # type: ignore[override]  # another graph, with inputs of its own
        self, pixel_values: Tensor, position_ids: Tensor, row_weights: Tensor, column_weights: Tensor
    ) -> Tensor:
        """As `SiglipTower`, position_ids into the table resized by row_weights [H, side] and column_weights [W, side]."""
        table = self.position_embedding.weight
        rows = (row_weights @ table.view(self.side, -1)).view(-1, self.side, table.shape[1])
        resized = (column_weights @ rows).flatten(0, 1)
        return self.encode(self.patch_embedding(pixel_values) + F.embedding(position_ids, resized))


class SiglipLayer(nn.Module):
    """One block; the tower adds the residuals, so that each sum fuses with the norm that follows it."""

    folds: ClassVar = (
        behind_norm("layer_norm1", "q_proj", "k_proj", "v_proj"),
        Fold(maker="v_proj", readers=("out_proj",)),
        behind_norm("layer_norm2", "fc1"),
    )
    FFN: ClassVar[FeedForward] = (("fc1",), "fc2")

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.gelu = ops.gelu_tanh if config.gelu == "tanh" else ops.gelu
        self.layer_norm1 = LayerNorm(width, config.layer_norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))
        self.layer_norm2 = LayerNorm(width, config.layer_norm_eps)
        self.fc1 = Linear(width, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, width)

    def attention(self, x: Tensor) -> Tensor:
        return self.out_proj(ops.multi_head_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads))

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(self.gelu(self.fc1(x)))
