"""What a run keeps beside its results to go on from: the plan, records of finished shards, journals of the others.

All of it lies in ``.sparsespec/`` of the output:

- ``plan.json``: what the results depend on, see `sparsespec.batch.plan`
- ``journal/000017/*.jsonl``: what is settled of a shard, as it happens, see `sparsespec.batch.journal`
- ``records/000017.jsonl``: the same of a finished shard, one line an image, sorted, without times
- ``times/000017.json``: its times, which go into ``run.json`` in the end
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsespec._atomic import settle_folder
from sparsespec.batch.job import Outcome, in_order
from sparsespec.batch.journal import Journal, Past, outcome_from, outcome_to, read_journals
from sparsespec.batch.plan import Plan, PlanError
from sparsespec.batch.record import stored_rows
from sparsespec.batch.store import Store

__all__ = ["STATE", "State"]

STATE = ".sparsespec"
"""Folder of the state, in the output."""

_ROWS_AT_ONCE = 50_000


@dataclass(frozen=True)
class State:
    """The state of a run.

    Attributes
    ----------
    store : Store
        Of the output.
    """

    store: Store

    def plan(self) -> Plan | None:
        """Read the plan; None when there is none.

        Raises
        ------
        PlanError
            There is one that cannot be read.
        """
        try:
            return Plan.decode(self.store.read(f"{STATE}/plan.json"))
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise PlanError(f"'{STATE}' is no folder") from error

    def write_plan(self, plan: Plan) -> None:
        """Note what the run is."""
        self.store.write(f"{STATE}/plan.json", plan.encode())

    def journal(self, shard: int) -> Journal:
        """Begin to note what happens to a shard."""
        return Journal(self.store, _journals(shard))

    def past(self, shard: int) -> tuple[Past, bool]:
        """Read what is known of a shard, and whether it was finished."""
        past = read_journals(self.store, _journals(shard))
        recorded: dict[str, list[Outcome]] = {}
        times = self._times(shard)
        try:
            lines = self.store.read(_record(shard)).splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return past, False
        damaged = False
        for line in lines:
            outcome = _recorded(line, times)
            if outcome is not None:
                recorded.setdefault(outcome.row.path, []).append(outcome)
            else:
                damaged = True
        if damaged:
            # It may have been a page of any file that has several, of which the others are not all.
            recorded = {path: outcomes for path, outcomes in recorded.items() if outcomes[0].row.page is None}
        past.settled = {**recorded, **past.settled}
        return past, True

    def finish(self, shard: int, settled: Mapping[str, list[Outcome]], journals: Iterable[str]) -> None:
        """Write the record of a shard, and remove the journals that it replaces."""
        paths = sorted(settled, key=in_order)
        times = {path: [[outcome.row.seconds, outcome.row.fingerprint] for outcome in settled[path]] for path in paths}
        self.store.write(_times(shard), json.dumps(times, allow_nan=False).encode())
        lines = [json.dumps(outcome_to(outcome), allow_nan=False) + "\n" for path in paths for outcome in settled[path]]
        self.store.write(_record(shard), "".join(lines).encode())
        if self.store.folder is not None:  # a power cut is to leave the journals or the record
            for path in (_times(shard), _record(shard)):
                settle_folder((self.store.folder / path).parent)
        for journal in journals:
            self.store.remove(journal)
        if self.store.folder is not None:
            with suppress(OSError):  # somebody else is at work on it too
                (self.store.folder / _journals(shard)).rmdir()

    def outcomes(self, shard: int, paths: set[str], stack: ExitStack) -> Iterator[Outcome]:
        """Give what is settled of a shard, in order, as far as it is about these paths.

        A finished shard is read line by line; `stack` closes its file.
        """
        if next(self.store.list(_journals(shard)), None) is None:
            try:
                file = stack.enter_context(stack.enter_context(self.store.fetched(_record(shard))).open("rb"))
            except (FileNotFoundError, NotADirectoryError):
                return
            times = self._times(shard)
            for line in file:
                outcome = _recorded(line, times)
                if outcome is not None and outcome.row.path in paths:
                    yield outcome
            return
        settled = self.past(shard)[0].settled
        for path in sorted(settled.keys() & paths, key=in_order):
            yield from settled[path]

    def restore_times(self, record: Path, shard_of: Any) -> None:
        """Take the times of a finished run out of its ``run.json`` again.

        Parameters
        ----------
        record : Path
            The ``run.json``.
        shard_of : callable
            Gives the shard of a path.
        """
        batch: dict[int, dict[str, list[Any]]] = {}
        count, path = 0, None

        def put() -> None:
            for shard, times in batch.items():
                known = self._times(shard)
                self.store.write(_times(shard), json.dumps({**times, **known}).encode())
            batch.clear()

        for row in stored_rows(record):
            if row.get("status") not in ("done", "failed"):
                continue
            if count >= _ROWS_AT_ONCE and row["path"] != path:  # the pages of a file stay together
                put()
                count = 0
            path = row["path"]
            pages = batch.setdefault(shard_of(path), {}).setdefault(path, [])
            pages.append([row.get("seconds") or {}, row.get("fingerprint")])
            count += 1
        put()

    def drop_times(self) -> None:
        """Forget the times: they are in ``run.json`` now."""
        if self.store.folder is not None:
            settle_folder(self.store.folder)
        for path in list(self.store.list(f"{STATE}/times")):
            self.store.remove(path)
        self._remove_folder("times")
        self._remove_folder("journal")

    def clear(self) -> None:
        """Forget everything but the lock."""
        kept = (f"{STATE}/lock", f"{STATE}/plan.json")
        for path in list(self.store.list(STATE)):
            if path not in kept:
                self.store.remove(path)
        # The last, so that there are never records of which nobody knows what they are of.
        self.store.remove(f"{STATE}/plan.json")
        for name in ("times", "records", "journal"):
            self._remove_folder(name)

    def shards(self) -> list[int]:
        """List the shards of which anything is known."""
        found = set()
        for path in self.store.list(STATE):
            kind, _, name = path.removeprefix(f"{STATE}/").partition("/")
            number = name.partition("/")[0].partition(".")[0]
            if kind in ("records", "journal") and number.isdecimal():
                found.add(int(number))
        return sorted(found)

    def _times(self, shard: int) -> dict[str, list[Any]]:
        try:
            times = json.loads(self.store.read(_times(shard)))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        return times if isinstance(times, dict) else {}

    def _remove_folder(self, name: str) -> None:
        if self.store.folder is None:
            return
        folder = self.store.folder / STATE / name
        for inner in sorted(folder.glob("*/"), reverse=True) if name == "journal" else ():
            with suppress(OSError):
                inner.rmdir()
        with suppress(OSError):
            folder.rmdir()


def _recorded(line: bytes, times: Mapping[str, Sequence[Any]]) -> Outcome | None:
    """Read a line of a record; None when the disk has damaged it: then the image is done again."""
    try:
        content = json.loads(line)
        pages = times.get(content["path"], ())
        page = (content["page"] or 1) - 1
        seconds, fingerprint = pages[page] if page < len(pages) else ({}, None)
        return outcome_from(content, seconds, fingerprint)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _journals(shard: int) -> str:
    return f"{STATE}/journal/{shard:06d}"


def _record(shard: int) -> str:
    return f"{STATE}/records/{shard:06d}.jsonl"


def _times(shard: int) -> str:
    return f"{STATE}/times/{shard:06d}.json"
