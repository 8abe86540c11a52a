"""Which tokens are object at all: objectness maps on the token grid, none of them learned.

The Fiedler vector of the whole image, which the paper takes, is in :mod:`sparsespec.paper`; what is here measured
better and needs no eigenvectors: objects are what differs from the image's border.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, diags_array, eye_array
from scipy.sparse.linalg import cg

from sparsespec.channels import normalize_tokens

FloatArray = npt.NDArray[np.floating]


def border_tokens(grid: tuple[int, int]) -> npt.NDArray[np.intp]:
    """Row-major indices of the tokens in the first and last row and column of a token grid.

    Examples
    --------
    >>> border_tokens((3, 3)).tolist()
    [0, 1, 2, 3, 5, 6, 7, 8]
    """
    inside = np.zeros(grid, bool)
    inside[1:-1, 1:-1] = True
    return np.flatnonzero(~inside)


def background_prototypes(
    features: FloatArray, grid: tuple[int, int], n_prototypes: int = 4, iterations: int = 20
) -> npt.NDArray[np.float32]:
    """Directions that stand for the background: spherical k-means of the tokens along the image border.

    Photographers leave the border to the background; several centres are needed because it is sky, wall and floor at
    once. The first centre is the border's mean direction, each further one the border token least like those before, so
    that no random number is drawn.

    Parameters
    ----------
    features
        (N, C) array of unit rows, row-major over the grid.
    grid
        (h, w), h w = N.
    n_prototypes
        How many centres at most; fewer when the border has fewer different tokens.
    iterations
        Of Lloyd's algorithm, at most.

    Returns
    -------
    (n_prototypes, C) float32 array of unit rows
    """
    border = np.asarray(features, dtype=np.float32)[border_tokens(grid)]
    centres = normalize_tokens(border.mean(axis=0, keepdims=True))
    while centres.shape[0] < n_prototypes:
        nearest = (border @ centres.T).max(axis=1)
        farthest = int(np.argmin(nearest))
        if nearest[farthest] > 1 - 1e-6:
            break
        centres = np.vstack([centres, border[farthest]])
    owner = np.full(border.shape[0], -1)
    for _ in range(iterations):
        previous, owner = owner, np.argmax(border @ centres.T, axis=1)
        if np.array_equal(previous, owner):
            break
        sums = (owner == np.arange(len(centres))[:, None]).astype(np.float32) @ border
        centres = np.where(np.linalg.norm(sums, axis=1, keepdims=True) > 0, normalize_tokens(sums), centres)
    return centres


def border_contrast(features: FloatArray, grid: tuple[int, int], n_prototypes: int = 4) -> npt.NDArray[np.float32]:
    """Objectness as unlikeness to the border: one minus the largest cosine to a background prototype.

    Parameters
    ----------
    features
        (N, C) array of unit rows, row-major over the grid.
    grid
        (h, w), h w = N.
    n_prototypes
        See :func:`background_prototypes`.

    Returns
    -------
    (N,) float32 array
        0 for a token that is a prototype, 1 for one unrelated to all of them.
    """
    features = np.asarray(features, dtype=np.float32)
    prototypes = background_prototypes(features, grid, n_prototypes)
    return np.asarray(1 - (features @ prototypes.T).max(axis=1), dtype=np.float32)


def smooth(values: FloatArray, affinity: csr_array, strength: float = 3.0) -> npt.NDArray[np.float64]:
    """Average a map over like neighbours: solve (I + strength (D - W)) x = values.

    The matrix is sparse, symmetric and positive definite with a condition number of at most 1 + 2 strength max(D), so
    conjugate gradients need a few dozen products whatever the number of tokens.

    Parameters
    ----------
    values
        (N,) array.
    affinity
        (N, N) symmetric affinity W of neighbouring tokens, weights in [0, 1].
    strength
        How far values spread; 0 leaves them.

    Returns
    -------
    (N,) float64 array
    """
    degrees = np.asarray(affinity.sum(axis=1)).ravel()
    matrix = eye_array(affinity.shape[0]) + strength * (diags_array(degrees) - affinity)
    inverse = diags_array(1 / matrix.diagonal())
    values = np.asarray(values, dtype=np.float64)
    solution, _ = cg(matrix.tocsr(), values, x0=values, rtol=1e-6, maxiter=500, M=inverse)
    return np.asarray(solution)


def standardise(values: FloatArray) -> npt.NDArray[np.float64]:
    """Subtract the mean and divide by the standard deviation; a constant map becomes zero.

    Parameters
    ----------
    values
        (N,) array.
    """
    values = np.asarray(values, dtype=np.float64)
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 1e-9 else np.zeros_like(values)


def contrast(masks: npt.NDArray[np.bool_], objectness: FloatArray) -> npt.NDArray[np.float64]:
    """How far each mask's mean objectness is above that of the tokens in no mask.

    Parameters
    ----------
    masks
        (n, N) bool.
    objectness
        (N,) array.

    Returns
    -------
    (n,) float64 array
        Where every token is in a mask, above the least of them.
    """
    objectness = np.asarray(objectness, dtype=np.float64)
    outside = ~masks.any(axis=0) if len(masks) else np.ones(objectness.size, bool)
    ground = objectness[outside].mean() if outside.any() else objectness.min()
    inside = masks.astype(np.float64) @ objectness / np.maximum(masks.sum(axis=1), 1)
    return np.asarray(inside - ground)
