"""What the families before 4.6 share: a SigLIP tower, a resampler and a Llama-like decoder, under their checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcv_export import config as cfg
from mcv_export.checkpoint import Checkpoint
from mcv_export.plan import GraphPlan, Part, Weights, same
from mcv_graphs.contract import decoder_io, key_value_cache, resampler_io, vision_encoder_io
from mcv_graphs.decoder import Decoder, DecoderConfig, rotary_tables
from mcv_graphs.resampler import Resampler, ResamplerConfig, TemporalResampler, position_frequencies, time_frequencies
from mcv_graphs.siglip import SiglipConfig, SiglipTower
from mcv_runtime.bundle.manifest import ImageSpec, PlaceholderSpec
from mcv_runtime.errors import CheckpointError


def tower_config(config: Mapping[str, Any]) -> SiglipConfig:
    """The navit tower of 2.5 to 4.5."""
    vision = cfg.section(config, "vision_config")
    patch_size = cfg.integer(vision, "patch_size")
    return SiglipConfig(
        hidden_size=cfg.integer(vision, "hidden_size"),
        intermediate_size=cfg.integer(vision, "intermediate_size"),
        # The class default of drop_vision_last_layer is true; every published config from 2.5 on says false.
        num_layers=cfg.integer(vision, "num_hidden_layers") - bool(config.get("drop_vision_last_layer", True)),
        num_heads=cfg.integer(vision, "num_attention_heads"),
        patch_size=patch_size,
        position_table_side=cfg.integer(vision, "image_size") // patch_size,
    )


def resampler_config(config: Mapping[str, Any], vision_size: int) -> ResamplerConfig:
    """The resampler of 2.5 to 4.5; a head is 128 wide."""
    hidden = cfg.integer(config, "hidden_size")
    return ResamplerConfig(
        hidden_size=hidden,
        vision_size=vision_size,
        num_queries=cfg.integer(config, "query_num"),
        num_heads=max(hidden // 128, 1),
    )


def decoder_config(
    config: Mapping[str, Any], *, qkv_bias: bool = False, qk_norm: bool = False, rope_factors: tuple[float, ...] = ()
) -> DecoderConfig:
    """A Llama-like decoder from the usual keys of a transformers config."""
    hidden, heads = cfg.integer(config, "hidden_size"), cfg.integer(config, "num_attention_heads")
    if config.get("tie_word_embeddings"):
        raise CheckpointError("config.json has tie_word_embeddings=true, which no published checkpoint of this family has")
    return DecoderConfig(
        vocab_size=cfg.integer(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=cfg.integer(config, "intermediate_size"),
        num_layers=cfg.integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=cfg.integer(config, "num_key_value_heads", heads),
        head_dim=cfg.integer(config, "head_dim", hidden // heads),
        context_length=cfg.integer(config, "max_position_embeddings"),
        rms_norm_eps=cfg.number(config, "rms_norm_eps"),
        rope_theta=cfg.number(config, "rope_theta", 10000.0),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        rope_factors=rope_factors,
    )


def image_spec(checkpoint: Checkpoint, tower: SiglipConfig, **facts: Any) -> ImageSpec:
    """Slicing and normalisation from preprocessor_config.json, else from config.json, else as published."""
    config = checkpoint.config
    settings = {**config, **(config.get("slice_config") or {}), **checkpoint.json("preprocessor_config.json")}
    return ImageSpec(
        scale_resolution=cfg.integer(settings, "scale_resolution", 448),
        patch_size=tower.patch_size,
        max_slice_nums=cfg.integer(settings, "max_slice_nums", 9),
        slice_mode=bool(settings.get("slice_mode", True)),
        mean=cfg.numbers(settings, "norm_mean", (0.5, 0.5, 0.5)),
        std=cfg.numbers(settings, "norm_std", (0.5, 0.5, 0.5)),
        position_table_side=tower.position_table_side,
        **facts,
    )


def placeholder(checkpoint: Checkpoint, num_queries: int) -> PlaceholderSpec:
    """The placeholder with image ids, of 2.6 to 4.5."""
    settings = checkpoint.json("preprocessor_config.json")
    return PlaceholderSpec(
        token=settings.get("unk", "<unk>"), tokens_per_slice=num_queries, use_image_id=bool(settings.get("use_image_id", True))
    )


def vision_encoder(config: SiglipConfig) -> GraphPlan:
    names = {
        "position_embedding.weight": "vpm.embeddings.position_embedding.weight",
        **cfg.affine(
            {
                "patch_embedding": "vpm.embeddings.patch_embedding",
                "post_layernorm": "vpm.post_layernorm",
                **{f"layers.*.{n}": f"vpm.encoder.layers.*.{n}" for n in ("layer_norm1", "layer_norm2")},
                **{f"layers.*.{n}": f"vpm.encoder.layers.*.self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
                **{f"layers.*.{n}": f"vpm.encoder.layers.*.mlp.{n}" for n in ("fc1", "fc2")},
            }
        ),
    }
    return GraphPlan(
        name="vision_encoder",
        module=lambda: SiglipTower(config),
        io=vision_encoder_io(config.patch_size, config.hidden_size),
        weights=same(names, config.num_layers),
    )


def resampler(config: ResamplerConfig, *, temporal: bool = False) -> GraphPlan:
    width = config.hidden_size
    times = {"time_frequencies": lambda: time_frequencies(width).numpy()} if temporal else {}
    return GraphPlan(
        name="resampler",
        module=lambda: (TemporalResampler if temporal else Resampler)(config),
        io=resampler_io(config.vision_size, config.num_queries, width, temporal=temporal),
        weights=resampler_weights(config, "resampler"),
        computed={"frequencies": lambda: position_frequencies(width).numpy(), **times},
    )


def resampler_weights(config: ResamplerConfig, prefix: str) -> Weights:
    width = config.hidden_size
    packed = {
        f"{name}.{kind}": (Part(tensor=f"{prefix}.attn.in_proj_{kind}", rows=width, offset=index * width, stored=3 * width),)
        for index, name in enumerate(("q_proj", "k_proj", "v_proj"))
        for kind in ("weight", "bias")
    }
    names = cfg.affine({n: f"{prefix}.{n}" for n in ("ln_q", "ln_kv", "ln_post")} | {"out_proj": f"{prefix}.attn.out_proj"})
    names["query"] = f"{prefix}.query"
    if config.vision_size != width:
        names["kv_proj.weight"] = f"{prefix}.kv_proj.weight"
    if config.query_positions:
        names["query_position"] = f"{prefix}.pos_embed"
    return {
        **same(names),
        **packed,
        "proj.weight": (Part(tensor=f"{prefix}.proj", transposed=True),),  # a plain parameter, applied as x @ proj
    }


def decoder(
    config: DecoderConfig,
    *,
    prefix: str = "llm.",
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> GraphPlan:
    """The scales are MiniCPM's: of a token's embedding, of what each sublayer adds, and of the logits."""
    counts = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
    layer = f"{prefix}model.layers.*"
    kinds = ("weight", "bias") if config.qkv_bias else ("weight",)
    packed = {
        f"layers.{number}.qkv_proj.{kind}": tuple(
            Part(tensor=f"{layer}.self_attn.{name}.{kind}".replace("*", str(number)), rows=count * config.head_dim)
            for name, count in counts.items()
        )
        for number in range(config.num_layers)
        for kind in kinds
    }
    norms = {n: n for n in ("input_layernorm", "post_attention_layernorm")}
    if config.qk_norm:
        norms |= {n: f"self_attn.{n}" for n in ("q_norm", "k_norm")}
    names = {
        "norm.weight": f"{prefix}model.norm.weight",
        **{f"layers.*.{ours}.weight": f"{layer}.{theirs}.weight" for ours, theirs in norms.items()},
        **{f"layers.*.{n}.weight": f"{layer}.mlp.{n}.weight" for n in ("gate_proj", "up_proj")},
    }
    sublayers = ("self_attn.o_proj", "mlp.down_proj")
    added = {f"layers.*.{name.rpartition('.')[2]}.weight": f"{layer}.{name}.weight" for name in sublayers}
    return GraphPlan(
        name="decoder_with_past",
        module=lambda: Decoder(config),
        io=decoder_io(
            config.vocab_size, config.hidden_size, key_value_cache(config.num_layers, config.num_kv_heads, config.head_dim)
        ),
        weights={
            **same(names, config.num_layers),
            **same(added, config.num_layers, scale=residual_scale),
            **same({"embed_tokens.weight": f"{prefix}model.embed_tokens.weight"}, scale=embedding_scale),
            **same({"lm_head.weight": f"{prefix}lm_head.weight"}, scale=logit_scale),
            **packed,
        },
        computed={"cos": lambda: rotary_tables(config)[0].numpy(), "sin": lambda: rotary_tables(config)[1].numpy()},
    )
