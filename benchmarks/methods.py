"""What each way of finding numbers for 4- and 8-bit weights, and ranges for static INT8, costs the demonstration model.

python benchmarks/methods.py benchmarks/results/methods.json [--samples 48]

As it is trained, and with outlier channels (`outliers.py`). A method is judged where it alone decides: blocks in a q4 decoder
behind a float tower, ranges in a static tower before a float decoder, pruning in float; a search begins with 4 bits everywhere
and raises what costs most. On held-out pictures and questions that calibrated nothing, against the same model in fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from outliers import Kind, add_outliers
from quality import STATIC, TINY, write_samples  # which lets the scripts of models/tiny be imported
from scenes import held_out

from mcv_calibration.gate import Gate
from mcv_calibration.recipe import Method, Ranges
from mcv_calibration.samples import Sample, SampleSet
from mcv_export.build import BuildOptions, build
from mcv_export.precision import Wishes
from mcv_export.report import ReportOptions, report_on
from mcv_export.search import search_recipe

SEED = 2000
WITHIN = 0.002
"""Nats within which a search is to end."""
FLOAT = dict.fromkeys(STATIC, "fp32")


def recipes() -> dict[str, Wishes]:
    """By what they differ in."""
    found = {"fp32": Wishes(precision="fp32")}
    for block in (32, 128):
        for method in get_args(Method):
            found[f"q4, blocks of {block}, {method}"] = Wishes(precision="q4", graphs=FLOAT, block_size=block, method=method)  # type: ignore[arg-type]
    for ranges in get_args(Ranges):
        found[f"int8-static, {ranges}"] = Wishes(precision="fp32", graphs=STATIC, ranges=ranges)
    for part in (0.1, 0.25):
        found[f"{part:.0%} of the feed-forward channels pruned"] = Wishes(precision="fp32", prune_ffn=part)
    return found


def measured(checkpoint: Path, folder: Path, count: int) -> dict[str, Any]:
    """Each recipe's errors against fp32."""
    folder.mkdir()
    samples = write_samples(folder / "samples")
    bundles = {}
    for number, (name, wishes) in enumerate(recipes().items()):
        options = BuildOptions(recipe=wishes.recipe(), samples=samples)
        bundles[name] = build(checkpoint, folder / f"bundle-{number}", options).folder
    four_bits = BuildOptions(precision=dict.fromkeys((*STATIC, "decoder_with_past"), "q4"))
    recipe = search_recipe(checkpoint, folder / "searched", four_bits, Gate(max_kl=WITHIN), samples.measuring())
    for name, found_by in (
        ("q4 throughout", four_bits),
        (f"the same, searched to be within {WITHIN} nats", BuildOptions(recipe=recipe)),
    ):
        bundles[name] = build(checkpoint, folder / f"bundle-{len(bundles)}", found_by).folder
    bundles["q8 throughout"] = build(checkpoint, folder / "q8", BuildOptions(precision="q8")).folder
    unseen = []
    for number, example in enumerate(held_out(count, SEED)):
        paths = [folder / f"{number}-{index}.png" for index, _ in enumerate(example.images)]
        for path, image in zip(paths, example.images, strict=True):
            image.save(path)
        unseen.append(Sample(tuple(paths), example.question, example.answer))
    options = ReportOptions(max_new_tokens=48, threads=os.cpu_count())
    made = report_on(
        list(bundles.values()), SampleSet(tuple(unseen), (), "held-out scenes"), names=list(bundles), options=options
    ).report
    found = {}
    for bundle in made.bundles:
        assert bundle.accuracy is not None
        tokens, together = bundle.accuracy.visual_tokens, bundle.accuracy.together
        found[bundle.name] = {
            "megabytes": round((bundle.size or 0) / 1e6, 2),
            "visual_error": tokens and round(tokens.relative, 5),
            "visual_cosine_p1": tokens and round(tokens.cosine_p1, 5),
            "kl": round(together.kl_mean, 6),
            "kl_interval": together.kl_interval and asdict(together.kl_interval),
            "agreement": round(together.agreement, 5),
            "same_answers": asdict(bundle.same),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--samples", type=int, default=48)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {
            "as trained": TINY / "checkpoint",
            "with outlier channels": add_outliers(TINY / "checkpoint", folder / "outliers", kinds=get_args(Kind)),
        }
        found = {name: measured(path, folder / name, given.samples) for name, path in models.items()}
    result = {"samples": given.samples, "seed": SEED, "models": found}
    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
