"""What is done with small pictures, against the reference, which uses OpenCV (golden/minicpm_ocr/adaptive.json)."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from mcv_runtime.bundle.manifest import DownsampleSpec, ImageSpec
from mcv_runtime.pictures.picture import slice_picture
from mcv_runtime.pictures.upsizing import adaptive_resolution, connected_components, measure_text, otsu_threshold, to_gray

SPEC = ImageSpec(
    slicing="aligned_grid",
    downsample={
        "16x": DownsampleSpec(graph="vision_encoder_16x", merge=4),
        "4x": DownsampleSpec(graph="vision_encoder", merge=2),
    },
    downsample_mode="4x",
)


@pytest.fixture(scope="module")
def cases(golden_root):
    cases = json.loads((golden_root / "minicpm_ocr" / "adaptive.json").read_text())
    assert len(cases) >= 10
    return [(golden_root / "minicpm_ocr" / case["file"], case) for case in cases]


def test_the_decision_and_each_step_to_it(cases):
    for file, case in cases:
        with Image.open(file) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        gray = to_gray(pixels)
        assert hashlib.sha256(gray.tobytes()).hexdigest() == case["gray_sha256"]
        assert otsu_threshold(gray) == case["otsu_threshold"]
        ink = (gray <= otsu_threshold(gray)) ^ case["flipped"]
        assert ink.sum() == case["foreground_pixels"]
        assert len(connected_components(ink).areas) == case["components"]
        text = measure_text(pixels)
        assert (text.height, text.density) == (case["font_px"], pytest.approx(case["density_per_kpx"], rel=1e-12))
        assert adaptive_resolution(pixels, 448) == case["adaptive_resolution_448"]


def test_slices(cases):
    for file, case in cases:
        for result in case["results"]:
            options = {name: result[name] for name in ("downsample_mode", "small_image_upsize")}
            sliced = slice_picture(file, SPEC, **options)
            grid = sliced.grid
            assert [grid.rows, grid.columns] == result["grid"]
            assert [[height // 14, width // 14] for width, height in grid.sizes] == result["target_sizes"]
            assert [piece.size for piece in sliced.slices] == list(grid.sizes)
            strips = [np.asarray(p).transpose(2, 0, 1).reshape(3, p.height // 14, 14, p.width // 14, 14) for p in sliced.slices]
            packed = np.concatenate([strip.transpose(0, 2, 1, 3, 4).reshape(3, 14, -1) for strip in strips], axis=-1)
            assert hashlib.sha256(packed.tobytes()).hexdigest() == result["pixel_values_u8_sha256"]


def flood(mask):
    """Area, width and height of each component, pixel by pixel."""
    todo = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    while todo:
        stack, pixels = [todo.pop()], []
        while stack:
            y, x = stack.pop()
            pixels.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            stack += near
        ys, xs = zip(*pixels, strict=True)
        yield len(pixels), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1


def test_components_are_those_of_a_flood_fill():
    rng = np.random.default_rng(0)
    for _ in range(100):
        mask = rng.random(rng.integers(1, 13, 2)) < rng.random()
        found = connected_components(mask)
        assert sorted(zip(found.areas, found.widths, found.heights, strict=True)) == sorted(flood(mask))
