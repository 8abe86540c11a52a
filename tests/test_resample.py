from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sparsespec import resample
from sparsespec.resample import resize
from tests.reference.resampling import triangle_image

SHAPES = [
    ((20, 30), (7, 11)),
    ((7, 11), (20, 30)),
    ((9, 9), (9, 4)),
    ((9, 9), (18, 9)),
    ((1, 40), (1, 3)),
    ((5, 1), (2, 6)),
]


def _image(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).random(shape, np.float32)


@pytest.mark.parametrize(("before", "after"), SHAPES)
def test_matches_the_definition(before: tuple[int, int], after: tuple[int, int]) -> None:
    image = _image((*before, 3))
    result = resize(image, after)
    assert result.shape == (*after, 3)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, triangle_image(image, after), atol=2e-6)


@pytest.mark.parametrize(("before", "after"), SHAPES)
def test_matches_pillow(before: tuple[int, int], after: tuple[int, int]) -> None:
    image = _image(before)
    pillow = Image.fromarray(image).resize(after[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(resize(image, after), np.asarray(pillow), atol=2e-6)


@pytest.mark.parametrize(("scale", "after"), [(0.3, (6, 9)), (0.29, (6, 9)), (2.5, (50, 75)), (0.7, (14, 21))])
def test_one_scale_for_both_axes(scale: float, after: tuple[int, int]) -> None:
    image = _image((20, 30, 2))
    np.testing.assert_allclose(resize(image, after, scale=scale), triangle_image(image, after, scale), atol=2e-6)


def test_scale_is_not_bent_by_rounding_the_sizes() -> None:
    # 101 x 37 at 0.45 is 45.45 x 16.65: on a ramp, each pixel must hold the coordinate that it lies on.
    ramp = np.add.outer(np.arange(101.0), np.arange(37.0))
    rows, columns = ((np.arange(size) + 0.5) / 0.45 - 0.5 for size in (45, 17))
    inner = np.s_[2:-2, 2:-2]
    difference = resize(ramp, (45, 17), scale=0.45) - np.add.outer(rows, columns)
    assert np.abs(difference[inner]).max() < 0.1
    stretched = resize(ramp, (45, 17)) - np.add.outer(rows, columns)
    assert np.abs(stretched[inner]).max() > 0.5


def test_beyond_the_edge_the_last_pixel_goes_on() -> None:
    result = resize(np.array([[1.0, 2.0, 3.0]]), (1, 9), scale=1.0)
    np.testing.assert_allclose(result, [[1, 2, 3, 3, 3, 3, 3, 3, 3]])


@pytest.mark.parametrize("after", [(3, 5), (64, 96), (32, 48)])
def test_constant_stays_constant(after: tuple[int, int]) -> None:
    np.testing.assert_allclose(resize(np.full((32, 48, 3), 0.3, np.float32), after), 0.3, rtol=1e-6)


def test_same_size_is_a_copy() -> None:
    image = _image((5, 6, 3))
    result = resize(image, (5, 6))
    np.testing.assert_array_equal(result, image)
    assert not np.shares_memory(result, image)


@pytest.mark.parametrize("channels", [(), (1,), (4,)])
def test_channels_are_kept(channels: tuple[int, ...]) -> None:
    assert resize(np.ones((8, 8, *channels)), (3, 2)).shape == (3, 2, *channels)


def test_other_layouts_and_types() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    expected = resize(image.astype(np.float32), (5, 4))
    read_only = image.copy()
    read_only.flags.writeable = False
    for other in (image, np.asfortranarray(image), read_only, image.astype(np.float64), image[::-1][::-1]):
        np.testing.assert_array_equal(resize(other, (5, 4)), expected)


def test_nan_spreads_no_further_than_the_filter() -> None:
    image = np.zeros((8, 40), np.float32)
    image[:, 0] = np.nan
    result = resize(image, (8, 10))
    assert np.isnan(result[:, 0]).all()
    assert not np.isnan(result[:, 2:]).any()


class Source:
    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape = pixels, pixels.shape
        self.read_rows: list[int] = []

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        self.read_rows.append(bottom - top)
        return self.pixels[top:bottom, left:right]


@pytest.mark.parametrize(("after", "scale"), [((13, 17), None), ((61, 90), None), ((20, 29), 0.5), ((41, 59), 1.0)])
@pytest.mark.parametrize("band", [1, 300, 1 << 20])
def test_same_bits_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, after: tuple[int, int], scale: float | None, band: int
) -> None:
    image = np.random.default_rng(5).integers(0, 65536, (41, 59, 3), dtype=np.uint16)
    whole = resize(image, after, scale=scale)
    monkeypatch.setattr(resample, "_BAND", band)
    source = Source(image)
    np.testing.assert_array_equal(resize(source, after, scale=scale), whole)
    if band < 1 << 20:
        assert max(source.read_rows) <= 10
    windows = [(0, 0, 1, 1), (3, 2, 9, 16), (after[0] - 1, 5, after[0], after[1]), (0, 0, *after)]
    for top, left, bottom, right in windows:
        part = resize(source, after, scale=scale, window=(top, left, bottom, right))
        np.testing.assert_array_equal(part, whole[top:bottom, left:right])
    monkeypatch.setattr(resample, "_WIDEST", 200)
    np.testing.assert_array_equal(resize(source, after, scale=scale), whole)


def test_window_reads_only_what_it_needs() -> None:
    source = Source(_image((1000, 40, 3)))
    resize(source, (100, 4), window=(50, 0, 52, 4))
    assert sum(source.read_rows) <= 40


@pytest.mark.parametrize("window", [(0, 0, 0, 2), (0, 0, 5, 2), (-1, 0, 2, 2), (0, 1, 2, 1)])
def test_bad_window(window: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="window must be"):
        resize(np.zeros((8, 8)), (4, 4), window=window)


@pytest.mark.parametrize(
    ("shape", "after", "scale", "words"),
    [
        ((4,), (2, 2), None, "image must be"),
        ((4, 4, 3, 1), (2, 2), None, "image must be"),
        ((0, 4, 3), (2, 2), None, "not empty"),
        ((4, 4), (0, 2), None, "shape must be"),
        ((4, 4), (2, 2), 0.0, "scale must be"),
        ((4, 4), (2, 2), float("nan"), "scale must be"),
        ((4, 4), (2, 2), -1.0, "scale must be"),
    ],
)
def test_bad_arguments(shape: tuple[int, ...], after: tuple[int, int], scale: float | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resize(np.zeros(shape), after, scale=scale)
