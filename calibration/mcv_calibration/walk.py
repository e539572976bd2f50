"""All samples through a decoder one layer at a time, so that a layer's weights are in memory once and not per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mcv_graphs.contract import GraphIO
from mcv_graphs.decoder import Decoder
from mcv_graphs.hybrid_decoder import HybridDecoder
from mcv_graphs.layer_state import LayerState
from mcv_graphs.layers import Linear

AnyDecoder: TypeAlias = Decoder | HybridDecoder
State: TypeAlias = LayerState[Any]
Visit: TypeAlias = Callable[[str, Callable[[], None]], AbstractContextManager[None]]
"""Called with the path of a layer, and a function that runs all samples through it for whoever observes it."""


def start(decoder: AnyDecoder, io: GraphIO, feed: Mapping[str, NDArray[Any]]) -> State:
    """A sample in front of the first layer; `feed` is what a session of the graph would be fed, caches included.

    A state takes 8 bytes for each of T * hidden values, and is all that is kept of a sample. Behind the last layer's mixture
    over time only `logit_positions` go on, so ask for all positions if that layer shall see as much as the others.
    """
    # torch warns of what it might write to, such as a picture's kept embeddings
    tensors = {name: torch.from_numpy(np.require(value, requirements="W")) for name, value in feed.items()}
    begin: Callable[..., State] = decoder.start  # the two decoders take their inputs in different orders: in io's
    return begin(*(tensors[name] for name in io.inputs), [tensors[entry.input] for entry in io.cache])


def walk(decoder: AnyDecoder, states: Sequence[State], visit: Visit) -> list[State]:
    """Visit each layer, `layers.0` first, then `lm_head`; the samples go on through a layer inside its visit's context.

    Returns the states in front of `lm_head`.
    """
    here = list(states)
    for index in range(len(decoder.layers)):
        block = _block(decoder, index)

        def run(block: Callable[[State], State] = block) -> None:
            for state in here:
                block(state)

        with visit(f"layers.{index}", run):
            for number, state in enumerate(here):
                here[number] = block(state)

    def finish() -> None:
        for state in here:
            decoder.finish(state)

    with visit("lm_head", finish):
        return here


@contextmanager
def held(module: nn.Module, weights: Mapping[str, NDArray[np.float32]]) -> Iterator[None]:
    """Put linears with these weights [N, K] in the place of the module's own, whatever those read their weights from."""
    own = {path: cast(Linear, module.get_submodule(path)) for path in weights}
    try:
        for path, rows_NK in weights.items():
            with torch.device("meta"):
                layer = Linear(own[path].in_features, own[path].out_features, bias=False)
            layer.weight = nn.Parameter(torch.from_numpy(rows_NK).T, requires_grad=False)
            layer.bias = own[path].bias
            module.set_submodule(path, layer)
        yield
    finally:
        for path, layer in own.items():
            module.set_submodule(path, layer)


def _block(decoder: AnyDecoder, index: int) -> Callable[[State], State]:
    """A layer, without the caches that it leaves."""
    return lambda state: replace(decoder.block(index, state), present=[])
