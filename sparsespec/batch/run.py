"""A run: what is settled already, what an engine is to do, and the files about it all."""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import pairwise
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.batch.assemble import Facts, assemble, now, write_running
from sparsespec.batch.inline import Inline
from sparsespec.batch.inputs import Inputs
from sparsespec.batch.job import Engine, Formats, ImageSegmenter, Item, Job, Outcome, ShardEngine, closed, in_order
from sparsespec.batch.merge import merged
from sparsespec.batch.names import output_names
from sparsespec.batch.outputs import OutputsError, held, prepare, sweep
from sparsespec.batch.plan import (
    DEFAULT_SHARD_SIZE,
    REPORT_CARDS,
    Plan,
    fewest_digests,
    inputs_digest,
    shard_count,
    shard_of,
)
from sparsespec.batch.record import RECORD_NAME, BatchResult, Row, Rows
from sparsespec.batch.shard import ENDED, Shard, ShardTask, blocked_by, gone, is_hopeless, quarantined, remove_stale
from sparsespec.batch.state import State
from sparsespec.batch.store import Store, open_store
from sparsespec.batch.urls import UrlStore
from sparsespec.formats.report import photographs_link
from sparsespec.formats.table import TABLE_KINDS
from sparsespec.formats.youtube_vis import video_ids
from sparsespec.images import DEFAULT_MAX_PIXELS

__all__ = ["run_batch"]

# After a second Ctrl-C the files about all images are written only if that takes no time.
_AT_ONCE = 20_000

Progress = Callable[[Row, int, int], None]


def run_batch(
    segmenter: ImageSegmenter,
    inputs: Inputs,
    output: str | os.PathLike[str] | Store,
    *,
    engine: Engine | ShardEngine | None = None,
    formats: Formats | None = None,
    overwrite: bool = False,
    prune: bool = False,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
    follow_links: bool = False,
    time_limit: float | None = None,
    fail_fast: bool = False,
    retry_quarantined: bool = False,
    shard_size: int = DEFAULT_SHARD_SIZE,
    parameters: Mapping[str, Any] | None = None,
    execution: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    on_stop: Callable[[], None] | None = None,
) -> BatchResult:
    """Segment every image and write masks, overlays, ``instances.json``, ``run.json`` and ``report.html``.

    Whatever goes wrong with one image is noted in its row, and the run goes on. In the output of a run that was ended,
    at whatever moment, the same run goes on where that one stood, and ends with the same files, byte for byte; only
    ``run.json`` has times. Images that failed are then tried again, except those that ended their process or took too
    long; images that changed since are done again.

    After Ctrl-C, or the signal to terminate, images at work are finished, and the files are written for those done
    until then; a second one gives up what is at work.

    Parameters
    ----------
    segmenter : callable
        See `ImageSegmenter`. Engines that use other processes must be able to pickle it.
    inputs : Inputs
        Of `find_inputs`.
    output : str, os.PathLike or Store
        Folder of the results, made if need be; or a store.
    engine : Engine or ShardEngine, optional
        Spreads the work; `sparsespec.batch.Inline()` if not given. Results don't depend on it.
    formats : Formats, optional
        What to write.
    overwrite : bool
        Allow a folder that is not empty and replace the results of the run before, whatever its settings.
    prune : bool
        When images that an earlier run has done are no longer among the inputs, remove their results.
    max_pixels : int or None
        Largest image to read, width x height; see `sparsespec.images.open_image`.
    follow_links : bool
        Read images through links that lead out of the input folder. Otherwise they fail.
    time_limit : float, optional
        Seconds for one file, pages together; only engines with processes can hold anybody to it.
    fail_fast : bool
        End like after Ctrl-C when the first image fails.
    retry_quarantined : bool
        Try files again that ended the process or took too long in an earlier run.
    shard_size : int
        Files noted together, 64 to 512; an output that is gone on with keeps its own.
    parameters : mapping
        What results depend on besides, such as the segmenter's settings. Noted in ``run.json`` and in the report; a
        run with others is not gone on with.
    execution : mapping
        What they don't depend on; noted in ``run.json``.
    progress : callable, optional
        Called after each image with its row, how many files are settled, and the number of all.
    on_stop : callable, optional
        Called after the first Ctrl-C.

    Returns
    -------
    BatchResult

    Raises
    ------
    ValueError
        An argument is out of its range, `inputs` are not in order, or `engine` cannot do what is asked for.
    OutputsError
        The output cannot be used, or holds a run with other settings.
    OSError
        ``run.json``, ``instances.json``, ``report.html`` or the state of the run cannot be written.
    """
    shard_count(1, shard_size)
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit must be above 0 seconds, not {time_limit!r}")
    engine = Inline() if engine is None else engine
    if time_limit is not None and isinstance(engine, Inline):
        raise ValueError("time_limit needs an engine with worker processes: a thread cannot be stopped")
    formats = formats or Formats()
    _check_formats(formats)
    _check_order(inputs.images)
    target = output if isinstance(output, Store) else open_store(output)
    job = Job(
        segmenter,
        inputs.source,
        target,
        formats=formats,
        max_pixels=max_pixels,
        follow_links=follow_links or inputs.named,
        time_limit=time_limit,
    )
    shown = dict(parameters or {})
    settings = {
        **shown,
        "input": _whole(shown.get("input", os.fspath(inputs.root))),
        **vars(job.formats),
        "max_pixels": max_pixels,
        "follow_links": follow_links,
    }
    plan = Plan(settings, inputs_digest(inputs.images), shard_count(len(inputs.images), shard_size))
    how = {**engine.settings, **(execution or {}), **({} if time_limit is None else {"time_limit": time_limit})}
    with held(target):
        names = output_names(inputs.images)
        former = prepare(target, plan, names, overwrite=overwrite)
        facts = Facts(shown, how, now(), _photographs(job))
        run = _Run(job, inputs, names, replace(plan, shards=former.shards), facts, retry_quarantined)
        del names
        if former is not plan:
            run.go_on(former, prune=prune)
        return run.through(engine, fail_fast=fail_fast, progress=progress, on_stop=on_stop)


class _Run:
    """A run whose output is ready."""

    def __init__(
        self, job: Job, inputs: Inputs, names: Sequence[str], plan: Plan, facts: Facts, retry_quarantined: bool
    ) -> None:
        self._job = job
        self._paths = inputs.images
        self._names = names
        self._plan = plan
        self._facts = facts
        self._retry = retry_quarantined
        self._state = State(job.target)
        self._fingerprints: dict[str, str | None] | None = None
        self._unlisted = [
            Row(path=path, status="failed", error=reason, reason="unlisted") for path, reason in inputs.unlisted
        ]
        self._shown = fewest_digests(inputs.images, REPORT_CARDS)
        shards = np.fromiter((shard_of(path, plan.shards) for path in self._paths), np.int64, len(self._paths))
        self._by_shard: npt.NDArray[np.int64] = np.argsort(shards, kind="stable")
        self._starts = np.searchsorted(shards[self._by_shard], np.arange(plan.shards + 1))
        self._total = len(self._paths) + len(self._unlisted)

    def items(self, shard: int) -> list[Item]:
        """Files of a shard, in the order of the inputs."""
        return [
            Item(
                self._paths[index],
                self._names[index],
                card=self._shown is None or self._paths[index] in self._shown,
            )
            for index in self._by_shard[self._starts[shard] : self._starts[shard + 1]].tolist()
        ]

    def shard(self, number: int, items: Sequence[Item]) -> Shard:
        """Take up a shard."""
        return Shard(self._job, number, items, retry_quarantined=self._retry, fingerprints=self._fingerprints)

    def go_on(self, former: Plan, *, prune: bool) -> None:
        """Take up an output that holds this run already."""
        if former.inputs != self._plan.inputs:
            lost = [path for shard in range(self._plan.shards) for path in gone(self._job, shard, self.items(shard))]
            if lost and not prune:
                raise OutputsError(
                    f"{len(lost)} of the images that the output '{self._job.target.place}' has results of are no longer"
                    f" in the input, such as '{lost[0]}': put them back, let their results be removed with --prune"
                    " (prune=True), or choose another output"
                )
        if isinstance(self._job.source, UrlStore):
            # A request a thousand, where to ask for each would be one for each.
            self._fingerprints = {entry.path: entry.fingerprint for entry in self._job.source.entries()}
        with suppress(FileNotFoundError), self._job.target.fetched(RECORD_NAME) as record:
            self._state.restore_times(record, lambda path: shard_of(path, self._plan.shards))
        if former.inputs != self._plan.inputs:
            for shard in range(self._plan.shards):
                remove_stale(self._job, shard, self.items(shard))

    def through(
        self,
        engine: Engine | ShardEngine,
        *,
        fail_fast: bool,
        progress: Progress | None,
        on_stop: Callable[[], None] | None,
    ) -> BatchResult:
        """Do all of it."""
        clock = time.perf_counter()
        self._state.write_plan(self._plan)
        with self._job.target.staged() as folder:
            write_running(folder, self._facts)
            self._job.target.publish(folder, [RECORD_NAME])
        work = _Work(self, self._job, self._unlisted, fail_fast=fail_fast, progress=progress)
        with _Interrupts(work.stopping, on_stop) as interrupts:
            try:
                work.begin()
                if isinstance(engine, ShardEngine):
                    work.by_shards(engine)
                else:
                    work.by_files(engine)
            except KeyboardInterrupt:
                interrupts.count = 2
            ended = "blocked" if work.blocked else "interrupted" if interrupts.count else None
            ended = ended or ("stopped" if work.failed_fast else "finished")
            seconds = time.perf_counter() - clock
            if not isinstance(engine, Inline) or work.left:
                sweep(self._job.target)
            if interrupts.count < 2 or self._total <= _AT_ONCE:
                with _held_interrupts() if self._total <= _AT_ONCE else nullcontext():
                    counts = self._write(ended, seconds)
            else:
                counts = {"images": 0}
        if ended == "finished":
            self._state.drop_times()
        return BatchResult(
            self._job.target.place,
            Rows(self._job.target, counts.get("images", 0)),
            counts,
            seconds,
            earlier=work.earlier,
            interrupted=ended == "interrupted",
            blocked=work.blocked,
            stopped=ended == "stopped",
        )

    def _write(self, ended: str, seconds: float) -> dict[str, int]:
        target = self._job.target
        with target.staged() as folder:
            outcomes = merged(self._state, self._plan.shards, self.items, folder)
            with closed(outcomes):
                counts, paths = assemble(
                    outcomes, self._unlisted, folder, self._job.formats, self._facts, state=ended, seconds=seconds
                )
            # Uploads run side by side; the record, which says that all is there, comes after the others.
            target.publish(folder, paths[:-1])
            target.publish(folder, paths[-1:])
        return counts

    @property
    def shards(self) -> int:
        """Their number."""
        return self._plan.shards

    @property
    def retry(self) -> bool:
        """Try what is in quarantine again."""
        return self._retry

    @property
    def total(self) -> int:
        """How many files there are, folders that could not be listed included."""
        return self._total


class _Work:
    """What has become of the files so far."""

    def __init__(
        self, run: _Run, job: Job, unlisted: Sequence[Row], *, fail_fast: bool, progress: Progress | None
    ) -> None:
        self._run = run
        self._job = job
        self._unlisted = unlisted
        self._fail_fast = fail_fast
        self._progress = progress
        self._shards: dict[int, Shard] = {}
        self._lock = threading.Lock()
        self._settled = 0
        self._guard: Any = None
        self.stopping = threading.Event()
        self.blocked: str | None = None
        self.failed_fast = False
        self.left = False
        self.earlier = 0

    def begin(self) -> None:
        """Tell what could not be listed."""
        for row in self._unlisted:
            self._settled += 1
            self._tell(row)

    def by_files(self, engine: Engine) -> None:
        """Work with an engine that takes files."""
        with ExitStack() as cleanup:
            cleanup.callback(self._close)
            results = engine.outcomes(
                self._job, _Guarded(self._files(isinstance(engine, Inline))), begin=self._begin, stopping=self.stopping
            )
            cleanup.enter_context(closed(results))
            cleanup.callback(self.stopping.set)  # threads that are about to begin another file are not to
            for item, outcomes in results:
                with _held_interrupts():
                    self._note(item, outcomes)

    def by_shards(self, engine: ShardEngine) -> None:
        """Work with an engine that takes shards."""
        settled: dict[int, int] = {}

        def tasks() -> Iterator[ShardTask]:
            for number in range(self._run.shards):
                items = self._run.items(number)
                shard = self._run.shard(number, items)
                self._skip(shard)
                if not shard.pending:
                    shard.finish()
                    continue
                settled[number] = shard.settled
                redo = frozenset(shard.outdated)
                yield ShardTask(number, tuple(items), retry_quarantined=self._run.retry, redo=redo)

        with closed(engine.summaries(self._job, _Guarded(tasks()), stopping=self.stopping)) as results:
            for summary in results:
                # Files with several pages have several rows, and those of an attempt that was lost have none.
                self._settled += max(0, summary.files - settled.get(summary.number, 0))
                settled[summary.number] = max(summary.files, settled.get(summary.number, 0))
                for path, status, error, instances in summary.rows:
                    self.left |= status == "failed"
                    self._tell(Row(path=path, status=status, error=error, instances=instances))
                if summary.blocked is not None:
                    self.blocked = summary.blocked
                    self.stopping.set()

    def _files(self, inline: bool) -> Iterator[Item]:
        """Give the files to work on, shard by shard."""
        for number in range(self._run.shards):
            shard = self._run.shard(number, self._run.items(number))
            self._skip(shard)
            if not shard.pending:
                shard.finish()
                continue
            self._shards[number] = shard
            for item in shard.pending.copy():
                deaths = shard.suspects.get(item.path, 0)
                if deaths and inline:
                    if self._is_done_guarded(item):
                        continue
                    if is_hopeless(deaths):
                        self._note(item, [quarantined(item)])
                        continue
                yield item

    def _skip(self, shard: Shard) -> None:
        with self._lock:
            self._settled += shard.settled
        self.earlier += shard.settled

    def _cannot_be_guarded(self) -> bool:
        if self._guard is None:
            from sparsespec.batch.processes import Processes

            try:
                pickle.dumps(self._job.segmenter)
                self._guard = Processes(workers=1)
            except Exception:
                self._guard = False
        return self._guard is False

    def _is_done_guarded(self, item: Item) -> bool:
        """Work on a file in another process, if that is possible.

        It was at work when an earlier run died. Should it be why, this process is to survive it.
        """
        if self._cannot_be_guarded():
            return False
        from sparsespec.batch.processes import WorkerError

        try:
            with closed(
                self._guard.outcomes(self._job, [item], begin=self._begin, stopping=threading.Event())
            ) as found:
                results = list(found)
        except WorkerError:  # such as of a segmenter of the main program: then as before, three deaths are the limit
            self._guard = False
            return False
        with _held_interrupts():
            for done, outcomes in results:
                self._note(done, outcomes)
        return bool(results)

    def _shard(self, item: Item) -> Shard:
        return self._shards[shard_of(item.path, self._run.shards)]

    def _begin(self, item: Item) -> None:
        self._shard(item).begin(item)

    def _note(self, item: Item, outcomes: list[Outcome]) -> None:
        blocked = blocked_by(outcomes)
        if blocked is not None:
            self.blocked = blocked
            self.stopping.set()
            return
        shard = self._shard(item)
        shard.settle(item, outcomes)
        with self._lock:
            self._settled += 1
        if shard.complete:
            shard.finish()
            del self._shards[shard.number]
        for outcome in outcomes:
            self._tell(outcome.row)

    def _tell(self, row: Row) -> None:
        if row.reason in ENDED:
            self.left = True
        if row.status == "failed" and self._fail_fast:
            self.failed_fast = True
            self.stopping.set()
        if self._progress is not None:
            self._progress(row, self._settled, self._run.total)

    def _close(self) -> None:
        for shard in list(self._shards.values()):
            with suppress(OSError):  # the disk may be full
                shard.close()
        if self._guard:
            self._guard.close()


class _Guarded(Iterator[Any]):
    """Lets several threads take from one generator."""

    def __init__(self, values: Iterator[Any]) -> None:
        self._values = values
        self._lock = threading.Lock()

    def __next__(self) -> Any:
        with self._lock:
            return next(self._values)


class _Interrupts:
    """Count Ctrl-C and the signal to terminate: the first sets an event, the second raises KeyboardInterrupt."""

    def __init__(self, stopping: threading.Event, on_stop: Callable[[], None] | None) -> None:
        self._stopping = stopping
        self._on_stop = on_stop
        self._former: dict[int, Any] = {}
        self.count = 0

    def __enter__(self) -> _Interrupts:
        # Signals never arrive elsewhere, and a handler of the program that runs this is left alone.
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) is default:
                    self._former[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self._stopping.set()
        if self.count > 1:
            raise KeyboardInterrupt
        if self._on_stop is not None:
            self._on_stop()


@contextmanager
def _held_interrupts() -> Iterator[None]:
    """Let signals wait for the end of a block that must not be left half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[Any, Any, Any]] = []
    former = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):
            former[number] = handler
            signal.signal(number, lambda *arguments, handler=handler: held.append((handler, *arguments)))
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    for handler, *arguments in held:
        handler(*arguments)


def _photographs(job: Job) -> str | None:
    if job.source.folder is None or job.target.folder is None:
        return None
    return photographs_link(job.source.folder, job.target.folder)


def _check_formats(formats: Formats) -> None:
    """See what is wrong with the formats before the first image."""
    if formats.table == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError("a Parquet table needs pyarrow: pip install 'sparsespec[table]'")
    if formats.table is not None and formats.table not in TABLE_KINDS:
        raise ValueError(f"table must be one of {', '.join(TABLE_KINDS)}, not {formats.table!r}")
    if formats.video_list is not None:
        video_ids(formats.video_list)


def _check_order(images: Sequence[str]) -> None:
    """See that records of shards can be merged in the order of the inputs."""
    for (before, key_before), (path, key) in pairwise((path, in_order(path)) for path in images):
        if key_before >= key:
            raise ValueError(
                f"inputs must be sorted part by part, and all different, as find_inputs gives them; {before!r} stands"
                f" before {path!r}"
            )


def _whole(place: Any) -> str:
    text = os.fspath(place)
    return text if "://" in text else os.path.abspath(text)
