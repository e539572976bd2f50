"""The order in which patches of one visual token stand together."""

import numpy as np
import pytest

from mcv_runtime.vision.patch_order import nested_order


def test_squares_of_two():
    assert nested_order(2, 4, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_squares_of_four_go_quarter_by_quarter():
    assert nested_order(4, 8, 4)[1].tolist() == [4, 5, 12, 13, 6, 7, 14, 15, 20, 21, 28, 29, 22, 23, 30, 31]


@pytest.mark.parametrize(("rows", "columns", "merge"), [(8, 12, 4), (6, 2, 2), (16, 8, 8)])
def test_every_patch_once_and_windows_nest(rows, columns, merge):
    order = nested_order(rows, columns, merge)
    assert sorted(order.reshape(-1)) == list(range(rows * columns))
    # merging 2 x 2 windows turns the order into that of the halved grid
    if merge > 2:
        windows = order.reshape(-1, 4)[:, 0]
        halved = windows // columns // 2 * (columns // 2) + windows % columns // 2
        np.testing.assert_array_equal(halved.reshape(-1, merge**2 // 4), nested_order(rows // 2, columns // 2, merge // 2))
