"""The position table of a ViT, learnt for one grid of tokens, brought to the grid of another image."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]

_CUBIC_A = -0.75


@dataclass(frozen=True)
class PositionRule:
    """How a family of models brings its position table to other grids.

    Attributes
    ----------
    offset : float
        0.1 where the scale is computed as table / (grid + 0.1), as in the original code of DINO and of DINOv2 without
        registers; 0 for table / grid.
    antialias : bool
        Whether the kernel is widened where the table is reduced, and has a = -1/2 instead of -3/4.
    """

    offset: float = 0.0
    antialias: bool = False


def resize_positions(
    table: _Floats, grid: tuple[int, int], *, window: tuple[int, int, int, int] | None = None
) -> _Floats:
    """Resize a position table by bicubic interpolation, a = -0.75.

    Entry i of an axis of n entries resized to m lies at ``(i + 1/2) n / m - 1/2`` (half-pixel centres), is made of the
    four entries around it with Keys' kernel, and sees the border entry repeated outside the table; no antialiasing.
    That is ``torch.nn.functional.interpolate(size=grid, mode="bicubic")`` and the ONNX operator ``Resize`` with
    ``cubic_coeff_a=-0.75``, the one DINOv2 was exported with.

    Parameters
    ----------
    table : (rows, columns, C) float32
        The table as learnt.
    grid : (int, int)
        Token rows and columns of the whole table wanted.
    window : (top, left, bottom, right), optional
        Compute only these tokens of it.

    Returns
    -------
    (h, w, C) float32
        Of the whole grid, or of the window.
    """
    rows, columns, channels = table.shape
    top, left, bottom, right = window or (0, 0, *grid)
    if (rows, columns) == tuple(grid):
        return table[top:bottom, left:right]
    vertical, horizontal = _cubic_weights(rows, grid[0])[top:bottom], _cubic_weights(columns, grid[1])[left:right]
    tall = (vertical @ table.astype(np.float64).reshape(rows, columns * channels)).reshape(-1, columns, channels)
    return np.matmul(horizontal, tall).astype(np.float32)


def positions_at(
    table: _Floats, grid: tuple[int, int], rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> _Floats:
    """Return the positions (n, C) of single tokens of a grid."""
    found = np.empty((len(rows), table.shape[2]), np.float32)
    for row in np.unique(rows):
        here = rows == row
        line = resize_positions(table, grid, window=(int(row), 0, int(row) + 1, grid[1]))
        found[here] = line[0, columns[here]]
    return found


@functools.lru_cache(maxsize=64)
def _cubic_weights(size: int, wanted: int) -> npt.NDArray[np.float64]:
    """Build the (wanted, size) matrix of one axis."""
    weights = np.zeros((wanted, size))
    rows = np.arange(wanted)
    centre = (rows + 0.5) * size / wanted - 0.5
    first = np.floor(centre).astype(np.int64) - 1
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * _CUBIC_A - 4 * _CUBIC_A
        np.add.at(weights, (rows, np.clip(first + tap, 0, size - 1)), np.where(distance <= 1, near, far))
    weights.flags.writeable = False
    return weights
