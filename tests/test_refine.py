from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import label

from sparsespec import refine
from sparsespec._kernels._compile import parallel_region
from sparsespec._kernels.guided import claim_pixels, solve_guide
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


# The kernels


def test_solve_guide_is_a_linear_solve_per_pixel() -> None:
    rng = np.random.default_rng(0)
    guide = blocky_image((2, 3), 0).astype(np.float64)
    membership = rng.random(guide.shape[:2])
    mean, mean_p = reference.window_mean(guide, 3), reference.window_mean(membership, 3)
    outer = reference.window_mean(guide[..., :, None] * guide[..., None, :], 3)
    moments = outer[..., (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
    cross = reference.window_mean(guide * membership[..., None], 3)
    found = np.empty((*mean_p.shape, 4), np.float32)
    given = [np.ascontiguousarray(a, np.float32) for a in (mean, moments, cross, mean_p)]
    with parallel_region():
        solve_guide(given[0], given[1], given[2], given[3], np.float32(1e-3), found)
    expected = reference.coefficients(guide, membership, 3, 1e-3)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("corner", [(0, 0), (2, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 5)])
def test_claim_pixels_interpolates_and_keeps_the_best(size: tuple[int, int], corner: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    image = rng.random((11, 17, 3)).astype(np.float32)
    coefficients = rng.standard_normal((*size, 4)).astype(np.float32)
    best = rng.random((11, 17)).astype(np.float32)
    labels = np.full((11, 17), 3, np.int32)
    top, left, bottom, right = box = (1, 2, 9, 16)
    step = (0.31, 0.42)
    expected_best, expected_labels = best.copy(), labels.copy()
    for y in range(top, bottom):
        for x in range(left, right):
            fy = min(max((y + 0.5) * step[0] - 0.5 - corner[0], 0), size[0] - 1)
            fx = min(max((x + 0.5) * step[1] - 0.5 - corner[1], 0), size[1] - 1)
            model = reference.bilinear(coefficients, fy, fx)
            value = float(model[:3] @ image[y, x] + model[3])
            if value > best[y, x]:
                expected_best[y, x], expected_labels[y, x] = value, 8
    assert {3, 8} == set(expected_labels.ravel().tolist())
    with parallel_region():
        claim_pixels(image, coefficients, np.array(box, np.int64), *step, *corner, 8, best, labels)
    assert np.array_equal(labels, expected_labels)
    np.testing.assert_allclose(best, expected_best, atol=1e-5)


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
    monkeypatch.setattr(refine, "_box", lambda mask, extent, shape, margin: (0, 0, *shape))
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
