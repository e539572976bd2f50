"""Bundles that took samples to build: what is in them, that their graphs compute what torch does, and that a recipe repeats."""

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mcv_calibration.recipe import GraphRecipe, Recipe
from mcv_calibration.target import this_machine
from mcv_export.build import BuildOptions, BuildResult, build
from mcv_export.calibrate import SampleOptions
from mcv_export.precision import Wishes
from mcv_export.recipe_file import RecipeFile
from mcv_export.verify import compare
from mcv_graphs.siglip import SiglipTower
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.errors import CheckpointError, OptionError

Run = Callable[..., tuple[int, str, str]]

STATIC = GraphRecipe(precision="int8-static", prune_ffn=0.3)
RECIPES: dict[str, Recipe] = {
    "minicpmv2_6": Recipe(
        target=this_machine(),
        graphs={
            "vision_encoder": STATIC,
            "resampler": GraphRecipe(precision="int8-static", ranges="minmax", smoothing=0.0),
            "decoder_with_past": GraphRecipe(
                precision="int8-static", layers={"layers.0": "q4", "lm_head": "q8"}, method="k-quant"
            ),
        },
    ),
    "minicpmv4_6": Recipe(
        target=this_machine(),
        graphs={
            "vision_encoder": STATIC,
            "resampler": GraphRecipe(precision="int8-static"),
            "decoder_with_past": GraphRecipe(
                precision="q4", layers={"embed_tokens": "q8", "lm_head": "q8"}, method="gptq", prune_ffn=0.2
            ),
        },
    ),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> SampleOptions:
    """Two small pictures, one that is none, and a question with its answer."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(random.integers(0, 256, (60, 90, 3), np.uint8)).resize((300, 200)).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG")
    rows = [{"image": name, "prompt": "What is it?", "answer": "Noise."} for name in ("a.png", "b.png", "broken.png")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return SampleOptions(folder=folder, prompts=folder / "rows.jsonl", count=3, store=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module", params=list(RECIPES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def result(family: str, golden_root: Path, samples: SampleOptions, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    options = BuildOptions(recipe=RECIPES[family], samples=samples)
    return build(golden_root / family / "checkpoint", tmp_path_factory.mktemp(family) / "bundle", options)


def test_graphs_compute_what_the_modules_do(result: BuildResult, family: str, golden_root: Path) -> None:
    report = compare(Bundle.open(result.folder), golden_root / family / "checkpoint")
    assert report.passed, report.worst.describe()
    assert max(item.relative for item in report.differences) < 0.03


def test_samples_are_told_of(result: BuildResult) -> None:
    assert result.samples is not None
    assert len(result.samples.samples) == 2 + 8  # drawn ones beside the user's
    assert "broken.png" in result.samples.describe()


def test_the_recipe_repeats(
    result: BuildResult, family: str, golden_root: Path, samples: SampleOptions, tmp_path: Path
) -> None:
    recipe = Recipe.from_json((result.folder / "mcv.json").read_text())
    again = build(golden_root / family / "checkpoint", tmp_path / "again", BuildOptions(recipe=recipe, samples=samples))
    assert again.manifest.files == result.manifest.files
    assert again.manifest.quantization == result.manifest.quantization


def test_channels_are_gone(result: BuildResult, family: str, golden_root: Path) -> None:
    """In whole blocks of 32."""
    width = json.loads((golden_root / family / "checkpoint" / "config.json").read_text())["vision_config"]["intermediate_size"]
    kept = math.ceil(0.7 * width / 32) * 32
    initializers = ir.load(result.folder / result.manifest.graphs["vision_encoder"].file).graph.initializers
    shapes = [initializers[f"layers.{layer}.{name}"].shape for layer in (0, 1) for name in ("fc1.bias", "fc2.qweight")]
    assert shapes[0] == shapes[2] == ir.Shape([kept])
    assert [shape[0] for shape in shapes if shape is not None] == [kept] * 4
    assert kept < width


def test_another_checkpoint_is_noticed(result: BuildResult, family: str, golden_root: Path, tmp_path: Path) -> None:
    source = golden_root / family / "checkpoint"
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("encoder.layers.1.self_attn.k_proj.weight"))
    tensors[name] = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0)).to(tensors[name].dtype)
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"k_proj is another than the checkpoint's"):
        compare(Bundle.open(result.folder), tmp_path)


def test_options_go_over_the_recipe_file_and_its_graphs_over_what_it_says_of_all(
    run: Run,
    recipe: Callable[..., tuple[object, ...]],
    golden_root: Path,
    samples: SampleOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MCV_CACHE", str(tmp_path / "cache"))
    source, out = golden_root / "minicpmv2_6" / "checkpoint", tmp_path / "bundle"
    given: list[Any] = ["--calibration", samples.folder, "--prompts", samples.prompts]
    how = ["--vision", "int8-static", "--target", "avx2"]
    file = recipe(
        target="arm64",
        graphs={
            "*": {"smoothing": 0.4, "block_size": 64, "method": "k-quant"},
            "vision_encoder": {"precision": "q8", "ranges": "mse", "prune_ffn": 0.25},
            "resampler": {"precision": "q8", "block_size": 32},
            "decoder_with_past": {"layers": {"embed_tokens": "q8"}, "prune_ffn": 0.25},
        },
        num_samples=2,
    )
    code, _, told = run("build", source, out, *given, *how, *file)
    assert code == 0
    assert "calibrated with 10 samples from " in told  # eight drawn ones beside the two
    written = Bundle.open(out).manifest
    assert written.graphs["vision_encoder"].file == "onnx/vision_encoder_int8.onnx"
    assert written.quantization == {
        "target": "avx2",
        "graphs": {
            "vision_encoder": {"precision": "int8-static", "ranges": "mse", "smoothing": 0.4, "prune_ffn": 0.25},
            "resampler": {"precision": "q8", "method": "k-quant", "block_size": 32, "smoothing": 0.4},
            "decoder_with_past": {
                "precision": "q4",
                "layers": {"embed_tokens": "q8"},
                "method": "k-quant",
                "block_size": 64,
                "smoothing": 0.4,
                "prune_ffn": 0.25,
            },
        },
    }


def test_what_is_not_observed_is_computed_once(
    golden_root: Path, samples: SampleOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower's part in two passes over the resampler's inputs, and in another over the decoder's."""
    seen: list[bytes] = []
    forward = SiglipTower.forward

    def counted(self: SiglipTower, pixel_values: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            seen.append(pixel_values.numpy().tobytes())
        return forward(self, pixel_values, position_ids)

    monkeypatch.setattr(SiglipTower, "forward", counted)
    recipe = Recipe(
        target="avx2",
        graphs={
            "vision_encoder": GraphRecipe(precision="fp32"),
            "resampler": GraphRecipe(precision="int8-static"),
            "decoder_with_past": GraphRecipe(precision="q4", method="gptq"),
        },
    )
    options = BuildOptions(recipe=recipe, samples=replace(samples, store=tmp_path / "store"))
    build(golden_root / "minicpmv2_6" / "checkpoint", tmp_path / "bundle", options)
    assert len(seen) == len(set(seen)) > 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"graphs": {"*": {"prune_ffn": 1.5}}}, "prune_ffn=1.5"),
        ({"graphs": {"*": {"smoothing": 2}}}, "smoothing=2"),
        ({"graphs": {"*": {"blocksize": 64}}}, "'blocksize'; did you mean 'block_size'?"),
        ({"graphs": {"decoder": {}}}, "'decoder'; did you mean 'decoder_with_past'?"),
        ({"graphs": {"resampler": 4}}, "resampler must be an object"),
        ({"num_sample": 4}, "'num_sample'; did you mean 'num_samples'?"),
        ({"num_samples": True}, "num_samples=True"),
        ({"min_agreement": 2}, "from 0 to 1"),
        ({"target": "abacus"}, "'abacus' is none of"),
    ],
)
def test_recipe_files_that_make_no_sense(
    keys: dict[str, Any],
    words: str,
    run: Run,
    recipe: Callable[..., tuple[object, ...]],
    golden_root: Path,
    tmp_path: Path,
) -> None:
    refused(run, golden_root, tmp_path, words, *recipe(**keys))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "nowhere.json"], "nowhere.json is not there"),
        (["--recipe", __file__], "is not JSON"),
        (["--vision", "int8-static", "--prompts", "x.txt"], "--calibration"),
    ],
)
def test_wishes_that_make_no_sense(arguments: list[str], words: str, run: Run, golden_root: Path, tmp_path: Path) -> None:
    refused(run, golden_root, tmp_path, words, *arguments)


def refused(run: Run, golden_root: Path, tmp_path: Path, words: str, *arguments: object) -> None:
    code, _, told = run("build", golden_root / "minicpmv2_6" / "checkpoint", tmp_path / "bundle", *arguments)
    assert code == 2
    assert words in told
    assert told.strip().count("\n") == 0


def test_the_readme_says_what_a_recipe_file_may_hold(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = text.partition("```json\n")[2].partition("```")[0]
    (tmp_path / "recipe.json").write_text(example, encoding="utf-8")
    said = RecipeFile.read(tmp_path / "recipe.json")
    graphs = Wishes(settings=said.graphs).recipe().graphs
    assert {name: graph.smoothing for name, graph in graphs.items()} == dict.fromkeys(graphs, 0.4)
    assert said.search
    keys = [each.name for kind in (RecipeFile, GraphRecipe) for each in fields(kind)]
    assert [key for key in keys if f"`{key}`" not in text and key != "graphs"] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "levels deep"),
        ("[]", "an object with `graphs`"),
        ('{"graphs": {"ears": {"precision": "q8"}}}', "'ears'"),
        ('{"graphs": {"resampler": {"precision": "q5"}}}', "'q5' is none of"),
        ('{"graphs": {"resampler": {"precision": "q8", "colour": 1}}}', "unknown key 'colour'"),
        ('{"graphs": {"resampler": {"precision": "q8", "block_size": "32"}}}', "block_size='32'"),
        ('{"target": "abacus", "graphs": {}}', "'abacus' is none of"),
    ],
)
def test_recipes_that_make_no_sense(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Recipe.from_json(text)


def test_a_recipe_for_every_graph(golden_root: Path, tmp_path: Path) -> None:
    recipe = Recipe(graphs={"vision_encoder": GraphRecipe(precision="q8")})
    with pytest.raises(OptionError, match="nothing about the graph resampler"):
        build(golden_root / "minicpmv2_6" / "checkpoint", tmp_path / "bundle", BuildOptions(recipe=recipe))
