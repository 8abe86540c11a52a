from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from sparsespec.evaluation.datasets._masks import decode_segmentation, fill_polygon
from sparsespec.formats import encode_rle

RNG = np.random.default_rng(5)


def corners(kind: str, height: int, width: int) -> np.ndarray:
    count = int(RNG.integers(3, 25))
    if kind == "anywhere":
        return RNG.random((count, 2)) * [width, height]
    if kind == "leaving the image":
        return RNG.normal(0.5, 0.6, (count, 2)) * [width, height]
    if kind == "whole numbers":
        return RNG.integers(-5, 130, (count, 2)).astype(float)
    angle = 2 * np.pi * np.sort(RNG.random(count))
    outline = np.column_stack([width / 2 * (1 + np.cos(angle)), height / 2 * (1 + np.sin(angle))]).round(2)
    return np.repeat(outline, RNG.integers(1, 3, count), axis=0)


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    runs = np.diff([0, *edges.tolist(), flat.size])
    return {"size": list(mask.shape), "counts": array("q", ([0] if flat[0] else []) + runs.tolist())}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["anywhere", "leaving the image", "whole numbers", "round, corners twice"])
def test_polygons_cover_the_pixels_that_pycocotools_gives_them(kind: str) -> None:
    tools = pytest.importorskip("pycocotools.mask", reason="pycocotools judges our polygons")
    for _ in range(60):
        height, width = (int(side) for side in RNG.integers(5, 120, 2))
        points = corners(kind, height, width)
        theirs = tools.decode(tools.merge(tools.frPyObjects([points.ravel().tolist()], height, width)))
        np.testing.assert_array_equal(fill_polygon(points, height, width), theirs.astype(bool))


def test_polygon_of_whole_pixels() -> None:
    mask = fill_polygon(np.array([[2.0, 1.0], [6.0, 1.0], [6.0, 4.0], [2.0, 4.0]]), 6, 8)
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(mask, expected)


def test_parts_of_a_polygon_are_joined() -> None:
    first, second = [0.0, 0, 4, 0, 4, 4, 0, 4], [2.0, 2, 7, 2, 7, 6, 2, 6]
    mask = decode_segmentation([array("d", first), array("d", second)], 8, 8)
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = expected[2:6, 2:7] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_runs_of_both_forms(share: float) -> None:
    mask = RNG.random((9, 13)) < share
    np.testing.assert_array_equal(decode_segmentation(encode_rle(mask), 9, 13), mask)
    np.testing.assert_array_equal(decode_segmentation(uncompressed(mask), 9, 13), mask)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "neither runs nor polygons but None"),
        ([], r"neither runs nor polygons but \[\]"),
        ("abc", "neither runs nor polygons but 'abc'"),
        ([array("d", [1, 2, 3, 4])], "has 4 numbers"),
        ([array("d", [1, 2, 3, 4, 5, 6, 7])], "has 7 numbers"),
        ([["a", 1]], "is not a list of numbers"),
        ([array("d", [0, 0, 1, float("nan"), 3, 3])], "no finite number"),
        ([array("d", [0, 0, 1e12, 0, 3, 3])], "reaches from 0 to 1e"),
        ({"counts": "04"}, r"not \[height, width\] but None"),
        ({"size": [2, 2.0], "counts": "04"}, r"not \[height, width\] but \[2, 2.0\]"),
        ({"size": [3, 2], "counts": "06"}, "the mask is 2 x 3 pixels, and the image is described as 2 x 2"),
        ({"size": [2, 2]}, "no text or list of whole numbers"),
        ({"size": [2, 2], "counts": [1.5, 2.5]}, "no text or list of whole numbers"),
        ({"size": [2, 2], "counts": array("q", [1, 2])}, "counts cover 3 pixels, size 2 x 2 has 4"),
        ({"size": [2, 2], "counts": array("q", [6, -2])}, "a run of -2 to 6 pixels"),
        ({"size": [2, 2], "counts": "03"}, "counts cover 3 pixels"),
        ({"size": [2, 2], "counts": ""}, "counts cover 0 pixels"),
        ({"size": [2, 2], "counts": "0 4"}, "have the character ' '"),
        ({"size": [2, 2], "counts": "0é"}, "have the character 'é'"),
        ({"size": [2, 2], "counts": "0\ud800"}, r"have the character '\\ud800'"),
        ({"size": [2, 2], "counts": "04P"}, "cut short"),
        ({"size": [2, 2], "counts": "PPPPPPPPPPPP4"}, "larger than any image"),
    ],
)
def test_what_does_not_decode_is_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_segmentation(segmentation, 2, 2)
