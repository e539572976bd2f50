"""CONTRIBUTING's picture of the runtime, drawn from its imports: this script prints it, and with `--write` puts it there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
START, END = "<!-- rooms -->", "<!-- /rooms -->"
ASIDE = {"errors", "facts", "files", "locks", "panics", "progress", "writing"}
"""What nearly every room imports: their arrows would hide the others."""


def picture() -> str:
    """A Mermaid flowchart; an arrow that follows from two others is left out."""
    graph = grimp.build_graph("mcv_runtime", cache_dir=None)
    files: Counter[str] = Counter()
    arrows: set[tuple[str, str]] = set()
    for module in graph.modules:
        room = _room(module)
        if room is None or room in ASIDE:
            continue
        files[room] += not graph.find_children(module)
        for imported in graph.find_modules_directly_imported_by(module):
            other = _room(imported)
            if other not in {None, room, *ASIDE}:
                arrows.add((room, str(other)))
    lines = ["```mermaid", "flowchart TD"]
    for room, count in sorted(files.items()):
        lines.append(f'  {room}["{room}{f"<br>{count} files" if count > 1 else ""}"]')
    lines += [f"  {room} --> {other}" for room, other in sorted(_direct(arrows))]
    return "\n".join([*lines, "```", ""])


def _room(module: str) -> str | None:
    """The room or the module beside the rooms that a module is in; None for the package itself."""
    _, *parts = module.split(".")
    return parts[0] if parts else None


def _direct(arrows: set[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Those without a longer way from the same start to the same end."""
    next_to = {start: {end for one, end in arrows if one == start} for start, _ in arrows}

    def reaches(start: str) -> set[str]:
        return set().union(*({one} | reaches(one) for one in next_to.get(start, ())))

    for start, end in arrows:
        if not any(end in reaches(other) for other in next_to[start] - {end}):
            yield start, end


def main() -> None:
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(picture())
        return
    page = ROOT / "CONTRIBUTING.md"
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{page} has no {START} ... {END}")
    page.write_text(f"{before}{START}\n{picture()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
