"""Smoothed-aggregation multigrid for a normalised Laplacian: the cycle that preconditions LOBPCG, and coarse problems.

PyAMG builds the hierarchy (Vaněk, Mandel, Brezina, Computing 56 (1996)). What runs in every iteration is ours: single
precision, eight columns at a time, on all the processors granted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
from pyamg import smoothed_aggregation_solver
from scipy import sparse

from sparsespec._kernels import multigrid as kernels
from sparsespec._kernels._compile import parallel_region

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# Links weaker than half an average one aren't followed in making coarse tokens out of fine ones, and none above 0.05.
# Following all takes 16 iterations instead of 11 on 48 neighbours, and loses small eigenvalues where weights span many
# orders of magnitude.
_STRENGTH = 0.5
_STRENGTH_MOST = 0.05
# Sizes below this are inverted outright.
_COARSEST = 100
# Where PyAMG stops early, what is left may be larger, but not so large that inverting it is the work.
_COARSEST_MOST = 1500
# Damping of a smoother whose spectrum is bounded by 1: halves the upper part of it in one sweep.
_DAMPING = 4.0 / 3.0
# Problems of at most so many rows are done before a second thread has woken up.
_ALONE_UP_TO = 8192
# Eigenvalues of the coarsest matrix below this are taken for it: rounding in single precision.
_FLOOR = 1e-9


class NoHierarchyError(Exception):
    """The graph has no coarser copies that are small enough to be inverted."""


class Matrix:
    """A sparse matrix as the kernels read it; arrays are shared with the one given where types allow."""

    def __init__(self, matrix: Any, dtype: Any) -> None:
        self.shape: tuple[int, int] = matrix.shape
        self.indptr: npt.NDArray[np.uint32] = _unsigned(matrix.indptr)
        self.indices: npt.NDArray[np.uint32] = _unsigned(matrix.indices)
        self.data: Any = np.asarray(matrix.data, dtype)

    @property
    def arrays(self) -> tuple[Any, Any, Any]:
        return self.indptr, self.indices, self.data


@dataclass(frozen=True, eq=False)
class Level:
    """One level: its matrix (n, n), null vector (n,) of unit length, and the way to the next coarser one.

    The coarse variables are scaled so that the eigenvectors of ``matrix``, not of a pair of matrices, approximate those
    of the finer level: prolongation P with P' P replaced by its row sums on the null vector is orthonormal.
    """

    matrix: Any
    null: Float64Array
    up: Any = None


class MultigridCycle:
    """One V-cycle of smoothed-aggregation multigrid, on all columns at once: an approximate inverse of the Laplacian.

    The prolongation is damped row by row, since the other kind estimates a spectral radius from NumPy's global random
    numbers. The smoother is Jacobi with the sum of each row's magnitudes in place of its diagonal (the l1 smoother of
    Baker, Falgout, Kolev and Yang, SIAM J. Sci. Comput. 33 (2011)), which converges on any such matrix and, unlike
    Gauss-Seidel, takes many columns for little more than the price of one. Two sweeps before and two after, with the
    step lengths of the Chebyshev polynomial for the upper part of the spectrum.

    Parameters
    ----------
    laplacian
        (n, n) csr_array, symmetric, positive semidefinite. It isn't changed.
    null
        (n,) its null vector, which the coarse levels have to represent.

    Raises
    ------
    NoHierarchyError
        No link is strong enough to follow, or too few, as on a star of thousands.

    Attributes
    ----------
    levels
        Finest first; ``levels[0].matrix`` is ``laplacian``.
    """

    def __init__(self, laplacian: Any, null: Float64Array) -> None:
        self.levels = _hierarchy(laplacian, null)
        # Unknowns are divided by their steps on every level but the coarsest: a sweep then is x + weight (right - A x).
        steps = [_steps(level.matrix) for level in self.levels[:-1]]
        steps.append(np.ones(len(self.levels[-1].null)))
        self._steps = [step.astype(np.float32) for step in steps]
        self._matrices, self._up, self._down = [], [], []
        for level, step, coarse_step in zip(self.levels, steps[:-1], steps[1:], strict=False):
            matrix = Matrix(level.matrix, np.float32)
            matrix.data = (level.matrix.data * step[level.matrix.indices]).astype(np.float32)
            self._matrices.append(matrix)
            self._down.append(Matrix(level.up.T.tocsr(), np.float32))
            up = Matrix(level.up, np.float32)
            weights = level.up.data * coarse_step[level.up.indices] / np.repeat(step, np.diff(level.up.indptr))
            up.data = weights.astype(np.float32)
            self._up.append(up)
        self._ones = np.ones(len(null), np.float32)
        last = self.levels[-1]
        if len(last.null) > _COARSEST_MOST:
            raise NoHierarchyError(f"the coarsest of {len(self.levels)} levels has {len(last.null)} unknowns")
        values, vectors = scipy.linalg.eigh(last.matrix.toarray() + 3.0 * np.outer(last.null, last.null))
        vectors -= np.outer(last.null, last.null @ vectors)
        self._coarsest = np.asarray(vectors / np.maximum(values, _FLOOR) @ vectors.T, np.float32)

    @property
    def sizes(self) -> list[int]:
        """Unknowns on each level, finest first."""
        return [level.matrix.shape[0] for level in self.levels]

    def __call__(self, right: Float64Array) -> Float64Array:
        """Solve approximately for each column of ``right`` (n, columns)."""
        n, columns = right.shape
        wide = np.zeros((n, -(-columns // kernels.COLUMNS) * kernels.COLUMNS), np.float32)
        wide[:, :columns] = right
        result = np.empty_like(wide)
        self.solve(0, wide, result, np.empty_like(wide))
        return result[:, :columns].astype(np.float64)

    def solve(self, at: int, right: Float32Array, x: Float32Array, spare: Float32Array) -> None:
        """Write to ``x`` the solution on level ``at`` for ``right`` (n, m), m a multiple of eight.

        ``spare`` is overwritten; all are float32.
        """
        with parallel_region(threads_for(len(right))):
            self._cycle(at, right, x, spare, self._steps[at])

    def _cycle(self, at: int, right: Float32Array, x: Float32Array, spare: Float32Array, scale: Float32Array) -> None:
        if at == len(self._up):
            np.matmul(self._coarsest, right, out=x)
            return
        matrix, up, down = self._matrices[at].arrays, self._up[at].arrays, self._down[at].arrays
        one, none = np.float32(1), np.float32(0)
        first, second = _SWEEPS
        # Two sweeps from zero at once.
        both = first * second
        kernels.relax(*matrix, right, first + second - both, right, both, right, self._ones, x)
        kernels.relax(*matrix, x, none, x, one, right, self._ones, spare)
        coarse = np.zeros((3, len(down[0]) - 1, right.shape[1]), np.float32)
        kernels.relax(*down, spare, none, coarse[0], -one, coarse[0], self._ones, coarse[1])
        self._cycle(at + 1, coarse[1], coarse[2], coarse[0], self._ones)
        kernels.relax(*up, coarse[2], one + one, x, -one, x, self._ones, x)
        kernels.relax(*matrix, x, one, x, second, right, self._ones, spare)
        kernels.relax(*matrix, spare, one, spare, first, right, scale, x)


def threads_for(rows: int) -> int | None:
    """Return how many threads a problem of so many rows is worth: None for all."""
    return None if rows > _ALONE_UP_TO else 1


def _chebyshev(lowest: float) -> tuple[np.float32, np.float32]:
    """Steps of two sweeps that damp eigenvalues from ``lowest`` to 1 evenly."""
    middle, reach = (1 + lowest) / 2, (1 - lowest) / 2 * np.sqrt(0.5)
    return np.float32(1 / (middle - reach)), np.float32(1 / (middle + reach))


_SWEEPS = _chebyshev(0.3)


def _steps(matrix: Any) -> Float64Array:
    magnitudes = sparse.csr_array((np.abs(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
    total = magnitudes @ np.ones(matrix.shape[1])
    # A coarse token that stands for no fine one has an empty row.
    return np.asarray(1.0 / np.where(total > 0, total, 1.0))


def _hierarchy(laplacian: Any, null: Float64Array) -> list[Level]:
    # The class and the index type that every release of PyAMG takes without a warning.
    matrix = sparse.csr_matrix(
        (laplacian.data, laplacian.indices.astype(np.int32, copy=False), laplacian.indptr.astype(np.int32, copy=False)),
        shape=laplacian.shape,
    )
    hierarchy = smoothed_aggregation_solver(
        matrix,
        B=null[:, None].copy(),
        strength=("symmetric", {"theta": min(_STRENGTH_MOST, _STRENGTH * len(null) / matrix.nnz)}),
        smooth=("jacobi", {"omega": _DAMPING, "weighting": "local"}),
        max_coarse=_COARSEST,
        max_levels=20,
    )
    levels: list[Level] = []
    mass = np.ones(len(null))
    matrix = sparse.csr_array(laplacian)
    for fine, coarse in zip(hierarchy.levels[:-1], hierarchy.levels[1:], strict=True):
        if not coarse.B.any():
            return [*levels, Level(matrix, _unit(np.sqrt(mass) * fine.B[:, 0]))]
        up = sparse.csr_array(fine.P)
        fine_null, coarse_null = fine.B[:, 0], coarse.B[:, 0]
        below = up.T @ (mass * fine_null)
        # Not so where rounding or an empty row rules; any scale is as good there.
        fair = below * coarse_null > 1e-3 * coarse_null**2
        coarse_mass = np.where(fair, below / np.where(fair, coarse_null, 1.0), 1.0)
        root, coarse_root = np.sqrt(mass), np.sqrt(coarse_mass)
        up.data *= np.repeat(root, np.diff(up.indptr)) / coarse_root[up.indices]
        levels.append(Level(matrix, _unit(root * fine_null), up))
        matrix = sparse.csr_array(coarse.A)
        matrix.data = matrix.data / np.repeat(coarse_root, np.diff(matrix.indptr)) / coarse_root[matrix.indices]
        mass = coarse_mass
    levels.append(Level(matrix, _unit(np.sqrt(mass) * hierarchy.levels[-1].B[:, 0])))
    return levels


def _unit(vector: Float64Array) -> Float64Array:
    return np.asarray(vector / np.linalg.norm(vector))


def _unsigned(numbers: Any) -> npt.NDArray[np.uint32]:
    if numbers.dtype == np.int32:
        return np.asarray(numbers.view(np.uint32))
    return np.asarray(numbers, np.uint32)
