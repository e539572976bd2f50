"""What MiniCPM-V 4.6, 4.7 and MiniCPM-OCR have in common: a tower with a window merger, a merger, a hybrid decoder.

Checkpoint layout and behaviour: the models `minicpmv4_6`, `minicpmv4_7`, `minicpm_ocr` and `qwen3_5_text` of transformers 5.23.
A config key that no published file has takes its default there; one that published files have must be present.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from mcv_export import config as cfg
from mcv_export import texts
from mcv_export.checkpoint import Checkpoint
from mcv_export.families._merger_weights import decoder_plan, merger_plan, vision_plans
from mcv_export.picture_settings import picture_settings, video_settings
from mcv_export.plan import ModelPlan
from mcv_export.rope import rope
from mcv_export.tying import table_and_head
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
from mcv_runtime.errors import CheckpointError, shown

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
    config, pictures = checkpoint.config, picture_settings(checkpoint)
    tower, merge_after = _vision(config)
    stored = table_and_head(
        checkpoint,
        cfg.Overlay(config, cfg.section(config, "text_config")),
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
        tied=True,
    )
    decoder = _decoder(config, traits, tied=stored.tied)
    mode = cfg.string(cfg.Overlay(config, pictures), "downsample_mode", traits.downsample_mode)
    if mode not in MERGE:
        raise CheckpointError(f"config has downsample_mode={shown(mode)}, which is none of {', '.join(MERGE)}")
    # The default mode has the plain name, so that a bundle looks like any other.
    names = {m: cast(GraphName, "vision_encoder" if m == mode else f"vision_encoder_{m}") for m in MERGE}
    template = texts.chat_template(checkpoint, asked="processor")
    image = ImageSpec(
        slicing="aligned_grid",
        scale_resolution=cfg.integer(pictures, "scale_resolution", 448),
        patch_size=tower.patch_size,
        max_slice_nums=cfg.integer(pictures, "max_slice_nums", 9),
        slice_mode=cfg.flag(pictures, "slice_mode", True),
        mean=cfg.numbers(pictures, "image_mean", (0.5, 0.5, 0.5)),
        std=cfg.numbers(pictures, "image_std", (0.5, 0.5, 0.5)),
        positions="divided",
        position_table_side=tower.position_table_side,
        downsample={m: DownsampleSpec(graph=names[m], merge=merge) for m, merge in MERGE.items()},
        downsample_mode=mode,
        small_image_upsize=_upsize(pictures) if traits.upsizes_by_choice else "always",
    )
    cfg.expect(pictures, "downsample_mode", mode)
    for place in (pictures, config):
        cfg.expect(place, "patch_size", tower.patch_size)
    return ModelPlan(
        graphs=(
            *vision_plans(tower, merge_after, full=names["16x"], plain=names["4x"]),
            merger_plan(tower.hidden_size, decoder.hidden_size),
            decoder_plan(decoder, stored),
        ),
        hidden_size=decoder.hidden_size,
        image=image,
        placeholder=_placeholder(checkpoint, traits),
        text=TextSpec(
            vocab_size=decoder.vocab_size,
            context_length=decoder.context_length,
            dropped_ids=texts.special_ids(checkpoint),
            stop_token="decoded",
            template_variables=texts.template_variables(checkpoint, template),
            positions=traits.positions,
            newline_id=texts.newline_id(checkpoint, config) if traits.positions == "canvas" else None,
        ),
        generation=texts.generation(
            checkpoint,
            vocab_size=decoder.vocab_size,
            # config.json names only the end of the text, not of a turn
            stop_tokens=("<|im_end|>", "<|endoftext|>"),
            fixed=False,
            repetition_penalty=1.0,
            max_new_tokens=512,
        ),
        video=_video(checkpoint, image),
        ignored=("mtp.", "lm_head.") if stored.tied else ("mtp.",),
        chat_template=template,
    )


def _vision(config: Mapping[str, Any]) -> tuple[SiglipConfig, int]:
    """The tower's sizes, and the layer after which windows merge."""
    vision = cfg.section(config, "vision_config")
    cfg.expect(vision, "hidden_act", "gelu_pytorch_tanh", "gelu_new")
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
    merge_after = cfg.integer(config, "insert_layer_id", 6, least=0)
    cfg.expect(vision, "insert_layer_id", merge_after)  # a copy, where transformers saved it
    if merge_after >= tower.num_layers:
        raise CheckpointError(f"config has insert_layer_id={shown(merge_after)}, but the tower has {tower.num_layers} layers")
    return tower, merge_after


def _decoder(config: Mapping[str, Any], traits: Traits, *, tied: bool) -> HybridConfig:
    text = cfg.section(config, "text_config")
    if (kind := text.get("model_type", "qwen3_5_text")) != "qwen3_5_text":
        raise CheckpointError(
            f"the language model is {shown(kind)}; of this family mcv knows the dense ones (qwen3_5_text) only"
        )
    cfg.expect(text, "hidden_act", "silu", "swish")
    cfg.expect(text, "attn_output_gate", True)
    head_dim, layer_kinds = cfg.integer(text, "head_dim"), _layer_kinds(text)
    positions = rope(text, head_dim=head_dim, theta=None, rotated=0.25, layer_kinds=layer_kinds)
    sections = cfg.numbers(positions.parameters, "mrope_section", (11, 11, 10))
    if len(sections) != 3:
        raise CheckpointError(f"config has mrope_section={list(sections)}, which is not three numbers")
    cfg.expect(positions.parameters, "mrope_interleaved", True)
    sizes = HybridConfig(
        vocab_size=cfg.integer(text, "vocab_size"),
        hidden_size=cfg.integer(text, "hidden_size"),
        intermediate_size=cfg.integer(text, "intermediate_size"),
        layer_kinds=layer_kinds,
        num_heads=cfg.integer(text, "num_attention_heads"),
        num_kv_heads=cfg.integer(text, "num_key_value_heads"),
        head_dim=head_dim,
        rotary_dim=positions.dim,
        linear_key_heads=cfg.integer(text, "linear_num_key_heads"),
        linear_value_heads=cfg.integer(text, "linear_num_value_heads"),
        linear_key_dim=cfg.integer(text, "linear_key_head_dim"),
        linear_value_dim=cfg.integer(text, "linear_value_head_dim"),
        conv_kernel=cfg.integer(text, "linear_conv_kernel_dim", 4),
        context_length=positions.context,
        rms_norm_eps=cfg.number(text, "rms_norm_eps", 1e-6),
        rope_theta=positions.theta,
        frequencies=positions.frequencies,
        rotary_scale=positions.scale,
        mrope_section=tuple(int(count) for count in sections) if traits.positions == "canvas" else (),
        tied=tied,
    )
    for many, few in (("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads")):
        if text[many] % text[few]:
            raise CheckpointError(f"config has {many}={text[many]}, which is not a multiple of {few}={text[few]}")
    return sizes


def _layer_kinds(text: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    count, interval = cfg.integer(text, "num_hidden_layers"), cfg.integer(text, "full_attention_interval", 4)
    kinds = text.get("layer_types") or ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise CheckpointError(f"config has layer_types={shown(kinds)}, which is not a list of names")
    if len(kinds) != count:
        raise CheckpointError(f"config has {len(kinds)} layer_types for num_hidden_layers={count}")
    if unknown := set(kinds) - {"linear_attention", "full_attention"}:
        raise CheckpointError(f"config has {shown(unknown.pop())} among its layer_types, which this family has not")
    return tuple(kinds)


def _placeholder(checkpoint: Checkpoint, traits: Traits) -> PlaceholderSpec:
    config, tokens = checkpoint.config, texts.token_ids(checkpoint)
    by_id = {number: token for token, number in tokens.items()}
    image, video = (by_id.get(config.get(f"{kind}_token_id", tokens.get(f"<|{kind}_pad|>")), "") for kind in ("image", "video"))
    around: dict[str, Any] = {
        f"{name}_{end}": texts.named_token(checkpoint, f"{name}_{end}_token", f"<{slash}{name}>")
        for name in ("image", "slice", "image_id")
        for end, slash in (("start", ""), ("end", "/"))
    }
    # The processor's own word counts before the image processor's.
    settings = cfg.Overlay(checkpoint.json("processor_config.json"), picture_settings(checkpoint))
    numbered = cfg.flag(settings, "use_image_id", True)
    spec = PlaceholderSpec(token=image, video_token=video, use_image_id=numbered, video_ids=traits.video_ids, **around)
    written = [image, video, *(token for name, token in around.items() if numbered or not name.startswith("image_id"))]
    if missing := [token for token in written if token not in tokens]:
        raise CheckpointError(
            f"tokenizer.json lacks the token {missing[0]}"
            if missing[0]
            else f"tokenizer.json has no token for image_token_id={config.get('image_token_id')} or "
            f"video_token_id={config.get('video_token_id')} of config.json"
        )
    if traits.positions == "canvas":
        cfg.expect(config, "mrope_mode", "canvas")
        for name in ("image_start", "image_end", "slice_start", "slice_end"):
            cfg.expect(config, f"{name}_id", tokens[around[name]])
    return spec


def _video(checkpoint: Checkpoint, image: ImageSpec) -> VideoSpec:
    """How frames are taken; they are cut and normalised as pictures are, into one slice unless a request says otherwise."""
    settings = video_settings(checkpoint)
    for key, value in (
        ("scale_resolution", image.scale_resolution),
        ("patch_size", image.patch_size),
        ("slice_mode", image.slice_mode),
        ("image_mean", list(image.mean)),
        ("image_std", list(image.std)),
        ("downsample_mode", image.downsample_mode),
    ):
        cfg.expect(settings, key, value)
    for key in ("max_slice_nums", "use_image_id"):  # of pictures, or of a request
        settings.get(key)
    stacked = cfg.integer(settings, "stack_frames", 1)
    return VideoSpec(max_num_frames=cfg.integer(settings, "max_num_frames", 128), stack_frames=stacked if stacked > 1 else None)


def _upsize(pictures: Mapping[str, Any]) -> SmallImageUpsize:
    value = cfg.string(pictures, "small_image_upsize", "always")
    if value not in ("always", "never", "adaptive"):
        raise CheckpointError(f"config has small_image_upsize={shown(value)}, which is none of always, never, adaptive")
    return cast(SmallImageUpsize, value)
