"""The engine that works on images in this process, one after the other or several at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sparsespec.batch.job import Item, Job, Outcome
from sparsespec.batch.one import process_file
from sparsespec.batch.several import Room, Threads

__all__ = ["Inline"]


@dataclass(frozen=True)
class Inline:
    """Works on images in threads of this process, which share one segmenter.

    It cannot end what takes too long, and a file that ends the process ends the run; the next run finds out which.

    Attributes
    ----------
    workers : int
        Images at the same time. The segmenter must allow calls from so many threads: a `sparsespec.Segmenter` works on
        as many as its Backbone's ``concurrency``. Images of more than `sparsespec.batch.several.PIXELS_AT_ONCE` pixels
        are worked on alone.

    Raises
    ------
    ValueError
        `workers` is less than 1.
    """

    workers: int = 1

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers!r}")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What goes into ``run.json``."""
        return {"engine": "inline", "workers": self.workers}

    def outcomes(
        self,
        job: Job,
        items: Iterable[Item],
        *,
        begin: Callable[[Item], None],
        stopping: threading.Event,
    ) -> Iterator[tuple[Item, list[Outcome]]]:
        """Work on files, see `sparsespec.batch.job.Engine`.

        Raises
        ------
        ValueError
            `job` has a time limit.
        """
        if job.time_limit is not None:
            raise ValueError("time_limit needs worker processes: a thread cannot be stopped")
        warm_up = _WarmUp(job.segmenter)
        if self.workers == 1:
            following = iter(items)
            while not stopping.is_set():
                item = next(following, None)
                if item is None:
                    return
                begin(item)
                yield item, process_file(job, item, warm_up=warm_up)
            return
        room = Room()

        def work(item: Item) -> list[Outcome]:
            begin(item)
            return process_file(job, item, admit=room.admit, warm_up=warm_up)

        threads = Threads(work, self.workers)
        try:
            yield from threads.outcomes(items, stopping)
        finally:
            threads.close()


class _WarmUp:
    """Makes a segmenter ready, once, so that no image's time is that of compiling kernels and opening the model.

    It is asked to when there is an image that could be opened: a run without one takes no time for it. Segmenters that
    have no ``warm_up`` are left as they are, and what goes wrong is for the image to tell.
    """

    def __init__(self, segmenter: Any) -> None:
        self._warm_up: Callable[[], object] | None = getattr(segmenter, "warm_up", None)
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """Give the seconds that this took, or that another thread took for it."""
        if self._warm_up is None:
            return 0.0
        began = time.perf_counter()
        with self._lock:
            if self._warm_up is not None:
                with suppress(Exception):
                    self._warm_up()
                self._warm_up = None
        return time.perf_counter() - began
