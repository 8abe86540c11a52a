"""Large label images in files: walked through by bands, without their pages piling up in memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["bands", "release"]

_BAND_BYTES = 1 << 24


def release(array: npt.NDArray[Any]) -> None:
    """Let the system take back the memory behind a mapped file; what was written stays, in the file.

    Does nothing for other arrays, for private mappings (which have nowhere else to keep what was written), and where
    the system has no such call. The array can be used as before: its pages come back when they are touched.

    Parameters
    ----------
    array : ndarray
        A `numpy.memmap`, a view of one, or any array.
    """
    owner: Any = array
    while owner is not None and not isinstance(owner, np.memmap):
        owner = getattr(owner, "base", None)
    if owner is None or owner.mode == "c" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    while isinstance(owner.base, np.memmap):
        owner = owner.base
    if isinstance(owner.base, mmap.mmap):
        owner.base.madvise(mmap.MADV_DONTNEED)


def bands(array: npt.NDArray[Any], *, step: int | None = None) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Go through an array from top to bottom, a few rows at a time.

    Parameters
    ----------
    array : (H, W) ndarray
        A `numpy.memmap` is released after each band.
    step : int, optional
        Rows of a band; the default makes it about 16 MB.

    Yields
    ------
    (int, (h, W) ndarray)
        The first row, and a view.
    """
    step = step or max(1, _BAND_BYTES // max(1, array[:1].nbytes))
    for top in range(0, len(array), step):
        yield top, array[top : top + step]
        release(array)
