"""Builds with a gate: refused without a trace, or searched for and replayed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mcv_calibration.accuracy import compare
from mcv_calibration.contender import Contender
from mcv_calibration.samples import builtin_samples
from mcv_calibration.sensitivity import blocks, sensitivities
from mcv_export.checkpoint import open_checkpoint
from mcv_export.eager import eager_module
from mcv_export.families.minicpmv2_6 import FAMILY
from mcv_export.oracle import TorchSession
from mcv_graphs.formats import WeightFormat
from mcv_graphs.layers import Linear
from mcv_runtime.bundle.folder import Bundle

Run = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., tuple[object, ...]]


FOUR_BITS = ("--precision", "q4", "--vision", "q4", "--resampler", "q4")


@pytest.fixture
def source(golden_root: Path) -> Path:
    return golden_root / "minicpmv2_6" / "checkpoint"


def test_a_build_that_misses_its_gate_leaves_nothing_behind(source: Path, tmp_path: Path, run: Run, recipe: Recipe) -> None:
    out = tmp_path / "bundle"
    code, _, err = run("build", source, out, *FOUR_BITS, *recipe(num_samples=1), "--max-kl", "1e-9")
    assert code == 3
    last = err.strip().splitlines()[-1]
    assert last.startswith("mcv-export: bundle misses its gate: its KL divergence ")
    assert last.count("(q4, +") == 3
    assert list(tmp_path.iterdir()) == []


def test_a_search_finds_a_recipe_that_can_be_replayed(source: Path, tmp_path: Path, run: Run, recipe: Recipe) -> None:
    found, again = tmp_path / "found", tmp_path / "again"
    code, _, _ = run("build", source, found, *FOUR_BITS, *recipe(num_samples=1, search=True), "--max-kl", "1.5")
    assert code == 0
    manifest = Bundle.open(found).manifest
    recipe = manifest.quantization["graphs"]
    assert any(graph.get("layers") for graph in recipe.values())
    assert {precision for graph in recipe.values() for precision in graph.get("layers", {}).values()} <= {"q8", "fp32"}
    report = json.loads((found / "report.json").read_text(encoding="utf-8"))
    assert report["bundles"][0]["quantization"] == manifest.quantization
    assert report["bundles"][0]["accuracy"]["together"]["kl_mean"] <= 1.5
    assert run("build", source, again, "--recipe", found / "mcv.json")[0] == 0
    reports = {"report.json", "report.html"}
    assert {name: spec for name, spec in manifest.files.items() if name not in reports} == Bundle.open(again).manifest.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "found"]


def test_a_search_needs_a_gate_and_a_free_place(source: Path, tmp_path: Path, run: Run, recipe: Recipe) -> None:
    searched = recipe(num_samples=1, search=True)
    code, _, err = run("build", source, tmp_path / "bundle", *searched)
    assert code == 2
    assert "give it --max-kl, or min_agreement in the recipe" in err
    code, _, err = run("build", source, tmp_path, *searched, "--max-kl", 1)
    assert code == 2
    assert "--force" in err


def test_each_block_alone(source: Path, bundle_of: Callable[..., Path]) -> None:
    """A block that is as it was costs nothing, and the one that is coarsest costs most."""
    contender = Contender(bundle_of("minicpmv2_6"), threads=1)
    calls = compare(contender, [contender], builtin_samples(1).samples, max_new_tokens=4).calls
    checkpoint = open_checkpoint(source)
    for graph in FAMILY.plan(checkpoint).graphs:
        with torch.device("meta"):
            module = graph.module()
        coarse = blocks(module)[-1]
        linears = [path for path, child in module.named_modules() if isinstance(child, Linear) and child.quantizable]
        formats = {
            path: WeightFormat(
                bits=4 if path.startswith(coarse.layers) else 8, block_size=32 if path.startswith(coarse.layers) else 16
            )
            for path in linears
        }
        exempt = linears[0]
        formats = {path: kind for path, kind in formats.items() if not path.startswith(exempt.rpartition(".")[0] or exempt)}
        session = TorchSession(lambda graph=graph: eager_module(graph, checkpoint), graph.io)
        quantized = eager_module(graph, checkpoint, formats=formats)
        feeds = [call.inputs for call in calls[graph.name][:1]]
        found = sensitivities(graph.name, session, session.module, quantized, feeds)
        errors = found.blocks
        assert found.together is not None
        assert found.together.cost > errors[-1].cost
        assert errors[0].layers == coarse.layers
        assert len({error.name for error in errors}) == len(errors)
        assert all(error.cost > 0 for error in errors)
        assert not any(exempt.startswith(error.layers) for error in errors)
