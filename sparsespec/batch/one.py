"""One image from file to files; nothing it meets gets out as an exception, Ctrl-C excepted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import temporary_beside
from sparsespec._mapped import release
from sparsespec.batch.job import ImageSegmenter, Outcome
from sparsespec.batch.outputs import OutputFolder
from sparsespec.batch.record import Row, jsonable
from sparsespec.formats.coco import instance_annotations
from sparsespec.formats.labels import write_label_png
from sparsespec.formats.overlay import (
    DEFAULT_MAX_SIDE,
    draw_instances,
    jpeg_bytes,
    reduced_copy,
    write_overlay_jpeg,
)
from sparsespec.images import LARGE_IMAGE, ImageReadError, PixelSource, open_image

if TYPE_CHECKING:
    from PIL import Image

    from sparsespec.pipeline import Segmentation

__all__ = ["explain", "process_image", "remove_results"]

THUMBNAIL_SIDE = 420
"""Longest side of a picture in the report, in pixels."""

_DETAILS = ("model", "grid", "tokens", "tiles", "views", "solver", "provider")
_LONGEST_ERROR = 400


def process_image(
    segmenter: ImageSegmenter,
    root: Path,
    path: str,
    folder: OutputFolder,
    name: str,
    *,
    overlays: bool,
    max_pixels: int | None,
    admit: Callable[[AbstractContextManager[PixelSource]], AbstractContextManager[PixelSource]] = lambda opening: (
        opening
    ),
) -> Outcome:
    """Read, segment and write one image.

    Parameters
    ----------
    segmenter : ImageSegmenter
        Does the work.
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
        Largest image to read, see `open_image`.
    admit : callable
        Opens the image when there is room for it, see `sparsespec.batch.several.Room.admit`.

    Returns
    -------
    Outcome
        With the status ``done``, or ``failed`` and no file left of this image.
    """
    row = Row(path=path)
    mask, overlay = folder.root / folder.mask(name), folder.root / folder.overlay(name)
    began = time.perf_counter()
    try:
        with admit(open_image(root / path, max_pixels=max_pixels)) as source:
            height, width = source.shape[:2]
            row.size = (int(width), int(height))
            large = height * width >= LARGE_IMAGE
            image = source if large else source.read(0, 0, height, width)
            row.seconds["read"] = time.perf_counter() - began
            with _label_file(folder.root, (height, width)) if large else nullcontext() as labels_file:
                before = time.perf_counter()
                segmentation = segmenter(image) if labels_file is None else segmenter(image, out=labels_file)
                labels, scores = _checked(segmentation, (height, width))
                info = segmentation.info
                row.seconds.update(_stages(info, time.perf_counter() - before))

                before = time.perf_counter()
                annotations = instance_annotations(labels, scores)
                mask.parent.mkdir(parents=True, exist_ok=True)
                write_label_png(mask, labels)
                photo, small = reduced_copy(image, labels, DEFAULT_MAX_SIDE if overlays else THUMBNAIL_SIDE)
            if overlays:
                overlay.parent.mkdir(parents=True, exist_ok=True)
                write_overlay_jpeg(overlay, draw_instances(photo, small, scores))
            thumbnail = jpeg_bytes(_thumbnail(photo, small, scores), quality=80)
            row.seconds["write"] = time.perf_counter() - before
    except Exception as error:
        _remove(mask, overlay)
        row.seconds["total"] = time.perf_counter() - began
        row.status, row.error = "failed", explain(error, row.size)
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
    return Outcome(_rounded(row), annotations, thumbnail=thumbnail)


def remove_results(folder: OutputFolder, row: Row) -> None:
    """Remove the files of an image that is not to be in the record after all."""
    _remove(*(folder.root / path for path in (row.mask, row.overlay) if path is not None))


@contextmanager
def _label_file(folder: Path, shape: tuple[int, int]) -> Iterator[npt.NDArray[np.uint16]]:
    """Map labels from a file in the output folder: they may be larger than the memory."""
    path = temporary_beside(folder / "labels")
    try:
        with path.open("xb") as file:
            size = shape[0] * shape[1] * np.dtype(np.uint16).itemsize
            file.truncate(size)
            # Writing to a mapped file kills the process when the disk is full: asked first, the system can say so.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        labels = np.memmap(path, np.uint16, "r+", shape=shape)
        yield labels
        del labels
    finally:
        with suppress(OSError):  # where open files cannot be removed, the next run does it
            path.unlink(missing_ok=True)


def _thumbnail(photo: Image.Image, labels: npt.NDArray[Any], scores: npt.NDArray[Any]) -> Image.Image:
    smaller, small = reduced_copy(np.asarray(photo), labels, THUMBNAIL_SIDE)
    return draw_instances(smaller, small, scores)


def _checked(segmentation: Segmentation, shape: tuple[int, ...]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    labels, scores = np.asarray(segmentation.labels), np.asarray(segmentation.scores)
    if labels.shape != shape:
        raise ValueError(f"the segmenter returned labels of shape {labels.shape} for an image of shape {shape}")
    release(labels)
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


def explain(error: Exception, size: tuple[int, int] | None) -> str:
    """Say on one line why there is no result for an image of so many pixels, width and height."""
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
