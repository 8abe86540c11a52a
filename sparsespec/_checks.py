"""What the functions on token features ask of their arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Squares and sums over thousands of channels of larger values would leave float32.
LARGEST = 1e15


def check_features(features: npt.ArrayLike, *, name: str = "features") -> npt.NDArray[np.float32]:
    """Return features as a C-contiguous (N, C) float32 array, or say what is wrong with them.

    Parameters
    ----------
    features
        (N, C) real numbers, at least one row and one column. Copied only if it isn't C-contiguous float32.
    name
        What the message calls it.

    Raises
    ------
    ValueError
        Not two-dimensional, empty, not real numbers, or a value that is NaN, infinite or beyond 1e15.
    """
    array = np.asarray(features)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name} must be an (N, C) array, one row per token, with N, C >= 1; its shape is {array.shape}"
        )
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold real numbers; its dtype is {array.dtype}")
    # Two passes without an array of their own; NaN fails the comparisons. Rows are looked at only to name them.
    bad = [] if array.min() >= -LARGEST and array.max() <= LARGEST else _bad_rows(array)
    if bad:
        shown = ", ".join(str(row) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{name} must be finite and at most {LARGEST:g} in magnitude; "
            f"{len(bad)} of {len(array)} rows hold NaN, infinity or larger values: rows {shown}"
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _bad_rows(array: npt.NDArray[Any]) -> list[int]:
    return [
        start + int(row)
        # In slices, so that the comparison needs no second array of this size.
        for start in range(0, len(array), 1024)
        for row in np.flatnonzero(~(np.abs(array[start : start + 1024]) <= LARGEST).all(axis=1))
    ]


def check_grid(grid: tuple[int, int], n_tokens: int, *, name: str = "grid") -> tuple[int, int]:
    """Return the grid as two integers h, w with h w = n_tokens.

    Raises
    ------
    ValueError
        Not a pair of positive integers, or another number of tokens.
    """
    try:
        height, width = (int(side) for side in grid)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (h, w) of integers, not {grid!r}") from None
    if height < 1 or width < 1 or height * width != n_tokens:
        raise ValueError(f"{name} {grid!r} does not hold the {n_tokens} tokens given: h * w must be {n_tokens}")
    return height, width


def check_count(value: int, *, name: str, least: int = 1) -> int:
    """Return an integer that is at least ``least``.

    Raises
    ------
    ValueError
        Another type or a smaller value.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    return int(value)
