"""What recipes cost models with outliers that no fold undoes: drop of exact match, visual tokens and next tokens.

    python benchmarks/surgery_costs.py --checkpoints operated/ --out benchmarks/results/surgery.json
    python benchmarks/surgery_costs.py --checkpoints operated/ --model all --bundle "before: default=old-bundle/"

Each model is compared with itself in fp32 on held-out questions; a drop's interval is of the mean difference of the same
questions (bootstrap). Recipes that need samples are calibrated on other held-out pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality import LONGEST, STATIC, write_samples
from questions import Example
from scenes import held_out
from surgery import KINDS, TINY, Kind, operate

from mcv_calibration.contender import Contender
from mcv_calibration.continuation import continuation_feed
from mcv_calibration.distances import DistributionErrors, TensorErrors
from mcv_calibration.intervals import NAMED, Share, bootstrap
from mcv_calibration.target import this_machine
from mcv_export.build import BuildOptions, build
from mcv_export.precision import Wishes
from mcv_runtime import Answer, Options, Picture, Request


def _decoder(**settings: Any) -> Wishes:
    return Wishes(settings={"decoder_with_past": settings})


MODELS: dict[str, tuple[Kind, ...]] = {
    "plain": (),
    **{kind: (kind,) for kind in KINDS},
    "all": KINDS,
}
RECIPES: dict[str, Wishes] = {
    "default": Wishes(),
    "q8": Wishes(precision="q8"),
    "int8-static vision": Wishes(graphs=STATIC),
    "int8-token": Wishes(precision="int8-token"),
    "blocks of 32, rounded": _decoder(block_size=32, method="rtn"),
    "blocks of 32, k-quant": _decoder(block_size=32),
    "blocks of 64, k-quant": _decoder(block_size=64),
    "blocks of 128, rounded": _decoder(method="rtn"),
}
DISTRIBUTIONS = 120
"""Questions along whose answers next tokens are compared."""


def checkpoint_of(model: str, folder: Path, steps: int) -> Path:
    """Operated once, and kept; the model with all kinds begins with the one that takes longest to learn again."""
    if not MODELS[model]:
        return TINY / "checkpoint"
    path = folder / model
    if not path.exists():
        kinds, start = list(MODELS[model]), TINY / "checkpoint"
        if model == "all":
            start = checkpoint_of("residual", folder, steps)
            kinds.remove("residual")
        operate(path, kinds, start=start, steps=steps)
    return path


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A bundle, and what it makes of each question."""

    contender: Contender
    pictures: Sequence[Sequence[Picture]]
    answers: Sequence[Answer]

    @classmethod
    def of(cls, bundle: Path, examples: Sequence[Example]) -> Asked:
        contender = Contender(bundle)
        pictures = [contender.encode(example.images)[0] for example in examples]
        options = Options(max_new_tokens=LONGEST)
        requests = [Request(seen, example.question, options=options) for seen, example in zip(pictures, examples, strict=True)]
        return cls(contender, pictures, contender.engine.batch(requests))

    def embeds(self, number: int) -> NDArray[np.float32]:
        """Visual tokens of one question: [visual, width]."""
        return np.concatenate([picture.embeds for picture in self.pictures[number]])


def right(asked: Asked, examples: Sequence[Example]) -> list[bool]:
    return [answer.text == example.answer for answer, example in zip(asked.answers, examples, strict=True)]


def costs(fp32: Asked, found: Asked, examples: Sequence[Example]) -> dict[str, Any]:
    """Of one bundle against the same model in fp32."""
    before, now = right(fp32, examples), right(found, examples)
    lost = [float(a) - float(b) for a, b in zip(before, now, strict=True)]
    interval = bootstrap(lost, [1.0] * len(lost))
    assert interval is not None
    visual, decoder, pictures, together = TensorErrors(), DistributionErrors(), DistributionErrors(), DistributionErrors()
    for number, example in enumerate(examples):
        embeds, own = fp32.embeds(number), found.embeds(number)
        visual.add(embeds, own)
        if number >= DISTRIBUTIONS:
            continue
        prompt = fp32.contender.engine.prompt([{"role": "user", "content": [*fp32.pictures[number], example.question]}])
        inputs = continuation_feed(fp32.contender.manifest, prompt, embeds, fp32.answers[number].tokens)
        with_own = {**inputs, "vision_embeds": own}
        wanted = fp32.contender.run("decoder_with_past", inputs).output
        decoder.add(wanted, found.contender.run("decoder_with_past", inputs).output)
        pictures.add(wanted, fp32.contender.run("decoder_with_past", with_own).output)
        together.add(wanted, found.contender.run("decoder_with_past", with_own).output)
    tokens, of_visual = together.result(), visual.result()
    of_decoder, of_pictures = decoder.result(), pictures.result()
    assert tokens is not None and of_visual is not None and of_decoder is not None and of_pictures is not None
    return {
        "right": asdict(Share.of(sum(now), len(now))),
        "drop_points": 100 * sum(lost) / len(lost),
        "drop_interval": [100 * interval.low, 100 * interval.high],
        "visual_cosine_p1": of_visual.cosine_p1,
        "visual_error": of_visual.relative,
        "kl": tokens.kl_mean,
        "kl_interval": None if tokens.kl_interval is None else asdict(tokens.kl_interval),
        "kl_of_decoder": of_decoder.kl_mean,
        "kl_of_pictures": of_pictures.kl_mean,
        "agreement": asdict(tokens.agreeing),
    }


def measured(checkpoint: Path, bundles: Mapping[str, Path], examples: Sequence[Example], folder: Path) -> dict[str, Any]:
    """fp32 and the costs of each bundle of one checkpoint."""
    float32 = build(checkpoint, folder / "fp32", BuildOptions(recipe=Wishes(precision="fp32").recipe())).folder
    fp32 = Asked.of(float32, examples)
    truth = right(fp32, examples)
    return {
        "fp32": asdict(Share.of(sum(truth), len(truth))),
        "recipes": {name: costs(fp32, Asked.of(path, examples), examples) for name, path in bundles.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="a folder that keeps what is operated, by model")
    parser.add_argument("--model", choices=MODELS, action="append", default=[])
    parser.add_argument("--recipe", choices=[*RECIPES, "none"], action="append", default=[])
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=FOLDER", help="more of one --model")
    parser.add_argument("--label", default="", help="before the recipes' names, for example of another version")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="write the figures here, beside those of models that are there already")
    arguments = parser.parse_args()
    examples = list(held_out(arguments.count, arguments.seed))
    result: dict[str, Any] = {"models": {}}
    if arguments.out is not None and arguments.out.exists():
        result = json.loads(arguments.out.read_text(encoding="utf-8"))
    result |= {"questions": arguments.count, "seed": arguments.seed, "intervals": NAMED, "target": this_machine()}
    for model in arguments.model or MODELS:
        checkpoint = checkpoint_of(model, arguments.checkpoints, arguments.steps)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bundles = {one.partition("=")[0]: Path(one.partition("=")[2]) for one in arguments.bundle}
            calibrating = write_samples(folder / "samples")
            for number, recipe in enumerate(arguments.recipe or RECIPES):
                if recipe != "none":
                    options = BuildOptions(recipe=RECIPES[recipe].recipe(), samples=calibrating)
                    bundles[f"{arguments.label}{recipe}"] = build(checkpoint, folder / f"bundle-{number}", options).folder
            found = measured(checkpoint, bundles, examples, folder)
        known = result["models"].setdefault(model, {"recipes": {}})
        known |= {"steps": arguments.steps, "fp32": found["fp32"]}
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
