"""What ``report.html`` shows of one image: a small photograph, and a script with its instances and layers.

A page that is opened from a disk may not read other files there, but it may run scripts that lie beside it. So what is
looked up when an image is opened is one call, ``sparsespec.card("name", {...})``, in a file of its own.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsespec.formats.coco import encode_rle, instance_annotations
from sparsespec.formats.overlay import jpeg_bytes, reduced_labels

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["CARD_SIDE", "MASK_SIDE", "card_photograph", "card_script"]

CARD_SIDE = 384
"""Longest side of the photograph, in pixels."""

MASK_SIDE = 640
"""Longest side of the masks, in pixels."""

_GRID_SIDE = 64
_QUALITY = 65
_REDUCING_GAP = 3.0


def card_photograph(photo: Image.Image) -> bytes:
    """Encode a photograph of any size as the small JPEG of the report, without anything drawn on it.

    Parameters
    ----------
    photo : PIL.Image.Image
        RGB.
    """
    from PIL import Image

    shrink = CARD_SIDE / max(photo.size)
    if shrink < 1:
        size = (max(1, round(photo.width * shrink)), max(1, round(photo.height * shrink)))
        photo = photo.resize(size, Image.Resampling.HAMMING, reducing_gap=_REDUCING_GAP)
    return jpeg_bytes(photo, quality=_QUALITY, subsampling=2, optimize=True)


def card_script(
    name: str,
    size: tuple[int, int],
    labels: npt.NDArray[Any],
    annotations: Sequence[Mapping[str, Any]],
    layers: Mapping[str, Any] | None = None,
    extent: Any = None,
) -> bytes:
    """Write the script that gives the report an image's instances and layers.

    Parameters
    ----------
    name : str
        Output name of the image.
    size : (int, int)
        Width and height of the photograph in pixels.
    labels : (h, w) ndarray of int
        Its labels, of this or a smaller size; 0 = background.
    annotations : sequence of dict
        Its instances, of `sparsespec.formats.coco.instance_annotations` for the whole photograph.
    layers : mapping of str to (rows, columns) array_like, optional
        Maps on the token grid, see `sparsespec.Segmentation`. What is no such map of finite numbers is left out.
    extent : (float, float), optional
        So many rows and columns of the grid lie on the photograph; the whole grid if not given, or something else.

    Returns
    -------
    bytes
        ASCII.
    """
    shrink = MASK_SIDE / max(labels.shape)
    if shrink < 1:
        height, width = labels.shape
        labels = reduced_labels(labels, (max(1, round(width * shrink)), max(1, round(height * shrink))))
    shown = [_layer(str(title), values, extent) for title, values in (layers or {}).items()]
    card = {
        "size": list(size),
        "maskSize": list(labels.shape),
        "instances": _instances(size, labels, annotations),
        "layers": [layer for layer in shown if layer is not None],
    }
    content = json.dumps(card, separators=(",", ":"), allow_nan=False)
    return f"sparsespec.card({json.dumps(name)},{content});\n".encode("ascii")


def _instances(
    size: tuple[int, int], labels: npt.NDArray[Any], annotations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if not annotations:
        return []
    if labels.shape == (size[1], size[0]):
        seen = {entry["label"]: entry["segmentation"]["counts"] for entry in annotations}
    else:
        most = max(entry["label"] for entry in annotations)
        seen = {
            entry["label"]: entry["segmentation"]["counts"] for entry in instance_annotations(labels, np.zeros(most))
        }
    # An instance may be too small for the size in which masks are shown.
    nothing = encode_rle(np.zeros(labels.shape, bool))["counts"]
    return [
        {
            "label": entry["label"],
            "score": round(entry["score"], 4),
            "box": entry["bbox"],
            "area": entry["area"],
            "rle": seen.get(entry["label"], nothing),
        }
        for entry in annotations
    ]


def _layer(title: str, values: Any, extent: Any) -> dict[str, Any] | None:
    grid = np.asarray(values)
    if grid.ndim != 2 or grid.size == 0 or grid.dtype.kind not in "fiub":
        return None
    grid = grid.astype(np.float64)
    if not np.isfinite(grid).all():
        return None
    covered = _covered(extent, grid.shape)
    step = math.ceil(max(grid.shape) / _GRID_SIDE)
    if step > 1:
        for _ in "rows", "columns":
            starts = np.arange(0, len(grid), step)
            grid = np.add.reduceat(grid, starts).T / np.diff(np.append(starts, len(grid)))
    low, high = float(grid.min()), float(grid.max())
    steps = np.rint((grid - low) / (high - low) * 255) if 0 < high - low < math.inf else np.zeros(grid.shape)
    return {
        "name": title,
        "grid": list(grid.shape),
        "extent": [round(length / step, 4) for length in covered],
        "range": [round(low, 4), round(high, 4)],
        "data": base64.b64encode(steps.astype(np.uint8).tobytes()).decode("ascii"),
    }


def _covered(extent: Any, shape: Sequence[int]) -> list[float]:
    try:
        rows, columns = (float(length) for length in extent)
    except (TypeError, ValueError):
        rows = columns = math.nan
    if 0 < rows < math.inf and 0 < columns < math.inf:
        return [rows, columns]
    return [float(length) for length in shape]
