"""Graphs of any size whose normalised Laplacian has a known spectrum, to measure errors and not only residuals.

The formulas: Chung, "Spectral Graph Theory" (1997), chapter 1, for path and complete graph; the others are products
with constant degree, whose eigenvalues are sums or products of those of their factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

__all__ = ["GRAPHS", "components", "grid", "path", "ring_of_cliques"]

Graph = tuple[Any, npt.NDArray[np.float64]]


def path(n_tokens: int) -> Graph:
    """Tokens in a row: gaps of order 1 / n^2."""
    return _chain(n_tokens), 1 - np.cos(np.pi * np.arange(n_tokens) / (n_tokens - 1))


def grid(n_tokens: int) -> Graph:
    """A square of tokens with 8 neighbours, wrapped around at its edges: the first eigenvalue beside 0 is fourfold."""
    side = max(3, round(n_tokens**0.5))
    along = sparse.csr_array(_ring(side) + sparse.eye_array(side))
    values = 2 * np.cos(2 * np.pi * np.arange(side) / side) + 1
    # No self loops: SciPy and scikit-learn leave them out of the degrees.
    affinity = sparse.csr_array(sparse.kron(along, along) - sparse.eye_array(side * side))
    affinity.eliminate_zeros()
    return affinity, np.sort(1 - (np.outer(values, values).ravel() - 1) / 8)


def ring_of_cliques(n_tokens: int, size: int = 24, link: float = 0.05) -> Graph:
    """Cliques in a ring, each token weakly linked to its counterparts in the two next: a clear gap, double values."""
    count = max(3, n_tokens // size)
    clique = sparse.csr_array(np.ones((size, size)) - np.eye(size))
    ring = _ring(count)
    affinity = sparse.kron(sparse.eye_array(count), clique) + link * sparse.kron(ring, sparse.eye_array(size))
    within = np.concatenate([[size - 1.0], -np.ones(size - 1)])
    around = 2 * np.cos(2 * np.pi * np.arange(count) / count)
    values = 1 - (within[:, None] + link * around).ravel() / (size - 1 + 2 * link)
    return sparse.csr_array(affinity), np.sort(values)


def components(n_tokens: int, count: int = 4) -> Graph:
    """Grids that nothing links: as many zeros as grids, then eigenvalues that each of them has."""
    part, values = grid(max(9, n_tokens // count))
    return sparse.csr_array(sparse.block_diag([part] * count)), np.sort(np.tile(values, count))


GRAPHS: dict[str, Callable[[int], Graph]] = {
    "path": path,
    "grid": grid,
    "ring of cliques": ring_of_cliques,
    "4 components": components,
}


def _chain(n: int) -> Any:
    return sparse.csr_array(sparse.diags_array([np.ones(n - 1), np.ones(n - 1)], offsets=[1, -1]))


def _ring(n: int) -> Any:
    ones = np.ones(n)
    return sparse.csr_array(sparse.diags_array([ones, ones, ones, ones], offsets=[1, -1, n - 1, 1 - n], shape=(n, n)))
