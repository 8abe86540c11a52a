"""Turn token-sized masks into pixels with a colour guided filter, band by band and only where it can matter.

Window sums are sums of multiples of powers of two that a float64 holds exactly, so that it makes no difference where a
running sum begins: bands of any height and any number of threads give the same bytes. The kernels do a range of rows
each, for threads to share: with Numba's own threads they would take three times as long to compile.
"""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import kernel

# Steps of the guide's and the masks' values, and of the linear models' coefficients.
_VALUE_STEP = 2.0**-16
_MODEL_STEP = 2.0**-24
# What rounding can add to a membership, where the models aren't absurdly steep.
_SLACK = np.float32(1e-4)
# Pixels handled at a time: their colours and one mask's models stay in the nearest cache.
_CHUNK = 512


@kernel()
def reduce_rows(pixels, top, peak, row_taps, row_weights, column_taps, column_weights, begin, end, guide, at):
    # (h, W, 3) pixels from row `top` on; taps int64 (rows, 2), weights float32 (rows, most taps) -> (3, rows, w) guide
    """Reduce an image to rows `begin` to `end` of a guide, whose first row in memory is `at`.

    Weighted sums over the pixels `taps[i, 0]` to `taps[i, 1]` of each axis, rounded to multiples of 2^-16; `peak` is
    the value of the pixels' type that stands for 1.
    """
    size = pixels.shape[1] * 3
    total = np.empty(size, np.float32)
    step = np.float32(_VALUE_STEP)
    for g in range(begin, end):
        total[:] = 0
        for y in range(row_taps[g, 0], row_taps[g, 1]):
            weight = row_weights[g, y - row_taps[g, 0]]
            row = pixels[y - top].reshape(size)
            for x in range(size):
                total[x] += weight * np.float32(row[x])
        for x in range(guide.shape[2]):
            start = 3 * column_taps[x, 0]
            r, q, b = np.float32(0.0), np.float32(0.0), np.float32(0.0)
            for i in range(column_taps[x, 1] - column_taps[x, 0]):
                weight = column_weights[x, i]
                r += weight * total[start + 3 * i]
                q += weight * total[start + 3 * i + 1]
                b += weight * total[start + 3 * i + 2]
            guide[0, g - at, x] = np.rint(r / peak / step) * step
            guide[1, g - at, x] = np.rint(q / peak / step) * step
            guide[2, g - at, x] = np.rint(b / peak / step) * step


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


@kernel()
def guide_statistics(guide, top, height, half, eps, begin, end, statistics, at):
    # float32 (3, h, w), of a guide of `height` rows from `top` on -> float32 (h', w, 9), whose first row is `at`
    """Of the windows around the pixels in rows `begin` to `end`: mean colour, and the inverse of Cov + eps I.

    The inverse's entries come in the order rr, rg, rb, gg, gb, bb. Outside the guide its outermost values are repeated.
    """
    width = guide.shape[2]
    area = np.float64(2 * half + 1) ** 2
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
            out = statistics[y - at, x]
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


@kernel()
def fit_models(
    mask, row_tokens, row_weights, column_tokens, column_weights, guide, guide_top, statistics, statistics_top, box,
    half, begin, end, models, first,
):  # fmt: skip
    # bool (h, w), int32 and float32 per row and column of the guide, ..., -> float32 (4, h', w'), first row `first`
    """Linear model of a mask in the colours of the window around each pixel of the guide, in rows `begin` to `end`.

    a = (Cov + eps I)^-1 cov(I, p), b = p - a . I, in multiples of 2^-24. `box` is the part of the guide (top, left,
    bottom, right) outside of which the mask's models are 0, or the guide ends.
    """
    top, left, bottom, right = box
    width = right - left
    area = np.float64(2 * half + 1) ** 2
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
            out = y - first
            models[0, out, x] = np.rint(a0 / _MODEL_STEP) * _MODEL_STEP
            models[1, out, x] = np.rint(a1 / _MODEL_STEP) * _MODEL_STEP
            models[2, out, x] = np.rint(a2 / _MODEL_STEP) * _MODEL_STEP
            models[3, out, x] = np.rint((p - a0 * s[0] - a1 * s[1] - a2 * s[2]) / _MODEL_STEP) * _MODEL_STEP
            i, j = min(x + half + 1, width - 1), max(x - half, 0)
            s0 += sums[0, i] - sums[0, j]
            s1 += sums[1, i] - sums[1, j]
            s2 += sums[2, i] - sums[2, j]
            s3 += sums[3, i] - sums[3, j]


@kernel()
def average_models(raw, raw_first, top, bottom, half, begin, end, models, first):
    # float32 (h, w) from row `raw_first` on -> (h', w) from row `first` on
    """Mean of one coefficient over the windows around rows `begin` to `end`; rows `top` to `bottom` exist."""
    width = raw.shape[1]
    area = np.float64(2 * half + 1) ** 2
    sums = np.zeros(width)
    for y in range(begin - half, begin + half + 1):
        entering = raw[min(max(y, top), bottom - 1) - raw_first]
        for x in range(width):
            sums[x] += np.float64(entering[x])
    for y in range(begin, end):
        if y > begin:
            entering = raw[min(y + half, bottom - 1) - raw_first]
            leaving = raw[max(y - 1 - half, top) - raw_first]
            for x in range(width):
                sums[x] += np.float64(entering[x]) - np.float64(leaving[x])
        s0 = 0.0
        for x in range(-half, half + 1):
            s0 += sums[min(max(x, 0), width - 1)]
        out = models[y - first]
        for x in range(width):
            out[x] = s0 / area
            s0 += sums[min(x + half + 1, width - 1)] - sums[max(x - half, 0)]


@kernel()
def _bound_memberships(models, boxes, offsets, above, rivals, most, least, ground):
    """What each mask can give at most and at least in the cells below a row of the guide; return how many are there.

    A cell lies between four of the guide's pixels. `rivals` are the masks whose models reach this row, `most` and
    `least` (masks, cells) theirs, `ground` (cells,) is raised to the largest `least`.
    """
    n = 0
    for k in range(offsets.size):
        if not boxes[k, 0] <= above < boxes[k, 2]:
            continue
        left, width = boxes[k, 1], boxes[k, 3] - boxes[k, 1]
        plane = width * (boxes[k, 2] - boxes[k, 0])
        rivals[n] = k
        for j in range(most.shape[1]):
            most[n, j] = -np.float32(np.inf)
            least[n, j] = np.float32(np.inf)
        for i in range(2):
            row = offsets[k] + min(above + i, boxes[k, 2] - 1) * width - boxes[k, 0] * width
            for x in range(width):
                a, b, c = models[row + x], models[row + plane + x], models[row + 2 * plane + x]
                d = models[row + 3 * plane + x]
                zero = np.float32(0.0)
                high = d + max(a, zero) + max(b, zero) + max(c, zero) + _SLACK
                low = d + min(a, zero) + min(b, zero) + min(c, zero) - _SLACK
                for j in range(left + max(x - 1, 0), left + max(min(x + 1, width - 1), 1)):
                    most[n, j] = max(most[n, j], high)
                    least[n, j] = min(least[n, j], low)
        for j in range(left, left + max(width - 1, 1)):
            ground[j] = max(ground[j], least[n, j])
        n += 1
    return n


@kernel()
def claim_pixels(
    pixels, peak, top, strips, first, last, down, cell_columns, column_weights, models, boxes, offsets, values,
    threshold, counts, labels,
):  # fmt: skip
    # (h, W, 3) pixels from row `top` on, int64 (n, 3), ..., float32 (H,), int64 (w,), float32 (W,), ..., (h, W) labels
    """Give each pixel to the mask of the largest filtered membership there, if that exceeds the threshold, or 0.

    The models, smooth by construction, are interpolated bilinearly at each pixel. Between four of the guide's pixels
    they bound what any colour can give: where that decides, no pixel is looked at.

    `strips` are rows from, to and the row of the guide above them, of which `first` to `last` are done; `down` and
    `column_weights` say how far between two of the guide's pixels each row and column lies, `cell_columns` the column
    that each cell of the guide begins with. Mask i has its (4, h', w') models at `offsets[i]` of the flat `models`,
    for the guide's rows and columns in `boxes[i]` (top, left, bottom, right), and gives its pixels `values[i]`.
    `counts[s]` becomes how many pixels of strip s had to be looked at.
    """
    cells = cell_columns.size - 1
    tallest = 0
    for s in range(first, last):
        tallest = max(tallest, strips[s, 1] - strips[s, 0])
    rivals = np.empty(offsets.size, np.int64)
    most = np.empty((offsets.size, cells), np.float32)
    least = np.empty((offsets.size, cells), np.float32)
    ground = np.empty(cells, np.float32)
    decided = np.empty(cells, np.int64)
    colours = np.empty((3, tallest, _CHUNK), np.float32)
    best = np.empty((tallest, _CHUNK), np.float32)
    flat = np.empty((4, _CHUNK), np.float32)
    slope = np.empty((4, _CHUNK), np.float32)
    for s in range(first, last):
        begin, end, above = strips[s, 0], strips[s, 1], strips[s, 2]
        counts[s] = 0
        for j in range(cells):
            ground[j] = threshold
        n = _bound_memberships(models, boxes, offsets, above, rivals, most, least, ground)
        # The label of a cell, or -1 where pixels have to be looked at.
        for j in range(cells):
            decided[j] = 0
            count = 0
            for m in range(n):
                if most[m, j] > ground[j]:
                    count += 1
                    decided[j] = values[rivals[m]] if count == 1 and least[m, j] > threshold else -1
        j = 0
        while j < cells:
            cell, label = j, decided[j]
            while j < cells and decided[j] == label:
                j += 1
            if label >= 0:
                for y in range(begin, end):
                    for x in range(cell_columns[cell], cell_columns[j]):
                        labels[y - top, x] = label
                continue
            for start in range(cell_columns[cell], cell_columns[j], _CHUNK):
                size = min(_CHUNK, cell_columns[j] - start)
                counts[s] += size * (end - begin)
                for y in range(begin, end):
                    i = y - begin
                    for x in range(size):
                        colours[0, i, x] = np.float32(pixels[y - top, start + x, 0]) / peak
                        colours[1, i, x] = np.float32(pixels[y - top, start + x, 1]) / peak
                        colours[2, i, x] = np.float32(pixels[y - top, start + x, 2]) / peak
                    for x in range(size):
                        best[i, x] = threshold
                        labels[y - top, start + x] = 0
                for m in range(n):
                    # The cells of this chunk in which the mask has a chance.
                    low, high = cell, j
                    while low < high and (cell_columns[low + 1] <= start or most[m, low] <= ground[low]):
                        low += 1
                    while low < high and (
                        cell_columns[high - 1] >= start + size or most[m, high - 1] <= ground[high - 1]
                    ):
                        high -= 1
                    if low == high:
                        continue
                    k = rivals[m]
                    value, width = values[k], boxes[k, 3] - boxes[k, 1]
                    plane = width * (boxes[k, 2] - boxes[k, 0])
                    x_from = max(cell_columns[low] - start, 0)
                    x_to = min(cell_columns[high] - start, size)
                    for c in range(4):
                        upper = offsets[k] + c * plane + (above - boxes[k, 0]) * width - boxes[k, 1]
                        lower = upper + (width if above + 1 < boxes[k, 2] else 0)
                        for i in range(low, high):
                            right = min(i + 1, boxes[k, 3] - 1)
                            u, v = models[upper + i], models[lower + i] - models[upper + i]
                            du = models[upper + right] - models[upper + i]
                            dv = models[lower + right] - models[lower + i] - du
                            for x in range(max(cell_columns[i] - start, 0), min(cell_columns[i + 1] - start, size)):
                                flat[c, x] = u + column_weights[start + x] * du
                                slope[c, x] = v + column_weights[start + x] * dv
                    for y in range(begin, end):
                        i, w = y - begin, down[y]
                        for x in range(x_from, x_to):
                            membership = (
                                (flat[3, x] + w * slope[3, x])
                                + (flat[0, x] + w * slope[0, x]) * colours[0, i, x]
                                + (flat[1, x] + w * slope[1, x]) * colours[1, i, x]
                                + (flat[2, x] + w * slope[2, x]) * colours[2, i, x]
                            )
                            if membership > best[i, x]:
                                best[i, x] = membership
                                labels[y - top, start + x] = value
