"""Watching a module's inputs: against all of them held in memory, interrupted, killed, and in bounded memory.

Run as a program, it calibrates into a cache folder, and kills itself where it is told to.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mcv_calibration.histogram import Histogram
from mcv_calibration.inputs import layer_inputs
from mcv_calibration.measure import measure
from mcv_calibration.measured import Measured
from mcv_calibration.ranges import METHODS, find_range
from mcv_calibration.recipe import GraphRecipe, Ranges
from mcv_calibration.samples import Sample, SampleSet
from mcv_calibration.store import Store
from mcv_graphs.folds import behind_norm
from mcv_graphs.layers import LayerNorm, Linear
from mcv_runtime.errors import CheckpointError, ImageError, OptionError

WIDTH, ROWS = 32, 50
STATIC = GraphRecipe(precision="int8-static")


class Block(nn.Module):
    """A norm, two layers that read it, and one that reads their product."""

    folds: ClassVar = (behind_norm("norm", "a", "b"),)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width, 1e-6)
        self.a, self.b, self.c = (Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return x + self.c(torch.tanh(self.a(normed)) * self.b(normed))


def stack(blocks: int = 3, width: int = WIDTH, outliers: int = 2) -> nn.Module:
    """Random blocks; `outliers` channels of every norm are 100 times the others."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(*(Block(width) for _ in range(blocks))).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.0 if "norm" in name else width**-0.5))
    for block in module:
        assert isinstance(block, Block)
        channels = torch.randperm(width, generator=generator)[:outliers]
        block.norm.weight[channels] = 100
        for layer in (block.a, block.b):
            layer.weight[channels] /= 100
    return module


def numbers(count: int = 12, rows: int = ROWS, width: int = WIDTH) -> SampleSet:
    """Samples that are arrays rather than pictures."""
    arrays = (np.random.default_rng(number).normal(size=(rows, width)).astype(np.float32) for number in range(count))
    return SampleSet(tuple(Sample((array,), "") for array in arrays), (), "random numbers")


def put_through(module: nn.Module, sample: Sample) -> None:
    array = sample.images[0]
    assert isinstance(array, np.ndarray)
    module(torch.from_numpy(array))


def calibrate(
    module: nn.Module,
    store: Store,
    recipe: GraphRecipe = STATIC,
    *,
    samples: SampleSet | None = None,
    run: Callable[[Sample], object] | None = None,
    progress: Any = None,
) -> Measured:
    def weight(path: str) -> Iterator[np.ndarray]:
        yield from np.array_split(module.get_submodule(path).weight.detach().numpy().T, 2)

    run = run or (lambda sample: put_through(module, sample))
    return measure(module, run, samples or numbers(), recipe, layer_inputs(module), weight, store, progress)


def same(one: Measured, other: Measured) -> bool:
    factors = [np.array_equal(array, other.smoothing[path]) for path, array in one.smoothing.items()]
    return one.ranges == other.ranges and one.smoothing.keys() == other.smoothing.keys() and all(factors)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return stack()


@pytest.fixture(scope="module")
def held(module: nn.Module) -> dict[str, np.ndarray]:
    """Every layer's input over all samples, [rows, in]: what the streaming statistics stand for."""
    seen: dict[str, list[np.ndarray]] = {}
    linears = [(path, child) for path, child in module.named_modules() if isinstance(child, Linear)]
    hooks = [
        child.register_forward_pre_hook(lambda _, given, path=path: seen.setdefault(path, []).append(given[0].numpy().copy()))
        for path, child in linears
    ]
    for sample in numbers().samples:
        put_through(module, sample)
    for hook in hooks:
        hook.remove()
    return {path: np.concatenate(arrays) for path, arrays in seen.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_ranges_are_those_of_all_activations(
    method: Ranges, smoothing: float, module: nn.Module, held: dict[str, np.ndarray], tmp_path: Path
) -> None:
    found = calibrate(module, Store("test", tmp_path), GraphRecipe(precision="int8-static", ranges=method, smoothing=smoothing))
    assert found.ranges.keys() == held.keys()
    assert ("0.a" in found.smoothing) == (smoothing > 0)
    for path, values in held.items():
        values = values / found.smoothing[path] if path in found.smoothing else values
        whole = Histogram()
        whole.add(values)
        assert found.ranges[path] == find_range(whole, method)
        if method == "minmax":
            assert (found.ranges[path].low, found.ranges[path].high) == (min(values.min(), 0), max(values.max(), 0))


def test_layers_of_one_norm_share_factors_and_range(module: nn.Module, tmp_path: Path) -> None:
    found = calibrate(module, Store("test", tmp_path))
    for block in range(3):
        np.testing.assert_array_equal(found.smoothing[f"{block}.a"], found.smoothing[f"{block}.b"])
        assert found.ranges[f"{block}.a"] == found.ranges[f"{block}.b"]


def test_smoothing_takes_the_outliers_away(module: nn.Module, tmp_path: Path) -> None:
    plain = calibrate(module, Store("test", tmp_path), GraphRecipe(precision="int8-static", smoothing=0.0, ranges="minmax"))
    found = calibrate(module, Store("test", tmp_path), GraphRecipe(precision="int8-static", ranges="minmax"))
    assert plain.ranges["0.a"].high > 100
    assert found.ranges["0.a"].high < 15


def test_only_static_layers_get_ranges(module: nn.Module, tmp_path: Path) -> None:
    recipe = GraphRecipe(precision="int8-static", layers={"0.a": "q8", "1": "fp32", "2.c": "int8-dynamic"})
    found = calibrate(module, Store("test", tmp_path), recipe)
    assert set(found.ranges) == {"0.b", "0.c", "2.a", "2.b"}
    # the norm before 0.a has taken the factors in, whatever 0.a is stored in
    assert "0.a" in found.smoothing
    assert not {path for path in found.smoothing if path.startswith("1.")}
    assert same(calibrate(module, Store("test", tmp_path), GraphRecipe(precision="q4")), Measured())


def test_another_recipe_runs_nothing_again(module: nn.Module, tmp_path: Path) -> None:
    ran: list[Sample] = []

    def run(sample: Sample) -> None:
        ran.append(sample)
        put_through(module, sample)

    first = calibrate(module, Store("test", tmp_path), run=run)
    assert len(ran) == 24  # two passes
    again = calibrate(module, Store("test", tmp_path), run=run)
    calibrate(module, Store("test", tmp_path), GraphRecipe(precision="int8-static", ranges="mse"), run=run)
    calibrate(module, Store("test", tmp_path), GraphRecipe(precision="fp32", layers={"1": "int8-static"}, smoothing=0), run=run)
    assert len(ran) == 24
    assert same(first, again)
    calibrate(module, Store("another checkpoint", tmp_path), run=run)
    assert len(ran) == 48
    calibrate(module, Store("test", tmp_path), run=run, samples=numbers(5))
    assert len(ran) == 58


def test_one_pass_is_enough_for_extremes_or_without_outliers(tmp_path: Path) -> None:
    labels: list[str] = []
    minmax = GraphRecipe(precision="int8-static", ranges="minmax")
    calibrate(stack(), Store("minmax", tmp_path), minmax, progress=lambda label, done, count: labels.append(label))
    off = GraphRecipe(precision="int8-static", smoothing=0.0)
    calibrate(stack(), Store("off", tmp_path), off, progress=lambda label, done, count: labels.append(label))
    assert set(labels) == {"activations"}


def test_an_interrupted_calibration_goes_on(module: nn.Module, tmp_path: Path) -> None:
    expected = calibrate(module, Store("test", tmp_path / "whole"))
    store, left = Store("test", tmp_path / "parts", every=100), iter([5, 7, 3])
    begun: list[tuple[str, int]] = []

    def run(sample: Sample) -> None:
        put_through(module, sample)
        nonlocal budget
        if budget == 0:  # in the middle of a sample: half of it must not count
            raise KeyboardInterrupt
        budget -= 1

    for budget in left:  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            calibrate(module, store, run=run, progress=lambda label, done, count: begun.append((label, done)))
    budget = 100
    found = calibrate(module, store, run=run, progress=lambda label, done, count: begun.append((label, done)))
    assert same(found, expected)
    assert budget == 100 - (24 - 5 - 7 - 3)  # no sample twice
    assert begun.count(("activations", 5)) == 2  # the end of the first, the start of the second


@pytest.mark.waits
def test_a_killed_calibration_goes_on(tmp_path: Path) -> None:
    def child(folder: str, stop: str = "") -> tuple[int, list[str], bytes]:
        out = tmp_path / "found.npz"
        out.unlink(missing_ok=True)
        command = [sys.executable, __file__, str(tmp_path / folder), str(out), stop]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines(), out.read_bytes() if out.exists() else b""

    status, _, expected = child("whole")
    assert status == 0
    assert expected
    assert child("parts", "activations 5")[::2] == (-signal.SIGKILL, b"")
    status, lines, _ = child("parts", "smoothed activations 3")
    assert (status, lines[0]) == (-signal.SIGKILL, "activations 4")  # kept after every second sample
    status, lines, found = child("parts")
    assert (status, lines[:2]) == (0, ["activations 12", "smoothed activations 2"])
    assert found == expected


def test_damaged_statistics_are_measured_again(module: nn.Module, tmp_path: Path) -> None:
    expected = calibrate(module, Store("test", tmp_path))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert same(calibrate(module, Store("test", tmp_path)), expected)


def test_a_sample_that_the_engine_refuses_is_left_out(
    module: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = numbers()

    def run(sample: Sample) -> None:
        put_through(module, sample)
        if sample is samples.samples[3]:
            raise ImageError("too narrow")

    rest = SampleSet(samples.samples[:3] + samples.samples[4:], (), "")
    with caplog.at_level(logging.WARNING):
        found = calibrate(module, Store("test", tmp_path), run=run, samples=samples)
    assert "sample 4 is left out: too narrow" in caplog.text
    assert same(found, calibrate(module, Store("test", tmp_path), samples=rest))


def test_no_sample_reaches_a_layer(module: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no sample reaches 0\.a: calibrate with samples that use it"):
        calibrate(module, Store("test", tmp_path), run=lambda sample: None)


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    module = stack()
    module[1].norm.weight[3] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises(CheckpointError, match=r"1\.a is given numbers that are not finite"):
        calibrate(module, Store("test", tmp_path))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """120 inputs of 4 MB each are seen; what stays is their statistics."""
    blocks, rows, width = 60, 4096, 256
    activation = rows * width * 4
    module, samples = stack(blocks, width), numbers(2, rows, width)
    levels: list[int] = []
    for block in module:
        block.register_forward_hook(lambda *_: levels.append(_resident()))
    put_through(module, samples.samples[0])  # what torch keeps for itself is there before
    before = max(levels)
    levels.clear()
    calibrate(module, Store("test", tmp_path), samples=samples)
    assert len(levels) == 2 * 2 * blocks
    assert max(levels) - before < 20 * activation


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(folder: str, out: str, stop: str) -> None:
    def progress(label: str, done: int, count: int) -> None:
        print(label, done, flush=True)
        if f"{label} {done}" == stop:
            os.kill(os.getpid(), signal.SIGKILL)

    found = calibrate(stack(), Store("test", Path(folder), every=2), progress=progress)
    ranges = np.array([(one.low, one.high) for one in found.ranges.values()])
    np.savez(out, ranges=ranges, **found.smoothing)


if __name__ == "__main__":
    main(*sys.argv[1:])
