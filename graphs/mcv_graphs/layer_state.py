"""What a decoder hands from one layer to the next, so that a caller may stop in between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

Call = TypeVar("Call")


class Norm(Protocol):
    def skip(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]: ...


class Layer(Protocol):
    """The part of a layer that follows its mixture over time."""

    post_attention_layernorm: Any
    o_proj: Any

    def mlp(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerState(Generic[Call]):
    """Between two layers.

    `x` [B, T, hidden] is the sum of what all layers before added and `normed` the same after the coming layer's norm; behind
    the last layer both have the wanted positions only, [R, hidden]. `past` are the caches of all layers, `present` those of
    the layers done; `call` is whatever the decoder's layers share.
    """

    normed: Tensor
    x: Tensor
    logit_positions: Tensor
    past: list[Tensor]
    present: list[Tensor]
    call: Call

    def through(
        self, layer: Layer, mixed: Tensor, present: tuple[Tensor, Tensor], norm: Norm, *, last: bool
    ) -> LayerState[Call]:
        """Behind `layer`, which mixed `normed` into `mixed`; `norm` is the coming layer's."""
        x = self.x
        if last:  # only the wanted positions go through the last layer's remaining, wider part
            mixed, x = (t.flatten(0, 1).index_select(0, self.logit_positions) for t in (mixed, x))
        normed, x = layer.post_attention_layernorm.skip(x, layer.o_proj(mixed))
        normed, x = norm.skip(x, layer.mlp(normed))
        return replace(self, normed=normed, x=x, present=[*self.present, *present])
