"""Bundles, reports and the commands that make them, with an adapter."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from mcv_calibration.precisions import Precision
from mcv_export.adapters import Adapter, find_adapter, open_merged
from mcv_export.build import BuildOptions, build
from mcv_export.checkpoint import open_checkpoint
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.errors import CheckpointError, OptionError

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def tuned(golden_root: Path, peft_reference: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter of 2.6, and the checkpoint with it merged by PEFT, where every tensor is float32."""
    root = tmp_path_factory.mktemp("tuned")
    model = peft_reference.skeleton(golden_root / "minicpmv2_6" / "checkpoint")
    settings = {"target_modules": ["q_proj", "v_proj", "lm_head"], "modules_to_save": ["resampler"]}
    folder = peft_reference.train(model, root / "lora", base="openbmb/MiniCPM-V-2_6", **LORA, **settings)
    whole = root / "merged"
    whole.mkdir()
    for path in (golden_root / "minicpmv2_6" / "checkpoint").iterdir():
        if path.is_file() and not path.name.startswith("model.safetensors"):
            (whole / path.name).write_bytes(path.read_bytes())
    tensors = peft_reference.merged(model, [(folder, 1.0)])
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, whole / "model.safetensors")
    return folder, whole


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_the_bundle_is_that_of_the_merged_model(
    precision: Any,
    tuned: tuple[Path, Path],
    golden_root: Path,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
    bundle_of: Callable[..., Path],
) -> None:
    folder, whole = tuned
    source = golden_root / "minicpmv2_6" / "checkpoint"
    code, _, said = run("build", source, tmp_path / "bundle", "--adapter", f"{folder}:1.0", "--precision", precision)
    assert code == 0, said
    expected = build(whole, tmp_path / "expected", BuildOptions(precision=precision)).manifest
    found = Bundle.open(tmp_path / "bundle").manifest
    for name, file in expected.files.items():
        ours = np.fromfile(tmp_path / "bundle" / name, np.uint8)
        theirs = np.fromfile(tmp_path / "expected" / name, np.uint8)
        assert found.files[name].size == file.size
        if precision == "fp32" and name.endswith(".data"):
            np.testing.assert_allclose(ours.view(np.float32), theirs.view(np.float32), rtol=1e-6, atol=1e-6)
        else:  # a value that lies between two steps may fall on either side
            assert np.mean(ours != theirs) < 1e-3
    (spec,) = found.adapters
    assert (spec.name, spec.weight, set(spec.files)) == ("lora", 1.0, {"adapter_config.json", "adapter_model.safetensors"})
    assert Bundle.open(tmp_path / "bundle").identity != Bundle.open(bundle_of("minicpmv2_6", precision)).identity
    assert "merged: lora, weight 1" in run("inspect", tmp_path / "bundle")[1]
    code, printed, _ = run("verify", tmp_path / "bundle", "--model", source, "--adapter", folder)
    assert code == 0
    assert "greedy tokens: 8 of 8 equal" in printed or precision != "fp32"
    for options in ((), ("--adapter", f"{folder}:0.5")):
        code, _, said = run("verify", tmp_path / "bundle", "--model", source, *options)
        assert code == 2
        assert "was built with --adapter lora" in said
    assert "name that too, with --model" in run("verify", tmp_path / "bundle", "--adapter", folder)[2]


def test_what_was_measured_for_the_base_is_not_taken(tuned: tuple[Path, Path], golden_root: Path, tmp_path: Path) -> None:
    """Calibrations are kept by checkpoint: one with an adapter is another."""
    source = golden_root / "minicpmv2_6" / "checkpoint"
    options = {"precision": {"vision_encoder": "fp32", "resampler": "int8-static", "decoder_with_past": "q8"}}
    adapter = Adapter(folder=tuned[0], name="lora")
    build(source, tmp_path / "base", BuildOptions(**options))  # type: ignore[arg-type]
    build(source, tmp_path / "tuned", BuildOptions(**options, adapters=(adapter,)))  # type: ignore[arg-type]
    build(tuned[1], tmp_path / "expected", BuildOptions(**options))  # type: ignore[arg-type]
    base, found, expected = (
        (tmp_path / name / "onnx" / "resampler_int8.onnx.data").read_bytes() for name in ("base", "tuned", "expected")
    )
    assert found != base
    assert np.mean(np.frombuffer(found, np.uint8) != np.frombuffer(expected, np.uint8)) < 1e-2


def test_a_report_and_its_gate_are_about_the_merged_model(
    tuned: tuple[Path, Path],
    golden_root: Path,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
    recipe: Callable[..., tuple[object, ...]],
) -> None:
    source = golden_root / "minicpmv2_6" / "checkpoint"
    options = ("--precision", "q8", *recipe(num_samples=2), "--max-kl", 0.3)
    code, _, said = run("build", source, tmp_path / "bundle", "--adapter", tuned[0], *options)
    assert code == 0, said
    code, _, said = run("report", tmp_path / "bundle", "--model", source, "--adapter", tuned[0], "--num-samples", 2)
    assert code == 0, said
    code, _, said = run("report", tmp_path / "bundle", "--model", source, "--num-samples", 2)
    assert (code, "was built with --adapter lora" in said) == (2, True)


AS_OPTIMUM: dict[GraphName, Precision] = {
    "vision_encoder": "int8-token",
    "resampler": "int8-token",
    "decoder_with_past": "q8",
}
"""What its `--weight-format int8` asks for."""


@pytest.mark.waits
def test_optimum_merges_too(tuned: tuple[Path, Path], golden_root: Path, tmp_path: Path) -> None:
    source = golden_root / "minicpmv2_6" / "checkpoint"
    program = Path(sys.executable).parent / "optimum-cli"
    command = [
        program,
        "export",
        "mcv",
        "-m",
        source,
        "--adapter",
        f"{tuned[0]}:0.5",
        "--weight-format",
        "int8",
        tmp_path / "b",
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    adapters = (Adapter(folder=tuned[0], name="lora", weight=0.5),)
    expected = build(source, tmp_path / "expected", BuildOptions(precision=AS_OPTIMUM, adapters=adapters)).manifest
    found = Bundle.open(tmp_path / "b").manifest
    assert (found.files, found.adapters) == (expected.files, expected.adapters)


def test_how_an_adapter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(hub_id: str, patterns: list[str], revision: str | None, cache_dir: Path | None) -> Path:
        assert {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"} <= set(patterns)
        asked.append((hub_id, revision))
        return tmp_path

    monkeypatch.setattr("mcv_export.hub._fetch", fetch)
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "lora:0.5", "at@home"):
        (tmp_path / name).mkdir()
    assert find_adapter("lora") == Adapter(folder=Path("lora"), name="lora")
    assert find_adapter("lora:-1e-1").weight == -0.1
    assert find_adapter("lora:0.5") == Adapter(folder=Path("lora:0.5"), name="lora:0.5")  # there is such a folder
    assert find_adapter("at@home:2").folder == Path("at@home")
    assert asked == []
    assert find_adapter("me/lora@v1.0:.25") == Adapter(folder=tmp_path, name="me/lora", revision="v1.0", weight=0.25)
    assert find_adapter("me/lora").revision is None
    assert asked == [("me/lora", "v1.0"), ("me/lora", None)]
    for nothing in ("C:\\loras\\mine", "C:\\loras\\mine:0.5", "nothing", "me/a/b", "lora:nan"):
        with pytest.raises(CheckpointError, match="neither the folder of an adapter nor a hub id"):
            find_adapter(nothing)
    with pytest.raises(OptionError, match="finite"):
        find_adapter("lora:1e999")


def test_manifests_without_adapters_are_read(golden_bundle: Path) -> None:
    data = json.loads((golden_bundle / "mcv.json").read_text())
    assert data.pop("adapters") == []
    manifest = type(Bundle.open(golden_bundle).manifest).from_json(json.dumps(data))
    assert manifest.adapters == ()


def test_no_adapter_changes_nothing(golden_root: Path) -> None:
    source = golden_root / "minicpmv2_6" / "checkpoint"
    assert open_merged(source) == open_checkpoint(source)
