"""The report in a terminal: its samples, its progress and its figures."""

from __future__ import annotations

from collections.abc import Iterator

import typer
from rich.table import Table

from mcv_calibration.accuracy import Speed
from mcv_calibration.gate import costliest
from mcv_calibration.intervals import Share
from mcv_calibration.report import BundleReport, Report
from mcv_export.command import print_table

_UNKNOWN = Speed(vision_s=None, prefill_tokens_per_s=None, decode_tokens_per_s=None)


def print_report(report: Report) -> None:
    """One row for each bundle, how sure the shares are, and the layers that cost each most."""
    table = Table("", "MB", "KL", "agree", "same", "right", "ms/slice", "prefill/s", "decode/s", box=None, pad_edge=False)
    for bundle in (report.reference, *report.bundles):
        table.add_row(*_row(bundle))
    print_table(table)
    left_out = f"; {report.calibrated} more calibrated" if report.calibrated else ""
    typer.echo(f"on {len(report.samples)} samples from {report.source} that calibrated nothing{left_out}")
    typer.echo("same, right: answers that are the reference's, that are known to be right; /s: tokens a second")
    for bundle in report.bundles:
        if bundle.accuracy is not None:
            typer.echo(f"{bundle.name}: {'; '.join(_sure(bundle))} (95 %)")
        if layers := costliest(bundle):
            named = ", ".join(f"{layer.graph} {layer.path} (+{layer.added:.1%})" for layer in layers)
            typer.echo(f"{bundle.name}: the layers that cost most are {named}")


def _sure(bundle: BundleReport) -> Iterator[str]:
    """Each figure with its interval."""
    assert bundle.accuracy is not None
    for error in bundle.accuracy.served:
        where = ", keys and values in 8 bits" if error is bundle.accuracy.int8_cache else ""
        if error.kl_interval is not None:
            yield f"KL {error.kl_mean:.2g} ({error.kl_interval.low:.2g} to {error.kl_interval.high:.2g}){where}"
        yield f"{_share(error.agreeing)} of {error.tokens} tokens agree{where}"
    yield f"{_share(bundle.same)} of answers same"
    if bundle.right is not None:
        yield f"{_share(bundle.right)} right"


def _share(share: Share) -> str:
    return f"{share.value:.1%} ({share.interval.low:.1%} to {share.interval.high:.1%})"


def _row(bundle: BundleReport) -> list[str]:
    whole = None if bundle.accuracy is None else bundle.accuracy.together
    speed, times = bundle.speed or _UNKNOWN, bundle.speedup or _UNKNOWN
    return [
        bundle.name,
        "" if bundle.size is None else f"{bundle.size / 1e6:,.1f}",
        "" if whole is None else f"{whole.kl_mean:.2g}",
        "" if whole is None else f"{whole.agreement:.1%}",
        "" if whole is None else f"{bundle.same.hits}/{bundle.same.total}",
        "" if bundle.right is None else f"{bundle.right.hits}/{bundle.right.total}",
        _timed(None if speed.vision_s is None else 1000 * speed.vision_s, times.vision_s),
        _timed(speed.prefill_tokens_per_s, times.prefill_tokens_per_s),
        _timed(speed.decode_tokens_per_s, times.decode_tokens_per_s),
    ]


def _timed(value: float | None, times: float | None) -> str:
    if value is None:
        return ""
    figure = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return figure if times is None else f"{figure} ({times:.2f}x)"
