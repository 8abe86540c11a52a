from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsespec.formats import write_label_png


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 4000), (4, 3)])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64, np.uint16])
def test_round_trip(tmp_path: Path, shape: tuple[int, int], dtype: type) -> None:
    labels: np.ndarray = np.random.default_rng(3).integers(0, 256, shape).astype(dtype)
    write_label_png(tmp_path / "l.png", labels)
    with Image.open(tmp_path / "l.png") as image:
        assert image.format == "PNG"
        assert image.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(image), labels)


def test_all_sixteen_bits_and_no_more(tmp_path: Path) -> None:
    labels = np.array([[0, 65535], [256, 1]])
    write_label_png(tmp_path / "l.png", labels)
    with Image.open(tmp_path / "l.png") as image:
        np.testing.assert_array_equal(np.asarray(image), labels)
    with pytest.raises(ValueError, match=r"0\.\.65535.*got 0\.\.65536"):
        write_label_png(tmp_path / "m.png", labels + np.array([[0, 1], [0, 0]]))
    assert not (tmp_path / "m.png").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 2, 3), int), "two-dimensional"),
        (np.zeros((0, 2), int), "at least one pixel"),
        (np.zeros((2, 2)), "whole numbers, got float64"),
        (np.array([[-1, 0]]), r"got -1\.\.0"),
    ],
)
def test_refused(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_label_png(tmp_path / "l.png", labels)
    assert list(tmp_path.iterdir()) == []


def test_same_labels_same_bytes(tmp_path: Path) -> None:
    labels = np.arange(600).reshape(20, 30)
    write_label_png(tmp_path / "a.png", labels)
    write_label_png(tmp_path / "b.png", labels.astype(np.uint16))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
