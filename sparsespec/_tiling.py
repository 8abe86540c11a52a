"""Token grids too large for one run of the network: overlapping tiles, and views that have seen the whole image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

_Floats = npt.NDArray[np.float32]

TILE_TOKENS = 4096
"""Tokens of a tile at most: the time for one token grows with the number of tokens it is seen with."""
_TILE_OVERLAP = 4
"""Tokens that neighbouring tiles share, at least, unless tiles are tiny."""
_TILES_PER_VIEW = 4
_MOST_VIEWS = 8
"""Views of a very large image: their pixels, 2.4 kB for each token, are held while the tiles are run."""
_VIEW_WIDTH = 0.7
"""Standard deviation of the smoothing of what the views correct, in distances between the tokens of one view."""


def token_tiles(grid: tuple[int, int], max_tokens: int) -> list[tuple[int, int, int, int]]:
    """Cover a token grid by overlapping tiles.

    Of all ways to cut the grid into rows and columns of equal tiles that are small enough, the one that runs the
    fewest tokens in total.

    Parameters
    ----------
    grid : (int, int)
        Token rows and columns.
    max_tokens : int
        Most tokens of a tile.

    Returns
    -------
    list of (top, left, bottom, right)
        Tokens; all tiles of the same size, evenly spread, neighbours share a few tokens. One tile when the grid has
        no more than ``max_tokens`` tokens.
    """
    height, width = grid
    if height * width <= max_tokens:
        return [(0, 0, height, width)]
    overlap = overlap_for(max_tokens)
    ways = []
    for down in range(1, height + 1):
        tall = _tile_side(height, down, overlap)
        widest = max_tokens // tall
        if tall < height and tall <= 2 * overlap:
            break
        if widest >= width:
            across = 1
        elif widest > 2 * overlap:
            across = math.ceil((width - overlap) / (widest - overlap))
        else:
            continue
        wide = _tile_side(width, across, overlap)
        ways.append((down * across * tall * wide, down, across, tall, wide))
    _, down, across, tall, wide = min(ways)
    tops, lefts = _origins(height, tall, down), _origins(width, wide, across)
    return [(top, left, top + tall, left + wide) for top in tops for left in lefts]


def overlap_for(max_tokens: int) -> int:
    return min(_TILE_OVERLAP, math.isqrt(max_tokens) // 4)


def _tile_side(size: int, count: int, overlap: int) -> int:
    """Return the smallest side with which ``count`` tiles cover an axis and neighbours overlap by ``overlap``."""
    return math.ceil((size + (count - 1) * overlap) / count)


def _origins(size: int, tile: int, count: int) -> list[int]:
    return [0] if count == 1 else [round(index * (size - tile) / (count - 1)) for index in range(count)]


def ramp(start: int, stop: int, size: int, overlap: int) -> _Floats:
    """Weigh the tokens of a tile along one axis: rising from its edges inwards, but not at the border of the image."""
    weight = np.ones(stop - start, np.float32)
    rise = np.arange(1, overlap + 1, dtype=np.float32) / (overlap + 1)
    if start > 0:
        weight[:overlap] = rise
    if stop < size:
        weight[len(weight) - overlap :] = rise[::-1]
    return weight


@dataclass(frozen=True, eq=False)
class View:
    """A thinned token grid, to be run at once: part of a lattice over the whole grid.

    Attributes
    ----------
    rows, columns
        (n,) of its tokens in the grid.
    places
        Row and column, (n,) each, of its tokens in the lattice.
    lattice
        The rows and the columns of the grid that the lattice of all views is made of.
    spacing
        Distance between neighbouring tokens of this view, in tokens down and across.
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    places: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    lattice: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    spacing: tuple[float, float]

    def collect(self, held: _Floats, pixels: _Floats, tile: tuple[int, int, int, int]) -> None:
        """Copy its patches out of the pixels of a tile, into (patch, n, patch, 3)."""
        top, left, bottom, right = tile
        patch = held.shape[0]
        inside = (self.rows >= top) & (self.rows < bottom) & (self.columns >= left) & (self.columns < right)
        patches = pixels.reshape(bottom - top, patch, right - left, patch, 3)
        held[:, inside] = patches[self.rows[inside] - top, :, self.columns[inside] - left].transpose(1, 0, 2, 3)


# Views i, j, ... take the tokens (row, column) of the lattice where (row * step + column) % count is i, j, ...: these
# steps leave the tokens of a view farthest from each other.
_LATTICE_STEPS = (0, 0, 1, 1, 2, 2, 2, 2, 3)


def views_of(grid: tuple[int, int], most: int, tiles: int) -> list[View]:
    """Thin a grid to what is seen at once, for a grid that is run in so many tiles of at most ``most`` tokens."""
    count = min(_MOST_VIEWS, math.ceil(tiles / _TILES_PER_VIEW))
    # The classes of a lattice differ a little in size.
    held = most if count == 1 else count * (most - count)
    share = min(1.0, math.sqrt(held / (grid[0] * grid[1])))
    height = min(grid[0], held, max(1, round(grid[0] * share)))
    width = min(grid[1], held // height)
    row, column = np.mgrid[0:height, 0:width]
    number = (row * _LATTICE_STEPS[count] + column) % count
    sizes = np.bincount(number.ravel(), minlength=count)
    if sizes.max() > most or sizes.min() == 0:
        number = (row * width + column) % count
    lattice = (_spread(grid[0], height), _spread(grid[1], width))
    thinned = math.sqrt(count)
    spacing = (grid[0] / height * thinned, grid[1] / width * thinned)
    views = []
    for k in range(count):
        down, across = (places.astype(np.int64) for places in np.nonzero(number == k))
        views.append(View(lattice[0][down], lattice[1][across], (down, across), lattice, spacing))
    return views


def _spread(size: int, count: int) -> npt.NDArray[np.int64]:
    """Choose ``count`` of ``size`` places, evenly."""
    return ((np.arange(count) + 0.5) * size / count).astype(np.int64)


def add_smoothly(total: _Floats, correction: _Floats, view: View) -> None:
    """Add to every token what a Gaussian makes of the corrections at the tokens of the lattice around it."""
    height, width, channels = total.shape
    down = _smoothing(height, view.lattice[0], _VIEW_WIDTH * view.spacing[0])
    across = _smoothing(width, view.lattice[1], _VIEW_WIDTH * view.spacing[1])
    flat = correction.reshape(len(view.lattice[0]), -1)
    for row in range(height):
        total[row] += across @ (down[row : row + 1] @ flat).reshape(-1, channels)


def _smoothing(size: int, places: npt.NDArray[np.int64], width: float) -> Any:
    """Build the (size, len(places)) matrix of Gaussian weights along one axis, each row of sum one."""
    distance = np.abs(np.arange(size)[:, None] - places) / width
    weights = np.where(distance <= 3, np.exp(-0.5 * distance**2), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return sparse.csr_array(weights.astype(np.float32))
