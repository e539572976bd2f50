"""A checkpoint that is almost of the merger generation gets one line that says what differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcv_export.build import BuildOptions, build
from mcv_export.checkpoint import open_checkpoint
from mcv_export.families import recognise
from mcv_export.plan import ModelPlan
from mcv_runtime.errors import CheckpointError


@pytest.fixture
def folder(golden_root: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(golden_root / "minicpmv4_6" / "checkpoint", copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    return copy


def planned(folder: Path) -> ModelPlan:
    checkpoint = open_checkpoint(folder)
    return recognise(checkpoint.config).plan(checkpoint)


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def setting(section: str | None, key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> None:
        place = config if section is None else config[section]
        if value is ...:
            del place[key]
        else:
            place[key] = value

    return change


@pytest.mark.parametrize(
    ("section", "key", "value", "line"),
    [
        (None, "text_config", ..., "no section 'text_config'"),
        ("text_config", "head_dim", ..., "lacks the key 'head_dim'"),
        ("text_config", "linear_num_key_heads", 3, "not a multiple"),
        ("text_config", "layer_types", ["linear_attention"], "1 layer_types for num_hidden_layers=4"),
        ("text_config", "layer_types", ["sliding_attention"] * 4, "'sliding_attention' among its layer_types"),
        ("text_config", "model_type", "qwen3_5_moe_text", "dense ones"),
        ("text_config", "rope_parameters", {"rope_type": "proportional", "rope_theta": 1e7}, "type 'proportional'"),
        ("vision_config", "hidden_act", "gelu", "hidden_act='gelu'"),
        (None, "insert_layer_id", 4, "insert_layer_id=4, but the tower has 4 layers"),
        (None, "merger_times", 2, "merger_times=2"),
        (None, "downsample_mode", "2x", "downsample_mode='2x'"),
        (None, "image_token_id", 9, "image_token_id=9"),
    ],
)
def test_config(folder: Path, section: str | None, key: str, value: Any, line: str) -> None:
    with pytest.raises(CheckpointError, match=line) as caught:
        planned(changed(folder, setting(section, key, value)))
    assert "\n" not in str(caught.value)


def test_keys_that_published_files_leave_out(folder: Path) -> None:
    def forget(config: dict[str, Any]) -> None:
        for key in ("layer_types", "attn_output_gate", "attention_bias"):
            config["text_config"].pop(key, None)
        for key in ("downsample_mode", "drop_vision_last_layer", "image_size"):
            config.pop(key, None)

    before = planned(folder)
    after = planned(changed(folder, forget))
    assert after.image == before.image
    assert after.graphs[-1].io == before.graphs[-1].io


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.update({"model.language_model.layers.0.extra": torch.zeros(1)}), r"layers\.0\.extra"),
        (lambda t: t.pop("model.vision_tower.vit_merger.pre_norm.bias"), r"no tensor .*pre_norm\.bias"),
        (
            lambda t: t.update({"model.merger.mlp.0.linear_2.weight": t["model.merger.mlp.0.linear_2.weight"].T.contiguous()}),
            r"linear_2\.weight has shape \[256, 96\]",
        ),
    ],
    ids=["extra", "missing", "transposed"],
)
def test_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], line: str, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=line) as caught:
        build(folder, tmp_path / "bundle", BuildOptions(precision="fp32"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
