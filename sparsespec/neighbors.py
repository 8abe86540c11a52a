"""Approximate nearest tokens by BoC affinity, for more tokens than can all be compared with each other.

BoC is not a distance: a token may lie near another because a single channel of theirs is far apart. Trees and
projections, which find what is close, find half of the nearest tokens by BoC and no more. What holds is that *like
tokens have like lists*. So

1. tokens are ordered by halving them again and again along their main direction, until blocks of 64 like tokens remain,
2. a block's candidates are gathered once and compared with its tokens in 16-bit integers, some thousand million pairs
   a second (:mod:`sparsespec._kernels.tiles`),
3. every fourth token is searched among every fourth token first, every sixteenth before, down to so few that all are
   compared with all,
4. with those lists to start from, rounds follow: the candidates of a block are the tokens listed by its tokens or
   listing them, then those that these list or are listed by, those met most often first. A candidate is compared once;
   the rounds end when lists hardly change,
5. the best half more than is asked for get their exact affinities, and the nearest of them are the answer.

Steps 3 and 4 follow NN-descent [1]_, which goes token by token, and PatchMatch [2]_, which passes lists on to
neighbours.

References
----------
.. [1] W. Dong, C. Moses, K. Li, "Efficient k-nearest neighbor graph construction for generic similarity measures",
   WWW 2011.
.. [2] C. Barnes, E. Shechtman, A. Finkelstein, D. B. Goldman, "PatchMatch: a randomized correspondence algorithm for
   structural image editing", SIGGRAPH 2009.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsespec._checks import check_count, check_features, check_grid
from sparsespec._kernels import descent as kernels
from sparsespec._kernels._compile import parallel_region
from sparsespec._kernels.tiles import GROUP

FloatArray = npt.NDArray[np.float32]
TokenArray = npt.NDArray[np.int32]

# So many tokens are compared with each other, all with all.
ALL_PAIRS = 4096
# Tokens of one level to a token of the next coarser one.
STEP = 4
# Places before and behind a block that it is compared with first.
AROUND = 64
# New candidates of a block in one round.
CANDIDATES = 4096
# Tokens that each token lists, at least, while the search lasts.
LISTED = 32
# Places for tokens that list a token, beside those that it lists.
LISTED_BY = 24
# Rounds of one level at most; they end when fewer than this share of all entries is new.
ROUNDS = 8
FEW = 0.02
# Rows larger than so many times the median do not decide what the unit of the integers is.
OUTLIER = 4


class _Found(NamedTuple):
    neighbours: TokenArray
    weights: FloatArray
    counts: TokenArray
    pairs: int


def approximate_neighbors(
    features: npt.ArrayLike,
    n_neighbors: int,
    *,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[TokenArray, FloatArray, TokenArray]:
    """Find most of the tokens of highest BoC affinity to each token, in time that grows far slower than N^2.

    On features of photographs more than 0.95 of the exact lists of 20 are found, and what takes the place of the
    rest has nearly their affinity. Noise without any structure is the worst case: like tokens don't exist there.

    Parameters
    ----------
    features
        (N, C) real numbers, one row per token, taken as float32 and as they are.
    n_neighbors
        k, at least 1: as many tokens are listed for each, fewer if there are no more.
    grid
        (h, w) if the tokens lie row-major on a grid of h w = N: tokens side by side are then compared first.
    seed
        At least 0: which of many equally good searches is done. The same seed gives the same bytes.
    threads
        At most so many; None for all that the process was granted. The result doesn't depend on it.

    Returns
    -------
    neighbours : (N, k) int32 array
        Token numbers by falling affinity, of equal affinities the lowest first; -1 where there are no more. Neither
        the token itself nor one of affinity 0 is listed. Among copies, more than there is room for, any may be listed.
    weights : (N, k) float32 array
        Their affinities with the bits of :func:`sparsespec.affinity.boc_edges`, not divided by any maximum; 0 where
        there are no more.
    counts : (N,) int32 array
        How many are listed.

    Raises
    ------
    ValueError
        ``features`` isn't an (N, C) array with at least one row and column or holds NaN, infinity or a value beyond
        1e15; ``n_neighbors`` is below 1; ``seed`` is negative; ``grid`` doesn't hold N tokens.

    Examples
    --------
    >>> import numpy as np
    >>> four = np.array([[1.0, 0.0], [1.0, 0.5], [0.1, 1.0], [0.0, 1.0]])
    >>> neighbours, weights, counts = approximate_neighbors(four, 1)
    >>> neighbours.ravel().tolist(), counts.tolist()
    ([1, 0, 1, 1], [1, 1, 1, 1])
    """
    found = _search(features, n_neighbors, grid=grid, seed=seed, threads=threads)
    return found.neighbours, found.weights, found.counts


def _search(
    features: npt.ArrayLike, n_neighbors: int, *, grid: tuple[int, int] | None, seed: int, threads: int | None
) -> _Found:
    """Search as :func:`approximate_neighbors` does, and count the pairs that were compared."""
    array = check_features(features)
    size = len(array)
    wanted = check_count(n_neighbors, name="n_neighbors")
    seed = check_count(seed, name="seed", least=0)
    if grid is not None:
        grid = check_grid(grid, size)
    # Integers put tokens of nearly the same affinity in another order, and longer lists lead further: more than wanted
    # are kept until the end.
    room = max(LISTED, wanted + wanted // 2 + 2)
    pairs = 0
    with parallel_region(threads):
        order = _order_by_likeness(array, seed)
        rows, unit = _as_integers(array, order)
        stride = 1
        while -(-size // stride) > ALL_PAIRS:
            stride *= STEP
        level = np.ascontiguousarray(rows[::stride])
        neighbours = np.full((len(level), room), -1, np.int32)
        values = np.zeros((len(level), room), np.float32)
        kernels.search_all(level, unit, neighbours, values)
        pairs += len(level) ** 2
        while stride > 1:
            stride //= STEP
            level = np.ascontiguousarray(rows[::stride])
            neighbours, values = _spread(neighbours, len(level), -1, STEP), _spread(values, len(level), 0.0, 1)
            beside = None if grid is None or stride > 1 else _beside(grid, order)
            pairs += _descend(level, unit, wanted, beside, neighbours, values)
        del rows, level, values
        nearest = np.empty((size, wanted), np.int32)
        weights = np.empty((size, wanted), np.float32)
        counts = np.empty(size, np.int32)
        kernels.finish(array, order, neighbours, nearest, weights, counts)
    return _Found(nearest, weights, counts, pairs)


def _descend(
    rows: npt.NDArray[np.int16],
    unit: np.float32,
    wanted: int,
    beside: TokenArray | None,
    neighbours: TokenArray,
    values: FloatArray,
) -> int:
    """Improve the lists of one level in rounds; return how many pairs were compared."""
    size, room = neighbours.shape
    links = np.empty((size, room + LISTED_BY), np.int32)
    ends = np.empty(size, np.int32)
    filters = np.zeros((-(-size // kernels.BLOCK), kernels.WORDS), np.int64)
    pairs = np.zeros(kernels.PARTS, np.int64)
    changed = np.zeros(kernels.PARTS, np.int64)
    for turn in range(ROUNDS):
        kernels.join_lists(neighbours, links, ends)
        if turn == 0 and beside is not None:
            # Tokens without a list of their own look at those beside them, and so at the lists of these.
            without = neighbours[:, 0] < 0
            links[without, : beside.shape[1]] = beside[without]
        changed[:] = 0
        around = AROUND if turn == 0 else 0
        kernels.descend(rows, unit, around, CANDIDATES, wanted, links, filters, neighbours, values, pairs, changed)
        if changed.sum() < FEW * size * wanted:
            break
    return int(pairs.sum())


def _order_by_likeness(features: FloatArray, seed: int) -> TokenArray:
    """Token numbers in an order in which like tokens follow each other."""
    size = len(features)
    order = np.roll(np.arange(size, dtype=np.int32), int(np.random.default_rng(seed).integers(size)))
    keys = np.empty(size, np.float32)
    bounds = np.array([0, size], np.intp)
    while (blocks := -(-np.diff(bounds) // kernels.BLOCK)).max() > 1:
        kernels.split_nodes(features, order, bounds, keys)
        middles = (bounds[:-1] + (blocks + 1) // 2 * kernels.BLOCK)[blocks > 1]
        bounds = np.sort(np.concatenate([bounds, middles]))
    return order


def _as_integers(features: FloatArray, order: TokenArray) -> tuple[npt.NDArray[np.int16], np.float32]:
    """Features in the given order as 16-bit integers, channels padded to whole groups, and the unit of the integers.

    A lane of the kernel sums every fourth channel, and no sum of usual rows may leave 16 bits.
    """
    size, n_channels = features.shape
    sums = np.empty(size, np.float32)
    parts = [slice(start, start + 1024) for start in range(0, size, 1024)]
    for part in parts:
        magnitudes = np.abs(features[part])
        sums[part] = np.max([magnitudes[:, lane::GROUP].sum(axis=1) for lane in range(GROUP)], axis=0)
    some = sums[sums > 0]
    largest = min(some.max(), OUTLIER * np.median(some)) if some.size else np.float32(1)
    # The sum of a difference is at most that of both rows; half a unit is lost in rounding each channel.
    steps = max(1.0, 16000.0 - n_channels)
    scale = np.float64(steps) / np.float64(largest)
    rows = np.zeros((size, -(-n_channels // GROUP) * GROUP), np.int16)
    for part in parts:
        scaled = np.rint(features[order[part]] * scale)
        rows[part, :n_channels] = np.clip(scaled, -steps, steps)
    return rows, np.float32(1 / scale)


def _spread(array: npt.NDArray, size: int, empty: float, factor: int) -> npt.NDArray:
    """Put a level's lists at the places that its tokens have in the next finer level."""
    out = np.full((size, array.shape[1]), empty, array.dtype)
    out[::STEP] = np.where(array == empty, empty, array * factor)
    return out


def _beside(grid: tuple[int, int], order: TokenArray) -> TokenArray:
    """Places in the order of the (up to eight) tokens around each place's token on the grid; N where the grid ends."""
    height, width = grid
    place = np.full((height + 2, width + 2), order.size, np.int32)
    inside = np.empty(order.size, np.int32)
    inside[order] = np.arange(order.size, dtype=np.int32)
    place[1:-1, 1:-1] = inside.reshape(grid)
    around = [
        place[1 + down : 1 + down + height, 1 + aside : 1 + aside + width].ravel()
        for down in (-1, 0, 1)
        for aside in (-1, 0, 1)
        if (down, aside) != (0, 0)
    ]
    return np.stack(around, axis=1)[order]
