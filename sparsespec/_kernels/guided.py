"""Turn token-sized masks into pixels with a colour guided filter, with no image-sized array per mask."""

from __future__ import annotations

import numba
import numpy as np

from sparsespec._kernels._compile import kernel


@kernel(parallel=True, fastmath=True)
def solve_guide(mean, moments, cross, membership, eps, coefficients):
    # float32 (h, w, 3), (h, w, 6), (h, w, 3), (h, w) -> (h, w, 4)
    """Linear model of a mask in the colours around each pixel: a = (Cov + eps I)^-1 cov(I, p), b = p - a . I.

    `moments` are the windows' means of rr, rg, rb, gg, gb, bb; `cross` those of r p, g p, b p; `membership` that of p.
    """
    height, width = mean.shape[:2]
    for y in numba.prange(height):
        for x in range(width):
            r, g, b = mean[y, x, 0], mean[y, x, 1], mean[y, x, 2]
            rr = moments[y, x, 0] - r * r + eps
            rg = moments[y, x, 1] - r * g
            rb = moments[y, x, 2] - r * b
            gg = moments[y, x, 3] - g * g + eps
            gb = moments[y, x, 4] - g * b
            bb = moments[y, x, 5] - b * b + eps
            i00, i01, i02 = gg * bb - gb * gb, rb * gb - rg * bb, rg * gb - rb * gg
            i11, i12, i22 = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
            inverse = np.float32(1.0) / (rr * i00 + rg * i01 + rb * i02)
            p = membership[y, x]
            c0 = cross[y, x, 0] - r * p
            c1 = cross[y, x, 1] - g * p
            c2 = cross[y, x, 2] - b * p
            a0 = (i00 * c0 + i01 * c1 + i02 * c2) * inverse
            a1 = (i01 * c0 + i11 * c1 + i12 * c2) * inverse
            a2 = (i02 * c0 + i12 * c1 + i22 * c2) * inverse
            coefficients[y, x, 0] = a0
            coefficients[y, x, 1] = a1
            coefficients[y, x, 2] = a2
            coefficients[y, x, 3] = p - a0 * r - a1 * g - a2 * b


@kernel(parallel=True, fastmath=True)
def claim_pixels(image, coefficients, box, step_y, step_x, top, left, value, best, labels):
    # float32 (H, W, 3), (h, w, 4), int64 (4,), floats, ints, float32 (H, W), int32 (H, W) -> best, labels in place
    """Give a mask the pixels of its box where its filtered membership beats that of all masks before it.

    The coefficients, smooth by construction, are interpolated bilinearly at each pixel; their first row and column are
    at (top, left) of an image whose pixels are 1 / step pixels wide.
    """
    rows, columns = coefficients.shape[:2]
    for y in numba.prange(box[0], box[2]):
        fy = min(max((y + 0.5) * step_y - 0.5 - top, 0.0), rows - 1.0)
        y0 = min(int(fy), max(rows - 2, 0))
        y1 = min(y0 + 1, rows - 1)
        wy = np.float32(fy - y0)
        for x in range(box[1], box[3]):
            fx = min(max((x + 0.5) * step_x - 0.5 - left, 0.0), columns - 1.0)
            x0 = min(int(fx), max(columns - 2, 0))
            x1 = min(x0 + 1, columns - 1)
            wx = np.float32(fx - x0)
            w00, w01 = (np.float32(1) - wy) * (np.float32(1) - wx), (np.float32(1) - wy) * wx
            w10, w11 = wy * (np.float32(1) - wx), wy * wx
            membership = np.float32(0.0)
            for c in range(4):
                a = (
                    w00 * coefficients[y0, x0, c]
                    + w01 * coefficients[y0, x1, c]
                    + w10 * coefficients[y1, x0, c]
                    + w11 * coefficients[y1, x1, c]
                )
                membership += a * image[y, x, c] if c < 3 else a
            if membership > best[y, x]:
                best[y, x] = membership
                labels[y, x] = value
