from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsespec.formats import cutouts, instance_annotations
from sparsespec.formats.cutouts import write_cutouts
from sparsespec.images import open_image


def scene(dtype: type = np.uint8, shape: tuple[int, int] = (60, 80)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    labels = np.zeros(shape, np.uint16)
    labels[10:40, 5:50] = 1
    labels[20:30, 20:35] = 2
    labels[0, :] = labels[-1, :] = labels[:, 0] = labels[:, -1] = 3
    labels[-1, -1] = 4
    image = rng.random((*shape, 3)).astype(np.float32)
    return image if dtype is np.float32 else (image * np.iinfo(dtype).max).astype(dtype), labels


@pytest.mark.parametrize("pixels", [1, 700, 1 << 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_colours_and_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, pixels: int) -> None:
    monkeypatch.setattr(cutouts, "_PIXELS_AT_ONCE", pixels)
    image, labels = scene(dtype)
    eight = {np.uint8: image, np.uint16: image.astype(int) >> 8, np.float32: np.round(image * 255)}[dtype]
    annotations = instance_annotations(labels, [0.5] * 4)
    paths = write_cutouts(tmp_path, "a/b", image, labels, annotations)
    assert paths == [f"cutouts/a/b/00{k}.png" for k in (1, 2, 3, 4)]
    for path, annotation in zip(paths, annotations, strict=True):
        left, top, width, height = annotation["bbox"]
        mask = labels[top : top + height, left : left + width] == annotation["label"]
        with Image.open(tmp_path / path) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGBA")
            found = np.asarray(picture)
        np.testing.assert_array_equal(found[..., 3], 255 * mask)
        np.testing.assert_array_equal(found[..., :3], eight[top : top + height, left : left + width] * mask[..., None])


def test_same_bytes_from_a_file_as_from_an_array(tmp_path: Path) -> None:
    image, labels = scene()
    annotations = instance_annotations(labels, [0.5] * 4)
    Image.fromarray(image).save(tmp_path / "x.png")
    paths = write_cutouts(tmp_path / "array", "x", image, labels, annotations)
    with open_image(tmp_path / "x.png") as source:
        assert write_cutouts(tmp_path / "source", "x", source, labels, annotations) == paths
    for path in paths:
        assert (tmp_path / "array" / path).read_bytes() == (tmp_path / "source" / path).read_bytes()


class Watched:
    """Notes which windows are read."""

    def __init__(self, image: np.ndarray) -> None:
        self.image, self.shape, self.dtype = image, image.shape, image.dtype
        self.windows: list[tuple[int, int, int, int]] = []

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        self.windows.append((top, left, bottom, right))
        return self.image[top:bottom, left:right]


def test_only_the_box_is_read(tmp_path: Path) -> None:
    image, labels = scene()
    source = Watched(image)
    write_cutouts(tmp_path, "x", source, labels, instance_annotations(labels, [0.5] * 4)[1:2])
    assert source.windows == [(20, 20, 30, 35)]


def test_memory_does_not_grow_with_the_instance(tmp_path: Path) -> None:
    def peak(height: int) -> int:
        labels = np.ones((height, 2000), np.uint8)
        image = np.zeros((height, 2000, 3), np.uint8)
        annotations = instance_annotations(labels, [1.0])
        tracemalloc.start()
        try:
            write_cutouts(tmp_path, "x", image, labels, annotations)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(4000) < 1.2 * peak(1000)


def test_no_instances_no_files(tmp_path: Path) -> None:
    assert write_cutouts(tmp_path, "x", np.zeros((3, 4, 3), np.uint8), np.zeros((3, 4), int), []) == []
    assert list(tmp_path.iterdir()) == []


def test_wrong_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"size of the image \(3, 4\), got \(4, 3\)"):
        write_cutouts(tmp_path, "x", np.zeros((3, 4, 3), np.uint8), np.zeros((4, 3), int), [])


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    image, labels = scene()
    annotations = instance_annotations(labels, [0.5] * 4)
    blocked = tmp_path / "cutouts" / "x" / "003.png"
    blocked.mkdir(parents=True)
    (blocked / "not ours").touch()
    with pytest.raises(OSError, match="003"):
        write_cutouts(tmp_path, "x", image, labels, annotations)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == [
        os.path.join("cutouts", "x", "003.png", "not ours")
    ]
