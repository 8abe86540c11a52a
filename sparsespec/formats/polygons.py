"""Outlines of instances as polygons, along the edges of their pixels.

Coordinates are continuous: pixel (y, x) covers the square from (x, y) to (x + 1, y + 1). Nothing is smoothed or left
out, so that the polygons enclose the pixels of the mask and no others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.formats._runs import foreground_runs, mask_runs

__all__ = ["add_polygons", "mask_polygons"]

_Whole = npt.NDArray[np.int64]


def mask_polygons(mask: npt.ArrayLike, offset: tuple[int, int] = (0, 0)) -> list[list[float]]:
    """Trace one mask.

    Parameters
    ----------
    mask : (H, W) array_like
        Non-zero is foreground.
    offset : (int, int)
        Added to every x and y, in pixels: where the mask's left top corner lies in the image.

    Returns
    -------
    list of list of float
        ``[x0, y0, x1, y1, ...]`` for each part, pixels; what touches at a corner only are two parts. From the
        topmost part to the lowest, each clockwise as seen on a screen from the left end of its top edge. A hole is
        joined to the outline around it by a cut of no width, straight up through the middle of a column of pixels:
        filled by the even-odd or by the winding rule, a polygon gives the pixels of its part.

    Raises
    ------
    ValueError
        `mask` is not two-dimensional.
    """
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"mask must be two-dimensional, got the shape {array.shape}")
    return _traced(*mask_runs(array), array.shape[0], offset)


def add_polygons(annotations: list[dict[str, Any]], labels: npt.ArrayLike | None = None) -> None:
    """Give each annotation of `sparsespec.formats.instance_annotations` its ``polygons``, see `mask_polygons`.

    They are made of the run-length encodings, in a time that depends on the length of the outlines alone.

    Parameters
    ----------
    annotations : list of dict
        With ``segmentation``. The key ``polygons`` is added to each.
    labels : (H, W) array_like, optional
        The label image that they describe. Only its size is compared with theirs.

    Raises
    ------
    ValueError
        An encoding is damaged or of another size than `labels`.
    """
    shape = None if labels is None else np.shape(labels)
    for annotation in annotations:
        rle = annotation["segmentation"]
        if shape is not None and tuple(rle["size"]) != shape:
            raise ValueError(f"the annotations are of an image of shape {tuple(rle['size'])}, labels has {shape}")
        annotation["polygons"] = _traced(*foreground_runs(rle), int(rle["size"][0]), (0, 0))


def _traced(begins: _Whole, ends: _Whole, height: int, offset: tuple[int, int]) -> list[list[float]]:
    """Trace a mask that is given by its runs along the columns."""
    if begins.size == 0:
        return []
    column, top, bottom = _by_column(begins, ends, height)
    x, y, right, forward = _horizontal_edges(column, top, bottom)
    following = _followers(x, y, right, forward)

    # Two points an edge, 2 e where it starts and 2 e + 1 where it ends; `after` says which point follows on which.
    xs = np.column_stack([np.where(forward, x, right), np.where(forward, right, x)]).ravel().astype(np.float64)
    ys = np.repeat(y, 2).astype(np.float64)
    after = np.empty(2 * x.size, np.int64)
    after[::2] = np.arange(1, 2 * x.size, 2)
    after[1::2] = 2 * following

    outline = _cycles(following)
    area = np.bincount(outline, weights=np.where(forward, x - right, right - x) * y)
    first = np.unique(outline, return_index=True)[1]  # edges are sorted by y, then x: the top edge at the left
    holes = first[area < 0]
    if holes.size:
        xs, ys, after = _joined(holes, x, y, column, top, bottom, xs, ys, after)
    return _polygons(2 * first[area > 0], xs + offset[0], ys + offset[1], after.tolist())


def _by_column(begins: _Whole, ends: _Whole, height: int) -> tuple[_Whole, _Whole, _Whole]:
    """Part the runs where one column ends and the next begins: column, first row, row behind the last."""
    first, last = begins // height, (ends - 1) // height
    pieces = last - first + 1
    column = np.repeat(first, pieces) + np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = column * height
    top = np.maximum(np.repeat(begins, pieces), start) - start
    bottom = np.minimum(np.repeat(ends, pieces), start + height) - start
    return column, top, bottom


def _horizontal_edges(
    column: _Whole, top: _Whole, bottom: _Whole
) -> tuple[_Whole, _Whole, _Whole, npt.NDArray[np.bool_]]:
    """Join the upper and lower ends of runs to edges: left end, height, right end, whether they go to the right.

    With the foreground to the right of the direction, upper edges go to the right and lower edges to the left. Sorted
    by y, then x.
    """
    x, y = np.tile(column, 2), np.concatenate([top, bottom])
    forward = np.repeat([True, False], column.size)
    order = np.lexsort((x, y))
    x, y, forward = x[order], y[order], forward[order]
    starts = np.append(True, (y[1:] != y[:-1]) | (x[1:] != x[:-1] + 1) | (forward[1:] != forward[:-1]))
    ends = np.append(starts[1:], True)
    return x[starts], y[starts], x[ends] + 1, forward[starts]


def _followers(x: _Whole, y: _Whole, right: _Whole, forward: npt.NDArray[np.bool_]) -> _Whole:
    """Find which edge follows on each, along the vertical edge between them.

    Along a vertical line of the grid, the ends of horizontal edges are in turn the upper and the lower end of a
    vertical one.
    """
    count = x.size
    along = np.concatenate([x, right])
    # Where two pixels touch at a corner, two horizontal edges meet without going on in one another. First comes the one
    # that belongs to the pixel above, so that each of the pixels keeps its own corner.
    starts_here = np.concatenate([forward, ~forward])
    is_right_end = np.repeat([False, True], count)
    order = np.lexsort((starts_here ^ is_right_end, np.tile(y, 2), along))
    edge, starts = np.tile(np.arange(count), 2)[order], starts_here[order]
    upper, lower = edge[::2], edge[1::2]
    down = starts[1::2]  # the edge at the upper end ends there, and that at the lower end starts
    following = np.empty(count, np.int64)
    following[np.where(down, upper, lower)] = np.where(down, lower, upper)
    return following


def _cycles(following: _Whole) -> _Whole:
    """Number the cycles of a permutation by their smallest element: the number of each element's."""
    number = [-1] * following.size
    successors = following.tolist()
    cycles = 0
    for start in range(following.size):
        if number[start] < 0:
            at = start
            while number[at] < 0:
                number[at] = cycles
                at = successors[at]
            cycles += 1
    return np.array(number, np.int64)


def _joined(
    holes: _Whole,
    x: _Whole,
    y: _Whole,
    column: _Whole,
    top: _Whole,
    bottom: _Whole,
    xs: npt.NDArray[np.float64],
    ys: npt.NDArray[np.float64],
    after: _Whole,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], _Whole]:
    """Cut from each hole, given by its top edge, to the outline above it.

    That outline may be another hole's, which begins higher up: in the end every hole hangs on an outer outline.
    """
    stride = int(bottom.max()) + 1
    # The run of foreground over the left end of a hole's top edge, and the edge where that run begins.
    run = np.searchsorted(column * stride + bottom, x[holes] * stride + y[holes])
    wide = int(column.max()) + 2
    above = np.searchsorted(y * wide + x, top[run] * wide + x[holes], side="right") - 1
    middle = x[holes] + 0.5
    count = len(after)
    xs = np.concatenate([xs, np.repeat(middle, 4)])
    ys = np.concatenate([ys, np.column_stack([top[run], y[holes], y[holes], top[run]]).ravel()])
    follower = np.concatenate([after, np.empty(4 * holes.size, np.int64)]).tolist()
    before: dict[int, int] = {}
    order = np.lexsort((middle, above))
    for hole, edge, new in zip(holes[order].tolist(), above[order].tolist(), (count + 4 * order).tolist(), strict=True):
        follower[before.get(edge, 2 * edge)] = new
        follower[new], follower[new + 1] = new + 1, 2 * hole + 1
        follower[2 * hole], follower[new + 2] = new + 2, new + 3
        follower[new + 3] = 2 * edge + 1
        before[edge] = new + 3
    return xs, ys, np.array(follower, np.int64)


def _polygons(
    starts: _Whole, xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64], after: list[int]
) -> list[list[float]]:
    result: list[list[float]] = []
    points = np.column_stack([xs, ys])
    for start in starts.tolist():
        chain, at = [start], after[start]
        while at != start:
            chain.append(at)
            at = after[at]
        # Whole numbers are written as such: they are shorter in JSON.
        result.append([int(value) if value.is_integer() else value for value in points[chain].ravel().tolist()])
    return result
