from __future__ import annotations

import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from sparsespec import _eigensolvers, spectral
from sparsespec._kernels import _compile
from sparsespec._kernels import multigrid as kernels
from sparsespec.spectral import (
    Eigenpairs,
    EigenSolverError,
    LowRankAffinity,
    ThresholdedAffinity,
    laplacian,
    smallest_eigenpairs,
)
from tests import gallery
from tests.reference import spectral as reference

SOLVERS = ["auto", "amg-lobpcg", "arpack", "dense", "shift-invert"]

BLOCKS = [(1, 8), (3, 8), (50, 16), (1027, 8), (2500, 24)]

GRAPHS = {
    "path": gallery.path(60),
    "long path": gallery.path(500),
    "cycle": gallery.cycle(90),
    "complete": gallery.complete(70),
    "constant": gallery.constant(70),
    "star": gallery.star(300),
    "square grid": gallery.grid(24, 24),
    "oblong grid": gallery.grid(13, 31),
    "disjoint cliques": gallery.disjoint_cliques(30, 50, 40),
    "ring of cliques": gallery.ring_of_cliques(9, 12),
}


def relabelled(affinity: Any, seed: int = 0) -> Any:
    order = np.random.default_rng(seed).permutation(affinity.shape[0])
    return affinity[order][:, order]


def region_grid(height: int, width: int, radius: int = 1, seed: int = 0) -> Any:
    """Link neighbours on a grid, weakly between a few regions: what a picture gives, with no symmetry."""
    rng = np.random.default_rng(seed)
    row, column = (axis.ravel() for axis in np.mgrid[:height, :width])
    centre = rng.random((8, 2)) * [height, width]
    region = ((row[:, None] - centre[:, 0]) ** 2 + (column[:, None] - centre[:, 1]) ** 2).argmin(axis=1)
    pairs = []
    for down in range(radius + 1):
        for right in range(-radius, radius + 1):
            if (down, right) > (0, 0):
                inside = (row + down < height) & (column + right >= 0) & (column + right < width)
                token = np.flatnonzero(inside)
                pairs.append((token, token + down * width + right))
    first, second = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    weight = np.where(region[first] == region[second], 1.0, 0.1) * (0.5 + 0.5 * rng.random(first.size))
    half = sparse.coo_array((weight, (first, second)), shape=(row.size, row.size)).tocsr()
    return sparse.csr_array(half + half.T)


def crowd(n: int, groups: int, seed: int = 0) -> Any:
    """Link tokens at random, mostly within a few groups: a k-nearest-neighbour graph with clear clusters."""
    rng = np.random.default_rng(seed)
    first = np.repeat(np.arange(n), 10)
    near = (first + groups * rng.integers(0, n // groups, first.size)) % n
    second = np.where(rng.random(first.size) < 0.95, near, rng.integers(0, n, first.size))
    half = sparse.coo_array((np.ones(first.size), (first, second)), shape=(n, n)).tocsr()
    return sparse.csr_array(half + half.T)


def assert_certified(affinity: Any, pairs: Eigenpairs, k: int, tol: float = 1e-4) -> None:
    """Check the contract of a result, with a residual computed here."""
    n = affinity.shape[0]
    matrix = laplacian(affinity)
    assert pairs.values.shape == (k,)
    assert pairs.vectors.shape == (n, k)
    assert pairs.residuals.shape == (k,)
    assert pairs.values.dtype == pairs.vectors.dtype == pairs.residuals.dtype == np.float64
    np.testing.assert_allclose(pairs.vectors.T @ pairs.vectors, np.eye(k), atol=1e-10)
    assert (np.diff(pairs.values) >= 0).all()
    residuals = np.linalg.norm(matrix @ pairs.vectors - pairs.vectors * pairs.values, axis=0)
    np.testing.assert_allclose(pairs.residuals, residuals, atol=1e-12)
    assert residuals.max() <= tol
    size = np.abs(pairs.vectors)
    first = [int(np.flatnonzero(column >= 0.99 * column.max())[0]) for column in size.T]
    assert (pairs.vectors[first, np.arange(k)] > 0).all()


class TestLaplacian:
    @pytest.mark.parametrize("name", ["path", "star", "disjoint cliques", "ring of cliques"])
    def test_agrees_with_the_definition(self, name: str) -> None:
        affinity, _ = GRAPHS[name]
        expected = reference.laplacian(affinity)
        np.testing.assert_allclose(laplacian(affinity).toarray(), expected, atol=1e-15)
        np.testing.assert_allclose(laplacian(affinity.toarray()), expected, atol=1e-15)

    @pytest.mark.parametrize("layout", ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"])
    def test_takes_every_sparse_format(self, layout: str) -> None:
        affinity = region_grid(5, 6)
        expected = laplacian(affinity.toarray())
        matrices: list[Any] = [affinity, sparse.csr_matrix(affinity)]
        for matrix in (matrix.asformat(layout) for matrix in matrices):
            result = laplacian(matrix)
            assert isinstance(result, sparse.csr_array)
            assert result.has_sorted_indices
            np.testing.assert_allclose(result.toarray(), expected, atol=1e-15)

    @pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.bool_])
    def test_takes_every_real_type(self, dtype: Any) -> None:
        affinity = gallery.ring_of_cliques(4, 3, link=1.0)[0].astype(dtype)
        for matrix in (affinity, affinity.toarray()):
            result = laplacian(matrix)
            assert result.dtype == np.float64
            np.testing.assert_allclose(reference.dense(result), reference.laplacian(affinity.astype(float)), atol=1e-15)

    def test_is_symmetric_to_the_bit(self) -> None:
        for matrix in (region_grid(12, 12), region_grid(12, 12).toarray()):
            result = reference.dense(laplacian(matrix))
            assert (result == result.T).all()

    def test_self_loops_count_in_the_degree(self) -> None:
        affinity = np.array([[3.0, 1.0], [1.0, 0.0]])
        np.testing.assert_allclose(laplacian(affinity), [[0.25, -0.5], [-0.5, 1.0]])

    def test_isolated_token_has_a_zero_row(self) -> None:
        affinity = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        expected = [[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
        np.testing.assert_array_equal(laplacian(affinity), expected)
        np.testing.assert_array_equal(laplacian(sparse.csr_array(affinity)).toarray(), expected)

    def test_duplicate_entries_are_summed(self) -> None:
        twice = sparse.coo_array(([1.0, 1.0, 2.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
        np.testing.assert_allclose(laplacian(twice).toarray(), [[1, -1], [-1, 1]])

    def test_almost_symmetric_is_averaged(self) -> None:
        affinity = np.array([[0.0, 1.0, 1.0], [1.0 + 1e-7, 0.0, 1.0], [1.0, 1.0, 0.0]])
        for matrix in (affinity, sparse.csr_array(affinity)):
            result = reference.dense(laplacian(matrix))
            np.testing.assert_array_equal(result, result.T)
            np.testing.assert_allclose(result, laplacian(gallery.complete(3)[0]).toarray(), atol=1e-7)

    @pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
    def test_scale_does_not_matter(self, scale: float) -> None:
        affinity = region_grid(4, 5)
        np.testing.assert_allclose(laplacian(affinity * scale).toarray(), laplacian(affinity).toarray(), rtol=1e-12)


class TestGallery:
    """The formulas themselves, against the definition."""

    @pytest.mark.parametrize(
        "graph",
        [
            gallery.path(2),
            gallery.path(7),
            gallery.cycle(3),
            gallery.cycle(8),
            gallery.complete(5, weight=0.3),
            gallery.constant(6),
            gallery.star(9),
            gallery.grid(3, 3),
            gallery.grid(4, 7),
            gallery.grid(1, 5),
            gallery.disjoint_cliques(2, 5, 3),
            gallery.ring_of_cliques(5, 4, link=0.2),
        ],
    )
    def test_formula(self, graph: gallery.Graph) -> None:
        affinity, values = graph
        np.testing.assert_allclose(reference.smallest_values(affinity, len(values)), values, atol=1e-12)


class TestKnownSpectra:
    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize("name", GRAPHS)
    def test_values(self, name: str, solver: str) -> None:
        affinity, values = GRAPHS[name]
        affinity = relabelled(affinity)
        for k in (1, 2, 3, 6, 9):
            pairs = smallest_eigenpairs(affinity, k, solver)
            assert_certified(affinity, pairs, k)
            np.testing.assert_allclose(pairs.values, values[:k], atol=1e-8, err_msg=f"k={k}")
            np.testing.assert_allclose(pairs.values, values[:k], rtol=1e-3, atol=1e-12, err_msg=f"k={k}")

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_dense_input(self, solver: str) -> None:
        affinity, values = gallery.grid(20, 16)
        pairs = smallest_eigenpairs(affinity.toarray(), 5, solver)
        assert_certified(affinity, pairs, 5)
        np.testing.assert_allclose(pairs.values, values[:5], atol=1e-8)

    @pytest.mark.parametrize("k", [59, 60])
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_all_pairs(self, solver: str, k: int) -> None:
        affinity, values = GRAPHS["path"]
        pairs = smallest_eigenpairs(affinity, k, solver)
        assert_certified(affinity, pairs, k)
        np.testing.assert_allclose(pairs.values, values[:k], atol=1e-12)
        assert pairs.solver == "dense"

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_vectors_of_a_path(self, solver: str) -> None:
        affinity, _ = gallery.path(400)
        pairs = smallest_eigenpairs(affinity, 4, solver)
        for j in range(1, 4):
            expected = np.cos(np.pi * j * np.arange(400) / 399)
            found = pairs.random_walk_vectors()[:, j]
            np.testing.assert_allclose(found * np.abs(expected).max() / np.abs(found).max(), expected, atol=1e-2)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_solvers_agree_on_a_picture(self, solver: str) -> None:
        affinity = region_grid(20, 25)
        pairs = smallest_eigenpairs(affinity, 6, solver)
        assert_certified(affinity, pairs, 6)
        np.testing.assert_allclose(pairs.values, reference.smallest_values(affinity, 6), atol=1e-9)
        expected = smallest_eigenpairs(affinity, 6, "dense").vectors
        np.testing.assert_allclose(pairs.vectors, expected, atol=2e-4)

    def test_weights_over_many_orders_of_magnitude(self) -> None:
        """Strengths of connection matter here: links of 1e-12 beside links of 1e3 must not be followed alike."""
        rng = np.random.default_rng(0)
        half = gallery.path(160)[0].tocoo()
        extra = rng.integers(0, 160, (2, 200))
        row, column = np.concatenate([half.row, extra[0]]), np.concatenate([half.col, extra[1]])
        weight = 10.0 ** rng.uniform(-12, 3, row.size)
        affinity = sparse.csr_array(sparse.coo_array((weight, (row, column)), shape=(160, 160)))
        affinity = sparse.csr_array(affinity + affinity.T)
        expected = smallest_eigenpairs(affinity, 6, "dense").values
        pairs = smallest_eigenpairs(affinity, 6, "amg-lobpcg")
        assert pairs.solver == "amg-lobpcg"
        np.testing.assert_allclose(pairs.values, expected, atol=1e-9)


class TestComponents:
    def test_parts_come_largest_first(self) -> None:
        affinity, _ = gallery.disjoint_cliques(3, 5, 5, 2)
        pairs = smallest_eigenpairs(affinity, 4)
        assert pairs.solver == "components"
        assert pairs.iterations == 0
        np.testing.assert_array_equal(pairs.values, 0)
        spans = [np.flatnonzero(column).tolist() for column in pairs.vectors.T]
        assert spans == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [0, 1, 2], [13, 14]]

    def test_null_vector_is_the_root_of_the_degree(self) -> None:
        affinity = region_grid(9, 9)
        degrees = affinity.sum(axis=1)
        pairs = smallest_eigenpairs(affinity, 2)
        np.testing.assert_allclose(pairs.vectors[:, 0], np.sqrt(degrees / degrees.sum()), atol=1e-14)
        np.testing.assert_allclose(pairs.degrees, degrees)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_vectors_stay_on_their_part(self, solver: str) -> None:
        first, second = region_grid(12, 14, seed=1), region_grid(11, 9, seed=2)
        affinity = sparse.csr_array(sparse.block_diag([first, second]))
        pairs = smallest_eigenpairs(affinity, 7, solver)
        assert_certified(affinity, pairs, 7)
        np.testing.assert_allclose(pairs.values, reference.smallest_values(affinity, 7), atol=1e-9)
        on_first = np.abs(pairs.vectors[: 12 * 14]).max(axis=0) > 0
        on_second = np.abs(pairs.vectors[12 * 14 :]).max(axis=0) > 0
        assert (on_first ^ on_second).all()

    @pytest.mark.parametrize("as_input", [sparse.csr_array, np.asarray])
    def test_isolated_tokens(self, as_input: Any) -> None:
        affinity = np.zeros((6, 6))
        affinity[1, 4] = affinity[4, 1] = 2.0
        affinity[3, 3] = 5.0  # linked to nothing but itself
        pairs = smallest_eigenpairs(as_input(affinity), 6)
        assert_certified(affinity, pairs, 6)
        np.testing.assert_allclose(pairs.values, [0, 0, 0, 0, 0, 2])
        root = np.sqrt(0.5)
        np.testing.assert_allclose(pairs.vectors[:, 0], [0, root, 0, 0, root, 0])
        np.testing.assert_allclose(pairs.vectors[:, 1:5], np.eye(6)[:, [0, 2, 3, 5]])
        assert np.isfinite(pairs.random_walk_vectors()).all()

    def test_no_links_at_all(self) -> None:
        pairs = smallest_eigenpairs(np.zeros((4, 4)), 3)
        np.testing.assert_array_equal(pairs.values, 0)
        np.testing.assert_array_equal(pairs.vectors, np.eye(4)[:, :3])

    def test_thousands_of_tiny_parts(self) -> None:
        pair = np.array([[0.0, 1.0], [1.0, 0.0]])
        affinity = sparse.csr_array(sparse.kron(sparse.eye_array(5000), pair))
        pairs = smallest_eigenpairs(affinity, 12)
        assert_certified(affinity, pairs, 12)
        assert pairs.solver == "components"

    def test_explicit_zeros_do_not_link(self) -> None:
        affinity = sparse.csr_array(np.ones((4, 4)))
        affinity.data[[2, 3, 6, 7, 8, 9, 12, 13]] = 0.0
        np.testing.assert_allclose(smallest_eigenpairs(affinity, 3).values, [0, 0, 1], atol=1e-15)

    @pytest.mark.parametrize("link", [1e-3, 1e-9, 1e-15, 1e-30])
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_parts_hanging_by_a_thread(self, solver: str, link: float) -> None:
        """The second vector tells the parts apart, however small its eigenvalue."""
        affinity = sparse.block_diag([region_grid(15, 15, seed=1), region_grid(10, 16, seed=2)]).tolil()
        affinity[3, 300] = affinity[300, 3] = link
        pairs = smallest_eigenpairs(affinity, 3, solver)
        second = pairs.random_walk_vectors()[:, 1]
        assert np.ptp(np.sign(second[:225])) == np.ptp(np.sign(second[225:])) == 0
        assert np.sign(second[0]) == -np.sign(second[300])
        assert np.ptp(second[:225]) < 0.05 * np.ptp(second) if link < 1e-3 else True


class TestSmall:
    def test_one_token(self) -> None:
        for affinity in (np.zeros((1, 1)), np.ones((1, 1)), sparse.csr_array((1, 1))):
            pairs = smallest_eigenpairs(affinity, 1)
            np.testing.assert_array_equal(pairs.values, [0.0])
            np.testing.assert_array_equal(pairs.vectors, [[1.0]])

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_two_tokens(self, solver: str) -> None:
        affinity = np.array([[0.0, 0.3], [0.3, 0.0]])
        pairs = smallest_eigenpairs(affinity, 2, solver)
        np.testing.assert_allclose(pairs.values, [0, 2], atol=1e-15)
        np.testing.assert_allclose(pairs.vectors, np.sqrt(0.5) * np.array([[1, 1], [1, -1]]))

    @pytest.mark.parametrize("n", [3, 4, 7, 12, 21])
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_every_k(self, solver: str, n: int) -> None:
        affinity, values = gallery.cycle(n)
        for k in range(1, n + 1):
            np.testing.assert_allclose(smallest_eigenpairs(affinity, k, solver).values, values[:k], atol=1e-10)


class TestPolicy:
    def test_small_is_dense_and_medium_is_inverted(self) -> None:
        assert smallest_eigenpairs(region_grid(10, 10), 4).solver == "dense"
        assert smallest_eigenpairs(region_grid(20, 20), 4).solver == "shift-invert"

    def test_links_that_go_anywhere_are_not_inverted(self) -> None:
        """Their factors would be full."""
        assert smallest_eigenpairs(crowd(800, 4), 4).solver == "arpack"

    def test_large_local_graph_is_multigrid(self) -> None:
        affinity = region_grid(66, 66)
        pairs = smallest_eigenpairs(affinity, 4)
        assert_certified(affinity, pairs, 4)
        assert pairs.solver == "amg-lobpcg"

    def test_large_graph_with_wide_gaps_is_arpack(self) -> None:
        affinity = crowd(5000, 5)
        pairs = smallest_eigenpairs(affinity, 5)
        assert_certified(affinity, pairs, 5)
        assert pairs.solver == "arpack"

    def test_depth_decides(self) -> None:
        """ARPACK needs more products the more hops a graph is across, multigrid doesn't."""
        assert smallest_eigenpairs(region_grid(66, 66), 4).solver == "amg-lobpcg"
        assert smallest_eigenpairs(region_grid(66, 66, radius=3), 4).solver == "arpack"

    @pytest.mark.parametrize(
        ("graph", "depth"),
        [
            (gallery.path(7), 6),
            (gallery.cycle(9), 4),
            (gallery.star(9), 2),
            (gallery.complete(5), 1),
            (gallery.grid(4, 11), 10),
            (gallery.ring_of_cliques(10, 3), 6),
            (gallery.path(1), 0),
        ],
    )
    def test_depth(self, graph: gallery.Graph, depth: int) -> None:
        assert spectral._depth(laplacian(graph[0])) == depth

    def test_depth_is_found_from_any_token(self) -> None:
        affinity = relabelled(gallery.path(50)[0])
        assert spectral._depth(laplacian(affinity)) == 49

    def test_weak_links_that_hops_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Few hops across, but a spectrum that Lanczos can't resolve in the restarts it is given."""
        affinity, _ = gallery.path(600)
        affinity = affinity.tolil()
        affinity[0, 20::20] = 1e-9
        affinity[20::20, 0] = 1e-9
        affinity = sparse.csr_array(affinity)
        assert spectral._depth(laplacian(affinity)) <= 50
        monkeypatch.setattr(spectral, "_INVERT_UP_TO", 0)
        pairs = smallest_eigenpairs(affinity, 4)
        assert pairs.solver == "amg-lobpcg"
        np.testing.assert_allclose(pairs.values, reference.smallest_values(affinity, 4), atol=1e-9)

    @pytest.mark.parametrize("n", [300, 3000])
    def test_graph_without_coarser_copies(self, n: int) -> None:
        """Every link of a star is weak beside its hub."""
        affinity, values = gallery.star(n)
        pairs = smallest_eigenpairs(affinity, 6, "amg-lobpcg", tol=1e-5)
        assert_certified(affinity, pairs, 6, tol=1e-5)
        np.testing.assert_allclose(pairs.values, values[:6], atol=1e-9)

    def test_long_thin_graph_is_multigrid(self) -> None:
        """ARPACK would need tens of thousands of products."""
        affinity, values = gallery.path(5000)
        pairs = smallest_eigenpairs(affinity, 3)
        assert pairs.solver == "amg-lobpcg"
        np.testing.assert_allclose(pairs.values, values[:3], rtol=1e-3, atol=1e-15)

    @pytest.mark.parametrize("solver", SOLVERS[1:])
    def test_what_was_asked_for_is_what_runs(self, solver: str) -> None:
        assert smallest_eigenpairs(region_grid(16, 16), 4, solver).solver == solver

    def test_residual_is_below_a_tight_tolerance(self) -> None:
        affinity = region_grid(20, 20)
        for solver in SOLVERS[1:]:
            pairs = smallest_eigenpairs(affinity, 5, solver, tol=1e-9)
            assert pairs.solver == solver
            assert_certified(affinity, pairs, 5, tol=1e-9)


class TestIterations:
    """Work counted, not timed."""

    @pytest.mark.parametrize("k", [2, 6])
    def test_multigrid_iterations_do_not_grow(self, k: int) -> None:
        counts = [
            smallest_eigenpairs(region_grid(side, side), k, "amg-lobpcg").iterations for side in (16, 32, 64, 128)
        ]
        assert all(2 <= count <= 10 for count in counts), counts
        assert counts[-1] <= counts[0] + 2, counts

    @pytest.mark.parametrize("radius", [1, 2, 3])
    def test_multigrid_iterations_by_radius(self, radius: int) -> None:
        affinity = region_grid(48, 64, radius=radius)
        pairs = smallest_eigenpairs(affinity, 6, "amg-lobpcg", tol=1e-5)
        assert_certified(affinity, pairs, 6, tol=1e-5)
        assert 2 <= pairs.iterations <= 12

    def test_multigrid_iterations_on_the_symmetric_grid(self) -> None:
        counts = []
        for side in (20, 80, 160):
            affinity, values = gallery.grid(side, side)
            pairs = smallest_eigenpairs(affinity, 4, "amg-lobpcg", tol=1e-5)
            np.testing.assert_allclose(pairs.values, values[:4], rtol=1e-3, atol=1e-12)
            counts.append(pairs.iterations)
        assert all(2 <= count <= 8 for count in counts), counts

    def test_multigrid_iterations_on_a_path(self) -> None:
        counts = [smallest_eigenpairs(gallery.path(n)[0], 5, "amg-lobpcg").iterations for n in (200, 2000, 20000)]
        assert all(count <= 12 for count in counts), counts

    def test_arpack_products_do_grow(self) -> None:
        """That is why multigrid takes over."""
        counts = [smallest_eigenpairs(region_grid(side, side), 4, "arpack").iterations for side in (16, 64)]
        assert 100 <= counts[0] <= 300
        assert counts[1] >= 1.8 * counts[0]

    @pytest.mark.parametrize("k", [2, 6])
    def test_solves_of_shift_invert_do_not_grow(self, k: int) -> None:
        for side in (16, 32, 64):
            pairs = smallest_eigenpairs(region_grid(side, side), k, "shift-invert")
            assert 10 <= pairs.iterations <= 100
            assert pairs.residuals.max() < 1e-11

    def test_direct_solvers_count_none(self) -> None:
        assert smallest_eigenpairs(region_grid(8, 8), 4, "dense").iterations == 0


class TestMultigridCycle:
    @pytest.fixture
    def graph(self) -> tuple[Any, np.ndarray]:
        affinity = region_grid(40, 40)
        degrees = affinity.sum(axis=1)
        return laplacian(affinity), np.sqrt(degrees / degrees.sum())

    def test_contracts(self, graph: tuple[Any, np.ndarray]) -> None:
        matrix, null = graph
        cycle = _eigensolvers.MultigridCycle(matrix, null)
        assert cycle.sizes[0] == 1600
        assert len(cycle.sizes) >= 3
        error = np.random.default_rng(0).standard_normal((1600, 3))
        error -= np.outer(null, null @ error)
        ratios = []
        for _ in range(8):
            before = np.sqrt((error * (matrix @ error)).sum(axis=0))
            error = error - cycle(matrix @ error)
            error -= np.outer(null, null @ error)
            ratios.append(np.sqrt((error * (matrix @ error)).sum(axis=0)) / before)
        assert np.max(ratios) < 0.75

    def test_is_symmetric_and_positive(self, graph: tuple[Any, np.ndarray]) -> None:
        cycle = _eigensolvers.MultigridCycle(*graph)
        block = np.random.default_rng(0).standard_normal((1600, 4))
        product = block.T @ cycle(block)
        # In single precision.
        np.testing.assert_allclose(product, product.T, rtol=1e-5, atol=1e-5 * np.abs(product).max())
        assert np.linalg.eigvalsh(product).min() > 0

    def test_columns_do_not_mix(self, graph: tuple[Any, np.ndarray]) -> None:
        cycle = _eigensolvers.MultigridCycle(*graph)
        block = np.random.default_rng(0).standard_normal((1600, 3))
        np.testing.assert_allclose(cycle(block)[:, [1]], cycle(block[:, [1]]), rtol=1e-9)


class TestMultigridKernels:
    """Each against NumPy and SciPy."""

    @staticmethod
    def problem(n: int, width: int, seed: int = 0) -> tuple[Any, tuple[Any, Any, Any], list[np.ndarray]]:
        rng = np.random.default_rng(seed)
        matrix = sparse.csr_array(rng.random((n, n)) * (rng.random((n, n)) < 6 / n))
        matrix.data -= 0.5
        arrays = matrix.indptr.astype(np.uint32), matrix.indices.astype(np.uint32), matrix.data
        for array in arrays:
            array.flags.writeable = False
        return matrix, arrays, [rng.standard_normal((n, width)) for _ in range(3)]

    @pytest.mark.parametrize("keep", [0.0, 1.0, 2.0])
    @pytest.mark.parametrize(("n", "width"), BLOCKS)
    def test_relax(self, n: int, width: int, keep: float) -> None:
        matrix, arrays, blocks = self.problem(n, width)
        x, base, right = (block.astype(np.float32) for block in blocks)
        scale = np.random.default_rng(1).random(n).astype(np.float32)
        expected = scale[:, None] * (keep * base + 0.7 * (right - matrix @ x))
        out = base if keep else np.full_like(base, np.nan)
        with _compile.parallel_region(2):
            weights = np.float32(keep), np.float32(0.7)
            single = arrays[2].astype(np.float32)
            kernels.relax(*arrays[:2], single, x, weights[0], base, weights[1], right, scale, out)
        np.testing.assert_allclose(out, expected, atol=2e-5)

    @pytest.mark.parametrize(("n", "width"), BLOCKS)
    def test_residuals(self, n: int, width: int) -> None:
        matrix, arrays, (x, _, _) = self.problem(n, width)
        values = np.random.default_rng(1).random(width)
        expected = matrix @ x - x * values
        out = np.empty((n, width), np.float32)
        squares = np.empty((-(-n // kernels.ROWS), width))
        with _compile.parallel_region(2):
            kernels.residuals(*arrays, x, values, out, squares)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        np.testing.assert_allclose(squares.sum(axis=0), (expected**2).sum(axis=0), rtol=1e-12)

    @pytest.mark.parametrize("parts", [1, 2, 3])
    @pytest.mark.parametrize(("n", "width"), BLOCKS)
    def test_gram_and_advance(self, n: int, width: int, parts: int) -> None:
        matrix, arrays, (x, w, p) = self.problem(n, width)
        w, p = w.astype(np.float32), p.astype(np.float32)
        null = np.random.default_rng(1).random(n)
        space = np.column_stack([x, w, p][:parts])
        size = parts * width
        sums = np.full((-(-n // kernels.ROWS), 2, size, size + 1), np.nan)
        change = np.random.default_rng(2).standard_normal((size + 1, 2 * width))
        expected = np.column_stack([space, null]) @ change
        with _compile.parallel_region(2):
            kernels.gram(*arrays, x, w, p, null, sums)
            kernels.advance(x, w, p, null, change)
        energy, mass = sums.sum(axis=0)
        np.testing.assert_allclose(energy[:, :size], space.T @ (matrix @ space), atol=1e-9)
        np.testing.assert_allclose(mass, space.T @ np.column_stack([space, null]), atol=1e-9)
        np.testing.assert_allclose(x, expected[:, :width], atol=1e-11)
        np.testing.assert_allclose(p, expected[:, width:], rtol=1e-6, atol=1e-5)


class TestRepeatable:
    @pytest.mark.parametrize("solver", SOLVERS)
    @pytest.mark.parametrize("name", ["square grid", "ring of cliques", "star"])
    def test_same_bytes_whatever_the_global_state(self, name: str, solver: str) -> None:
        affinity = GRAPHS[name][0]
        np.random.seed(1)  # noqa: NPY002
        first = smallest_eigenpairs(affinity, 5, solver)
        np.random.seed(2)  # noqa: NPY002
        second = smallest_eigenpairs(affinity, 5, solver)
        assert first.vectors.tobytes() == second.vectors.tobytes()
        assert first.values.tobytes() == second.values.tobytes()
        assert first.iterations == second.iterations

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_global_random_state_is_left_alone(self, solver: str) -> None:
        np.random.seed(3)  # noqa: NPY002
        before: Any = np.random.get_state()  # noqa: NPY002
        smallest_eigenpairs(region_grid(30, 30), 4, solver)
        after: Any = np.random.get_state()  # noqa: NPY002
        np.testing.assert_array_equal(before[1], after[1])
        assert before[2] == after[2]

    @pytest.mark.parametrize("solver", ["amg-lobpcg", "arpack", "shift-invert"])
    def test_threads_get_the_same_as_one_alone(self, solver: str) -> None:
        affinity = region_grid(40, 50)
        alone = smallest_eigenpairs(affinity, 4, solver)
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda _: smallest_eigenpairs(affinity, 4, solver), range(6)))
        for pairs in together:
            assert pairs.values.tobytes() == alone.values.tobytes()
            assert pairs.vectors.tobytes() == alone.vectors.tobytes()
            assert pairs.iterations == alone.iterations

    def test_threads_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        affinity = region_grid(100, 100, radius=2)
        found = []
        for threads in (1, 2, 4):
            monkeypatch.setattr(_compile, "default_threads", lambda threads=threads: threads)
            pairs = smallest_eigenpairs(affinity, 6, "amg-lobpcg")
            found.append((pairs.values.tobytes(), pairs.vectors.tobytes(), pairs.iterations))
        assert found[0] == found[1] == found[2]

    def test_single_precision_weights(self) -> None:
        affinity = region_grid(15, 15)
        single = smallest_eigenpairs(affinity.astype(np.float32), 5)
        assert single.vectors.dtype == np.float64
        np.testing.assert_allclose(single.values, smallest_eigenpairs(affinity, 5).values, atol=1e-6)

    @pytest.mark.parametrize("as_input", [np.asarray, sparse.csr_array, sparse.csc_array, sparse.coo_array])
    def test_input_is_not_changed(self, as_input: Any) -> None:
        values = region_grid(6, 6).toarray()
        values[0, 1] *= 1 + 1e-8
        values[35, 35] = 1e-320
        affinity = as_input(values)
        if not sparse.issparse(affinity):
            affinity.flags.writeable = False
        before = pickle.dumps(affinity)
        smallest_eigenpairs(affinity, 3)
        assert pickle.dumps(affinity) == before

    def test_read_only_sparse_input(self) -> None:
        affinity = region_grid(6, 6)
        for part in (affinity.data, affinity.indices, affinity.indptr):
            part.flags.writeable = False
        assert_certified(affinity, smallest_eigenpairs(affinity, 3), 3)

    def test_long_indices(self) -> None:
        affinity = region_grid(20, 20)
        long = sparse.csr_array(
            (affinity.data, affinity.indices.astype(np.int64), affinity.indptr.astype(np.int64)), shape=affinity.shape
        )
        for solver in SOLVERS:
            np.testing.assert_allclose(
                smallest_eigenpairs(long, 3, solver).values, smallest_eigenpairs(affinity, 3, solver).values, atol=1e-12
            )


def garbage(part: Any, null: np.ndarray, count: int, *rest: Any, **options: Any) -> _eigensolvers.Proposal:
    return _eigensolvers.Proposal(np.random.default_rng(5).standard_normal((len(null), count)), 1)


def nothing(part: Any, null: np.ndarray, count: int, *rest: Any, **options: Any) -> _eigensolvers.Proposal:
    raise _eigensolvers.DidNotConvergeError


def not_a_number(part: Any, null: np.ndarray, count: int, *rest: Any, **options: Any) -> _eigensolvers.Proposal:
    return _eigensolvers.Proposal(np.full((len(null), count), np.nan), 1)


class TestFallback:
    @pytest.mark.parametrize("broken", [garbage, nothing, not_a_number])
    @pytest.mark.parametrize(
        ("asked", "fails", "expected"),
        [
            ("auto", ["shift_invert"], "amg-lobpcg"),
            ("auto", ["shift_invert", "amg_lobpcg"], "arpack"),
            ("auto on a crowd", ["arpack"], "amg-lobpcg"),
            ("auto on a crowd", ["arpack", "amg_lobpcg"], "dense"),
            ("shift-invert", ["shift_invert", "amg_lobpcg", "arpack"], "dense"),
            ("amg-lobpcg", ["amg_lobpcg"], "arpack"),
            ("amg-lobpcg", ["amg_lobpcg", "arpack"], "dense"),
            ("arpack", ["arpack"], "amg-lobpcg"),
            ("dense", ["dense"], "amg-lobpcg"),
        ],
    )
    def test_next_solver_runs(
        self, monkeypatch: pytest.MonkeyPatch, asked: str, fails: list[str], expected: str, broken: Any
    ) -> None:
        solver, _, on_a_crowd = asked.partition(" ")
        affinity = crowd(330, 3) if on_a_crowd else region_grid(18, 18)
        for name in fails:
            monkeypatch.setattr(_eigensolvers, name, broken)
        pairs = smallest_eigenpairs(affinity, 4, solver)
        assert pairs.solver == expected
        assert_certified(affinity, pairs, 4)
        np.testing.assert_allclose(pairs.values, reference.smallest_values(affinity, 4), atol=1e-9)

    def test_gram_falls_back_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        affinity = LowRankAffinity(np.random.default_rng(0).random((60, 5)))
        monkeypatch.setattr(_eigensolvers, "gram", garbage)
        assert smallest_eigenpairs(affinity, 4).solver == "arpack"

    def test_error_when_all_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_eigensolvers, "shift_invert", garbage)
        monkeypatch.setattr(_eigensolvers, "arpack", nothing)
        monkeypatch.setattr(_eigensolvers, "amg_lobpcg", garbage)
        monkeypatch.setattr(_eigensolvers, "dense", not_a_number)
        with pytest.raises(EigenSolverError, match=r"3 eigenpairs of 324 tokens.*tol=0\.001") as caught:
            smallest_eigenpairs(region_grid(18, 18), 4, tol=1e-3)
        residuals = caught.value.residuals
        assert list(residuals) == ["shift-invert", "amg-lobpcg", "arpack", "dense"]
        assert residuals["arpack"].size == residuals["dense"].size == 0
        assert residuals["amg-lobpcg"].shape == (3,)
        assert residuals["amg-lobpcg"].min() > 1e-3
        copy = pickle.loads(pickle.dumps(caught.value))
        assert str(copy) == str(caught.value)
        assert list(copy.residuals) == list(residuals)

    def test_out_of_reach_tolerance_is_an_error(self) -> None:
        with pytest.raises(EigenSolverError, match="tol=1e-18"):
            smallest_eigenpairs(region_grid(8, 8), 4, tol=1e-18)

    def test_large_graphs_never_become_dense(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(spectral, "_DENSE_FALLBACK_UP_TO", 300)
        monkeypatch.setattr(_eigensolvers, "shift_invert", nothing)
        monkeypatch.setattr(_eigensolvers, "arpack", nothing)
        monkeypatch.setattr(_eigensolvers, "amg_lobpcg", garbage)
        with pytest.raises(EigenSolverError) as caught:
            smallest_eigenpairs(region_grid(18, 18), 4)
        assert "dense" not in caught.value.residuals

    def test_arpack_gives_up_within_its_restarts(self) -> None:
        affinity = region_grid(60, 60)
        degrees = affinity.sum(axis=1)
        with pytest.raises(_eigensolvers.DidNotConvergeError):
            _eigensolvers.arpack(laplacian(affinity), np.sqrt(degrees / degrees.sum()), 5, 1e-6, restarts=2)

    def test_arpack_keeps_what_reached_the_aim(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A coarse aim is met soon; the finer pass that a small eigenvalue asks for isn't."""
        affinity, _ = gallery.path(400)
        degrees = affinity.sum(axis=1)
        problem = laplacian(affinity), np.sqrt(degrees / degrees.sum()), 1, 1e-3
        monkeypatch.setattr(_eigensolvers, "_MOST_RESTARTS", 20)
        vector = _eigensolvers.arpack(*problem).vectors
        assert np.linalg.norm(laplacian(affinity) @ vector) < 2e-3
        with pytest.raises(_eigensolvers.DidNotConvergeError):
            _eigensolvers.arpack(*problem, restarts=20)


class TestLowRank:
    @staticmethod
    def features(n: int = 80, channels: int = 6, seed: int = 0) -> np.ndarray:
        rng = np.random.default_rng(seed)
        centres = np.abs(rng.standard_normal((3, channels)))
        return centres[rng.integers(0, 3, n)] + 0.3 * rng.random((n, channels))

    @pytest.mark.parametrize("solver", ["auto", "gram", "arpack", "dense"])
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_agrees_with_the_matrix_formed(self, solver: str, k: int) -> None:
        features = self.features()
        low_rank = LowRankAffinity(features)
        pairs = smallest_eigenpairs(low_rank, k, solver)
        formed = smallest_eigenpairs(features @ features.T, k, "dense")
        assert_certified(low_rank, pairs, k)
        np.testing.assert_allclose(pairs.values, formed.values, atol=1e-10)
        np.testing.assert_allclose(pairs.vectors, formed.vectors, atol=1e-6)
        np.testing.assert_allclose(pairs.degrees, formed.degrees)
        assert k == 1 or pairs.solver == ("gram" if solver == "auto" else solver)

    @pytest.mark.parametrize("k", [6, 7, 30, 80])
    def test_more_pairs_than_channels(self, k: int) -> None:
        features = self.features()
        pairs = smallest_eigenpairs(LowRankAffinity(features), k)
        assert_certified(LowRankAffinity(features), pairs, k)
        np.testing.assert_allclose(pairs.values, reference.smallest_values(features @ features.T, k), atol=1e-9)

    def test_more_channels_than_tokens(self) -> None:
        features = self.features(12, 40)
        pairs = smallest_eigenpairs(LowRankAffinity(features), 12)
        np.testing.assert_allclose(pairs.values, reference.smallest_values(features @ features.T, 12), atol=1e-10)

    def test_negative_similarities(self) -> None:
        """Negative entries make L indefinite: the smallest eigenvalue isn't that of the degrees."""
        features = np.column_stack([np.full(40, 0.2), np.random.default_rng(0).standard_normal((40, 3))])
        features[:, 1:] -= features[:, 1:].mean(axis=0)
        low_rank = LowRankAffinity(features)
        formed = features @ features.T
        degrees = formed.sum(axis=1)
        expected = np.linalg.eigvalsh(np.eye(40) - formed / np.sqrt(np.outer(degrees, degrees)))[:5]
        assert expected[0] < -0.1
        for solver in ("gram", "arpack", "dense"):
            pairs = smallest_eigenpairs(low_rank, 5, solver)
            assert_certified(low_rank, pairs, 5)
            np.testing.assert_allclose(pairs.values, expected, atol=1e-9)

    def test_zero_rows_are_isolated(self) -> None:
        features = self.features()
        features[[4, 9]] = 0
        pairs = smallest_eigenpairs(LowRankAffinity(features), 5)
        assert_certified(LowRankAffinity(features), pairs, 5)
        np.testing.assert_array_equal(pairs.vectors[:, 1:3], np.eye(80)[:, [4, 9]])
        np.testing.assert_allclose(pairs.values, reference.smallest_values(features @ features.T, 5), atol=1e-10)

    def test_operator(self) -> None:
        features = self.features()
        features[7] = 0
        operator = LowRankAffinity(features).laplacian()
        expected = reference.laplacian(features @ features.T)
        assert operator.shape == (80, 80)
        np.testing.assert_allclose(operator @ np.eye(80), expected, atol=1e-12)
        np.testing.assert_allclose(operator.T @ np.ones(80), expected.sum(axis=1), atol=1e-12)
        np.testing.assert_allclose(laplacian(LowRankAffinity(features)) @ np.ones(80), expected.sum(axis=1), atol=1e-12)

    def test_all_tokens_alike(self) -> None:
        pairs = smallest_eigenpairs(LowRankAffinity(np.ones((30, 4), np.float32)), 3)
        np.testing.assert_allclose(pairs.values, [0, 1, 1], atol=1e-12)
        pairs = smallest_eigenpairs(LowRankAffinity(np.zeros((5, 4))), 2)
        np.testing.assert_array_equal(pairs.values, 0)

    def test_keeps_its_own_copy(self) -> None:
        features = self.features()
        low_rank = LowRankAffinity(features)
        before = smallest_eigenpairs(low_rank, 3).vectors.copy()
        features[:] = 1
        np.testing.assert_array_equal(smallest_eigenpairs(low_rank, 3).vectors, before)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (np.ones(3), "shape is"),
            (np.ones((0, 3)), "shape is"),
            (np.ones((3, 2), complex), "complex"),
            (np.array([[1.0, np.nan]]), "finite"),
            (np.array([[1.0, 0.0], [-1.0, 1e-3]]), "degree that is not positive"),
            (np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), "2 of 4 tokens"),
        ],
    )
    def test_rejects(self, features: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LowRankAffinity(features)


class TestThresholded:
    @staticmethod
    def features(n: int = 700, channels: int = 12, seed: int = 0) -> np.ndarray:
        """Cosine features of a few groups, a third of the similarities negative."""
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((4, channels)) + 0.5
        features = centres[rng.integers(0, 4, n)] + 0.6 * rng.standard_normal((n, channels))
        return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)

    @staticmethod
    def formed(features: np.ndarray) -> np.ndarray:
        exact = features.astype(np.float64)
        return np.maximum(exact @ exact.T, 0)

    @pytest.mark.parametrize("solver", ["auto", "sampled-lobpcg", "arpack", "dense"])
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_agrees_with_the_matrix_formed(self, solver: str, k: int) -> None:
        features = self.features()
        affinity = ThresholdedAffinity(features)
        expected = smallest_eigenpairs(self.formed(features), k, "dense")
        pairs = smallest_eigenpairs(affinity, k, solver)
        assert_certified(affinity, pairs, k)
        np.testing.assert_allclose(pairs.values, expected.values, atol=1e-6)
        assert (np.abs((pairs.vectors * expected.vectors).sum(axis=0)) > 1 - 1e-6).all()
        assert k == 1 or pairs.solver == ("sampled-lobpcg" if solver == "auto" else solver)

    @pytest.mark.parametrize(("tile", "sample"), [(64, 48), (97, 300), (2048, 32)])
    def test_tiles_and_sample_do_not_matter(self, monkeypatch: pytest.MonkeyPatch, tile: int, sample: int) -> None:
        monkeypatch.setattr(spectral, "_TILE", tile)
        monkeypatch.setattr(spectral, "_SAMPLE", sample)
        features = self.features()
        pairs = smallest_eigenpairs(ThresholdedAffinity(features), 4)
        assert pairs.solver == "sampled-lobpcg"
        np.testing.assert_allclose(pairs.values, reference.smallest_values(self.formed(features), 4), atol=1e-6)

    def test_few_products(self) -> None:
        """One for each iteration; every one costs as much as forming the matrix."""
        counts = [smallest_eigenpairs(ThresholdedAffinity(self.features(n)), 4).iterations for n in (600, 1200, 2400)]
        assert max(counts) <= 6, counts

    def test_matrix_is_never_formed(self) -> None:
        features = self.features(4000)
        tracemalloc.start()
        smallest_eigenpairs(ThresholdedAffinity(features), 3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4000 * 4000 * 4 / 2

    def test_operator(self) -> None:
        features = self.features(90)
        features[7] = 0
        operator = laplacian(ThresholdedAffinity(features))
        expected = reference.laplacian(self.formed(features))
        np.testing.assert_allclose(operator @ np.eye(90), expected, atol=1e-6)
        np.testing.assert_allclose(operator.T @ np.ones(90), expected.sum(axis=1), atol=1e-6)

    def test_zero_rows_are_isolated(self) -> None:
        features = self.features(400)
        features[[4, 9]] = 0
        pairs = smallest_eigenpairs(ThresholdedAffinity(features), 5)
        assert_certified(ThresholdedAffinity(features), pairs, 5)
        np.testing.assert_array_equal(pairs.vectors[:, 1:3], np.eye(400)[:, [4, 9]])
        np.testing.assert_allclose(pairs.values, reference.smallest_values(self.formed(features), 5), atol=1e-6)

    def test_opposite_groups_are_parts_of_their_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(spectral, "_TILE", 50)
        rng = np.random.default_rng(0)
        features = rng.random((600, 5)) * np.where(np.arange(600) % 3 == 0, -1, 1)[:, None]
        pairs = smallest_eigenpairs(ThresholdedAffinity(features), 4)
        assert_certified(ThresholdedAffinity(features), pairs, 4)
        np.testing.assert_array_equal(pairs.values[:2], 0)
        np.testing.assert_array_equal(np.flatnonzero(pairs.vectors[:, 1]), np.arange(0, 600, 3))
        np.testing.assert_allclose(pairs.values, reference.smallest_values(self.formed(features), 4), atol=1e-6)

    def test_chain_of_parts(self) -> None:
        """Each token is like its neighbours only: connected, but by many hops."""
        angle = np.arange(300) * 0.4 * np.pi
        features = np.zeros((300, 600))
        for offset in range(2):
            features[np.arange(300), np.arange(300) + offset] = [np.cos(angle), np.ones(300)][offset] ** 2 + 0.1
        pairs = smallest_eigenpairs(ThresholdedAffinity(features), 2)
        assert_certified(ThresholdedAffinity(features), pairs, 2)
        assert pairs.values[1] > 0

    def test_duplicates_one_token_and_zeros(self) -> None:
        pairs = smallest_eigenpairs(ThresholdedAffinity(np.ones((400, 4), np.float32)), 3)
        np.testing.assert_allclose(pairs.values, [0, 1, 1], atol=1e-6)
        np.testing.assert_array_equal(smallest_eigenpairs(ThresholdedAffinity(np.zeros((5, 4))), 2).values, 0)
        np.testing.assert_array_equal(smallest_eigenpairs(ThresholdedAffinity(np.ones((1, 4))), 1).vectors, [[1.0]])
        with pytest.raises(ValueError, match="k must be at most the 3 tokens"):
            smallest_eigenpairs(ThresholdedAffinity(np.ones((3, 2))), 4)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_scale_does_not_matter(self, scale: float) -> None:
        features = self.features(300).astype(np.float64)
        features.flags.writeable = False
        pairs = smallest_eigenpairs(ThresholdedAffinity(features * scale), 3)
        np.testing.assert_allclose(pairs.values, reference.smallest_values(self.formed(features), 3), atol=1e-6)

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (np.ones(3), "shape is"),
            (np.ones((0, 3)), "shape is"),
            (np.ones((3, 2), complex), "complex"),
            (np.array([[1.0, np.nan]]), "finite"),
            (np.array([[1.0, -np.inf]]), "finite"),
        ],
    )
    def test_rejects(self, features: np.ndarray, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ThresholdedAffinity(features)

    def test_rejects_solvers(self) -> None:
        for solver in ("amg-lobpcg", "gram"):
            with pytest.raises(ValueError, match=f"solver '{solver}'"):
                smallest_eigenpairs(ThresholdedAffinity(np.ones((9, 2))), 2, solver)
        with pytest.raises(ValueError, match="solver 'sampled-lobpcg' is for a ThresholdedAffinity"):
            smallest_eigenpairs(np.ones((9, 9)), 2, "sampled-lobpcg")


class TestRandomWalkVectors:
    def test_solve_the_generalised_problem(self) -> None:
        affinity = region_grid(10, 12)
        pairs = smallest_eigenpairs(affinity, 5)
        vectors = pairs.random_walk_vectors()
        weights = affinity.toarray()
        degrees = np.diag(weights.sum(axis=1))
        np.testing.assert_allclose((degrees - weights) @ vectors, degrees @ vectors * pairs.values, atol=1e-8)
        np.testing.assert_allclose(vectors.T @ degrees @ vectors, np.eye(5), atol=1e-10)
        np.testing.assert_allclose(pairs.values, reference.generalised_values(affinity, 5), atol=1e-10)
        assert np.ptp(vectors[:, 0]) < 1e-14

    def test_result_is_frozen(self) -> None:
        pairs = smallest_eigenpairs(gallery.path(5)[0], 2)
        with pytest.raises(AttributeError):
            pairs.solver = "other"  # type: ignore[misc]


class TestRejects:
    @pytest.mark.parametrize("as_input", [np.asarray, sparse.csr_array])
    @pytest.mark.parametrize(
        ("affinity", "message"),
        [
            (np.ones((3, 4)), "square"),
            (np.zeros((0, 0)), "square"),
            (np.array([[0, 1], [2, 0]]), "symmetric"),
            (np.array([[0, 1], [0, 0]]), "symmetric"),
            (np.array([[0, np.nan], [np.nan, 0]]), "2 of its entries are NaN"),
            (np.array([[0, np.inf], [np.inf, 0]]), "finite"),
            (np.array([[0, -1.0], [-1.0, 0]]), "negative"),
            (np.array([[0, 1j], [1j, 0]]), "real numbers"),
            (np.full((3, 3), 1e308), "rows whose sum is infinite"),
        ],
    )
    def test_affinity(self, affinity: np.ndarray, message: str, as_input: Any) -> None:
        with pytest.raises(ValueError, match=f"affinity_matrix.*{message}"):
            smallest_eigenpairs(as_input(affinity), 1)
        with pytest.raises(ValueError, match="affinity_matrix"):
            laplacian(as_input(affinity))

    def test_not_a_matrix(self) -> None:
        with pytest.raises(ValueError, match="affinity_matrix must be square"):
            smallest_eigenpairs(np.ones(4), 1)
        with pytest.raises(ValueError, match="affinity_matrix"):
            smallest_eigenpairs(None, 1)

    @pytest.mark.parametrize("k", [0, -1, 6, 2.0, "2", None, True])
    def test_k(self, k: Any) -> None:
        with pytest.raises(ValueError, match="k must be"):
            smallest_eigenpairs(gallery.path(5)[0], k)

    @pytest.mark.parametrize("tol", [0, -1e-4, np.nan, np.inf, "1e-4", None])
    def test_tol(self, tol: Any) -> None:
        with pytest.raises(ValueError, match="tol must be"):
            smallest_eigenpairs(gallery.path(5)[0], 2, tol=tol)

    @pytest.mark.parametrize("solver", ["lobpcg", "", None, "AUTO"])
    def test_solver(self, solver: Any) -> None:
        with pytest.raises(ValueError, match="solver must be one of auto, amg-lobpcg, arpack, dense"):
            smallest_eigenpairs(gallery.path(5)[0], 2, solver)

    def test_solver_that_cannot_take_the_input(self) -> None:
        with pytest.raises(ValueError, match="LowRankAffinity"):
            smallest_eigenpairs(gallery.path(5)[0], 2, "gram")
        with pytest.raises(ValueError, match="needs a matrix"):
            smallest_eigenpairs(LowRankAffinity(np.ones((9, 2))), 2, "amg-lobpcg")
