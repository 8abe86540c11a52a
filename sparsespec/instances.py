"""How many objects, and which token is whose: recursive normalised cuts over many thresholds, and their consensus."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import label
from scipy.sparse import csr_array

from sparsespec._checks import check_grid
from sparsespec._kernels import cuts as kernels
from sparsespec.spectral import smallest_eigenpairs

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
TokenArray = npt.NDArray[np.int32]

# Up to here a region's Fiedler vector comes from a band factorisation inside the kernel; multigrid takes over where the
# band, tokens x short side of the grid, would no longer fit the caches.
LARGE_REGION = 16_384
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


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
        Regions of more tokens are solved by :func:`sparsespec.spectral.smallest_eigenpairs`.

    Raises
    ------
    ValueError
        When the grid doesn't hold N tokens, or a weight isn't positive.
    """

    def __init__(
        self,
        affinity: csr_array,
        grid: tuple[int, int],
        *,
        tolerance: float = 1e-2,
        large_region: int = LARGE_REGION,
    ) -> None:
        n = affinity.shape[0]
        height, width = check_grid(grid, n)
        if affinity.nnz and not affinity.data.min() > 0:
            raise ValueError(f"affinity must have positive weights; its smallest is {affinity.data.min()}")
        # The band of the factorisation is as wide as the axis that runs fastest: let it be the short one.
        order = np.arange(n).reshape(height, width)
        self._order = order.T.ravel() if width > height else order.ravel()
        self._rank = np.empty(n, np.int32)
        self._rank[self._order] = np.arange(n, dtype=np.int32)
        graph = csr_array(affinity)[self._order][:, self._order].tocsr()
        graph.sort_indices()
        self._graph = graph
        self._csr = (graph.indptr.astype(np.int32), graph.indices.astype(np.int32), graph.data.astype(np.float64))
        self._local = np.full(n, -1, np.int32)
        self._tolerance = tolerance
        self._large_region = large_region
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
        ordered, ends = kernels.components(*self._csr[:2], tokens)
        return np.split(ordered, ends[:-1])

    def cut(self, tokens: TokenArray) -> tuple[float, TokenArray, TokenArray]:
        """Smallest normalised cut found for a connected region, and its two sides."""
        self.record.cuts += 1
        if tokens.size > self._large_region:
            pairs = smallest_eigenpairs(self._graph[tokens][:, tokens], k=min(3, tokens.size))
            self.record.iterations += pairs.iterations
            self.record.large += 1
            residual = float(pairs.residuals.max())
            vectors = np.ascontiguousarray(pairs.random_walk_vectors()[:, 1:].T)
            value, order, position = kernels.sweep_region(*self._csr, tokens, self._local, vectors)
        else:
            value, order, position, _, residual, ran = kernels.cut_region(
                *self._csr, tokens, self._local, self._tolerance
            )
            self.record.iterations += int(ran)
        self.record.largest_residual = max(self.record.largest_residual, float(residual))
        return float(value), np.sort(tokens[order[:position]]), np.sort(tokens[order[position:]])

    def fiedler_value(self, tokens: TokenArray) -> tuple[float, float]:
        """Second smallest eigenvalue of a region's Laplacian, and its residual: how firmly the region hangs together.

        0 for a region in several parts; for a single token, which nothing can divide, 2, the largest there is.
        """
        if tokens.size < 2:
            return 2.0, 0.0
        if len(self.components(tokens)) > 1:
            return 0.0, 0.0
        if tokens.size > self._large_region:
            pairs = smallest_eigenpairs(self._graph[tokens][:, tokens], k=2)
            return float(pairs.values[1]), float(pairs.residuals[1])
        _, _, _, value, residual, _ = kernels.cut_region(*self._csr, tokens, self._local, self._tolerance)
        return float(value), float(residual)

    def tree(
        self, tokens: TokenArray, largest_cut: float, birth: float = 0.0
    ) -> Iterator[tuple[TokenArray, float, float]]:
        """All regions that recursive cuts make of a region, its connected parts first, each with its thresholds.

        Yields
        ------
        tokens, birth, cut
            The region is part of the partition at threshold t if birth <= t < cut.
        """
        if tokens.size > self._large_region:
            # A stack of our own: where cuts peel off a little at a time, the interpreter's would overflow.
            pending = [(part, birth) for part in reversed(self.components(tokens))]
            while pending:
                region, region_birth = pending.pop()
                if region.size <= self._large_region:
                    yield from self.tree(region, largest_cut, region_birth)
                    continue
                value, *sides = self.cut(region)
                yield region, region_birth, value
                if value <= largest_cut:
                    parts = [part for side in sides for part in self.components(side)]
                    pending.extend((part, max(region_birth, value)) for part in reversed(parts))
            return
        runs, starts, ends, births, values, residual, iterations = kernels.split_tree(
            *self._csr, tokens, birth, largest_cut, self._tolerance
        )
        self.record.cuts += starts.size
        self.record.iterations += int(iterations)
        self.record.largest_residual = max(self.record.largest_residual, float(residual))
        for start, end, region_birth, value in zip(starts, ends, births, values, strict=True):
            yield np.sort(runs[start:end]), float(region_birth), float(value)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Regions that occurred in at least one partition.

    Attributes
    ----------
    masks
        (m, N) bool, no two rows equal.
    multiplicity
        (m,) int64: in how many partitions the region occurred.
    partitions
        How many there were.
    """

    masks: BoolArray
    multiplicity: npt.NDArray[np.int64]
    partitions: int

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
        if not self.multiplicity.size:
            return np.zeros(len(masks))
        # Most regions have nothing in common: sparse, this takes seconds less on grids of ten thousand tokens.
        shared = (csr_array(masks, dtype=np.float32) @ csr_array(self.masks, dtype=np.float32).T).tocoo()
        sizes, region_sizes = masks.sum(axis=1), self.masks.sum(axis=1)
        row, column = shared.coords
        overlap = shared.data / (sizes[row] + region_sizes[column] - shared.data.astype(np.float64))
        votes = np.bincount(row, overlap * self.multiplicity[column], minlength=len(masks))
        return np.asarray(np.clip(votes / max(self.partitions, 1), 0, 1))


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
    found: dict[bytes, int] = {}
    trees: dict[bytes, list[tuple[bytes, int]]] = {}
    partitions = 0
    for values, thresholds in maps:
        for threshold in thresholds:
            partitions += levels.size
            parts, count = label((np.asarray(values) > threshold).reshape(cutter.grid), _EIGHT_NEIGHBOURS)
            for part in range(1, count + 1):
                region = cutter.tokens_of(parts.ravel() == part)
                if region.size < min_tokens:
                    continue
                key = region.tobytes()
                if key not in trees:
                    trees[key] = [
                        (tokens.tobytes(), int(np.count_nonzero((birth <= levels) & (levels < cut))))
                        for tokens, birth, cut in cutter.tree(region, float(levels[-1]))
                        if tokens.size >= min_tokens
                    ]
                for region_key, times in trees[key]:
                    if times:
                        found[region_key] = found.get(region_key, 0) + times
    masks = [cutter.mask_of(np.frombuffer(key, np.int32)) for key in found]
    n_tokens = cutter.grid[0] * cutter.grid[1]
    return Candidates(
        np.array(masks, bool).reshape(-1, n_tokens), np.fromiter(found.values(), np.int64, len(found)), partitions
    )


def select(
    candidates: Candidates,
    *,
    min_votes: float = 0.36,
    min_free: float = 0.8,
    n_instances: int | None = None,
) -> BoolArray:
    """Take regions by falling votes as long as they are mostly free, and give each what is free of it.

    Parameters
    ----------
    candidates
        From :func:`propose`.
    min_votes
        Regions with fewer are not taken: this alone decides how many instances there are.
    min_free
        Share of a region that no better one has taken.
    n_instances
        Take so many, whatever their votes, if there are as many.

    Returns
    -------
    (n, N) bool array
        Disjoint masks, by falling votes.
    """
    n_tokens = candidates.masks.shape[1]
    free = np.ones(n_tokens, bool)
    votes = candidates.votes(candidates.masks)
    masks: list[BoolArray] = []
    for row in np.argsort(-votes, kind="stable"):
        if len(masks) == n_instances or (n_instances is None and votes[row] < min_votes):
            break
        mask = candidates.masks[row]
        if np.count_nonzero(mask & free) >= min_free * np.count_nonzero(mask):
            masks.append(mask & free)
            free &= ~mask
    return np.array(masks, bool).reshape(-1, n_tokens)


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
