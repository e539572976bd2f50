"""Make `tests/golden/` from a larger folder of golden data: `python tests/shrink_golden.py LARGER [FAMILY ...]`.

Takes checkpoints (as bf16, which holds their values exactly), numbers, and the cases whose pictures were drawn (`synth_*`)
or that have none; photographs stay where they are. The merger generation's data is large: of it only what the tests read
is taken, and the smaller pictures; of visual tokens and logits the first ones.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

GOLDEN = Path(__file__).parent / "golden"
MERGER_IMAGES = ("synth_small.png", "synth_tiny.png", "synth_big.png")
MERGER_KEYS = (
    "id", "messages", "images", "downsample_mode", "max_slice_nums", "enable_thinking", "use_image_id", "extra",
    "target_sizes", "pixel_values_u8_sha256", "greedy", "greedy_text", "beam3", "beam3_scores", "allsteps_fp64_maxdiff",
)  # fmt: skip
MERGER_ARRAYS = ("input_ids", "logits_last", "position_ids", "merger", "merger_idx")


def shrink_family(larger: Path, family: str) -> None:
    source, target = larger / family, GOLDEN / family
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source / "checkpoint", target / "checkpoint", ignore=shutil.ignore_patterns("model.safetensors"))
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    tensors = load_file(source / "checkpoint" / "model.safetensors")
    small = {name: value.bfloat16() for name, value in tensors.items()}
    if any(not torch.equal(small[name].to(value.dtype), value) for name, value in tensors.items()):
        raise SystemExit(f"{family}: a tensor does not fit bf16")
    # Compressed for the repository; tests/conftest.py unpacks it.
    packed = gzip.compress(save(small, metadata={"format": "pt"}), compresslevel=9, mtime=0)
    (target / "checkpoint" / "model.safetensors.gz").write_bytes(packed)
    golden = json.loads((source / "golden.json").read_text(encoding="utf-8"))
    if isinstance(golden["cases"], list):
        shrink_merger_family(larger, source, target, golden)
        return
    golden["cases"] = {name: case for name, case in golden["cases"].items() if drawn(case["images"])}
    (target / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    arrays = np.load(source / "golden.npz")
    kept: dict[str, Any] = {name: arrays[name] for name in arrays.files if name.split("/")[0] in golden["cases"]}
    np.savez_compressed(target / "golden.npz", **kept)
    for case in golden["cases"].values():
        for name in case["images"]:
            copy(larger / "images" / name, GOLDEN / "images" / name)


def shrink_merger_family(larger: Path, source: Path, target: Path, golden: dict[str, Any]) -> None:
    golden["cases"] = [
        {key: value for key, value in case.items() if key in MERGER_KEYS}
        for case in golden["cases"]
        if "kind" not in case and not case["video"] and all(Path(name).name in MERGER_IMAGES for name in case["images"])
    ]
    write_json(target / "golden.json", golden)
    arrays = np.load(source / "golden.npz")
    kept = {}
    for name in sorted({f"{case['id']}/{name}" for case in golden["cases"] for name in MERGER_ARRAYS} & set(arrays.files)):
        most = 16 if "/merger" in name else 512 if "/logits" in name else None
        kept[name] = arrays[name][:most]
    np.savez_compressed(target / "golden.npz", **kept)
    write_json(target / "slicing.json", json.loads((source / "slicing.json").read_text())[::20])
    if target.name == "minicpmv4_6":  # the same in all three
        copy(source / "text_golden.json", target / "text_golden.json")
    if (source / "rope_golden.json").exists():
        cases = json.loads((source / "rope_golden.json").read_text())[::2]
        write_json(target / "rope_golden.json", cases)
        arrays = np.load(source / "rope_golden.npz")
        names = {case["id"] for case in cases}
        np.savez_compressed(target / "rope_golden.npz", **{n: arrays[n] for n in arrays.files if n.split("/")[0] in names})
    if (source / "adaptive.json").exists():
        small = [case for case in json.loads((source / "adaptive.json").read_text()) if case_size(source, case) < 6_000]
        write_json(target / "adaptive.json", small)
        for case in small:
            copy(source / case["file"], target / case["file"])
    for name in {name for case in golden["cases"] for name in case["images"]}:
        file = Path("images46") / Path(name).name
        copy(larger / file, GOLDEN / file)


def case_size(source: Path, case: dict[str, Any]) -> int:
    return (source / case["file"]).stat().st_size


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def drawn(images: Iterable[str]) -> bool:
    return all(Path(name).name.startswith("synth_") for name in images)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def main() -> None:
    larger, families = Path(sys.argv[1]), sys.argv[2:]
    for family in families or sorted(path.parent.name for path in larger.glob("*/golden.json")):
        shrink_family(larger, family)
    for name in ("slicing.json", "posid_buckets.json"):
        copy(larger / name, GOLDEN / name)


if __name__ == "__main__":
    main()
