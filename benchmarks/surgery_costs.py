"""What recipes cost models with outliers that no fold undoes: drop of exact match, visual tokens and next tokens, in one run.

    python benchmarks/surgery_costs.py --out benchmarks/results/surgery.json
    python benchmarks/surgery_costs.py --model all --checkpoint operated/ --bundle "before: default=old-bundle/"

Each model is compared with itself in fp32 on held-out questions; a drop's interval is of the mean difference of the same
questions (bootstrap). Recipes that need samples are calibrated on other held-out pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality import STATIC, write_samples
from scenes import held_out
from surgery import KINDS, Kind, operate

from mcv_calibration.accuracy import Result, compare
from mcv_calibration.contender import Contender
from mcv_calibration.intervals import NAMED, Share, bootstrap
from mcv_calibration.samples import Sample
from mcv_calibration.target import this_machine
from mcv_export.build import BuildOptions, build
from mcv_export.precision import Wishes

MODELS: dict[str, tuple[Kind, ...]] = {
    "plain": (),
    **{kind: (kind,) for kind in KINDS},
    "spikes and fixed": ("spikes", "fixed"),
    "all": KINDS,
}
RECIPES: dict[str, Wishes] = {
    "default": Wishes(),
    "q8": Wishes(precision="q8"),
    "int8-static vision": Wishes(graphs=STATIC),
}
LONGEST = 48


def costs(fp32: Result, found: Result) -> dict[str, Any]:
    """Of one bundle against the same model in fp32."""
    accuracy = found.accuracy
    assert accuracy is not None and accuracy.visual_tokens is not None
    lost = [float(bool(a.right) - bool(b.right)) for a, b in zip(fp32.answers, found.answers, strict=True)]
    interval = bootstrap(lost, [1.0] * len(lost))
    assert interval is not None
    return {
        "right": _right(found),
        "drop_points": 100 * sum(lost) / len(lost),
        "drop_interval": [100 * interval.low, 100 * interval.high],
        "visual_cosine_p1": accuracy.visual_tokens.cosine_p1,
        "visual_error": accuracy.visual_tokens.relative,
        "kl": accuracy.together.kl_mean,
        "kl_interval": None if accuracy.together.kl_interval is None else asdict(accuracy.together.kl_interval),
        "kl_of_decoder": accuracy.decoder.kl_mean,
        "kl_of_pictures": accuracy.pictures.kl_mean,
        "agreement": asdict(accuracy.together.agreeing),
    }


def _right(result: Result) -> dict[str, Any]:
    return asdict(Share.of(sum(answer.right is True for answer in result.answers), len(result.answers)))


def measured(checkpoint: Path, bundles: Mapping[str, Path], samples: Sequence[Sample], folder: Path) -> dict[str, Any]:
    """fp32 and the costs of each bundle of one checkpoint."""
    float32 = build(checkpoint, folder / "fp32", BuildOptions(recipe=Wishes(precision="fp32").recipe())).folder
    found = compare(Contender(float32), [Contender(path) for path in bundles.values()], samples, max_new_tokens=LONGEST)
    return {
        "fp32": _right(found.reference),
        "recipes": {name: costs(found.reference, one) for name, one in zip(bundles, found.candidates, strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", default=[])
    parser.add_argument("--recipe", choices=[*RECIPES, "none"], action="append", default=[])
    parser.add_argument("--checkpoint", type=Path, help="operated before; with one --model")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=FOLDER", help="more of that checkpoint")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, help="write the figures here, beside those of models that are there already")
    arguments = parser.parse_args()
    questions = held_out(arguments.count, arguments.seed)
    samples = [Sample(tuple(one.images), one.question, one.answer) for one in questions]
    result: dict[str, Any] = {"models": {}}
    if arguments.out is not None and arguments.out.exists():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    result |= {"questions": arguments.count, "seed": arguments.seed, "intervals": NAMED, "target": this_machine()}
    for model in arguments.model or MODELS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint = arguments.checkpoint
            if checkpoint is None:
                checkpoint = operate(folder / "checkpoint", MODELS[model], steps=arguments.steps)
            bundles = {one.partition("=")[0]: Path(one.partition("=")[2]) for one in arguments.bundle}
            calibrating = write_samples(folder / "samples")
            for number, recipe in enumerate(arguments.recipe or RECIPES):
                if recipe != "none":
                    options = BuildOptions(recipe=RECIPES[recipe].recipe(), samples=calibrating)
                    bundles[recipe] = build(checkpoint, folder / f"bundle-{number}", options).folder
            found = measured(checkpoint, bundles, samples, folder)
        known = result["models"].setdefault(model, {"recipes": {}})
        known |= {"fp32": found["fp32"], "steps": arguments.steps}
        known["recipes"] |= found["recipes"]
        print(f"{model}: fp32 {100 * found['fp32']['hits'] / found['fp32']['total']:.1f} %", file=sys.stderr, flush=True)
        for recipe, cost in found["recipes"].items():
            low, high = cost["drop_interval"]
            print(
                f"  {recipe}: {cost['drop_points']:.1f} points ({low:.1f} to {high:.1f}), visual cosine p1 "
                f"{cost['visual_cosine_p1']:.4f}, KL {cost['kl']:.3g} (decoder {cost['kl_of_decoder']:.3g}, pictures "
                f"{cost['kl_of_pictures']:.3g})",
                flush=True,
            )
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
