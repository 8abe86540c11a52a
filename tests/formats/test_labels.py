from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsespec.formats import labels as labels_module
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


@pytest.mark.parametrize("pixels", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (41, 53)])
def test_any_number_of_rows_at_a_time_gives_the_same_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(labels_module, "_PIXELS_AT_ONCE", pixels)
    labels = np.random.default_rng(5).integers(0, 65536, shape, dtype=np.int32)
    labels[: shape[0] // 2] = 3
    write_label_png(tmp_path / "l.png", labels)
    with Image.open(tmp_path / "l.png") as image:
        image.verify()  # the checksums
    with Image.open(tmp_path / "l.png") as image:
        assert image.size == shape[::-1]
        np.testing.assert_array_equal(np.asarray(image), labels)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_mapped_labels_need_little_memory_and_stay_as_they_are(tmp_path: Path, dtype: type) -> None:
    shape = (3000, 4000)
    labels = np.memmap(tmp_path / "labels", dtype, "w+", shape=shape)
    labels[500:1500, 500:3500] = 7
    labels[2000:, :] = 65535
    tracemalloc.start()
    try:
        write_label_png(tmp_path / "l.png", labels)
        assert tracemalloc.get_traced_memory()[1] < 12e6  # the labels have 24 or 48 MB
    finally:
        tracemalloc.stop()
    expected = np.zeros(shape, dtype)
    expected[500:1500, 500:3500] = 7
    expected[2000:, :] = 65535
    np.testing.assert_array_equal(labels, expected)
    with Image.open(tmp_path / "l.png") as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_other_memory_layouts(tmp_path: Path) -> None:
    labels = np.random.default_rng(5).integers(0, 9, (40, 60))
    for view in (labels.T, labels[::2, ::-3], np.asfortranarray(labels), labels.astype(">i4")):
        write_label_png(tmp_path / "l.png", view)
        with Image.open(tmp_path / "l.png") as image:
            np.testing.assert_array_equal(np.asarray(image), view)
