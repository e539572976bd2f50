"""Adapters that cannot be merged: one line that names the tensor or the key, exit code 2, nothing half-written."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcv_export import cli
from mcv_export.adapters import Adapter, open_merged
from mcv_export.adapters.names import is_of_another_model

Q = "base_model.model.llm.model.layers.0.self_attn.q_proj"
A, B, M = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"{Q}.lora_magnitude_vector"
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "openbmb/MiniCPM-V-2_6",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A sound adapter of one layer of the 2.6 golden checkpoint."""
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file({A: torch.full((4, 256), 0.01), B: torch.full((256, 4), 0.01)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def source(golden_root: Path) -> Path:
    return golden_root / "minicpmv2_6" / "checkpoint"


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `mcv-export build` complains of."""

    def run(model: Path, *options: object) -> str:
        out = tmp_path / "out" / "bundle"
        monkeypatch.setattr(sys, "argv", ["mcv-export", "build", str(model), str(out), *map(str, options)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        assert (exit_info.value.code, printed.out) == (2, "")
        assert printed.err.startswith("mcv-export: ")
        assert printed.err.count("\n") == 1
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return printed.err

    return run


def change(folder: Path, edit: Callable[[dict[str, Any]], Any], tensors: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    edit(config)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    held = load_file(folder / "adapter_model.safetensors")
    tensors(held)
    save_file({name: value.clone() for name, value in held.items()}, folder / "adapter_model.safetensors")


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type='LOHA': LORA is merged, other kinds are not"),
    ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ({"peft_type": "PROMPT_TUNING"}, "peft_type='PROMPT_TUNING'"),
    ({"peft_type": "ADALORA"}, "peft_type='ADALORA'"),
    ({"peft_type": None}, "peft_type=None"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens=.*cannot be merged"),
    ({"megatron_config": {"tensor_model_parallel_size": 2}}, "megatron_config=.*cannot be merged"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication=.*cannot be merged"),
    ({"target_parameters": ["resampler.proj"]}, "target_parameters=.*cannot be merged"),
    ({"use_qalora": True}, "use_qalora=True.*cannot be merged"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.*cannot be merged"),
    ({"kasa_config": {"beta": 1}}, "kasa_config=.*cannot be merged"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
    ({"init_lora_weights": "of next year"}, "init_lora_weights='of next year': which is unknown"),
    ({"twist": 0.5}, "twist=0.5: a key unknown here"),
    ({"bias": "some"}, "bias='some'"),
    ({"r": 0}, "r=0: a positive integer is wanted"),
    ({"r": "4"}, "r='4': a positive integer is wanted"),
    ({"lora_alpha": None}, "lora_alpha=None: a number is wanted"),
    ({"use_rslora": "yes"}, "use_rslora='yes': true or false is wanted"),
    ({"rank_pattern": [4]}, "rank_pattern=.*an object is wanted"),
    ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern='8': a number is wanted"),
    ({"target_modules": 3}, "target_modules=3: a list of strings is wanted"),
    ({"target_modules": "("}, "no regular expression"),
    ({"rank_pattern": {"*": 3}}, "no regular expression"),
    ({"modules_to_save": "resampler", "trainable_token_indices": [-1]}, "trainable_token_indices=.*numbers from 0"),
    ({"target_modules": "q_proj", "layers_to_transform": [0]}, "layers_to_transform=.*lists of target_modules only"),
    ({"target_modules": ["k_proj"]}, r"q_proj.lora_A is of a layer that its adapter_config.json leaves out"),
    ({"exclude_modules": r"llm\..*"}, r"q_proj.lora_A is of a layer that its adapter_config.json leaves out"),
    ({"layers_to_transform": [1]}, r"q_proj.lora_A is of a layer that its adapter_config.json leaves out"),
    ({"use_dora": True}, "q_proj.lora_A has no lora_magnitude_vector beside it"),
    ({"lora_bias": True}, "q_proj.lora_A has no lora_B.bias beside it"),
    ({"rank_pattern": {"q_proj": 8}}, "q_proj.lora_A has rank 4, but its adapter_config.json says 8"),
    ({"r": 16}, "q_proj.lora_A has rank 4, but its adapter_config.json says 16"),
    ({"modules_to_save": ["resampler"]}, r"resampler\.\S+ is missing, which its adapter_config.json lists \(resampler\)"),
    ({"base_model_name_or_path": "openbmb/MiniCPM-o-2_6"}, r"q_proj.weight is of 'openbmb/MiniCPM-o-2_6', which is another"),
    ({"base_model_name_or_path": "/models/MiniCPM-V-4_5/"}, r"is of '/models/MiniCPM-V-4_5/', which is another model"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "complaint"), KEYS, ids=[str(keys)[:60] for keys, _ in KEYS])
def test_a_key_is_understood_or_refused(
    keys: dict[str, Any], complaint: str, lora: Path, source: Path, said: Callable[..., str]
) -> None:
    change(lora, lambda config: config.update(keys), lambda tensors: None)
    assert re.search(complaint, said(source, "--adapter", lora))


@pytest.mark.parametrize(
    "keys",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "corda_config": {"corda_method": "kpm"}, "loftq_config": {}},
        {"megatron_config": None, "megatron_core": "megatron.core", "use_qalora": False, "qalora_group_size": 16},
        {"some_future_switch": False, "some_future_config": None, "some_future_list": []},
        {"lora_dropout": 0.5, "task_type": "CAUSAL_LM", "inference_mode": True, "peft_version": "9.9", "revision": "main"},
        {"layers_to_transform": 0, "layers_pattern": ["layers"], "auto_mapping": {"parent_library": "x"}},
        {"base_model_name_or_path": "/root/models/OpenBMB___MiniCPM-V-2_6-int4"},
        {"base_model_name_or_path": "/data/MiniCPM-V/output/base"},
        {"base_model_name_or_path": None},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"modules_to_save": ["classifier", "score"]},
    ],
)
def test_what_changes_nothing_is_read_over(keys: dict[str, Any], lora: Path, source: Path) -> None:
    change(lora, lambda config: config.update(keys), lambda tensors: None)
    merged, base = open_merged(source, [Adapter(folder=lora, name="lora")]), open_merged(source)
    name = "llm.model.layers.0.self_attn.q_proj.weight"
    difference = merged.tensor(name).rows(0, 256) - base.tensor(name).rows(0, 256)
    assert difference == pytest.approx(8 / 4 * 4 * 0.01**2, abs=1e-7)


TENSORS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (lambda t: t.pop(B), "q_proj.lora_A has no lora_B beside it; is the file whole?"),
    (lambda t: t.pop(A), "q_proj.lora_B has no lora_A beside it; is the file whole?"),
    (lambda t: t.update({A: torch.zeros(4, 128)}), r"A has shape \[4, 128\], which does not fit the base's \[256, 256\]"),
    (lambda t: t.update({B: torch.zeros(512, 4)}), r"q_proj.lora_B has shape \[512, 4\], which does not fit"),
    (lambda t: t.update({B: torch.zeros(256, 8)}), r"q_proj.lora_B has shape \[256, 8\], which does not fit"),
    (lambda t: t.update({A: torch.zeros(0), B: torch.zeros(0)}), r"q_proj.lora_A has shape \[0\], which does not fit"),
    (lambda t: t.update({A: t[A].to(torch.int8)}), "has type I8; "),
    (lambda t: t.update({M: torch.ones(256)}), "lora_magnitude_vector is more than its adapter_config.json says"),
    (lambda t: t.update({A.replace("layers.0", "layers.7"): t[A]}), r"layers.7.self_attn.q_proj.weight is none that .* has"),
    (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 256)}), "its tensor score.weight is none that"),
    (lambda t: t.update({"base_model.model.resampler.query": torch.ones(64, 8)}), r"query has shape \[64, 8\], but the base"),
    (lambda t: t.update({"base_model.model.llm.lm_head.weight": torch.ones(600, 256)}), "its vocabulary was resized"),
    (lambda t: t.update({A.replace("weight", "one.weight"): t[A], B.replace("weight", "two.weight"): t[B]}),
     "several adapters, 'one' and 'two'"),
    (lambda t: t.update({f"{Q}.hada_w1_a": t[A]}), "q_proj.hada_w1_a is none that"),
    (lambda t: t.update({"base_model.model.llm.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 256)}),
     r"trainable_tokens_delta has shape \[2, 256\], for 0 trainable_token_indices"),
    (lambda t: t.clear(), "holds no tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "complaint"), TENSORS, ids=[complaint[:40] for _, complaint in TENSORS])
def test_a_tensor_fits_or_is_named(
    edit: Callable[..., Any], complaint: str, lora: Path, source: Path, said: Callable[..., str]
) -> None:
    change(lora, lambda config: None, edit)
    line = said(source, "--adapter", lora)
    assert re.search(complaint, line), line


def test_tokens_that_the_base_has_not(lora: Path, source: Path, said: Callable[..., str]) -> None:
    name = "base_model.model.llm.model.embed_tokens.token_adapter.trainable_tokens_delta"
    change(lora, lambda c: c.update(trainable_token_indices=[5, 584]), lambda t: t.update({name: torch.ones(2, 256)}))
    assert "for 2 trainable_token_indices of [584, 256]" in said(source, "--adapter", lora)
    (lora / "new_embeddings.safetensors").touch()
    assert "holds tokens that the base has not" in said(source, "--adapter", lora)


def test_an_adapter_of_the_text_model(lora: Path, source: Path, said: Callable[..., str]) -> None:
    """A LoRA of the language model from which the family was made has its shapes, but is not of its weights."""
    rename = {name.replace("llm.", ""): name for name in (A, B)}

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for new, old in rename.items():
            tensors[new] = tensors.pop(old)

    change(lora, lambda config: config.update(base_model_name_or_path="Qwen/Qwen2-7B-Instruct"), cut)
    line = said(source, "--adapter", lora)
    assert "its tensor model.layers.0.self_attn.q_proj.weight is of 'Qwen/Qwen2-7B-Instruct', which is another model" in line
    change(lora, lambda config: config.update(base_model_name_or_path="me/reader"), lambda tensors: None)
    line = said(source, "--adapter", lora)
    assert "model.layers.0.self_attn.q_proj.weight is none that" in line
    assert "it was trained on 'me/reader'" in line
    change(lora, lambda config: config.update(base_model_name_or_path=""), lambda tensors: None)
    open_merged(source, [Adapter(folder=lora, name="lora")])  # of the language model inside, for all that it says


def test_names_that_fit_in_two_places(lora: Path, golden_root: Path, said: Callable[..., str]) -> None:
    source = golden_root / "minicpmv4_6" / "checkpoint"
    q, k = (f"base_model.model.layers.0.self_attn.q_proj.lora_{part}.weight" for part in "AB")
    (lora / "adapter_config.json").write_text(json.dumps({**CONFIG, "base_model_name_or_path": None}))
    save_file({q: torch.ones(4, 64), k: torch.ones(64, 4)}, lora / "adapter_model.safetensors")
    merged = open_merged(source, [Adapter(folder=lora, name="lora")])  # the text model's are of other shapes
    assert (
        merged.tensors["model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"]
        != open_merged(source).tensors["model.vision_tower.encoder.layers.0.self_attn.q_proj.weight"]
    )
    name = "base_model.model.layer_norm1.bias"
    save_file({name: torch.ones(64)}, lora / "adapter_model.safetensors")
    assert re.search(
        r"layer_norm1.bias fits in several places of the base \(model.vision_tower.*\)", said(source, "--adapter", lora)
    )


def test_files(lora: Path, source: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    weights = lora / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert "adapter_model.safetensors is truncated" in said(source, "--adapter", lora)
    weights.unlink()
    assert "has no weights: neither adapter_model.safetensors nor adapter_model.bin" in said(source, "--adapter", lora)
    (lora / "adapter_model.bin").write_bytes(b"no torch file")
    assert "adapter_model.bin holds more than tensors" in said(source, "--adapter", lora)
    (lora / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not JSON" in said(source, "--adapter", lora)
    shutil.copytree(lora, tmp_path / "runs" / "checkpoint-100")
    assert f"did you mean {tmp_path / 'runs' / 'checkpoint-100'}?" in said(source, "--adapter", tmp_path / "runs")
    assert "neither the folder of an adapter nor a hub id" in said(source, "--adapter", tmp_path / "nothing" / "at" / "all")


def test_two_that_replace_the_same(lora: Path, source: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    query = "base_model.model.resampler.query"
    change(lora, lambda config: None, lambda tensors: tensors.update({query: torch.ones(64, 256)}))
    other = shutil.copytree(lora, tmp_path / "other")
    line = said(source, "--adapter", lora, "--adapter", other)
    assert "the adapter other cannot be merged: its tensor resampler.query is held in full by lora too" in line
    rows = "base_model.model.llm.model.embed_tokens.token_adapter.trainable_tokens_delta"
    for folder in (lora, other):
        change(
            folder,
            lambda c: c.update(trainable_token_indices=[7]),
            lambda t: (t.pop(query), t.update({rows: torch.ones(1, 256)})),
        )
    assert "has tokens that another adapter has too" in said(source, "--adapter", lora, "--adapter", other)


def test_a_copy_of_the_base_replaces_nothing(lora: Path, source: Path, tmp_path: Path) -> None:
    """PEFT saves an embedding beside its LoRA: two such adapters hold it both."""
    held = load_file(source / "model.safetensors")["resampler.query"].float()
    change(lora, lambda config: None, lambda tensors: tensors.update({"base_model.model.resampler.query": held}))
    other = shutil.copytree(lora, tmp_path / "other")
    change(other, lambda config: None, lambda tensors: tensors.update({"base_model.model.resampler.query": held + 1}))
    for pair in ((lora, other), (other, lora)):
        merged = open_merged(source, [Adapter(folder=folder, name=folder.name) for folder in pair])
        assert merged.tensor("resampler.query").rows(0, 64) == pytest.approx(held.numpy() + 1)


def test_an_adapter_is_no_model(lora: Path, checkpoint: Path, said: Callable[..., str]) -> None:
    complaint = (
        f"{lora} is an adapter of openbmb/MiniCPM-V-2_6, not a model; merge it: mcv-export build openbmb/MiniCPM-V-2_6 OUT"
    )
    assert complaint in said(lora)
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(checkpoint / name, lora / name)
    assert f"{complaint} --adapter {lora}\n" in said(lora)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(lora / name, checkpoint / name)
    assert f"{checkpoint} holds a model and an adapter of openbmb/MiniCPM-V-2_6; merge it with --adapter" in said(checkpoint)
    assert open_merged(checkpoint, [Adapter(folder=checkpoint, name="x")]).adapters
    (checkpoint / "adapter_model.safetensors").unlink()
    open_merged(checkpoint)  # what is left of one that was merged says nothing


@pytest.mark.parametrize(
    ("base", "title", "version", "other"),
    [
        ("openbmb/MiniCPM-V-2_6", "MiniCPM-V 2.6", 2.6, False),
        ("openbmb/MiniCPM-V-2_6-int4", "MiniCPM-V 2.6", "2.6", False),
        ("minicpm-v-v2_6-chat", "MiniCPM-V 2.6", 2.6, False),
        ("/c/models--openbmb--MiniCPM-V-2_6/snapshots/0123abc", "MiniCPM-V 2.6", 2.6, False),
        ("/home/me/MiniCPM-V/finetune/MiniCPM-V-2_6", "MiniCPM-V 2.6", 2.6, False),
        ("openbmb/MiniCPM-V-4_5", "MiniCPM-V 2.6", 2.6, True),
        ("openbmb/MiniCPM-o-2_6", "MiniCPM-V 2.6", 2.6, True),
        ("openbmb/MiniCPM-o-4_5", "MiniCPM-o 2.6 and 4.5 (vision and text)", "2.6", True),
        ("openbmb/MiniCPM-o-2_6", "MiniCPM-o 2.6 and 4.5 (vision and text)", "2.6", False),
        ("openbmb/MiniCPM-V-4", "MiniCPM-V 4.0", 4, False),
        ("openbmb/MiniCPM-V-4.6", "MiniCPM-V 4.6", None, False),
        ("openbmb/MiniCPM-V-4", "MiniCPM-V 4.6", None, True),
        ("openbmb/MiniCPM-V-4_6", "MiniCPM-OCR 1.0", None, True),
        ("openbmb/MiniCPM-OCR", "MiniCPM-V 4.6", None, True),
        ("openbmb/MiniCPM-Llama3-V-2_5", "MiniCPM-Llama3-V 2.5", 2.5, False),
        ("openbmb/MiniCPM-Llama3-V-2_5", "MiniCPM-V 2.6", 2.6, True),
        ("openbmb/MiniCPM-V-2", "MiniCPM-V 1.0 and 2.0", None, False),
        ("openbmb/OmniLMM-12B", "OmniLMM-12B", None, False),
        ("openbmb/OmniLMM-12B", "MiniCPM-V 2.6", 2.6, True),
        ("/home/me/minicpmv-output/base", "MiniCPM-V 2.6", 2.6, False),
        ("me/reader", "MiniCPM-V 2.6", 2.6, False),
        ("Qwen/Qwen3.5-0.8B", "MiniCPM-V 4.6", None, True),
        ("/c/models--Qwen--Qwen3.5-0.8B/snapshots/0123456789abcdef", "MiniCPM-V 4.6", None, True),
        ("/home/me/llama-projects/base", "MiniCPM-V 4.6", None, False),
        ("openbmb/MiniCPM4-8B", "MiniCPM-V 4.0", 4, True),
        ("me/qwen-like-minicpm", "MiniCPM-V 4.6", None, False),
        (None, "MiniCPM-V 2.6", 2.6, False),
    ],
)
def test_what_a_bases_name_says(base: str | None, title: str, version: Any, other: bool) -> None:
    assert is_of_another_model(base, title, {} if version is None else {"version": version}) == other
