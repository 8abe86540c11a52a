"""Graphs whose normalised Laplacian has a known spectrum.

Each function returns the affinity (N, N) as a csr_array and all N eigenvalues, ascending. The formulas: Chung,
"Spectral Graph Theory" (1997), chapter 1, for path, cycle, complete graph and star. The other graphs are products with
constant degree, so their eigenvalues are sums or products of those of their factors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

Graph = tuple[Any, npt.NDArray[np.float64]]


def path(n: int) -> Graph:
    return _chain(n), np.sort(1 - np.cos(np.pi * np.arange(n) / max(n - 1, 1)))


def cycle(n: int) -> Graph:
    return _ring(n), np.sort(1 - np.cos(2 * np.pi * np.arange(n) / n))


def complete(n: int, weight: float = 1.0) -> Graph:
    """All pairs of tokens with one weight: a constant affinity without self loops."""
    affinity = sparse.csr_array(weight * (np.ones((n, n)) - np.eye(n)))
    return affinity, np.concatenate([[0.0], np.full(n - 1, n / (n - 1))])


def constant(n: int) -> Graph:
    """All pairs of tokens, self loops too."""
    return sparse.csr_array(np.ones((n, n))), np.concatenate([[0.0], np.ones(n - 1)])


def star(n: int) -> Graph:
    affinity = np.zeros((n, n))
    affinity[0, 1:] = affinity[1:, 0] = 1
    return sparse.csr_array(affinity), np.concatenate([[0.0], np.ones(n - 2), [2.0]])


def grid(height: int, width: int) -> Graph:
    """Link 8 neighbours; edges that would leave the grid are turned back, and each token has a self loop.

    (T_h + I) x (T_w + I) (Kronecker), where T is a chain reflected at its ends, with eigenvalues 2 cos(pi j / n).
    """
    rows, columns = _reflected(height), _reflected(width)
    affinity = sparse.kron(rows, columns, format="csr")
    along = (2 * np.cos(np.pi * np.arange(height) / height) + 1) / 3
    across = (2 * np.cos(np.pi * np.arange(width) / width) + 1) / 3
    return sparse.csr_array(affinity), np.sort(1 - np.outer(along, across).ravel())


def disjoint_cliques(*sizes: int) -> Graph:
    parts = [complete(size) for size in sizes]
    affinity = sparse.csr_array(sparse.block_diag([part[0] for part in parts]))
    return affinity, np.sort(np.concatenate([part[1] for part in parts]))


def ring_of_cliques(count: int, size: int, link: float = 0.05) -> Graph:
    """Cliques in a ring, each token linked to its counterparts in the two neighbouring cliques.

    I x (J - I) + link (ring x I); most eigenvalues are repeated.
    """
    clique = sparse.csr_array(np.ones((size, size)) - np.eye(size))
    affinity = sparse.kron(sparse.eye_array(count), clique) + link * sparse.kron(_ring(count), sparse.eye_array(size))
    within = np.concatenate([[size - 1.0], -np.ones(size - 1)])
    around = 2 * np.cos(2 * np.pi * np.arange(count) / count)
    values = 1 - (within[:, None] + link * around).ravel() / (size - 1 + 2 * link)
    return sparse.csr_array(affinity), np.sort(values)


def _chain(n: int) -> Any:
    ones = np.ones(max(n - 1, 0))
    return sparse.csr_array(sparse.diags_array([ones, ones], offsets=[1, -1], shape=(n, n)))


def _ring(n: int) -> Any:
    token = np.arange(n)
    shift = sparse.csr_array((np.ones(n), (token, (token + 1) % n)), shape=(n, n))
    return sparse.csr_array(shift + shift.T)


def _reflected(n: int) -> Any:
    ends = np.zeros(n)
    ends[0] += 1
    ends[-1] += 1
    return _chain(n) + sparse.diags_array(1 + ends)
