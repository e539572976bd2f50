"""Adapters: the merged tensors are PEFT's own."""

import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mcv_export.adapters import Adapter, open_merged
from mcv_export.adapters.tensors import LowRank, MergedTensor, matrix

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}
LAYERS = ["q_proj", "o_proj", "down_proj"]
PUBLISHED = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def model_of(golden_root: Path, peft_reference: Any) -> Callable[[str], Any]:
    return cache(lambda family: peft_reference.skeleton(golden_root / family / "checkpoint"))


def assert_equal(found: Any, wanted: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> list[str]:
    """All tensors are PEFT's within 1e-6; names of those that the adapters changed."""
    changed = []
    for name, tensor in wanted.items():
        stored = EMBEDDING if name == HEAD and HEAD not in found.tensors else name  # a head that is the embedding
        values = matrix(found.tensors[stored])
        expected = tensor.numpy().reshape(values.shape)
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(matrix(found.tensors[stored], 1, 2), values[1:2], rtol=1e-6, atol=1e-6, err_msg=name)
        if not np.allclose(expected, before[name].numpy().reshape(values.shape), atol=1e-4):
            changed.append(name)
    return changed


VARIANTS: list[tuple[str, dict[str, Any], int]] = [
    ("plain", {"target_modules": LAYERS}, 9),
    ("rank-stabilized", {"target_modules": LAYERS, "use_rslora": True}, 9),
    ("dora", {"target_modules": LAYERS, "use_dora": True}, 9),
    ("published", {"target_modules": PUBLISHED, "modules_to_save": ["embed_tokens", "resampler", "vpm"]}, 73),
    ("rank and alpha patterns", {
        "target_modules": LAYERS,
        "rank_pattern": {r"llm.model.layers.0.self_attn.q_proj": 7, "down_proj": 2},
        "alpha_pattern": {r".*layers\.1\.mlp\.down_proj": 3},
    }, 9),
    ("all linear", {"target_modules": "all-linear"}, 35),
    ("some layers", {"target_modules": LAYERS, "layers_to_transform": [1], "exclude_modules": "vpm.*"}, 3),
    ("a layer by pattern", {"target_modules": LAYERS, "layers_to_transform": 0, "layers_pattern": "layers"}, 4),
    ("excluded by name", {"target_modules": LAYERS, "exclude_modules": ["o_proj", "vpm.encoder.layers.0.self_attn.q_proj"]}, 6),
    ("fan_in_fan_out", {"target_modules": LAYERS, "fan_in_fan_out": True}, 9),
    ("all biases", {"target_modules": LAYERS, "bias": "all"}, 45),
    ("biases of LoRAs", {"target_modules": LAYERS, "bias": "lora_only"}, 14),
    ("biases in LoRAs", {"target_modules": ["fc1", "out_proj"], "lora_bias": True}, 14),
    ("embeddings", {"target_modules": ["embed_tokens", "position_embedding", "lm_head"]}, 3),
    ("dora of an embedding", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, 6),
    ("a convolution", {"target_modules": ["patch_embedding"]}, 1),
    ("dora of a convolution", {"target_modules": ["patch_embedding"], "use_dora": True, "r": 1}, 1),
    ("a whole attention", {"target_modules": ["attn", "kv_proj"]}, 3),
    ("tokens", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 500, 7]}, 6),
    ("tokens by name", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [7, 1]}}, 7),
    ("begun otherwise", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}, 5),
    ("half precision", {"target_modules": LAYERS, "use_dora": True}, 9),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "count"), VARIANTS, ids=[name for name, _, _ in VARIANTS])
def test_as_peft_merges(
    name: str,
    settings: dict[str, Any],
    count: int,
    golden_root: Path,
    peft_reference: Any,
    model_of: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = model_of("minicpmv2_6")
    folder = peft_reference.train(model, tmp_path / "lora", base="openbmb/MiniCPM-V-2_6", **{**LORA, **settings})
    if name == "half precision":
        halves = {key: value.bfloat16() for key, value in load_file(folder / "adapter_model.safetensors").items()}
        save_file(halves, folder / "adapter_model.safetensors")
    wanted = peft_reference.merged(model, [(folder, 1.0)])
    found = open_merged(golden_root / "minicpmv2_6" / "checkpoint", [Adapter(folder=folder, name="lora")])
    assert len(assert_equal(found, wanted, model.state_dict())) == count


def test_several_one_after_the_other(
    golden_root: Path, peft_reference: Any, model_of: Callable[..., Any], tmp_path: Path
) -> None:
    """A weight multiplies a LoRA's scaling, and a DoRA's lengths are those of the base: as PEFT with `set_scale`."""
    model = model_of("minicpmv2_6")
    settings: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["resampler"]},
        {**LORA, "target_modules": ["q_proj", "fc1"], "use_dora": True},
        {**LORA, "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
        {**LORA, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ]
    folders = [peft_reference.train(model, tmp_path / f"{i}", seed=i, **one) for i, one in enumerate(settings)]
    weights = [1.0, 0.5, -0.25, 1.5]
    wanted = peft_reference.merged(model, list(zip(folders, weights, strict=True)))
    adapters = [Adapter(folder=f, name=f.name, weight=w) for f, w in zip(folders, weights, strict=True)]
    found = open_merged(golden_root / "minicpmv2_6" / "checkpoint", adapters)
    changed = assert_equal(found, wanted, model.state_dict())
    assert {"llm.model.layers.1.self_attn.v_proj.weight", "resampler.query", "llm.model.embed_tokens.weight"} <= set(changed)
    assert [spec.weight for spec in found.adapters] == weights


def test_weights_add_up_as_those_of_a_weighted_adapter(
    golden_root: Path, peft_reference: Any, model_of: Callable[..., Any], tmp_path: Path
) -> None:
    """The sum that `add_weighted_adapter` makes exactly, by combination_type "cat"."""
    model = model_of("minicpmv2_6")
    folders = [peft_reference.train(model, tmp_path / f"{i}", seed=i, target_modules=["q_proj"], r=2 + i) for i in range(2)]
    wanted = peft_reference.combined(model, folders, [0.7, 0.2])
    adapters = [Adapter(folder=f, name=f.name, weight=w) for f, w in zip(folders, (0.7, 0.2), strict=True)]
    assert assert_equal(open_merged(golden_root / "minicpmv2_6" / "checkpoint", adapters), wanted, model.state_dict())


def test_half_of_what_is_held_in_full_is_half_way(
    golden_root: Path, peft_reference: Any, model_of: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["resampler"], "trainable_token_indices": [5]}
    folder = peft_reference.train(model_of("minicpmv2_6"), tmp_path / "lora", **settings)
    source = golden_root / "minicpmv2_6" / "checkpoint"
    base, half, full = (
        open_merged(source, adapters).tensors
        for adapters in ([], [Adapter(folder=folder, name="a", weight=0.5)], [Adapter(folder=folder, name="a")])
    )
    for name in ("resampler.query", "llm.model.embed_tokens.weight", "llm.model.layers.0.self_attn.q_proj.weight"):
        assert not np.array_equal(matrix(base[name]), matrix(full[name]))
        np.testing.assert_allclose(matrix(half[name]), (matrix(base[name]) + matrix(full[name])) / 2, atol=1e-6)


@pytest.mark.parametrize("family", ["minicpmv2_0", "minicpmv2_5", "minicpmv4_0", "minicpmv4_5", "minicpmv4_7", "minicpm_ocr"])
def test_every_family(
    family: str, golden_root: Path, peft_reference: Any, model_of: Callable[..., Any], tmp_path: Path
) -> None:
    model = model_of(family)
    targets = ["q_proj", "down_proj", "qkv", "in_proj_qkv", "linear_1", "fc1", "embed_tokens", "patch_embedding"]
    folder = peft_reference.train(model, tmp_path / "lora", **LORA, target_modules=targets, use_dora=True)
    wanted = peft_reference.merged(model, [(folder, 1.0)])
    found = open_merged(golden_root / family / "checkpoint", [Adapter(folder=folder, name="lora")])
    assert len(assert_equal(found, wanted, model.state_dict())) >= 7


TIED: list[tuple[dict[str, Any], bool]] = [
    ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    ({"target_modules": ["q_proj", "lm_head"]}, True),
    ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
    ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 500]}, True),
    ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, False),
]


@pytest.mark.parametrize("stored_twice", [False, True])
@pytest.mark.parametrize(("settings", "one"), TIED)
def test_a_head_that_is_the_embedding(
    settings: dict[str, Any],
    one: bool,
    stored_twice: bool,
    golden_root: Path,
    peft_reference: Any,
    model_of: Callable[..., Any],
    tmp_path: Path,
    copied: Callable[[str], Path],
) -> None:
    """What is added to one is added to both; one that is saved in full by itself is another from then on."""
    model = model_of("minicpmv4_6")
    folder = peft_reference.train(model, tmp_path / "lora", **LORA, **settings)
    wanted = peft_reference.merged(model, [(folder, 1.0)])
    source = copied("minicpmv4_6")
    if stored_twice:
        tensors = load_file(source / "model.safetensors")
        save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, source / "model.safetensors")
    found = open_merged(source, [Adapter(folder=folder, name="lora")])
    assert assert_equal(found, wanted, model.state_dict())
    assert (HEAD not in found.tensors) == one
    assert torch.equal(wanted[HEAD], wanted[EMBEDDING]) == one
    assert found.config["tie_word_embeddings"] == one


def test_as_the_models_own_class_saves(golden_root: Path, peft_reference: Any, tmp_path: Path) -> None:
    """4.6 by its class of transformers: the names of its modules, and its weights, are the checkpoint's."""
    from transformers import MiniCPMV4_6ForConditionalGeneration

    source = golden_root / "minicpmv4_6" / "checkpoint"
    model = MiniCPMV4_6ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    targets = r".*language_model.*(q_proj|in_proj_qkv|down_proj)"
    folder = peft_reference.train(model, tmp_path / "lora", **LORA, target_modules=targets, modules_to_save=["merger"])
    wanted = peft_reference.merged(model, [(folder, 1.0)])
    found = open_merged(source, [Adapter(folder=folder, name="lora")])
    assert len(assert_equal(found, wanted, model.state_dict())) > 10


def test_as_scripts_save(golden_root: Path, peft_reference: Any, model_of: Callable[..., Any], tmp_path: Path) -> None:
    """A `.bin`, names with the adapter's name, what was trained in full in a file of its own, and wrappers of trainers."""
    model = model_of("minicpmv2_6")
    settings = {"target_modules": PUBLISHED, "modules_to_save": ["embed_tokens", "resampler", "vpm"]}
    folder = peft_reference.train(model, tmp_path / "lora", **LORA, **settings)
    wanted = peft_reference.merged(model, [(folder, 1.0)])
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    named = {key.replace(".weight", ".default.weight") if "lora_" in key else key: value for key, value in tensors.items()}
    beside = {}
    for key in [key for key in named if "lora_" not in key]:
        module, rest = next((m, key.split(f".{m}.")[1]) for m in settings["modules_to_save"] if f".{m}." in key)
        prefix = key.removesuffix(f"{module}.{rest}")
        value = named.pop(key)
        beside[f"module.{prefix}{module}.modules_to_save.default.{rest}"] = value
        beside[f"module.{prefix}{module}.original_module.{rest}"] = torch.zeros_like(value)
    torch.save({f"_fsdp_wrapped_module.{key}": value for key, value in named.items()}, folder / "adapter_model.bin")
    torch.save(beside, folder / "vpm_resampler_embedtokens.pt")
    found = open_merged(golden_root / "minicpmv2_6" / "checkpoint", [Adapter(folder=folder, name="lora")])
    assert_equal(found, wanted, model.state_dict())
    assert set(found.adapters[0].files) == {"adapter_config.json", "adapter_model.bin", "vpm_resampler_embedtokens.pt"}


@pytest.mark.parametrize(
    ("family", "inner", "own"), [("minicpmv2_6", "llm.", ""), ("minicpmv4_6", "model.language_model.", "model.")]
)
def test_trained_on_the_language_model_alone(
    family: str, inner: str, own: str, golden_root: Path, peft_reference: Any, model_of: Callable[..., Any], tmp_path: Path
) -> None:
    """Its names then begin otherwise; those of the base begin one way only."""
    model = model_of(family)
    folder = peft_reference.train(model, tmp_path / "lora", **LORA, target_modules=["q_proj", "down_proj", "lm_head"],
                                  exclude_modules=r"vpm.*|model\.vision_tower.*")  # fmt: skip
    wanted = peft_reference.merged(model, [(folder, 1.0)])
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace(f"base_model.model.{inner}", f"base_model.model.{own}"): value for key, value in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    found = open_merged(golden_root / family / "checkpoint", [Adapter(folder=folder, name="lora")])
    assert_equal(found, wanted, model.state_dict())


class _Counted:
    """A tensor [rows, columns] of ones that knows the most rows that were asked for at once."""

    name = "counted"

    def __init__(self, rows: int, columns: int) -> None:
        self.shape, self.most = (rows, columns), 0

    def rows(self, first: int, last: int) -> NDArray[np.float32]:
        self.most = max(self.most, last - first)
        return np.ones((last - first, self.shape[1]), np.float32)


@pytest.mark.parametrize("dora", [False, True])
def test_memory_is_that_of_a_block(dora: bool) -> None:
    """Merging a block takes its own size a few times and the adapter, however many rows the tensor has."""
    rows, columns, rank, block = 32_768, 512, 8, 128
    base = _Counted(rows, columns)
    lengths = _Counted(rows, 1) if dora else None
    merged = MergedTensor(base, None, [LowRank(_Counted(rank, columns), _Counted(rows, rank), 0.5, lengths)])
    tracemalloc.start()
    for first in range(0, rows, block):
        merged.rows(first, first + block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    adapter = 4 * (rank * (rows + columns) + rows)
    assert base.most == block
    assert peak < 5 * 4 * block * columns + adapter
    assert peak < 4 * rows * columns / 10, "the whole tensor was there"
