"""`mcv-run tune`: find the fastest settings for a bundle on this machine, and remember them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.command.cli_options import chosen_bundle
from mcv_runtime.command.progress_bar import ProgressBar
from mcv_runtime.errors import OptionError
from mcv_runtime.sessions.machine import check_machine
from mcv_runtime.sessions.profile import keep_profile
from mcv_runtime.tuning.tune import ANSWER, PROMPT, SECONDS, SLICES, Trial, Tuning, tune

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_COLUMNS = ("setting", "value", "slice s", "prompt tokens/s", "answer tokens/s", "question s")


@app.callback()
def _command() -> None:
    """A group, so that `tune` is a word of the command line."""


@app.command("tune")
def run(
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the model; else $MCV_BUNDLE, else the demo.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="How long to try.")] = SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the fastest settings for a model on this machine: threads, pieces of a prompt, slices at once, keys and values.

    mcv-run, mcv-serve and load() use them from then on, for what they are not told otherwise. What was found is a small file in
    $MCV_CACHE or the user's cache folder, which may be deleted at any time.
    """
    if not 0 < seconds < math.inf:
        raise OptionError(f"--seconds must be above 0, not {seconds}")
    opened = Bundle.open(chosen_bundle(bundle))
    check_machine(opened.manifest.needs)
    bar = ProgressBar(sys.stderr)
    try:
        found = tune(opened, seconds=seconds, show=bar.show)
    finally:
        bar.close()
    path = keep_profile(found.profile)
    if as_json:
        trials = [{k: None if v != v else v for k, v in asdict(trial).items()} for trial in found.trials]
        print(json.dumps({"profile": asdict(found.profile), "path": str(path), "complete": found.complete, "trials": trials}))
        return
    print(table(found))
    typer.echo(f"mcv-run: kept in {path}, which may be deleted", err=True)
    if not found.complete:
        typer.echo("mcv-run: there was no time to try everything; give it more with --seconds", err=True)


def table(tuning: Tuning) -> str:
    """Every trial, the chosen ones marked; a question is what its measured parts take together."""
    rows = [_COLUMNS, *(_row(trial) for trial in tuning.trials)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"* chosen; a question: {SLICES} slices, {PROMPT} tokens to read, {ANSWER} to answer"])


def _row(trial: Trial) -> tuple[str, ...]:
    def shown(value: float, digits: int) -> str:
        return "" if math.isnan(value) else f"{value:.{digits}f}"

    return (
        trial.setting,
        f"{trial.value}{' *' if trial.chosen else '  '}",
        shown(trial.slice_s, 3),
        shown(1 / trial.token_s, 1),
        shown(1 / trial.step_s, 1),
        shown(trial.question_s, 2),
    )
