"""The outcomes of all shards in the order of the inputs, as a stream."""

from __future__ import annotations

import heapq
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from sparsespec.batch.job import Item, Outcome, in_order
from sparsespec.batch.journal import outcome_from, outcome_to
from sparsespec.batch.record import Row
from sparsespec.batch.state import State

__all__ = ["merged"]

# Files of one kind open at the same time: records while runs of them are joined, and runs of two levels. Systems allow
# a process 256 at least, and others need some too.
_FILES_AT_ONCE = 64

_Key = tuple[list[str], int]


def merged(state: State, shards: int, items: Callable[[int], Sequence[Item]], scratch: Path) -> Iterator[Outcome]:
    """Give the outcomes of all shards in the order of the inputs; files not reached with the status ``skipped``.

    Memory does not grow with the number of images.

    Parameters
    ----------
    state : State
        Of the run.
    shards : int
        Their number.
    items : callable
        Gives the files of a shard, in order.
    scratch : Path
        Folder for temporary files, where there are too many shards to be read at once.
    """
    if shards <= _FILES_AT_ONCE:
        with ExitStack() as stack:
            yield from _outcomes([_shard(state, number, items(number), stack) for number in range(shards)])
        return
    levels: list[list[IO[bytes]]] = [[]]
    try:
        for first in range(0, shards, _FILES_AT_ONCE):
            with ExitStack() as stack:
                group = range(first, min(first + _FILES_AT_ONCE, shards))
                streams = [_shard(state, number, items(number), stack) for number in group]
                levels[0].append(_spooled(streams, scratch))
            for level, runs in enumerate(levels):
                if len(runs) < _FILES_AT_ONCE:
                    break
                if level + 1 == len(levels):
                    levels.append([])
                levels[level + 1].append(_joined(runs, scratch))
        for level in range(len(levels) - 1):
            if levels[level]:
                levels[level + 1].append(_joined(levels[level], scratch))
        yield from _outcomes([_read(run) for run in levels[-1]])
    finally:
        for runs in levels:
            for run in runs:
                run.close()


def _joined(runs: list[IO[bytes]], scratch: Path) -> IO[bytes]:
    joined = _spooled([_read(run) for run in runs], scratch)
    for run in runs:
        run.close()
    runs.clear()
    return joined


def _outcomes(streams: Sequence[Iterator[tuple[_Key, Outcome]]]) -> Iterator[Outcome]:
    for _, outcome in heapq.merge(*streams, key=lambda entry: entry[0]):
        yield outcome


def _shard(state: State, number: int, items: Sequence[Item], stack: ExitStack) -> Iterator[tuple[_Key, Outcome]]:
    known = {item.path: item for item in items}
    seen = set()
    settled: Iterator[Outcome] = state.outcomes(number, set(known), stack)
    missing: list[Item] = []
    position = 0
    for outcome in settled:
        path = outcome.row.path
        if outcome.name != known[path].name:
            continue
        if not known[path].card:
            outcome.card = None
        seen.add(path)
        # What was not reached stands between what was, as in the list of inputs.
        while items[position].path != path:
            if items[position].path not in seen:
                missing.append(items[position])
            position += 1
        yield from _skipped(missing)
        missing.clear()
        yield _key(outcome), outcome
    yield from _skipped([item for item in items[position:] if item.path not in seen])


def _skipped(items: Sequence[Item]) -> Iterator[tuple[_Key, Outcome]]:
    for item in items:
        outcome = Outcome(Row(path=item.path, status="skipped", error="not reached"), name=item.name)
        yield _key(outcome), outcome


def _key(outcome: Outcome) -> _Key:
    return in_order(outcome.row.path), outcome.row.page or 0


def _spooled(streams: Sequence[Iterator[tuple[_Key, Outcome]]], scratch: Path) -> IO[bytes]:
    file: IO[bytes] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - whoever merges it closes it
    for outcome in _outcomes(streams):
        line = [outcome_to(outcome), outcome.row.seconds, outcome.row.fingerprint]
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
    file.seek(0)
    return file


def _read(run: IO[bytes]) -> Iterator[tuple[_Key, Outcome]]:
    for line in run:
        outcome = outcome_from(*json.loads(line))
        yield _key(outcome), outcome
