"""What MiniCPM-V 4.6, 4.7 and MiniCPM-OCR have in common: a tower with a window merger, a merger, a hybrid decoder.

Checkpoint layout and behaviour: the models `minicpmv4_6`, `minicpmv4_7`, `minicpm_ocr` and `qwen3_5_text` of transformers 5.23.
A config key that no published file has takes its default there; one that published files have must be present.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from mcv_export import config as cfg
from mcv_export.checkpoint import Checkpoint
from mcv_export.families._merger_weights import decoder_plan, merger_plan, vision_plans
from mcv_export.plan import ModelPlan
from mcv_graphs.hybrid_decoder import HybridConfig, LayerKind
from mcv_graphs.siglip import SiglipConfig
from mcv_runtime.bundle.manifest import (
    DownsampleSpec,
    GraphName,
    ImageSpec,
    PlaceholderSpec,
    SmallImageUpsize,
    TextSpec,
    VideoSpec,
)
from mcv_runtime.errors import CheckpointError

MERGE = {"16x": 4, "4x": 2}
"""Side of the square of patches behind a visual token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What tells the families apart."""

    model_type: str
    architecture: str
    downsample_mode: str = "16x"
    positions: Literal["sequential", "canvas"] = "sequential"
    video_ids: bool = True
    """Whether a video may have a number in the prompt."""
    upsizes_by_choice: bool = False
    """Whether the processor has `small_image_upsize`."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == self.model_type or config.get("architectures") == [self.architecture]


def plan(checkpoint: Checkpoint, traits: Traits) -> ModelPlan:
    """The three graphs, the tower's once for each downsample mode, and the manifest's facts."""
    config, preprocessor = checkpoint.config, checkpoint.json("preprocessor_config.json")
    tower, merge_after = _vision(config)
    decoder = _decoder(checkpoint, traits)
    mode = config.get("downsample_mode", preprocessor.get("downsample_mode", traits.downsample_mode))
    if mode not in MERGE:
        raise CheckpointError(f"config has downsample_mode={mode!r}, which is none of {', '.join(MERGE)}")
    # The default mode has the plain name, so that a bundle looks like any other.
    names = {m: cast(GraphName, "vision_encoder" if m == mode else f"vision_encoder_{m}") for m in MERGE}
    tokens = cfg.token_ids(checkpoint)
    return ModelPlan(
        graphs=(
            *vision_plans(tower, merge_after, full=names["16x"], plain=names["4x"]),
            merger_plan(tower.hidden_size, decoder.hidden_size),
            decoder_plan(decoder),
        ),
        hidden_size=decoder.hidden_size,
        image=ImageSpec(
            slicing="aligned_grid",
            scale_resolution=cfg.integer(preprocessor, "scale_resolution", 448),
            patch_size=tower.patch_size,
            max_slice_nums=cfg.integer(preprocessor, "max_slice_nums", 9),
            slice_mode=bool(preprocessor.get("slice_mode", True)),
            mean=cfg.numbers(preprocessor, "image_mean", (0.5, 0.5, 0.5)),
            std=cfg.numbers(preprocessor, "image_std", (0.5, 0.5, 0.5)),
            position_table_side=tower.position_table_side,
            downsample={m: DownsampleSpec(graph=names[m], merge=merge) for m, merge in MERGE.items()},
            downsample_mode=mode,
            small_image_upsize=_upsize(preprocessor) if traits.upsizes_by_choice else "always",
        ),
        placeholder=_placeholder(config, tokens, bool(preprocessor.get("use_image_id", True)), traits),
        text=TextSpec(
            vocab_size=decoder.vocab_size,
            context_length=decoder.context_length,
            dropped_ids=cfg.special_ids(checkpoint),
            positions=traits.positions,
            newline_id=cfg.newline_id(checkpoint, config) if traits.positions == "canvas" else None,
        ),
        generation=cfg.generation(
            checkpoint, stop_tokens=_stop_tokens(checkpoint, tokens), repetition_penalty=1.0, max_new_tokens=512
        ),
        video=VideoSpec(),
        ignored=("mtp.", "lm_head.") if decoder.tied else ("mtp.",),
    )


def _vision(config: Mapping[str, Any]) -> tuple[SiglipConfig, int]:
    """The tower's sizes, and the layer after which windows merge."""
    vision = cfg.section(config, "vision_config")
    cfg.expect(vision, "hidden_act", "gelu_pytorch_tanh")
    cfg.expect(vision, "num_channels", 3)
    for holder, key in ((vision, "window_kernel_size"), (config, "window_kernel_size"), (config, "merge_kernel_size")):
        cfg.expect(holder, key, [2, 2])
    cfg.expect(config, "merger_times", 1)
    cfg.expect(config, "drop_vision_last_layer", False)
    patch_size = cfg.integer(vision, "patch_size")
    tower = SiglipConfig(
        hidden_size=cfg.integer(vision, "hidden_size"),
        intermediate_size=cfg.integer(vision, "intermediate_size"),
        num_layers=cfg.integer(vision, "num_hidden_layers"),
        num_heads=cfg.integer(vision, "num_attention_heads"),
        patch_size=patch_size,
        position_table_side=cfg.integer(vision, "image_size") // patch_size,
        layer_norm_eps=cfg.number(vision, "layer_norm_eps", 1e-6),
    )
    merge_after = config.get("insert_layer_id", 6)
    if type(merge_after) is not int or not 0 <= merge_after < tower.num_layers:
        raise CheckpointError(f"config has insert_layer_id={merge_after!r}, but the tower has {tower.num_layers} layers")
    return tower, merge_after


def _decoder(checkpoint: Checkpoint, traits: Traits) -> HybridConfig:
    text = cfg.section(checkpoint.config, "text_config")
    if text.get("model_type", "qwen3_5_text") != "qwen3_5_text":
        raise CheckpointError(
            f"the language model is {text['model_type']!r}; of this family mcv knows the dense ones (qwen3_5_text) only"
        )
    for key, value in (("hidden_act", "silu"), ("attention_bias", False), ("attn_output_gate", True)):
        cfg.expect(text, key, value)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    cfg.expect(rope, "rope_type", "default")
    head_dim = cfg.integer(text, "head_dim")
    partial = cfg.number({**text, **rope}, "partial_rotary_factor", 0.25)
    sections = cfg.numbers(rope, "mrope_section", (11, 11, 10))
    if len(sections) != 3:
        raise CheckpointError(f"config has mrope_section={list(sections)}, which is not three numbers")
    config = HybridConfig(
        vocab_size=cfg.integer(text, "vocab_size"),
        hidden_size=cfg.integer(text, "hidden_size"),
        intermediate_size=cfg.integer(text, "intermediate_size"),
        layer_kinds=_layer_kinds(text),
        num_heads=cfg.integer(text, "num_attention_heads"),
        num_kv_heads=cfg.integer(text, "num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=int(head_dim * partial),
        linear_key_heads=cfg.integer(text, "linear_num_key_heads"),
        linear_value_heads=cfg.integer(text, "linear_num_value_heads"),
        linear_key_dim=cfg.integer(text, "linear_key_head_dim"),
        linear_value_dim=cfg.integer(text, "linear_value_head_dim"),
        conv_kernel=cfg.integer(text, "linear_conv_kernel_dim", 4),
        context_length=cfg.integer(text, "max_position_embeddings"),
        rms_norm_eps=cfg.number(text, "rms_norm_eps", 1e-6),
        rope_theta=cfg.number({**text, **rope}, "rope_theta"),
        mrope_section=tuple(int(count) for count in sections) if traits.positions == "canvas" else (),
        tied="lm_head.weight" not in checkpoint.tensors or bool(checkpoint.config.get("tie_word_embeddings")),
    )
    for many, few in (("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads")):
        if text[many] % text[few]:
            raise CheckpointError(f"config has {many}={text[many]}, which is not a multiple of {few}={text[few]}")
    return config


def _layer_kinds(text: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    count, interval = cfg.integer(text, "num_hidden_layers"), cfg.integer(text, "full_attention_interval", 4)
    kinds = text.get("layer_types") or ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    if len(kinds) != count:
        raise CheckpointError(f"config has {len(kinds)} layer_types for num_hidden_layers={count}")
    if unknown := set(kinds) - {"linear_attention", "full_attention"}:
        raise CheckpointError(f"config has a layer of the unknown type {unknown.pop()!r}")
    return tuple(kinds)


def _placeholder(config: Mapping[str, Any], tokens: Mapping[str, int], use_image_id: bool, traits: Traits) -> PlaceholderSpec:
    by_id = {number: token for token, number in tokens.items()}
    image, video = (by_id.get(config.get(f"{kind}_token_id", tokens.get(f"<|{kind}_pad|>")), "") for kind in ("image", "video"))
    spec = PlaceholderSpec(token=image, video_token=video, use_image_id=use_image_id, video_ids=traits.video_ids)
    written = [image, video, spec.image_start, spec.image_end, spec.slice_start, spec.slice_end]
    written += [spec.image_id_start, spec.image_id_end] if use_image_id else []
    if missing := [token for token in written if token not in tokens]:
        raise CheckpointError(
            f"tokenizer.json lacks the token {missing[0]}"
            if missing[0]
            else f"tokenizer.json has no token for image_token_id={config.get('image_token_id')} or "
            f"video_token_id={config.get('video_token_id')} of config.json"
        )
    return spec


def _stop_tokens(checkpoint: Checkpoint, tokens: Mapping[str, int]) -> tuple[str, ...]:
    """Those of generation_config.json: config.json names only the end of the text, not of a turn."""
    ids = checkpoint.json("generation_config.json").get("eos_token_id")
    named = [ids] if isinstance(ids, int) else ids or []
    by_id = {number: token for token, number in tokens.items()}
    return tuple(by_id[number] for number in named if number in by_id) or ("<|im_end|>", "<|endoftext|>")


def _upsize(preprocessor: Mapping[str, Any]) -> SmallImageUpsize:
    value = preprocessor.get("small_image_upsize", "always")
    if value not in ("always", "never", "adaptive"):
        raise CheckpointError(f"config has small_image_upsize={value!r}, which is none of always, never, adaptive")
    return cast(SmallImageUpsize, value)
