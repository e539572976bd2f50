"""Slicing against 2,000 cases of the reference's own code (golden/slicing.json)."""

import json

import pytest

from mcv_runtime.bundle.manifest import ImageSpec
from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.slicing import SliceGrid, adaptive_grid


def expected_grid(case):
    if case["grid"] is None:
        return SliceGrid(overview=tuple(case["source_size"]))
    columns, rows = case["grid"]
    return SliceGrid(overview=tuple(case["source_size"]), columns=columns, rows=rows, cell=tuple(case["patch_size_wh"]))


def test_every_golden_case(golden_root):
    cases = json.loads((golden_root / "slicing.json").read_text())["cases"]
    assert len(cases) >= 2000
    for case in cases:
        image = ImageSpec(
            scale_resolution=case["scale_resolution"], patch_size=case["patch_size"], slice_mode=not case["never_split"]
        )
        grid = adaptive_grid((case["w"], case["h"]), image, case["max_slice_nums"])
        assert grid == expected_grid(case), case
        assert not grid.columns or grid.refined == tuple(case["refine_size"]), case


def test_sizes_are_overview_then_cells():
    grid = SliceGrid(overview=(8, 4), columns=2, rows=1, cell=(6, 6))
    assert grid.sizes == ((8, 4), (6, 6), (6, 6))


def test_at_least_one_slice():
    with pytest.raises(OptionError, match="max_slice_nums"):
        adaptive_grid((100, 100), ImageSpec(), 0)
