"""A language model whose layers are gated delta nets with full attention every so often: the graph `decoder_with_past`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from mcv_graphs import ops
from mcv_graphs import recurrent_ops as rec
from mcv_graphs.folds import Fold, behind_norm, value_channels
from mcv_graphs.layer_state import LayerState
from mcv_graphs.layers import FLOAT32, Embedding, FeedForward, Linear, RMSNorm

LayerKind = Literal["linear_attention", "full_attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridConfig:
    """Sizes of a Qwen3.5-like decoder. `mrope_section` counts the frequencies of time, row and column; empty: one position.

    `frequencies` and `rotary_scale` as in `mcv_graphs.decoder.DecoderConfig`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_kinds: tuple[LayerKind, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    linear_key_heads: int
    linear_value_heads: int
    linear_key_dim: int
    linear_value_dim: int
    conv_kernel: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    frequencies: tuple[float, ...] = ()
    rotary_scale: float = 1.0
    mrope_section: tuple[int, ...] = ()
    tied: bool = True

    @property
    def conv_channels(self) -> int:
        """Query, key and value of a delta net side by side."""
        return 2 * self.linear_key_heads * self.linear_key_dim + self.value_channels

    @property
    def value_channels(self) -> int:
        return self.linear_value_heads * self.linear_value_dim


class HybridDecoder(nn.Module):
    """Token ids and visual tokens to logits, one cached step or many positions at once.

    Norms weigh with `weight` alone: the published zero-centred ones are stored with 1 added.
    """

    frequencies: Tensor
    frequency_axes: Tensor

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, may_stay_float=True)
        self.layers = nn.ModuleList(_LAYERS[kind](config) for kind in config.layer_kinds)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)
        if config.mrope_section:
            self.register_buffer("frequency_axes", frequency_axes(config), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        vision_embeds: Tensor,
        vision_positions: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """One call over a chunk of T tokens for B sequences.

        As `mcv_graphs.decoder.Decoder.forward`, with position_ids [B, T], or [3, B, T] (time, row, column) where the config
        has sections. past: two tensors of each layer in turn, key and value or the convolution's inputs and the state.
        """
        inputs = (input_ids, vision_embeds, vision_positions, position_ids, logit_positions, seqlens_k, total_sequence_length)
        state = self.start(*inputs, past)
        for index in range(len(self.layers)):
            state = self.block(index, state)
        return self.finish(state)

    def start(
        self,
        input_ids: Tensor,
        vision_embeds: Tensor,
        vision_positions: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        past: list[Tensor],
    ) -> LayerState[Call]:
        """`forward` up to the first layer."""
        embeds = self.embed_tokens(input_ids)
        x = embeds.flatten(0, 1).index_put((vision_positions,), vision_embeds).view_as(embeds)
        call = Call(*self.rotary(position_ids), _row_numbers(input_ids), seqlens_k, total_sequence_length)
        normed = cast(HybridLayer, self.layers[0]).input_layernorm(x)
        return LayerState(normed, x, logit_positions, past, [], call)

    def block(self, index: int, state: LayerState[Call]) -> LayerState[Call]:
        """`forward` through one layer, up to the next."""
        layers = cast(list[HybridLayer], self.layers)
        first, second = state.past[2 * index : 2 * index + 2]
        mixed, first, second = layers[index].mix(state.normed, first, second, state.call)
        last = index + 1 == len(layers)
        next_norm = self.norm if last else layers[index + 1].input_layernorm
        return state.through(layers[index], mixed, (first, second), next_norm, last=last)

    def finish(self, state: LayerState[Call]) -> tuple[Tensor, list[Tensor]]:
        """What `forward` returns."""
        if self.shares_table and ops.emits():  # one float table for both; equally quantized ones share their bytes in the file
            return ops.tied_logits(state.normed, self.embed_tokens.weight), state.present
        return self.lm_head(state.normed), state.present

    @property
    def shares_table(self) -> bool:
        return self.config.tied and self.embed_tokens.format == self.lm_head.format == FLOAT32

    def rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token: two [B * T, rotary_dim / 2]. Tables of a long context would outweigh a layer."""
        positions = ops.to_float(position_ids)
        if self.config.mrope_section:
            positions = positions.flatten(1).index_select(0, self.frequency_axes).transpose(0, 1)
        else:
            positions = positions.flatten().unsqueeze(-1)
        angles = positions * self.frequencies
        if self.config.rotary_scale == 1:
            return angles.cos(), angles.sin()
        return angles.cos() * self.config.rotary_scale, angles.sin() * self.config.rotary_scale


@dataclass(frozen=True, slots=True)
class Call:
    """What all layers of one call share."""

    cos: Tensor
    sin: Tensor
    rows: Tensor
    seqlens_k: Tensor
    total_sequence_length: Tensor


class HybridLayer(nn.Module):
    """One block; the decoder adds the residuals, so that each sum fuses with the norm that follows it."""

    FFN: ClassVar[FeedForward] = (("gate_proj", "up_proj"), "down_proj")

    def __init__(self, config: HybridConfig, mixed_size: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.o_proj = Linear(mixed_size, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.gate_proj, self.up_proj = (Linear(width, config.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = Linear(config.intermediate_size, width, bias=False)

    @property
    def folds(self) -> tuple[Fold, ...]:
        return (
            behind_norm("post_attention_layernorm", "gate_proj", "up_proj"),
            Fold(maker="up_proj", readers=("down_proj",), gates=("gate_proj",)),
        )

    def mix(self, x: Tensor, first: Tensor, second: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture over time, [B, T, hidden] -> [B, T, mixed_size], and the layer's two cache tensors."""
        raise NotImplementedError

    def mlp(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.silu(self.gate_proj(x)) * self.up_proj(x))


class FullAttentionLayer(HybridLayer):
    """Grouped-query attention with normalised heads, partial rotary positions and a gate on its output."""

    def __init__(self, config: HybridConfig) -> None:
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        super().__init__(config, width)
        self.q_proj, self.q_gate = (Linear(config.hidden_size, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (Linear(config.hidden_size, kv_width, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = (nn.Parameter(torch.empty(config.head_dim)) for _ in range(2))

    @property
    def folds(self) -> tuple[Fold, ...]:
        values = value_channels(self.config.num_heads, self.config.num_kv_heads, self.config.head_dim)
        return (
            behind_norm("input_layernorm", "q_proj", "q_gate", "k_proj", "v_proj"),
            Fold(maker="v_proj", readers=("o_proj",), channels=values),
            *super().folds,
        )

    def mix(self, x: Tensor, first: Tensor, second: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        query = ops.head_rms_norm(self.q_proj(x), self.q_norm, heads, config.rms_norm_eps)
        key = ops.head_rms_norm(self.k_proj(x), self.k_norm, kv_heads, config.rms_norm_eps)
        attended, key, value = ops.group_query_attention(
            rec.partial_rotary(query, call.cos, call.sin, call.rows, heads),
            rec.partial_rotary(key, call.cos, call.sin, call.rows, kv_heads),
            self.v_proj(x),
            first,
            second,
            call.seqlens_k,
            call.total_sequence_length,
            num_heads=heads,
            kv_num_heads=kv_heads,
        )
        return attended * self.q_gate(x).sigmoid(), key, value


class DeltaNetLayer(HybridLayer):
    """A gated delta net: short convolution, then a memory of fixed size; its output is normalised and gated per head."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config, config.value_channels)
        width, heads = config.hidden_size, config.linear_value_heads
        self.in_proj_qkv = Linear(width, config.conv_channels, bias=False)
        self.in_proj_z = Linear(width, config.value_channels, bias=False)
        # One number a head, which sets how long it remembers: not worth quantizing.
        self.in_proj_a, self.in_proj_b = (Linear(width, heads, bias=False, quantizable=False) for _ in range(2))
        self.conv_taps = nn.Parameter(torch.empty(config.conv_kernel, config.conv_channels))
        self.dt_bias, self.decay_scale = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.norm = nn.Parameter(torch.empty(config.linear_value_dim))

    @property
    def folds(self) -> tuple[Fold, ...]:
        every_head = tuple(range(self.config.linear_value_dim)) * self.config.linear_value_heads
        return (
            behind_norm("input_layernorm", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
            Fold(maker="norm", readers=("o_proj",), gates=("in_proj_z",), channels=every_head),
            *super().folds,
        )

    def mix(self, x: Tensor, first: Tensor, second: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        key_heads, value_heads = config.linear_key_heads, config.linear_value_heads
        key_width = key_heads * config.linear_key_dim
        convolved, conv_state = rec.causal_conv(self.in_proj_qkv(x), self.conv_taps, first)
        query, key, value = ops.silu(convolved).split([key_width, key_width, config.value_channels], dim=-1)
        decay, strength = rec.linear_attention_gate(self.in_proj_a(x), self.dt_bias, self.decay_scale, self.in_proj_b(x))
        output, state = rec.gated_delta_rule(
            rec.head_l2_norm(query, key_heads),
            rec.head_l2_norm(key, key_heads),
            value,
            second,
            decay,
            strength,
            key_heads=key_heads,
            value_heads=value_heads,
        )
        normed = ops.head_rms_norm(output, self.norm, value_heads, config.rms_norm_eps)
        return normed * ops.silu(self.in_proj_z(x)), conv_state, state


_LAYERS: dict[LayerKind, type[FullAttentionLayer] | type[DeltaNetLayer]] = {
    "full_attention": FullAttentionLayer,
    "linear_attention": DeltaNetLayer,
}


def rotary_frequencies(config: HybridConfig) -> Tensor:
    """Radians per position of each rotated pair: [rotary_dim / 2] float32."""
    if config.frequencies:
        return torch.tensor(config.frequencies, dtype=torch.float32)
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    return 1.0 / config.rope_theta**exponents


def frequency_axes(config: HybridConfig) -> Tensor:
    """Axis (0 time, 1 row, 2 column) of each frequency: [rotary_dim / 2]. Rows take every third from 1 on, columns from 2."""
    axes = torch.zeros(config.rotary_dim // 2, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * config.mrope_section[axis] : 3] = axis
    return axes


def _row_numbers(input_ids: Tensor) -> Tensor:
    """[B, T] -> the flat index of each token, [B, T]."""
    return torch.arange(input_ids.shape[0] * input_ids.shape[1], device=input_ids.device).view_as(input_ids)
