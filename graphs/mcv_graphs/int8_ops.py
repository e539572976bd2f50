"""Products of 8-bit integers, with the two bodies of `ops`: the plain one rounds as the operators do, so that the two agree.

A weight is int8 [K, N] with a scale for each output channel and no zero point. On x86 the fast kernels take uint8 activations
and int8 weights; both signed was twelve times slower there.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mcv_graphs.ops import emit_once, emits

_LEVELS = 255
_MAGNITUDES = 127
_LEAST_PEAK = 1e-30
"""A row of zeros is divided by it."""


def static_matmul(
    x: Tensor, qweight: Tensor, weight_scales: Tensor, input_scale: Tensor, input_zero_point: Tensor, bias: Tensor | None
) -> Tensor:
    """`x @ W + bias`, x rounded to 8 bits in a range that is known beforehand: x [..., K] -> [..., N].

    input_scale [] float32; input_zero_point [], uint8 or int8, whose type the rounded x has.
    """
    if emits():
        dtype, shape = input_zero_point.dtype, (*x.shape[:-1], qweight.shape[1])
        inputs = (x, input_scale, input_zero_point)
        rounded = torch.onnx.ops.symbolic("QuantizeLinear", inputs, dtype=dtype, shape=x.shape)
        operands = (rounded, qweight, input_scale, weight_scales, input_zero_point, None, bias)
        name = "com.microsoft::MatMulIntegerToFloat"
        return torch.onnx.ops.symbolic(name, operands, dtype=torch.float32, shape=shape, version=1)
    limits = torch.iinfo(input_zero_point.dtype)
    zero = input_zero_point.float()
    steps = (x / input_scale).round_().add_(zero).clamp_(limits.min, limits.max).sub_(zero)
    return _scaled(steps, qweight, input_scale * weight_scales, bias)


def token_matmul(x: Tensor, qweight: Tensor, weight_scales: Tensor, bias: Tensor | None, *, signed: bool = False) -> Tensor:
    """`x @ W + bias`, each row of x rounded to 8 bits of its own largest magnitude: x [..., K] -> [..., N].

    `signed`: to int8 rather than uint8. One range, not the two ends: a row's own zero point would have to be taken out again.
    """
    if emits():
        rows, rounded, scales = emit_once(("rows", signed), x, partial(_rounded_rows, signed=signed))
        operands = (rounded, qweight, torch.ones(()), weight_scales, torch.full((), _zero(signed), dtype=rounded.dtype))
        name, shape = "com.microsoft::MatMulIntegerToFloat", (rows.shape[0], qweight.shape[1])
        y = torch.onnx.ops.symbolic(name, operands, dtype=torch.float32, shape=shape, version=1)
        y = y.view(*x.shape[:-1], qweight.shape[1]) * scales
    else:
        scales = _row_scales(x)
        y = _scaled((x / scales).round_(), qweight, weight_scales, None) * scales
    return y if bias is None else y + bias


def _row_scales(x: Tensor) -> Tensor:
    peaks = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    return peaks.clamp_min(_LEAST_PEAK) / _MAGNITUDES


def _rounded_rows(x: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., K] as rows [R, K], these rounded, and their scales [..., 1]."""
    dtype, scales, rows = torch.int8 if signed else torch.uint8, _row_scales(x), x.reshape(-1, x.shape[-1])
    inputs = (rows, scales.flatten(), torch.full((rows.shape[0],), _zero(signed), dtype=dtype))
    return rows, torch.onnx.ops.symbolic("QuantizeLinear", inputs, {"axis": 0}, dtype=dtype, shape=rows.shape), scales


def _zero(signed: bool) -> int:
    return 0 if signed else 128


def dynamic_matmul(x: Tensor, qweight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ W + bias`, x rounded to 8 bits in the range that it has in this call, all of it together: [..., K] -> [..., N]."""
    if emits():
        operands = (x, qweight, weight_scales, None, bias)
        name, shape = "com.microsoft::DynamicQuantizeMatMul", (*x.shape[:-1], qweight.shape[1])
        return torch.onnx.ops.symbolic(name, operands, dtype=torch.float32, shape=shape, version=1)
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], qweight.shape[1])
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / _LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round()
    steps = (x / scale).round_().add_(zero).clamp_(0, _LEVELS).sub_(zero)
    return _scaled(steps, qweight, scale * weight_scales, bias)


def _scaled(steps: Tensor, qweight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    y = (steps @ qweight.float()) * scales
    return y if bias is None else y + bias
