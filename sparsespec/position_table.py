"""The position table of a ViT, learnt for one grid of tokens, brought to the grid of another image."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]


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

    def __post_init__(self) -> None:
        if not 0 <= self.offset < 1:
            raise ValueError(f"offset must be at least 0 and less than 1, got {self.offset}")


_DEFAULT = PositionRule()


def resize_positions(
    table: _Floats,
    grid: tuple[int, int],
    *,
    rule: PositionRule = _DEFAULT,
    window: tuple[int, int, int, int] | None = None,
) -> _Floats:
    """Resize a position table by bicubic interpolation.

    Entry i of an axis of n entries resized to m lies at ``(i + 1/2) s - 1/2`` (half-pixel centres), with
    s = n / (m + offset). Without antialiasing it is made of the four entries around it with Keys' kernel, a = -3/4,
    and sees the border entry repeated outside the table. With antialiasing a is -1/2, the kernel is max(s, 1) times as
    wide, entries outside the table don't count, the weights are divided by their sum, and an axis that keeps its length
    is left as it is. A table that is wanted at its own size is returned unchanged by either.

    That is ``torch.nn.functional.interpolate(mode="bicubic")``: with ``size=grid`` for offset 0, which is the ONNX
    operator ``Resize`` with ``cubic_coeff_a=-0.75`` too, and with ``scale_factor=((m + offset) / n, ...)`` otherwise.

    Parameters
    ----------
    table : (rows, columns, C) float32
        The table as learnt.
    grid : (int, int)
        Token rows and columns of the whole table wanted.
    rule : PositionRule
        What the model was trained with. Another one changes the features a little, and nothing warns of it.
    window : (top, left, bottom, right), optional
        Compute only these tokens of it.

    Returns
    -------
    (h, w, C) float32
        Of the whole grid, or of the window.

    Raises
    ------
    ValueError
        If the table isn't three-dimensional or is empty, the grid has no tokens, or the window leaves the grid.

    References
    ----------
    R. Keys. Cubic convolution interpolation for digital image processing. IEEE Transactions on Acoustics, Speech, and
    Signal Processing 29(6), 1981, equation (15) for a = -1/2.
    """
    rows, columns, channels = _checked_table(table)
    height, width = _checked_grid(grid)
    top, left, bottom, right = _checked_window(window, height, width)
    if (rows, columns) == (height, width):
        return table[top:bottom, left:right]
    vertical = _axis_weights(rows, height, rule)[top:bottom]
    horizontal = _axis_weights(columns, width, rule)[left:right]
    tall = (vertical @ table.astype(np.float64).reshape(rows, columns * channels)).reshape(-1, columns, channels)
    return np.matmul(horizontal, tall).astype(np.float32)


def positions_at(
    table: _Floats,
    grid: tuple[int, int],
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    *,
    rule: PositionRule = _DEFAULT,
) -> _Floats:
    """Return the positions (n, C) of single tokens of a grid.

    Parameters
    ----------
    table : (rows, columns, C) float32
        The table as learnt.
    grid : (int, int)
        Token rows and columns of the whole grid.
    rows, columns : (n,) int
        Where in it the tokens lie.
    rule : PositionRule
        As for :func:`resize_positions`.

    Raises
    ------
    ValueError
        If the table or the grid is no good, as for :func:`resize_positions`, or a token lies outside the grid.
    """
    height, width = _checked_grid(grid)
    if np.any((rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)):
        raise ValueError(f"tokens must lie inside the grid of {height} x {width}")
    found = np.empty((len(rows), _checked_table(table)[2]), np.float32)
    for row in np.unique(rows):
        here = rows == row
        line = resize_positions(table, (height, width), rule=rule, window=(int(row), 0, int(row) + 1, width))
        found[here] = line[0, columns[here]]
    return found


def _checked_table(table: _Floats) -> tuple[int, int, int]:
    if table.ndim != 3 or 0 in table.shape:
        raise ValueError(f"a position table has the shape (rows, columns, channels), none of them 0; got {table.shape}")
    rows, columns, channels = table.shape
    return rows, columns, channels


def _checked_grid(grid: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (operator.index(side) for side in grid)
    except (TypeError, ValueError):
        raise ValueError(f"grid must be two whole numbers, rows and columns of tokens, got {grid!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"grid must hold at least one token, got {height} x {width}")
    return height, width


def _checked_window(window: tuple[int, int, int, int] | None, height: int, width: int) -> tuple[int, int, int, int]:
    top, left, bottom, right = window or (0, 0, height, width)
    if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
        raise ValueError(f"window (top, left, bottom, right) = {window} doesn't lie in a grid of {height} x {width}")
    return top, left, bottom, right


def _keys_kernel(distance: npt.NDArray[np.float64], a: float) -> npt.NDArray[np.float64]:
    distance = np.abs(distance)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


@functools.lru_cache(maxsize=64)
def _axis_weights(size: int, wanted: int, rule: PositionRule) -> npt.NDArray[np.float64]:
    """Build the (wanted, size) matrix of one axis."""
    scale = size / (wanted + rule.offset)
    rows = np.arange(wanted)
    centre = (rows + 0.5) * scale - 0.5
    if rule.antialias and size == wanted:
        weights = np.eye(size)
    elif rule.antialias:
        weights = _keys_kernel((np.arange(size) - centre[:, None]) / max(scale, 1.0), -0.5)
        weights /= weights.sum(1, keepdims=True)
    else:
        weights = np.zeros((wanted, size))
        first = np.floor(centre).astype(np.int64) - 1
        for tap in range(4):
            at = first + tap
            np.add.at(weights, (rows, np.clip(at, 0, size - 1)), _keys_kernel(at - centre, -0.75))
    weights.flags.writeable = False
    return weights
