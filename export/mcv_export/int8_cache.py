"""A second decoder graph whose keys and values are kept in 8 bits: a quarter of the memory, and less to read at every step.

It is the first one's graph and reads the same weights; only the type of the cache differs, and each attention gets the scales
of its keys and values. They come from samples that were read by the first graph itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mcv_calibration.samples import Sample
from mcv_export.graph_files import Progress
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import CacheEntry, GraphSpec, TensorSpec
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.row import prompt_keys
from mcv_runtime.engine import load
from mcv_runtime.errors import CheckpointError, McvError
from mcv_runtime.sessions.graphs import cpu_session, session_options

_ATTENTION = "GroupQueryAttention"
_K_SCALE, _V_SCALE = 12, 13
"""Places among the operator's inputs (onnxruntime's ContribOperators.md)."""
_PAST = (3, 4)
_HEADROOM = 1.1
"""Of the largest value that was seen: later ones may be larger, and a tenth of 127 levels costs little."""


def add_int8_cache(folder: Path, samples: Sequence[Sample], progress: Progress) -> Path:
    """Write the graph into the bundle `folder`, which does not name it yet; returns its path."""
    bundle = Bundle.open(folder)
    peaks = cache_peaks(bundle, samples, progress)
    decoder = bundle.graph("decoder_with_past")
    model = ir.load(decoder)
    for node in model.graph:
        if node.op_type == _ATTENTION:
            _keep_in_int8(model, node, peaks)
    path = decoder.with_name(decoder.name.replace("decoder_with_past", "decoder_with_past_kv8"))
    ir.save(model, path)
    return path


def cache_peaks(bundle: Bundle, samples: Sequence[Sample], progress: Progress) -> dict[str, NDArray[np.float32]]:
    """The largest magnitude of each channel of each key and value over the samples, by input: [kv_heads, head_dim].

    Of a picture only the overview is shown. Samples that cannot be read are left out; raises `CheckpointError` if none can.
    """
    engine = load(bundle.folder, reuse=False)
    session = cpu_session(bundle.graph("decoder_with_past"), session_options())
    decoder, entries = Decoder(lambda name: session, bundle.manifest), [entry for entry in bundle.manifest.cache if entry.grows]
    slots = decoder.new_slots()
    peaks: dict[str, NDArray[np.float32]] = {}
    for number, sample in enumerate(samples):
        progress("decoder_with_past_kv8", number, len(samples))
        try:
            pictures = [engine.encode_image(image, max_slice_nums=1) for image in sample.images]
            prompt = engine.prompt([{"role": "user", "content": [*pictures, sample.prompt]}])
        except McvError:
            continue
        row = decoder.new_row(slots, len(prompt.ids))
        embeds = decoder.visual_tokens(pictures)
        decoder.read(slots, row, prompt.ids, embeds, prompt.visual_positions, keys=prompt_keys(prompt))
        tensors = dict(slots.export(row))
        for entry in entries:
            peaks[entry.input] = np.maximum(peaks.get(entry.input, 0), np.abs(tensors[entry.input]).max(axis=1))
        slots.drop(row)
    progress("decoder_with_past_kv8", len(samples), len(samples))
    if not peaks:
        raise CheckpointError("no sample could be read to find the range of keys and values; give others with --calibration")
    return peaks


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
        scales = np.maximum(peaks[past.name] * (_HEADROOM / 127), np.finfo(np.float32).tiny)[None, :, None]
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
