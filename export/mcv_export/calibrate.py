"""Put samples through a checkpoint's own engine, and find what a recipe needs to know of each graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mcv_calibration.formats import layer_formats
from mcv_calibration.gptq_layers import quantize_layers
from mcv_calibration.importance import ffn_importance, kept_channels
from mcv_calibration.inputs import layer_inputs
from mcv_calibration.measure import measure
from mcv_calibration.measured import NOTHING, Measured
from mcv_calibration.moments import mean_squares
from mcv_calibration.recipe import GraphRecipe, Recipe
from mcv_calibration.samples import (
    ENOUGH,
    Sample,
    SampleSet,
    builtin_samples,
    calibrating_part,
    folder_samples,
    measuring_samples,
    with_drawn,
)
from mcv_calibration.store import Store, content_hash, fingerprint, make_room, mark_used
from mcv_calibration.target import Target
from mcv_calibration.walk import AnyDecoder, start
from mcv_export.checkpoint import Checkpoint
from mcv_export.eager import eager_module
from mcv_export.oracle import TorchSession, oracle_engine, prompt_feed
from mcv_export.plan import GraphPlan, ModelPlan
from mcv_export.sources import Source, resolve
from mcv_export.storage import Storage, feed_forward
from mcv_export.unseen_smoothing import smoothed_unseen
from mcv_graphs.formats import WeightFormat
from mcv_graphs.layers import Linear
from mcv_runtime.bundle.checked import cache_folder, code_version
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.engine import Engine
from mcv_runtime.errors import OptionError, OutputError
from mcv_runtime.sessions.graphs import Session

CalibrationProgress = Callable[[str, int, int], None]
"""Told what is being measured, how much of it is done, and of how much."""


_ROWS = 64
"""Positions of a question that the last layer and the head see: logits of all would take more memory than the layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Where samples come from: a folder of pictures with a file of questions, or what is drawn here.

    `count` of them, by default 32, or 16 of those drawn here. Of these a tower sees the overview alone: they have no finer
    detail, and a full-size tower takes seconds for a slice. What calibrates does not measure: of a user's pictures every
    fourth is held out, and others are drawn.
    """

    folder: Path | None = None
    prompts: Path | None = None
    count: int | None = None
    store: Path | None = None
    """Where what was measured is kept; by default the user's cache folder."""

    def calibrating(self) -> SampleSet:
        """What ranges, channels and blocks are taken from; beside a user's are some drawn here.

        Raises `OptionError` or `ImageError` where there are no samples.
        """
        if (own := self._own()) is None:
            return builtin_samples(16 if self.count is None else self.count)
        return with_drawn(calibrating_part(own))

    def measuring(self) -> SampleSet:
        """What a bundle is measured on, but for those that it was calibrated with. Raises as `calibrating`."""
        own = self._own()
        if own is None:
            return measuring_samples(self.count)
        return replace(own, enough=ENOUGH if self.count is None else None)

    def _own(self) -> SampleSet | None:
        if self.folder is not None:
            return folder_samples(self.folder, self.prompts, 32 if self.count is None else self.count)
        if self.prompts is not None:
            raise OptionError(f"{self.prompts} are questions about pictures; give their folder too, with --calibration")
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was found, by graph, and what with."""

    graphs: Mapping[GraphName, Measured]
    samples: SampleSet | None = None


def calibrate(
    plan: ModelPlan,
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: SampleOptions,
    progress: CalibrationProgress,
    pool: Executor | None = None,
) -> Calibration:
    """Measure the graphs whose recipes ask for it, of the others see what norms say; no sample is opened where none asks."""
    found: dict[GraphName, Measured] = {}
    reference: dict[GraphName, Session] = {}
    samples = None
    for graph in plan.graphs:
        if graph.shares:
            continue
        graph_recipe = recipe.graphs[graph.name]
        if graph_recipe.needs_samples:
            samples = options.calibrating() if samples is None else samples
            bench = _Bench(plan, graph, checkpoint, reference, samples, options, progress, pool)
            found[graph.name] = bench.measured(graph_recipe, recipe.target)
        else:
            found[graph.name] = smoothed_unseen(graph, checkpoint, graph_recipe, recipe.target, NOTHING, pool)
    return Calibration(graphs=found, samples=samples)


@dataclass(frozen=True, slots=True)
class _Bench:
    """One graph under observation."""

    plan: ModelPlan
    graph: GraphPlan
    checkpoint: Checkpoint
    reference: dict[GraphName, Session]
    samples: SampleSet
    options: SampleOptions
    progress: CalibrationProgress
    pool: Executor | None

    def measured(self, recipe: GraphRecipe, target: Target) -> Measured:
        """Channels to keep first, then ranges and factors of what they leave, then the blocks of the weights as smoothed."""
        found = NOTHING
        if recipe.prune_ffn:
            found = Measured(kept=self._kept(recipe.prune_ffn))
        if recipe.static:
            found = self._ranges(recipe, found)
        found = smoothed_unseen(self.graph, self.checkpoint, recipe, target, found, self.pool)
        if recipe.method == "gptq" and recipe.in_blocks and self.graph.io.cache:
            found = self._blocks(recipe, target, found)
        return found

    def _kept(self, part: float) -> dict[str, NDArray[np.int64]]:
        module = self._module(NOTHING)
        sources = resolve(self.graph, self.checkpoint)
        blocks = [path for path, block in module.named_modules() if hasattr(block, "FFN")]
        outer = {path: feed_forward(module, path)[1] for path in blocks}
        with mean_squares(module, outer.values()) as squares, torch.inference_mode():
            run = self._run(module)
            for sample in self._counted("feed-forward channels"):
                run(sample)
        weights = {path: sources[f"{layer}.weight"].all for path, layer in outer.items()}
        importance = {path: ffn_importance(squares[layer].value, weights[path]()) for path, layer in outer.items()}
        return {path: kept_channels(channels, part) for path, channels in importance.items()}

    def _ranges(self, recipe: GraphRecipe, found: Measured) -> Measured:
        module, sources = self._module(found), self._sources(found)

        def rows(path: str) -> Iterator[NDArray[np.float32]]:
            return sources[f"{path}.weight"].pieces()

        store = Store(self._origin(found), self.options.store)
        seen = measure(
            module, self._run(module), self.samples, recipe, layer_inputs(module), rows, store, self._label(self.progress)
        )
        return replace(found, ranges=seen.ranges, smoothing=seen.smoothing)

    def _blocks(self, recipe: GraphRecipe, target: Target, found: Measured) -> Measured:
        module, sources = self._module(found), self._sources(found)
        formats = {
            path: kind
            for path, kind in layer_formats(module, recipe, target).items()
            if isinstance(kind, WeightFormat) and isinstance(module.get_submodule(path), Linear)
            # a tied layer has its twin's bytes: other blocks of its own would cost a second table
            if path not in self.graph.tied
        }
        engine = oracle_engine(self.plan, self.checkpoint, {self.graph.name: module}, self.reference)
        with torch.inference_mode():
            states = [
                start(cast(AnyDecoder, module), self.graph.io, _question_feed(engine, sample))
                for sample in self._counted("states")
            ]
        layers = list(dict.fromkeys(".".join(path.split(".")[:2]) for path in formats))
        done: list[str] = []

        def advance(layer: str) -> None:
            done.append(layer)
            self.progress(f"{self.graph.name}: gptq", len(done), len(layers))

        key = content_hash(
            code_version(), self._origin(found), self.samples.content_hash(), repr(sorted(formats.items(), key=str))
        )
        store = self.options.store or cache_folder()
        if store is None:
            raise OutputError("gptq keeps what it has done in the home folder, and there is none; set MCV_CACHE to a folder")
        folder = store / "gptq" / key
        mark_used(folder)
        make_room(folder.parent)
        blocks = quantize_layers(
            cast(AnyDecoder, module),
            states,
            lambda path: sources[f"{path}.weight"].all(),
            formats,
            folder,
            progress=advance,
        )
        return replace(found, blocks=blocks)

    def _module(self, found: Measured) -> nn.Module:
        return eager_module(self.graph, self.checkpoint, measured=found)

    def _sources(self, found: Measured) -> dict[str, Source]:
        return resolve(self.graph, self.checkpoint, Storage(measured=found))

    def _origin(self, found: Measured) -> str:
        """What tells this graph's statistics from others'."""
        files = [path for path in self.checkpoint.folder.iterdir() if path.is_file()]
        arrays: list[NDArray[Any]] = [*found.kept.values(), *found.smoothing.values()]
        parts = [array.tobytes().hex() for array in arrays]
        return content_hash(fingerprint(files), *map(repr, self.checkpoint.adapters), self.graph.name, *parts)

    def _run(self, module: nn.Module) -> Callable[[Sample], object]:
        """What drives the module with a sample: all ways in which pictures reach it, or a question with its pictures."""
        modules: dict[GraphName, nn.Module] = {self.graph.name: module}
        modules |= {other.name: _sharing(other, module) for other in self.plan.graphs if other.shares == self.graph.name}
        engine = oracle_engine(self.plan, self.checkpoint, modules, self.reference)
        if self.graph.io.cache:
            session = TorchSession(lambda: module, self.graph.io)
            return lambda sample: session.run(["logits"], _question_feed(engine, sample))
        downsample = self.plan.image.downsample
        # a tower is shown pictures in every mode that it serves, what comes behind it in the default one
        modes: list[str | None] = [mode for mode, spec in downsample.items() if spec.graph in modules]

        def encode(sample: Sample) -> None:
            for image in sample.images:
                for mode in modes or [None]:
                    engine.encode_image(image, downsample_mode=mode, max_slice_nums=1 if sample.overview else None)

        return encode

    def _counted(self, what: str) -> Iterator[Sample]:
        for number, sample in enumerate(self.samples.samples):
            self.progress(f"{self.graph.name}: {what}", number, len(self.samples.samples))
            yield sample
        self.progress(f"{self.graph.name}: {what}", len(self.samples.samples), len(self.samples.samples))

    def _label(self, progress: CalibrationProgress) -> CalibrationProgress:
        return lambda what, done, total: progress(f"{self.graph.name}: {what}", done, total)


def _question_feed(engine: Engine, sample: Sample) -> dict[str, Any]:
    """A sample's question, and its answer where that is known, as the decoder's inputs."""
    pictures = [engine.encode_image(image) for image in sample.images]
    messages = [{"role": "user", "content": [*pictures, sample.prompt]}]
    if sample.answer is not None:
        messages.append({"role": "assistant", "content": [sample.answer]})
    prompt = engine.prompt(messages)
    rows = np.unique(np.linspace(0, len(prompt.ids) - 1, _ROWS).astype(np.int64))
    return prompt_feed(engine.bundle.manifest, prompt, [picture.embeds for picture in pictures], rows)


def _sharing(graph: GraphPlan, owner: nn.Module) -> nn.Module:
    """The module of a graph that has another's weights, made of that other's layers: who observes those sees both at work."""
    with torch.device("meta"):
        module = graph.module().eval()
    for name, _ in list(module.named_children()):
        setattr(module, name, getattr(owner, name))
    return module
