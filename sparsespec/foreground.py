"""Which tokens are object at all: objectness maps on the token grid, none of them learned.

Objects are what differs from the image's border: :func:`border_contrast` measured best, and needs no eigenvectors. With
them, :func:`eigenvector_contrast` does for any number of tokens what the published method (:mod:`sparsespec.paper`)
does on a dense matrix, and chooses the vector by the border as well.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec._checks import check_count, check_grid
from sparsespec._kernels import smoothing as kernels
from sparsespec._threads import Team
from sparsespec.channels import noise_channel_reduction, normalize_tokens, token_norms
from sparsespec.spectral import ThresholdedAffinity, smallest_eigenpairs

FloatArray = npt.NDArray[np.floating]

# Of the right-hand side, where the smoothing of a map stops; what is thresholded afterwards needs no more.
_TOLERANCE = 1e-6
_MOST = 500


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
        (N, C) array, row-major over the grid; the length of a row doesn't matter.
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
    border = normalize_tokens(np.asarray(features, dtype=np.float32)[border_tokens(grid)])
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
        (N, C) array, row-major over the grid; the length of a row doesn't matter.
    grid
        (h, w), h w = N.
    n_prototypes
        See :func:`background_prototypes`.

    Returns
    -------
    (N,) float32 array
        0 for a token that is a prototype, 1 for one unrelated to all of them, or of zeros.
    """
    features = np.asarray(features, dtype=np.float32)
    prototypes = background_prototypes(features, grid, n_prototypes)
    # Scaled afterwards: unit copies of all tokens would take longer than the products.
    likeness = (features @ prototypes.T).max(axis=1)
    return np.asarray(1 - likeness / token_norms(features), dtype=np.float32)


def eigenvector_contrast(
    features: npt.ArrayLike, grid: tuple[int, int], *, keep: float = 1 / 3, n_vectors: int = 4
) -> npt.NDArray[np.float64]:
    """Objectness as the eigenvector of the whole image whose one side keeps clear of the image's border.

    Of the tokens at unit length NCR keeps the quiet channels; the affinity of two tokens is their product, or 0 where
    that is negative, between all tokens, and never formed (:class:`sparsespec.spectral.ThresholdedAffinity`). The
    published method takes the second smallest eigenvector of its Laplacian and calls its smaller side the object; often
    it is a later one. Among the ``n_vectors`` after the first and both their signs, this is the one whose positive side
    holds the smallest share of the border, at least 1 % of the tokens and at most 70 %, if there is such a side.

    Memory is linear in the number of tokens, time quadratic, with a product of all tokens with all in each iteration:
    2 s for 12,000 tokens with 128 channels left on two cores, 11 s for 30,000.

    Parameters
    ----------
    features
        (N, C) real numbers, row-major over the grid; the length of a row doesn't matter.
    grid
        (h, w), h w = N.
    keep
        See :func:`sparsespec.channels.noise_channel_reduction`.
    n_vectors
        How many eigenvectors to choose from.

    Returns
    -------
    (N,) float64 array
        Positive for the object, of unit length; zeros where the image has no other eigenvector than the first.

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array of real, finite numbers, ``grid`` doesn't hold N tokens, ``keep`` is outside
        (0, 1], or ``n_vectors`` is below 1.
    """
    unit = normalize_tokens(features)
    height, width = check_grid(grid, len(unit))
    n_vectors = check_count(n_vectors, name="n_vectors")
    quiet = unit[:, noise_channel_reduction(unit, keep)]
    pairs = smallest_eigenpairs(ThresholdedAffinity(quiet), min(n_vectors + 1, len(unit)))
    vectors = pairs.random_walk_vectors()[:, 1:]
    if not vectors.shape[1]:
        return np.zeros(len(unit))
    sides = np.concatenate([vectors, -vectors], axis=1)
    inside = sides > 0
    area = inside.mean(axis=0)
    score = inside[border_tokens((height, width))].mean(axis=0) + (area > 0.7) + (area < 0.01)
    chosen = sides[:, int(np.argmin(score))]
    return np.asarray(chosen / np.linalg.norm(chosen))


def smooth(values: FloatArray, affinity: csr_array, strength: float = 3.0) -> npt.NDArray[np.float64]:
    """Average maps over like neighbours: solve (I + strength (D - W)) x = values.

    The matrix is sparse, symmetric and positive definite with a condition number of at most 1 + 2 strength max(D), so
    conjugate gradients need a few dozen products whatever the number of tokens. They stop at a residual of 1e-6 of the
    right-hand side.

    Parameters
    ----------
    values
        (N,) array, or (N, m) for m maps at once.
    affinity
        (N, N) symmetric affinity W of neighbouring tokens, weights in [0, 1].
    strength
        How far values spread; 0 leaves them.

    Returns
    -------
    float64 array
        Of the shape of ``values``.

    Raises
    ------
    ValueError
        ``values`` doesn't have one row per token, or ``strength`` is negative or not finite.
    """
    if not (np.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength must be a number of at least 0, not {strength!r}")
    right = np.asarray(values, dtype=np.float64)
    if right.ndim not in (1, 2) or len(right) != affinity.shape[0]:
        raise ValueError(
            f"values must be (N,) or (N, m) with N = {affinity.shape[0]}, the tokens of affinity; not {right.shape}"
        )
    rows = np.ascontiguousarray(right.reshape(len(right), -1).T)
    solution = rows.copy()
    graph = csr_array(affinity)
    weights = graph.data.astype(np.float64, copy=False)

    def spread(first: int, last: int) -> None:
        for row in range(first, last):
            kernels.diffuse(
                graph.indptr, graph.indices, weights, float(strength), _TOLERANCE, _MOST, rows[row], solution[row]
            )

    Team().share(spread, 0, len(rows))
    return solution.T.reshape(right.shape)


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
