"""Which layers take in factors without any sample, and that these change nothing but the rounding."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mcv_calibration.measured import NOTHING, Measured
from mcv_calibration.recipe import GraphRecipe
from mcv_export.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint
from mcv_export.eager import eager_module
from mcv_export.families import recognise
from mcv_export.oracle import oracle_engine, prompt_feed
from mcv_export.plan import GraphPlan
from mcv_export.unseen_smoothing import smoothed_unseen
from mcv_graphs.folds import folds
from mcv_runtime.engine import Engine
from mcv_runtime.errors import OptionError


@pytest.fixture(scope="module", params=["minicpmv2_6", "minicpmv4_6"])
def checkpoint(request: pytest.FixtureRequest, golden_root: Path) -> Checkpoint:
    return open_checkpoint(golden_root / request.param / "checkpoint")


@pytest.fixture(scope="module")
def graphs(checkpoint: Checkpoint) -> tuple[GraphPlan, ...]:
    return recognise(checkpoint.config).plan(checkpoint).graphs


def found(graph: GraphPlan, checkpoint: Checkpoint, recipe: GraphRecipe) -> set[str]:
    return set(smoothed_unseen(graph, checkpoint, recipe, "avx2", NOTHING).smoothing)


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


def test_layers_between_linears(graphs: tuple[GraphPlan, ...], checkpoint: Checkpoint) -> None:
    tower, decoder = graphs[0], graphs[-1]
    assert "layers.0.out_proj" in found(tower, checkpoint, GraphRecipe(precision="q8"))
    assert found(decoder, checkpoint, GraphRecipe(precision="q4")) >= {
        "layers.0.o_proj",
        "layers.1.o_proj",
        "layers.0.down_proj",
    }


@pytest.mark.parametrize("family", ["minicpmv2_0", "minicpmv2_6", "minicpmv4_5", "minicpmv4_6"])
def test_the_function_is_the_same(family: str, golden_root: Path) -> None:
    """Whatever the factors: each fold of tower, resampler, merger and decoder takes random ones, from 1 / 16 to 16."""
    checkpoint = open_checkpoint(golden_root / family / "checkpoint")
    plan = recognise(checkpoint.config).plan(checkpoint)
    rng = np.random.default_rng(0)
    measured = {graph.name: random_factors(graph, rng) for graph in plan.graphs if not graph.shares}
    for graph in plan.graphs:  # without the layers that only its owner has
        if graph.shares:
            own = {path: s for path, s in measured[graph.shares].smoothing.items() if f"{path}.weight" in graph.weights}
            measured[graph.name] = Measured(smoothing=own)
    plain, folded = (
        oracle_engine(plan, checkpoint, {g.name: eager_module(g, checkpoint, measured=found[g.name]) for g in plan.graphs})
        for found in (dict.fromkeys(measured, NOTHING), measured)
    )
    noise = Image.fromarray(rng.integers(0, 256, (160, 240, 3), dtype=np.uint8))
    embeds = [engine.encode_image(noise, max_slice_nums=1).embeds for engine in (plain, folded)]
    np.testing.assert_allclose(embeds[1], embeds[0], rtol=0, atol=2e-5 * np.abs(embeds[0]).max())
    logits = [next_logits(engine, plan.graphs[-1], noise) for engine in (plain, folded)]
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4 * np.abs(logits[0]).max())


def random_factors(graph: GraphPlan, rng: np.random.Generator) -> Measured:
    """The same for columns that read one channel."""
    with torch.device("meta"):
        module = graph.module()
    smoothing = {}
    for fold in folds(module):
        if fold.free and {*graph.tied, *graph.tied.values()}.isdisjoint(fold.readers):
            width = module.get_submodule(fold.readers[0]).in_features
            channels = np.arange(width) if fold.channels is None else np.array(fold.channels)
            smoothing |= dict.fromkeys(
                fold.readers, np.exp2(rng.uniform(-4, 4, channels.max() + 1))[channels].astype(np.float32)
            )
    return Measured(smoothing=smoothing)


def next_logits(engine: Engine, graph: GraphPlan, image: Image.Image) -> np.ndarray:
    """What follows each position of a question about a picture."""
    picture = engine.encode_image(image, max_slice_nums=1)
    prompt = engine.prompt([{"role": "user", "content": [picture, "What is in the picture?"]}])
    feed = prompt_feed(engine.bundle.manifest, prompt, [picture.embeds], np.arange(len(prompt.ids)))
    logits: np.ndarray = engine._sessions(graph.name).run(["logits"], feed)[0]
    return logits


def test_a_channel_has_one_factor(golden_root: Path) -> None:
    checkpoint = open_checkpoint(golden_root / "minicpmv2_6" / "checkpoint")
    decoder = recognise(checkpoint.config).plan(checkpoint).graphs[-1]
    with torch.device("meta"):
        width = decoder.module().layers[0].o_proj.in_features
    for factors, message in ((np.arange(1, width + 1), "reads the same channel"), (np.ones(3), "for 3 channels")):
        with pytest.raises(OptionError, match=message):
            eager_module(decoder, checkpoint, measured=Measured(smoothing={"layers.0.o_proj": factors.astype(np.float32)}))


def test_what_another_graph_enlarges_is_multiplied_back(golden_root: Path) -> None:
    """The tower's last norm is before the resampler's first layer, in a graph of its own that keeps its result."""
    checkpoint = open_checkpoint(golden_root / "minicpmv2_6" / "checkpoint")
    resampler = recognise(checkpoint.config).plan(checkpoint).graphs[1]
    assert "kv_proj" not in found(resampler, checkpoint, GraphRecipe(precision="q8"))  # all channels alike
    enlarged = replace(checkpoint, tensors={**checkpoint.tensors})
    for name in ("vpm.post_layernorm.weight", "vpm.post_layernorm.bias"):
        enlarged.tensors[name] = Scaled(checkpoint.tensors[name])  # type: ignore[index]
    for precision in ("q8", "q4", "int8-dynamic"):
        recipe = GraphRecipe(precision=precision)  # type: ignore[arg-type]
        factors = smoothed_unseen(resampler, enlarged, recipe, "avx2", NOTHING).smoothing["kv_proj"]
        assert set(np.argsort(factors)[-3:]) == {0, 1, 2}
    assert "kv_proj" not in found(resampler, enlarged, GraphRecipe(precision="int8-static"))
    assert "kv_proj" not in found(resampler, enlarged, GraphRecipe(precision="q8", layers={"kv_proj": "fp32"}))


class Scaled:
    """A tensor whose first three values are 1,000 times larger."""

    def __init__(self, tensor: CheckpointTensor) -> None:
        self.name, self.shape, self._tensor = tensor.name, tensor.shape, tensor

    def rows(self, first: int, last: int) -> np.ndarray:
        return self._tensor.rows(first, last) * np.where(np.arange(first, last) < 3, 1000, 1).reshape(-1, 1)
