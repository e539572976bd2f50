"""From a checkpoint to a bundle, all or nothing."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from mcv_calibration.formats import require_layers
from mcv_calibration.measured import NOTHING
from mcv_calibration.precisions import PRECISIONS, Precision
from mcv_calibration.recipe import Recipe
from mcv_calibration.samples import SampleSet
from mcv_export.adapters import Adapter, open_merged
from mcv_export.calibrate import SampleOptions, calibrate
from mcv_export.checkpoint import Checkpoint, commit_of
from mcv_export.families import recognise
from mcv_export.file_specs import checkpoint_files, file_spec, folder_specs
from mcv_export.graph_files import DataFile, Progress, storage_of, write_graph, write_sharing_graph
from mcv_export.int8_cache import add_int8_cache, int8_cache_spec
from mcv_export.output_folder import check_output, output_folder
from mcv_export.plan import ModelPlan
from mcv_export.precision import Wishes, resolved
from mcv_export.sources import resolve
from mcv_export.table_screen import screened
from mcv_export.texts import copy_texts
from mcv_export.workers import workers
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import FILE_NAME, FileSpec, GraphName, GraphSpec, Manifest, NeedsSpec
from mcv_runtime.errors import BundleCorruptError, CheckpointError, PromptError, printable
from mcv_runtime.pictures.picture import picture_grid
from mcv_runtime.text.prompts import Message, PromptBuilder
from mcv_runtime.text.template import ChatTemplate
from mcv_runtime.text.tokens import TextTokenizer

_TOOLS = ("minicpmv-onnx", "torch", "onnx-ir", "onnxscript")
"""Distributions whose versions matter to what is built."""
_COMPUTED = re.compile(
    r"(?:^|\.)(?:(?:original_|long_|short_)?inv_freq|(?:cos|sin)_cached|position_ids|causal_mask|resampler\.(?:temporal_)?pos_embed)$"
)
"""Buffers that every model computes anew, and that older transformers, or a plain `state_dict`, save with the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What to build. `precision` is as in `Wishes`, or of each graph by name; graphs not named get the default.

    `recipe` says it in full, in the place of `precision` and `block_size`.
    """

    precision: Precision | Mapping[GraphName, Precision] = field(default_factory=dict)
    block_size: int | None = None
    recipe: Recipe | None = None
    samples: SampleOptions = field(default_factory=SampleOptions)
    """What to calibrate with, where the recipe asks for it."""
    force: bool = False
    """Replace an output folder that is a bundle, or empty."""
    int8_cache: bool = False
    """Also make a decoder graph that keeps its cache in 8 bits."""
    adapters: tuple[Adapter, ...] = ()
    """Fine-tunes to merge, in this order."""

    def chosen(self) -> Recipe:
        """The recipe, given or made of the simpler options; raises `OptionError`."""
        if self.recipe is not None:
            return self.recipe
        if isinstance(self.precision, str):
            return Wishes(precision=self.precision, block_size=self.block_size).recipe()
        return Wishes(graphs=self.precision, block_size=self.block_size).recipe()


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltGraph:
    """What one graph came to."""

    name: GraphName
    precision: Precision
    size: int
    """Bytes, graph and weights together."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build made."""

    folder: Path
    manifest: Manifest
    graphs: tuple[BuiltGraph, ...]
    seconds: float
    notice: str | None
    """What a user should know before using the bundle."""
    samples: SampleSet | None = None
    """What it was calibrated with."""


def build(
    checkpoint_folder: Path,
    out: Path,
    options: BuildOptions = BuildOptions(),
    *,
    model: str | None = None,
    revision: str | None = None,
    check: Callable[[Path], object] | None = None,
    progress: Progress = lambda graph, done, total: None,
) -> BuildResult:
    """Build the bundle `out` from a checkpoint folder.

    Everything is written to a sibling folder that takes the name `out` at the end: a build that fails or is interrupted leaves
    nothing behind, and what a killed one left the next one removes. `check` is shown that folder when the bundle in it is
    whole; what it raises ends the build like any fault.
    Raises `CheckpointError`, `OptionError` or `OutputError`.
    """
    started = time.perf_counter()
    check_output(out, checkpoint_folder, force=options.force)
    wanted = options.chosen()
    checkpoint = open_merged(checkpoint_folder, options.adapters)
    family = recognise(checkpoint.config)
    plan = family.plan(checkpoint)
    _require_readable(plan, family.name)
    _reject_unknown_tensors(plan, checkpoint, family.title)
    recipe = resolved(wanted, [graph.name for graph in plan.graphs if not graph.shares])
    for graph in plan.graphs:
        if not graph.shares:
            with torch.device("meta"):
                require_layers(graph.module(), recipe.graphs[graph.name], f"the recipe's {graph.name}")
        resolve(graph, checkpoint)  # what is wrong with a tensor is said now, not when minutes of calibration are over
    recipe = screened(plan, checkpoint, recipe)
    with output_folder(out, checkpoint_folder, force=options.force) as folder, workers() as pool:
        copy_texts(checkpoint, folder, plan.chat_template)
        _require_texts(folder, plan)
        calibration = calibrate(plan, checkpoint, recipe, options.samples, progress, pool)
        # hashed while the graphs are traced, which keeps one core busy
        read = {path.name: pool.submit(file_spec, path) for path in checkpoint_files(checkpoint_folder)}
        (folder / "onnx").mkdir()
        specs: dict[GraphName, GraphSpec] = {}
        built = []
        data: dict[GraphName, DataFile] = {}
        for graph in plan.graphs:
            began = time.perf_counter()
            graph_recipe = recipe.graphs[graph.shares or graph.name]
            precision = graph_recipe.precision
            measured = calibration.graphs.get(graph.shares or graph.name, NOTHING)
            storage = storage_of(graph, graph_recipe, recipe.target, measured)
            path = folder / "onnx" / f"{graph.name}{PRECISIONS[precision].suffix}.onnx"
            if graph.shares:
                write_sharing_graph(graph, storage, data[graph.shares], path)
                size = path.stat().st_size
            else:
                data[graph.name] = write_graph(graph, storage, checkpoint, path, progress, pool)
                size = path.stat().st_size + data[graph.name].path.stat().st_size
            built.append(BuiltGraph(name=graph.name, precision=precision, size=size, seconds=time.perf_counter() - began))
            specs[graph.name] = GraphSpec(
                file=f"onnx/{path.name}", precision=precision, inputs=graph.io.all_inputs, outputs=graph.io.all_outputs
            )
        describe = partial(
            plan.manifest,
            family=family.name,
            model=model or checkpoint_folder.resolve().name,
            revision=commit_of(checkpoint_folder) or revision,
            checkpoint={name: spec.result() for name, spec in read.items()},
            adapters=checkpoint.adapters,
            quantization=recipe.to_data(),
            needs=needs(recipe),
            tools={name: importlib.metadata.version(name) for name in _TOOLS},
        )
        samples = calibration.samples
        manifest = _write_manifest(folder, describe, specs, folder_specs(folder, pool), samples)
        if options.int8_cache:
            samples = samples or options.samples.calibrating()
            measured = calibration.graphs.get("decoder_with_past", NOTHING)
            path = add_int8_cache(folder, plan.graphs[-1], checkpoint, measured, samples.samples, progress)
            specs["decoder_with_past_kv8"] = int8_cache_spec(specs["decoder_with_past"], f"onnx/{path.name}", manifest.cache)
            manifest = _write_manifest(folder, describe, specs, folder_specs(folder, pool, manifest.files), samples)
        if check is not None:
            check(folder)
            manifest = Bundle.open(folder).manifest  # it may list a report now
    return BuildResult(
        folder=out,
        manifest=manifest,
        graphs=tuple(built),
        seconds=time.perf_counter() - started,
        notice=plan.notice,
        samples=samples,
    )


def _write_manifest(
    folder: Path,
    describe: Callable[..., Manifest],
    specs: Mapping[GraphName, GraphSpec],
    files: Mapping[str, FileSpec],
    samples: SampleSet | None,
) -> Manifest:
    """Write `mcv.json`."""
    calibration = () if samples is None else tuple(sorted(samples.digests()))
    manifest = describe(graphs=specs, files=files, calibration=calibration)
    (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def needs(recipe: Recipe) -> NeedsSpec:
    """What the graphs of a recipe need: the ONNX Runtime that this toolchain is for, and the processor of 8-bit products."""
    required = importlib.metadata.requires("minicpmv-onnx") or []
    (floor,) = (found[1] for line in required if (found := re.fullmatch(r"onnxruntime>=([\d.]+)", line)))
    in_int8 = any(graph.in_int8 for graph in recipe.graphs.values())
    return NeedsSpec(onnxruntime=floor, processor=recipe.target if in_int8 else "any")


def _require_readable(plan: ModelPlan, family: str) -> None:
    """Raise `CheckpointError` for facts that no runtime would take from a manifest: sizes that would fill any memory."""
    try:
        Manifest.from_json(plan.manifest(family=family, model="", graphs={}).to_json())
    except BundleCorruptError as error:
        raise CheckpointError(f"the checkpoint's configuration cannot be used: {error}") from None


def _require_texts(folder: Path, plan: ModelPlan) -> None:
    """Raise `CheckpointError` for texts of which no runtime could make a prompt, before anything is calibrated."""
    try:
        tokenizer = TextTokenizer((folder / plan.text.tokenizer).read_text(encoding="utf-8"))
        template = ChatTemplate((folder / plan.text.chat_template).read_text(encoding="utf-8"), plan.text.template_variables)
        square = picture_grid((plan.image.scale_resolution,) * 2, plan.image)
        PromptBuilder(tokenizer, template, plan.text, plan.placeholder).build([Message("user", (square, "What is this?"))])
    except (BundleCorruptError, PromptError) as error:
        raise CheckpointError(re.sub("the (bundle|model)'s", "the checkpoint's", str(error), count=1)) from None


def _reject_unknown_tensors(plan: ModelPlan, checkpoint: Checkpoint, title: str) -> None:
    used = {part.tensor for graph in plan.graphs for parts in graph.weights.values() for part in parts}
    used |= {name for graph in plan.graphs for name in graph.used}
    unknown = [
        name
        for name in checkpoint.tensors
        if name not in used and not name.startswith(plan.ignored) and not _COMPUTED.search(name)
    ]
    if unknown:
        first, more = printable(unknown[0]), f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"the checkpoint has the tensor {first}{more}, which {title} has not; it is another model than it says"
        )
