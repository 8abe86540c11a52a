"""Diffusion of maps over a sparse graph by conjugate gradients."""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import device, kernel


@device(fastmath=True)
def _dot(a, b):  # float64[N], float64[N] -> float64
    total = 0.0
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@device()
def _apply(indptr, indices, data, diagonal, strength, x, out):
    # (I + strength (D - W)) x, with I + strength D on the diagonal
    for i in range(x.size):
        total = 0.0
        for e in range(indptr[i], indptr[i + 1]):
            total += data[e] * x[indices[e]]
        out[i] = diagonal[i] * x[i] - strength * total


@kernel()
def diffuse(indptr, indices, data, strength, tolerance, most, right, x):
    # int(int[N + 1], int[E], float64[E], float, float, int, float64[N], float64[N]): iterations; x in place
    """Solve (I + strength (D - W)) x = right from the given x, with a diagonal preconditioner.

    Stops at a residual of `tolerance` of the right-hand side, or after `most` iterations.
    """
    n = x.size
    diagonal = np.empty(n)
    for i in range(n):
        degree = 0.0
        for e in range(indptr[i], indptr[i + 1]):
            degree += data[e]
        diagonal[i] = 1.0 + strength * degree
    r, z, p, q = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
    _apply(indptr, indices, data, diagonal, strength, x, r)
    for i in range(n):
        r[i] = right[i] - r[i]
        z[i] = r[i] / diagonal[i]
        p[i] = z[i]
    rz = _dot(r, z)
    enough = tolerance * tolerance * _dot(right, right)
    iteration = 0
    while iteration < most and _dot(r, r) > enough:
        iteration += 1
        _apply(indptr, indices, data, diagonal, strength, p, q)
        step = rz / _dot(p, q)
        for i in range(n):
            x[i] += step * p[i]
            r[i] -= step * q[i]
            z[i] = r[i] / diagonal[i]
        before, rz = rz, _dot(r, z)
        for i in range(n):
            p[i] = z[i] + rz / before * p[i]
    return iteration
