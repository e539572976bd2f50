"""Rotary positions as configs spell them: transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).

The frequencies are those of the same names in `transformers.modeling_rope_utils`, in float32 and in its order of operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mcv_export import config as cfg
from mcv_runtime.errors import CheckpointError, shown

_LAYER_KINDS = ("full_attention", "sliding_attention", "linear_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions of one model."""

    theta: float
    dim: int
    """Components of a head that are rotated."""
    context: int
    """Positions that these frequencies are for."""
    frequencies: tuple[float, ...] = ()
    """Radians a position of each rotated pair, float32; empty where they are theta's own."""
    scale: float = 1.0
    """Multiplies cosine and sine."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The object of the config, for what else a family has in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    parameters: Mapping[str, Any]
    plain: Tensor
    wavelengths: Tensor
    theta: float
    context: int
    original: int


def rope(
    config: Mapping[str, Any],
    *,
    head_dim: int,
    theta: float | None = 10000.0,
    rotated: float = 1.0,
    layer_kinds: Collection[str] = ("full_attention",),
) -> Rope:
    """What a config says about rotary positions; `theta` and `rotated` (the part of a head) are the class's defaults.

    Raises `CheckpointError` for a kind that is not computed, and for two spellings that contradict each other.
    """
    parameters = _parameters(config, layer_kinds)
    base = _once(config, parameters, "rope_theta", theta)
    partial = _once(config, parameters, "partial_rotary_factor", rotated)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or (kind not in _SCALED and kind not in ("default", "dynamic")):
        known = ", ".join(["default", "dynamic", *_SCALED])
        raise CheckpointError(f"config has rotary positions of type {shown(kind)}; mcv knows {known}")
    dim, context = int(head_dim * partial), cfg.integer(config, "max_position_embeddings")
    if kind not in _SCALED:
        if kind == "dynamic":  # its frequencies change only beyond max_position_embeddings, where a bundle does not go
            cfg.number(parameters, "factor")
        return Rope(theta=base, dim=dim, context=context, parameters=parameters)
    original = cfg.integer(cfg.Overlay(config, parameters), "original_max_position_embeddings", context)
    wavelengths = base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    facts = _Facts(
        parameters=parameters, plain=1.0 / wavelengths, wavelengths=wavelengths, theta=base, context=context, original=original
    )
    frequencies, scale, context = _SCALED[kind](facts)
    return Rope(
        theta=base,
        dim=dim,
        context=context,
        frequencies=tuple(frequencies.tolist()),
        scale=scale,
        parameters=parameters,
    )


def _parameters(config: Mapping[str, Any], layer_kinds: Collection[str]) -> Mapping[str, Any]:
    """The one object with the parameters, also where each kind of layer has its own."""
    given = [found for key in ("rope_scaling", "rope_parameters") if (found := config.get(key))]
    if not all(isinstance(one, Mapping) for one in given):
        raise CheckpointError(f"config has rotary positions {shown(given)}, which are not an object")
    parameters = _same(given, "in rope_scaling and in rope_parameters")
    own = [kind for kind in _LAYER_KINDS if kind in parameters]
    if not own:
        return parameters
    used = [kind for kind in layer_kinds if kind != "linear_attention"]
    for kind in own:
        if kind not in used and isinstance(parameters[kind], cfg.Config):
            parameters[kind].pass_over()  # no layer is of this kind
    return _same([cfg.section(parameters, kind) for kind in used], "for each kind of layer")


def _same(given: Sequence[Mapping[str, Any]], where: str) -> Mapping[str, Any]:
    """Several objects that must be one."""
    if any(one != given[0] for one in given):
        raise CheckpointError(f"config has other rotary positions {where}; mcv knows one for all")
    return cfg.Overlay(*given) if given else {}


def _once(config: Mapping[str, Any], parameters: Mapping[str, Any], key: str, default: float | None) -> float:
    """A number that may stand in both places, with one value."""
    inside, outside = (cfg.number(place, key) if key in place else None for place in (parameters, config))
    if inside is not None and outside is not None and inside != outside:
        raise CheckpointError(f"config has {key}={outside} and, with the rotary positions, {inside}; keep the right one")
    found = inside if inside is not None else outside
    return found if found is not None else cfg.number({}, key, default)


def _linear(facts: _Facts) -> tuple[Tensor, float, int]:
    return facts.plain / cfg.number(facts.parameters, "factor"), 1.0, facts.context


def _llama3(facts: _Facts) -> tuple[Tensor, float, int]:
    """Long wavelengths are stretched, short ones not, those between partly."""
    factor = cfg.number(facts.parameters, "factor")
    low, high = (cfg.number(facts.parameters, f"{name}_freq_factor") for name in ("low", "high"))
    if low >= high:
        raise CheckpointError(f"config has low_freq_factor={low}, which is not below high_freq_factor={high}")
    lengths = 2 * math.pi / facts.plain
    stretched = torch.where(lengths > facts.original / low, facts.plain / factor, facts.plain)
    part = (facts.original / lengths - low) / (high - low)
    between = ~(lengths < facts.original / high) & ~(lengths > facts.original / low)
    return torch.where(between, (1 - part) * stretched / factor + part * stretched, stretched), 1.0, facts.context


def _yarn(facts: _Facts) -> tuple[Tensor, float, int]:
    """https://arxiv.org/abs/2309.00071; it is there for contexts up to `factor` times the original one."""
    parameters, dim = facts.parameters, 2 * len(facts.plain)
    factor = cfg.number(parameters, "factor", facts.context / facts.original)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    def dimension(turns: float) -> float:
        """The (fractional) component that turns so often in the original context."""
        return (dim * math.log(facts.original / (turns * 2 * math.pi))) / (2 * math.log(facts.theta))

    scale = magnitude(1)
    if "mscale" in parameters and "mscale_all_dim" in parameters:
        weights = [cfg.number(parameters, key) if parameters[key] else 0.0 for key in ("mscale", "mscale_all_dim")]
        if all(weights):
            scale = magnitude(weights[0]) / magnitude(weights[1])
    scale = cfg.number(parameters, "attention_factor", scale)
    low, high = dimension(cfg.number(parameters, "beta_fast", 32)), dimension(cfg.number(parameters, "beta_slow", 1))
    if cfg.flag(parameters, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    frequencies = 1.0 / (factor * facts.wavelengths) * (1 - kept) + facts.plain * kept
    return frequencies, scale, max(facts.context, int(facts.original * factor))


def _longrope(facts: _Facts) -> tuple[Tensor, float, int]:
    """https://arxiv.org/abs/2402.13753, the short factors.

    The long ones begin past the original context and would change every earlier key: a bundle ends there.
    """
    parameters, wanted = facts.parameters, len(facts.plain)
    short, _ = (_factors(parameters, key, wanted) for key in ("short_factor", "long_factor"))
    factor = cfg.number(parameters, "factor", facts.context / facts.original)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(facts.original))
    frequencies = 1.0 / (torch.tensor(short, dtype=torch.float32) * facts.wavelengths)
    return frequencies, cfg.number(parameters, "attention_factor", scale), min(facts.context, facts.original)


def _factors(parameters: Mapping[str, Any], key: str, wanted: int) -> tuple[float, ...]:
    factors = cfg.numbers(parameters, key)
    if len(factors) != wanted or min(factors) <= 0:
        raise CheckpointError(f"config has {len(factors)} {key} values, not {wanted} positive ones for the rotary frequencies")
    return factors


_SCALED: Mapping[str, Callable[[_Facts], tuple[Tensor, float, int]]] = {
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
