"""Bray-Curtis over Chebyshev (BoC) affinity between tokens: dense, for pairs, and as a sparse graph of nearest tokens.

For two tokens u and v::

    BoC(u, v) = (1 + max_c |u_c - v_c|) / (1 + sum_c |u_c - v_c| / sum_c |u_c + v_c|)

It falls with the Bray-Curtis distance in the denominator and *rises* with the Chebyshev distance in the numerator, and
the nearest token is the one of highest affinity. It follows that

- a token has affinity 1 to itself and to its copies,
- u and -u have affinity 0 (their Bray-Curtis distance is infinite), and a token of zeros has affinity
  ``(1 + max|u|) / 2`` to any other,
- two tokens of zeros have affinity 0 (their Bray-Curtis distance is 0 / 0), as in the released reference, whose masked
  background has no edges inside.

Nothing is scaled here: scale the tokens to unit length first (:func:`sparsespec.channels.normalize_tokens`) for the
affinity of the paper. Sums are taken in float32, channel by channel, in one fixed order, and the sum of ``|u + v|`` is
``2 sum max(|u|, |v|) - sum |u - v|``: every function returns the same bits for the same pair of tokens (with the same
channels), on any number of threads. The error is a few float32 roundings of ``1 + max_c |u_c - v_c|``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec._checks import check_count, check_features, check_grid
from sparsespec._kernels import boc, knn, positions, window
from sparsespec._kernels._compile import parallel_region
from sparsespec._threads import Team, default_threads
from sparsespec.channels import normalize_tokens

FloatArray = npt.NDArray[np.float32]
IndexArray = npt.NDArray[np.intp]

METHODS = ("auto", "exact", "approximate")
# Above so many tokens "auto" no longer compares every pair.
EXACT_TOKENS = 32_768

# A ring of lines of the grid should stay in the second-level cache beside what is written.
_RING_BYTES = 256 * 1024
# So few are worked through by one thread: starting a second takes as long.
_SERIAL_TOKENS = 1024


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
    out = np.empty((len(array), len(array)), np.float32)
    rows, columns = _tiles(array)
    with parallel_region(threads):
        boc.all_pairs(array, rows, columns, out)
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
    seed: int = 0,
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
        "exact" compares every pair of tokens that may be joined. "approximate" finds most of the nearest over all
        tokens without that, see :func:`sparsespec.neighbors.approximate_neighbors`. "auto" is "exact" within a window
        and up to 32,768 tokens, "approximate" beyond.
    grid, radius
        Given together: tokens lie row-major on a grid of ``grid = (h, w)`` tokens and neighbours are sought at most
        ``radius`` rows and columns away, always exactly, which is linear in N; ``radius=1`` with ``n_neighbors >= 8``
        is the 8-neighbour graph. Beside the graph it takes one bit for every token and place of the window. Both left
        out: over all tokens; exact is quadratic in time, linear in memory. The grid alone: the same, with a hint to the
        approximate method where neighbours are likely.
    seed
        Of the approximate method, which gives the same graph for the same seed.
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
        1e15; ``n_neighbors`` or ``radius`` is below 1; ``grid`` doesn't hold N tokens; ``radius`` is given without
        ``grid``, or ``grid`` alone with ``method="exact"``, or ``radius`` with ``method="approximate"``; ``method`` is
        unknown.

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
    shape = None if grid is None else check_grid(grid, size)
    if radius is not None:
        radius = check_count(radius, name="radius")
        if shape is None:
            raise ValueError("radius belongs to a grid: give both for neighbours in a window, or neither")
        if method == "approximate":
            raise ValueError('method="approximate" is over all tokens: leave out radius, or use method="exact"')
        if radius < max(shape) - 1:
            return _window_graph(array, n_neighbors, shape, radius, threads)
    elif shape is not None and method == "exact":
        raise ValueError("grid and radius belong together with method='exact': give both, or neither")

    wanted = max(1, min(n_neighbors, size - 1))
    approximate = method == "approximate" or (method == "auto" and radius is None and size > EXACT_TOKENS)
    if approximate:
        # Not before it is needed: importing it takes time that most runs don't have to spend.
        from sparsespec.neighbors import approximate_neighbors

        neighbours, weights, counts = approximate_neighbors(array, wanted, grid=shape, seed=seed, threads=threads)
    else:
        neighbours, weights, counts, _ = _nearest_of_all(array, wanted, threads)
    return _symmetric_union(neighbours, weights, counts, wanted, complete=not approximate)


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
    boc.listed_pairs(array, ends[0], ends[1], out)
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
    features: Sequence[npt.ArrayLike],
    grid: tuple[int, int],
    *,
    radius: int = 1,
    sharpness: float = 25.0,
    threads: int | None = None,
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
    threads
        At most so many; None for all that the process was granted. The result doesn't depend on it.

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
    arrays = [check_features(one) for one in features]
    for array in arrays:
        shape = check_grid(grid, len(array))
    radius = check_count(radius, name="radius")
    sweeps = [_Sweep(array, shape, radius, threads) for array in arrays]
    start = sweeps[0].whole_rows()
    # One array of marks without a line stands for all of the window.
    marks = np.empty((0, 0), np.uint16)
    indices, data = np.empty(start[-1], start.dtype), np.empty(start[-1])
    divisors = [max(1.0, sweep.largest()) for sweep in sweeps]
    for number, (sweep, divisor) in enumerate(zip(sweeps, divisors, strict=True)):
        kinds = len(sweeps) if number == len(sweeps) - 1 else 0
        sweep.fill(marks, start, indices, data, divisor, first=number == 0, kinds=kinds, sharpness=sharpness)
    return _as_graph(data, indices, start)


def cosine_affinity(
    features: Sequence[npt.ArrayLike], grid: tuple[int, int], *, radius: int = 1, sharpness: float = 10.0
) -> csr_array:
    """Affinity of neighbouring tokens by the dot product of unit tokens: what BoC is compared with.

    With c the mean over the kinds of features of the cosine of two tokens, the weight is exp(sharpness (c - 1)).

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
        As :func:`local_affinity`.

    Raises
    ------
    ValueError
        As :func:`local_affinity`.
    """
    graph = local_affinity(features, grid, radius=radius, sharpness=0.0)
    if not (np.isfinite(sharpness) and sharpness >= 0):
        raise ValueError(f"sharpness must be a number of at least 0, not {sharpness!r}")
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    total = np.zeros(graph.nnz)
    for one in features:
        unit = normalize_tokens(check_features(one))
        total += np.einsum("ij,ij->i", unit[rows], unit[graph.indices])
    graph.data = np.maximum(np.exp(sharpness * (np.minimum(total / len(features), 1) - 1)), window.LEAST_WEIGHT)
    return graph


def weaken_back_steps(
    affinity: csr_array,
    position: npt.NDArray[np.floating],
    grid: tuple[int, int],
    *,
    strength: float = 20.0,
    threads: int | None = None,
) -> csr_array:
    """Weaken edges along which the position within the object steps back: there one object ends and the next begins.

    Going right, tokens of one object lie further and further right in it; where the right edge of one object meets the
    left edge of the next, the position falls from 0.5 to -0.5. With s the step of the position from token i to token j
    in the direction of the edge, the weight is multiplied by exp(strength min(0, s)).

    Parameters
    ----------
    affinity
        (N, N) symmetric affinity of neighbouring tokens, weights in [0, 1].
    position
        (N, 2) array: x and y of each token in the box of its object, from -0.5 to 0.5
        (:meth:`sparsespec.directions.Directions.position_of`).
    grid
        (h, w), h w = N.
    strength
        0 leaves the weights.
    threads
        At most so many; None for all that the process was granted. The result doesn't depend on it.

    Returns
    -------
    (N, N) scipy.sparse.csr_array of float64
        With the same entries, weights of at least 1e-12.

    Raises
    ------
    ValueError
        The grid or ``position`` doesn't fit, ``position`` isn't finite, or ``strength`` is negative or not finite.
    """
    if not (np.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength must be a number of at least 0, not {strength!r}")
    graph = csr_array(affinity)
    _, width = check_grid(grid, graph.shape[0])
    position = np.asarray(position, dtype=np.float64)
    if position.shape != (graph.shape[0], 2) or not np.isfinite(position).all():
        raise ValueError(
            f"position must be finite and of shape ({graph.shape[0]}, 2), one row for each token; "
            f"its shape is {position.shape}"
        )
    across, down = np.ascontiguousarray(position.T)
    data = np.asarray(graph.data, np.float64)
    weights = np.empty(graph.nnz)

    def work(first: int, last: int) -> None:
        positions.weaken_back_steps(
            graph.indptr, graph.indices, data, across, down, width, float(strength), first, last, weights
        )

    Team(threads).share(work, 0, graph.shape[0], at_once=4096)
    return csr_array((weights, graph.indices, graph.indptr), shape=graph.shape)


class _Sweep:
    """Passes over one kind of features on the token grid, whose parts threads share.

    ``computed`` counts the affinities computed so far; a pair counts for both of its tokens.
    """

    def __init__(self, features: FloatArray, grid: tuple[int, int], radius: int, threads: int | None = None) -> None:
        height, self._width = grid
        self._team = Team(threads if len(features) > _SERIAL_TOKENS else 1)
        self._features = features
        self._down, self._aside = min(radius, height - 1), min(radius, self._width - 1)
        self.places = (2 * self._down + 1) * (2 * self._aside + 1)
        across = _RING_BYTES // ((2 * self._down + 1) * features.shape[1] * 4) - 2 * self._aside
        strips = -(-self._width // max(4 * window.LANES, across))
        self._strip = -(-self._width // (strips * window.LANES)) * window.LANES
        # Lines above and below a part are copied for it once more; more parts than this keep no more threads busy.
        self._band = max(16, 4 * self._down, height // 32) if len(features) > _SERIAL_TOKENS else height
        self.computed = 0

    def largest(self) -> float:
        """Find the largest affinity of any two tokens in a window, 0 without any."""
        nothing = np.empty(0, np.int32)
        return self._run(window.LARGEST, 0, np.empty((0, 0), np.uint16), nothing, nothing, np.empty(0))

    def mark(self, n_neighbors: int) -> tuple[npt.NDArray[np.uint16], float]:
        """Mark the nearest of every token, a bit for each place of its window; also the largest affinity."""
        height = len(self._features) // self._width
        marks = np.empty((height * -(-self._width // window.LANES), self.places), np.uint16)
        nothing = np.empty(0, np.int32)
        return marks, self._run(window.MARK, n_neighbors, marks, nothing, nothing, np.empty(0))

    def whole_rows(self) -> npt.NDArray[np.integer]:
        """Say where the rows of a graph begin that joins all tokens in a window."""
        height, width = len(self._features) // self._width, self._width
        start = np.zeros(height * width + 1, _index_type(height * width * (self.places - 1)))
        spans = [
            np.minimum(np.arange(side) + reach, side - 1) - np.maximum(np.arange(side) - reach, 0) + 1
            for side, reach in ((height, self._down), (width, self._aside))
        ]
        np.multiply.outer(*(span.astype(start.dtype) for span in spans), out=start[1:].reshape(height, width))
        start[1:] -= 1
        return np.cumsum(start, out=start)

    def marked_rows(self, marks: npt.NDArray[np.uint16], n_neighbors: int) -> npt.NDArray[np.integer]:
        """Say where the rows of a graph begin that joins tokens of which either has marked the other."""
        size = len(self._features)
        start = np.zeros(size + 1, _index_type(2 * size * n_neighbors))
        height = size // self._width

        def count(top: int, bottom: int) -> None:
            window.count_rows(marks, self._width, height, self._down, self._aside, top, bottom, start[1:])

        self._team.share(count, 0, height, self._band)
        return np.cumsum(start, out=start)

    def fill(
        self,
        marks: npt.NDArray[np.uint16],
        start: npt.NDArray[np.integer],
        indices: npt.NDArray[np.integer],
        data: npt.NDArray[np.float64],
        divisor: float,
        *,
        first: bool = True,
        kinds: int = 0,
        sharpness: float = 0.0,
    ) -> float:
        """Fill the rows; see :func:`sparsespec._kernels.window.sweep`."""
        return self._run(window.FILL, 0, marks, start, indices, data, divisor, first, kinds, sharpness)

    def _run(
        self,
        task: int,
        n_neighbors: int,
        marks: npt.NDArray[np.uint16],
        start: npt.NDArray[np.integer],
        indices: npt.NDArray[np.integer],
        data: npt.NDArray[np.float64],
        divisor: float = 1.0,
        first: bool = True,
        kinds: int = 0,
        sharpness: float = 0.0,
    ) -> float:
        height = len(self._features) // self._width
        rest = (task, n_neighbors, marks, start, indices, data, float(divisor), first, kinds, float(sharpness))
        grid = (self._features, self._width, self._down, self._aside)
        across = -(-self._width // self._strip)
        found: list[tuple[int, int]] = []

        def sweep(first: int, last: int) -> None:
            for part in range(first, last):
                top, left = part // across * self._band, part % across * self._strip
                bottom, right = min(top + self._band, height), min(left + self._strip, self._width)
                found.append(window.sweep(*grid, top, bottom, left, right, *rest))

        self._team.share(sweep, 0, -(-height // self._band) * across)
        self.computed += sum(computed for _, computed in found)
        # Floats that aren't negative are in the order of their bits.
        return float(np.int32(max(bits for bits, _ in found)).view(np.float32))


def _window_graph(
    features: FloatArray, n_neighbors: int, grid: tuple[int, int], radius: int, threads: int | None
) -> csr_array:
    sweep = _Sweep(features, grid, radius, threads)
    if n_neighbors >= sweep.places - 1:
        # Everything in the window: nothing to choose, and the largest affinity is known when all are in place.
        marks, divisor = np.empty((0, 0), np.uint16), 1.0
        start = sweep.whole_rows()
    else:
        marks, largest = sweep.mark(n_neighbors)
        divisor = max(1.0, largest)
        start = sweep.marked_rows(marks, n_neighbors)
    indices, data = np.empty(start[-1], start.dtype), np.empty(start[-1])
    largest = sweep.fill(marks, start, indices, data, divisor)
    graph = _as_graph(data, indices, start)
    if len(marks) == 0:
        if largest > 1:
            data /= largest
        if not data.all():
            graph.eliminate_zeros()
    return graph


def _nearest_of_all(
    features: FloatArray, wanted: int, threads: int | None
) -> tuple[npt.NDArray[np.int32], FloatArray, npt.NDArray[np.int32], int]:
    """List the nearest of every token over all, in no order; also how many pairs were computed."""
    size = len(features)
    # Lists take in more than they keep, and are cut back when they are full.
    room = max(1, min(size - 1, -(-3 * wanted // 16) * 16))
    neighbours = np.empty((size, room), np.int32)
    weights = np.empty((size, room), np.float32)
    counts = np.zeros(size, np.int32)
    rows, columns = _tiles(features)
    # Enough meetings of two strips at a time to keep every thread busy to the end of each round.
    strips = 4 * (threads or default_threads())
    with parallel_region(threads):
        computed = knn.nearest_of_all(features, wanted, strips, rows, columns, neighbours, weights, counts)
    return neighbours, weights, counts, computed


def _tiles(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Allocate what the kernels copy the features to, so that tiles are read from beginning to end."""
    size, channels = features.shape
    panels = -(-size // boc.COLUMNS)
    return (
        _aligned(panels * boc.COLUMNS // boc.ROWS, channels, 2 * boc.ROWS),
        _aligned(panels, channels, boc.COLUMNS),
    )


def _aligned(*shape: int) -> FloatArray:
    """Allocate where no vector lies in two lines of the cache."""
    count, step = int(np.prod(shape)), 16
    memory = np.empty(count + step, np.float32)
    begin = -(memory.ctypes.data // memory.itemsize) % step
    return memory[begin : begin + count].reshape(shape)


def _index_type(most_entries: int) -> type[np.integer]:
    return np.int32 if most_entries <= np.iinfo(np.int32).max else np.int64


def _as_graph(
    data: npt.NDArray[np.float64], indices: npt.NDArray[np.integer], start: npt.NDArray[np.integer]
) -> csr_array:
    size = start.size - 1
    graph = csr_array((data, indices, start), shape=(size, size))
    graph.has_canonical_format = True
    return graph


def _symmetric_union(
    neighbours: npt.NDArray[np.int32],
    weights: FloatArray,
    counts: npt.NDArray[np.int32],
    wanted: int,
    *,
    complete: bool,
) -> csr_array:
    """Build the graph of the pairs of which either token lists the other, weights divided by their maximum or 1.

    ``complete`` says that no list lacks a token nearer than its last, and that those below ``wanted`` lack none.
    """
    size = len(neighbours)
    start = np.empty(size + 1, _index_type(2 * size * wanted))
    data, indices = knn.symmetric_union(neighbours, weights, counts, wanted, complete, start)
    return _as_graph(data, indices, start)


def _window_offsets(height: int, width: int, radius: int) -> tuple[IndexArray, IndexArray]:
    """List the steps (rows, columns) from a token to the others of its window, in the order of token numbers."""
    down, aside = min(radius, height - 1), min(radius, width - 1)
    rows, cols = np.mgrid[-down : down + 1, -aside : aside + 1].reshape(2, -1)
    elsewhere = (rows != 0) | (cols != 0)
    return np.ascontiguousarray(rows[elsewhere], np.intp), np.ascontiguousarray(cols[elsewhere], np.intp)
