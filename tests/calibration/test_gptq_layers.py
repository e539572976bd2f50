"""GPTQ of whole decoders: better logits than rounding to nearest, the samples' way through the layers, and resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcv_calibration.block_store import BlockStore
from mcv_calibration.blocks import Blocks, dequantize_rows, quantize_rows
from mcv_calibration.gptq_layers import quantize_layers
from mcv_calibration.walk import AnyDecoder, State, held, start, walk
from mcv_export.checkpoint import open_checkpoint
from mcv_export.eager import eager_module
from mcv_export.families import recognise
from mcv_export.plan import GraphPlan
from mcv_export.sources import Source, resolve
from mcv_export.storage import IN_FLOAT
from mcv_graphs.layers import Linear, WeightFormat
from mcv_runtime.errors import OptionError

Q4 = WeightFormat(bits=4, block_size=32)
FAMILIES = ["minicpmv2_6", "minicpmv4_6"]


@dataclass
class Golden:
    """The decoder of a golden checkpoint, its weights streamed, and random sequences for it."""

    plan: GraphPlan
    decoder: AnyDecoder
    sources: Mapping[str, Source]
    reads: list[str]

    def weight(self, path: str) -> np.ndarray:
        self.reads.append(path)
        return self.sources[f"{path}.weight"].all()

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """All linears of the layers that may be quantized."""
        linears = {p: m for p, m in self.decoder.named_modules() if isinstance(m, Linear) and p.startswith("layers.")}
        return {path: Q4 for path, linear in linears.items() if linear.quantizable}

    def feed(self, rows: int, seed: int, length: int = 48) -> dict[str, Any]:
        """Several sequences at once: the torch body of a delta net goes through time step by step."""
        inputs = self.plan.io.inputs
        positions = np.tile(np.arange(length), (rows, 1))
        if "position_ids" in inputs and inputs["position_ids"].shape[0] == 3:
            positions = np.stack([positions] * 3)
        sizes = {"batch": rows, "cache_length": 0}
        return {
            "input_ids": np.random.default_rng(seed).integers(0, self.decoder.config.vocab_size, (rows, length)),
            "vision_embeds": np.empty((0, self.decoder.config.hidden_size), np.float32),
            "vision_positions": np.empty(0, np.int64),
            "position_ids": positions,
            "logit_positions": np.arange(rows * length),
            "seqlens_k": np.full(rows, length - 1, np.int32),
            "total_sequence_length": np.array([length], np.int32),
            **{e.input: np.zeros([sizes.get(n, n) for n in e.shape], np.float32) for e in self.plan.io.cache},
        }

    def states(self, rows: int, *seeds: int) -> list[State]:
        return [start(self.decoder, self.plan.io, self.feed(rows, seed)) for seed in seeds]

    def logits(self, states: list[State]) -> np.ndarray:
        rows = []
        for state in states:
            for index in range(len(self.decoder.layers)):
                state = self.decoder.block(index, state)
            rows.append(self.decoder.finish(state)[0].numpy())
        return np.concatenate(rows)

    def quantized_logits(self, blocks: Mapping[str, Blocks], states: list[State]) -> np.ndarray:
        widths = {path: self.decoder.get_submodule(path).in_features for path in blocks}
        with held(self.decoder, {path: dequantize_rows(found, Q4, widths[path]) for path, found in blocks.items()}):
            return self.logits(states)


@pytest.fixture(params=FAMILIES)
def golden(request: pytest.FixtureRequest, golden_root: Path) -> Golden:
    checkpoint = open_checkpoint(golden_root / request.param / "checkpoint")
    plan = recognise(checkpoint.config).plan(checkpoint).graphs[-1]
    decoder = eager_module(plan, checkpoint)
    return Golden(plan, decoder, resolve(plan, checkpoint, IN_FLOAT), [])


@torch.inference_mode()
def test_stopping_between_layers_changes_nothing(golden: Golden) -> None:
    feed = golden.feed(2, 0)
    inputs = [torch.from_numpy(feed[name]) for name in golden.plan.io.inputs]
    logits, present = golden.decoder(*inputs, [torch.from_numpy(feed[e.input]) for e in golden.plan.io.cache])
    states = [start(golden.decoder, golden.plan.io, feed)]
    np.testing.assert_array_equal(golden.logits(states), logits.numpy())
    assert len(present) == len(golden.plan.io.cache)


@torch.inference_mode()
def test_logits_are_closer_than_those_of_rounding_to_nearest(golden: Golden, tmp_path: Path) -> None:
    formats = golden.formats
    gptq = quantize_layers(golden.decoder, golden.states(32, 0, 1), golden.weight, formats, tmp_path)
    assert set(gptq) == set(formats)
    rtn = {path: quantize_rows(golden.weight(path), Q4, "rtn") for path in formats}
    held_out = golden.states(12, 2)
    exact = golden.logits(held_out)
    errors = [float(np.linalg.norm(golden.quantized_logits(blocks, held_out) - exact)) for blocks in (gptq, rtn)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("golden", ["minicpmv2_6"], indirect=True)
def test_an_interrupted_walk_goes_on_behind_the_last_layer(golden: Golden, tmp_path: Path) -> None:
    def quantize(folder: Path, stop: str = "") -> Mapping[str, Blocks]:
        def progress(layer: str) -> None:
            if layer == stop:
                raise KeyboardInterrupt

        golden.reads.clear()
        with torch.inference_mode():
            states = golden.states(4, 0)
        return quantize_layers(golden.decoder, states, golden.weight, golden.formats, folder, progress=progress)

    whole = quantize(tmp_path / "whole")
    assert sorted(golden.reads) == sorted([*golden.formats] * 2)  # however many samples there are
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "resumed", stop="layers.0")
    resumed = quantize(tmp_path / "resumed")
    assert not any(path.startswith("layers.0.") for path in golden.reads)
    _assert_equal(resumed, whole)
    damaged = tmp_path / "resumed" / "layers.0.npz"
    damaged.write_bytes(damaged.read_bytes()[:-5000])
    _assert_equal(quantize(tmp_path / "resumed"), whole)
    assert "layers.0.qkv_proj" in golden.reads


@pytest.mark.parametrize("golden", ["minicpmv2_6"], indirect=True)
def test_the_decoder_is_left_as_it_was(golden: Golden, tmp_path: Path) -> None:
    before = dict(golden.decoder.named_modules())
    with torch.inference_mode():
        states = golden.states(1, 0)
        expected = golden.logits(states)
    quantize_layers(golden.decoder, states, golden.weight, golden.formats, tmp_path)
    assert dict(golden.decoder.named_modules()) == before
    with torch.inference_mode():
        np.testing.assert_array_equal(golden.logits(states), expected)


@pytest.mark.parametrize("golden", ["minicpmv2_6"], indirect=True)
def test_the_head_too_but_no_embedding(golden: Golden, tmp_path: Path) -> None:
    with torch.inference_mode():
        states = golden.states(1, 0)
    head = quantize_layers(golden.decoder, states, golden.weight, {"lm_head": Q4}, tmp_path / "head")
    assert list(head) == ["lm_head"]
    with pytest.raises(OptionError, match=r"embed_tokens is none; give it another method"):
        quantize_layers(golden.decoder, states, golden.weight, {"embed_tokens": Q4}, tmp_path / "table")


@pytest.mark.parametrize("golden", ["minicpmv2_6"], indirect=True)
def test_a_walk_visits_layers_in_order_and_keeps_no_caches(golden: Golden) -> None:
    visited = []

    @contextmanager
    def visit(layer: str, run: Callable[[], None]) -> Iterator[None]:
        visited.append(layer)
        yield

    with torch.inference_mode():
        states = golden.states(1, 0, 1)
        behind = walk(golden.decoder, states, visit)
        found = np.concatenate([golden.decoder.finish(state)[0].numpy() for state in behind])
        np.testing.assert_array_equal(found, golden.logits(states))
    assert visited == [f"layers.{index}" for index in range(len(golden.decoder.layers))] + ["lm_head"]
    assert not any(state.present for state in behind)


def test_blocks_of_eight_bits_are_kept_without_zero_points(tmp_path: Path) -> None:
    weights = WeightFormat(bits=8, block_size=16)
    blocks = quantize_rows(np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32), weights)
    BlockStore(tmp_path).write("layers.0", {"layers.0.fc": blocks})
    store = BlockStore(tmp_path)
    assert not store.find("layers.0", {"layers.0.fc", "layers.0.other"})
    assert store.find("layers.0", {"layers.0.fc"})
    _assert_equal(store, {"layers.0.fc": blocks})


def _assert_equal(found: Mapping[str, Blocks], expected: Mapping[str, Blocks]) -> None:
    assert set(found) == set(expected)
    for path, blocks in expected.items():
        for field in ("qweight", "scales", "zero_points"):
            wanted = getattr(blocks, field)
            if wanted is None:
                assert getattr(found[path], field) is None
            else:
                np.testing.assert_array_equal(getattr(found[path], field), wanted)
