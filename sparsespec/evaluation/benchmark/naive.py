"""The loops that anyone would write first, compiled by Numba: a peer, and a check of what is found.

Token by token, candidate by candidate, channel by channel, with the running list of the nearest kept sorted by
insertion. All threads are used; nothing is blocked, reordered or shared between pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = ["nearest_of_all", "nearest_of_window"]


def _compiled(*, parallel: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile on first use, kept on disk where that is possible."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(function, cache=True, parallel=parallel, nogil=True)
        except RuntimeError:
            return numba.njit(function, parallel=parallel, nogil=True)

    return decorate


@_compiled()
def _affinity(u, v):  # type: ignore[no-untyped-def]
    difference = np.float32(0.0)
    total = np.float32(0.0)
    largest = np.float32(0.0)
    for c in range(u.size):
        d = abs(u[c] - v[c])
        difference += d
        total += abs(u[c] + v[c])
        largest = max(largest, d)
    if total == 0.0:
        return np.float32(0.0)
    return (np.float32(1.0) + largest) / (np.float32(1.0) + difference / total)


@_compiled()
def _insert(value, j, neighbours, weights):  # type: ignore[no-untyped-def]
    place = weights.size - 1
    if value <= weights[place]:
        return
    while place > 0 and weights[place - 1] < value:
        weights[place] = weights[place - 1]
        neighbours[place] = neighbours[place - 1]
        place -= 1
    weights[place] = value
    neighbours[place] = j


@_compiled(parallel=True)
def nearest_of_all(features, tokens, neighbours, weights):  # type: ignore[no-untyped-def]
    # float32[N, C], int64[M], int32[M, k] of -1, float32[M, k] of 0: the last two are filled
    """Find the k nearest of all tokens to each of the listed ones."""
    for row in numba.prange(tokens.size):
        i = tokens[row]
        for j in range(features.shape[0]):
            if j != i:
                _insert(_affinity(features[i], features[j]), j, neighbours[row], weights[row])


@_compiled(parallel=True)
def nearest_of_window(features, width, radius, neighbours, weights):  # type: ignore[no-untyped-def]
    # float32[N, C], int, int, int32[N, k] of -1, float32[N, k] of 0: the last two are filled
    """Find the k nearest of the tokens at most ``radius`` rows and columns away."""
    size = features.shape[0]
    height = size // width
    for i in numba.prange(size):
        y, x = i // width, i % width
        for row in range(max(0, y - radius), min(height, y + radius + 1)):
            for column in range(max(0, x - radius), min(width, x + radius + 1)):
                j = row * width + column
                if j != i:
                    _insert(_affinity(features[i], features[j]), j, neighbours[i], weights[i])
