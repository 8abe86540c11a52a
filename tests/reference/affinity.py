"""BoC affinity and its graphs from whole distance matrices in float64."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist


def boc(features: np.ndarray) -> np.ndarray:
    """Undivided affinity of all pairs."""
    features = np.asarray(features, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        bray_curtis = cdist(features, features, "braycurtis")
        affinity = (1 + cdist(features, features, "chebyshev")) / (1 + bray_curtis)
    affinity[np.isnan(affinity)] = 0
    np.fill_diagonal(affinity, 1)
    return affinity


def in_window(grid: tuple[int, int], radius: int) -> np.ndarray:
    row, col = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    apart = np.maximum(np.abs(row[:, None] - row), np.abs(col[:, None] - col))
    return (apart <= radius) & (apart > 0)


def knn_graph(affinity: np.ndarray, n_neighbors: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Dense symmetric graph from an undivided affinity; of equal affinities the lower index is nearer."""
    candidates = affinity.copy()
    np.fill_diagonal(candidates, 0)
    if allowed is not None:
        candidates[~allowed] = 0
    nearest = np.argsort(-candidates, axis=1, kind="stable")[:, :n_neighbors]
    graph = np.zeros_like(candidates)
    np.put_along_axis(graph, nearest, np.take_along_axis(candidates, nearest, axis=1), axis=1)
    graph = np.maximum(graph, graph.T)
    return graph / max(1.0, graph.max())
