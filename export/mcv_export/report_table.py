"""The report in a terminal: its samples, its progress and its figures."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.table import Table

from mcv_calibration.accuracy import Speed
from mcv_calibration.gate import costliest
from mcv_calibration.report import BundleReport, Report

_UNKNOWN = Speed(vision_s=None, prefill_tokens_per_s=None, decode_tokens_per_s=None)


def print_report(report: Report) -> None:
    """One row for each bundle, and the layers that cost each most."""
    table = Table("", "MB", "KL", "agree", "same", "right", "ms/slice", "prefill/s", "decode/s", box=None, pad_edge=False)
    for bundle in (report.reference, *report.bundles):
        table.add_row(*_row(bundle, report))
    Console().print(table)
    typer.echo("same, right: answers that are the reference's, that are known to be right; /s: tokens a second")
    for bundle in report.bundles:
        if layers := costliest(bundle):
            named = ", ".join(f"{layer.graph} {layer.path} (+{layer.added:.1%})" for layer in layers)
            typer.echo(f"{bundle.name}: the layers that cost most are {named}")


def _row(bundle: BundleReport, report: Report) -> list[str]:
    whole = None if bundle.accuracy is None else bundle.accuracy.together
    samples = len(report.samples)
    speed, times = bundle.speed or _UNKNOWN, bundle.speedup or _UNKNOWN
    return [
        bundle.name,
        "" if bundle.size is None else f"{bundle.size / 1e6:,.1f}",
        "" if whole is None else f"{whole.kl_mean:.2g}",
        "" if whole is None else f"{whole.agreement:.1%}",
        "" if whole is None else f"{bundle.as_reference}/{samples}",
        f"{bundle.right}/{report.known}" if report.known else "",
        _timed(None if speed.vision_s is None else 1000 * speed.vision_s, times.vision_s),
        _timed(speed.prefill_tokens_per_s, times.prefill_tokens_per_s),
        _timed(speed.decode_tokens_per_s, times.decode_tokens_per_s),
    ]


def _timed(value: float | None, times: float | None) -> str:
    if value is None:
        return ""
    figure = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return figure if times is None else f"{figure} ({times:.2f}x)"
