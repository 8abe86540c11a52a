"""Bray-Curtis over Chebyshev (BoC) affinity between tokens: dense, for pairs, and as a sparse graph of nearest tokens.

For two tokens u and v::

    BoC(u, v) = (1 + max_c |u_c - v_c|) / (1 + sum_c |u_c - v_c| / sum_c |u_c + v_c|)

It falls with the Bray-Curtis distance in the denominator and *rises* with the Chebyshev distance in the numerator, and
the nearest token is the one of highest affinity. It follows that

- a token has affinity 1 to itself and to its copies,
- u and -u have affinity 0 (their Bray-Curtis distance is infinite), and a token of zeros has affinity
  (1 + max|u|) / 2 to any other,
- two tokens of zeros have affinity 0 (their Bray-Curtis distance is 0 / 0), as in the released reference, whose masked
  background has no edges inside.

Nothing is scaled here: scale the tokens to unit length first (:func:`sparsespec.channels.normalize_tokens`) for the
affinity of the paper. Sums are taken in float32, channel by channel, in one fixed order: every function returns the
same bits for the same pair of tokens (with the same channels), on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec._checks import check_count, check_features, check_grid
from sparsespec._kernels import boc as kernels
from sparsespec._kernels._compile import parallel_region

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.intp]

METHODS = ("auto", "exact")


def bray_curtis_over_chebyshev(
    features: npt.ArrayLike, *, divide_by_maximum: bool = True, threads: int | None = None
) -> FloatArray:
    """Compute the dense BoC affinity matrix of all tokens, exactly.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, taken as float32 and as they are.
    divide_by_maximum
        Divide the matrix by its largest entry, as the paper does, so that it lies in [0, 1]. Without, the diagonal
        is 1.
    threads
        At most so many; None for all that the process was granted. The result doesn't depend on it.

    Returns
    -------
    (N, N) float32 array
        Exactly symmetric. Rows of zeros, opposite rows: see the head of this module.

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array with at least one row and column or holds NaN, infinity or a value beyond
        1e15; the message names the rows.

    Examples
    --------
    >>> import numpy as np
    >>> bray_curtis_over_chebyshev(np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
    array([[1., 1., 0., 1.],
           [1., 1., 0., 1.],
           [0., 0., 1., 1.],
           [1., 1., 1., 1.]], dtype=float32)
    """
    array = check_features(features)
    rows, columns = _padded(array)
    out = np.empty((len(array), len(array)), np.float32)
    with parallel_region(threads):
        kernels.all_pairs(rows, columns, len(array), out)
    if divide_by_maximum:
        out /= out.max()
    return out


def boc_knn_graph(
    features: npt.ArrayLike,
    n_neighbors: int = 20,
    method: str = "auto",
    grid: tuple[int, int] | None = None,
    radius: int | None = None,
    *,
    threads: int | None = None,
) -> csr_array:
    """Join every token to the tokens of highest BoC affinity: over all tokens, or within a window of the token grid.

    Tokens i and j are joined if j is among the ``n_neighbors`` nearest of i, or i among those of j. The weight is
    their BoC affinity divided by the largest of the graph, or by 1 (the affinity of a token to itself) if that is
    larger; over all tokens this is the maximum of the dense matrix.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, taken as float32 and as they are.
    n_neighbors
        At least 1. More than there are other tokens (in the window) means all of them.
    method
        "exact" compares every pair of tokens that may be joined. "auto" is "exact".
    grid, radius
        Given together: tokens lie row-major on a grid of ``grid = (h, w)`` tokens and neighbours are sought at most
        ``radius`` rows and columns away, which is linear in N; ``radius=1`` with ``n_neighbors >= 8`` is the
        8-neighbour graph. Left out: over all tokens, quadratic in time, linear in memory.
    threads
        At most so many; None for all that the process was granted. The result doesn't depend on it.

    Returns
    -------
    (N, N) scipy.sparse.csr_array of float64
        Symmetric, sorted indices, no entry on the diagonal, entries in (0, 1]. Of equal affinities the token with the
        lowest index is nearer. Pairs of affinity 0 (see the head of this module) are never joined.

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array with at least one row and column or holds NaN, infinity or a value beyond
        1e15; ``n_neighbors`` or ``radius`` is below 1; ``grid`` doesn't hold N tokens; only one of ``grid`` and
        ``radius`` is given; ``method`` is unknown.

    Examples
    --------
    >>> import numpy as np
    >>> row_of_four = np.array([[1.0, 0.0], [1.0, 0.1], [0.1, 1.0], [0.0, 1.0]])
    >>> graph = boc_knn_graph(row_of_four, grid=(1, 4), radius=1)
    >>> graph.nnz, graph.indices.tolist()
    (6, [1, 0, 2, 1, 3, 2])
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    array = check_features(features)
    size = len(array)
    n_neighbors = check_count(n_neighbors, name="n_neighbors")
    if (grid is None) != (radius is None):
        raise ValueError("grid and radius belong together: give both for neighbours in a window, or neither")
    window = None
    if grid is not None and radius is not None:
        height, width = check_grid(grid, size)
        reach = check_count(radius, name="radius")
        window = _window_offsets(height, width, reach)

    candidates = size - 1 if window is None else window[0].size
    room = max(1, min(n_neighbors, candidates))
    neighbours = np.empty((size, room), np.int32)
    weights = np.empty((size, room), np.float32)
    counts = np.zeros(size, np.int32)
    if window is None:
        rows, columns = _padded(array)
        with parallel_region(threads):
            kernels.nearest_of_all(rows, columns, size, neighbours, weights, counts)
    else:
        rows_off, cols_off = window
        columns = np.ascontiguousarray(array.T)
        with parallel_region(threads):
            kernels.nearest_of_window(columns, width, rows_off, cols_off, neighbours, weights, counts)
    return _symmetric_union(neighbours, weights, counts)


def boc_edges(features: npt.ArrayLike, first: npt.ArrayLike, second: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """BoC affinity of listed pairs of tokens, not divided by any maximum.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, taken as float32 and as they are.
    first, second
        (E,) integers in [0, N): the two ends of every pair, for instance of :func:`grid_edges`.

    Returns
    -------
    (E,) float64 array
        At least 0. A token has affinity 1 to itself.

    Raises
    ------
    ValueError
        ``features`` as in :func:`bray_curtis_over_chebyshev`; ``first`` and ``second`` of different lengths, not
        integers or outside [0, N).
    """
    array = check_features(features)
    ends = []
    for name, given in (("first", first), ("second", second)):
        end = np.asarray(given)
        if end.ndim != 1 or (end.size and end.dtype.kind not in "iu"):
            raise ValueError(
                f"{name} must be an (E,) array of integers; its shape is {end.shape}, its dtype {end.dtype}"
            )
        if end.size and (end.min() < 0 or end.max() >= len(array)):
            raise ValueError(
                f"{name} must hold token numbers from 0 to {len(array) - 1}; it holds {end.min()} to {end.max()}"
            )
        ends.append(np.ascontiguousarray(end, np.intp))
    if ends[0].size != ends[1].size:
        raise ValueError(f"first and second must be as long as each other, not {ends[0].size} and {ends[1].size}")
    out = np.empty(ends[0].size, np.float64)
    kernels.listed_pairs(array, ends[0], ends[1], out)
    return out


def grid_edges(grid: tuple[int, int], radius: int = 1) -> tuple[IndexArray, IndexArray]:
    """Pairs of tokens at most ``radius`` rows and columns apart, each pair once.

    Parameters
    ----------
    grid
        (h, w), tokens in row-major order.
    radius
        At least 1; 1 gives the pairs of the 8-neighbour graph.

    Returns
    -------
    first, second : (E,) intp arrays
        ``first < second``, ordered by ``first``, then by ``second``.

    Raises
    ------
    ValueError
        A side of ``grid`` or ``radius`` is below 1.

    Examples
    --------
    >>> first, second = grid_edges((2, 2))
    >>> first.tolist(), second.tolist()
    ([0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3])
    """
    height, width = (check_count(side, name="every side of grid") for side in grid)
    rows_off, cols_off = _window_offsets(height, width, check_count(radius, name="radius"))
    later = (rows_off > 0) | ((rows_off == 0) & (cols_off > 0))
    rows_off, cols_off = rows_off[later], cols_off[later]
    row, col = np.divmod(np.arange(height * width)[:, None], width)
    inside = (row + rows_off < height) & (col + cols_off >= 0) & (col + cols_off < width)
    first, offset = np.nonzero(inside)
    return first, first + rows_off[offset] * width + cols_off[offset]


def local_affinity(
    features: Sequence[npt.ArrayLike], grid: tuple[int, int], *, radius: int = 1, sharpness: float = 25.0
) -> csr_array:
    """Affinity of neighbouring tokens for cutting: the mean of several features' BoC graphs, made steep.

    With W_f the graph of :func:`boc_knn_graph` of one kind of features (keys, say, or values) over all tokens of the
    window, 0 where it has no entry, the weight is exp(sharpness (mean_f W_f - 1)). BoC of neighbours lies close to 1
    throughout; the exponential turns small differences into cheap and dear cuts.

    Parameters
    ----------
    features
        One or more (N, C_f) arrays of the same tokens.
    grid
        (h, w), h w = N.
    radius
        Neighbours are at most so many rows and columns away.
    sharpness
        0 makes all weights 1.

    Returns
    -------
    (N, N) scipy.sparse.csr_array of float64
        Symmetric, sorted indices, no diagonal, weights in [1e-12, 1]; all neighbours are joined.

    Raises
    ------
    ValueError
        As :func:`boc_knn_graph`; no features; a sharpness that is negative or not finite.
    """
    if not features:
        raise ValueError("features must hold at least one (N, C) array")
    if not (np.isfinite(sharpness) and sharpness >= 0):
        raise ValueError(f"sharpness must be a number of at least 0, not {sharpness!r}")
    first, second = grid_edges(grid, check_count(radius, name="radius"))
    total = np.zeros(first.size)
    for one in features:
        array = check_features(one)
        size = len(array)
        check_grid(grid, size)
        weights = boc_edges(array, first, second)
        total += weights / max(1.0, weights.max(initial=0.0))
    # Not below 1e-12: two neighbours without likeness are a cheap cut, not two separate pictures.
    weights = np.maximum(np.exp(sharpness * (total / len(features) - 1)), 1e-12)
    ends = np.concatenate([[first, second], [second, first]], axis=1, dtype=np.int32)
    graph = csr_array((np.tile(weights, 2), tuple(ends)), shape=(size, size))
    graph.sort_indices()
    return graph


def _window_offsets(height: int, width: int, radius: int) -> tuple[IndexArray, IndexArray]:
    """List the steps (rows, columns) from a token to the others of its window, in the order of token numbers."""
    down, aside = min(radius, height - 1), min(radius, width - 1)
    rows, cols = np.mgrid[-down : down + 1, -aside : aside + 1].reshape(2, -1)
    elsewhere = (rows != 0) | (cols != 0)
    return np.ascontiguousarray(rows[elsewhere], np.intp), np.ascontiguousarray(cols[elsewhere], np.intp)


def _padded(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Features by token and by channel, with channels and columns of zeros up to what the kernels take at a time."""
    size, n_channels = features.shape
    channels = -(-n_channels // kernels.CHANNEL_STEP) * kernels.CHANNEL_STEP
    rows = features
    if channels > n_channels:
        rows = np.zeros((size, channels), np.float32)
        rows[:, :n_channels] = features
    columns = np.zeros((channels, -(-size // kernels.BLOCK) * kernels.BLOCK), np.float32)
    columns[:n_channels, :size] = features.T
    return rows, columns


def _symmetric_union(
    neighbours: npt.NDArray[np.int32], weights: FloatArray, counts: npt.NDArray[np.int32]
) -> csr_array:
    """Build the graph of the pairs of which either end lists the other, weights divided by their maximum or 1."""
    size, room = neighbours.shape
    listed = np.arange(room) < counts[:, None]
    start = np.zeros(size + 1, np.int32)
    np.cumsum(counts, out=start[1:])
    values = weights[listed].astype(np.float64)
    values /= max(1.0, values.max(initial=0.0))
    directed = csr_array((values, neighbours[listed], start), shape=(size, size))
    directed.sort_indices()
    # Both directions of a pair have the same bits and none is zero, so the maximum is the union.
    graph = csr_array(directed.maximum(directed.T.tocsr()))
    graph.sort_indices()
    return graph
