"""A family that nothing else knows of: one file, found by itself."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mcv_export import families
from mcv_export.build import BuildOptions, build
from mcv_runtime.errors import CheckpointError

FILE = '''
"""The architecture of 4.5 under another name, with slices of its own size."""

from dataclasses import replace

from mcv_export.families import minicpmv4_5
from mcv_export.plan import Family


def read(checkpoint):
    plan = minicpmv4_5.plan(checkpoint)
    return replace(plan, image=replace(plan.image, max_slice_nums=4))


FAMILY = Family(
    name="minicpmv9",
    title="MiniCPM-V 9",
    recognises=lambda config: config.get("version") == 9,
    read=read,
    description=minicpmv4_5.FAMILY.description,
)
'''


def test_a_bundle_of_it_is_built_and_verified(
    copy_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = copy_checkpoint("minicpmv4_5", lambda config: config.update(version=9))
    with pytest.raises(CheckpointError, match="version=9"):
        build(checkpoint, tmp_path / "bundle", BuildOptions(precision="q8"))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "minicpmv9.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "more")])
    monkeypatch.delitem(sys.modules, "mcv_export.families.minicpmv9", raising=False)
    manifest = build(checkpoint, tmp_path / "bundle", BuildOptions(precision="q8")).manifest
    sys.modules.pop("mcv_export.families.minicpmv9")
    assert (manifest.family, manifest.image.max_slice_nums) == ("minicpmv9", 4)
