"""Pixels, target sizes and positions against the golden data."""

import hashlib
import json

import numpy as np

from mcv_runtime.bundle.manifest import ImageSpec
from mcv_runtime.pictures.images import open_picture
from mcv_runtime.pictures.patches import bucket, bucketized_ids, cut, normalise, patch_slice, patchify
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
        np.testing.assert_array_equal(bucket(count, side), expected, err_msg=str(count))


def test_position_ids_are_row_major():
    assert bucketized_ids(2, 3, 70).tolist() == [0, 23, 46, 35 * 70, 35 * 70 + 23, 35 * 70 + 46]
