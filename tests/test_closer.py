from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsespec.closer import crop_around, redraw


def on_grid(grid: tuple[int, int], top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(grid, bool)
    mask[top:bottom, left:right] = True
    return mask


# Where to look


def test_the_margin_is_in_sides_of_the_instance() -> None:
    mask = on_grid((40, 40), 16, 18, 24, 24)
    # 8 x 6 tokens of 10 pixels: 60 and 45 pixels on each side.
    assert crop_around(mask, 10, (400, 400), 0.75) == (100, 135, 300, 285)
    assert crop_around(mask, 10, (400, 400), 1.5) == (40, 90, 360, 330)
    assert crop_around(mask, 10, (400, 400)) == crop_around(mask, 10, (400, 400), 0.75)


def test_a_small_instance_gets_a_margin_of_three_tokens() -> None:
    mask = on_grid((40, 40), 20, 20, 21, 22)
    assert crop_around(mask, 10, (400, 400), 0.75) == (170, 170, 240, 250)
    assert crop_around(mask, 10, (400, 400), 0.0) == (170, 170, 240, 250)
    # Its box alone counts, however many tokens of it are its own.
    corners = on_grid((40, 40), 20, 20, 21, 21) | on_grid((40, 40), 25, 27, 26, 28)
    assert crop_around(corners, 10, (400, 400)) == crop_around(on_grid((40, 40), 20, 20, 26, 28), 10, (400, 400))


def test_a_crop_ends_with_the_image() -> None:
    shape = (205, 395)
    assert crop_around(on_grid((21, 40), 0, 0, 4, 4), 10, shape) == (0, 0, 70, 70)
    assert crop_around(on_grid((21, 40), 17, 36, 21, 40), 10, shape) == (140, 330, 205, 395)
    assert crop_around(np.ones((21, 40), bool), 10, shape) == (0, 0, 205, 395)


def test_beside_a_narrow_instance_there_is_room() -> None:
    for mask, turn in ((on_grid((60, 60), 20, 30, 40, 31), 1), (on_grid((60, 60), 30, 20, 31, 40), -1)):
        height, width = np.subtract(*np.reshape(crop_around(mask, 10, (600, 600)), (2, 2))[::-1])[::turn]
        assert (height, width) == (500, 250)
    # As far as the image goes.
    assert crop_around(on_grid((60, 60), 20, 0, 40, 1), 10, (600, 600)) == (50, 0, 550, 130)
    assert crop_around(on_grid((60, 4), 20, 1, 40, 2), 10, (600, 40)) == (50, 0, 550, 40)


def test_tokens_need_not_be_whole_pixels() -> None:
    box = crop_around(on_grid((8, 8), 3, 3, 4, 4), 2.5, (19, 20), 1.0)
    assert box == (0, 0, 17, 17)
    assert all(type(side) is int for side in box)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (3, 5)])
@pytest.mark.parametrize("side", [0.05, 1.0, 14.0])
def test_tiny_images(shape: tuple[int, int], side: float) -> None:
    grid = tuple(int(np.ceil(pixels / side)) for pixels in shape)
    top, left, bottom, right = crop_around(np.ones(grid, bool), side, shape) or (0, 0, 0, 0)
    assert (top, left, bottom, right) == (0, 0, *shape)


def test_nothing_to_look_at() -> None:
    assert crop_around(np.zeros((5, 6), bool), 10, (50, 60)) is None
    # Tokens that lie in the padding, more than their margin beyond the image.
    assert crop_around(on_grid((20, 20), 15, 3, 16, 4), 10, (100, 200)) is None


# What to make of it


def looked(shape: tuple[int, int] = (20, 30)) -> np.ndarray:
    """Labels with an instance 1 in the middle, 2 on its right and 3 below."""
    view = np.zeros(shape, np.int32)
    view[5:15, 5:15] = 1
    view[5:15, 15:25] = 2
    view[15:18, 5:15] = 3
    return view


def test_the_same_object_takes_its_place() -> None:
    view = looked()
    others = view > 1
    before = view.copy()
    crop = np.zeros_like(view)
    crop[3:14, 4:17] = 2
    crop[0:2, 0:4] = 1
    assert redraw(view, 1, crop, 4) == [(1, 2)]
    # All of the region but what its neighbours have, and nothing else.
    assert np.array_equal(view == 1, (crop == 2) & ~others)
    assert np.array_equal(view[others], before[others])
    assert view.max() == 3


def test_it_falls_apart() -> None:
    view = looked()
    others = view > 1
    before = view.copy()
    crop = np.zeros_like(view)
    crop[4:15, 5:9] = 3
    crop[5:15, 9:13] = 1
    # Of no interest: it lies mostly elsewhere.
    crop[5:15, 14:25] = 2
    assert redraw(view, 1, crop, 7) == [(1, 1), (7, 3)]
    assert np.array_equal(view == 1, crop == 1)
    assert np.array_equal(view == 7, crop == 3)
    assert np.array_equal(view[others], before[others])
    assert set(np.unique(view)) == {0, 1, 2, 3, 7}


def test_it_falls_into_many() -> None:
    view = looked()
    crop = np.zeros_like(view)
    for k in range(5):
        crop[5 + 2 * k : 7 + 2 * k, 5:15] = k + 1
    assert redraw(view, 1, crop, 4) == [(1, 1), (4, 2), (5, 3), (6, 4), (7, 5)]
    for number, region in [(1, 1), (4, 2), (5, 3), (6, 4), (7, 5)]:
        assert np.array_equal(view == number, crop == region)


def regions(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    crop = np.zeros((20, 30), np.int32)
    for k, (top, left, bottom, right) in enumerate(boxes, start=1):
        crop[top:bottom, left:right] = k
    return crop


@pytest.mark.parametrize(
    ("crop", "why"),
    [
        (regions(), "nothing was seen"),
        (regions((0, 0, 4, 4)), "nothing was seen there"),
        (regions((5, 5, 15, 9)), "one small part alone"),
        (regions((0, 0, 20, 30)), "it is part of something larger"),
        (regions((5, 5, 8, 15), (8, 5, 9, 15)), "parts that leave out most of it"),
        (regions((5, 0, 15, 9), (0, 10, 20, 15)), "regions that lie half elsewhere"),
    ],
)
def test_it_stays(crop: np.ndarray, why: str) -> None:
    view = looked()
    before = view.copy()
    assert redraw(view, 1, crop, 4) == [], why
    assert np.array_equal(view, before)


def test_it_stays_one_where_it_must() -> None:
    view = looked()
    before = view.copy()
    halves = regions((5, 5, 15, 9), (5, 10, 15, 14))
    assert redraw(view, 1, halves, 4, split=False) == []
    assert np.array_equal(view, before)
    same = regions((5, 5, 15, 13))
    assert redraw(view, 1, same, 4, split=False) == [(1, 1)]
    assert np.array_equal(view == 1, same == 1)


def test_half_in_common_is_the_same() -> None:
    for right, found in ((10, [(1, 1)]), (9, [])):
        view = looked()
        assert redraw(view, 1, regions((5, 5, 15, right)), 4) == found
        assert np.count_nonzero(view == 1) == (50 if found else 100)


def test_an_instance_without_pixels() -> None:
    view = looked()
    before = view.copy()
    assert redraw(view, 9, regions((0, 0, 20, 30)), 4) == []
    assert np.array_equal(view, before)


def test_empty_views() -> None:
    view = np.zeros((0, 5), np.int32)
    assert redraw(view, 1, view.copy(), 2) == []


def test_every_part_has_pixels_of_its_own() -> None:
    rng = np.random.default_rng(0)
    outcomes = set()
    for trial in range(200):
        coarse = rng.integers(0, 4, (5, 7))
        view = np.kron(coarse, np.ones((4, 4), int)).astype(np.int32)
        crop = np.kron(rng.integers(0, 4, (10, 14)), np.ones((2, 2), int)).astype(np.int32)
        if trial % 2:
            # Regions that follow the labels more or less.
            crop = np.where(rng.random(view.shape) < 0.9, view + 2 * (rng.random(view.shape) < 0.4), 0).astype(np.int32)
        before = view.copy()
        taken = redraw(view, 1, crop, 4, split=trial % 3 > 0)
        outcomes.add(min(len(taken), 2))
        assert np.array_equal(view[before > 1], before[before > 1])
        assert [label for label, _ in taken] == [1, *range(4, 20)][: len(taken)]
        for label, region in taken:
            assert np.any(view == label)
            assert np.all(crop[view == label] == region)
        if not taken:
            assert np.array_equal(view, before)
    assert outcomes == {0, 1, 2}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_labels_in_a_file(tmp_path: Path, dtype: type) -> None:
    expected = looked()
    crop = regions((4, 5, 15, 9), (5, 9, 15, 13))
    taken = redraw(expected, 1, crop, 4)
    assert len(taken) == 2
    stored = np.memmap(tmp_path / "labels", dtype, "w+", shape=(40, 50))
    stored[...] = 200
    stored[10:30, 12:42] = looked()
    assert redraw(stored[10:30, 12:42], 1, crop.astype(np.uint16), 4) == taken
    assert np.array_equal(stored[10:30, 12:42], expected)
    stored[10:30, 12:42] = 200
    assert np.all(stored == 200)


def test_labels_that_the_type_does_not_hold() -> None:
    crop = np.array([[1, 1, 0, 2, 2]] * 2, np.int32)
    view = np.full((2, 5), 7, np.uint8)
    with pytest.raises(ValueError, match="holds numbers up to 256, not uint8"):
        redraw(view, 7, crop, 256)
    assert (view == 7).all()
    assert redraw(view, 7, crop, 255) == [(7, 1), (255, 2)]
