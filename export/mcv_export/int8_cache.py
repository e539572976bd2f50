"""A second decoder graph whose keys and values are kept in 8 bits: a quarter of the memory, and less to read at every step.

It is the first one's graph and reads the same weights; only the type of the cache differs, and each attention gets the scales
of its keys and values. They come from samples that go through the decoder in float. Samples are short, contexts are not: later
positions turn the same pairs of a key's channels further, and keep their length, which is what is measured of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from mcv_calibration.measured import Measured
from mcv_calibration.samples import Sample
from mcv_calibration.walk import AnyDecoder, held, start
from mcv_export.checkpoint import Checkpoint
from mcv_export.eager import eager_module
from mcv_export.graph_files import Progress
from mcv_export.oracle import prompt_feed
from mcv_export.plan import GraphPlan
from mcv_export.sources import resolve
from mcv_export.storage import Storage
from mcv_graphs.folds import folds
from mcv_graphs.layers import Linear
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import CacheEntry, GraphSpec, TensorSpec
from mcv_runtime.engine import load
from mcv_runtime.errors import CheckpointError, McvError

Cache: TypeAlias = "Mapping[str, NDArray[np.float32]]"
"""Keys and values of one sample in one layer by their input of the decoder: [kv_heads, tokens, head_dim]."""
_ATTENTION = "GroupQueryAttention"
_K_SCALE, _V_SCALE = 12, 13
"""Places among the operator's inputs (onnxruntime's ContribOperators.md)."""
_PAST = (3, 4)
_KEY, _COS = 1, 7
HEADROOM = 1.1
"""Of the largest value that was seen: later ones may be larger, and a tenth of 127 levels costs little."""


def add_int8_cache(
    folder: Path, graph: GraphPlan, checkpoint: Checkpoint, measured: Measured, samples: Sequence[Sample], progress: Progress
) -> Path:
    """Write the graph into the bundle `folder`, which does not name it yet; returns its path.

    `graph` is the decoder, `measured` what went into the bundle's own.
    """
    bundle = Bundle.open(folder)
    decoder = bundle.graph("decoder_with_past")
    model = ir.load(decoder)
    attentions = [node for node in model.graph if node.op_type == _ATTENTION]
    caches = read_samples(bundle, graph, checkpoint, measured, samples, progress)
    peaks = cache_peaks(caches, rotated_channels(attentions))
    for node in attentions:
        _keep_in_int8(model, node, peaks)
    path = decoder.with_name(decoder.name.replace("decoder_with_past", "decoder_with_past_kv8"))
    ir.save(model, path)
    return path


def cache_peaks(caches: Iterable[Cache], rotated: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    """The largest magnitude that each channel of each key and value can have, by input: [kv_heads, head_dim].

    `rotated`: so many of a key's first channels are turned by its position. Raises `CheckpointError` for no caches.
    """
    peaks: dict[str, NDArray[np.float32]] = {}
    for cache in caches:
        for name, values in cache.items():
            peaks[name] = np.maximum(peaks.get(name, 0), reach(values, rotated.get(name, 0)).max(axis=1))
    if not peaks:
        raise CheckpointError("no sample could be read to find the range of keys and values; give others with --calibration")
    return peaks


def reach(values_HTD: NDArray[np.float32], rotated: int) -> NDArray[np.float32]:
    """What each value may become at other positions: its pair's length, (j, j + R) in the first 2 R = `rotated` channels."""
    low, high, rest = np.split(values_HTD, (rotated // 2, rotated), axis=-1)
    length = np.hypot(low, high)
    return np.concatenate((length, length, np.abs(rest)), axis=-1)


def rotated_channels(attentions: Iterable[ir.Node]) -> dict[str, int]:
    """How many channels of a head rotary positions turn, by the name of the keys' cache: in the operator, or before it."""
    rotated = {}
    for node in attentions:
        past, key, cos = node.inputs[_PAST[0]], node.inputs[_KEY], node.inputs[_COS] if len(node.inputs) > _COS else None
        assert past is not None and past.name is not None
        if node.attributes.get_int("do_rotary", 0):
            assert cos is not None and cos.shape is not None
            rotated[past.name] = 2 * cos.shape.numpy()[1]
        elif key is not None and (before := key.producer()) is not None and before.op_type == "RotaryEmbedding":
            rotated[past.name] = before.attributes.get_int("rotary_embedding_dim", 0)
    return rotated


def read_samples(
    bundle: Bundle,
    graph: GraphPlan,
    checkpoint: Checkpoint,
    measured: Measured,
    samples: Sequence[Sample],
    progress: Progress = lambda *_: None,
) -> Iterator[Cache]:
    """What each layer of the decoder keeps of each sample, of a picture's overview alone.

    Samples that cannot be read are left out. Pictures are encoded by the bundle; then all samples go through the checkpoint's
    decoder together, one of whose layers is in memory at a time, in float, where a session would hold all of them twice.
    """
    measured = replace(measured, smoothing=_folded(graph, measured))  # what else is smoothed is so by a product, here left out
    module = cast(AnyDecoder, eager_module(graph, checkpoint, measured=measured))
    sources = resolve(graph, checkpoint, Storage(measured=measured))
    with torch.inference_mode():
        states = [start(module, graph.io, feed) for feed in _questions(bundle, samples)]
    count = len(module.layers)
    linears = [path for path, child in module.named_modules() if isinstance(child, Linear)]
    for index in range(count):
        progress("decoder_with_past_kv8", index, count)
        weights = {path: sources[f"{path}.weight"].all() for path in linears if path.startswith(f"layers.{index}.")}
        with held(module, weights):
            for number, state in enumerate(states):
                with torch.inference_mode():
                    beyond = module.block(index, state)
                states[number] = replace(beyond, present=[])
                entries = zip(graph.io.cache[2 * index :], beyond.present, strict=False)
                yield {entry.input: kept[0].numpy() for entry, kept in entries if entry.grows}
    progress("decoder_with_past_kv8", count, count)


def _questions(bundle: Bundle, samples: Sequence[Sample]) -> Iterator[dict[str, NDArray[Any]]]:
    """What the decoder is given to read each sample."""
    engine = load(bundle.folder, reuse=False)
    for sample in samples:
        try:
            pictures = [engine.encode_image(image, max_slice_nums=1) for image in sample.images]
            prompt = engine.prompt([{"role": "user", "content": [*pictures, sample.prompt]}])
        except McvError:
            continue
        yield prompt_feed(bundle.manifest, prompt, [picture.embeds for picture in pictures], np.array([0]))


def _folded(graph: GraphPlan, measured: Measured) -> dict[str, NDArray[np.float32]]:
    """The factors that another layer's weight has taken in."""
    with torch.device("meta"):
        free = {layer for fold in folds(graph.module()) if fold.free for layer in fold.readers}
    return {path: factors for path, factors in measured.smoothing.items() if path in free}


def int8_cache_spec(spec: GraphSpec, file: str, cache: Sequence[CacheEntry]) -> GraphSpec:
    """What the manifest says of it."""
    names = {name for entry in cache if entry.grows for name in (entry.input, entry.output)}

    def in_int8(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(dtype="int8", shape=t.shape) if name in names else t for name, t in tensors.items()}

    return GraphSpec(file=file, precision=spec.precision, inputs=in_int8(spec.inputs), outputs=in_int8(spec.outputs))


def _keep_in_int8(model: ir.Model, node: ir.Node, peaks: Mapping[str, NDArray[np.float32]]) -> None:
    """One attention's cache, its inputs and outputs included."""
    node.resize_inputs(_V_SCALE + 1)
    for place, scale_place in zip(_PAST, (_K_SCALE, _V_SCALE), strict=True):
        past = node.inputs[place]
        assert past is not None and past.name is not None
        past.dtype = ir.DataType.INT8
        scales = np.maximum(peaks[past.name] * (HEADROOM / 127), np.finfo(np.float32).tiny)[None, :, None]
        value = ir.Value(
            name=f"{past.name}.scale",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(scales.shape),
            const_value=ir.tensor(scales.astype(np.float32), name=f"{past.name}.scale"),
        )
        model.graph.initializers[f"{past.name}.scale"] = value
        node.replace_input_with(scale_place, value)
    for present in node.outputs[1:3]:
        present.dtype = ir.DataType.INT8
    for name, setting in (("k_quant_type", "PER_CHANNEL"), ("v_quant_type", "PER_CHANNEL")):
        node.attributes[name] = ir.AttrString(name, setting)
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
