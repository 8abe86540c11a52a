"""Recursive normalised cuts the plain way: dense matrices, numpy.linalg.eigh, one cut at a time."""

from __future__ import annotations

import numpy as np
from scipy.sparse.csgraph import connected_components


def normalised_cut(weights: np.ndarray, side: np.ndarray) -> float:
    """Return cut / vol(A) + cut / vol(B) of a dense affinity for a boolean side."""
    cut = weights[np.ix_(side, ~side)].sum()
    return float(cut / weights[side].sum() + cut / weights[~side].sum())


def fiedler_plane(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Second and third smallest eigenvalues of the normalised Laplacian and their random-walk eigenvectors."""
    root = np.sqrt(weights.sum(axis=1))
    values, vectors = np.linalg.eigh(np.eye(root.size) - weights / root[:, None] / root[None, :])
    return values[1:3], vectors[:, 1:3] / root[:, None]


def best_sweep(weights: np.ndarray, vector: np.ndarray) -> tuple[float, np.ndarray]:
    """The prefix of the vector's order with the smallest normalised cut."""
    order = np.argsort(vector, kind="stable")
    best, where = np.inf, order[:1]
    for size in range(1, order.size):
        side = np.zeros(order.size, bool)
        side[order[:size]] = True
        value = normalised_cut(weights, side)
        if value < best:
            best, where = value, order[:size]
    side = np.zeros(order.size, bool)
    side[where] = True
    return best, side


def split_tree(
    weights: np.ndarray, region: np.ndarray, largest_cut: float
) -> list[tuple[frozenset[int], float, float]]:
    """(tokens, birth, cut) of every region, see the kernel."""
    out: list[tuple[frozenset[int], float, float]] = []

    def components(tokens: np.ndarray) -> list[np.ndarray]:
        count, label = connected_components(weights[np.ix_(tokens, tokens)])
        return [tokens[label == c] for c in range(count)]

    def visit(tokens: np.ndarray, birth: float) -> None:
        if tokens.size < 2:
            out.append((frozenset(tokens.tolist()), birth, np.inf))
            return
        inner = weights[np.ix_(tokens, tokens)]
        _, vectors = fiedler_plane(inner)
        cuts = [best_sweep(inner, vectors[:, c]) for c in range(vectors.shape[1])]
        cut, side = min(cuts, key=lambda pair: pair[0])
        out.append((frozenset(tokens.tolist()), birth, cut))
        if cut <= largest_cut:
            for part in (tokens[side], tokens[~side]):
                for piece in components(part):
                    visit(piece, max(birth, cut))

    for piece in components(np.sort(region)):
        visit(piece, 0.0)
    return out
