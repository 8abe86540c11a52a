"""Turn token-sized masks into pixels with a colour guided filter, band by band and only where it can matter.

Window sums are sums of multiples of powers of two that a float64 holds exactly, so that it makes no difference where a
running sum begins: bands of any height and any number of threads give the same bytes. The kernels do a range of rows
each, for threads to share: with Numba's own threads they would take three times as long to compile.
"""

from __future__ import annotations

import numpy as np

from sparsespec._kernels._compile import device, kernel

# Steps of the guide's and the masks' values, and of the linear models' coefficients.
_VALUE_STEP = 2.0**-16
_MODEL_STEP = 2.0**-24
# What rounding can add to a membership, where the models aren't absurdly steep.
_SLACK = np.float32(1e-4)
# Pixels handled at a time: their colours and one mask's models stay in the nearest cache.
_CHUNK = 512


@kernel()
def reduce_rows(pixels, top, peak, row_taps, row_weights, column_taps, column_weights, begin, end, guide, at):
    # (h, 3 W) pixels from row `top` on; taps int64 (rows, 2), weights float32 (rows, most taps) -> (3, rows, w) guide
    """Reduce an image to rows `begin` to `end` of a guide, whose first row in memory is `at`.

    Weighted sums over the pixels `taps[i, 0]` to `taps[i, 1]` of each axis, rounded to multiples of 2^-16; `peak` is
    the value of the pixels' type that stands for 1.
    """
    size = pixels.shape[1]
    total = np.empty(size, np.float32)
    step = np.float32(_VALUE_STEP)
    for g in range(begin, end):
        total[:] = 0
        for y in range(row_taps[g, 0], row_taps[g, 1]):
            weight = row_weights[g, y - row_taps[g, 0]]
            row = pixels[y - top]
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


@device()
def _add_products(sums, one, other, sign):
    for x in range(one.size):
        sums[x] += sign * (np.float64(one[x]) * np.float64(other[x]))


@device()
def _add_values(sums, values, sign):
    for x in range(values.size):
        sums[x] += sign * np.float64(values[x])


@device()
def _repeat_ends(sums, half):
    """Repeat the first and last sum of each row, so that windows of 2 half + 1 around all of them have sums."""
    last = sums.shape[1] - half - 2
    for c in range(sums.shape[0]):
        for i in range(half):
            sums[c, i] = sums[c, half]
        for i in range(last + 1, sums.shape[1]):
            sums[c, i] = sums[c, last]


@device()
def _add_row(sums, guide, y, half, sign):
    # float64 (9, w + 2 half + 1) += sign x (r, g, b, rr, rg, rb, gg, gb, bb) of a row of float32 (3, h, w)
    colours = guide.shape[0]
    n = colours
    for c in range(colours):
        _add_values(sums[c, half:], guide[c, y], sign)
        for d in range(c, colours):
            _add_products(sums[n, half:], guide[c, y], guide[d, y], sign)
            n += 1


# Several running sums at a time: each has to wait for its last addition.


@device()
def _means_of_three(a, b, c, size, share, a_mean, b_mean, c_mean):
    a_sum, b_sum, c_sum = 0.0, 0.0, 0.0
    for i in range(size):
        a_sum += a[i]
        b_sum += b[i]
        c_sum += c[i]
    a_next, b_next, c_next = a[size:], b[size:], c[size:]
    for x in range(a_mean.size):
        a_mean[x] = a_sum * share
        b_mean[x] = b_sum * share
        c_mean[x] = c_sum * share
        a_sum += a_next[x] - a[x]
        b_sum += b_next[x] - b[x]
        c_sum += c_next[x] - c[x]


@device()
def _means_of_four(a, b, c, d, size, share, a_mean, b_mean, c_mean, d_mean):
    a_sum, b_sum, c_sum, d_sum = 0.0, 0.0, 0.0, 0.0
    for i in range(size):
        a_sum += a[i]
        b_sum += b[i]
        c_sum += c[i]
        d_sum += d[i]
    a_next, b_next, c_next, d_next = a[size:], b[size:], c[size:], d[size:]
    for x in range(a_mean.size):
        a_mean[x] = a_sum * share
        b_mean[x] = b_sum * share
        c_mean[x] = c_sum * share
        d_mean[x] = d_sum * share
        a_sum += a_next[x] - a[x]
        b_sum += b_next[x] - b[x]
        c_sum += c_next[x] - c[x]
        d_sum += d_next[x] - d[x]


@device()
def _invert(windows, eps, statistics, at):
    # float64 (9, w) -> float32 (9, h, w) at a row
    for x in range(windows.shape[1]):
        r, g, b = windows[0, x], windows[1, x], windows[2, x]
        rr = windows[3, x] - r * r + eps
        rg = windows[4, x] - r * g
        rb = windows[5, x] - r * b
        gg = windows[6, x] - g * g + eps
        gb = windows[7, x] - g * b
        bb = windows[8, x] - b * b + eps
        i00, i01, i02 = gg * bb - gb * gb, rb * gb - rg * bb, rg * gb - rb * gg
        inverse = 1.0 / (rr * i00 + rg * i01 + rb * i02)
        statistics[0, at, x] = r
        statistics[1, at, x] = g
        statistics[2, at, x] = b
        statistics[3, at, x] = i00 * inverse
        statistics[4, at, x] = i01 * inverse
        statistics[5, at, x] = i02 * inverse
        statistics[6, at, x] = (rr * bb - rb * rb) * inverse
        statistics[7, at, x] = (rb * rg - rr * gb) * inverse
        statistics[8, at, x] = (rr * gg - rg * rg) * inverse


@kernel()
def guide_statistics(guide, top, height, half, eps, begin, end, statistics, at):
    # float32 (3, h, w), of a guide of `height` rows from `top` on -> float32 (9, h', w), whose first row is `at`
    """Of the windows around the pixels in rows `begin` to `end`: mean colour, and the inverse of Cov + eps I.

    The inverse's entries come in the order rr, rg, rb, gg, gb, bb. Outside the guide its outermost values are repeated.
    """
    width = guide.shape[2]
    share = 1.0 / np.float64(2 * half + 1) ** 2
    sums = np.zeros((9, width + 2 * half + 1))
    windows = np.empty((9, width))
    for entering in range(begin - half, end + half):
        _add_row(sums, guide, min(max(entering, 0), height - 1) - top, half, 1.0)
        y = entering - half
        if y < begin:
            continue
        _repeat_ends(sums, half)
        for c in range(0, sums.shape[0], 3):
            _means_of_three(
                sums[c], sums[c + 1], sums[c + 2], 2 * half + 1, share, windows[c], windows[c + 1], windows[c + 2]
            )
        _add_row(sums, guide, max(y - half, 0) - top, half, -1.0)
        _invert(windows, eps, statistics, y - at)


@device()
def _enlarge_row(upper, lower, weight, tokens, weights, scratch, out):
    # two rows of bool (w,), int32 and float32 per column -> one row of the bilinear enlargement, multiples of 2^-16
    last = upper.size
    for i in range(last):
        scratch[i] = (np.float32(1) - weight) * np.float32(upper[i]) + weight * np.float32(lower[i])
    scratch[last] = scratch[last - 1]
    step = np.float32(_VALUE_STEP)
    for x in range(out.size):
        token = np.uint32(tokens[x])
        value = (np.float32(1) - weights[x]) * scratch[token] + weights[x] * scratch[token + np.uint32(1)]
        out[x] = np.rint(value / step) * step


@device()
def _add_cross(sums, guide, y, left, membership, half, sign):
    # float64 (4, w + 2 half + 1) += sign x (r p, g p, b p, p)
    for c in range(guide.shape[0]):
        _add_products(sums[c, half:], membership, guide[c, y, left : left + membership.size], sign)
    _add_values(sums[3, half:], membership, sign)


@device()
def _solve(p, rp, gp, bp, r, g, b, i00, i01, i02, i11, i12, i22, a0, a1, a2, offset):
    # means of p and of r p, g p, b p, statistics -> the model, (w,) each
    for x in range(p.size):
        c0, c1, c2 = rp[x] - r[x] * p[x], gp[x] - g[x] * p[x], bp[x] - b[x] * p[x]
        s0 = i00[x] * c0 + i01[x] * c1 + i02[x] * c2
        s1 = i01[x] * c0 + i11[x] * c1 + i12[x] * c2
        s2 = i02[x] * c0 + i12[x] * c1 + i22[x] * c2
        a0[x] = np.rint(s0 / _MODEL_STEP) * _MODEL_STEP
        a1[x] = np.rint(s1 / _MODEL_STEP) * _MODEL_STEP
        a2[x] = np.rint(s2 / _MODEL_STEP) * _MODEL_STEP
        offset[x] = np.rint((p[x] - s0 * r[x] - s1 * g[x] - s2 * b[x]) / _MODEL_STEP) * _MODEL_STEP


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
    share = 1.0 / np.float64(2 * half + 1) ** 2
    # Rows of the enlarged mask that these windows see, and sums over a window's height.
    low, high = max(begin - half, top), min(end + half, bottom)
    membership = np.empty((high - low, width), np.float32)
    scratch = np.empty(mask.shape[1] + 1, np.float32)
    for y in range(low, high):
        token = row_tokens[y]
        _enlarge_row(
            mask[token], mask[min(token + 1, mask.shape[0] - 1)], row_weights[y], column_tokens[left:right],
            column_weights[left:right], scratch, membership[y - low],
        )  # fmt: skip
    sums = np.zeros((4, width + 2 * half + 1))
    windows = np.empty((4, width))
    for entering in range(begin - half, end + half):
        i = min(max(entering, top), bottom - 1)
        _add_cross(sums, guide, i - guide_top, left, membership[i - low], half, 1.0)
        y = entering - half
        if y < begin:
            continue
        _repeat_ends(sums, half)
        _means_of_four(
            sums[0], sums[1], sums[2], sums[3], 2 * half + 1, share, windows[0], windows[1], windows[2], windows[3]
        )
        i, j = y - statistics_top, y - first
        _solve(
            windows[3], windows[0], windows[1], windows[2],
            statistics[0, i, left:right], statistics[1, i, left:right], statistics[2, i, left:right],
            statistics[3, i, left:right], statistics[4, i, left:right], statistics[5, i, left:right],
            statistics[6, i, left:right], statistics[7, i, left:right], statistics[8, i, left:right],
            models[0, j], models[1, j], models[2, j], models[3, j],
        )  # fmt: skip
        i = max(y - half, top)
        _add_cross(sums, guide, i - guide_top, left, membership[i - low], half, -1.0)


@kernel()
def average_models(raw, raw_first, top, bottom, half, begin, end, models, first):
    # float32 (4, h, w) from row `raw_first` on -> (4, h', w + 1) from row `first` on
    """Mean models of the windows around rows `begin` to `end`, the last column twice; rows `top` to `bottom` exist."""
    width = raw.shape[2]
    share = 1.0 / np.float64(2 * half + 1) ** 2
    sums = np.zeros((4, width + 2 * half + 1))
    for entering in range(begin - half, end + half):
        for c in range(raw.shape[0]):
            _add_values(sums[c, half:], raw[c, min(max(entering, top), bottom - 1) - raw_first], 1.0)
        y = entering - half
        if y < begin:
            continue
        i = y - first
        _repeat_ends(sums, half)
        _means_of_four(
            sums[0], sums[1], sums[2], sums[3], 2 * half + 1, share,
            models[0, i, :width], models[1, i, :width], models[2, i, :width], models[3, i, :width],
        )  # fmt: skip
        for c in range(raw.shape[0]):
            models[c, i, width] = models[c, i, width - 1]
            _add_values(sums[c, half:], raw[c, max(y - half, top) - raw_first], -1.0)


# Loops that are to be SIMD run from 0 over contiguous slices: with another first index the compiler expects negative
# ones, and with two dimensions strides.


@device()
def _bound_models(a, b, c, d, a_below, b_below, c_below, d_below, most, least):
    zero = np.float32(0.0)
    for x in range(most.size):
        above = d[x] + max(a[x], zero) + max(b[x], zero) + max(c[x], zero)
        below = d_below[x] + max(a_below[x], zero) + max(b_below[x], zero) + max(c_below[x], zero)
        most[x] = max(above, below) + _SLACK
        above = d[x] + min(a[x], zero) + min(b[x], zero) + min(c[x], zero)
        below = d_below[x] + min(a_below[x], zero) + min(b_below[x], zero) + min(c_below[x], zero)
        least[x] = min(above, below) - _SLACK


@device()
def _bound_cells(upper, upper_right, lower, lower_right, most, least, ground):
    for x in range(most.size):
        most[x] = max(upper[x], upper_right[x])
        least[x] = min(lower[x], lower_right[x])
        ground[x] = max(ground[x], least[x])


@device()
def _decide_cells(most, least, ground, threshold, value, decided):
    for x in range(decided.size):
        mine = value if least[x] > threshold and decided[x] == 0 else np.int32(-1)
        decided[x] = mine if most[x] > ground[x] else decided[x]


@device()
def _read_pixels(pixels, peak, threshold, red, green, blue, best, labels):
    for x in range(red.size):
        red[x] = np.float32(pixels[3 * x]) / peak
        green[x] = np.float32(pixels[3 * x + 1]) / peak
        blue[x] = np.float32(pixels[3 * x + 2]) / peak
    for x in range(labels.size):
        best[x] = threshold
        labels[x] = 0


@device()
def _interpolate(models, below, cells, left, weights, flat, slope):
    for x in range(flat.size):
        i = np.uint32(cells[x] - left)
        u, v = models[i], below[i]
        du, dv = models[i + np.uint32(1)] - u, below[i + np.uint32(1)] - v
        flat[x] = u + weights[x] * du
        slope[x] = (v - u) + weights[x] * (dv - du)


@device()
def _claim(a, b, c, d, a_slope, b_slope, c_slope, d_slope, down, red, green, blue, value, best, labels):
    for x in range(best.size):
        membership = (
            (d[x] + down * d_slope[x])
            + (a[x] + down * a_slope[x]) * red[x]
            + (b[x] + down * b_slope[x]) * green[x]
            + (c[x] + down * c_slope[x]) * blue[x]
        )
        better = membership > best[x]
        best[x] = membership if better else best[x]
        labels[x] = value if better else labels[x]


@device()
def _fill(values, value):
    for x in range(values.size):
        values[x] = value


@kernel()
def claim_pixels(
    pixels, peak, top, strips, first, last, down, cells_of, column_weights, cell_columns, models, boxes, offsets,
    values, threshold, counts, labels,
):  # fmt: skip
    # (h, 3 W) from row `top` on, int64 (n, 3), ..., float32 (H,), int32 (W,), float32 (W,), int64 (w,), ..., (h, W)
    """Give each pixel to the mask of the largest filtered membership there, if that exceeds the threshold, or 0.

    The models, smooth by construction, are interpolated bilinearly at each pixel. Between four of the guide's pixels,
    in a cell, they bound what any colour can give: where that decides, no pixel is looked at.

    `strips` are rows from, to and the row of the guide above them, of which `first` to `last` are done; `down` and
    `column_weights` say how far between two of the guide's pixels each row and column lies, `cells_of` in which cell
    each column, `cell_columns` which column each cell begins with. Mask i has models (4, h', w' + 1) at `offsets[i]`
    of the flat `models`, for the guide's rows and columns in `boxes[i]` (top, left, bottom, right), the last column
    repeated, and gives its pixels `values[i]`. `counts[s]` becomes how many pixels of strip s had to be looked at.
    """
    cells = cell_columns.size - 1
    tallest = 0
    for s in range(first, last):
        tallest = max(tallest, strips[s, 1] - strips[s, 0])
    rivals = np.empty(offsets.size, np.int64)
    most = np.empty((offsets.size, cells), np.float32)
    least = np.empty((offsets.size, cells), np.float32)
    upper, lower = np.empty(cells + 2, np.float32), np.empty(cells + 2, np.float32)
    ground = np.empty(cells, np.float32)
    decided = np.empty(cells, np.int32)
    red, green = np.empty((tallest, _CHUNK), np.float32), np.empty((tallest, _CHUNK), np.float32)
    blue, best = np.empty((tallest, _CHUNK), np.float32), np.empty((tallest, _CHUNK), np.float32)
    flat = np.empty((4, _CHUNK), np.float32)
    slope = np.empty((4, _CHUNK), np.float32)
    for s in range(first, last):
        begin, end, above = strips[s, 0], strips[s, 1], strips[s, 2]
        counts[s] = 0
        # What each mask can give in each cell at most and at least, and what the best of them gives at least.
        for x in range(cells):
            ground[x] = threshold
            decided[x] = 0
        n = 0
        for k in range(offsets.size):
            if boxes[k, 0] <= above < boxes[k, 2]:
                rivals[n] = k
                left, width = boxes[k, 1], boxes[k, 3] - boxes[k, 1] + 1
                right = left + max(width - 2, 1)
                plane = width * (boxes[k, 2] - boxes[k, 0])
                i = offsets[k] + (above - boxes[k, 0]) * width
                j = i + (width if above + 1 < boxes[k, 2] else 0)
                _bound_models(
                    models[i : i + width], models[i + plane : i + plane + width],
                    models[i + 2 * plane : i + 2 * plane + width], models[i + 3 * plane : i + 3 * plane + width],
                    models[j : j + width], models[j + plane : j + plane + width],
                    models[j + 2 * plane : j + 2 * plane + width], models[j + 3 * plane : j + 3 * plane + width],
                    upper[:width], lower,
                )  # fmt: skip
                _bound_cells(
                    upper, upper[1:], lower, lower[1:], most[n, left:right], least[n, left:right], ground[left:right]
                )
                n += 1
        # The label of a cell, or -1 where pixels have to be looked at.
        for m in range(n):
            left, right = boxes[rivals[m], 1], boxes[rivals[m], 3]
            right = max(right - 1, left + 1)
            _decide_cells(
                most[m, left:right], least[m, left:right], ground[left:right], threshold, values[rivals[m]],
                decided[left:right],
            )  # fmt: skip
        j = 0
        while j < cells:
            cell, label = j, decided[j]
            while j < cells and decided[j] == label:
                j += 1
            if label >= 0:
                for y in range(begin, end):
                    _fill(labels[y - top, cell_columns[cell] : cell_columns[j]], label)
                continue
            for start in range(cell_columns[cell], cell_columns[j], _CHUNK):
                size = min(_CHUNK, cell_columns[j] - start)
                counts[s] += size * (end - begin)
                for y in range(begin, end):
                    i = y - begin
                    row = pixels[y - top, 3 * start : 3 * (start + size)]
                    _read_pixels(
                        row, peak, threshold, red[i, :size], green[i, :size], blue[i, :size], best[i],
                        labels[y - top, start : start + size],
                    )  # fmt: skip
                for m in range(n):
                    # The cells of this chunk in which the mask has a chance.
                    k = rivals[m]
                    low, high = max(cell, boxes[k, 1]), min(j, max(boxes[k, 3] - 1, boxes[k, 1] + 1))
                    while low < high and (cell_columns[low + 1] <= start or most[m, low] <= ground[low]):
                        low += 1
                    while low < high and (
                        cell_columns[high - 1] >= start + size or most[m, high - 1] <= ground[high - 1]
                    ):
                        high -= 1
                    if low >= high:
                        continue
                    u, v = max(cell_columns[low], start), min(cell_columns[high], start + size)
                    width = boxes[k, 3] - boxes[k, 1] + 1
                    for c in range(4):
                        i = offsets[k] + (c * (boxes[k, 2] - boxes[k, 0]) + above - boxes[k, 0]) * width
                        x = i + (width if above + 1 < boxes[k, 2] else 0)
                        _interpolate(
                            models[i : i + width], models[x : x + width], cells_of[u:v], np.int32(boxes[k, 1]),
                            column_weights[u:v], flat[c, : v - u], slope[c, : v - u],
                        )  # fmt: skip
                    for y in range(begin, end):
                        i = y - begin
                        _claim(
                            flat[0, : v - u], flat[1, : v - u], flat[2, : v - u], flat[3, : v - u],
                            slope[0, : v - u], slope[1, : v - u], slope[2, : v - u], slope[3, : v - u], down[y],
                            red[i, u - start : v - start], green[i, u - start : v - start],
                            blue[i, u - start : v - start], values[k], best[i, u - start : v - start],
                            labels[y - top, u:v],
                        )  # fmt: skip
