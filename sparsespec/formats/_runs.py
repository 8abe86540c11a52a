"""Masks as runs of pixels: decoding COCO's run-length encodings without the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["foreground_runs", "mask_runs"]

_MOST_GROUPS = 12  # of five bits: what fits into 64


def foreground_runs(rle: Mapping[str, Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the runs of foreground of a mask.

    Parameters
    ----------
    rle : mapping
        ``{"size": [H, W], "counts": str}``, as `sparsespec.formats.encode_rle` gives it.

    Returns
    -------
    begins, ends : (n,) ndarray of int64
        Places in the mask read column by column: pixel (y, x) is at ``x * H + y``. Ends are exclusive. The runs rise,
        none is empty and no two meet.

    Raises
    ------
    ValueError
        The counts are damaged, or do not add up to the size.
    """
    height, width = rle["size"]
    counts = _decompressed(rle["counts"])
    if (counts < 0).any() or counts.sum() != height * width:
        raise ValueError(f"counts cover {int(counts.sum())} pixels, size {height} x {width} has {height * width}")
    bounds = np.concatenate([[0], np.cumsum(counts)])
    begins, ends = bounds[1:-1:2], bounds[2::2]
    full = ends > begins
    begins, ends = begins[full], ends[full]
    apart = begins[1:] > ends[:-1]
    return begins[np.append(True, apart)[: begins.size]], ends[np.append(apart, True)[: ends.size]]


def mask_runs(mask: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the runs of foreground of a (H, W) mask, as `foreground_runs` does."""
    flat = np.zeros(mask.size + 2, bool)
    flat[1:-1] = (mask != 0).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return edges[::2], edges[1::2]


def _decompressed(text: str) -> npt.NDArray[np.int64]:
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return codes
    last = codes & 32 == 0
    if codes.min() < 0 or codes.max() > 63 or not last[-1]:
        raise ValueError("counts are not those of a COCO run-length encoding")
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > _MOST_GROUPS:
        raise ValueError("counts hold a number of more than 60 bits")
    places = np.arange(codes.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((codes & 31) << (5 * places), starts)
    negative = codes[ends] & 16 != 0
    numbers[negative] -= np.int64(1) << (5 * lengths[negative])
    # From the fourth on, the difference to the number two places before is kept.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
