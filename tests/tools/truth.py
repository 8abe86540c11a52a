"""What is true about a run, from its label images alone; runs in the environments of the tools, without sparsespec."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Truth:
    """One photograph: its path in the input, its label image and the row of ``run.json``."""

    path: str
    labels: np.ndarray
    row: dict

    @property
    def masks(self) -> list[np.ndarray]:
        """The mask of each instance, by rising label."""
        return [self.labels == label for label in np.unique(self.labels) if label > 0]


def read(run: Path) -> list[Truth]:
    """Read all photographs of a run."""
    rows = json.loads((run / "run.json").read_bytes())["images"]
    found = [Truth(row["path"], np.asarray(Image.open(run / row["mask"])), row) for row in rows]
    assert sum(len(truth.masks) for truth in found) > 5
    return found


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask, the latter two exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & other).sum() / max(1, (one | other).sum()))


def in_one_piece(mask: np.ndarray) -> bool:
    """Whether all pixels of a mask hang together, at corners at least."""
    leader: list[int] = []

    def first(run: int) -> int:
        while leader[run] != run:
            run = leader[run]
        return run

    above: list[tuple[int, int, int]] = []
    for row in mask:
        bounds = np.flatnonzero(np.diff(row, prepend=False, append=False)).reshape(-1, 2).tolist()
        here = []
        for begin, end in bounds:
            number = len(leader)
            leader.append(number)
            here.append((begin, end, number))
            for begin_above, end_above, number_above in above:
                if begin_above <= end and begin <= end_above:
                    leader[first(number_above)] = number
        above = here
    return len({first(run) for run in range(len(leader))}) == 1


def agreement(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[str, bool]:
    """Say how far masks that were read agree with the true ones, and whether all are the same."""
    values = [(overlap(found, true), bool((found == true).all())) for found, true in pairs]
    exact = sum(same for _, same in values)
    text = f"{exact} of {len(values)} masks equal"
    if exact < len(values):
        text += f"; IoU {spread([value for value, _ in values])}"
    return text, exact == len(values)


def yolo_agreement(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[str, bool]:
    """As `agreement`, where masks in several pieces have pixels too many along the lines that link the pieces."""
    whole, linked = [], []
    for pair in pairs:
        (whole if in_one_piece(pair[1]) else linked).append(pair)
    text, right = agreement(whole)
    text += " of those in one piece"
    if linked:
        text += f"; {len(linked)} in pieces, linked by lines: IoU {spread([overlap(*pair) for pair in linked])}"
    return text, right and all(bool(found[true].all()) for found, true in linked)


def spread(values: list[float]) -> str:
    """Mean and smallest."""
    return f"{sum(values) / len(values):.4f} on average, {min(values):.4f} at worst"


def report(version: str, reads: str, result: str, right: bool) -> None:
    """Print a row for ``run.py``."""
    state = "right" if right else "wrong"
    print("row " + json.dumps({"version": version, "reads": reads, "result": result, "state": state}), flush=True)


def by_instance(truths: Iterable[Truth]) -> Iterator[tuple[Truth, int, np.ndarray]]:
    """All instances: photograph, label and mask."""
    for truth in truths:
        for label in np.unique(truth.labels[truth.labels > 0]).tolist():
            yield truth, label, truth.labels == label
