"""Exact match of bundles of models/tiny on held-out pictures, answered by mcv_runtime: what each precision costs.

python benchmarks/quality.py                       build fp32, q8 and q4 of models/tiny and compare them
python benchmarks/quality.py --bundle my-bundle    a bundle of models/tiny that was built before
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
sys.path.insert(0, str(TINY))

from questions import Example  # noqa: E402 - models/tiny is a folder of scripts, not a package
from scenes import held_out  # noqa: E402

from mcv_calibration.recipe import Precision  # noqa: E402
from mcv_export.build import BuildOptions, build  # noqa: E402
from mcv_runtime import Engine, load  # noqa: E402

RESULTS = Path(__file__).parent / "results"
LONGEST = 48
"""Tokens of the longest answer, with room to be wrong."""


def right_answers(engine: Engine, examples: Sequence[Example]) -> Iterator[bool]:
    """Whether each example is answered to the letter."""
    for example in examples:
        answer = engine.ask(list(example.images), example.question, max_new_tokens=LONGEST)
        yield answer.text == example.answer


def exact_match(engine: Engine, examples: Sequence[Example]) -> dict[str, float]:
    """Percent of right answers by kind of question, and in all."""
    right: dict[str, list[bool]] = {}
    for example, good in zip(examples, right_answers(engine, examples), strict=True):
        right.setdefault(example.kind, []).append(good)
        right.setdefault("all", []).append(good)
    return {kind: 100 * sum(goods) / len(goods) for kind, goods in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", default=[])
    parser.add_argument("--precision", choices=("fp32", "q8", "q4"), action="append", default=[])
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"write the figures to this file (for example {RESULTS}/tiny-quality.json)")
    arguments = parser.parse_args()
    examples = list(held_out(arguments.count, arguments.seed))
    precisions: list[Precision] = arguments.precision or ([] if arguments.bundle else ["fp32", "q8", "q4"])
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundles = {str(path): path for path in arguments.bundle}
        for precision in precisions:
            options = BuildOptions(precision=precision, block_size=arguments.block_size)
            bundles[precision] = build(TINY / "checkpoint", Path(folder) / precision, options).folder
        for name, bundle in bundles.items():
            figures[name] = exact_match(load(bundle), examples)
            print(f"{name}: {figures[name]['all']:.1f} % of {len(examples)} to the letter", file=sys.stderr)
    kinds = list(next(iter(figures.values())))
    print("| kind | " + " | ".join(figures) + " |\n|---|" + "---|" * len(figures))
    for kind in kinds:
        print(f"| {kind} | " + " | ".join(f"{figure[kind]:.1f}" for figure in figures.values()) + " |")
    if arguments.out:
        result = {"examples": len(examples), "seed": arguments.seed, "block_size": arguments.block_size, "exact_match": figures}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
