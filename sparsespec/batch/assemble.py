"""The files about all images together, written at the end of a run as streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sparsespec
from sparsespec._atomic import write_atomic
from sparsespec.batch.job import Formats, Outcome
from sparsespec.batch.record import RECORD_NAME, RecordWriter, Row
from sparsespec.formats.coco import CocoWriter
from sparsespec.formats.report import RUN_SCRIPT, ReportRow, ReportWriter
from sparsespec.formats.table import TableWriter
from sparsespec.formats.yolo import yolo_dataset_yaml
from sparsespec.formats.youtube_vis import YouTubeVisWriter, video_ids

__all__ = ["Facts", "assemble", "now", "write_running"]


@dataclass(frozen=True)
class Facts:
    """What is written about a run besides its images.

    Attributes
    ----------
    parameters : mapping
        What results depend on; goes into the report too.
    execution : mapping
        What they don't depend on.
    started : str
        ISO 8601.
    photographs : str or None
        Where the report finds the images, of `sparsespec.formats.report.photographs_link`.
    """

    parameters: Mapping[str, Any]
    execution: Mapping[str, Any]
    started: str
    photographs: str | None = None


def now() -> str:
    """Give the time in ISO 8601, with the offset to UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_running(folder: Path, facts: Facts) -> None:
    """Write a ``run.json`` without images, by which the output is known for what it is while the run goes on."""
    record = RecordWriter(folder / RECORD_NAME)
    try:
        record.close(
            state="running",
            parameters=facts.parameters,
            execution=facts.execution,
            started=facts.started,
            finished=None,
            seconds=0.0,
        )
    finally:
        record.discard()


def assemble(
    outcomes: Iterable[Outcome],
    unlisted: Iterable[Row],
    folder: Path,
    formats: Formats,
    facts: Facts,
    *,
    state: str,
    seconds: float,
) -> tuple[dict[str, int], list[str]]:
    """Write ``instances.json``, ``report.html`` and its script, whatever else is asked for, and ``run.json``.

    Parameters
    ----------
    outcomes : iterable of Outcome
        In the order of the inputs.
    unlisted : iterable of Row
        What could not even be listed.
    folder : Path
        Where to write.
    formats : Formats
        What to write.
    facts : Facts
        About the run.
    state, seconds
        See `RecordWriter.close`.

    Returns
    -------
    counts : dict of str to int
        As in `BatchResult`.
    paths : list of str
        Files written, relative to `folder`; ``run.json`` last.

    Raises
    ------
    ImportError
        The table needs a package that is missing.
    OSError
        Something cannot be written. Each file of before is replaced in one step, or left as it is.
    """
    written: list[str] = []
    with ExitStack() as cleanup:
        record = RecordWriter(folder / RECORD_NAME)
        cleanup.callback(record.discard)
        report = ReportWriter(folder / "report.html")
        cleanup.callback(report.discard)
        coco = None
        if not formats.coco_shards:
            coco = CocoWriter(
                folder / "instances.json",
                description="sparsespec instances",
                version=sparsespec.__version__,
                polygons=formats.polygons,
            )
            cleanup.callback(coco.discard)
        table = videos = None
        if formats.table is not None:
            name = f"instances.{formats.table}"
            table = TableWriter(folder / name, formats.table)
            cleanup.callback(table.discard)
        if formats.youtube_vis:
            ids = None if formats.video_list is None else video_ids(formats.video_list)
            videos = _Videos(YouTubeVisWriter(folder / "youtube_vis.json", ids=ids))
            cleanup.callback(videos.writer.discard)
        for row in unlisted:
            record.add(row)
            report.add(ReportRow(row.path, row.status, error=row.error))
        for image_id, outcome in enumerate(outcomes, start=1):
            row = outcome.row
            record.add(row)
            if row.status == "done" and row.size is not None and coco is not None:
                coco.add(image_id, row.path, row.size[0], row.size[1], outcome.annotations, page=row.page)
            report.add(_report_row(outcome))
            if row.status == "done" and row.size is not None and table is not None:
                about = (row.path, row.page, *row.size)
                table.add(image_id, *about, outcome.annotations, outcome.properties, row.mask)
            if videos is not None:
                videos.add(outcome)
        if coco is not None:
            coco.close()
            written.append("instances.json")
        if table is not None:
            table.close()
            written.append(name)
        if videos is not None:
            videos.writer.close()
            written += ["youtube_vis.json", "youtube_vis.videos.json"]
        if formats.yolo:
            (folder / "yolo").mkdir(exist_ok=True)
            write_atomic(folder / "yolo" / "data.yaml", yolo_dataset_yaml().encode())
            written.append("yolo/data.yaml")
        finished = now()
        report.close(
            totals=_captions(record.counts),
            parameters=facts.parameters,
            interrupted=state != "finished",
            photographs=facts.photographs,
            finished=finished,
        )
        written += [RUN_SCRIPT, "report.html"]
        record.close(
            state=state,
            parameters=facts.parameters,
            execution=facts.execution,
            started=facts.started,
            finished=finished,
            seconds=seconds,
        )
        written.append(RECORD_NAME)
    return dict(record.counts), written


class _Videos:
    """Tells which images are frames of one video: those of a folder, or the pages of a file."""

    def __init__(self, writer: YouTubeVisWriter) -> None:
        self.writer = writer
        self._parts: Counter[str] = Counter()
        self._folder: str | None = None

    def add(self, outcome: Outcome) -> None:
        row = outcome.row
        folder, _, frame = row.path.rpartition("/")
        if row.page is not None:
            folder, frame = row.path, f"page {row.page}"
        if folder != self._folder:
            self._folder = folder
            self._parts[folder] += 1
        # In the order of the inputs folders stand between the files of the folder around them.
        part = self._parts[folder]
        name = (folder or ".") if part == 1 else f"{folder or '.'} ({part})"
        done = row.status == "done" and row.size is not None
        width, height = row.size if done and row.size is not None else (0, 0)
        self.writer.add(name, frame, width, height, outcome.annotations if done else [])


def _report_row(outcome: Outcome) -> ReportRow:
    row = outcome.row
    area = None
    if row.status == "done" and row.size is not None:
        area = sum(annotation["area"] for annotation in outcome.annotations) / (row.size[0] * row.size[1])
    return ReportRow(
        row.path,
        row.status,
        page=row.page,
        instances=row.instances,
        score=max(row.scores, default=None),
        area=area,
        size=row.size,
        name=outcome.card,
        overlay=row.overlay,
        mask=row.mask,
        error=row.error,
        seconds=row.seconds,
    )


def _captions(counts: Mapping[str, int]) -> dict[str, str]:
    captions = {"Images done": f"{counts.get('done', 0)} of {counts.get('images', 0)}"}
    for status in ("failed", "skipped"):
        if counts.get(status):
            captions[status.capitalize()] = str(counts[status])
    captions["Instances"] = str(counts.get("instances", 0))
    return captions
