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
    """A square of tokens with 8 neighbours; edges that would leave it are turned back. Most eigenvalues are double."""
    side = max(2, round(n_tokens**0.5))
    along = sparse.csr_array(_chain(side) + sparse.diags_array(1.0 + _ends(side)))
    values = (2 * np.cos(np.pi * np.arange(side) / side) + 1) / 3
    return sparse.csr_array(sparse.kron(along, along)), np.sort(1 - np.outer(values, values).ravel())


def ring_of_cliques(n_tokens: int, size: int = 24, link: float = 0.05) -> Graph:
    """Cliques in a ring, each token weakly linked to its counterparts in the two next: a clear gap, double values."""
    count = max(3, n_tokens // size)
    clique = sparse.csr_array(np.ones((size, size)) - np.eye(size))
    wrap = sparse.coo_array(([1.0, 1.0], ([0, count - 1], [count - 1, 0])), shape=(count, count))
    ring = sparse.csr_array(_chain(count) + wrap)
    affinity = sparse.kron(sparse.eye_array(count), clique) + link * sparse.kron(ring, sparse.eye_array(size))
    within = np.concatenate([[size - 1.0], -np.ones(size - 1)])
    around = 2 * np.cos(2 * np.pi * np.arange(count) / count)
    values = 1 - (within[:, None] + link * around).ravel() / (size - 1 + 2 * link)
    return sparse.csr_array(affinity), np.sort(values)


def components(n_tokens: int, count: int = 4) -> Graph:
    """Grids that nothing links: as many zeros as grids, then eigenvalues that each grid has."""
    part, values = grid(max(4, n_tokens // count))
    return sparse.csr_array(sparse.block_diag([part] * count)), np.sort(np.tile(values, count))


GRAPHS: dict[str, Callable[[int], Graph]] = {
    "path": path,
    "grid": grid,
    "ring of cliques": ring_of_cliques,
    "4 components": components,
}


def _chain(n: int) -> Any:
    return sparse.csr_array(sparse.diags_array([np.ones(n - 1), np.ones(n - 1)], offsets=[1, -1]))


def _ends(n: int) -> npt.NDArray[np.float64]:
    ends = np.zeros(n)
    ends[0] += 1
    ends[-1] += 1
    return ends
