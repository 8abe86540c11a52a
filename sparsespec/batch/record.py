"""``run.json``: what was asked, on which machine, and what became of every image."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import sparsespec
from sparsespec._atomic import write_atomic
from sparsespec._threads import available_cpus

__all__ = ["REASONS", "RECORD_NAME", "BatchResult", "Row", "is_record", "jsonable", "machine", "write_record"]

RECORD_NAME = "run.json"
REASONS = ("unreadable", "refused", "error", "memory", "timeout", "crash", "unlisted", "storage")
"""Why there is no result: the file is damaged or no image; it is not to be read (size, a link out of the input, a bad
name); the segmenter raised; out of memory; over the time limit; it ended the process, and is quarantined; its folder
could not be listed; input or output could not be reached."""

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


@dataclass(frozen=True)
class BatchResult:
    """A finished or interrupted run.

    Attributes
    ----------
    output : Path
        Folder of the results.
    rows : list of Row
        One for each image, in the order of the inputs.
    seconds : float
        Wall time.
    interrupted : bool
        Ended by Ctrl-C.
    """

    output: Path
    rows: list[Row]
    seconds: float
    interrupted: bool = False

    def count(self, status: str) -> int:
        """Count the images with this status."""
        return sum(row.status == status for row in self.rows)

    @property
    def instances(self) -> int:
        """Instances found in all images together."""
        return sum(row.instances for row in self.rows)

    def totals(self) -> dict[str, Any]:
        """Sum up for the record."""
        return {
            "images": len(self.rows),
            "done": self.count("done"),
            "failed": self.count("failed"),
            "skipped": self.count("skipped"),
            "instances": self.instances,
            "seconds": round(self.seconds, 3),
        }


def write_record(
    path: Path,
    result: BatchResult,
    *,
    state: str,
    parameters: Mapping[str, Any],
    started: str,
    finished: str | None,
) -> None:
    """Write ``run.json``, whole or not at all.

    Parameters
    ----------
    path : Path
        Target.
    result : BatchResult
        What there is so far.
    state : str
        ``running``, ``finished`` or ``interrupted``.
    parameters : mapping
        What the run was asked to do.
    started, finished : str
        ISO 8601 with the offset to UTC; `finished` is None while it runs.
    """
    record = {
        "program": _PROGRAM,
        "version": sparsespec.__version__,
        "state": state,
        "started": started,
        "finished": finished,
        "parameters": dict(parameters),
        "machine": machine(),
        "totals": result.totals(),
    }
    head = json.dumps(jsonable(record), indent=1, allow_nan=False)
    # One line an image: long records stay readable, and tools for lines can work on them.
    rows = ",\n".join("  " + json.dumps(jsonable(vars(row)), allow_nan=False) for row in result.rows)
    write_atomic(path, f'{head[:-2]},\n "images": [\n{rows}\n ]\n}}\n'.encode())


def is_record(path: Path) -> bool:
    """Tell whether a file is the ``run.json`` of a run of ours; reads its first bytes only."""
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError:
        return False
    return f'"program": "{_PROGRAM}"'.encode() in start


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
