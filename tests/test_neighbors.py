from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from sparsespec import affinity, channels, neighbors
from sparsespec._kernels import tiles
from tests.reference import affinity as reference

K = 20
GRID = (84, 84)
SAMPLE = np.arange(0, GRID[0] * GRID[1], 23)


def _picture(rng: np.random.Generator, grid: tuple[int, int], n_channels: int = 24, n_things: int = 12) -> np.ndarray:
    """Tokens as photographs have them: things of the same features, smooth within, with a few channels that spike."""
    height, width = grid
    nearest = rng.integers(0, (height, width), (n_things, 2))
    row, col = np.mgrid[:height, :width]
    thing = np.argmin((row[..., None] - nearest[:, 0]) ** 2 + (col[..., None] - nearest[:, 1]) ** 2, axis=-1)
    fields = gaussian_filter(rng.standard_normal((height, width, n_channels)), (4, 4, 0))
    features = rng.standard_normal((n_things, n_channels))[thing] + 8 * fields
    features += 0.1 * rng.standard_normal(features.shape)
    spikes = rng.random(features.shape) < 0.002
    features[spikes] *= 4
    return channels.normalize_tokens(features.reshape(-1, n_channels).astype(np.float32))


def _exact(features: np.ndarray, n_neighbors: int, tokens: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lists and affinities of some tokens by all pairs, of equal affinities the lowest token first."""
    size = len(features)
    tokens = np.arange(size) if tokens is None else tokens
    every = np.tile(np.arange(size), tokens.size)
    values = affinity.boc_edges(features, np.repeat(tokens, size), every).reshape(-1, size)
    values[np.arange(tokens.size), tokens] = -1
    nearest = np.argsort(-values, axis=1, kind="stable")[:, :n_neighbors]
    return nearest, np.take_along_axis(values, nearest, axis=1)


def _recall(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([np.isin(one, other).mean() for one, other in zip(exact, found, strict=True)]))


def assert_lists(features: np.ndarray, lists: tuple[np.ndarray, np.ndarray, np.ndarray], n_neighbors: int) -> None:
    neighbours, weights, counts = lists
    size = len(features)
    assert neighbours.shape == weights.shape == (size, n_neighbors)
    assert neighbours.dtype == counts.dtype == np.int32
    assert weights.dtype == np.float32
    listed = np.arange(n_neighbors) < counts[:, None]
    assert np.all(neighbours[~listed] == -1)
    assert np.all(weights[~listed] == 0)
    assert np.all(weights[listed] > 0)
    first, second = np.nonzero(listed)[0], neighbours[listed]
    assert np.all(first != second)
    assert np.unique(first * size + second).size == second.size, "a token is listed once"
    same_bits = affinity.boc_edges(features, first, second).astype(np.float32)
    assert same_bits.tobytes() == weights[listed].tobytes()
    falling = (weights[:, :-1] > weights[:, 1:]) | (
        (weights[:, :-1] == weights[:, 1:]) & (neighbours[:, :-1] < neighbours[:, 1:])
    )
    assert np.all(falling[listed[:, 1:]])


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return _picture(np.random.default_rng(3), GRID)


@pytest.mark.parametrize("n_channels", [1, 3, 4, 60])
def test_tiles_are_those_of_numpy(n_channels: int) -> None:
    rng = np.random.default_rng(n_channels)
    steps = -(-n_channels // tiles.GROUP)
    rows = rng.integers(-900, 900, (12, steps * tiles.GROUP)).astype(np.int16)
    others = rng.integers(-900, 900, (tiles.CANDIDATES, steps * tiles.GROUP)).astype(np.int16)
    rows[5] = others[1] = 0
    others[2] = rows[6]
    others[3] = -rows[7]
    tile = np.ascontiguousarray(others.reshape(tiles.CANDIDATES, steps, -1).transpose(1, 0, 2).reshape(steps, -1))
    unit = np.float32(1 / 1000)
    thresholds = np.full(12, 0.7, np.float32)
    found, plain = np.empty((2, tiles.QUERIES, tiles.CANDIDATES), np.float32)
    first = 4
    arguments = (rows, np.abs(rows), first, tile, np.abs(tile), unit, thresholds)
    hits = _compare(*arguments, found)
    assert hits == tiles._compare_plain(*arguments, plain)
    assert found.tobytes() == plain.tobytes()
    both = np.concatenate([rows[first : first + tiles.QUERIES], others]) / 1000
    expected = reference.boc(both)[: tiles.QUERIES, tiles.QUERIES :]
    expected[5 - first, 1] = 0  # two rows of zeros
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert [bool(hits >> bit & 1) for bit in range(32)] == (found.ravel() > 0.7).tolist()


def _compare(*arguments: object) -> int:
    if numba.config.DISABLE_JIT:
        return tiles.compare(*arguments)
    return _compiled()(*arguments)


def _compiled() -> Callable[..., int]:
    compare = tiles.compare

    @numba.njit(error_model="numpy")
    def call(queries, queries_abs, first, tile, tile_abs, unit, thresholds, values):  # type: ignore[no-untyped-def]
        return compare(queries, queries_abs, first, tile, tile_abs, unit, thresholds, values)

    return call


def test_most_of_the_nearest_are_found(picture: np.ndarray) -> None:
    lists = neighbors.approximate_neighbors(picture, K)
    assert_lists(picture, lists, K)
    exact, weights = _exact(picture, K, SAMPLE)
    assert _recall(lists[0][SAMPLE], exact) > 0.97
    # What is found instead has nearly their affinity.
    assert np.mean(weights - lists[1][SAMPLE]) < 1e-3


def test_tokens_in_any_order_and_on_a_grid(picture: np.ndarray) -> None:
    exact, _ = _exact(picture, K, SAMPLE)
    on_grid = neighbors.approximate_neighbors(picture, K, grid=GRID)
    assert_lists(picture, on_grid, K)
    assert _recall(on_grid[0][SAMPLE], exact) > 0.97
    shuffled = np.random.default_rng(0).permutation(len(picture))
    lists = neighbors.approximate_neighbors(picture[shuffled], K)
    back = np.argsort(shuffled)
    assert _recall(shuffled[lists[0]][back][SAMPLE], exact) > 0.97


@pytest.mark.slow
def test_read_only_features(picture: np.ndarray) -> None:
    read_only = picture.copy()
    read_only.setflags(write=False)
    first = neighbors.approximate_neighbors(picture, 5)
    again = neighbors.approximate_neighbors(read_only, 5)
    assert [one.tobytes() for one in again] == [one.tobytes() for one in first]


def test_same_bytes_on_any_number_of_threads(picture: np.ndarray) -> None:
    first = neighbors.approximate_neighbors(picture, 5, threads=1)
    for threads in (2, 4):
        again = neighbors.approximate_neighbors(picture, 5, threads=threads)
        assert [one.tobytes() for one in again] == [one.tobytes() for one in first]
    other = neighbors.approximate_neighbors(picture, 5, seed=1)
    assert _recall(other[0], first[0]) > 0.95


def test_pairs_grow_far_slower_than_all_pairs() -> None:
    rng = np.random.default_rng(8)
    pairs = []
    for side in (72, 144):
        features = _picture(rng, (side, side), 12)
        found = neighbors._search(features, 10, grid=None, seed=0, threads=None)
        pairs.append(found.pairs)
        sample = rng.choice(len(features), 200, replace=False)
        assert _recall(found.neighbours[sample], _exact(features, 10, sample)[0]) > 0.95
    # Four times the tokens make sixteen times as many pairs.
    assert pairs[1] < 0.33 * 20736**2
    assert pairs[1] < 9 * pairs[0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 63, 64, 65, 129])
def test_few_tokens_are_exact(size: int) -> None:
    features = np.random.default_rng(size).standard_normal((size, 7)).astype(np.float32)
    for n_neighbors in (3, size + 3):
        lists = neighbors.approximate_neighbors(features, n_neighbors)
        assert_lists(features, lists, n_neighbors)
        exact, weights = _exact(features, n_neighbors)
        expected = np.minimum(n_neighbors, (weights > 0).sum(axis=1))
        assert lists[2].tolist() == expected.tolist()
        for token in range(size):
            assert lists[0][token, : expected[token]].tolist() == exact[token, : expected[token]].tolist()


def test_levels_of_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # All kernels, with tokens few enough to run uncompiled.
    monkeypatch.setattr(neighbors, "ALL_PAIRS", 20)
    features = _picture(np.random.default_rng(4), (13, 15), 6)
    exact, _ = _exact(features, 5)
    for grid in (None, (13, 15)):
        lists = neighbors.approximate_neighbors(features, 5, grid=grid)
        assert_lists(features, lists, 5)
        assert _recall(lists[0], exact) > 0.99
    features[:150] = 0
    lists = neighbors.approximate_neighbors(features, 5)
    assert_lists(features, lists, 5)
    assert not np.isin(lists[0][:150], np.arange(150)).any()


def test_noise_is_the_worst_case() -> None:
    noise = np.random.default_rng(2).standard_normal((6000, 30)).astype(np.float32)
    lists = neighbors.approximate_neighbors(noise, K)
    assert_lists(noise, lists, K)
    assert _recall(lists[0][:300], _exact(noise, K, np.arange(300))[0]) > 0.5


def test_constant_and_repeated_tokens(picture: np.ndarray) -> None:
    constant = np.full((5000, 8), 0.3, np.float32)
    lists = neighbors.approximate_neighbors(constant, 6)
    assert_lists(constant, lists, 6)
    assert np.all(lists[1] == 1)
    repeated = np.repeat(picture[::9], 6, axis=0)
    lists = neighbors.approximate_neighbors(repeated, K)
    assert_lists(repeated, lists, K)
    assert np.mean(np.isclose(lists[1][:300], _exact(repeated, K, np.arange(300))[1], atol=1e-6)) > 0.9


def test_tokens_of_zeros_and_opposites(picture: np.ndarray) -> None:
    features = picture[:5000].copy()
    features[1000:2500] = 0
    features[2500:3000] = -features[:500]
    lists = neighbors.approximate_neighbors(features, K)
    assert_lists(features, lists, K)
    assert not np.isin(lists[0][1000:2500], np.arange(1000, 2500)).any(), "no edges between tokens of zeros"
    assert np.all(lists[2] == K)
    nothing = neighbors.approximate_neighbors(np.zeros((4500, 3), np.float32), 4)
    assert_lists(np.zeros((4500, 3), np.float32), nothing, 4)
    assert not nothing[2].any()


@pytest.mark.parametrize("scale", [1e-12, 1e3, 1e15])
def test_any_size_of_numbers(picture: np.ndarray, scale: float) -> None:
    features = (picture[:600] / np.abs(picture[:600]).max() * scale).astype(np.float32)
    features[5, 0] *= 0.99
    lists = neighbors.approximate_neighbors(features, 8)
    assert_lists(features, lists, 8)
    exact, weights = _exact(features, 8)
    assert np.mean(weights - lists[1] <= 1e-3 * weights) > 0.95
    assert exact.shape == lists[0].shape


def test_one_token_far_larger_than_others(picture: np.ndarray) -> None:
    features = picture[:3000].copy()
    features[77] *= 1e8
    lists = neighbors.approximate_neighbors(features, 8)
    assert_lists(features, lists, 8)
    usual = np.arange(100, 500)
    assert _recall(lists[0][usual], _exact(features, 8, usual)[0]) > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": np.ones(4)}, r"features must be an \(N, C\) array"),
        ({"features": np.array([[1.0, np.nan]])}, "features must be finite"),
        ({"n_neighbors": 0}, "n_neighbors must be an integer of at least 1"),
        ({"n_neighbors": 2.0}, "n_neighbors must be an integer of at least 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"grid": (2, 2)}, r"grid \(2, 2\) does not hold the 6 tokens"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    given = {"features": np.ones((6, 2)), "n_neighbors": 2} | arguments
    with pytest.raises(ValueError, match=message):
        neighbors.approximate_neighbors(given.pop("features"), given.pop("n_neighbors"), **given)
