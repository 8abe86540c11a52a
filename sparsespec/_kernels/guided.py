"""Turn token-sized masks into pixels with a colour guided filter, band by band and only where it can matter.

Window sums are sums of multiples of powers of two that a float64 holds exactly, so that it makes no difference where a
running sum begins: bands of any height and any number of threads give the same bytes.
"""

from __future__ import annotations

import numba
import numpy as np

from sparsespec._kernels._compile import kernel

# Steps of the guide's and the masks' values, and of the linear models' coefficients.
_VALUE_STEP = 2.0**-16
_MODEL_STEP = 2.0**-24
# Pixels handled at a time: their colours and one mask's models stay in the nearest cache.
_CHUNK = 512


@kernel(parallel=True)
def reduce_rows(pixels, top, peak, row_taps, row_weights, column_taps, column_weights, guide, at):
    # (h, W, 3) pixels from row `top` on; taps int64 (rows, 2), weights float32 (rows, most taps) -> (3, rows, w) guide
    """Reduce an image to rows of the guide, one for each of `row_taps`, the first of them `at`.

    Weighted sums over the pixels `taps[i, 0]` to `taps[i, 1]` of each axis, rounded to multiples of 2^-16; `peak` is
    the value of the pixels' type that stands for 1.
    """
    width, columns = pixels.shape[1], guide.shape[2]
    for g in numba.prange(row_taps.shape[0]):
        total = np.zeros(3 * width, np.float32)
        for y in range(row_taps[g, 0], row_taps[g, 1]):
            weight = row_weights[g, y - row_taps[g, 0]]
            row = pixels[y - top].reshape(3 * width)
            for x in range(3 * width):
                total[x] += weight * np.float32(row[x])
        for x in range(columns):
            start = column_taps[x, 0]
            r, q, b = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for i in range(column_taps[x, 1] - start):
                weight = column_weights[x, i]
                r += weight * total[3 * (start + i)]
                q += weight * total[3 * (start + i) + 1]
                b += weight * total[3 * (start + i) + 2]
            guide[0, at + g, x] = np.rint(r / peak / _VALUE_STEP) * _VALUE_STEP
            guide[1, at + g, x] = np.rint(q / peak / _VALUE_STEP) * _VALUE_STEP
            guide[2, at + g, x] = np.rint(b / peak / _VALUE_STEP) * _VALUE_STEP


@kernel()
def _add_row(sums, guide, y, sign):
    # float64 (9, w) += sign x (r, g, b, rr, rg, rb, gg, gb, bb) of a row of float32 (3, h, w)
    n = 0
    for c in range(3):
        one = guide[c, y]
        for x in range(one.size):
            sums[c, x] += sign * np.float64(one[x])
        for d in range(c, 3):
            other = guide[d, y]
            for x in range(one.size):
                sums[3 + n, x] += sign * (np.float64(one[x]) * np.float64(other[x]))
            n += 1


@kernel(parallel=True)
def guide_statistics(guide, top, height, half, eps, first, rows, chunk, statistics, at):
    # float32 (3, h, w), of a guide of `height` rows from `top` on -> float32 (h', w, 9) from row `at` on
    """Of the windows around the pixels in rows `first` and following: mean colour, and the inverse of Cov + eps I.

    The inverse's entries come in the order rr, rg, rb, gg, gb, bb. Outside the guide its outermost values are repeated.
    """
    width = guide.shape[2]
    area = np.float64(2 * half + 1) ** 2
    for part in numba.prange((rows + chunk - 1) // chunk):
        begin = first + part * chunk
        end = min(begin + chunk, first + rows)
        sums = np.zeros((9, width))
        for y in range(begin - half, begin + half + 1):
            _add_row(sums, guide, min(max(y, 0), height - 1) - top, 1.0)
        for y in range(begin, end):
            if y > begin:
                _add_row(sums, guide, min(y + half, height - 1) - top, 1.0)
                _add_row(sums, guide, max(y - 1 - half, 0) - top, -1.0)
            s0, s1, s2, s3, s4, s5, s6, s7, s8 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
            for x in range(-half, half + 1):
                i = min(max(x, 0), width - 1)
                s0 += sums[0, i]
                s1 += sums[1, i]
                s2 += sums[2, i]
                s3 += sums[3, i]
                s4 += sums[4, i]
                s5 += sums[5, i]
                s6 += sums[6, i]
                s7 += sums[7, i]
                s8 += sums[8, i]
            for x in range(width):
                r, g, b = s0 / area, s1 / area, s2 / area
                rr = s3 / area - r * r + eps
                rg = s4 / area - r * g
                rb = s5 / area - r * b
                gg = s6 / area - g * g + eps
                gb = s7 / area - g * b
                bb = s8 / area - b * b + eps
                i00, i01, i02 = gg * bb - gb * gb, rb * gb - rg * bb, rg * gb - rb * gg
                inverse = 1.0 / (rr * i00 + rg * i01 + rb * i02)
                out = statistics[at + y - first, x]
                out[0] = r
                out[1] = g
                out[2] = b
                out[3] = i00 * inverse
                out[4] = i01 * inverse
                out[5] = i02 * inverse
                out[6] = (rr * bb - rb * rb) * inverse
                out[7] = (rb * rg - rr * gb) * inverse
                out[8] = (rr * gg - rg * rg) * inverse
                i, j = min(x + half + 1, width - 1), max(x - half, 0)
                s0 += sums[0, i] - sums[0, j]
                s1 += sums[1, i] - sums[1, j]
                s2 += sums[2, i] - sums[2, j]
                s3 += sums[3, i] - sums[3, j]
                s4 += sums[4, i] - sums[4, j]
                s5 += sums[5, i] - sums[5, j]
                s6 += sums[6, i] - sums[6, j]
                s7 += sums[7, i] - sums[7, j]
                s8 += sums[8, i] - sums[8, j]


@kernel()
def _enlarge_row(mask, token, weight, column_tokens, column_weights, left, out):
    # bool (h, w) -> one row of its bilinear enlargement, in multiples of 2^-16
    below = min(token + 1, mask.shape[0] - 1)
    for i in range(out.size):
        u, across = column_tokens[left + i], column_weights[left + i]
        v = min(u + 1, mask.shape[1] - 1)
        upper = (np.float32(1) - across) * mask[token, u] + across * mask[token, v]
        lower = (np.float32(1) - across) * mask[below, u] + across * mask[below, v]
        out[i] = np.rint(((np.float32(1) - weight) * upper + weight * lower) / _VALUE_STEP) * _VALUE_STEP


@kernel()
def _add_cross(sums, guide, y, left, membership, sign):
    # float64 (4, w) += sign x (r p, g p, b p, p)
    for c in range(3):
        colour = guide[c, y, left : left + membership.size]
        for x in range(membership.size):
            sums[c, x] += sign * (np.float64(colour[x]) * np.float64(membership[x]))
    for x in range(membership.size):
        sums[3, x] += sign * np.float64(membership[x])


@kernel(parallel=True)
def fit_models(
    mask, row_tokens, row_weights, column_tokens, column_weights, guide, guide_top, statistics, statistics_top, box,
    raw_rows, rows, half, chunk, raw, models,
):  # fmt: skip
    # bool (h, w), int32 and float32 per row and column of the guide, ..., float32 (4, h', w'), (4, h'', w'')
    """Linear model of a mask in the colours around each pixel of the guide, averaged over the windows that hold it.

    a = (Cov + eps I)^-1 cov(I, p), b = p - a . I. `box` is the part of the guide (top, left, bottom, right) outside of
    which the mask's models are 0, or the guide ends; `raw_rows` and `rows`, each from and to, are within it: those
    whose models are wanted before (`raw`) and after averaging.
    """
    top, left, bottom, right = box
    width = right - left
    area = np.float64(2 * half + 1) ** 2
    for part in numba.prange((raw_rows[1] - raw_rows[0] + chunk - 1) // chunk):
        begin = raw_rows[0] + part * chunk
        end = min(begin + chunk, raw_rows[1])
        # Rows of the enlarged mask that these windows see, and their sums over a window's height.
        low, high = max(begin - half, top), min(end + half, bottom)
        membership = np.empty((high - low, width), np.float32)
        for y in range(low, high):
            _enlarge_row(mask, row_tokens[y], row_weights[y], column_tokens, column_weights, left, membership[y - low])
        sums = np.zeros((4, width))
        for y in range(begin - half, begin + half + 1):
            i = min(max(y, top), bottom - 1)
            _add_cross(sums, guide, i - guide_top, left, membership[i - low], 1.0)
        for y in range(begin, end):
            if y > begin:
                i, j = min(y + half, bottom - 1), max(y - 1 - half, top)
                _add_cross(sums, guide, i - guide_top, left, membership[i - low], 1.0)
                _add_cross(sums, guide, j - guide_top, left, membership[j - low], -1.0)
            s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
            for x in range(-half, half + 1):
                i = min(max(x, 0), width - 1)
                s0 += sums[0, i]
                s1 += sums[1, i]
                s2 += sums[2, i]
                s3 += sums[3, i]
            for x in range(width):
                s = statistics[y - statistics_top, left + x]
                p = s3 / area
                c0, c1, c2 = s0 / area - s[0] * p, s1 / area - s[1] * p, s2 / area - s[2] * p
                a0 = s[3] * c0 + s[4] * c1 + s[5] * c2
                a1 = s[4] * c0 + s[6] * c1 + s[7] * c2
                a2 = s[5] * c0 + s[7] * c1 + s[8] * c2
                out = y - raw_rows[0]
                raw[0, out, x] = np.rint(a0 / _MODEL_STEP) * _MODEL_STEP
                raw[1, out, x] = np.rint(a1 / _MODEL_STEP) * _MODEL_STEP
                raw[2, out, x] = np.rint(a2 / _MODEL_STEP) * _MODEL_STEP
                raw[3, out, x] = np.rint((p - a0 * s[0] - a1 * s[1] - a2 * s[2]) / _MODEL_STEP) * _MODEL_STEP
                i, j = min(x + half + 1, width - 1), max(x - half, 0)
                s0 += sums[0, i] - sums[0, j]
                s1 += sums[1, i] - sums[1, j]
                s2 += sums[2, i] - sums[2, j]
                s3 += sums[3, i] - sums[3, j]
    for part in numba.prange(4 * ((rows[1] - rows[0] + chunk - 1) // chunk)):
        c, begin = part % 4, rows[0] + part // 4 * chunk
        end = min(begin + chunk, rows[1])
        sums = np.zeros(width)
        for y in range(begin - half, begin + half + 1):
            entering = raw[c, min(max(y, top), bottom - 1) - raw_rows[0]]
            for x in range(width):
                sums[x] += np.float64(entering[x])
        for y in range(begin, end):
            if y > begin:
                entering = raw[c, min(y + half, bottom - 1) - raw_rows[0]]
                leaving = raw[c, max(y - 1 - half, top) - raw_rows[0]]
                for x in range(width):
                    sums[x] += np.float64(entering[x]) - np.float64(leaving[x])
            s0 = 0.0
            for x in range(-half, half + 1):
                s0 += sums[min(max(x, 0), width - 1)]
            out = models[c, y - rows[0]]
            for x in range(width):
                out[x] = s0 / area
                s0 += sums[min(x + half + 1, width - 1)] - sums[max(x - half, 0)]


@kernel(parallel=True)
def claim_pixels(
    pixels, peak, top, strips, down, cell_columns, column_weights, models, boxes, offsets, values, threshold,
    counts, labels,
):  # fmt: skip
    # (h, W, 3) pixels from row `top` on, int64 (n, 3), float32 (H,), ..., (h, W) labels
    """Give each pixel to the mask of the largest filtered membership there, if that exceeds the threshold, or 0.

    The models, smooth by construction, are interpolated bilinearly at each pixel. Between four of the guide's pixels
    they bound what any colour can give: where that decides, no pixel is looked at.

    `strips` are rows from, to and the row of the guide above them; `down` and `column_weights` how far between two of
    the guide's pixels each row and column lies; `cell_columns` the first column past each of the guide's columns.
    Mask i has its (4, h', w') models at `offsets[i]` of the flat `models`, for the guide's rows and columns in
    `boxes[i]` (top, left, bottom, right), and gives its pixels `values[i]`. `counts[s]` becomes how many pixels of
    strip s had to be looked at.
    """
    cells = cell_columns.size - 1
    # What rounding can add to a membership where the models aren't absurdly steep.
    slack = np.float32(1e-4)
    one = np.float32(1.0)
    for s in numba.prange(strips.shape[0]):
        begin, end, above = strips[s, 0], strips[s, 1], strips[s, 2]
        rivals = np.empty(offsets.size, np.int64)
        n = 0
        for k in range(offsets.size):
            if boxes[k, 0] <= above < boxes[k, 2]:
                rivals[n] = k
                n += 1
        # What each mask can reach at most in each cell, and what the best of them reaches at least.
        most = np.full((n, cells), -np.float32(np.inf), np.float32)
        least = np.full((n, cells), -np.float32(np.inf), np.float32)
        ground = np.full(cells, threshold, np.float32)
        for m in range(n):
            k = rivals[m]
            left, right = boxes[k, 1], boxes[k, 3]
            height, width = boxes[k, 2] - boxes[k, 0], right - left
            part = models[offsets[k] : offsets[k] + 4 * height * width].reshape(4, height, width)
            y0 = above - boxes[k, 0]
            y1 = min(y0 + 1, height - 1)
            highest, lowest = np.empty(width, np.float32), np.empty(width, np.float32)
            for x in range(width):
                u0, u1, u2, u3 = part[0, y0, x], part[1, y0, x], part[2, y0, x], part[3, y0, x]
                v0, v1, v2, v3 = part[0, y1, x], part[1, y1, x], part[2, y1, x], part[3, y1, x]
                zero = np.float32(0.0)
                highest[x] = max(
                    u3 + max(u0, zero) + max(u1, zero) + max(u2, zero),
                    v3 + max(v0, zero) + max(v1, zero) + max(v2, zero),
                )
                lowest[x] = min(
                    u3 + min(u0, zero) + min(u1, zero) + min(u2, zero),
                    v3 + min(v0, zero) + min(v1, zero) + min(v2, zero),
                )
            for j in range(left, max(right - 1, left + 1)):
                x0 = j - left
                x1 = min(x0 + 1, width - 1)
                most[m, j] = max(highest[x0], highest[x1]) + slack
                least[m, j] = min(lowest[x0], lowest[x1]) - slack
                ground[j] = max(ground[j], least[m, j])
        # -1 where pixels have to be looked at.
        decided = np.empty(cells, np.int64)
        for j in range(cells):
            found, count = np.int64(0), 0
            for m in range(n):
                if most[m, j] > ground[j]:
                    count += 1
                    found = values[rivals[m]] if least[m, j] > threshold else np.int64(-1)
            decided[j] = found if count < 2 else np.int64(-1)
        looked = 0
        colours = np.empty((3, end - begin, _CHUNK), np.float32)
        best = np.empty((end - begin, _CHUNK), np.float32)
        flat, slope = np.empty((4, _CHUNK), np.float32), np.empty((4, _CHUNK), np.float32)
        j = 0
        while j < cells:
            stop = j + 1
            while stop < cells and decided[stop] == decided[j]:
                stop += 1
            if decided[j] >= 0:
                for y in range(begin, end):
                    labels[y - top, cell_columns[j] : cell_columns[stop]] = decided[j]
                j = stop
                continue
            for start in range(cell_columns[j], cell_columns[stop], _CHUNK):
                size = min(_CHUNK, cell_columns[stop] - start)
                looked += size * (end - begin)
                for y in range(begin, end):
                    row = pixels[y - top, start : start + size]
                    r, g, b = colours[0, y - begin], colours[1, y - begin], colours[2, y - begin]
                    for x in range(size):
                        r[x] = np.float32(row[x, 0]) / peak
                        g[x] = np.float32(row[x, 1]) / peak
                        b[x] = np.float32(row[x, 2]) / peak
                    best[y - begin, :size] = threshold
                    labels[y - top, start : start + size] = 0
                # The cells this chunk begins and ends in.
                first, last = j, stop
                while cell_columns[first + 1] <= start:
                    first += 1
                while cell_columns[last - 1] >= start + size:
                    last -= 1
                for m in range(n):
                    low, high = first, last
                    while low < high and most[m, low] <= ground[low]:
                        low += 1
                    while low < high and most[m, high - 1] <= ground[high - 1]:
                        high -= 1
                    if low == high:
                        continue
                    k = rivals[m]
                    left = boxes[k, 1]
                    height, width = boxes[k, 2] - boxes[k, 0], boxes[k, 3] - left
                    part = models[offsets[k] : offsets[k] + 4 * height * width].reshape(4, height, width)
                    y0 = above - boxes[k, 0]
                    y1 = min(y0 + 1, height - 1)
                    x_from = max(cell_columns[low], start) - start
                    x_to = min(cell_columns[high], start + size) - start
                    for c in range(4):
                        for i in range(low, high):
                            x0 = i - left
                            x1 = min(x0 + 1, width - 1)
                            u, du = part[c, y0, x0], part[c, y0, x1] - part[c, y0, x0]
                            v, dv = part[c, y1, x0] - u, part[c, y1, x1] - part[c, y1, x0] - du
                            for x in range(
                                max(cell_columns[i] - start, x_from), min(cell_columns[i + 1] - start, x_to)
                            ):
                                flat[c, x] = u + column_weights[start + x] * du
                                slope[c, x] = v + column_weights[start + x] * dv
                    value = values[k]
                    for y in range(begin, end):
                        w = down[y]
                        r, g, b = colours[0, y - begin], colours[1, y - begin], colours[2, y - begin]
                        so_far, row = best[y - begin], labels[y - top, start : start + size]
                        for x in range(x_from, x_to):
                            membership = (
                                (flat[3, x] + w * slope[3, x])
                                + (flat[0, x] + w * slope[0, x]) * r[x]
                                + (flat[1, x] + w * slope[1, x]) * g[x]
                                + (flat[2, x] + w * slope[2, x]) * b[x]
                            )
                            better = membership > so_far[x]
                            so_far[x] = membership if better else so_far[x]
                            row[x] = value if better else row[x]
            j = stop
        counts[s] = looked
