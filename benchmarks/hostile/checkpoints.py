"""Checkpoints whose configurations or weights' headers were changed, read as far as a build goes before it calibrates."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch

import mcv_export.build
from hostile.changed_json import changed
from hostile.guarded import Case, Draw
from mcv_export.build import BuildOptions, build

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
_FILES = ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


class _EnoughError(Exception):
    """A build came as far as its calibration."""


def checkpoints(scratch: Path) -> Draw:
    """A configuration with an odd value, or a safetensors header that lies."""
    torch.set_num_threads(1)
    folders = sorted(path for path in GOLDEN.glob("minicpm*/checkpoint") if (path / "model.safetensors.gz").exists())
    weights = {folder: gzip.decompress((folder / "model.safetensors.gz").read_bytes()) for folder in folders}

    def draw(dice: Random) -> Case:
        folder = dice.choice(folders)
        copy = scratch / "checkpoint"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.gz"))
        data, family = weights[folder], folder.parent.name
        files = [name for name in _FILES if (copy / name).exists()]
        name = dice.choice([*files, "config.json", "config.json", "model.safetensors", "model.safetensors"])
        if name == "model.safetensors":
            what, data = _header(data, dice)
        else:
            what, text = changed(
                json.loads((copy / name).read_bytes()), dice, lambda path: name != "tokenizer.json" or len(path) < 4
            )
            (copy / name).write_bytes(text)
        (copy / "model.safetensors").write_bytes(data)
        return Case(f"{family}/{name}: {what}", lambda: _begin(copy, scratch / "out"))

    return draw


def _begin(checkpoint: Path, out: Path) -> str:
    def enough(*arguments: Any, **named: Any) -> None:
        raise _EnoughError

    mcv_export.build.calibrate = enough  # in a process of its own
    try:
        build(checkpoint, out, BuildOptions(precision="q8"))
    except _EnoughError:
        return "as far as calibration"
    return "built"


def _header(data: bytes, dice: Random) -> tuple[str, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    tensor = dice.choice(names)
    part = dice.choice(
        ("length", "cut", "dtype", "offsets", "shape", "entry", "all", "deep", "overlap", "moved", "metadata", "value")
    )
    if part == "length":
        return part, struct.pack("<Q", dice.choice((0, 1, 2**63, 2**64 - 1, length + 1, length - 1, 2**31))) + data[8:]
    if part == "cut":
        return part, data[: dice.choice((dice.randrange(20), dice.randrange(len(data))))]
    if part == "value":  # a NaN or an infinity among the weights
        made = bytearray(body)
        place = 2 * dice.randrange(len(made) // 2)
        made[place : place + 2] = dice.choice((b"\xc0\x7f", b"\x80\x7f", b"\xff\xff"))
        return part, data[: 8 + length] + bytes(made)
    if part == "dtype":
        header[tensor]["dtype"] = dice.choice(("F8_E4M3", "I64", "BOOL", None, [], {}, 1, "", "F64", "U8"))
    elif part == "offsets":
        odd = [[], [0], [0, 1, 2], None, "ab", [0, "1"], [0.0, 4.0], [0, 10**30], [-8, 0], [5, 1], {}, [0, None]]
        header[tensor]["data_offsets"] = dice.choice(odd)
    elif part == "shape":
        odd = [[], [-1], [2**32, 2**32], [0], None, "a", [1.5], ["a"], [[1]], [10**30], [True], {}, [2**63]]
        header[tensor]["shape"] = dice.choice(odd)
    elif part == "entry":
        header[tensor] = dice.choice((None, 1, [], "x", {}, True))
    elif part == "all":
        header = dice.choice(([], None, 1, "x", {}, [{}]))
    elif part == "overlap":
        for name in names:
            start, end = header[name]["data_offsets"]
            header[name]["data_offsets"] = [0, end - start]
    elif part == "moved":
        start, end = header[tensor]["data_offsets"]
        header[tensor]["data_offsets"] = [start - 10**6, end - 10**6]
    elif part == "metadata":
        header["__metadata__"] = dice.choice((None, [], 1, {"a": [1]}))
    text = b"[" * 100_000 if part == "deep" else json.dumps(header).encode()
    return part, struct.pack("<Q", len(text)) + text + body
