from __future__ import annotations

import numpy as np
import pytest

from sparsespec.refine import absorb_specks


def test_islands_and_holes_are_absorbed() -> None:
    labels = np.zeros((20, 30), np.int32)
    labels[2:12, 2:12] = 1
    labels[2:12, 12:22] = 2
    expected = labels.copy()
    labels[5, 5] = 0  # a hole
    labels[15:17, 25] = 2  # an island in the background
    labels[7, 11] = 2  # a notch: part of its neighbour, nothing to absorb
    labels[6, 16] = 1  # an island in another instance
    expected[7, 11] = 2
    before = labels.copy()
    np.testing.assert_array_equal(absorb_specks(labels, 4), expected)
    np.testing.assert_array_equal(labels, before)


def test_regions_of_the_limit_stay() -> None:
    labels = np.zeros((6, 12), np.int32)
    labels[1:3, 1:3] = 1
    labels[1:4, 6:9] = 1
    np.testing.assert_array_equal(absorb_specks(labels, 4), labels)
    assert absorb_specks(labels, 5)[1, 1] == 0


def test_the_largest_region_of_a_label_stays_however_small() -> None:
    labels = np.zeros((9, 9), np.int32)
    labels[4, 4] = 3
    np.testing.assert_array_equal(absorb_specks(labels, 50), labels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("value", [0, 2])
def test_one_region(shape: tuple[int, int], value: int) -> None:
    labels = np.full(shape, value, np.int32)
    np.testing.assert_array_equal(absorb_specks(labels, 100), labels)


def test_the_longest_shared_outline_decides() -> None:
    labels = np.ones((9, 9), np.int32)
    labels[:, 5:] = 2
    labels[3:6, 4] = 3
    labels[8, 8] = 3
    labels[0:4, 0:2] = 3  # the largest region of 3 stays
    out = absorb_specks(labels, 4)
    # Three of its sides touch 1 (left, above and below: 5 pixel edges) and one touches 2 (3 pixel edges).
    assert set(out[3:6, 4]) == {1}
    assert out[8, 8] == 2
