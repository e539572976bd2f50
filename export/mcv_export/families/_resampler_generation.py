"""What the families before 4.6 share: a SigLIP tower, a resampler and a Llama-like decoder, under their checkpoint names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mcv_export import config as cfg
from mcv_export import texts
from mcv_export.checkpoint import Checkpoint
from mcv_export.picture_settings import picture_settings
from mcv_export.plan import GraphPlan, Part, Weights, same
from mcv_export.rope import rope
from mcv_export.tying import table_and_head
from mcv_graphs.contract import decoder_io, key_value_cache, resampler_io, vision_encoder_io
from mcv_graphs.decoder import Decoder, DecoderConfig, rotary_tables
from mcv_graphs.resampler import Resampler, ResamplerConfig, TemporalResampler, position_frequencies, time_frequencies
from mcv_graphs.siglip import SiglipConfig, SiglipTower
from mcv_runtime.bundle.manifest import GenerationSpec, ImageSpec, PlaceholderSpec, TextSpec
from mcv_runtime.errors import CheckpointError, shown

_WRITTEN = {
    "token": ("unk", "<unk>"),
    "image_start": ("im_start", "<image>"),
    "image_end": ("im_end", "</image>"),
    "slice_start": ("slice_start", "<slice>"),
    "slice_end": ("slice_end", "</slice>"),
    "image_id_start": ("im_id_start", "<image_id>"),
    "image_id_end": ("im_id_end", "</image_id>"),
}
"""The tokens around a picture: ours, the key of the picture settings, and as published."""
_GELU: Mapping[str, Literal["tanh", "erf"]] = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "erf"}


def tower_config(config: Mapping[str, Any]) -> SiglipConfig:
    """The navit tower of 2.5 to 4.5."""
    vision = cfg.section(config, "vision_config")
    gelu = cfg.string(vision, "hidden_act", "gelu_pytorch_tanh")
    if gelu not in _GELU:
        raise CheckpointError(f"config has vision_config.hidden_act={shown(gelu)}; mcv knows {', '.join(_GELU)}")
    cfg.expect(vision, "num_channels", 3)
    patch_size = cfg.integer(vision, "patch_size")
    return SiglipConfig(
        hidden_size=cfg.integer(vision, "hidden_size"),
        intermediate_size=cfg.integer(vision, "intermediate_size"),
        # The class default of drop_vision_last_layer is true; every published config from 2.5 on says false.
        num_layers=cfg.integer(vision, "num_hidden_layers") - cfg.flag(config, "drop_vision_last_layer", True),
        num_heads=cfg.integer(vision, "num_attention_heads"),
        patch_size=patch_size,
        position_table_side=cfg.integer(vision, "image_size") // patch_size,
        layer_norm_eps=cfg.number(vision, "layer_norm_eps", 1e-6),
        gelu=_GELU[gelu],
    )


def resampler_config(config: Mapping[str, Any], vision_size: int, **facts: Any) -> ResamplerConfig:
    """The resampler of 2.0 to 4.5; a head is 128 wide."""
    hidden = cfg.integer(config, "hidden_size")
    return ResamplerConfig(
        hidden_size=hidden,
        vision_size=vision_size,
        num_queries=cfg.integer(config, "query_num"),
        num_heads=max(hidden // 128, 1),
        **facts,
    )


def decoder_config(
    config: Mapping[str, Any], *, qkv_bias: bool = False, qk_norm: bool = False, sliding: bool = False
) -> DecoderConfig:
    """A Llama-like decoder from the usual keys of a transformers config.

    `sliding`: every layer has a window, without a switch (Mistral).
    """
    hidden, heads = cfg.integer(config, "hidden_size"), cfg.integer(config, "num_attention_heads")
    kv_heads, layers = cfg.integer(config, "num_key_value_heads", heads), cfg.integer(config, "num_hidden_layers")
    if heads % kv_heads:
        raise CheckpointError(f"config has num_attention_heads={heads}, not a multiple of num_key_value_heads={kv_heads}")
    cfg.expect(config, "hidden_act", "silu", "swish")
    if qkv_bias:
        cfg.flag(config, "attention_bias", True)  # Qwen2 has its biases, whatever a config says
    head_dim = cfg.integer(config, "head_dim", hidden // heads)
    kinds, window = _windows(config, layers, sliding)
    positions = rope(config, head_dim=head_dim, layer_kinds=kinds)
    if positions.dim != head_dim:
        raise CheckpointError(
            f"config has a partial_rotary_factor for {positions.dim} of {head_dim} components; mcv knows 1 only"
        )
    return DecoderConfig(
        vocab_size=cfg.integer(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=cfg.integer(config, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=min(positions.context, window or positions.context),
        rms_norm_eps=cfg.number(config, "rms_norm_eps"),
        rope_theta=positions.theta,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        frequencies=positions.frequencies,
        rotary_scale=positions.scale,
    )


def _windows(config: Mapping[str, Any], layers: int, sliding: bool) -> tuple[frozenset[str], int | None]:
    """The kinds of the layers, and the positions back to which every layer sees: a bundle's context ends there."""
    first = cfg.integer(config, "max_window_layers", 0 if sliding else 28, least=0)
    on = cfg.flag(config, "use_sliding_window", sliding) and not (
        isinstance(config, cfg.Config) and "sliding_window" in config.nulls
    )
    window = cfg.integer(config, "sliding_window", 4096) if on else None
    if not on:
        config.get("sliding_window")  # switched off
    kinds = config.get("layer_types") or ["sliding_attention" if on and i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers:
        raise CheckpointError(f"config has {len(kinds)} layer_types for num_hidden_layers={layers}")
    if unknown := set(kinds) - {"full_attention", *(["sliding_attention"] if on else [])}:
        raise CheckpointError(f"config has {shown(unknown.pop())} among its layer_types, which this family has not")
    return frozenset(kinds), window if "sliding_attention" in kinds else None


def image_spec(checkpoint: Checkpoint, tower: SiglipConfig, **facts: Any) -> ImageSpec:
    """Slicing and normalisation from the picture settings, else from config.json, else as published."""
    config = checkpoint.config
    pictures = picture_settings(checkpoint)
    settings = cfg.Overlay(pictures, cfg.optional_section(config, "slice_config"), config)
    for place in (pictures, cfg.optional_section(config, "slice_config"), config):
        if (size := cfg.integer(place, "patch_size", tower.patch_size)) != tower.patch_size:
            given = f"{cfg.named(place, 'patch_size')}={size}"
            raise CheckpointError(f"config has {given}, but its vision tower has patches with a side of {tower.patch_size}")
    mean, std = (cfg.numbers(settings, f"norm_{kind}", (0.5, 0.5, 0.5)) for kind in ("mean", "std"))
    for kind, values in (("mean", mean), ("std", std)):  # what the published code derives, and what others call it
        cfg.expect(pictures, kind, list(values))
        cfg.expect(pictures, f"image_{kind}", list(values))
    return ImageSpec(
        scale_resolution=cfg.integer(settings, "scale_resolution", 448),
        patch_size=tower.patch_size,
        max_slice_nums=cfg.integer(settings, "max_slice_nums", 9),
        slice_mode=cfg.flag(settings, "slice_mode", True),
        mean=mean,
        std=std,
        position_table_side=tower.position_table_side,
        **facts,
    )


def placeholder(checkpoint: Checkpoint, num_queries: int, *, numbered: bool = True) -> PlaceholderSpec:
    """What stands for a picture, `numbered` from 2.6 on."""
    pictures = picture_settings(checkpoint)
    cfg.expect(pictures, "image_feature_size", num_queries)
    written: dict[str, Any] = {ours: cfg.string(pictures, theirs, published) for ours, (theirs, published) in _WRITTEN.items()}
    used = cfg.flag(cfg.Overlay(pictures, checkpoint.config), "use_image_id", True)
    return PlaceholderSpec(
        strategy="image_id_slices" if numbered else "bracketed_slices",
        tokens_per_slice=num_queries,
        use_image_id=used or not numbered,
        **written,
    )


def text_spec(
    checkpoint: Checkpoint, decoder: DecoderConfig, template: str, *, dropped_ids: tuple[int, ...] = (0,), **facts: Any
) -> TextSpec:
    """Text as these families have it; the published decode() removes id 0 from answers."""
    return TextSpec(
        vocab_size=decoder.vocab_size,
        context_length=decoder.context_length,
        dropped_ids=dropped_ids,
        template_variables=texts.template_variables(checkpoint, template),
        **facts,
    )


def generation(
    checkpoint: Checkpoint, decoder: DecoderConfig, *stop_tokens: str, repetition_penalty: float, max_new_tokens: int
) -> GenerationSpec:
    """The published chat() has its own stop tokens and its own defaults."""
    return texts.generation(
        checkpoint,
        vocab_size=decoder.vocab_size,
        stop_tokens=stop_tokens,
        fixed=True,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
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


def resampler(config: ResamplerConfig, *, temporal: bool = False, norm: str = "vpm.post_layernorm") -> GraphPlan:
    """`norm`: the tower's last."""
    width = config.hidden_size
    times = {"time_frequencies": lambda: time_frequencies(width).numpy()} if temporal else {}
    return GraphPlan(
        name="resampler",
        module=lambda: (TemporalResampler if temporal else Resampler)(config),
        io=resampler_io(config.vision_size, config.num_queries, width, temporal=temporal),
        weights=resampler_weights(config, "resampler"),
        computed={"frequencies": lambda: position_frequencies(width).numpy(), **times},
        input_norms=input_norms(config, norm),
    )


def input_norms(config: ResamplerConfig, norm: str) -> dict[str, str]:
    """See `GraphPlan`; a resampler as wide as the tower projects nothing."""
    return {"kv_proj": norm} if config.vision_size != config.hidden_size else {}


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
    checkpoint: Checkpoint,
    config: DecoderConfig,
    *,
    prefix: str = "llm.",
    tied: bool = False,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> GraphPlan:
    """The scales are MiniCPM's: of a token's embedding, of what each sublayer adds, and of the logits.

    `tied` is the class's default of tie_word_embeddings, which transformers 4 does not write.
    """
    both = (f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight")
    stored = table_and_head(checkpoint, checkpoint.config, *both, tied=tied)
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
            **same({"embed_tokens.weight": stored.table}, scale=embedding_scale),
            **same({"lm_head.weight": stored.head}, scale=logit_scale),
            **packed,
        },
        computed={"cos": lambda: rotary_tables(config)[0].numpy(), "sin": lambda: rotary_tables(config)[1].numpy()},
        used=tuple(name for name in both if stored.tied and name in checkpoint.tensors),
    )
