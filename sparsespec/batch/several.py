"""Several images at once: threads of this process that share one segmenter and one session of the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager

from sparsespec.batch.job import Item, Outcome
from sparsespec.images import PixelSource

__all__ = ["PIXELS_AT_ONCE", "Room", "Threads"]

PIXELS_AT_ONCE = 50_000_000
"""Pixels of all images at work together, unless it is a single one: some 20 bytes each while it is segmented."""

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


class Threads:
    """Threads that work on files, a few ahead of whoever asks for the outcomes.

    Parameters
    ----------
    work
        Called with a file, by several threads.
    workers
        Threads.
    """

    def __init__(self, work: Callable[[Item], list[Outcome]], workers: int) -> None:
        self._work = work
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sparsespec-image")
        self._begun: dict[Future[list[Outcome] | None], Item] = {}

    def outcomes(self, items: Iterable[Item], stopping: threading.Event) -> Iterator[tuple[Item, list[Outcome]]]:
        """Yield what becomes of each file, as it is finished."""
        following = iter(items)
        exhausted = False
        while True:
            # One more than there are threads: none waits for the outcome of another to be noted.
            while not exhausted and not stopping.is_set() and len(self._begun) <= self._workers:
                item = next(following, None)
                if item is None:
                    exhausted = True
                else:
                    self._begun[self._pool.submit(self._unless_stopping, item, stopping)] = item
            if not self._begun:
                return
            done = wait(self._begun, timeout=_LISTENING, return_when=FIRST_COMPLETED).done
            for future in done:
                item = self._begun.pop(future)
                outcomes = future.result()
                if outcomes is not None:
                    yield item, outcomes

    def _unless_stopping(self, item: Item, stopping: threading.Event) -> list[Outcome] | None:
        return None if stopping.is_set() else self._work(item)

    def close(self) -> None:
        """Wait for nothing more; what is at work goes on in the background, and nobody asks for it."""
        self._pool.shutdown(wait=False, cancel_futures=True)
