"""The normalised Laplacian and its eigenpairs by their definitions, dense and slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy import sparse

Float64Array = npt.NDArray[np.float64]


def dense(affinity_matrix: Any) -> Float64Array:
    matrix = affinity_matrix.toarray() if sparse.issparse(affinity_matrix) else affinity_matrix
    return np.asarray(matrix, dtype=np.float64)


def laplacian(affinity_matrix: Any) -> Float64Array:
    weights = dense(affinity_matrix)
    n = len(weights)
    degrees = [sum(row) for row in weights.tolist()]
    result = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if degrees[i] > 0 and degrees[j] > 0:
                result[i, j] = float(i == j) - weights[i, j] / np.sqrt(degrees[i] * degrees[j])
    return result


def smallest_values(affinity_matrix: Any, k: int) -> Float64Array:
    return np.asarray(scipy.linalg.eigvalsh(laplacian(affinity_matrix))[:k])


def generalised_values(affinity_matrix: Any, k: int) -> Float64Array:
    """Eigenvalues of (D - W) v = lambda D v, without the symmetric form in between; every degree positive."""
    weights = dense(affinity_matrix)
    degrees = np.diag(weights.sum(axis=1))
    return np.asarray(scipy.linalg.eigh(degrees - weights, degrees, eigvals_only=True)[:k])
