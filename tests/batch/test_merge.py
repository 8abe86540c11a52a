from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch import merge
from sparsespec.batch.job import Item, Outcome, in_order
from sparsespec.batch.merge import merged
from sparsespec.batch.plan import shard_of
from sparsespec.batch.record import Row
from sparsespec.batch.state import State
from sparsespec.batch.store import LocalStore


def paths_of(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    names = ["a", "b", "a.b", "a-b", "ü", "Z", "caf\udce9"]
    found = set()
    while len(found) < count:
        folders = rng.choices(names, k=rng.randrange(3))
        found.add("/".join([*folders, f"{rng.choice(names)}{rng.randrange(10 * count)}.jpg"]))
    return sorted(found, key=in_order)


def outcome(path: str, page: int | None = None) -> Outcome:
    row = Row(path=path, status="done", page=page, seconds={"total": len(path)}, fingerprint=path[::-1])
    return Outcome(row, [{"label": 1}], [{"area": 2}], path, {f"masks/{path}.png": 3}, path)


class Run:
    """A run of so many shards, of which some are finished, some at work, and some not begun."""

    def __init__(self, folder: Path, paths: Sequence[str], shards: int, seed: int) -> None:
        rng = random.Random(seed)
        self.state = State(LocalStore(folder))
        self.shards = shards
        self.by_shard: list[list[Item]] = [[] for _ in range(shards)]
        self.expected: list[tuple[str, int | None, str]] = []
        settled: list[dict[str, list[Outcome]]] = [{} for _ in range(shards)]
        kinds = [rng.choice(["finished", "at work", "at work", "not begun"]) for _ in range(shards)]
        for path in paths:
            shard = shard_of(path, shards)
            self.by_shard[shard].append(Item(path, path))
            if kinds[shard] == "finished" or (kinds[shard] == "at work" and rng.random() < 0.6):
                pages = [None] if rng.random() < 0.8 else [1, 2, 3]
                settled[shard][path] = [outcome(path, page) for page in pages]
                self.expected += [(path, page, "done") for page in pages]
            else:
                self.expected.append((path, None, "skipped"))
        for shard, kind in enumerate(kinds):
            if kind == "finished":
                self.state.finish(shard, settled[shard], [])
            elif settled[shard]:
                journal = self.state.journal(shard)
                for path in rng.sample(sorted(settled[shard]), len(settled[shard])):
                    journal.settle(path, settled[shard][path])
                journal.close()

    def items(self, shard: int) -> list[Item]:
        return self.by_shard[shard]

    def merged(self, scratch: Path) -> Iterator[Outcome]:
        return merged(self.state, self.shards, self.items, scratch)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("at_once", [2, 3, 128])
def test_all_come_in_the_order_of_the_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, at_once: int
) -> None:
    monkeypatch.setattr(merge, "_FILES_AT_ONCE", at_once)
    run = Run(tmp_path, paths_of(seed, 120), 1 + 4 * seed, seed)
    found = list(run.merged(tmp_path))
    assert [(entry.row.path, entry.row.page, entry.row.status) for entry in found] == run.expected
    for entry in found:
        if entry.row.status == "done":
            assert entry == outcome(entry.row.path, entry.row.page)
        else:
            assert (entry.row.error, entry.name) == ("not reached", entry.row.path)
    assert not list(tmp_path.glob("*.tmp"))


def test_no_images(tmp_path: Path) -> None:
    assert list(merged(State(LocalStore(tmp_path)), 1, lambda shard: [], tmp_path)) == []


def test_what_is_no_longer_so_is_not_told(tmp_path: Path) -> None:
    state = State(LocalStore(tmp_path))
    state.finish(0, {path: [outcome(path)] for path in "abc"}, [])
    items = [Item("a", "a", card=False), Item("b", "other name")]
    found = list(merged(state, 1, lambda shard: items, tmp_path))
    assert [(entry.row.path, entry.row.status, entry.card) for entry in found] == [
        ("a", "done", None),
        ("b", "skipped", None),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")
@pytest.mark.parametrize("shards", [6, 60])
def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    monkeypatch.setattr(merge, "_FILES_AT_ONCE", 6)
    run = Run(tmp_path, paths_of(0, 300), shards, seed=3)
    assert sum(1 for path in (tmp_path / ".sparsespec" / "records").iterdir()) >= 2
    before = len(os.listdir("/proc/self/fd"))
    most = [0]
    heap_merge = merge.heapq.merge

    def counting(*streams: Iterator[Any], key: Callable[[Any], Any]) -> Iterator[Any]:
        for entry in heap_merge(*streams, key=key):
            most[0] = max(most[0], len(os.listdir("/proc/self/fd")) - before)
            yield entry

    monkeypatch.setattr(merge.heapq, "merge", counting)
    assert len(list(run.merged(tmp_path))) == len(run.expected)
    # Of a merge, and runs of each level that wait for theirs; the folder that is listed is one more.
    assert 1 < most[0] <= 6 + 2 * 6 + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_memory_holds_one_image_of_each_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished shards are read line by line, whatever their size."""
    alive, most = [0], [0]
    outcome_from = merge.outcome_from

    class Counted(Outcome):
        def __init__(self, whole: Outcome) -> None:
            super().__init__(**vars(whole))
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self) -> None:
            alive[0] -= 1

    counted: Callable[..., Outcome] = lambda *arguments: Counted(outcome_from(*arguments))  # noqa: E731
    monkeypatch.setattr("sparsespec.batch.state.outcome_from", counted)
    monkeypatch.setattr(merge, "outcome_from", counted)
    monkeypatch.setattr(merge, "_FILES_AT_ONCE", 4)
    paths, shards = paths_of(1, 600), 12
    state = State(LocalStore(tmp_path))
    for shard in range(shards):
        state.finish(shard, {path: [outcome(path)] for path in paths if shard_of(path, shards) == shard}, [])
    items = [[Item(path, path) for path in paths if shard_of(path, shards) == shard] for shard in range(shards)]
    count = sum(1 for _ in merged(state, shards, lambda shard: items[shard], tmp_path))
    assert count == 600
    assert most[0] <= 2 * 4 + 2


def test_a_merge_that_is_given_up_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_FILES_AT_ONCE", 3)
    run = Run(tmp_path, paths_of(0, 100), 20, 0)
    stream = run.merged(tmp_path)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    # An open file would be a ResourceWarning, which is an error here.
    del stream


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_files_that_are_open_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_FILES_AT_ONCE", 4)
    paths, shards = paths_of(0, 300), 60
    state = State(LocalStore(tmp_path))
    for shard in range(shards):
        state.finish(shard, {path: [outcome(path)] for path in paths if shard_of(path, shards) == shard}, [])
    most = 0

    def items(shard: int) -> list[Item]:
        nonlocal most
        most = max(most, len(os.listdir("/proc/self/fd")))
        return [Item(path, path) for path in paths if shard_of(path, shards) == shard]

    before = len(os.listdir("/proc/self/fd"))
    count = 0
    for _ in merged(state, shards, items, tmp_path):
        most = max(most, len(os.listdir("/proc/self/fd")))
        count += 1
    assert count == 300
    assert before + 4 <= most <= before + 3 * 4
    # With as many as are open otherwise there is room for three times so many on every system.
    monkeypatch.undo()
    assert 3 * merge._FILES_AT_ONCE < 256 - 32
