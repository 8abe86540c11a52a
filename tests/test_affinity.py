from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array

from sparsespec import affinity, channels
from tests.reference import affinity as reference
from tests.reference import positions as plain

FILES = ("FudanPed00017", "FudanPed00035", "PennPed00061")
LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "float64": lambda features: features.astype(np.float64),
    "read-only": lambda features: np.frombuffer(features.tobytes(), np.float32).reshape(features.shape),
    "not contiguous": lambda features: np.repeat(np.repeat(features, 2, axis=0), 3, axis=1)[::2, ::3],
    "column-major": np.asfortranarray,
    "list": lambda features: features.tolist(),
}
# Kernels are compiled once more for arrays that cannot be written to, which takes longest.
CHANGES = [pytest.param(c, marks=[pytest.mark.slow] * (c == "read-only")) for c in sorted(LAYOUTS)]
GRID = (7, 11)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def features(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((77, 13)).astype(np.float32)


def _awkward(features: np.ndarray) -> np.ndarray:
    """Put copies, opposites, rows of zeros, a constant channel and a constant row among the tokens."""
    features = features.copy()
    features[:, 2] = 0.25
    features[5] = features[30]
    features[6] = -features[31]
    features[[7, 8, 40, 41]] = 0
    features[9] = 1
    return features


def assert_canonical(graph: csr_array) -> None:
    assert isinstance(graph, csr_array)
    assert graph.dtype == np.float64
    assert graph.has_canonical_format
    assert abs(graph - graph.T).nnz == 0
    assert not graph.diagonal().any()
    assert np.all(graph.data > 0)
    assert np.all(graph.data <= 1)


def assert_same_bytes(first: csr_array, second: csr_array) -> None:
    for name in ("data", "indices", "indptr"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 3), (16, 4), (17, 4), (129, 3), (77, 60)])
def test_dense_is_that_of_scipy(rng: np.random.Generator, shape: tuple[int, int]) -> None:
    features = rng.standard_normal(shape).astype(np.float32)
    found = affinity.bray_curtis_over_chebyshev(features, divide_by_maximum=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference.boc(features), rtol=1e-5)
    assert np.array_equal(found, found.T)
    divided = affinity.bray_curtis_over_chebyshev(features)
    np.testing.assert_allclose(divided, reference.boc(features) / reference.boc(features).max(), rtol=1e-5)
    assert divided.max() == 1


def test_dense_of_awkward_rows(features: np.ndarray) -> None:
    awkward = _awkward(features)
    found = affinity.bray_curtis_over_chebyshev(awkward, divide_by_maximum=False)
    np.testing.assert_allclose(found, reference.boc(awkward), rtol=1e-5)
    assert found[5, 30] == 1, "copies"
    assert found[6, 31] == 0, "opposites"
    assert found[7, 40] == 0, "two rows of zeros"
    assert found[7, 7] == 1, "a row of zeros and itself"
    assert found[7, 9] == 1, "a row of zeros and a row of ones: (1 + 1) / (1 + 1)"


@pytest.mark.parametrize("n_neighbors", [1, 5, 76, 1000])
@pytest.mark.parametrize("awkward", [False, True])
def test_knn_over_all_tokens(features: np.ndarray, n_neighbors: int, awkward: bool) -> None:
    if awkward:
        features = _awkward(features)
    graph = affinity.boc_knn_graph(features, n_neighbors)
    assert_canonical(graph)
    np.testing.assert_allclose(
        graph.toarray(), reference.knn_graph(reference.boc(features), n_neighbors), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("grid", [GRID, (11, 7), (1, 77), (77, 1)])
@pytest.mark.parametrize("radius", [1, 2, 5, 100])
@pytest.mark.parametrize("n_neighbors", [1, 6, 1000])
def test_knn_in_a_window(features: np.ndarray, grid: tuple[int, int], radius: int, n_neighbors: int) -> None:
    features = _awkward(features)
    graph = affinity.boc_knn_graph(features, n_neighbors, grid=grid, radius=radius)
    assert_canonical(graph)
    expected = reference.knn_graph(reference.boc(features), n_neighbors, reference.in_window(grid, radius))
    np.testing.assert_allclose(graph.toarray(), expected, rtol=1e-5, atol=0)


def test_radius_one_is_the_eight_neighbour_graph(features: np.ndarray) -> None:
    graph = affinity.boc_knn_graph(features, grid=GRID, radius=1)
    assert np.array_equal(graph.toarray() > 0, reference.in_window(GRID, 1))


def test_window_over_the_whole_grid_is_the_graph_of_all_tokens_bit_for_bit(features: np.ndarray) -> None:
    features = _awkward(features)
    assert_same_bytes(
        affinity.boc_knn_graph(features, 9), affinity.boc_knn_graph(features, 9, grid=GRID, radius=max(GRID))
    )


def test_maximum_is_that_of_the_dense_matrix(features: np.ndarray) -> None:
    dense = affinity.bray_curtis_over_chebyshev(features)
    graph = affinity.boc_knn_graph(features, 4)
    row, col = graph.nonzero()
    np.testing.assert_allclose(graph.data, dense[row, col], rtol=1e-6)


def test_ties_go_to_the_lowest_index(features: np.ndarray) -> None:
    copies = np.repeat(features[:1], 40, axis=0)
    expected = reference.knn_graph(np.ones((40, 40)), 3)
    assert np.array_equal(affinity.boc_knn_graph(copies, 3).toarray(), expected)
    allowed = reference.in_window((5, 8), 2)
    expected = reference.knn_graph(np.ones((40, 40)), 3, allowed)
    assert np.array_equal(affinity.boc_knn_graph(copies, 3, grid=(5, 8), radius=2).toarray(), expected)


@pytest.mark.parametrize("kind", ["random", "many ties", "equal"])
@pytest.mark.parametrize(("size", "n_neighbors"), [(1500, 20), (1100, 600), (530, 2000)])
def test_knn_over_more_tokens_than_begin_together(
    rng: np.random.Generator, kind: str, size: int, n_neighbors: int
) -> None:
    features = rng.standard_normal((size, 5)).astype(np.float32)
    if kind == "many ties":
        features = np.round(features)
        features[::9] = features[3]
        features[::11] = 0
    elif kind == "equal":
        features[:] = features[0]
    # The bits are those of the dense matrix, so the choice among near and equal affinities is the same.
    dense = affinity.bray_curtis_over_chebyshev(features, divide_by_maximum=False).astype(np.float64)
    graphs = [affinity.boc_knn_graph(features, n_neighbors, threads=threads) for threads in (1, 2, 4)]
    assert_canonical(graphs[0])
    assert np.array_equal(graphs[0].toarray(), reference.knn_graph(dense, n_neighbors))
    assert_same_bytes(graphs[0], graphs[1])
    assert_same_bytes(graphs[0], graphs[2])


@pytest.mark.parametrize("n_neighbors", [3, 20, 200])
@pytest.mark.parametrize("radius", [1, 4])
def test_knn_in_windows_of_several_parts(rng: np.random.Generator, radius: int, n_neighbors: int) -> None:
    grid = (50, 37)
    features = np.round(rng.standard_normal((50 * 37, 4)), 1).astype(np.float32)
    features[100:140] = 0
    dense = affinity.bray_curtis_over_chebyshev(features, divide_by_maximum=False).astype(np.float64)
    graphs = [
        affinity.boc_knn_graph(features, n_neighbors, grid=grid, radius=radius, threads=threads)
        for threads in (1, 2, 4)
    ]
    expected = reference.knn_graph(dense, n_neighbors, reference.in_window(grid, radius))
    assert_canonical(graphs[0])
    assert np.array_equal(graphs[0].toarray(), expected)
    assert_same_bytes(graphs[0], graphs[1])
    assert_same_bytes(graphs[0], graphs[2])


def test_strips_of_a_wide_grid_join_without_a_seam(rng: np.random.Generator) -> None:
    # Wide enough for lines of this many channels to be cut into strips.
    grid, radius = (5, 300), 3
    features = rng.standard_normal((1500, 70)).astype(np.float32)
    sweep = affinity._Sweep(features, grid, radius)
    assert sweep._strip < grid[1]
    dense = affinity.bray_curtis_over_chebyshev(features, divide_by_maximum=False).astype(np.float64)
    expected = reference.knn_graph(dense, 6, reference.in_window(grid, radius))
    assert np.array_equal(affinity.boc_knn_graph(features, 6, grid=grid, radius=radius).toarray(), expected)


def test_over_all_tokens_every_pair_is_computed_about_once(rng: np.random.Generator) -> None:
    size = 5000
    features = rng.standard_normal((size, 3)).astype(np.float32)
    computed = affinity._nearest_of_all(features, 4, None)[-1]
    pairs = size * (size - 1) // 2
    # Up to 512 tokens that begin together compute a pair for either end, and tiles hang over the edge.
    assert pairs <= computed <= pairs + size * (512 + 64) // 2 + 64 * size


def test_within_windows_the_work_grows_with_the_tokens(rng: np.random.Generator) -> None:
    computed = []
    for height in (64, 128):
        sweep = affinity._Sweep(rng.standard_normal((height * 64, 3)).astype(np.float32), (height, 64), 2)
        sweep.mark(5)
        computed.append(sweep.computed)
    # 24 neighbours and the token itself, six at a time along each of five lines.
    assert computed[0] <= 64 * 64 * 5 * 6
    assert computed[1] - computed[0] == 64 * 64 * 5 * 6


def test_a_graph_within_windows_takes_no_memory_of_its_size(rng: np.random.Generator) -> None:
    grid = (250, 200)
    features = rng.standard_normal((grid[0] * grid[1], 4)).astype(np.float32)
    for make in (
        lambda: affinity.boc_knn_graph(features, 8, grid=grid, radius=2),
        lambda: affinity.boc_knn_graph(features, 24, grid=grid, radius=2),
        lambda: affinity.local_affinity([features, features], grid),
    ):
        tracemalloc.start()
        try:
            graph = make()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        held = graph.data.nbytes + graph.indices.nbytes + graph.indptr.nbytes
        assert held <= peak <= 1.15 * held


def test_the_number_of_threads_changes_no_byte(features: np.ndarray) -> None:
    one, two = (affinity.boc_knn_graph(features, 7, threads=threads) for threads in (1, 2))
    assert_same_bytes(one, two)
    one, two = (affinity.boc_knn_graph(features, 7, grid=GRID, radius=2, threads=threads) for threads in (1, 2))
    assert_same_bytes(one, two)
    one, two = (affinity.local_affinity([features, features], GRID, threads=threads) for threads in (1, 2))
    assert_same_bytes(one, two)
    dense = [affinity.bray_curtis_over_chebyshev(features, threads=threads).tobytes() for threads in (1, 2)]
    assert dense[0] == dense[1]


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 2), (4, 6)])
@pytest.mark.parametrize("radius", [1, 3])
def test_grid_edges_are_the_window(grid: tuple[int, int], radius: int) -> None:
    first, second = affinity.grid_edges(grid, radius)
    expected = np.nonzero(np.triu(reference.in_window(grid, radius)))
    assert np.array_equal(first, expected[0])
    assert np.array_equal(second, expected[1])


def test_listed_pairs_have_the_bits_of_the_dense_matrix(features: np.ndarray) -> None:
    features = _awkward(features)
    dense = affinity.bray_curtis_over_chebyshev(features, divide_by_maximum=False)
    first, second = np.indices(dense.shape).reshape(2, -1)
    assert np.array_equal(affinity.boc_edges(features, first, second), dense.ravel())
    assert affinity.boc_edges(features, [], []).size == 0


def test_tokens_without_a_neighbour() -> None:
    assert affinity.boc_knn_graph(np.ones((1, 3))).nnz == 0
    assert affinity.boc_knn_graph(np.ones((1, 3)), grid=(1, 1), radius=4).nnz == 0
    assert affinity.boc_knn_graph(np.zeros((6, 3))).nnz == 0
    assert affinity.boc_knn_graph(np.zeros((6, 3)), grid=(2, 3), radius=1).nnz == 0
    assert affinity.boc_knn_graph(np.array([[1.0, 2.0], [-1.0, -2.0]])).nnz == 0


@pytest.mark.parametrize("change", CHANGES)
def test_layouts_and_types_give_the_same_answer(features: np.ndarray, change: str) -> None:
    given = LAYOUTS[change](features)
    assert np.array_equal(affinity.bray_curtis_over_chebyshev(given), affinity.bray_curtis_over_chebyshev(features))
    assert_same_bytes(affinity.boc_knn_graph(given, 5), affinity.boc_knn_graph(features, 5))
    assert_same_bytes(
        affinity.boc_knn_graph(given, 5, grid=GRID, radius=2), affinity.boc_knn_graph(features, 5, grid=GRID, radius=2)
    )
    assert np.array_equal(affinity.boc_edges(given, [1, 2], [3, 4]), affinity.boc_edges(features, [1, 2], [3, 4]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
@pytest.mark.parametrize(
    "function",
    [
        affinity.bray_curtis_over_chebyshev,
        affinity.boc_knn_graph,
        lambda features: affinity.boc_knn_graph(features, grid=GRID, radius=1),
        lambda features: affinity.boc_edges(features, [0], [1]),
    ],
)
def test_values_that_are_no_numbers_are_named(
    features: np.ndarray, function: Callable[[np.ndarray], object], bad: float
) -> None:
    features[4, 2] = bad
    with pytest.raises(ValueError, match=r"features must be finite .* 1 of 77 rows .* rows 4"):
        function(features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_neighbors": 0}, "n_neighbors must be an integer of at least 1, not 0"),
        ({"n_neighbors": 2.5}, "n_neighbors must be an integer"),
        ({"grid": GRID, "radius": 0}, "radius must be an integer of at least 1, not 0"),
        ({"grid": GRID, "method": "exact"}, "grid and radius belong together"),
        ({"radius": 1}, "radius belongs to a grid"),
        ({"grid": GRID, "radius": 1, "method": "approximate"}, "leave out radius"),
        ({"grid": (7, 12), "radius": 1}, r"grid \(7, 12\) does not hold the 77 tokens"),
        ({"grid": (-7, -11), "radius": 1}, "grid"),
        ({"grid": 7, "radius": 1}, r"grid must be a pair \(h, w\)"),
        ({"method": "fast"}, "method must be one of 'auto', 'exact', 'approximate', not 'fast'"),
    ],
)
def test_arguments_that_make_no_graph(features: np.ndarray, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        affinity.boc_knn_graph(features, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([0, 1], [1], "as long as each other, not 2 and 1"),
        ([0], [77], "second must hold token numbers from 0 to 76"),
        ([-1], [1], "first must hold token numbers"),
        ([0.5], [1], "first must be an .* integers"),
        ([[0]], [[1]], "first must be an .* integers"),
    ],
)
def test_pairs_that_are_none(features: np.ndarray, first: list[int], second: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        affinity.boc_edges(features, first, second)


def test_grid_edges_validates() -> None:
    with pytest.raises(ValueError, match="grid"):
        affinity.grid_edges((0, 3))
    with pytest.raises(ValueError, match="radius"):
        affinity.grid_edges((3, 3), 0)


@pytest.mark.parametrize("name", FILES)
def test_parity_with_the_released_reference(shared_dir: Path, name: str) -> None:
    numbers = np.load(shared_dir / "reference" / f"{name}.npz")
    keys = numbers["keys"]
    tokens = channels.normalize_tokens(keys[:, channels.channels_by_entropy(keys, normalize=False)])
    kept = tokens[:, channels.deviation_channel_reduction(tokens)]
    masked = kept * numbers["foreground_mask"].reshape(-1, 1)
    found = affinity.bray_curtis_over_chebyshev(masked)
    np.testing.assert_allclose(found[::7, ::7], numbers["boc_affinity"], rtol=1e-5, atol=0)
    np.testing.assert_allclose(found.sum(axis=1, dtype=np.float64), numbers["boc_row_sums"], rtol=1e-5)


# Approximate


class Lists:
    """Stands in for the approximate search: the exact lists of some tokens, shorter ones of the others."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, features: np.ndarray, n_neighbors: int, **options: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.calls.append(options)
        candidates = affinity.bray_curtis_over_chebyshev(features, divide_by_maximum=False)
        np.fill_diagonal(candidates, 0)
        candidates[1::2, ::3] = 0
        neighbours = np.argsort(-candidates, axis=1, kind="stable")[:, :n_neighbors].astype(np.int32)
        weights = np.take_along_axis(candidates, neighbours, axis=1)
        return neighbours, weights, (weights > 0).sum(axis=1, dtype=np.int32)


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> Lists:
    stand_in = Lists()
    monkeypatch.setitem(sys.modules, "sparsespec.neighbors", SimpleNamespace(approximate_neighbors=stand_in))
    return stand_in


@pytest.mark.parametrize("n_neighbors", [1, 5, 1000])
def test_lists_that_lack_neighbours_become_the_union_of_both_ends(
    features: np.ndarray, lists: Lists, n_neighbors: int
) -> None:
    features = _awkward(features)
    graph = affinity.boc_knn_graph(features, n_neighbors, method="approximate", grid=GRID, seed=3)
    assert lists.calls == [{"grid": GRID, "seed": 3, "threads": None}]
    neighbours, weights, counts = lists(features, min(n_neighbors, 76))
    expected = np.zeros((77, 77))
    for i in range(77):
        expected[i, neighbours[i, : counts[i]]] = weights[i, : counts[i]]
    expected = np.maximum(expected, expected.T)
    assert_canonical(graph)
    assert np.array_equal(graph.toarray(), expected / max(1, expected.max()))


def test_auto_is_approximate_beyond_a_number_of_tokens(
    features: np.ndarray, lists: Lists, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "EXACT_TOKENS", 77)
    affinity.boc_knn_graph(features)
    assert not lists.calls
    monkeypatch.setattr(affinity, "EXACT_TOKENS", 76)
    affinity.boc_knn_graph(features, grid=GRID, radius=1)
    affinity.boc_knn_graph(features, method="exact")
    assert not lists.calls
    affinity.boc_knn_graph(features)
    assert lists.calls == [{"grid": None, "seed": 0, "threads": None}]


# For cutting


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("kinds", [1, 3])
def test_local_affinity_is_steep_in_the_mean_of_the_graphs(rng: np.random.Generator, kinds: int, radius: int) -> None:
    features = [channels.normalize_tokens(rng.standard_normal((77, c))) for c in (13, 4, 20)[:kinds]]
    near = reference.in_window(GRID, radius)
    mean = np.zeros((77, 77))
    for one in features:
        boc = np.where(near, reference.boc(one), 0)
        mean += boc / max(1, boc.max()) / kinds
    expected = np.where(near, np.maximum(np.exp(25 * (mean - 1)), 1e-12), 0)
    found = affinity.local_affinity(features, GRID, radius=radius)
    assert_canonical(found)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("grid", [(1, 1), (1, 77), (77, 1), (2, 2)])
def test_local_affinity_on_thin_grids(rng: np.random.Generator, grid: tuple[int, int]) -> None:
    features = rng.standard_normal((grid[0] * grid[1], 5))
    found = affinity.local_affinity([features], grid)
    assert_canonical(found)
    assert found.nnz == 2 * affinity.grid_edges(grid)[0].size


def test_local_affinity_without_sharpness_is_one_everywhere(features: np.ndarray) -> None:
    found = affinity.local_affinity([features, features], GRID, sharpness=0)
    assert np.array_equal(found.toarray(), reference.in_window(GRID, 1).astype(float))


def test_local_affinity_of_equal_tokens_is_one() -> None:
    found = affinity.local_affinity([np.ones((12, 3))], (3, 4))
    assert np.array_equal(found.toarray(), reference.in_window((3, 4), 1).astype(float))


def test_local_affinity_falls_no_lower_than_its_floor(features: np.ndarray) -> None:
    found = affinity.local_affinity([features], GRID, sharpness=1e6)
    assert_canonical(found)
    assert found.data.min() == 1e-12
    assert found.nnz == reference.in_window(GRID, 1).sum()


def test_local_affinity_joins_neighbours_without_any_likeness() -> None:
    # Opposite tokens and pairs of zeros have BoC 0 and no entry in the graph of one kind of features.
    opposite = np.array([[1.0, 0], [-1, 0], [0, 0], [0, 0]])
    alike = np.ones((4, 2))
    for features in ([opposite], [opposite, alike]):
        found = affinity.local_affinity(features, (1, 4))
        assert found.indices.tolist() == [1, 0, 2, 1, 3, 2]
    assert found[0, 1] == pytest.approx(np.exp(-12.5))


@pytest.mark.parametrize("sharpness", [-1, np.nan, np.inf])
def test_local_affinity_validates_sharpness(features: np.ndarray, sharpness: float) -> None:
    with pytest.raises(ValueError, match="sharpness must be a number of at least 0"):
        affinity.local_affinity([features], GRID, sharpness=sharpness)


def test_local_affinity_validates_features(features: np.ndarray) -> None:
    with pytest.raises(ValueError, match="features must hold at least one"):
        affinity.local_affinity([], GRID)
    with pytest.raises(ValueError, match=r"grid \(7, 12\) does not hold the 77 tokens"):
        affinity.local_affinity([features], (7, 12))
    with pytest.raises(ValueError, match="radius must be an integer of at least 1"):
        affinity.local_affinity([features], GRID, radius=0)
    features[4, 2] = np.nan
    with pytest.raises(ValueError, match="features must be finite"):
        affinity.local_affinity([features[::-1], features], GRID)


# By the dot product


@pytest.mark.parametrize("grid", [GRID, (1, 77), (77, 1)])
@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("kinds", [1, 3])
def test_cosine_affinity_is_that_of_numpy(
    rng: np.random.Generator, kinds: int, radius: int, grid: tuple[int, int]
) -> None:
    features = [rng.standard_normal((77, c)) + 0.5 for c in (13, 4, 20)[:kinds]]
    # Tokens of zeros are like none, and a token is like a multiple of itself.
    features[0][5] = 0
    features[0][20] = 3 * features[0][21]
    mean = np.zeros((77, 77))
    for one in features:
        unit = one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-30)
        mean += unit @ unit.T / kinds
    expected = np.where(reference.in_window(grid, radius), np.maximum(np.exp(10 * (mean - 1)), 1e-12), 0)
    found = affinity.cosine_affinity(features, grid, radius=radius)
    assert_canonical(found)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-4, atol=0)


def test_cosine_affinity_at_its_ends(features: np.ndarray) -> None:
    near = reference.in_window(GRID, 1)
    flat = affinity.cosine_affinity([features, features], GRID, sharpness=0)
    assert np.array_equal(flat.toarray(), near.astype(float))
    equal = affinity.cosine_affinity([np.full((77, 3), 0.1)], GRID)
    assert np.all((equal.data > 1 - 1e-5) & (equal.data <= 1))
    steep = affinity.cosine_affinity([features], GRID, sharpness=1e6)
    assert_canonical(steep)
    assert steep.data.min() == 1e-12
    assert steep.nnz == near.sum()
    alone = affinity.cosine_affinity([np.ones((1, 4))], (1, 1))
    assert (alone.shape, alone.nnz) == ((1, 1), 0)


@pytest.mark.parametrize("change", CHANGES)
def test_cosine_affinity_of_any_array(features: np.ndarray, change: str) -> None:
    before = features.copy()
    found = affinity.cosine_affinity([LAYOUTS[change](features)], GRID)
    assert (found != affinity.cosine_affinity([before], GRID)).nnz == 0
    assert np.array_equal(features, before)


def test_cosine_affinity_validates(features: np.ndarray) -> None:
    for sharpness in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="sharpness must be a number of at least 0"):
            affinity.cosine_affinity([features], GRID, sharpness=sharpness)
    with pytest.raises(ValueError, match="features must hold at least one"):
        affinity.cosine_affinity([], GRID)
    with pytest.raises(ValueError, match=r"grid \(7, 12\) does not hold the 77 tokens"):
        affinity.cosine_affinity([features], (7, 12))
    features[4, 2] = np.inf
    with pytest.raises(ValueError, match="features must be finite"):
        affinity.cosine_affinity([features], GRID)


# Where the position steps back


def neighbours(grid: tuple[int, int], radius: int = 1, seed: int = 0) -> csr_array:
    """Random symmetric weights between the tokens of a grid."""
    near = reference.in_window(grid, radius)
    weights = np.triu(np.random.default_rng(seed).uniform(1e-3, 1, near.shape) * near)
    return csr_array(weights + weights.T)


@pytest.mark.parametrize("grid", [(6, 7), (1, 12), (12, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("strength", [0.0, 5.0, 1000.0])
def test_back_steps_are_those_of_plain_loops(grid: tuple[int, int], radius: int, strength: float) -> None:
    graph = neighbours(grid, radius)
    said = np.random.default_rng(1).uniform(-0.5, 0.5, (grid[0] * grid[1], 2))
    found = affinity.weaken_back_steps(graph, said, grid, strength=strength)
    expected = plain.weaken_back_steps(graph.toarray(), said, grid, strength)
    np.testing.assert_allclose(found.toarray(), expected, rtol=1e-9, atol=0)
    assert found.nnz == graph.nnz
    assert found.dtype == np.float64
    assert (found != found.T).nnz == 0
    if strength == 0:
        assert np.array_equal(found.toarray(), graph.toarray())


def test_positions_that_are_the_same_everywhere_weaken_nothing() -> None:
    graph = neighbours((5, 6), 2)
    found = affinity.weaken_back_steps(graph, np.full((30, 2), 0.3), (5, 6), strength=50)
    assert np.array_equal(found.toarray(), graph.toarray())


def test_only_edges_from_one_object_to_the_next_are_weakened() -> None:
    # Two objects of four tokens side by side.
    said = np.zeros((24, 2))
    said[:, 0] = np.tile([-0.375, -0.125, 0.125, 0.375], 6)
    graph = neighbours((3, 8))
    ratio = affinity.weaken_back_steps(graph, said, (3, 8), strength=4).toarray()[graph.toarray() > 0]
    ratio /= graph.toarray()[graph.toarray() > 0]
    first, second = np.nonzero(graph.toarray())
    across = (first % 8 < 4) != (second % 8 < 4)
    level = first // 8 == second // 8
    np.testing.assert_allclose(ratio[~across], 1)
    np.testing.assert_allclose(ratio[across & level], np.exp(-4 * 0.75))
    # Along a diagonal the step is shorter by the root of two.
    np.testing.assert_allclose(ratio[across & ~level], np.exp(-4 * 0.75 / np.sqrt(2)))


def test_a_token_joined_to_itself_steps_nowhere() -> None:
    graph = csr_array(neighbours((3, 4)).toarray() + 0.5 * np.eye(12))
    said = np.random.default_rng(1).uniform(-0.5, 0.5, (12, 2))
    found = affinity.weaken_back_steps(graph, said, (3, 4))
    assert np.array_equal(found.diagonal(), np.full(12, 0.5))
    np.testing.assert_allclose(found.toarray(), plain.weaken_back_steps(graph.toarray(), said, (3, 4), 20), rtol=1e-9)


def test_back_steps_on_any_number_of_threads_are_the_same_bytes(rng: np.random.Generator) -> None:
    grid = (90, 101)
    graph = affinity.local_affinity([rng.standard_normal((9090, 4))], grid)
    said = rng.uniform(-0.5, 0.5, (9090, 2))
    found = [affinity.weaken_back_steps(graph, said, grid, threads=threads) for threads in (1, 2, 3)]
    for other in found[1:]:
        assert other.data.tobytes() == found[0].data.tobytes()
    assert np.all(found[0].data <= graph.data)
    assert (found[0] != found[0].T).nnz == 0


def test_back_steps_leave_what_they_are_given() -> None:
    graph, said = neighbours((5, 6)), np.random.default_rng(1).uniform(-0.5, 0.5, (30, 2))
    before = graph.copy()
    expected = affinity.weaken_back_steps(graph, said, (5, 6))
    for part in (graph.data, graph.indices, graph.indptr, said):
        part.flags.writeable = False
    for given in (said, np.asfortranarray(said), said.tolist()):
        found = affinity.weaken_back_steps(graph, given, (5, 6))
        assert found.data.tobytes() == expected.data.tobytes()
    wide = csr_array((graph.data, graph.indices.astype(np.int64), graph.indptr.astype(np.int64)), shape=(30, 30))
    assert np.array_equal(affinity.weaken_back_steps(wide, said, (5, 6)).toarray(), expected.toarray())
    single = csr_array((graph.data.astype(np.float32), graph.indices, graph.indptr), shape=(30, 30))
    np.testing.assert_allclose(
        affinity.weaken_back_steps(single, said.astype(np.float32), (5, 6)).data, expected.data, rtol=1e-5
    )
    assert np.array_equal(graph.toarray(), before.toarray())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_back_steps_validate(bad: float) -> None:
    graph, said = neighbours((5, 6)), np.zeros((30, 2))
    for strength in (-1, bad):
        with pytest.raises(ValueError, match="strength must be a number of at least 0"):
            affinity.weaken_back_steps(graph, said, (5, 6), strength=strength)
    with pytest.raises(ValueError, match=r"grid \(5, 5\) does not hold the 30 tokens"):
        affinity.weaken_back_steps(graph, said, (5, 5))
    for wrong in (said[:, 0], said[:29], np.zeros((30, 3))):
        with pytest.raises(ValueError, match=r"position must be finite and of shape \(30, 2\)"):
            affinity.weaken_back_steps(graph, wrong, (5, 6))
    said[3, 1] = bad
    with pytest.raises(ValueError, match="position must be finite"):
        affinity.weaken_back_steps(graph, said, (5, 6))
