"""How a model is quantized, as plain data: what a manifest records and `--recipe` replays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, cast, get_args

from mcv_calibration.precisions import PRECISIONS, Precision
from mcv_calibration.target import Target, chosen, this_machine
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.errors import OptionError, shown
from mcv_runtime.files import parse_json

Method = Literal["rtn", "k-quant", "gptq"]
Ranges = Literal["minmax", "percentile", "mse"]
_NAMED = 12
"""Known keys that an error lists at most."""


def require_known(keys: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise `OptionError` for a key that nobody would heed, with the one that is probably meant."""
    for key in keys:
        if key not in known:
            near = [name for name in known if name.startswith(key)] or get_close_matches(key, known, 1)
            first = ", ".join((*known[:_NAMED], *["..."] * (len(known) > _NAMED)))
            meant = f"did you mean {near[0]!r}?" if near else f"known are {first}"
            raise OptionError(f"{where} has the unknown key {shown(key)}; {meant}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRecipe:
    """How one graph is quantized.

    `layers`: a path or the beginning of one, such as `layers.3`, `layers.3.fc2` or `lm_head`, whose precision differs; the
    longest that fits decides. `method` finds the numbers of q8 and q4 blocks of `block_size`: by default k-quant those of 128
    in q4, and rounding those of 32 in q8. `ranges` finds those of static activations. `smoothing`: how much of its inputs'
    outliers a layer's weight takes over, from 0 (none) to 1. `prune_ffn`: the part of the feed-forward channels that is left
    out.
    """

    precision: Precision
    layers: Mapping[str, Precision] = field(default_factory=dict)
    method: Method | None = None
    block_size: int | None = None
    ranges: Ranges = "percentile"
    smoothing: float = 0.5
    prune_ffn: float = 0.0

    def __post_init__(self) -> None:
        for value, known in (
            *((precision, tuple(PRECISIONS)) for precision in self.precisions),
            (self.method, (None, *get_args(Method))),
            (self.ranges, get_args(Ranges)),
        ):
            if value not in known:
                raise OptionError(f"{shown(value)} is none of {', '.join(known)}")
        if not 0 <= self.smoothing <= 1:
            raise OptionError(f"smoothing={self.smoothing} is not between 0 and 1")
        if not 0 <= self.prune_ffn < 1:
            raise OptionError(f"prune_ffn={self.prune_ffn} is not a part of the channels, from 0 to below 1")
        if self.block_size is not None and (self.block_size < 16 or self.block_size & (self.block_size - 1)):
            raise OptionError(f"block_size={self.block_size} is not a power of two of at least 16")

    @property
    def precisions(self) -> frozenset[Precision]:
        """All that layers of the graph may have."""
        return frozenset((self.precision, *self.layers.values()))

    @property
    def in_blocks(self) -> bool:
        """Whether layers are stored in blocks."""
        return any(PRECISIONS[precision].block_size for precision in self.precisions)

    @property
    def in_int8(self) -> bool:
        """Whether layers compute in 8-bit integers."""
        return any(PRECISIONS[precision].in_int8 for precision in self.precisions)

    @property
    def static(self) -> bool:
        """Whether layers need the range of their input."""
        return any(PRECISIONS[precision].static for precision in self.precisions)

    @property
    def needs_samples(self) -> bool:
        """Whether it takes a look at the model at work."""
        return bool(self.static or self.prune_ffn or (self.in_blocks and self.method == "gptq"))

    def precision_of(self, path: str) -> Precision:
        """A layer's precision."""
        fitting = [prefix for prefix in self.layers if path == prefix or path.startswith(f"{prefix}.")]
        return self.layers[max(fitting, key=len)] if fitting else self.precision

    def to_data(self) -> dict[str, Any]:
        """What JSON can hold: only what matters to this precision."""
        told = {
            "layers": bool(self.layers),
            "method": self.in_blocks and self.method is not None,
            "block_size": self.in_blocks and self.block_size is not None,
            "ranges": self.static,
            "smoothing": self.precisions != {"fp32"},
            "prune_ffn": self.prune_ffn > 0,
        }
        values = {f.name: getattr(self, f.name) for f in fields(self) if told.get(f.name, True)}
        return values | ({"layers": dict(self.layers)} if self.layers else {})

    @classmethod
    def from_data(cls, data: Any, where: str = "recipe") -> GraphRecipe:
        """The reverse; raises `OptionError` naming what is wrong."""
        if not isinstance(data, dict) or "precision" not in data:
            raise OptionError(f"{where} must be an object with a precision")
        require_known(data, [each.name for each in fields(cls)], where)
        for name, kinds in (("block_size", int), ("smoothing", int | float), ("prune_ffn", int | float), ("layers", dict)):
            if name in data and (not isinstance(data[name], kinds) or isinstance(data[name], bool)):
                raise OptionError(f"{where} has {name}={shown(data[name])}")
        try:
            return cls(**data)
        except TypeError:  # an unhashable precision, say
            raise OptionError(f"{where} has a value that is no text where text is needed") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How all graphs are quantized, and the processor that int8 is for."""

    target: Target = field(default_factory=this_machine)
    graphs: Mapping[GraphName, GraphRecipe]

    def __post_init__(self) -> None:
        chosen(self.target)

    def to_data(self) -> dict[str, Any]:
        """What JSON can hold."""
        target = {"target": self.target} if any(graph.in_int8 for graph in self.graphs.values()) else {}
        return {**target, "graphs": {name: graph.to_data() for name, graph in self.graphs.items()}}

    @classmethod
    def from_data(cls, data: Any) -> Recipe:
        """The reverse; raises `OptionError` naming what is wrong."""
        graphs = data.get("graphs") if isinstance(data, dict) else None
        if not isinstance(graphs, dict):
            raise OptionError("a recipe is an object with `graphs`, as mcv.json has it under `quantization`")
        require_known(graphs, get_args(GraphName), "the recipe's `graphs`")
        read = {cast(GraphName, name): GraphRecipe.from_data(value, f"recipe: {name}") for name, value in graphs.items()}
        return cls(target=chosen(data.get("target")), graphs=read)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """A recipe, or a whole `mcv.json` with one inside."""
        data = parse_json(text, "the recipe", error=OptionError)
        return cls.from_data(data["quantization"] if isinstance(data, dict) and "quantization" in data else data)
