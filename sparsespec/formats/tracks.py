"""Which instances of one frame of a video are those of the frame before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.formats._runs import foreground_runs

__all__ = ["MAX_GAP", "MIN_IOU", "Linker", "mask_iou"]

MIN_IOU = 0.4
"""Least overlap of two masks, intersection over union, that are taken for the same object.

Lower than detectors of still images use: an object that moves overlaps little with where it was, and the instances of
one frame do not overlap at all, so that a wrong partner rarely reaches this.
"""

MAX_GAP = 2
"""Frames in which an object may be missing without losing its number."""


@dataclass(frozen=True)
class _Shape:
    """A mask as its runs, see `foreground_runs`, with what is asked for often."""

    size: tuple[int, int]
    begins: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    area: int

    @classmethod
    def of(cls, rle: Mapping[str, Any]) -> _Shape:
        begins, ends = foreground_runs(rle)
        height, width = rle["size"]
        return cls((int(height), int(width)), begins, ends, int((ends - begins).sum()))

    def covered(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count the pixels of the mask before each place."""
        run = np.searchsorted(self.begins, places, side="right")
        full = np.concatenate([[0], np.cumsum(self.ends - self.begins)])
        inside = np.maximum(0, np.append(self.ends, 0)[run - 1] - places)  # of the last run that has begun
        counts: npt.NDArray[np.int64] = full[run] - np.where(run > 0, inside, 0)
        return counts

    def iou(self, other: _Shape) -> float:
        if self.size != other.size or not self.area or not other.area:
            return 0.0
        if self.ends[-1] <= other.begins[0] or other.ends[-1] <= self.begins[0]:
            return 0.0
        few, many = (self, other) if self.begins.size < other.begins.size else (other, self)
        both = int((many.covered(few.ends) - many.covered(few.begins)).sum())
        return both / (self.area + other.area - both)


@dataclass
class _Track:
    number: int
    shape: _Shape
    last: int
    """The frame in which it was seen last."""


class Linker:
    """Gives the instances of consecutive frames of one video the numbers of their tracks.

    The instances of a frame are assigned to the tracks so that the overlaps of their masks add up to the most, by the
    Hungarian method. An instance whose overlap with every free track is too small begins a track of its own. Only the
    last mask of each track that may still go on is held, as a run-length encoding.

    Parameters
    ----------
    min_iou : float
        Least overlap, see `MIN_IOU`.
    max_gap : int
        Frames in which an object may be missing, see `MAX_GAP`.

    Raises
    ------
    ValueError
        An overlap outside (0, 1], or a negative gap.
    """

    def __init__(self, *, min_iou: float = MIN_IOU, max_gap: int = MAX_GAP) -> None:
        if not 0 < min_iou <= 1:
            raise ValueError(f"min_iou must lie above 0 and not above 1, got {min_iou}")
        if max_gap < 0:
            raise ValueError(f"max_gap must be at least 0, got {max_gap}")
        self._min_iou = min_iou
        self._max_gap = max_gap
        self._tracks: list[_Track] = []
        self._frame = 0
        self._count = 0

    def add(self, annotations: Sequence[Mapping[str, Any]]) -> list[int]:
        """Add the next frame.

        Parameters
        ----------
        annotations : sequence of mapping
            Of `sparsespec.formats.instance_annotations`: ``segmentation`` is used. Empty for a frame that is missing.

        Returns
        -------
        list of int
            The number of each one's track, counting from 1 in the order in which they begin.

        Raises
        ------
        ValueError
            A run-length encoding is damaged.
        """
        shapes = [_Shape.of(annotation["segmentation"]) for annotation in annotations]
        self._frame += 1
        self._tracks = [track for track in self._tracks if self._frame - track.last <= self._max_gap + 1]
        linked = self._assigned(shapes)
        numbers = []
        for index, shape in enumerate(shapes):
            track = linked.get(index)
            if track is None:
                self._count += 1
                track = _Track(self._count, shape, self._frame)
                self._tracks.append(track)
            track.shape, track.last = shape, self._frame
            numbers.append(track.number)
        return numbers

    def _assigned(self, shapes: list[_Shape]) -> dict[int, _Track]:
        if not shapes or not self._tracks:
            return {}
        from scipy.optimize import linear_sum_assignment

        overlaps = np.array([[track.shape.iou(shape) for shape in shapes] for track in self._tracks])
        # What is too little does not count, so that it takes no track from another instance.
        overlaps[overlaps < self._min_iou] = 0
        rows, columns = linear_sum_assignment(overlaps, maximize=True)
        return {
            column: self._tracks[row]
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
            if overlaps[row, column] > 0
        }


def mask_iou(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Intersection over union of two masks that are given as COCO's run-length encodings.

    Parameters
    ----------
    one, other : mapping
        ``{"size": [H, W], "counts": str}``.

    Returns
    -------
    float
        0 where the sizes differ or a mask is empty.
    """
    return _Shape.of(one).iou(_Shape.of(other))
