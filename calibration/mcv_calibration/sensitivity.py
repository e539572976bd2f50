"""What each block of a graph costs by itself: the error when it alone is quantized and all else is in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mcv_calibration.distances import DistributionErrors, TensorErrors
from mcv_calibration.intervals import Interval
from mcv_graphs.folds import folds
from mcv_graphs.layers import Embedding, Linear
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.sessions.graphs import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

Feed = Mapping[str, "NDArray[Any]"]


@dataclass(frozen=True, slots=True)
class Block:
    """What is quantized or not together: `layers` are the beginnings of paths that a recipe names, `members` the modules."""

    layers: tuple[str, ...]
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.layers[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockError:
    """What one block costs by itself: a decoder's in nats of the next tokens, another's in the graph's result."""

    layers: tuple[str, ...]
    relative: float | None
    sqnr_db: float | None
    cosine_mean: float | None
    kl_mean: float | None
    interval: Interval | None
    """Of `kl_mean`, or else of `relative`."""

    @property
    def name(self) -> str:
        return self.layers[0]

    @property
    def cost(self) -> float:
        """Comparable among the blocks of one graph."""
        return self.kl_mean if self.kl_mean is not None else self.relative or 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBlocks:
    """What the blocks of one graph cost on so many calls of it, and so many next tokens (or patches, or visual tokens)."""

    graph: GraphName
    calls: int
    vectors: int
    together: BlockError | None
    """All of them at once; None: none is quantized."""
    blocks: tuple[BlockError, ...]
    """The costliest first."""


def blocks(module: nn.Module) -> list[Block]:
    """Every layer of the stack, and what else has weights, in the module's order.

    Linears that alone read a norm or a linear go with it, because smoothing may have moved a factor from one to the other.
    """
    found: list[Block] = []
    own = [fold for fold in folds(module) if fold.free and "." not in fold.maker]
    grouped = {path: (fold.maker, *fold.readers) for fold in own for path in (fold.maker, *fold.readers)}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found += [Block((f"{name}.{index}",), (f"{name}.{index}",)) for index in range(len(child))]
        elif name in grouped:
            members = grouped[name]
            layers = tuple(path for path in members if isinstance(module.get_submodule(path), Linear))
            if name == layers[0]:
                found.append(Block(layers, members))
        elif any(isinstance(layer, Linear | Embedding) for layer in child.modules()):
            found.append(Block((name,), (name,)))
    return found


def sensitivities(
    graph: GraphName,
    session: Session,
    module: nn.Module,
    quantized: nn.Module,
    feeds: Sequence[Feed],
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> GraphBlocks:
    """Of all blocks that `quantized` has in less than float.

    `session` runs `module`, the graph in float, into which the blocks of the other are put one at a time, and all at the end.
    """
    wanted = [block for block in blocks(quantized) if any(_reduced(quantized.get_submodule(path)) for path in block.members)]
    if not wanted:
        return GraphBlocks(graph=graph, calls=0, vectors=0, together=None, blocks=())
    expected = [session.run(None, dict(feed))[0] for feed in feeds]

    def error(layers: tuple[str, ...], members: Sequence[str]) -> BlockError:
        with _swapped(module, quantized, members):
            return _error(graph, layers, expected, [session.run(None, dict(feed))[0] for feed in feeds])

    errors = []
    for done, block in enumerate(wanted, 1):
        errors.append(error(block.layers, block.members))
        advance(done, len(wanted) + 1)
    together = error(tuple(block.name for block in wanted), [path for block in wanted for path in block.members])
    advance(len(wanted) + 1, len(wanted) + 1)
    return GraphBlocks(
        graph=graph,
        calls=len(feeds),
        vectors=sum(right.size // right.shape[-1] for right in expected),
        together=together,
        blocks=tuple(sorted(errors, key=lambda error: -error.cost)),
    )


def _error(
    graph: GraphName, layers: tuple[str, ...], expected: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]
) -> BlockError:
    of_tokens = graph == "decoder_with_past"
    tokens, tensors = DistributionErrors(), TensorErrors()
    for right, own in zip(expected, found, strict=True):
        (tokens if of_tokens else tensors).add(right, own)
    kl, error = tokens.result(), tensors.result()
    return BlockError(
        layers=layers,
        relative=None if error is None else error.relative,
        sqnr_db=None if error is None else error.sqnr_db,
        cosine_mean=None if error is None else error.cosine_mean,
        kl_mean=None if kl is None else kl.kl_mean,
        interval=error.interval if error is not None else kl.kl_interval if kl is not None else None,
    )


def _reduced(module: nn.Module) -> bool:
    layers = [layer for layer in module.modules() if isinstance(layer, Linear | Embedding)]
    return any(layer.format.quantized for layer in layers)


@contextmanager
def _swapped(module: nn.Module, other: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Have the other module's submodules in the place of these."""
    own = {path: module.get_submodule(path) for path in paths}
    for path in paths:
        module.set_submodule(path, other.get_submodule(path))
    try:
        yield
    finally:
        for path, child in own.items():
            module.set_submodule(path, child)
