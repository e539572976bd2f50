"""The graphs of the merger generation, and where in a checkpoint each of their weights is."""

from __future__ import annotations

from mcv_export import config as cfg
from mcv_export.plan import GraphPlan, Part, Weights, same
from mcv_export.tying import TableAndHead
from mcv_graphs.contract import (
    key_value_entries,
    merger_io,
    positioned_decoder_io,
    recurrent_cache,
    window_vision_encoder_io,
)
from mcv_graphs.hybrid_decoder import HybridConfig, HybridDecoder, frequency_axes, rotary_frequencies
from mcv_graphs.merger import Merger
from mcv_graphs.siglip import SiglipConfig
from mcv_graphs.window_siglip import WindowSiglipTower
from mcv_runtime.bundle.manifest import CacheEntry, GraphName

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def vision_plans(config: SiglipConfig, merge_after: int, *, full: GraphName, plain: GraphName) -> tuple[GraphPlan, ...]:
    """The tower with its window merger, and without: the second has a part of the first one's weights."""
    tower, layer, merger = "model.vision_tower", "model.vision_tower.encoder.layers.*", "model.vision_tower.vit_merger"
    shared = {
        "position_embedding.weight": f"{tower}.embeddings.position_embedding.weight",
        **cfg.affine({"patch_embedding": f"{tower}.embeddings.patch_embedding", "post_layernorm": f"{tower}.post_layernorm"}),
        **cfg.affine({f"layers.*.{n}": f"{layer}.{n}" for n in ("layer_norm1", "layer_norm2")}),
        **cfg.affine({f"layers.*.{n}": f"{layer}.self_attn.{n}" for n in _ATTENTION}),
        **cfg.affine({f"layers.*.{n}": f"{layer}.mlp.{n}" for n in ("fc1", "fc2")}),
    }
    own = {
        **cfg.affine({f"vit_merger.{n}": f"{merger}.{n}" for n in ("layer_norm1", "pre_norm", "linear_1", "linear_2")}),
        **cfg.affine({f"vit_merger.{n}": f"{merger}.self_attn.{n}" for n in _ATTENTION}),
    }
    return (
        GraphPlan(
            name=full,
            module=lambda: WindowSiglipTower(config, merge_after),
            io=window_vision_encoder_io(config.patch_size, config.hidden_size, 16),
            weights=same(shared | own, config.num_layers),
        ),
        GraphPlan(
            name=plain,
            module=lambda: WindowSiglipTower(config, None),
            io=window_vision_encoder_io(config.patch_size, config.hidden_size, 4),
            weights=same(shared, config.num_layers),
            shares=full,
        ),
    )


def merger_plan(vision_size: int, hidden_size: int) -> GraphPlan:
    names = cfg.affine({n: f"model.merger.mlp.0.{n}" for n in ("pre_norm", "linear_1", "linear_2")})
    return GraphPlan(
        name="merger",
        module=lambda: Merger(vision_size, hidden_size),
        io=merger_io(vision_size, hidden_size),
        weights=same(names),
    )


def decoder_plan(config: HybridConfig, stored: TableAndHead) -> GraphPlan:
    """The language model; zero-centred norms get their 1, and the decay's logarithm becomes the factor that it stands for."""
    prefix = "model.language_model"
    weights: dict[str, tuple[Part, ...]] = {
        "embed_tokens.weight": (Part(tensor=stored.table),),
        "lm_head.weight": (Part(tensor=stored.head),),
        "norm.weight": (Part(tensor=f"{prefix}.norm.weight", transform="plus_one"),),
    }
    cache: list[CacheEntry] = []
    for index, kind in enumerate(config.layer_kinds):
        theirs = f"{prefix}.layers.{index}"
        layer = {f"{n}.weight": (Part(tensor=f"{theirs}.mlp.{n}.weight"),) for n in ("gate_proj", "up_proj", "down_proj")}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[f"{norm}.weight"] = (Part(tensor=f"{theirs}.{norm}.weight", transform="plus_one"),)
        mixer = _attention(config, theirs) if kind == "full_attention" else _delta_net(theirs)
        weights |= {f"layers.{index}.{name}": parts for name, parts in {**layer, **mixer}.items()}
        cache += _cache(config, index)
    return GraphPlan(
        name="decoder_with_past",
        module=lambda: HybridDecoder(config),
        io=positioned_decoder_io(config.vocab_size, config.hidden_size, tuple(cache), axes=3 if config.mrope_section else 1),
        weights=weights,
        computed={
            "frequencies": lambda: rotary_frequencies(config).numpy(),
            "frequency_axes": lambda: frequency_axes(config).numpy(),
        }
        if config.mrope_section
        else {"frequencies": lambda: rotary_frequencies(config).numpy()},
        tied={"lm_head": "embed_tokens"} if config.tied else {},
    )


def _attention(config: HybridConfig, theirs: str) -> Weights:
    """The published q_proj holds the query and the gate of each head in turn."""
    rows, stored = config.head_dim, 2 * config.num_heads * config.head_dim

    def every_other(first: int) -> tuple[Part, ...]:
        starts = range(first * rows, stored, 2 * rows)
        return tuple(Part(tensor=f"{theirs}.self_attn.q_proj.weight", rows=rows, offset=at, stored=stored) for at in starts)

    norms = {n: (Part(tensor=f"{theirs}.self_attn.{n}.weight", transform="plus_one"),) for n in ("q_norm", "k_norm")}
    plain = {f"{n}.weight": (Part(tensor=f"{theirs}.self_attn.{n}.weight"),) for n in ("k_proj", "v_proj", "o_proj")}
    return {"q_proj.weight": every_other(0), "q_gate.weight": every_other(1), **plain, **norms}


def _delta_net(theirs: str) -> Weights:
    names = {
        **{f"{n}.weight": f"{n}.weight" for n in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")},
        "o_proj.weight": "out_proj.weight",
        "norm": "norm.weight",
        "dt_bias": "dt_bias",
    }
    return {
        **{ours: (Part(tensor=f"{theirs}.linear_attn.{name}"),) for ours, name in names.items()},
        "conv_taps": (Part(tensor=f"{theirs}.linear_attn.conv1d.weight", transposed=True),),
        "decay_scale": (Part(tensor=f"{theirs}.linear_attn.A_log", transform="negative_exp"),),
    }


def _cache(config: HybridConfig, layer: int) -> tuple[CacheEntry, ...]:
    if config.layer_kinds[layer] == "full_attention":
        return key_value_entries(layer, config.num_kv_heads, config.head_dim)
    return recurrent_cache(
        layer,
        (config.conv_kernel - 1, config.conv_channels),
        (config.linear_value_heads, config.linear_key_dim, config.linear_value_dim),
    )
