"""`mcv-export build`: a bundle from a checkpoint, by a few options and a recipe file for the rest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from mcv_calibration.precisions import PRECISIONS, Precision
from mcv_calibration.target import Target
from mcv_export.command import (
    Adapters,
    CacheDir,
    Calibration,
    Json,
    MaxKL,
    Prompts,
    Revision,
    bars,
    megabytes,
    open_samples,
    print_table,
)
from mcv_export.memory import peak_rss_mb
from mcv_export.precision import Wishes
from mcv_export.recipe_file import RecipeFile
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.files import at_home

if TYPE_CHECKING:
    from mcv_calibration.gate import Gate
    from mcv_export.build import BuildOptions, BuildResult

# torch takes seconds to import: what needs it is imported where it is used.

_NAMES = "|".join(PRECISIONS)
Override = Annotated[Precision | None, typer.Option(metavar=_NAMES, show_default=False, help="Precision of this graph.")]


def build_command(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder, or a hub id such as openbmb/MiniCPM-V-2_6.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Bundle folder to make.")],
    adapter: Adapters = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of all graphs: float, weights in 8- or 4-bit blocks, or 8-bit integers throughout, their ranges measured "
            "beforehand (static), or in each call for all of it (dynamic) or each patch and token (token); q4 is the decoder's "
            "alone. Default: decoder q4, vision int8-token, resampler int8-token and q8, merger q8.",
            metavar=_NAMES,
            show_default=False,
        ),
    ] = None,
    vision: Override = None,
    resampler: Annotated[
        Precision | None,
        typer.Option("--resampler", "--merger", metavar=_NAMES, show_default=False, help="Precision of this graph."),
    ] = None,
    decoder: Override = None,
    target: Annotated[
        Target | None, typer.Option(help="Processor that int8 graphs are for.", show_default="this machine")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Everything else: a JSON file of settings (block sizes, methods, single layers, the README lists them), or "
            "the mcv.json of a bundle. Options above go over it.",
            show_default=False,
        ),
    ] = None,
    calibration: Calibration = None,
    prompts: Prompts = None,
    max_kl: MaxKL = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure what it cost against the checkpoint (always done with limits).")
    ] = False,
    kv: Annotated[
        Literal["float", "int8"],
        typer.Option(help="int8: add a decoder graph that keeps keys and values in 8 bits, for `mcv-run --kv int8`."),
    ] = "float",
    revision: Revision = None,
    cache_dir: CacheDir = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle. Needs little memory: weights are streamed and quantized a few rows at a time."""
    from mcv_calibration.gate import Gate
    from mcv_export.build import BuildOptions
    from mcv_export.calibrate import SampleOptions

    said = RecipeFile.read(recipe) if recipe else RecipeFile()
    overrides: dict[GraphName, Precision | None] = {
        "vision_encoder": vision,
        "resampler": resampler,
        "decoder_with_past": decoder,
    }
    wishes = Wishes(
        precision=precision,
        graphs={name: value for name, value in overrides.items() if value},
        target=target or said.target,
        settings=said.graphs,
    )
    options = BuildOptions(
        recipe=wishes.recipe(),
        samples=SampleOptions(folder=calibration, prompts=prompts, count=said.num_samples),
        force=force,
        int8_cache=kv == "int8",
    )
    gate = Gate(max_kl=max_kl, min_agreement=said.min_agreement)
    result = make_bundle(
        model,
        out,
        options,
        adapters=adapter or (),
        revision=revision,
        cache_dir=cache_dir,
        gate=gate,
        report=report,
        search=said.search,
    )
    if as_json:
        graphs = [asdict(graph) for graph in result.graphs]
        told = {"bundle": str(out), "graphs": graphs, "seconds": result.seconds, "peak_rss_mb": peak_rss_mb()}
        typer.echo(json.dumps(told, indent=2))
    else:
        print_result(result)


def make_bundle(
    model: str,
    out: Path,
    options: BuildOptions,
    *,
    adapters: Sequence[str] = (),
    revision: str | None = None,
    cache_dir: Path | None = None,
    gate: Gate | None = None,
    report: bool = False,
    search: bool = False,
) -> BuildResult:
    """Build OUT from a folder or hub id, with bars and notices on stderr."""
    from mcv_export.adapters import find_adapter
    from mcv_export.build import build
    from mcv_export.hub import locate
    from mcv_export.output_folder import check_output

    check_output(out, at_home(model), force=options.force)  # before gigabytes are fetched
    with bars() as progress:
        folder = locate(model, revision=revision, cache_dir=cache_dir)
        options = replace(options, adapters=tuple(find_adapter(one, cache_dir=cache_dir) for one in adapters))
        hub_id = None if folder == at_home(model) else model  # a path says where a checkpoint lay, not what it is
        check = None
        if search or report or (gate and not gate.open):
            from mcv_calibration.gate import Gate
            from mcv_export.report import judge
            from mcv_export.search import search_recipe

            gate, samples = gate or Gate(), open_samples(options.samples)
            if search:
                options = replace(options, recipe=search_recipe(folder, out, options, gate, samples, progress=progress))
            check = partial(
                judge,
                name=out.name,
                checkpoint=folder,
                samples=samples,
                gate=gate,
                adapters=options.adapters,
                progress=progress,
            )
        result = build(folder, out, options, model=hub_id, revision=revision, check=check, progress=progress)
    if result.samples:
        typer.echo(f"mcv-export: calibrated with {result.samples.describe()}", err=True)
    if result.notice:
        typer.echo(f"mcv-export: note: {result.notice}", err=True)
    return result


def print_result(result: BuildResult) -> None:
    """A line for each graph, and what to do next."""
    table = Table("graph", "precision", "file", "size", "time", box=None)
    for built in result.graphs:
        file = result.manifest.graphs[built.name].file
        table.add_row(built.name, built.precision, file, megabytes(built.size), f"{built.seconds:.1f} s")
    total = sum(file.size for file in result.manifest.files.values())
    table.add_row("all", "", escape(str(result.folder)), megabytes(total), f"{result.seconds:.1f} s")
    print_table(table)
    typer.echo(
        f"peak memory {peak_rss_mb():.0f} MB\n"
        f"ask it something: mcv-run -m {shlex.quote(str(result.folder))} --image photo.jpg --prompt 'What is this?'"
    )
