"""What is done already, noted image by image, in a form that a run killed in the middle of a line leaves readable."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsespec.batch.job import Item, Outcome
from sparsespec.batch.record import Row, jsonable
from sparsespec.batch.store import Store

__all__ = ["Journal", "Past", "outcome_from", "outcome_to", "read_journals"]

# A request for each image would cost more than doing a few again.
_LINES_AT_ONCE = 16
_SECONDS_AT_MOST = 20.0
_VOLATILE = ("seconds", "fingerprint")


def outcome_to(outcome: Outcome) -> dict[str, Any]:
    """Turn an outcome into JSON values, the path and the page first; times and the like are left out."""
    row = outcome.row
    content: dict[str, Any] = {"path": row.path, "page": row.page}
    content.update(
        (key, jsonable(value)) for key, value in vars(row).items() if key not in content and key not in _VOLATILE
    )
    content["name"] = outcome.name
    content["files"] = outcome.files
    content["annotations"] = outcome.annotations
    content["properties"] = outcome.properties
    content["card"] = outcome.card
    return content


def outcome_from(
    content: Mapping[str, Any], seconds: Mapping[str, float] | None = None, fingerprint: str | None = None
) -> Outcome:
    """Turn JSON values of `outcome_to` back into an outcome."""
    fields = dict(content)
    name, files, annotations = fields.pop("name"), fields.pop("files"), fields.pop("annotations")
    properties, card = fields.pop("properties"), fields.pop("card")
    if fields["size"] is not None:
        fields["size"] = tuple(fields["size"])
    row = Row(**fields, seconds=dict(seconds or {}), fingerprint=fingerprint)
    return Outcome(row, annotations, properties, card, files, name)


@dataclass
class Past:
    """What journals tell of a shard.

    Attributes
    ----------
    settled : dict of str to list of Outcome
        By path: the outcomes of files that were finished.
    begun : dict of str to int
        By path: how many runs that didn't end by themselves were at work on a file that nobody has finished since.
    names : dict of str to str
        By path: output names of all files that were begun.
    sources : list of str
        Paths of the journals in the store.
    """

    settled: dict[str, list[Outcome]] = field(default_factory=dict)
    begun: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)


class Journal:
    """Notes of one process on one shard. Each attempt has a file of its own: two may work on the same shard.

    Parameters
    ----------
    store : Store
        Of the output.
    folder : str
        Of the shard's journals, relative to the output.

    Attributes
    ----------
    sources : list of str
        Files written, relative to the output.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._folder = folder
        self.sources: list[str] = []
        # By their names journals are read in the order in which they were begun: the last word counts.
        self._token = f"{time.time_ns():016x}{secrets.token_hex(4)}"
        self._descriptor: int | None = None
        self._waiting: list[bytes] = []
        self._last = time.monotonic()
        self._lock = threading.Lock()
        self._empty = True
        self._closed = False
        self._torn = False

    def begin(self, item: Item) -> None:
        """Note that the work on a file begins."""
        self._add({"begun": item.path, "name": item.name})

    def settle(self, path: str, outcomes: list[Outcome]) -> None:
        """Note the outcomes of a file."""
        lines = [[outcome_to(outcome), outcome.row.seconds, outcome.row.fingerprint] for outcome in outcomes]
        self._add({"settled": path, "outcomes": lines})

    def close(self) -> None:
        """Note that this process ends by itself: whatever it had begun is no suspect."""
        if self._closed:
            return
        try:
            if not self._empty:
                self._add({"closed": True})
            with self._lock:
                self._flush()
            self._closed = True
        finally:
            with self._lock:
                if self._descriptor is not None:
                    os.close(self._descriptor)
                    self._descriptor = None

    def _add(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, allow_nan=False).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        with self._lock:
            self._empty = False
            if self._store.folder is None:
                self._waiting.append(line)
                late = time.monotonic() - self._last > _SECONDS_AT_MOST
                if late or sum(b'"settled"' in waiting[:20] for waiting in self._waiting) >= _LINES_AT_ONCE:
                    self._flush()
                return
            if self._descriptor is None:
                self.sources.append(f"{self._folder}/{self._token}.jsonl")
                path = self._store.folder / self.sources[-1]
                path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
                self._descriptor = os.open(path, flags, 0o666)
            # A line that could not be written whole, on a full disk, takes no other with it.
            rest = memoryview(b"\n" + line if self._torn else line)
            self._torn = True
            while rest:
                # Not buffered: what is written outlives this process, if not the machine; what a power cut takes from
                # the end is done again.
                rest = rest[os.write(self._descriptor, rest) :]
            self._torn = False

    def _flush(self) -> None:
        if self._waiting:
            part = f"{self._folder}/{self._token}-{len(self.sources):06d}.jsonl"
            self._store.write(part, b"".join(self._waiting))
            self.sources.append(part)
            self._waiting.clear()
        self._last = time.monotonic()


def read_journals(store: Store, folder: str) -> Past:
    """Read all journals of a shard, as far as they are whole."""
    past = Past()
    # By attempt: the files it was at work on, as far as nobody has settled them since.
    open_: dict[str, set[str]] = {}
    closed: set[str] = set()
    past.sources = sorted(store.list(folder))
    for source in past.sources:
        attempt = source.rpartition("/")[2].partition(".")[0].partition("-")[0]
        begun = open_.setdefault(attempt, set())
        for content in _lines(_read(store, source)):
            if "settled" in content:
                path = content["settled"]
                past.settled[path] = [outcome_from(*entry) for entry in content["outcomes"]]
                for others in open_.values():
                    others.discard(path)
            elif "begun" in content:
                begun.add(content["begun"])
                past.names[content["begun"]] = content["name"]
            elif "closed" in content:
                closed.add(attempt)
    past.begun = dict(Counter(path for attempt, begun in open_.items() if attempt not in closed for path in begun))
    return past


def _read(store: Store, source: str) -> bytes:
    try:
        return store.read(source)
    except FileNotFoundError:  # whoever else works on the shard has just written its record, which is read after this
        return b""


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n"):
        checksum, _, text = line.partition(b" ")
        try:
            # Nothing has the checksum 0, with which a line that was cut in its checksum may begin.
            if not text or int(checksum, 16) != zlib.crc32(text):
                continue
        except ValueError:
            continue
        yield json.loads(text)
