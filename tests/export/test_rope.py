"""Rotary positions of every spelling and kind, against `transformers.modeling_rope_utils` itself (a development dependency)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcv_export.build import BuildOptions, build
from mcv_export.checkpoint import open_checkpoint
from mcv_export.config import Config
from mcv_export.families import recognise
from mcv_export.rope import Rope, rope
from mcv_graphs.decoder import DecoderConfig, rotary_tables
from mcv_runtime import load
from mcv_runtime.errors import CheckpointError

transformers = pytest.importorskip("transformers", minversion="5.18")

HEAD_DIM, CONTEXT, THETA = 48, 2048, 1e6
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn that is not truncated": {
        "rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 1024, "truncate": False, "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    "yarn with magnitudes": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 512, "mscale": 1.0, "mscale_all_dim": 0.5,
    },
    "yarn with a factor of attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 0.75,
    },
    "yarn whose factor is null": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1 + 0.05 * i for i in range(24)], "long_factor": [2.0] * 24,
        "original_max_position_embeddings": 512,
    },
    "longrope with a factor": {
        "rope_type": "longrope", "short_factor": [1.5] * 24, "long_factor": [2.0] * 24, "factor": 1.0,
        "original_max_position_embeddings": 2048,
    },
}  # fmt: skip


def config(**more: Any) -> Config:
    return Config({"max_position_embeddings": CONTEXT, **more})


def frequencies(found: Rope) -> torch.Tensor:
    """As the decoder has them: of position 1, for the table's angles are no more than products."""
    sizes = DecoderConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=found.dim,
        context_length=2, rms_norm_eps=1e-6, rope_theta=found.theta, frequencies=found.frequencies, rotary_scale=found.scale,
    )  # fmt: skip
    return torch.stack([table[1] for table in rotary_tables(sizes)])


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_frequencies_are_those_of_transformers(name: str, partial: float) -> None:
    scaled = dict(SCALED[name])
    for key in ("short_factor", "long_factor"):
        if key in scaled:
            scaled[key] = scaled[key][: int(24 * partial)]
    reference = transformers.LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, head_dim=HEAD_DIM, max_position_embeddings=CONTEXT,
        rope_parameters={**scaled, "rope_theta": THETA, "partial_rotary_factor": partial},
    )  # fmt: skip
    make = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[scaled["rope_type"]]
    expected, scale = make(reference, torch.device("cpu"))
    older = {("type" if key == "rope_type" else key): value for key, value in scaled.items()}
    for spelled in (
        config(rope_parameters={**scaled, "rope_theta": THETA, "partial_rotary_factor": partial}),
        config(rope_scaling=older, rope_theta=THETA, partial_rotary_factor=partial),
        config(rope_scaling=scaled, rope_parameters=scaled, rope_theta=THETA, partial_rotary_factor=partial),
        config(rope_parameters={"full_attention": {**scaled, "rope_theta": THETA, "partial_rotary_factor": partial}}),
    ):
        found = rope(spelled, head_dim=HEAD_DIM)
        assert (found.theta, found.dim) == (THETA, int(HEAD_DIM * partial))
        assert torch.equal(torch.tensor(found.frequencies, dtype=torch.float32), expected)
        assert found.scale == scale
        assert torch.equal(frequencies(found), torch.stack([expected.cos() * scale, expected.sin() * scale]))


@pytest.mark.parametrize(
    "spelled",
    [
        {"rope_theta": THETA},
        {"rope_theta": THETA, "rope_scaling": None},
        {"rope_theta": THETA, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": THETA, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": THETA}},
        {"rope_parameters": {"rope_theta": THETA}, "rope_theta": THETA, "rope_scaling": None},
        {"rope_parameters": {"full_attention": {"rope_theta": THETA}, "sliding_attention": {"rope_theta": 3.0}}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": THETA}},
        {"rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": THETA}},
    ],
)
def test_plain_positions(spelled: dict[str, Any]) -> None:
    read = config(**spelled)
    found = rope(read, head_dim=HEAD_DIM)
    expected = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    assert (found.theta, found.frequencies, found.scale, found.context) == (THETA, (), 1.0, CONTEXT)
    assert torch.equal(frequencies(found), torch.stack([expected.cos(), expected.sin()]))
    assert not list(read.unread())


def test_without_a_base() -> None:
    assert rope(config(), head_dim=HEAD_DIM).theta == 10000.0
    assert rope(config(rope_theta=None), head_dim=HEAD_DIM).theta == 10000.0
    with pytest.raises(CheckpointError, match="lacks the key 'rope_theta'"):
        rope(config(), head_dim=HEAD_DIM, theta=None)


def test_how_far_positions_go() -> None:
    assert rope(config(rope_scaling=SCALED["yarn"]), head_dim=HEAD_DIM).context == 2048
    assert rope(config(rope_scaling=SCALED["yarn with magnitudes"]), head_dim=HEAD_DIM).context == 20480
    assert rope(config(rope_scaling=SCALED["longrope"]), head_dim=HEAD_DIM).context == 512


@pytest.mark.parametrize(
    ("spelled", "line"),
    [
        ({"rope_scaling": {"rope_type": "proportional"}}, "type 'proportional'; mcv knows default, dynamic, linear, yarn"),
        ({"rope_scaling": {"type": "su"}}, "type 'su'"),
        ({"rope_scaling": "yarn"}, "are not an object"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta=10000.0 and, .* 1000000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
            "for each kind",
        ),
        (
            {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 1e6}}},
            "no section 'full_attention'",
        ),
        ({"rope_scaling": {"type": "linear"}}, "lacks the key 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor=nan"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}, "not below"),
        ({"rope_scaling": {**SCALED["longrope"], "short_factor": [1.0] * 3}}, "3 short_factor values, not 24"),
    ],
)
def test_refused(spelled: dict[str, Any], line: str) -> None:
    kinds = ("full_attention", "sliding_attention")
    with pytest.raises(CheckpointError, match=line):
        rope(config(**spelled), head_dim=HEAD_DIM, layer_kinds=kinds if "for each kind" in line else kinds[:1])


@pytest.mark.parametrize("family", ["minicpmv2_0", "minicpmv2_5", "minicpmv2_6", "minicpmv4_0", "minicpmv4_5"])
def test_a_family_reads_both_spellings(family: str, golden_root: Path, copy_checkpoint: Callable[..., Path]) -> None:
    def resaved(config: dict[str, Any]) -> None:
        scaling = config.pop("rope_scaling", None) or {}
        config["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": config.pop("rope_theta")}
        config["dtype"] = config.pop("torch_dtype", None)

    before, after = open_checkpoint(golden_root / family / "checkpoint"), open_checkpoint(copy_checkpoint(family, resaved))
    one, other = (recognise(each.config).plan(each).graphs[-1] for each in (before, after))
    for name in ("cos", "sin"):
        np.testing.assert_array_equal(one.computed[name](), other.computed[name]())


def test_a_scaled_bundle_answers_otherwise(copy_checkpoint: Callable[..., Path], golden_root: Path, tmp_path: Path) -> None:
    """As the Qwen model cards advise for long contexts."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    scaled = copy_checkpoint("minicpmv2_6", lambda config: config.update(rope_scaling=yarn))
    plain = golden_root / "minicpmv2_6" / "checkpoint"
    bundles = [build(each, tmp_path / f"of-{each.parent.name}", BuildOptions(precision="fp32")) for each in (scaled, plain)]
    assert [one.manifest.text.context_length for one in bundles] == [131072, 32768]
    one, other = (load(each.folder, threads=1).ask(None, "What is it?", max_new_tokens=12).tokens for each in bundles)
    assert one != other
