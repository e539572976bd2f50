"""ONNX Runtime's fused operators as torch functions with two bodies.

Under `emitting()` a function puts the operator itself into the traced graph, so no fusion pass has to find it
afterwards. Otherwise it computes the same in plain torch: that body trains, and is the oracle the graph is checked against.
Operator definitions: onnxruntime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

_Emitted: TypeAlias = dict[Any, tuple[Tensor, ...]]
_EMITTING: ContextVar[_Emitted | None] = ContextVar("mcv_graphs_emitting", default=None)


@contextmanager
def emitting() -> Iterator[None]:
    """Trace inside this context to get ONNX Runtime operators instead of their torch equivalents."""
    token = _EMITTING.set({})
    try:
        yield
    finally:
        _EMITTING.reset(token)


def emits() -> bool:
    """Whether a function called now shall put an operator into a graph."""
    return _EMITTING.get() is not None


def emit_once(key: Any, x: Tensor, made: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `made` makes of x, in the graph once however many layers read x: a graph takes long to trace by its nodes."""
    known = _EMITTING.get()
    assert known is not None
    if (key, id(x)) not in known:
        known[key, id(x)] = (x, *made(x))  # with x, so that nothing else gets its id
    return known[key, id(x)][1:]


def to_float(x: Tensor) -> Tensor:
    """x in float32. The exporter knows this operator, but `to` only once it has taken the whole graph apart."""
    return torch.ops.aten._to_copy(x, dtype=torch.float32)


def emit(op: str, inputs: Sequence[Tensor | None], shapes: Sequence[Sequence[Any]], /, **attributes: Any) -> Sequence[Tensor]:
    """Emit `op`; every output has the first input's element type unless that is an integer, then float32."""
    first = inputs[0]
    assert first is not None
    dtype = first.dtype if first.dtype.is_floating_point else torch.float32
    return torch.onnx.ops.symbolic_multi_out(
        op, inputs, attributes, dtypes=[dtype] * len(shapes), shapes=shapes, version=1 if "::" in op else None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis."""
    if emits():
        return emit("SimplifiedLayerNormalization", (x, weight), [x.shape], axis=-1, epsilon=eps, stash_type=1)[0]
    return F.rms_norm(x, weight.shape, weight, eps)


def skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`s = x + skip`; returns `(rms_norm(s), s)`, both of x's shape [..., width]."""
    if emits():
        inputs = (x, skip, weight)
        normed, _, _, total = emit(
            "com.microsoft::SkipSimplifiedLayerNormalization", inputs, [x.shape, (1,), (1,), x.shape], epsilon=eps
        )
        return normed, total
    total = x + skip
    return F.rms_norm(total, weight.shape, weight, eps), total


def head_rms_norm(x: Tensor, weight: Tensor, num_heads: int, eps: float) -> Tensor:
    """RMS norm of each head on its own: x [B, T, heads * D], weight [D] shared by the heads -> [B, T, heads * D]."""
    if emits():
        return emit("com.microsoft::BranchwiseRMSNorm", (x, weight), [x.shape], num_branches=num_heads, epsilon=eps)[0]
    heads = x.unflatten(-1, (num_heads, -1))
    return F.rms_norm(heads, weight.shape, weight, eps).flatten(-2)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    if emits():
        return emit("com.microsoft::FastGelu", (x,), [x.shape])[0]
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """GELU by the error function."""
    if emits():
        return emit("com.microsoft::Gelu", (x,), [x.shape])[0]
    return F.gelu(x)


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`."""
    if emits():
        return emit("com.microsoft::QuickGelu", (x,), [x.shape], alpha=1.0)[0]
    return F.silu(x)


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Unmasked attention, scale `head_dim ** -0.5`: query [B, Q, W], key and value [B, L, W] -> [B, Q, W]."""
    if emits():
        inputs = (query, key, value)
        return emit("com.microsoft::MultiHeadAttention", inputs, [query.shape], num_heads=num_heads)[0]
    query, key, value = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal grouped-query attention with a cache, and with rotary positions unless query and key carry theirs already.

    query [B, T, heads * D], key and value [B, T, kv_heads * D], or all three packed into `query`; past_key and past_value
    [B, kv_heads, S, D]; seqlens_k [B] int32: valid keys after this call, minus 1; total_sequence_length [1] int32: the
    largest of them plus 1; cos and sin [positions, D / 2]. Returns the attention output [B, T, heads * D] and the keys and
    values, which the operator writes into the same buffer when past and present are bound to one.

    The torch body takes an empty cache (S = 0) or one that all rows have filled equally far, S then being that length.
    """
    batch, length, _ = query.shape
    head_dim = past_key.shape[3]
    if emits():
        present = (past_key.shape[0], kv_num_heads, past_key.shape[2], head_dim)
        inputs = (query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos, sin)
        output, key, value = emit(
            "com.microsoft::GroupQueryAttention",
            inputs,
            [(batch, length, num_heads * head_dim), present, present],
            num_heads=num_heads,
            kv_num_heads=kv_num_heads,
            do_rotary=int(cos is not None),
        )
        return output, key, value
    past = past_key.shape[2]
    if key is None or value is None:
        query, key, value = query.split([heads * head_dim for heads in (num_heads, kv_num_heads, kv_num_heads)], dim=-1)
    query, key, value = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (query, key, value))
    if cos is not None and sin is not None:
        cos, sin = cos[past : past + length], sin[past : past + length]
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    causal = past == 0
    if past:
        key, value = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
    mask = None if causal else torch.ones(length, past + length, dtype=torch.bool, device=query.device).tril(past)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=num_heads != kv_num_heads
    )
    return output.transpose(1, 2).flatten(2), key, value


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired (j, j + D/2): x [B, heads, T, D], cos and sin [T, D/2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def matmul_nbits(
    x: Tensor, qweight: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, *, bits: int, block_size: int
) -> Tensor:
    """`x @ W + bias` with W block-quantized along its input width: x [..., K] -> [..., N].

    qweight uint8 [N, blocks, block_size * bits / 8], two 4-bit values a byte, low half first; scales [N, blocks];
    zero_points uint8 [N, ceil(blocks * bits / 8)], absent = 2 ** (bits - 1). `accuracy_level=4` computes in int8, each block of
    x rounded to 127 levels a side: 17 times faster than 0.
    """
    width, out = x.shape[-1], qweight.shape[0]
    if emits():
        inputs = (x, qweight, scales, zero_points, None, bias)
        attributes = {"K": width, "N": out, "bits": bits, "block_size": block_size, "accuracy_level": 4}
        return emit("com.microsoft::MatMulNBits", inputs, [(*x.shape[:-1], out)], **attributes)[0]
    weight = dequantize(qweight, scales, zero_points, bits)[:, :width]
    return F.linear(_rounded_blocks(x, block_size), weight, bias)


def gather_block_quantized(
    table: Tensor, indices: Tensor, scales: Tensor, zero_points: Tensor | None, *, bits: int, block_size: int
) -> Tensor:
    """Rows of a block-quantized table: table uint8 [rows, width * bits / 8], indices [...] -> [..., width] float32."""
    width = table.shape[1] * 8 // bits
    if emits():
        inputs = (table, indices, scales, zero_points)
        attributes = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
        return emit("com.microsoft::GatherBlockQuantized", inputs, [(*indices.shape, width)], **attributes)[0]
    wanted = indices.flatten()
    zeros = None if zero_points is None else zero_points[wanted]
    rows = dequantize(table[wanted].unflatten(1, (scales.shape[1], -1)), scales[wanted], zeros, bits)
    return rows.unflatten(0, indices.shape)


def tied_logits(x: Tensor, table: Tensor) -> Tensor:
    """Scores of every row of an embedding table, read as it lies: x [R, width], table [rows, width] -> [R, rows]."""
    if emits():
        return emit("Gemm", (x, table), [(x.shape[0], table.shape[0])], transB=1)[0]
    return F.linear(x, table)


def _rounded_blocks(x: Tensor, block_size: int) -> Tensor:
    """x [..., K] as the operator sees it: each block of K rounded to multiples of a 127th of its largest value."""
    padding = -x.shape[-1] % block_size
    blocks = F.pad(x, (0, padding)).unflatten(-1, (-1, block_size))
    steps = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(steps > 0, 1 / steps, torch.zeros_like(steps))
    return ((blocks * inverse).round_() * steps).flatten(-2)[..., : x.shape[-1]]


def dequantize(qweight: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int) -> Tensor:
    """qweight uint8 [N, blocks, bytes], scales [N, blocks] -> float32 [N, blocks * block_size]."""
    values = _unpack(qweight, bits)
    if zero_points is None:
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        zeros = _unpack(zero_points, bits)[:, : scales.shape[1]].to(scales.dtype)
    return ((values - zeros[..., None]) * scales[..., None]).flatten(1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The values of the last axis, as float32; 4-bit values come low half first."""
    if bits == 8:
        return packed.float()
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).float()
