"""Solvers for the smallest eigenvectors of one connected graph's Laplacian; ``spectral`` chooses among them and judges.

Every function takes a symmetric normalised Laplacian whose null vector is known, and looks for the eigenvectors
*beside* it. Leaving the known vector out is what keeps a weak link between two parts from being lost in the rounding of
an eigenvalue that is zero anyway. What comes back is a proposal: the caller computes eigenvalues and residuals itself.

Nothing here draws from NumPy's global random state or touches the warning filters, so threads don't meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy import sparse
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh, splu

from sparsespec._kernels import multigrid as kernels
from sparsespec._kernels._compile import parallel_region
from sparsespec._kernels.multigrid import COLUMNS, ROWS
from sparsespec._multigrid import Matrix, MultigridCycle, NoHierarchyError, threads_for

Float64Array = npt.NDArray[np.float64]

# Vectors that LOBPCG carries at least beyond those asked for. They save a third of the iterations, and they let it find
# all the vectors of a repeated eigenvalue.
GUARD_VECTORS = 2

# A coarse level of at most so many tokens is diagonalised for the start, and finer ones are improved up to a residual
# of this part of the largest eigenvalue sought, in at most so many iterations.
_DIRECT_UP_TO = 600
_COARSE_TARGET = 0.05
_COARSE_ITERATIONS = 6
# What rounding leaves of a square of length 1, with a margin.
_ROUNDING = 1e-12

_MOST_RESTARTS = 1000
_MAX_ITERATIONS = 200
_PATIENCE = 30
# Residuals are held below this part of the largest eigenvalue sought: a fine grid, or two parts hanging by a thread,
# has eigenvalues smaller than any tolerance one would think of.
_RELATIVE = 0.01
# Below this, rounding.
_SMALLEST_AIM = 1e-12
# Makes a Laplacian, whose smallest eigenvalue is 0, positive definite.
_SHIFT = 1e-5

# SciPy draws ARPACK's rare restart vectors from here since 1.17; before, they came from inside the Fortran library.
_EIGSH_HAS_RNG = "rng" in inspect.signature(eigsh).parameters


class Proposal(NamedTuple):
    """Vectors (n, m) that span what was found, and the work it took."""

    vectors: Float64Array
    iterations: int


class DidNotConvergeError(Exception):
    """The solver stopped with nothing to show."""


def dense(laplacian: Any, null: Float64Array, count: int, aim: float) -> Proposal:
    """Diagonalise the whole matrix: O(n^3)."""
    return Proposal(_diagonalise(laplacian, null, count), 0)


def _diagonalise(laplacian: Any, null: Float64Array, count: int) -> Float64Array:
    matrix = laplacian.toarray() if sparse.issparse(laplacian) else laplacian @ np.eye(len(null))
    # Lifts the null vector above the spectrum, which ends at 2.
    matrix = matrix + 3.0 * np.outer(null, null)
    _, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2, subset_by_index=(0, count - 1))
    return np.asarray(vectors)


def gram(scaled: Float64Array, null: Float64Array, count: int) -> Proposal:
    """Solve for L = I - B B', B = ``scaled`` (n, C), through the C x C matrix B' B: O(n C^2)."""
    n, channels = scaled.shape
    rest = scaled - np.outer(null, null @ scaled)
    if channels < n:
        squares, right = np.linalg.eigh(rest.T @ rest)
        squares, right = squares[::-1][:count], right[:, ::-1][:, :count]
        # Beyond the rank every vector is an eigenvector, with eigenvalue 1.
        useful = squares > 1e-10
        vectors = rest @ right[:, useful] / np.sqrt(squares[useful])
    else:
        vectors = np.linalg.eigh(rest @ rest.T)[1][:, ::-1][:, :count]
    missing = count - vectors.shape[1]
    if missing:
        others = np.random.default_rng(0).standard_normal((n, missing))
        vectors = np.linalg.qr(np.column_stack([null, vectors, others]))[0][:, 1:]
    return Proposal(vectors, 0)


def arpack(laplacian: Any, null: Float64Array, count: int, aim: float, restarts: int | None = None) -> Proposal:
    """Run Lanczos on 2 I - L, for its largest eigenvalues.

    A Krylov space holds one vector of each eigenvalue, so a repeated one (any symmetric picture has them) is found
    once, with a perfect residual, and an eigenvalue further up takes the place of its twin. Therefore, when done, look
    once more beside everything found, from another start: no eigenvalue there may be smaller than the largest we have.

    Parameters
    ----------
    restarts
        Give up after so many. None: after a thousand, and then only if nothing reached ``aim``; what the finer pass and
        the second look could not settle in so many is left as it is.

    Raises
    ------
    DidNotConvergeError
        The restarts are spent.
    """

    def apply(x: Float64Array, known: Float64Array) -> Float64Array:
        return np.asarray(2.0 * x - laplacian @ x - known @ (3.0 * (x @ known)))

    return _lanczos(apply, laplacian, null, count, aim, restarts)


def shift_invert(laplacian: Any, null: Float64Array, count: int) -> Proposal:
    """Run Lanczos on the inverse of L + shift I, factored once: a few dozen solves, to the last digit.

    How much the factors hold beyond the matrix depends on the graph: little where few tokens keep its parts together.
    """
    n = len(null)
    shifted = sparse.csc_array(laplacian) + _SHIFT * sparse.eye_array(n, format="csc")
    # Positive definite: it can be ordered, and its pivots taken, by symmetry.
    factors = splu(
        sparse.csc_matrix(shifted), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
    )

    def apply(x: Float64Array, known: Float64Array) -> Float64Array:
        solved = factors.solve(x - known @ (x @ known))
        return np.asarray(solved - known @ (solved @ known))

    return _lanczos(apply, laplacian, null, count, _SMALLEST_AIM, None)


def _lanczos(
    apply: Callable[[Float64Array, Float64Array], Float64Array],
    laplacian: Any,
    null: Float64Array,
    count: int,
    aim: float,
    restarts: int | None,
) -> Proposal:
    """Find the largest eigenvalues of ``apply(x, known)``: 2 I - L or (L + shift I)^-1, deflated by ``known``.

    Of both, half the residual of L is at most the residual relative to their eigenvalue.
    """
    n = len(null)
    products = 0

    def largest(wanted: int, known: Float64Array, start: Float64Array, tolerance: float) -> Float64Array:
        def counted(x: Float64Array) -> Float64Array:
            nonlocal products
            products += 1
            return apply(np.ravel(x), known)

        operator = LinearOperator((n, n), matvec=counted, dtype=np.float64)
        options: dict[str, Any] = {"rng": np.random.default_rng(0)} if _EIGSH_HAS_RNG else {}
        options |= {"tol": tolerance / 2, "maxiter": restarts or _MOST_RESTARTS, "ncv": min(n, max(2 * wanted + 1, 20))}
        try:
            _, vectors = eigsh(operator, wanted, which="LA", v0=start - known @ (known.T @ start), **options)
        except ArpackError as error:  # ArpackNoConvergence among them
            raise DidNotConvergeError(str(error)) from error
        return np.asarray(vectors, dtype=np.float64)

    def improve(vectors: Float64Array) -> tuple[Float64Array, Float64Array, float]:
        values, vectors, residuals = rayleigh_ritz(laplacian, null, vectors)
        return values[:count], vectors[:, :count], float(residuals[:count].max())

    rng = np.random.default_rng(0)
    values, vectors, worst = improve(largest(count, null[:, None], rng.standard_normal(n), aim))
    try:
        target = _target(aim, values[-1])
        if worst > target:
            values, vectors, _ = improve(largest(count, null[:, None], vectors.sum(axis=1), 0.1 * target))
        for _ in range(count):
            known = np.column_stack([null, vectors])
            if known.shape[1] >= n:
                break
            # The first start has nothing left in it of a twin: its share of that eigenvalue is the vector found.
            extra = largest(1, known, rng.standard_normal(n), max(_RELATIVE * values[-1], target))
            if rayleigh_ritz(laplacian, null, extra)[0][0] >= values[-1] - target:
                break
            extra = largest(1, known, extra[:, 0], target)
            values, vectors, _ = improve(np.column_stack([vectors, extra]))
    except DidNotConvergeError:
        if restarts is not None:
            raise
    return Proposal(vectors, products)


def amg_lobpcg(laplacian: Any, null: Float64Array, count: int, aim: float) -> Proposal:
    """Run LOBPCG, preconditioned by one multigrid cycle: iterations that don't grow with the size of a grid.

    Knyazev, "Toward the optimal preconditioned eigensolver", SIAM J. Sci. Comput. 23 (2001), algorithm 5.1. The start
    comes from the same problem on the coarser levels, and there from the next coarser ones; ``iterations`` are those on
    the matrix given.
    """
    try:
        cycle = MultigridCycle(sparse.csr_array(laplacian), null)
    except NoHierarchyError as error:
        raise DidNotConvergeError(str(error)) from error
    width = -(-(count + GUARD_VECTORS) // COLUMNS) * COLUMNS
    # The coarsest problem that has room for the trial space is solved outright.
    direct = max((at for at, size in enumerate(cycle.sizes) if size > 3 * width), default=0)
    vectors: Float64Array | None = None
    iterations = 0
    for at in range(direct, -1, -1):
        level = cycle.levels[at]
        if at == direct and at > 0 and len(level.null) <= _DIRECT_UP_TO:
            vectors = _diagonalise(level.matrix, level.null, width)
        else:
            start = np.random.default_rng(0).standard_normal((len(level.null), width if vectors is None else 1))
            if vectors is not None:
                # One column knows nothing of the coarse level, in case something has no picture there.
                finer = np.asarray(level.up @ vectors)
                finer[:, -1] = start[:, 0]
                start = finer
            vectors, iterations = _lobpcg(cycle, at, start, count, aim)
    assert vectors is not None
    return Proposal(np.ascontiguousarray(vectors[:, :count]), iterations)


def _lobpcg(cycle: MultigridCycle, at: int, vectors: Float64Array, count: int, aim: float) -> tuple[Float64Array, int]:
    """Improve ``vectors`` (n, width), in place, for one level of the hierarchy; return them and the iterations.

    Vectors are kept in double precision, the corrections to them in single precision. The sums that decide are of the
    numbers as stored, in double precision, so what single precision costs is a fraction of each correction, which the
    next one puts right.
    """
    n, width = vectors.shape
    null = cycle.levels[at].null
    matrix = Matrix(cycle.levels[at].matrix, np.float64).arrays
    blocks = -(-n // ROWS)
    residual, correction, spare = (np.empty((n, width), np.float32) for _ in range(3))
    direction = np.zeros((n, width), np.float32)
    squares = np.empty((blocks, width))
    best, best_at, iteration, parts = np.inf, 0, 0, 1
    while True:
        sums = np.empty((blocks, 2, parts * width, parts * width + 1))
        with parallel_region(threads_for(n)):
            kernels.gram(*matrix, vectors, correction, direction, null, sums)
            values, change = _ritz(sums.sum(axis=0), width)
            kernels.advance(vectors, correction, direction, null, change)
            kernels.residuals(*matrix, vectors, values, residual, squares)
        worst = float(np.sqrt(squares.sum(axis=0)[:count].max()))
        coarse = at > 0
        target = _COARSE_TARGET * abs(values[count - 1]) if coarse else _target(aim, values[count - 1])
        if worst < best:
            best, best_at = worst, iteration
        if worst <= target or iteration >= (_COARSE_ITERATIONS if coarse else _MAX_ITERATIONS):
            break
        if iteration - best_at >= _PATIENCE:
            break
        cycle.solve(at, residual, correction, spare)
        iteration += 1
        parts = min(iteration + 1, 3)
    return vectors, iteration


def _ritz(sums: Float64Array, width: int) -> tuple[Float64Array, Float64Array]:
    """Rayleigh and Ritz in the span of S = [vectors, corrections, directions], beside the null vector.

    Parameters
    ----------
    sums
        (2, s, s + 1): S' L S, and S' [S, null].
    width
        Number of vectors; the first of S.

    Returns
    -------
    values, change
        (width,) ascending, and (s + 1, 2 width) combinations of [S, null]: the new vectors, and their part that isn't
        in the old ones.
    """
    size = sums.shape[1]
    beside = sums[1, :, size]
    energy = _symmetric(sums[0, :, :size])
    mass = _symmetric(sums[1, :, :size] - np.outer(beside, beside))
    old = _whiten(mass[:width, :width], np.diag(sums[1])[:width])
    shared = old.T @ mass[:width, width:]
    new = _whiten(mass[width:, width:] - shared.T @ shared, np.diag(sums[1])[width:size])
    basis = np.zeros((size, old.shape[1] + new.shape[1]))
    basis[:width, : old.shape[1]] = old
    basis[:width, old.shape[1] :] = -old @ (shared @ new)
    basis[width:, old.shape[1] :] = new
    found, rotation = scipy.linalg.eigh(_symmetric(basis.T @ energy @ basis))
    kept = min(width, len(found))
    values = np.concatenate([found[:kept], np.full(width - kept, found[-1])])
    change = np.zeros((size + 1, 2, width))
    change[:size, 0, :kept] = basis @ rotation[:, :kept]
    change[:size, 1, :kept] = basis[:, old.shape[1] :] @ rotation[old.shape[1] :, :kept]
    change[size] = -np.tensordot(beside, change[:size], axes=1)
    return values, change.reshape(size + 1, 2 * width)


def _whiten(mass: Float64Array, lengths: Float64Array) -> Float64Array:
    """Return combinations of columns with Gram matrix ``mass`` that are orthonormal, without those that add nothing.

    ``lengths`` are the squared lengths of the columns before anything was taken away from them.
    """
    squares = np.diag(mass)
    alive = squares > _ROUNDING * lengths
    scale = np.where(alive, 1.0 / np.sqrt(np.where(alive, squares, 1.0)), 0.0)
    values, rotation = np.linalg.eigh(mass * np.outer(scale, scale))
    kept = values > _ROUNDING * max(1, len(values))
    return np.asarray(scale[:, None] * rotation[:, kept] / np.sqrt(values[kept]))


def sampled_lobpcg(laplacian: Any, start: Float64Array, null: Float64Array, count: int, aim: float) -> Proposal:
    """Run LOBPCG without a preconditioner, from vectors (n, width) that are close already, for an expensive matrix.

    A product with the matrix takes all columns of a block at once, and there is one in each iteration.
    """
    width = start.shape[1]
    vectors = _orthonormal(start, null[:, None])
    if vectors.shape[1] < width:
        # The affinity has fewer vectors than that; any others will do.
        others = np.random.default_rng(0).standard_normal((len(null), width - vectors.shape[1]))
        vectors = _orthonormal(np.column_stack([vectors, others]), null[:, None])
    images = laplacian @ vectors
    values, rotation = scipy.linalg.eigh(_symmetric(vectors.T @ images))
    vectors, images = vectors @ rotation, images @ rotation
    direction = along = np.empty((len(null), 0))
    best, best_at, iteration = np.inf, 0, 0
    while True:
        residual = images - vectors * values
        worst = float(np.linalg.norm(residual, axis=0)[:count].max())
        if worst < best:
            best, best_at = worst, iteration
        if worst <= _target(aim, values[count - 1]) or iteration - best_at >= 2 or iteration >= _MAX_ITERATIONS:
            return Proposal(vectors[:, :count], iteration)
        iteration += 1
        known = np.column_stack([null, vectors])
        trial = _orthonormal(residual, known)
        basis = np.column_stack([vectors, trial])
        images = np.column_stack([images, laplacian @ trial])
        if direction.shape[1]:
            # Combinations of what was multiplied before cost no product.
            weights = _beside(direction, np.column_stack([null, basis]))
            further = direction @ weights[1] - np.column_stack([null, basis]) @ weights[0]
            images = np.column_stack([images, along @ weights[1] - images @ weights[0][1:]])
            basis = np.column_stack([basis, further])
        values, rotation = scipy.linalg.eigh(_symmetric(basis.T @ images), subset_by_index=(0, width - 1))
        direction, along = basis[:, width:] @ rotation[width:], images[:, width:] @ rotation[width:]
        vectors, images = basis @ rotation, images @ rotation


def _beside(vectors: Float64Array, basis: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return (a, b) with orthonormal columns in vectors b - basis a, orthogonal to the orthonormal basis."""
    shared = basis.T @ vectors
    mass = vectors.T @ vectors
    b = _whiten(mass - shared.T @ shared, np.diag(mass))
    return shared @ b, b


def _orthonormal(vectors: Float64Array, against: Float64Array) -> Float64Array:
    """Return an orthonormal basis of the vectors, orthogonal to ``against``; columns that add nothing are dropped."""
    for _ in range(2):  # the second time for what rounding left
        vectors = vectors - against @ (against.T @ vectors)
        length = np.linalg.norm(vectors, axis=0)
        vectors = vectors[:, length > 0] / length[length > 0]
        squares, rotation = np.linalg.eigh(vectors.T @ vectors)
        kept = squares > 1e-14 * vectors.shape[1]
        vectors = vectors @ (rotation[:, kept] / np.sqrt(squares[kept]))
    return vectors


def rayleigh_ritz(
    laplacian: Any, null: Float64Array, vectors: Float64Array
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Find the best eigenpairs in the span of the vectors, beside the null vector.

    Returns
    -------
    values, vectors, residuals
        (m,) ascending, (n, m), and (m,) the lengths of L u - lambda u.
    """
    basis = np.linalg.qr(np.column_stack([null, vectors]))[0][:, 1:]
    images = laplacian @ basis
    values, rotation = np.linalg.eigh(_symmetric(basis.T @ images))
    found = basis @ rotation
    return values, found, np.linalg.norm(images @ rotation - found * values, axis=0)


def _target(aim: float, value: float) -> float:
    return float(max(min(aim, _RELATIVE * value), _SMALLEST_AIM))


def _symmetric(matrix: Float64Array) -> Float64Array:
    return (matrix + matrix.T) / 2
