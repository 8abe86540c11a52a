"""Instances in the text format of YOLO's segmentation models: a line each, with the class and one polygon.

Readers of that format make whole pixels of the coordinates, by cutting decimals off (Ultralytics) or by rounding
(supervision), and fill the polygon with its outline (OpenCV's ``fillPoly``). Along the edges of the pixels that would
add a row and a column to every instance. The outlines are therefore drawn in to the centres of the pixels, less a
twentieth of a pixel so that both ways of making them whole give the same: the pixels along the border of the instance.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import write_atomic

__all__ = ["write_yolo", "yolo_dataset_yaml", "yolo_lines"]

_CLASS = 0
_TO_CENTRE = 0.5
_BELOW_CENTRE = 0.05
_Points = npt.NDArray[np.float64]


def yolo_lines(annotations: list[dict[str, Any]], width: int, height: int) -> str:
    """Write the instances of one image, in the order in which they are given.

    Parameters
    ----------
    annotations : list of dict
        With ``polygons``, see `sparsespec.formats.add_polygons`.
    width, height : int
        Size of the image, pixels.

    Returns
    -------
    str
        A line for each instance, ``0 x1 y1 x2 y2 ...``: x in parts of the width and y in parts of the height. Several
        parts are joined by cuts of no width from point to nearest point, since a line has room for one polygon. Empty
        for an image without instances, which readers take for an image of background.

    Raises
    ------
    ValueError
        An annotation without polygons, or a size below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be at least 1, got {width} x {height}")
    lines = []
    for annotation in annotations:
        polygons = annotation.get("polygons")
        if not polygons:
            raise ValueError(f"annotation {annotation.get('label', '')} has no polygons: call add_polygons first")
        points = _as_one([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons])
        values = np.clip(points / (width, height), 0, 1).ravel().tolist()
        lines.append(f"{_CLASS} " + " ".join([f"{value:.6f}" for value in values]) + "\n")
    return "".join(lines)


def write_yolo(path: str | os.PathLike[str], annotations: list[dict[str, Any]], width: int, height: int) -> None:
    """Write the lines of `yolo_lines` to a file, whole or not at all; its folder must exist."""
    write_atomic(path, yolo_lines(annotations, width, height).encode("ascii"))


def yolo_dataset_yaml(images: Sequence[str] = ("images",)) -> str:
    """Describe a folder of labels as a data set.

    Parameters
    ----------
    images : sequence of str
        Folders of photographs, relative to the file. A reader looks for the labels of ``images/a/x.jpg`` in
        ``labels/a/x.txt``.

    Returns
    -------
    str
        The content of ``data.yaml``. The same folders are named for training and validation, which readers ask for:
        whoever trains splits them.
    """
    # No "path": readers would look for one that is not absolute elsewhere than beside the file.
    listed = f" {_quoted(images[0])}" if len(images) == 1 else "".join(f"\n  - {_quoted(name)}" for name in images)
    return f"train:{listed}\nval:{listed}\nnames:\n  0: object\n"


def _quoted(text: str) -> str:
    escaped = "".join(
        character if character.isprintable() and character not in '"\\' else _escape(character) for character in text
    )
    return f'"{escaped}"'


def _escape(character: str) -> str:
    return "\\" + character if character in '"\\' else f"\\U{ord(character):08x}"


def _drawn_in(points: _Points) -> _Points:
    """Move the sides of a polygon of `mask_polygons`, all of them along the axes, to the pixels that they enclose."""
    along = np.sign(np.roll(points, -1, axis=0) - points)
    # Clockwise on a screen, where y points down, the inside lies to the right.
    inwards = np.column_stack([-along[:, 1], along[:, 0]])
    # A cut to a hole runs through the centres of pixels already.
    inwards[(along[:, 1] != 0) & (points[:, 0] % 1 != 0)] = 0
    moved: _Points = points + _TO_CENTRE * (inwards + np.roll(inwards, 1, axis=0)) - _BELOW_CENTRE
    return moved


def _as_one(parts: list[_Points]) -> _Points:
    """Join polygons: walk around the first, and on the way, over the shortest links there are, around the others."""
    drawn_in = np.concatenate([_drawn_in(part) for part in parts])
    if len(parts) == 1:
        return drawn_in
    sizes = [len(part) for part in parts]
    points = np.concatenate(parts)
    owner = np.repeat(np.arange(len(parts)), sizes)
    ends = np.cumsum(sizes)
    after = np.arange(1, len(points) + 1)
    after[ends - 1] = ends - sizes
    follower, place = after.tolist(), list(range(len(points)))
    for here, there in _links(points, owner):
        # Either end is passed twice: here, there (a copy), around the other polygon, there, here (a copy), and on.
        copy_there, copy_here = len(place), len(place) + 1
        place += [there, here]
        follower += [follower[there], follower[here]]
        follower[here], follower[there] = copy_there, copy_here
    chain, at = [0], follower[0]
    while at != 0:
        chain.append(at)
        at = follower[at]
    return drawn_in[[place[k] for k in chain]]


def _links(points: _Points, owner: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Find the links, from point to point, that connect all polygons and are shortest together."""
    from scipy.spatial import Delaunay

    # The shortest links between points are among the sides of the triangles between them.
    triangles = Delaunay(points)
    corners, again = triangles.simplices, triangles.coplanar  # the latter: points that lie where another does
    sides = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [0, 2]], again[:, [0, 2]]])
    sides = np.unique(np.sort(sides, axis=1), axis=0)
    sides = sides[owner[sides[:, 0]] != owner[sides[:, 1]]]
    lengths = ((points[sides[:, 0]] - points[sides[:, 1]]) ** 2).sum(axis=1)
    leader = list(range(int(owner[-1]) + 1))

    def group(part: int) -> int:
        while leader[part] != part:
            leader[part] = leader[leader[part]]
            part = leader[part]
        return part

    links = []
    for here, there in sides[np.argsort(lengths, kind="stable")].tolist():
        one, other = group(owner[here]), group(owner[there])
        if one != other:
            leader[other] = one
            links.append((here, there))
    return links
