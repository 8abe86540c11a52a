"""What TokenCut and MaskCut share: one normalised cut of a graph whose edges are either strong or nearly absent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.ndimage import label

from sparsespec._checks import check_features, check_grid

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]

# Weight of the edges below the threshold, in both papers: no token is cut off altogether.
WEAK = 1e-5
# A dense float64 matrix of so many tokens takes 0.8 GB, and its eigenvectors minutes.
MAX_TOKENS = 10_000
# A second eigenvalue this close to 1 says that the affinity is of rank one: no token is told from another.
_NO_STRUCTURE = 1e-6


@dataclass(frozen=True, eq=False)
class PeerResult:
    """What a method found on the token grid.

    Attributes
    ----------
    masks
        (n, N) bool, row-major on the grid, in the order in which they were found; no two share a token.
    scores
        (n,) float64 in [0, 1]. The papers rank nothing; what each method takes is in its own description.
    """

    masks: BoolArray
    scores: Float64Array

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class Bipartition:
    """Two sides of a graph.

    Attributes
    ----------
    value
        Second smallest eigenvalue of ``(D - W) v = lambda D v``, in [0, 2].
    vector
        (N,) float64: its eigenvector, v' D v = 1, the entry of largest magnitude positive.
    side
        (N,) bool: entries above the mean; holds the entry of largest magnitude.
    """

    value: float
    vector: Float64Array
    side: BoolArray


def cosine_similarity(features: npt.ArrayLike, grid: tuple[int, int]) -> tuple[Float64Array, tuple[int, int]]:
    """Cosine of every token's features with every other's; tokens of zeros have the cosine 0 with all.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, row-major on the grid.
    grid
        (h, w), h w = N.

    Returns
    -------
    similarity : (N, N) float64 array
    grid : (int, int)

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array of finite numbers, ``grid`` doesn't hold N tokens, or there are more than
        10,000.
    """
    tokens = check_features(features).astype(np.float64)
    if len(tokens) > MAX_TOKENS:
        raise ValueError(
            f"features hold {len(tokens)} tokens; the peers build dense matrices of tokens by tokens "
            f"and take at most {MAX_TOKENS}: use a smaller image"
        )
    size = check_grid(grid, len(tokens))
    lengths = np.linalg.norm(tokens, axis=1, keepdims=True)
    tokens /= np.where(lengths > 0, lengths, 1.0)
    return tokens @ tokens.T, size


def check_tau(tau: float) -> float:
    """Return the threshold, a cosine.

    Raises
    ------
    ValueError
        No number, or one outside [-1, 1].
    """
    try:
        value = float(tau)
    except (TypeError, ValueError):
        value = math.nan
    if not -1 <= value <= 1:
        raise ValueError(f"tau must be a cosine in [-1, 1], not {tau!r}")
    return value


def bipartition(similarity: Float64Array, tau: float, left_out: BoolArray | None = None) -> Bipartition | None:
    """Cut the graph with ``W = 1`` where the similarity is at least tau and ``W = 1e-5`` elsewhere, in two.

    The cut is the relaxed normalised cut (Shi and Malik, "Normalized cuts and image segmentation", PAMI 2000) of
    TokenCut, equations 3 to 6, divided at the mean of the eigenvector.

    Parameters
    ----------
    similarity
        (N, N) float64, symmetric.
    tau
        Similarity from which on an edge is strong.
    left_out
        (N,) bool: tokens without strong edges, whatever their similarity.

    Returns
    -------
    Bipartition or None
        None where no token is told from another: a single one, or one weight for all edges.
    """
    weights = np.where(similarity >= tau, 1.0, WEAK)
    if left_out is not None:
        weights[left_out] = WEAK
        weights[:, left_out] = WEAK
    size = len(weights)
    if size < 2:
        return None
    scale = 1 / np.sqrt(weights.sum(axis=1))
    weights *= scale
    weights *= scale[:, None]
    values, vectors = eigh(weights, subset_by_index=[size - 2, size - 1], overwrite_a=True)
    value = 1 - float(values[0])
    if value > 1 - _NO_STRUCTURE:
        return None
    vector = vectors[:, 0] * scale
    vector *= np.sign(vector[np.argmax(np.abs(vector))])
    return Bipartition(value, vector, vector > vector.mean())


def component(side: BoolArray, seed: int, grid: tuple[int, int]) -> BoolArray:
    """Return the 4-connected part of some tokens that holds one of them, (N,) bool."""
    parts = label(side.reshape(grid))[0].ravel()
    return np.asarray(parts == parts[seed])
