"""`mcv-export`: build, inspect and verify bundles."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mcv_calibration.recipe import Method, Precision, Ranges
from mcv_calibration.target import Target
from mcv_export.memory import peak_rss_mb
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.command import terminal
from mcv_runtime.errors import CheckpointError, OptionError, printable
from mcv_runtime.files import at_home

if TYPE_CHECKING:
    from mcv_calibration.samples import SampleSet
    from mcv_export.build import BuildResult
    from mcv_export.calibrate import SampleOptions

# torch takes seconds to import: the commands that need it import it themselves.

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a published MiniCPM-V checkpoint into a bundle that mcv-run answers with.",
)

Model = Annotated[str, typer.Argument(help="Checkpoint: a folder, or a hub id such as openbmb/MiniCPM-V-2_6.")]
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="FOLDER_OR_ID[@REVISION][:WEIGHT]",
        help="A fine-tune to merge: a LoRA that PEFT saved, as my-lora/ or me/my-lora@main:0.5. Several are merged one "
        "after the other.",
        show_default=False,
    ),
]
Override = Annotated[Precision | None, typer.Option(show_default=False, help="Precision of this graph.")]

MaxKL = Annotated[
    float | None,
    typer.Option("--max-kl", help="Fail (exit code 3) above this mean KL divergence of next tokens from fp32, in nats."),
]
MinAgreement = Annotated[
    float | None,
    typer.Option("--min-agreement", help="Fail (exit code 3) below this share of next tokens that are fp32's, 0 to 1."),
]


@app.command("build")
def build_command(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Bundle folder to make.")],
    adapter: Adapters = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of all graphs: float, weights in 8- or 4-bit blocks, or 8-bit integers throughout, their ranges measured "
            "beforehand (static), or in each call for all of it (dynamic) or each patch and token (token); q4 is the decoder's "
            "alone. Default: decoder q4, vision and resampler int8-token.",
            show_default=False,
        ),
    ] = None,
    vision: Override = None,
    resampler: Annotated[
        Precision | None, typer.Option("--resampler", "--merger", show_default=False, help="Precision of this graph.")
    ] = None,
    decoder: Override = None,
    mixed: Annotated[bool, typer.Option("--mixed", help="Keep a q4 decoder's embedding and head in q8.")] = False,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Weights of a block that share a scale: larger blocks decode faster, smaller ones are more accurate.",
            show_default="32",
        ),
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="How blocks are found; gptq looks at the samples, layer by layer.", show_default="rtn")
    ] = None,
    prune_ffn: Annotated[
        float | None, typer.Option(help="Leave out this part of the feed-forward channels, those that samples use least.")
    ] = None,
    target: Annotated[
        Target | None, typer.Option(help="Processor that int8 graphs are for.", show_default="this machine")
    ] = None,
    ranges: Annotated[Ranges | None, typer.Option(help="How static ranges are chosen.", show_default="percentile")] = None,
    smoothing: Annotated[
        float | None,
        typer.Option(help="How much of its inputs' outliers a layer's weight takes over, 0 to 1.", show_default="0.5"),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of pictures to measure with.", show_default="pictures drawn here")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Questions about them: .txt, or .jsonl with pictures and answers.")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="How many of them. Default: 32, or 16 of those drawn here.", show_default=False)
    ] = None,
    max_kl: MaxKL = None,
    min_agreement: MinAgreement = None,
    search: Annotated[
        bool, typer.Option("--search", help="Keep the blocks that cost most at a higher precision until the limits are met.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Measure what it cost against the checkpoint (always done with limits).")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="All of the above from a file, or from the mcv.json of a bundle.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept (default: the hub's own cache).")] = None,
    kv: Annotated[
        Literal["float", "int8"],
        typer.Option(help="int8: add a decoder graph that keeps keys and values in 8 bits, for `mcv-run --kv int8`."),
    ] = "float",
    text_graphs: Annotated[
        bool, typer.Option("--text-graphs", help="Add tokenizer.onnx and detokenizer.onnx, for hosts without Python.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a bundle.")] = False,
    as_json: Json = False,
) -> None:
    """Build a bundle. Needs little memory: weights are streamed and quantized a few rows at a time."""
    from mcv_calibration.gate import Gate
    from mcv_export.adapters import find_adapter
    from mcv_export.build import BuildOptions, build
    from mcv_export.calibrate import SampleOptions
    from mcv_export.hub import locate
    from mcv_export.output_folder import check_output
    from mcv_export.precision import Wishes, read_recipe

    gate = Gate(max_kl=max_kl, min_agreement=min_agreement)
    overrides: dict[GraphName, Precision | None] = {
        "vision_encoder": vision,
        "resampler": resampler,
        "decoder_with_past": decoder,
    }
    wishes = Wishes(
        precision=precision,
        graphs={name: value for name, value in overrides.items() if value},
        target=target,
        block_size=block_size,
        method=method,
        ranges=ranges,
        smoothing=smoothing,
        prune_ffn=prune_ffn,
        mixed=mixed,
    )
    options = BuildOptions(
        recipe=read_recipe(recipe, wishes) if recipe else wishes.recipe(),
        samples=SampleOptions(folder=calibration, prompts=prompts, count=num_samples),
        force=force,
        text_graphs=text_graphs,
        int8_cache=kv == "int8",
    )
    check_output(out, at_home(model), force=force)  # before gigabytes are fetched
    with _progress() as progress:
        folder = locate(model, revision=revision, cache_dir=cache_dir)
        adapters = tuple(find_adapter(one, cache_dir=cache_dir) for one in adapter or ())
        options = replace(options, adapters=adapters)
        hub_id = None if folder == at_home(model) else model  # a path says where a checkpoint lay, not what it is
        check = None
        if search or report or not gate.open:
            from mcv_export.report import judge
            from mcv_export.search import search_recipe

            samples = _samples(options.samples)
            if search:
                options = replace(options, recipe=search_recipe(folder, out, options, gate, samples, progress=progress))
            check = partial(
                judge,
                name=out.name,
                checkpoint=folder,
                samples=samples,
                gate=gate,
                adapters=adapters,
                progress=progress,
            )
        result = build(folder, out, options, model=hub_id, revision=revision, check=check, progress=progress)
    if result.samples:
        typer.echo(f"mcv-export: calibrated with {result.samples.describe()}", err=True)
    if result.notice:
        typer.echo(f"mcv-export: note: {result.notice}", err=True)
    if as_json:
        graphs = [asdict(graph) for graph in result.graphs]
        typer.echo(
            json.dumps(
                {"bundle": str(out), "graphs": graphs, "seconds": result.seconds, "peak_rss_mb": peak_rss_mb()}, indent=2
            )
        )
    else:
        _print_result(result)


@app.command()
def inspect(bundle: BundleFolder, as_json: Json = False) -> None:
    """Print what a bundle is: model, graphs, precisions, sizes, inputs and outputs."""
    manifest = Bundle.open(bundle).manifest
    if as_json:
        typer.echo(manifest.to_json(), nl=False)
        return
    origin = f"{manifest.model} @ {manifest.revision}" if manifest.revision else manifest.model
    total = sum(file.size for file in manifest.files.values())
    _say(f"{origin} ({manifest.family}), {_megabytes(total)} in {len(manifest.files)} files")
    for adapter in manifest.adapters:
        at = f" @ {adapter.revision}" if adapter.revision else ""
        _say(f"merged: {adapter.name}{at}, weight {adapter.weight:g}")
    _say(f"made with {', '.join(f'{name} {version}' for name, version in manifest.tools.items())}")
    processor = "" if manifest.needs.processor == "any" else f", processor {manifest.needs.processor}"
    _say(f"needs onnxruntime {manifest.needs.onnxruntime}{processor}")
    image, text, generation = manifest.image, manifest.text, manifest.generation
    _say(f"images: slices of about {image.scale_resolution} px, at most {image.max_slice_nums}; {_tokens(manifest)}")
    _say(
        f"text: vocabulary {text.vocab_size}, context {text.context_length}, repetition penalty {generation.repetition_penalty}"
    )
    for name, graph in manifest.graphs.items():
        size = sum(file.size for path, file in manifest.files.items() if path.startswith(graph.file))
        typer.echo()
        _say(f"{name}: {graph.file}, {graph.precision}, {_megabytes(size)}")
        cached = {n for entry in manifest.cache for n in (entry.input, entry.output)} if name == "decoder_with_past" else set()
        for direction, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
            for key, spec in tensors.items():
                if key not in cached:
                    _say(f"  {direction} {key}: {spec.dtype} [{', '.join(map(str, spec.shape))}]")
        if cached:
            entry = manifest.cache[0]
            _say(f"  and {len(manifest.cache)} cache tensors such as {entry.input}: {entry.dtype} {list(entry.shape)}")


@app.command()
def verify(
    bundle: BundleFolder,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint (folder or hub id): compare answers with its modules in torch.")
    ] = None,
    adapter: Adapters = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    key: Annotated[
        str | None, typer.Option(help="minisign's public key, or its file: the manifest must be signed with it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every file's sha256, the manifest's signature and, given the checkpoint, the graphs against torch on a picture."""
    signed = None
    if key is not None:
        from mcv_export.signature import PublicKey, check_signature

        signed = check_signature(bundle, PublicKey.read(key))
        if not as_json:
            typer.echo(f"signed: {signed}")
    opened = Bundle.open(bundle)
    checked = sum(1 for _ in opened.verify())
    if model is None:
        _no_adapters_alone(adapter)
        told = {"files": checked} if signed is None else {"files": checked, "signed": signed}
        typer.echo(json.dumps(told) if as_json else f"{checked} files are as built")
        return
    from mcv_export.adapters import find_adapter
    from mcv_export.hub import locate
    from mcv_export.verify import compare

    adapters = [find_adapter(one, cache_dir=cache_dir) for one in adapter or ()]
    report = compare(opened, locate(model, revision=revision, cache_dir=cache_dir), adapters)
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
    else:
        typer.echo(f"{checked} files are as built")
        for item in report.differences:
            typer.echo(f"{item.tensor} ({item.precision}): {item.describe()}")
        typer.echo(f"greedy tokens: {report.tokens_equal} of {report.tokens} equal")
    if not report.passed:
        raise CheckpointError(
            f"{report.worst.tensor} is off: {report.worst.describe()}, {report.tokens_equal} of {report.tokens} tokens equal; "
            "build the bundle again"
        )


@app.command("report")
def report_command(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundle folders.")],
    model: Annotated[
        str | None,
        typer.Option(help="Their checkpoint (folder or hub id), as the reference in place of the first bundle in fp32."),
    ] = None,
    adapter: Adapters = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads are kept.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pictures like those the model will see; else a set drawn here.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Questions: .txt, one a line, or .jsonl with pictures and answers.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples at most.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", help="Longest answer, in tokens.")] = 32,
    max_kl: MaxKL = None,
    min_agreement: MinAgreement = None,
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Also measure what each block costs by itself (with --model; slow).")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where to write the report (default: into the one bundle).")
    ] = None,
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Threads; by default one per physical core.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what quantization cost, against fp32 on the same pictures: report.json and report.html."""
    from mcv_calibration.gate import Gate
    from mcv_export.adapters import find_adapter
    from mcv_export.calibrate import SampleOptions
    from mcv_export.hub import locate
    from mcv_export.report import ReportOptions, keep, keep_in_bundle, report_on, require_report
    from mcv_export.report_table import print_report

    gate = Gate(max_kl=max_kl, min_agreement=min_agreement)
    if out is None and not as_json and len(bundles) - (model is None) > 1:
        raise OptionError("a report on several bundles belongs to none of them: say where to write it with --out FOLDER")
    if out is not None:
        require_report(out)
    checkpoint = None if model is None else locate(model, revision=revision, cache_dir=cache_dir)
    if checkpoint is None:
        _no_adapters_alone(adapter)
    adapters = [find_adapter(one, cache_dir=cache_dir) for one in adapter or ()]
    samples = _samples(SampleOptions(folder=calibration, prompts=prompts, count=num_samples))
    options = ReportOptions(max_new_tokens=max_new_tokens, threads=threads, blocks=blocks)
    with _progress() as progress:
        made = report_on(bundles, samples, checkpoint=checkpoint, adapters=adapters, options=options, progress=progress)
    if out is not None:
        keep(made, out)
    elif len(made.folders) == 1:
        out = made.folders[0]
        keep_in_bundle(made, out)
    if as_json:
        typer.echo(made.report.to_json(), nl=False)
    else:
        print_report(made.report)
        typer.echo(f"see {out}/report.html")
    for bundle in made.report.bundles:
        gate.check(bundle)


def main() -> None:
    """Entry point of `mcv-export`."""
    try:
        terminal.run(app, "mcv-export", interrupted="interrupted; nothing was kept")
    except ModuleNotFoundError as error:  # a plain install has the runtime alone
        typer.echo(
            f"mcv-export: {error.name} is not installed; get the toolchain: pip install 'minicpmv-onnx[export]'", err=True
        )
        sys.exit(terminal.USAGE)


def _no_adapters_alone(adapters: list[str] | None) -> None:
    if adapters:
        raise OptionError(f"--adapter {adapters[0]} is merged into a checkpoint: name that too, with --model")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per graph, and per measurement, on stderr."""
    columns = TextColumn("{task.description:<18}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    bars = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(graph: str, done: int, total: int) -> None:
        if not tasks:  # not before: without a bar, rich prints an empty line above an error
            bars.start()
        if graph not in tasks:
            tasks[graph] = bars.add_task(graph, total=total)
        bars.update(tasks[graph], completed=done)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()


def _samples(options: SampleOptions) -> SampleSet:
    """The samples; what could not be used is counted and named on stderr."""
    samples = options.samples()
    if samples.skipped:
        typer.echo(f"mcv-export: {len(samples.skipped)} samples skipped: {'; '.join(samples.skipped)}", err=True)
    return samples


def _print_result(result: BuildResult) -> None:
    table = Table("graph", "precision", "file", "size", "time", box=None)
    for built in result.graphs:
        file = result.manifest.graphs[built.name].file
        table.add_row(built.name, built.precision, file, _megabytes(built.size), f"{built.seconds:.1f} s")
    total = sum(file.size for file in result.manifest.files.values())
    table.add_row("all", "", escape(str(result.folder)), _megabytes(total), f"{result.seconds:.1f} s")
    Console().print(table)
    typer.echo(
        f"peak memory {peak_rss_mb():.0f} MB\n"
        f"ask it something: mcv-run -m {shlex.quote(str(result.folder))} --image photo.jpg --prompt 'What is this?'"
    )


def _say(text: str) -> None:
    """Print a line that holds texts of a bundle, which may be a stranger's."""
    typer.echo(printable(text))


def _tokens(manifest: Manifest) -> str:
    """How many visual tokens a slice makes."""
    if manifest.placeholder.tokens_per_slice is not None:
        return f"{manifest.placeholder.tokens_per_slice} tokens a slice"
    modes = (f"{mode}: one token for {spec.merge**2} patches" for mode, spec in manifest.image.downsample.items())
    return f"{', '.join(modes)}, by default {manifest.image.downsample_mode}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
