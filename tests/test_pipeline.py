from __future__ import annotations

import dataclasses
import json
import multiprocessing
import pickle
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage import data

import sparsespec
from sparsespec import Backbone, Segmentation, Segmenter, pipeline, segment
from sparsespec.closer import crop_around
from sparsespec.directions import Directions, find_directions
from sparsespec.explanation import explain
from sparsespec.images import as_pixels
from sparsespec.models import UnknownModelError, get_model
from sparsespec.pipeline import PLAIN, Settings, find_instances, paint
from sparsespec.spectral import EigenSolverError

SMALL = 168


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(threads=1)


@pytest.fixture(scope="module")
def segmenter(backbone: Backbone) -> Segmenter:
    return Segmenter(backbone)


@pytest.fixture(scope="module")
def small(backbone: Backbone) -> Segmenter:
    """A segmenter that looks at few tokens."""
    return Segmenter(backbone, long_side=SMALL)


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    return data.astronaut()


@pytest.fixture(scope="module")
def result(segmenter: Segmenter, astronaut: np.ndarray) -> Segmentation:
    return segmenter(astronaut)


@pytest.fixture(scope="module")
def small_result(small: Segmenter, astronaut: np.ndarray) -> Segmentation:
    found = small(astronaut)
    assert len(found) > 0
    return found


@pytest.fixture(scope="module")
def directions(backbone: Backbone) -> Directions:
    """Those that come with the package."""
    found = find_directions("default", source_sha256=backbone.features_sha256, channels=backbone.channels)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    """Two small photographs on a grey surface."""
    image = np.full((240, 320, 3), 120, np.uint8)
    image[150:225, 30:105] = data.astronaut()[:450:6, :450:6]
    image[30:90, 200:270] = data.chelsea()[:240:4, 60:340:4]
    return image


@pytest.fixture(scope="module")
def table_result(small: Segmenter, table: np.ndarray) -> Segmentation:
    found = small(table)
    assert found.info["crops"] == 2
    return found


def assert_sound(found: Segmentation, shape: tuple[int, int], dtype: type = np.int32) -> None:
    """Check all that a result promises whatever the image."""
    n = len(found)
    assert found.labels.shape == shape
    assert found.labels.dtype == dtype
    assert set(np.unique(found.labels).tolist()) | {0} == set(range(n + 1))
    assert found.scores.shape == (n,)
    assert found.scores.dtype == np.float32
    assert np.all((found.scores >= 0) & (found.scores <= 1))
    assert np.all(np.diff(found.scores) <= 0)
    assert found.boxes.shape == (n, 4)
    assert found.boxes.dtype == np.float32
    for k, (x, y, width, height) in enumerate(found.boxes, start=1):
        rows, columns = np.nonzero(found.labels == k)
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
    assert json.loads(json.dumps(found.info, allow_nan=False)) == found.info
    if found.info["method"] == "sparse":
        assert len(found.info["eigenvalues"]) == len(found.info["residuals"]) == n
        assert found.info["crops"] >= 0


def assert_same_bytes(first: Segmentation, second: Segmentation) -> None:
    for name in ("labels", "scores", "boxes"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes(), name
    assert {k: v for k, v in first.info.items() if k != "seconds"} == {
        k: v for k, v in second.info.items() if k != "seconds"
    }


# Results


def test_a_photograph_has_its_object(result: Segmentation, astronaut: np.ndarray) -> None:
    assert_sound(result, astronaut.shape[:2])
    assert len(result) > 0
    # The face, and the corner of the backdrop.
    assert result.labels[120, 225] > 0
    assert result.labels[20, 500] == 0


def test_another_photograph_of_another_shape(segmenter: Segmenter) -> None:
    image = data.coffee()
    found = segmenter(image)
    assert_sound(found, image.shape[:2])
    assert found.info["grid"] == [22, 32]
    # The cup, and the table.
    assert found.labels[180, 300] > 0
    assert found.labels[30, 30] == 0


def test_info_says_how_it_came_about(result: Segmentation, backbone: Backbone) -> None:
    info = result.info
    assert info["version"] == sparsespec.__version__
    assert info["model"] == backbone.name
    assert info["provider"] in backbone.providers
    assert info["method"] == "sparse"
    assert (info["grid"], info["tokens"], info["tiles"]) == ([32, 32], 1024, 1)
    assert info["channels"] == {"total": 3 * 384, "kept": 3 * 60}
    assert info["crops"] >= 0
    assert info["cuts"] > 0
    assert info["candidates"] >= len(result)
    stages = {"features", "channels", "affinity", "foreground", "instances", "refine", "total"}
    assert info["seconds"].keys() == stages
    assert info["seconds"]["total"] >= sum(v for k, v in info["seconds"].items() if k != "total") > 0


@pytest.mark.parametrize("value", [0, 128, 255])
def test_nothing_is_found_in_one_colour(small: Segmenter, value: int) -> None:
    found = small(np.full((90, 120, 3), value, np.uint8))
    assert_sound(found, (90, 120))
    assert len(found) == 0
    assert not found.labels.any()


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 400), (400, 3), (1, 50)])
@pytest.mark.parametrize("count", [None, 1])
def test_images_of_a_few_pixels(backbone: Backbone, shape: tuple[int, int], count: int | None) -> None:
    segmenter = Segmenter(backbone, count, long_side=SMALL)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = segmenter(image)
    assert_sound(found, shape)
    if count is not None:
        assert len(found) == count
        return
    for other in (
        image[:, :, 0],
        image.astype(np.uint16) * 257,
        np.concatenate([image, image[:, :, :1]], axis=2),
    ):
        assert_sound(segmenter(other), shape)


@pytest.mark.parametrize("shape", [(14, 14), (14, 1)])
def test_an_image_of_one_token(backbone: Backbone, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*shape, 3))
    found = Segmenter(backbone, long_side=14)(image)
    assert_sound(found, shape)
    assert found.info["tokens"] == 1
    assert len(found) == 0
    one = Segmenter(backbone, 1, long_side=14)(image)
    assert np.all(one.labels == 1)


# Without directions, and without a closer look


def by_parts(
    backbone: Backbone,
    image: np.ndarray,
    settings: Settings | None = None,
    directions: Directions | None = None,
    long_side: int = SMALL,
) -> tuple[np.ndarray, np.ndarray]:
    pixels = as_pixels(image)
    tokens = backbone.features(pixels, long_side=long_side)
    found = find_instances(tokens, settings, directions=directions)
    return paint(image, found, tokens, settings)


@pytest.mark.parametrize("settings", [None, PLAIN])
def test_without_directions_the_image_alone_decides(
    backbone: Backbone, astronaut: np.ndarray, settings: Settings | None
) -> None:
    found = Segmenter(backbone, long_side=SMALL, directions=None, settings=settings)(astronaut)
    assert_sound(found, astronaut.shape[:2])
    labels, scores = by_parts(backbone, astronaut, PLAIN)
    assert len(scores) > 0
    assert np.array_equal(found.labels, labels)
    assert np.array_equal(found.scores, scores)
    assert found.info["crops"] == 0
    # The default of either is the same.
    again, _ = by_parts(backbone, astronaut)
    assert np.array_equal(again, labels)


@pytest.mark.parametrize("long_side", [SMALL, 448])
def test_without_a_closer_look_it_is_the_parts_in_a_row(
    backbone: Backbone, directions: Directions, table: np.ndarray, long_side: int
) -> None:
    once = dataclasses.replace(Settings(), closer_margin=0.0)
    found = Segmenter(backbone, long_side=long_side, settings=once)(table)
    assert_sound(found, table.shape[:2])
    labels, scores = by_parts(backbone, table, once, directions, long_side)
    assert len(scores) == 2
    assert np.array_equal(found.labels, labels)
    assert np.array_equal(found.scores, scores)
    assert found.info["crops"] == 0


def test_directions_and_settings_can_be_chosen_apart(
    backbone: Backbone, directions: Directions, table: np.ndarray, table_result: Segmentation, tmp_path: Path
) -> None:
    assert_same_bytes(Segmenter(backbone, long_side=SMALL, directions=directions)(table), table_result)
    directions.save(tmp_path / "own.npz")
    assert_same_bytes(Segmenter(backbone, long_side=SMALL, directions=tmp_path / "own.npz")(table), table_result)
    # What needs directions is left out where there are none, and what they would do is left out by PLAIN.
    none = Segmenter(backbone, long_side=SMALL, directions=None, settings=Settings())(table)
    assert_sound(none, table.shape[:2])
    plain = Segmenter(backbone, long_side=SMALL, directions=directions, settings=PLAIN)(table)
    assert_same_bytes(plain, Segmenter(backbone, long_side=SMALL, directions=None)(table))
    cosine = Segmenter(backbone, long_side=SMALL, settings=Settings(weights="cosine", keep=1.0, keep_deviation=None))
    other = cosine(table)
    assert_sound(other, table.shape[:2])
    assert other.info["channels"] == {"total": 3 * 384, "kept": 3 * 384}


# A closer look


def test_small_things_are_looked_at_in_crops(
    backbone: Backbone, directions: Directions, table: np.ndarray, table_result: Segmentation
) -> None:
    found = table_result
    assert_sound(found, table.shape[:2])
    assert found.info["crops"] == len(found) == 2
    once, scores = by_parts(backbone, table, dataclasses.replace(Settings(), closer_margin=0.0), directions)
    assert np.array_equal(found.scores, scores)
    for top, left, bottom, right in ((150, 30, 225, 105), (30, 200, 90, 270)):
        # As many tokens as a photograph of its own: the outline is the sharper.
        inside = np.zeros(table.shape[:2], bool)
        inside[top:bottom, left:right] = True
        label = found.labels[(top + bottom) // 2, (left + right) // 2]
        assert label > 0
        before = once == once[(top + bottom) // 2, (left + right) // 2]
        after = found.labels == label
        assert np.any(before != after)
        assert np.count_nonzero(after & inside) > 0.8 * np.count_nonzero(after)
    stages = ("features", "refine", "instances")
    assert all(found.info["seconds"][stage] > 0 for stage in stages)


@pytest.mark.parametrize(
    "resolution", [{"long_side": SMALL}, {"long_side": 630}, {"scale": 4.0}, {"megapixels": 0.3}, {"scale": 0.9}]
)
def test_what_was_seen_large_is_not_looked_at_again(
    backbone: Backbone, table: np.ndarray, resolution: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = np.ascontiguousarray(table[120:, :160])
    boxes: list[tuple[int, int, int, int]] = []

    def record(*arguments: Any) -> tuple[int, int, int, int] | None:
        box = crop_around(*arguments)
        boxes.extend([] if box is None else [box])
        return box

    monkeypatch.setattr(pipeline, "crop_around", record)
    found = Segmenter(backbone, **resolution)(cut)  # type: ignore[arg-type]
    assert_sound(found, cut.shape[:2])
    assert len(found) > 0
    scale = backbone.features(as_pixels(cut), **resolution).scale  # type: ignore[arg-type]
    enlarged = [box for box in boxes if max(box[2] - box[0], box[3] - box[1]) * scale <= 0.85 * 448]
    assert found.info["crops"] == len(enlarged)
    # The photograph takes up most of the picture: it alone is looked at, and only where it was seen small.
    largest = max(max(box[2] - box[0], box[3] - box[1]) for box in boxes)
    assert largest >= 100
    assert (largest * scale <= 0.85 * 448) == (scale < 3)


def test_labels_go_to_an_array_in_a_file(
    small: Segmenter, table: np.ndarray, table_result: Segmentation, tmp_path: Path
) -> None:
    for dtype in (np.uint8, np.uint16):
        stored = np.lib.format.open_memmap(tmp_path / "labels.npy", "w+", dtype, table.shape[:2])
        stored[...] = 77
        found = small(table, out=stored)
        assert found.labels is stored
        assert_sound(found, table.shape[:2], dtype)
        assert np.array_equal(stored, table_result.labels)
        assert np.array_equal(found.scores, table_result.scores)
        stored.flush()
        assert np.array_equal(np.load(tmp_path / "labels.npy"), table_result.labels)


def test_images_in_a_file(small: Segmenter, table: np.ndarray, table_result: Segmentation, tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", table)
    assert_same_bytes(small(np.load(tmp_path / "image.npy", mmap_mode="r")), table_result)


@pytest.mark.parametrize("kind", ["grey", "RGBA", "uint16", "float"])
def test_crops_of_every_kind_of_array(
    small: Segmenter, table: np.ndarray, table_result: Segmentation, kind: str
) -> None:
    grey = table[:, :, 1]
    opaque = np.full((*grey.shape, 1), 255, np.uint8)
    image = {
        "grey": grey,
        "RGBA": np.concatenate([table, opaque], axis=2),
        "uint16": table.astype(np.uint16) * 257,
        "float": table / 255,
    }[kind]
    found = small(image)
    assert_sound(found, table.shape[:2])
    assert found.info["crops"] == 2
    like = small(np.repeat(grey[:, :, None], 3, axis=2)) if kind == "grey" else table_result
    assert np.array_equal(found.labels, like.labels)


@pytest.mark.slow
def test_crops_of_a_crowd_come_apart(backbone: Backbone) -> None:
    coins = data.coins()
    found = Segmenter(backbone)(coins)
    assert_sound(found, coins.shape)
    # There are 24 on it.
    assert 20 <= len(found) <= 28
    assert found.info["crops"] > 10


@pytest.mark.parametrize("count", [1, 2, 4, pytest.param(9, marks=pytest.mark.slow)])
def test_a_closer_look_keeps_the_count(backbone: Backbone, table: np.ndarray, count: int) -> None:
    found = Segmenter(backbone, count, long_side=SMALL)(table)
    assert_sound(found, table.shape[:2])
    assert len(found) == count
    assert found.info["crops"] > 0
    assert np.bincount(found.labels.ravel(), minlength=count + 1)[1:].min() > 0


def test_threads_and_pickling_change_nothing_in_crops(table: np.ndarray, table_result: Segmentation) -> None:
    two = pickle.loads(pickle.dumps(Segmenter(threads=2, long_side=SMALL)))
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(two, [table] * 3):
            assert_same_bytes(found, table_result)


# On the token grid


def test_instances_of_tokens(backbone: Backbone, directions: Directions, table: np.ndarray) -> None:
    tokens = backbone.features(as_pixels(table), long_side=SMALL)
    n_tokens = tokens.grid[0] * tokens.grid[1]
    for options in ({}, {"directions": directions}, {"directions": directions, "n_instances": 5}, {"n_instances": 1}):
        found = find_instances(tokens, **options)  # type: ignore[arg-type]
        n = options.get("n_instances", len(found.masks))
        assert found.masks.shape == (n, n_tokens)
        assert n > 0
        assert found.masks.sum(axis=0).max() == 1
        assert found.masks.any(axis=1).all()
        assert found.scores.shape == (n,)
        assert np.all((found.scores >= 0) & (found.scores <= 1))
        assert np.all(np.diff(found.scores) <= 0)
        assert all(len(values) == n for values in found.of_each.values())
        assert found.candidates.n_tokens == n_tokens


def test_a_foreground_that_is_given(backbone: Backbone, directions: Directions, table: np.ndarray) -> None:
    tokens = backbone.features(as_pixels(table), long_side=SMALL)
    n_tokens = tokens.grid[0] * tokens.grid[1]
    inside = np.zeros(tokens.grid, bool)
    inside[2:6, 3:8] = True
    for chosen in (directions, None):
        found = find_instances(tokens, directions=chosen, foreground_mask=inside.ravel())
        assert np.all(found.masks.any(axis=0) <= inside.ravel())
        nothing = find_instances(tokens, directions=chosen, foreground_mask=np.zeros(n_tokens, bool))
        assert nothing.masks.shape == (0, n_tokens)
        labels, scores = paint(table, nothing, tokens)
        assert not labels.any()
        assert scores.shape == (0,)
    with pytest.raises(ValueError, match=rf"foreground_mask must be of shape \({n_tokens},\), not \(3,\)"):
        find_instances(tokens, foreground_mask=np.ones(3, bool))
    with pytest.raises(ValueError, match=f"n_instances is {n_tokens + 1}, but the image has only {n_tokens} tokens"):
        find_instances(tokens, n_instances=n_tokens + 1)
    for count in (0, -1, 1.5):
        with pytest.raises(ValueError, match="n_instances must be an integer of at least 1"):
            find_instances(tokens, n_instances=count)  # type: ignore[arg-type]
    found = find_instances(tokens)
    with pytest.raises(ValueError, match=r"pixels are 3 high and 4 wide, but the tokens are of .* \d+ and \d+"):
        paint(np.zeros((3, 4, 3), np.uint8), found, tokens)


# Kinds of arrays


@pytest.mark.slow
def test_kinds_of_arrays_of_one_picture(small: Segmenter, small_result: Segmentation, astronaut: np.ndarray) -> None:
    opaque = np.full((*astronaut.shape[:2], 1), 255, np.uint8)
    read_only = astronaut.copy()
    read_only.flags.writeable = False
    kinds: dict[str, np.ndarray] = {
        "float32": astronaut.astype(np.float32) / 255,
        "float64": astronaut / 255,
        "uint16": astronaut.astype(np.uint16) * 257,
        "RGBA": np.concatenate([astronaut, opaque], axis=2),
        "read-only": read_only,
        "not contiguous": np.repeat(astronaut, 2, axis=1)[:, ::2],
        "column-major": np.asfortranarray(astronaut),
    }
    for name, image in kinds.items():
        found = small(image)
        assert np.array_equal(found.labels, small_result.labels), name
        assert np.array_equal(found.scores, small_result.scores), name


def test_grey_images_are_those_with_three_equal_channels(small: Segmenter) -> None:
    grey = data.camera()[100:356, 100:356]
    found = small(grey)
    assert_sound(found, grey.shape)
    assert_same_bytes(found, small(np.repeat(grey[:, :, None], 3, axis=2)))
    assert_same_bytes(found, small(grey[:, :, None]))


def test_bool_images(small: Segmenter) -> None:
    image = np.zeros((60, 80), bool)
    image[20:40, 25:55] = True
    assert_same_bytes(small(image), small(image.astype(np.uint8) * 255))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_image_is_not_changed(small: Segmenter, table: np.ndarray, dtype: type) -> None:
    image = table.astype(dtype) if dtype is np.uint8 else table.astype(dtype) / 255
    before = image.copy()
    small(image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((8, 8, 3), np.nan), "image .*NaN"),
        (np.full((8, 8, 3), 2.0), "image .*0.*1"),
        (np.zeros((8, 8, 2)), r"image must have the shape .*\(8, 8, 2\)"),
        (np.zeros((2, 8, 8, 3)), r"image must have the shape .*\(2, 8, 8, 3\)"),
        (np.zeros(8), r"image must have the shape .*\(8,\)"),
        (np.zeros((0, 8, 3)), "image has no pixels"),
        (np.zeros((8, 8, 3), np.int64), "image must be .*int64"),
        (np.zeros((8, 8, 3), complex), "image must be .*complex"),
    ],
)
def test_arrays_that_are_no_images(small: Segmenter, image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(image)


# The same every time


def test_two_calls_give_the_same_bytes(segmenter: Segmenter, result: Segmentation, astronaut: np.ndarray) -> None:
    assert_same_bytes(segmenter(astronaut), result)


def test_the_number_of_threads_changes_nothing(result: Segmentation, astronaut: np.ndarray) -> None:
    assert_same_bytes(Segmenter(threads=2)(astronaut), result)


def test_two_python_threads_at_once(
    small: Segmenter, small_result: Segmentation, table_result: Segmentation, astronaut: np.ndarray, table: np.ndarray
) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(small, [astronaut, table, table, astronaut]))
    for one, other in zip(found, (small_result, table_result, table_result, small_result), strict=True):
        assert_same_bytes(one, other)


def test_a_pickled_segmenter_is_as_good(small: Segmenter, small_result: Segmentation, astronaut: np.ndarray) -> None:
    stored = pickle.dumps(small)
    assert len(stored) < 100_000
    assert_same_bytes(pickle.loads(stored)(astronaut), small_result)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(
    small: Segmenter, small_result: Segmentation, astronaut: np.ndarray
) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert_same_bytes(pool.submit(small, astronaut).result(timeout=120), small_result)


def test_a_copy_with_other_threads(small: Segmenter, small_result: Segmentation, astronaut: np.ndarray) -> None:
    one = small.with_threads(1)
    assert (one.backbone.threads, one.backbone.concurrency) == (1, 1)
    assert one.backbone is not small.backbone
    assert_same_bytes(one(astronaut), small_result)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        small.with_threads(0)


@pytest.mark.parametrize(
    "options",
    [
        {"long_side": 100_000},
        {"scale": 1e-6},
        {"megapixels": 900.0, "n_instances": 5000},
        {"method": "paper", "n_instances": 3},
    ],
)
def test_warming_up_takes_little_whatever_the_settings(
    backbone: Backbone, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    features = Backbone.features

    def watched(self: Backbone, image: Any, **size: Any) -> Any:
        tokens = features(self, image, **size)
        seen.append(tokens.grid)
        return tokens

    monkeypatch.setattr(Backbone, "features", watched)
    Segmenter(backbone, **options).warm_up()
    assert seen
    assert all(rows * columns <= 1024 for rows, columns in seen)


def test_segment_is_a_segmenter_used_once(
    backbone: Backbone, small_result: Segmentation, astronaut: np.ndarray
) -> None:
    assert_same_bytes(segment(astronaut, model=backbone, long_side=SMALL), small_result)


def test_a_model_can_be_named_or_opened_by_its_path(
    backbone: Backbone, small_result: Segmentation, astronaut: np.ndarray
) -> None:
    path = get_model("default").path
    for model in (backbone.name, path, str(path)):
        assert_same_bytes(Segmenter(model, threads=1, long_side=SMALL)(astronaut), small_result)
    assert Segmenter(backbone).backbone is backbone


# An exact number of instances


@pytest.mark.parametrize("count", [1, 2, 5, pytest.param(12, marks=pytest.mark.slow)])
def test_so_many_instances_as_asked_for(backbone: Backbone, astronaut: np.ndarray, count: int) -> None:
    found = Segmenter(backbone, n_instances=count, long_side=SMALL)(astronaut)
    assert_sound(found, astronaut.shape[:2])
    assert len(found) == count


@pytest.mark.parametrize("count", [1, 5, pytest.param(12, marks=pytest.mark.slow)])
def test_so_many_instances_even_where_there_is_nothing(backbone: Backbone, count: int) -> None:
    found = Segmenter(backbone, count, long_side=SMALL)(np.zeros((60, 80, 3), np.uint8))
    assert_sound(found, (60, 80))
    assert len(found) == count


@pytest.mark.parametrize("shape", [(2, 3), (6, 1), (2, 70)])
def test_so_many_instances_as_there_are_pixels_or_tokens(backbone: Backbone, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).random((*shape, 3))
    grid = Backbone.features(backbone, image.astype(np.float32), long_side=SMALL).grid
    most = min(shape[0] * shape[1], grid[0] * grid[1])
    found = Segmenter(backbone, most, long_side=SMALL)(image)
    assert_sound(found, shape)
    assert len(found) == most
    with pytest.raises(ValueError, match=f"n_instances is {most + 1}, but .* holds at most {most} instances"):
        Segmenter(backbone, most + 1, long_side=SMALL)(image)


@pytest.mark.parametrize("method", ["sparse", "paper"])
@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_counts_that_are_none(backbone: Backbone, count: int, method: str) -> None:
    with pytest.raises(ValueError, match="n_instances must be an integer of at least 1"):
        Segmenter(backbone, count, method)


# The published method


@pytest.mark.parametrize("count", [1, 3])
def test_the_published_method_on_a_photograph(backbone: Backbone, astronaut: np.ndarray, count: int) -> None:
    paper = Segmenter(backbone, count, "paper", long_side=SMALL)
    found = paper(astronaut)
    assert_sound(found, astronaut.shape[:2])
    assert len(found) == count
    assert found.scores.sum() == pytest.approx(1, abs=1e-6)
    assert found.info["method"] == "paper"
    assert found.info["channels"] == {"total": 384, "kept": 60}
    assert len(found.info["eigenvalues"]) == len(found.info["foreground_eigenvalues"]) == 5
    assert_same_bytes(paper(astronaut), found)


@pytest.mark.parametrize("shape", [(60, 80), (1, 1), (3, 100)])
def test_the_published_method_on_a_black_picture(backbone: Backbone, shape: tuple[int, int]) -> None:
    found = Segmenter(backbone, 1, "paper", long_side=SMALL)(np.zeros((*shape, 3), np.uint8))
    assert_sound(found, shape)
    assert len(found) <= 1


def test_the_published_method_has_to_be_told_the_count(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match='method="paper" needs n_instances'):
        Segmenter(backbone, method="paper")


# Arguments


def test_a_generator_is_drawn_from_once(backbone: Backbone, astronaut: np.ndarray) -> None:
    first, second = (Segmenter(backbone, 3, "paper", np.random.default_rng(7), long_side=SMALL) for _ in range(2))
    expected = first(astronaut)
    assert_same_bytes(first(astronaut), expected)
    assert_same_bytes(second(astronaut), expected)
    rng = np.random.default_rng(7)
    Segmenter(backbone, rng=rng)
    assert rng.bit_generator.state != np.random.default_rng(7).bit_generator.state


def test_the_seed_does_not_matter_to_the_sparse_method(
    backbone: Backbone, small_result: Segmentation, astronaut: np.ndarray
) -> None:
    assert_same_bytes(Segmenter(backbone, rng=99, long_side=SMALL)(astronaut), small_result)


@pytest.mark.parametrize(
    "settings", [Settings(min_merit=1.5), Settings(min_contrast=2.0), Settings(min_votes_left=1.1)]
)
def test_settings_are_used(backbone: Backbone, astronaut: np.ndarray, settings: Settings) -> None:
    strict = Segmenter(backbone, long_side=SMALL, settings=settings)
    assert len(strict(astronaut)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharpness": 0}, "sharpness must be a number above 0, not 0"),
        ({"smoothing_sharpness": -1.0}, "smoothing_sharpness must be a number above 0"),
        ({"back_steps": -1}, "back_steps must be a number of at least 0"),
        ({"wholeness": np.nan}, "wholeness must be a number of at least 0"),
        ({"learned_weight": -2}, "learned_weight must be an integer of at least 0"),
        ({"thresholds": ()}, "thresholds must hold at least one number"),
        ({"learned_thresholds": ()}, "learned_thresholds must hold"),
        ({"learned_weight": 1.5}, "learned_weight must be an integer"),
        ({"prototypes": 0}, "prototypes must be an integer of at least 1"),
        ({"closer_margin": np.nan}, "closer_margin must be a number of at least 0"),
        ({"closer_cuts": 0.0}, "closer_cuts must be a number above 0"),
        ({"cut_thresholds": ()}, "cut_thresholds must hold"),
        ({"cut_thresholds": (0.02, np.nan)}, "cut_thresholds must hold .* finite"),
        ({"weights": "dot"}, "weights must be one of 'boc', 'cosine', not 'dot'"),
    ],
)
def test_settings_that_are_none(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)  # type: ignore[arg-type]


def test_unknown_models(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="nosuch"):
        Segmenter("nosuch")
    with pytest.raises(ValueError, match=r"missing\.onnx"):
        Segmenter(tmp_path / "missing.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dense"}, "method must be one of 'sparse', 'paper', not 'dense'"),
        ({"method": None}, "method must be one of 'sparse', 'paper', not None"),
        ({"rng": -1}, "rng must be an int of at least 0 or a numpy.random.Generator, not -1"),
        ({"rng": True}, "rng must be"),
        ({"rng": 0.5}, "rng must be"),
        ({"rng": None}, "rng must be"),
        ({"long_side": 0}, "long_side must be an integer of at least 1, not 0"),
        ({"long_side": 448.0}, "long_side must be an integer"),
        ({"threads": 2}, "provider and threads belong to the Backbone"),
        ({"provider": "cpu"}, "provider and threads belong to the Backbone"),
    ],
)
def test_options_that_are_none(backbone: Backbone, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(backbone, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"), [({"threads": 0}, "threads"), ({"provider": "x"}, "provider"), ({"model": ""}, "model")]
)
def test_options_that_the_backbone_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(**options)  # type: ignore[arg-type]


def test_layers_are_maps_on_the_token_grid_and_change_nothing(
    segmenter: Segmenter, result: Segmentation, astronaut: np.ndarray
) -> None:
    plain, layered = result, segmenter(astronaut, eigenvectors=3)
    assert np.array_equal(plain.labels, layered.labels)
    assert list(plain.layers) == ["foreground"]
    assert list(layered.layers) == ["foreground", "eigenvector 1", "eigenvector 2", "eigenvector 3"]
    for layer in layered.layers.values():
        assert layer.shape == tuple(layered.info["grid"])
        assert np.abs(layer).max() <= 1
    # The instances lie on what is above most thresholds.
    height, width = layered.info["grid"]
    rows = np.minimum(np.arange(512) * height // 512, height - 1)
    share = layered.layers["foreground"][rows[:, None], rows[None, :] * width // height]
    assert share[layered.labels > 0].mean() > 2 * share[layered.labels == 0].mean()


def test_who_watches_is_told_every_step_in_order(segmenter: Segmenter, astronaut: np.ndarray) -> None:
    steps: list[str] = []
    made: dict[str, Any] = {}

    def watch(step: str, values: Mapping[str, Any]) -> None:
        steps.append(step)
        made[step] = values

    result = segmenter(astronaut, eigenvectors=1, watch=watch)
    first = [step for step in steps if step != "crop"]
    assert first == ["features", "channels", "affinity", "eigenpairs", "foreground", "instances", "refine", "order"]
    assert sorted(made["order"]["order"]) == list(range(len(result)))
    assert steps.count("crop") == result.info["crops"]
    n = result.info["tokens"]
    assert made["instances"]["masks"].shape[1] == n
    assert [m.name for m in made["foreground"]["maps"]] == ["keys", "queries", "values", "learned"]
    assert made["affinity"]["graph"].shape == (n, n)


def test_no_image_fails_for_its_eigenvectors(
    small: Segmenter, astronaut: np.ndarray, small_result: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_vain(graph: Any, k: int) -> Any:
        raise EigenSolverError("no solver reached the tolerance", {})

    monkeypatch.setattr(pipeline, "smallest_eigenpairs", in_vain)
    made: dict[str, Mapping[str, Any]] = {}
    found = small(astronaut, eigenvectors=2, watch=lambda step, what: made.update({step: what}))
    assert np.array_equal(found.labels, small_result.labels)
    assert list(found.layers) == ["foreground"]
    assert made["eigenpairs"]["pairs"] is None
    with pytest.raises(EigenSolverError, match="no solver reached"):
        explain(small, astronaut)


def test_a_negative_number_of_eigenvectors(segmenter: Segmenter, astronaut: np.ndarray) -> None:
    with pytest.raises(ValueError, match="eigenvectors"):
        segmenter(astronaut, eigenvectors=-1)
