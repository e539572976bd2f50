"""Watch the inputs of a graph's linear layers while samples go through it: their ranges, and factors against outliers.

Every input is reduced as it passes, so that one pass sees all layers in the memory of one activation. A second pass sees the
smoothed inputs, whose distribution cannot be told from the first one's: channels are divided by factors that only the end
of the first pass knows. It is left out where nothing is smoothed or only extremes are asked for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mcv_calibration.channels import Channels
from mcv_calibration.histogram import Histogram
from mcv_calibration.inputs import LayerInput
from mcv_calibration.measured import Measured, Range
from mcv_calibration.precisions import PRECISIONS
from mcv_calibration.ranges import find_range
from mcv_calibration.recipe import GraphRecipe
from mcv_calibration.samples import Sample, SampleSet
from mcv_calibration.smoothing import WeightRows, smoothing_factors
from mcv_calibration.store import Store, content_hash
from mcv_graphs.layers import Linear
from mcv_runtime.errors import CheckpointError, McvError, OptionError

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how many samples are through, and of how many."""
_COUNTED = 1 << 20
"""Values of one activation that are counted; of a larger one every n-th row is. Extremes are always exact."""
_SAVE_S = 30.0
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class InputStatistics:
    """What is known of one input."""

    channels: Channels
    histogram: Histogram

    @classmethod
    def of(cls, x_RK: NDArray[np.float32], factors_K: NDArray[np.float32] | None) -> InputStatistics:
        """Of one activation divided by the factors; only the rows that are counted are ever copied."""
        channels = Channels.of(x_RK)
        counted = x_RK[:: -(-x_RK.size // _COUNTED) | 1]  # odd, so as not to keep to some columns of a grid of patches
        if factors_K is not None:
            channels, counted = channels.divided(factors_K), counted / factors_K
        histogram = Histogram()
        histogram.add(counted, float(channels.low.min()), float(channels.high.max()))
        return cls(channels, histogram)

    def merge(self, other: InputStatistics) -> None:
        self.channels.merge(other.channels)
        self.histogram.merge(other.histogram)


def measure(
    module: nn.Module,
    run: Callable[[Sample], object],
    samples: SampleSet,
    recipe: GraphRecipe,
    inputs: Sequence[LayerInput],
    weight: WeightRows,
    store: Store,
    progress: Progress | None = None,
) -> Measured:
    """Ranges and factors for the layers whose precision needs them beforehand.

    `run` puts a sample through an engine whose graph is `module`. `inputs` are `layer_inputs(module)`; all of them are watched
    whatever the recipe says, so that another recipe finds them in the store. Factors are given for every layer of an input,
    static or not: a norm that has taken them in feeds them all. A range holds what it would of a user's samples alone and of
    those drawn beside them: many dark slices say nothing about the few bright ones, and would outnumber what these reach.
    Raises `CheckpointError` for activations that are not finite.
    """
    static = {
        path
        for one in inputs
        for path in one.layers
        if PRECISIONS[recipe.precision_of(path)].static and cast(Linear, module.get_submodule(path)).quantizable
    }
    wanted = [one for one in inputs if static.intersection(one.layers)]
    if not wanted:
        return Measured()
    watches = [_Watch(module, run, part, store, progress) for part in samples.parts()]
    seen = [watch.statistics([one.name for one in inputs], {}, "activations") for watch in watches]
    channels = {
        one.name: Channels.together(found)
        for one in wanted
        if (found := [part[one.name].channels for part in seen if one.name in part])
    }
    if missing := [one.name for one in wanted if one.name not in channels]:
        raise OptionError(f"no sample reaches {missing[0]}: calibrate with samples that use it, or keep it in float")
    factors = {}
    for one in wanted:
        factors_K = smoothing_factors(
            channels[one.name], one.layers, weight, alpha=recipe.smoothing, folded=one.folded, shared=one.channels
        )
        if factors_K is not None:
            factors[one.name] = factors_K
    if recipe.ranges == "minmax":
        ranges = {one.name: _extremes(channels[one.name], factors.get(one.name)) for one in wanted}
    else:
        smoothed = [watch.statistics(list(factors), factors, "smoothed activations") if factors else {} for watch in watches]
        of_parts = [{**part, **then} for part, then in zip(seen, smoothed, strict=True)]
        ranges = {
            one.name: _union([find_range(part[one.name].histogram, recipe.ranges) for part in of_parts if one.name in part])
            for one in wanted
        }
    return Measured(
        ranges={path: ranges[one.name] for one in wanted for path in one.layers if path in static},
        smoothing={path: factors[one.name] for one in wanted if one.name in factors for path in one.layers},
    )


def _union(ranges: Sequence[Range]) -> Range:
    return Range(min(each.low for each in ranges), max(each.high for each in ranges))


def _extremes(channels: Channels, factors_K: NDArray[np.float32] | None) -> Range:
    channels = channels if factors_K is None else channels.divided(factors_K)
    return Range(min(float(channels.low.min()), 0.0), max(float(channels.high.max()), 0.0))


class _Watch:
    """Passes of the samples through the module, each kept in the store."""

    def __init__(
        self, module: nn.Module, run: Callable[[Sample], object], samples: SampleSet, store: Store, progress: Progress | None
    ) -> None:
        self._module, self._run, self._samples, self._store = module, run, samples, store
        self._samples_hash = samples.content_hash()
        self._progress = progress or (lambda *_: None)

    def statistics(
        self, names: Sequence[str], factors: Mapping[str, NDArray[np.float32]], label: str
    ) -> dict[str, InputStatistics]:
        """Of each named layer's input over all samples, divided by its factors."""
        values = content_hash(*(factors[name].tobytes().hex() for name in factors))
        key = self._store.key(torch.__version__, self._samples_hash, values, *names)
        total, done = _unpack(self._store.load(key) or {})
        count = len(self._samples.samples)
        kept, saved = done, time.monotonic()
        self._progress(label, done, count)
        try:
            for number in range(done, count):
                try:
                    found = self._look(self._samples.samples[number], names, factors)
                except CheckpointError:
                    raise
                except McvError as error:  # a sample that the engine refuses is no reason to lose the others
                    _log.warning("sample %d is left out: %s", number + 1, error)
                    found = {}
                for name, one in found.items():
                    total[name].merge(one) if name in total else total.update({name: one})
                done = number + 1
                if done - kept >= self._store.every or time.monotonic() - saved >= _SAVE_S:
                    self._store.save(key, _pack(total, done))
                    kept, saved = done, time.monotonic()
                self._progress(label, done, count)
        finally:  # also when interrupted: what is in `total` is whole samples
            if done > kept:
                self._store.save(key, _pack(total, done))
        return total

    def _look(
        self, sample: Sample, names: Sequence[str], factors: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, InputStatistics]:
        """Of one sample."""
        found: dict[str, InputStatistics] = {}

        def see(name: str, x: Tensor) -> None:
            x_RK = x.detach().reshape(-1, x.shape[-1]).to(torch.float32).numpy()
            if not len(x_RK):
                return
            if not all(math.isfinite(end) for end in x.aminmax()):
                raise CheckpointError(f"{name} is given numbers that are not finite; the checkpoint's weights are damaged")
            one = InputStatistics.of(x_RK, factors.get(name))
            if name in found:
                found[name].merge(one)
            else:
                found[name] = one

        with ExitStack() as hooks, torch.inference_mode():
            for name in names:
                layer = self._module.get_submodule(name)
                hook = layer.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
                hooks.callback(hook.remove)
            self._run(sample)
        return found


def _pack(total: Mapping[str, InputStatistics], done: int) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {"done": np.array(done)}
    for name, one in total.items():
        for part, found in (("channels", one.channels.arrays()), ("histogram", one.histogram.arrays())):
            arrays |= {f"{name}/{part}/{kind}": array for kind, array in found.items()}
    return arrays


def _unpack(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, InputStatistics], int]:
    """The inverse of `_pack`; of nothing, the start."""
    parts: dict[str, dict[str, dict[str, NDArray[Any]]]] = {}
    for path, array in arrays.items():
        if path != "done":
            name, part, kind = path.split("/")
            parts.setdefault(name, {}).setdefault(part, {})[kind] = array
    total = {
        name: InputStatistics(Channels.from_arrays(of["channels"]), Histogram.from_arrays(of["histogram"]))
        for name, of in parts.items()
    }
    return total, int(arrays.get("done", np.array(0)))
