"""Regions of a token grid as lists of tokens: where they come from, which are the same, and how much they share."""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import kernel
from sparsespec._kernels.cuts import find, join

# Chains of a hash table: regions are thousands at most.
_CHAINS = 4096


@kernel()
def reorder(indptr, indices, data, order, rank, width):
    # int[:], int[:], float[:] of a CSR matrix, int32[N] new to old, int32[N] old to new, int -> CSR arrays, int
    """Renumber the tokens of a graph, rows sorted; also how far apart on the grid neighbours lie."""
    n = order.size
    new_indptr, new_indices = np.empty(n + 1, np.int32), np.empty(indices.size, np.int32)
    new_data = np.empty(indices.size)
    filled, radius = 0, 0
    for i in range(n):
        new_indptr[i] = filled
        old = order[i]
        for e in range(indptr[old], indptr[old + 1]):
            j, weight = rank[indices[e]], data[e]
            radius = max(radius, abs(old // width - indices[e] // width), abs(old % width - indices[e] % width))
            at = filled
            while at > new_indptr[i] and new_indices[at - 1] > j:
                new_indices[at], new_data[at] = new_indices[at - 1], new_data[at - 1]
                at -= 1
            new_indices[at], new_data[at] = j, weight
            filled += 1
    new_indptr[n] = filled
    return new_indptr, new_indices, new_data, radius


@kernel()
def superlevel_regions(indptr, indices, values, which, thresholds, short, radius, min_tokens, salts):
    # graph, float64[M, N], int64[P], float64[P], int, int, int, int64[N] -> int32[:], int64[:], int64[:], int64[:]
    """Connected parts of where each map is above each of its thresholds, each different one once.

    Connected means by edges of the graph, and on the grid, where diagonal neighbours touch. Tokens are numbered along
    the short side of the grid first. Returns the tokens of all regions, sorted in each, where each starts, its size,
    and how often it occurred.
    """
    n = indptr.size - 1
    parent, area, label = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    above = np.empty(n, np.bool_)
    begin, ends = np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)
    ordered = np.empty(n, np.int32)
    marks = np.empty(n, np.int64)
    # As many as there can be: what isn't written takes no memory.
    arena = np.empty(which.size * n, np.int32)
    starts, sizes, times, keys, following = np.empty((5, which.size * n), np.int64)
    chains = np.full(_CHAINS, -1, np.int64)
    regions, filled = 0, 0
    for p in range(which.size):
        for i in range(n):
            above[i] = values[which[p], i] > thresholds[p]
            parent[i] = i
        if radius > 1:
            for i in range(n):
                if above[i]:
                    column = i % short
                    if column > 0 and above[i - 1]:
                        join(parent, i, i - 1)
                    for j in range(i - short - (column > 0), i - short + 1 + (column < short - 1)):
                        if j >= 0 and above[j]:
                            join(parent, i, j)
        for i in range(n):
            area[i] = find(parent, i) if radius > 1 else 0
        for i in range(n):
            parent[i] = i
        for i in range(n):
            if above[i]:
                for e in range(indptr[i], indptr[i + 1]):
                    earlier = np.int64(indices[e])
                    if earlier >= i:
                        break
                    if above[earlier] and area[earlier] == area[i]:
                        join(parent, i, earlier)
        count = 0
        for i in range(n):
            if above[i]:
                root = find(parent, i)
                if root == i:
                    label[i] = count
                    ends[count] = 0
                    marks[count] = 0
                    count += 1
                label[i] = label[root]
                ends[label[i]] += 1
                marks[label[i]] ^= salts[i]
        total = 0
        for c in range(count):
            begin[c] = total
            total += ends[c]
            ends[c] = begin[c]
        for i in range(n):
            if above[i]:
                ordered[ends[label[i]]] = i
                ends[label[i]] += 1
        for c in range(count):
            size = ends[c] - begin[c]
            if size < min_tokens:
                continue
            chain = marks[c] & (_CHAINS - 1)
            known = chains[chain]
            while known >= 0:
                if keys[known] == marks[c] and sizes[known] == size:
                    same = 0
                    while same < size and arena[starts[known] + same] == ordered[begin[c] + same]:
                        same += 1
                    if same == size:
                        break
                known = following[known]
            if known >= 0:
                times[known] += 1
                continue
            following[regions], chains[chain] = chains[chain], regions
            starts[regions], sizes[regions], times[regions], keys[regions] = filled, size, 1, marks[c]
            for i in range(size):
                arena[filled + i] = ordered[begin[c] + i]
            filled += size
            regions += 1
    return arena[:filled], starts[:regions], sizes[:regions], times[:regions]


@kernel()
def collect_nodes(
    arena, roots, times, starts, sizes, births, cuts, hashes, largest_cut, levels, min_tokens, order
):  # fmt: skip
    # int32[:], int64[:], int64[:], node arrays, float, float64[:], int, int32[N] -> int32[:], int64[:], int64[:]
    """Regions that are part of some partition, each different one once: tokens, where each ends, in how many."""
    stamp = np.zeros(order.size, np.int64)
    chains, following = np.full(_CHAINS, -1, np.int64), np.empty(sizes.size, np.int64)
    chosen, count = np.empty(sizes.size, np.int64), np.empty(sizes.size, np.int64)
    regions, total, serial = 0, 0, 0
    for r in range(roots.size):
        node, end = roots[r], roots[r] + 2 * sizes[roots[r]] - 1
        while node < end:
            size = sizes[node]
            if size == 0:
                node += 1
                continue
            this = node
            node += 1 if size > 1 and cuts[node] <= largest_cut else 2 * size - 1
            if size < min_tokens:
                continue
            held = 0
            for level in levels:
                if births[this] <= level and level < cuts[this]:
                    held += times[r]
            if held == 0:
                continue
            chain = hashes[this] & (_CHAINS - 1)
            known, stamped = chains[chain], False
            while known >= 0:
                other = chosen[known]
                if hashes[other] == hashes[this] and sizes[other] == size:
                    if not stamped:
                        serial += 1
                        for i in range(size):
                            stamp[arena[starts[this] + i]] = serial
                        stamped = True
                    same = 0
                    while same < size and stamp[arena[starts[other] + same]] == serial:
                        same += 1
                    if same == size:
                        break
                known = following[known]
            if known >= 0:
                count[known] += held
                continue
            following[regions], chains[chain] = chains[chain], regions
            chosen[regions], count[regions] = this, held
            regions += 1
            total += size
    tokens, ends = np.empty(total, np.int32), np.empty(regions, np.int64)
    filled = 0
    for region in range(regions):
        start = starts[chosen[region]]
        for i in range(sizes[chosen[region]]):
            tokens[filled] = order[arena[start + i]]
            filled += 1
        ends[region] = filled
    return tokens, ends, count[:regions]


@kernel()
def summed_overlap(tokens, ends, times, asked, asked_ends, n_tokens):
    # int32[:], int64[:], int64[:], int32[:], int64[:], int -> float64[:]
    """Sum over all regions of the intersection over union with each region asked about, times `times`."""
    # Which regions each token is in.
    bounds = np.zeros(n_tokens + 1, np.int64)
    for token in tokens:
        bounds[token + 1] += 1
    for token in range(n_tokens):
        bounds[token + 1] += bounds[token]
    members, filled = np.empty(tokens.size, np.int32), bounds[:-1].copy()
    start = 0
    for region in range(ends.size):
        for i in range(start, ends[region]):
            members[filled[tokens[i]]] = region
            filled[tokens[i]] += 1
        start = ends[region]

    out = np.zeros(asked_ends.size)
    shared, met = np.zeros(ends.size, np.int64), np.empty(ends.size, np.int64)
    begin = 0
    for row in range(asked_ends.size):
        size, known = asked_ends[row] - begin, 0
        for i in range(begin, asked_ends[row]):
            for e in range(bounds[asked[i]], bounds[asked[i] + 1]):
                region = members[e]
                if shared[region] == 0:
                    met[known] = region
                    known += 1
                shared[region] += 1
        begin = asked_ends[row]
        for k in range(known):
            region = met[k]
            other = ends[region] - (ends[region - 1] if region > 0 else 0)
            out[row] += shared[region] / (size + other - shared[region]) * times[region]
            shared[region] = 0
    return out


@kernel()
def take_free(tokens, ends, sequence, min_free, wanted, n_tokens):
    # int32[:], int64[:], int64[:], float, int, int -> int32[N], int
    """Give regions in sequence what is free of them, if it is most of them; which has each token, -1 for none."""
    owner = np.full(n_tokens, -1, np.int32)
    count = 0
    for region in sequence:
        if count == wanted:
            break
        start = ends[region - 1] if region > 0 else 0
        free = 0
        for i in range(start, ends[region]):
            free += owner[tokens[i]] < 0
        if free >= min_free * (ends[region] - start):
            for i in range(start, ends[region]):
                if owner[tokens[i]] < 0:
                    owner[tokens[i]] = count
            count += 1
    return owner, count
