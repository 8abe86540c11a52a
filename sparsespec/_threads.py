"""How many processors this process may use, one answer for ONNX Runtime and Numba alike; threads that share work."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from sparsespec._cgroups import cpu_quota

# More than any machine has: threads are started as they are needed, and wait for more work.
_MOST_HELPERS = 1024


class ForkError(RuntimeError):
    """A forked process wants to use what its parent had used: the threads that belong to it exist there only."""


def available_cpus() -> int:
    """Count the processors granted to this process.

    The smallest of the scheduler affinity and the quota of the control groups it is in, since libraries that ask the
    operating system for "all cores" take the host's and ignore both. Part of a processor counts as one.

    Returns
    -------
    int
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = cpu_quota()
    if quota is not None:
        count = min(count, math.ceil(quota))
    return max(1, count)


@functools.cache
def granted_cpus() -> int:
    """Return :func:`available_cpus` as it was when first asked: asking takes longer than the smaller kernels run."""
    return available_cpus()


_limit = threading.local()


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Let everything that the calling thread does meanwhile, and that isn't told otherwise, use at most so many."""
    before = getattr(_limit, "threads", None)
    _limit.threads = threads
    try:
        yield
    finally:
        _limit.threads = before


def default_threads() -> int:
    """Return how many threads to use where nothing was said: the limit in force, or all that were granted."""
    return getattr(_limit, "threads", None) or granted_cpus()


class Team:
    """Threads of Python that share the work of kernels which let go of the interpreter lock.

    For many short stretches this is quicker than Numba's own threads, whose kernels take three times as long to compile
    and which keep a processor busy for a while after each. The calling thread is the first of the team; the others
    belong to the process and serve all teams.

    Parameters
    ----------
    threads
        At most so many; None for :func:`default_threads`.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._others = max(1, threads or default_threads()) - 1

    def share(self, work: Callable[[int, int], object], begin: int, end: int, at_once: int = 1) -> None:
        """Call ``work(from, to)`` for stretches of a range until all is done; each thread takes the next one.

        Parameters
        ----------
        work
            Called by several threads at a time, for stretches that don't overlap.
        begin, end
            The range.
        at_once
            Length of a stretch.
        """
        stretches = iter(range(begin, end, at_once))

        def take() -> None:
            for first in stretches:
                work(first, min(first + at_once, end))

        others = min(self._others, (end - begin - 1) // at_once)
        started = [_helpers(os.getpid()).submit(take) for _ in range(others)]
        try:
            take()
        finally:
            for other in started:
                # All is taken by now; one that is still waiting for a thread has nothing left to do.
                if not other.cancel():
                    other.result()


_helpers_lock = threading.Lock()
_helpers_of: dict[int, ThreadPoolExecutor] = {}


def _helpers(process: int) -> ThreadPoolExecutor:
    # Threads don't survive a fork: each process has its own.
    with _helpers_lock:
        if process not in _helpers_of:
            _helpers_of[process] = ThreadPoolExecutor(_MOST_HELPERS, thread_name_prefix="sparsespec")
        return _helpers_of[process]


if hasattr(os, "register_at_fork"):
    # The lock may be held by a thread of the parent at that moment.
    os.register_at_fork(
        before=_helpers_lock.acquire, after_in_parent=_helpers_lock.release, after_in_child=_helpers_lock.release
    )
