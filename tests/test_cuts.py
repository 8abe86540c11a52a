from __future__ import annotations

from itertools import pairwise

import numba
import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from sparsespec._kernels import band as blocked
from sparsespec._kernels.cuts import split_nodes
from tests.reference import cuts as reference

# The factorisation, which only kernels call


@numba.njit
def _factor(band, first, blocks, wide, inverse, transposed):  # type: ignore[no-untyped-def]
    blocked.factor(band, first, blocks, wide, inverse, transposed)


@numba.njit
def _solve(band, last, blocks, wide, inverse, transposed, a, b):  # type: ignore[no-untyped-def]
    blocked.solve(band, last, blocks, wide, inverse, transposed, a, b)


def _random_band(n: int, width: int, seed: int) -> np.ndarray:
    """Dense positive definite matrix with a ragged band."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((n, n))
    for i in range(n):
        first = max(0, i - int(rng.integers(0, width + 1)))
        matrix[i, first:i] = rng.uniform(-1, 1, i - first)
    matrix += matrix.T
    matrix[np.arange(n), np.arange(n)] = np.abs(matrix).sum(axis=1) + 0.1
    return matrix


def _solve_by_blocks(matrix: np.ndarray, width: int, right: np.ndarray) -> np.ndarray:
    n, size = len(matrix), blocked.BLOCK
    blocks, wide = -(-n // size), -(-width // size) + 1
    padded = np.eye(blocks * size)
    padded[:n, :n] = matrix
    tiles = padded.reshape(blocks, size, blocks, size).transpose(0, 2, 1, 3)
    band = np.zeros((blocks, wide, size, size))
    used = np.abs(tiles).sum(axis=(2, 3)) > 0
    for j in range(blocks):
        for t in range(min(wide, blocks - j)):
            band[j, t] = tiles[j + t, j].T
    first = np.array([np.flatnonzero(used[i])[0] for i in range(blocks)])
    last = np.array([max(i for i in range(blocks) if first[i] <= j) for j in range(blocks)])
    band = band.ravel()
    inverse, transposed = np.empty(blocks * size**2), np.empty(blocks * size**2)
    _factor(band, first, blocks, wide, inverse, transposed)
    out = np.zeros((2, blocks * size))
    out[:, :n] = right
    _solve(band, last, blocks, wide, inverse, transposed, out[0], out[1])
    assert np.all(out[:, n:] == 0)
    return out[:, :n]


@pytest.mark.parametrize(("n", "width"), [(1, 0), (5, 2), (8, 7), (9, 8), (40, 3), (41, 9), (67, 16), (90, 30)])
def test_solutions_are_those_of_the_dense_matrix(n: int, width: int) -> None:
    matrix = _random_band(n, width, n)
    right = np.random.default_rng(1).standard_normal((2, n))
    found = _solve_by_blocks(matrix, width, right)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right.T).T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("keep", [0, 1])
def test_vector_steps_are_the_plain_ones(keep: int, count: int) -> None:
    rng = np.random.default_rng(count)
    data = rng.standard_normal(2000)
    by_kernel, by_hand = data.copy(), data.copy()
    _steps(by_kernel, keep, count)
    getattr(_steps, "py_func", _steps)(by_hand, keep, count)
    assert not np.array_equal(by_hand, data)
    np.testing.assert_allclose(by_kernel, by_hand, rtol=1e-12, atol=1e-12)


@numba.njit(error_model="numpy")
def _steps(data, keep, count):  # type: ignore[no-untyped-def]
    blocked.multiply(data[:64], 0, keep, data[64:800], 0, data[800:1500], 64, count, 128)
    blocked.forward_step(data[64:800], 64, count + 1, data[800:1500], 64, data[1500:1600], data[1600:1700], 8)
    blocked.backward_step(data[64:800], 64, count + 1, data[800:1500], 64, data[1700:1800], data[1800:1900], 8)


# The trees


def _grid_graph(height: int, width: int, rng: np.random.Generator, low: float = 0.05) -> np.ndarray:
    """Dense affinity of the 8-neighbour graph with random weights."""
    n = height * width
    weights = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            if max(abs(i // width - j // width), abs(i % width - j % width)) == 1:
                weights[i, j] = weights[j, i] = rng.uniform(low, 1)
    return weights


Rows = list[tuple[frozenset[int], float, float]]


class _Run:
    """One call of the kernel for one connected region."""

    def __init__(
        self, weights: np.ndarray, region: np.ndarray, largest_cut: float, tolerance: float = 1e-9, whole: int = 10**6
    ) -> None:
        graph = csr_array(weights)
        n, places = region.size, 2 * region.size - 1
        self.arena = region.astype(np.int32)
        self.salts = np.random.default_rng(9).integers(-(2**62), 2**62, len(weights))
        self.starts, self.sizes = np.zeros(places, np.int64), np.zeros(places, np.int64)
        self.births, self.cuts, self.values = np.zeros(places), np.zeros(places), np.zeros(places)
        self.lefts, self.hashes = np.zeros(places, np.int64), np.zeros(places, np.int64)
        self.sizes[0] = n
        self.made, self.iterations, self.residual = split_nodes(
            graph.indptr.astype(np.int32), graph.indices.astype(np.int32), graph.data, self.salts, self.arena,
            np.zeros(1, np.int64), whole, float(largest_cut), tolerance, np.cos(2.3 * np.arange(n) + 0.7),
            self.starts, self.sizes, self.births, self.cuts, self.values, self.lefts, self.hashes,
        )  # fmt: skip
        self.nodes = np.flatnonzero(self.sizes)

    def tokens(self, node: int) -> np.ndarray:
        return self.arena[self.starts[node] : self.starts[node] + self.sizes[node]]

    def rows(self) -> Rows:
        return [(frozenset(self.tokens(k).tolist()), float(self.births[k]), float(self.cuts[k])) for k in self.nodes]


def _as_dict(rows: Rows) -> dict[frozenset[int], tuple[float, float]]:
    assert len({row[0] for row in rows}) == len(rows)
    return {tokens: (birth, cut) for tokens, birth, cut in rows}


def _connected(weights: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Largest connected part of a random choice of tokens."""
    region = np.flatnonzero(rng.random(len(weights)) < share)
    _, label = connected_components(weights[np.ix_(region, region)])
    return region[label == np.argmax(np.bincount(label))]


@pytest.mark.parametrize("seed", range(5))
def test_every_region_is_the_plain_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = _grid_graph(5, 7, rng)
    region = _connected(weights, 0.8, rng)
    run = _Run(weights, region, 0.9)
    expected = _as_dict(reference.split_tree(weights, region, 0.9))
    found = _as_dict(run.rows())
    assert found.keys() == expected.keys()
    for tokens, (birth, cut) in found.items():
        assert expected[tokens] == (pytest.approx(birth, abs=1e-9), pytest.approx(cut, abs=1e-9))
    assert run.made == len(expected)
    # Eigenvalues of a few tokens can lie so close that the iterations end before the tolerance is met.
    assert 0 <= run.residual <= 1e-2


def test_nodes_are_marked_by_their_tokens() -> None:
    weights = _grid_graph(4, 6, np.random.default_rng(0))
    run = _Run(weights, np.arange(24), 1.2)
    for node in run.nodes:
        assert run.hashes[node] == np.bitwise_xor.reduce(run.salts[run.tokens(node)])
    assert len(set(run.hashes[run.nodes].tolist())) == run.nodes.size > 10


def test_large_nodes_are_cut_once() -> None:
    weights = _grid_graph(4, 6, np.random.default_rng(0))
    whole, once = _Run(weights, np.arange(24), 1.2), _Run(weights, np.arange(24), 1.2, whole=23)
    assert once.made == 1
    assert whole.made > 10
    assert once.cuts[0] == whole.cuts[0]
    parts = _as_dict(whole.rows())
    assert all(tokens in parts for tokens, _, _ in once.rows())
    left = frozenset(once.arena[: once.lefts[0]].tolist())
    assert 0 < len(left) < 24
    side = np.isin(np.arange(24), sorted(left))
    assert reference.normalised_cut(weights, side) == pytest.approx(once.cuts[0], abs=1e-9)


def test_sides_that_fall_apart_become_several_nodes() -> None:
    # A hub with three arms: the first cut parts one arm, or two arms, from the rest.
    weights = np.zeros((10, 10))
    for chain in ([0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]):
        for a, b in pairwise(chain):
            weights[a, b] = weights[b, a] = 0.1 if a == 0 else 1.0
    run = _Run(weights, np.arange(10), np.inf)
    assert {frozenset([i]) for i in range(10)} <= _as_dict(run.rows()).keys()
    assert run.made == run.nodes.size
    assert run.nodes.size <= 19
    for tokens, _, _ in run.rows():
        inner = weights[np.ix_(sorted(tokens), sorted(tokens))]
        assert np.all(np.linalg.matrix_power(inner + np.eye(len(tokens)), 10) > 0)


def test_two_blocks_with_a_thin_bridge_are_cut_at_the_bridge() -> None:
    weights = _grid_graph(4, 9, np.random.default_rng(0), low=1.0)
    grid = np.arange(36).reshape(4, 9)
    left, bridge, right = grid[:, :4].ravel(), grid[1, 4:5], grid[:, 5:].ravel()
    region = np.sort(np.concatenate([left, bridge, right]))
    leaves = [tokens for tokens, _, cut in _Run(weights, region, 0.15).rows() if cut > 0.15]
    assert len(leaves) == 2
    assert {len(leaf) for leaf in leaves} == {16, 17}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_regions(size: int) -> None:
    weights = _grid_graph(1, 3, np.random.default_rng(2))
    run = _Run(weights, np.arange(size), np.inf)
    found = _as_dict(run.rows())
    assert {tokens for tokens, (_, cut) in found.items() if cut == np.inf} == {frozenset({i}) for i in range(size)}
    assert found.keys() == _as_dict(reference.split_tree(weights, np.arange(size), np.inf)).keys()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_the_weights_doesnt_matter(scale: float) -> None:
    weights = _grid_graph(5, 6, np.random.default_rng(3))
    plain, scaled = _Run(weights, np.arange(30), 0.8), _Run(scale * weights, np.arange(30), 0.8)
    assert [row[0] for row in plain.rows()] == [row[0] for row in scaled.rows()]
    np.testing.assert_allclose(scaled.cuts[scaled.nodes], plain.cuts[plain.nodes], rtol=1e-9)
    np.testing.assert_allclose(scaled.values[scaled.nodes], plain.values[plain.nodes], rtol=1e-9)


@pytest.mark.parametrize("weak", [1e-4, 1e-8, 1e-12])
def test_parts_that_hardly_hang_together_are_cut_apart(weak: float) -> None:
    weights = _grid_graph(4, 10, np.random.default_rng(4), low=0.5)
    across = (np.arange(40) % 10 < 6)[:, None] != (np.arange(40) % 10 < 6)
    weights[across] *= weak
    run = _Run(weights, np.arange(40), 0.01)
    expected = frozenset(np.flatnonzero(np.arange(40) % 10 < 6).tolist())
    assert expected in _as_dict(run.rows())
    assert run.nodes.size == 3
    assert run.cuts[0] == pytest.approx(reference.normalised_cut(weights, np.arange(40) % 10 < 6), rel=1e-3, abs=1e-14)
    # Iterations end where the eigenvalue is as good as 0.
    assert 0 < run.values[0] <= max(run.cuts[0], 1e-12)


def test_constant_weights() -> None:
    # Nothing but the shape decides, and the square's two smoothest vectors are equally smooth.
    for height, width in ((6, 6), (1, 20), (3, 12)):
        weights = (_grid_graph(height, width, np.random.default_rng(0)) > 0).astype(float)
        run = _Run(weights, np.arange(height * width), 0.3)
        values, vectors = reference.fiedler_plane(weights)
        assert run.values[0] == pytest.approx(values[0], abs=1e-8)
        if values[1] - values[0] > 1e-6:
            expected = min(reference.best_sweep(weights, v)[0] for v in vectors.T)
            assert run.cuts[0] == pytest.approx(expected, abs=1e-9)


def test_self_loops_count_as_volume_and_are_never_cut() -> None:
    weights = _grid_graph(4, 6, np.random.default_rng(5))
    weights[np.arange(24), np.arange(24)] = np.random.default_rng(6).uniform(0, 2, 24)
    run = _Run(weights, np.arange(24), 0.0)
    values, vectors = reference.fiedler_plane(weights)
    assert run.values[0] == pytest.approx(values[0], abs=1e-9)
    assert run.cuts[0] == pytest.approx(min(reference.best_sweep(weights, v)[0] for v in vectors.T), abs=1e-9)
    pair = _Run(weights[:2, :2], np.arange(2), 0.0)
    assert pair.values[0] == pytest.approx(reference.fiedler_plane(weights[:2, :2])[0][0], abs=1e-12)


def test_the_largest_region_costs_few_iterations() -> None:
    # Twice the side must not cost twice the iterations: each is a direct solve.
    counts = []
    for side in (8, 16):
        weights = _grid_graph(side, side + 3, np.random.default_rng(3))
        counts.append(_Run(weights, np.arange(side * (side + 3)), 0.0).iterations)
    assert max(counts) <= 40


@pytest.mark.parametrize("size", [2, 3, 12])
def test_eigenvalue_and_residual(size: int) -> None:
    weights = _grid_graph(2, 6, np.random.default_rng(4))[:size, :size]
    run = _Run(weights, np.arange(size), 0.0)
    assert run.values[0] == pytest.approx(reference.fiedler_plane(weights)[0][0], abs=1e-9)
    assert 0 <= run.residual <= 1e-8
