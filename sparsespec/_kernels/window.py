"""Graphs of tokens and their neighbours within a window of the token grid, filled where they will stay.

The grid is worked through in narrow strips from top to bottom. The lines of tokens that a window reaches lie
channel-major in a ring that stays in the cache, and LANES tokens side by side are compared with all their neighbours
at once. Three things are done with the affinities found: the largest is taken, the k nearest of every token are
marked, one bit for each place of the window, or rows of a sparse matrix are filled. Affinities are computed anew for
each, so a graph needs no memory but its own arrays and the bits; to fill it, only those near a joined pair.

Places of a window are numbered row by row, so neighbours in the order of places are in the order of their numbers. The
token itself is the place in the middle, with affinity 0; place p of a token seen from the other end is place P - 1 - p.
"""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import device, kernel
from sparsespec._kernels.boc import LANES, SHIFTS, count_at_least, lanes_at_least, lowest_bit, window_affinities

# Neighbours without likeness are a cheap cut, not two separate pictures.
LEAST_WEIGHT = 1e-12

LARGEST = 0
MARK = 1
FILL = 2


@device()
def _lay_line(features, width, y, left, slot, lines):
    # void(float32[N, C], intp, intp, intp, intp, float32[slots, C, M]): tokens left, left + 1, ... of line y of the
    # grid into the ring; NaN where the grid has none
    channels, room = lines.shape[1:]
    begin = max(0, -left)
    end = min(room, width - left)
    for c in range(channels):
        for x in range(begin):
            lines[slot, c, x] = np.float32(np.nan)
        for x in range(max(begin, end), room):
            lines[slot, c, x] = np.float32(np.nan)
    for x in range(begin, end):
        token = y * width + left + x
        for c in range(channels):
            lines[slot, c, x] = features[token, c]


@device()
def _block_affinities(lines, y, height, x, up, down, aside, joined, found):
    # intp(float32[slots, C, M], intp, intp, intp, intp, intp, intp, uint16[P + SHIFTS], float32[P + SHIFTS, LANES]):
    # LANES tokens of line y from column x + aside of the ring against every place of their window, from `up` lines
    # above to `down` below, 0 where there is none; how many were computed. Not, where no place of a step has a token
    # that is joined to it: anything may stand there.
    slots, channels, room = lines.shape
    across = 2 * aside + 1
    here = (y % slots) * channels * room + x + aside
    computed = 0
    for dy in range(-up, down + 1):
        place = (dy + up) * across
        if y + dy < 0 or y + dy >= height:
            for p in range(place, place + across):
                for lane in range(LANES):
                    found[p, lane] = np.float32(0.0)
            continue
        there = ((y + dy) % slots) * channels * room + x
        # What the last step finds beyond the window is overwritten by the next line of it.
        for dx in range(0, across, SHIFTS):
            wanted = np.uint16(0)
            for s in range(place + dx, place + dx + SHIFTS):
                wanted |= joined[s]
            if wanted != np.uint16(0):
                window_affinities(lines, here, there + dx, room, channels, found, place + dx)
                computed += SHIFTS * LANES
    for lane in range(LANES):
        found[up * across + aside, lane] = np.float32(0.0)
    return computed


@device()
def _mark_nearest(found, places, n_neighbors, low, high, middle, counts, marks):
    # void(float32[P + SHIFTS, LANES], intp, intp, int32[LANES] x 4, uint16[P]): the n highest above 0 of every lane.
    # Floats that aren't negative are in the order of their bits, so the n-th highest is found by halving the range.
    keys = found.view(np.int32)
    least = np.int32(0x7FFFFFFF)
    most = np.int32(0)
    for place in range(places):
        for lane in range(LANES):
            key = keys[place, lane]
            most = max(most, key)
            least = min(least, key if key > 0 else np.int32(0x7FFFFFFF))
    for lane in range(LANES):
        low[lane] = min(least, most + np.int32(1))
    count_at_least(keys, places, low, counts)
    # Invariant: at least n reach `low`, or all above 0 do; fewer than n reach `high`.
    for lane in range(LANES):
        high[lane] = most + np.int32(1) if counts[lane] > n_neighbors else low[lane]
    open_lanes = True
    while open_lanes:
        open_lanes = False
        for lane in range(LANES):
            middle[lane] = low[lane] + (high[lane] - low[lane]) // np.int32(2)
        count_at_least(keys, places, middle, counts)
        for lane in range(LANES):
            if high[lane] - low[lane] > 1:
                if counts[lane] >= n_neighbors:
                    low[lane] = middle[lane]
                    if counts[lane] == n_neighbors:
                        high[lane] = low[lane]
                else:
                    high[lane] = middle[lane]
                if high[lane] - low[lane] > 1:
                    open_lanes = True
    lanes_at_least(keys, places, low, marks)
    count_at_least(keys, places, low, counts)
    for lane in range(LANES):
        # More of equal affinity than there is room for: the last places go.
        spare = counts[lane] - n_neighbors
        place = places - 1
        while spare > 0:
            if keys[place, lane] == low[lane]:
                marks[place] &= ~(np.uint16(1) << np.uint16(lane))
                spare -= 1
            place -= 1


@device()
def _joined(marks, blocks, y, x, width, height, down, aside, out):
    # void(uint16[height blocks, P], intp, intp, intp, intp, intp, intp, intp, uint16[P + SHIFTS]): which of LANES
    # tokens of line y from column x are joined to each place: either end has marked the other. No marks: all there are.
    across = 2 * aside + 1
    places = (2 * down + 1) * across
    everything = marks.shape[0] == 0
    for place in range(out.size):
        out[place] = np.uint16(0)
    for dy in range(max(-down, -y), min(down, height - 1 - y) + 1):
        for dx in range(-aside, aside + 1):
            place = (dy + down) * across + dx + aside
            if everything:
                first = max(0, -(x + dx))
                last = min(min(LANES, width - x), width - (x + dx))
                if last > first and place != places // 2:
                    out[place] = np.uint16(((1 << last) - 1) & ~((1 << first) - 1))
                continue
            bits = np.uint32(marks[y * blocks + x // LANES, place])
            block = (x + dx) // LANES
            shift = (x + dx) - block * LANES
            line = (y + dy) * blocks
            if 0 <= block < blocks:
                bits |= np.uint32(marks[line + block, places - 1 - place]) >> np.uint32(shift)
            if shift > 0 and 0 <= block + 1 < blocks:
                bits |= np.uint32(marks[line + block + 1, places - 1 - place]) << np.uint32(LANES - shift)
            out[place] = np.uint16(bits & np.uint32(0xFFFF))


@kernel()
def count_rows(marks, width, height, down, aside, top, bottom, counts):
    # void(uint16[height blocks, P], intp, intp, intp, intp, intp, intp, int[N]): the length of every row of the joined
    # graph in lines top to bottom
    blocks = (width + LANES - 1) // LANES
    places = (2 * down + 1) * (2 * aside + 1)
    joined = np.empty(places + SHIFTS, np.uint16)
    for y in range(top, bottom):
        for x in range(0, width, LANES):
            _joined(marks, blocks, y, x, width, height, down, aside, joined)
            begin = y * width + x
            for lane in range(min(LANES, width - x)):
                counts[begin + lane] = 0
            for place in range(places):
                bits = np.uint64(joined[place])
                while bits != np.uint64(0):
                    counts[begin + lowest_bit(bits)] += 1
                    bits &= bits - np.uint64(1)


@device()
def _fill_rows(token, width, down, aside, joined, found, heads, start, indices, data, divisor, first, kinds, sharpness):
    # int32(...): the rows of LANES tokens from `token`, see `sweep`; the bits of the largest affinity
    across = 2 * aside + 1
    keys = found.view(np.int32)
    best = np.int32(0)
    for lane in range(LANES):
        heads[lane] = 0
    for place in range((2 * down + 1) * across):
        bits = np.uint64(joined[place])
        if bits == np.uint64(0):
            continue
        step = (place // across - down) * width + place % across - aside
        while bits != np.uint64(0):
            lane = lowest_bit(bits)
            bits &= bits - np.uint64(1)
            k = start[token + lane] + heads[lane]
            heads[lane] += 1
            best = max(best, keys[place, lane])
            weight = np.float64(found[place, lane]) / divisor
            if first:
                indices[k] = token + lane + step
            else:
                weight += data[k]
            if kinds > 0:
                weight = max(np.exp(sharpness * (weight / kinds - 1.0)), LEAST_WEIGHT)
            data[k] = weight
    return best


@kernel()
def sweep(
    features,
    width,
    down,
    aside,
    top,
    bottom,
    left,
    right,
    task,
    n_neighbors,
    marks,
    start,
    indices,
    data,
    divisor,
    first,
    kinds,
    sharpness,
):
    # (int32, intp)(float32[N, C], intp x 9, uint16[height blocks, P], int[N + 1], int[E], float64[E], float64, bool,
    # intp, float64): one pass over a part of the grid, lines top to bottom and columns left to right, beginning at a
    # multiple of LANES. LARGEST: nothing else. MARK: `marks` of the n nearest of each token. FILL: the rows that begin
    # at `start`, of what is marked, or of all the grid where `marks` is empty; affinities by `divisor` are put into
    # `data`, or added to it unless this is the `first`, and where `kinds` isn't 0 the sum of so many is made steep.
    # Returns the bits of the largest affinity and how many affinities were computed.
    size, channels = features.shape
    height = size // width
    slots = 2 * down + 1
    blocks = (width + LANES - 1) // LANES
    # Room for the window on both sides, and for whole vectors and SHIFTS beyond.
    room = (right - left + 2 * aside + SHIFTS + 3 * LANES - 1) // LANES * LANES
    # Of the pairs of two lines one end is enough to find the largest.
    up = 0 if task == LARGEST else down
    places = (up + down + 1) * (2 * aside + 1)
    lines = np.empty((slots, channels, room), np.float32)
    found = np.empty((places + SHIFTS, LANES), np.float32)
    keys = found.view(np.int32)
    joined = np.full(places + SHIFTS, np.uint16(0xFFFF), np.uint16)
    scratch = np.empty((4, LANES), np.int32)
    best = np.int32(0)
    computed = 0
    laid = max(0, top - down)
    for y in range(top, bottom):
        while laid < min(y + down + 1, height):
            _lay_line(features, width, laid, left - aside, laid % slots, lines)
            laid += 1
        for x in range(left, right, LANES):
            if task == FILL:
                _joined(marks, blocks, y, x, width, height, down, aside, joined)
            computed += _block_affinities(lines, y, height, x - left, up, down, aside, joined, found)
            if task == FILL:
                highest = _fill_rows(
                    y * width + x,
                    width,
                    down,
                    aside,
                    joined,
                    found,
                    scratch[0],
                    start,
                    indices,
                    data,
                    divisor,
                    first,
                    kinds,
                    sharpness,
                )
                best = max(best, highest)
                continue
            # Floats that aren't negative are in the order of their bits.
            for place in range(places):
                for lane in range(LANES):
                    best = max(best, keys[place, lane])
            if task == MARK:
                _mark_nearest(
                    found,
                    places,
                    n_neighbors,
                    scratch[0],
                    scratch[1],
                    scratch[2],
                    scratch[3],
                    marks[y * blocks + x // LANES],
                )
    return best, computed
