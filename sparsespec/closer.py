"""A closer look at what was found: where to look, and what to make of what is seen there.

The network sees a photograph at a fixed size, so a small object covers few tokens. In a crop around it, enlarged to the
same size, it covers many: its outline is drawn from more tokens, and objects that were one region come apart.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparsespec._mapped import bands

LabelArray = npt.NDArray[np.integer]
Box = tuple[int, int, int, int]

# Least margin around an instance, in tokens of the first look.
_LEAST_MARGIN = 3.0
# The longer side of a crop is at most so many times the shorter one, as far as the image goes: beside a narrow strip
# the network sees too little.
_MOST_ELONGATED = 2.0
# Intersection over union from which a region of the crop is the same object.
SAME = 0.5
# Share of a crop's region that lies in the instance to be a part of it, and of the instance that its parts must cover.
_MOSTLY = 0.5


def crop_around(
    mask: npt.NDArray[np.bool_], token_side: float, shape: tuple[int, int], margin: float = 0.75
) -> Box | None:
    """Box to look at more closely for an instance.

    Parameters
    ----------
    mask
        (h, w) bool on the token grid.
    token_side
        Side of a token in pixels of the image.
    shape
        Height and width of the image, pixels.
    margin
        Added on each side, in sides of the instance's box.

    Returns
    -------
    (top, left, bottom, right) in pixels, or None
        None for an empty mask, or one that lies beyond the image.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    sides = []
    for tokens in (rows, columns):
        first, last = tokens[0] * token_side, (tokens[-1] + 1) * token_side
        around = max((last - first) * margin, _LEAST_MARGIN * token_side)
        sides.append((first - around, last + around))
    (top, bottom), (left, right) = sides
    down = max(0.0, (right - left) / _MOST_ELONGATED - (bottom - top)) / 2
    across = max(0.0, (bottom - top) / _MOST_ELONGATED - (right - left)) / 2
    box = (
        max(0, int(top - down)),
        max(0, int(left - across)),
        min(shape[0], int(bottom + down)),
        min(shape[1], int(right + across)),
    )
    return box if box[0] < box[2] and box[1] < box[3] else None


def redraw(
    view: LabelArray, label: int, crop: LabelArray, next_label: int, *, split: bool = True
) -> list[tuple[int, int]]:
    """Replace an instance by what was seen of it in its crop.

    It becomes the region of the crop that is the same object. Where there is none, but it falls into several regions
    that cover most of it, it becomes those. Otherwise it stays. Nothing is taken from other instances. Works through
    bands of rows, so that little memory is needed beside the two arrays.

    Parameters
    ----------
    view
        Labels in the crop's box, changed in place.
    label
        The instance's label in ``view``.
    crop
        Of the same shape: regions 1..n of the crop, 0 elsewhere.
    next_label
        The first label that is free for further parts.
    split
        Whether it may become several.

    Returns
    -------
    list of (label, region)
        What now has which label, the instance's own first; empty where the instance stayed.

    Raises
    ------
    ValueError
        The type of ``view`` doesn't hold the labels of further parts.
    """
    size, count = 0, int(crop.max(initial=0))
    area, shared = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for top, rows in bands(view):
        regions, inside = crop[top : top + len(rows)], rows == label
        size += int(np.count_nonzero(inside))
        area += np.bincount(regions.ravel(), minlength=count + 1)[1:]
        shared += np.bincount(regions[inside], minlength=count + 1)[1:]
    if not size or not count:
        return []
    likeness = shared / np.maximum(area + size - shared, 1)
    parts = np.flatnonzero(shared > _MOSTLY * area)
    best = int(likeness.argmax())
    if likeness[best] >= SAME:
        chosen = [best]
    elif split and parts.size > 1 and shared[parts].sum() > _MOSTLY * size:
        chosen = [int(part) for part in parts]
    else:
        return []
    largest = next_label + len(chosen) - 2
    if largest > np.iinfo(view.dtype).max:
        raise ValueError(f"the labels must have a type that holds numbers up to {largest}, not {view.dtype}")
    taken = [(label if place == 0 else next_label + place - 1, part + 1) for place, part in enumerate(chosen)]
    label_of = np.zeros(count + 1, view.dtype)
    for number, region in taken:
        label_of[region] = number
    for top, rows in bands(view):
        free = (rows == 0) | (rows == label)
        rows[free] = label_of[crop[top : top + len(rows)][free]]
    return taken
