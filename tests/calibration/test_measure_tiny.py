"""The demonstration model's vision graphs calibrated end to end: as they are, and with outlier channels as in real towers."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mcv_calibration.formats import layer_formats
from mcv_calibration.inputs import layer_inputs
from mcv_calibration.measure import measure
from mcv_calibration.measured import Measured
from mcv_calibration.ranges import PERCENTILE
from mcv_calibration.recipe import GraphRecipe
from mcv_calibration.samples import Sample, SampleSet, builtin_samples, calibrating_part, folder_samples, with_drawn
from mcv_calibration.store import Store
from mcv_export.checkpoint import Checkpoint, open_checkpoint
from mcv_export.eager import eager_module
from mcv_export.families.minicpmv2_6 import FAMILY
from mcv_export.oracle import oracle_engine
from mcv_export.sources import resolve
from mcv_graphs.layers import Linear
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.engine import Engine

TINY = Path(__file__).parents[2] / "models" / "tiny"
GRAPHS: tuple[GraphName, ...] = ("vision_encoder", "resampler")
NAIVE = GraphRecipe(precision="int8-static", ranges="minmax", smoothing=0.0)
DEFAULT = GraphRecipe(precision="int8-static")


def scenes(count: int, seed: int) -> tuple[Sample, ...]:
    """Pictures of the model's own world: it is trained on no others."""
    sys.path.insert(0, str(TINY))
    try:
        from scenes import held_out
    finally:
        del sys.path[0]
    examples = held_out(count, seed)
    return tuple(Sample(tuple(picture.image for picture in example.pictures), example.question) for example in examples)


@pytest.fixture(scope="module")
def samples() -> SampleSet:
    return SampleSet(scenes(24, seed=7) + builtin_samples(2).samples, (), "scenes and built-in pictures")


@pytest.fixture(scope="module")
def plain() -> Checkpoint:
    return open_checkpoint(TINY / "checkpoint")


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same function: channels of every norm 32 to 256 times as large, the following weights' columns as much smaller."""
    folder = tmp_path_factory.mktemp("outliers") / "checkpoint"
    shutil.copytree(TINY / "checkpoint", folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)

    def scale(norm: str, *weights: str) -> None:
        channels = torch.from_numpy(rng.choice(160, 6, replace=False))
        factors = torch.from_numpy(2.0 ** rng.integers(5, 9, 6)).to(tensors[f"{norm}.weight"].dtype)  # powers of two: exact
        for kind in ("weight", "bias"):
            tensors[f"{norm}.{kind}"][channels] *= factors
        for name in weights:
            tensors[f"{name}.weight"][:, channels] /= factors

    for layer in range(4):
        prefix = f"vpm.encoder.layers.{layer}"
        scale(f"{prefix}.layer_norm1", *(f"{prefix}.self_attn.{name}_proj" for name in "qkv"))
        scale(f"{prefix}.layer_norm2", f"{prefix}.mlp.fc1")
    scale("vpm.post_layernorm", "resampler.kv_proj")
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def calibrate(checkpoint: Checkpoint, samples: SampleSet, recipe: GraphRecipe, store: Path) -> dict[GraphName, Measured]:
    """Both graphs, driven by the engine whose modules they are."""
    plan = FAMILY.plan(checkpoint)
    plans = {graph.name: graph for graph in plan.graphs}
    modules = {name: eager_module(plans[name], checkpoint) for name in GRAPHS}
    engine = oracle_engine(plan, checkpoint, modules)
    found = {}
    for name in GRAPHS:
        sources = resolve(plans[name], checkpoint)
        found[name] = measure(
            modules[name],
            lambda sample: encode(engine, sample),
            samples,
            recipe,
            layer_inputs(modules[name]),
            lambda path, sources=sources: sources[f"{path}.weight"].pieces(),
            Store(f"{checkpoint.folder} {name}", store),
        )
    return found


def encode(engine: Engine, sample: Sample) -> np.ndarray:
    """Visual tokens [tokens, hidden]."""
    return np.concatenate([engine.encode_image(image).embeds for image in sample.images])


def cosines(checkpoint: Checkpoint, recipe: GraphRecipe, measured: Mapping[GraphName, Measured]) -> np.ndarray:
    """Of each visual token of held-out pictures, in static INT8 and in float."""
    plan = FAMILY.plan(checkpoint)
    modules = {
        graph.name: eager_module(
            graph,
            checkpoint,
            formats=layer_formats(graph.module(), recipe, "avx512_vnni"),
            measured=measured[graph.name],
        )
        for graph in plan.graphs
        if graph.name in GRAPHS
    }
    engines = oracle_engine(plan, checkpoint), oracle_engine(plan, checkpoint, modules)
    exact, found = (np.concatenate([encode(engine, sample) for sample in scenes(12, seed=0)]) for engine in engines)
    result: np.ndarray = (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)
    return result


def test_ranges_hold_all_activations(plain: Checkpoint, samples: SampleSet, tmp_path: Path) -> None:
    """Against every activation of the two graphs held in memory."""
    plan = FAMILY.plan(plain)
    modules = {graph.name: eager_module(graph, plain) for graph in plan.graphs if graph.name in GRAPHS}
    engine = oracle_engine(plan, plain, modules)
    held: dict[tuple[GraphName, str], list[np.ndarray]] = {}
    for name, module in modules.items():
        for path, layer in module.named_modules():
            if isinstance(layer, Linear) and layer.quantizable:
                seen = held.setdefault((name, path), [])
                layer.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].numpy().ravel().copy()))
    for sample in samples.samples:
        encode(engine, sample)
    extremes = calibrate(plain, samples, NAIVE, tmp_path)
    assert {(name, path) for name in GRAPHS for path in extremes[name].ranges} == held.keys()
    assert len(held) == 4 * 6 + 6
    percentiles = calibrate(plain, samples, GraphRecipe(precision="int8-static", smoothing=0.0), tmp_path)
    for (name, path), arrays in held.items():
        values = np.concatenate(arrays)
        found, cut = extremes[name].ranges[path], percentiles[name].ranges[path]
        assert (found.low, found.high) == (min(values.min(), 0), max(values.max(), 0))
        inside = np.mean((values >= cut.low) & (values <= cut.high))
        assert 100 * inside == pytest.approx(PERCENTILE, abs=2e-3)


def test_static_int8_holds(plain: Checkpoint, samples: SampleSet, tmp_path: Path) -> None:
    found = cosines(plain, DEFAULT, calibrate(plain, samples, DEFAULT, tmp_path))
    assert found.mean() > 0.999
    assert found.min() > 0.97


def test_static_int8_holds_where_channels_are_outliers(outliers: Checkpoint, samples: SampleSet, tmp_path: Path) -> None:
    naive = cosines(outliers, NAIVE, calibrate(outliers, samples, NAIVE, tmp_path))
    assert naive.mean() < 0.5  # the case is as hard as it should be
    found = cosines(outliers, DEFAULT, calibrate(outliers, samples, DEFAULT, tmp_path))
    assert found.mean() > 0.999
    assert found.min() > 0.97


def dark(folder: Path, levels: int, size: int, count: int = 15) -> Path:
    """Pictures of nearly black noise, and a bright one, for which the folder is taken."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, levels, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    Image.fromarray(random.integers(0, 256, (60, 90, 3), dtype=np.uint8)).resize((size, size)).save(folder / "bright.png")
    return folder


@pytest.mark.parametrize("levels", [7, 60])
def test_a_folder_of_dark_pictures_does_no_harm(levels: int, plain: Checkpoint, tmp_path: Path) -> None:
    """Neither of those that show nothing, nor of those that leave the ranges of others to few drawn ones beside them."""
    given = folder_samples(dark(tmp_path / "dark", levels, 300))
    alone = replace(given, samples=tuple(sample for sample in given.samples if sample.images[0].name != "bright.png"))  # type: ignore[union-attr]
    if alone.samples:
        assert cosines(plain, DEFAULT, calibrate(plain, alone, DEFAULT, tmp_path / "alone")).mean() < 0.99  # a hard case
    found = cosines(plain, DEFAULT, calibrate(plain, with_drawn(calibrating_part(given)), DEFAULT, tmp_path / "beside"))
    assert found.mean() > 0.999
    assert np.quantile(found, 0.01) > 0.99


def test_the_outliers_change_nothing_in_float(plain: Checkpoint, outliers: Checkpoint) -> None:
    one, other = (oracle_engine(FAMILY.plan(checkpoint), checkpoint) for checkpoint in (plain, outliers))
    for sample in scenes(3, seed=0):
        np.testing.assert_allclose(encode(one, sample), encode(other, sample), atol=1e-4)
