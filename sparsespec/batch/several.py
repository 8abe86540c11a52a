"""Several images at once: threads of this process that share one segmenter and one session of the network."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

from sparsespec.batch.job import Outcome
from sparsespec.images import PixelSource

__all__ = ["PIXELS_AT_ONCE", "InOrder", "Room"]

PIXELS_AT_ONCE = 50_000_000
"""Pixels of all images at work together, unless it is a single one: some 20 bytes each while it is segmented."""

# Outcomes that wait for a slow one before them hold a small picture each.
_AHEAD = 8
# Ctrl-C is not heeded on Windows while a lock is waited for.
_LISTENING = 0.5


class Room:
    """Room for so many pixels in memory.

    Only one image at a time is opened, and waits with its pixels until there is room for it; one that is larger than
    the room has it for itself.

    Parameters
    ----------
    pixels
        Of all images together.
    """

    def __init__(self, pixels: int = PIXELS_AT_ONCE) -> None:
        self._pixels = pixels
        self._free = pixels
        self._door = threading.Lock()
        self._left = threading.Condition()

    @contextmanager
    def admit(self, opening: AbstractContextManager[PixelSource]) -> Iterator[PixelSource]:
        """Open an image when it is its turn, and keep its room until it is closed."""
        with ExitStack() as stack:
            with self._door:
                source = stack.enter_context(opening)
                taken = min(self._pixels, source.shape[0] * source.shape[1])
                with self._left:
                    self._left.wait_for(lambda: self._free >= taken)
                    self._free -= taken
            stack.callback(self._leave, taken)
            yield source

    def _leave(self, taken: int) -> None:
        with self._left:
            self._free += taken
            self._left.notify_all()


class InOrder:
    """Outcomes of images that threads work on, in the order of the images.

    Parameters
    ----------
    work
        Called with the number of an image, by several threads.
    count
        Images.
    workers
        Threads.
    """

    def __init__(self, work: Callable[[int], Outcome], count: int, workers: int) -> None:
        self._work = work
        self._following = iter(range(count))
        self._ahead = _AHEAD * workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sparsespec-image")
        self._begun: deque[tuple[int, Future[Outcome]]] = deque()

    def __iter__(self) -> Iterator[tuple[int, Outcome]]:
        self._begin()
        while self._begun:
            number, future = self._begun[0]
            while not wait([future], timeout=_LISTENING).done:
                pass
            yield number, future.result()
            # Only now: whoever is interrupted meanwhile gets it again from `rest`.
            self._begun.popleft()
            self._begin()

    def _begin(self) -> None:
        while len(self._begun) < self._ahead:
            number = next(self._following, None)
            if number is None:
                return
            self._begun.append((number, self._pool.submit(self._work, number)))

    def rest(self) -> Iterator[tuple[int, Outcome]]:
        """Begin nothing more; yield what is at work when it is finished, and what nobody has asked for yet."""
        for _, future in self._begun:
            future.cancel()
        for number, future in self._begun:
            if future.cancelled():
                continue
            while not wait([future], timeout=_LISTENING).done:
                pass
            if future.exception() is None:
                yield number, future.result()

    def drop(self, undo: Callable[[int, Outcome], None]) -> None:
        """Wait for nothing more; call ``undo`` with all that was begun and not asked for, as it is finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for number, future in self._begun:
            future.add_done_callback(partial(_undone, undo, number))


def _undone(undo: Callable[[int, Outcome], None], number: int, future: Future[Outcome]) -> None:
    if not future.cancelled() and future.exception() is None:
        undo(number, future.result())
