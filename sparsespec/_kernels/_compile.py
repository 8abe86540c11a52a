"""The one place that decides how kernels are compiled and run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numba

from sparsespec._threads import ForkError, default_threads

# No "nnan" and no "ninf": kernels are asked about NaN and infinity and must answer as documented.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}

_Function = TypeVar("_Function", bound=Callable[..., Any])

_parallel_lock = threading.Lock()
_lost_to_fork = ""


def _has_place_for_cache() -> bool:
    """Tell whether Numba may look for a folder to keep compiled kernels in.

    Without HOME, and for a user who has no entry in the system's list, as in many containers, it would make one called
    "~" in the working directory.
    """
    beside = Path(__file__).parent
    return (
        any(os.environ.get(name) for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"))
        or os.path.expanduser("~") != "~"
        or os.access(beside / "__pycache__" if (beside / "__pycache__").exists() else beside, os.W_OK)
    )


_CACHE = _has_place_for_cache()


def kernel(*, parallel: bool = False, fastmath: bool = False) -> Callable[[_Function], _Function]:
    """Compile a function lazily, without the interpreter lock, and cached on disk where that is possible.

    Parameters
    ----------
    parallel
        Spread ``numba.prange`` loops over threads; call such a kernel inside :func:`parallel_region`.
    fastmath
        Allow the rewrites of :data:`FASTMATH` (sums may be reordered; NaN and infinity stay what they are).
    """

    def decorate(function: _Function) -> _Function:
        options: dict[str, Any] = {
            "nogil": True,
            "parallel": parallel,
            "fastmath": FASTMATH if fastmath else False,
            "error_model": "numpy",
        }
        try:
            compiled: _Function = numba.njit(cache=_CACHE, **options)(function)
        except RuntimeError:
            # Neither the package's folder nor the user's cache folder can be written: compile once per process instead.
            compiled = numba.njit(**options)(function)
        return compiled

    return decorate


def device(*, fastmath: bool = False) -> Callable[[_Function], _Function]:
    """Compile a function that only kernels call: as :func:`kernel`, without what it takes to call it from Python.

    That halves what a first run waits for. The kernels that use it hold its code in their own entries on disk.
    """

    def decorate(function: _Function) -> _Function:
        compiled: _Function = numba.njit(
            nogil=True,
            fastmath=FASTMATH if fastmath else False,
            error_model="numpy",
            no_cpython_wrapper=True,
            no_cfunc_wrapper=True,
        )(function)
        return compiled

    return decorate


@contextmanager
def parallel_region(threads: int | None = None) -> Iterator[None]:
    """Run parallel kernels one at a time, on so many threads or on :func:`~sparsespec._threads.default_threads`.

    Numba's fallback threading layer aborts the process when two Python threads enter it at once, hence the lock.

    Raises
    ------
    ForkError
        In a process that was forked after such a kernel had run, when Numba's threads don't survive that: GNU OpenMP
        would end the process instead.
    """
    if _lost_to_fork:
        raise ForkError(
            f"Numba's threads ({_lost_to_fork}) were in use in the process that this one was forked from, and don't"
            ' survive that: start processes with multiprocessing.get_context("spawn"), or segment nothing before the'
            " fork"
        )
    with _parallel_lock:
        before = numba.get_num_threads()
        numba.set_num_threads(max(1, min(threads or default_threads(), numba.config.NUMBA_NUM_THREADS)))
        try:
            yield
        finally:
            numba.set_num_threads(before)


def _after_fork() -> None:
    global _parallel_lock, _lost_to_fork
    _parallel_lock = threading.Lock()  # another thread may have held it
    try:
        layer = numba.threading_layer()
    except ValueError:  # none was started
        return
    if layer != "workqueue":
        _lost_to_fork = layer


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
