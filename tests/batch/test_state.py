from __future__ import annotations

import errno
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch.job import Item, Outcome, failure
from sparsespec.batch.plan import Plan, PlanError, shard_of
from sparsespec.batch.record import RecordWriter, Row
from sparsespec.batch.state import State
from sparsespec.batch.store import LocalStore


def outcome(path: str, page: int | None = None, seconds: float = 1.5) -> Outcome:
    row = Row(path=path, status="done", page=page, seconds={"total": seconds}, fingerprint=f"print of {path}")
    return Outcome(row, files={f"masks/{path}.png": 3}, name=path)


def state(folder: Path) -> State:
    return State(LocalStore(folder))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder / ".sparsespec").as_posix() for path in folder.rglob("*") if path.is_file()}


def killed(found: State, shard: int, settled: dict[str, list[Outcome]], begun: tuple[str, ...] = ()) -> None:
    journal = found.journal(shard)
    for path, outcomes in settled.items():
        journal.begin(Item(path, path))
        journal.settle(path, outcomes)
    for path in begun:
        journal.begin(Item(path, path))
    descriptor, journal._descriptor = journal._descriptor, None
    assert descriptor is not None
    os.close(descriptor)


def streamed(found: State, shard: int, paths: set[str]) -> list[Outcome]:
    with ExitStack() as stack:
        return list(found.outcomes(shard, paths, stack))


def test_the_plan(tmp_path: Path) -> None:
    found = state(tmp_path)
    assert found.plan() is None
    plan = Plan({"seed": 0}, "digest", 3)
    found.write_plan(plan)
    assert found.plan() == plan
    (tmp_path / ".sparsespec" / "plan.json").write_bytes(b"{")
    with pytest.raises(PlanError, match="damaged"):
        found.plan()


def test_a_file_in_the_place_of_the_state(tmp_path: Path) -> None:
    (tmp_path / ".sparsespec").write_text("mine")
    with pytest.raises(PlanError, match=r"'\.sparsespec' is no folder"):
        state(tmp_path).plan()


def test_a_finished_shard_is_one_sorted_record_without_times(tmp_path: Path) -> None:
    found = state(tmp_path)
    pages = [outcome("b/scan.tif", page, seconds=page) for page in (1, 2)]
    settled = {"b.jpg": [outcome("b.jpg")], "b/scan.tif": pages, "a.jpg": [failure(Item("a.jpg", "a"), "bad", "error")]}
    killed(found, 7, settled)
    past, finished = found.past(7)
    assert (past.settled, finished) == (settled, False)
    found.finish(7, settled, past.sources)
    assert files(tmp_path) == {"records/000007.jsonl", "times/000007.json"}
    assert not (tmp_path / ".sparsespec" / "journal" / "000007").exists()
    past, finished = found.past(7)
    assert (past.settled, past.sources, finished) == (settled, [], True)
    record = (tmp_path / ".sparsespec" / "records" / "000007.jsonl").read_text()
    # Part by part, as the inputs are: "b/..." before "b.jpg".
    assert [json.loads(line)["path"] for line in record.splitlines()] == [
        "a.jpg", "b/scan.tif", "b/scan.tif", "b.jpg",
    ]  # fmt: skip
    assert "print of" not in record
    # The same whatever the times and the order.
    for entry in pages:
        entry.row.seconds = {"total": 99.0}
    found.finish(7, dict(reversed(settled.items())), [])
    assert (tmp_path / ".sparsespec" / "records" / "000007.jsonl").read_text() == record
    assert streamed(found, 7, {"b/scan.tif"}) == pages


def test_journals_count_more_than_the_record(tmp_path: Path) -> None:
    found = state(tmp_path)
    found.finish(0, {"a": [outcome("a")], "b": [failure(Item("b", "b"), "bad", "error")]}, [])
    killed(found, 0, {"b": [outcome("b")]}, begun=("c",))
    past, finished = found.past(0)
    assert finished
    assert past.settled == {"a": [outcome("a")], "b": [outcome("b")]}
    assert past.begun == {"c": 1}
    assert streamed(found, 0, {"a", "b", "c"}) == [outcome("a"), outcome("b")]
    assert found.shards() == [0]


def test_only_what_is_asked_for_is_streamed(tmp_path: Path) -> None:
    found = state(tmp_path)
    assert streamed(found, 0, {"a"}) == []
    found.finish(0, {path: [outcome(path)] for path in "abc"}, [])
    assert [entry.row.path for entry in streamed(found, 0, {"a", "c", "x"})] == ["a", "c"]


@pytest.mark.parametrize("damage", [b"{", b"", b"[1]", b'{"path": "b"}', b"\xff\xff", b"null"])
def test_a_damaged_line_of_a_record_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    found = state(tmp_path)
    found.finish(0, {path: [outcome(path)] for path in "abc"}, [])
    path = tmp_path / ".sparsespec" / "records" / "000000.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]))
    assert list(found.past(0)[0].settled) == ["a", "c"]
    assert [entry.row.path for entry in streamed(found, 0, {"a", "b", "c"})] == ["a", "c"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": []}', '{"a": 7}'])
def test_lost_times_are_no_loss(tmp_path: Path, damage: str) -> None:
    found = state(tmp_path)
    found.finish(0, {"b": [outcome("b")]}, [])
    (tmp_path / ".sparsespec" / "times" / "000000.json").write_text(damage)
    (entry,) = found.past(0)[0].settled["b"]
    assert entry.row.seconds == {}
    assert entry.row.fingerprint is None
    assert entry.files == {"masks/b.png": 3}


def write_record(folder: Path, rows: list[Row]) -> Path:
    record = RecordWriter(folder / "run.json")
    for row in rows:
        record.add(row)
    about: dict[str, Any] = {"parameters": {}, "execution": {}, "started": "", "finished": "", "seconds": 1.0}
    record.close(state="finished", **about)
    return folder / "run.json"


def test_times_come_back_from_the_record_of_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsespec.batch.state._ROWS_AT_ONCE", 3)
    found = state(tmp_path)
    paths = [f"{number}.jpg" for number in range(10)]
    settled = {path: [outcome(path, seconds=number)] for number, path in enumerate(paths)}
    settled["scan.tif"] = [outcome("scan.tif", page, seconds=100 + page) for page in (1, 2, 3)]
    for shard in range(2):
        found.finish(shard, {path: settled[path] for path in settled if shard_of(path, 2) == shard}, [])
    rows = [entry.row for path in sorted(settled) for entry in settled[path]]
    found.drop_times()
    assert files(tmp_path) == {"records/000000.jsonl", "records/000001.jsonl"}
    record = write_record(tmp_path, [*rows, Row(path="never", status="skipped")])
    found.restore_times(record, lambda path: shard_of(path, 2))
    for shard in range(2):
        for path, outcomes in found.past(shard)[0].settled.items():
            assert outcomes == settled[path]
    # What is known later counts.
    found.finish(0, {path: [outcome(path, seconds=77)] for path in paths if shard_of(path, 2) == 0}, [])
    found.restore_times(record, lambda path: shard_of(path, 2))
    assert {entry[0].row.seconds["total"] for entry in found.past(0)[0].settled.values()} == {77}


@pytest.mark.parametrize("content", ["", "{", "[]", ' "images": [\n  {"path": "a"', '{"images": [{"path": 3}]}'])
def test_a_damaged_record_of_a_run_has_no_times(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    state(tmp_path).restore_times(tmp_path / "run.json", lambda path: 0)
    assert not (tmp_path / ".sparsespec").exists()


def test_everything_is_forgotten_but_the_lock(tmp_path: Path) -> None:
    found = state(tmp_path)
    found.write_plan(Plan({}, "", 2))
    found.finish(0, {"a": [outcome("a")]}, [])
    killed(found, 1, {"b": [outcome("b")]})
    (tmp_path / ".sparsespec" / "lock").touch()
    assert found.shards() == [0, 1]
    found.clear()
    assert [path.name for path in (tmp_path / ".sparsespec").iterdir()] == ["lock"]
    assert found.shards() == []


def test_a_damaged_page_of_a_record_casts_doubt_on_all_files_of_several_pages(tmp_path: Path) -> None:
    found = state(tmp_path)
    pages = [outcome("scan.tif") for _ in range(3)]
    for number, entry in enumerate(pages, start=1):
        entry.row.page = number
    found.finish(0, {"a": [outcome("a")], "scan.tif": pages}, [])
    assert list(found.past(0)[0].settled) == ["a", "scan.tif"]
    path = tmp_path / ".sparsespec" / "records" / "000000.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert list(found.past(0)[0].settled) == ["a"]


def test_a_record_of_a_run_that_cannot_be_read_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = write_record(tmp_path, [Row(path="a", status="done", fingerprint="1-2")])

    def broken(self: Path, *arguments: Any, **options: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(OSError, match=r"Input/output|I/O"):
        state(tmp_path).restore_times(record, lambda path: 0)
