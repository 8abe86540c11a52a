"""What a run is to do with each image, in a form that other processes can be given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from sparsespec.batch.record import Row
from sparsespec.batch.store import Store
from sparsespec.formats.table import TableKind
from sparsespec.images import DEFAULT_MAX_PIXELS

if TYPE_CHECKING:
    from sparsespec.batch.shard import ShardSummary, ShardTask
    from sparsespec.pipeline import Segmentation

__all__ = [
    "Engine",
    "Formats",
    "ImageSegmenter",
    "Item",
    "Job",
    "Outcome",
    "ShardEngine",
    "closed",
    "failure",
    "in_order",
]


_T = TypeVar("_T")


class ImageSegmenter(Protocol):
    """What `run_batch` calls for each image: a `sparsespec.Segmenter`, or anything that behaves like one."""

    def __call__(self, image: Any, /, *, out: npt.NDArray[np.uint16] | None = None) -> Segmentation:
        """Segment one image.

        Parameters
        ----------
        image : (H, W, 3) ndarray of uint8 or uint16, or PixelSource
            An array; of an image of `sparsespec.images.LARGE_IMAGE` pixels or more a source that is read by window.
        out : (H, W) ndarray of uint16, optional
            Given with a source, and only then: zeros, mapped from a file, to be filled with the labels and returned
            as the result's ``labels``.

        Returns
        -------
        Segmentation
            Or an object with ``labels`` (H, W), ``scores`` (n,) and ``info`` (a mapping).
        """
        ...


@dataclass(frozen=True)
class Formats:
    """What to write beside the label images, ``instances.json``, ``run.json`` and ``report.html``.

    Attributes
    ----------
    overlays : bool
        The photograph with outlines, colours and scores, as JPEG.
    cutouts : bool
        Each instance by itself, on a transparent ground, as PNG.
    yolo : bool
        YOLO segmentation labels, a text file for each image.
    polygons : bool
        Outlines instead of run-length encodings in the COCO JSON.
    coco_shards : bool
        One COCO JSON for each shard, in ``instances/``, instead of the one ``instances.json``.
    table : str or None
        ``csv`` or ``parquet``: a table of all instances.
    youtube_vis : bool
        A YouTube-VIS submission: instances linked from frame to frame of each folder.
    video_list : str or None
        JSON file of a data set that has the numbers of its videos, for the submission.
    """

    overlays: bool = True
    cutouts: bool = False
    yolo: bool = False
    polygons: bool = False
    coco_shards: bool = False
    table: TableKind | None = None
    youtube_vis: bool = False
    video_list: str | None = None


@dataclass(frozen=True)
class Item:
    """One input file.

    Attributes
    ----------
    path : str
        Relative to the input, ``/`` between the parts.
    name : str
        Its output name, of `sparsespec.batch.names.output_names`.
    card : bool
        The report shows it: what it needs for that is written.
    """

    path: str
    name: str
    card: bool = True


@dataclass
class Outcome:
    """What one image, or one page of a file with several, contributes to the run.

    Attributes
    ----------
    row : Row
        For the record.
    annotations : list of dict
        For ``instances.json``; of `sparsespec.formats.coco.instance_annotations`.
    properties : list of dict
        For the table, one for each annotation; empty when none is asked for.
    card : str or None
        Under this output name the report shows it.
    files : dict of str to int
        Size in bytes of each file written, by its path relative to the output.
    name : str
        Output name of the input file.
    """

    row: Row
    annotations: list[dict[str, Any]] = field(default_factory=list)
    properties: list[dict[str, Any]] = field(default_factory=list)
    card: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Job:
    """All that a process needs to know to work on images of a run; it can be pickled if the segmenter can.

    Attributes
    ----------
    segmenter : ImageSegmenter
        Does the work.
    source, target : Store
        Where images are read and results go.
    formats : Formats
        What to write.
    max_pixels : int or None
        Largest image to read, see `sparsespec.images.open_image`.
    follow_links : bool
        Read images through links that lead out of the input folder.
    time_limit : float or None
        Seconds for one file; only engines that can stop it heed this.
    """

    segmenter: ImageSegmenter
    source: Store
    target: Store
    formats: Formats = Formats()
    max_pixels: int | None = DEFAULT_MAX_PIXELS
    follow_links: bool = False
    time_limit: float | None = None


class Engine(Protocol):
    """Spreads files over threads or processes.

    ``settings`` is noted in ``run.json``; results never depend on the engine.
    """

    @property
    def settings(self) -> Mapping[str, Any]: ...  # noqa: D102

    def outcomes(
        self,
        job: Job,
        items: Iterable[Item],
        *,
        begin: Callable[[Item], None],
        stopping: threading.Event,
    ) -> Iterator[tuple[Item, list[Outcome]]]:
        """Work on files; yield the outcomes of each as it is finished, in any order.

        Whatever goes wrong with a file is an outcome with the status ``failed``; nothing is raised for it.

        Parameters
        ----------
        job : Job
            What to do.
        items : iterable of Item
            Taken one by one, never many more than are at work.
        begin : callable
            Called, from any thread, just before the work on a file begins.
        stopping : threading.Event
            Once set, no further file is begun, those at work are finished and yielded, and the iteration ends.

        Yields
        ------
        (Item, list of Outcome)
            Closing the iterator gives up what is at work, at once where that is possible.
        """
        ...


@runtime_checkable
class ShardEngine(Protocol):
    """Spreads whole shards over other machines, where `sparsespec.batch.shard.work_shard` does the work."""

    @property
    def settings(self) -> Mapping[str, Any]: ...  # noqa: D102

    def summaries(self, job: Job, tasks: Iterable[ShardTask], *, stopping: threading.Event) -> Iterator[ShardSummary]:
        """Work on shards; yield a summary of each as it is finished, in any order.

        Once `stopping` is set, no further file is begun, and the iteration ends soon. Closing the iterator gives up
        what is at work.
        """
        ...


def failure(item: Item, error: str, reason: str, *, seconds: float = 0.0) -> Outcome:
    """Note that there is no result for a file.

    Parameters
    ----------
    item : Item
        The file.
    error : str
        Why, on one line, and what to do.
    reason : str
        One of `sparsespec.batch.record.REASONS`.
    seconds : float
        Spent on it.
    """
    row = Row(path=item.path, status="failed", error=error, reason=reason, seconds={"total": round(seconds, 6)})
    return Outcome(row, name=item.name)


@contextmanager
def closed(values: Iterator[_T]) -> Iterator[Iterator[_T]]:
    """Close an iterator after a block, if it can be closed."""
    try:
        yield values
    finally:
        close = getattr(values, "close", None)
        if close is not None:
            close()


def in_order(path: str) -> list[str]:
    """Sort key of a relative path: part by part, the same on every machine."""
    return path.split("/")
