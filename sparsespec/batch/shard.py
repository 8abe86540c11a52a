"""One shard of a run: what of it is settled, what is still to do, and its record in the end."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import sparsespec
from sparsespec.batch.job import Engine, Item, Job, Outcome, closed, failure, in_order
from sparsespec.batch.journal import Journal
from sparsespec.batch.outputs import card_files, coco_file, planned_files, remove_outputs
from sparsespec.batch.state import State
from sparsespec.formats.coco import CocoWriter

__all__ = ["Shard", "ShardSummary", "ShardTask", "work_shard"]

QUARANTINE = ("crash", "timeout")
"""Reasons for which a file is not tried again unless that is asked for."""

ENDED = (*QUARANTINE, "memory")
"""Reasons for which a process may have left files behind."""

_IDS_A_SHARD = 1_000_000
_MOST_DEATHS = 3


@dataclass(frozen=True)
class ShardTask:
    """A shard to work on, for another process.

    Attributes
    ----------
    number : int
        Of the shard.
    items : tuple of Item
        All its files.
    only : frozenset of str or None
        Work on these paths only, and leave the shard unfinished; None: on all.
    quarantined : tuple of str
        Paths that ended the processes that worked on them: they are not tried.
    retry_quarantined : bool
        Try files again that an earlier run has put into quarantine.
    redo : frozenset of str
        Paths of files to work on again whatever is known of them.
    """

    number: int
    items: tuple[Item, ...]
    only: frozenset[str] | None = None
    quarantined: tuple[str, ...] = ()
    retry_quarantined: bool = False
    redo: frozenset[str] = frozenset()


@dataclass
class ShardSummary:
    """What became of a shard, as far as those who wait for it need to know.

    Attributes
    ----------
    number : int
        Of the shard.
    rows : list of (str, str, str or None, int)
        Path, status, error and instances of each image that was worked on.
    files : int
        How many files of the shard are settled now.
    stopped : bool
        Given up before its end.
    blocked : str or None
        Results cannot be written any more, and why.
    """

    number: int
    rows: list[tuple[str, str, str | None, int]] = field(default_factory=list)
    files: int = 0
    stopped: bool = False
    blocked: str | None = None


class Shard:
    """A shard that this process works on.

    Parameters
    ----------
    job : Job
        What to do.
    number : int
        Of the shard.
    items : sequence of Item
        Its files.
    retry_quarantined : bool
        Try files again that an earlier run has put into quarantine.
    redo : collection of str
        Paths of files to work on again whatever is known of them.
    fingerprints : mapping of str to str or None, optional
        State of the input files behind a URL, by path; otherwise it is not looked at.

    Attributes
    ----------
    pending : list of Item
        Files still to be worked on.
    outdated : list of str
        Paths among them that were settled before.
    suspects : dict of str to int
        By path: how many runs died while they were at work on a file.
    """

    def __init__(
        self,
        job: Job,
        number: int,
        items: Sequence[Item],
        *,
        retry_quarantined: bool = False,
        redo: Collection[str] = (),
        fingerprints: Mapping[str, str | None] | None = None,
    ) -> None:
        self._job = job
        self._fingerprints = fingerprints
        self._state = State(job.target)
        self._number = number
        self._journal: Journal | None = None
        self._lock = threading.Lock()
        past, finished = self._state.past(number)
        self._journals = past.sources
        self._settled: dict[str, list[Outcome]] = {}
        self._files = len(items)
        self._former: dict[str, set[str]] = {}
        self.pending: list[Item] = []
        self.outdated: list[str] = []
        for item in items:
            outcomes = past.settled.get(item.path)
            if outcomes and item.path not in redo and self._stands(item, outcomes, retry_quarantined=retry_quarantined):
                self._settled[item.path] = outcomes
            else:
                self.pending.append(item)
                self._former[item.path] = {path for outcome in outcomes or () for path in outcome.files}
                if outcomes is not None:
                    self.outdated.append(item.path)
        # Nobody has noted what was written of these.
        self._unknown = {item.path for item in self.pending if item.path in past.names}
        self.suspects = {item.path: past.begun[item.path] for item in self.pending if item.path in past.begun}
        self._stale = bool(self._journals) or not finished or self._settled.keys() != past.settled.keys()
        if job.formats.coco_shards and not self._stale:
            self._stale = job.target.size(coco_file(number)) is None

    @property
    def number(self) -> int:
        """Which shard it is."""
        return self._number

    @property
    def complete(self) -> bool:
        """Whether all files are settled."""
        return len(self._settled) == self._files

    @property
    def settled(self) -> int:
        """How many files are settled."""
        return len(self._settled)

    def begin(self, item: Item) -> None:
        """Note that the work on a file begins."""
        self._open_journal().begin(item)

    def settle(self, item: Item, outcomes: list[Outcome]) -> None:
        """Note what became of a file."""
        former = self._former.pop(item.path, set())
        if outcomes[0].row.reason in ENDED or item.path in self._unknown:
            former.update(planned_files(self._job.target, item))
        # Of an image that has changed, or now fails, there may have been more files.
        former.difference_update(*(outcome.files for outcome in outcomes))
        remove_outputs(self._job.target, former, item=item)
        for outcome in outcomes:
            if outcome.row.fingerprint is None:
                outcome.row.fingerprint = self._fingerprint(item)
        self._open_journal().settle(item.path, outcomes)
        self._settled[item.path] = outcomes

    def finish(self) -> None:
        """Write the record, when all files are settled."""
        self.close()
        if not self._stale:
            return
        if self._job.formats.coco_shards:
            self._write_coco()
        journals = list(self._journals)
        if self._journal is not None:
            journals += self._journal.sources
        self._state.finish(self._number, self._settled, journals)
        self._stale = False

    def close(self) -> None:
        """Note that this process ends its work here by itself."""
        if self._journal is not None:
            self._journal.close()

    def _open_journal(self) -> Journal:
        with self._lock:
            if self._journal is None:
                self._journal = self._state.journal(self._number)
                self._stale = True
            return self._journal

    def _stands(self, item: Item, outcomes: list[Outcome], *, retry_quarantined: bool) -> bool:
        """Tell whether what an earlier run says of a file still holds."""
        recorded = outcomes[0].row.fingerprint
        now = self._fingerprint(item)
        # Of a file on a disk it is always known, unless the times of the run before are lost.
        unknown = self._job.source.folder is None and (recorded is None or now is None)
        if not unknown and recorded != now:
            return False
        for outcome in outcomes:
            if outcome.name != item.name:
                return False
            if outcome.row.status == "done" and item.card and outcome.card is None:
                return False
            if outcome.row.status != "done":
                if retry_quarantined or outcome.row.reason not in QUARANTINE:
                    return False
            # Objects that a server has taken are there; to ask for each would cost as much as many an image.
            elif self._job.target.folder is not None and any(
                self._job.target.size(path) != size for path, size in outcome.files.items()
            ):
                return False
        return True

    def _fingerprint(self, item: Item) -> str | None:
        if self._job.source.folder is not None:
            return self._job.source.fingerprint(item.path)
        return None if self._fingerprints is None else self._fingerprints.get(item.path)

    def _write_coco(self) -> None:
        path = coco_file(self._number)
        with self._job.target.staged() as folder:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            writer = CocoWriter(
                folder / path,
                description="sparsespec instances",
                version=sparsespec.__version__,
                polygons=self._job.formats.polygons,
                first_annotation=self._number * _IDS_A_SHARD + 1,
            )
            with ExitStack() as stack:
                stack.callback(writer.discard)
                image_id = self._number * _IDS_A_SHARD
                for name in sorted(self._settled, key=in_order):
                    for outcome in self._settled[name]:
                        image_id += 1
                        row = outcome.row
                        if row.status == "done" and row.size is not None:
                            writer.add(image_id, row.path, *row.size, outcome.annotations, page=row.page)
                writer.close()
            self._job.target.publish(folder, [path])


def work_shard(job: Job, task: ShardTask, engine: Engine, *, stopping: threading.Event | None = None) -> ShardSummary:
    """Work on what is not settled yet of a shard, and write its record. To do it again, or twice at once, is harmless.

    Parameters
    ----------
    job : Job
        What to do.
    task : ShardTask
        With which files.
    engine : Engine
        Does the work.
    stopping : threading.Event, optional
        Once set, no further file is begun.

    Returns
    -------
    ShardSummary

    Raises
    ------
    OSError
        The state cannot be read or written.
    """
    shard = Shard(job, task.number, task.items, retry_quarantined=task.retry_quarantined, redo=task.redo)
    stopping = stopping or threading.Event()
    summary = ShardSummary(task.number)

    def settle(item: Item, outcomes: list[Outcome]) -> None:
        shard.settle(item, outcomes)
        for outcome in outcomes:
            row = outcome.row
            summary.rows.append((row.path, row.status, row.error, row.instances))

    try:
        todo = [item for item in shard.pending if task.only is None or item.path in task.only]
        for item in [item for item in todo if item.path in task.quarantined]:
            settle(item, [quarantined(item)])
        items: Iterator[Item] = (item for item in todo if item.path not in task.quarantined)
        with closed(engine.outcomes(job, items, begin=shard.begin, stopping=stopping)) as results:
            for item, outcomes in results:
                summary.blocked = blocked_by(outcomes)
                if summary.blocked is not None:
                    break
                settle(item, outcomes)
        summary.files = shard.settled
        if shard.complete:
            shard.finish()
        else:
            summary.stopped = task.only is None
    finally:
        shard.close()
    return summary


def quarantined(item: Item) -> Outcome:
    """Note that a file has ended every process that worked on it."""
    return failure(
        item,
        "it ended the process that worked on it, each time it was tried; the file is quarantined: look at it by"
        " itself, and try it again with --retry-quarantined",
        "crash",
    )


def blocked_by(outcomes: Sequence[Outcome]) -> str | None:
    """Say why results cannot be written any more: then the run ends, and this file is to be done again."""
    return next((outcome.row.error for outcome in outcomes if outcome.row.reason == "output"), None)


def is_hopeless(deaths: int) -> bool:
    """Tell whether a file was at work in so many runs that died that it is to be quarantined without another try."""
    return deaths >= _MOST_DEATHS


def gone(job: Job, number: int, items: Sequence[Item]) -> list[str]:
    """List the images of a shard that an earlier run has results of, and that are no longer among the inputs."""
    past, _ = State(job.target).past(number)
    known = {item.path for item in items}
    return [
        path
        for path, outcomes in past.settled.items()
        if path not in known and any(outcome.row.status == "done" for outcome in outcomes)
    ]


def remove_stale(job: Job, number: int, items: Sequence[Item]) -> None:
    """Remove the files of images that are no longer among the inputs, or have another output name now.

    Of those that the report no longer shows, it removes what was written for that.
    """
    state = State(job.target)
    past, _ = state.past(number)
    names = {item.path: item.name for item in items}
    stale = {path for path, outcomes in past.settled.items() if names.get(path) != outcomes[0].name}
    for path in stale:
        for outcome in past.settled[path]:
            remove_outputs(job.target, outcome.files)
    begun = {path: name for path, name in past.names.items() if names.get(path) != name}
    for path, name in begun.items():
        remove_outputs(job.target, planned_files(job.target, Item(path, name)))
    hidden = False
    cards = {item.path for item in items if item.card}
    for path in past.settled.keys() - stale - cards:
        for outcome in past.settled[path]:
            if outcome.card is not None:
                files = card_files(outcome.card)
                remove_outputs(job.target, files)
                outcome.files = {file: size for file, size in outcome.files.items() if file not in files}
                outcome.card, hidden = None, True
    if stale or begun or hidden:
        if job.formats.coco_shards:
            # Written anew with the shard. What a journal says, the file may not, and after this there is no journal.
            job.target.remove(coco_file(number))
        # Their names may be those of other images soon: nobody is to remove them once more.
        state.finish(number, {path: past.settled[path] for path in past.settled.keys() - stale}, past.sources)
