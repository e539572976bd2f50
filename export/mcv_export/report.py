"""Report on bundles: against one of them in fp32, or against the checkpoint in torch; and keep the report in a bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

from mcv_calibration.accuracy import MAX_NEW_TOKENS
from mcv_calibration.contender import Contender
from mcv_calibration.gate import Gate
from mcv_calibration.report import FORMAT, HTML_NAME, JSON_NAME, Calls, Progress, Report, make_report
from mcv_calibration.report_html import render
from mcv_calibration.samples import SampleSet, unseen
from mcv_calibration.sensitivity import GraphBlocks
from mcv_calibration.taps import Tapped, TappedModule
from mcv_export.adapters import Adapter
from mcv_export.block_errors import block_errors
from mcv_export.checkpoint import Checkpoint
from mcv_export.eager import eager_module
from mcv_export.file_specs import file_spec
from mcv_export.oracle import TorchSession
from mcv_export.origin import open_origin
from mcv_export.plan import ModelPlan
from mcv_export.remembering import RememberingSession
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import FILE_NAME, GraphName
from mcv_runtime.errors import OptionError, OutputError
from mcv_runtime.writing import replacing

CHECKPOINT = "the checkpoint"

_BEGINNING = f'{{\n "format": {FORMAT},'.encode()
"""Of every `report.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """How bundles are measured; `threads` as `mcv_runtime.load` takes them."""

    max_new_tokens: int = MAX_NEW_TOKENS
    threads: int | None = None
    blocks: bool = False
    """Also measure each block by itself, which takes a pass through the checkpoint for each."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A report, its page, and the folders of the bundles that it is about, the reference's not among them."""

    report: Report
    page: str
    folders: tuple[Path, ...]


def report_on(
    folders: Sequence[Path],
    samples: SampleSet,
    *,
    checkpoint: Path | None = None,
    adapters: Sequence[Adapter] = (),
    names: Sequence[str] | None = None,
    options: ReportOptions = ReportOptions(),
    progress: Progress = lambda what, done, total: None,
) -> Reported:
    """Measure bundles on those of the samples that calibrated none of them.

    The reference is the checkpoint (with adapters) if one is given, else the first bundle in fp32.

    `names` are what the bundles are called, by default their folders' names. Raises `OptionError` where there is nothing to
    compare, and what the runtime raises for a bundle that cannot be used.
    """
    called = list(names or [folder.name for folder in folders])
    bundles = [Bundle.open(folder) for folder in folders]
    if options.blocks and checkpoint is None:
        raise OptionError("blocks are put into the checkpoint's graphs one by one: name it with --model")
    samples = unseen(samples, {digest for bundle in bundles for digest in bundle.manifest.calibration})
    more: dict[str, Any] = {}
    if checkpoint is not None:
        in_torch = checkpoint_reference(bundles[0], checkpoint, adapters)
        reference, more["tapped"] = in_torch.contender, in_torch.tapped
        if options.blocks:
            more["blocks"] = partial(in_torch.blocks, progress)
        compared = list(range(len(folders)))
    else:
        first = _first_float(bundles)
        compared = [index for index in range(len(folders)) if index != first]
        if not compared:
            raise OptionError(
                f"{folders[first]} has nothing to be compared with: name another bundle, or its checkpoint with --model"
            )
        reference = Contender(folders[first], name=called[first], threads=options.threads)
    report = make_report(
        reference,
        [Contender(folders[index], name=called[index], threads=options.threads) for index in compared],
        samples,
        threads=options.threads,
        max_new_tokens=options.max_new_tokens,
        progress=progress,
        **more,
    )
    return Reported(report, render(report, samples.samples[: len(report.samples)]), tuple(folders[index] for index in compared))


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointReference:
    """A checkpoint in torch, at the memory of a few weights, in the place of a bundle made from it."""

    contender: Contender
    checkpoint: Checkpoint
    plan: ModelPlan
    sessions: Mapping[GraphName, TorchSession]

    def tapped(self, name: GraphName) -> Tapped:
        """A graph whose layers can be looked at."""
        return TappedModule(self.sessions[name].module, self.sessions[name])

    def blocks(self, progress: Progress, bundle: Bundle, calls: Calls) -> Iterator[GraphBlocks]:
        """What each block of a bundle costs by itself."""
        for graph in self.plan.graphs:
            if graph.name in calls:
                label = f"blocks of {graph.name}"
                advance = partial(progress, label)
                yield block_errors(bundle, graph, self.sessions[graph.name], calls[graph.name], advance)


def checkpoint_reference(bundle: Bundle, folder: Path, adapters: Sequence[Adapter] = ()) -> CheckpointReference:
    """Raises `CheckpointError` if the bundle is of another model."""
    checkpoint, plan = open_origin(bundle, folder, adapters)
    sessions = {graph.name: TorchSession(partial(eager_module, graph, checkpoint), graph.io) for graph in plan.graphs}
    remembering = {bundle.graph(name): RememberingSession(session) for name, session in sessions.items()}

    def open_module(path: Path, options: ort.SessionOptions) -> RememberingSession:
        return remembering[path]

    contender = Contender(bundle.folder, name=CHECKPOINT, session_factory=open_module, timed=False)
    return CheckpointReference(contender, checkpoint, plan, sessions)


def judge(
    folder: Path,
    name: str,
    checkpoint: Path,
    samples: SampleSet,
    gate: Gate,
    *,
    adapters: Sequence[Adapter] = (),
    options: ReportOptions = ReportOptions(),
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Report on a bundle that was just built, keep the report in it, and raise `GateError` if it costs too much."""
    made = report_on(
        [folder], samples, checkpoint=checkpoint, adapters=adapters, names=[name], options=options, progress=progress
    )
    for bundle in made.report.bundles:
        gate.check(bundle)
    keep_in_bundle(made, folder)
    return made.report


def require_report(folder: Path) -> None:
    """Raise `OutputError` where a file is in the way that no report of ours wrote."""
    try:
        with (folder / JSON_NAME).open("rb") as file:
            is_ours = file.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        is_ours = not any(os.path.lexists(folder / name) for name in (JSON_NAME, HTML_NAME))
    if not is_ours:
        raise OutputError(f"{folder} has a {JSON_NAME} or {HTML_NAME} that is none of a bundle; choose another folder")


def keep(made: Reported, folder: Path) -> None:
    """Write `report.json` and `report.html` into a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((JSON_NAME, made.report.to_json()), (HTML_NAME, made.page)):
            _replace(folder / name, text)
    except OSError as error:
        raise OutputError(f"the report cannot be written to {folder}: {error.strerror}") from None


def keep_in_bundle(made: Reported, folder: Path) -> None:
    """Write the report into a bundle and list it in the manifest.

    The manifest names no report while the old one is being replaced: the bundle can be opened at any moment.
    """
    manifest = Bundle.open(folder).manifest
    others = {name: spec for name, spec in manifest.files.items() if name not in (JSON_NAME, HTML_NAME)}
    try:
        if others.keys() != manifest.files.keys():
            _replace(folder / FILE_NAME, replace(manifest, files=others).to_json())
        keep(made, folder)
        listed = {name: file_spec(folder / name) for name in (HTML_NAME, JSON_NAME)}
        _replace(folder / FILE_NAME, replace(manifest, files=dict(sorted({**others, **listed}.items()))).to_json())
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"the report cannot be written to {folder}: {error.strerror}") from None


def _first_float(bundles: Sequence[Bundle]) -> int:
    for index, bundle in enumerate(bundles):
        if all(graph.precision == "fp32" for graph in bundle.manifest.graphs.values()):
            return index
    raise OptionError(
        "there is nothing to compare with: name a bundle in fp32 (mcv-export build MODEL OUT --precision fp32)"
        " or the checkpoint with --model"
    )


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    with replacing(path, mode=0o666) as file:
        file.write(text.encode(errors="replace"))
        if path.exists():
            Path(file.name).chmod(path.stat().st_mode & 0o777)
