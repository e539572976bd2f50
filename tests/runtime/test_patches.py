"""Pixels, target sizes and positions against the golden data."""

import hashlib
import json
import platform

import numpy as np
import pytest
from PIL import Image

from mcv_runtime.bundle.manifest import ImageSpec
from mcv_runtime.pictures.images import open_picture
from mcv_runtime.pictures.patches import bucket, cut, divided, grid_ids, normalise, patch_slice, patchify, stepped
from mcv_runtime.pictures.slicing import adaptive_grid


def sha256(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_slices_and_pixels_of_every_case(golden_case):
    image = ImageSpec()
    options = golden_case.options
    pieces = []
    for path in golden_case.images:
        picture = open_picture(path)
        pieces += cut(picture, adaptive_grid(picture.size, image, options.get("max_slice_nums")))
    expected = golden_case.expected
    assert [[piece.height, piece.width] for piece in pieces] == [one["hw"] for one in expected["slices"]]
    for piece, one, (rows, columns) in zip(pieces, expected["slices"], expected["tgt_sizes_hw"], strict=True):
        pixels_HWC = np.asarray(piece)
        assert sha256(pixels_HWC.transpose(2, 0, 1)) == one["sha256_u8_chw"]
        if golden_case.family != "minicpmv2_0":  # which keeps the hash of the bytes alone
            assert sha256(normalise(pixels_HWC, image)) == one["sha256_f32_chw"]
        patched = patch_slice(piece, image)
        assert (patched.rows, patched.columns) == (rows, columns)
        assert patched.pixel_values.shape == (rows * columns, 3 * 14 * 14)
        assert patched.patch_positions[[0, 1, -1]].tolist() == [[0, 0], [0, 1], [rows - 1, columns - 1]]


def test_patch_is_the_square_it_came_from():
    image_CHW = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    patches = patchify(image_CHW, 2)
    assert patches.shape == (6, 12)
    np.testing.assert_array_equal(patches[4], image_CHW[:, 2:4, 2:4].reshape(-1))


def test_every_golden_bucket(golden_root):
    """All n up to 1500: the quotient's floor but for the listed deviations of the reference's floating point."""
    golden = json.loads((golden_root / "posid_buckets.json").read_text())
    side = golden["num_patches_per_side"]
    deviations = {one["n"]: one["at"] for one in golden["deviations"]}
    assert len(deviations) == 309
    for count in range(1, 1501):
        expected = np.arange(count) * side // count
        for i, reference, _ in deviations.get(count, []):
            expected[i] = reference
        np.testing.assert_array_equal(bucket(stepped(count), side), expected, err_msg=str(count))


def test_divided_coordinates_fall_where_the_quotient_does():
    """`torch.arange(n) / n` of transformers' `get_vision_nearest_position_ids` (5.24): never below the whole quotients."""
    differ = []
    for count in range(1, 1501):
        exact = np.arange(count) * 70 // count
        np.testing.assert_array_equal(bucket(divided(count), 70), exact, err_msg=str(count))
        differ += [count] * (bucket(stepped(count), 70).tolist() != exact.tolist())
    assert len([count for count in differ if count < 400]) == 67
    assert {100, 164, 172, 188, 196, 200} <= set(differ)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch's arange rounds by the width of vectors")
@pytest.mark.parametrize("side", [2, 3, 16, 27, 54, 64, 70, 80])
def test_buckets_are_those_of_torch(side):
    """The published lines of both generations, for a table of any size."""
    torch = pytest.importorskip("torch")
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    for count in range(1, 1501):
        steps = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(count))
        quotients = torch.arange(count) / count
        for coordinates, ours in ((steps, stepped(count)), (quotients, divided(count))):
            np.testing.assert_array_equal(ours, coordinates.numpy(), err_msg=str(count))
            expected = torch.bucketize(coordinates, boundaries, right=True).numpy()
            np.testing.assert_array_equal(bucket(ours, side), expected, err_msg=str(count))


def test_narrow_slices_of_the_merger_generation():
    """A picture of 200 x 1,900 has rows of 100 and more, where the rules differ."""
    utils = pytest.importorskip("transformers.vision_utils")
    torch = pytest.importorskip("torch")
    for rows, columns in ((100, 12), (12, 164), (188, 8), (8, 200), (28, 36)):
        expected = utils.get_vision_nearest_position_ids(torch.tensor([[rows, columns]]), 70).numpy()
        image = ImageSpec(positions="divided")
        patched = patch_slice(Image.new("RGB", (14 * columns, 14 * rows)), image)
        np.testing.assert_array_equal(patched.position_ids, expected)


@pytest.mark.parametrize("positions", ["bucketized", "divided"])
def test_a_slice_is_numbered_by_its_own_rule(positions):
    """25 rows: 5 / 25 of 70 is entry 14 by quotients, 13 by steps (posid_buckets.json)."""
    patched = patch_slice(Image.new("RGB", (14, 25 * 14)), ImageSpec(positions=positions))
    assert patched.position_ids[5] == {"bucketized": 13, "divided": 14}[positions] * 70


def test_position_ids_are_row_major():
    assert grid_ids(2, 3, 70, stepped).tolist() == [0, 23, 46, 35 * 70, 35 * 70 + 23, 35 * 70 + 46]
