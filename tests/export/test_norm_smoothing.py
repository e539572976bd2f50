"""Which norms take in factors without any sample, and that these change nothing but the rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mcv_calibration.measured import NOTHING
from mcv_calibration.recipe import GraphRecipe
from mcv_export.checkpoint import Checkpoint, open_checkpoint
from mcv_export.eager import eager_module
from mcv_export.families import recognise
from mcv_export.norm_smoothing import smoothed_by_norms
from mcv_export.plan import GraphPlan


@pytest.fixture(scope="module", params=["minicpmv2_6", "minicpmv4_6"])
def checkpoint(request: pytest.FixtureRequest, golden_root: Path) -> Checkpoint:
    return open_checkpoint(golden_root / request.param / "checkpoint")


@pytest.fixture(scope="module")
def graphs(checkpoint: Checkpoint) -> tuple[GraphPlan, ...]:
    return recognise(checkpoint.config).plan(checkpoint).graphs


def found(graph: GraphPlan, checkpoint: Checkpoint, recipe: GraphRecipe) -> set[str]:
    return set(smoothed_by_norms(graph, checkpoint, recipe, "avx2", NOTHING).smoothing)


def test_layers_behind_norms(graphs: tuple[GraphPlan, ...], checkpoint: Checkpoint) -> None:
    tower, decoder = graphs[0], graphs[-1]
    behind = {path for path in found(tower, checkpoint, GraphRecipe(precision="q8")) if path.startswith("layers.0.")}
    assert behind >= {f"layers.0.{name}" for name in ("q_proj", "k_proj", "v_proj", "fc1")}
    assert "layers.0.fc2" not in behind
    assert "layers.1.up_proj" in found(decoder, checkpoint, GraphRecipe(precision="int8-dynamic"))


def test_a_tied_head_keeps_the_weight_of_its_twin(graphs: tuple[GraphPlan, ...], checkpoint: Checkpoint) -> None:
    decoder = graphs[-1]
    assert ("lm_head" in found(decoder, checkpoint, GraphRecipe(precision="q4"))) == (not decoder.tied)


def test_norms_that_are_left_as_they_are(graphs: tuple[GraphPlan, ...], checkpoint: Checkpoint) -> None:
    for recipe in (
        GraphRecipe(precision="fp32"),
        GraphRecipe(precision="q4", smoothing=0.0),
        GraphRecipe(precision="int8-static"),
    ):
        assert not found(graphs[0], checkpoint, recipe)
    mixed = GraphRecipe(precision="int8-static", layers={"layers.1": "q8", "layers.0.q_proj": "q8"})
    assert {path.rpartition(".")[0] for path in found(graphs[0], checkpoint, mixed)} == {"layers.1"}


def test_the_function_is_the_same(graphs: tuple[GraphPlan, ...], checkpoint: Checkpoint) -> None:
    tower = graphs[0]
    measured = smoothed_by_norms(tower, checkpoint, GraphRecipe(precision="q4"), "avx2", NOTHING)
    shapes = {name: [4 if isinstance(n, str) else n for n in spec.shape] for name, spec in tower.io.inputs.items()}
    generator = torch.Generator().manual_seed(0)
    feed = [
        torch.randn(shape, generator=generator) if name == "pixel_values" else torch.zeros(shape, dtype=torch.int64)
        for name, shape in shapes.items()
    ]
    with torch.inference_mode():
        plain, smoothed = (eager_module(tower, checkpoint, measured=one)(*feed).numpy() for one in (NOTHING, measured))
    assert measured.smoothing
    np.testing.assert_allclose(smoothed, plain, rtol=0, atol=1e-4)
