"""The demonstration model: what ships is what is trained, and what quantization costs it."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir
import pytest

from mcv_export.build import BuildOptions, build
from mcv_runtime import load
from mcv_runtime.bundle.folder import DEFAULT, Bundle

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models" / "tiny"
EXAMPLES = 1000
COMPARED = 400


RECIPES = ("fp32", "int8-static vision", "q8", "q4 gptq", "int8-static + q4 gptq")
OUTLIERS = ("outliers: int8-static", "outliers: q8", "outliers: int8-static + q4 gptq")
EVERYWHERE = ("all outliers: default", "all outliers: int8-dynamic", "all outliers: q8")
COLLAPSES = ("outliers: naive int8-static", "outliers: naive q8")


@pytest.fixture(scope="module")
def exact_match(tmp_path_factory: pytest.TempPathFactory, traced_once: None) -> dict[str, float]:
    """Percent of held-out questions answered to the letter, by recipe."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(TINY)]
    try:
        from quality import build_recipes, right_answers
        from scenes import held_out
    finally:
        del sys.path[:2]
    examples = list(held_out(EXAMPLES))
    bundles = build_recipes([*RECIPES, *OUTLIERS, *EVERYWHERE, *COLLAPSES], tmp_path_factory.mktemp("recipes"))
    # a drop is that of the same questions, so it takes fewer of them than what is said of the model; a collapse, fewer still
    counts = {name: 100 if name in COLLAPSES else EXAMPLES if name == "fp32" else COMPARED for name in bundles}
    right = {name: list(right_answers(load(path, threads=1), examples[: counts[name]])) for name, path in bundles.items()}
    right["fp32 compared"] = right["fp32"][:COMPARED]
    return {name: 100 * sum(goods) / len(goods) for name, goods in right.items()}


def test_the_model_answers(exact_match: dict[str, float]) -> None:
    """As its card and the kept result say, give or take what another processor's rounding may flip."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "tiny-quality.json").read_text())
    assert kept["examples"] == EXAMPLES
    assert exact_match["fp32"] == pytest.approx(kept["exact_match"]["fp32"]["all"], abs=0.5)
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert f"{kept['exact_match']['fp32']['all']:.1f} %" in card


@pytest.mark.parametrize(
    ("recipe", "points"), [("int8-static vision", 1), ("q8", 0.5), ("q4 gptq", 1), ("int8-static + q4 gptq", 2)]
)
def test_quantization_costs_little(exact_match: dict[str, float], recipe: str, points: float) -> None:
    assert exact_match[recipe] >= exact_match["fp32 compared"] - points


@pytest.mark.parametrize("recipe", OUTLIERS)
def test_outlier_channels_cost_nothing(exact_match: dict[str, float], recipe: str) -> None:
    """The same function with channels up to 256 times larger: ranges and blocks alone cannot hold them, smoothing does."""
    assert exact_match[recipe] >= exact_match["fp32 compared"] - 2


@pytest.mark.parametrize("recipe", EVERYWHERE)
def test_outliers_between_linears_cost_nothing(exact_match: dict[str, float], recipe: str) -> None:
    """Where no norm is before a layer: values of attention, also shared by heads, the MLP's channels, and across graphs."""
    assert exact_match[recipe] >= exact_match["fp32 compared"] - 2


@pytest.mark.parametrize("recipe", COLLAPSES)
def test_without_smoothing_they_cost_nearly_all(exact_match: dict[str, float], recipe: str) -> None:
    assert exact_match[recipe] < 50


def test_the_shipped_bundle_is_built_from_it(tmp_path: Path) -> None:
    again = build(TINY / "checkpoint", tmp_path / "bundle", BuildOptions(precision="q8"), model="models/tiny").manifest
    shipped = Bundle.open(DEFAULT).manifest
    assert shipped.files.keys() == again.files.keys()
    for name in shipped.files:
        if name.endswith(".onnx"):  # another version of the tracer may write the same graph in other bytes
            assert _nodes(DEFAULT / name) == _nodes(tmp_path / "bundle" / name)
        else:
            assert shipped.files[name] == again.files[name]
    for name in ("image", "placeholder", "text", "generation", "cache", "graphs", "quantization"):
        assert getattr(shipped, name) == getattr(again, name)


def test_the_demo_answers_as_the_readme_says() -> None:
    answer = load().ask(TINY / "demo.png", "What does the text say?")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    demo = next(number for number, line in enumerate(lines) if line.startswith("$ make demo"))
    assert lines[demo + 1] == answer.text
    assert answer.stop_reason == "stop"


@pytest.mark.waits
def test_threads_share_an_engine() -> None:
    engine = load(threads=1)
    questions = ["What does the text say?", "Describe the picture.", "What shape is this?", "How many shapes are there?"] * 4
    alone = [engine.ask(TINY / "demo.png", question).tokens for question in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda question: engine.ask(TINY / "demo.png", question).tokens, questions))
    assert together == alone


@pytest.mark.waits
def test_mcv_run_without_a_bundle() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MCV_BUNDLE"}
    command = [sys.executable, "-m", "mcv_runtime.command.cli", "-p", "How many shapes are there?", "--image"]
    good, bad = (
        subprocess.run([*command, str(TINY / name)], capture_output=True, text=True, env=environment, check=False)
        for name in ("demo.png", "nothing.png")
    )
    assert (good.returncode, good.stdout) == (0, "1\n")
    assert "demo model" in good.stderr
    assert "mcv-export build" in good.stderr
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)


def test_the_checkpoint_is_small_and_in_the_published_layout() -> None:
    files = {path.name: path.stat().st_size for path in (TINY / "checkpoint").iterdir()}
    assert sum(files.values()) < 12_000_000
    published = {"config.json", "generation_config.json", "preprocessor_config.json", "special_tokens_map.json"}
    assert files.keys() == published | {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def _nodes(path: Path) -> list[tuple[object, ...]]:
    model = ir.load(path)
    return [
        (node.domain, node.op_type, [value and value.name for value in node.inputs], [value.name for value in node.outputs])
        for node in model.graph
    ]
