"""Resizing of photographs: antialiased bilinear, exact, and quick on large ones.

Each axis is one sparse matrix of triangle-filter weights, so an image of many megapixels costs one pass over its rows
and one over a much smaller array. The rows are taken in bands: beside the picture and the result only a band of the
picture is ever held as floating point numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

_BAND = 1 << 20
"""Values of the picture that are converted at a time; the result doesn't depend on it."""
_WIDEST = 1 << 25
"""Values that one row of the result may need before its columns are cut as well."""


def resize(
    image: Any,
    shape: tuple[int, int],
    *,
    scale: float | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> npt.NDArray[np.float32]:
    """Resize an image with a triangle filter that widens when the image shrinks (no aliasing).

    Output pixel i of an axis is centred on input coordinate ``(i + 1/2) / scale - 1/2`` and weighs input pixel j by
    ``max(0, 1 - |j - centre| / max(1, 1 / scale))``, weights normalised to one. Outside the image there is nothing: the
    filter is cut at the edge, as Pillow does it.

    Parameters
    ----------
    image : (H, W) or (H, W, C) array, or pixel source
        Any real dtype. A source has a ``shape`` and a method ``read(top, left, bottom, right)`` that returns that part
        of the image; parts are read in bands of rows from top to bottom.
    shape : (int, int)
        Rows and columns of the result, each at least 1.
    scale : float, optional
        Output pixels per input pixel, the same on both axes. The default stretches each axis to ``shape``, so that
        scales of the two axes can differ by the rounding of the sizes.
    window : (top, left, bottom, right), optional
        Compute only these pixels of the result: the same bits as in the whole.

    Returns
    -------
    (rows, columns) or (rows, columns, C) float32
        C-contiguous, of the whole result or of the window.

    Raises
    ------
    ValueError
        On an empty image, another number of dimensions, a size below 1, a scale that isn't positive or a window that
        is empty or leaves the result.
    """
    if not hasattr(image, "read"):
        image = np.asarray(image)
    full = tuple(int(size) for size in image.shape)
    if len(full) not in (2, 3) or 0 in full:
        raise ValueError(f"image must be (H, W) or (H, W, C) and not empty, got shape {full}")
    rows, columns = (int(size) for size in shape)
    if rows < 1 or columns < 1:
        raise ValueError(f"shape must be at least (1, 1), got {tuple(shape)}")
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    top, left, bottom, right = (0, 0, rows, columns) if window is None else (int(side) for side in window)
    if not (0 <= top < bottom <= rows and 0 <= left < right <= columns):
        raise ValueError(f"window must be (top, left, bottom, right) within {(rows, columns)}, got {window}")

    count = math.prod(full[2:])
    result = np.empty((bottom - top, right - left, count), np.float32)
    step = full[0] / rows if scale is None else 1 / scale
    aside = full[1] / columns if scale is None else 1 / scale
    # Very wide pictures that shrink a lot: columns are cut too, so that the rows under one output row stay few enough.
    needed = (2 * max(1.0, step) + 1) * count * max(1.0, aside)
    across = max(1, min(right - left, int(_WIDEST / needed)))
    for start in range(left, right, across):
        stop = min(start + across, right)
        part = result[:, start - left : stop - left]
        _resize_columns(image, part, (rows, columns), scale, (top, start, bottom, stop), step)
    return result.reshape(bottom - top, right - left, *full[2:])


def _resize_columns(
    image: Any,
    result: npt.NDArray[np.float32],
    shape: tuple[int, int],
    scale: float | None,
    window: tuple[int, int, int, int],
    step: float,
) -> None:
    """Fill ``result``, a window of the resized image, band by band."""
    height, width, count = image.shape[0], image.shape[1], result.shape[2]
    top, left, bottom, right = window
    vertical = _weights(height, shape[0], scale, top, bottom)
    horizontal = _weights(width, shape[1], scale, left, right)
    first, last = (left, right) if horizontal is None else _span(horizontal)
    if horizontal is not None:
        horizontal = _columns(horizontal, first, last)
    band = max(1, int(_BAND / (max(1.0, step) * (last - first) * count)))
    for start in range(0, bottom - top, band):
        stop = min(start + band, bottom - top)
        if vertical is None:
            pixels = _read(image, top + start, first, top + stop, last).astype(np.float32, copy=False)
        else:
            rows = vertical[start:stop]
            begin, end = _span(rows)
            pixels = _read(image, begin, first, end, last).astype(np.float32, copy=False)
            pixels = _columns(rows, begin, end) @ pixels.reshape(end - begin, (last - first) * count)
        pixels = pixels.reshape(stop - start, last - first, count)
        if horizontal is None:
            result[start:stop] = pixels
        else:
            turned = np.ascontiguousarray(pixels.transpose(1, 0, 2)).reshape(last - first, -1)
            result[start:stop] = (horizontal @ turned).reshape(right - left, stop - start, count).transpose(1, 0, 2)


def _read(image: Any, top: int, left: int, bottom: int, right: int) -> npt.NDArray[Any]:
    if hasattr(image, "read"):
        return np.asarray(image.read(top, left, bottom, right))
    return np.asarray(image[top:bottom, left:right])


def _span(weights: Any) -> tuple[int, int]:
    """Return the first used column of a matrix and one past the last."""
    return int(weights.indices.min()), int(weights.indices.max()) + 1


def _columns(weights: Any, first: int, last: int) -> Any:
    return sparse.csr_array(
        (weights.data, weights.indices - first, weights.indptr), shape=(weights.shape[0], last - first)
    )


def _weights(size: int, wanted: int, scale: float | None, start: int, stop: int) -> Any:
    """Build rows ``start`` to ``stop`` of the (wanted, size) matrix of one axis; None when it would be the identity."""
    step = size / wanted if scale is None else 1.0 / scale
    if step == 1.0 and size == wanted:
        return None
    radius = max(1.0, step)
    # Past the edge (a scale that doesn't divide the size) the last pixels are seen from the border itself.
    centre = np.clip((np.arange(start, stop) + 0.5) * step - 0.5, 0, size - 1)
    first = np.maximum(np.floor(centre - radius).astype(np.int64) + 1, 0)
    last = np.minimum(np.ceil(centre + radius).astype(np.int64), size)
    taps = np.arange(int((last - first).max()))
    column = first[:, None] + taps
    weight = np.clip(1.0 - np.abs(column - centre[:, None]) / radius, 0, None)
    weight[column >= last[:, None]] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    used = weight > 0
    pointer = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    return sparse.csr_array((weight[used].astype(np.float32), column[used], pointer), shape=(stop - start, size))
