"""`mcv-run`: ask about pictures from a terminal. The answer alone goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from mcv_runtime import bundle as bundles
from mcv_runtime import terminal
from mcv_runtime.answers import Answer
from mcv_runtime.engine import Options, load
from mcv_runtime.images import MAX_PIXELS
from mcv_runtime.manifest import SmallImageUpsize
from mcv_runtime.video import Video

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_DEMO = (
    "mcv-run: this was the small demo model; build a real one with `mcv-export build openbmb/MiniCPM-V-2_6 my-bundle`"
    " and name it with -m or $MCV_BUNDLE"
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"mcv-run {version('minicpmv-onnx')}")
        except PackageNotFoundError:
            typer.echo("mcv-run (not installed)")
        raise typer.Exit


@app.command()
def run(
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="What to ask.")] = "",
    image: Annotated[list[Path] | None, typer.Option("--image", help="A picture to ask about; may be repeated.")] = None,
    video: Annotated[
        list[Path] | None, typer.Option("--video", help="A video to ask about (needs PyAV); may be repeated.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("-m", "--bundle", help="Folder of the model; else $MCV_BUNDLE, else the demo.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("-n", "--max-new-tokens", help="Longest answer, in tokens.")] = None,
    threads: Annotated[int | None, typer.Option("-t", "--threads", help="Threads; by default one per physical core.")] = None,
    max_slice_nums: Annotated[int | None, typer.Option(help="Most slices that a picture is cut into.")] = None,
    use_image_id: Annotated[
        bool | None,
        typer.Option("--use-image-id/--no-use-image-id", help="Number the pictures in the prompt.", show_default=False),
    ] = None,
    downsample_mode: Annotated[
        str | None, typer.Option(help="Pixels behind a visual token: 16x is faster, 4x sees more, if the model has them.")
    ] = None,
    small_image_upsize: Annotated[
        SmallImageUpsize | None, typer.Option(help="Whether small pictures are enlarged.", show_default=False)
    ] = None,
    max_num_frames: Annotated[int | None, typer.Option(help="Most frames that are taken of a video.")] = None,
    stack_frames: Annotated[int | None, typer.Option(help="Frames of each second that are looked at.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first, if it knows how.")] = False,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    max_pixels: Annotated[int, typer.Option(help="Refuse larger pictures.")] = MAX_PIXELS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the answer and what it took.")] = False,
    show_version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Ask a MiniCPM-V model about pictures."""
    options: Options = {
        "max_slice_nums": max_slice_nums,
        "use_image_id": use_image_id,
        "thinking": thinking,
        "downsample_mode": downsample_mode,
        "small_image_upsize": small_image_upsize,
        "max_num_frames": max_num_frames,
        "stack_frames": stack_frames,
    }
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if repetition_penalty is not None:
        options["repetition_penalty"] = repetition_penalty
    folder = _bundle(bundle)
    engine = load(folder, threads=threads, max_pixels=max_pixels)
    seen: list[Path | Video] = [*(image or ()), *(Video(path) for path in video or ())]
    if as_json:
        answer = engine.ask(seen, prompt, system=system, **options)
        print(json.dumps(report(answer), ensure_ascii=False))
    else:
        for piece in engine.stream(seen, prompt, system=system, **options):
            print(piece, end="", flush=True)
        print()
    if folder == bundles.DEFAULT:  # after the answer: a mistake gets its own line alone
        typer.echo(_DEMO, err=True)


def _bundle(named: Path | None) -> Path:
    if named is not None:
        return named
    if from_environment := os.environ.get("MCV_BUNDLE"):
        return Path(from_environment)
    return bundles.DEFAULT


def report(answer: Answer) -> dict[str, Any]:
    """The object that `--json` prints."""
    timings = answer.timings
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "prompt_tokens": answer.prompt_tokens,
        "images": [
            {
                "size": picture.size,
                "grid": [picture.grid.columns, picture.grid.rows] if picture.grid.columns else None,
                "slice_sizes": picture.grid.sizes,
                "visual_tokens": len(picture.embeds),
            }
            for picture in answer.pictures
        ],
        "timings_s": {name: round(getattr(timings, name), 4) for name in ("load", "preprocess", "vision", "prefill", "decode")},
        "tokens_per_s": None if answer.tokens_per_s is None else round(answer.tokens_per_s, 2),
        "peak_rss_mb": _peak_rss_mb(),
        "stop_reason": answer.stop_reason,
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
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    terminal.run(app, "mcv-run")


if __name__ == "__main__":
    main()
