"""Positions on a canvas against the reference's 88 cases (golden/minicpmv4_7/rope_golden)."""

import itertools
import json

import numpy as np
import pytest

from mcv_runtime.text.canvas_positions import Crop, Markers, canvas_positions, spread

MARKERS = Markers(image_start=1534, image_end=1535, slice_start=1544, slice_end=1545, newline=198)
IMAGE, VIDEO = 1, 2


def crops(kinds, sizes, merge):
    """The slices of a prompt: runs of visual tokens of one kind, and their sizes in patches."""
    borders = np.flatnonzero(np.diff(np.concatenate(([0], kinds, [0]))))
    left = {kind: iter(sizes[kind]) for kind in (IMAGE, VIDEO)}
    for start, end in itertools.pairwise(borders):
        if end <= len(kinds) and kinds[start]:
            rows, columns = next(left[int(kinds[start])])
            crop = Crop(int(start), rows // merge, columns // merge)
            assert crop.end == end
            yield crop


def test_every_golden_case(golden_root):
    folder = golden_root / "minicpmv4_7"
    cases = json.loads((folder / "rope_golden.json").read_text(encoding="utf-8"))
    arrays = np.load(folder / "rope_golden.npz")
    assert len(cases) >= 40
    for case in cases:
        ids, kinds, expected = (arrays[f"{case['id']}/{n}"] for n in ("input_ids", "mm_token_type_ids", "position_ids"))
        sizes = {IMAGE: case.get("target_sizes") or [], VIDEO: case.get("target_sizes_videos") or []}
        merge = 4 if case["downsample_mode"] == "16x" else 2
        found = canvas_positions(ids.astype(np.int64), list(crops(kinds, sizes, merge)), MARKERS)
        np.testing.assert_array_equal(found, expected.reshape(3, -1), err_msg=case["id"])
        assert found.max() + 1 - len(ids) == case["rope_delta"]


def test_text_is_a_line():
    ids = np.arange(5)
    assert canvas_positions(ids, [], MARKERS).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_spread_is_torchs_linspace():
    torch = pytest.importorskip("torch")
    for length in range(1, 200, 3):
        for count in range(2, 40):
            expected = torch.linspace(0, length - 1, count).round().long().tolist()
            assert spread(length, count).tolist() == expected
    assert spread(9, 1).tolist() == [0]
