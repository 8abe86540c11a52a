from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array

from sparsespec._kernels.cuts import cut_region, split_tree
from tests.reference import cuts as reference


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


def _run(weights: np.ndarray, region: np.ndarray, largest_cut: float) -> tuple[Rows, int]:
    graph = csr_array(weights)
    indptr, indices = graph.indptr.astype(np.int32), graph.indices.astype(np.int32)
    tokens, starts, ends, births, values, residual, iterations = split_tree(
        indptr, indices, graph.data, region.astype(np.int32), 0.0, largest_cut, 1e-9
    )
    # Eigenvalues of a few tokens can lie so close that the iterations end before the tolerance is met.
    assert 0 <= residual <= 1e-2
    rows = zip(starts, ends, births, values, strict=True)
    return [(frozenset(tokens[s:e].tolist()), float(b), float(c)) for s, e, b, c in rows], iterations


def _as_dict(rows: Rows) -> dict[frozenset[int], tuple[float, float]]:
    return {tokens: (birth, cut) for tokens, birth, cut in rows}


@pytest.mark.parametrize("seed", range(5))
def test_every_region_is_the_plain_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = _grid_graph(5, 7, rng)
    region = np.flatnonzero(rng.random(35) < 0.8)
    found, _ = _run(weights, region, 0.9)
    expected = _as_dict(reference.split_tree(weights, region, 0.9))
    assert len(found) == len(expected)
    for tokens, (birth, cut) in _as_dict(found).items():
        assert expected[tokens] == (pytest.approx(birth, abs=1e-9), pytest.approx(cut, abs=1e-9))


def test_two_blocks_with_a_thin_bridge_are_cut_at_the_bridge() -> None:
    weights = _grid_graph(4, 9, np.random.default_rng(0), low=1.0)
    grid = np.arange(36).reshape(4, 9)
    left, bridge, right = grid[:, :4].ravel(), grid[1, 4:5], grid[:, 5:].ravel()
    region = np.sort(np.concatenate([left, bridge, right]))
    found, _ = _run(weights, region, 0.15)
    leaves = sorted((tokens for tokens, _, cut in found if cut > 0.15), key=len)
    assert len(leaves) == 2
    assert {len(leaf) for leaf in leaves} == {16, 17}


def test_parts_without_an_edge_between_them_are_regions_from_the_start() -> None:
    weights = _grid_graph(3, 7, np.random.default_rng(1))
    region = np.array([0, 1, 7, 8, 5, 6, 12, 13])
    found, _ = _run(weights, np.sort(region), 0.0)
    assert {tokens for tokens, birth, _ in found if birth == 0} == {frozenset({0, 1, 7, 8}), frozenset({5, 6, 12, 13})}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_regions(size: int) -> None:
    weights = _grid_graph(1, 3, np.random.default_rng(2))
    found, _ = _run(weights, np.arange(size), np.inf)
    assert {tokens for tokens, _, cut in found if cut == np.inf} == {frozenset({i}) for i in range(size)}
    assert _as_dict(found).keys() == _as_dict(reference.split_tree(weights, np.arange(size), np.inf)).keys()


def test_the_largest_region_costs_few_iterations() -> None:
    # Twice the side must not cost twice the iterations: each is a direct solve.
    counts = []
    for side in (8, 16):
        weights = _grid_graph(side, side + 3, np.random.default_rng(3))
        counts.append(_run(weights, np.arange(side * (side + 3)), 0.0)[1])
    assert max(counts) <= 40


@pytest.mark.parametrize("size", [2, 3, 12])
def test_eigenvalue_and_residual(size: int) -> None:
    weights = _grid_graph(2, 6, np.random.default_rng(4))[:size, :size]
    graph = csr_array(weights)
    tokens = np.arange(size, dtype=np.int32)
    local = np.full(size, -1, np.int32)
    _, _, _, value, residual, _ = cut_region(
        graph.indptr.astype(np.int32), graph.indices.astype(np.int32), graph.data, tokens, local, 1e-9
    )
    assert value == pytest.approx(reference.fiedler_plane(weights)[0][0], abs=1e-9)
    assert 0 <= residual <= 1e-8
    assert (local == -1).all()
