"""Exact match of bundles of models/tiny on held-out pictures, answered by mcv_runtime: what each recipe costs.

python benchmarks/quality.py                                    all recipes, and those with outliers
python benchmarks/quality.py --recipe q4 --recipe int8-static   some of them
python benchmarks/quality.py --bundle my-bundle                 a bundle of models/tiny that was built before

Recipes that need samples are calibrated on pictures that are held out too, but are others than those asked about.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
sys.path.insert(0, str(TINY))

from outliers import Kind, add_outliers  # noqa: E402
from questions import Example  # noqa: E402 - models/tiny is a folder of scripts, not a package
from scenes import held_out  # noqa: E402

from mcv_calibration.precisions import Precision  # noqa: E402
from mcv_export.build import BuildOptions, build  # noqa: E402
from mcv_export.calibrate import SampleOptions  # noqa: E402
from mcv_export.precision import Wishes  # noqa: E402
from mcv_runtime import Engine, Options, Request, load  # noqa: E402
from mcv_runtime.bundle.manifest import GraphName  # noqa: E402

RESULTS = Path(__file__).parent / "results"
LONGEST = 48
"""Tokens of the longest answer, with room to be wrong."""


def right_answers(engine: Engine, examples: Sequence[Example]) -> Iterator[bool]:
    """Whether each example is answered to the letter."""
    options = Options(max_new_tokens=LONGEST)
    requests = (Request(list(example.images), example.question, options=options) for example in examples)
    for example, ticket in zip(examples, engine.submit_all(requests), strict=True):
        yield ticket.result().text == example.answer


def exact_match(engine: Engine, examples: Sequence[Example]) -> dict[str, float]:
    """Percent of right answers by kind of question, and in all."""
    right: dict[str, list[bool]] = {}
    for example, good in zip(examples, right_answers(engine, examples), strict=True):
        right.setdefault(example.kind, []).append(good)
        right.setdefault("all", []).append(good)
    return {kind: 100 * sum(goods) / len(goods) for kind, goods in sorted(right.items())}


STATIC: dict[GraphName, Precision] = {"vision_encoder": "int8-static", "resampler": "int8-static"}
DYNAMIC: dict[GraphName, Precision] = {"vision_encoder": "int8-dynamic", "resampler": "int8-dynamic"}
RECIPES: dict[str, Wishes] = {
    "fp32": Wishes(precision="fp32"),
    "int8-static vision": Wishes(precision="fp32", graphs=STATIC),
    "int8-dynamic vision": Wishes(precision="fp32", graphs=DYNAMIC),
    "q8": Wishes(precision="q8"),
    "q4": Wishes(precision="q4"),
    "q4 gptq": Wishes(precision="q4", method="gptq"),
    "int8-static + q4 gptq": Wishes(precision="q4", graphs=STATIC, method="gptq"),
    "outliers: fp32": Wishes(precision="fp32"),
    "outliers: naive int8-static": Wishes(precision="fp32", graphs=STATIC, ranges="minmax", smoothing=0.0),
    "outliers: int8-static": Wishes(precision="fp32", graphs=STATIC),
    "outliers: int8-dynamic": Wishes(precision="fp32", graphs=DYNAMIC),
    "outliers: naive q8": Wishes(precision="q8", smoothing=0.0),
    "outliers: q8": Wishes(precision="q8"),
    "outliers: q4": Wishes(precision="q4"),
    "outliers: int8-static + q4 gptq": Wishes(precision="q4", graphs=STATIC, method="gptq"),
    "all outliers: fp32": Wishes(precision="fp32"),
    "all outliers: default": Wishes(),
    "all outliers: int8-dynamic": Wishes(graphs=DYNAMIC),
    "all outliers: q8": Wishes(precision="q8"),
}
SAMPLES, SAMPLE_SEED = 48, 1000


def write_samples(folder: Path) -> SampleOptions:
    """Pictures and questions to calibrate with, as a user would have them."""
    folder.mkdir()
    rows = []
    for number, example in enumerate(held_out(SAMPLES, SAMPLE_SEED)):
        names = [f"{number}-{index}.png" for index, _ in enumerate(example.images)]
        for name, image in zip(names, example.images, strict=True):
            image.save(folder / name)
        rows.append({"images": names, "prompt": example.question, "answer": example.answer})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(lines, encoding="utf-8")
    return SampleOptions(folder=folder, prompts=folder / "prompts.jsonl", count=SAMPLES, store=folder.with_name("store"))


def build_recipes(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """A bundle of each recipe, by its name, of the model that it is about."""
    samples = write_samples(folder / "samples")
    checkpoints = {
        "outliers": add_outliers(TINY / "checkpoint", folder / "outliers"),
        "all outliers": add_outliers(TINY / "checkpoint", folder / "all-outliers", kinds=get_args(Kind)),
    }
    bundles = {}
    for number, name in enumerate(names):
        checkpoint = checkpoints.get(name.partition(":")[0], TINY / "checkpoint")
        options = BuildOptions(recipe=RECIPES[name].recipe(), samples=samples)
        bundles[name] = build(checkpoint, folder / f"bundle-{number}", options).folder
    return bundles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", default=[])
    parser.add_argument("--recipe", choices=RECIPES, action="append", default=[])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"write the figures to this file (for example {RESULTS}/tiny-quality.json)")
    arguments = parser.parse_args()
    examples = list(held_out(arguments.count, arguments.seed))
    names: list[str] = arguments.recipe or ([] if arguments.bundle else list(RECIPES))
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, bundle in ({str(path): path for path in arguments.bundle} | build_recipes(names, Path(folder))).items():
            figures[name] = exact_match(load(bundle), examples)
            print(f"{name}: {figures[name]['all']:.1f} % of {len(examples)} to the letter", file=sys.stderr, flush=True)
    kinds = list(next(iter(figures.values())))
    print("| kind | " + " | ".join(figures) + " |\n|---|" + "---|" * len(figures))
    for kind in kinds:
        print(f"| {kind} | " + " | ".join(f"{figure[kind]:.1f}" for figure in figures.values()) + " |")
    if arguments.out:
        recipes = {name: RECIPES[name].recipe().to_data() for name in names}
        result = {"examples": len(examples), "seed": arguments.seed, "recipes": recipes, "exact_match": figures}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
