"""Raise the precision of the blocks that cost most until a bundle passes its gate, with few attempts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mcv_calibration.accuracy import Accuracy
from mcv_calibration.gate import Gate
from mcv_calibration.precisions import PRECISIONS, Precision
from mcv_calibration.recipe import GraphRecipe, Recipe
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.errors import GateError

FIRST_PART = 4
"""One block in so many is raised first; the number doubles from there."""
TOGETHER = 2
"""Graphs are raised in the same attempt if they cost no less than one such part of the costliest."""
REFINEMENTS = 3
"""Attempts to do with less, once the gate is passed."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """The blocks of one graph, the costliest first, each as the beginnings of the paths of its layers.

    A step raises the next block by one precision; after the last block comes the first again.
    """

    blocks: tuple[tuple[str, ...], ...]

    def raised(self, recipe: GraphRecipe, steps: int) -> GraphRecipe:
        """The recipe after so many steps; layers that it names keep at least what they have."""
        layers = dict(recipe.layers)
        rounds, further = divmod(steps, max(len(self.blocks), 1))
        for index, paths in enumerate(self.blocks):
            times = rounds + (index < further)
            for path in paths if times else ():
                inner = [key for key in recipe.layers if key.startswith(f"{path}.")]
                layers |= {key: climb(recipe.precision_of(key), times) for key in (path, *inner)}
        return replace(recipe, layers=layers)

    def top(self, recipe: GraphRecipe) -> int:
        """Steps after which all is in fp32."""
        named = {*recipe.layers.values(), recipe.precision}
        return len(self.blocks) * max(_height(precision) for precision in named)


def climb(precision: Precision, times: int) -> Precision:
    """So many precisions up."""
    for _ in range(times):
        precision = PRECISIONS[precision].higher or precision
    return precision


def _height(precision: Precision) -> int:
    higher = PRECISIONS[precision].higher
    return 1 + _height(higher) if higher else 0


def find_recipe(
    start: Recipe,
    measure: Callable[[Recipe], Accuracy],
    ladder: Callable[[GraphName], Ladder],
    gate: Gate,
    costs: Callable[[Accuracy], Mapping[GraphName, float]],
) -> Recipe:
    """A recipe that passes the gate, by raising as few blocks as a handful of attempts can find.

    `measure` builds by a recipe and compares with the reference; `costs` says what each graph costs, and `ladder` names the
    blocks of one. Raises `GateError` if not even fp32 passes.
    """
    ladders: dict[GraphName, Ladder] = {}
    before: dict[GraphName, int] = {}
    steps: dict[GraphName, int] = {}

    def recipe_at(steps: Mapping[GraphName, int]) -> Recipe:
        raised = {name: ladders[name].raised(start.graphs[name], count) for name, count in steps.items()}
        return replace(start, graphs={**start.graphs, **raised})

    def higher(name: GraphName) -> int:
        """Steps of a graph's next attempt."""
        if name not in ladders:
            ladders[name] = ladder(name)
        taken = steps.get(name, 0)
        return min(2 * taken or -(-len(ladders[name].blocks) // FIRST_PART), ladders[name].top(start.graphs[name]))

    accuracy = measure(start)
    while (wrong := gate.miss(accuracy)) is not None:
        found = costs(accuracy)
        raisable = {name: cost for name, cost in found.items() if higher(name) > steps.get(name, 0)}
        if not raisable:
            raise GateError(f"no recipe passes the gate: with all layers in fp32 that can be, {wrong}")
        most = max(raisable.values())
        before = dict(steps)
        steps |= {name: higher(name) for name, cost in raisable.items() if cost * TOGETHER >= most}
        accuracy = measure(recipe_at(steps))
    for _ in range(REFINEMENTS):
        middle = {name: (before.get(name, 0) + count) // 2 for name, count in steps.items()}
        if middle == {name: before.get(name, 0) for name in steps}:
            break
        if gate.miss(measure(recipe_at(middle))) is None:
            steps = middle
        else:
            before = middle
    return recipe_at(steps)
