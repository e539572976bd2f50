"""The README's table of families, made from the families: this script prints it, and with `--write` puts it there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mcv_export.families import families
from mcv_export.plan import Family

ROOT = Path(__file__).parent.parent
START, END = "<!-- families -->", "<!-- /families -->"
HEAD = ("family", "sizes", "`config.json`", "vision", "compression", "language model", "inputs", "status", "verified")


def table() -> str:
    """One row a family, newest last."""
    rows = [HEAD, ("---",) * len(HEAD), *(_row(family) for family in sorted(families(), key=_generation))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(readme: Path) -> None:
    """Replace what stands between the markers."""
    before, start, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{readme} has no {START} ... {END}")
    readme.write_text(f"{before}{START}\n{table()}{END}{after}", encoding="utf-8")


def golden_cases(family: Family) -> int:
    """Cases in this repository that hold the family to its reference's numbers."""
    golden = ROOT / "tests" / "golden" / family.name / "golden.json"
    if not golden.exists():
        return 0
    cases = json.loads(golden.read_text(encoding="utf-8"))["cases"]  # by name, or with their names inside
    names = cases if isinstance(cases, dict) else [case["id"] for case in cases]
    return sum(not name.startswith("quirk_") for name in names)


def _row(family: Family) -> tuple[str, ...]:
    about = family.description
    cases = golden_cases(family)
    status = f"without {about.left_out}" if about.left_out else "complete"
    verified = f"{cases} golden cases" if cases else about.verified or "no golden data"
    facts = about.sizes, about.config, about.vision, about.compression, about.language_model, about.inputs
    return (family.title, *facts, status, verified)


def _generation(family: Family) -> tuple[bool, str]:
    return not family.name.startswith("minicpmv"), family.name


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write(ROOT / "README.md")
    else:
        print(table(), end="")
