"""The engine that works through the images in processes of its own, which may die without the run dying with them.

Each worker process keeps its segmenter, with the network and the compiled kernels, from file to file. It is started
with a fresh interpreter and talks through pipes: nothing is forked, ``__main__`` is not imported again, and processes
that may not have children of :mod:`multiprocessing`, such as workers of Dask, may have these.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from queue import Empty, SimpleQueue
from typing import IO, Any, Self

from sparsespec._checks import check_count
from sparsespec._processes import (
    GRACE,
    LAST_GRACE,
    SCRATCH,
    TAIL,
    WATCHING_MEMORY,
    EndedError,
    WorkerError,
    ending,
    frame,
    greeting,
    kill_group,
    launching,
    memory_of,
    on_one_line,
    read_frame,
    write_frame,
)
from sparsespec._threads import available_cpus
from sparsespec.batch.job import Item, Job, Outcome, failure

__all__ = ["Processes", "WorkerError", "pickled_job"]

_LOG = logging.getLogger("sparsespec.batch")

# Ctrl-C is not heeded on Windows while a lock is waited for.
_LISTENING = 0.2
_WATCHING = 0.1
# Results that nobody has asked for yet, for each worker.
_AHEAD = 4


class Processes:
    """Worker processes that each work on one file after the other; a file can end its process, not the run.

    A file whose process dies is tried once more in a new process, while no other file is at work; when that process
    dies too, the file is quarantined: its outcome is a failure with the reason ``crash``. A file over the time limit
    of the job has its process killed, and fails with the reason ``timeout``. The time it takes to start a process, open
    the model and load the compiled kernels counts for no file: a process segments a small picture before its first.
    Only kernels for rare images (16 bits, gigapixels) may be compiled later, once on each machine.

    What a process that dies has written of its file's results is left where it is.

    Processes live until `close`, or the end of the program, and serve several calls of `outcomes`, one at a time; for
    calls at the same time make an engine for each. They end by themselves when this process dies in any way.

    Parameters
    ----------
    workers : int, optional
        Processes. The default is as many as fit with so many `threads`.
    threads : int, optional
        Of each process. The default is the processors granted to this process over `workers`, and 1 without these.
    start_limit : float
        Seconds that a process may take to get ready.
    memory_limit : int, optional
        Bytes of memory of its own that a process may take; above it is killed, and its file is treated like any that
        ended its process, but fails with the reason ``memory``. Looked at every 20 ms. Linux only.

    Raises
    ------
    ValueError
        Processes times threads are more than the processors granted to this process; a number out of range; a
        memory limit on another system than Linux.

    Notes
    -----
    Every process holds the network and its own working memory: about half a gigabyte each with the default model.
    """

    def __init__(
        self,
        workers: int | None = None,
        threads: int | None = None,
        *,
        start_limit: float = 300.0,
        memory_limit: int | None = None,
    ) -> None:
        self.workers, self.threads = _shares(workers, threads)
        if not start_limit > 0:
            raise ValueError(f"start_limit must be a number of seconds above 0, not {start_limit!r}")
        if memory_limit is not None:
            memory_limit = check_count(memory_limit, name="memory_limit")
            if not os.path.exists("/proc/self/status"):
                raise ValueError("memory_limit needs Linux, where the memory of a process can be read in /proc")
        self._start_limit = start_limit
        self._memory_limit = memory_limit
        self._children: list[_Child | None] = [None] * self.workers
        self._busy = threading.Lock()
        # Also when the program ends, or when nobody has this object any more.
        self._finalizer = weakref.finalize(self, _end_all, self._children)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is noted in ``run.json``."""
        return {"engine": "processes", "workers": self.workers, "threads": self.threads}

    def outcomes(
        self,
        job: Job,
        items: Iterable[Item],
        *,
        begin: Callable[[Item], None],
        stopping: threading.Event,
    ) -> Iterator[tuple[Item, list[Outcome]]]:
        """Work on files; yield the outcomes of each as it is finished, in any order.

        Closing the iterator kills the processes that are at work. See `sparsespec.batch.job.Engine`; `items` and
        `begin` are called by other threads, one at a time.

        Raises
        ------
        WorkerError
            The segmenter cannot be sent to another process, or no process with it can be started.
        RuntimeError
            The engine is at work for another caller.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("these processes are at work for another call of outcomes(): make an engine for each")
        try:
            run = _Run(
                self._children,
                job,
                pickled_job(job),
                self.threads,
                iter(items),
                begin,
                stopping,
                self._start_limit,
                self._memory_limit,
            )
            yield from run.outcomes()
        finally:
            self._busy.release()

    def close(self) -> None:
        """End the processes; the next call of `outcomes` starts new ones."""
        with self._busy:
            _end_all(self._children)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _shares(workers: int | None, threads: int | None) -> tuple[int, int]:
    cpus = available_cpus()
    if workers is not None:
        workers = check_count(workers, name="workers")
    if threads is not None:
        threads = check_count(threads, name="threads")
    wanted = (workers or 1) * (threads or 1)
    if wanted > cpus:
        said = " x ".join(f"{n} {what}" for n, what in ((workers, "workers"), (threads, "threads")) if n is not None)
        raise ValueError(
            f"{said} are more than the {cpus} processors granted to this process: make workers x threads at most {cpus}"
        )
    if workers is None:
        threads = threads or 1
        workers = cpus // threads
    return workers, threads or cpus // workers


class _JobPickler(pickle.Pickler):
    """Refuses what stands in ``__main__``: another process has another one."""

    def persistent_id(self, thing: Any) -> None:
        if isinstance(thing, (type, types.FunctionType)) and thing.__module__ == "__main__":
            raise WorkerError(
                f"'{thing.__qualname__}' stands in the main program, which worker processes do not import: put it into"
                " a module of its own and import it from there, or use the engine 'inline'"
            )


def pickled_job(job: Job) -> bytes:
    """Pickle a job for worker processes.

    Raises
    ------
    WorkerError
        That is not possible, and why.
    """
    file = BytesIO()
    try:
        _JobPickler(file, pickle.HIGHEST_PROTOCOL).dump(job)
    except WorkerError:
        raise
    except Exception as error:
        raise WorkerError(
            f"the segmenter cannot be sent to worker processes ({type(error).__name__}: {on_one_line(str(error))}):"
            " define its class at the top level of a module and let it hold only what can be pickled, or use the engine"
            " 'inline'"
        ) from error
    return file.getvalue()


class _Child:
    """One worker process. A single thread talks to it; any may `kill` or `check` it."""

    def __init__(self, threads: int, *, scratch: bool) -> None:
        self.scratch: str | None = None
        self._lifeline: int | None = None
        environment: dict[str, str] = {}
        if scratch:
            # What a process that is killed leaves there goes with it.
            self.scratch = tempfile.mkdtemp(prefix="sparsespec-worker-")
            environment = dict.fromkeys((SCRATCH, "TMPDIR", "TEMP", "TMP"), self.scratch)
        pipe = subprocess.PIPE
        try:
            with launching("sparsespec.batch.worker", threads, **environment) as launch:
                self._process = subprocess.Popen(launch.command, stdin=pipe, stdout=pipe, stderr=pipe, **launch.options)
        except BaseException:
            self._leave_nothing()
            raise
        self._lifeline = launch.lifeline
        self.pid = self._process.pid
        self.job: bytes | None = None
        self.killed_for: str | None = None
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._at_work = False
        self._broken = False
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self._tail = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        with suppress(OSError):  # it has died: the first question will tell
            self._requests.write(greeting())

    def _listen(self) -> None:
        errors: Any = self._process.stderr
        with errors:
            while chunk := errors.read1(TAIL):
                self._tail = (self._tail + chunk)[-TAIL:]
                _LOG.debug("worker process %d: %s", self.pid, chunk.decode(errors="replace").rstrip())

    def ask(self, kind: str, content: Any, limit: float | None) -> Any:
        """Send a request and wait for the answer; an EndedError when none comes."""
        with self._lock:
            self._at_work = True
            self._deadline = None if limit is None else time.monotonic() + limit
        try:
            write_frame(self._requests, frame(kind, content))
            answer = read_frame(self._answers)
        except (OSError, EOFError) as error:
            self._broken = True
            raise EndedError from error
        finally:
            with self._lock:
                self._at_work = False
        return pickle.loads(answer)

    @property
    def usable(self) -> bool:
        """Whether it is alive, as far as one can know."""
        return self.killed_for is None and self._process.poll() is None

    def check(self, memory_limit: int | None) -> None:
        """Kill it when it has worked for too long, or takes too much memory."""
        with self._lock:
            if not self._at_work or self.killed_for is not None:
                return
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._kill("time")
            elif memory_limit is not None and memory_of(self.pid) > memory_limit:
                self._kill("memory")

    def kill(self) -> None:
        """Kill it at once."""
        with self._lock:
            self._kill("close")

    def _kill(self, reason: str) -> None:
        # Under the lock: an answer that has come before counts, and the process is not asked anything more.
        self.killed_for = self.killed_for or reason
        if self._process.poll() is None:
            kill_group(self._process)

    def end(self) -> str:
        """Make sure that it is gone and that nothing is left of it; tell how it ended."""
        if self._broken:
            # It is about to end by itself, in a way that is to be told: not asked to.
            self._wait(GRACE)
        with suppress(OSError):
            self._requests.close()
        if not self._wait(GRACE):
            kill_group(self._process)
            if not self._wait(LAST_GRACE):
                _LOG.warning("worker process %d could not be killed, most likely for a disk or server", self.pid)
        # What it has started itself keeps its pipes open otherwise.
        kill_group(self._process)
        self._answers.close()
        self._listener.join(GRACE)
        self._leave_nothing()
        return ending(self._process.returncode, self.words)

    def _wait(self, seconds: float) -> bool:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _leave_nothing(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def signalled(self) -> bool:
        """Whether a signal ended it."""
        return (self._process.returncode or 0) < 0

    @property
    def words(self) -> str:
        """The end of what it has written to its standard error."""
        return self._tail.decode(errors="replace").strip()


def _end_all(children: list[_Child | None]) -> None:
    """End processes that are idle or were killed, all at the same time."""
    for child in children:
        if child is not None:
            with suppress(OSError):
                child._requests.close()
    for number, child in enumerate(children):
        if child is not None:
            child.end()
            children[number] = None


class _Floor:
    """Where any number may work together, or one alone."""

    def __init__(self, over: threading.Event) -> None:
        self._over = over
        self._changed = threading.Condition()
        self._together = 0
        self._alone = False
        self._waiting = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work beside others."""
        with self._changed:
            self._wait(lambda: not self._alone and not self._waiting)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Work when nobody else does."""
        with self._changed:
            self._waiting += 1
            self._wait(lambda: not self._alone and not self._together)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    def _wait(self, free: Callable[[], bool]) -> None:
        while not (free() or self._over.is_set()):
            self._changed.wait(_LISTENING)


class _Run:
    """One call of `Processes.outcomes`: a thread for each worker process, and one that watches their limits."""

    def __init__(
        self,
        children: list[_Child | None],
        job: Job,
        pickled: bytes,
        threads: int,
        items: Iterator[Item],
        begin: Callable[[Item], None],
        stopping: threading.Event,
        start_limit: float,
        memory_limit: int | None,
    ) -> None:
        self._children = children
        self._pickled, self._threads = pickled, threads
        self._time_limit = job.time_limit
        self._scratch = job.source.folder is None or job.target.folder is None
        self._items, self._begin, self._stopping = items, begin, stopping
        self._start_limit, self._memory_limit = start_limit, memory_limit
        self._over = threading.Event()
        self._door = threading.Lock()  # of the list of children
        self._callers = threading.Lock()  # of what the caller gave: items and begin
        self._floor = _Floor(self._over)
        self._room = threading.Semaphore((1 + _AHEAD) * len(children))
        # A result, an error, or None when a thread has ended.
        self._results: SimpleQueue[tuple[Item, list[Outcome]] | BaseException | None] = SimpleQueue()

    def outcomes(self) -> Iterator[tuple[Item, list[Outcome]]]:
        numbers = range(len(self._children))
        feeders = [threading.Thread(target=self._feed, args=(number,), daemon=True) for number in numbers]
        watch = threading.Thread(target=self._watch, daemon=True)
        working = len(feeders)
        try:
            for thread in (*feeders, watch):
                thread.start()
            while working:
                try:
                    result = self._results.get(timeout=_LISTENING)
                except Empty:
                    continue
                if result is None:
                    working -= 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    self._room.release()
                    yield result
        finally:
            self._over.set()
            if working:
                with self._door:
                    children = [child for child in self._children if child is not None]
                for child in children:
                    child.kill()
            for thread in (*feeders, watch):
                # One that waits for its caller's items is left to itself: it begins nothing more.
                if thread.ident is not None:
                    thread.join(GRACE)
            if working:
                for number, feeder in enumerate(feeders):
                    if not feeder.is_alive():
                        self._discard(number)

    def _watch(self) -> None:
        while not self._over.wait(_WATCHING if self._memory_limit is None else WATCHING_MEMORY):
            for child in tuple(self._children):
                if child is not None:
                    child.check(self._memory_limit)

    def _feed(self, number: int) -> None:
        try:
            while (item := self._take()) is not None:
                outcomes = self._work(number, item)
                if outcomes is None:
                    return
                self._results.put((item, outcomes))
        except BaseException as error:
            if not self._over.is_set():
                self._results.put(error)
        finally:
            self._results.put(None)

    def _take(self) -> Item | None:
        while not self._room.acquire(timeout=_LISTENING):
            if self._stops():
                return None
        with self._callers:
            return None if self._stops() else next(self._items, None)

    def _stops(self) -> bool:
        return self._over.is_set() or self._stopping.is_set()

    def _work(self, number: int, item: Item) -> list[Outcome] | None:
        """Work on a file; None when it was not begun, or was given up."""
        before = time.perf_counter()
        with self._floor.together():
            child = self._ready(number)
            if child is None or self._stops():
                return None
            with self._callers:
                self._begin(item)
            found = self._attempt(number, child, item)
        if isinstance(found, _Loss) and found.killed_for != "time":
            with self._floor.alone():
                child = self._ready(number)
                if child is None:
                    return None
                found = self._attempt(number, child, item)
        if isinstance(found, _Loss):
            return [self._failure(item, found, time.perf_counter() - before)]
        return found

    def _attempt(self, number: int, child: _Child, item: Item) -> list[Outcome] | _Loss | None:
        try:
            outcomes: list[Outcome] = child.ask("file", item, self._time_limit)[1]
            return outcomes
        except EndedError:
            how = self._discard(number)
            return None if self._over.is_set() else _Loss(child.killed_for, how)

    def _failure(self, item: Item, loss: _Loss, seconds: float) -> Outcome:
        if loss.killed_for == "time":
            reason = "timeout"
            error = f"over the time limit of {self._time_limit:g} s; allow more time, or make the image smaller"
        elif loss.killed_for == "memory" and self._memory_limit is not None:
            reason = "memory"
            error = (
                f"its process took more than {self._memory_limit / 2**20:.0f} MiB of memory, twice, the second time"
                " alone at work; allow more memory, or make the image smaller"
            )
        else:
            reason = "crash"
            advice = (
                "allow more memory, or make the image smaller"
                if "SIGKILL" in loss.how
                else "open it with another program and save it anew, or leave it out"
            )
            error = f"its process {loss.how}, twice, the second time alone at work; it is quarantined: {advice}"
        return failure(item, error, reason, seconds=seconds)

    def _ready(self, number: int) -> _Child | None:
        """Give the worker process, started if need be, with the job at hand; None when all is over."""
        for again in (True, False):
            child = self._children[number]
            if child is not None and not (child.usable and (child.scratch or not self._scratch)):
                self._discard(number)
                child = None
            if child is None:
                child = self._start(number)
            if child is None or child.job == self._pickled:
                return child
            try:
                kind, content = child.ask("job", (self._pickled, self._threads), self._start_limit)
            except EndedError as error:
                how = self._discard(number)
                if self._over.is_set():
                    return None
                # Killed from outside: that may pass.
                if again and child.killed_for is None and child.signalled:
                    continue
                raise WorkerError(self._not_started(child, how)) from error
            if kind == "unusable":
                self._discard(number)
                line, text = content
                raise WorkerError(f"the segmenter cannot be used in a worker process: {on_one_line(line)}\n{text}")
            child.job = self._pickled
            return child
        raise AssertionError("the second attempt returns or raises")

    def _not_started(self, child: _Child, how: str) -> str:
        if child.killed_for == "time":
            said = f"a worker process was not ready after {self._start_limit:g} s; allow more with start_limit"
        elif child.killed_for == "memory":
            said = f"a worker process took more than memory_limit={self._memory_limit} before its first file; raise it"
        else:
            said = f"a worker process {how} before it was ready"
        return said + (f"; it wrote:\n{child.words}" if child.words else "")

    def _start(self, number: int) -> _Child | None:
        child = _Child(self._threads, scratch=self._scratch)
        with self._door:
            self._children[number] = child
            if not self._over.is_set():
                return child
        self._discard(number)
        return None

    def _discard(self, number: int) -> str:
        with self._door:
            child, self._children[number] = self._children[number], None
        return "" if child is None else child.end()


@dataclass(frozen=True)
class _Loss:
    """A process that ended over a file: what it was killed for, if it was, and how it ended."""

    killed_for: str | None
    how: str
