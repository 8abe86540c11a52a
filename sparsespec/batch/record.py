"""``run.json``: what was asked, on which machine, and what became of every image."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

import sparsespec
from sparsespec._atomic import AtomicFile
from sparsespec._threads import available_cpus
from sparsespec.batch.store import Store

__all__ = [
    "REASONS",
    "RECORD_NAME",
    "BatchResult",
    "RecordWriter",
    "Row",
    "Rows",
    "is_record",
    "jsonable",
    "machine",
    "stored_rows",
]

RECORD_NAME = "run.json"
REASONS = ("unreadable", "refused", "error", "memory", "timeout", "crash", "unlisted", "storage", "output")
"""Why there is no result, in this order: the file is damaged or no image; it is not to be read; the segmenter raised;
out of memory; over the time limit; it ended the process, and is quarantined; its folder could not be listed; a file
could not be fetched or written; results cannot be written any more, or a server is gone, which ends the run."""

_PROGRAM = "sparsespec"
_LIBRARIES = ("numpy", "scipy", "numba", "scikit-image", "pyamg", "onnxruntime", "imageio", "pillow", "tifffile")


@dataclass
class Row:
    """What became of one image.

    Attributes
    ----------
    path : str
        The image, relative to the input folder.
    status : str
        ``done``, ``failed``, or ``skipped`` (the run ended before its turn).
    mask, overlay : str or None
        Files written, relative to the output folder.
    size : (int, int) or None
        Width and height in pixels, after the orientation flag was followed.
    instances : int
        How many were found.
    scores : list of float
        Their scores, descending.
    seconds : dict of str to float
        Time by stage, and ``total``.
    details : dict
        What the segmenter says about its work: grid, tokens, solver, provider.
    error : str or None
        Why there is no result, on one line.
    reason : str or None
        The same as one of `REASONS`.
    page : int or None
        Which page of a file that has several, from 1.
    cutouts : list of str
        Cut-outs written, by rising label, relative to the output folder.
    yolo : str or None
        Labels for YOLO, relative to the output folder.
    fingerprint : str or None
        State of the input file, see `sparsespec.batch.store.Store.fingerprint`.
    """

    path: str
    status: str = "skipped"
    mask: str | None = None
    overlay: str | None = None
    size: tuple[int, int] | None = None
    instances: int = 0
    scores: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    reason: str | None = None
    page: int | None = None
    cutouts: list[str] = field(default_factory=list)
    yolo: str | None = None
    fingerprint: str | None = None


class Rows(Sequence[Row]):
    """The rows of a ``run.json``, read when they are asked for, one after the other: there may be millions."""

    def __init__(self, store: Store, count: int) -> None:
        self._store = store
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        with self._store.fetched(RECORD_NAME) as path:
            for row in stored_rows(path):
                size = row.pop("size", None)
                yield Row(**row, size=None if size is None else tuple(size))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return list(self)[index]
        if not -self._count <= index < self._count:
            raise IndexError(f"there are {self._count} rows, not one with the index {index}")
        return next(islice(self, index % self._count, None))


@dataclass(frozen=True)
class BatchResult:
    """A finished or interrupted run.

    Attributes
    ----------
    output : str
        Folder or URL of the results.
    rows : Rows
        One for each image, in the order of the inputs; read from ``run.json``.
    counts : dict of str to int
        How many images have which status, and under ``instances`` how many instances they have together.
    seconds : float
        Wall time of this run, without those that it went on from.
    earlier : int
        Files that were settled when it began.
    interrupted : bool
        Ended by Ctrl-C.
    blocked : str or None
        Ended since results could not be written any more, and why.
    stopped : bool
        Ended by the first failure, as was asked for.
    """

    output: str
    rows: Rows
    counts: Mapping[str, int]
    seconds: float
    earlier: int = 0
    interrupted: bool = False
    blocked: str | None = None
    stopped: bool = False

    def count(self, status: str) -> int:
        """Count the images with this status."""
        return self.counts.get(status, 0)

    @property
    def instances(self) -> int:
        """Instances found in all images together."""
        return self.counts.get("instances", 0)


class RecordWriter:
    """``run.json``, written as a stream.

    Parameters
    ----------
    path : Path
        Target; it appears with `close`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - lives as long as this object
        self.counts: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        """Add the next row."""
        # One line an image: long records stay readable, and tools for lines can work on them.
        before = b",\n  " if self.counts["images"] else b"  "
        self._rows.write(before + json.dumps(jsonable(vars(row)), allow_nan=False).encode())
        self.counts.update({"images": 1, row.status: 1, "instances": row.instances})

    def close(
        self,
        *,
        state: str,
        parameters: Mapping[str, Any],
        execution: Mapping[str, Any],
        started: str,
        finished: str | None,
        seconds: float,
    ) -> None:
        """Write the file.

        Parameters
        ----------
        state : str
            ``running``, ``finished``, ``interrupted``, ``blocked`` (results could not be written any more) or
            ``stopped`` (at the first failure).
        parameters : mapping
            What the run was asked to do, as far as results depend on it.
        execution : mapping
            How it was done: engine, workers, where results went.
        started, finished : str
            ISO 8601 with the offset to UTC; `finished` is None while it runs.
        seconds : float
            Wall time.
        """
        record = {
            "program": _PROGRAM,
            "version": sparsespec.__version__,
            "state": state,
            "started": started,
            "finished": finished,
            "parameters": dict(parameters),
            "execution": dict(execution),
            "machine": machine(),
            "totals": {
                **{name: self.counts[name] for name in ("images", "done", "failed", "skipped", "instances")},
                "seconds": round(seconds, 3),
            },
        }
        head = json.dumps(jsonable(record), indent=1, allow_nan=False)
        with AtomicFile(self._path) as file:
            file.write(f'{head[:-2]},\n "images": [\n'.encode())
            self._rows.seek(0)
            shutil.copyfileobj(self._rows, file)
            file.write(b"\n ]\n}\n")
        self.discard()

    def discard(self) -> None:
        """Give the temporary file back."""
        with suppress(OSError):  # closing flushes, which a full disk refuses
            self._rows.close()


def stored_rows(record: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a ``run.json`` one after the other; what is not whole ends it.

    Raises
    ------
    OSError
        It is there and cannot be read.
    """
    try:
        with record.open("rb") as file:
            for line in file:
                if line.strip() == b'"images": [':
                    break
            for line in file:
                text = line.strip()
                if text == b"]":
                    return
                row = json.loads(text.removesuffix(b",")) if text else None
                if isinstance(row, dict) and isinstance(row.get("path"), str):
                    yield row
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return


def is_record(path: Path) -> bool:
    """Tell whether a file is the ``run.json`` of a run of ours; reads its first bytes only."""
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError:
        return False
    return f'"program": "{_PROGRAM}"'.encode() in start


@cache
def machine() -> dict[str, Any]:
    """Describe where a run takes place: no name, no address, what is needed to compare timings."""
    libraries = {}
    for name in _LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cpus": available_cpus(),
        "libraries": libraries,
    }


def jsonable(value: Any) -> Any:
    """Bring a value to what JSON knows: NumPy numbers and arrays, paths and tuples; NaN and infinity become null."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [jsonable(item) for item in sorted(value, key=str)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value)
