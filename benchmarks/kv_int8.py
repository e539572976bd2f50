"""What keeping keys in 8 bits costs at positions far behind those that their scales were taken from.

python benchmarks/kv_int8.py --out benchmarks/results/kv-int8.json

Keys of models/tiny for held-out questions are turned to the positions of a long context as the decoder turns them, rounded with
scales of short prompts, and compared: with the largest value of each channel as it was seen, and with the length of the pair
that positions turn, which is what `mcv-export build --kv int8` takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
sys.path.insert(0, str(TINY))

from scenes import held_out  # noqa: E402 - models/tiny is a folder of scripts, not a package

from mcv_calibration.measured import NOTHING  # noqa: E402
from mcv_calibration.samples import Sample, builtin_samples  # noqa: E402
from mcv_export.build import BuildOptions, build  # noqa: E402
from mcv_export.checkpoint import open_checkpoint  # noqa: E402
from mcv_export.families import recognise  # noqa: E402
from mcv_export.int8_cache import HEADROOM, Cache, cache_peaks, read_samples  # noqa: E402
from mcv_runtime.bundle.folder import Bundle  # noqa: E402

POSITIONS = (100, 300, 1000, 3000, 10_000, 32_000)


def turned(keys_HTD: NDArray[np.float32], first: int, theta: float) -> NDArray[np.float32]:
    """Keys of positions 0, 1, ... as they would be from position `first` on."""
    half = keys_HTD.shape[-1] // 2
    angles = first / theta ** (np.arange(half) / half)
    low, high = keys_HTD[..., :half], keys_HTD[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1).astype(np.float32)


def error(caches: list[Cache], peaks: Mapping[str, NDArray[np.float32]], first: int, theta: float) -> float:
    """Root mean square of what rounding to 8 bits changes in all keys, of that of the keys, in percent."""
    off, all_of_it = 0.0, 0.0
    for cache in caches:
        for name, values in cache.items():
            if name.endswith("key"):
                keys, step = turned(values, first, theta), peaks[name][:, None, :] * (HEADROOM / 127)
                rounded = np.clip(np.round(keys / step), -128, 127) * step
                off += float(np.square(rounded - keys).sum())
                all_of_it += float(np.square(keys).sum())
    return 100 * (off / all_of_it) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="Questions whose keys are compared.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = json.loads((TINY / "checkpoint" / "config.json").read_text())
    theta, width = config["rope_theta"], config["hidden_size"] // config["num_attention_heads"]
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(build(TINY / "checkpoint", Path(folder) / "bundle", BuildOptions(precision="fp32")).folder)
        checkpoint = open_checkpoint(TINY / "checkpoint")
        origin = recognise(checkpoint.config).plan(checkpoint).graphs[-1], checkpoint, NOTHING
        seen = list(read_samples(bundle, *origin, builtin_samples(16).samples))
        asked = [Sample(example.images, example.question) for example in held_out(arguments.count)]
        caches = list(read_samples(bundle, *origin, asked))
    keys = dict.fromkeys((name for cache in seen for name in cache if name.endswith("key")), width)
    scales = {"largest seen": cache_peaks(seen, {}), "length of the pair": cache_peaks(seen, keys)}
    table = {how: {str(first): error(caches, peaks, first, theta) for first in POSITIONS} for how, peaks in scales.items()}
    print("| position | " + " | ".join(table) + " |\n|---|" + "---|" * len(table))
    for first in POSITIONS:
        print(f"| {first:,} | " + " | ".join(f"{errors[str(first)]:.2f} %" for errors in table.values()) + " |")
    if arguments.out:
        result = {"model": "models/tiny", "rope_theta": theta, "questions": arguments.count, "error_percent": table}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
