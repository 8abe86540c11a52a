"""The engine that works through the images in this process, one after the other or several at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import sparsespec
from sparsespec.batch.inputs import Inputs
from sparsespec.batch.job import ImageSegmenter, Outcome
from sparsespec.batch.names import output_names
from sparsespec.batch.one import process_image, remove_results
from sparsespec.batch.outputs import OutputFolder
from sparsespec.batch.record import BatchResult, Row, write_record
from sparsespec.batch.several import InOrder, Room
from sparsespec.formats.coco import CocoWriter
from sparsespec.formats.report import ReportCard, ReportWriter, readable_duration
from sparsespec.images import DEFAULT_MAX_PIXELS

__all__ = ["run_batch"]


def run_batch(
    segmenter: ImageSegmenter,
    inputs: Inputs,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    overlays: bool = True,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    workers: int = 1,
    parameters: Mapping[str, Any] | None = None,
    progress: Callable[[Row, int, int], None] | None = None,
) -> BatchResult:
    """Segment every image and write masks, overlays, ``instances.json``, ``run.json`` and ``report.html``.

    Whatever goes wrong with one image is noted in its row, and the run goes on. After Ctrl-C the files are finished for
    the images done until then; several workers finish what they are at before, a second Ctrl-C gives that up.

    Parameters
    ----------
    segmenter : callable
        Takes an (H, W, 3) image, returns an object with ``labels`` (H, W), ``scores`` (n,) and ``info`` (a mapping).
        An image of at least `sparsespec.images.LARGE_IMAGE` pixels it gets as a source to be read by window, together
        with ``out=``, an (H, W) uint16 array of zeros in a file, to be filled and returned as ``labels``.
    inputs : Inputs
        Of `find_inputs`.
    output : str or os.PathLike
        Folder of the results; it is made if need be.
    overwrite : bool
        Allow a folder that is not empty and replace the results of the run before.
    overlays : bool
        Write overlays. The report has its small pictures either way.
    max_pixels : int or None
        Largest image to read, width x height; see `sparsespec.images.open_image`.
    workers : int
        Images at the same time, each in a thread; files and their order are the same for any number. The segmenter must
        allow calls from so many threads: a `sparsespec.Segmenter` works on as many as its Backbone's ``concurrency``.
        Images of more than `sparsespec.batch.several.PIXELS_AT_ONCE` pixels are worked on alone.
    parameters : mapping, optional
        Noted in ``run.json`` and in the report.
    progress : callable, optional
        Called after each image with its row, its position (from 1) and the number of all.

    Returns
    -------
    BatchResult

    Raises
    ------
    ValueError
        `workers` is less than 1.
    OutputsError
        The output folder cannot be used.
    OSError
        ``run.json``, ``instances.json`` or ``report.html`` cannot be written.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers!r}")
    folder = OutputFolder(Path(output))
    names = output_names(inputs.images)
    folder.prepare(names, overwrite=overwrite)
    parameters = dict(parameters or {})
    started, clock = _now(), time.perf_counter()
    rows = [Row(path=path, error="not reached") for path in inputs.images]
    unlisted = [Row(path=path, status="failed", error=reason) for path, reason in inputs.unlisted]

    def result(*, interrupted: bool = False) -> BatchResult:
        return BatchResult(folder.root, [*unlisted, *rows], time.perf_counter() - clock, interrupted)

    def record(state: str, so_far: BatchResult, finished: str | None = None) -> None:
        write_record(folder.record, so_far, state=state, parameters=parameters, started=started, finished=finished)

    # Should this process be killed, the record says where its files are, so that --overwrite can clear them.
    planned = [replace(row, mask=folder.mask(n), overlay=folder.overlay(n)) for row, n in zip(rows, names, strict=True)]
    record("running", BatchResult(folder.root, [*unlisted, *planned], 0.0))

    total = len(rows) + len(unlisted)
    interrupted = False
    noted: set[int] = set()

    def work(index: int, **options: Any) -> Outcome:
        path, name = inputs.images[index], names[index]
        return process_image(
            segmenter, inputs.root, path, folder, name, overlays=overlays, max_pixels=max_pixels, **options
        )

    def note(index: int, outcome: Outcome) -> None:
        with _interrupts_held():
            noted.add(index)
            rows[index] = outcome.row
            _collect(outcome, index + 1, coco, report)
        if progress is not None:
            progress(outcome.row, len(unlisted) + len(noted), total)

    def remove(index: int, outcome: Outcome) -> None:
        if index not in noted:
            remove_results(folder, outcome.row)

    with ExitStack() as cleanup:
        outcomes: Iterable[tuple[int, Outcome]] = ((index, work(index)) for index in range(len(rows)))
        several = None
        if workers > 1:
            outcomes = several = InOrder(partial(work, admit=Room().admit), len(rows), workers)
            cleanup.callback(several.drop, remove)
        coco = CocoWriter(folder.coco, description="sparsespec instances", version=sparsespec.__version__)
        cleanup.callback(coco.discard)
        report = ReportWriter(folder.report)
        cleanup.callback(report.discard)
        try:
            for position, row in enumerate(unlisted, start=1):
                report.add(ReportCard(name=row.path, status=row.status, error=row.error))
                if progress is not None:
                    progress(row, position, total)
            for index, outcome in outcomes:
                note(index, outcome)
        except KeyboardInterrupt:
            interrupted = True
            if several is not None:
                with suppress(KeyboardInterrupt):
                    for index, outcome in several.rest():
                        if index not in noted:
                            note(index, outcome)
        with _interrupts_held(drop=True):
            for row in rows:
                if row.status == "skipped":
                    report.add(ReportCard(name=row.path, status=row.status, error=row.error))
            coco.close()
            final = result(interrupted=interrupted)
            report.close(totals=_captions(final), parameters=parameters, interrupted=interrupted)
            record("interrupted" if interrupted else "finished", final, _now())
    return final


def _collect(outcome: Outcome, image_id: int, coco: CocoWriter, report: ReportWriter) -> None:
    row = outcome.row
    if row.status == "done" and row.size is not None:
        coco.add(image_id, row.path, row.size[0], row.size[1], outcome.annotations)
    report.add(
        ReportCard(
            name=row.path,
            status=row.status,
            count=row.instances,
            score=max(row.scores, default=None),
            seconds=row.seconds.get("total", 0.0),
            size=row.size,
            thumbnail=outcome.thumbnail,
            overlay=row.overlay,
            mask=row.mask,
            error=row.error,
        )
    )


def _captions(result: BatchResult) -> dict[str, str]:
    done = result.count("done")
    captions = {"Images done": f"{done} of {len(result.rows)}"}
    for status in ("failed", "skipped"):
        if result.count(status):
            captions[status.capitalize()] = str(result.count(status))
    captions["Instances"] = str(result.instances)
    captions["Time"] = readable_duration(result.seconds)
    if done:
        spent = np.mean([row.seconds["total"] for row in result.rows if row.status == "done"])
        captions["Time per image"] = readable_duration(float(spent))
    return captions


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _interrupts_held(*, drop: bool = False) -> Iterator[None]:
    """Let Ctrl-C wait for the end of a block that must not be left half-way."""
    if threading.current_thread() is not threading.main_thread():  # signals never arrive elsewhere
        yield
        return
    held: list[Any] = []
    previous = signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous if previous is not None else signal.default_int_handler)
    if held and not drop and callable(previous):
        previous(*held[-1])
