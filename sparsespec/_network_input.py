"""An image as the network sees it: its values, its size, and its mirror image beyond the edge of the grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.resample import resize

_Floats = npt.NDArray[np.float32]


DEFAULT_LONG_SIDE = 448
"""Pixels of the network's input along the longer side of the image."""
_ROUNDING = 1e-5


class _DefaultSide(int):
    """Says that no long side was given, and what it is then."""


NO_SIDE_GIVEN = _DefaultSide(DEFAULT_LONG_SIDE)


class UnitPixels:
    """A pixel source, or an array as one, whose parts are float32 in [0, 1]."""

    def __init__(self, image: Any) -> None:
        self._read = image.read if hasattr(image, "read") else None
        self._image = image if self._read else np.asarray(image)
        shape = tuple(int(size) for size in self._image.shape)
        if len(shape) != 3 or shape[2] != 3 or 0 in shape:
            raise ValueError(f"image must be (H, W, 3) and not empty, got shape {shape}")
        dtype = np.dtype(self._image.dtype)
        if dtype.kind != "f" and dtype not in (np.uint8, np.uint16):
            raise ValueError(f"image must be uint8, uint16 or of a float type with values in [0, 1], got {dtype}")
        self.shape = shape
        self._largest = None if dtype.kind == "f" else int(np.iinfo(dtype).max)

    def read(self, top: int, left: int, bottom: int, right: int) -> _Floats:
        if self._read is None:
            part = self._image[top:bottom, left:right]
        else:
            part = np.asarray(self._read(top, left, bottom, right))
        if self._largest is not None:
            unit: _Floats = np.divide(part, np.float32(self._largest), dtype=np.float32)
            return unit
        low, high = float(part.min()), float(part.max())
        # Written so that NaN, which min and max hand on, fails as well; resizing can leave the range by rounding.
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(f"image must have finite values in [0, 1], found values from {low:g} to {high:g}")
        return part.astype(np.float32, copy=False)


def wanted_scale(shape: tuple[int, ...], long_side: int | None, scale: float | None, megapixels: float | None) -> float:
    """Return the network's pixels per pixel of the image that the arguments of ``features`` ask for."""
    side = None if isinstance(long_side, _DefaultSide) else long_side
    asked = {"long_side": side, "scale": scale, "megapixels": megapixels}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1:
        said = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"long_side, scale and megapixels exclude each other, got {said}")
    for name in given.keys() - {"long_side"}:
        value = given[name]
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    if scale is not None:
        return float(scale)
    if megapixels is not None:
        return min(1.0, math.sqrt(megapixels * 1e6 / (shape[0] * shape[1])))
    return _scale_to(shape, long_side)


def _scale_to(shape: tuple[int, ...], long_side: int | None) -> float:
    if long_side is None:
        return 1.0
    if long_side < 1:
        raise ValueError(f"long_side must be at least 1 pixel or None, got {long_side!r}")
    return long_side / max(shape[:2])


@dataclass(frozen=True, eq=False)
class Fitted:
    """An image as the network sees it, made in parts on demand.

    Attributes
    ----------
    source
        Array or pixel source.
    scale
        New pixels per old pixel.
    content
        Rows and columns of the resized image; what lies beyond them in the grid is its mirror image.
    patch_size
        Side of a token, pixels.
    """

    source: Any
    scale: float
    content: tuple[int, int]
    patch_size: int

    @property
    def grid(self) -> tuple[int, int]:
        height, width = (-(-side // self.patch_size) for side in self.content)
        return height, width

    def pixels(self, tile: tuple[int, int, int, int]) -> _Floats:
        """Make the pixels of a tile of tokens."""
        top, left, bottom, right = (side * self.patch_size for side in tile)
        rows, columns = _mirrored(top, bottom, self.content[0]), _mirrored(left, right, self.content[1])
        first, begin = int(rows.min()), int(columns.min())
        window = (first, begin, int(rows.max()) + 1, int(columns.max()) + 1)
        part = resize(self.source, self.content, scale=self.scale, window=window)
        if len(rows) > len(part):
            part = part[rows - first]
        if len(columns) > part.shape[1]:
            part = part[:, columns - begin]
        return part


def _mirrored(start: int, stop: int, size: int) -> npt.NDArray[np.int64]:
    """Return the coordinates, inside an axis of ``size`` that is continued by mirror images, of a range."""
    place = np.arange(start, stop) % (2 * size)
    return np.where(place < size, place, 2 * size - 1 - place)


def fit(source: Any, scale: float, patch_size: int) -> Fitted:
    height, width = (max(1, round(side * scale)) for side in source.shape[:2])
    return Fitted(source, scale, (height, width), patch_size)


def fit_to_grid(image: _Floats, long_side: int | None, patch_size: int) -> tuple[_Floats, float]:
    """Bring an image to the size the network sees.

    One scale for both axes makes the longer side ``long_side`` pixels, up or down; the other side is rounded to whole
    pixels, at least one, while the scale stays exact. Then the image is continued at the bottom and at the right by
    its mirror image to the next multiple of the patch size, so that every pixel is in a token and none is stretched.

    Parameters
    ----------
    image : (H, W, 3) float32
        The image.
    long_side : int or None
        Pixels of the longer side; None keeps the size.
    patch_size : int
        Side of a token, pixels.

    Returns
    -------
    fitted : (h * patch_size, w * patch_size, 3) float32
        The image at its new size.
    scale : float
        New pixels per old pixel.

    Raises
    ------
    ValueError
        On a ``long_side`` below 1.
    """
    whole = fit(image, _scale_to(image.shape, long_side), patch_size)
    return whole.pixels((0, 0, *whole.grid)), whole.scale
