"""The report on what bundles cost against a reference: `report.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mcv_calibration.accuracy import KEPT_CALLS, MAX_NEW_TOKENS, Accuracy, Comparison, GivenAnswer, Result, Speed, compare
from mcv_calibration.contender import Call, Contender
from mcv_calibration.intervals import NAMED, Share
from mcv_calibration.layer_errors import LayerError, layer_errors
from mcv_calibration.samples import Sample, SampleSet
from mcv_calibration.sensitivity import GraphBlocks
from mcv_calibration.taps import Tapped, TappedGraph
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.pictures.images import describe

FORMAT = 1
JSON_NAME, HTML_NAME = "report.json", "report.html"

Calls = Mapping[GraphName, Sequence[Call]]
Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """One graph of a bundle and the bytes that it takes, weights included."""

    name: GraphName
    precision: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFacts:
    """What was asked about which pictures; `answer` is the right one, where it is known."""

    pictures: tuple[str, ...]
    prompt: str
    answer: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReport:
    """One bundle, or the reference: that has no accuracy and no layers, and without a bundle no graphs and no speed."""

    name: str
    graphs: tuple[GraphFacts, ...]
    size: int | None
    quantization: Any
    """As the manifest has it."""
    accuracy: Accuracy | None
    layers: tuple[LayerError, ...]
    blocks: tuple[GraphBlocks, ...]
    """What each block costs by itself; empty: not measured."""
    speed: Speed | None
    speedup: Speed | None
    """How many times faster than the reference, in the same run."""
    answers: tuple[GivenAnswer, ...]
    """In the order of the samples."""

    same: Share
    """Answers that are the reference's."""
    right: Share | None
    """Answers that are known to be right; None: of no sample is it known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of `report.json`; its first bundle is the reference."""

    format: int = FORMAT
    model: str
    source: str
    """Where the samples come from."""
    calibrated: int
    """Samples that are left out, because a bundle was calibrated with their pictures."""
    intervals: str = NAMED
    """What the intervals are."""
    skipped: tuple[str, ...]
    """Samples that could not be used, with the reason."""
    samples: tuple[SampleFacts, ...]
    max_new_tokens: int
    reference: BundleReport
    bundles: tuple[BundleReport, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def make_report(
    reference: Contender,
    candidates: Sequence[Contender],
    samples: SampleSet,
    *,
    tapped: Callable[[GraphName], Tapped] | None = None,
    blocks: Callable[[Bundle, Calls], Iterable[GraphBlocks]] = lambda bundle, calls: (),
    threads: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Compare bundles with the reference, on samples that should have calibrated none of them.

    `tapped` opens a graph of the reference for a look at its layers, and `blocks` measures each block of a bundle by itself, on
    these calls of the reference.

    Raises `OptionError` for bundles of different models, and what the runtime raises for samples it cannot use.
    """
    total = len(samples.samples)
    compared = compare(
        reference,
        candidates,
        samples.samples,
        max_new_tokens=max_new_tokens,
        enough=samples.enough,
        advance=lambda done: progress("samples", done, total),
    )
    open_tapped = tapped or (lambda graph: TappedGraph(reference.engine.bundle.graph(graph), threads))
    steps = len(candidates) * len(compared.calls)
    bundles = []
    for number, (candidate, result) in enumerate(zip(candidates, compared.candidates, strict=True)):
        layers: list[LayerError] = []
        for step, (graph, calls) in enumerate(compared.calls.items(), 1):
            own = TappedGraph(candidate.engine.bundle.graph(graph), threads)
            layers += layer_errors(graph, open_tapped(graph), own, [call.inputs for call in calls[:KEPT_CALLS]])
            progress("layers", number * len(compared.calls) + step, steps)
        bundles.append(
            _bundle(candidate, result, compared, tuple(layers), tuple(blocks(candidate.engine.bundle, compared.calls)))
        )
    return Report(
        model=candidates[0].manifest.model,
        source=samples.source,
        calibrated=samples.calibrated,
        skipped=samples.skipped,
        samples=tuple(_facts(sample) for sample in compared.samples),
        max_new_tokens=max_new_tokens,
        reference=_bundle(reference, compared.reference, compared),
        bundles=tuple(bundles),
    )


def _bundle(
    contender: Contender,
    result: Result,
    compared: Comparison,
    layers: tuple[LayerError, ...] = (),
    blocks: tuple[GraphBlocks, ...] = (),
) -> BundleReport:
    files = contender.manifest.files
    sizes = {
        name: sum(spec.size for file, spec in files.items() if file.startswith(graph.file))
        for name, graph in contender.manifest.graphs.items()
    }
    graphs = tuple(
        GraphFacts(name=name, precision=graph.precision, size=sizes[name]) for name, graph in contender.manifest.graphs.items()
    )
    known = [answer.right for answer in result.answers if answer.right is not None]
    return BundleReport(
        name=contender.name,
        graphs=graphs if contender.timed else (),
        size=sum(file.size for file in files.values()) if contender.timed else None,
        quantization=dict(contender.manifest.quantization) if contender.timed else {},
        accuracy=result.accuracy,
        layers=layers,
        blocks=blocks,
        speed=result.speed,
        speedup=_speedup(result.speed, compared.reference.speed),
        answers=result.answers,
        same=Share.of(sum(answer.as_reference for answer in result.answers), len(result.answers)),
        right=Share.of(sum(known), len(known)) if known else None,
    )


def _speedup(own: Speed | None, reference: Speed | None) -> Speed | None:
    if own is None or reference is None:
        return None
    return Speed(
        vision_s=_ratio(reference.vision_s, own.vision_s),
        prefill_tokens_per_s=_ratio(own.prefill_tokens_per_s, reference.prefill_tokens_per_s),
        decode_tokens_per_s=_ratio(own.decode_tokens_per_s, reference.decode_tokens_per_s),
    )


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _facts(sample: Sample) -> SampleFacts:
    return SampleFacts(pictures=tuple(describe(image) for image in sample.images), prompt=sample.prompt, answer=sample.answer)
