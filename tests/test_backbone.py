from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec import _sessions, _threads, _tiling, backbone
from sparsespec.backbone import (
    Backbone,
    TokenFeatures,
    fit_to_grid,
    resize_positions,
    token_tiles,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def net() -> Backbone:
    return Backbone(threads=1)


def picture(height: int, width: int) -> np.ndarray:
    """Make a smooth picture with one sharp disc in it."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    disc = (x - 0.5) ** 2 + (y - 0.3) ** 2 < 0.04
    channels = [0.5 + 0.4 * np.sin(5 * x + k) * np.cos(4 * y - k) for k in range(3)]
    return np.stack([np.where(disc, 1 - c, c) for c in channels], axis=-1).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


# Features


def test_features_are_those_of_the_network_as_exported(net: Backbone) -> None:
    golden = np.load(GOLDEN / "trunk.npz")
    found = net.features(golden["image"], long_side=None)
    assert found.grid == (4, 5)
    for name, mean, worst in (("queries", 0.995, 0.98), ("keys", 0.998, 0.99), ("values", 0.99, 0.96)):
        similarity = cosine(golden[name].astype(np.float32), getattr(found, name))
        assert similarity.mean() > mean, name
        assert similarity.min() > worst, name


def test_what_features_holds(net: Backbone) -> None:
    found = net.features(picture(90, 120), long_side=112)
    assert isinstance(found, TokenFeatures)
    assert found.grid == (6, 8)
    assert found.patch_size == net.patch_size == 14
    assert found.image_shape == (90, 120)
    assert found.scale == pytest.approx(112 / 120)
    for part in (found.queries, found.keys, found.values):
        assert part.shape == (48, 384)
        assert part.dtype == np.float32
        assert part.flags.c_contiguous
        assert np.isfinite(part).all()
    assert found.info["model"] == net.name == "dinov2-vits14-int8"
    assert found.info["provider"] == net.providers[0]
    assert found.info["threads"] == 1
    assert (found.info["tiles"], found.info["views"], found.info["context_tokens"]) == (1, 0, 0)
    assert found.info["seconds"] > 0


def test_tokens_follow_the_picture_row_by_row(net: Backbone) -> None:
    # Left half black, right half noise: each row of tokens must split in the middle.
    image = np.zeros((112, 224, 3), np.float32)
    image[:, 112:] = np.random.default_rng(0).random((112, 112, 3))
    found = net.features(image, long_side=None)
    keys = found.keys.reshape(*found.grid, -1)
    left, right = keys[:, :7].reshape(-1, 384), keys[:, 9:].reshape(-1, 384)
    middle_left, middle_right = left.mean(0), right.mean(0)
    for part, own, other in ((left, middle_left, middle_right), (right, middle_right, middle_left)):
        nearer = np.linalg.norm(part - own, axis=1) < np.linalg.norm(part - other, axis=1)
        assert nearer.mean() > 0.95


@pytest.mark.parametrize(
    ("shape", "long_side", "grid"),
    [
        ((480, 640), 448, (24, 32)),
        ((1, 1), 28, (2, 2)),
        ((3, 4000), 448, (1, 32)),
        ((4000, 3), 448, (32, 1)),
        ((500, 333), 112, (8, 6)),
        ((20, 20), 1, (1, 1)),
        ((13, 14), None, (1, 1)),
        ((15, 29), None, (2, 3)),
        ((30, 31), 57, (4, 5)),
    ],
)
def test_grid(net: Backbone, shape: tuple[int, int], long_side: int | None, grid: tuple[int, int]) -> None:
    found = net.features(picture(*shape), long_side=long_side)
    assert found.grid == grid
    assert len(found.keys) == grid[0] * grid[1]
    assert found.image_shape == shape
    # The grid covers the picture to its last pixel, or to the half pixel lost in rounding its side.
    covered = np.array(grid) * found.patch_size
    assert (covered >= np.array(shape) * found.scale - 0.5).all()


def test_same_input_same_bytes(net: Backbone) -> None:
    image = picture(60, 80)
    first = net.features(image, long_side=84)
    for other in (net, Backbone(threads=1), Backbone(threads=2)):
        again = other.features(image, long_side=84)
        for name in ("queries", "keys", "values"):
            assert getattr(first, name).tobytes() == getattr(again, name).tobytes()


def test_input_is_not_changed_and_may_be_read_only(net: Backbone) -> None:
    image = picture(28, 42)
    before = image.copy()
    image.flags.writeable = False
    native = net.features(image, long_side=None)
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(net.features(image.astype(np.float64), long_side=None).keys, native.keys)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4), np.float32), r"must be \(H, W, 3\)"),
        (np.zeros((4, 4, 4), np.float32), r"must be \(H, W, 3\)"),
        (np.zeros((0, 4, 3), np.float32), "not empty"),
        (np.zeros((4, 4, 3), np.int32), "uint8, uint16 or of a float type.*int32"),
        (np.zeros((4, 4, 3), bool), "bool"),
        (np.full((4, 4, 3), np.nan), "finite"),
        (np.full((4, 4, 3), np.inf), "finite"),
        (np.full((4, 4, 3), 255.0), r"\[0, 1\].*255"),
        (np.full((4, 4, 3), -0.5), r"\[0, 1\].*-0.5"),
    ],
)
def test_bad_image(net: Backbone, image: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        net.features(image)


def test_one_nan_is_enough(net: Backbone) -> None:
    image = picture(28, 28)
    image[5, 6, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        net.features(image)


class Source:
    """A picture that is read by window, and remembers the windows."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape, self.dtype = pixels, pixels.shape, pixels.dtype
        self.windows: list[tuple[int, int, int, int]] = []

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        assert 0 <= top < bottom <= self.shape[0]
        assert 0 <= left < right <= self.shape[1]
        self.windows.append((top, left, bottom, right))
        return self.pixels[top:bottom, left:right].copy()

    def most_read(self) -> int:
        return max((bottom - top) * (right - left) for top, left, bottom, right in self.windows)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("max_tokens", [8192, 40])
def test_types_and_sources_give_the_same_bytes(dtype: type, max_tokens: int) -> None:
    image = picture(100, 150)
    largest = 1 if dtype is np.float32 else np.iinfo(dtype).max
    pixels = (image * largest).round().astype(dtype) if largest > 1 else image
    as_float = pixels.astype(np.float32) / np.float32(largest)
    net = Backbone(threads=1, max_tokens=max_tokens)
    for asked in ({"long_side": 112}, {"scale": 1.0}):
        expected = net.features(as_float, **asked)
        for other in (pixels, Source(pixels)):
            found = net.features(other, **asked)
            assert found.image_shape == (100, 150)
            assert found.keys.tobytes() == expected.keys.tobytes()
            assert found.values.tobytes() == expected.values.tobytes()


def test_source_with_bad_values(net: Backbone) -> None:
    with pytest.raises(ValueError, match=r"finite values in \[0, 1\].*2"):
        net.features(Source(np.full((20, 20, 3), 2, np.float32)))
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\).*\(20, 20\)"):
        net.features(Source(np.zeros((20, 20), np.uint8)))


def test_large_picture_is_read_in_small_parts() -> None:
    source = Source((picture(700, 900) * 255).astype(np.uint8))
    net = Backbone(threads=1, max_tokens=100)
    for asked in ({"scale": 1.0}, {"scale": 0.25}):
        source.windows.clear()
        found = net.features(source, **asked)
        assert found.info["tiles"] > 2
        # A tile of 100 tokens and the margin of the filter.
        tokens_of_one = (14 / asked["scale"]) ** 2
        assert source.most_read() < 1.5 * 100 * tokens_of_one
        # Overlaps are read twice, nothing more often than that.
        assert sum((w[2] - w[0]) * (w[3] - w[1]) for w in source.windows) < 2.5 * 700 * 900


@pytest.mark.parametrize(
    ("asked", "scale"),
    [
        ({}, 448 / 160),
        ({"long_side": 80}, 0.5),
        ({"long_side": None}, 1.0),
        ({"scale": 1}, 1.0),
        ({"scale": 0.3}, 0.3),
        ({"scale": 1.25, "long_side": None}, 1.25),
        ({"megapixels": 120 * 160 / 4e6}, 0.5),
        ({"megapixels": 12.0}, 1.0),
    ],
)
def test_size_of_the_input(net: Backbone, asked: dict[str, Any], scale: float) -> None:
    found = net.features(picture(120, 160), **asked)
    assert found.scale == pytest.approx(scale)
    assert found.grid == tuple(-(-round(side * scale) // 14) for side in (120, 160))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"long_side": 0}, "long_side must be at least 1 pixel or None, got 0"),
        ({"scale": 0.0}, "scale must be a positive number, got 0.0"),
        ({"scale": float("nan")}, "scale must be a positive number, got nan"),
        ({"scale": True}, "scale must be a positive number, got True"),
        ({"scale": "1"}, "scale must be a positive number, got '1'"),
        ({"megapixels": -2}, "megapixels must be a positive number, got -2"),
        ({"megapixels": float("inf")}, "megapixels must be a positive number, got inf"),
        ({"scale": 1.0, "megapixels": 2}, "exclude each other, got scale=1.0 and megapixels=2"),
        ({"scale": 0.5, "long_side": 448}, "exclude each other, got long_side=448 and scale=0.5"),
        ({"megapixels": 1, "long_side": 600}, "exclude each other, got long_side=600 and megapixels=1"),
    ],
)
def test_bad_size_of_the_input(net: Backbone, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        net.features(picture(9, 9), **asked)


def test_bad_arguments(net: Backbone) -> None:
    with pytest.raises(ValueError, match="threads"):
        Backbone(threads=0)
    with pytest.raises(ValueError, match="max_tokens"):
        Backbone(max_tokens=1)
    with pytest.raises(ValueError, match="unknown provider 'gpu9'"):
        Backbone(provider="gpu9")
    with pytest.raises(ValueError, match="provider_options"):
        Backbone(provider="cpu", provider_options={"device_id": 1})
    with pytest.raises(ValueError, match="unknown model 'resnet'"):
        Backbone("resnet")


# The picture on the grid


@pytest.mark.parametrize(("shape", "long_side"), [((50, 70), 56), ((50, 70), 200), ((33, 14), None), ((5, 400), 100)])
def test_fit_to_grid(shape: tuple[int, int], long_side: int | None) -> None:
    image = picture(*shape)
    fitted, scale = fit_to_grid(image, long_side, 14)
    assert fitted.dtype == np.float32
    assert all(side % 14 == 0 for side in fitted.shape[:2])
    content = [max(1, round(side * scale)) for side in shape]
    assert scale == (1.0 if long_side is None else long_side / max(shape))
    assert [-(-side // 14) * 14 for side in content] == list(fitted.shape[:2])
    # What was added is the mirror image of what lies before it.
    for axis, side in enumerate(content):
        turned = fitted.swapaxes(0, axis)
        for extra in range(side, len(turned)):
            mirrored = extra % (2 * side)
            mirrored = mirrored if mirrored < side else 2 * side - 1 - mirrored
            np.testing.assert_array_equal(turned[extra], turned[mirrored])


def test_picture_that_fits_is_left_alone() -> None:
    image = picture(28, 42)
    fitted, scale = fit_to_grid(image, 42, 14)
    assert scale == 1
    np.testing.assert_array_equal(fitted, image)


# The position table


def test_few_position_tables_are_kept() -> None:
    net = Backbone(threads=1)
    for side in range(14, 140, 14):
        net.features(picture(14, side), long_side=None)
    assert len(net._tables) == backbone._TABLES_KEPT


# Tiles


@pytest.mark.parametrize("max_tokens", [16, 33, 256, 4096])
def test_tiles_cover_every_grid(max_tokens: int) -> None:
    rng = np.random.default_rng(max_tokens)
    grids = [(1, 1), (1, 5000), (5000, 1), (3, 1500), (4, 4), (64, 64), (65, 64)]
    for height, width in grids + [tuple(pair) for pair in rng.integers(1, 140, (60, 2))]:
        tiles = token_tiles((height, width), max_tokens)
        times = np.zeros((height, width), int)
        sizes = set()
        for top, left, bottom, right in tiles:
            assert 0 <= top < bottom <= height
            assert 0 <= left < right <= width
            times[top:bottom, left:right] += 1
            sizes.add((bottom - top, right - left))
        assert times.min() >= 1
        (size,) = sizes
        assert size[0] * size[1] <= max_tokens
        assert len(set(tiles)) == len(tiles)
        if height * width <= max_tokens:
            assert tiles == [(0, 0, height, width)]
        # Neighbours overlap by what the ramps need.
        for side in (0, 1):
            spans = sorted({(tile[side], tile[side + 2]) for tile in tiles})
            for (_, end), (start, _) in itertools.pairwise(spans):
                assert end - start >= _tiling.overlap_for(max_tokens) >= 1


def test_tiles_waste_little() -> None:
    for grid in ((67, 100), (143, 215), (65, 64), (400, 300)):
        run = sum((bottom - top) * (right - left) for top, left, bottom, right in token_tiles(grid, 4096))
        assert run < 1.35 * grid[0] * grid[1]


def test_tiled_features_resemble_untiled_ones(net: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(240, 320)
    whole = net.features(image, long_side=322)
    tiling = Backbone(threads=1, max_tokens=200)
    tiled = tiling.features(image, long_side=322)
    assert tiled.grid == whole.grid == (18, 23)
    assert (tiled.info["tiles"], tiled.info["views"]) == (3, 1)
    assert 150 < tiled.info["context_tokens"] <= 200
    monkeypatch.setattr(backbone, "add_smoothly", lambda *_: None)
    alone = tiling.features(image, long_side=322)
    for name, least in (("queries", 0.9), ("keys", 0.97), ("values", 0.88)):
        similarity = cosine(getattr(whole, name), getattr(tiled, name)).mean()
        assert similarity > least, name
        # The view takes away a good part of what the tiles miss.
        missed = 1 - cosine(getattr(whole, name), getattr(alone, name)).mean()
        assert 1 - similarity < 0.75 * missed, name


def mean_colours(session: Any, pixels: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Stand in for the network: features that repeat the mean colour of each token."""
    height, width = (side // 14 for side in pixels.shape[:2])
    assert len(positions) == height * width + 1
    tokens = pixels.reshape(height, 14, width, 14, 3).mean((1, 3)).reshape(-1, 3)
    features = np.tile(tokens, 128).astype(np.float32)
    return features, 2 * features, -features


def test_blending_is_an_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that return what stands in the picture must be put together to the picture."""
    net = Backbone(threads=1, max_tokens=36)

    monkeypatch.setattr(net, "_run", mean_colours)
    image = picture(14 * 13, 14 * 17)
    found = net.features(image, long_side=None)
    assert found.info["tiles"] > 4
    expected = image.reshape(13, 14, 17, 14, 3).mean((1, 3)).reshape(-1, 3)
    np.testing.assert_allclose(found.queries[:, :3], expected, atol=1e-6)
    np.testing.assert_allclose(found.keys, 2 * found.queries, atol=1e-6)
    np.testing.assert_allclose(found.values, -found.queries, atol=1e-6)


def test_views_take_away_what_a_tile_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """When each tile is off by its own constant, the corrected features are not."""
    net = Backbone(threads=1, max_tokens=64)
    runs = itertools.count()

    def off_by_a_constant(session: Any, pixels: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        is_view = pixels.shape[0] == 14
        offset = np.float32(0 if is_view else 1 + next(runs) % 3)
        queries, keys, values = mean_colours(session, pixels, positions)
        return queries + offset, keys - offset, values

    monkeypatch.setattr(net, "_run", off_by_a_constant)
    image = picture(14 * 24, 14 * 30)
    found = net.features(image, scale=1)
    assert found.info["tiles"] > 12
    assert found.info["views"] > 3
    true = image.reshape(24, 14, 30, 14, 3).mean((1, 3)).reshape(-1, 3)
    for features, expected in ((found.queries, true), (found.keys, 2 * true), (found.values, -true)):
        error = np.abs(features[:, :3] - expected)
        assert error.mean() < 0.4
        # Far from where it can't be known: the mean offset is gone.
        assert np.abs((features[:, :3] - expected).mean()) < 0.05


def test_view_sees_the_pixels_and_positions_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Backbone(threads=1, max_tokens=60)
    image = np.random.default_rng(0).random((14 * 11, 14 * 13, 3), np.float32)
    patches = image.reshape(11, 14, 13, 14, 3).transpose(0, 2, 1, 3, 4)
    whole = resize_positions(net._metadata.positions, (11, 13))
    seen = []

    def look(session: Any, pixels: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        if pixels.shape[0] == 14:
            strip = pixels.reshape(14, -1, 14, 3).transpose(1, 0, 2, 3)
            np.testing.assert_array_equal(positions[:1], net._metadata.prefix)
            for patch, position in zip(strip, positions[1:], strict=True):
                (place,) = np.argwhere((patches == patch).all((2, 3, 4)))
                np.testing.assert_allclose(position, whole[tuple(place)], atol=1e-7)
                seen.append(tuple(place))
        return mean_colours(session, pixels, positions)

    monkeypatch.setattr(net, "_run", look)
    found = net.features(image, scale=1)
    assert len(set(seen)) == len(seen) == found.info["context_tokens"] > 40


@pytest.mark.parametrize("most", [16, 33, 256, 4096])
def test_views_are_even_and_small_enough(most: int) -> None:
    rng = np.random.default_rng(most)
    grids = [(1, 5000), (5000, 1), (3, 1500), (65, 64), (220, 290), (700, 900)]
    for height, width in grids + [tuple(pair) for pair in rng.integers(1, 140, (40, 2))]:
        tiles = len(token_tiles((height, width), most))
        if tiles == 1:
            continue
        views = _tiling.views_of((height, width), most, tiles)
        assert len(views) == min(8, -(-tiles // 4))
        lattice = [len(side) for side in views[0].lattice]
        times = np.zeros(lattice, int)
        for view in views:
            assert 0 < len(view.rows) <= most
            times[view.places] += 1
            for coordinate, places, side in zip((view.rows, view.columns), view.places, view.lattice, strict=True):
                np.testing.assert_array_equal(coordinate, side[places])
        assert (times == 1).all()
        # They use what they may, and their lattice is a grid without repeats over the whole picture.
        assert times.size > 0.5 * most
        for side, size in zip(views[0].lattice, (height, width), strict=True):
            assert len(np.unique(side)) == len(side)
            assert 0 <= side[0] <= size // len(side)
            assert size - 1 - size // len(side) <= side[-1] < size


def test_smoothing_keeps_constants_and_stays_near() -> None:
    places = np.array([2, 6, 10, 14])
    weights = _tiling._smoothing(17, places, 3.0).toarray()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert (weights.argmax(1) == np.abs(np.arange(17)[:, None] - places).argmin(1)).all()
    # A Gaussian: the ratio of two weights depends on the two distances alone.
    np.testing.assert_allclose(weights[4, 0] / weights[4, 2], np.exp((36 - 4) / 18), rtol=1e-5)
    assert weights[0, 3] == 0


def test_tiled_same_bytes_for_any_number_of_threads() -> None:
    image = picture(180, 200)
    first, *others = (Backbone(threads=n, max_tokens=30).features(image, scale=1) for n in (1, 2, 4, 1))
    assert first.info["views"] > 1
    for name in ("queries", "keys", "values"):
        assert {getattr(other, name).tobytes() for other in others} == {getattr(first, name).tobytes()}


def test_ramp_rises_only_inside_the_picture() -> None:
    np.testing.assert_allclose(_tiling.ramp(0, 6, 10, 2), [1, 1, 1, 1, 2 / 3, 1 / 3])
    np.testing.assert_allclose(_tiling.ramp(4, 10, 10, 2), [1 / 3, 2 / 3, 1, 1, 1, 1])
    np.testing.assert_allclose(_tiling.ramp(0, 10, 10, 2), 1)
    # Where two tiles overlap by exactly the length of the ramps, the two weights make one.
    total = np.zeros(10)
    total[0:6] += _tiling.ramp(0, 6, 10, 2)
    total[4:10] += _tiling.ramp(4, 10, 10, 2)
    np.testing.assert_allclose(total, 1)


# Sessions, threads and processes


def test_session_opens_on_first_use_only(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    genuine = _sessions.open_session
    monkeypatch.setattr(_sessions, "open_session", lambda *a: opened.append(threading.get_ident()) or genuine(*a))
    net = Backbone(threads=1)
    assert net.patch_size == 14
    assert net.name
    assert opened == []
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: net.features(picture(28, 28), long_side=None).keys, range(8)))
    assert len(opened) == 1
    for keys in found[1:]:
        np.testing.assert_array_equal(keys, found[0])


def test_two_threads_with_different_pictures(net: Backbone) -> None:
    images = [picture(14 * (1 + k % 5), 14 * (1 + k % 3)) for k in range(16)]
    alone = [net.features(image, long_side=None).keys for image in images]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda image: net.features(image, long_side=None).keys, images))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_pickling(net: Backbone) -> None:
    image = picture(42, 28)
    expected = net.features(image).keys
    state = pickle.dumps(net)
    assert len(state) < 2000
    copy = pickle.loads(state)
    assert copy._session is None
    np.testing.assert_array_equal(copy.features(image).keys, expected)
    assert repr(copy) == repr(net)


@pytest.mark.slow
def test_spawned_process(net: Backbone) -> None:
    image = picture(42, 28)
    expected = net.features(image, long_side=56).keys
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(net.features, image, long_side=56).result(timeout=120)
    np.testing.assert_array_equal(found.keys, expected)


_GROWTH = """
import numpy as np
from pathlib import Path
from sparsespec.backbone import Backbone
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
net, rng = Backbone(threads=1, provider="cpu"), np.random.default_rng(0)
def run(times):
    for _ in range(times):
        shape = rng.integers(20, 200, 2)
        net.features(rng.random((*shape, 3), np.float32), long_side=int(rng.integers(28, 200)))
net.features(np.zeros((200, 200, 3), np.float32), long_side=200)
run(10)
before = resident()
run(40)
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_number_of_sizes() -> None:
    done = subprocess.run([sys.executable, "-c", _GROWTH], timeout=120, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 25


def test_default_threads_are_those_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "available_cpus", lambda: 3)
    assert Backbone().features(picture(14, 14), long_side=None).info["threads"] == 3
    assert _threads.available_cpus() >= 1


# Execution providers: see test_providers.py and test_sessions.py


def test_forced_cpu(net: Backbone) -> None:
    forced = Backbone(provider="cpu", threads=1)
    assert forced.providers == ("CPUExecutionProvider",)
    assert forced.features(picture(14, 28)).info["provider"] == "CPUExecutionProvider"


def test_without_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    net = Backbone()
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        net.features(picture(14, 14))


def test_importing_the_module_does_not_import_onnx_runtime() -> None:
    code = "import sys, sparsespec.backbone; sys.exit('onnxruntime' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_before_onnx_runtime_loads(given: str | None, seen: str) -> None:
    code = """
import importlib.abc, os, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Watch())
from sparsespec.backbone import Backbone
Backbone().providers
"""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [seen]


def test_features_in_half_precision() -> None:
    rng = np.random.default_rng(0)
    kinds = [rng.normal(size=(6, 4)).astype(np.float32) for _ in range(3)]
    kinds[1][2, 3] = 1e6
    tokens = TokenFeatures(*kinds, (2, 3), 14, (28, 42), 1.0, {"model": "m"})
    half = tokens.halved()
    for name, kind in zip(("queries", "keys", "values"), kinds, strict=True):
        stored = getattr(half, name)
        assert stored.dtype == np.float16
        fits = np.abs(kind) < 6e4
        np.testing.assert_allclose(stored[fits], kind[fits], rtol=1e-3, atol=1e-6)
        assert np.isinf(stored[~fits]).all()
    assert (half.grid, half.extent, half.token_side, half.info) == ((2, 3), (2.0, 3.0), 14.0, {"model": "m"})
