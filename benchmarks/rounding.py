"""Whether answers of rows that share steps part from those of one row by last digits alone, on bundles with random weights.

    python benchmarks/rounding.py benchmarks/results/rounding-NAME.json fp32=BUNDLE default=BUNDLE

Products of one row and of several add in another order, which moves last digits. Four questions about four pictures are asked
one at a time, together, and one at a time again with pictures' embeddings a last digit off: if the last two part from the first
alike, and in float neither does, then rows are not mixed up: what rounds its inputs to 8 bits enlarges a digit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from load import QUESTIONS, drawn

from mcv_runtime import Answer, Options, Picture, Request, load

ROWS, TOKENS = 4, 10
DIGIT = 1e-7
"""Of float32, relative."""
OPTIONS = Options(max_new_tokens=TOKENS, logprobs=True, top_logprobs=3)


def parted(alone: Iterable[Answer], others: Iterable[Answer]) -> dict[str, Any]:
    """How far log-probabilities are apart as long as the tokens before are the same, and after how many tokens they are not."""
    apart, after = [], []
    for one, other in zip(alone, others, strict=True):
        same = next((k for k, pair in enumerate(zip(one.tokens, other.tokens, strict=False)) if pair[0] != pair[1]), TOKENS)
        after.append(same)
        assert one.top_logprobs is not None and other.top_logprobs is not None
        for mine, theirs in zip(one.top_logprobs[: same + 1], other.top_logprobs[: same + 1], strict=True):
            found = dict(theirs)
            apart += [abs(value - found[token]) for token, value in mine if token in found]
    return {
        "largest_difference": round(max(apart), 5),
        "median_difference": round(float(np.median(apart)), 5),
        "same_tokens": after,
    }


def measured(bundle: Path, threads: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    with load(bundle, threads=threads) as engine:
        pictures = [engine.encode_image(drawn(number), max_slice_nums=1) for number in range(ROWS)]

        def one_by_one(pictures: Iterable[Picture]) -> list[Answer]:
            answers = []
            for picture in pictures:
                engine.forget()  # nothing is reused, which would be read in other chunks
                answers.append(engine.ask(picture, QUESTIONS[0], options=OPTIONS))
            return answers

        alone = one_by_one(pictures)
        moved = []
        for picture in pictures:
            factor = 1 + DIGIT * random.standard_normal(picture.embeds.shape)
            moved.append(replace(picture, embeds=(picture.embeds * factor).astype(np.float32)))
        engine.forget()
        together = engine.batch([Request(picture, QUESTIONS[0], options=OPTIONS) for picture in pictures])
        return {
            "again": parted(alone, one_by_one(pictures)),
            "together": parted(alone, together),
            "a_digit_off": parted(alone, one_by_one(moved)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("bundles", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    found = {}
    for name, _, folder in (one.partition("=") for one in given.bundles):
        found[name] = measured(Path(folder), given.threads)
        print(name, json.dumps(found[name]), flush=True)
    result = {"rows": ROWS, "tokens": TOKENS, "digit": DIGIT, "bundles": found}
    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
