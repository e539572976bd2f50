"""`mcv-run`: ask about pictures from a terminal. The answer alone goes to stdout, everything else to stderr."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mcv_runtime.batch.answer_fields import completion_report, regions_report
from mcv_runtime.bundle import folder as bundles
from mcv_runtime.command import cli_options, terminal
from mcv_runtime.command.progress_bar import ProgressBar, print_answer
from mcv_runtime.command.streams import is_closed
from mcv_runtime.documents.document import DPI, Document
from mcv_runtime.engine import load
from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.images import MAX_PIXELS
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.answer import Answer
from mcv_runtime.request.options import Options
from mcv_runtime.text.reading import LONGEST_PAGE, PAGE_REPEAT_GUARD, read_as

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_READING = {"max_new_tokens": LONGEST_PAGE, "repeat_guard": PAGE_REPEAT_GUARD}
"""With --to, unless said otherwise."""
_TIMINGS = ("load", "preprocess", "vision", "prefill", "decode", "longest_gap")
_DEMO = (
    "mcv-run: this is the small demo model; build a real one with `mcv-export build openbmb/MiniCPM-V-2_6 my-bundle`"
    " and name it with -m or $MCV_BUNDLE"
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version  # slow to import

        try:
            typer.echo(f"mcv-run {version('minicpmv-onnx')}")
        except PackageNotFoundError:
            typer.echo("mcv-run (not installed)")
        raise typer.Exit


def run(
    prompt: cli_options.Prompt = "",
    image: cli_options.Images = None,
    pages: cli_options.Pages = None,
    each_page: cli_options.EachPage = False,
    to: cli_options.To = None,
    video: cli_options.Videos = None,
    system: cli_options.System = None,
    as_json: cli_options.AsJson = False,
    chat: cli_options.ChatMode = False,
    batch: cli_options.Batch = None,
    out: cli_options.Out = None,
    batch_size: cli_options.BatchSize = None,
    fetch: cli_options.Fetch = None,
    compute: cli_options.ComputeEngine = "here",
    address: cli_options.Address = None,
    workers: cli_options.Workers = None,
    dpi: cli_options.Dpi = None,
    max_pixels: cli_options.MaxPixels = MAX_PIXELS,
    bundle: cli_options.BundleFolder = None,
    threads: cli_options.Threads = None,
    memory_mb: cli_options.MemoryMb = None,
    no_reuse: cli_options.NoReuse = False,
    cache_dir: cli_options.CacheDir = None,
    cache_dir_mb: cli_options.CacheDirMb = None,
    low_memory: cli_options.LowMemory = False,
    kv: cli_options.Kv = None,
    provider: cli_options.Provider = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    **request_options: Any,
) -> int:
    """Ask a MiniCPM-V model about pictures."""
    options = cli_options.request_options(request_options)
    load_options = _given(
        threads=threads,
        max_pixels=max_pixels,
        memory_mb=memory_mb,
        reuse=False if no_reuse else None,
        cache_dir=cache_dir,
        cache_dir_mb=cache_dir_mb,
        low_memory=low_memory or None,
        kv=kv,
        provider=provider,
    )
    each_page = each_page or to is not None
    if to is not None:
        _refuse((bool(prompt), "--to asks with the published prompt; leave out --prompt"))
        prompt = read_as("text" if to == "text" else "markdown")
        options = Options.of(options, {**_READING, **options.given()})
    named = image or ()
    documents = [Document(path, pages, DPI if dpi is None else dpi) for path in named]
    in_pages = each_page or pages is not None or dpi is not None  # else a PDF still is a document, any other a picture
    seen: list[Path | Document | Video] = [*(documents if in_pages else named), *(Video(path) for path in video or ())]
    several = (options.num_return_sequences or 1) > 1
    _refuse(
        (chat and batch is not None, "--chat and --batch exclude each other"),
        ((chat or batch is not None) and as_json, "--json is for one question; leave it out"),
        (batch is not None and bool(seen), "with --batch, every row names its own pictures; leave out --image and --video"),
        (
            batch is None and (out is not None or batch_size is not None or bool(fetch)),
            "--out, --batch-size and --fetch need --batch",
        ),
        (batch is None and compute == "ray", "--engine ray is for --batch"),
        (compute == "here" and (address is not None or workers is not None), "--address and --workers need --engine ray"),
        (chat and each_page, "a conversation is about all pages; leave out --each-page and --to"),
        (each_page and bool(video), "a video has no pages; leave out --each-page and --to"),
        (each_page and batch is None and not image, "--each-page and --to need --image or --batch"),
        (batch is None and not image and (pages is not None or dpi is not None), "--pages and --dpi need --image or --batch"),
        (chat and several, "a conversation goes on from one answer; leave out --num-return-sequences"),
        (batch is None and is_closed(sys.stdout), "stdout is closed, so that no answer can be given; leave it open"),
        (bool(options.logprobs) and batch is None and not as_json, "--logprobs needs --json or --batch, which show them"),
    )
    folder = cli_options.chosen_bundle(bundle)
    is_demo = folder == bundles.DEFAULT
    # What not every command needs is imported where it is needed: a short question is mostly imports.
    if batch is not None:
        from mcv_runtime.batch.remote import fetched_folders, place_of
        from mcv_runtime.batch.rows import Defaults, Paging
        from mcv_runtime.command.batch_cli import BATCH_SIZE, answer_batch, check_batch, run_batch

        size = BATCH_SIZE if batch_size is None else batch_size
        source = place_of(batch)
        target = check_batch(source, None if out is None else place_of(out), size)
        fetched = fetched_folders(fetch or ())
        engine = load(folder, max_rows=size, **load_options) if compute == "here" else None
        model = (bundles.Bundle.open(folder) if engine is None else engine.bundle).identity
        _say(_DEMO if is_demo else "")
        defaults = Defaults(
            prompt=prompt,
            system=system,
            options=options,
            model=model,
            paging=Paging(pages, DPI if dpi is None else dpi, each_page),
            max_pixels=max_pixels,
            fetch=fetched,
        )
        if engine is not None:
            return answer_batch(engine, source, target, defaults, size)
        from mcv_runtime.distributed.ray_workers import RayWorkers

        with RayWorkers(folder, load_options, size, model=model, address=address, workers=workers) as answerers:
            return run_batch(answerers, source, target, defaults)
    if chat:
        from mcv_runtime.command.chat_cli import TerminalChat, chat_lines

        talk = TerminalChat(load(folder, **load_options), system=system, options=options, max_pixels=max_pixels)
        talk.show(seen)
        _say(_DEMO if is_demo else "")
        return talk.run(itertools.chain([prompt] if prompt else [], chat_lines()))
    engine = load(folder, open_vision=bool(seen), **load_options)  # a question without pictures need not wait for the tower
    if each_page:
        from mcv_runtime.command.pages_cli import PageAnswers

        code = PageAnswers(engine, documents, "json" if as_json else to or "text", max_pixels=max_pixels).run(
            prompt, system, options, partial(report, regions=bool(options.grounding))
        )
        _say(_DEMO if is_demo else "")
        return code
    bar = ProgressBar(sys.stderr)
    ticket = engine.stream(seen, prompt, system=system, options=options, progress=bar)
    if as_json:
        try:
            answer = ticket.result()
        finally:
            bar.close()
        print(json.dumps(report(answer, regions=bool(options.grounding)), ensure_ascii=False))
    else:
        for other in print_answer(ticket, bar).alternatives:
            print(other.text)
    _say(_DEMO if is_demo else "")  # after the answer: a mistake gets its own line alone
    return 0


def _with_request_options() -> Callable[..., int]:
    """The command with a parameter for every option of a request, before those of model and machine."""
    own = list(inspect.signature(run, eval_str=True).parameters.values())[:-1]
    parameters = [*own[:16], *cli_options.request_parameters(), *own[16:]]

    @functools.wraps(run)
    def command(**values: Any) -> int:
        return run(**values)

    ordered = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    del command.__wrapped__
    return command


app.command(cls=cli_options.GroupedCommand, epilog="mcv-run tune BUNDLE: find the fastest settings for this machine.")(
    _with_request_options()
)


def _refuse(*clashes: tuple[bool, str]) -> None:
    for clash, line in clashes:
        if clash:
            raise OptionError(line)


def _say(line: str) -> None:
    if line:
        typer.echo(line, err=True)


def _given(**values: Any) -> dict[str, Any]:
    """What was said on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def report(answer: Answer, *, regions: bool = False) -> dict[str, Any]:
    """The object that `--json` prints; `regions`: with the places that the text names in the one picture."""
    timings = answer.timings
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "images": [
            {
                "size": picture.size,
                **({} if picture.page is None else {"page": picture.page.number, "page_size": picture.page.size}),
                "grid": [picture.grid.columns, picture.grid.rows] if picture.grid.columns else None,
                "slice_sizes": picture.grid.sizes,
                "visual_tokens": len(picture.embeds),
            }
            for picture in answer.pictures
        ],
        "timings_s": {name: round(getattr(timings, name), 4) for name in _TIMINGS},
        "tokens_per_s": None if answer.tokens_per_s is None else round(answer.tokens_per_s, 2),
        "peak_rss_mb": _peak_rss_mb(),
        "stop_reason": answer.stop_reason,
        "logprobs": answer.logprobs,
        "score": answer.score,
        "alternatives": [completion_report(other) for other in answer.alternatives],
        "reused_tokens": answer.reused_tokens,
        "drafted": answer.drafted,
        "accepted": answer.accepted,
        **regions_report(answer, asked=regions),
    }


def _peak_rss_mb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def main() -> None:
    """Entry point of `mcv-run`."""
    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata and large pictures: the user has our own line
    if sys.argv[1:2] == ["tune"]:
        from mcv_runtime.command import tune_cli

        terminal.run(tune_cli.app, "mcv-run")
    else:
        terminal.run(app, "mcv-run")


if __name__ == "__main__":
    main()
