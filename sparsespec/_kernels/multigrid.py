"""Sparse matrices times blocks of vectors, and the passes of LOBPCG over them.

Blocks are row-major with a multiple of ``COLUMNS`` columns, so that an entry of the matrix is read once for a whole
register of them. Matrices come as ``indptr``, ``indices`` (uint32: unsigned numbers need no test for "counted from the
end") and ``data``. Sums over tokens are taken over fixed blocks of rows and then added in order, whatever the threads.
"""

from __future__ import annotations

import numba
import numpy as np

from sparsespec._kernels._compile import device, kernel

COLUMNS = 8
# Rows whose sums are taken together.
ROWS = 1024


@device(fastmath=True)
def _row_product(indices, data, start, stop, x, c):
    """Return columns c to c + 7 of one row's product with x."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = x.dtype.type(0)
    for e in range(start, stop):
        v = data[e]
        j = indices[e]
        s0 += v * x[j, c]
        s1 += v * x[j, c + 1]
        s2 += v * x[j, c + 2]
        s3 += v * x[j, c + 3]
        s4 += v * x[j, c + 4]
        s5 += v * x[j, c + 5]
        s6 += v * x[j, c + 6]
        s7 += v * x[j, c + 7]
    return s0, s1, s2, s3, s4, s5, s6, s7


# indptr (n + 1,), indices (nnz,) uint32; data (nnz,), x (columns of the matrix, m), scale (n,), right, base, out (n, m)
# float32. out may be base.
@kernel(parallel=True, fastmath=True)
def relax(indptr, indices, data, x, keep, base, weight, right, scale, out):
    """Compute out = scale (keep base + weight (right - A x)), scale by row: a sweep, a residual, a change of level."""
    m = x.shape[1]
    for i in numba.prange(indptr.size - 1):
        held, moved = scale[i] * keep, scale[i] * weight
        for c in range(0, m, COLUMNS):
            sums = _row_product(indices, data, indptr[i], indptr[i + 1], x, c)
            if keep != 0:
                out[i, c] = held * base[i, c] + moved * (right[i, c] - sums[0])
                out[i, c + 1] = held * base[i, c + 1] + moved * (right[i, c + 1] - sums[1])
                out[i, c + 2] = held * base[i, c + 2] + moved * (right[i, c + 2] - sums[2])
                out[i, c + 3] = held * base[i, c + 3] + moved * (right[i, c + 3] - sums[3])
                out[i, c + 4] = held * base[i, c + 4] + moved * (right[i, c + 4] - sums[4])
                out[i, c + 5] = held * base[i, c + 5] + moved * (right[i, c + 5] - sums[5])
                out[i, c + 6] = held * base[i, c + 6] + moved * (right[i, c + 6] - sums[6])
                out[i, c + 7] = held * base[i, c + 7] + moved * (right[i, c + 7] - sums[7])
            else:
                out[i, c] = moved * (right[i, c] - sums[0])
                out[i, c + 1] = moved * (right[i, c + 1] - sums[1])
                out[i, c + 2] = moved * (right[i, c + 2] - sums[2])
                out[i, c + 3] = moved * (right[i, c + 3] - sums[3])
                out[i, c + 4] = moved * (right[i, c + 4] - sums[4])
                out[i, c + 5] = moved * (right[i, c + 5] - sums[5])
                out[i, c + 6] = moved * (right[i, c + 6] - sums[6])
                out[i, c + 7] = moved * (right[i, c + 7] - sums[7])


# data (nnz,), x (n, m), values (m,) float64; out (n, m) float32; squares (blocks of ROWS rows, m) float64.
@kernel(parallel=True, fastmath=True)
def residuals(indptr, indices, data, x, values, out, squares):
    """Compute out = A x - x values, by column, and the sums of squares of its entries in every block of rows."""
    n, m = x.shape
    for block in numba.prange(squares.shape[0]):
        first = block * ROWS
        squares[block] = 0
        for i in range(first, min(first + ROWS, n)):
            for c in range(0, m, COLUMNS):
                sums = _row_product(indices, data, indptr[i], indptr[i + 1], x, c)
                r0 = sums[0] - values[c] * x[i, c]
                r1 = sums[1] - values[c + 1] * x[i, c + 1]
                r2 = sums[2] - values[c + 2] * x[i, c + 2]
                r3 = sums[3] - values[c + 3] * x[i, c + 3]
                r4 = sums[4] - values[c + 4] * x[i, c + 4]
                r5 = sums[5] - values[c + 5] * x[i, c + 5]
                r6 = sums[6] - values[c + 6] * x[i, c + 6]
                r7 = sums[7] - values[c + 7] * x[i, c + 7]
                out[i, c] = r0
                out[i, c + 1] = r1
                out[i, c + 2] = r2
                out[i, c + 3] = r3
                out[i, c + 4] = r4
                out[i, c + 5] = r5
                out[i, c + 6] = r6
                out[i, c + 7] = r7
                squares[block, c] += r0 * r0
                squares[block, c + 1] += r1 * r1
                squares[block, c + 2] += r2 * r2
                squares[block, c + 3] += r3 * r3
                squares[block, c + 4] += r4 * r4
                squares[block, c + 5] += r5 * r5
                squares[block, c + 6] += r6 * r6
                squares[block, c + 7] += r7 * r7


@device(fastmath=True)
def _row_images(indices, data, start, stop, x, y, r, offset):
    """Write one row's product with x to y[r, offset:]."""
    for c in range(0, x.shape[1], COLUMNS):
        sums = _row_product(indices, data, start, stop, x, c)
        y[r, offset + c] = sums[0]
        y[r, offset + c + 1] = sums[1]
        y[r, offset + c + 2] = sums[2]
        y[r, offset + c + 3] = sums[3]
        y[r, offset + c + 4] = sums[4]
        y[r, offset + c + 5] = sums[5]
        y[r, offset + c + 6] = sums[6]
        y[r, offset + c + 7] = sums[7]


# x (n, m) float64; w, p (n, m) float32; null (n,) float64; sums (blocks of ROWS rows, 2, s, s + 1) float64 with
# s = m, 2 m or 3 m for the first so many of S = [x, w, p].
@kernel(parallel=True, fastmath=True)
def gram(indptr, indices, data, x, w, p, null, sums):
    """S' A S (and zeros) and S' [S, null] of every block of rows."""
    n, m = x.shape
    s = sums.shape[2]
    for block in numba.prange(sums.shape[0]):
        first = block * ROWS
        # Four rows at a time: a sum is read and written once for four products.
        here = np.zeros((4, s + 1))
        images = np.zeros((4, s))
        sums[block] = 0
        energies = sums[block, 0]
        masses = sums[block, 1]
        last = min(first + ROWS, n)
        for group in range(first, last, 4):
            for r in range(4):
                i = group + r
                if i < last:
                    start, stop = indptr[i], indptr[i + 1]
                    _row_images(indices, data, start, stop, x, images, r, 0)
                    for c in range(m):
                        here[r, c] = x[i, c]
                    if s > m:
                        _row_images(indices, data, start, stop, w, images, r, m)
                        for c in range(m):
                            here[r, m + c] = w[i, c]
                    if s > 2 * m:
                        _row_images(indices, data, start, stop, p, images, r, 2 * m)
                        for c in range(m):
                            here[r, 2 * m + c] = p[i, c]
                    here[r, s] = null[i]
                else:
                    here[r] = 0
                    images[r] = 0
            for a in range(s):
                h0, h1, h2, h3 = here[0, a], here[1, a], here[2, a], here[3, a]
                for b in range(s):
                    energies[a, b] += h0 * images[0, b] + h1 * images[1, b] + h2 * images[2, b] + h3 * images[3, b]
                for b in range(s + 1):
                    masses[a, b] += h0 * here[0, b] + h1 * here[1, b] + h2 * here[2, b] + h3 * here[3, b]


# change (s + 1, 2 m) float64: S change[:s] + null change[s] is [x, p] afterwards.
@kernel(parallel=True, fastmath=True)
def advance(x, w, p, null, change):
    """[x, p] = [S, null] change, in place."""
    n, m = x.shape
    s = change.shape[0] - 1
    for block in numba.prange((n + ROWS - 1) // ROWS):
        here = np.zeros((4, s + 1))
        new = np.empty((4, 2 * m))
        last = min(block * ROWS + ROWS, n)
        for group in range(block * ROWS, last, 4):
            some = min(4, last - group)
            for r in range(some):
                i = group + r
                for c in range(m):
                    here[r, c] = x[i, c]
                if s > m:
                    for c in range(m):
                        here[r, m + c] = w[i, c]
                if s > 2 * m:
                    for c in range(m):
                        here[r, 2 * m + c] = p[i, c]
                here[r, s] = null[i]
            new[:] = 0
            for a in range(s + 1):
                h0, h1, h2, h3 = here[0, a], here[1, a], here[2, a], here[3, a]
                for c in range(2 * m):
                    v = change[a, c]
                    new[0, c] += h0 * v
                    new[1, c] += h1 * v
                    new[2, c] += h2 * v
                    new[3, c] += h3 * v
            for r in range(some):
                i = group + r
                for c in range(m):
                    x[i, c] = new[r, c]
                    p[i, c] = new[r, m + c]
