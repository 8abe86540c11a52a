from __future__ import annotations

import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from skimage import data

import sparsespec
from sparsespec import Backbone, Segmentation, Segmenter, segment
from sparsespec.models import UnknownModelError, get_model
from sparsespec.pipeline import Settings

SMALL = 224


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


def assert_sound(found: Segmentation, shape: tuple[int, int]) -> None:
    """Check all that a result promises whatever the image."""
    n = len(found)
    assert found.labels.shape == shape
    assert found.labels.dtype == np.int32
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
def test_images_of_a_few_pixels(small: Segmenter, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert_sound(small(image), shape)


@pytest.mark.parametrize("shape", [(14, 14), (14, 1)])
def test_an_image_of_one_token(backbone: Backbone, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*shape, 3))
    found = Segmenter(backbone, long_side=14)(image)
    assert_sound(found, shape)
    assert found.info["tokens"] == 1
    assert len(found) == 0
    one = Segmenter(backbone, 1, long_side=14)(image)
    assert np.all(one.labels == 1)


# Kinds of arrays


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
    grey = data.camera()
    found = small(grey)
    assert_sound(found, grey.shape)
    assert_same_bytes(found, small(np.repeat(grey[:, :, None], 3, axis=2)))
    assert_same_bytes(found, small(grey[:, :, None]))


def test_bool_images(small: Segmenter) -> None:
    image = np.zeros((60, 80), bool)
    image[20:40, 25:55] = True
    assert_same_bytes(small(image), small(image.astype(np.uint8) * 255))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_image_is_not_changed(small: Segmenter, astronaut: np.ndarray, dtype: type) -> None:
    image = astronaut.astype(dtype) if dtype is np.uint8 else astronaut.astype(dtype) / 255
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


def test_two_python_threads_at_once(segmenter: Segmenter, result: Segmentation, astronaut: np.ndarray) -> None:
    turned = np.ascontiguousarray(astronaut[::-1])
    expected = segmenter(turned)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(segmenter, [astronaut, turned, turned, astronaut]))
    for one, other in zip(found, (result, expected, expected, result), strict=True):
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


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_so_many_instances_as_asked_for(backbone: Backbone, astronaut: np.ndarray, count: int) -> None:
    found = Segmenter(backbone, n_instances=count, long_side=SMALL)(astronaut)
    assert_sound(found, astronaut.shape[:2])
    assert len(found) == count


@pytest.mark.parametrize("count", [1, 5, 30])
def test_so_many_instances_even_where_there_is_nothing(backbone: Backbone, count: int) -> None:
    found = Segmenter(backbone, count, long_side=SMALL)(np.zeros((60, 80, 3), np.uint8))
    assert_sound(found, (60, 80))
    assert len(found) == count


@pytest.mark.parametrize("shape", [(3, 4), (12, 1), (2, 70)])
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


def test_settings_are_used(backbone: Backbone, astronaut: np.ndarray) -> None:
    strict = Segmenter(backbone, long_side=SMALL, settings=Settings(min_votes=1.0))
    assert len(strict(astronaut)) == 0


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
        ({"threads": 2}, "providers and threads belong to the Backbone"),
        ({"providers": ["CPUExecutionProvider"]}, "providers and threads belong to the Backbone"),
    ],
)
def test_options_that_are_none(backbone: Backbone, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(backbone, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"), [({"threads": 0}, "threads"), ({"providers": []}, "providers"), ({"model": ""}, "model")]
)
def test_options_that_the_backbone_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(**options)  # type: ignore[arg-type]
