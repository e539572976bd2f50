"""Where a factor of each channel can move between two layers of a block and leave the function what it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Channels that `maker` gives and `readers` read: what the one is divided by, the others' columns are multiplied by.

    All are paths in the block: of a norm, a linear or a vector of weights, and of linears. `gates`: linears by whose outputs,
    behind a function of each value, the channels are multiplied on their way. `channels`: the maker's channel that each column
    of a reader takes, where that is not the one of the same number. `added`: the root mean square of what is added on the way.
    `free`: nobody else reads the channels and nothing is added, so that factors vanish in the maker's weights; else a reader's
    input is divided by a product.
    """

    maker: str
    readers: tuple[str, ...]
    gates: tuple[str, ...] = ()
    channels: tuple[int, ...] | None = None
    added: float = 0.0
    free: bool = True


def folds(module: nn.Module) -> Iterator[Fold]:
    """Those that the module's blocks declare as their `folds`, by the module's paths."""
    for path, block in module.named_modules():
        prefix = f"{path}." if path else ""
        for fold in getattr(block, "folds", ()):
            yield replace(
                fold,
                maker=f"{prefix}{fold.maker}",
                readers=tuple(f"{prefix}{reader}" for reader in fold.readers),
                gates=tuple(f"{prefix}{gate}" for gate in fold.gates),
            )


def behind_norm(norm: str, *readers: str) -> Fold:
    """Linears that alone read what a norm gives."""
    return Fold(maker=norm, readers=readers)


def value_channels(heads: int, kv_heads: int, head_dim: int, first: int = 0) -> tuple[int, ...]:
    """Of each channel that grouped-query attention gives, the value's channel that it is a mean of; values begin at `first`."""
    group = heads // kv_heads
    return tuple(first + head // group * head_dim + channel for head in range(heads) for channel in range(head_dim))
