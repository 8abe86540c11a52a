"""Masks with every property that an outline can have, and plain ways of filling one."""

from __future__ import annotations

import numpy as np


def masks() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    ring = np.zeros((9, 11), bool)
    ring[1:8, 1:10] = True
    ring[3:6, 3:8] = False
    nested = ring.copy()
    nested[4, 5] = True
    diagonal_ring = np.zeros((3, 3), bool)
    diagonal_ring[[0, 1, 1, 2], [1, 0, 2, 1]] = True
    comb = np.zeros((12, 15), bool)
    comb[:, ::2] = True
    comb[0] = True
    holes_above_each_other = np.ones((13, 5), bool)
    holes_above_each_other[1:12:2, 1:4] = False
    shared_edge = np.ones((5, 12), bool)
    shared_edge[2, 1:11:2] = False
    return {
        "one pixel": np.ones((1, 1), bool),
        "full": np.ones((5, 7), bool),
        "row": np.ones((1, 9), bool),
        "column": np.ones((9, 1), bool),
        "frame": np.pad(np.zeros((3, 4), bool), 1, constant_values=True),
        "two corners": np.eye(2, dtype=bool),
        "chessboard": np.indices((6, 7)).sum(axis=0) % 2 == 0,
        "ring": ring,
        "island in a ring": nested,
        "ring by corners": diagonal_ring,
        "ring by corners, filled outside": ~np.pad(diagonal_ring, 2),
        "comb": comb,
        "holes above each other": holes_above_each_other,
        "holes in a row": shared_edge,
        "noise": rng.random((40, 30)) > 0.4,
        "dense noise": rng.random((30, 40)) > 0.1,
        "coarse noise": np.kron(rng.random((8, 9)) > 0.4, np.ones((3, 4))) > 0,
    }


def winding(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """How often polygons with sides along the axes run clockwise around the centre of each pixel."""
    y, x = np.mgrid[:height, :width] + 0.5
    turns = np.zeros((height, width), int)
    for polygon in polygons:
        points = np.reshape(polygon, (-1, 2))
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            assert (x0 == x1) != (y0 == y1), "a side that is not along an axis, or of no length"
            # Seen on a screen, a side that leads upwards has to its right what a clockwise polygon encloses.
            turns += np.sign(y0 - y1).astype(int) * ((x > x0) & (min(y0, y1) < y) & (y < max(y0, y1)))
    return turns
