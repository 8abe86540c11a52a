from __future__ import annotations

import numpy as np
import pytest

from sparsespec.formats import encode_rle, instance_annotations
from sparsespec.formats.tracks import Linker, mask_iou
from tests.formats.shapes import masks

SHAPES = [np.pad(mask, ((0, 40 - mask.shape[0]), (0, 40 - mask.shape[1]))) for mask in masks().values()]


def frame(*boxes: tuple[int, int, int, int], shape: tuple[int, int] = (40, 60)) -> list[dict]:
    """Annotations of rectangles (left, top, right, bottom), the first with the first label."""
    labels = np.zeros(shape, int)
    for label, (left, top, right, bottom) in enumerate(boxes, start=1):
        labels[top:bottom, left:right] = label
    return instance_annotations(labels, [0.5] * len(boxes))


@pytest.mark.parametrize("first", range(len(SHAPES)))
def test_overlap_is_that_of_the_pixels(first: int) -> None:
    one = SHAPES[first]
    for other in SHAPES:
        expected = (one & other).sum() / (one | other).sum()
        assert mask_iou(encode_rle(one), encode_rle(other)) == pytest.approx(expected, abs=1e-12)


def test_overlap_of_nothing() -> None:
    empty, full, turned = encode_rle(np.zeros((3, 4))), encode_rle(np.ones((3, 4))), encode_rle(np.ones((4, 3)))
    assert mask_iou(empty, full) == mask_iou(full, empty) == mask_iou(empty, empty) == 0
    assert mask_iou(full, turned) == 0
    assert mask_iou(full, full) == 1


def test_two_objects_that_move_past_each_other() -> None:
    linker = Linker()
    for step in range(8):
        going, coming = (2 + 4 * step, 5, 18 + 4 * step, 15), (40 - 4 * step, 20, 56 - 4 * step, 35)
        order = [going, coming] if step % 2 else [coming, going]
        assert linker.add(frame(*order)) == ([2, 1] if step % 2 else [1, 2])


def test_the_best_sum_decides_and_not_the_first() -> None:
    linker = Linker(min_iou=0.1)
    assert linker.add(frame((0, 0, 20, 10), (20, 0, 30, 10))) == [1, 2]
    # The first overlaps with both; it is left to the track that has no other, so that both go on.
    assert linker.add(frame((10, 0, 30, 10), (2, 0, 10, 10))) == [2, 1]


def test_too_little_overlap_begins_a_track() -> None:
    linker = Linker(min_iou=0.5)
    assert linker.add(frame((0, 0, 30, 10))) == [1]
    assert linker.add(frame((10, 0, 40, 10))) == [1]  # exactly one half
    assert linker.add(frame((21, 0, 51, 10))) == [2]


def test_what_is_too_little_takes_no_track_from_another() -> None:
    linker = Linker(min_iou=0.5)
    assert linker.add(frame((0, 0, 10, 10), (12, 0, 32, 10))) == [1, 2]
    # Crosswise, two overlaps below the limit would add up to more than the one that is enough.
    assert linker.add(frame((0, 0, 10, 18), (12, 0, 32, 10))) == [1, 2]


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_gaps(gap: int) -> None:
    linker = Linker(max_gap=gap)
    box = (3, 3, 20, 20)
    assert linker.add(frame(box)) == [1]
    for _ in range(gap):
        assert linker.add([]) == []
    assert linker.add(frame(box)) == [1]
    for _ in range(gap + 1):
        assert linker.add([]) == []
    assert linker.add(frame(box)) == [2]


def test_frames_of_another_size_are_another_scene() -> None:
    linker = Linker()
    assert linker.add(frame((0, 0, 10, 10))) == [1]
    assert linker.add(frame((0, 0, 10, 10), shape=(60, 40))) == [2]


@pytest.mark.parametrize(("options", "message"), [({"min_iou": 0}, "got 0"), ({"min_iou": 1.1}, "got 1.1"),
                                                  ({"max_gap": -1}, "at least 0, got -1")])  # fmt: skip
def test_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Linker(**options)
