"""How far each layer's result is from the reference's, and where the error comes in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mcv_calibration.distances import Energy
from mcv_calibration.taps import Tap, Tapped, TappedGraph
from mcv_runtime.bundle.manifest import GraphName

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feed = Mapping[str, "NDArray[Any]"]
BYTES = 256_000_000
"""Of the results that one side holds at a time; more layers are looked at in further passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Of one layer's result, both graphs given the same inputs.

    `added` is what this layer brings in: the part of its squared error that the worst of the layers before it does not explain
    already, as a root. It says where to look, not how much would be gained. All are None if the layer has another width here
    than in the reference (it was pruned).
    """

    graph: GraphName
    path: str
    precision: str
    relative: float | None
    sqnr_db: float | None
    added: float | None


def layer_errors(
    graph: GraphName, reference: Tapped, candidate: TappedGraph, feeds: Sequence[Feed], max_bytes: int = BYTES
) -> tuple[LayerError, ...]:
    """Errors of all layers in the graph's order. Layers that the reference does not reach with these feeds are left out."""
    energies: dict[str, Energy | None] = {}
    for paths in _chunks(list(candidate.taps.values()), _rows(feeds), max_bytes):
        for expected, found in zip(reference.run(paths, feeds), candidate.run(paths, feeds), strict=True):
            _add(energies, expected, found)
    relative = {path: energy.relative for path, energy in energies.items() if energy is not None}
    return tuple(
        LayerError(
            graph=graph,
            path=path,
            precision=tap.precision,
            relative=relative.get(path),
            sqnr_db=energy.sqnr_db if (energy := energies[path]) is not None else None,
            added=_added(tap, relative),
        )
        for path, tap in candidate.taps.items()
        if path in energies
    )


def worst_layers(errors: Iterable[LayerError], count: int = 3) -> list[LayerError]:
    """Those that add most, worst first; layers that add nothing are not among them."""
    adding = [error for error in errors if error.added]
    return sorted(adding, key=lambda error: -(error.added or 0))[:count]


def _add(energies: dict[str, Energy | None], expected: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> None:
    for path in expected.keys() & found.keys():
        if expected[path].shape != found[path].shape:
            energies[path] = None
        elif (energy := energies.setdefault(path, Energy())) is not None:
            energy.add(expected[path], found[path])


def _added(tap: Tap, relative: Mapping[str, float]) -> float | None:
    if tap.path not in relative:
        return None
    before = max((relative[path] for path in tap.after if path in relative), default=0.0)
    return math.sqrt(max(relative[tap.path] ** 2 - before**2, 0.0))


def _rows(feeds: Sequence[Feed]) -> int:
    """The most rows that a layer's result has: patches of a slice, or tokens."""
    arrays = [array for feed in feeds for array in feed.values()]
    return max(array.size // array.shape[-1] if array.dtype.kind == "f" and array.size else array.size for array in arrays)


def _chunks(taps: Sequence[Tap], rows: int, max_bytes: int) -> Iterator[list[str]]:
    """Layers whose results of one feed fit together."""
    chunk: list[str] = []
    used = 0
    for tap in taps:
        size = 4 * rows * tap.width
        if chunk and used + size > max_bytes:
            yield chunk
            chunk, used = [], 0
        chunk.append(tap.path)
        used += size
    if chunk:
        yield chunk
