"""Each instance alone: the photograph cropped to it, with everything else transparent."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import AtomicFile
from sparsespec._mapped import release
from sparsespec.formats.labels import _SIGNATURE, _chunk
from sparsespec.formats.overlay import _eight_bits

if TYPE_CHECKING:
    from sparsespec.images import PixelSource

__all__ = ["cutout_path", "write_cutouts"]

_EIGHT_BITS, _RGBA = 8, 6
_AVERAGE = 3  # the filter that keeps the difference to the mean of the pixel to the left and the one above
_PIXELS_AT_ONCE = 1 << 20


def cutout_path(name: str, label: int) -> str:
    """Path of an instance's cut-out relative to the output folder: ``cutouts/<name>/<label>.png``."""
    return f"cutouts/{name}/{label:03d}.png"


def write_cutouts(
    folder: Path,
    name: str,
    image: npt.NDArray[Any] | PixelSource,
    labels: npt.NDArray[Any],
    annotations: list[dict[str, Any]],
) -> list[str]:
    """Write an RGBA PNG of 8 bits for each instance, in its full resolution.

    Alpha is 255 on the instance and 0 elsewhere, where the colour is black: nothing of what stands beside it gets into
    the file. There is no soft edge, which would have to invent how the colours of both sides mix. Of an image of 16
    bits the upper 8 are kept.

    A million pixels are in memory at a time, however large the instance is; only the window around it is read.

    Parameters
    ----------
    folder : Path
        Output folder. Folders below it are made.
    name : str
        Output name of the image.
    image : (H, W, 3) ndarray or PixelSource
        The photograph, see `sparsespec.images.PixelSource`.
    labels : (H, W) ndarray of int
        0 = background. It may be mapped from a file.
    annotations : list of dict
        Of `sparsespec.formats.instance_annotations`: ``label`` and ``bbox`` are used.

    Returns
    -------
    list of str
        For each annotation the path of its file, relative to `folder`, see `cutout_path`.

    Raises
    ------
    ValueError
        The labels are not of the size of the image.
    OSError
        A file cannot be written. Those that were written before it are removed.
    """
    from sparsespec.images import as_pixels

    if labels.shape != tuple(image.shape[:2]):
        raise ValueError(f"labels must have the size of the image {tuple(image.shape[:2])}, got {labels.shape}")
    source = as_pixels(image)
    paths = [cutout_path(name, annotation["label"]) for annotation in annotations]
    written: list[Path] = []
    try:
        for path, annotation in zip(paths, annotations, strict=True):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with AtomicFile(target) as file:
                _write(file, source, labels, annotation["label"], annotation["bbox"])
            written.append(target)
    except BaseException:
        for target in written:
            with suppress(OSError):
                target.unlink()
        raise
    return paths


def _write(file: BinaryIO, source: PixelSource, labels: npt.NDArray[Any], label: int, box: list[int]) -> None:
    left, top, width, height = box
    file.write(_SIGNATURE)
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, _EIGHT_BITS, _RGBA, 0, 0, 0))
    # The noise of photographs leaves nothing for a search of repetitions but time; runs are in what is transparent.
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    above = np.zeros(4 * width, np.uint8)
    rows = max(1, _PIXELS_AT_ONCE // width)
    for first in range(top, top + height, rows):
        last = min(first + rows, top + height)
        inside = labels[first:last, left : left + width] == label
        pixels = np.zeros((last - first, width, 4), np.uint8)
        np.multiply(_eight_bits(source.read(first, left, last, left + width)), inside[..., None], out=pixels[..., :3])
        np.multiply(inside, np.uint8(255), out=pixels[..., 3])
        release(labels)
        _chunk(file, b"IDAT", packer.compress(_filtered(pixels.reshape(last - first, -1), above).data))
        above = pixels[-1].ravel()
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _filtered(rows: npt.NDArray[np.uint8], above: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Give each row its filter type and the differences that it stands for."""
    mean = np.zeros(rows.shape, np.uint16)
    mean[:, 4:] = rows[:, :-4]
    mean[0] += above
    mean[1:] += rows[:-1]
    mean >>= 1
    filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = _AVERAGE
    np.subtract(rows, mean, out=filtered[:, 1:], casting="unsafe", dtype=np.uint16)
    return filtered
