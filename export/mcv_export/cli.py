"""`mcv-export`: build, inspect and verify bundles."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mcv_export.build_command import build_command
from mcv_export.command import (
    Adapters,
    BundleFolder,
    CacheDir,
    Calibration,
    Json,
    MaxKL,
    Prompts,
    Revision,
    bars,
    megabytes,
    open_samples,
)
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import Manifest
from mcv_runtime.command import terminal
from mcv_runtime.errors import CheckpointError, OptionError, printable

# torch takes seconds to import: the commands that need it import it themselves.

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a published MiniCPM-V checkpoint into a bundle that mcv-run answers with.",
)

MinAgreement = Annotated[
    float | None,
    typer.Option("--min-agreement", help="Fail (exit code 3) below this share of next tokens that are fp32's, 0 to 1."),
]

app.command("build")(build_command)


@app.command()
def inspect(bundle: BundleFolder, as_json: Json = False) -> None:
    """Print what a bundle is: model, graphs, precisions, sizes, inputs and outputs."""
    manifest = Bundle.open(bundle).manifest
    if as_json:
        typer.echo(manifest.to_json(), nl=False)
        return
    origin = f"{manifest.model} @ {manifest.revision}" if manifest.revision else manifest.model
    total = sum(file.size for file in manifest.files.values())
    _say(f"{origin} ({manifest.family}), {megabytes(total)} in {len(manifest.files)} files")
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
        _say(f"{name}: {graph.file}, {graph.precision}, {megabytes(size)}")
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
    revision: Revision = None,
    cache_dir: CacheDir = None,
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
    revision: Revision = None,
    cache_dir: CacheDir = None,
    calibration: Calibration = None,
    prompts: Prompts = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Samples at most. Default: 32, up to 512 tokens of answers.", show_default=False)
    ] = None,
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
    samples = open_samples(SampleOptions(folder=calibration, prompts=prompts, count=num_samples))
    options = ReportOptions(max_new_tokens=max_new_tokens, threads=threads, blocks=blocks)
    with bars() as progress:
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


def _say(text: str) -> None:
    """Print a line that holds texts of a bundle, which may be a stranger's."""
    typer.echo(printable(text))


def _tokens(manifest: Manifest) -> str:
    """How many visual tokens a slice makes."""
    if manifest.placeholder.tokens_per_slice is not None:
        return f"{manifest.placeholder.tokens_per_slice} tokens a slice"
    modes = (f"{mode}: one token for {spec.merge**2} patches" for mode, spec in manifest.image.downsample.items())
    return f"{', '.join(modes)}, by default {manifest.image.downsample_mode}"
