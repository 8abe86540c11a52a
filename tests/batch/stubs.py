"""Segmenters for worker processes, which import this module: what they do depends on the grey of the first pixel."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Result:
    labels: np.ndarray
    scores: np.ndarray
    info: dict[str, Any] = field(default_factory=dict)


def segfault() -> None:
    ctypes.string_at(0)


def allocate() -> None:
    held = []
    while True:
        held.append(np.ones(1 << 20))
        time.sleep(0.002)


def pretend_prints() -> None:
    print("printed by Python", flush=True)
    os.write(1, b"printed by a library\n")
    ctypes.CDLL(None).puts(b"printed by a library in C") if os.name == "posix" else None


def stubborn() -> None:
    """Sleep without letting any other thread of Python run."""
    ctypes.PyDLL(None).sleep(1000)


ACTIONS = {
    "segfault": segfault,
    "abort": os.abort,
    "exit": lambda: os._exit(3),
    "sys.exit": lambda: sys.exit("no reason"),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(1000),
    "slow": lambda: time.sleep(0.3),
    "stubborn": stubborn,
    "allocate": allocate,
    "print": pretend_prints,
}


@dataclass(frozen=True)
class Stub:
    """Takes the bright pixels for one object, and does something else where an image is marked.

    Attributes
    ----------
    marks
        What to do at which grey.
    notes
        Folder: each process leaves an empty file with its number there, and locks it while it lives.
    once
        Do it the first time only.
    threads
        As a worker process has set them.
    """

    marks: dict[int, str] = field(default_factory=dict)
    notes: Path | None = None
    once: bool = False
    threads: int = 0

    def with_threads(self, threads: int) -> Stub:
        return Stub(self.marks, self.notes, self.once, threads)

    def __call__(self, image: np.ndarray, *, out: np.ndarray | None = None) -> Result:
        if self.notes is not None:
            note(self.notes)
        grey = int(image[0, 0, 0])
        if grey in self.marks and self._now(grey):
            ACTIONS[self.marks[grey]]()
        labels = (image.max(axis=2) > 200).astype(np.int32)
        scores = np.full(int(labels.max(initial=0)), 0.5, np.float32)
        info = {"model": "stub", "tokens": self.threads, "solver": os.environ.get("NUMBA_NUM_THREADS")}
        return Result(labels, scores, info)

    def _now(self, grey: int) -> bool:
        if not self.once:
            return True
        assert self.notes is not None
        done = self.notes / f"once-{grey}"
        if done.exists():
            return False
        done.touch()
        return True


class Unloadable:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return (_refuse, ("the model is missing",))

    def __call__(self, image: np.ndarray) -> Result:
        raise NotImplementedError


def _refuse(why: str) -> None:
    raise FileNotFoundError(why)


class Dying:
    """Ends the process that unpickles it."""

    def __init__(self, how: str, notes: Path) -> None:
        self.how, self.notes = how, notes

    def __reduce__(self) -> Any:
        return (_die, (self.how, self.notes))

    def __call__(self, image: np.ndarray) -> Result:
        raise NotImplementedError


def _die(how: str, notes: Path) -> None:
    note(notes)
    print("my last words", file=sys.stderr, flush=True)
    ACTIONS[how]()


_held: list[Any] = []


def note(folder: Path) -> None:
    path = folder / f"pid-{os.getpid()}"
    if not path.exists():
        _held.append(path.open("w"))
        if os.name == "posix":
            import fcntl

            fcntl.flock(_held[-1], fcntl.LOCK_EX)
