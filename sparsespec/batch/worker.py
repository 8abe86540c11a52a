"""What runs in a worker process of `sparsespec.batch.processes`: one job, kept open, and one file after the other.

The process talks to its parent in frames, each a pickled pair of a kind and a content with its length before it.
Requests are ``("job", (pickled job, threads))``, answered by ``("ready", None)`` or ``("unusable", (line, text))``, and
``("file", item)``, answered by ``("done", outcomes)``.
"""

from __future__ import annotations

import pickle
import traceback
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from sparsespec._processes import frame, talk, write_frame

if TYPE_CHECKING:
    from sparsespec.batch.job import Item, Job

__all__ = ["main"]


def main(requests: IO[bytes]) -> None:
    """Answer requests until the parent closes its end.

    Parameters
    ----------
    requests : binary file
        For `sparsespec._processes.talk`.
    """
    answers, inbox = talk(requests)
    job: Job | None = None
    while True:
        kind, content = pickle.loads(inbox.get())
        if kind == "job":
            try:
                job = None  # the one before gives back its memory first
                job = _opened(*content)
                answer = frame("ready", None)
            except Exception as error:
                answer = frame("unusable", (f"{type(error).__name__}: {error}", traceback.format_exc()))
        else:
            assert job is not None
            answer = _answer(job, content)
        write_frame(answers, answer)


def _opened(pickled: bytes, threads: int) -> Job:
    """Unpickle a job and make ready whatever the first file would otherwise have to wait for."""
    job: Job = pickle.loads(pickled)
    segmenter: Any = job.segmenter
    if hasattr(segmenter, "with_threads"):
        segmenter = segmenter.with_threads(threads)
        job = replace(job, segmenter=segmenter)
    if hasattr(segmenter, "warm_up"):
        segmenter.warm_up()
    return job


def _answer(job: Job, item: Item) -> bytes:
    from sparsespec.batch import one
    from sparsespec.batch.job import failure

    try:
        return frame("done", one.process_file(job, item))
    except Exception as error:  # most likely something that cannot be pickled
        kind = "memory" if isinstance(error, MemoryError) else "error"
        return frame("done", [failure(item, one.explain(error, None), kind)])
