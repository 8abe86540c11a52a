"""One image from file to files; nothing it meets gets out as an exception, Ctrl-C excepted."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import temporary_beside, write_atomic
from sparsespec._mapped import release
from sparsespec.batch.inputs import leads_outside
from sparsespec.batch.job import Item, Job, Outcome, failure
from sparsespec.batch.names import page_name
from sparsespec.batch.outputs import card_files, mask_file, overlay_file, yolo_file
from sparsespec.batch.record import Row, jsonable
from sparsespec.batch.remote import StoreError
from sparsespec.batch.store import inside
from sparsespec.formats.card import MASK_SIDE, card_photograph, card_script
from sparsespec.formats.coco import instance_annotations
from sparsespec.formats.cutouts import cutout_path, write_cutouts
from sparsespec.formats.labels import write_label_png
from sparsespec.formats.overlay import (
    DEFAULT_MAX_SIDE,
    draw_instances,
    reduced_copy,
    write_overlay_jpeg,
)
from sparsespec.formats.polygons import add_polygons
from sparsespec.formats.report import readable_name
from sparsespec.formats.table import instance_properties
from sparsespec.formats.yolo import write_yolo
from sparsespec.images import LARGE_IMAGE, ImageReadError, PixelSource, count_pages, open_image

if TYPE_CHECKING:
    from PIL import Image

    from sparsespec.pipeline import Segmentation

__all__ = ["explain", "process_file", "reason"]

EIGENVECTORS = 4
"""So many are among the layers that the report shows."""

_DETAILS = ("model", "grid", "tokens", "tiles", "views", "solver", "provider")
_LONGEST_ERROR = 400


def process_file(
    job: Job,
    item: Item,
    *,
    admit: Callable[[AbstractContextManager[PixelSource]], AbstractContextManager[PixelSource]] = lambda opening: (
        opening
    ),
    warm_up: Callable[[], float] = lambda: 0.0,
) -> list[Outcome]:
    """Read, segment and write one file.

    Parameters
    ----------
    job : Job
        What to do.
    item : Item
        With which file.
    admit : callable
        Opens an image when there is room for it, see `sparsespec.batch.several.Room.admit`.
    warm_up : callable
        Is called before an image that could be opened is segmented, and gives the seconds that it took, which do not
        count as the image's.

    Returns
    -------
    list of Outcome
        One, or one for each page of a file that has several; with the status ``done``, or ``failed`` and no file left
        of it.
    """
    began = time.perf_counter()
    fingerprint = None
    try:
        fingerprint = None if job.source.folder is None else job.source.fingerprint(item.path)
        _refuse_links(job, item)
        with job.source.fetched(item.path) as file:
            fetching = time.perf_counter() - began
            if job.source.folder is None:
                fingerprint = job.source.fingerprint(item.path)  # of what was just fetched: no request
            pages = count_pages(file)
            outcomes = []
            for page in range(pages):
                work = _Image(job, item, file, page if pages > 1 else None, fetching if page == 0 else 0.0)
                outcomes.append(work.outcome(admit, warm_up))
    except Exception as error:
        outcomes = [failure(item, explain(error, None), reason(error), seconds=time.perf_counter() - began)]
    for outcome in outcomes:
        outcome.row.fingerprint = fingerprint
    return outcomes


class _Image:
    """One image: the only one of a file, or one of its pages."""

    def __init__(self, job: Job, item: Item, file: Path, page: int | None, fetching: float) -> None:
        self._job = job
        self._item = item
        self._file = file
        self._page = page
        self._name = item.name if page is None else page_name(item.name, item.path, page + 1)
        self._fetching = fetching
        self._waited = 0.0
        self._written: list[str] = []
        self._row = Row(path=item.path, page=None if page is None else page + 1)

    def outcome(
        self,
        admit: Callable[[AbstractContextManager[PixelSource]], AbstractContextManager[PixelSource]],
        warm_up: Callable[[], float],
    ) -> Outcome:
        """Do all of it; what goes wrong is in the row."""
        row, target = self._row, self._job.target
        began = time.perf_counter() - self._fetching
        with ExitStack() as stack:
            try:
                staging = stack.enter_context(target.staged())
            except OSError as error:
                row.status, row.error, row.reason = "failed", explain(error, None), "output"
                return Outcome(row, name=self._item.name)
            try:
                done = self._results(staging, admit, warm_up, began)
                done.files = {path: (staging / path).stat().st_size for path in self._written}
                before = time.perf_counter()
                with _output_errors():
                    target.publish(staging, self._written)
                if target.folder is None:
                    row.seconds["publish"] = time.perf_counter() - before
            except Exception as error:
                self._remove(staging)
                row.status, row.error, row.reason = "failed", explain(error, row.size), reason(error)
                row.mask = row.overlay = row.yolo = None
                row.cutouts, row.scores, row.instances, row.details = [], [], 0, {}
                done = Outcome(row, name=self._item.name)
            except BaseException:
                self._remove(staging)
                raise
        row.seconds["total"] = time.perf_counter() - began - self._waited
        row.seconds = {stage: round(seconds, 6) for stage, seconds in row.seconds.items()}
        return done

    def _results(
        self,
        staging: Path,
        admit: Callable[[AbstractContextManager[PixelSource]], AbstractContextManager[PixelSource]],
        warm_up: Callable[[], float],
        began: float,
    ) -> Outcome:
        job, row, formats = self._job, self._row, self._job.formats
        with admit(open_image(self._file, page=self._page or 0, max_pixels=job.max_pixels)) as source:
            height, width = source.shape[:2]
            row.size = (int(width), int(height))
            large = height * width >= LARGE_IMAGE
            image = source if large else source.read(0, 0, height, width)
            row.seconds["read"] = time.perf_counter() - began
            self._waited = warm_up()
            with _label_file(staging, (height, width)) if large else nullcontext() as labels_file:
                before = time.perf_counter()
                segmentation = self._segmented(image, labels_file)
                labels, scores = _checked(segmentation, (height, width))
                info = segmentation.info
                row.seconds.update(_stages(info, time.perf_counter() - before))

                before = time.perf_counter()
                annotations = instance_annotations(labels, scores)
                properties = self._more(staging, source, labels, annotations)
                with _output_errors():
                    write_label_png(self._place(staging, mask_file(self._name)), labels)
                row.mask = self._written[-1]
                photo = None
                if formats.overlays or self._item.card:
                    photo, small = reduced_copy(image, labels, DEFAULT_MAX_SIDE if formats.overlays else MASK_SIDE)
            if photo is not None:
                if formats.overlays:
                    overlay = draw_instances(photo, small, scores)
                    with _output_errors():
                        write_overlay_jpeg(self._place(staging, overlay_file(self._name)), overlay)
                    row.overlay = self._written[-1]
                if self._item.card:
                    self._write_card(staging, photo, small, annotations, segmentation)
            row.seconds["write"] = time.perf_counter() - before
        row.status = "done"
        row.instances = len(annotations)
        row.scores = [annotation["score"] for annotation in annotations]
        row.details = {key: jsonable(info[key]) for key in _DETAILS if key in info}
        return Outcome(row, annotations, properties, self._name if self._item.card else None, name=self._item.name)

    def _segmented(
        self, image: npt.NDArray[Any] | PixelSource, labels_file: npt.NDArray[np.uint16] | None
    ) -> Segmentation:
        segmenter = self._job.segmenter
        options: dict[str, Any] = {} if labels_file is None else {"out": labels_file}
        # One of ours has this module loaded; others are called as their protocol says.
        pipeline = sys.modules.get("sparsespec.pipeline")
        if self._item.card and pipeline is not None and isinstance(segmenter, pipeline.Segmenter):
            options["eigenvectors"] = EIGENVECTORS
        return segmenter(image, **options)

    def _more(
        self, staging: Path, source: PixelSource, labels: npt.NDArray[Any], annotations: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Write what is asked for beside the label image and the overlay; properties for the table."""
        formats, row = self._job.formats, self._row
        height, width = labels.shape
        if formats.polygons or formats.yolo:
            add_polygons(annotations, labels)
        if formats.yolo:
            with _output_errors():
                write_yolo(self._place(staging, yolo_file(self._name)), annotations, width, height)
            row.yolo = self._written[-1]
        if not formats.polygons:
            for annotation in annotations:
                annotation.pop("polygons", None)
        if formats.cutouts and annotations:
            inside(staging, cutout_path(self._name, 1))
            with _output_errors():
                row.cutouts = write_cutouts(staging, self._name, source, labels, annotations)
            self._written += row.cutouts
        return instance_properties(source, labels, annotations) if formats.table is not None else []

    def _write_card(
        self,
        staging: Path,
        photo: Image.Image,
        labels: npt.NDArray[Any],
        annotations: list[dict[str, Any]],
        segmentation: Segmentation,
    ) -> None:
        assert self._row.size is not None
        layers = getattr(segmentation, "layers", None)
        script = card_script(
            self._name,
            self._row.size,
            labels,
            annotations,
            layers if isinstance(layers, Mapping) else None,
            segmentation.info.get("extent"),
        )
        for path, content in zip(card_files(self._name), (card_photograph(photo), script), strict=True):
            with _output_errors():
                # To wait for the disk would take longer than all the rest; what a power cut leaves of them has another
                # size, and is done again.
                write_atomic(self._place(staging, path), content, durable=False)

    def _place(self, staging: Path, path: str) -> Path:
        """Give the place of a file to be written, with its folder made."""
        place = inside(staging, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._written.append(path)
        return place

    def _remove(self, staging: Path) -> None:
        for path in self._written:
            with suppress(OSError):
                (staging / path).unlink(missing_ok=True)
            if self._job.target.folder is None:
                with suppress(OSError):
                    self._job.target.remove(path)


class _LinkError(ImageReadError):
    """A link that is not to be followed."""


class _OutputError(OSError):
    """Results cannot be written, which no other image would change."""


_ENDING = frozenset({errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EIO})


@contextmanager
def _output_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _ENDING:
            raise
        raise _OutputError(error.errno, f"cannot write the results: {error.strerror}", error.filename) from error


def _refuse_links(job: Job, item: Item) -> None:
    if job.source.folder is None or job.follow_links:
        return
    if leads_outside(job.source.folder, item.path):
        raise _LinkError(
            job.source.folder / item.path,
            "it is a link that leads out of the input folder",
            "read such links with --follow-links (follow_links=True)",
            "file",
        )


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
    found = {str(stage): float(seconds) for stage, seconds in stages.items() if stage not in ("read", "total")}
    return {stage: seconds for stage, seconds in found.items() if math.isfinite(seconds)}


def explain(error: Exception, size: tuple[int, int] | None) -> str:
    """Say on one line why there is no result for an image of so many pixels, width and height."""
    if isinstance(error, ImageReadError):
        text = f"{error.reason}; {error.advice}"
    elif isinstance(error, MemoryError):
        pixels = f" ({size[0]} x {size[1]} pixels)" if size else ""
        text = f"out of memory{pixels}; make the image smaller"
    elif isinstance(error, OSError):
        where = f" '{error.filename}'" if error.filename else ""
        kind = "" if isinstance(error, _OutputError) else f"{type(error).__name__}: "
        text = f"{kind}{error.strerror or error}{where}"
    else:
        text = f"{type(error).__name__}: {error}"
    # Names of files get into it, and it goes to terminals and into pages.
    line = readable_name(" ".join(text.split()))
    return line if len(line) <= _LONGEST_ERROR else line[: _LONGEST_ERROR - 1] + "…"


def reason(error: Exception) -> str:
    """Give the kind of an error, one of `sparsespec.batch.record.REASONS`."""
    if isinstance(error, (_OutputError, StoreError)):
        return "output"
    if isinstance(error, ImageReadError):
        if isinstance(error.__cause__, MemoryError):
            return "memory"
        return "refused" if isinstance(error, _LinkError) else "unreadable"
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError):
        return "storage"
    return "error"
