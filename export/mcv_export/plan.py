"""What a family hands to the build: three graphs, where their weights come from, and the facts of the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray
from torch import nn

from mcv_export.checkpoint import Checkpoint
from mcv_export.config_keys import refuse_unread
from mcv_graphs.contract import GraphIO
from mcv_runtime.bundle.manifest import (
    GenerationSpec,
    GraphName,
    GraphSpec,
    ImageSpec,
    Manifest,
    PlaceholderSpec,
    TextSpec,
    VideoSpec,
)

Transform = Literal["plus_one", "negative_exp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of a graph's weight [out, in] and the checkpoint tensor they come from.

    `rows` is how many this part gives (None: all that the weight has), `offset` where they begin in the tensor,
    `stored` how many rows the tensor has (None: as many as this part takes). `transposed`: the checkpoint stores [in, out].
    `transform` is what happens to the values: `plus_one` for a zero-centred norm, `negative_exp` for a decay kept as logarithm;
    `scale` multiplies them: a constant factor of the model that the graph then needs no operator for.
    """

    tensor: str
    rows: int | None = None
    offset: int = 0
    stored: int | None = None
    transposed: bool = False
    transform: Transform | None = None
    scale: float = 1.0


Weights = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """One graph: its module in float, its io, and the origin of each of its parameters."""

    name: GraphName
    module: Callable[[], nn.Module]
    io: GraphIO
    weights: Weights
    computed: Mapping[str, Callable[[], NDArray[Any]]] = field(default_factory=dict)
    """Buffers that no checkpoint holds as they are, by name."""
    used: tuple[str, ...] = ()
    """Checkpoint tensors that `computed` reads."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """A layer whose weight is another layer's, and that other layer: stored once where both have the same format."""
    input_norms: Mapping[str, str] = field(default_factory=dict)
    """A linear that reads another graph's result as it is, and the checkpoint's name of the norm that made it."""
    shares: GraphName | None = None
    """An earlier graph that has all of this one's weights: this one reads them from that one's file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """A whole checkpoint, ready to be built."""

    graphs: tuple[GraphPlan, ...]
    hidden_size: int
    image: ImageSpec
    placeholder: PlaceholderSpec
    text: TextSpec
    generation: GenerationSpec
    video: VideoSpec | None = None
    ignored: tuple[str, ...] = ()
    """Prefixes of checkpoint tensors that a bundle does not need."""
    notice: str | None = None
    """What a user should know before using the bundle."""
    chat_template: str
    """The checkpoint's own, but for what it leaves to its code."""
    ignored_keys: tuple[str, ...] = ()
    """Beginnings of configuration keys about what a bundle leaves out."""

    def manifest(self, *, family: str, model: str, graphs: Mapping[GraphName, GraphSpec], **more: Any) -> Manifest:
        """The facts of this plan, with what only a build knows."""
        return Manifest(
            family=family,
            model=model,
            graphs=graphs,
            cache=self.graphs[-1].io.cache,
            image=self.image,
            placeholder=self.placeholder,
            text=self.text,
            generation=self.generation,
            hidden_size=self.hidden_size,
            video=self.video,
            **more,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A family in a reader's words: one row of the table that `tests/families_table.py` prints."""

    sizes: str
    config: str
    """What in config.json identifies it."""
    vision: str
    compression: str
    language_model: str
    inputs: str = "pictures"
    """Also `video` and the downsample modes, where it has them."""
    left_out: str = ""
    """What the published model can do and a bundle cannot."""
    verified: str = ""
    """What a test compares it with, if there are no golden data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One published model family; each file of `mcv_export.families` holds one as `FAMILY`."""

    name: str
    title: str
    recognises: Callable[[Mapping[str, Any]], bool]
    """Whether a `config.json` belongs to this family."""
    read: Callable[[Checkpoint], ModelPlan]
    description: Description

    def plan(self, checkpoint: Checkpoint) -> ModelPlan:
        """How to build a checkpoint; raises `CheckpointError`, also for a key of its configuration that was not weighed."""
        plan = self.read(checkpoint)
        refuse_unread(checkpoint, plan.ignored_keys)
        return plan


def same(names: Mapping[str, str], layers: int = 1, *, scale: float = 1.0) -> dict[str, tuple[Part, ...]]:
    """Weights that are each one whole checkpoint tensor; `*` in both names runs over the layer numbers."""
    return {
        ours.replace("*", str(layer)): (Part(tensor=theirs.replace("*", str(layer)), scale=scale),)
        for ours, theirs in names.items()
        for layer in range(layers if "*" in ours else 1)
    }
