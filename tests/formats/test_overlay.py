from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsespec.formats import (
    draw_instances,
    instance_colours,
    jpeg_bytes,
    reduced_copy,
    render_overlay,
    write_overlay_jpeg,
)
from sparsespec.images import as_pixels


def two_discs(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.int32)
    labels[(y - height * 0.5) ** 2 + (x - width * 0.3) ** 2 < (height * 0.25) ** 2] = 1
    labels[(y - height * 0.5) ** 2 + (x - width * 0.7) ** 2 < (height * 0.2) ** 2] = 2
    return labels


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).max(axis=-1).mean())


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_outlines_are_visible_on_any_photograph(grey: int) -> None:
    photo = np.full((300, 400, 3), grey, np.uint8)
    labels = two_discs(300, 400)
    drawn = render_overlay(photo, labels, [0.9, 0.4])
    assert drawn.shape == photo.shape
    assert drawn.dtype == np.uint8
    # A horizontal cut through the lower part of the first disc, away from the tag: outside, edge, inside.
    row = 190
    columns = np.flatnonzero(labels[row] == 1)
    left = columns[0]
    line, rim, inside = drawn[row, left : left + 2], drawn[row, left - 1 : left], drawn[row, left + 12 : left + 20]
    assert contrast(line, np.broadcast_to(instance_colours(1), line.shape)) < 60
    assert contrast(inside, photo[row, :8]) > 30
    assert max(contrast(line[:1], photo[row, :1]), contrast(rim, photo[row, :1])) > 100
    # Far from any instance the photograph is untouched.
    np.testing.assert_array_equal(drawn[:20, :20], photo[:20, :20])
    np.testing.assert_array_equal(drawn[-20:, 190:210], photo[-20:, 190:210])


def test_the_inputs_stay_as_they_are() -> None:
    photo = np.full((120, 160, 3), 90, np.uint8)
    labels = two_discs(120, 160)
    before = labels.copy()
    render_overlay(photo, labels, [0.9, 0.4])
    assert (photo == 90).all()
    np.testing.assert_array_equal(labels, before)


def test_nothing_found_leaves_the_photograph() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    np.testing.assert_array_equal(render_overlay(photo, np.zeros((50, 70), int), []), photo)


def test_scores_are_written_inside_their_instance_or_beside_it() -> None:
    photo = np.zeros((300, 400, 3), np.uint8)
    labels = np.zeros((300, 400), int)
    labels[100:260, 40:360] = 1
    with_text = render_overlay(photo, labels, [0.87])
    other_score = render_overlay(photo, labels, [0.12])
    changed = np.argwhere((with_text != other_score).any(axis=2))
    assert len(changed) > 10
    (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
    assert 100 <= top < bottom < 260
    assert 40 <= left < right < 360


def test_tags_stay_inside_the_picture_and_apart() -> None:
    photo = np.zeros((240, 320, 3), np.uint8)
    labels = np.zeros((240, 320), int)
    labels[:6, :6], labels[:6, 20:26], labels[-5:, -5:] = 1, 2, 3
    drawn = render_overlay(photo, labels, [0.9, 0.8, 0.7])
    colours = instance_colours(3).astype(int)
    sizes = [(np.abs(drawn.astype(int) - colour).max(axis=2) < 8).sum() for colour in colours]
    # Each tag shows well more of its colour than the instance itself has pixels.
    assert min(sizes) > 150


@pytest.mark.parametrize("shape", [(1, 1), (3, 4000), (4000, 3), (2, 2), (50, 50)])
def test_extreme_shapes(shape: tuple[int, int]) -> None:
    photo = np.full((*shape, 3), 40, np.uint8)
    drawn = render_overlay(photo, np.ones(shape, int), [0.5])
    assert max(drawn.shape[:2]) == min(2048, max(shape))
    assert min(drawn.shape[:2]) >= 1


def test_large_pictures_are_reduced_and_keep_their_proportions() -> None:
    photo = np.full((600, 900, 3), 40, np.uint16) * 257
    labels = two_discs(600, 900)
    drawn = render_overlay(photo, labels, [0.9, 0.4], max_side=300)
    assert drawn.shape == (200, 300, 3)
    assert np.abs(drawn[0, 0].astype(int) - 40).max() <= 1
    assert contrast(drawn[120:125, 80:100], np.full((5, 20, 3), 40)) > 30  # inside the first disc
    assert render_overlay(photo, labels, [0.9, 0.4]).shape == (600, 900, 3)


def test_colours_are_stable_and_distinct() -> None:
    colours = instance_colours(200)
    assert colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == 200
    np.testing.assert_array_equal(instance_colours(5), colours[:5])
    assert instance_colours(0).shape == (0, 3)
    few = colours[:10].astype(int)
    distance = np.abs(few[:, None] - few).sum(axis=2) + 1000 * np.eye(10, dtype=int)
    assert distance.min() > 60
    assert colours.max(axis=1).min() > 200  # bright enough for dark writing


@pytest.mark.parametrize(
    ("image", "labels", "scores", "message"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), int), [], "image must be"),
        (np.zeros((4, 4, 3)), np.zeros((4, 4), int), [], "float64"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), int), [], r"got \(4, 5\)"),
        (np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), int), [], r"0\.\.0"),
    ],
)
def test_refused(image: np.ndarray, labels: np.ndarray, scores: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_overlay(image, labels, scores)


def test_jpeg(tmp_path: Path) -> None:
    drawn = render_overlay(np.full((90, 120, 3), 99, np.uint8), two_discs(90, 120), [0.9, 0.4])
    write_overlay_jpeg(tmp_path / "o.jpg", drawn)
    with Image.open(tmp_path / "o.jpg") as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - drawn).mean() < 4
    assert jpeg_bytes(drawn) == (tmp_path / "o.jpg").read_bytes()


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.dstack([x * 255 / width, y * 255 / height, 127 + 120 * np.sin(x / 9) * np.cos(y / 7)]).astype(np.uint8)


@pytest.mark.parametrize("side", [500, 333, 150, 37, 1])
@pytest.mark.parametrize("pixels", [1, 20_000, 10**7])
def test_reduced_by_bands_as_in_one_piece(side: int, pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    photo, labels = smooth(610, 877), two_discs(610, 877)
    size = (side, max(1, round(610 * side / 877)))
    expected = Image.fromarray(photo).resize(size, Image.Resampling.HAMMING, reducing_gap=3.0)
    monkeypatch.setattr("sparsespec.formats.overlay._PIXELS_AT_ONCE", pixels)
    small, small_labels = reduced_copy(photo, labels, side)
    assert small.size == size
    # The filter's weights are rounded from slightly different fractions.
    assert np.abs(np.asarray(small).astype(int) - np.asarray(expected)).max() <= 1
    rows, columns = (((np.arange(n) + 0.5) * (m / n)).astype(int) for n, m in ((size[1], 610), (size[0], 877)))
    np.testing.assert_array_equal(small_labels, labels[rows][:, columns])


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_sources_are_drawn_like_arrays(kind: str) -> None:
    photo = smooth(120, 160)
    labels = two_discs(120, 160)
    scaled: Any = {"uint8": photo, "uint16": photo.astype(np.uint16) * 257, "float32": photo.astype(np.float32) / 255}
    drawn = render_overlay(as_pixels(scaled[kind]), labels, [0.9, 0.4])
    np.testing.assert_array_equal(drawn, render_overlay(photo, labels, [0.9, 0.4]))


def test_large_pictures_are_reduced_in_little_memory() -> None:
    class Striped:
        """A hundred megapixels that exist only where somebody looks."""

        shape = (10_000, 10_000, 3)
        dtype = np.dtype(np.uint8)
        largest = 0

        def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
            self.largest = max(self.largest, (bottom - top) * (right - left))
            rows = np.arange(top, bottom, dtype=np.uint32) * 255 // 10_000
            return np.broadcast_to(rows[:, None, None].astype(np.uint8), (bottom - top, right - left, 3))

    source = Striped()
    labels = np.broadcast_to(np.arange(10_000, dtype=np.uint16)[:, None] // 5000, (10_000, 10_000))
    tracemalloc.start()
    try:
        photo, small = reduced_copy(source, labels, 400)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()
    assert source.largest <= 1 << 23
    assert photo.size == (400, 400)
    np.testing.assert_allclose(np.asarray(photo)[:, 7, 1], np.arange(400) * 255 / 400, atol=1.5)
    np.testing.assert_array_equal(small, np.repeat([0, 1], 200)[:, None].repeat(400, axis=1))


def test_more_instances_than_a_palette_holds() -> None:
    labels = np.arange(289).reshape(17, 17).repeat(4, 0).repeat(4, 1)
    # Too small a picture for tags.
    drawn = render_overlay(np.zeros((68, 68, 3), np.uint8), labels, np.full(288, 0.5))
    few = render_overlay(np.zeros((68, 68, 3), np.uint8), np.where(labels < 250, labels, 0), np.full(249, 0.5))
    np.testing.assert_array_equal(drawn[:50], few[:50])
    assert drawn[66, 66].max() > 40


def test_boxes_agree_with_scipy() -> None:
    from scipy import ndimage

    from sparsespec.formats.overlay import _boxes

    labels = np.random.default_rng(2).integers(0, 30, (40, 50)) * (np.random.default_rng(3).random((40, 50)) > 0.9)
    labels[5] = 40  # a whole row, and the beginning of the next
    labels[6, :3] = 40
    expected = {
        label: (rows.start, columns.start, rows.stop, columns.stop)
        for label, found in enumerate(ndimage.find_objects(labels), start=1)
        if found is not None
        for rows, columns in [found]
    }
    assert _boxes(labels) == expected


def test_drawing_leaves_the_photograph_alone() -> None:
    photo = Image.fromarray(smooth(120, 160))
    before = photo.tobytes()
    drawn = draw_instances(photo, two_discs(120, 160), [0.9, 0.4])
    assert photo.tobytes() == before != drawn.tobytes()
    assert jpeg_bytes(drawn) == jpeg_bytes(np.asarray(drawn))
