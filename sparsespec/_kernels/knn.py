"""The k nearest of all tokens by BoC, and the symmetric graph of any lists of neighbours.

Each pair is computed once and offered to both of its tokens. Tokens are divided into strips; in one round every strip
meets at most one other, as in a tournament, so no two threads write to the lists of the same token. What a token's list
holds in the end doesn't depend on the order of the offers: the k pairs of highest affinity, of equal ones those with
the lowest numbers. Whole tiles of pairs are compared with what both sides have so far, and few get further than that:
every token begins with the best of some hundred tokens beside it.
"""

from __future__ import annotations

import numba
import numpy as np

from sparsespec._kernels._compile import device, kernel
from sparsespec._kernels.boc import COLUMNS, ROWS, lowest_bit, pack, tile_affinities, tile_hits

# Affinities above 0 are at least the rounding of 1: no pair with an affinity lies below this, none without reaches it.
_LEAST = np.float32(1e-30)
_NONE = np.uint64(0)
# Panels whose tokens are compared with each other first, for a good start: about as many tokens as fit the cache.
_FIRST = 512 // COLUMNS


@device()
def _count_at_least(keys, count, least):
    reached = 0
    for place in range(count):
        reached += keys[place] >= least
    return reached


@device()
def _cut(keys, count, wanted):
    # (int32, int32, intp)(int32[...], intp, intp): a number that `wanted` keys reach, or more only if as many are equal
    # to it; the next number; how many reach it. Keys below 1 don't count; fewer than wanted reach 1: (1, ..., fewer).
    low = np.int32(0x7FFFFFFF)
    high = np.int32(0)
    for place in range(count):
        key = keys[place]
        low = min(low, key if key > 0 else np.int32(0x7FFFFFFF))
        high = max(high, key)
    high += np.int32(1)
    low = min(low, high)
    # At least `wanted` reach `low`, fewer reach `high`.
    reached = _count_at_least(keys, count, low)
    if reached <= wanted:
        return low, high, reached
    while high - low > 1 and reached != wanted:
        middle = low + (high - low) // np.int32(2)
        found = _count_at_least(keys, count, middle)
        if found >= wanted:
            low = middle
            reached = found
        else:
            high = middle
    return low, high, reached


@device()
def _keep_best(i, wanted, neighbours, weights, counts):
    # float32(intp, intp, int32[N, room], float32[N, room], int32[N]): leave the `wanted` best of more in the list of i,
    # and return the affinity of the last of them. Floats that aren't negative are in the order of their bits, so it is
    # found by halving the range of bits; so is the number of the last token of that affinity.
    count = counts[i]
    numbers = neighbours[i]
    values = weights[i]
    keys = values.view(np.int32)
    low, high, reached = _cut(keys, count, wanted)
    last = np.int64(0x7FFFFFFF)
    if reached > wanted:
        equal_wanted = wanted - _count_at_least(keys, count, high)
        first = np.int64(-1)
        while last - first > 1:
            middle = first + (last - first) // 2
            found = 0
            for place in range(count):
                found += (keys[place] == low) & (numbers[place] <= middle)
            if found >= equal_wanted:
                last = middle
            else:
                first = middle
    kept = 0
    if last == np.int64(0x7FFFFFFF):
        for place in range(count):
            key = keys[place]
            numbers[kept] = numbers[place]
            keys[kept] = key
            kept += key >= low
    else:
        for place in range(count):
            key = keys[place]
            j = numbers[place]
            numbers[kept] = j
            keys[kept] = key
            kept += (key > low) | ((key == low) & (j <= last))
    counts[i] = kept
    least = values[0]
    for place in range(1, kept):
        least = values[place] if values[place] < least else least
    return least


@device()
def _begin(panel, panels, wanted, rows, columns, thresholds, neighbours, weights, counts, line, tile):
    # intp(...): the first list of every token of some panels, from these panels; how many affinities were computed
    size = counts.size
    stop = min(panel + _FIRST, panels)
    start = panel * COLUMNS
    width = min(stop * COLUMNS, size) - start
    for quad in range(start // ROWS, (start + width + ROWS - 1) // ROWS):
        for p in range(panel, stop):
            tile_affinities(rows, quad, columns, p, tile)
            for r in range(ROWS):
                for k in range(COLUMNS):
                    line[r, (p - panel) * COLUMNS + k] = tile[r, k]
        for r in range(ROWS):
            i = quad * ROWS + r
            if i >= size:
                break
            line[r, i - start] = np.float32(0.0)
            keys = line[r].view(np.int32)
            low, _, reached = _cut(keys, width, wanted)
            # Of equal ones the first.
            spare = reached - min(reached, wanted)
            equal = 0
            if spare > 0:
                for k in range(width):
                    equal += keys[k] == low
            count = 0
            for k in range(width):
                if keys[k] >= low:
                    if keys[k] == low:
                        equal -= 1
                        if spare > 0 and equal < spare:
                            continue
                    neighbours[i, count] = start + k
                    weights[i, count] = line[r, k]
                    count += 1
            counts[i] = count
            if count == wanted:
                least = weights[i, 0]
                for k in range(1, count):
                    least = min(least, weights[i, k])
                thresholds[i] = least
    return ((width + ROWS - 1) // ROWS) * (stop - panel) * ROWS * COLUMNS


@device()
def _offer(i, j, value, wanted, neighbours, weights, counts, thresholds):
    # void(intp, intp, float32, intp, int32[N, room], float32[N, room], int32[N], float32[...]): j to the list of i
    count = counts[i]
    weights[i, count] = value
    neighbours[i, count] = j
    counts[i] = count + 1
    if count + 1 == weights.shape[1] and count + 1 > wanted:
        thresholds[i] = _keep_best(i, wanted, neighbours, weights, counts)


@device()
def _meet(first, second, strip, wanted, rows, columns, thresholds, neighbours, weights, counts, tile, hits):
    # intp(...): all pairs of two strips of `strip` panels each, or within one; how many were computed. Not those that
    # began together.
    panels = columns.shape[0]
    computed = 0
    quad_begin = first * strip * COLUMNS // ROWS
    quads = min((first + 1) * strip * COLUMNS, counts.size)
    quads = (quads + ROWS - 1) // ROWS
    for panel in range(second * strip, min((second + 1) * strip, panels)):
        start = panel * COLUMNS
        for quad in range(quad_begin, min(quads, panel // _FIRST * _FIRST * COLUMNS // ROWS)):
            computed += ROWS * COLUMNS
            if tile_hits(rows, quad, columns, panel, thresholds, tile, hits) == 0:
                continue
            for r in range(ROWS):
                i = quad * ROWS + r
                bits = hits[r]
                while bits != _NONE:
                    lane = lowest_bit(bits)
                    bits &= bits - np.uint64(1)
                    j = start + (lane & 31)
                    value = tile[r, lane & 31]
                    of_row = lane < 32
                    _offer(
                        i if of_row else j,
                        j if of_row else i,
                        value,
                        wanted,
                        neighbours,
                        weights,
                        counts,
                        thresholds,
                    )
    return computed


@kernel(parallel=True)
def nearest_of_all(features, wanted, strips, rows, columns, neighbours, weights, counts):
    # intp(float32[N, C], intp, intp, float32[Q, C, 2 ROWS], float32[P, C, COLUMNS], int32[N, room], float32[N, room],
    # int32[N]): an even number of strips; rows, columns: to work with; room for all others or for more than `wanted`.
    # Lists come in no order. Returns how many pairs were computed.
    size = features.shape[0]
    panels = columns.shape[0]
    for part in numba.prange(panels):
        pack(features, np.intp(part), rows, columns)
    thresholds = np.full(panels * COLUMNS, _LEAST, np.float32)
    strip = (panels + strips - 1) // strips
    computed = 0
    for part in numba.prange((panels + _FIRST - 1) // _FIRST):
        tile = np.empty((ROWS, COLUMNS), np.float32)
        line = np.empty((ROWS, _FIRST * COLUMNS), np.float32)
        computed += _begin(
            np.intp(part) * _FIRST,
            panels,
            wanted,
            rows,
            columns,
            thresholds,
            neighbours,
            weights,
            counts,
            line,
            tile,
        )
    for turn in range(strips):
        # In the first turn every strip meets itself.
        meetings = strips if turn == 0 else strips // 2
        for meeting in numba.prange(meetings):
            tile = np.empty((ROWS, COLUMNS), np.float32)
            hits = np.empty(ROWS, np.uint64)
            one = np.intp(meeting)
            other = one
            if turn > 0:
                others = strips - 1
                one = (turn + np.intp(meeting)) % others if meeting > 0 else others
                other = (turn - np.intp(meeting) + others) % others
            computed += _meet(
                min(one, other),
                max(one, other),
                strip,
                wanted,
                rows,
                columns,
                thresholds,
                neighbours,
                weights,
                counts,
                tile,
                hits,
            )
    for part in numba.prange(panels):
        for i in range(np.intp(part) * COLUMNS, min(np.intp(part) * COLUMNS + COLUMNS, size)):
            if counts[i] > wanted:
                _keep_best(i, wanted, neighbours, weights, counts)
    return computed


@kernel()
def symmetric_union(neighbours, weights, counts, wanted, complete, start):
    # (float64[E], int[E])(int32[N, room], float32[N, room], int32[N], intp, bool, int[N + 1]): the rows of the graph of
    # all pairs of which either token lists the other, by `start`, which is filled. `complete`: a list lacks no token
    # that is nearer than its last, and those shorter than `wanted` lack none. Weights are divided by their maximum, or
    # by 1.
    size = neighbours.shape[0]
    # The last of each list, by affinity and number.
    worst = np.empty(size, np.float32)
    worst_neighbour = np.empty(size, np.int32)
    largest = np.float32(1.0)
    for i in range(size):
        least = np.float32(np.inf)
        for place in range(counts[i]):
            value = weights[i, place]
            least = value if value < least else least
            largest = value if value > largest else largest
        last = np.int32(-1)
        for place in range(counts[i]):
            last = max(last, neighbours[i, place] if weights[i, place] == least else np.int32(-1))
        if complete and counts[i] < wanted:
            least = np.float32(0.0)
        worst[i] = least
        worst_neighbour[i] = last
    # Who is listed by i and doesn't list i gets i as one more.
    one_sided = np.empty(neighbours.shape, np.uint8)
    more = np.zeros(size + 1, np.int64)
    for i in range(size):
        for place in range(counts[i]):
            j = neighbours[i, place]
            value = weights[i, place]
            back = (value > worst[j]) | ((value == worst[j]) & (i <= worst_neighbour[j]))
            if back and not complete:
                back = False
                for k in range(counts[j]):
                    back |= neighbours[j, k] == i
            one_sided[i, place] = not back
            more[j + 1] += not back
    start[0] = 0
    for i in range(size):
        start[i + 1] = start[i] + counts[i] + more[i + 1]
        more[i + 1] += more[i]
    extra = np.empty(more[size], np.int32)
    extra_weights = np.empty(more[size], np.float32)
    place_of = np.empty(size, np.int64)
    for i in range(size):
        place_of[i] = more[i]
    for i in range(size):
        for place in range(counts[i]):
            if one_sided[i, place]:
                j = neighbours[i, place]
                extra[place_of[j]] = i
                extra_weights[place_of[j]] = weights[i, place]
                place_of[j] += 1
    # Rows are filled from column to column, which leaves them sorted.
    indices = np.empty(start[size], start.dtype)
    data = np.empty(start[size], np.float64)
    for i in range(size):
        place_of[i] = start[i]
    divisor = np.float64(largest)
    for i in range(size):
        for place in range(counts[i]):
            k = place_of[neighbours[i, place]]
            place_of[neighbours[i, place]] = k + 1
            indices[k] = i
            data[k] = weights[i, place] / divisor
        for place in range(more[i], more[i + 1]):
            k = place_of[extra[place]]
            place_of[extra[place]] = k + 1
            indices[k] = i
            data[k] = extra_weights[place] / divisor
    return data, indices
