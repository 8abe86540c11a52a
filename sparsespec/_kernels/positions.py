"""Where tokens say they lie within their object: steps between neighbours, and how well a region agrees."""

from __future__ import annotations

import math

import numpy as np

from sparsespec._kernels._compile import kernel
from sparsespec._kernels.window import LEAST_WEIGHT


@kernel()
def weaken_back_steps(indptr, indices, data, horizontal, vertical, width, strength, first, last, out):
    # int[N + 1], int[E], float64[E], float64[N], float64[N], int, float, int, int, float64[E]: None
    """Weights of the rows first..last times exp(-strength * how far the position steps back along the edge)."""
    for i in range(first, last):
        row, column = i // width, i % width
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            down, right = j // width - row, j % width - column
            step = right * (horizontal[j] - horizontal[i]) + down * (vertical[j] - vertical[i])
            # At least 1, for a token joined to itself.
            back = max(0.0, -step / math.sqrt(max(1, right * right + down * down)))
            out[e] = max(LEAST_WEIGHT, data[e] * math.exp(-strength * back))


@kernel()
def residuals(tokens, ends, horizontal, vertical, width):
    # int32[:], int64[:], float64[N], float64[N], int -> float64[:]
    """Mean squared distance, over a region's tokens, of the position told from the one in the region's own box."""
    out = np.empty(ends.size)
    start = 0
    for region in range(ends.size):
        top, bottom, left, right = 1 << 40, -1, 1 << 40, -1
        for k in range(start, ends[region]):
            row, column = tokens[k] // width, tokens[k] % width
            top, bottom = min(top, row), max(bottom, row)
            left, right = min(left, column), max(right, column)
        total = 0.0
        for k in range(start, ends[region]):
            token = tokens[k]
            row, column = token // width, token % width
            x = (column - left + 0.5) / (right - left + 1) - 0.5
            y = (row - top + 0.5) / (bottom - top + 1) - 0.5
            total += (horizontal[token] - x) ** 2 + (vertical[token] - y) ** 2
        out[region] = total / max(ends[region] - start, 1)
        start = ends[region]
    return out
