"""How many objects, and which token is whose: recursive normalised cuts over many thresholds, and their consensus."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from sparsespec._checks import check_grid
from sparsespec._kernels import cuts as kernels
from sparsespec._kernels import positions, regions
from sparsespec._threads import Team, default_threads
from sparsespec.spectral import smallest_eigenpairs

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.int32]

# Up to here a region's Fiedler vector comes from a band factorisation inside the kernel, then from multigrid. On a grid
# of 216 x 288 tokens the former takes a tenth of a second, the latter more than one.
LARGE_REGION = 131_072
# The same limit in memory: what the bands of all threads together may take.
_BAND_BYTES = 1 << 29
# Up to here one thread follows a region to the last of its parts; the parts of larger ones are shared out anew.
_WHOLE_UP_TO = 4096
# So few tokens are cut before a second thread has begun.
_ALONE_UP_TO = 512


@dataclass
class SolverRecord:
    """What the cuts of one image took.

    Attributes
    ----------
    cuts
        Regions whose smallest normalised cut was sought.
    iterations
        Of the eigensolvers, over all of them.
    large
        How many of the regions were large enough for the multigrid solver.
    largest_residual
        Of all Fiedler vectors, ||L u - lambda u||.
    """

    cuts: int = 0
    iterations: int = 0
    large: int = 0
    largest_residual: float = 0.0


class RegionCutter:
    """Normalised cuts of regions of one sparse graph on a token grid.

    Parameters
    ----------
    affinity
        (N, N) symmetric affinity of neighbouring tokens with positive weights.
    grid
        (h, w), h w = N.
    tolerance
        Residual, relative to the eigenvalue, at which a Fiedler vector is good enough to sweep.
    large_region
        Regions of more tokens, or of so many that a band factorisation would take more than half a gigabyte, are solved
        by :func:`sparsespec.spectral.smallest_eigenpairs`.
    threads
        None takes what the process was granted; the result is the same for any number.

    Raises
    ------
    ValueError
        When the grid doesn't hold N tokens, or a weight isn't positive and finite.
    """

    def __init__(
        self,
        affinity: csr_array,
        grid: tuple[int, int],
        *,
        tolerance: float = 1e-2,
        large_region: int = LARGE_REGION,
        threads: int | None = None,
    ) -> None:
        n = affinity.shape[0]
        height, width = check_grid(grid, n)
        graph = csr_array(affinity)
        if graph.nnz:
            least, most = graph.data.min(), graph.data.max()
            if not (least > 0 and most < np.inf):
                raise ValueError(f"affinity must have positive weights; its smallest is {least}, its largest {most}")
        # The band of the factorisation is as wide as the axis that runs fastest: let it be the short one.
        order = np.arange(n, dtype=np.int32).reshape(height, width)
        self._order = np.ascontiguousarray(order.T if width > height else order).ravel()
        self._rank = np.empty(n, np.int32)
        self._rank[self._order] = np.arange(n, dtype=np.int32)
        indptr, indices, data, self._radius = regions.reorder(
            graph.indptr, graph.indices, graph.data, self._order, self._rank, width
        )
        self._csr = (indptr, indices, data)
        # Regions get a mark, the exclusive or of these, by which the same are found at once.
        self._salts = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, max(n, 1), dtype=np.int64)
        self._tolerance = tolerance
        # Bytes that the band takes for each token, at most.
        self._band_width = 8 * (self._radius * (min(height, width) + 1) + 16)
        self._large_region = min(large_region, _BAND_BYTES // self._band_width)
        self._threads = threads
        self.grid = (height, width)
        self.record = SolverRecord()

    def tokens_of(self, mask: BoolArray) -> TokenArray:
        """Sorted token numbers, in the order of this graph, of an (N,) mask."""
        return np.sort(self._rank[mask])

    def mask_of(self, tokens: TokenArray) -> BoolArray:
        """(N,) mask of token numbers in the order of this graph."""
        mask = np.zeros(self._order.size, bool)
        mask[self._order[tokens]] = True
        return mask

    def components(self, tokens: TokenArray) -> list[TokenArray]:
        """Connected parts of a region, each sorted."""
        ordered, sizes = self._components(tokens)
        return np.split(ordered, np.cumsum(sizes)[:-1])

    def _components(self, tokens: TokenArray) -> tuple[TokenArray, Int64Array]:
        inside = np.zeros((1, self._order.size))
        inside[0, tokens] = 1
        # With radius 1 edges alone connect.
        ordered, _, sizes, _ = regions.superlevel_regions(
            *self._csr[:2], inside, np.zeros(1, np.int64), np.zeros(1), min(self.grid), 1, 1, self._salts
        )
        return ordered, sizes

    def cut(self, tokens: TokenArray) -> tuple[float, TokenArray, TokenArray]:
        """Smallest normalised cut found for a connected region, and its two sides, each sorted."""
        self.record.cuts += 1
        if tokens.size > self._large_region:
            pairs = smallest_eigenpairs(self._part(tokens), k=min(3, tokens.size))
            self.record.iterations += pairs.iterations
            self.record.large += 1
            self.record.largest_residual = max(self.record.largest_residual, float(pairs.residuals.max()))
            vectors = np.ascontiguousarray(pairs.random_walk_vectors()[:, 1:].T)
            value, side = kernels.sweep_region(*self._csr, tokens, vectors)
            return float(value), tokens[side], tokens[~side]
        ordered, forest = tokens.copy(), _Forest.of_roots(np.array([tokens.size]))
        _, iterations, residual = self._split(ordered, forest, forest.roots, 0, np.inf)
        self.record.iterations += iterations
        self.record.largest_residual = max(self.record.largest_residual, residual)
        left = forest.lefts[0]
        return float(forest.cuts[0]), np.sort(ordered[:left]), np.sort(ordered[left:])

    def fiedler_value(self, tokens: TokenArray) -> tuple[float, float]:
        """Second smallest eigenvalue of a region's Laplacian, and its residual: how firmly the region hangs together.

        0 for a region in several parts; for a single token, which nothing can divide, 2, the largest there is.
        """
        if tokens.size < 2:
            return 2.0, 0.0
        if len(self.components(tokens)) > 1:
            return 0.0, 0.0
        if tokens.size > self._large_region:
            pairs = smallest_eigenpairs(self._part(tokens), k=2)
            return float(pairs.values[1]), float(pairs.residuals[1])
        forest = _Forest.of_roots(np.array([tokens.size]))
        _, _, residual = self._split(tokens.copy(), forest, forest.roots, 0, -np.inf)
        return float(forest.values[0]), residual

    def tree(
        self, tokens: TokenArray, largest_cut: float, birth: float = 0.0
    ) -> Iterator[tuple[TokenArray, float, float]]:
        """All regions that recursive cuts make of a region, its connected parts first, each with its thresholds.

        Yields
        ------
        tokens, birth, cut
            The region is part of the partition at threshold t if birth <= t < cut.
        """
        arena, sizes = self._components(tokens)
        forest = self._grow(arena, sizes, largest_cut, birth)
        for node in np.flatnonzero(forest.sizes):
            start = forest.starts[node]
            region = np.sort(arena[start : start + forest.sizes[node]])
            yield region, float(forest.births[node]), float(forest.cuts[node])

    def count_regions(
        self, maps: Sequence[Float64Array], thresholds: Sequence[Float64Array], levels: Float64Array, min_tokens: int
    ) -> tuple[TokenArray, Int64Array, Int64Array]:
        """Regions of all partitions of where maps are above their thresholds, each once; see :func:`propose`.

        Parameters
        ----------
        maps
            (N,) arrays.
        thresholds
            For each map.
        levels
            Largest cuts that are made, ascending.
        min_tokens
            Smaller regions are left out.

        Returns
        -------
        tokens, ends, multiplicity
            As in :class:`Candidates`.
        """
        values = np.take(np.array(maps, np.float64).reshape(len(maps), self._order.size), self._order, axis=1)
        which = np.repeat(np.arange(len(maps)), [t.size for t in thresholds])
        flat = np.concatenate([np.empty(0), *thresholds])
        arena, _, sizes, times = regions.superlevel_regions(
            *self._csr[:2], values, which, flat, min(self.grid), self._radius, min_tokens, self._salts
        )
        largest_cut = float(levels[-1])
        forest = self._grow(arena, sizes, largest_cut)
        found: tuple[TokenArray, Int64Array, Int64Array] = regions.collect_nodes(
            arena, forest.roots, times, forest.starts, forest.sizes, forest.births, forest.cuts, forest.hashes,
            largest_cut, levels, min_tokens, self._order,
        )  # fmt: skip
        return found

    def _part(self, tokens: TokenArray) -> csr_array:
        """Affinity within a region."""
        indptr, indices, data = self._csr
        return csr_array((data, indices, indptr), shape=(indptr.size - 1,) * 2)[tokens][:, tokens]

    def _grow(self, arena: TokenArray, sizes: Int64Array, largest_cut: float, birth: float = 0.0) -> _Forest:
        """Cut connected regions that lie one after the other in the arena recursively; reorders the arena."""
        forest = _Forest.of_roots(sizes, birth)
        whole_up_to = min(_WHOLE_UP_TO, self._large_region)
        waiting = forest.roots
        while waiting.size:
            many = forest.sizes[waiting]
            large = many > self._large_region
            for node in waiting[large]:
                self._cut_large(arena, forest, int(node), largest_cut)
            made, iterations, residual = self._split(arena, forest, waiting[~large], whole_up_to, largest_cut)
            self.record.cuts += made
            self.record.iterations += iterations
            self.record.largest_residual = max(self.record.largest_residual, residual)
            waiting = forest.parts_of(waiting[many > whole_up_to], largest_cut)
        return forest

    def _split(
        self, arena: TokenArray, forest: _Forest, tasks: Int64Array, whole_up_to: int, largest_cut: float
    ) -> tuple[int, int, float]:
        """Cut nodes on several threads; returns how many there were, the iterations, and the largest residual."""
        if not tasks.size:
            return 0, 0, 0.0
        sizes = forest.sizes[tasks]
        workers = min(self._threads or default_threads(), tasks.size) if sizes.sum() > _ALONE_UP_TO else 1
        workers = max(1, min(workers, _BAND_BYTES // (int(sizes.max()) * self._band_width)))
        # The most work first, dealt out to and fro.
        tasks = tasks[np.argsort(-sizes, kind="stable")]
        place = np.arange(tasks.size) % (2 * workers)
        dealt = np.minimum(place, 2 * workers - 1 - place)
        cosines = np.cos(2.3 * np.arange(sizes.max()) + 0.7)

        done: list[tuple[int, int, float]] = []

        # The kernel lets go of the interpreter lock; these threads need none of Numba's.
        def work(worker: int) -> tuple[int, int, float]:
            made: tuple[int, int, float] = kernels.split_nodes(
                *self._csr, self._salts, arena, tasks[dealt == worker], whole_up_to, float(largest_cut),
                self._tolerance, cosines, forest.starts, forest.sizes, forest.births, forest.cuts, forest.values,
                forest.lefts, forest.hashes,
            )  # fmt: skip
            return made

        Team(workers).share(lambda first, last: done.extend(map(work, range(first, last))), 0, workers)
        made, iterations, residuals = zip(*done, strict=True)
        return sum(made), sum(iterations), max(residuals)

    def _cut_large(self, arena: TokenArray, forest: _Forest, node: int, largest_cut: float) -> None:
        start, size = int(forest.starts[node]), int(forest.sizes[node])
        region = arena[start : start + size].copy()
        value, *sides = self.cut(region)
        forest.cuts[node] = value
        forest.hashes[node] = np.bitwise_xor.reduce(self._salts[region])
        if value <= largest_cut:
            parts = [part for side in sides for part in self.components(side)]
            arena[start : start + size] = np.concatenate(parts)
            forest.divide(node, np.array([part.size for part in parts]))


@dataclass(frozen=True, eq=False)
class _Forest:
    """Nodes of trees of regions, laid out as :func:`sparsespec._kernels.cuts.split_nodes` says; unused: size 0.

    Each is a run of an arena of tokens, which cuts reorder, with the thresholds of its birth and of its cut.
    """

    roots: Int64Array
    starts: Int64Array
    sizes: Int64Array
    births: Float64Array
    cuts: Float64Array
    values: Float64Array
    lefts: Int64Array
    hashes: Int64Array

    @classmethod
    def of_roots(cls, sizes: Int64Array, birth: float = 0.0) -> _Forest:
        places = int(2 * sizes.sum() - sizes.size)
        roots = np.cumsum(2 * sizes - 1) - (2 * sizes - 1)
        forest = cls(
            roots,
            np.empty(places, np.int64),
            np.zeros(places, np.int64),
            np.empty(places),
            np.empty(places),
            np.empty(places),
            np.empty(places, np.int64),
            np.empty(places, np.int64),
        )
        forest.starts[roots] = np.cumsum(sizes) - sizes
        forest.sizes[roots] = sizes
        forest.births[roots] = birth
        return forest

    def divide(self, node: int, sizes: Int64Array) -> None:
        """Make nodes of the parts of a node, which lie in its run in this order."""
        places = node + 1 + np.cumsum(2 * sizes - 1) - (2 * sizes - 1)
        self.starts[places] = self.starts[node] + np.cumsum(sizes) - sizes
        self.sizes[places] = sizes
        self.births[places] = max(self.births[node], self.cuts[node])

    def parts_of(self, nodes: Int64Array, largest_cut: float) -> Int64Array:
        """Nodes directly below those of the given ones that were cut."""
        parts: list[int] = []
        for node in nodes[(self.sizes[nodes] > 1) & (self.cuts[nodes] <= largest_cut)]:
            place, end = int(node) + 1, int(self.starts[node] + self.sizes[node])
            while True:
                parts.append(place)
                if self.starts[place] + self.sizes[place] == end:
                    break
                place += 2 * int(self.sizes[place]) - 1
        return np.array(parts, np.int64)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Regions that occurred in at least one partition.

    Attributes
    ----------
    tokens
        int32, the tokens of the regions, one region after the other.
    ends
        (m,) int64: where each region's tokens end.
    multiplicity
        (m,) int64: in how many partitions the region occurred.
    partitions
        How many there were.
    n_tokens
        N, of the image.
    """

    tokens: TokenArray
    ends: Int64Array
    multiplicity: Int64Array
    partitions: int
    n_tokens: int

    @classmethod
    def from_masks(cls, masks: BoolArray, multiplicity: npt.ArrayLike, partitions: int) -> Candidates:
        """Candidates from (m, N) bool masks."""
        tokens, ends = _tokens_of_masks(masks)
        return cls(tokens, ends, np.asarray(multiplicity, np.int64), partitions, masks.shape[1])

    def __len__(self) -> int:
        return self.ends.size

    @property
    def masks(self) -> BoolArray:
        """(m, N) bool: made when asked for, as they take far more room than the lists of tokens."""
        masks = np.zeros((len(self), self.n_tokens), bool)
        masks[np.repeat(np.arange(len(self)), np.diff(self.ends, prepend=0)), self.tokens] = True
        return masks

    def votes(self, masks: BoolArray) -> Float64Array:
        """Summed IoU of each mask with all regions of all partitions, per partition.

        Parameters
        ----------
        masks
            (n, N) bool.

        Returns
        -------
        (n,) float64 array in [0, 1]
            1 for a region that every partition holds.
        """
        return self._votes(*_tokens_of_masks(masks))

    def own_votes(self) -> Float64Array:
        """(m,) votes of the regions themselves."""
        return self._votes(self.tokens, self.ends)

    def own_residuals(self, position: npt.NDArray[np.floating], grid: tuple[int, int]) -> Float64Array:
        """(m,) residuals of the regions themselves, see :func:`position_residuals`."""
        return _residuals(self.tokens, self.ends, position, grid, self.n_tokens)

    def _votes(self, tokens: TokenArray, ends: Int64Array) -> Float64Array:
        summed = regions.summed_overlap(self.tokens, self.ends, self.multiplicity, tokens, ends, self.n_tokens)
        return np.asarray(np.clip(summed / max(self.partitions, 1), 0, 1))


def _tokens_of_masks(masks: BoolArray) -> tuple[TokenArray, Int64Array]:
    masks = np.asarray(masks, bool)
    tokens = [np.flatnonzero(mask) for mask in masks]
    ends = np.cumsum([len(t) for t in tokens], dtype=np.int64)
    return np.concatenate([np.empty(0, np.int32), *tokens]).astype(np.int32), ends


def position_residuals(masks: BoolArray, position: npt.NDArray[np.floating], grid: tuple[int, int]) -> Float64Array:
    """How far masks are from being one whole object each, by what their tokens say of their place in it.

    In the box of a mask every token has a place, x and y from -0.5 to 0.5. The tokens of one whole object say just
    that; those of a part have places on one side, those of two objects say everything twice, and those of no object
    say anything.

    Parameters
    ----------
    masks
        (n, N) bool.
    position
        (N, 2) array: x and y that each token says (:meth:`sparsespec.directions.Directions.position_of`).
    grid
        (h, w), h w = N.

    Returns
    -------
    (n,) float64 array
        Mean squared distance of the two, over the mask's tokens. 0 for a mask without any; up to 1/6 where the tokens
        say nothing at all.

    Raises
    ------
    ValueError
        The grid or ``position`` doesn't fit, or ``position`` isn't finite.
    """
    return _residuals(*_tokens_of_masks(masks), position, grid, np.shape(masks)[1])


def _residuals(
    tokens: TokenArray,
    ends: Int64Array,
    position: npt.NDArray[np.floating],
    grid: tuple[int, int],
    n_tokens: int,
) -> Float64Array:
    position = np.asarray(position, np.float64)
    if position.shape != (n_tokens, 2) or not np.isfinite(position).all():
        raise ValueError(
            f"position must be finite and of shape ({n_tokens}, 2), one row for each token; its shape is "
            f"{position.shape}"
        )
    _, width = check_grid(grid, n_tokens)
    across, down = np.ascontiguousarray(position.T)
    return np.asarray(positions.residuals(tokens, ends, across, down, width))


def propose(
    maps: Sequence[tuple[npt.NDArray[np.floating], Sequence[float]]],
    cutter: RegionCutter,
    *,
    cut_thresholds: Sequence[float],
    min_tokens: int = 2,
) -> Candidates:
    """Cut the foreground at every threshold into regions, recursively, and count how often each region occurs.

    For every objectness map and every threshold on it, each connected part of the foreground is split along the sweep
    cut of its Fiedler vector with the smallest normalised cut, cut(A, B) / vol(A) + cut(A, B) / vol(B) (Shi and Malik,
    2000, equation 2), for as long as that is at most a cut threshold. One pass serves all cut thresholds, since a lower
    one only stops earlier on the same path.

    Parameters
    ----------
    maps
        Pairs of an objectness map, (N,) array, and the thresholds to take on it.
    cutter
        The graph.
    cut_thresholds
        Largest normalised cut that is still made; one partition for each. For a region of given shape the value falls
        as one over the number of tokens along its side.
    min_tokens
        Smaller regions are left out.

    Returns
    -------
    Candidates
    """
    levels = np.sort(np.asarray(cut_thresholds, dtype=np.float64))
    values = [np.asarray(v, dtype=np.float64).ravel() for v, _ in maps]
    thresholds = [np.asarray(t, dtype=np.float64).ravel() for _, t in maps]
    tokens, ends, multiplicity = cutter.count_regions(values, thresholds, levels, min_tokens)
    partitions = levels.size * sum(t.size for t in thresholds)
    return Candidates(tokens, ends, multiplicity, partitions, cutter.grid[0] * cutter.grid[1])


def select(
    candidates: Candidates,
    *,
    merit: Float64Array | None = None,
    min_merit: float = 0.36,
    min_free: float = 0.8,
    n_instances: int | None = None,
) -> BoolArray:
    """Take regions by falling merit as long as they are mostly free, and give each what is free of it.

    Parameters
    ----------
    candidates
        From :func:`propose`.
    merit
        (m,) finite numbers; the votes of the regions where it isn't given.
    min_merit
        Regions with less are not taken: this alone decides how many instances there are.
    min_free
        Share of a region that no better one has taken.
    n_instances
        Take so many, whatever their merit, if there are as many.

    Returns
    -------
    (n, N) bool array
        Disjoint masks, by falling merit.

    Raises
    ------
    ValueError
        ``merit`` has another shape or isn't finite.
    """
    merit = candidates.own_votes() if merit is None else np.asarray(merit, np.float64)
    if merit.shape != (len(candidates),) or not np.isfinite(merit).all():
        raise ValueError(f"merit must be finite and of shape ({len(candidates)},), one number for each region")
    sequence = np.argsort(-merit, kind="stable")
    wanted = -1 if n_instances is None else n_instances
    if n_instances is None:
        sequence = sequence[merit[sequence] >= min_merit]
    owner, count = regions.take_free(
        candidates.tokens, candidates.ends, sequence, float(min_free), wanted, candidates.n_tokens
    )
    return np.asarray(owner == np.arange(count)[:, None], bool).reshape(-1, candidates.n_tokens)


def split_until(masks: BoolArray, n_instances: int, cutter: RegionCutter) -> BoolArray:
    """Split masks along their smallest normalised cuts until there are as many as wanted.

    Where there is no mask to start from, or all are single tokens, the rest of the image is split as well.

    Parameters
    ----------
    masks
        (n, N) bool, disjoint, n <= n_instances.
    n_instances
        At most N.
    cutter
        The graph.

    Returns
    -------
    (n_instances, N) bool array
        Disjoint.

    Raises
    ------
    ValueError
        When more instances are wanted than there are tokens.
    """
    n_tokens = masks.shape[1]
    if n_instances > n_tokens:
        raise ValueError(f"n_instances is {n_instances}, but the image has only {n_tokens} tokens")
    regions = [cutter.tokens_of(mask) for mask in masks]
    while len(regions) < n_instances:
        # By cut, then by when the region arose: the order doesn't depend on the contents of arrays.
        heap: list[tuple[float, int, TokenArray, TokenArray]] = []
        serial = 0
        done: list[TokenArray] = []
        pending = list(regions)
        while pending or heap:
            for region in pending:
                if region.size < 2:
                    done.append(region)
                    continue
                parts = cutter.components(region)
                if len(parts) > 1:
                    value, left, right = 0.0, parts[0], np.sort(np.concatenate(parts[1:]))
                else:
                    value, left, right = cutter.cut(region)
                heapq.heappush(heap, (value, serial, left, right))
                serial += 1
            pending = []
            if not heap or len(done) + len(heap) >= n_instances:
                break
            _, _, left, right = heapq.heappop(heap)
            pending = [left, right]
        regions = done + [np.sort(np.concatenate(row[2:])) for row in heap]
        if len(regions) < n_instances:
            taken = np.zeros(n_tokens, bool)
            taken[[token for region in regions for token in region]] = True
            regions.append(np.flatnonzero(~taken).astype(np.int32))
    return np.array([cutter.mask_of(region) for region in regions], bool)
