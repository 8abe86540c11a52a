"""What runs in a worker process of `sparsespec.batch.processes`: one job, kept open, and one file after the other.

The process talks to its parent in frames, each a pickled pair of a kind and a content with its length before it.
Requests are ``("job", (pickled job, threads))``, answered by ``("ready", None)`` or ``("unusable", (line, text))``, and
``("file", item)``, answered by ``("done", outcomes)``.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import shutil
import signal
import struct
import sys
import threading
import traceback
from dataclasses import replace
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsespec.batch.job import Item, Job

__all__ = ["LIFELINE", "SCRATCH", "frame", "main", "read_frame", "write_frame"]

SCRATCH = "SPARSESPEC_WORKER_SCRATCH"
"""Variable of the environment: the folder for temporary files of this process, removed with it."""
LIFELINE = "SPARSESPEC_WORKER_LIFELINE"
"""Variable of the environment: the number of a pipe that breaks when the parent is gone."""

_LENGTH = struct.Struct("<Q")
# Of 1000, added to what the system thinks of a process when memory has run out: it is to take this one, not its parent.
_SOONER_KILLED = 500


def frame(kind: str, content: Any) -> bytes:
    """Pickle a message."""
    return pickle.dumps((kind, content), protocol=pickle.HIGHEST_PROTOCOL)


def write_frame(file: IO[bytes], content: bytes) -> None:
    """Send a message, pickled; an OSError when nobody reads it."""
    file.write(_LENGTH.pack(len(content)) + content)
    file.flush()


def read_frame(file: IO[bytes]) -> bytes:
    """Receive a message, still pickled; an EOFError when the other side has closed its end."""
    length = _LENGTH.unpack(_exactly(file, _LENGTH.size))[0]
    return _exactly(file, length)


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError
    return content


def main(requests: IO[bytes]) -> None:
    """Answer requests until the parent closes its end.

    Parameters
    ----------
    requests : binary file
        Not file descriptor 0 itself, which is closed to everything that runs here, as is 1: whatever a library prints
        goes to 2.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    _let_be_killed_first()
    _die_with_parent()
    inbox: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests, inbox), daemon=True).start()

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


def _receive(requests: IO[bytes], inbox: SimpleQueue[bytes]) -> None:
    """Read ahead, to notice the end of the parent while a file is at work."""
    try:
        while True:
            inbox.put(read_frame(requests))
    except (EOFError, OSError):
        scratch = os.environ.get(SCRATCH)
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
        # Threads of the network's runtime would be waited for otherwise, and nobody wants their results.
        os._exit(0)


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


def _let_be_killed_first() -> None:
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
            score = int(file.read())
            file.seek(0)
            file.write(str(min(1000, score + _SOONER_KILLED)))
    except (OSError, ValueError):
        return


def _die_with_parent() -> None:
    """Let the system end this process with its parent, even while code that lets no other thread run is at work."""
    lifeline = os.environ.get(LIFELINE)
    if lifeline and sys.platform == "linux":
        import fcntl

        # The system sends a signal when the pipe breaks, which nobody handles and which therefore ends the process.
        descriptor = int(lifeline)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
