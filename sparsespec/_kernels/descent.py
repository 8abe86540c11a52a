"""Approximate nearest tokens by BoC: like tokens in blocks, and blocks searched against what their neighbours list.

Tokens are put into an order in which like tokens follow each other; every `BLOCK` of that order is searched as one:
its candidates are gathered once and compared with all of its tokens in register-sized tiles. Every kernel reads what
the last one left and writes to places of its own, so that the number of threads changes nothing. But for the exact
affinities at the end, a token is called by its place in that order.
"""

from __future__ import annotations

import numba
import numpy as np

from sparsespec._kernels import boc, tiles
from sparsespec._kernels._compile import device, kernel

# Tokens searched together.
BLOCK = 64
# Rows of a node that its direction is computed from, and steps of the power iteration.
SAMPLE = 128
STEPS = 4
# A token listed by a token of the block counts as much as so many that are only listed by listed ones.
DIRECT = 1024
CEILING = 8192
# Parts of the blocks with counters of their own.
PARTS = 64
# A block's filter of candidates that it has met, 64 bits a word: 16 KiB. Of 15,000 met, it mistakes about 4 % of new
# ones, of 20,000 about 7 %.
WORDS = 2048

_QUERIES, _CANDIDATES, _GROUP = tiles.QUERIES, tiles.CANDIDATES, tiles.GROUP


@device()
def _dot(row, direction):
    # float32(float32[C], float32[C]): four sums side by side, the same ones on every machine
    whole = row.size // 4 * 4
    t0 = t1 = t2 = t3 = np.float32(0.0)
    for c in range(0, whole, 4):
        t0 += row[c] * direction[c]
        t1 += row[c + 1] * direction[c + 1]
        t2 += row[c + 2] * direction[c + 2]
        t3 += row[c + 3] * direction[c + 3]
    for c in range(whole, row.size):
        t0 += row[c] * direction[c]
    return (t0 + t1) + (t2 + t3)


@device()
def _divide(keys, order, first, middle, last):
    # void(float32[N], int32[N], intp, intp, intp): the lowest keys of [first, last) go to [first, middle)
    low, high = first, last - 1
    while low < high:
        a, b, c = keys[low], keys[(low + high) // 2], keys[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while keys[i] < pivot:
                i += 1
            while keys[j] > pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                order[i], order[j] = order[j], order[i]
                i += 1
                j -= 1
        if middle <= j:
            high = j
        elif middle >= i:
            low = i
        else:
            return


@kernel(parallel=True)
def split_nodes(features, order, bounds, keys):
    # void(float32[N, C], int32[N], intp[nodes + 1], float32[N]): each node of more than a block is halved in `order`
    n_channels = features.shape[1]
    for one in numba.prange(bounds.size - 1):
        node = np.intp(one)
        first, last = bounds[node], bounds[node + 1]
        n_blocks = (last - first + BLOCK - 1) // BLOCK
        if n_blocks < 2:
            continue
        # The main direction of an evenly spread sample: power iteration on its covariance.
        count = min(SAMPLE, last - first)
        sample = np.empty((count, n_channels), np.float32)
        mean = np.zeros(n_channels, np.float32)
        for s in range(count):
            row = features[order[first + s * (last - first) // count]]
            for c in range(n_channels):
                sample[s, c] = row[c]
                mean[c] += row[c]
        direction = np.zeros(n_channels, np.float32)
        largest = np.float32(-1.0)
        for s in range(count):
            for c in range(n_channels):
                sample[s, c] -= mean[c] / np.float32(count)
            length = _dot(sample[s], sample[s])
            if length > largest:
                largest = length
                direction[:] = sample[s]
        for _ in range(STEPS):
            renewed = np.zeros(n_channels, np.float32)
            for s in range(count):
                along = _dot(sample[s], direction)
                for c in range(n_channels):
                    renewed[c] += along * sample[s, c]
            length = np.sqrt(_dot(renewed, renewed))
            if not (length > np.float32(0.0)):
                break
            for c in range(n_channels):
                direction[c] = renewed[c] / length
        for place in range(first, last):
            keys[place] = _dot(features[order[place]], direction)
        _divide(keys, order, first, first + (n_blocks + 1) // 2 * BLOCK, last)


@device()
def _keep(value, token, neighbours, values):
    # intp(float32, int32, int32[K], float32[K]): the place that it took in the list, highest first, or K
    room = values.size
    place = room
    while place > 0 and values[place - 1] < value:
        place -= 1
    same = place - 1
    while same >= 0 and values[same] == value:
        if neighbours[same] == token:
            return room
        same -= 1
    for p in range(room - 1, place, -1):
        values[p] = values[p - 1]
        neighbours[p] = neighbours[p - 1]
    values[place] = value
    neighbours[place] = token
    return place


@device()
def _search(rows, first, n_queries, candidates, n_candidates, unit, near, neighbours, values, work):
    # intp(int16[N, C], intp, intp, int32[:], intp, float32, intp, int32[B, K], float32[B, K], tuple): compare the
    # tokens from `first` with the candidates; the entries that came into the first `near` places of a list
    queries, queries_abs, tile, tile_abs, found, thresholds = work
    n_channels = rows.shape[1]
    room = values.shape[1]
    for q in range(BLOCK):
        thresholds[q] = values[q, room - 1] if q < n_queries else np.float32(np.inf)
        for c in range(n_channels):
            queries[q, c] = rows[first + q, c] if q < n_queries else 0
            queries_abs[q, c] = abs(queries[q, c])
    words = rows.view(np.int64)
    tile_words = tile.view(np.int64)
    changed = 0
    for start in range(0, n_candidates, _CANDIDATES):
        stop = min(_CANDIDATES, n_candidates - start)
        for j in range(_CANDIDATES):
            # The places beyond the last candidate repeat it, and find it already there.
            token = candidates[start + min(j, stop - 1)]
            for g in range(words.shape[1]):
                tile_words[g, j] = words[token, g]
        for g in range(tile.shape[0]):
            for j in range(tile.shape[1]):
                tile_abs[g, j] = abs(tile[g, j])
        for block in range(0, n_queries, _QUERIES):
            hits = tiles.compare(queries, queries_abs, block, tile, tile_abs, unit, thresholds, found)
            if not hits:
                continue
            for q in range(_QUERIES):
                query = block + q
                for j in range(_CANDIDATES):
                    token = candidates[start + min(j, stop - 1)]
                    if (
                        (hits >> (q * _CANDIDATES + j)) & 1
                        and found[q, j] > thresholds[query]
                        and token != first + query
                    ):
                        changed += _keep(found[q, j], token, neighbours[query], values[query]) < near
                        thresholds[query] = values[query, room - 1]
    return changed


@device()
def _workspace(n_channels):
    # tuple(intp)
    return (
        np.zeros((BLOCK, n_channels), np.int16),
        np.zeros((BLOCK, n_channels), np.int16),
        np.zeros((n_channels // _GROUP, _CANDIDATES * _GROUP), np.int16),
        np.zeros((n_channels // _GROUP, _CANDIDATES * _GROUP), np.int16),
        np.zeros((_QUERIES, _CANDIDATES), np.float32),
        np.zeros(BLOCK, np.float32),
    )


@kernel(parallel=True)
def search_all(rows, unit, neighbours, values):
    # void(int16[N, C], float32, int32[N, K], float32[N, K]): every token against every other
    size = rows.shape[0]
    for one in numba.prange((size + BLOCK - 1) // BLOCK):
        first = np.intp(one) * BLOCK
        last = min(first + BLOCK, size)
        work = _workspace(rows.shape[1])
        everyone = np.arange(size).astype(np.int32)
        here, its_values = neighbours[first:last], values[first:last]
        _search(rows, first, last - first, everyone, size, unit, 1, here, its_values, work)


@device()
def _place_in_filter(token):
    # (int64, int64)(intp): a word of a block's filter, and two bits in it
    mixed = (np.int64(token) * np.int64(0x9E3779B1)) & np.int64(0xFFFFFFFF)
    bits = (np.int64(1) << ((mixed >> np.int64(15)) & np.int64(63))) | (
        np.int64(1) << ((mixed >> np.int64(9)) & np.int64(63))
    )
    return mixed >> np.int64(21), bits


@kernel(parallel=True)
def descend(rows, unit, around, limit, near, links, filters, neighbours, values, pairs, changed):
    # void(int16[N, C], float32, intp, intp, intp, int32[N, L], int64[N / BLOCK, WORDS], int32[N, K], float32[N, K],
    # int64[PARTS], int64[PARTS]): one round; adds the pairs compared and the entries new in the first `near` places
    size = rows.shape[0]
    n_links = links.shape[1]
    n_blocks = (size + BLOCK - 1) // BLOCK
    for one in numba.prange(PARTS):
        part = np.intp(one)
        start, stop = part * n_blocks // PARTS, (part + 1) * n_blocks // PARTS
        if start == stop:
            continue
        work = _workspace(rows.shape[1])
        # How often each token was listed. The token "size" fills places of lists that are empty.
        counts = np.zeros(size + 1, np.int32)
        counts[size] = 1
        candidates = np.empty(size + 1, np.int32)
        often = np.zeros(CEILING + 1, np.int32)
        for block in range(start, stop):
            first, last = block * BLOCK, min((block + 1) * BLOCK, size)
            n = 0
            for token in range(max(0, first - around), min(size, last + around)):
                candidates[n] = token
                n += counts[token] == 0
                counts[token] += DIRECT
            for i in range(first, last):
                for e in range(n_links):
                    token = links[i, e]
                    candidates[n] = token
                    n += counts[token] == 0
                    counts[token] += DIRECT
            direct = n
            for place in range(direct):
                i = candidates[place]
                weight = counts[i] // DIRECT
                for e in range(n_links):
                    token = links[i, e]
                    candidates[n] = token
                    n += counts[token] == 0
                    counts[token] += weight
            # Those that are listed most often, as many as there is room for.
            often[:] = 0
            fresh = 0
            for place in range(n):
                token = candidates[place]
                word, bits = _place_in_filter(token)
                if filters[block, word] & bits == bits:
                    # Compared in an earlier round, or, rarely, like one that was.
                    counts[token] = 0
                else:
                    candidates[fresh] = token
                    fresh += 1
                    often[min(CEILING, counts[token])] += 1
            n = fresh
            least, taken = CEILING, often[CEILING]
            while least > 1 and taken + often[least - 1] <= limit:
                least -= 1
                taken += often[least]
            taken = 0
            for place in range(n):
                token = candidates[place]
                if counts[token] >= least and taken < limit:
                    candidates[taken] = token
                    taken += 1
                    word, bits = _place_in_filter(token)
                    filters[block, word] |= bits
                counts[token] = 0
            counts[size] = 1
            pairs[part] += taken * (last - first)
            here, its_values = neighbours[first:last], values[first:last]
            changed[part] += _search(rows, first, last - first, candidates, taken, unit, near, here, its_values, work)


@kernel()
def join_lists(neighbours, links, ends):
    # void(int32[N, K], int32[N, L], int32[N]): those that each token lists, then those that list it, the ones that
    # list it further up first, as many as there is room for; N where there are no more
    size, room = links.shape
    n_listed = neighbours.shape[1]
    for i in range(size):
        ends[i] = n_listed
        for rank in range(n_listed):
            links[i, rank] = neighbours[i, rank] if neighbours[i, rank] >= 0 else size
        for rank in range(n_listed, room):
            links[i, rank] = size
    for rank in range(n_listed):
        for i in range(size):
            j = neighbours[i, rank]
            if j >= 0 and ends[j] < room:
                links[j, ends[j]] = i
                ends[j] += 1


@kernel(parallel=True)
def finish(features, order, candidates, neighbours, weights, counts):
    # void(float32[N, C], int32[N], int32[N, K], int32[N, k], float32[N, k], int32[N]): exact affinities, and of the
    # candidates (places in the order) the nearest tokens of each token
    room = candidates.shape[1]
    n_neighbours = neighbours.shape[1]
    for one in numba.prange((order.size + BLOCK - 1) // BLOCK):
        block = np.intp(one)
        tokens = np.empty(room, np.intp)
        here = np.empty(room, np.intp)
        affinity = np.empty(room, np.float64)
        for place in range(block * BLOCK, min((block + 1) * BLOCK, order.size)):
            i = order[place]
            n = 0
            for j in candidates[place]:
                if j >= 0:
                    tokens[n] = order[j]
                    n += 1
            # In the order of the tokens, so that of equal affinities the lowest index stays first.
            tokens[:n].sort()
            here[:n] = i
            # The library's one formula for a pair, so that the weights have the bits of every other graph's.
            boc.listed_pairs(features, here[:n], tokens[:n], affinity[:n])
            count = 0
            for j in range(n):
                value = np.float32(affinity[j])
                if value <= np.float32(0.0) or (count == n_neighbours and value <= weights[i, count - 1]):
                    continue
                count = min(count + 1, n_neighbours)
                rank = count - 1
                while rank > 0 and weights[i, rank - 1] < value:
                    weights[i, rank] = weights[i, rank - 1]
                    neighbours[i, rank] = neighbours[i, rank - 1]
                    rank -= 1
                weights[i, rank] = value
                neighbours[i, rank] = tokens[j]
            counts[i] = count
            neighbours[i, count:] = -1
            weights[i, count:] = np.float32(0.0)
