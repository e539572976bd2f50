"""What the commands of `mcv-export` have in common: options by the same names, bars on stderr, how sizes are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from mcv_calibration.samples import SampleSet
    from mcv_export.calibrate import SampleOptions

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
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where downloads are kept (default: the hub's own cache).")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of pictures like those the model will see; else a set drawn here.", show_default=False
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Questions about them: .txt, one a line, or .jsonl with pictures and answers.", show_default=False
    ),
]
MaxKL = Annotated[
    float | None,
    typer.Option("--max-kl", help="Fail (exit code 3) above this mean KL divergence of next tokens from fp32, in nats."),
]


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar per graph, and per measurement, on stderr."""
    columns = TextColumn("{task.description:<18}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, TaskID] = {}

    def show(graph: str, done: int, total: int) -> None:
        if not tasks:  # not before: without a bar, rich prints an empty line above an error
            progress.start()
        if graph not in tasks:
            tasks[graph] = progress.add_task(graph, total=total)
        progress.update(tasks[graph], completed=done)

    try:
        yield show
    finally:
        if tasks:
            progress.stop()


def print_table(table: Table) -> None:
    """To stdout, as wide as it has to be: a name that is cut to a terminal's width can be neither read nor copied."""
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1 << 16), table).maximum
    Console(width=max(console.width, needed)).print(table)


def open_samples(options: SampleOptions) -> SampleSet:
    """What is measured on; what could not be used is counted and named on stderr."""
    samples = options.measuring()
    if samples.skipped:
        typer.echo(f"mcv-export: {len(samples.skipped)} samples skipped: {'; '.join(samples.skipped)}", err=True)
    return samples


def megabytes(size: int) -> str:
    """A number of bytes in a reader's words."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
