"""What a user can get wrong in a build: one clear line, exit code 2, and nothing half-written."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcv_export import cli


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `mcv-export build` and hand out its one line of complaint."""
    out = tmp_path / "out" / "bundle"

    def run(model: Path | str, *options: str, target: Path = out) -> str:
        before = _tree(target.parent)
        monkeypatch.setattr(sys, "argv", ["mcv-export", "build", str(model), str(target), *options])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        assert exit_info.value.code == 2
        assert printed.out == ""
        lines = [line for line in printed.err.splitlines() if "mcv-export: " in line]
        assert len(lines) == 1
        assert "Traceback" not in printed.err
        assert _tree(target.parent) == before, "something half-written was left"
        return lines[0].partition("mcv-export: ")[2]

    return run


def test_missing_folder(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "neither a folder nor a hub id" in fails(tmp_path / "nothing")


def test_empty_folder(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in fails(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(architectures=["LlamaForCausalLM"]), r"architectures=\['LlamaForCausalLM'\].*MiniCPM-V 2.6"),
        (lambda c: c.update(version=9.9), "version=9.9"),
        (lambda c: c.pop("query_num"), "lacks the key 'query_num'"),
        (lambda c: c.pop("vision_config"), "no section 'vision_config'"),
        (lambda c: c.update(hidden_size="256"), "hidden_size='256'"),
        (lambda c: c.update(quantization_config={"quant_method": "bnb"}), "already quantized .bnb.*full-precision"),
        (lambda c: c.update(intermediate_size=200), r"gate_proj.weight has shape \[192, 256\].*\[200, 256\]"),
    ],
)  # fmt: skip
def test_config(fails: Callable[..., str], edit_config: Callable[..., Path], change: Callable[[Any], Any], said: str) -> None:
    assert re.search(said, fails(edit_config(change)))


def test_config_that_is_no_json(fails: Callable[..., str], checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    assert "config.json is not JSON" in fails(checkpoint)


NAME, BIAS = "llm.model.layers.1.mlp.up_proj.weight", "llm.model.layers.0.self_attn.k_proj.bias"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME), f"no tensor {NAME}"),
        (lambda t: t.update({NAME: t[NAME].T}), rf"{NAME} has shape \[256, 192\].*\[192, 256\]"),
        (lambda t: t.update({"vpm.post_layernorm.bias": torch.zeros(7)}), r"vpm.post_layernorm.bias has shape \[7\].*\[48\]"),
        (lambda t: t.update({BIAS: torch.zeros(64)}), rf"{BIAS} has shape \[64\].*\[128\]"),
        (lambda t: t.update({"resampler.proj": torch.zeros(256, 8)}), r"resampler.proj has shape \[256, 8\]"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), f"{NAME} has type I8"),
        (lambda t: t.update(surplus=torch.zeros(1)), "has the tensor surplus, which MiniCPM-V 2.6 has not"),
    ],
)  # fmt: skip
def test_tensors(fails: Callable[..., str], edit_tensors: Callable[..., Path], change: Callable[[Any], Any], said: str) -> None:
    assert re.search(said, fails(edit_tensors(change)))


def test_truncated_file(fails: Callable[..., str], checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    for length in (len(content) - 1, 100, 4, 0):
        weights.write_bytes(content[:length])
        assert "model.safetensors is truncated" in fails(checkpoint)


def test_shards(fails: Callable[..., str], checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, checkpoint / file)
    (checkpoint / "model.safetensors").unlink()
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: file for file, keys in files.items() for key in keys}}))
    (checkpoint / "b.safetensors").rename(checkpoint / "elsewhere")
    assert "lacks the shard b.safetensors" in fails(checkpoint)
    index.write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    assert "lacks the shard ../b.safetensors" in fails(checkpoint)
    index.write_text(json.dumps({}))
    assert "no weight_map" in fails(checkpoint)


def test_no_weights_tokenizer_or_template(fails: Callable[..., str], checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").unlink()
    assert "no chat template" in fails(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    assert "no tokenizer.json" in fails(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    assert "has no weights" in fails(checkpoint)


def test_texts_that_no_runtime_takes(fails: Callable[..., str], checkpoint: Path) -> None:
    """Found before anything is calibrated."""
    (checkpoint / "chat_template.jinja").write_text("{{ messages | batch(10**9, 0) | list }}")
    assert fails(checkpoint) == "the checkpoint's chat template cannot be used: No filter named 'batch'."
    (checkpoint / "chat_template.jinja").write_text("{{ 1 // 0 }}")
    assert fails(checkpoint).startswith("the checkpoint's chat template fails with these messages: ")
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].role }}")
    assert fails(checkpoint) == "the checkpoint's chat template keeps 0 of 1 pictures"
    (checkpoint / "chat_template.jinja").unlink()
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 1000}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "the checkpoint's tokenizer cannot be used: its normalizer would make a text many times as long" in fails(checkpoint)


def test_output_exists(fails: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "bundle").mkdir(parents=True)
    assert "--force" in fails(checkpoint)


def test_output_is_the_checkpoint(fails: Callable[..., str], checkpoint: Path) -> None:
    """Whatever the options; the message comes before any work."""
    for options in ((), ("--force",), ("--force", "--report", "--max-kl", "1")):
        said = fails(checkpoint, *options, target=checkpoint)
        assert said == f"{checkpoint} is the checkpoint; choose another folder"


def test_output_holds_something_else(fails: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/wedding.jpg").touch()
    for options in ((), ("--force",)):
        said = fails(checkpoint, *options, target=tmp_path / "photos")
        assert said == f"{tmp_path / 'photos'} exists and is no bundle; choose another folder"


def test_output_cannot_be_made(fails: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in fails(checkpoint, target=tmp_path / "file" / "bundle")


def test_options(fails: Callable[..., str], checkpoint: Path, recipe: Callable[..., Any]) -> None:
    for block_size, words in ((33, "block_size=33"), (512, "wide cannot be cut into blocks of 512")):
        assert words in fails(checkpoint, *map(str, recipe(graphs={"*": {"block_size": block_size}})))


@pytest.mark.waits
@pytest.mark.parametrize("limit", [3_000_000, 9_000_000])
def test_no_space_left(checkpoint: Path, tmp_path: Path, limit: int) -> None:
    """A file size limit stands in for a full disk: writing fails in the same place, with another errno."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from mcv_export.cli import main; main()"
    )
    out = tmp_path / "out" / "bundle"
    command = [sys.executable, "-c", code, "build", str(checkpoint), str(out), "--precision", "fp32"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert re.search(r"^mcv-export: .* cannot be written: .*; nothing was kept$", result.stderr, re.MULTILINE)
    assert "Traceback" not in result.stderr
    assert _tree(out.parent) == []


INTERRUPTED = """
import os, signal, sys
number, file = int(sys.argv.pop(1)), int(sys.argv.pop(1))
if number == signal.SIGINT:
    signal.signal(number, signal.default_int_handler)  # what a shell starts in the background ignores it
folder, opened = os.path.dirname(sys.argv[-1]), []
def interrupt(event, arguments):
    if event == "open" and str(arguments[0]).startswith(folder) and "onnx" in str(arguments[0]):
        opened.append(arguments[0])
        if len(opened) == file:
            signal.raise_signal(number)
sys.addaudithook(interrupt)
from mcv_export.cli import main
main()
"""


@pytest.mark.waits
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("file", [1, 3])
def test_interrupted(checkpoint: Path, tmp_path: Path, number: signal.Signals, code: int, file: int) -> None:
    """While it opens so many a file of its graphs."""
    out = tmp_path / "out" / "bundle"
    options = ["build", "--precision", "fp32", str(checkpoint), str(out)]
    command = [sys.executable, "-c", INTERRUPTED, str(int(number)), str(file), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert "interrupted; nothing was kept" in result.stderr
    assert "Traceback" not in result.stderr
    assert _tree(out.parent) == []


@pytest.mark.waits
def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from mcv_export.cli import main; main()",
        "build",
        str(tmp_path / "none"),
        str(tmp_path / "out"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"mcv-export: {tmp_path / 'none'}")


@pytest.mark.waits
def test_without_the_toolchain(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from mcv_export.cli import main; main()"
    command = [sys.executable, "-c", code, "build", str(tmp_path), str(tmp_path / "bundle")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "mcv-export: torch is not installed; get the toolchain: pip install 'minicpmv-onnx[export]'\n"


def _tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*")) if folder.is_dir() else []
