"""Every key of a checkpoint's configuration is read, known to have no effect, or refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mcv_export.checkpoint import open_checkpoint
from mcv_export.config import Config, Overlay
from mcv_export.families import recognise
from mcv_export.plan import ModelPlan
from mcv_export.sources import resolve
from mcv_graphs import ops
from mcv_runtime.errors import CheckpointError

RESAMPLER = ("minicpmv2_0", "minicpmv2_5", "minicpmv2_6", "minicpmv4_0", "minicpmv4_5")
MERGER = ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
FAMILIES = (*RESAMPLER, *MERGER)
V4_DUMP = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
    "begin_suppress_tokens": None, "bos_token_id": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "eos_token_id": None, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "pad_token_id": None, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None, "task_specific_params": None,
    "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": True,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": "bfloat16", "torchscript": False, "typical_p": 1.0,
    "use_bfloat16": False, "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-06,
    "num_channels": 3, "model_type": "siglip_vision_model",
}  # fmt: skip
"""What transformers 4 writes of a nested configuration."""


def planned(folder: Path) -> ModelPlan:
    checkpoint = open_checkpoint(folder)
    return recognise(checkpoint.config).plan(checkpoint)


def language(config: dict[str, Any]) -> dict[str, Any]:
    place: dict[str, Any] = config.get("text_config", config)
    return place


def facts(plan: ModelPlan) -> tuple[Any, ...]:
    return plan.image, plan.placeholder, plan.text, plan.generation, plan.video, plan.graphs[-1].weights, plan.graphs[-1].io


def test_a_config_remembers() -> None:
    config = Config({"a": 1, "b": None, "c": {"d": 2, "e": 3}, "f": {"g": None}})
    assert config.get("a") == 1
    assert "b" not in config
    assert config["c"]["d"] == 2
    assert [(key, path) for key, path, _ in config.unread()] == [("e", "c.e")]
    assert config == {"a": 1, "c": {"d": 2, "e": 3}, "f": {}}
    assert len(list(config.unread())) == 1
    below = Config({"a": 5, "x": 6})
    assert (Overlay(config, below)["a"], Overlay(config, below)["x"]) == (1, 6)
    assert not list(below.unread())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "some_new_scale", 2.0),
        ("config.json", "rotary_something", {"x": 1}),
        ("generation_config.json", "no_repeat_ngram_size", 3),
        ("generation_config.json", "stop_strings", ["###"]),
        ("generation_config.json", "chat_template_kwargs", {"enable_thinking": True}),
        ("preprocessor_config.json", "do_normalize", False),
        ("preprocessor_config.json", "some_new_key", "x"),
        ("processor_config.json", "some_new_key", "x"),
    ],
)
def test_a_key_that_nobody_weighed(family: str, file: str, key: str, value: Any, copy_checkpoint: Callable[..., Path]) -> None:
    folder = copy_checkpoint(family, lambda content: content.update({key: value}), file)
    with pytest.raises(CheckpointError, match=f"{key}(.enable_thinking)?=") as caught:
        planned(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"), ("mlp_bias", True), ("use_sliding_window", "yes"), ("partial_rotary_factor", 0.3),
        ("head_dim", "wide"), ("final_logit_softcapping", 30.0), ("logits_scaling", 8.0), ("num_experts", 8),
        ("rope_scaling", {"type": "ntk-by-parts", "factor": 2.0}), ("rms_norm_eps", float("nan")),
        ("layer_types", ["chunked_attention", "chunked_attention"]), ("num_attention_heads", 7),
    ],
)  # fmt: skip
def test_another_language_model(family: str, key: str, value: Any, copy_checkpoint: Callable[..., Path]) -> None:
    folder = copy_checkpoint(family, lambda config: language(config).update({key: value}))
    other = {"rope_scaling": "|ntk-by-parts", "num_attention_heads": "|asks for", "partial_rotary_factor": "|short_factor"}
    other["rms_norm_eps"] = "=NaN is no number"
    said = key + other.get(key, "")
    with pytest.raises(CheckpointError, match=said):
        resolve(planned(folder).graphs[-1], open_checkpoint(folder))  # the shapes say so, where the config alone does not


@pytest.mark.parametrize("family", FAMILIES)
def test_what_savers_add_changes_nothing(family: str, golden_root: Path, copy_checkpoint: Callable[..., Path]) -> None:
    def add(config: dict[str, Any]) -> None:
        for section in ("vision_config", "slice_config"):
            if section in config:
                config[section] = {**(V4_DUMP if section == "vision_config" else {"torch_dtype": "float16"}), **config[section]}
        language(config).update(head_dim=language(config).get("head_dim"), some_new_key=None, mlp_bias=False)
        config.update(dtype="bfloat16", unsloth_version="2026.1", use_cache=False, pad_token_id=0, attention_dropout=0.1)

    before = planned(golden_root / family / "checkpoint")
    after = planned(copy_checkpoint(family, add))
    assert facts(after) == facts(before)


CLASSES = dict(zip(RESAMPLER, ("LlamaConfig", "LlamaConfig", "Qwen2Config", "LlamaConfig", "Qwen3Config"), strict=True))
V4_GENERATION = {
    "assistant_confidence_threshold": 0.4, "assistant_early_exit": None, "assistant_lookbehind": 10, "cache_config": None,
    "cache_implementation": None, "constraints": None, "disable_compile": False, "do_sample": False, "dola_layers": None,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "force_words_ids": None, "forced_decoder_ids": None, "generation_kwargs": {},
    "guidance_scale": None, "is_assistant": False, "low_memory": None, "max_matching_ngram_size": None, "max_time": None,
    "min_new_tokens": None, "min_p": None, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant",
    "output_logits": None, "penalty_alpha": None, "prefill_chunk_size": None, "prompt_lookup_num_tokens": None,
    "renormalize_logits": False, "return_legacy_cache": None, "sequence_bias": None, "stop_strings": None,
    "target_lookbehind": 10, "token_healing": False, "use_cache": True, "watermarking_config": None,
    "_from_model_config": True,
}  # fmt: skip
"""What GenerationConfig of transformers 4.40 to 4.57 has besides the keys of V4_DUMP."""


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_transformers_4_has_by_default(family: str, golden_root: Path, copy_checkpoint: Callable[..., Path]) -> None:
    general = {key: value for key, value in V4_DUMP.items() if key not in ("tie_word_embeddings", "num_channels", "hidden_act")}
    own = {"head_dim": None, "rope_scaling": None, "pretraining_tp": 1, "mlp_bias": False, "_attn_implementation_autoset": True}

    def dump(config: dict[str, Any]) -> None:
        for place in (config, language(config), config.get("vision_config", {})):
            wanted = {**general, **own} if place is language(config) else general
            place.update({key: value for key, value in wanted.items() if key not in place and key != "layer_norm_eps"})

    before = planned(golden_root / family / "checkpoint")
    folder = copy_checkpoint(family, dump)
    defaults = {
        **V4_GENERATION,
        **{key: value for key, value in general.items() if key in ("max_length", "top_k", "pad_token_id")},
    }
    copy_checkpoint(family, lambda c: c.update({**defaults, **c}), "generation_config.json")
    assert facts(planned(folder)) == facts(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_transformers_5_has_by_default(family: str, golden_root: Path, copy_checkpoint: Callable[..., Path]) -> None:
    """Its own classes, and for the families whose code is their publisher's those that this code is derived from."""
    transformers = pytest.importorskip("transformers")
    source = golden_root / family / "checkpoint"

    def dump(config: dict[str, Any]) -> None:
        if family in MERGER:
            made = transformers.AutoConfig.from_pretrained(source).to_dict()
        else:
            own = {key: value for key, value in config.items() if key not in ("vision_config", "slice_config", "model_type")}
            made = {**config, **getattr(transformers, CLASSES[family])(**own).to_dict()}
            made["architectures"] = config["architectures"]
            if "vision_config" in config:
                made["vision_config"] = transformers.SiglipVisionConfig(**config["vision_config"]).to_dict()
        config.clear()
        config.update(json.loads(json.dumps(made, default=str)))

    before = planned(source)
    folder = copy_checkpoint(family, dump)
    copy_checkpoint(
        family,
        lambda c: c.update({**json.loads(json.dumps(transformers.GenerationConfig().to_dict(), default=str)), **c}),
        "generation_config.json",
    )
    assert facts(planned(folder)) == facts(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_is_as_if_it_were_not_there(family: str, golden_root: Path, copy_checkpoint: Callable[..., Path]) -> None:
    def absent(config: dict[str, Any]) -> None:
        place = language(config)
        for key in ("sliding_window", "use_sliding_window", "rope_scaling", "layer_types", "tie_word_embeddings", "hidden_act"):
            if not (key == "rope_scaling" and place.get(key)):
                place[key] = None
        config.setdefault("vision_config", {}).update(hidden_act=None, layer_norm_eps=None)

    def unsaid(config: dict[str, Any]) -> None:
        config.update(max_new_tokens=None, eos_token_id=None, chat_template_kwargs=None)

    before = planned(golden_root / family / "checkpoint")
    copy_checkpoint(family, unsaid, "generation_config.json")
    if (golden_root / family / "checkpoint" / "preprocessor_config.json").exists():
        copy_checkpoint(family, lambda c: c.update(slice_mode=None, norm_mean=None, image_std=None), "preprocessor_config.json")
    after = planned(copy_checkpoint(family, absent))
    assert set(after.generation.stop_token_ids) == set(before.generation.stop_token_ids)
    assert facts(after)[:3] == facts(before)[:3]


def test_all_heads_have_their_own_keys_where_null_says_so(copy_checkpoint: Callable[..., Path]) -> None:
    folder = copy_checkpoint("minicpmv2_0", lambda config: config.update(num_key_value_heads=None, head_dim=None))
    entry = planned(folder).graphs[-1].io.cache[0]
    assert entry.shape[1:] == (4, "cache_length", 64)


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({}, 32768),
        ({"use_sliding_window": True, "sliding_window": 1000, "max_window_layers": 1}, 1000),
        ({"use_sliding_window": True, "sliding_window": 1000, "max_window_layers": 2}, 32768),
        ({"use_sliding_window": True, "sliding_window": 100000, "max_window_layers": 0}, 32768),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, 32768),
        ({"layer_types": ["full_attention", "full_attention"]}, 32768),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]}, 64),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 2}, 32768),
    ],
)
def test_a_context_ends_where_windows_begin(change: dict[str, Any], context: int, copy_checkpoint: Callable[..., Path]) -> None:
    assert planned(copy_checkpoint("minicpmv2_6", lambda c: c.update(change))).text.context_length == context


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"layer_types": ["full_attention"]}, "1 layer_types for num_hidden_layers=2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention' among its layer_types"),
        ({"patch_size": 16}, "patch_size=16"),
        ({"slice_config": {"max_slice_nums": 9, "patch_size": 16}}, "slice_config.patch_size=16, but .* a side of 14"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config.hidden_act='relu'"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "already quantized .awq"),
        ({"slice_mode": "yes"}, "slice_mode='yes', which is not true or false"),
        ({"hidden_size": None}, "hidden_size=null, which has no default"),
    ],
)
def test_refused(change: dict[str, Any], line: str, copy_checkpoint: Callable[..., Path]) -> None:
    def update(config: dict[str, Any]) -> None:
        for key, value in change.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value

    with pytest.raises(CheckpointError, match=line):
        folder = copy_checkpoint("minicpmv2_6", update)
        if "slice_mode" in change:
            copy_checkpoint("minicpmv2_6", lambda c: c.pop("slice_mode"), "preprocessor_config.json")
        planned(folder)


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("text_config.rope_parameters.rope_type", {"a": 1}, "rotary positions of type"),
        ("text_config.rope_parameters.rope_type", ["default"], "rotary positions of type"),
        ("text_config.layer_types", 1_000_000, "layer_types=1000000, which is not a list of names"),
        ("text_config.layer_types", [["full_attention"]], "which is not a list of names"),
        ("vision_config.intermediate_size", 10**30, "intermediate_size=10+, which is not a positive integer below 2,147,"),
        ("text_config.rms_norm_eps", 10**400, "rms_norm_eps=10+.*, which is not a positive number"),
    ],
)
def test_values_that_python_itself_refuses(path: str, value: Any, line: str, copy_checkpoint: Callable[..., Path]) -> None:
    *parents, key = path.split(".")

    def update(config: dict[str, Any]) -> None:
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value

    with pytest.raises(CheckpointError, match=line):
        planned(copy_checkpoint("minicpmv4_6", update))


@pytest.mark.parametrize(("family", "key"), [("minicpmv2_5", "batch_vision_input"), ("minicpmv4_5", "batch_3d_resampler")])
def test_a_switch_that_one_family_has(family: str, key: str, copy_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=f"{key}=False"):
        planned(copy_checkpoint(family, lambda config: config.update({key: False})))


def test_another_activation_of_a_tower_is_computed(copy_checkpoint: Callable[..., Path]) -> None:
    plan = planned(copy_checkpoint("minicpmv2_6", lambda c: c["vision_config"].update(hidden_act="gelu", layer_norm_eps=1e-5)))
    tower: Any = plan.graphs[0].module()
    assert (tower.layers[0].gelu, tower.layers[0].layer_norm1.eps) == (ops.gelu, 1e-5)


def test_what_minicpm_o_hears_and_says_is_left_out(copy_checkpoint: Callable[..., Path]) -> None:
    more = {
        "architectures": ["MiniCPMO"], "version": "2.6", "audio_config": {"d_model": 8}, "audio_pool_step": 2,
        "audio_chunk_length": 1.0, "tts_config": {"llm_dim": 8}, "init_vision": True, "init_audio": True, "init_tts": True,
        "stream_input": False, "listen_speak_type": "asr", "chunk_input": True, "use_image_id": True, "vision_batch_size": 16,
    }  # fmt: skip
    folder = copy_checkpoint("minicpmv2_6", lambda config: config.update(more))
    copy_checkpoint(
        "minicpmv2_6", lambda c: c.update(audio_pool_step=2, n_fft=400, sampling_rate=16000), "preprocessor_config.json"
    )
    assert planned(folder).notice
    copy_checkpoint("minicpmv2_6", lambda config: config.update(vision_pool_step=2))
    with pytest.raises(CheckpointError, match="vision_pool_step=2"):
        planned(folder)


@pytest.mark.parametrize("family", MERGER)
def test_picture_settings_inside_the_processor_s(family: str, copy_checkpoint: Callable[..., Path]) -> None:
    """`processor.save_pretrained` of transformers 5: one file, which counts before a preprocessor_config.json that stayed."""
    changed = {"max_slice_nums": 4, "image_mean": [0.4, 0.4, 0.4], "use_image_id": False, "some_old_key": None}
    mode = "4x" if family == "minicpm_ocr" else "16x"
    video = {
        "max_num_frames": 64, "stack_frames": 3, "max_slice_nums": 9, "image_mean": [0.4, 0.4, 0.4], "do_sample_frames": True,
        "video_processor_type": "X", "downsample_mode": mode, "resample": 3, "rescale_factor": 0.00392156862745098, "fps": None,
    }  # fmt: skip

    def processor(content: dict[str, Any]) -> None:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        saved = {"do_resize": True, "do_rescale": True, "do_convert_rgb": True, "resample": 3, "data_format": "channels_first"}
        content.update(processor_class="P", image_processor={**settings, **saved, **changed}, video_processor=video)

    folder = copy_checkpoint(family, lambda content: None)
    copy_checkpoint(family, processor, "processor_config.json")
    for _ in range(2):  # with the old file beside it, and without
        plan = planned(folder)
        assert (plan.image.max_slice_nums, plan.image.mean) == (4, (0.4, 0.4, 0.4))
        assert plan.placeholder.use_image_id is False
        assert plan.video is not None
        assert (plan.video.max_num_frames, plan.video.stack_frames, plan.video.max_slice_nums) == (64, 3, 1)
        (folder / "preprocessor_config.json").unlink(missing_ok=True)
    copy_checkpoint(family, lambda c: c["video_processor"].update(image_mean=[0.5, 0.5, 0.5]), "processor_config.json")
    with pytest.raises(CheckpointError, match=r"video_processor.image_mean=\[0.5, 0.5, 0.5\]"):
        planned(folder)


@pytest.mark.parametrize("family", RESAMPLER[1:])
def test_picture_settings_of_the_resampler_generation(family: str, copy_checkpoint: Callable[..., Path]) -> None:
    changed = {"max_slice_nums": 4, "norm_mean": [0.4, 0.4, 0.4], "mean": [0.4, 0.4, 0.4], "use_image_id": False}
    folder = copy_checkpoint(family, lambda c: c.update(changed), "preprocessor_config.json")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    for name in ("preprocessor_config.json", "processor_config.json"):
        plan = planned(folder)
        assert (plan.image.max_slice_nums, plan.image.mean) == (4, (0.4, 0.4, 0.4)), name
        assert plan.placeholder.use_image_id is (family == "minicpmv2_5")
        (folder / "preprocessor_config.json").unlink(missing_ok=True)
        copy_checkpoint(family, lambda c: c.update(image_processor=settings), "processor_config.json")
    for key, value in (("image_feature_size", 32), ("patch_size", 16), ("image_mean", [0.5, 0.5, 0.5])):
        copy_checkpoint(family, lambda c, k=key, v=value: c.update(image_processor={**settings, k: v}), "processor_config.json")
        with pytest.raises(CheckpointError, match=f"image_processor.{key}="):
            planned(folder)


def test_other_names_of_the_tokens_around_a_picture(copy_checkpoint: Callable[..., Path]) -> None:
    folder = copy_checkpoint("minicpmv2_6", lambda c: c.update(im_start="<box>", unk="<ref>"), "preprocessor_config.json")
    spec = planned(folder).placeholder
    assert (spec.token, spec.image_start, spec.image_end) == ("<ref>", "<box>", "</image>")
    folder = copy_checkpoint(
        "minicpmv4_6", lambda c: c["extra_special_tokens"].update(slice_start_token="<box>"), "tokenizer_config.json"
    )
    assert planned(folder).placeholder.slice_start == "<box>"


def test_the_canvas_is_marked_by_the_tokens_that_are_written(copy_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="image_start_id=3"):
        planned(copy_checkpoint("minicpmv4_7", lambda config: config.update(image_start_id=3)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stop_token_may_be_an_ordinary_one(family: str, golden_root: Path, copy_checkpoint: Callable[..., Path]) -> None:
    before = planned(golden_root / family / "checkpoint").generation.stop_token_ids
    folder = copy_checkpoint(
        family, lambda c: c.update(eos_token_id=[*before, 300], max_new_tokens=77), "generation_config.json"
    )
    generation = planned(folder).generation
    assert (generation.stop_token_ids, generation.max_new_tokens) == ((*before, 300), 77)
    for wrong in (-1, 10**6, "</s>", [True]):
        copy_checkpoint(family, lambda c, ids=wrong: c.update(eos_token_id=ids), "generation_config.json")
        with pytest.raises(CheckpointError, match="eos_token_id="):
            planned(folder)


def test_the_merger_generation_stops_where_its_file_says(copy_checkpoint: Callable[..., Path]) -> None:
    folder = copy_checkpoint("minicpmv4_6", lambda c: c.update(eos_token_id=300), "generation_config.json")
    assert planned(folder).generation.stop_token_ids == (300,)
    (folder / "generation_config.json").unlink()
    assert planned(folder).generation.stop_token_ids == (1502, 1500)
    copy_checkpoint("minicpmv4_6", lambda c: (c.pop("eos_token_id"), c["text_config"].update(eos_token_id=[300])))
    assert planned(folder).generation.stop_token_ids == (1502, 1500, 300)


def test_inputs_are_left_alone(golden_root: Path, tmp_path: Path) -> None:
    """A checkpoint is planned twice from one opening: what was read stays read, and nothing changes."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(golden_root / "minicpmv4_5" / "checkpoint", folder)
    checkpoint = open_checkpoint(folder)
    family = recognise(checkpoint.config)
    assert facts(family.plan(checkpoint)) == facts(family.plan(checkpoint))
