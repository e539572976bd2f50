"""GPTQ of a decoder, layer by layer: each layer sees its samples as the quantized layers before it left them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mcv_calibration.block_store import BlockStore
from mcv_calibration.blocks import Blocks, dequantize_rows
from mcv_calibration.gptq import gptq
from mcv_calibration.moments import second_moments
from mcv_calibration.walk import AnyDecoder, State, held, walk
from mcv_graphs.layers import Linear, WeightFormat
from mcv_runtime.errors import OptionError

Weight = Callable[[str], NDArray[np.float32]]
"""The float weight [N, K] of a linear by its path."""


@torch.inference_mode()
def quantize_layers(
    decoder: AnyDecoder,
    states: Sequence[State],
    weight: Weight,
    formats: Mapping[str, WeightFormat],
    folder: Path,
    *,
    damping: float = 0.01,
    progress: Callable[[str], None] = lambda layer: None,
) -> Mapping[str, Blocks]:
    """Quantize the linears that `formats` names; the decoder is left as it was.

    Each layer's blocks are written to `folder` and read from there when asked for. A walk that finds a layer in it goes on
    behind that one, so the folder's name should be a hash of all that goes in: weights, samples, formats and damping.
    In memory are the states, one layer in float, its second moments, and what `gptq` needs for one linear. `progress` gets
    the path of each layer that is done. Raises `OptionError` for a path that is no linear of a layer, nor `lm_head`.
    """
    widths: dict[str, int] = {}
    for path in formats:
        linear = decoder.get_submodule(path) if path == "lm_head" or path.startswith("layers.") else None
        if not isinstance(linear, Linear):
            raise OptionError(f"GPTQ quantizes the linears of a decoder's layers, and {path} is none; give it another method")
        widths[path] = linear.in_features
    store = BlockStore(folder)

    @contextmanager
    def visit(layer: str, run: Callable[[], None]) -> Iterator[None]:
        mine = {path for path in formats if path == layer or path.startswith(f"{layer}.")}
        if not mine:
            yield
            return
        if not store.find(layer, mine):
            with held(decoder, {path: weight(path) for path in mine}), second_moments(decoder, mine) as moments:
                run()
            blocks = {path: gptq(weight(path), moments.pop(path), formats[path], damping) for path in sorted(mine)}
            store.write(layer, blocks)
        with held(decoder, {path: dequantize_rows(store[path], formats[path], widths[path]) for path in mine}):
            yield
        progress(layer)

    walk(decoder, states, visit)
    return store
