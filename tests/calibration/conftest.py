"""Bundles of the 2.6 golden checkpoint, whole and damaged, and a few samples."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import onnx
import pytest

from mcv_calibration.samples import Sample


@pytest.fixture(scope="session", autouse=True)
def _traced_once(traced_once: None) -> None:
    """All that is built here."""


@pytest.fixture(scope="session")
def few_samples(golden_root: Path) -> tuple[Sample, ...]:
    pictures = sorted((golden_root / "images").iterdir())[:2]
    return (
        Sample((pictures[0],), "What is written here?"),
        Sample(tuple(pictures), "What <b>differs</b> & why?", "the answer"),
        Sample((), "Hello"),
    )


@pytest.fixture
def damage(bundle_of: Callable[..., Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """A copy of the q8 bundle in which the weights of one layer are those of another model."""

    def damage(graph: str, layer: str) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(bundle_of("minicpmv2_6", "q8"), folder)
        path = folder / "onnx" / f"{graph}_q8.onnx"
        (weight,) = (t for t in onnx.load(path, load_external_data=False).graph.initializer if t.name == f"{layer}.qweight")
        at = {entry.key: entry.value for entry in weight.external_data}
        data = path.with_name(at["location"])
        content = bytearray(data.read_bytes())
        first, size = int(at["offset"]), int(at["length"])
        content[first : first + size] = content[first : first + size][::-1]
        data.write_bytes(content)
        manifest = json.loads((folder / "mcv.json").read_text())
        manifest["files"][f"onnx/{data.name}"]["sha256"] = sha256(content).hexdigest()
        (folder / "mcv.json").write_text(json.dumps(manifest))
        return folder

    return damage
