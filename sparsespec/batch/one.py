"""One image from file to files; nothing it meets gets out as an exception, Ctrl-C excepted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsespec.batch.outputs import OutputFolder
from sparsespec.batch.record import Row, jsonable
from sparsespec.formats.coco import instance_annotations
from sparsespec.formats.labels import write_label_png
from sparsespec.formats.overlay import jpeg_bytes, render_overlay, write_overlay_jpeg
from sparsespec.images import ImageReadError, read_image

if TYPE_CHECKING:
    from sparsespec.pipeline import Segmentation

__all__ = ["Outcome", "process_image"]

THUMBNAIL_SIDE = 420
"""Longest side of a picture in the report, in pixels."""

_DETAILS = ("model", "grid", "tokens", "solver", "provider")
_LONGEST_ERROR = 400


@dataclass
class Outcome:
    """What one image contributes to the run.

    Attributes
    ----------
    row : Row
        For the record.
    annotations : list of dict
        For ``instances.json``.
    thumbnail : bytes or None
        A small JPEG for the report.
    """

    row: Row
    annotations: list[dict[str, Any]] = field(default_factory=list)
    thumbnail: bytes | None = None


def process_image(
    segmenter: Callable[[npt.NDArray[Any]], Segmentation],
    root: Path,
    path: str,
    folder: OutputFolder,
    name: str,
    *,
    overlays: bool,
    max_pixels: int | None,
) -> Outcome:
    """Read, segment and write one image.

    Parameters
    ----------
    segmenter : callable
        See `run_batch`.
    root : Path
        Folder of the input.
    path : str
        The image, relative to `root`.
    folder : OutputFolder
        Where results go.
    name : str
        Its output name, of `output_names`.
    overlays : bool
        Write an overlay too.
    max_pixels : int or None
        Largest image to read.

    Returns
    -------
    Outcome
        With the status ``done``, or ``failed`` and no file left of this image.
    """
    row = Row(path=path)
    mask, overlay = folder.root / folder.mask(name), folder.root / folder.overlay(name)
    began = time.perf_counter()
    try:
        image = read_image(root / path, max_pixels=max_pixels)
        row.size = (int(image.shape[1]), int(image.shape[0]))
        row.seconds["read"] = time.perf_counter() - began

        before = time.perf_counter()
        segmentation = segmenter(image)
        labels, scores = _checked(segmentation, image.shape[:2])
        info = segmentation.info
        row.seconds.update(_stages(info, time.perf_counter() - before))

        before = time.perf_counter()
        annotations = instance_annotations(labels, scores)
        mask.parent.mkdir(parents=True, exist_ok=True)
        write_label_png(mask, labels)
        if overlays:
            overlay.parent.mkdir(parents=True, exist_ok=True)
            write_overlay_jpeg(overlay, render_overlay(image, labels, scores))
        thumbnail = jpeg_bytes(render_overlay(image, labels, scores, max_side=THUMBNAIL_SIDE), quality=80)
        row.seconds["write"] = time.perf_counter() - before
    except Exception as error:
        _remove(mask, overlay)
        row.seconds["total"] = time.perf_counter() - began
        row.status, row.error = "failed", _explain(error, row.size)
        return Outcome(_rounded(row))
    except BaseException:
        _remove(mask, overlay)
        raise
    row.seconds["total"] = time.perf_counter() - began
    row.status = "done"
    row.mask = folder.mask(name)
    row.overlay = folder.overlay(name) if overlays else None
    row.instances = len(annotations)
    row.scores = [annotation["score"] for annotation in annotations]
    row.details = {key: jsonable(info[key]) for key in _DETAILS if key in info}
    return Outcome(_rounded(row), annotations, thumbnail)


def _checked(segmentation: Segmentation, shape: tuple[int, ...]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    labels, scores = np.asarray(segmentation.labels), np.asarray(segmentation.scores)
    if labels.shape != shape:
        raise ValueError(f"the segmenter returned labels of shape {labels.shape} for an image of shape {shape}")
    return labels, scores


def _stages(info: Mapping[str, Any], measured: float) -> dict[str, float]:
    stages = info.get("seconds")
    if not isinstance(stages, Mapping):
        return {"segment": measured}
    return {str(stage): float(seconds) for stage, seconds in stages.items() if stage not in ("read", "total")}


def _rounded(row: Row) -> Row:
    row.seconds = {stage: round(seconds, 6) for stage, seconds in row.seconds.items()}
    return row


def _remove(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _explain(error: Exception, size: tuple[int, int] | None) -> str:
    if isinstance(error, ImageReadError):
        text = f"{error.reason}; {error.advice}"
    elif isinstance(error, MemoryError):
        pixels = f" ({size[0]} x {size[1]} pixels)" if size else ""
        text = f"out of memory{pixels}; make the image smaller"
    elif isinstance(error, OSError):
        where = f" '{error.filename}'" if error.filename else ""
        text = f"{type(error).__name__}: {error.strerror or error}{where}"
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_ERROR else line[: _LONGEST_ERROR - 1] + "…"
