"""Build the smallest bundle that passes a gate: the blocks that cost most are kept at a higher precision."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mcv_calibration.accuracy import Accuracy, compare
from mcv_calibration.contender import Call, Contender
from mcv_calibration.gate import Gate
from mcv_calibration.raising import Ladder, find_recipe
from mcv_calibration.recipe import Recipe
from mcv_calibration.report import Progress
from mcv_calibration.samples import SampleSet, unseen
from mcv_export.adapters import open_merged
from mcv_export.block_errors import block_errors
from mcv_export.build import BuildOptions, build
from mcv_export.families import recognise
from mcv_export.output_folder import check_output, claimed_folder, failures
from mcv_export.plan import GraphPlan
from mcv_export.precision import resolved
from mcv_export.report import CheckpointReference, ReportOptions, checkpoint_reference
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.errors import OptionError

_AS_REPORTED = ReportOptions()
_log = logging.getLogger(__name__)


def search_recipe(
    checkpoint: Path,
    beside: Path,
    options: BuildOptions,
    gate: Gate,
    samples: SampleSet,
    *,
    measuring: ReportOptions = _AS_REPORTED,
    progress: Progress = lambda what, done, total: None,
) -> Recipe:
    """The recipe to build by, from that of `options` upwards; attempts are built in a folder next to `beside`, which vanishes.

    Raises `GateError` if not even fp32 passes, and what `build` raises.
    """
    if gate.open:
        raise OptionError("a search needs a gate to pass: give it --max-kl, or min_agreement in the recipe")
    place = check_output(beside, checkpoint, force=options.force)  # hours before the build itself would find out
    opened = open_merged(checkpoint, options.adapters)
    plan = recognise(opened.config).plan(opened)
    start = resolved(options.chosen(), [graph.name for graph in plan.graphs if not graph.shares])
    with failures(beside), claimed_folder(place, ".search") as folder:
        attempts = _Attempts(folder / "attempts", checkpoint, options, samples, measuring, progress)
        return find_recipe(start, attempts.measure, attempts.ladder, gate, attempts.costs)


@dataclass(frozen=True, slots=True, eq=False)
class _First:
    """The first attempt, which stays: its blocks are what later ones raise."""

    bundle: Bundle
    reference: CheckpointReference
    calls: Mapping[GraphName, Sequence[Call]]

    def used(self, owner: GraphName) -> GraphPlan | None:
        """The graph with this one's weights that the samples went through."""
        plans = self.reference.plan.graphs
        return next((plan for plan in plans if plan.name in self.calls and (plan.shares or plan.name) == owner), None)


class _Attempts:
    """Bundles that are built and measured one after the other."""

    def __init__(
        self,
        folder: Path,
        checkpoint: Path,
        options: BuildOptions,
        samples: SampleSet,
        measuring: ReportOptions,
        progress: Progress,
    ) -> None:
        self._folder, self._checkpoint, self._options, self._samples = folder, checkpoint, options, samples
        self._measuring, self._progress = measuring, progress
        self._count = 0
        self._first: _First | None = None

    def measure(self, recipe: Recipe) -> Accuracy:
        """Of the bundle that the recipe makes."""
        self._count += 1
        out = self._folder / f"{self._count}"
        build(self._checkpoint, out, replace(self._options, recipe=recipe, force=False))
        if self._first:
            reference = self._first.reference
        else:
            bundle = Bundle.open(out)
            self._samples = unseen(self._samples, bundle.manifest.calibration)
            reference = checkpoint_reference(bundle, self._checkpoint, self._options.adapters)
        label, total = f"attempt {self._count}", len(self._samples.samples)
        compared = compare(
            reference.contender,
            [Contender(out, threads=self._measuring.threads)],
            self._samples.samples,
            max_new_tokens=self._measuring.max_new_tokens,
            enough=self._samples.enough,
            advance=lambda done: self._progress(label, done, total),
        )
        if self._first is None:
            self._first = _First(Bundle.open(out), reference, compared.calls)
        else:
            shutil.rmtree(out)
        accuracy = compared.candidates[0].accuracy
        assert accuracy is not None
        _log.info("%s: KL %.3g, agreement %.3f", label, accuracy.together.kl_mean, accuracy.together.agreement)
        return accuracy

    def ladder(self, owner: GraphName) -> Ladder:
        """A graph's blocks, the costliest first; in float it has none."""
        first = self._first
        assert first is not None
        graph = first.used(owner)
        if graph is None:
            return Ladder(())
        found = block_errors(
            first.bundle,
            graph,
            first.reference.sessions[graph.name],
            first.calls[graph.name],
            lambda done, total: self._progress(f"blocks of {owner}", done, total),
        )
        for error in found.blocks:
            _log.info("%s %s costs %.3g by itself", owner, error.name, error.cost)
        return Ladder(tuple(error.layers for error in found.blocks))

    def costs(self, accuracy: Accuracy) -> dict[GraphName, float]:
        """What each graph costs in nats; what the pictures cost is shared out by tower's and compressor's squared errors."""
        first = self._first
        assert first is not None
        owners = {plan.name: plan.shares or plan.name for plan in first.reference.plan.graphs}
        errors: dict[GraphName, float] = {}
        for name in first.calls.keys() - {"decoder_with_past"}:
            error = accuracy.compressor if name == first.bundle.manifest.compressor else accuracy.vision
            errors[owners[name]] = 0.0 if error is None else error.relative**2
        total = sum(errors.values()) or 1.0
        pictures = {name: accuracy.pictures.kl_mean * error / total for name, error in errors.items()}
        return {"decoder_with_past": accuracy.decoder.kl_mean, **pictures}
