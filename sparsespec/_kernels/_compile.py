"""The one place that decides how kernels are compiled and run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numba

from sparsespec._threads import default_threads

# No "nnan" and no "ninf": kernels are asked about NaN and infinity and must answer as documented.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}

_Function = TypeVar("_Function", bound=Callable[..., Any])

_parallel_lock = threading.Lock()


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
            compiled: _Function = numba.njit(cache=True, **options)(function)
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
    """
    with _parallel_lock:
        before = numba.get_num_threads()
        numba.set_num_threads(max(1, min(threads or default_threads(), numba.config.NUMBA_NUM_THREADS)))
        try:
            yield
        finally:
            numba.set_num_threads(before)
