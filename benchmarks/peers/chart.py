"""Draw a race's result: bars of every peer in every measure, ours in colour, as SVG.

python benchmarks/peers/chart.py benchmarks/results/peers-minicpmv4_6.json > peers.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

LABELS = {
    "decode_0": ("tokens / s, decoding", 1.0),
    "decode_1024": ("tokens / s, decoding behind 1,024 tokens", 1.0),
    "prefill_512": ("tokens / s, reading 512 tokens", 512.0),
    "slice": ("slices / s, 448 x 448 pixels", 1.0),
    "cold picture: first_token": ("s to the first token about a picture, fresh process", None),
    "cold text: first_token": ("s to the first token without a picture, fresh process", None),
    "cold picture: peak_rss_mb": ("MB of memory at most, with a picture", None),
}
"""Of the measures that are drawn: what the bars say, and of how much their seconds are; None: as it is, less is better."""
WIDTH, NAMES, BAR, GAP, HEAD = 760, 220, 18, 4, 30


def draw(result: dict[str, Any]) -> str:
    """The chart of what has been measured so far."""
    parts, y = list[str](), 8.0
    for measure, (label, amount) in LABELS.items():
        peers = result["summary"].get(measure)
        if not peers:
            continue
        values = {name: amount / entry["median"] if amount else entry["median"] for name, entry in peers.items()}
        ordered = sorted(values.items(), key=lambda item: item[1], reverse=amount is not None)
        better = "more" if amount else "less"
        parts.append(f'<text x="0" y="{y + 14}" class="head">{escape(label)} ({better} is better)</text>')
        y += HEAD - 8
        most = max(values.values())
        for name, value in ordered:
            length = (WIDTH - NAMES - 70) * value / most
            kind = "ours" if name.startswith("mcv") else "other"
            parts.append(f'<text x="{NAMES - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect x="{NAMES}" y="{y}" width="{length:.1f}" height="{BAR}" class="{kind}"/>')
            parts.append(f'<text x="{NAMES + length + 6:.1f}" y="{y + 13}">{_number(value)}</text>')
            y += BAR + GAP
        y += 14
    style = (
        "text{font:12px sans-serif;fill:#333}.head{font-weight:bold}.ours{fill:#c2410c}.other{fill:#94a3b8}"
        "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    )
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}">\n<style>{style}</style>\n{body}\n</svg>\n'


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    print(draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
