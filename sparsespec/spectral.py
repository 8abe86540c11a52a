"""The normalised Laplacian of an affinity and its smallest eigenpairs, each with its residual.

For an affinity W with degrees d = W 1 the Laplacian is L = I - D^-1/2 W D^-1/2 (Shi and Malik, "Normalized cuts and
image segmentation", PAMI 2000, equation 7; von Luxburg, "A tutorial on spectral clustering", 2007, section 3.2). Its
eigenvectors u order the tokens along the cheapest cuts, and D^-1/2 u are the generalised eigenvectors of (D - W, D).
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy import sparse
from scipy.sparse.csgraph import breadth_first_order, connected_components
from scipy.sparse.linalg import LinearOperator

from sparsespec import _eigensolvers
from sparsespec._checks import check_count
from sparsespec._eigensolvers import DidNotConvergeError, Float64Array, Proposal

__all__ = [
    "EigenSolverError",
    "Eigenpairs",
    "LowRankAffinity",
    "ThresholdedAffinity",
    "laplacian",
    "smallest_eigenpairs",
]

SOLVERS = ("auto", "amg-lobpcg", "arpack", "dense", "gram", "sampled-lobpcg", "shift-invert")

# What "auto" does with a connected part, by measurement. Lanczos takes 13 (grids) to 27 (nearest neighbours over all
# tokens) products with the matrix for every hop that a graph is deep, multigrid 5 to 20 cycles whatever the depth.
# Depth: hops from a token furthest from the first one to the token furthest from it.
# Six pairs, residual 1e-5, real photographs but for the last line, two cores; docs/benchmarks.md has more of it.
#
#     graph                                    tokens   depth   arpack: products, ms   amg-lobpcg: iterations, ms
#     nearest 20 over all tokens                  768      10          136       7              8      11
#                                               4,096      10          213      37              9      64
#                                              16,384       9          252     145             13     336
#     nearest 10 over all tokens               16,384      12          310     148             11     510
#                                              30,600      21          577     533             17   2,024
#     1 row and column                          4,096      63          834     135              8      44
#                                              16,384     127        1,347   1,183              7     105
#     nearest 8 of 3 rows and columns          16,384      97        2,394   2,620              8     163
#     random links in clusters                  4,000       5          274      40             59     235
#
# So: dense while it costs nothing; shift and invert where that is sure to be cheap, see below; ARPACK where no token is
# far from another; multigrid elsewhere, and where ARPACK hasn't finished after so many restarts (about ten products
# each), as on weak links that hops don't show.
_DENSE_UP_TO = 256
_ARPACK_DEPTH = 50
_ARPACK_RESTARTS = 100
# Shift and invert needs some 40 solves whatever the gaps. The factors hold 4 to 6 times the entries of the matrix where
# few tokens separate its parts, but 14 to 40 times where links go anywhere: a graph that is d hops deep falls apart
# when about N / d tokens are taken out. Five pairs, on one core, in ms:
#
#     graph                                    tokens   N / depth   shift-invert   arpack   amg-lobpcg
#     1 row and column, photograph                768          25            2.4     17.4          8.9
#     nearest 8 of 3 rows and columns             768          48            4.5      7.0          9.7
#     nearest 10 in the plane                     768          48            3.9      7.2          9.0
#     1 row and column                          4,096          65           14.2        -         36.7
#     3 rows and columns                          768          70            6.0      5.5         11.1
#     nearest 20 over all tokens                  768         192           25.3      5.7         14.4
_INVERT_UP_TO = 4096
_INVERT_WIDTH = 64
# Beyond this a dense matrix is no longer a fallback: 4,096 tokens take 0.4 GB and seconds.
_DENSE_FALLBACK_UP_TO = 4096

# Solvers aim this far below the tolerance that certifies their work: what counts for a vector is the residual against
# the gap to the next eigenvalue, and the last two digits cost a few iterations.
_AIM = 0.01
_SYMMETRY_TOLERANCE = 1e-5
_ROWS_AT_A_TIME = 1 << 16
# Side of the tiles of an affinity that isn't formed (1 MB each), and size of the sample that its solution starts from.
_TILE = 512
_SAMPLE = 512


class EigenSolverError(RuntimeError):
    """No solver reached the tolerance.

    Attributes
    ----------
    residuals
        The residuals (m,) of the pairs beside the null vector, by solver, in the order in which they were tried; empty
        for a solver that gave up without a vector.
    """

    def __init__(self, message: str, residuals: dict[str, Float64Array]) -> None:
        super().__init__(message)
        self.residuals = residuals

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.residuals)


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """The k smallest eigenpairs of a symmetric normalised Laplacian.

    Attributes
    ----------
    values
        (k,) float64, ascending.
    vectors
        (N, k) float64, orthonormal columns. In each, the entry of largest magnitude is positive; entries within one
        percent of the largest count as equal, and the lowest index wins.
    residuals
        (k,) float64, ||L u - lambda u||_2.
    solver
        What ran on the largest connected part that needed a solver: one of the solvers of :func:`smallest_eigenpairs`;
        "components" if the connected parts alone were the answer.
    iterations
        The most that any part took: iterations of LOBPCG, products with the matrix or its inverse for Lanczos, 0 for
        direct solvers.
    degrees
        (N,) float64, the row sums of the affinity.
    """

    values: Float64Array
    vectors: Float64Array
    residuals: Float64Array
    solver: str
    iterations: int
    degrees: Float64Array

    def random_walk_vectors(self) -> Float64Array:
        """Return D^-1/2 u, the generalised eigenvectors v of (D - W) v = lambda D v used by normalised cuts.

        They are also the eigenvectors of the random walk D^-1 W, with eigenvalue 1 - lambda; v' D v = 1. On a connected
        part the one with eigenvalue 0 is constant. An isolated token keeps its entry of u.

        Returns
        -------
        ndarray
            (N, k) float64.
        """
        scale = np.sqrt(np.where(self.degrees > 0, self.degrees, 1.0))
        return self.vectors / scale[:, None]


def _real_rows(features: npt.ArrayLike) -> npt.NDArray[Any]:
    array = np.asarray(features)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiub":
        raise ValueError(
            "features must be an (N, C) array of real numbers with N, C >= 1; "
            f"its shape is {array.shape} and its dtype {array.dtype}"
        )
    return array


class LowRankAffinity:
    """The affinity W = F F' of all pairs of tokens, never formed.

    A product with it costs O(N C), and :func:`smallest_eigenpairs` takes O(N C^2). Unlike the affinities given as
    matrices it may have negative entries, as cosines have, so long as each token's degree is positive. Its Laplacian
    may then have negative eigenvalues; the vector D^1/2 1 has eigenvalue 0, but need not come first.

    Parameters
    ----------
    features
        (N, C) real numbers; a copy is kept as float64. A row of zeros is an isolated token.

    Raises
    ------
    ValueError
        Not two-dimensional, empty, not finite, or a row that isn't zero has a degree that isn't positive.

    Attributes
    ----------
    features
        (N, C) float64.
    degrees
        (N,) float64, F (F' 1).
    shape
        (N, N).
    """

    def __init__(self, features: npt.ArrayLike) -> None:
        array = _real_rows(features)
        self.features: Float64Array = array.astype(np.float64)
        if not np.isfinite(self.features).all():
            raise ValueError("features must be finite; some values are NaN or infinity")
        total = self.features.sum(axis=0)
        self.degrees: Float64Array = self.features @ total
        self._isolated: npt.NDArray[np.bool_] = np.logical_not(self.features.any(axis=1))
        noise = 1e-12 * (np.abs(self.features) @ np.abs(total))
        bad = np.flatnonzero((self.degrees <= noise) & ~self._isolated)
        if bad.size:
            raise ValueError(
                f"features give {bad.size} of {len(array)} tokens a degree that is not positive (token {bad[0]} has "
                f"{self.degrees[bad[0]]:.3g}): the sum of a token's similarities must be positive, or its row zero"
            )
        self.shape = (len(array), len(array))

    def laplacian(self) -> LinearOperator:
        """Return the normalised Laplacian as an operator; rows of isolated tokens are zero."""
        scale = np.sqrt(np.where(self._isolated, 1.0, self.degrees))
        return _GramLaplacian(self.features / scale[:, None], np.logical_not(self._isolated))


class _GramLaplacian(LinearOperator):
    """I - B B', with zero rows where ``linked`` is False."""

    def __init__(self, scaled: Float64Array, linked: npt.NDArray[np.bool_]) -> None:
        super().__init__(np.float64, (len(scaled), len(scaled)))
        self.scaled = scaled
        self.linked = linked

    def _matmat(self, x: Float64Array) -> Float64Array:
        return self.linked[:, None] * x - self.scaled @ (self.scaled.T @ x)

    def _matvec(self, x: Float64Array) -> Float64Array:
        return self._matmat(np.reshape(x, (-1, 1)))

    def _adjoint(self) -> _GramLaplacian:
        return self


class ThresholdedAffinity:
    """The affinity W = max(F F', 0) of all pairs of tokens, never formed: tiles of it, of bounded size, come and go.

    A product with it costs O(N^2 C) in single precision, whatever the number of columns up to about C / 4, and O(N C)
    memory. :func:`smallest_eigenpairs` starts from the eigenvectors of a sample of the tokens, carried over to all by
    Nystrom's formula (Fowlkes, Belongie, Chung, Malik, PAMI 2004), and needs a handful of products to certify and
    correct them.

    Parameters
    ----------
    features
        (N, C) real numbers; a copy is kept as float32, divided by the largest magnitude, which changes no eigenvector.
        A row of zeros is an isolated token.

    Raises
    ------
    ValueError
        Not two-dimensional, empty, or not finite.

    Attributes
    ----------
    features
        (N, C) float32, of magnitude at most 1.
    degrees
        (N,) float64, the row sums of max(F F', 0) for these features.
    shape
        (N, N).
    """

    def __init__(self, features: npt.ArrayLike) -> None:
        array = _real_rows(features)
        largest = float(np.abs(array).max())
        if not np.isfinite(largest):
            raise ValueError("features must be finite; some values are NaN or infinity")
        self.features: npt.NDArray[np.float32] = np.asarray(array / (largest or 1.0), np.float32)
        self.shape = (len(array), len(array))
        self.degrees: Float64Array = _thresholded_product(self.features, np.ones((len(array), 1)))[:, 0]

    def laplacian(self) -> LinearOperator:
        """Return the normalised Laplacian as an operator; rows of isolated tokens are zero."""
        return _ThresholdedLaplacian(self.features, self.degrees)

    def _links(self) -> Any:
        """Link every token to the first of its connected part."""
        n = len(self.features)
        hub = np.full(n, -1)
        for first in range(n):
            if hub[first] >= 0:
                continue
            hub[first] = first
            unseen = np.flatnonzero(hub < 0)
            frontier = np.array([first])
            while len(frontier) and len(unseen):
                # Enough of the frontier at a time to reach most tokens, which needn't be asked about again.
                some, frontier = frontier[:_TILE], frontier[_TILE:]
                reached = np.zeros(len(unseen), bool)
                for start in range(0, len(unseen), _TILE):
                    part = unseen[start : start + _TILE]
                    reached[start : start + _TILE] = ((self.features[part] @ self.features[some].T) > 0).any(axis=1)
                hub[unseen[reached]] = first
                frontier = np.concatenate([frontier, unseen[reached]])
                unseen = unseen[~reached]
        return sparse.csr_array((np.ones(n), (hub, np.arange(n))), shape=self.shape)


class _ThresholdedLaplacian(LinearOperator):
    """I - D^-1/2 max(F F', 0) D^-1/2, with zero rows where the degree is zero."""

    def __init__(self, features: npt.NDArray[np.float32], degrees: Float64Array) -> None:
        super().__init__(np.float64, (len(features), len(features)))
        self.features, self.degrees = features, degrees
        self.scale = 1.0 / np.sqrt(np.where(degrees > 0, degrees, 1.0))

    def _matmat(self, x: Float64Array) -> Float64Array:
        product = _thresholded_product(self.features, self.scale[:, None] * x)
        return (self.degrees > 0)[:, None] * x - self.scale[:, None] * product

    def _matvec(self, x: Float64Array) -> Float64Array:
        return self._matmat(np.reshape(x, (-1, 1)))

    def _adjoint(self) -> _ThresholdedLaplacian:
        return self

    def start(self, width: int) -> Float64Array:
        """Return about ``width`` vectors (N, width): those of an evenly spaced sample, carried over to all tokens."""
        n = len(self.features)
        sample = np.arange(min(n, _SAMPLE)) * n // min(n, _SAMPLE)
        chosen = self.features[sample]
        weights = np.maximum(chosen @ chosen.T, 0).astype(np.float64)
        degrees = weights.sum(axis=1)
        root = np.sqrt(np.where(degrees > 0, degrees, 1.0))
        count = min(width + 1, len(sample))
        _, vectors = scipy.linalg.eigh(
            weights / np.outer(root, root), subset_by_index=(len(sample) - count, len(sample) - 1)
        )
        vectors = vectors[:, ::-1][:, 1:] / root[:, None]
        out = np.empty((n, vectors.shape[1]))
        for first in range(0, n, _TILE):
            tile = np.maximum(self.features[first : first + _TILE] @ chosen.T, 0)
            out[first : first + _TILE] = tile @ vectors
        return out * self.scale[:, None]


def _thresholded_product(features: npt.NDArray[np.float32], x: Float64Array) -> Float64Array:
    """Compute max(F F', 0) x for x (N, columns), tile by tile above the diagonal; each serves its mirror image too."""
    n = len(features)
    out = np.zeros(x.shape)
    single = x.astype(np.float32)
    for top in range(0, n, _TILE):
        rows = slice(top, min(top + _TILE, n))
        for left in range(top, n, _TILE):
            columns = slice(left, min(left + _TILE, n))
            tile = features[rows] @ features[columns].T
            np.maximum(tile, 0, out=tile)
            out[rows] += tile @ single[columns]
            if left > top:
                out[columns] += tile.T @ single[rows]
    return out


def laplacian(affinity_matrix: Any) -> Any:
    """Compute the symmetric normalised Laplacian L = I - D^-1/2 W D^-1/2.

    A self loop counts in its token's degree. A token of degree 0 is isolated: its row and column of L are zero, which
    makes it a connected part of its own, with eigenvalue 0.

    Parameters
    ----------
    affinity_matrix
        (N, N) SciPy sparse matrix or array of any format, ndarray, :class:`LowRankAffinity` or
        :class:`ThresholdedAffinity`. A matrix must be symmetric to within 1e-5 of its largest entry (the mean with its
        transpose is used) and not negative. It isn't changed.

    Returns
    -------
    csr_array, ndarray or LinearOperator
        (N, N) float64, as sparse as the input; an operator for an affinity that isn't formed.

    Raises
    ------
    ValueError
        Not square, empty, not symmetric, or an entry is complex, NaN, infinite or negative.

    Examples
    --------
    >>> import numpy as np
    >>> laplacian(np.array([[0.0, 2.0], [2.0, 0.0]]))
    array([[ 1., -1.],
           [-1.,  1.]])
    """
    return _read(affinity_matrix).laplacian


def smallest_eigenpairs(affinity_matrix: Any, k: int, solver: str = "auto", tol: float = 1e-4) -> Eigenpairs:
    """Compute the k smallest eigenpairs of the symmetric normalised Laplacian of an affinity.

    The connected parts come first. Each has the eigenvalue 0 with the vector D^1/2 1 on its tokens, exactly; parts with
    more tokens come before smaller ones, then those with the lower first token. If they don't make up k pairs, each
    part's further pairs are solved for on their own and the smallest are taken. A vector is therefore zero outside one
    part. Within a repeated eigenvalue any orthonormal basis is as good as another; the one returned is always the same.

    Every solution is certified by its residuals: where they exceed ``tol`` the next solver is tried, also when
    ``solver`` names one. A solver is passed over where it can't work (LOBPCG needs five tokens for each pair; tiny
    parts are always solved densely). ``Eigenpairs.solver`` says what gave the answer.

    Parameters
    ----------
    affinity_matrix
        (N, N) SciPy sparse matrix or array of any format, ndarray, :class:`LowRankAffinity` or
        :class:`ThresholdedAffinity`; see :func:`laplacian`. It isn't changed.
    k
        1 to N.
    solver
        "auto"; "dense", O(N^3); "arpack", Lanczos on 2I - L; "amg-lobpcg", whose iterations don't grow with the size of
        a grid; "shift-invert", Lanczos on the inverse, for a matrix whose factors stay sparse; "gram", for a
        :class:`LowRankAffinity` only, and "sampled-lobpcg", for a :class:`ThresholdedAffinity` only (neither of which
        "amg-lobpcg" and "shift-invert" can take).
    tol
        Largest residual ||L u - lambda u||_2 that is accepted. Solvers aim a hundred times lower.

    Returns
    -------
    Eigenpairs
        The same bytes for the same input, whatever the state of NumPy's global random numbers.

    Raises
    ------
    ValueError
        ``affinity_matrix`` as in :func:`laplacian`; ``k``, ``solver`` or ``tol`` isn't one of those above.
    EigenSolverError
        No solver reached ``tol``.

    Examples
    --------
    A path of three tokens has the eigenvalues 0, 1 and 2:

    >>> import numpy as np
    >>> pairs = smallest_eigenpairs(np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), 2)
    >>> pairs.values
    array([0., 1.])
    """
    k = check_count(k, name="k")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, not {solver!r}")
    number: Any = tol
    if not isinstance(number, numbers.Real) or not 0 < tol < np.inf:
        raise ValueError(f"tol must be a positive number, not {tol!r}")
    low_rank = isinstance(affinity_matrix, LowRankAffinity)
    if solver == "gram" and not low_rank:
        raise ValueError("solver 'gram' is for a LowRankAffinity; use auto, amg-lobpcg, arpack or dense for a matrix")
    if solver in ("amg-lobpcg", "shift-invert") and low_rank:
        raise ValueError(f"solver {solver!r} needs a matrix; use auto, gram, arpack or dense for a LowRankAffinity")
    thresholded = isinstance(affinity_matrix, ThresholdedAffinity)
    if solver == "sampled-lobpcg" and not thresholded:
        raise ValueError("solver 'sampled-lobpcg' is for a ThresholdedAffinity; use auto, amg-lobpcg, arpack or dense")
    if solver in ("amg-lobpcg", "shift-invert") and thresholded:
        raise ValueError(f"solver {solver!r} needs a matrix; use auto, arpack or dense for a ThresholdedAffinity")
    graph = _read(affinity_matrix)
    n = len(graph.degrees)
    if k > n:
        raise ValueError(f"k must be at most the {n} tokens of affinity_matrix, not {k}")

    n_parts, label = connected_components(graph.links, directed=False)
    sizes = np.bincount(label, minlength=n_parts)
    # Components are numbered by their first token.
    order = np.argsort(-sizes, kind="stable")

    values = [np.zeros(min(k, n_parts))]
    vectors = [_null_vectors(graph.degrees, label, order[:k])]
    ran, iterations = "components", 0
    # With k parts or more there's nothing to solve, so the loop never runs over many.
    for part in order if n_parts < k else ():
        count = min(k - n_parts, sizes[part] - 1)
        if count == 0:
            break
        members = np.flatnonzero(label == part)
        found = _solve(graph, members, int(count), solver, float(tol))
        values.append(found.values)
        vectors.append(np.zeros((n, count)))
        vectors[-1][members] = found.vectors
        if ran == "components":
            ran = found.solver
        iterations = max(iterations, found.iterations)

    chosen = np.argsort(np.concatenate(values), kind="stable")[:k]
    value = np.concatenate(values)[chosen]
    vector = np.concatenate(vectors, axis=1)[:, chosen]
    vector = vector * _signs(vector)
    residual = np.linalg.norm(graph.laplacian @ vector - vector * value, axis=0)
    return Eigenpairs(value, vector, residual, ran, iterations, graph.degrees)


@dataclass(frozen=True, eq=False)
class _Graph:
    laplacian: Any
    degrees: Float64Array
    # (N, N) sparse, with an entry wherever two tokens are linked.
    links: Any
    # Not positive semidefinite, if so.
    signed: bool = False

    def part(self, members: npt.NDArray[np.intp]) -> Any:
        if len(members) == len(self.degrees):
            return self.laplacian
        if isinstance(self.laplacian, _GramLaplacian):
            return _GramLaplacian(self.laplacian.scaled[members], self.laplacian.linked[members])
        if isinstance(self.laplacian, _ThresholdedLaplacian):
            return _ThresholdedLaplacian(self.laplacian.features[members], self.degrees[members])
        if not sparse.issparse(self.laplacian):
            return self.laplacian[members][:, members]
        # All that these tokens are linked to is among them.
        rows = self.laplacian[members]
        number = np.empty(len(self.degrees), rows.indices.dtype)
        number[members] = np.arange(len(members))
        return sparse.csr_array((rows.data, number[rows.indices], rows.indptr), shape=(len(members), len(members)))


@dataclass(frozen=True, eq=False)
class _Found:
    values: Float64Array
    vectors: Float64Array
    solver: str
    iterations: int


def _read(affinity_matrix: Any) -> _Graph:
    """Validate an affinity and compute its Laplacian, on a copy."""
    if isinstance(affinity_matrix, LowRankAffinity):
        linked = np.flatnonzero(affinity_matrix.degrees > 0)
        n = len(affinity_matrix.degrees)
        # All linked tokens count as one part: a star around the first of them.
        hub = np.full(len(linked), linked[0] if len(linked) else 0)
        links = sparse.csr_array((np.ones(len(linked)), (hub, linked)), shape=(n, n))
        return _Graph(affinity_matrix.laplacian(), affinity_matrix.degrees.copy(), links, signed=True)
    if isinstance(affinity_matrix, ThresholdedAffinity):
        return _Graph(affinity_matrix.laplacian(), affinity_matrix.degrees.copy(), affinity_matrix._links())
    is_sparse = bool(sparse.issparse(affinity_matrix))
    if not is_sparse:
        affinity_matrix = np.asarray(affinity_matrix)
    shape, kind = affinity_matrix.shape, affinity_matrix.dtype.kind
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"affinity_matrix must be square, (N, N) with N >= 1; its shape is {shape}")
    if kind not in "fiub":
        raise ValueError(f"affinity_matrix must hold real numbers; its dtype is {affinity_matrix.dtype}")
    if is_sparse:
        # Shares the caller's arrays where it can, so nothing below may write to them.
        weights = sparse.csr_array(affinity_matrix)
        if not weights.has_canonical_format:
            weights = weights.copy()
            weights.sum_duplicates()
        weights = sparse.csr_array(
            (weights.data.astype(np.float64, copy=False), weights.indices, weights.indptr), shape=weights.shape
        )
        entries = weights.data
    else:
        weights = entries = affinity_matrix.astype(np.float64)
    _check_entries(entries)
    # The product of two degrees below this would leave float64.
    tiny = np.finfo(np.float64).tiny
    if not is_sparse:
        entries[entries < tiny] = 0.0
    elif entries.min(initial=1.0) < tiny:
        weights = weights.copy()
        weights.data[weights.data < tiny] = 0.0
        weights.eliminate_zeros()
    weights = _symmetrised(weights)
    with np.errstate(over="ignore"):
        degrees = np.asarray(weights.sum(axis=1), dtype=np.float64)
    if not np.isfinite(degrees).all():
        raise ValueError("affinity_matrix has rows whose sum is infinite; divide it by its largest entry")
    return _Graph(_normalised(weights, degrees), degrees, _links(weights))


def _check_entries(entries: Float64Array) -> None:
    # NaN goes through a minimum or maximum.
    smallest, largest = entries.min(initial=0.0), entries.max(initial=0.0)
    if not (np.isfinite(smallest) and np.isfinite(largest)):
        count = np.count_nonzero(~np.isfinite(entries))
        raise ValueError(f"affinity_matrix must be finite; {count} of its entries are NaN or infinity")
    if smallest < 0:
        raise ValueError(f"affinity_matrix must not be negative; its smallest entry is {smallest:.6g}")


def _symmetrised(weights: Any) -> Any:
    if sparse.issparse(weights):
        mirror = weights.T.tocsr()
        same = (
            np.array_equal(mirror.indptr, weights.indptr)
            and np.array_equal(mirror.indices, weights.indices)
            and np.array_equal(mirror.data, weights.data)
        )
        del mirror
        if same:
            return weights
    difference = abs(weights - weights.T)
    largest = difference.max()
    if largest == 0:
        return weights
    if largest > _SYMMETRY_TOLERANCE * weights.max():
        raise ValueError(
            f"affinity_matrix must be symmetric; entries differ from their mirror images by up to {largest:.6g}, with "
            f"entries of at most {weights.max():.6g}"
        )
    mean = 0.5 * weights + 0.5 * weights.T
    if not sparse.issparse(weights):
        return mean
    mean = sparse.csr_array(mean)
    mean.sort_indices()
    return mean


def _normalised(weights: Any, degrees: Float64Array) -> Any:
    linked = degrees > 0
    # An isolated token's row is empty or zero already, so the divisor only has to be something.
    root = np.where(linked, np.sqrt(degrees), 1.0)
    if isinstance(weights, np.ndarray):
        return np.diag(linked.astype(np.float64)) - weights / np.outer(root, root)
    # Some rows at a time: beside the matrix of a million tokens there shouldn't be others of its size.
    n = len(degrees)
    own = weights.diagonal()
    added = linked & (own == 0)
    shift = np.concatenate([[0], np.cumsum(added)])
    indptr = (weights.indptr + shift).astype(weights.indptr.dtype)
    indices = np.empty(indptr[-1], weights.indices.dtype)
    data = np.empty(indptr[-1])
    below = np.empty(n, np.intp)
    for first in range(0, n, _ROWS_AT_A_TIME):
        last = min(first + _ROWS_AT_A_TIME, n)
        here = slice(weights.indptr[first], weights.indptr[last])
        rows = np.repeat(np.arange(first, last), np.diff(weights.indptr[first : last + 1]))
        columns = weights.indices[here]
        after = columns > rows
        place = np.arange(here.start, here.stop) + shift[rows] + (after & added[rows])
        indices[place] = columns
        # One division by the product, and not two divisions, keeps the result exactly symmetric.
        data[place] = -weights.data[here] / (root[rows] * root[columns])
        below[first:last] = np.bincount(rows[columns < rows] - first, minlength=last - first)
    diagonal = indptr[:-1] + below
    token = np.flatnonzero(linked)
    indices[diagonal[token]] = token
    data[diagonal[token]] = 1.0 - own[token] / (root[token] * root[token])
    return sparse.csr_array((data, indices, indptr), shape=weights.shape)


def _links(weights: Any) -> Any:
    if sparse.issparse(weights):
        return weights
    linked = weights > 0
    np.fill_diagonal(linked, True)
    hubs = np.flatnonzero(linked.all(axis=1))
    if hubs.size:
        # A token linked to all others says as much as the whole matrix.
        only = np.zeros_like(linked)
        only[hubs[0]] = True
        linked = only
    return sparse.csr_array(linked)


def _null_vectors(degrees: Float64Array, label: npt.NDArray[np.int32], parts: npt.NDArray[np.intp]) -> Float64Array:
    """Return D^1/2 1 on each of the parts, of unit length: (N, len(parts)) float64."""
    column = np.full(label.max() + 1, -1)
    column[parts] = np.arange(len(parts))
    token = np.flatnonzero(column[label] >= 0)
    vectors = np.zeros((len(degrees), len(parts)))
    vectors[token, column[label[token]]] = np.sqrt(np.where(degrees > 0, degrees, 1.0))[token]
    return vectors / np.linalg.norm(vectors, axis=0)


def _solve(graph: _Graph, members: npt.NDArray[np.intp], count: int, solver: str, tol: float) -> _Found:
    """Find the ``count`` smallest eigenpairs of one connected part beside its null vector."""
    part = graph.part(members)
    null = np.sqrt(graph.degrees[members])
    null /= np.linalg.norm(null)
    tried: dict[str, Float64Array] = {}
    for name, run in _plan(part, null, count, solver, _AIM * tol):
        try:
            proposal = run()
        except DidNotConvergeError:
            tried.setdefault(name, np.empty(0))
            continue
        if not np.isfinite(proposal.vectors).all():
            tried[name] = np.empty(0)
            continue
        values, vectors, residuals = _eigensolvers.rayleigh_ritz(part, null, proposal.vectors)
        if not graph.signed:
            # L is positive semidefinite, rounding is not.
            values = np.maximum(values, 0.0)
        if values.shape == (count,) and residuals.max() <= tol:
            return _Found(values, vectors, name, proposal.iterations)
        tried[name] = residuals
    reached = ", ".join(f"{name} {r.max():.2g}" if r.size else f"{name} none" for name, r in tried.items())
    raise EigenSolverError(
        f"no solver brought the residuals of {count} eigenpairs of {len(null)} tokens down to tol={tol:g}; "
        f"largest residuals: {reached}",
        tried,
    )


def _plan(
    part: Any, null: Float64Array, count: int, solver: str, aim: float
) -> Iterator[tuple[str, Callable[[], Proposal]]]:
    """Yield solvers in the order in which to try them."""
    n = len(null)
    low_rank = isinstance(part, _GramLaplacian)
    thresholded = isinstance(part, _ThresholdedLaplacian)
    can_iterate = n > max(20, 3 * count)
    # A full matrix has no coarser copies worth building, unless one insists.
    suits_amg = sparse.issparse(part) or (solver == "amg-lobpcg" and not low_rank and not thresholded)
    width = count + _eigensolvers.GUARD_VECTORS + 1
    names = ["shift-invert", "gram", "sampled-lobpcg", "amg-lobpcg", "arpack", "dense"]
    first = solver
    if solver == "auto" and thresholded:
        first = "dense" if n <= _DENSE_UP_TO else "sampled-lobpcg"
    elif solver == "auto" and not low_rank:
        depth = _depth(part) if sparse.issparse(part) and n > _DENSE_UP_TO else 0
        if n <= _DENSE_UP_TO:
            first = "dense"
        elif n <= min(_INVERT_UP_TO, _INVERT_WIDTH * depth):
            first = "shift-invert"
        else:
            first = "arpack" if depth <= _ARPACK_DEPTH else "amg-lobpcg"
        if first == "arpack" and can_iterate:
            yield first, partial(_eigensolvers.arpack, part, null, count, aim, restarts=_ARPACK_RESTARTS)
            first = "amg-lobpcg"
    able = {
        "gram": low_rank,
        "sampled-lobpcg": thresholded and can_iterate and n > 5 * width,
        "arpack": can_iterate,
        "amg-lobpcg": suits_amg and can_iterate and n > 5 * (count + _eigensolvers.GUARD_VECTORS),
        # Its factors may take any amount of memory: only where that was looked at, or somebody insists.
        "shift-invert": first == "shift-invert" and can_iterate,
        "dense": n <= _DENSE_FALLBACK_UP_TO or solver == "dense" or not can_iterate,
    }
    names.sort(key=lambda name: name != first)
    for name in names:
        if not able[name]:
            continue
        if name == "gram":
            yield name, partial(_eigensolvers.gram, part.scaled, null, count)
        elif name == "sampled-lobpcg":
            yield name, partial(_sampled, part, null, count, aim, width)
        elif name == "amg-lobpcg":
            yield name, partial(_eigensolvers.amg_lobpcg, part, null, count, aim)
        elif name == "shift-invert":
            yield name, partial(_eigensolvers.shift_invert, part, null, count)
        elif name == "arpack":
            yield name, partial(_eigensolvers.arpack, part, null, count, aim)
        else:
            yield name, partial(_eigensolvers.dense, part, null, count, aim)


def _sampled(part: _ThresholdedLaplacian, null: Float64Array, count: int, aim: float, width: int) -> Proposal:
    return _eigensolvers.sampled_lobpcg(part, part.start(width), null, count, aim)


def _depth(part: Any) -> int:
    """Count the hops from the token furthest from the first one to the token furthest from it, in a connected graph."""
    depth, start = 0, 0
    for _ in range(2):
        order, before = breadth_first_order(part, start)
        place = np.empty(len(order), np.intp)
        place[order] = np.arange(len(order))
        # Where the token each was reached from stands in the order: this never falls.
        parent = place[before[order[1:]]]
        depth, reached = 0, 1
        while reached < len(order):
            reached = 1 + int(np.searchsorted(parent, reached))
            depth += 1
        start = int(order[-1])
    return depth


def _signs(vectors: Float64Array) -> Float64Array:
    size = np.abs(vectors)
    first = (size >= 0.99 * size.max(axis=0)).argmax(axis=0)
    return np.where(vectors[first, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
