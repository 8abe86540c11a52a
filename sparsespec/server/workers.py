"""The worker processes of a server, and the queue before them.

Images are segmented in processes of their own: one that crashes its decoder, takes too much memory or does not end
takes its process with it, and a new one is started; the server and all other images go on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sparsespec._processes import (
    GRACE,
    LAST_GRACE,
    LENGTH,
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
)
from sparsespec.server.limits import Limits
from sparsespec.server.models import ServedModel
from sparsespec.server.problems import Problem, ProblemError, stopping
from sparsespec.server.wish import Wish
from sparsespec.server.work import Done, read_said

__all__ = ["Pool", "WorkerError"]

_LOG = logging.getLogger("sparsespec.server")

_START_LIMIT = 300.0
# Seconds before a worker that could not be started is tried again, doubled each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_LARGEST_ANSWER = 1 << 31
# Bytes that are read from a process before they are asked for.
_AT_ONCE = 1 << 20


class _UnusableError(Exception):
    """A worker process cannot open the models."""


class _Child:
    """One worker process."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int | None) -> None:
        self._process = process
        self._lifeline = lifeline
        self.pid = process.pid
        self.killed_for: str | None = None
        self._tail = b""
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def started(cls, threads: int) -> _Child:
        """Start a process; a WorkerError when the system does not."""
        pipe = asyncio.subprocess.PIPE
        with launching("sparsespec.server.work", threads) as launch:
            process = await asyncio.create_subprocess_exec(
                *launch.command, stdin=pipe, stdout=pipe, stderr=pipe, limit=_AT_ONCE, **launch.options
            )
        child = cls(process, launch.lifeline)
        assert process.stdin is not None
        process.stdin.write(greeting())
        return child

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(TAIL):
            self._tail = (self._tail + chunk)[-TAIL:]

    async def ask(self, kind: str, content: Any, limit: float) -> tuple[str, Done, str]:
        """Send a request and wait for the answer; an EndedError when none comes in time, or at all."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        message = frame(kind, content)
        try:
            async with asyncio.timeout(limit):
                self._process.stdin.write(LENGTH.pack(len(message)))
                self._process.stdin.write(message)
                await self._process.stdin.drain()
                size = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))[0]
                if size > _LARGEST_ANSWER:
                    raise ValueError("a worker process said something that is no message")
                return read_said(await self._process.stdout.readexactly(size))
        except TimeoutError as error:
            self.kill("time")
            raise EndedError from error
        except (OSError, EOFError, ValueError) as error:
            raise EndedError from error

    def kill(self, reason: str) -> None:
        """Kill it at once."""
        self.killed_for = self.killed_for or reason
        if self._process.returncode is None:
            kill_group(self._process)

    @property
    def alive(self) -> bool:
        """Whether it is, as far as one can know."""
        return self.killed_for is None and self._process.returncode is None

    @property
    def memory(self) -> int:
        """Bytes of memory of its own."""
        return memory_of(self.pid) if self._process.returncode is None else 0

    async def ended(self) -> None:
        """Wait until it has ended."""
        await self._process.wait()

    async def end(self) -> str:
        """Make sure that it is gone and that nothing is left of it; tell how it ended."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        for grace in (GRACE, LAST_GRACE):
            with suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self._process.wait()
                break
            kill_group(self._process)
        else:
            _LOG.warning("worker process %d could not be killed, most likely for a disk or server", self.pid)
        # What it has started itself keeps its pipes open otherwise.
        kill_group(self._process)
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                await asyncio.wait([self._listener])
        self._listener.cancel()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
        return ending(self._process.returncode, self._tail.decode(errors="replace").strip())


class _Ticket:
    """One image that waits, or is at work."""

    def __init__(self, wish: Wish, body: bytes) -> None:
        self.wish = wish
        self.body: bytes | None = body
        self.since = time.perf_counter()
        self.waited = 0.0
        self.begun = asyncio.Event()
        self.again = False
        self.done: asyncio.Future[Done] = asyncio.get_running_loop().create_future()

    def settle(self, result: Done | Problem) -> None:
        """Give the result, if anybody still wants it."""
        self.body = None
        if self.done.done():
            return
        if isinstance(result, Problem):
            self.done.set_exception(ProblemError(result))
            # Nobody may be there any more to take it.
            self.done.exception()
        else:
            self.done.set_result(result)


class Pool:
    """Worker processes with one queue, first come, first served.

    Parameters
    ----------
    models : mapping of str to ServedModel
        By their names.
    workers, threads : int
        Processes, and threads of each.
    limits : Limits
        Of the server.
    """

    def __init__(self, models: Mapping[str, ServedModel], workers: int, threads: int, limits: Limits) -> None:
        self.workers, self.threads, self.limits = workers, threads, limits
        self._models = dict(models)
        self._children: list[_Child | None] = [None] * workers
        self._ready = [False] * workers
        self._queue: deque[_Ticket] = deque()
        self._more = asyncio.Condition()
        self._at_work: set[_Ticket] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._opened = asyncio.Event()
        self._stopping = False
        self._usual_seconds = 1.0
        self.restarts: dict[str, int] = {"crash": 0, "time": 0, "memory": 0, "start": 0}
        self.unusable: str | None = None
        """Why no worker could open the models, if that is so."""
        self.settled = asyncio.Event()
        """The first worker is ready, or it is known that none can be."""

    # What others may ask

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return len(self._queue)

    @property
    def at_work(self) -> int:
        """Images that are at work."""
        return len(self._at_work)

    @property
    def ready(self) -> int:
        """Worker processes that have opened the models."""
        return sum(self._ready)

    @property
    def full(self) -> bool:
        """Whether one more image would be refused."""
        return self.waiting + self.at_work >= self.workers + self.limits.max_waiting

    @property
    def stopping(self) -> bool:
        """Whether nothing more is taken on."""
        return self._stopping

    def memory(self) -> Sequence[int]:
        """Bytes of memory of its own of each worker process, 0 where there is none."""
        return [0 if child is None else child.memory for child in self._children]

    # What the server does

    async def start(self) -> None:
        """Start the processes; they get ready by and by."""
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(self.workers)]
        if self.limits.memory_limit is not None:
            self._tasks.append(asyncio.create_task(self._watch(self.limits.memory_limit)))

    def refuse(self) -> None:
        """Take nothing more on; what has been is finished."""
        self._stopping = True

    async def stop(self, grace: float = 0.0) -> None:
        """Take nothing more on, finish what has been within so many seconds, and end the processes."""
        self.refuse()
        end = time.monotonic() + grace
        while (self._queue or self._at_work) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for ticket in (*self._queue, *self._at_work):
            ticket.settle(stopping())
            ticket.begun.set()
        self._queue.clear()
        for child in self._children:
            if child is not None and self._at_work:
                child.kill("close")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ready = [False] * self.workers
        await asyncio.gather(*(self._discard(number) for number in range(self.workers)))

    def check_room(self) -> None:
        """Raise the problem that one more image would meet at once: 429 or 503."""
        if self._stopping:
            raise ProblemError(stopping())
        if self.unusable is not None:
            raise ProblemError(_not_open())
        if self.full:
            # Until half of the queue is done: whoever comes back then finds room, and the workers are not idle yet.
            seconds = min(max(0.1, (self.waiting // 2 + 1) * self._usual_seconds / self.workers), 60.0)
            raise ProblemError(
                Problem(
                    429,
                    "busy",
                    "Too many images are waiting",
                    f"{self.at_work} images are at work and {self.waiting} wait, which is all that may.",
                    "Try again after the seconds that Retry-After says.",
                    # The header has whole seconds.
                    retry_after=math.ceil(seconds),
                    seconds=round(seconds, 1),
                )
            )

    async def work(self, wish: Wish, body: bytes) -> tuple[Done, float]:
        """Segment an image when its turn comes: the result, and the seconds it has waited.

        Cancelled while the image waits, it never gets its turn.

        Raises
        ------
        ProblemError
            429, 503, or 500 when its process has crashed.
        """
        self.check_room()
        ticket = _Ticket(wish, body)
        del body
        async with self._more:
            self._queue.append(ticket)
            self._more.notify_all()
        try:
            try:
                async with asyncio.timeout(self.limits.wait_limit):
                    await ticket.begun.wait()
            except TimeoutError:
                if not ticket.begun.is_set():
                    raise ProblemError(_waited(self.limits, bool(self.ready))) from None
            return await ticket.done, ticket.waited
        finally:
            ticket.body = None
            with suppress(ValueError):
                self._queue.remove(ticket)

    # What each worker does

    async def _run(self, number: int) -> None:
        """Keep one worker process, and give it one image after the other."""
        pause = _FIRST_PAUSE
        # One after the other until the first is ready: the others find its compiled kernels.
        if number:
            await self._opened.wait()
        while True:
            try:
                child = await self._open(number)
            except (_UnusableError, WorkerError) as error:
                if isinstance(error, _UnusableError) and not self._opened.is_set():
                    self._fail(str(error))
                    return
                _LOG.error("%s; trying again in %g s", error, pause, extra={"event": "worker"})
                self.restarts["start"] += 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            end = asyncio.create_task(self._tell_end(child))
            done = 0
            try:
                while (ticket := await self._next(child)) is not None:
                    await self._do(number, child, ticket)
                    done += 1
            finally:
                end.cancel()
            if await self._lost(number, child) and not done:
                # Something ends them one after the other, and starting them takes the processors from the others.
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                pause = _FIRST_PAUSE

    async def _open(self, number: int) -> _Child:
        child = await _Child.started(self.threads)
        self._children[number] = child
        try:
            kind, done, text = await child.ask("open", (self._models, self.threads), _START_LIMIT)
        except EndedError as error:
            how = await self._discard(number)
            if child.killed_for == "time":
                how = f"was not ready after {_START_LIMIT:g} s"
            elif child.killed_for == "memory":
                how = "took more than the memory limit before its first image"
            raise WorkerError(f"a worker process {how}") from error
        if kind != "ready":
            await self._discard(number)
            _LOG.debug("%s", done.trace)
            raise _UnusableError(text)
        self._ready[number] = True
        self._opened.set()
        self.settled.set()
        return child

    def _fail(self, why: str) -> None:
        """No worker can open the models: nothing will change that."""
        self.unusable = why
        for ticket in self._queue:
            ticket.settle(_not_open())
            ticket.begun.set()
        self._queue.clear()
        self.settled.set()

    async def _tell_end(self, child: _Child) -> None:
        await child.ended()
        async with self._more:
            self._more.notify_all()

    async def _next(self, child: _Child) -> _Ticket | None:
        """Wait for an image; None when the process has ended."""
        async with self._more:
            await self._more.wait_for(lambda: self._queue or not child.alive)
            return self._queue.popleft() if child.alive else None

    async def _do(self, number: int, child: _Child, ticket: _Ticket) -> None:
        ticket.waited = time.perf_counter() - ticket.since
        self._at_work.add(ticket)
        ticket.begun.set()
        began = time.perf_counter()
        try:
            content = (ticket.wish, ticket.body, self.limits.max_pixels)
            _, done, _ = await child.ask("image", content, self.limits.time_limit)
            ticket.settle(done)
            self._usual_seconds += 0.1 * (time.perf_counter() - began - self._usual_seconds)
        except EndedError:
            self._ready[number] = False
            how = await self._discard(number)
            if self._once_more(ticket, child, how):
                _LOG.info("an image is tried once more", extra={"event": "worker"})
            else:
                ticket.settle(_lost(child.killed_for, how, self.limits))
            kind = child.killed_for if child.killed_for in self.restarts else "crash"
            self.restarts[str(kind)] += 1
            _LOG.error("a worker process %s over an image", how, extra={"event": "worker", "killed_for": kind})
            child.killed_for = child.killed_for or "crash"
        finally:
            self._at_work.discard(ticket)
            if ticket in self._queue:
                async with self._more:
                    self._more.notify_all()
            else:
                ticket.settle(stopping())

    def _once_more(self, ticket: _Ticket, child: _Child, how: str) -> bool:
        """Put an image whose process was killed from outside first in the queue, once: it need not be its fault."""
        if ticket.again or ticket.body is None or self._stopping:
            return False
        if child.killed_for is not None or "SIGKILL" not in how:
            return False
        ticket.again = True
        self._queue.appendleft(ticket)
        return True

    async def _lost(self, number: int, child: _Child) -> bool:
        """A process has ended: True between two images, False over one, which was noted."""
        self._ready[number] = False
        if self._children[number] is child:
            how = await self._discard(number)
            self.restarts["crash"] += 1
            _LOG.error("a worker process %s between two images", how, extra={"event": "worker"})
            return True
        return False

    async def _discard(self, number: int) -> str:
        child = self._children[number]
        how = "" if child is None else await child.end()
        self._children[number] = None
        return how

    async def _watch(self, most: int) -> None:
        while True:
            await asyncio.sleep(WATCHING_MEMORY)
            for child in self._children:
                if child is not None and child.alive and child.memory > most:
                    child.kill("memory")


def _not_open() -> Problem:
    return Problem(
        503,
        "not-open",
        "The model cannot be opened",
        "The server runs, but its worker processes cannot open the model.",
        "Tell the operator of the server, whose log says why.",
        retry_after=60,
    )


def _waited(limits: Limits, ready: bool) -> Problem:
    return Problem(
        503,
        "waited",
        "Waited too long" if ready else "Not ready",
        f"No worker was free within {limits.wait_limit:g} s."
        if ready
        else f"The model was not open within {limits.wait_limit:g} s.",
        "Try again after the seconds that Retry-After says.",
        retry_after=10,
    )


def _lost(killed_for: str | None, how: str, limits: Limits) -> Problem:
    if killed_for == "time":
        return Problem(
            503,
            "time",
            "Took too long",
            f"The image was not done after {limits.time_limit:g} s.",
            "Make the image smaller; as it is, it will take as long again.",
            retry_after=60,
        )
    if killed_for == "memory" or "SIGKILL" in how:
        return Problem(
            503,
            "memory",
            "Out of memory",
            "The processes that worked on the image were ended, as they are when memory runs out."
            if killed_for is None
            else "The process that worked on the image took more memory than it may.",
            "Make the image smaller, or try again later.",
            retry_after=10,
        )
    return Problem(
        500,
        "crash",
        "The worker process has crashed",
        "The process that worked on the image has ended; others are not affected.",
        "Open the image with another program and save it anew before it is sent again.",
    )
