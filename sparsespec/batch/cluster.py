"""The engine that spreads shards over the processes of a cluster, by dask.distributed.

Scheduler and workers are those of Dask; a task is a whole shard, which the worker works on and records by itself. What
travels is the list of a shard's files in one direction and what became of them in the other, so that the scheduler has
one small task for hundreds of images. Tasks may run twice: whatever is settled is passed over, and the rest gives the
same bytes again.
"""

from __future__ import annotations

import asyncio
import heapq
import importlib.metadata
import logging
import pickle
import re
import secrets
import shutil
import tempfile
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar

import sparsespec
from sparsespec._checks import check_count
from sparsespec._threads import available_cpus
from sparsespec.batch import cluster_worker
from sparsespec.batch.cluster_worker import Probe, Ticket
from sparsespec.batch.job import Job
from sparsespec.batch.outputs import sweep
from sparsespec.batch.state import STATE, State

if TYPE_CHECKING:
    from sparsespec.batch.shard import ShardSummary, ShardTask

__all__ = ["Cluster", "ClusterError"]

_ADDRESS = re.compile(r"(tcp|tls|ws|wss)://[^\s/]+:\d{1,5}")
# Tasks ready beside those at work, for each of these. A task takes minutes: a few make up for the time that it takes to
# send the next; each costs memory in the scheduler. Also without any worker: an adaptive cluster sees them, and starts
# some.
_SHARE_READY = 0.25
_FEWEST_READY = 4
_MOST_LOCAL_WORKERS = 4
# Seconds: Ctrl-C is not heeded on Windows while a lock is waited for.
_LISTENING = 0.2
_LOOKING = 1.0
"""Seconds from one look at the workers to the next."""
_ANSWER = 10.0
"""Seconds that the scheduler may take to answer."""
_SILENCE = 30.0
"""Seconds without an answer after which it is given up."""
_CHECKING = 120.0
"""Seconds for a new worker to import the package and show what it sees."""
_CLOSING = 10.0
_TELLING = 3.0
_PAUSED = 600.0
"""Seconds that all workers may stand still for want of memory."""
_STOPPING = 120.0
"""Seconds beyond the time limit of a file that are waited for those at work when a run is stopped."""
_DEFAULT_FILE = 600.0
_ROUNDS = 3
_LOGGERS = ("distributed", "distributed.client", "tornado.application", "asyncio")
_INSTALL = f"run \"pip install 'sparsespec[dask]=={sparsespec.__version__}'\" in the environment of every worker"
_GOES_ON = "nothing that was finished is lost: the same command goes on from there"


class ClusterError(RuntimeError):
    """The cluster can't be used, or has failed in the middle; the message says what to do."""


class Cluster:
    """Works through the shards of a run on the workers of a Dask cluster.

    Every task of a worker keeps a process of its own for the images, see `sparsespec.batch.processes.Processes`, so
    that a file that crashes or never ends takes neither the worker nor its shard with it. A shard whose worker is lost
    is done again by another. One that has cost too many workers is halved until the file is alone that does it, which
    is then given up.

    Parameters
    ----------
    scheduler : str, optional
        Address of a running scheduler, such as ``tcp://10.0.0.5:8786``. Without one, a cluster of processes is started
        on this machine, and ended with the run.
    workers : int, optional
        Processes of the cluster on this machine; not with a scheduler, whose workers are started by themselves. The
        default is one for each processor granted to this process, four at most.
    threads : int, optional
        Of each process that works on images. By default the processors of a machine, shared evenly by all tasks that
        it may be given at once. Never more than the processors.
    retries : int
        How often a shard is tried again that could not be worked on, as when a disk doesn't answer; after 1, 4, 16 and
        so on seconds.
    connect_limit : float
        Seconds that the scheduler may take to answer at first.
    window : int, optional
        Tasks that the scheduler holds beside those at work, ready for the workers; the default is one for four threads,
        four at least.
    worker_limit : float
        Seconds without any worker after which the run ends.

    Raises
    ------
    ValueError
        A number out of range, an address that is none, or `workers` with a scheduler.
    """

    # What the benchmark of the scheduler replaces by nothing.
    _work: ClassVar[Callable[..., tuple[str, Any]]] = staticmethod(cluster_worker.work)

    def __init__(
        self,
        scheduler: str | None = None,
        *,
        workers: int | None = None,
        threads: int | None = None,
        retries: int = 3,
        connect_limit: float = 10.0,
        window: int | None = None,
        worker_limit: float = 60.0,
    ) -> None:
        if scheduler is not None and not _ADDRESS.fullmatch(scheduler):
            raise ValueError(f"scheduler must be an address such as 'tcp://10.0.0.5:8786', not {scheduler!r}")
        if scheduler is not None and workers is not None:
            raise ValueError("workers are those of the scheduler: give one of the two")
        for name, value in (("connect_limit", connect_limit), ("worker_limit", worker_limit)):
            if not value > 0:
                raise ValueError(f"{name} must be a number of seconds above 0, not {value!r}")
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries must be a whole number from 0 on, not {retries!r}")
        self._scheduler = scheduler
        if scheduler is None:
            workers = (
                min(_MOST_LOCAL_WORKERS, available_cpus()) if workers is None else check_count(workers, name="workers")
            )
        self._workers = workers
        self._threads = None if threads is None else check_count(threads, name="threads")
        self._retries = retries
        self._connect_limit = float(connect_limit)
        self._window = None if window is None else check_count(window, name="window")
        self._worker_limit = float(worker_limit)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is noted in ``run.json``."""
        return {
            "engine": "dask",
            "scheduler": self._scheduler,
            "workers": self._workers,
            "threads": self._threads,
            "retries": self._retries,
            "window": self._window,
        }

    def summaries(self, job: Job, tasks: Iterable[ShardTask], *, stopping: threading.Event) -> Iterator[ShardSummary]:
        """Work on shards; yield the summary of each as it is finished, in any order.

        Parameters
        ----------
        job : Job
            What to do with each file.
        tasks : iterable of ShardTask
            Taken one by one, never many more than are at work.
        stopping : threading.Event
            Once set, no further shard is begun, the files at work are finished, and the iteration ends.

        Yields
        ------
        ShardSummary
            Closing the iterator gives up what is at work; workers finish the file in hand by themselves.

        Raises
        ------
        ClusterError
            The scheduler doesn't answer or is lost, it has no workers, they have another version of the package,
            another model or none, or don't see the same files; or a shard could not be worked on.
        ImportError
            Without distributed.
        TypeError
            The segmenter can't be sent to other processes.
        """
        _import_distributed()
        packed = cluster_worker.pack(job)
        with ExitStack() as cleanup:
            cleanup.enter_context(_quiet())
            client = cleanup.enter_context(self._connected())
            run = _Run(
                client,
                job,
                packed,
                iter(tasks),
                stopping,
                scheduler=self._scheduler,
                threads=self._threads,
                retries=self._retries,
                window=self._window,
                worker_limit=self._worker_limit,
                work=self._work,
            )
            cleanup.callback(run.close)
            yield from run.summaries()

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        from distributed import Client

        with ExitStack() as cleanup:
            address: Any = self._scheduler
            if address is None:
                address = cleanup.enter_context(self._local())
            try:
                with _no_warnings():
                    if self._scheduler is not None:
                        _knock(self._scheduler, self._connect_limit)
                    client = Client(address, timeout=self._connect_limit, set_as_default=False, name="sparsespec")
            except (OSError, TimeoutError) as error:
                raise ClusterError(
                    f"the scheduler {self._scheduler} doesn't answer within {self._connect_limit:g} seconds"
                    f"{_because(error)}: check that 'dask scheduler' runs there, the address it printed when it"
                    " started, and that this machine is let through to it"
                ) from error
            except Exception as error:
                hint = (
                    "; for tls:// the certificates are those of the configuration of Dask, distributed.comm.tls"
                    if str(self._scheduler).startswith("tls")
                    else ""
                )
                raise ClusterError(
                    f"the scheduler {self._scheduler or 'of this machine'} can't be used"
                    f" ({type(error).__name__}: {_line(error)}): it must run a version of distributed that goes with"
                    f" the one here{hint}"
                ) from error
            cleanup.callback(_closed, client)
            yield client

    @contextmanager
    def _local(self) -> Iterator[Any]:
        import dask
        from distributed import LocalCluster

        folder = tempfile.mkdtemp(prefix="sparsespec-dask-")
        settings = {"distributed.scheduler.allowed-failures": 1, "temporary-directory": folder}
        cluster = None
        try:
            with _no_warnings(), dask.config.set(settings):
                cluster = LocalCluster(
                    n_workers=self._workers,
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    # No dashboard, and the port that remains is a free one of this machine alone.
                    dashboard_address="127.0.0.1:0",
                    worker_dashboard_address=None,
                    memory_limit=None,
                    local_directory=folder,
                    silence_logs=logging.CRITICAL,
                )
            yield cluster
        except (OSError, TimeoutError) as error:
            if cluster is not None:
                raise
            raise ClusterError(f"a cluster can't be started on this machine: {_line(error)}") from error
        finally:
            if cluster is not None:
                _closed(cluster)
            shutil.rmtree(folder, ignore_errors=True)


class _Call:
    """Unpickled, it is the value of a function."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


@dataclass
class _Piece:
    """A task as the scheduler gets it.

    Attributes
    ----------
    number : int
        Of the shard.
    whole : bool
        All of it, not some files of one that has cost workers.
    packed : bytes
        The ShardTask, pickled and compressed: there may be thousands at a time, with hundreds of names each.
    attempts : int
        How often it was tried again for other reasons.
    suspect : bool
        It was there when too many workers died.
    """

    number: int
    whole: bool
    packed: bytes
    attempts: int = 0
    suspect: bool = False

    @classmethod
    def of(cls, task: ShardTask, *, suspect: bool = False) -> _Piece:
        """Pack a task."""
        return cls(task.number, task.only is None, cluster_worker.pack_task(task), suspect=suspect)


@dataclass
class _Checked:
    """What came of a look at workers: None, or why one can't take part; those that didn't answer are missing."""

    workers: list[str]
    found: dict[str, str | None]
    error: Exception | None = None


@dataclass
class _Broken:
    """A shard that has cost too many workers.

    Attributes
    ----------
    task : ShardTask
        The whole of it.
    rounds : int
        How often it was taken apart.
    open : int
        Parts that are not through yet.
    alone : Counter of str
        How often a file has cost workers while it was alone.
    culprits : set of str
        Files that have done so twice.
    rows : list
        What became of the others so far, as in a ShardSummary.
    """

    task: ShardTask
    rounds: int = 0
    open: int = 0
    alone: Counter[str] = field(default_factory=Counter)
    culprits: set[str] = field(default_factory=set)
    rows: list[tuple[str, str, str | None, int]] = field(default_factory=list)


class _Run:
    """The shards of one run, from the first task to the last summary."""

    def __init__(
        self,
        client: Any,
        job: Job,
        packed: bytes,
        tasks: Iterator[ShardTask],
        stopping: threading.Event,
        *,
        scheduler: str | None,
        threads: int | None,
        retries: int,
        window: int | None,
        worker_limit: float,
        work: Callable[..., tuple[str, Any]],
    ) -> None:
        self._client = client
        self._work = work
        self._job = job
        self._ticket = Ticket(sparsespec.__version__, secrets.token_hex(8), packed)
        self._tasks = tasks
        self._exhausted = False
        self._stopping = stopping
        self._scheduler = scheduler
        self._threads = threads
        self._retries = retries
        self._ready = window
        self._worker_limit = worker_limit
        self._keys = 0
        self._at_work: dict[str, tuple[_Piece, Any]] = {}
        self._waiting: list[tuple[float, int, _Piece]] = []
        self._suspects: deque[_Piece] = deque()
        self._broken: dict[int, _Broken] = {}
        self._events: SimpleQueue[Any] = SimpleQueue()
        now = time.monotonic()
        self._looked = -_LOOKING
        self._answered = self._worker_seen = self._progress = now
        self._known: set[str] = set()
        self._checking: set[str] = set()
        self._lost_some = False
        self._nthreads: dict[str, int] = {}
        self._crowd: dict[str, int] = {}
        self._stopped: float | None = None

    def summaries(self) -> Iterator[ShardSummary]:
        self._begin()
        while True:
            self._heed_stop()
            self._look()
            self._submit()
            if self._exhausted and not (self._at_work or self._waiting or self._suspects):
                break
            try:
                event = self._events.get(timeout=_LISTENING)
            except Empty:
                continue
            if isinstance(event, _Checked):
                self._checked(event)
            elif (summary := self._ended(event)) is not None:
                yield summary
        if self._lost_some:
            sweep(self._job.target)

    def close(self) -> None:
        """Let go of everything; what is at work ends by itself after the file in hand."""
        if self._scheduler is not None and self._known and self._client.status == "running":
            self._tell(cluster_worker.forget)
        for _, future in self._at_work.values():
            with suppress(Exception):
                future.release()
        self._at_work.clear()
        if self._ticket.probe is not None:
            with suppress(OSError):
                self._job.target.remove(self._ticket.probe.token)

    # The workers

    def _begin(self) -> None:
        """Take the first task, for a file of the input that every worker must see."""
        first = next(self._tasks, None)
        if first is None:
            self._exhausted = True
            return
        self._wait(_Piece.of(first))
        if self._scheduler is None:
            return  # processes of this machine, with the same environment
        path = first.items[0].path if first.items else None
        size = None if path is None else self._job.source.size(path)
        # A file that is gone meanwhile is gone for all.
        probe = Probe(f"{STATE}/seen-{self._ticket.run}", path if size is not None else None, size)
        self._job.target.write(probe.token, probe.token.encode())
        self._ticket = replace(self._ticket, probe=probe)

    def _look(self) -> None:
        """See which workers there are; look at new ones before they have done any harm."""
        now = time.monotonic()
        if now < self._looked + _LOOKING:
            return
        if self._client.status != "running":
            raise self._lost()
        try:
            self._nthreads = dict(self._client.nthreads(callback_timeout=_ANSWER))
            running = self._client.sync(self._client.scheduler.ncores_running, callback_timeout=_ANSWER)
        except Exception as error:
            if self._client.status != "running" or now > self._answered + _SILENCE:
                raise self._lost() from error
            return
        finally:
            self._looked = time.monotonic()
        now = self._answered = time.monotonic()
        if self._nthreads:
            self._worker_seen = now
        elif now > self._worker_seen + self._worker_limit:
            raise ClusterError(
                f"{self._place} has had no workers for {self._worker_limit:g} seconds: start some with 'dask worker"
                f" {self._scheduler or 'ADDRESS'}', and see their output if they have ended; {_GOES_ON}"
            )
        if running or not self._at_work:
            self._progress = now
        elif self._nthreads and now > self._progress + _PAUSED:
            raise ClusterError(
                f"all workers of {self._place} have stood still for {_PAUSED:g} seconds, as they do when they run out"
                f" of memory: give them more with --memory-limit, or fewer of them to a machine; {_GOES_ON}"
            )
        self._crowd = _crowd(self._nthreads)
        self._lost_some |= bool(self._known - self._nthreads.keys())
        new = self._nthreads.keys() - self._known - self._checking
        if new and self._stopped is None:
            self._checking |= new
            # Not here: one that dies meanwhile keeps whoever asks it waiting.
            threading.Thread(target=self._check, args=(sorted(new),), daemon=True).start()

    def _check(self, workers: list[str]) -> None:
        """Look at new workers, before they have done anything where they are there from the beginning."""
        found: dict[str, str | None] = {}
        try:
            # A function of the standard library, which is there whatever is missing on the worker.
            for worker, version in self._ask(workers, importlib.metadata.version, "sparsespec").items():
                if isinstance(version, importlib.metadata.PackageNotFoundError):
                    found[worker] = f"sparsespec is not installed there; {_INSTALL}"
                elif isinstance(version, str) and version != sparsespec.__version__:
                    found[worker] = cluster_worker.other_version(version, sparsespec.__version__)
            if not found:
                local = self._scheduler is None
                for worker, reason in self._ask(workers, cluster_worker.look, self._ticket, local=local).items():
                    if reason is None or isinstance(reason, str):
                        found[worker] = reason
                    elif isinstance(reason, (ImportError, AttributeError)):
                        found[worker] = f"it can't use sparsespec ({_line(reason)}); {_INSTALL}"
                    # Any other error is of the connection: the worker is gone, or is looked at again.
        except Exception as error:
            self._events.put(_Checked(workers, {}, error))
        else:
            self._events.put(_Checked(workers, found))

    def _checked(self, checked: _Checked) -> None:
        self._checking -= set(checked.workers)
        if checked.error is not None and self._client.status == "running":
            raise checked.error
        self._known |= checked.found.keys()
        refused = {worker: reason for worker, reason in checked.found.items() if reason is not None}
        if refused:
            raise self._refused(refused)

    def _ask(self, workers: list[str], function: Callable[..., Any], *args: Any, **options: Any) -> dict[str, Any]:
        """Call a function on workers; what it raises is returned."""
        try:
            answers = self._client.run(
                function, *args, workers=workers, on_error="return", callback_timeout=_CHECKING, **options
            )
        except TimeoutError as error:
            raise ClusterError(
                f"workers of {self._place} don't answer within {_CHECKING:g} seconds ({_some(workers)}): start them"
                f" again; {_GOES_ON}"
            ) from error
        except (OSError, ValueError):  # one of them has just left
            return {}
        return dict(answers)

    def _tell(self, function: Callable[..., Any]) -> None:
        """Call a function on all workers, and don't mind if that fails."""
        with suppress(Exception):
            self._client.run(function, self._ticket.run, on_error="ignore", callback_timeout=_TELLING)

    # Tasks

    def _submit(self) -> None:
        if self._stopped is not None or (self._checking and not self._known):
            return
        threads = sum(self._nthreads.values())
        ready = self._ready if self._ready is not None else max(_FEWEST_READY, round(_SHARE_READY * threads))
        room = threads + ready
        while len(self._at_work) < room:
            piece = self._next()
            if piece is None:
                return
            self._keys += 1
            key = f"sparsespec-shard-{piece.number}-{self._ticket.run}-{self._keys}"
            call = _Call(self._work, (self._ticket, piece.packed, self._threads, self._crowd))
            # A worker that lacks the package, or has another one, reports that; it would lose its connection over a
            # task that it can't even unpickle.
            future = self._client.submit(pickle.loads, pickle.dumps(call, protocol=5), key=key, pure=False)
            self._at_work[key] = (piece, future)
            future.add_done_callback(self._events.put)

    def _next(self) -> _Piece | None:
        if self._suspects and not any(piece.suspect for piece, _ in self._at_work.values()):
            return self._suspects.popleft()
        if self._waiting and self._waiting[0][0] <= time.monotonic():
            return heapq.heappop(self._waiting)[2]
        if self._exhausted:
            return None
        task = next(self._tasks, None)
        if task is None:
            self._exhausted = True
            return None
        return _Piece.of(task)

    def _wait(self, piece: _Piece, seconds: float = 0.0) -> None:
        self._keys += 1
        heapq.heappush(self._waiting, (time.monotonic() + seconds, self._keys, piece))

    def _ended(self, future: Any) -> ShardSummary | None:
        """Take a task that has ended in some way off the list; give its summary if the shard is through."""
        from distributed import KilledWorker

        if future.key not in self._at_work:
            return None
        piece, _ = self._at_work[future.key]
        if future.status == "cancelled":
            raise self._lost()
        if future.status not in ("finished", "error"):
            self._again(future)  # its worker left with the result: the scheduler has it done again
            return None
        try:
            kind, content = future.result(timeout=_ANSWER)
        except KilledWorker as error:
            self._drop(future)
            self._suspect(piece, error)
            return None
        except TimeoutError as error:
            if future.status != "error":
                self._again(future)
                return None
            self._drop(future)
            self._try_again(piece, error)
            return None
        except Exception as error:
            if future.status == "cancelled" or self._client.status != "running":
                raise self._lost() from error
            self._drop(future)
            self._try_again(piece, error)
            return None
        self._drop(future)
        self._progress = time.monotonic()
        if kind == "refused":
            raise self._refused({"": content})
        summary: ShardSummary = content
        if summary.blocked is not None:
            return summary
        if summary.stopped:
            if not self._stopping.is_set():
                # Somebody else has told this worker to stop; its part is not done.
                self._try_again(piece, RuntimeError("it was stopped on its worker"))
                return None
            return summary if piece.whole else None
        broken = self._broken.get(piece.number)
        if broken is None:
            return summary
        summary.rows[:0] = broken.rows
        if piece.whole:
            del self._broken[piece.number]
            return summary
        broken.rows = summary.rows
        broken.open -= 1
        if not broken.open:
            self._finish(broken)
        return None

    def _drop(self, future: Any) -> None:
        del self._at_work[future.key]
        future.release()

    def _again(self, future: Any) -> None:
        """Wait for a task that was thought to have ended."""
        timer = threading.Timer(_LOOKING, future.add_done_callback, (self._events.put,))
        timer.daemon = True
        timer.start()

    def _try_again(self, piece: _Piece, error: Exception) -> None:
        if isinstance(error, (ImportError, AttributeError)) and "sparsespec" in str(error):
            reason = f"the same version of sparsespec is not installed there ({_line(error)}); {_INSTALL}"
            raise self._refused({"": reason}) from error
        if self._stopped is not None:
            return
        if piece.attempts >= self._retries:
            raise ClusterError(
                f"shard {piece.number} could not be worked on, {piece.attempts + 1} times, the last time because"
                f" of {type(error).__name__}: {_line(error)}; once that is put right {_GOES_ON}"
            ) from error
        piece.attempts += 1
        self._wait(piece, 4.0 ** (piece.attempts - 1))

    # Shards that cost workers

    def _suspect(self, piece: _Piece, error: Exception) -> None:
        """Find out which file it is that costs workers.

        A worker takes all with it that it has at the moment, so whatever was there is suspect at first, and is tried
        again while no other suspect is.
        """
        self._lost_some = True
        if not piece.suspect:
            self._suspects.append(replace(piece, suspect=True))
            return
        task = cluster_worker.unpack_task(piece.packed)
        broken = self._broken.setdefault(task.number, _Broken(replace(task, only=None)))
        if task.only is None:
            broken.rounds += 1
            if broken.rounds > _ROUNDS:
                raise ClusterError(
                    f"shard {task.number} ends its workers, whatever is left out of it ({_line(error)}): see the output"
                    f" of the workers; do they have enough memory? {_GOES_ON[0].upper()}{_GOES_ON[1:]}"
                ) from error
        else:
            broken.open -= 1
        parts = self._parts(task)
        if len(parts) == 1:
            path = parts[0][0]
            broken.alone[path] += 1
            if broken.alone[path] > 1:
                broken.culprits.add(path)
                parts = []
        for part in parts:
            broken.open += 1
            self._suspects.append(_Piece.of(replace(broken.task, only=frozenset(part)), suspect=True))
        if not broken.open:
            self._finish(broken)

    def _parts(self, task: ShardTask) -> list[list[str]]:
        """Take a task apart: what was at work when a worker died and the rest, where that is known, or in halves."""
        paths = [
            item.path
            for item in task.items
            if (task.only is None or item.path in task.only) and item.path not in task.quarantined
        ]
        begun = State(self._job.target).past(task.number)[0].begun
        found = [path for path in paths if path in begun]
        if 0 < len(found) < len(paths):
            return [found, [path for path in paths if path not in begun]]
        half = (len(paths) + 1) // 2
        return [part for part in (paths[:half], paths[half:]) if part]

    def _finish(self, broken: _Broken) -> None:
        """All parts are through: what remains is to note the culprits and to write the shard's record."""
        quarantined = tuple(sorted({*broken.task.quarantined, *broken.culprits}))
        broken.task = replace(broken.task, quarantined=quarantined)
        self._suspects.append(_Piece.of(broken.task, suspect=True))

    # The end

    def _heed_stop(self) -> None:
        if not self._stopping.is_set():
            return
        now = time.monotonic()
        if self._stopped is None:
            self._stopped = now
            self._exhausted = True
            self._waiting.clear()
            self._suspects.clear()
        elif now < self._looked + _LOOKING:
            return
        if now > self._stopped + (self._job.time_limit or _DEFAULT_FILE) + _STOPPING:
            raise ClusterError(f"workers of {self._place} haven't stopped when told to; {_GOES_ON}")
        # Again and again: a worker that was busy starting may not have heard it.
        threading.Thread(target=self._tell, args=(cluster_worker.stop,), daemon=True).start()

    @property
    def _place(self) -> str:
        return "the cluster on this machine" if self._scheduler is None else f"the scheduler {self._scheduler}"

    def _lost(self) -> ClusterError:
        return ClusterError(f"{self._place} was lost in the middle of the run; once it runs again {_GOES_ON}")

    def _refused(self, reasons: Mapping[str, str]) -> ClusterError:
        worker, reason = next(iter(sorted(reasons.items())))
        others = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        who = f"the worker {worker}{others}" if worker else "a worker"
        return ClusterError(f"{who} of {self._place} can't be used: {reason}")


def _crowd(nthreads: Mapping[str, int]) -> dict[str, int]:
    """Count the tasks that each machine may be given at once; the usual number stands under ""."""
    from distributed.comm import get_address_host

    hosts: Counter[str] = Counter()
    for worker, threads in nthreads.items():
        hosts[get_address_host(worker)] += threads
    if not hosts:
        return {}
    usual = Counter(hosts.values()).most_common(1)[0][0]
    return {"": usual, **{host: threads for host, threads in hosts.items() if threads != usual}}


def _import_distributed() -> None:
    try:
        import distributed  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the engine 'dask' needs distributed ({error}): run pip install 'sparsespec[dask]'", name="distributed"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's remarks on workers that come and go off the terminal; what matters is raised."""
    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in before:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _knock(address: str, limit: float) -> None:
    """See that a scheduler answers; a Client waits without end for one that takes the connection and says nothing."""
    from distributed.comm import connect
    from distributed.security import Security

    async def knock() -> None:
        comm = await connect(address, timeout=limit, **Security().get_connection_args("client"))
        comm.abort()

    # In a thread of its own: the caller's may have a loop that runs.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(asyncio.wait_for(knock(), limit))).result()


def _closed(resource: Any) -> None:
    with _no_warnings(), suppress(Exception):
        resource.close(timeout=_CLOSING)


def _because(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    return f" ({_line(cause)})" if isinstance(cause, OSError) and _line(cause) else ""


def _line(error: BaseException) -> str:
    # Dask names the object that it connects with, which tells nobody anything.
    text = re.sub(r"^in <[^>]*>: ", "", " ".join(str(error).split()))
    return text if len(text) <= 300 else text[:299] + "…"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
