"""Worker processes: how they are started, talked to and ended, whatever they work on.

A worker is a fresh interpreter that talks to its parent through pipes, in frames with their length before them. It dies
with its parent in any way that this one may die, and before it when memory runs out.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import IO, Any, Protocol

__all__ = [
    "GRACE",
    "LAST_GRACE",
    "LENGTH",
    "SCRATCH",
    "TAIL",
    "WATCHING_MEMORY",
    "EndedError",
    "Launch",
    "WorkerError",
    "ending",
    "frame",
    "greeting",
    "kill_group",
    "launching",
    "memory_of",
    "on_one_line",
    "read_frame",
    "talk",
    "write_frame",
]

SCRATCH = "SPARSESPEC_WORKER_SCRATCH"
"""Variable of the environment: the folder for temporary files of this process, removed with it."""
GRACE = 2.0
"""Seconds that an idle process gets to end by itself, and one that has closed its pipe."""
LAST_GRACE = 10.0
"""And one that was killed: it may hang in a call to the system, for a file server that does not answer."""
WATCHING_MEMORY = 0.02
"""Seconds between two looks at the memory of a process, which takes it by the gigabyte in a second."""
TAIL = 8192
"""Bytes that are kept of what a process writes to its standard error."""
LENGTH = struct.Struct("<Q")
"""What stands before each message."""

# The number of a pipe that breaks when the parent is gone.
_LIFELINE = "SPARSESPEC_WORKER_LIFELINE"
# Of 1000, added to what the system thinks of a process when memory has run out: it is to take this one, not its parent.
_SOONER_KILLED = 500
_LONGEST_LINE = 200

# Run with -P: no file that happens to lie in the current folder is imported before the paths are the parent's.
_BOOT = """
import os, pickle
requests = os.fdopen(os.dup(0), "rb")
import sys
sys.path[:] = pickle.load(requests)
from {module} import main
main(requests)
"""

_ENDINGS = {
    "SIGKILL": "killed from outside, as the system does when memory runs out",
    "SIGSEGV": "it touched memory that is not its own",
    "SIGBUS": "a file mapped to memory could not be read or written",
    "SIGABRT": "a library gave up",
    "SIGFPE": "a library's arithmetic failed",
    "SIGILL": "a library uses instructions that this processor does not have",
    "SIGTERM": "it was told to end",
}


class WorkerError(RuntimeError):
    """Worker processes cannot work at all, whatever the file."""


class EndedError(Exception):
    """A worker process has ended, or was made to, without an answer."""


# Messages


def frame(kind: str, content: Any) -> bytes:
    """Pickle a message."""
    return pickle.dumps((kind, content), protocol=pickle.HIGHEST_PROTOCOL)


def write_frame(file: IO[bytes], content: bytes) -> None:
    """Send a message, pickled; an OSError when nobody reads it."""
    file.write(LENGTH.pack(len(content)) + content)
    file.flush()


def read_frame(file: IO[bytes]) -> bytes:
    """Receive a message, still pickled; an EOFError when the other side has closed its end."""
    length = LENGTH.unpack(_exactly(file, LENGTH.size))[0]
    return _exactly(file, length)


def _exactly(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError
    return content


def greeting() -> bytes:
    """Give what a process has to be sent first: where it finds modules, which is where this one does."""
    return pickle.dumps([os.path.abspath(entry) for entry in sys.path])


# In the parent


@dataclass
class Launch:
    """How to start a worker process.

    Attributes
    ----------
    command : tuple of str
        The interpreter and its arguments.
    options : dict
        More arguments of `subprocess.Popen`.
    lifeline : int or None
        File descriptor to be kept open for as long as the process is to live, and closed after it.
    """

    command: tuple[str, ...]
    options: dict[str, Any]
    lifeline: int | None = None


@contextmanager
def launching(module: str, threads: int, **environment: str) -> Iterator[Launch]:
    """Make ready to start a process with the function ``main`` of a module, and start it in this context.

    Parameters
    ----------
    module : str
        Its ``main`` is given the binary file of requests, see `talk`.
    threads : int
        Of each library.
    **environment : str
        More variables.

    Raises
    ------
    WorkerError
        There is no interpreter, or the system starts no process.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise WorkerError("worker processes need a Python interpreter, which sys.executable does not name here")
    variables = {**os.environ, **_thread_counts(threads), **environment}
    launch = Launch((sys.executable, "-P", "-c", _BOOT.format(module=module)), {"env": variables})
    if sys.platform == "win32":
        import subprocess

        launch.options["creationflags"] = subprocess.CREATE_NEW_PROCESS_GROUP
    else:
        # No Ctrl-C of the terminal, which is for the parent alone.
        launch.options["start_new_session"] = True
    reader = None
    try:
        if sys.platform == "linux":
            reader, launch.lifeline = os.pipe()
            variables[_LIFELINE] = str(reader)
            launch.options["pass_fds"] = (reader,)
        yield launch
    except BaseException as error:
        if launch.lifeline is not None:
            os.close(launch.lifeline)
        if isinstance(error, OSError):
            raise WorkerError(f"a worker process could not be started: {error}") from error
        raise
    finally:
        if reader is not None:
            os.close(reader)


def _thread_counts(threads: int) -> dict[str, str]:
    # NumPy's matrices are small here: threads that wait for each other cost more than they save.
    return {
        "NUMBA_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


class _Started(Protocol):
    """A process of `subprocess` or of `asyncio`."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...


def kill_group(process: _Started) -> None:
    """Kill a process and whatever it has started itself."""
    with suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def memory_of(pid: int) -> int:
    """Bytes of memory of a process of its own, without the pages of files, which the system can take back."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/status", "rb") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith((b"RssAnon:", b"VmSwap:")))
    return 0


def ending(code: int | None, words: str) -> str:
    """Say how a process has ended, by its exit code and what it has written to its standard error."""
    if code is None:
        return "hangs in a call to the system and cannot be ended"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"ended by {name}" + (f" ({_ENDINGS[name]})" if name in _ENDINGS else "")
    lines = words.splitlines()
    shown = f"{code:#x}" if code > 255 else str(code)
    return f"ended with exit code {shown}" + (f" ({on_one_line(lines[-1])})" if lines else "")


def on_one_line(text: str) -> str:
    """Bring a text to one line that is not too long."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "…"


# In the process itself


def talk(requests: IO[bytes]) -> tuple[IO[bytes], SimpleQueue[bytes]]:
    """Begin to work: the file for answers, and the requests as they come, still pickled.

    From now on this process ends when its parent closes the pipe of requests, or is gone.

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
    return answers, inbox


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
    lifeline = os.environ.get(_LIFELINE)
    if lifeline and sys.platform == "linux":
        import fcntl

        # The system sends a signal when the pipe breaks, which nobody handles and which therefore ends the process.
        descriptor = int(lifeline)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_ASYNC)
