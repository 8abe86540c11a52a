from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch.inline import Inline
from sparsespec.batch.job import Formats, Item, Job, Outcome, failure
from sparsespec.batch.one import process_file
from sparsespec.batch.shard import Shard, ShardTask, blocked_by, gone, is_hopeless, remove_stale, work_shard
from sparsespec.batch.state import State
from sparsespec.batch.store import LocalStore

Photo = Callable[..., Path]
NUMBER = 3


@pytest.fixture
def job(tmp_path: Path, segmenter: Any, photo: Photo) -> Job:
    for k in range(4):
        photo(tmp_path / "in" / f"{k}.png", 50 + k)
    (tmp_path / "out").mkdir()
    return Job(segmenter, LocalStore(tmp_path / "in"), LocalStore(tmp_path / "out"), formats=Formats(cutouts=True))


ITEMS = [Item(f"{k}.png", f"{k}") for k in range(4)]


def kill(shard: Shard) -> None:
    """Leave what is there when the process is killed."""
    assert shard._journal is not None
    descriptor, shard._journal._descriptor = shard._journal._descriptor, None
    assert descriptor is not None
    os.close(descriptor)


def work(job: Job, items: list[Item], *, until: int | None = None, begun: int = 0) -> Shard:
    """Settle the first of what is pending; be killed, unless it was all."""
    shard = Shard(job, NUMBER, items)
    for item in shard.pending[:until]:
        shard.begin(item)
        shard.settle(item, process_file(job, item))
    for item in shard.pending[until or 0 :][:begun]:
        shard.begin(item)
    if shard.complete:
        shard.finish()
    elif shard._journal is not None:
        kill(shard)
    return shard


def left(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith(".sparsespec/")}


def pending(job: Job, items: list[Item] = ITEMS, **options: Any) -> list[str]:
    shard = Shard(job, NUMBER, items, **options)
    assert shard.settled + len(shard.pending) == len(items)
    return [item.path for item in shard.pending]


def test_a_new_shard_has_all_to_do(job: Job) -> None:
    assert pending(job) == [item.path for item in ITEMS]
    assert not Shard(job, NUMBER, ITEMS).suspects


def test_a_shard_is_gone_on_with_and_finished_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    work(job, ITEMS, until=2, begun=1)
    shard = Shard(job, NUMBER, ITEMS)
    assert [item.path for item in shard.pending] == ["2.png", "3.png"]
    assert shard.suspects == {"2.png": 1}
    assert (shard.settled, shard.complete) == (2, False)
    work(job, ITEMS)
    assert pending(job) == []
    assert State(job.target).past(NUMBER)[1]

    def refused(*_: object) -> None:
        raise AssertionError("the record is there")

    monkeypatch.setattr(State, "finish", refused)
    Shard(job, NUMBER, ITEMS).finish()


def test_a_finished_shard_with_a_journal_beside_it_is_finished_again(job: Job) -> None:
    """The process was killed after the record was written, and before the journal was removed."""
    work(job, ITEMS, until=4)
    record = State(job.target).past(NUMBER)[0]
    state = State(job.target)
    journal = state.journal(NUMBER)
    journal.settle("0.png", record.settled["0.png"])
    journal.close()
    shard = Shard(job, NUMBER, ITEMS)
    assert shard.complete
    shard.finish()
    past, finished = state.past(NUMBER)
    assert (past.sources, finished, past.settled) == ([], True, record.settled)


@pytest.mark.parametrize("damage", ["missing mask", "missing overlay", "missing cut-out", "cut mask"])
def test_missing_or_cut_outputs_are_done_again(job: Job, tmp_path: Path, damage: str) -> None:
    work(job, ITEMS, until=4)
    out = tmp_path / "out"
    path = {
        "mask": out / "masks" / "1.png",
        "overlay": out / "overlays" / "1.jpg",
        "cut-out": out / "cutouts/1/001.png",
    }
    target = path[damage.partition(" ")[2]]
    content = target.read_bytes()
    if damage.startswith("missing"):
        target.unlink()
    else:
        target.write_bytes(content[:-1])
    assert pending(job) == ["1.png"]
    work(job, ITEMS)
    assert target.read_bytes() == content
    assert pending(job) == []


def test_a_changed_input_is_done_again_and_leaves_nothing_of_before(job: Job, tmp_path: Path, photo: Photo) -> None:
    work(job, ITEMS, until=4)
    out = tmp_path / "out"
    assert {"masks/1.png", "cutouts/1/001.png", "cutouts/1/002.png"} <= left(out)
    (tmp_path / "in" / "1.png").write_bytes(b"")
    os.utime(tmp_path / "in" / "2.png", (1, 1))
    assert pending(job) == ["1.png", "2.png"]
    work(job, ITEMS)
    assert not [path for path in left(out) if "/1" in path]
    # Failed, so that it is tried again; but of nothing that is known there is more.
    assert pending(job) == ["1.png"]
    photo(tmp_path / "in" / "1.png", 70)
    work(job, ITEMS)
    assert {"masks/1.png", "cutouts/1/001.png", "cutouts/1/002.png"} <= left(out)


def test_files_of_an_attempt_that_nobody_noted_go_when_the_file_fails(job: Job, tmp_path: Path, photo: Photo) -> None:
    shard = Shard(job, NUMBER, ITEMS)
    shard.begin(ITEMS[1])
    process_file(job, ITEMS[1])
    kill(shard)
    assert "masks/1.png" in left(tmp_path / "out")
    (tmp_path / "in" / "1.png").write_bytes(b"")
    work(job, ITEMS)
    assert not [path for path in left(tmp_path / "out") if "/1" in path]


@pytest.mark.parametrize(
    ("reason", "again"), [("unreadable", True), ("memory", True), ("crash", False), ("timeout", False)]
)
def test_failures_are_tried_again_but_for_the_quarantined(job: Job, tmp_path: Path, reason: str, again: bool) -> None:
    shard = Shard(job, NUMBER, ITEMS[:1])
    process_file(job, ITEMS[0])
    shard.settle(ITEMS[0], [failure(ITEMS[0], "it went wrong", reason)])
    # Processes that ended too early have left something.
    assert bool(left(tmp_path / "out")) == (reason == "unreadable")
    shard.finish()
    assert pending(job, ITEMS[:1]) == (["0.png"] if again else [])
    assert pending(job, ITEMS[:1], retry_quarantined=True) == ["0.png"]
    # Another file is another try.
    os.utime(tmp_path / "in" / "0.png", (1, 1))
    assert pending(job, ITEMS[:1]) == ["0.png"]


def test_another_output_name_is_done_again(job: Job) -> None:
    work(job, ITEMS, until=4)
    items = [ITEMS[0], replace(ITEMS[1], name="1.png"), *ITEMS[2:]]
    assert pending(job, items) == ["1.png"]


def test_a_picture_that_the_report_is_to_show_is_made(job: Job) -> None:
    items = [replace(item, card=False) for item in ITEMS]
    work(job, items, until=4)
    assert not any(path.startswith("report/") for path in left(Path(job.target.place)))
    assert pending(job, [ITEMS[0], *items[1:]]) == ["0.png"]
    work(job, ITEMS)
    assert pending(job, items) == []


def test_a_picture_that_the_report_shows_no_longer_goes(job: Job, tmp_path: Path) -> None:
    """Of more images others are chosen: the files are those of a run that never had it."""
    work(job, ITEMS)
    before = left(tmp_path / "out")
    items = [replace(ITEMS[0], card=False), *ITEMS[1:]]
    for _ in range(2):  # once more after it was killed in between
        remove_stale(job, NUMBER, items)
        assert before - left(tmp_path / "out") == {"report/images/0.jpg", "report/images/0.js"}
        assert pending(job, items) == []
    (outcome,) = State(job.target).past(NUMBER)[0].settled["0.png"]
    assert outcome.card is None
    assert "masks/0.png" in outcome.files
    assert not any(path.startswith("report/") for path in outcome.files)
    assert pending(job, ITEMS) == ["0.png"]


def test_what_is_gone_is_told_and_removed(job: Job, tmp_path: Path) -> None:
    shard = work(job, ITEMS, until=2)
    shard = Shard(job, NUMBER, ITEMS)
    shard.begin(ITEMS[2])
    process_file(job, ITEMS[2])
    kill(shard)
    failed = Shard(job, NUMBER, ITEMS)
    failed.settle(ITEMS[3], [failure(ITEMS[3], "bad", "error")])
    kill(failed)
    rest = ITEMS[:1]
    # What failed has nothing to lose, and of what was at work nobody has anything yet.
    assert gone(job, NUMBER, rest) == ["1.png"]
    for _ in range(2):  # once more after it was killed in between
        remove_stale(job, NUMBER, rest)
        assert {path.split("/")[-1].split(".")[0] for path in left(tmp_path / "out") if "cutouts" not in path} == {"0"}
        assert list(State(job.target).past(NUMBER)[0].settled) == ["0.png"]
    assert gone(job, NUMBER, rest) == []
    assert pending(job, rest) == []


def test_nothing_stale_is_removed_in_the_name_of_another(job: Job, tmp_path: Path) -> None:
    """An image takes the name that another one had."""
    work(job, ITEMS[:1], until=1)
    renamed = [replace(ITEMS[0], name="0.png"), replace(ITEMS[1], name="0")]
    remove_stale(job, NUMBER, renamed)
    assert left(tmp_path / "out") == set()
    shard = Shard(job, NUMBER, renamed)
    shard.settle(renamed[1], process_file(job, renamed[1]))
    kill(shard)
    before = left(tmp_path / "out")
    assert "masks/0.png" in before
    remove_stale(job, NUMBER, renamed)
    assert left(tmp_path / "out") == before


def test_coco_of_a_shard(job: Job, tmp_path: Path) -> None:
    job = replace(job, formats=Formats(coco_shards=True))
    (tmp_path / "in" / "1.png").write_bytes(b"")
    shard = Shard(job, NUMBER, ITEMS)
    for item in reversed(ITEMS):
        outcomes = process_file(job, item)
        if item.path == "2.png":  # it was read before it failed
            outcomes[0].row.status = "failed"
        shard.settle(item, outcomes)
    shard.finish()
    coco = json.loads((tmp_path / "out" / "instances" / "000003.json").read_text())
    assert [(image["id"], image["file_name"]) for image in coco["images"]] == [(3000001, "0.png"), (3000004, "3.png")]
    assert [annotation["id"] for annotation in coco["annotations"]] == [3000001, 3000002, 3000003, 3000004]


def test_work_on_a_shard_elsewhere(job: Job) -> None:
    task = ShardTask(NUMBER, tuple(ITEMS))
    summary = work_shard(job, task, Inline(2))
    assert sorted(summary.rows) == [(f"{k}.png", "done", None, 2) for k in range(4)]
    assert (summary.files, summary.stopped, summary.blocked) == (4, False, None)
    past, finished = State(job.target).past(NUMBER)
    assert finished
    assert past.sources == []
    # To do it again is harmless.
    assert work_shard(job, task, Inline()).rows == []
    assert State(job.target).past(NUMBER)[0].settled == past.settled


def test_a_shard_at_work_twice_at_the_same_time(job: Job, tmp_path: Path) -> None:
    task = ShardTask(NUMBER, tuple(ITEMS))
    threads = [threading.Thread(target=work_shard, args=(job, task, Inline())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pending(job) == []
    assert len({path for path in left(tmp_path / "out") if path.startswith("masks/")}) == 4


def test_only_some_files_of_a_shard(job: Job) -> None:
    summary = work_shard(job, ShardTask(NUMBER, tuple(ITEMS), only=frozenset({"1.png", "3.png"})), Inline())
    assert [row[0] for row in summary.rows] == ["1.png", "3.png"]
    assert (summary.files, summary.stopped) == (2, False)
    assert pending(job) == ["0.png", "2.png"]
    summary = work_shard(job, ShardTask(NUMBER, tuple(ITEMS), quarantined=("2.png",)), Inline())
    rows = {row[0]: row[1] for row in summary.rows}
    assert rows == {"0.png": "done", "2.png": "failed"}
    (found,) = State(job.target).past(NUMBER)[0].settled["2.png"]
    assert found.row.reason == "crash"
    assert "--retry-quarantined" in (found.row.error or "")


def test_a_shard_that_is_stopped_goes_on_later(job: Job) -> None:
    stopping = threading.Event()

    class Stopped(Inline):
        def outcomes(self, *arguments: Any, **options: Any) -> Iterator[tuple[Item, list[Outcome]]]:
            for result in super().outcomes(*arguments, **options):
                stopping.set()
                yield result

    summary = work_shard(job, ShardTask(NUMBER, tuple(ITEMS)), Stopped(), stopping=stopping)
    assert (summary.stopped, summary.files) == (True, 1)
    shard = Shard(job, NUMBER, ITEMS)
    assert [item.path for item in shard.pending] == ["1.png", "2.png", "3.png"]
    assert shard.suspects == {}


def test_a_full_disk_is_told(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsespec.batch.one.write_label_png", full)
    summary = work_shard(job, ShardTask(NUMBER, tuple(ITEMS)), Inline())
    assert summary.blocked == "cannot write the results: No space left on device"
    assert summary.rows == []
    monkeypatch.undo()
    assert pending(job) == [item.path for item in ITEMS]


def test_three_deaths_are_enough() -> None:
    assert [is_hopeless(deaths) for deaths in range(5)] == [False, False, False, True, True]
    assert blocked_by([failure(ITEMS[0], "x", "storage")]) is None
    assert blocked_by([failure(ITEMS[0], "disk full", "output")]) == "disk full"


def test_the_coco_of_a_shard_follows_what_is_gone_or_lost(job: Job, tmp_path: Path) -> None:
    job = replace(job, formats=Formats(coco_shards=True))
    work(job, ITEMS, until=4)
    path = tmp_path / "out" / "instances" / f"{NUMBER:06d}.json"

    def names() -> list[str]:
        return [image["file_name"] for image in json.loads(path.read_text())["images"]]

    assert names() == [item.path for item in ITEMS]
    remove_stale(job, NUMBER, ITEMS[1:])
    work(job, ITEMS[1:])
    assert names() == [item.path for item in ITEMS[1:]]
    path.unlink()
    work(job, ITEMS[1:])
    assert names() == [item.path for item in ITEMS[1:]]


def test_the_coco_of_a_shard_follows_a_journal_that_is_taken_into_the_record(
    job: Job, tmp_path: Path, photo: Photo
) -> None:
    """Killed before the shard was finished again; then the report no longer shows one of its images."""
    job = replace(job, formats=Formats(coco_shards=True))
    work(job, ITEMS, until=4)
    path = tmp_path / "out" / "instances" / f"{NUMBER:06d}.json"

    def widths() -> list[int]:
        return [image["width"] for image in json.loads(path.read_text())["images"]]

    assert widths() == [50, 51, 52, 53]
    photo(tmp_path / "in" / "1.png", 90)
    shard = Shard(job, NUMBER, ITEMS)
    shard.settle(ITEMS[1], process_file(job, ITEMS[1]))
    kill(shard)
    hidden = [replace(ITEMS[0], card=False), *ITEMS[1:]]
    remove_stale(job, NUMBER, hidden)
    work(job, hidden)
    assert widths() == [50, 90, 52, 53]


def test_without_its_fingerprint_a_file_is_done_again(job: Job, tmp_path: Path) -> None:
    work(job, ITEMS, until=4)
    (tmp_path / "out" / ".sparsespec" / "times" / f"{NUMBER:06d}.json").unlink()
    assert pending(job) == [item.path for item in ITEMS]


def test_folders_of_others_stay_while_they_may_be_at_work(job: Job, tmp_path: Path, photo: Photo) -> None:
    photo(tmp_path / "in" / "a" / "1.png")
    item = Item("a/1.png", "a/1")
    work(job, [item], until=1)
    (tmp_path / "in" / "a" / "1.png").write_bytes(b"")
    work(job, [item])
    assert left(tmp_path / "out") == set()
    assert (tmp_path / "out" / "masks" / "a").is_dir()
    assert not (tmp_path / "out" / "cutouts" / "a" / "1").exists()
    remove_stale(job, NUMBER, [])
