from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import find_objects, label
from skimage import measure

from sparsespec import refine, resample
from sparsespec._kernels import guided
from tests.reference import guided as reference

SCALE = refine._PIXELS_PER_TOKEN


def blocky_image(grid: tuple[int, int], seed: int, per_token: int = SCALE) -> np.ndarray:
    """Patches of random colours with a little noise: edges at other places than those of the tokens."""
    rng = np.random.default_rng(seed)
    height, width = grid[0] * per_token, grid[1] * per_token
    side = per_token + 4
    colours = rng.random((height // side + 1, width // side + 1, 3))
    image = colours.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]
    return (0.9 * image + 0.1 * rng.random(image.shape)).astype(np.float32)


def disjoint_masks(grid: tuple[int, int], count: int, seed: int) -> np.ndarray:
    """Neighbouring blobs, one for each of some random centres, and tokens that are in none."""
    rng = np.random.default_rng(seed)
    centres = rng.random((count, 2)) * grid
    y, x = np.mgrid[: grid[0], : grid[1]]
    away = np.hypot(y - centres[:, 0, None, None], x - centres[:, 1, None, None])
    return (away == away.min(axis=0)) & (away < 0.3 * max(grid))


class Window:
    """A picture that is only read by window, and says what was read."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self.shape, self.dtype = pixels.shape, pixels.dtype
        self.largest = 0

    def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        part = self._pixels[top:bottom, left:right].copy()
        assert part.shape == (bottom - top, right - left, 3)
        self.largest = max(self.largest, part.nbytes)
        return part


# The kernels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(
    ("size", "wanted"), [((23, 41), (9, 13)), ((7, 6), (15, 20)), ((12, 9), (12, 9)), ((1, 1), (7, 7))]
)
def test_the_guide_is_the_resized_photograph(
    size: tuple[int, int], wanted: tuple[int, int], dtype: type[np.generic]
) -> None:
    image = np.random.default_rng(0).random((*size, 3)).astype(np.float32)
    peak = np.float32(1 if dtype is np.float32 else np.iinfo(dtype).max)
    pixels = (image * peak).astype(dtype)
    rows, columns = refine._taps(size[0], wanted[0]), refine._taps(size[1], wanted[1])
    guide = np.empty((3, wanted[0] - 1, wanted[1]), np.float32)
    # Without the first row, from the pixels that the others need, in two parts.
    top = int(rows[0][1, 0])
    flat = pixels[top:].reshape(size[0] - top, -1)
    flat.flags.writeable = False  # as the pipeline gives it: no other kernel is compiled
    for begin, end in ((1, wanted[0] // 2), (wanted[0] // 2, wanted[0])):
        guided.reduce_rows(flat, top, peak, *rows, *columns, begin, end, guide, 1)
    expected = resample.resize(pixels.astype(np.float32) / peak, wanted)[1:]
    np.testing.assert_allclose(guide.transpose(1, 2, 0), expected, atol=2.0**-17 + 1e-6)
    assert np.array_equal(guide * 2**16, np.rint(guide * 2**16))


def exact_guide(height: int, width: int, seed: int) -> np.ndarray:
    """(3, h, w) colours in multiples of 2^-16, with an edge and a constant corner."""
    guide = np.random.default_rng(seed).random((3, height, width))
    guide[:, :, width // 2 :] *= 0.3
    guide[:, : height // 3, : width // 3] = 0.5
    return (np.rint(guide * 2**16) / 2**16).astype(np.float32)


@pytest.mark.parametrize(("size", "half"), [((9, 12), 2), ((5, 6), 4), ((1, 7), 3), ((6, 1), 0), ((1, 1), 1)])
def test_statistics_are_those_of_windows_one_by_one(size: tuple[int, int], half: int) -> None:
    guide = exact_guide(*size, 1)
    found = np.empty((9, *size), np.float32)
    guided.guide_statistics(guide, 0, size[0], half, 1e-2, 0, size[0], found, 0)
    colours = guide.transpose(1, 2, 0).astype(float)
    mean = reference.window_mean(colours, half)
    covariance = reference.window_mean(colours[..., :, None] * colours[..., None, :], half)
    covariance -= mean[..., :, None] * mean[..., None, :]
    inverse = np.linalg.inv(covariance + 1e-2 * np.eye(3))
    np.testing.assert_allclose(found[:3].transpose(1, 2, 0), mean, atol=1e-6)
    np.testing.assert_allclose(
        found[3:].transpose(1, 2, 0), inverse[..., (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)], rtol=1e-5, atol=1e-5
    )
    # Row by row, from no more than the rows in the window: the same bytes.
    for y in range(size[0]):
        top, bottom = max(y - half, 0), min(y + half + 1, size[0])
        row = np.empty((9, 1, size[1]), np.float32)
        guided.guide_statistics(guide[:, top:bottom].copy(), top, size[0], half, 1e-2, y, y + 1, row, y)
        assert row.tobytes() == found[:, y].tobytes()


def test_statistics_of_a_constant_image_are_those_of_eps() -> None:
    found = np.empty((9, 4, 6), np.float32)
    guided.guide_statistics(np.full((3, 4, 6), 0.25, np.float32), 0, 4, 2, 1e-4, 0, 4, found, 0)
    np.testing.assert_allclose(found[:3], 0.25, rtol=1e-6)
    np.testing.assert_allclose(found[[3, 6, 8]], 1e4, rtol=1e-6)
    np.testing.assert_allclose(found[[4, 5, 7]], 0, atol=1e-6)


@pytest.mark.parametrize(("grid", "half"), [((3, 4), 3), ((2, 2), 7), ((1, 3), 0), ((1, 1), 2)])
def test_models_are_a_linear_solve_per_pixel(grid: tuple[int, int], half: int) -> None:
    size = (grid[0] * 4, grid[1] * 4)
    eps = 1e-2
    guide = exact_guide(*size, 2)
    mask = np.random.default_rng(2).random(grid) < 0.5
    mask.flat[0] = True
    statistics = np.empty((9, *size), np.float32)
    guided.guide_statistics(guide, 0, size[0], half, eps, 0, size[0], statistics, 0)
    rows, columns = refine._between(size[0], 0.25, grid[0]), refine._between(size[1], 0.25, grid[1])
    box = (0, 0, *size)
    raw, models = np.empty((4, *size), np.float32), np.empty((4, size[0], size[1] + 1), np.float32)
    arguments = (mask, *rows, *columns, guide, 0, statistics, 0, box, half)
    guided.fit_models(*arguments, 0, size[0], raw, 0)
    membership = reference.enlarge(mask, grid, size)
    expected = reference.coefficients(guide.transpose(1, 2, 0), membership, half, eps)
    np.testing.assert_allclose(raw.transpose(1, 2, 0), expected, atol=2e-5)
    guided.average_models(raw, 0, 0, size[0], half, 0, size[0], models, 0)
    np.testing.assert_allclose(models[:, :, :-1].transpose(1, 2, 0), reference.window_mean(expected, half), atol=2e-5)
    assert np.array_equal(models[:, :, -1], models[:, :, -2])
    for y in range(size[0]):
        one = np.empty((4, 1, size[1]), np.float32)
        guided.fit_models(*arguments, y, y + 1, one, y)
        assert np.array_equal(one[:, 0], raw[:, y])
        top, bottom = max(y - half, 0), min(y + half + 1, size[0])
        mean = np.empty((4, 1, size[1] + 1), np.float32)
        guided.average_models(raw[:, top:bottom].copy(), top, 0, size[0], half, y, y + 1, mean, y)
        assert np.array_equal(mean[:, 0], models[:, y])


@pytest.mark.parametrize("steepness", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5), (2, 60)])
def test_pixels_go_to_the_mask_of_the_largest_interpolated_model(size: tuple[int, int], steepness: float) -> None:
    """Also where bounds decide: with models that hardly slope most cells need no look at a pixel."""
    rng = np.random.default_rng(1)
    shape = (11, 17 * size[1])
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    count = 3
    models = steepness * rng.standard_normal((count, 4, *size)).astype(np.float32)
    phase = 2 * np.pi * (np.arange(size[1]) / size[1] + np.arange(count)[:, None] / count)
    models[:, 3] += (0.5 + 0.4 * np.cos(phase)).astype(np.float32)[:, None]
    boxes = np.array([(0, 0, *size)] * count, np.int64)
    above, down = refine._between(shape[0], size[0] / shape[0], size[0])
    before, across = refine._between(shape[1], size[1] / shape[1], size[1])
    cell_columns = np.searchsorted(before, np.arange(max(size[1] - 1, 1) + 1)).astype(np.int64)
    flat = np.concatenate([models, models[..., -1:]], axis=-1).ravel()
    top = 2
    strips = refine._strips(above, top, shape[0])
    labels = np.full((shape[0] - top, shape[1]), 77, np.int32)
    looked_at = np.empty(len(strips), np.int64)
    guided.claim_pixels(
        pixels[top:].reshape(shape[0] - top, -1), np.float32(255), top, strips, 0, len(strips), down, before, across,
        cell_columns, flat, boxes, np.arange(count) * (flat.size // count), np.array([4, 5, 9], np.int32),
        np.float32(0.5), looked_at, labels,
    )  # fmt: skip
    filtered = np.empty((count, *labels.shape))
    for k, (y, x) in ((k, place) for k in range(count) for place in np.ndindex(labels.shape)):
        fy = min(max((y + top + 0.5) * size[0] / shape[0] - 0.5, 0), size[0] - 1)
        fx = min(max((x + 0.5) * size[1] / shape[1] - 0.5, 0), size[1] - 1)
        model = reference.bilinear(models[k].transpose(1, 2, 0), fy, fx)
        filtered[k, y, x] = model[:3] @ (pixels[y + top, x] / 255) + model[3]
    rivals = np.sort(np.concatenate([np.full((1, *labels.shape), 0.5), filtered]), axis=0)
    sure = rivals[-1] - rivals[-2] > 1e-5
    assert sure.mean() > 0.9
    assert np.array_equal(labels[sure], np.array([0, 4, 5, 9])[reference.claim(filtered, 0.5)][sure])
    assert 0 <= looked_at.sum() <= labels.size
    if steepness == 3.0 and size == (2, 60):
        assert looked_at.sum() > 0.9 * labels.size
    if steepness == 0.02 and size == (2, 60):
        assert 0 < looked_at.sum() < 0.9 * labels.size


# The filter


@pytest.mark.parametrize("extent_is_whole", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_labels_are_those_of_the_plain_filter(seed: int, extent_is_whole: bool) -> None:
    # Exactly as many pixels as the statistics take, so that nothing is reduced.
    grid = (8, 10)
    extent = (8.0, 10.0) if extent_is_whole else (8 - 2 / 7, 10 - 4 / 7)
    image = blocky_image(grid, seed)[: round(extent[0] * SCALE), : round(extent[1] * SCALE)]
    masks = disjoint_masks(grid, 4, seed)
    found = refine.refine_masks(image, masks, extent, radius=1.0, eps=1e-3)
    filtered = reference.memberships(image, masks, extent, SCALE, 1e-3)
    expected = reference.claim(filtered, 0.5)
    rivals = np.sort(np.concatenate([np.full((1, *expected.shape), 0.5), filtered]), axis=0)
    sure = rivals[-1] - rivals[-2] > 1e-4
    assert sure.mean() > 0.99
    assert len(np.unique(expected)) > 3
    assert found.dtype == np.int32
    assert np.array_equal(found[sure], expected[sure])


def test_a_reduced_photograph_gives_nearly_the_labels_of_the_whole_one() -> None:
    grid, per_token = (6, 7), 2 * SCALE
    image = blocky_image(grid, 5, per_token)
    masks = disjoint_masks(grid, 3, 5)
    extent = (6.0, 7.0)
    found = refine.refine_masks(image, masks, extent, radius=1.0, eps=1e-3)
    expected = reference.claim(reference.memberships(image, masks, extent, per_token, 1e-3), 0.5)
    assert np.mean(found == expected) > 0.97


@pytest.mark.parametrize("per_token", [3, 11])
@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])
def test_cropping_to_what_a_mask_can_reach_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, radius: float, per_token: int
) -> None:
    grid = (24, 19)
    image = blocky_image(grid, 2, per_token)
    masks = np.zeros((4, *grid), bool)
    masks[0, 8:13, 8:12] = True
    masks[1, 0, 0] = True
    masks[2, 20:, 3:6] = True
    masks[3, 13:15, 9:12] = True
    extent = (23.4, 18.7)
    found = refine.refine_masks(image, masks, extent, radius=radius)
    monkeypatch.setattr(refine, "_reach", lambda mask, extent, shape, half: (0, 0, *shape))
    assert np.array_equal(found, refine.refine_masks(image, masks, extent, radius=radius))
    assert set(np.unique(found).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("first", [10, 11])
@pytest.mark.parametrize("per_token", [SCALE, 2 * SCALE])
def test_borders_follow_an_edge_of_the_photograph_half_a_token_away(per_token: int, first: int) -> None:
    edge = round(10.5 * per_token)
    image = np.full((20 * per_token, 20 * per_token, 3), 0.3, np.float32)
    image[:, edge:] = 0.6, 0.4, 0.3
    mask = np.zeros((1, 20, 20), bool)
    mask[0, :, first:] = True
    labels = refine.refine_masks(image, mask, (20.0, 20.0))
    found = np.argmax(labels > 0, axis=1)
    assert np.all(np.abs(found - edge) <= 2)
    assert np.all(np.diff(labels, axis=1) >= 0)


def test_a_constant_image_gives_the_smoothed_mask() -> None:
    masks = disjoint_masks((9, 11), 1, 3)
    image = np.full((9 * SCALE, 11 * SCALE, 3), 0.4, np.float32)
    found = refine.refine_masks(image, masks, (9.0, 11.0), radius=1.0)
    smooth = reference.enlarge(masks[0], (9, 11), image.shape[:2])
    for _ in range(2):
        smooth = reference.window_mean(smooth, SCALE)
    sure = np.abs(smooth - 0.5) > 1e-3
    assert 0 < np.count_nonzero(found) < found.size
    assert np.array_equal(found[sure] > 0, smooth[sure] > 0.5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_of_everything_takes_everything(value: float) -> None:
    image = np.full((30, 40, 3), value, np.float32)
    assert np.all(refine.refine_masks(image, np.ones((1, 3, 4), bool), (3.0, 4.0)) == 1)


@pytest.mark.parametrize(
    ("shape", "grid", "extent"),
    [
        ((1, 1), (1, 1), (1.0, 1.0)),
        ((1, 1), (4, 4), (4.0, 4.0)),
        ((3, 400), (1, 32), (0.24, 32.0)),
        ((5, 1), (6, 1), (5.1, 0.02)),
    ],
)
def test_images_of_a_few_pixels(shape: tuple[int, int], grid: tuple[int, int], extent: tuple[float, float]) -> None:
    image = np.random.default_rng(0).random((*shape, 3)).astype(np.float32)
    labels = refine.refine_masks(image, np.ones((1, *grid), bool), extent)
    assert labels.shape == shape
    assert np.all(labels == 1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_masks_and_empty_masks_label_nothing(count: int) -> None:
    image = blocky_image((3, 4), 0)
    labels = refine.refine_masks(image, np.zeros((count, 3, 4), bool), (3.0, 4.0))
    assert labels.dtype == np.int32
    assert labels.shape == image.shape[:2]
    assert not labels.any()


def test_empty_masks_between_others_keep_their_number() -> None:
    masks = np.zeros((3, 6, 8), bool)
    masks[0, :, :4] = masks[2, :, 4:] = True
    labels = refine.refine_masks(blocky_image((6, 8), 1), masks, (6.0, 8.0))
    assert set(np.unique(labels).tolist()) - {0} == {1, 3}


def test_of_equal_masks_the_first_wins() -> None:
    masks = np.ones((2, 3, 4), bool)
    assert np.all(refine.refine_masks(blocky_image((3, 4), 1), masks, (3.0, 4.0)) == 1)


def test_inputs_may_be_read_only_and_stay_as_they_were() -> None:
    image, masks = blocky_image((6, 8), 1), disjoint_masks((6, 8), 2, 1)
    expected = refine.refine_masks(image.copy(), masks.copy(), (6.0, 8.0))
    before = image.copy(), masks.copy()
    image.flags.writeable = masks.flags.writeable = False
    assert np.array_equal(refine.refine_masks(image, masks, (6.0, 8.0)), expected)
    assert np.array_equal(image, before[0])
    assert np.array_equal(masks, before[1])


@pytest.mark.parametrize(
    ("band", "window", "chunk", "strip"), [(1, 1, 1, 1), (200_000, 5_000, 5, 3), (1, 10**9, 64, 99)]
)
def test_labels_do_not_depend_on_where_bands_end(
    monkeypatch: pytest.MonkeyPatch, band: int, window: int, chunk: int, strip: int
) -> None:
    grid, extent = (17, 12), (16.6, 11.8)
    image = (255 * blocky_image(grid, 4, 9)[: round(16.6 * 9), : round(11.8 * 9)]).astype(np.uint8)
    masks = disjoint_masks(grid, 5, 4)
    masks = np.concatenate([masks, np.zeros((1, *grid), bool)])
    masks[5, 0, 0] = masks[5, -1, -1] = True
    whole = refine.refine_masks(image, masks, extent, radius=0.5)
    assert len(np.unique(whole)) > 4
    for name, value in (("BAND_BYTES", band), ("WINDOW_BYTES", window), ("CHUNK_ROWS", chunk), ("STRIP_ROWS", strip)):
        monkeypatch.setattr(refine, f"_{name}", value)
    source = Window(image)
    for threads in (1, 2, 4):
        found = refine.refine_masks(source, masks, extent, radius=0.5, threads=threads)
        assert found.tobytes() == whole.tobytes()
    assert source.largest <= max(window, 5 * image[:9].nbytes)


def test_bands_without_masks_are_background(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (60, 5)
    image = blocky_image(grid, 4, 5)
    masks = np.zeros((2, *grid), bool)
    masks[0, 2:6] = masks[1, 50:55, 1:] = True
    whole = refine.refine_masks(image, masks, (60.0, 5.0), radius=0.5)
    monkeypatch.setattr(refine, "_BAND_BYTES", 1)
    assert np.array_equal(refine.refine_masks(image, masks, (60.0, 5.0), radius=0.5), whole)
    assert set(np.unique(whole).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_as_many_threads_as_wanted_give_the_same_bytes(threads: int) -> None:
    image, masks = blocky_image((20, 30), 3), disjoint_masks((20, 30), 6, 3)
    expected = refine.refine_masks(image, masks, (20.0, 30.0))
    assert refine.refine_masks(image, masks, (20.0, 30.0), threads=threads).tobytes() == expected.tobytes()


def test_eight_bits_sixteen_and_floats_give_the_same_labels() -> None:
    eight = (255 * blocky_image((7, 9), 2)).astype(np.uint8)
    masks = disjoint_masks((7, 9), 3, 2)
    expected = refine.refine_masks(eight, masks, (7.0, 9.0))
    assert len(np.unique(expected)) > 2
    real = eight / np.float32(255)
    for image in (eight.astype(np.uint16) * np.uint16(257), real, real.astype(np.float64), eight[::-1][::-1]):
        assert np.array_equal(refine.refine_masks(image, masks, (7.0, 9.0)), expected)
        assert np.array_equal(refine.refine_masks(Window(image), masks, (7.0, 9.0)), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_labels_may_be_written_to_a_file(tmp_path: Path, dtype: type[np.generic]) -> None:
    image, masks = (255 * blocky_image((6, 8), 1)).astype(np.uint8), disjoint_masks((6, 8), 2, 1)
    expected = refine.refine_masks(image, masks, (6.0, 8.0))
    out = np.memmap(tmp_path / "labels", dtype, "w+", shape=image.shape[:2])
    out[...] = 99
    assert refine.refine_masks(image, masks, (6.0, 8.0), out=out) is out
    assert np.array_equal(out, expected)
    assert refine.refine_masks(image, masks[:0], (6.0, 8.0), out=out) is out
    assert not out.any()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((5, 9), np.int32), "shape"),
        (np.zeros((6, 8), np.float32), "integers"),
        (np.zeros((6, 16), np.int32)[:, ::2], "contiguous"),
        (np.zeros((6, 8), np.int8), "up to 200"),
    ],
)
def test_what_labels_do_not_fit_in_is_refused(out: np.ndarray, message: str) -> None:
    image, masks = np.zeros((6, 8, 3), np.float32), np.zeros((200, 2, 3), bool)
    with pytest.raises(ValueError, match=f"out must .*{message}"):
        refine.refine_masks(image, masks, (2.0, 3.0), out=out)


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (6, 8, 4)])
def test_what_is_no_colour_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="image must be"):
        refine.refine_masks(np.zeros(shape, np.float32), np.ones((1, 2, 3), bool), (2.0, 3.0))


def test_only_labels_are_as_large_as_the_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "_BAND_BYTES", 1 << 20)
    monkeypatch.setattr(refine, "_WINDOW_BYTES", 1 << 18)
    small = (255 * blocky_image((24, 32), 1)).astype(np.uint8)

    class Enlarged:
        shape, dtype = (24 * 70, 32 * 70, 3), small.dtype

        def read(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
            return small[np.arange(top, bottom) // 10][:, np.arange(left, right) // 10]

    masks = disjoint_masks((24, 32), 4, 1)
    out = np.zeros(Enlarged.shape[:2], np.int32)
    refine.refine_masks(Enlarged(), masks[:, :4], (4.0, 32.0), out=out)
    # What other threads of the process allocate meanwhile, such as those that earlier tests left, counts as well.
    for _ in range(3):
        tracemalloc.start()
        refine.refine_masks(Enlarged(), masks, (24.0, 32.0), out=out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        if peak < 6 << 20:
            break
    assert len(np.unique(out)) == 5
    # The labels have 15 MB, the photograph 11 and would have 45 in float32.
    assert peak < 6 << 20


# Without a photograph


@pytest.mark.parametrize(
    ("shape", "extent"), [((21, 35), (3.0, 5.0)), ((17, 16), (2.4, 4.7)), ((1, 1), (3.0, 5.0)), ((2, 40), (0.3, 5.0))]
)
def test_enlarged_labels_are_those_of_the_tokens_that_pixels_lie_in(
    shape: tuple[int, int], extent: tuple[float, float]
) -> None:
    labels = np.arange(15, dtype=np.int32).reshape(3, 5)
    found = refine.enlarge_labels(labels, extent, shape)
    assert found.shape == shape
    assert found.dtype == np.int32
    for y, x in np.ndindex(shape):
        row, column = (y + 0.5) * extent[0] / shape[0], (x + 0.5) * extent[1] / shape[1]
        assert found[y, x] == labels[int(row), int(column)]


# Specks


def by_loops(labels: np.ndarray, min_pixels: float) -> np.ndarray:
    """Specks absorbed one by one, with outlines counted pixel by pixel."""
    regions = np.zeros(labels.shape, int)
    for value in np.unique(labels):
        parts, _ = label(labels == value)
        regions = np.where(parts > 0, parts + regions.max(), regions)
    sizes = {r: np.count_nonzero(regions == r) for r in np.unique(regions)}
    value_of = {r: int(labels[regions == r][0]) for r in sizes}
    first = {r: int(np.flatnonzero(regions == r)[0]) for r in sizes}
    kept = {max((r for r in sizes if value_of[r] == v), key=lambda r: (sizes[r], -first[r])) for v in np.unique(labels)}
    small = {r for r in sizes if sizes[r] < min_pixels} - kept
    out = labels.copy()
    for region in small:
        outline: dict[int, int] = {}
        for y, x in np.argwhere(regions == region):
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < labels.shape[0] and 0 <= u < labels.shape[1]:
                    other = int(regions[v, u])
                    if other != region and other not in small:
                        outline[other] = outline.get(other, 0) + 1
        if outline:
            out[regions == region] = value_of[max(outline, key=lambda r: (outline[r], -first[r]))]
    return out


def by_regions(labels: np.ndarray, min_pixels: float) -> np.ndarray:
    """The same with arrays of the image's size."""
    regions = measure.label(labels, background=-1, connectivity=1) - 1
    sizes = np.bincount(regions.ravel())
    label_of = np.zeros(sizes.size, labels.dtype)
    label_of[regions] = labels
    order = np.lexsort((-sizes, label_of))
    small = sizes < min_pixels
    small[order[np.r_[True, np.diff(label_of[order]) != 0]]] = False
    pairs = [(regions[:, :-1], regions[:, 1:]), (regions[:-1], regions[1:])]
    pairs += [(other, one) for one, other in pairs]
    shared: dict[tuple[int, int], int] = {}
    for inner, outer in (side for one, other in pairs for side in zip(one.ravel(), other.ravel(), strict=True)):
        if small[inner] and not small[outer]:
            shared[inner, outer] = shared.get((inner, outer), 0) + 1
    taken_by = np.arange(sizes.size)
    for (inner, outer), _ in sorted(shared.items(), key=lambda item: (item[1], -item[0][1])):
        taken_by[inner] = outer
    return label_of[taken_by][regions]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize(("shape", "density"), [((90, 70), 0.02), ((61, 83), 0.5), ((1, 400), 0.3), ((400, 1), 0.3)])
def test_specks_in_noise(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], density: float, dtype: type[np.generic]
) -> None:
    monkeypatch.setattr(refine, "_SMALL", 0)
    rng = np.random.default_rng(7)
    labels = (np.add.outer(np.arange(shape[0]) // 20, np.arange(shape[1]) // 15) % 4).astype(dtype)
    noise = rng.random(shape) < density
    labels[noise] = rng.integers(0, 5, np.count_nonzero(noise))
    expected = by_regions(labels, 6)
    assert not np.array_equal(expected, labels)
    for threads in (1, 2, 4):
        found = refine.absorb_specks(labels, 6, threads=threads)
        assert found.dtype == dtype
        assert np.array_equal(found, expected)
    other = np.empty_like(labels)
    assert refine.absorb_specks(labels, 6, out=other) is other
    assert np.array_equal(other, expected)
    assert refine.absorb_specks(labels, 6, out=labels) is labels
    assert np.array_equal(labels, expected)


def test_specks_of_a_read_only_map_and_of_none() -> None:
    labels = np.zeros((5, 6), np.int32)
    labels[2, 3] = labels[0, 0] = labels[0, 1] = 1
    labels.flags.writeable = False
    assert np.argwhere(refine.absorb_specks(labels, 2)).tolist() == [[0, 0], [0, 1]]
    assert refine.absorb_specks(np.zeros((0, 4), np.int32), 2).shape == (0, 4)


def test_passes_over_labels_take_no_memory_of_their_size() -> None:
    labels = np.zeros((1200, 1500), np.int32)
    labels[200:900, 300:800] = 1
    labels[400:600, 900:1300] = 2
    labels[500, 600] = labels[10, 10] = labels[1100, 1400:1402] = 2
    masks = np.zeros((3, 12, 15), bool)
    masks[0, 2:9, 3:8] = masks[1, 4:6, 9:13] = masks[2, 10, 11] = True
    twice = []
    for _ in range(2):
        # The first time compiles.
        part = labels.copy()
        tracemalloc.start()
        assert refine.absorb_specks(part, 4, out=part) is part
        refine.keep_all(part, masks, (12.0, 15.0))
        twice.append(refine.label_boxes(part, 3))
        refine.relabel(part, [0, 3, 1, 2])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    boxes, pixels = twice[-1]
    assert peak < 1 << 20 < labels.nbytes / 6
    assert boxes.tolist() == [[300, 200, 500, 700], [900, 400, 400, 200], [1100, 1000, 100, 100]]
    assert pixels.tolist() == [labels.size - 440_000, 350_000, 80_000, 10_000]
    assert np.bincount(part.ravel()).tolist() == [labels.size - 440_000, 80_000, 10_000, 350_000]


@pytest.mark.parametrize("min_pixels", [0, 1.5, 4, 9, 1e9])
@pytest.mark.parametrize("seed", range(3))
def test_specks_take_the_label_around_them(seed: int, min_pixels: float) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (4, 5)).repeat(5, axis=0).repeat(4, axis=1).astype(np.int32)
    noise = rng.random(labels.shape) < 0.2
    labels[noise] = rng.integers(0, 4, np.count_nonzero(noise))
    before = labels.copy()
    found = refine.absorb_specks(labels, min_pixels)
    assert found.dtype == np.int32
    assert np.array_equal(found, by_loops(labels, min_pixels))
    assert np.array_equal(labels, before)
    assert set(np.unique(found)) == set(np.unique(labels))


def test_an_island_and_a_hole() -> None:
    labels = np.zeros((8, 12), np.int32)
    labels[2:6, 2:7] = 1
    labels[4, 4] = 0
    expected = labels.copy()
    expected[4, 4] = 1
    labels[1, 10] = 1
    assert np.array_equal(refine.absorb_specks(labels, 2), expected)
    assert np.array_equal(refine.absorb_specks(labels, 1), labels)


@pytest.mark.parametrize("value", [0, 3])
def test_one_label_everywhere_stays(value: int) -> None:
    labels = np.full((1, 5), value, np.int32)
    assert np.array_equal(refine.absorb_specks(labels, 100), labels)


def test_islands_and_holes_are_absorbed() -> None:
    labels = np.zeros((20, 30), np.int32)
    labels[2:12, 2:12] = 1
    labels[2:12, 12:22] = 2
    expected = labels.copy()
    labels[5, 5] = 0  # a hole
    labels[15:17, 25] = 2  # an island in the background
    labels[7, 11] = 2  # a notch: part of its neighbour, nothing to absorb
    labels[6, 16] = 1  # an island in another instance
    expected[7, 11] = 2
    before = labels.copy()
    np.testing.assert_array_equal(refine.absorb_specks(labels, 4), expected)
    np.testing.assert_array_equal(labels, before)


def test_regions_of_the_limit_stay() -> None:
    labels = np.zeros((6, 12), np.int32)
    labels[1:3, 1:3] = 1
    labels[1:4, 6:9] = 1
    np.testing.assert_array_equal(refine.absorb_specks(labels, 4), labels)
    assert refine.absorb_specks(labels, 5)[1, 1] == 0


def test_the_largest_region_of_a_label_stays_however_small() -> None:
    labels = np.zeros((9, 9), np.int32)
    labels[4, 4] = 3
    np.testing.assert_array_equal(refine.absorb_specks(labels, 50), labels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)])
@pytest.mark.parametrize("value", [0, 2])
def test_one_region(shape: tuple[int, int], value: int) -> None:
    labels = np.full(shape, value, np.int32)
    np.testing.assert_array_equal(refine.absorb_specks(labels, 100), labels)


def test_the_longest_shared_outline_decides() -> None:
    labels = np.ones((9, 9), np.int32)
    labels[:, 5:] = 2
    labels[3:6, 4] = 3
    labels[8, 8] = 3
    labels[0:4, 0:2] = 3  # the largest region of 3 stays
    out = refine.absorb_specks(labels, 4)
    # Five of its pixel edges touch 1 (left, above and below), three touch 2.
    assert set(out[3:6, 4]) == {1}
    assert out[8, 8] == 2


# Numbers and boxes


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (57, 31)])
def test_boxes_counts_and_numbers(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: type[np.generic], threads: int
) -> None:
    monkeypatch.setattr(refine, "_SMALL", 0)
    rng = np.random.default_rng(shape[0])
    labels = np.repeat(rng.integers(0, 9, shape), 4, axis=1).astype(dtype)
    labels[labels == 3] = 0
    # One label more than asked for, two that aren't there.
    boxes, pixels = refine.label_boxes(labels, 7, threads=threads)
    assert np.array_equal(pixels, np.bincount(labels.ravel(), minlength=9)[:8])
    found = find_objects(labels.astype(np.int32), 7)
    assert boxes.shape == (7, 4)
    for box, place in zip(boxes.tolist(), found, strict=True):
        if place is None:
            assert box == [0, 0, 0, 0]
        else:
            rows, columns = place
            assert box == [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
    number = np.array([0, 5, 2, 1, 1, 0, 7])
    expected = np.where(labels < 7, number[np.minimum(labels, 6)], labels)
    refine.relabel(labels, number, threads=threads)
    assert labels.dtype == dtype
    assert np.array_equal(labels, expected)


def test_no_labels_have_no_boxes() -> None:
    boxes, pixels = refine.label_boxes(np.zeros((4, 5), np.int32), 0)
    assert boxes.shape == (0, 4)
    assert pixels.tolist() == [20]
    boxes, pixels = refine.label_boxes(np.zeros((0, 5), np.int32), 2)
    assert boxes.tolist() == [[0, 0, 0, 0]] * 2
    assert pixels.tolist() == [0, 0, 0]


# Every mask a pixel


def token_grid_masks(grid: tuple[int, int]) -> np.ndarray:
    return np.eye(grid[0] * grid[1], dtype=bool).reshape(-1, *grid)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(6, 8), (3, 4), (30, 41)])
def test_keep_all_gives_every_mask_a_pixel_and_takes_no_masks_last(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 12
    masks = token_grid_masks((3, 4))
    labels = rng.integers(0, count + 1, shape).astype(np.int32)
    # Some masks own much, several nothing.
    labels[np.isin(labels, rng.permutation(count)[:7] + 1)] = 0 if seed % 2 else 1 + rng.integers(count)
    before = labels.copy()
    refine.keep_all(labels, masks, (3.0, 4.0))
    had = np.bincount(before.ravel(), minlength=count + 1)[1:] > 0
    has = np.bincount(labels.ravel(), minlength=count + 1)[1:] > 0
    assert not had.all()
    assert has.all()
    changed = labels != before
    assert not had[labels[changed] - 1].any()
    enough = shape != (3, 4)
    if enough:
        own = refine.enlarge_labels(np.arange(1, 13, dtype=np.int32).reshape(3, 4), (3.0, 4.0), shape)
        assert np.array_equal(labels[changed], own[changed])


def test_keep_all_leaves_labels_alone_that_are_all_there() -> None:
    labels = np.array([[0, 1], [2, 2]], np.int32)
    refine.keep_all(labels, token_grid_masks((1, 2)), (1.0, 2.0))
    assert labels.tolist() == [[0, 1], [2, 2]]
    refine.keep_all(labels, np.zeros((0, 1, 2), bool), (1.0, 2.0))
    assert labels.tolist() == [[0, 1], [2, 2]]


def test_keep_all_takes_a_masks_own_background() -> None:
    labels = np.zeros((4, 8), np.int32)
    labels[:, :3] = 1
    refine.keep_all(labels, token_grid_masks((1, 2)), (1.0, 2.0))
    assert np.array_equal(labels, np.repeat([[1, 1, 1, 0, 2, 2, 2, 2]], 4, axis=0))


def test_keep_all_takes_one_pixel_of_another_where_there_is_no_background() -> None:
    labels = np.ones((4, 8), np.int32)
    refine.keep_all(labels, token_grid_masks((1, 2)), (1.0, 2.0))
    assert np.argwhere(labels == 2).tolist() == [[0, 4]]


def test_tokens_smaller_than_pixels_take_the_pixel_they_lie_in() -> None:
    masks = token_grid_masks((6, 6))[[7, 35, 0]]
    labels = np.zeros((3, 3), np.int32)
    refine.keep_all(labels, masks, (6.0, 6.0))
    # The last one's pixel is the only one of the first.
    assert labels.tolist() == [[1, 3, 0], [0, 0, 0], [0, 0, 2]]


def test_a_token_without_a_pixel_takes_no_more_than_one() -> None:
    labels = np.zeros((3, 3), np.int32)
    refine.keep_all(labels, token_grid_masks((6, 6))[[14]], (6.0, 6.0))
    assert labels.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("count", [1, 7, 9])
def test_as_many_masks_as_pixels(count: int) -> None:
    masks = token_grid_masks((6, 6))[np.random.default_rng(count).permutation(36)[:count]]
    labels = np.zeros((3, 3), np.int32)
    refine.keep_all(labels, masks, (6.0, 6.0))
    assert set(range(1, count + 1)) <= set(labels.ravel().tolist())
