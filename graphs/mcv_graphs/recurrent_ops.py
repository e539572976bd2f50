"""The operators of a gated delta net and of partly rotated, separately normalised attention, with the two bodies of `ops`.

What is here as plain torch in both bodies was measured: on CPUs the fused CausalConvWithState and GatedRMSNorm are slower
than the same in small operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mcv_graphs.ops import emit, emits, head_rms_norm


def head_l2_norm(x: Tensor, num_heads: int, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(sum(x^2) + eps)` of each head, as the RMS norm that it is: [B, T, heads * D] -> the same shape."""
    width = x.shape[-1] // num_heads
    weight = torch.full((width,), width**-0.5, dtype=x.dtype, device=x.device)
    return head_rms_norm(x, weight, num_heads, eps / width)


def causal_conv(x: Tensor, taps: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise convolution over time: each position sees itself (the last tap) and the positions before it.

    x [B, T, C], taps [K, C], past [B, K - 1, C] the inputs before x. Returns [B, T, C] and the next call's `past`.
    """
    reach = taps.shape[0] - 1
    seen = torch.cat((past, x), dim=1)
    total = seen[:, reach:] * taps[reach]
    for back in range(1, reach + 1):
        total = total + seen[:, reach - back : -back] * taps[reach - back]
    return total, seen[:, -reach:]


def linear_attention_gate(a: Tensor, dt_bias: Tensor, decay_scale: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay `decay_scale * softplus(a + dt_bias)` and write strength `sigmoid(b)`, all [B, T, heads]."""
    if emits():
        inputs = (a, dt_bias, decay_scale, b)
        decay, strength = emit("com.microsoft::LinearAttentionGate", inputs, [a.shape, a.shape])
        return decay, strength
    return decay_scale * F.softplus(a + dt_bias), b.sigmoid()


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor,
    decay: Tensor,
    strength: Tensor,
    *,
    key_heads: int,
    value_heads: int,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a forgetting, self-correcting memory (arXiv:2412.06464).

    query and key [B, T, key_heads * dk], L2-normalised; value [B, T, value_heads * dv]; past_state [B, value_heads, dk, dv];
    decay (in log space) and strength [B, T, value_heads]. Returns [B, T, value_heads * dv] and the new state. Each key head
    serves `value_heads / key_heads` consecutive value heads.
    """
    scale = (query.shape[-1] // key_heads) ** -0.5
    if emits():
        inputs = (query, key, value, past_state, decay, strength)
        output, state = emit(
            "com.microsoft::LinearAttention",
            inputs,
            [value.shape, past_state.shape],
            q_num_heads=key_heads,
            kv_num_heads=value_heads,
            update_rule="gated_delta",
            scale=scale,
        )
        return output, state
    repeats = value_heads // key_heads
    query, key = (t.unflatten(-1, (key_heads, -1)).repeat_interleave(repeats, dim=2) for t in (query * scale, key))
    value = value.unflatten(-1, (value_heads, -1))
    state, outputs = past_state, []
    for t in range(value.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], error * strength[:, t, :, None])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, dim=1).flatten(2), state


def partial_rotary(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, num_heads: int) -> Tensor:
    """Rotate the first 2 R channels of each head, paired (j, j + R): x [B, T, heads * D], cos and sin [B * T, R].

    `rows` [B, T] says which row of the tables belongs to a token.
    """
    rotated = 2 * cos.shape[-1]
    if emits():
        inputs = (x, rows, cos, sin)
        attributes = {"num_heads": num_heads, "rotary_embedding_dim": rotated, "interleaved": 0}
        return emit("com.microsoft::RotaryEmbedding", inputs, [x.shape], **attributes)[0]
    heads = x.unflatten(-1, (num_heads, -1))
    cos, sin = cos[rows].unsqueeze(2), sin[rows].unsqueeze(2)
    low, high, rest = heads.tensor_split((rotated // 2, rotated), dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1).flatten(-2)
