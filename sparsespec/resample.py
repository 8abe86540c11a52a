"""Resizing of photographs: antialiased bilinear, exact, and quick on large ones.

Each axis is one sparse matrix of triangle-filter weights, so an image of many megapixels costs one pass over its rows
and one over a much smaller array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse


def resize(image: npt.NDArray[Any], shape: tuple[int, int], *, scale: float | None = None) -> npt.NDArray[np.float32]:
    """Resize an image with a triangle filter that widens when the image shrinks (no aliasing).

    Output pixel i of an axis is centred on input coordinate ``(i + 1/2) / scale - 1/2`` and weighs input pixel j by
    ``max(0, 1 - |j - centre| / max(1, 1 / scale))``, weights normalised to one. Outside the image there is nothing: the
    filter is cut at the edge, as Pillow does it.

    Parameters
    ----------
    image : (H, W) or (H, W, C) array
        Any real dtype.
    shape : (int, int)
        Rows and columns of the result, each at least 1.
    scale : float, optional
        Output pixels per input pixel, the same on both axes. The default stretches each axis to ``shape``, so that
        scales of the two axes can differ by the rounding of the sizes.

    Returns
    -------
    (rows, columns) or (rows, columns, C) float32
        C-contiguous.

    Raises
    ------
    ValueError
        On an empty image, another number of dimensions, a size below 1 or a scale that isn't positive.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"image must be (H, W) or (H, W, C) and not empty, got shape {image.shape}")
    rows, columns = (int(size) for size in shape)
    if rows < 1 or columns < 1:
        raise ValueError(f"shape must be at least (1, 1), got {tuple(shape)}")
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale!r}")
    height, width = image.shape[:2]
    channels = image.shape[2:]
    count = int(np.prod(channels, dtype=np.int64))

    vertical = _weights(height, rows, scale)
    if vertical is not None:
        image = vertical @ image.reshape(height, width * count).astype(np.float32, copy=False)
    image = image.reshape(rows, width, count)
    horizontal = _weights(width, columns, scale)
    if horizontal is not None:
        turned = np.ascontiguousarray(image.transpose(1, 0, 2), dtype=np.float32).reshape(width, rows * count)
        image = (horizontal @ turned).reshape(columns, rows, count).transpose(1, 0, 2)
    return np.array(image, np.float32, order="C").reshape(rows, columns, *channels)


def _weights(size: int, wanted: int, scale: float | None) -> Any:
    """Build the (wanted, size) matrix of one axis; None when it would be the identity."""
    step = size / wanted if scale is None else 1.0 / scale
    if step == 1.0 and size == wanted:
        return None
    radius = max(1.0, step)
    # Past the edge (a scale that doesn't divide the size) the last pixels are seen from the border itself.
    centre = np.clip((np.arange(wanted) + 0.5) * step - 0.5, 0, size - 1)
    first = np.maximum(np.floor(centre - radius).astype(np.int64) + 1, 0)
    last = np.minimum(np.ceil(centre + radius).astype(np.int64), size)
    taps = np.arange(int((last - first).max()))
    column = first[:, None] + taps
    weight = np.clip(1.0 - np.abs(column - centre[:, None]) / radius, 0, None)
    weight[column >= last[:, None]] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    used = weight > 0
    pointer = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
    return sparse.csr_array((weight[used].astype(np.float32), column[used], pointer), shape=(wanted, size))
