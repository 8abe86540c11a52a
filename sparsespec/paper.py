"""The released reference of SpecUnIIS, step by step and dense: what ``method="paper"`` runs.

Foreground: NCR, cosine affinity of the channels kept, the Fiedler vector, its positive side, cleaned. Instances: NCR
and DCR, Bray-Curtis over Chebyshev affinity of the tokens with the background set to zero, and k-means with the given
count on the eigenvectors. Each graph is an N x N matrix, so memory grows with N^2 and time with N^3: this exists to be
compared with, not to be fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.ndimage import binary_fill_holes, label, median_filter

from sparsespec._checks import check_count, check_features, check_grid
from sparsespec.affinity import bray_curtis_over_chebyshev
from sparsespec.channels import (
    channels_by_entropy,
    deviation_channel_reduction,
    noise_channel_reduction,
    normalize_tokens,
)

BoolArray = npt.NDArray[np.bool_]
IndexArray = npt.NDArray[np.intp]
Float64Array = npt.NDArray[np.float64]

N_EIGENPAIRS = 5
NCR_KEEP = 1 / 3
DCR_KEEP = 60
# A dense float64 matrix of so many tokens takes 0.8 GB, and its eigenvectors minutes.
MAX_TOKENS = 10_000
WEIGHTS = ("boc", "cosine")
# An eigenvalue this close to 1 says that the affinity is of rank one: no token is told from another.
_NO_STRUCTURE = 1e-6
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


@dataclass(frozen=True)
class PaperForeground:
    """Which tokens are object, and the numbers on the way there.

    Attributes
    ----------
    mask
        (h, w) bool: the positive side of the Fiedler vector, cleaned.
    fiedler
        (N,) float64: second generalised eigenvector of (D - W, D), v' D v = 1, positive on the minority of the tokens.
    eigenvalues
        (5,) float64, ascending, fewer if there are fewer tokens.
    keep
        Channels that NCR kept, ascending.
    """

    mask: BoolArray
    fiedler: Float64Array
    eigenvalues: Float64Array
    keep: IndexArray


@dataclass(frozen=True)
class PaperInstances:
    """Which foreground token belongs to which instance, and the numbers on the way there.

    Attributes
    ----------
    labels
        (h, w) int32: 0 is background, 1..n are instances, the largest first.
    eigenvalues
        (5,) float64, ascending, fewer if there are fewer tokens.
    eigenvectors
        (N, 5) float64: generalised eigenvectors of (D - W, D), v' D v = 1.
    keep
        Channels of the features that NCR and then DCR kept, highest deviation first; by entropy where DCR is left out.
    """

    labels: npt.NDArray[np.int32]
    eigenvalues: Float64Array
    eigenvectors: Float64Array
    keep: IndexArray


def foreground(keys: npt.ArrayLike, grid: tuple[int, int], *, keep: float = NCR_KEEP) -> PaperForeground:
    """Separate objects from background by the Fiedler vector of the cosine affinity.

    With f the tokens scaled to unit length, restricted to the third of the channels with the lowest entropy and not
    scaled again: ``W = max(f f', 0) / max(f f')``, ``D = diag(W 1)``, and ``(D - W) v = lambda D v``.

    Parameters
    ----------
    keys
        (N, C) real numbers, one row per token, row-major on the grid.
    grid
        (h, w), h w = N.
    keep
        Share of the channels that NCR keeps, in (0, 1]; 1 leaves it out.

    Returns
    -------
    PaperForeground
        Tokens that are all alike (and a single one) have no second eigenvector worth the name: the vector is zero then
        and the mask empty. Tokens of zeros have the value 0.

    Raises
    ------
    ValueError
        ``keys`` isn't an (N, C) array of finite numbers, ``grid`` doesn't hold N tokens, there are more than 10,000, or
        ``keep`` is out of range.
    """
    features = check_features(keys, name="keys")
    height, width = _check_size(grid, len(features))
    channels = noise_channel_reduction(features, keep, normalize=True)
    kept = normalize_tokens(features)[:, channels].astype(np.float64)
    affinity = np.maximum(kept @ kept.T, 0.0)
    affinity /= affinity.max() or 1.0
    values, vectors = _smallest_generalized(affinity, affinity.sum(axis=1))
    if values.size < 2 or values[1] > 1 - _NO_STRUCTURE:
        fiedler = np.zeros(len(features))
    else:
        fiedler = _positive_on_minority(vectors[:, 1])
    mask = clean_mask((fiedler > 0).reshape(height, width))
    return PaperForeground(mask, fiedler, values, channels)


def clean_mask(mask: npt.ArrayLike) -> BoolArray:
    """Post-process a foreground mask as the released reference does.

    A mask that covers more than 90 % of at least two of the four borders is inverted. Then 8-connected parts with fewer
    than 10 % of the pixels of the largest part are dropped, holes are filled and a 3 x 3 median is taken.

    Parameters
    ----------
    mask
        (h, w) bool.

    Returns
    -------
    (h, w) bool array
    """
    mask = np.asarray(mask, dtype=bool)
    borders = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    if sum(border.mean() > 0.9 for border in borders) >= 2:
        mask = ~mask
    parts, count = label(mask, _EIGHT_NEIGHBOURS)
    if count:
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        large = sizes >= 0.1 * sizes[1:].max()
        large[0] = False
        mask = binary_fill_holes(large[parts])
    return np.asarray(median_filter(np.asarray(mask, np.uint8), size=3, mode="reflect") > 0)


def instances(
    keys: npt.ArrayLike,
    grid: tuple[int, int],
    foreground_mask: npt.ArrayLike,
    n_instances: int | None,
    rng: int | np.random.Generator = 0,
    *,
    keep: float = NCR_KEEP,
    keep_deviation: int | None = DCR_KEEP,
    weights: str = "boc",
) -> PaperInstances:
    """Divide the foreground into a given number of instances by the eigenvectors of the BoC affinity.

    The third of the channels with the lowest entropy is kept (the variant before normalisation), the tokens are scaled
    to unit length, the 60 channels of highest deviation are kept, background tokens are set to zero, and W is the BoC
    affinity divided by its maximum. The five smallest eigenpairs of ``(D - W) v = lambda D v`` follow, and k-means on
    the rows of the eigenvectors in the foreground.

    Background tokens are all equal, which makes ``1 - W_bb / D_bb`` an eigenvalue with as many eigenvectors as there
    are background tokens, less one. These are exactly zero in the foreground; the released code clusters their rounding
    errors where it meets them. Here they don't take part, and if no other eigenvector beside the first is among the
    five, the four that follow take their place.

    With ``weights="cosine"`` W is the dot product of the tokens in place of BoC, what is negative set to 0. A token of
    zeros then is joined to nothing, not even to itself: the graph is that of the foreground alone.

    Parameters
    ----------
    keys
        (N, C) real numbers, one row per token, row-major on the grid.
    grid
        (h, w), h w = N.
    foreground_mask
        (h, w) bool.
    n_instances
        How many instances, at least 0. There are fewer if the foreground has fewer tokens that differ.
    rng
        Seed or generator of the starts of k-means.
    keep
        Share of the channels that NCR keeps, in (0, 1]; 1 leaves it out.
    keep_deviation
        Channels that DCR keeps; None leaves it out.
    weights
        "boc", or "cosine" for the dot product of the tokens, which have unit length before DCR.

    Returns
    -------
    PaperInstances

    Raises
    ------
    ValueError
        ``n_instances`` is None or negative; ``foreground_mask`` isn't of the grid's shape; unknown ``weights``;
        ``keep`` or ``keep_deviation`` out of range; ``keys`` or ``grid`` as in :func:`foreground`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, not {weights!r}")
    if n_instances is None:
        raise ValueError(
            'n_instances is None, but method="paper" needs n_instances: it does not count the objects itself'
        )
    count = check_count(n_instances, name="n_instances", least=0)
    features = check_features(keys, name="keys")
    height, width = _check_size(grid, len(features))
    mask = np.asarray(foreground_mask, dtype=bool)
    if mask.shape != (height, width):
        raise ValueError(f"foreground_mask must have the shape of the grid, {(height, width)}, not {mask.shape}")
    inside = mask.ravel()

    channels = channels_by_entropy(features, keep, normalize=False)
    kept = normalize_tokens(features[:, channels])
    if keep_deviation is not None:
        order = deviation_channel_reduction(kept, keep_deviation)
        channels, kept = channels[order], kept[:, order]
    kept = kept * inside[:, None]
    if weights == "boc":
        affinity = bray_curtis_over_chebyshev(kept).astype(np.float64)
        values, vectors, telling = _smallest_with_twins(affinity, ~kept.any(axis=1))
    else:
        values, vectors, telling = _smallest_of_products(kept.astype(np.float64))

    labels = np.zeros(height * width, np.int32)
    if count and inside.any():
        labels[inside] = _by_size(_k_means(telling[inside], count, np.random.default_rng(rng)))
    return PaperInstances(labels.reshape(height, width), values, vectors, channels)


def _check_size(grid: tuple[int, int], n_tokens: int) -> tuple[int, int]:
    if n_tokens > MAX_TOKENS:
        raise ValueError(
            f'keys hold {n_tokens} tokens; method="paper" builds dense matrices of tokens by tokens '
            f'and takes at most {MAX_TOKENS}: use a smaller image or method="sparse"'
        )
    return check_grid(grid, n_tokens)


def _smallest_generalized(affinity: Float64Array, degrees: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Compute the smallest eigenpairs of (D - W, D); in each vector the entry of largest magnitude is positive."""
    # A token joined to nothing, not even to itself, gets the eigenvalue 1 of its own.
    scale = 1 / np.sqrt(np.where(degrees > 0, degrees, 1.0))
    size = len(affinity)
    similar = affinity * scale[:, None] * scale
    values, vectors = eigh(similar, subset_by_index=[max(0, size - N_EIGENPAIRS), size - 1])
    vectors = vectors[:, ::-1] * scale[:, None]
    peaks = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])]
    return 1 - values[::-1], vectors * np.sign(peaks)


def _smallest_with_twins(affinity: Float64Array, is_twin: BoolArray) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Compute the smallest eigenpairs of (D - W, D) where some tokens are twins: equal, and joined only to themselves.

    Vectors that are equal on the twins are the eigenvectors of a graph with one token in their place; all others are
    contrasts between them, zero elsewhere, with one common eigenvalue.

    Returns
    -------
    values : (k,) array
    vectors : (N, k) array
    telling : (N, j) array
        Of the vectors those that are no contrasts; if that leaves only the first, the smallest such vectors at all.
    """
    degrees = affinity.sum(axis=1)
    twins, others = np.flatnonzero(is_twin), np.flatnonzero(~is_twin)
    if twins.size < 2:
        values, vectors = _smallest_generalized(affinity, degrees)
        return values, vectors, vectors
    # In the basis of the other tokens and the sum of the twins, scaled to unit length.
    root = np.sqrt(twins.size)
    kept = np.append(others, twins[0])
    merged = affinity[np.ix_(kept, kept)]
    merged[-1, :-1] *= root
    merged[:-1, -1] *= root
    own_values, basis = _smallest_generalized(merged, degrees[kept])
    own = np.empty((len(affinity), own_values.size))
    own[others] = basis[:-1]
    own[twins] = basis[-1] / root

    contrasts = np.zeros((len(affinity), min(N_EIGENPAIRS, twins.size - 1)))
    for column, contrast in enumerate(contrasts.T):
        contrast[twins[: column + 1]] = 1
        contrast[twins[column + 1]] = -(column + 1)
        contrast /= np.sqrt((column + 1) * (column + 2) * degrees[twins[0]])
    contrast_value = 1 - affinity[twins[0], twins[0]] / degrees[twins[0]]

    values = np.append(own_values, np.full(contrasts.shape[1], contrast_value))
    order = np.argsort(values, kind="stable")[:N_EIGENPAIRS]
    n_own = int(np.count_nonzero(order < own_values.size))
    vectors = np.concatenate([own, contrasts], axis=1)[:, order]
    return values[order], vectors, own[:, :n_own] if n_own > 1 else own


def _smallest_of_products(tokens: Float64Array) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Compute what :func:`_smallest_with_twins` does for products of tokens, where a token of zeros has no edge."""
    joined = np.flatnonzero(tokens.any(axis=1))
    affinity = np.maximum(tokens[joined] @ tokens[joined].T, 0.0)
    affinity /= affinity.max(initial=0.0) or 1.0
    values = np.empty(0)
    vectors = np.zeros((len(tokens), 0))
    if joined.size:
        values, own = _smallest_generalized(affinity, affinity.sum(axis=1))
        vectors = np.zeros((len(tokens), own.shape[1]))
        vectors[joined] = own
    return values, vectors, vectors


def _positive_on_minority(vector: Float64Array) -> Float64Array:
    positive = np.count_nonzero(vector > 0)
    negative = np.count_nonzero(vector < 0)
    return -vector if positive > negative else vector


def _k_means(points: Float64Array, count: int, rng: np.random.Generator, restarts: int = 10) -> IndexArray:
    """Return cluster numbers from the best of several runs of k-means, each started by k-means++."""
    best, best_cost = np.zeros(len(points), np.intp), np.inf
    for _ in range(restarts):
        centres = [points[rng.integers(len(points))]]
        nearest = np.sum((points - centres[0]) ** 2, axis=1)
        while len(centres) < count and nearest.max() > 0:
            # Points that are centres already have weight 0 and can't be drawn again.
            drawn = np.searchsorted(np.cumsum(nearest), rng.random() * nearest.sum(), side="right")
            drawn = min(int(drawn), int(np.flatnonzero(nearest)[-1]))
            centres.append(points[drawn])
            nearest = np.minimum(nearest, np.sum((points - centres[-1]) ** 2, axis=1))
        clusters, cost = _lloyd(points, np.array(centres))
        if cost < best_cost:
            best, best_cost = clusters, cost
    return best


def _lloyd(points: Float64Array, centres: Float64Array, max_rounds: int = 300) -> tuple[IndexArray, float]:
    clusters = np.full(len(points), -1)
    cost = np.inf
    for _ in range(max_rounds):
        distances = np.sum((points[:, None, :] - centres) ** 2, axis=2)
        nearest = np.argmin(distances, axis=1)
        cost = float(distances[np.arange(len(points)), nearest].sum())
        if np.array_equal(nearest, clusters):
            break
        clusters = nearest
        for cluster in range(len(centres)):
            members = points[clusters == cluster]
            if len(members):
                centres[cluster] = members.mean(axis=0)
    return clusters, cost


def _by_size(clusters: IndexArray) -> npt.NDArray[np.int32]:
    """Renumber clusters 1..n, largest first, of equal sizes the one that comes first."""
    _, first, inverse, sizes = np.unique(clusters, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(sizes.size, np.int32)
    rank[np.lexsort((first, -sizes))] = np.arange(1, sizes.size + 1)
    return rank[inverse]
