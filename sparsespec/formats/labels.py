"""The label image: which pixel belongs to which instance."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from sparsespec.formats._atomic import write_atomic

__all__ = ["MAX_LABEL", "write_label_png"]

MAX_LABEL = 65535
"""The largest label a 16-bit image holds."""


def write_label_png(path: str | os.PathLike[str], labels: npt.ArrayLike) -> None:
    """Write a label image as a 16-bit grey PNG, losslessly.

    Parameters
    ----------
    path : str or os.PathLike
        Target; its folder must exist. It is replaced in one step.
    labels : (H, W) array_like of int
        0 = background, 1..65535 = instances.

    Raises
    ------
    ValueError
        Not a two-dimensional array of whole numbers, no pixels, or a label outside 0..65535.
    OSError
        The file cannot be written.
    """
    array = np.asarray(labels)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"labels must be two-dimensional with at least one pixel, got the shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers, got {array.dtype}")
    smallest, largest = int(array.min()), int(array.max())
    if smallest < 0 or largest > MAX_LABEL:
        raise ValueError(
            f"labels must lie in 0..{MAX_LABEL}, which is what a 16-bit PNG holds; got {smallest}..{largest}"
        )
    import imageio.v3 as iio

    content = iio.imwrite("<bytes>", array.astype(np.uint16), plugin="pillow", extension=".png", is_batch=False)
    write_atomic(path, content)
