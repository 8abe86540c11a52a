"""Instances as COCO JSON, with the masks as compressed run-length encodings.

COCO reads a mask column by column. Its runs alternate between 0 and 1, beginning with 0; from the fourth run on, the
difference to the run two places before is kept; and each number is written in groups of five bits, lowest first, as
printable characters from ``"0"`` on, where 32 marks that more groups follow.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import AtomicFile
from sparsespec._mapped import bands

__all__ = ["CATEGORY_ID", "CocoWriter", "decode_rle", "encode_rle", "instance_annotations"]

CATEGORY_ID = 1
"""Everything found is an object; nothing here knows names."""

_COUNTS_AT_ONCE = 1 << 16


def encode_rle(mask: npt.ArrayLike) -> dict[str, Any]:
    """Encode one binary mask the way COCO does.

    Parameters
    ----------
    mask : (H, W) array_like
        Non-zero is foreground.

    Returns
    -------
    dict
        ``{"size": [H, W], "counts": str}``.

    Raises
    ------
    ValueError
        `mask` is not two-dimensional.
    """
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"mask must be two-dimensional, got the shape {array.shape}")
    flat = (array != 0).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], edges, [flat.size]])
    counts = np.diff(bounds)
    if flat.size and flat[0]:
        counts = np.concatenate([[0], counts])
    return {"size": [int(array.shape[0]), int(array.shape[1])], "counts": _compress(counts)}


def decode_rle(rle: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Turn ``{"size": [H, W], "counts": str}`` back into an (H, W) array of 0 and 1.

    Raises
    ------
    ValueError
        The runs do not add up to the size.
    """
    height, width = rle["size"]
    counts = _decompress(rle["counts"])
    if counts.sum() != height * width or (counts.size and counts.min() < 0):
        raise ValueError(f"counts cover {int(counts.sum())} pixels, size {height} x {width} has {height * width}")
    values = np.arange(counts.size) % 2
    return np.repeat(values.astype(np.uint8), counts).reshape((height, width), order="F")


def instance_annotations(labels: npt.ArrayLike, scores: npt.ArrayLike) -> list[dict[str, Any]]:
    """Describe each instance of a label image, in one pass over its pixels, row by row.

    Beside the labels, which may be mapped from a file, it needs memory for their outlines only.

    Parameters
    ----------
    labels : (H, W) array_like of int
        0 = background.
    scores : (n,) array_like of float
        ``scores[k - 1]`` belongs to label ``k``.

    Returns
    -------
    list of dict
        By rising label: ``label``, ``segmentation``, ``bbox`` (x, y, width, height), ``area`` (pixels), ``score``,
        ``iscrowd``, ``category_id``. A label without a pixel is left out.

    Raises
    ------
    ValueError
        A label without a score, a negative label, a score that is no finite number, or wrong dimensions.
    """
    array = np.asarray(labels)
    confidence = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be a two-dimensional array of whole numbers, got {array.dtype} {array.shape}")
    if confidence.ndim != 1 or not np.isfinite(confidence).all():
        raise ValueError("scores must be a one-dimensional array of finite numbers")
    if array.size == 0:
        return []
    height, width = array.shape
    starts, owners, smallest, largest = _runs(array)
    if smallest < 0 or largest > confidence.size:
        raise ValueError(f"labels must lie in 0..{confidence.size}, the number of scores; got {smallest}..{largest}")
    ends = np.append(starts[1:], array.size)
    keep = owners > 0
    starts, ends, owners = starts[keep], ends[keep], owners[keep]
    order = np.argsort(owners, kind="stable")
    starts, ends, owners = starts[order], ends[order], owners[order]
    present, firsts = np.unique(owners, return_index=True)
    annotations = []
    for label, first, last in zip(present.tolist(), firsts, np.append(firsts, owners.size)[1:], strict=True):
        begin, end = starts[first:last], ends[first:last]
        bounds = np.concatenate([[0], np.column_stack([begin, end]).ravel()])
        counts = np.diff(bounds)
        if end[-1] < array.size:
            counts = np.append(counts, array.size - end[-1])
        left, right = begin[0] // height, (end[-1] - 1) // height
        if (begin // height != (end - 1) // height).any():  # a run that goes on in the next column touches both borders
            top, bottom = 0, height - 1
        else:
            top, bottom = (begin % height).min(), ((end - 1) % height).max()
        annotations.append(
            {
                "category_id": CATEGORY_ID,
                "segmentation": {"size": [height, width], "counts": _compress(counts)},
                "bbox": [int(left), int(top), int(right - left + 1), int(bottom - top + 1)],
                "area": int((end - begin).sum()),
                "score": round(float(confidence[label - 1]), 6),
                "iscrowd": 0,
                "label": label,
            }
        )
    return annotations


class CocoWriter:
    """``instances.json``, written as a stream.

    Parameters
    ----------
    path : str or os.PathLike
        Target; it appears with `close`.
    description : str
        Goes into the ``info`` entry.
    version : str
        Version of the program, for the ``info`` entry.
    polygons : bool
        Write outlines, the annotations' ``polygons``, instead of run-length encodings.
    first_annotation : int
        Identifier of the first annotation.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        description: str,
        version: str,
        polygons: bool = False,
        first_annotation: int = 1,
    ) -> None:
        self._target = AtomicFile(path)
        self._images: IO[bytes] = tempfile.TemporaryFile(dir=self._target.path.parent)  # noqa: SIM115 - lives as long
        self._polygons = polygons
        self._first = first_annotation
        self._annotations = 0
        self._count = 0
        info = {"description": description, "version": version}
        categories = [{"id": CATEGORY_ID, "name": "object", "supercategory": "object"}]
        self._target.file.write(
            f'{{"info": {json.dumps(info)},\n"licenses": [],\n"categories": {json.dumps(categories)},\n'
            f'"annotations": ['.encode()
        )

    def add(
        self,
        image_id: int,
        file_name: str,
        width: int,
        height: int,
        annotations: list[dict[str, Any]],
        *,
        page: int | None = None,
    ) -> None:
        """Add one image and its instances (of `instance_annotations`).

        The identifiers of the annotations are given here, one after the other. `page` counts from 1.
        """
        lines = []
        for number, annotation in enumerate(annotations, start=self._first + self._annotations):
            entry = {"id": number, "image_id": image_id, **annotation}
            polygons = entry.pop("polygons", None)
            if self._polygons:
                entry["segmentation"] = polygons
            lines.append(json.dumps(entry, allow_nan=False))
        before = ",\n" if self._annotations else "\n"
        if lines:
            self._target.file.write((before + ",\n".join(lines)).encode())
        self._annotations += len(lines)
        image = {"id": image_id, "file_name": file_name, "width": width, "height": height}
        if page is not None:
            image["page"] = page
        self._images.write(((",\n" if self._count else "") + json.dumps(image)).encode())
        self._count += 1

    def close(self) -> None:
        """Finish the file and put it in its place."""
        self._target.file.write(b'\n],\n"images": [\n')
        self._images.seek(0)
        shutil.copyfileobj(self._images, self._target.file)
        self._target.file.write(b"\n]}\n")
        self._images.close()
        self._target.commit()

    def discard(self) -> None:
        """Give up; a file of an earlier run stays as it was."""
        with suppress(OSError):  # closing flushes, which a full disk refuses
            self._images.close()
        self._target.discard()


def _runs(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], int, int]:
    """Find where, column by column, a run of one label begins, and whose it is; smallest and largest label too.

    The rows are read in their order, since columns lie far apart in memory: a run begins where a pixel differs from the
    one above it, or at the top of a column from the last of the column before.
    """
    height, width = labels.shape
    first, last = np.array(labels[0]), np.array(labels[-1])
    columns = np.flatnonzero(np.append(True, first[1:] != last[:-1]))
    places, owners = [columns.astype(np.int64) * height], [first[columns]]
    smallest, largest = int(first.min()), int(first.max())
    above = first
    for top, part in bands(labels):
        smallest, largest = min(smallest, int(part.min())), max(largest, int(part.max()))
        for row, changed in ((top, part[:1] != above), (top + 1, part[1:] != part[:-1])):
            flat = np.flatnonzero(changed)
            rows, columns = np.divmod(flat, width)
            places.append(columns * height + rows + row)
            owners.append(part[rows + (row - top), columns])
        above = np.array(part[-1])
    places_, owners_ = np.concatenate(places), np.concatenate(owners)
    order = np.argsort(places_)
    return places_[order], owners_[order], smallest, largest


def _compress(counts: npt.NDArray[np.int64]) -> str:
    numbers = counts.astype(np.int64)
    numbers[3:] -= counts[1:-2]
    parts = [_characters(numbers[k : k + _COUNTS_AT_ONCE]) for k in range(0, len(numbers), _COUNTS_AT_ONCE)]
    return b"".join(parts).decode("ascii")


def _characters(numbers: npt.NDArray[np.int64]) -> bytes:
    # Five bits each, and one of them for the sign.
    most = 1 + int(np.abs(numbers).max()).bit_length() // 5
    groups = (numbers[:, None] >> (5 * np.arange(most))) & 31
    # A number ends at the first group after which only its sign remains: zeros, or all ones after bit 16.
    rest = numbers[:, None] >> (5 * np.arange(1, most + 1))
    finished = rest == np.where(groups & 16, -1, 0)
    length = finished.argmax(axis=1) + 1
    used = np.arange(most) < length[:, None]
    more = np.arange(most) < (length - 1)[:, None]
    characters = groups + 32 * more + 48
    return characters[used].astype(np.uint8).tobytes()


def _decompress(text: str) -> npt.NDArray[np.int64]:
    codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    counts: list[int] = []
    value, shift = 0, 0
    for code in codes.tolist():
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return np.array(counts, dtype=np.int64)
