"""Plain, slow versions of the resamplers, straight from their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt


def triangle(signal: npt.NDArray[Any], wanted: int, scale: float) -> npt.NDArray[np.float64]:
    """Resample the first axis with a triangle filter as wide as the larger of the two pixel sizes."""
    size = len(signal)
    radius = max(1.0, 1 / scale)
    rows = []
    for i in range(wanted):
        centre = (i + 0.5) / scale - 0.5
        weights = [max(0.0, 1 - abs(j - centre) / radius) for j in range(size)]
        rows.append(sum(w * signal[j].astype(float) for j, w in enumerate(weights)) / sum(weights))
    return np.array(rows)


def triangle_image(image: npt.NDArray[Any], shape: tuple[int, int], scale: float | None = None) -> npt.NDArray[Any]:
    """Resize rows, then columns."""
    scales = [wanted / size if scale is None else scale for wanted, size in zip(shape, image.shape[:2], strict=True)]
    tall = triangle(image, shape[0], scales[0])
    return triangle(tall.swapaxes(0, 1), shape[1], scales[1]).swapaxes(0, 1)


def _keys_kernel(distance: float, a: float = -0.75) -> float:
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    if d < 2:
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return 0.0


def bicubic(
    signal: npt.NDArray[Any], wanted: int, *, offset: float = 0.0, antialias: bool = False
) -> npt.NDArray[np.float64]:
    """Resample the first axis by bicubic interpolation, half-pixel centres; border repeated or weights normalised."""
    size = len(signal)
    scale = size / (wanted + offset)
    rows = []
    for i in range(wanted):
        centre = (i + 0.5) * scale - 0.5
        if antialias:
            stretch = max(scale, 1.0)
            around = [j for j in range(size) if abs(j - centre) < 2 * stretch]
            weights = [_keys_kernel((j - centre) / stretch, -0.5) for j in around]
            weights = [weight / sum(weights) for weight in weights]
        else:
            around = list(range(math.floor(centre) - 1, math.floor(centre) + 3))
            weights = [_keys_kernel(centre - j) for j in around]
            around = [min(max(j, 0), size - 1) for j in around]
        rows.append(sum(weight * signal[j].astype(float) for weight, j in zip(weights, around, strict=True)))
    return np.array(rows)


def bicubic_image(
    table: npt.NDArray[Any], shape: tuple[int, int], *, offset: float = 0.0, antialias: bool = False
) -> npt.NDArray[np.float64]:
    """Resize rows, then columns; an axis that keeps its length is left alone with antialiasing."""
    if table.shape[:2] == shape:
        return table.astype(float)
    for axis in (0, 1):
        if not (antialias and table.shape[axis] == shape[axis]):
            resized = bicubic(table.swapaxes(0, axis), shape[axis], offset=offset, antialias=antialias)
            table = resized.swapaxes(0, axis)
    return table
