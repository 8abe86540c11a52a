from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.linalg
from scipy.sparse import csr_array, eye_array

from sparsespec import foreground
from sparsespec.affinity import grid_edges
from sparsespec.channels import noise_channel_reduction, normalize_tokens

BORDERS = {
    (1, 1): [0],
    (1, 5): [0, 1, 2, 3, 4],
    (4, 1): [0, 1, 2, 3],
    (2, 2): [0, 1, 2, 3],
    (2, 3): [0, 1, 2, 3, 4, 5],
    (3, 3): [0, 1, 2, 3, 5, 6, 7, 8],
    (3, 4): [0, 1, 2, 3, 4, 7, 8, 9, 10, 11],
}


def unit_rows(n: int, channels: int, seed: int = 0) -> np.ndarray:
    return normalize_tokens(np.random.default_rng(seed).standard_normal((n, channels)))


def random_graph(grid: tuple[int, int], seed: int = 0) -> csr_array:
    first, second = grid_edges(grid)
    n = grid[0] * grid[1]
    weights = np.zeros((n, n))
    weights[first, second] = np.random.default_rng(seed).uniform(0.01, 1, first.size)
    return csr_array(weights + weights.T)


@pytest.mark.parametrize("grid", BORDERS)
def test_border_tokens(grid: tuple[int, int]) -> None:
    assert foreground.border_tokens(grid).tolist() == BORDERS[grid]


# Prototypes


@pytest.mark.parametrize("wanted", [1, 2, 4, 9])
def test_prototypes_are_unit_rows_and_always_the_same(wanted: int) -> None:
    features = unit_rows(30, 7)
    found = foreground.background_prototypes(features, (5, 6), wanted)
    assert found.shape == (wanted, 7)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found.tobytes() == foreground.background_prototypes(features.copy(), (5, 6), wanted).tobytes()


def test_prototypes_do_not_look_inside_the_border() -> None:
    features = unit_rows(30, 7)
    changed = features.copy()
    inside = np.setdiff1d(np.arange(30), foreground.border_tokens((5, 6)))
    changed[inside] = unit_rows(inside.size, 7, seed=1)
    first, second = (foreground.background_prototypes(f, (5, 6)) for f in (features, changed))
    assert np.array_equal(first, second)


def test_prototypes_are_the_means_of_the_tokens_nearest_to_them() -> None:
    features = unit_rows(99, 5)
    border = features[foreground.border_tokens((9, 11))].astype(np.float64)
    centres = foreground.background_prototypes(features, (9, 11), 3, iterations=1000)
    owner = np.argmax(border @ centres.T, axis=1)
    for c, centre in enumerate(centres):
        mean = border[owner == c].sum(axis=0)
        np.testing.assert_allclose(centre, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_there_are_no_more_prototypes_than_different_border_tokens(kinds: int) -> None:
    features = np.eye(3, 8, dtype=np.float32)[np.arange(30) % kinds]
    found = foreground.background_prototypes(features, (5, 6), 4)
    # The first centre is the mean, which is no token unless all are alike, so that one spare centre can stay.
    assert kinds <= len(found) <= (1 if kinds == 1 else kinds + 1)
    assert np.all((features @ found.T).max(axis=1) > 1 - 1e-5)


def test_opposite_tokens_on_the_border_have_no_mean_and_do_no_harm() -> None:
    features = np.eye(1, 4, dtype=np.float32)[np.zeros(16, int)] * np.where(np.arange(16) % 2, -1, 1)[:, None]
    found = foreground.border_contrast(features.astype(np.float32), (4, 4))
    np.testing.assert_allclose(found, 0, atol=1e-6)


# Border contrast


def test_an_object_unlike_the_border_has_contrast_one() -> None:
    grid = (8, 9)
    inside = np.zeros(grid, bool)
    inside[3:6, 2:7] = True
    features = np.zeros((72, 6), np.float32)
    features[:, 0] = 1
    features[36:, :2] = 0, 1  # two kinds of background
    features[inside.ravel()] = 0, 0, 1, 0, 0, 0
    found = foreground.border_contrast(features, grid)
    assert found.shape == (72,)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[inside.ravel()], 1, atol=1e-6)
    np.testing.assert_allclose(found[~inside.ravel()], 0, atol=1e-6)


def test_border_contrast_is_one_minus_the_nearest_cosine() -> None:
    features = unit_rows(30, 7)
    prototypes = foreground.background_prototypes(features, (5, 6), 3)
    expected = [1 - max(float(np.dot(token, p)) for p in prototypes) for token in features]
    np.testing.assert_allclose(foreground.border_contrast(features, (5, 6), 3), expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1), (2, 3)])
def test_grids_without_an_inside(grid: tuple[int, int]) -> None:
    found = foreground.border_contrast(unit_rows(grid[0] * grid[1], 5), grid)
    assert np.isfinite(found).all()


# Smoothing


@pytest.mark.parametrize("strength", [0.1, 3.0, 50.0])
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (6, 9)])
def test_smoothing_solves_its_equation(grid: tuple[int, int], strength: float) -> None:
    graph = random_graph(grid)
    values = np.random.default_rng(1).standard_normal(grid[0] * grid[1])
    dense = graph.toarray()
    matrix = np.eye(values.size) + strength * (np.diag(dense.sum(axis=1)) - dense)
    found = foreground.smooth(values, graph, strength)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.linalg.solve(matrix, values), atol=1e-4)


def test_smoothing_with_strength_zero_leaves_the_values() -> None:
    values = np.random.default_rng(1).standard_normal(54)
    np.testing.assert_allclose(foreground.smooth(values, random_graph((6, 9)), 0.0), values, rtol=1e-12)


def test_smoothing_keeps_the_sum_and_constants() -> None:
    graph = random_graph((6, 9))
    values = np.random.default_rng(1).standard_normal(54)
    kept = values.copy()
    assert foreground.smooth(values, graph).sum() == pytest.approx(values.sum(), abs=1e-4)
    np.testing.assert_allclose(foreground.smooth(np.full(54, 2.5), graph), 2.5, rtol=1e-5)
    np.testing.assert_allclose(foreground.smooth(np.zeros(54), graph), 0)
    assert np.array_equal(values, kept)


# Statistics


def test_several_maps_are_smoothed_as_each_alone() -> None:
    graph = random_graph((6, 9))
    maps = np.random.default_rng(4).standard_normal((54, 5)) * [1, 10, 0, 1e-6, 1e6]
    found = foreground.smooth(maps, graph, 3.0)
    assert found.shape == maps.shape
    for column, one in zip(found.T, maps.T, strict=True):
        assert np.array_equal(column, foreground.smooth(one, graph, 3.0))


def test_a_self_loop_smooths_nothing() -> None:
    graph = random_graph((6, 9))
    values = np.random.default_rng(5).standard_normal(54)
    looped = csr_array(graph + 0.7 * eye_array(54))
    np.testing.assert_allclose(foreground.smooth(values, looped), foreground.smooth(values, graph), atol=1e-5)


@pytest.mark.parametrize("strength", [-1.0, np.nan, np.inf])
def test_smoothing_wants_a_strength(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be a number of at least 0"):
        foreground.smooth(np.zeros(54), random_graph((6, 9)), strength)


@pytest.mark.parametrize("shape", [(53,), (2, 54), (54, 1, 1)])
def test_smoothing_wants_a_row_for_each_token(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"values must be \(N,\) or \(N, m\) with N = 54"):
        foreground.smooth(np.zeros(shape), random_graph((6, 9)))


def test_the_length_of_a_token_does_not_matter_to_its_contrast() -> None:
    rng = np.random.default_rng(6)
    features = rng.standard_normal((54, 7)).astype(np.float32)
    scaled = features * rng.uniform(0.1, 10, (54, 1)).astype(np.float32)
    np.testing.assert_allclose(
        foreground.border_contrast(scaled, (6, 9)), foreground.border_contrast(features, (6, 9)), atol=2e-6
    )


def test_a_token_of_zeros_is_unrelated_to_the_border() -> None:
    features = np.ones((54, 3), np.float32)
    features[22] = 0
    contrast = foreground.border_contrast(features, (6, 9))
    assert contrast[22] == 1
    np.testing.assert_allclose(np.delete(contrast, 22), 0, atol=1e-6)


def test_standardise() -> None:
    values = np.random.default_rng(2).uniform(3, 9, 40).astype(np.float32)
    found = foreground.standardise(values)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert found.std() == pytest.approx(1, abs=1e-12)
    assert np.array_equal(np.argsort(found), np.argsort(values))


@pytest.mark.parametrize("value", [0.0, 0.1, -7e3])
def test_standardise_makes_a_constant_map_zero(value: float) -> None:
    assert np.array_equal(foreground.standardise(np.full(33, value)), np.zeros(33))


def test_the_eigenvector_of_a_picture_in_two_parts_tells_the_inner_one() -> None:
    rng = np.random.default_rng(7)
    inside = np.zeros((12, 15), bool)
    inside[4:9, 5:11] = True
    # Objects and ground point apart, so that the threshold at zero acts.
    ground, thing = rng.standard_normal((2, 30))
    features = np.where(inside.reshape(-1, 1), thing, ground - 0.3 * thing) + 0.1 * rng.standard_normal((180, 30))
    found = foreground.eigenvector_contrast(features, (12, 15))
    assert np.array_equal((found > 0).reshape(12, 15), inside)
    assert np.linalg.norm(found) == pytest.approx(1)


def test_the_eigenvector_is_one_of_the_dense_matrix() -> None:
    features = np.random.default_rng(8).standard_normal((54, 40)) + 0.2
    found = foreground.eigenvector_contrast(features, (6, 9), n_vectors=3)
    unit = normalize_tokens(features)
    quiet = unit[:, noise_channel_reduction(unit)].astype(np.float64)
    weights = np.maximum(quiet @ quiet.T, 0)
    values, vectors = scipy.linalg.eigh(np.diag(weights.sum(axis=1)) - weights, np.diag(weights.sum(axis=1)))
    sides = np.concatenate([vectors[:, 1:4], -vectors[:, 1:4]], axis=1)
    sides /= np.linalg.norm(sides, axis=0)
    assert np.all(np.diff(values[:5]) > 1e-3)
    cosines = found @ sides
    chosen = int(np.argmax(cosines))
    assert cosines[chosen] == pytest.approx(1, abs=1e-4)
    on_border = (sides[foreground.border_tokens((6, 9))] > 0).mean(axis=0)
    assert on_border[chosen] == on_border.min()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_eigenvector_of_a_few_tokens(size: int) -> None:
    found = foreground.eigenvector_contrast(np.ones((size, 4)), (1, size))
    assert found.shape == (size,)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (5, 9)}, r"grid \(5, 9\) does not hold the 54 tokens"),
        ({"keep": 0.0}, "keep must be a share"),
        ({"n_vectors": 0}, "n_vectors must be an integer of at least 1"),
    ],
)
def test_the_eigenvector_wants_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        foreground.eigenvector_contrast(np.ones((54, 4)), **{"grid": (6, 9), **arguments})
