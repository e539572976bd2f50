"""Which blocks a search raises: against a model of costs whose best answer is known."""

from collections.abc import Mapping

import pytest

from mcv_calibration.accuracy import Accuracy
from mcv_calibration.distances import DistributionError, Histogram
from mcv_calibration.gate import Gate
from mcv_calibration.intervals import Share
from mcv_calibration.raising import Ladder, find_recipe
from mcv_calibration.recipe import GraphRecipe, Recipe
from mcv_runtime.errors import GateError

COSTS = {"decoder_with_past": [2.0**-n for n in range(16)], "vision_encoder": [0.01] * 4}
NOISE = {"q4": 1.0, "int8-static": 0.5, "q8": 0.1, "fp32": 0.0}


def distribution(kl: float) -> DistributionError:
    nothing = Histogram(edges=(0.0, None), counts=(1,))
    return DistributionError(
        tokens=1,
        kl_mean=kl,
        kl_interval=None,
        kl_p95=kl,
        kl_max=kl,
        agreeing=Share.of(1, 1),
        divergences=nothing,
    )


class Model:
    """Every block costs by its precision, and the costs add up."""

    def __init__(self, floor: float = 0.0) -> None:
        self.floor = floor
        self.tried: list[Recipe] = []

    def costs(self, recipe: Recipe) -> dict[str, float]:
        return {
            name: sum(cost * NOISE[recipe.graphs[name].precision_of(f"layers.{n}.fc1")] for n, cost in enumerate(costs))
            for name, costs in COSTS.items()
        }

    def measure(self, recipe: Recipe) -> Accuracy:
        self.tried.append(recipe)
        costs = self.costs(recipe)
        parts = {name: distribution(costs[graph]) for name, graph in PARTS.items()}
        whole = distribution(sum(costs.values()) + self.floor)
        return Accuracy(vision=None, compressor=None, visual_tokens=None, together=whole, int8_cache=None, **parts)

    def find(self, recipe: Recipe, gate: Gate) -> Recipe:
        return find_recipe(
            recipe,
            self.measure,
            lambda name: Ladder(tuple((f"layers.{n}",) for n in range(len(COSTS[name])))),
            gate,
            lambda accuracy: {graph: getattr(accuracy, name).kl_mean for name, graph in PARTS.items()},
        )


PARTS = {"decoder": "decoder_with_past", "pictures": "vision_encoder"}


def recipe(decoder: str = "q4", vision: str = "int8-static", layers: Mapping[str, str] | None = None) -> Recipe:
    graphs = {
        "decoder_with_past": GraphRecipe(precision=decoder, layers=layers or {}),
        "vision_encoder": GraphRecipe(precision=vision),
    }
    return Recipe(target="avx2", graphs=graphs)


def test_the_costliest_blocks_are_raised_and_no_more_than_needed() -> None:
    model = Model()
    found = model.find(recipe(), Gate(max_kl=0.3))
    # 2 - 2**-15 in q4: with the first three in q8 0.175 + 0.25 is left, with four 0.1875 + 0.125, with five 0.19 + 0.0625
    assert dict(found.graphs["decoder_with_past"].layers) == {f"layers.{n}": "q8" for n in range(5)}
    assert found.graphs["vision_encoder"] == recipe().graphs["vision_encoder"]
    assert len(model.tried) <= 7
    assert sum(model.costs(found).values()) <= 0.3


def test_what_passes_is_left_alone() -> None:
    model = Model()
    assert model.find(recipe(), Gate(max_kl=3)) == recipe()
    assert len(model.tried) == 1


def test_up_to_fp32_in_both_graphs() -> None:
    model = Model()
    found = model.find(recipe(), Gate(max_kl=1e-6))
    assert sum(model.costs(found).values()) <= 1e-6
    assert {found.graphs["vision_encoder"].precision_of(f"layers.{n}") for n in range(4)} == {"fp32"}


def test_if_nothing_helps() -> None:
    with pytest.raises(GateError, match="no recipe passes the gate"):
        Model(floor=1).find(recipe(), Gate(max_kl=0.5))


def test_layers_that_a_recipe_names_are_never_lowered() -> None:
    named = GraphRecipe(precision="q4", layers={"layers.0.fc1": "fp32", "layers.0.fc2": "q8", "layers.1": "q8"})
    ladder = Ladder((("layers.0",), ("layers.1",), ("k_proj", "v_proj")))
    once = ladder.raised(named, 2)
    assert dict(once.layers) == {"layers.0.fc1": "fp32", "layers.0.fc2": "fp32", "layers.1": "fp32", "layers.0": "q8"}
    assert ladder.raised(named, 3).layers["v_proj"] == "q8"
    assert ladder.raised(named, ladder.top(named)).precisions == {"q4", "fp32"}
    assert ladder.raised(named, 0) == named
