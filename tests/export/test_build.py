"""Building: what a bundle holds, and that its graphs are the checkpoint's."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

import mcv_calibration
import mcv_export
import mcv_graphs
import mcv_runtime
from mcv_calibration.target import TARGETS
from mcv_export.build import BuildOptions, build
from mcv_export.calibrate import SampleOptions
from mcv_export.checkpoint import commit_of
from mcv_export.precision import DEFAULT, Wishes
from mcv_runtime import load
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName, Manifest, NeedsSpec
from mcv_runtime.errors import BundleError, OptionError

Run = Callable[..., tuple[int, str, str]]

GRAPHS: tuple[GraphName, ...] = ("vision_encoder", "resampler", "decoder_with_past")


@pytest.fixture(scope="module")
def source(golden_root: Path) -> Path:
    return golden_root / "minicpmv2_6" / "checkpoint"


@pytest.fixture(scope="module")
def bundles(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The golden checkpoint in each precision."""
    folder = tmp_path_factory.mktemp("bundles")
    for precision in ("fp32", "q8", "q4"):
        build(source, folder / precision, BuildOptions(precision=dict.fromkeys(GRAPHS, precision)))  # type: ignore[arg-type]
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "q8", "q4"])
def test_parity_with_the_eager_modules(precision: str, bundles: dict[str, Path], source: Path, run: Run) -> None:
    code, printed, _ = run("verify", bundles[precision], "--model", source, "--json")
    report = json.loads(printed)
    assert code == 0
    largest = {item["tensor"]: item["largest"] for item in report["differences"]}
    assert list(largest) == ["vision_hidden", "vision_embeds", "logits"]
    if precision == "fp32":
        assert largest["vision_hidden"] < 1e-4
        assert largest["vision_embeds"] < 1e-4
        assert largest["logits"] < 2e-3
        assert report["tokens_equal"] == report["tokens"]
    else:
        relative = {item["tensor"]: item["relative"] for item in report["differences"]}
        assert max(relative.values()) < 0.03, "the module rounds as the graph does"


def test_verify_notices_other_weights(bundles: dict[str, Path], edit_tensors: Callable[..., Path], run: Run) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors["resampler.query"] = tensors["resampler.query"].flip(0)

    code, printed, _ = run("verify", bundles["fp32"], "--model", edit_tensors(swap))
    assert code == 2
    assert "vision_embeds (fp32): largest difference" in printed


def test_verify_notices_an_altered_file(bundles: dict[str, Path], tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(bundles["q8"], folder)
    data = folder / "onnx" / "decoder_with_past_q8.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert run("verify", folder)[0] == 2
    assert run("verify", bundles["q8"])[:2] == (0, "10 files are as built\n")


def test_files(bundles: dict[str, Path]) -> None:
    names = {path.relative_to(bundles["q4"]).as_posix() for path in bundles["q4"].rglob("*") if path.is_file()}
    graphs = {f"onnx/{name}_q4.onnx" for name in GRAPHS}
    texts = {"tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"}
    assert names == {"mcv.json", *texts, *graphs, *(f"{name}.data" for name in graphs)}
    assert set(Bundle.open(bundles["q4"]).manifest.files) == names - {"mcv.json"}


def test_two_builds_are_equal(bundles: dict[str, Path], source: Path, tmp_path: Path) -> None:
    again = build(source, tmp_path / "again", BuildOptions(precision=dict.fromkeys(GRAPHS, "q4"))).manifest
    assert again.files == Bundle.open(bundles["q4"]).manifest.files


@pytest.mark.waits
def test_graphs_are_the_same_wherever_they_are_built(source: Path, tmp_path: Path, recipe: Callable[..., Any]) -> None:
    """Other folders of the checkpoint, the bundle and these sources, another order of sets: the same bytes, without a path."""
    for package in (mcv_runtime, mcv_graphs, mcv_calibration, mcv_export):
        folder = Path(package.__file__).parent
        shutil.copytree(folder, tmp_path / "elsewhere" / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(source, tmp_path / "moved" / "model", copy_function=shutil.copyfile)
    arguments = ["build", "moved/model", "there", "--kv", "int8", *map(str, recipe(num_samples=2))]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "elsewhere"), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", "from mcv_export.cli import main; main()", *arguments]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    wanted = BuildOptions(samples=SampleOptions(count=2), int8_cache=True)
    build(source, tmp_path / "here", wanted)
    names = sorted(path.name for path in (tmp_path / "here" / "onnx").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "there" / "onnx").iterdir())
    assert len([name for name in names if name.endswith(".onnx")]) == 4
    for name in names:
        content = (tmp_path / "here" / "onnx" / name).read_bytes()
        assert content == (tmp_path / "there" / "onnx" / name).read_bytes(), name
        for trace in (tmp_path, Path(mcv_export.__file__).parents[2], Path.home(), ".py", "stack_trace"):
            assert name.endswith(".data") or str(trace).encode() not in content, name


def test_a_bundle_says_what_it_needs(bundles: dict[str, Path], source: Path, tmp_path: Path) -> None:
    """The processor matters where 8-bit integers are multiplied; the least ONNX Runtime is that of `pyproject.toml`."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    (floor,) = (line.partition(">=")[2] for line in project["project"]["dependencies"] if line.startswith("onnxruntime"))
    assert Bundle.open(bundles["q4"]).manifest.needs == NeedsSpec(onnxruntime=floor, processor="any")
    for target in TARGETS:
        recipe = Wishes(target=target, precision="int8-dynamic").recipe()
        manifest = build(source, tmp_path / target, BuildOptions(recipe=recipe)).manifest
        assert manifest.needs == NeedsSpec(onnxruntime=floor, processor=target)
        assert Manifest.from_json((tmp_path / target / "mcv.json").read_text()).needs == manifest.needs


def test_graphs_hold_no_second_copy_of_a_weight(bundles: dict[str, Path]) -> None:
    """Every tensor of any size is external: nothing was folded into the graph."""
    for path in bundles["fp32"].glob("onnx/*.onnx"):
        model = ir.load(path)
        inline = [v.const_value for v in model.graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
        assert sum(tensor.nbytes for tensor in inline if tensor is not None) < 1000
        assert not {"Transpose", "Identity"} & {node.op_type for node in model.graph}


def test_overrides_and_default(source: Path, tmp_path: Path) -> None:
    manifest = build(source, tmp_path / "mixed", BuildOptions(precision={"resampler": "fp32"})).manifest
    precisions = {name: graph.precision for name, graph in manifest.graphs.items()}
    assert precisions == {"vision_encoder": DEFAULT["vision_encoder"], "resampler": "fp32", "decoder_with_past": "q4"}


def test_four_bits_are_the_decoders_unless_another_graph_is_named() -> None:
    """In 4 bits a tower gives something a fifth wrong, and is slower than by default."""
    vision = {name: DEFAULT[name] for name in ("vision_encoder", "resampler", "merger")}
    for wishes, expected in (
        (Wishes(precision="q4"), {**vision, "decoder_with_past": "q4"}),
        (
            Wishes(precision="q4", graphs={"vision_encoder": "q4"}),
            {**vision, "vision_encoder": "q4", "decoder_with_past": "q4"},
        ),
        (Wishes(precision="q4", graphs={"decoder_with_past": "q8"}), {**vision, "decoder_with_past": "q8"}),
        (Wishes(precision="q8"), dict.fromkeys((*GRAPHS, "merger"), "q8")),
        (Wishes(), {**vision, "decoder_with_past": "q4"}),
    ):
        assert {name: graph.precision for name, graph in wishes.recipe().graphs.items()} == expected


def test_what_visual_tokens_are_sums_of_is_in_blocks_unless_the_graph_is_named(source: Path, tmp_path: Path) -> None:
    """In products of 8 bits a resampler's last layers lose half of what visual tokens lose by a default build."""
    for wishes, expected in (
        (Wishes(), {"v_proj": "q8", "out_proj": "q8", "proj": "q8"}),
        (Wishes(settings={"*": {"smoothing": 0.4}}), {"v_proj": "q8", "out_proj": "q8", "proj": "q8"}),
        (Wishes(settings={"resampler": {"layers": {"proj": "fp32"}}}), {"proj": "fp32"}),
        (Wishes(graphs={"resampler": "int8-token"}), {}),
        (Wishes(precision="int8-token"), {}),
    ):
        assert wishes.recipe().graphs["resampler"].layers == expected
    with pytest.raises(
        OptionError, match=re.escape("the recipe's resampler has the unknown key 'v_prj'; did you mean 'v_proj'?")
    ):
        layers = {"v_prj": "q8"}
        build(source, tmp_path / "out", BuildOptions(recipe=Wishes(settings={"resampler": {"layers": layers}}).recipe()))
    assert not (tmp_path / "out").exists()


def test_shards_and_bin_files_give_the_same_bundle(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save({name: value.bfloat16() for name, value in tensors.items()}, checkpoint / "pytorch_model.bin")
    names = sorted(tensors)
    expected = Bundle.open(bundles["q8"]).manifest.files
    assert build(checkpoint, tmp_path / "from-bin", BuildOptions(precision="q8")).manifest.files == expected
    (checkpoint / "pytorch_model.bin").unlink()
    files = {"a.safetensors": names[::3], "b.safetensors": names[1::3], "c.safetensors": names[2::3]}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, checkpoint / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert build(checkpoint, tmp_path / "from-shards", BuildOptions(precision="q8")).manifest.files == expected


def test_build_and_inspect_print_what_was_made(source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # no name is cut, however narrow the terminal
    out = tmp_path / "bundle"
    code, printed, _ = run("build", source, out, "--precision", "q4", "--resampler", "q4", "--decoder", "q8")
    assert code == 0
    table, _, _ = printed.partition("ask it something")
    for word in ("vision_encoder", "onnx/decoder_with_past_q8.onnx", "MB", "peak memory", str(out)):
        assert word in table
    code, printed, _ = run("inspect", out)
    assert code == 0
    assert "in  pixel_values: float32 [slices, patches, 588]" in printed
    assert "4 cache tensors such as past_key_values.0.key" in printed
    assert json.loads(run("inspect", out, "--json")[1])["graphs"]["resampler"]["precision"] == "q4"


def test_minicpm_o_without_its_ears_and_voice(
    bundles: dict[str, Path],
    checkpoint: Path,
    edit_tensors: Callable[..., Path],
    edit_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    edit_tensors(lambda tensors: tensors.update({"apm.conv1.bias": torch.zeros(4), "tts.emb.weight": torch.zeros(4, 4)}))
    edit_config(lambda config: config.update(architectures=["MiniCPMO"], version="2.6"))
    result = build(checkpoint, tmp_path / "bundle", BuildOptions(precision="q8"))
    assert result.manifest.family == "minicpmo"
    assert result.notice is not None
    assert "audio" in result.notice
    assert result.manifest.files == Bundle.open(bundles["q8"]).manifest.files


def test_inspect_obeys_no_terminal_codes(bundles: dict[str, Path], tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(bundles["q8"], tmp_path / "bundle")
    manifest = json.loads((folder / "mcv.json").read_text())
    manifest["model"] = "\x1b]0;owned\x07 \u202egnp.exe 模型"
    (folder / "mcv.json").write_text(json.dumps(manifest))
    code, printed, _ = run("inspect", folder)
    assert code == 0
    assert printed.startswith(r"\x1b]0;owned\x07 \u202egnp.exe 模型 (minicpmv2_6)")


def test_verify_needs_a_list(bundles: dict[str, Path], tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(bundles["q8"], tmp_path / "bundle")
    manifest = json.loads((folder / "mcv.json").read_text())
    manifest["files"] = {}
    (folder / "mcv.json").write_text(json.dumps(manifest))
    assert run("verify", folder)[:2] == (2, "")


def test_a_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="mcv-export build"):
        load(tmp_path)


def test_a_bundle_says_what_it_was_built_from(golden_bundle, golden_root):
    folder = golden_root / "minicpmv2_6" / "checkpoint"
    manifest = Bundle.open(golden_bundle).manifest
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= manifest.checkpoint.keys()
    for name, spec in manifest.checkpoint.items():
        data = (folder / name).read_bytes()
        assert (spec.size, spec.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest.revision is None


def test_the_commit_of_a_download(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert commit_of(tmp_path / "models--openbmb--MiniCPM-V-2_6" / "snapshots" / commit) == commit
    assert commit_of(tmp_path / "models--openbmb--MiniCPM-V-2_6" / "snapshots" / "main") is None
    assert commit_of(tmp_path / "mine" / "snapshots" / commit) is None
    assert commit_of(tmp_path / "models--openbmb--MiniCPM-V-2_6") is None
