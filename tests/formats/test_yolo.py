from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label as components

from sparsespec.formats import instance_annotations
from sparsespec.formats.polygons import add_polygons
from sparsespec.formats.yolo import write_yolo, yolo_dataset_yaml, yolo_lines
from tests.formats.shapes import masks

MASKS = masks()
WAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"cut off": np.trunc, "rounded": np.round}


def annotated(labels: np.ndarray) -> list[dict]:
    annotations = instance_annotations(labels, [0.5] * int(labels.max()))
    add_polygons(annotations)
    return annotations


def points_of(line: str, width: int, height: int) -> np.ndarray:
    category, *values = line.split(" ")
    assert category == "0"
    # Readers hold them in single precision.
    points = np.array(values, np.float32).reshape(-1, 2)
    assert len(points) >= 3
    assert points.min() >= 0
    assert points.max() <= 1
    return points * np.array([width, height])


def filled(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill a polygon between pixels, its outline included, as OpenCV does."""
    from skimage.draw import line, polygon

    mask = np.zeros((height, width), bool)
    mask[polygon(points[:, 1], points[:, 0], mask.shape)] = True
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        mask[line(y0, x0, y1, x1)] = True
    return mask


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MASKS)
def test_readers_fill_the_very_pixels(name: str, way: str) -> None:
    mask = MASKS[name]
    height, width = mask.shape
    points = WAYS[way](points_of(yolo_lines(annotated(mask.astype(int)), width, height), width, height)).astype(int)
    result = filled(points, height, width)
    assert result[mask].all()
    if components(mask, np.ones((3, 3)))[1] == 1:
        np.testing.assert_array_equal(result, mask)


@pytest.mark.parametrize("size", [3, 4000, 60_000])
def test_six_digits_are_enough(size: int) -> None:
    labels = np.zeros((3, size), int)
    labels[1, size // 3 : size - 1] = 1
    points = points_of(yolo_lines(annotated(labels), size, 3), size, 3)
    for way in WAYS.values():
        whole = way(points).astype(int)
        assert whole.min(axis=0).tolist() == [size // 3, 1]
        assert whole.max(axis=0).tolist() == [size - 2, 1]


def test_parts_are_linked_where_they_are_nearest() -> None:
    labels = np.zeros((20, 40), int)
    labels[2:6, 2:10] = labels[2:6, 12:20] = labels[10:18, 14:18] = labels[0, 39] = 1
    points = np.trunc(points_of(yolo_lines(annotated(labels), 40, 20), 40, 20)).astype(int)
    extra = filled(points, 20, 40) & (labels == 0)
    # Two columns between the first two, four rows to the third; the last is 19 columns away from the second.
    assert extra[:, 10:12].sum() == 2
    assert 4 <= extra[6:10].sum() <= 5
    assert extra[:, 20:39].any(axis=0).all()
    assert extra[:, 20:39].sum() <= 2 * 19  # there and back a line may take different pixels
    assert extra.sum() <= 2 + 5 + 2 * 19


def test_lines() -> None:
    labels = np.zeros((4, 8), int)
    labels[1:3, 2:6] = 2
    labels[0, 0] = 1
    text = yolo_lines(annotated(labels), 8, 4)
    first, second = text.splitlines()
    assert first == "0" + " 0.056250 0.112500" * 4
    assert second == "0 0.306250 0.362500 0.681250 0.362500 0.681250 0.612500 0.306250 0.612500"
    assert text.endswith("\n")
    assert yolo_lines([], 8, 4) == ""


def test_file(tmp_path: Path) -> None:
    annotations = annotated(np.ones((3, 3), int))
    write_yolo(tmp_path / "x.txt", annotations, 3, 3)
    assert (tmp_path / "x.txt").read_bytes() == yolo_lines(annotations, 3, 3).encode()
    write_yolo(tmp_path / "empty.txt", [], 3, 3)
    assert (tmp_path / "empty.txt").read_bytes() == b""


def test_refused(tmp_path: Path) -> None:
    annotations = instance_annotations(np.ones((3, 3), int), [0.5])
    with pytest.raises(ValueError, match="annotation 1 has no polygons: call add_polygons"):
        write_yolo(tmp_path / "x.txt", annotations, 3, 3)
    with pytest.raises(ValueError, match="at least 1, got 0 x 3"):
        yolo_lines([], 0, 3)
    assert list(tmp_path.iterdir()) == []


def test_data_set() -> None:
    assert yolo_dataset_yaml() == 'train: "images"\nval: "images"\nnames:\n  0: object\n'
    assert yolo_dataset_yaml(["a", "b"]).startswith('train:\n  - "a"\n  - "b"\nval:\n')
    # JSON's strings are YAML's: nothing in a name of a folder ends its quotes.
    assert 'train: "a\\"b\\\\\\U0000000a: c"\nval' in yolo_dataset_yaml(['a"b\\\n: c'])
