"""What goes into and comes out of each graph, by name: the side of the contract that the modules' `forward` fixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mcv_runtime.bundle.manifest import CacheEntry, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphIO:
    """Inputs in `forward`'s order, outputs in its return order; `cache` follows both, entry by entry."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    cache: tuple[CacheEntry, ...] = ()

    @property
    def all_inputs(self) -> dict[str, TensorSpec]:
        return {**self.inputs, **{e.input: TensorSpec(dtype=e.dtype, shape=e.shape) for e in self.cache}}

    @property
    def all_outputs(self) -> dict[str, TensorSpec]:
        return {**self.outputs, **{e.output: TensorSpec(dtype=e.dtype, shape=e.shape) for e in self.cache}}


def vision_encoder_io(patch_size: int, vision_size: int) -> GraphIO:
    """All slices of one call have the same number of patches."""
    return GraphIO(
        inputs={
            "pixel_values": _spec("float32", "slices", "patches", 3 * patch_size**2),
            "position_ids": _spec("int64", "slices", "patches"),
        },
        outputs={"vision_hidden": _spec("float32", "slices", "patches", vision_size)},
    )


def fixed_vision_encoder_io(patch_size: int, vision_size: int, patches: int) -> GraphIO:
    """Every picture has the same grid of patches."""
    return GraphIO(
        inputs={"pixel_values": _spec("float32", "slices", patches, 3 * patch_size**2)},
        outputs={"vision_hidden": _spec("float32", "slices", patches, vision_size)},
    )


def fixed_resampler_io(vision_size: int, patches: int, num_queries: int, hidden_size: int) -> GraphIO:
    """As `fixed_vision_encoder_io`: where a patch lies is known to the graph."""
    return GraphIO(
        inputs={"vision_hidden": _spec("float32", "slices", patches, vision_size)},
        outputs={"vision_embeds": _spec("float32", "slices", num_queries, hidden_size)},
    )


def resized_vision_encoder_io(patch_size: int, vision_size: int, table_side: int) -> GraphIO:
    """`row_weights` and `column_weights` resize a table of positions, `table_side` a side, to the slice's grid."""
    io = vision_encoder_io(patch_size, vision_size)
    return GraphIO(
        inputs={
            **io.inputs,
            "row_weights": _spec("float32", "rows", table_side),
            "column_weights": _spec("float32", "columns", table_side),
        },
        outputs=io.outputs,
    )


def window_vision_encoder_io(patch_size: int, vision_size: int, patches_per_token: int) -> GraphIO:
    """The patches of a visual token stand together, as `mcv_graphs.window_siglip` says; four features of it are left."""
    return GraphIO(
        inputs={
            "pixel_values": _spec("float32", "slices", "tokens", patches_per_token, 3 * patch_size**2),
            "position_ids": _spec("int64", "slices", "tokens", patches_per_token),
        },
        outputs={"vision_hidden": _spec("float32", "slices", "tokens", 4, vision_size)},
    )


def merger_io(vision_size: int, hidden_size: int) -> GraphIO:
    """See `mcv_graphs.merger.Merger.forward`."""
    return GraphIO(
        inputs={"vision_hidden": _spec("float32", "slices", "tokens", 4, vision_size)},
        outputs={"vision_embeds": _spec("float32", "slices", "tokens", hidden_size)},
    )


def resampler_io(vision_size: int, num_queries: int, hidden_size: int, *, temporal: bool = False) -> GraphIO:
    """`patch_positions` holds (row, column); all slices of one call have the same grid of patches.

    `temporal`: the patches may be those of several frames, `patch_times` says when each was (-1: a still picture).
    """
    return GraphIO(
        inputs={
            "vision_hidden": _spec("float32", "slices", "patches", vision_size),
            "patch_positions": _spec("int64", "patches", 2),
            **({"patch_times": _spec("int64", "patches")} if temporal else {}),
        },
        outputs={"vision_embeds": _spec("float32", "slices", num_queries, hidden_size)},
    )


def decoder_io(vocab_size: int, hidden_size: int, cache: tuple[CacheEntry, ...]) -> GraphIO:
    """See `mcv_graphs.decoder.Decoder.forward` for the meaning of each."""
    return GraphIO(
        inputs={
            "input_ids": _spec("int64", "batch", "sequence"),
            "vision_embeds": _spec("float32", "visual", hidden_size),
            "vision_positions": _spec("int64", "visual"),
            "logit_positions": _spec("int64", "rows"),
            "seqlens_k": _spec("int32", "batch"),
            "total_sequence_length": _spec("int32", 1),
        },
        outputs={"logits": _spec("float32", "rows", vocab_size)},
        cache=cache,
    )


def positioned_decoder_io(vocab_size: int, hidden_size: int, cache: tuple[CacheEntry, ...], *, axes: int) -> GraphIO:
    """A decoder that is told the position of each token: one number, or with three axes time, row and column."""
    io = decoder_io(vocab_size, hidden_size, cache)
    shape = ("batch", "sequence") if axes == 1 else (axes, "batch", "sequence")
    names = list(io.inputs)
    names.insert(names.index("logit_positions"), "position_ids")
    inputs = {**io.inputs, "position_ids": _spec("int64", *shape)}
    return GraphIO(inputs={name: inputs[name] for name in names}, outputs=io.outputs, cache=cache)


def recurrent_cache(layer: int, conv_shape: tuple[int, int], state_shape: tuple[int, int, int]) -> tuple[CacheEntry, ...]:
    """What a linear attention layer keeps, of the same size for any length: its convolution's last inputs, and its memory."""
    return tuple(
        CacheEntry(input=f"past_{kind}.{layer}", output=f"present_{kind}.{layer}", dtype="float32", shape=("batch", *shape))
        for kind, shape in (("conv", conv_shape), ("recurrent", state_shape))
    )


def key_value_cache(num_layers: int, num_kv_heads: int, head_dim: int) -> tuple[CacheEntry, ...]:
    """Key and value of every layer."""
    return tuple(entry for layer in range(num_layers) for entry in key_value_entries(layer, num_kv_heads, head_dim))


def key_value_entries(layer: int, num_kv_heads: int, head_dim: int) -> tuple[CacheEntry, ...]:
    """Key and value of an attention layer, named as optimum and onnxruntime-genai name them."""
    return tuple(
        CacheEntry(
            input=f"past_key_values.{layer}.{kind}",
            output=f"present.{layer}.{kind}",
            dtype="float32",
            shape=("batch", num_kv_heads, "cache_length", head_dim),
        )
        for kind in ("key", "value")
    )


def _spec(dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(dtype=dtype, shape=shape)
