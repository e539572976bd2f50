"""What a linear's inputs are like, summed up while they pass by: nothing of a sample is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@contextmanager
def observed(module: nn.Module, paths: Collection[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`see` gets the path and the input [..., K] of each of these linears, whenever one is called in the block."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: see(path, inputs[0])

    handles = [module.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def second_moments(module: nn.Module, paths: Collection[str]) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Sums of x x^T over all inputs x of each linear seen in the block: [K, K] by path.

    Linears that are given the same tensor one after the other (query, key and value; gate and up) share one array. A wide
    layer's takes K * K * 4 bytes, so observe a few layers at a time.
    """
    sums: dict[str, Tensor] = {}
    result: dict[str, NDArray[np.float32]] = {}
    latest: tuple[Tensor, str] | None = None

    def see(path: str, x: Tensor) -> None:
        nonlocal latest
        if latest is not None and latest[0] is x and sums.get(path, sums[latest[1]]) is sums[latest[1]]:
            sums[path] = sums[latest[1]]
        else:
            rows = x.reshape(-1, x.shape[-1])
            sums.setdefault(path, torch.zeros(x.shape[-1], x.shape[-1])).addmm_(rows.T, rows)
            latest = x, path
        result[path] = sums[path].numpy()

    with observed(module, paths, see):
        yield result
    latest = None
    sums.clear()


@contextmanager
def mean_squares(module: nn.Module, paths: Collection[str]) -> Iterator[Mapping[str, MeanSquare]]:
    """The mean square of each input channel of each linear seen in the block."""
    squares = {path: MeanSquare() for path in paths}
    with observed(module, paths, lambda path, x: squares[path].add(x)):
        yield squares


class MeanSquare:
    """A running mean of x^2 for each of K channels."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        total = rows.square().sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)

    @property
    def value(self) -> NDArray[np.float32]:
        """[K]; raises `ValueError` where nothing was seen."""
        if self._sum is None or not self._count:
            raise ValueError("no input was seen: run the samples inside the block")
        return (self._sum / self._count).float().numpy()
