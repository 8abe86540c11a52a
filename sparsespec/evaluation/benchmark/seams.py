"""How far two label images agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

__all__ = ["agreement"]


def agreement(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Share of pixels that have the same label, with instances matched one to one.

    Background is matched with background. Of all ways to match instances the one with most pixels in common counts; the
    pixels of an instance without a partner agree with nothing.

    Parameters
    ----------
    first, second
        (H, W) integers of at least 0; 0 is background.

    Returns
    -------
    float
        In [0, 1]; 1 for two empty images.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"first and second must be of one shape, not {first.shape} and {second.shape}")
    if first.size == 0:
        return 1.0
    rows, columns = int(first.max()) + 1, int(second.max()) + 1
    pairs = first.astype(np.int64).ravel() * columns + second.ravel()
    overlap = np.bincount(pairs, minlength=rows * columns).reshape(rows, columns)
    common = int(overlap[0, 0])
    if rows > 1 and columns > 1:
        common += int(overlap[1:, 1:][linear_sum_assignment(overlap[1:, 1:], maximize=True)].sum())
    return common / first.size
