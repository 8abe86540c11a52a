"""The label image: which pixel belongs to which instance."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import AtomicFile
from sparsespec._mapped import bands

__all__ = ["MAX_LABEL", "label_png_bytes", "label_range", "write_label_png"]

MAX_LABEL = 65535
"""The largest label a 16-bit image holds."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SIXTEEN_BITS, _GREY = 16, 0
_ABOVE = 2  # the filter that keeps the difference to the row above: of labels it leaves next to nothing but zeros
_PIXELS_AT_ONCE = 1 << 20
_LONGEST_SIDE = 2**31 - 1


def write_label_png(path: str | os.PathLike[str], labels: npt.ArrayLike) -> None:
    """Write a label image as a 16-bit grey PNG, losslessly.

    A few rows at a time: beside the labels, which may be mapped from a file, it needs a few megabytes.

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
    array = _checked(labels)
    with AtomicFile(path) as file:
        _write(file, array)


def label_png_bytes(labels: npt.ArrayLike) -> bytes:
    """Encode a label image as the 16-bit grey PNG that `write_label_png` writes.

    Parameters
    ----------
    labels : (H, W) array_like of int
        0 = background, 1..65535 = instances.

    Raises
    ------
    ValueError
        As for `write_label_png`.
    """
    file = io.BytesIO()
    _write(file, _checked(labels))
    return file.getvalue()


def _checked(labels: npt.ArrayLike) -> npt.NDArray[np.integer]:
    array = np.asarray(labels)
    if array.ndim != 2 or array.size == 0 or max(array.shape) > _LONGEST_SIDE:
        raise ValueError(f"labels must be two-dimensional with at least one pixel, got the shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers, got {array.dtype}")
    smallest, largest = label_range(array)
    if smallest < 0 or largest > MAX_LABEL:
        raise ValueError(
            f"labels must lie in 0..{MAX_LABEL}, which is what a 16-bit PNG holds; got {smallest}..{largest}"
        )
    return array


def label_range(labels: npt.NDArray[np.integer]) -> tuple[int, int]:
    """Find the smallest and the largest label of an image that has pixels, some rows at a time."""
    ranges = [(int(part.min()), int(part.max())) for _, part in bands(labels)]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _write(file: BinaryIO, labels: npt.NDArray[np.integer]) -> None:
    height, width = labels.shape
    file.write(_SIGNATURE)
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, _SIXTEEN_BITS, _GREY, 0, 0, 0))
    # After the filter only runs are worth looking for, and looking for nothing else is several times as fast.
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    above = np.zeros(2 * width, np.uint8)
    for _, part in bands(labels, step=max(1, _PIXELS_AT_ONCE // width)):
        rows = part.astype(">u2", order="C").view(np.uint8)
        filtered = np.empty((len(rows), 1 + 2 * width), np.uint8)
        filtered[:, 0] = _ABOVE
        np.subtract(rows[0], above, out=filtered[0, 1:])
        np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
        above = rows[-1]
        _chunk(file, b"IDAT", packer.compress(filtered.data))
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _chunk(file: BinaryIO, kind: bytes, content: bytes) -> None:
    if content or kind == b"IEND":
        file.write(struct.pack(">I", len(content)) + kind)
        file.write(content)
        file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))))
