from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.ndimage import label as components

from sparsespec.formats import instance_annotations
from sparsespec.formats._runs import foreground_runs, mask_runs
from sparsespec.formats.coco import encode_rle
from sparsespec.formats.polygons import add_polygons, mask_polygons
from tests.formats.shapes import masks, winding

MASKS = masks()
# pycocotools' own arrays are from before NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("name", MASKS)
def test_polygons_enclose_the_pixels_and_no_others(name: str) -> None:
    mask = MASKS[name]
    polygons = mask_polygons(mask)
    # Once around each pixel: the even-odd rule and the winding rule agree.
    np.testing.assert_array_equal(winding(polygons, *mask.shape), mask.astype(int))
    assert len(polygons) == components(mask)[1]


@pytest.mark.parametrize("name", MASKS)
def test_pycocotools_fills_them_exactly(name: str) -> None:
    tools = pytest.importorskip("pycocotools.mask", reason="pycocotools fills the polygons")
    mask = MASKS[name]
    height, width = mask.shape
    filled = tools.decode(tools.merge(tools.frPyObjects(mask_polygons(mask), height, width)))
    np.testing.assert_array_equal(filled, mask)


@pytest.mark.parametrize("seed", range(20))
def test_random_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 25, 2)) < rng.random()
    np.testing.assert_array_equal(winding(mask_polygons(mask), *mask.shape), mask.astype(int))


def test_points_and_their_order() -> None:
    assert mask_polygons(np.zeros((3, 4))) == []
    assert mask_polygons(np.zeros((0, 4))) == []
    mask = np.zeros((4, 6), bool)
    mask[2, 3:5] = True
    mask[0, 0] = True
    assert mask_polygons(mask) == [[0, 0, 1, 0, 1, 1, 0, 1], [3, 2, 5, 2, 5, 3, 3, 3]]
    assert mask_polygons(mask[1:, 2:], offset=(2, 1)) == [[3, 2, 5, 2, 5, 3, 3, 3]]
    hole = np.ones((3, 3), bool)
    hole[1, 1] = False
    # Down the middle of the column above the hole, around it and back.
    cut = [1.5, 0, 1.5, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1.5, 1, 1.5, 0]
    assert mask_polygons(hole) == [[0, 0, *cut, 3, 0, 3, 3, 0, 3]]
    assert json.dumps(mask_polygons(hole)[0][:6]) == "[0, 0, 1.5, 0, 1.5, 1]"


def test_wrong_dimensions() -> None:
    with pytest.raises(ValueError, match=r"two-dimensional, got the shape \(3,\)"):
        mask_polygons(np.ones(3))


def test_annotations_get_the_polygons_of_their_masks() -> None:
    labels = np.random.default_rng(2).integers(0, 4, (9, 12))
    labels = np.kron(labels, np.ones((3, 2), int))
    annotations = instance_annotations(labels, [0.5] * 3)
    add_polygons(annotations, labels)
    assert [annotation["label"] for annotation in annotations] == [1, 2, 3]
    for annotation in annotations:
        assert annotation["polygons"] == mask_polygons(labels == annotation["label"])
    with pytest.raises(ValueError, match=r"of shape \(27, 24\), labels has \(24, 27\)"):
        add_polygons(annotations, labels.T)
    add_polygons([])


def test_an_instance_along_all_borders() -> None:
    labels = np.pad(np.zeros((4, 5), int), 2, constant_values=1)
    (annotation,) = instance_annotations(labels, [1.0])
    add_polygons([annotation])
    np.testing.assert_array_equal(winding(annotation["polygons"], *labels.shape), labels)


@pytest.mark.parametrize("name", MASKS)
def test_runs_of_encodings(name: str) -> None:
    for mask in (MASKS[name], ~MASKS[name]):
        for ours, expected in zip(foreground_runs(encode_rle(mask)), mask_runs(mask), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_runs_of_long_and_short_counts() -> None:
    lengths = [3, 40_000, 1, 2, 100_000, 1, 5, 1_100_000, 31, 32, 15, 16, 1023, 1]
    flat = np.repeat(np.arange(len(lengths)) % 2, lengths)[None]
    ends = np.cumsum(lengths)
    begins_found, ends_found = foreground_runs(encode_rle(flat))
    np.testing.assert_array_equal(begins_found, ends[:-1:2])
    np.testing.assert_array_equal(ends_found, ends[1::2])


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [2, 3], "counts": "5"}, "cover 5 pixels, size 2 x 3 has 6"),
        ({"size": [2, 3], "counts": ""}, "cover 0 pixels"),
        ({"size": [2, 3], "counts": "P"}, "not those of a COCO"),  # a number that does not end
        ({"size": [2, 3], "counts": "6!"}, "not those of a COCO"),
        ({"size": [2, 3], "counts": "6\x7f"}, "not those of a COCO"),
        ({"size": [2, 3], "counts": "o" * 12 + "0"}, "more than 60 bits"),
        ({"size": [2, 3], "counts": "7O"}, "cover 6 pixels"),  # 7 and -1
    ],
)
def test_damaged_encodings(rle: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foreground_runs(rle)


def test_runs_that_meet_are_one() -> None:
    begins, ends = foreground_runs({"size": [1, 6], "counts": "0202"})  # 0, 2, 0, 4: a count of zero between them
    assert (begins.tolist(), ends.tolist()) == ([0], [6])
