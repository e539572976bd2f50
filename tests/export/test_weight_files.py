"""Weights as people have them, and as they should not: which files are read, and what is wrong with one in one line."""

import json
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mcv_export.build import BuildOptions, build
from mcv_export.checkpoint import open_checkpoint
from mcv_export.families import recognise
from mcv_export.sources import resolve
from mcv_runtime.errors import CheckpointError

NORM = "llm.model.norm.weight"
WEIGHTS = "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"
Tensors = dict[str, torch.Tensor]


def tensors_of(checkpoint: Path) -> Tensors:
    return load_file(checkpoint / WEIGHTS)


def read(checkpoint: Path, name: str = NORM) -> Any:
    tensor = open_checkpoint(checkpoint).tensor(name)
    return tensor.rows(0, tensor.shape[0])[:, 0]


def refused(checkpoint: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as raised:
        open_checkpoint(checkpoint)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


def write_index(checkpoint: Path, weight_map: object, name: str = f"{WEIGHTS}.index.json") -> None:
    (checkpoint / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_single_file_wins_over_an_index(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in `_get_resolved_checkpoint_files` of transformers' modeling_utils."""
    tensors = tensors_of(checkpoint)
    expected = read(checkpoint)
    write_index(checkpoint, dict.fromkeys(tensors, SHARD))
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(read(checkpoint), expected)
    assert "index.json" in caplog.text, "nobody is left to wonder which was read"
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, checkpoint / SHARD)
    assert np.array_equal(read(checkpoint), expected)
    (checkpoint / WEIGHTS).unlink()
    assert not read(checkpoint).any()


def test_torch_files_count_where_there_is_nothing_newer(checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)
    expected = read(checkpoint)
    torch.save({name: torch.zeros_like(value) for name, value in tensors.items()}, checkpoint / "pytorch_model.bin")
    assert np.array_equal(read(checkpoint), expected)
    (checkpoint / WEIGHTS).rename(checkpoint / SHARD)
    write_index(checkpoint, dict.fromkeys(tensors, SHARD))
    assert np.array_equal(read(checkpoint), expected)
    (checkpoint / SHARD).unlink()
    assert not read(checkpoint).any(), "of an index that was copied with other JSON files, no shard is here"
    (checkpoint / "pytorch_model.bin").unlink()
    refused(checkpoint, f"lacks the shard {SHARD}")


def test_a_single_torch_file_wins_over_its_index(checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)
    expected = read(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    write_index(checkpoint, dict.fromkeys(tensors, "gone.bin"), "pytorch_model.bin.index.json")
    assert np.array_equal(read(checkpoint), expected)


def test_of_a_tensor_in_two_shards_the_index_says_which_counts(checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    for shard, value in (("a.safetensors", 1.0), ("b.safetensors", 2.0)):
        save_file({**tensors, NORM: torch.full_like(tensors[NORM], value)}, checkpoint / shard)
        write_index(checkpoint, {**dict.fromkeys(tensors, "b.safetensors"), "x": "a.safetensors", NORM: shard})
    assert (read(checkpoint) == 2).all()
    write_index(checkpoint, {**dict.fromkeys(tensors, "b.safetensors"), NORM: "a.safetensors"})
    assert (read(checkpoint) == 1).all()


@pytest.mark.parametrize("shard", ["", ".", "..", "../x", "/etc/passwd", "a\0", "a" * 300, "\x1b[31m", 5, None, ["x"], {}])
def test_a_shard_is_a_file_of_the_folder(checkpoint: Path, shard: object) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / SHARD)
    write_index(checkpoint, {"a": SHARD, "b": shard})
    refused(checkpoint, "lacks the shard")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_files_of_parameters(checkpoint: Path, dtype: torch.dtype, legacy: bool) -> None:
    """As `dict(model.named_parameters())` gives them; the format before torch 1.6 is read too."""
    tensors = tensors_of(checkpoint)
    expected = tensors[NORM].to(dtype).float().numpy()
    (checkpoint / WEIGHTS).unlink()
    parameters = {name: torch.nn.Parameter(value.to(dtype)) for name, value in tensors.items()}
    torch.save(parameters, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert np.array_equal(read(checkpoint), expected)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (lambda tmp: [1, 2], "holds a list, not tensors by name"),
        (lambda tmp: torch.zeros(3), "holds a Tensor, not tensors by name"),
        (lambda tmp: {"state_dict": {NORM: torch.zeros(3)}}, "has 'state_dict', which is no tensor with a name"),
        (lambda tmp: {NORM: "x"}, f"has '{NORM}', which is no tensor with a name"),
        (lambda tmp: {1: torch.zeros(2)}, "has 1, which is no tensor with a name"),
        (lambda tmp: {NORM: torch.eye(3).to_sparse()}, "without plain values"),
        (lambda tmp: {NORM: torch.zeros(3, device="meta")}, "without plain values"),
        (lambda tmp: {NORM: torch.zeros(3), "evil": Evil(tmp / "ran")}, "code in it is never run"),
    ],
)
def test_torch_files_of_something_else(
    checkpoint: Path, tmp_path: Path, held: Callable[[Path], object], reason: str, legacy: bool
) -> None:
    (checkpoint / WEIGHTS).unlink()
    torch.save(held(tmp_path), checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    refused(checkpoint, reason)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage" * 50, b"PK\x03\x04" + b"\0" * 100, b"\x1b[31m"])
def test_damaged_torch_files(checkpoint: Path, content: bytes) -> None:
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(content)
    refused(checkpoint, "pytorch_model.bin")


Header = dict[str, Any]


def edit_header(checkpoint: Path, change: Callable[[Header], object]) -> None:
    """Change the header as `change` does in place, or replace it with the bytes that it gives."""
    content = (checkpoint / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    replaced = change(header)
    new = replaced if isinstance(replaced, bytes) else json.dumps(header).encode()
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])


def entry(**values: Any) -> Callable[[Header], object]:
    return lambda header: header[NORM].update(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header: b"[]", "is no object"),
        (lambda header: b"{", "is not JSON"),
        (lambda header: b"\xff", "is not UTF-8"),
        (lambda header: b"[" * 100_000, "levels deep"),
        (lambda header: b'{"a": 1, "a": 1}', "'a' stands twice"),
        (lambda header: header.update({NORM: None}), "is no tensor"),
        (lambda header: header.update({NORM: []}), "is no tensor"),
        (entry(dtype=None), "is no tensor"),
        (entry(shape=None), "is no tensor"),
        (entry(shape=[1.5]), "is no tensor"),
        (entry(shape=[-1]), "is no tensor"),
        (entry(shape=[True]), "is no tensor"),
        (entry(shape=[[256]]), "is no tensor"),
        (entry(shape=[10**30]), "bytes for shape"),
        (entry(shape=[2**32, 2**32]), "bytes for shape"),
        (entry(data_offsets=[-8, 0]), "is no tensor"),
        (entry(data_offsets=[5, 1]), "is no tensor"),
        (entry(data_offsets=["0", "1"]), "is no tensor"),
        (entry(data_offsets=[0.0, 4.0]), "is no tensor"),
        (entry(data_offsets=[0]), "is no tensor"),
        (entry(dtype="I8", shape=[1], data_offsets=[0, 10**30]), "two tensors the same bytes|truncated"),
        (lambda header: header.update({"twin": header[NORM]}), "two tensors the same bytes"),
        (lambda header: header.update({"\x1b[31m": 1}), r"at '\\x1b\[31m', is no tensor"),
    ],
)
def test_damaged_headers(checkpoint: Path, change: Callable[[Header], object], reason: str) -> None:
    edit_header(checkpoint, change)
    refused(checkpoint, reason)


def test_a_giant_header_is_not_read(checkpoint: Path) -> None:
    with (checkpoint / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 6 << 30))
        file.truncate((6 << 30) + 100)
    refused(checkpoint, "more than 100,000,000 bytes")


@pytest.mark.parametrize(
    "name",
    ["llm.model.layers.0.self_attn.rotary_emb.inv_freq", "llm.model.rotary_emb.inv_freq",
     "llm.model.rotary_emb.original_inv_freq", "llm.model.rotary_emb.long_inv_freq", "llm.model.causal_mask",
     "llm.model.layers.1.self_attn.rotary_emb.cos_cached",
     "llm.model.layers.1.self_attn.rotary_emb.sin_cached", "vpm.embeddings.position_ids", "resampler.pos_embed",
     "resampler.temporal_pos_embed"],
)  # fmt: skip
@pytest.mark.parametrize("value", [torch.zeros(3, 5), torch.arange(9)])
def test_buffers_are_computed_anew(checkpoint: Path, edit_tensors: Callable[..., Path], name: str, value: torch.Tensor) -> None:
    edit_tensors(lambda tensors: tensors.update({name: value}))
    build_until_weights(checkpoint)


@pytest.mark.parametrize(
    "name", ["vpm.pos_embed", "llm.model.layers.0.position_ids.weight", "inv_freqs", "resampler.pos_embed.x"]
)
def test_other_tensors_are_another_models(checkpoint: Path, edit_tensors: Callable[..., Path], name: str) -> None:
    edit_tensors(lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match="it is another model than it says"):
        build_until_weights(checkpoint)


class _Enough(Exception):  # noqa: N818
    """The build went as far as a test wants it to."""


def build_until_weights(checkpoint: Path) -> None:
    """A build up to the first progress, when all has been looked at but for the weights' values."""

    def stop(*_: object) -> None:
        raise _Enough

    with pytest.raises(_Enough):
        build(checkpoint, checkpoint.parent / "bundle", BuildOptions(precision="q8"), progress=stop)
    assert not (checkpoint.parent / "bundle").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_is_looked_at(checkpoint: Path, value: float, dtype: torch.dtype) -> None:
    """Whatever it is in the graph: a weight, a norm, a bias, an embedding, packed rows."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(checkpoint).items()}
    for name, tensor in tensors.items():
        if "layers.0." in name or "layers" not in name:
            save_file({**tensors, name: poisoned(tensor, value)}, checkpoint / WEIGHTS)
            opened = open_checkpoint(checkpoint)
            plan = recognise(opened.config).plan(opened)
            kind = "NaN" if value != value else "infinite values"
            with pytest.raises(CheckpointError, match=f"tensor {name} has {kind}; download it again, or merge"):
                for graph in plan.graphs:
                    for source in resolve(graph, opened).values():
                        source.all()


def poisoned(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize("precision", ["fp32", "q8", "q4", "int8-dynamic", "int8-static", "int8-token"])
@pytest.mark.parametrize(
    "name", ["llm.model.layers.1.self_attn.o_proj.weight", "llm.model.layers.0.mlp.gate_proj.weight", NORM]
)
def test_a_bundle_of_nan_is_not_built(
    checkpoint: Path, edit_tensors: Callable[..., Path], tmp_path: Path, precision: Any, name: str
) -> None:
    edit_tensors(lambda tensors: tensors.update({name: poisoned(tensors[name], float("nan"))}))
    with pytest.raises(CheckpointError, match=f"tensor {name} has NaN"):
        build(checkpoint, tmp_path / "bundle", BuildOptions(precision=precision))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_numbers_beyond_float32_are_infinite(checkpoint: Path, edit_tensors: Callable[..., Path]) -> None:
    edit_tensors(lambda tensors: tensors.update({NORM: tensors[NORM].double() * 1e300}))
    opened = open_checkpoint(checkpoint)
    graph = recognise(opened.config).plan(opened).graphs[-1]
    with pytest.raises(CheckpointError, match=f"tensor {NORM} has infinite values"):
        resolve(graph, opened)["norm.weight"].all()


def test_an_adapter_is_named(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "openbmb/MiniCPM-V-2_6"}))
    assert read(checkpoint) is not None, "its settings alone, of an adapter that was merged"
    (checkpoint / "adapter_model.safetensors").touch()
    refused(checkpoint, "holds a model and an adapter of openbmb/MiniCPM-V-2_6; merge it with --adapter")
    (checkpoint / WEIGHTS).unlink()
    refused(
        checkpoint, "is an adapter of openbmb/MiniCPM-V-2_6, not a model; merge it: mcv-export build openbmb/MiniCPM-V-2_6 OUT"
    )
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "is an adapter of openbmb/MiniCPM-V-2_6")
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    refused(checkpoint, "is an adapter of BASE")


@pytest.mark.parametrize("wrapped", ["q_proj.lora_A.default.weight", "q_proj.base_layer.weight", "q_proj.lora_B.weight"])
def test_a_model_with_an_unmerged_adapter_is_named(edit_tensors: Callable[..., Path], wrapped: str) -> None:
    name = f"base_model.model.llm.model.layers.0.self_attn.{wrapped}"
    refused(edit_tensors(lambda tensors: tensors.update({name: torch.zeros(2, 2)})), "not merged .*merge_and_unload")


@pytest.mark.parametrize(
    "name", ["config.json", WEIGHTS, "tokenizer.json", "generation_config.json", "preprocessor_config.json"]
)
def test_no_file_is_waited_for_or_followed_elsewhere(checkpoint: Path, tmp_path: Path, name: str) -> None:
    kept = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pipe, not a file"):
        build(checkpoint, tmp_path / "bundle", BuildOptions(precision="q8"))
    (checkpoint / name).unlink()
    (tmp_path / "secret").write_bytes(kept)
    (checkpoint / name).symlink_to(tmp_path / "secret")
    if name == WEIGHTS:  # which may lie on a larger disk
        assert read(checkpoint) is not None
        return
    with pytest.raises(CheckpointError, match=f"{name} leads out of"):
        build(checkpoint, tmp_path / "bundle", BuildOptions(precision="q8"))
    assert not (tmp_path / "bundle").exists()


def test_a_folder_of_links_to_another_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """As `ln -s BASE/* .` makes it, to change one file of it."""
    (tmp_path / "links").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    build_until_weights(tmp_path / "links")


@pytest.mark.parametrize("section", [None, "vision_config"])
@pytest.mark.parametrize("count", [10**4, 10**7, 10**30])
def test_layers_that_nobody_could_lay_out(edit_config: Callable[..., Path], section: str | None, count: int) -> None:
    change = lambda config: (config[section] if section else config).update(num_hidden_layers=count)  # noqa: E731
    refused(edit_config(change), f"num_hidden_layers={count}, but the checkpoint has only")


@pytest.mark.parametrize("key", ["max_position_embeddings", "hidden_size", "vocab_size", "query_num"])
def test_sizes_that_no_machine_has_memory_for(edit_config: Callable[..., Path], tmp_path: Path, key: str) -> None:
    folder = edit_config(lambda config: config.update({key: 10**12}))
    with pytest.raises(ValueError, match=r"10{12}|250{9}|context_length is 10{12}"):
        build(folder, tmp_path / "bundle", BuildOptions(precision="q8"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', '{"a": 1, "a": 2}', '["\ud800"]', "[]"])
def test_json_that_is_none(checkpoint: Path, text: str) -> None:
    for name in ("config.json", f"{WEIGHTS}.index.json"):
        kept = (checkpoint / name).read_bytes() if (checkpoint / name).exists() else b""
        (checkpoint / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        if name != "config.json":
            (checkpoint / WEIGHTS).unlink()
        refused(checkpoint, name)
        (checkpoint / name).write_bytes(kept)
