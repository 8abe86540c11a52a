"""Solvers for the smallest eigenvectors of one connected graph's Laplacian; ``spectral`` chooses among them and judges.

Every function takes a symmetric normalised Laplacian whose null vector is known, and looks for the eigenvectors
*beside* it. Leaving the known vector out is what keeps a weak link between two parts from being lost in the rounding of
an eigenvalue that is zero anyway. What comes back is a proposal: the caller computes eigenvalues and residuals itself.

Nothing here draws from NumPy's global random state or touches the warning filters, so threads don't meet.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.linalg
from pyamg import smoothed_aggregation_solver
from scipy import sparse
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

Float64Array = npt.NDArray[np.float64]

# Vectors that LOBPCG carries beyond those asked for. They cost a third more work in an iteration and save a third of
# the iterations, and they let it find all the vectors of a repeated eigenvalue.
GUARD_VECTORS = 2

# Added to the diagonal while the multigrid hierarchy is built: the coarse copies of a singular matrix are singular, and
# rounding can push them below zero. The usual 1e-5 is more than the smallest eigenvalues of a large grid or a long
# path, which the cycle then can't tell apart (22 iterations instead of 6 on a path of 20,000 tokens); no Cholesky
# factor is taken here that would need so much.
_AMG_SHIFT = 1e-9
# Links weaker than half an average one aren't followed in making coarse tokens out of fine ones, and none above 0.05.
# Following all takes 16 iterations instead of 11 on 48 neighbours, and loses small eigenvalues where weights span many
# orders of magnitude.
_AMG_STRENGTH = 0.5
_AMG_STRENGTH_MOST = 0.05
# Sizes below this are inverted outright.
_AMG_COARSEST = 100
# Damping of a smoother whose spectrum is bounded by 1: halves the upper part of it in one sweep.
_DAMPING = 4.0 / 3.0
_SWEEPS = 2

_MOST_RESTARTS = 1000
_MAX_ITERATIONS = 200
_PATIENCE = 30
# Residuals are held below this part of the largest eigenvalue sought: a fine grid, or two parts hanging by a thread,
# has eigenvalues smaller than any tolerance one would think of.
_RELATIVE = 0.01
# Below this, rounding.
_SMALLEST_AIM = 1e-12

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
    matrix = laplacian.toarray() if sparse.issparse(laplacian) else laplacian @ np.eye(len(null))
    # Lifts the null vector above the spectrum, which ends at 2.
    matrix = matrix + 3.0 * np.outer(null, null)
    _, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2, subset_by_index=(0, count - 1))
    return Proposal(vectors, 0)


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
    n = len(null)
    products = 0

    def largest(wanted: int, known: Float64Array, start: Float64Array, tolerance: float) -> Float64Array:
        def apply(x: Float64Array) -> Float64Array:
            nonlocal products
            products += 1
            x = np.ravel(x)
            return 2.0 * x - laplacian @ x - known @ (3.0 * (x @ known))

        operator = LinearOperator((n, n), matvec=apply, dtype=np.float64)
        options: dict[str, Any] = {"rng": np.random.default_rng(0)} if _EIGSH_HAS_RNG else {}
        # The tolerance is relative to the eigenvalue, at most 2.
        options |= {"tol": tolerance / 2, "maxiter": restarts or _MOST_RESTARTS, "ncv": min(n, max(2 * wanted + 1, 20))}
        try:
            _, vectors = eigsh(operator, wanted, which="LA", v0=start - known @ (known.T @ start), **options)
        except ArpackError as error:  # ArpackNoConvergence among them
            raise DidNotConvergeError(str(error)) from error
        return np.asarray(vectors, dtype=np.float64)

    def improve(vectors: Float64Array) -> tuple[Float64Array, Float64Array, float]:
        values, vectors = rayleigh_ritz(laplacian, null, vectors)
        values, vectors = values[:count], vectors[:, :count]
        worst = np.linalg.norm(laplacian @ vectors - vectors * values, axis=0).max()
        return values, vectors, float(worst)

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

    Knyazev, "Toward the optimal preconditioned eigensolver", SIAM J. Sci. Comput. 23 (2001), algorithm 5.1, with an
    orthonormal basis of the whole trial space in each iteration instead of a generalised eigenproblem, so that no
    Cholesky factor can fail.
    """
    n = len(null)
    laplacian = sparse.csr_array(laplacian)
    cycle = MultigridCycle(laplacian, null)
    width = count + GUARD_VECTORS

    vectors = _orthonormal(np.random.default_rng(0).standard_normal((n, width)), null[:, None])
    images = laplacian @ vectors
    values, rotation = scipy.linalg.eigh(_symmetric(vectors.T @ images))
    vectors, images = vectors @ rotation, images @ rotation
    direction = np.empty((n, 0))
    best, best_at, iteration = np.inf, 0, 0
    while True:
        residual = images - vectors * values
        norms = np.linalg.norm(residual, axis=0)
        worst = float(norms[:count].max())
        target = _target(aim, values[count - 1])
        if worst < best:
            best, best_at = worst, iteration
        if worst <= target or iteration >= _MAX_ITERATIONS or iteration - best_at >= _PATIENCE:
            return Proposal(vectors[:, :count], iteration)

        iteration += 1
        trial = np.column_stack([cycle(residual[:, norms > target]), direction])
        trial = _orthonormal(trial, np.column_stack([null, vectors]))
        basis = np.column_stack([vectors, trial])
        images = np.column_stack([images, laplacian @ trial])
        values, rotation = scipy.linalg.eigh(_symmetric(basis.T @ images), subset_by_index=(0, width - 1))
        vectors, images = basis @ rotation, images @ rotation
        direction = trial @ rotation[width:]


class MultigridCycle:
    """One V-cycle of smoothed-aggregation multigrid, on all columns at once: an approximate inverse of the Laplacian.

    PyAMG builds the hierarchy (Vaněk, Mandel, Brezina, Computing 56 (1996)). The prolongation is damped row by row,
    since the other kind estimates a spectral radius from NumPy's global random numbers. The smoother is Jacobi with the
    sum of each row's magnitudes in place of its diagonal (the l1 smoother of Baker, Falgout, Kolev and Yang, SIAM J.
    Sci. Comput. 33 (2011)), which converges on any such matrix and, unlike Gauss-Seidel, takes many columns for little
    more than the price of one.

    Parameters
    ----------
    laplacian
        (n, n) sparse, symmetric, positive semidefinite.
    null
        (n,) its null vector, which the coarse levels have to represent.
    """

    def __init__(self, laplacian: Any, null: Float64Array) -> None:
        shifted = sparse.csr_array(laplacian + _AMG_SHIFT * sparse.eye_array(len(null)))
        # The class and the index type that every release of PyAMG takes without a warning.
        matrix = sparse.csr_matrix(
            (shifted.data, shifted.indices.astype(np.int32), shifted.indptr.astype(np.int32)), shape=shifted.shape
        )
        hierarchy = smoothed_aggregation_solver(
            matrix,
            B=null[:, None].copy(),
            strength=("symmetric", {"theta": min(_AMG_STRENGTH_MOST, _AMG_STRENGTH * len(null) / matrix.nnz)}),
            smooth=("jacobi", {"omega": _DAMPING, "weighting": "local"}),
            max_coarse=_AMG_COARSEST,
            max_levels=20,
        )
        self._matrices = [sparse.csr_array(level.A) for level in hierarchy.levels]
        self._up = [sparse.csr_array(level.P) for level in hierarchy.levels[:-1]]
        self._down = [sparse.csr_array(prolongation.T) for prolongation in self._up]
        sums = [np.asarray(abs(matrix).sum(axis=1))[:, None] for matrix in self._matrices]
        # A coarse token that stands for no fine one has an empty row.
        self._steps = [_DAMPING / np.where(total > 0, total, 1.0) for total in sums]
        self._coarsest = scipy.linalg.pinvh(self._matrices[-1].toarray())

    @property
    def sizes(self) -> list[int]:
        """Unknowns on each level, finest first."""
        return [matrix.shape[0] for matrix in self._matrices]

    def __call__(self, right: Float64Array, level: int = 0) -> Float64Array:
        """Solve approximately for each column of ``right`` (n, columns)."""
        if level == len(self._up):
            return self._coarsest @ right
        matrix, step = self._matrices[level], self._steps[level]
        x = step * right
        for _ in range(_SWEEPS - 1):
            x += step * (right - matrix @ x)
        x += self._up[level] @ self(self._down[level] @ (right - matrix @ x), level + 1)
        for _ in range(_SWEEPS):
            x += step * (right - matrix @ x)
        return x


def rayleigh_ritz(laplacian: Any, null: Float64Array, vectors: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Return the best eigenpairs in the span of the vectors, beside the null vector: (m,) ascending and (n, m)."""
    basis = np.linalg.qr(np.column_stack([null, vectors]))[0][:, 1:]
    values, rotation = np.linalg.eigh(_symmetric(basis.T @ (laplacian @ basis)))
    return values, basis @ rotation


def _target(aim: float, value: float) -> float:
    return float(max(min(aim, _RELATIVE * value), _SMALLEST_AIM))


def _symmetric(matrix: Float64Array) -> Float64Array:
    return (matrix + matrix.T) / 2


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
