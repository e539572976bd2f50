"""A precision that nothing else knows of: one file with its format, and a line in the registry."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mcv_calibration.precisions import PRECISIONS, PrecisionSpec
from mcv_calibration.raising import climb
from mcv_calibration.recipe import GraphRecipe, Recipe
from mcv_export.build import BuildOptions, build
from mcv_export.verify import compare
from mcv_graphs.layers import Embedding, Linear
from mcv_runtime import load
from mcv_runtime.bundle.folder import Bundle

TINY = Path(__file__).parents[2] / "models" / "tiny"
GRAPHS = ("vision_encoder", "resampler", "decoder_with_past")


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfFormat:
    """Weights in 16-bit floats, which the layer widens before it multiplies."""

    smoothed: bool = False

    main: ClassVar = "qweight"
    columns: ClassVar = frozenset(("qweight",))
    quantized: ClassVar = True
    static: ClassVar = False
    tolerance: ClassVar = 0.01

    def register(self, layer: Linear) -> None:
        layer.register_buffer("qweight", torch.empty(layer.in_features, layer.out_features, dtype=torch.float16))

    def register_table(self, table: Embedding) -> None:
        table.register_buffer("qweight", torch.empty(table.rows, table.width, dtype=torch.float16))

    def forward(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        y = x @ layer.qweight.float()
        return y if layer.bias is None else y + layer.bias

    def lookup(self, table: Embedding, indices: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices, table.qweight).float()

    def quantize(self, rows_NK: np.ndarray, rounding: object) -> dict[str, np.ndarray]:
        return {"qweight": rows_NK.astype(np.float16)}

    def constants(self, inputs: object) -> dict[str, np.ndarray]:
        return {}

    def dequantize(self, layer: Linear | Embedding, count: int) -> torch.Tensor:
        return (layer.qweight[:, :count].T if isinstance(layer, Linear) else layer.qweight[:count]).float()


HALF = PrecisionSpec(name="half", suffix="_half", higher="fp32", layer=lambda size, target: HalfFormat(), operators={})


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRECISIONS, HALF.name, HALF)
    return HALF.name


def test_a_bundle_of_it_is_built_verified_and_answers(half: str, tmp_path: Path) -> None:
    built = build(TINY / "checkpoint", tmp_path / "bundle", BuildOptions(precision=half))
    bundle = Bundle.open(built.folder)
    assert [graph.file for graph in bundle.manifest.graphs.values()] == [f"onnx/{name}_half.onnx" for name in GRAPHS]
    plain = build(TINY / "checkpoint", tmp_path / "plain", BuildOptions(precision="fp32"))
    for one, other in zip(built.graphs, plain.graphs, strict=True):
        assert one.size < 0.6 * other.size
    assert compare(bundle, TINY / "checkpoint").passed
    answers = [load(result.folder, threads=1).ask(TINY / "demo.png", "What does the text say?") for result in (built, plain)]
    assert answers[0].text == answers[1].text == "HELLO"


def test_single_layers_and_the_search_may_have_it(half: str, tmp_path: Path) -> None:
    layers = {"layers.0": half, "embed_tokens": half}
    recipe = Recipe(
        target="avx2",
        graphs={
            **dict.fromkeys(GRAPHS, GraphRecipe(precision="q8")),
            "decoder_with_past": GraphRecipe(precision="q4", layers=layers),
        },
    )
    bundle = Bundle.open(build(TINY / "checkpoint", tmp_path / "bundle", BuildOptions(recipe=recipe)).folder)
    assert Recipe.from_data(bundle.manifest.quantization).graphs["decoder_with_past"].layers == layers
    assert compare(bundle, TINY / "checkpoint").passed
    assert climb(half, 1) == "fp32"
