"""Compare a bundle's graphs with the modules they were traced from, on a sample picture and question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import nn

from mcv_calibration.contender import Call, WatchedSession
from mcv_calibration.measured import NOTHING
from mcv_calibration.recipe import Recipe
from mcv_export.adapters import Adapter
from mcv_export.checkpoint import Checkpoint
from mcv_export.eager import eager_module
from mcv_export.graph_files import storage_of
from mcv_export.origin import open_origin
from mcv_export.plan import GraphPlan
from mcv_export.stored import check_weights, stored_module
from mcv_export.unseen_smoothing import smoothed_unseen
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.row import prompt_keys
from mcv_runtime.engine import load
from mcv_runtime.sessions.graphs import cpu_session, session_options
from mcv_runtime.text.prompts import Prompt

Array: TypeAlias = NDArray[Any]

STEPS = 8
"""Tokens that both sides decode."""
_QUESTION = "What is in the picture?"
_ABSOLUTE = {"vision_hidden": 1e-4, "vision_embeds": 1e-4, "logits": 2e-3}
_RELATIVE = {"vision_hidden": 0.05, "vision_embeds": 0.05, "logits": 0.1}
"""Both sides round alike, but a value on the border between two steps may fall on either side, and what follows with it: 0.009
was seen of trained towers, 0.02 of logits of random weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far a graph's output is from the module's, both given the module's inputs."""

    graph: GraphName
    tensor: str
    precision: str
    largest: float
    """Largest absolute difference."""
    relative: float
    """Root mean square of the difference over that of the output."""
    rounded: bool
    """Whether a layer rounds its input, so that the two may fall on different sides of a border."""
    tolerance: float
    """What `largest`, or of a graph that rounds `relative`, may be."""

    @property
    def excess(self) -> float:
        """Above 1 if the tolerance is broken."""
        return (self.relative if self.rounded else self.largest) / self.tolerance

    def describe(self) -> str:
        return f"largest difference {self.largest:.2g}, relative error {self.relative:.2g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All differences, and the greedy tokens that agree before the first that does not."""

    differences: tuple[Difference, ...]
    tokens: int
    tokens_equal: int

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda item: item.excess)

    @property
    def passed(self) -> bool:
        rounded = any(item.rounded for item in self.differences)
        return self.worst.excess <= 1 and (self.tokens_equal == self.tokens or rounded)


def compare(bundle: Bundle, checkpoint_folder: Path, adapters: Sequence[Adapter] = ()) -> Report:
    """Run both on a picture that is cut into slices; raises `CheckpointError` if the bundle is of another model.

    `adapters` are those that the bundle was built with.
    """
    checkpoint, plan = open_origin(bundle, checkpoint_folder, adapters)
    recipe = Recipe.from_data(bundle.manifest.quantization)
    recorded, embeds, prompt = _run(bundle)
    *encoders, decoder = plan.graphs
    differences = []
    with torch.inference_mode():
        for graph in encoders:
            module, calls = _module(graph, checkpoint, bundle, recipe), recorded[graph.name]
            arguments = [[torch.from_numpy(call.inputs[name]) for name in graph.io.inputs] for call in calls]
            expected = [module(*tensors).numpy() for tensors in arguments]
            differences.append(_difference(recipe, graph, expected, [call.output for call in calls]))
        wanted, logits = _decode_eager(_module(decoder, checkpoint, bundle, recipe), decoder, prompt, embeds)
    tokens, found = _decode_bundled(bundle, prompt, embeds)
    differences.append(_difference(recipe, decoder, [logits], [found]))
    equal = next((n for n, (a, b) in enumerate(zip(wanted, tokens, strict=True)) if a != b), STEPS)
    return Report(differences=tuple(differences), tokens=STEPS, tokens_equal=equal)


def _run(bundle: Bundle) -> tuple[dict[GraphName, list[Call]], Array, Prompt]:
    """The calls of each graph on a sample picture, in every downsample mode; its visual tokens in the default one; a prompt."""
    names = {bundle.graph(name): name for name in bundle.manifest.graphs}
    calls: dict[GraphName, list[Call]] = {name: [] for name in bundle.manifest.graphs}

    def open_watched(path: Path, options: ort.SessionOptions) -> WatchedSession:
        return WatchedSession(names[path], cpu_session(path, options), calls[names[path]])

    engine = load(bundle.folder, session_factory=open_watched)
    image = bundle.manifest.image
    sample = sample_picture(image.scale_resolution)
    picture = engine.encode_image(sample)
    for mode in image.downsample.keys() - {image.downsample_mode}:
        engine.encode_image(sample, downsample_mode=mode, max_slice_nums=1)
    prompt = engine.prompt([{"role": "user", "content": [picture, _QUESTION]}])
    return calls, picture.embeds.copy(), prompt


def sample_picture(side: int) -> Image.Image:
    """A picture of three by two slices with gradients, edges and text."""
    across, down = np.meshgrid(np.linspace(0, 255, 3 * side), np.linspace(0, 255, 2 * side))
    picture = Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((side // 4, side // 4, side, side), fill="white", outline="black", width=3)
    draw.text((side // 2, side // 2), "MCV 123", fill="black")
    return picture


def _module(plan: GraphPlan, checkpoint: Checkpoint, bundle: Bundle, recipe: Recipe) -> nn.Module:
    """The module that rounds as the bundle's graph does.

    What took samples to find is taken from the bundle, and checked against the checkpoint's weights.
    """
    graph_recipe = recipe.graphs[plan.shares or plan.name]
    storage = storage_of(plan, graph_recipe, recipe.target)
    if not graph_recipe.needs_samples:
        measured = smoothed_unseen(plan, checkpoint, graph_recipe, recipe.target, NOTHING)
        return eager_module(plan, checkpoint, formats=storage.formats, measured=measured, method=storage.method)
    module = stored_module(plan, storage.formats, bundle.graph(plan.name))
    check_weights(plan, checkpoint, module)
    return module


def _decode_eager(module: nn.Module, plan: GraphPlan, prompt: Prompt, embeds: Array) -> tuple[list[int], Array]:
    """Greedy tokens, and the logits that follow the prompt."""
    past = [torch.zeros([1 if n == "batch" else 0 if isinstance(n, str) else n for n in e.shape]) for e in plan.io.cache]
    positions = np.arange(len(prompt.ids)) if prompt.positions is None else prompt.positions
    following = int(positions.max()) + 1
    values = {
        "input_ids": prompt.ids[None],
        "vision_embeds": embeds,
        "vision_positions": prompt.visual_positions,
        "position_ids": positions[..., None, :],
        "seqlens_k": np.zeros(1, np.int32),  # the torch body reads lengths from the cache itself
        "total_sequence_length": np.zeros(1, np.int32),
    }
    tokens: list[int] = []
    first = None
    while len(tokens) < STEPS:
        values["logit_positions"] = np.array([values["input_ids"].shape[1] - 1])
        logits, past = module(*(torch.from_numpy(values[name]) for name in plan.io.inputs), past)
        first = logits if first is None else first
        tokens.append(int(logits.argmax()))
        values |= {"input_ids": np.array([tokens[-1:]]), "vision_embeds": embeds[:0]}
        values["vision_positions"] = prompt.visual_positions[:0]
        values["position_ids"] = np.full((*positions.shape[:-1], 1, 1), following + len(tokens) - 1)
    assert first is not None
    return tokens, first.numpy()


def _decode_bundled(bundle: Bundle, prompt: Prompt, embeds: Array) -> tuple[list[int], Array]:
    session = cpu_session(bundle.graph("decoder_with_past"), session_options())
    decoder = Decoder(lambda name: session, bundle.manifest)
    slots = decoder.new_slots()
    row = decoder.new_row(slots, len(prompt.ids) + STEPS)
    first = logits = decoder.read(slots, row, prompt.ids, embeds, prompt.visual_positions, keys=prompt_keys(prompt))
    tokens = [int(logits.argmax())]
    while len(tokens) < STEPS:
        logits = decoder.read(slots, row, tokens[-1:])
        tokens.append(int(logits.argmax()))
    return tokens, first


def _difference(recipe: Recipe, plan: GraphPlan, expected: Sequence[Array], found: Sequence[Array]) -> Difference:
    (tensor,) = plan.io.outputs
    graph_recipe = recipe.graphs[plan.shares or plan.name]
    rounded = graph_recipe.precisions != {"fp32"}
    want, got = (np.concatenate([a.ravel() for a in arrays]).astype(np.float64) for arrays in (expected, found))
    scale = float(np.sqrt(np.mean(want**2)))
    return Difference(
        graph=plan.name,
        tensor=tensor,
        precision=graph_recipe.precision,
        largest=float(np.abs(want - got).max()),
        relative=float(np.sqrt(np.mean((want - got) ** 2))) / scale,
        rounded=rounded,
        tolerance=_RELATIVE[tensor] if rounded else _ABSOLUTE[tensor] * max(scale, 1.0),
    )
