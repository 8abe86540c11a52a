"""Recursive normalised cuts of regions of a sparse graph: many small Fiedler problems, solved where they arise.

A graph is indptr, indices (int32) and data (float64) of a symmetric CSR matrix with sorted rows, its tokens ordered so
that neighbours have close numbers. A region is a sorted int32 array of tokens. ``local`` is an int32 array of -1, one
for each token of the graph, and is left as it was.
"""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import device, kernel
from sparsespec._kernels.band import BLOCK, factor, solve

# The null vector of the Laplacian is taken out by hand; the shift only has to keep the factorisation positive.
_SHIFT = 1e-7
_MAX_ITERATIONS = 60
_AREA = BLOCK * BLOCK


@device(fastmath=True)
def _dot(a, b, n):  # float64[:], float64[:], int -> float64
    total = 0.0
    for i in range(n):
        total += a[i] * b[i]
    return total


@device()
def _subtract(x, scale, y, n):
    for i in range(n):
        x[i] -= scale * y[i]


@device()
def _enter(indptr, indices, data, mine, local, pointers, columns, weights, degree):
    """Edges of a region's tokens to earlier ones of it, numbered within the region, and the tokens' degrees.

    Returns how far apart the tokens of an edge lie.
    """
    n = mine.size
    for i in range(n):
        local[mine[i]] = i
        degree[i] = 0.0
    filled, width = 0, 0
    for i in range(n):
        token = mine[i]
        pointers[i] = filled
        for e in range(indptr[token], indptr[token + 1]):
            if indices[e] > token:
                break
            j = local[indices[e]]
            if j >= 0:
                columns[filled] = j
                weights[filled] = data[e]
                filled += 1
                degree[i] += data[e]
                if j != i:
                    degree[j] += data[e]
                width = max(width, i - j)
    pointers[n] = filled
    for i in range(n):
        local[mine[i]] = -1
    return width


@device()
def _fill_band(pointers, columns, weights, inverse_root, n, wide, band, first, last):
    """Blocks of the shifted normalised Laplacian, padded by an identity to whole blocks."""
    blocks = first.size
    for at in range(blocks * wide * _AREA):
        band[at] = 0.0
    for block in range(blocks):
        first[block] = block
    for i in range(BLOCK * blocks):
        own = i // BLOCK
        band[own * wide * _AREA + (BLOCK + 1) * (i % BLOCK)] = 1.0 + _SHIFT
    for i in range(n):
        own, row = i // BLOCK, i % BLOCK
        for e in range(pointers[i], pointers[i + 1]):
            j = columns[e]
            other, column = j // BLOCK, j % BLOCK
            value = weights[e] * inverse_root[i] * inverse_root[j]
            at = (other * wide + own - other) * _AREA
            band[at + BLOCK * column + row] -= value
            if own == other and row != column:
                band[at + BLOCK * row + column] -= value
            first[own] = min(first[own], other)
    for block in range(blocks):
        for other in range(first[block], block + 1):
            last[other] = block


@device()
def _fiedler(pointers, columns, weights, degree, n, width, cosines, tolerance, vectors, work, band):
    """Two smallest nontrivial eigenvectors of a connected region's normalised Laplacian, by block inverse iteration.

    Writes random-walk eigenvectors D^-1/2 u into the first two rows of vectors. Returns of the first the eigenvalue and
    the residual ||L u - lambda u||, how many iterations ran, and the band, which grows when it has to.
    """
    blocks = (n + BLOCK - 1) // BLOCK
    padded = BLOCK * blocks
    wide = (width + BLOCK - 1) // BLOCK + 1
    if band.size < blocks * wide * _AREA:
        band = np.empty(blocks * wide * _AREA)
    inverse_root, trivial, a0, b0, a, b = work[0], work[1], work[2], work[3], work[4], work[5]
    bounds = np.empty((2, blocks), np.int64)
    first, last = bounds[0], bounds[1]
    inverse = np.empty((2, padded * BLOCK))

    volume = 0.0
    for i in range(n):
        volume += degree[i]
    for i in range(n):
        inverse_root[i] = 1.0 / np.sqrt(degree[i])
        trivial[i] = np.sqrt(degree[i] / volume)
        # Position along the ordering is close to the smoothest vector of a long region; the second start has a share of
        # every eigenvector, and neither draws a random number.
        a0[i] = (i - 0.5 * (n - 1)) / inverse_root[i]
        b0[i] = cosines[i] / inverse_root[i]
    for i in range(n, padded):
        trivial[i], a0[i], b0[i] = 0.0, 0.0, 0.0
    _subtract(a0, _dot(a0, trivial, padded), trivial, padded)
    _subtract(b0, _dot(b0, trivial, padded), trivial, padded)
    _fill_band(pointers, columns, weights, inverse_root, n, wide, band, first, last)
    factor(band, first, blocks, wide, inverse[0], inverse[1])

    iterations = 0
    while iterations < _MAX_ITERATIONS:
        iterations += 1
        for i in range(padded):
            a[i], b[i] = a0[i], b0[i]
        solve(band, last, blocks, wide, inverse[0], inverse[1], a, b)
        _subtract(a, _dot(a, trivial, padded), trivial, padded)
        _subtract(b, _dot(b, trivial, padded), trivial, padded)
        size_a, size_b = np.sqrt(_dot(a, a, padded)), np.sqrt(_dot(b, b, padded))
        if not size_a > 0.0:
            break
        for i in range(padded):
            a[i] /= size_a
        along = _dot(a, b, padded)
        _subtract(b, along, a, padded)
        rest = _dot(a, b, padded)
        _subtract(b, rest, a, padded)
        _subtract(b, _dot(b, trivial, padded), trivial, padded)
        along += rest
        left = np.sqrt(_dot(b, b, padded))
        # What was solved for tells what the Laplacian makes of the solution: (L + shift) a = a0, and so on.
        scale, mixed = 1.0 / size_a, along / size_a
        if not left > 1e-12 * size_b:
            # The second start was no different from the first.
            for i in range(padded):
                a0[i] = a[i]
                b0[i] = a[i]
            break
        for i in range(padded):
            b[i] /= left
            b0[i] = (b0[i] - mixed * a0[i]) / left
            a0[i] *= scale
        # Rayleigh-Ritz in the plane of the two.
        aa, ab, bb = _dot(a, a0, padded) - _SHIFT, _dot(a, b0, padded), _dot(b, b0, padded) - _SHIFT
        angle = 0.5 * np.arctan2(2.0 * ab, aa - bb) + 0.5 * np.pi
        c, s = np.cos(angle), np.sin(angle)
        value = c * c * aa + 2.0 * c * s * ab + s * s * bb
        residual = 0.0
        for i in range(padded):
            low = c * a[i] + s * b[i]
            difference = c * a0[i] + s * b0[i] - (_SHIFT + value) * low
            residual += difference * difference
            b0[i] = c * b[i] - s * a[i]
            a0[i] = low
        if np.sqrt(residual) <= tolerance * value or value < 1e-12:
            break
    for i in range(n):
        vectors[0, i] = a0[i] * inverse_root[i]
        vectors[1, i] = b0[i] * inverse_root[i]
    # Taken from the edges themselves, both hold for the vector as it is, however small the eigenvalue.
    for i in range(n):
        a[i] = 0.0
    for i in range(n):
        for e in range(pointers[i], pointers[i + 1]):
            j = columns[e]
            flow = weights[e] * (vectors[0, i] - vectors[0, j])
            a[i] += flow
            a[j] -= flow
    value, size = 0.0, 0.0
    for i in range(n):
        value += vectors[0, i] * a[i]
        size += degree[i] * vectors[0, i] * vectors[0, i]
    value /= size
    error = 0.0
    for i in range(n):
        error += (inverse_root[i] * (a[i] - value * degree[i] * vectors[0, i])) ** 2
    return value, np.sqrt(error / size), iterations, band


@device()
def _sort(keys, spare, padded):
    """Sort int64 keys whose number is a multiple of eight: networks of eight, then merges; returns where they are."""
    for start in range(0, padded, BLOCK):
        part = keys[start : start + BLOCK]
        for i, j in (
            (0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7), (0, 1), (2, 3),
            (4, 5), (6, 7), (2, 4), (3, 5), (1, 4), (3, 6), (1, 2), (3, 4), (5, 6),
        ):  # fmt: skip
            low = min(part[i], part[j])
            part[j] = max(part[i], part[j])
            part[i] = low
    width = BLOCK
    while width < padded:
        for start in range(0, padded, 2 * width):
            i, middle, end = start, min(start + width, padded), min(start + 2 * width, padded)
            j, k = middle, start
            while i < middle and j < end:
                # Without a branch: which of the two is smaller can't be predicted.
                left, right = keys[i], keys[j]
                spare[k] = min(left, right)
                second = int(right < left)
                j += second
                i += 1 - second
                k += 1
            while i < middle:
                spare[k] = keys[i]
                i += 1
                k += 1
            while j < end:
                spare[k] = keys[j]
                j += 1
                k += 1
        keys, spare = spare, keys
        width *= 2
    return keys


@device()
def _order(vector, n, keys, spare):
    """Positions by rising entries, ties by position; beyond ten digits entries count as equal."""
    bits = 1
    while (1 << bits) < n:
        bits += 1
    low = (1 << bits) - 1
    whole = vector.view(np.int64)
    for i in range(n):
        key = whole[i]
        # Negative numbers lie the other way round, once their sign is off.
        key ^= (key >> 63) & 0x7FFFFFFFFFFFFFFF
        keys[i] = (key & ~low) | i
    padded = (n + BLOCK - 1) // BLOCK * BLOCK
    for i in range(n, padded):
        keys[i] = 0x7FFFFFFFFFFFFFFF
    ordered = _sort(keys, spare, padded)
    for i in range(n):
        ordered[i] &= low
    return ordered


@device()
def _sweep(pointers, columns, weights, degree, vector, n, keys, spare, rank, change):
    """Smallest normalised cut along the order of a vector, and how many tokens are before it; fills their ranks."""
    ordered = _order(vector, n, keys, spare)
    total = 0.0
    for r in range(n):
        rank[ordered[r]] = r
        total += degree[r]
    for r in range(n):
        change[r] = degree[ordered[r]]
    # An edge enters the cut with its first token and leaves it with the second.
    for i in range(n):
        mine = rank[i]
        for e in range(pointers[i], pointers[i + 1]):
            j = columns[e]
            if j != i:
                change[max(mine, rank[j])] -= 2.0 * weights[e]
            else:
                change[mine] -= weights[e]
    cut, volume = 0.0, 0.0
    best, position = np.inf, 0
    for r in range(n - 1):
        cut += change[r]
        volume += degree[ordered[r]]
        value = cut / volume + cut / max(total - volume, 1e-300)
        if value < best:
            best, position = value, r + 1
    return max(best, 0.0), position


@device()
def _best_of_sweeps(pointers, columns, weights, degree, vectors, n, keys, ranks, change):
    """Value, row of ranks and position of the smallest of the cuts along several vectors."""
    best, position, which = np.inf, 0, 0
    for k in range(vectors.shape[0]):
        # The first of equals counts; there are two rows of ranks, and the better one is kept.
        value, where = _sweep(
            pointers, columns, weights, degree, vectors[k], n, keys[0], keys[1], ranks[1 - which], change
        )
        if k == 0 or value < best:
            best, position, which = value, where, 1 - which
    return best, which, position


@device()
def find(parent, i):
    """Root of an element of a forest of parents, which becomes shallower."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@device()
def join(parent, i, j):
    """Make one tree of the two that the elements are in; its root is its first element."""
    one, other = find(parent, i), find(parent, j)
    parent[max(one, other)] = min(one, other)


@device()
def _label_parts(pointers, columns, rank, position, n, parent, label, bounds):
    """Number the connected parts of the tokens ranked before a position, then those of the rest; returns how many.

    bounds[c] becomes the number of tokens in parts 0 to c.
    """
    for i in range(n):
        parent[i] = i
        mine = rank[i] < position
        for e in range(pointers[i], pointers[i + 1]):
            if (rank[columns[e]] < position) == mine:
                join(parent, i, columns[e])
    count = 0
    for side in range(2):
        for i in range(n):
            if (rank[i] >= position) == (side == 1):
                root = find(parent, i)
                if root == i:
                    label[i] = count
                    bounds[count] = 0
                    count += 1
                label[i] = label[root]
                bounds[label[i]] += 1
    for c in range(1, count):
        bounds[c] += bounds[c - 1]
    return count


@device()
def _bring_together(mine, label, n, bounds, spare):
    """Reorder tokens part by part, each sorted."""
    for i in range(n):
        spare[i] = mine[i]
    for i in range(n - 1, -1, -1):
        bounds[label[i]] -= 1
        mine[bounds[label[i]]] = spare[i]
    for c in range(bounds.size - 1):
        bounds[c] = bounds[c + 1]
    bounds[bounds.size - 1] = n


@kernel()
def sweep_region(indptr, indices, data, mine, vectors):
    # graph, int32[:] sorted, (k, n) float64 -> float, bool[:]
    """Smallest normalised cut of a connected region along any of the given vectors, and its first side."""
    n = mine.size
    local, integers, columns, weights, work = _make_scratch(indices, indptr.size - 1, n)
    _enter(indptr, indices, data, mine, local, integers[0], columns, weights, work[0])
    value, which, position = _best_of_sweeps(
        integers[0], columns, weights, work[0], vectors, n, integers[3:5], integers[1:3], work[3]
    )
    return value, integers[1 + which, :n] < position


@device()
def _make_scratch(indices, tokens, n):
    """Arrays for the cuts of regions of up to n tokens."""
    edges = indices.size // 2 + tokens + 1
    padded = (n + BLOCK) // BLOCK * BLOCK
    local = np.full(tokens, -1, np.int32)
    return local, np.empty((7, padded + 1), np.int64), np.empty(edges, np.int64), np.empty(edges), np.empty((9, padded))


@kernel()
def split_nodes(
    indptr, indices, data, salts, arena, tasks, whole_up_to, largest_cut, tolerance, cosines, starts, sizes, births,
    cuts, values, lefts, hashes,
):  # fmt: skip
    # graph, int64[N], int32[:], int64[:], int, float, float, float64[:], node arrays in place -> int, int, float
    """Recursive normalised cuts of many connected regions, for every threshold up to `largest_cut` at once.

    A node is a run of tokens of the arena, which a cut only reorders, so that the nodes below it are parts of its run.
    A node of n tokens owns 2 n - 1 places in the node arrays: its own, and after it those of its parts, one after the
    other; places left over have size 0. It is part of the partition at threshold t if birth <= t < cut. Tasks are
    nodes; those of up to `whole_up_to` tokens are followed to the leaves, others are cut once. Calls for different
    tasks may run at once: they touch different runs and places.

    Fills for each node the cut, the eigenvalue of the first Fiedler vector, how many tokens are on the first side, and
    the exclusive or of the tokens' salts. Returns how many nodes there were, the iterations, and the largest residual.
    ``cosines`` are cos(2.3 i + 0.7), for as many i as the largest task has tokens.
    """
    local, integers, columns, weights, work = _make_scratch(indices, indptr.size - 1, cosines.size)
    pointers, label, parent, bounds = integers[0], integers[4], integers[3], integers[5]
    degree, vectors = work[0], work[1:3]
    band = np.empty(0)
    made, iterations, largest_residual = 0, 0, 0.0
    for task in tasks:
        end = task + 1 if sizes[task] > whole_up_to else task + 2 * sizes[task] - 1
        node = task
        while node < end:
            start, n = starts[node], sizes[node]
            if n == 0:
                node += 1
                continue
            made += 1
            mine = arena[start : start + n]
            hashes[node] = 0
            for i in range(n):
                hashes[node] ^= salts[mine[i]]
            # Of a single token, which nothing can divide.
            value, position, which = np.inf, 1, 0
            values[node] = 2.0
            if n > 1:
                width = _enter(indptr, indices, data, mine, local, pointers, columns, weights, degree)
            if n == 2:
                # The one nontrivial vector is known.
                integers[1, 0], integers[1, 1] = 0, 1
                value = weights[pointers[1]] * (1.0 / degree[0] + 1.0 / degree[1])
                values[node] = value
            elif n > 2:
                values[node], residual, ran, band = _fiedler(
                    pointers, columns, weights, degree, n, width, cosines, tolerance, vectors, work[3:9], band
                )
                iterations += ran
                largest_residual = max(largest_residual, residual)
                value, which, position = _best_of_sweeps(
                    pointers, columns, weights, degree, vectors, n, integers[3:5], integers[1:3], work[3]
                )
            cuts[node], lefts[node] = value, position
            if n < 2 or position == 0 or not value <= largest_cut:
                node += 2 * n - 1
                continue
            count = _label_parts(pointers, columns, integers[1 + which], position, n, parent, label, bounds)
            _bring_together(mine, label, n, bounds[:count], integers[6])
            child, begin = node + 1, 0
            for c in range(count):
                starts[child], sizes[child], births[child] = start + begin, bounds[c] - begin, max(births[node], value)
                child += 2 * (bounds[c] - begin) - 1
                begin = bounds[c]
            # Three parts and more leave places over.
            for place in range(child, node + 2 * n - 1):
                sizes[place] = 0
            node += 1
    return made, iterations, largest_residual
