"""Bray-Curtis over Chebyshev: every pair, listed pairs, and the k nearest of all tokens or of a window of the grid.

Every kernel adds the channels of one pair in the same order with plain IEEE arithmetic, so all of them return the same
bits for the same pair, for either order of the pair and for any number of threads. The inner loops run over tokens in
channel-major copies of the features, which vectorises without reordering a sum.
"""

from __future__ import annotations

import numba
import numpy as np

from sparsespec._kernels._compile import kernel

# Columns handled at a time: a block of 60 channels stays in the first-level cache next to its accumulators.
BLOCK = 128
# Channels are taken four at a time so that the accumulators travel to the cache and back once for four channels;
# callers pad with channels of zeros, which change no sum and no maximum.
CHANNEL_STEP = 4
# Rows that one thread takes at a time.
ROWS = 16

# The index of a prange loop is unsigned, and unsigned with signed makes a float: hence np.intp around each.


@kernel()
def _affinity(difference, total, largest):
    # float32(float32, float32, float32): sum|a - b|, sum|a + b|, max|a - b|
    one = np.float32(1.0)
    if total == np.float32(0.0):
        # b = -a: Bray-Curtis is infinite; two rows of zeros: it is undefined. Either way, no affinity.
        return np.float32(0.0)
    return (one + largest) / (one + difference / total)


@kernel()
def _pair_block(rows, i, columns, start, difference, total, largest, affinity):
    # void(float32[N, C], intp, float32[C, M], intp, float32[BLOCK] x 4): token i against BLOCK columns from `start`
    zero = np.float32(0.0)
    for j in range(BLOCK):
        difference[j] = zero
        total[j] = zero
        largest[j] = zero
    for c in range(0, columns.shape[0], CHANNEL_STEP):
        a0 = rows[i, c]
        a1 = rows[i, c + 1]
        a2 = rows[i, c + 2]
        a3 = rows[i, c + 3]
        b0 = columns[c, start : start + BLOCK]
        b1 = columns[c + 1, start : start + BLOCK]
        b2 = columns[c + 2, start : start + BLOCK]
        b3 = columns[c + 3, start : start + BLOCK]
        for j in range(BLOCK):
            d0 = abs(a0 - b0[j])
            d1 = abs(a1 - b1[j])
            d2 = abs(a2 - b2[j])
            d3 = abs(a3 - b3[j])
            difference[j] = (((difference[j] + d0) + d1) + d2) + d3
            total[j] = (((total[j] + abs(a0 + b0[j])) + abs(a1 + b1[j])) + abs(a2 + b2[j])) + abs(a3 + b3[j])
            e0 = d0 if d0 > d1 else d1
            e1 = d2 if d2 > d3 else d3
            e0 = e0 if e0 > e1 else e1
            largest[j] = e0 if e0 > largest[j] else largest[j]
    for j in range(BLOCK):
        affinity[j] = _affinity(difference[j], total[j], largest[j])


@kernel()
def _insert(value, j, neighbours, weights, count):
    # intp(float32, intp, int32[k], float32[k], intp): the new count. Lists stay sorted, highest first. Called with
    # ascending j and strict about "greater", so that of equal affinities the lowest index stays.
    room = weights.size
    if value <= np.float32(0.0) or (count == room and value <= weights[room - 1]):
        return count
    place = min(count, room - 1)
    while place > 0 and weights[place - 1] < value:
        weights[place] = weights[place - 1]
        neighbours[place] = neighbours[place - 1]
        place -= 1
    weights[place] = value
    neighbours[place] = j
    return min(count + 1, room)


@kernel(parallel=True)
def nearest_of_all(rows, columns, size, neighbours, weights, counts):
    # void(float32[N, C], float32[C, M], intp, int32[N, k], float32[N, k], int32[N]), N = size <= M, M = n BLOCK
    for part in numba.prange((size + ROWS - 1) // ROWS):
        difference = np.empty(BLOCK, np.float32)
        total = np.empty(BLOCK, np.float32)
        largest = np.empty(BLOCK, np.float32)
        affinity = np.empty(BLOCK, np.float32)
        first = np.intp(part) * ROWS
        last = min(first + ROWS, size)
        for start in range(0, size, BLOCK):
            stop = min(BLOCK, size - start)
            for i in range(first, last):
                _pair_block(rows, i, columns, start, difference, total, largest, affinity)
                for j in range(stop):
                    if start + j != i:
                        counts[i] = _insert(affinity[j], start + j, neighbours[i], weights[i], counts[i])


@kernel(parallel=True)
def all_pairs(rows, columns, size, out):
    # void(float32[N, C], float32[C, M], intp, float32[N, N]), N = size <= M, M = n BLOCK
    parts = (size + ROWS - 1) // ROWS
    # A part computes the pairs from its own rows onwards: the first and the last part together make an even load.
    for couple in numba.prange((parts + 1) // 2):
        difference = np.empty(BLOCK, np.float32)
        total = np.empty(BLOCK, np.float32)
        largest = np.empty(BLOCK, np.float32)
        tile = np.empty((ROWS, BLOCK), np.float32)
        for end in range(2):
            part = np.intp(couple) if end == 0 else parts - 1 - np.intp(couple)
            if end == 1 and part == np.intp(couple):
                continue
            first = part * ROWS
            last = min(first + ROWS, size)
            for start in range(first // BLOCK * BLOCK, size, BLOCK):
                stop = min(start + BLOCK, size)
                for i in range(first, last):
                    _pair_block(rows, i, columns, start, difference, total, largest, tile[i - first])
                    for j in range(max(start, first), stop):
                        out[i, j] = tile[i - first, j - start]
                for j in range(max(start, last), stop):
                    for i in range(first, last):
                        out[j, i] = tile[i - first, j - start]
            for i in range(first, last):
                out[i, i] = np.float32(1.0)


@kernel()
def listed_pairs(features, first, second, out):
    # void(float32[N, C], intp[E], intp[E], float64[E])
    for pair in range(first.size):
        i = first[pair]
        j = second[pair]
        difference = np.float32(0.0)
        total = np.float32(0.0)
        largest = np.float32(0.0)
        for c in range(features.shape[1]):
            d = abs(features[i, c] - features[j, c])
            difference += d
            total += abs(features[i, c] + features[j, c])
            largest = d if d > largest else largest
        out[pair] = _affinity(difference, total, largest) if i != j else np.float32(1.0)


@kernel(parallel=True)
def nearest_of_window(columns, width, rows_off, cols_off, neighbours, weights, counts):
    # void(float32[C, N], intp, intp[P], intp[P], int32[N, k], float32[N, k], int32[N]): offsets in row-major order
    n_channels, size = columns.shape
    height = size // width
    for line in numba.prange(height):
        y = np.intp(line)
        difference = np.empty(width, np.float32)
        total = np.empty(width, np.float32)
        largest = np.empty(width, np.float32)
        # One offset at a time for a whole row of the grid: its tokens and their neighbours lie side by side.
        for p in range(rows_off.size):
            left = max(0, -cols_off[p])
            count = min(width, width - cols_off[p]) - left
            if y + rows_off[p] < 0 or y + rows_off[p] >= height or count <= 0:
                continue
            here = y * width + left
            there = here + rows_off[p] * width + cols_off[p]
            for x in range(count):
                difference[x] = np.float32(0.0)
                total[x] = np.float32(0.0)
                largest[x] = np.float32(0.0)
            for c in range(n_channels):
                a = columns[c, here : here + count]
                b = columns[c, there : there + count]
                for x in range(count):
                    d = abs(a[x] - b[x])
                    difference[x] += d
                    total[x] += abs(a[x] + b[x])
                    largest[x] = d if d > largest[x] else largest[x]
            for x in range(count):
                i = here + x
                value = _affinity(difference[x], total[x], largest[x])
                counts[i] = _insert(value, there + x, neighbours[i], weights[i], counts[i])
