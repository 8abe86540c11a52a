"""Masks as COCO describes them: runs, compressed runs, and polygons."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.truth import BoolArray
from sparsespec.formats import decode_rle

_FINER = 5
_MOST_GROUPS = 7
_MOST_STEPS = 10_000_000


def decode_segmentation(segmentation: Any, height: int, width: int) -> BoolArray:
    """Turn the ``segmentation`` of an annotation into a mask.

    Parameters
    ----------
    segmentation
        ``{"size": [H, W], "counts": ...}`` with runs as a list or as a compressed string, or a list of polygons, each
        ``[x, y, x, y, ...]`` in pixels from the upper left corner of the image, whose union is meant.
    height, width
        Size of the image.

    Returns
    -------
    (H, W) bool array

    Raises
    ------
    ValueError
        It is neither, doesn't decode, or is of another size.
    """
    if isinstance(segmentation, dict):
        return _decode_runs(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(f"the segmentation is neither runs nor polygons but {_shown(segmentation)}")
    mask = np.zeros((height, width), bool)
    for part in segmentation:
        mask |= fill_polygon(_points(part), height, width)
    return mask


def fill_polygon(points: npt.NDArray[np.float64], height: int, width: int) -> BoolArray:
    """Fill a polygon by the rule of COCO's own tools, so that the same pixels belong to it.

    The outline is drawn on a grid five times as fine. A column of pixels is entered or left where the drawn outline
    passes the middle of the column, at the next pixel below.

    Parameters
    ----------
    points
        (n, 2) x and y of the corners, in pixels.
    height, width
        Size of the image.

    Raises
    ------
    ValueError
        The outline is longer than any image's.
    """
    corners = np.trunc(_FINER * points + 0.5)
    start, end = corners, np.roll(corners, -1, axis=0)
    extent = np.abs(end - start)
    steps = extent.max(axis=1)
    if steps.sum() > _MOST_STEPS:
        raise ValueError(f"a polygon reaches from {points.min():g} to {points.max():g} pixels")
    steps = steps.astype(np.int64)
    # An edge is drawn from its left to its right end, or from its upper to its lower, whichever side is longer; the
    # direction decides how halves are rounded.
    along = (extent[:, 0] < extent[:, 1]).astype(np.int64)
    rows = np.arange(len(points))
    reverse = start[rows, along] > end[rows, along]
    origin = np.where(reverse[:, None], end, start)
    other = np.where(reverse[:, None], start, end)
    slope = (other - origin)[rows, 1 - along] / np.maximum(steps, 1)
    edge = np.repeat(rows, steps + 1)
    place = np.arange(edge.size) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    place = np.where(reverse[edge], steps[edge] - place, place)
    major = origin[edge, along[edge]] + place
    minor = np.trunc(origin[edge, 1 - along[edge]] + slope[edge] * place + 0.5)
    x = np.where(along[edge] == 0, major, minor)
    y = np.where(along[edge] == 0, minor, major)
    crossing = np.flatnonzero(x[1:] != x[:-1]) + 1
    fine = np.where(x[crossing] < x[crossing - 1], x[crossing], x[crossing] - 1)
    column = (fine + 0.5) / _FINER - 0.5
    row = np.ceil(np.clip((np.minimum(y[crossing], y[crossing - 1]) + 0.5) / _FINER - 0.5, 0, height))
    inside = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    mask = np.zeros((height, width), bool)
    if not inside.any():
        return mask
    # Down the columns, one after the other, every turn changes between outside and inside.
    left, right = int(column[inside].min()), int(column[inside].max()) + 1
    turns = ((column[inside] - left) * height + row[inside]).astype(np.int64)
    pixels = (right - left) * height
    parity = np.cumsum(np.bincount(turns, minlength=pixels + 1)[:pixels], dtype=np.int64) & 1
    mask[:, left:right] = parity.astype(bool).reshape((height, right - left), order="F")
    return mask


def _points(part: Any) -> npt.NDArray[np.float64]:
    if not isinstance(part, array) or part.typecode != "d":
        raise ValueError(f"a polygon is not a list of numbers but {_shown(part)}")
    values = np.asarray(part, np.float64)
    if values.size < 6 or values.size % 2:
        raise ValueError(f"a polygon has {values.size} numbers; it takes x and y of three corners or more")
    if not np.isfinite(values).all():
        raise ValueError("a polygon has a corner that is no finite number")
    return values.reshape(-1, 2)


def _decode_runs(rle: dict[str, Any], height: int, width: int) -> BoolArray:
    size, counts = rle.get("size"), rle.get("counts")
    whole = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    if not isinstance(size, list) or not whole:
        raise ValueError(f"the size of a run-length encoding is not [height, width] but {_shown(size)}")
    if size != [height, width]:
        raise ValueError(
            f"the mask is {size[1]} x {size[0]} pixels, and the image is described as {width} x {height} pixels"
        )
    if isinstance(counts, str):
        _check_characters(counts)
        return decode_rle({"size": size, "counts": counts}).astype(bool)
    if not isinstance(counts, array) or counts.typecode != "q":
        raise ValueError(f"the counts of a run-length encoding are no text or list of whole numbers: {_shown(counts)}")
    runs = np.asarray(counts)
    if runs.size and (runs.min() < 0 or runs.max() > height * width):
        raise ValueError(f"a run of {int(runs.min())} to {int(runs.max())} pixels in an image of {height * width}")
    if runs.sum() != height * width:
        raise ValueError(f"counts cover {int(runs.sum())} pixels, size {height} x {width} has {height * width}")
    return np.repeat(np.arange(runs.size) % 2 == 1, runs).reshape((height, width), order="F")


def _check_characters(counts: str) -> None:
    """Refuse what is no compressed list of runs: the decoder takes every character for five bits."""
    codes = np.frombuffer(counts.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64) - 48
    bad = np.flatnonzero((codes < 0) | (codes > 63))
    if bad.size:
        raise ValueError(f"counts have the character {counts[bad[0]]!r}, which no run-length encoding has")
    if codes.size and codes[-1] & 32:
        raise ValueError("counts end in the middle of a number: they are cut short")
    ends = np.flatnonzero(~codes & 32)
    if ends.size and np.diff(ends, prepend=-1).max() > _MOST_GROUPS:
        raise ValueError("counts have a number larger than any image")


def _shown(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, array) else value)
    return text if len(text) <= 60 else text[:57] + "..."
