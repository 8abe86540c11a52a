from __future__ import annotations

import errno
import json
import os
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch.job import Item, Outcome, failure
from sparsespec.batch.journal import Journal, outcome_from, outcome_to, read_journals
from sparsespec.batch.record import Row
from sparsespec.batch.store import LocalStore

FOLDER = ".sparsespec/journal/000000"


def outcome(path: str, page: int | None = None, **values: Any) -> Outcome:
    row = Row(
        path=path,
        status="done",
        mask=f"masks/{path}.png",
        size=(30, 20),
        instances=1,
        scores=[0.1 + 0.2],
        seconds={"total": 1.25},
        details={"grid": [3, 4], "solver": "none"},
        page=page,
        fingerprint="12-345",
    )
    annotation = {"label": 1, "bbox": [1, 2, 3, 4], "score": 1 / 3, "segmentation": {"size": [20, 30], "counts": "a\\"}}
    return Outcome(row, [annotation], [{"area": 7}], path, {f"masks/{path}.png": 123}, path, **values)


def abandon(journal: Journal) -> None:
    """What is left when the process is killed."""
    descriptor, journal._descriptor = journal._descriptor, None
    assert descriptor is not None
    os.close(descriptor)


def written(folder: Path, *paths: str, begun: tuple[str, ...] = (), close: bool = False) -> Journal:
    journal = Journal(LocalStore(folder), FOLDER)
    for path in paths:
        journal.begin(Item(path, path))
        journal.settle(path, [outcome(path)])
    for path in begun:
        journal.begin(Item(path, f"name of {path}"))
    if close:
        journal.close()
    else:
        abandon(journal)
    return journal


def test_an_outcome_is_read_as_it_was_written() -> None:
    for whole in (outcome("a/ü\n.jpg", 2), outcome("caf\udce9.png"), failure(Item("b", "b"), "it broke", "crash")):
        text = json.dumps(outcome_to(whole))
        assert outcome_from(json.loads(text), whole.row.seconds, whole.row.fingerprint) == whole
        # Records, in which times have no place, are made of this.
        assert "1.25" not in text
        assert "12-345" not in text


def test_what_was_settled_is_known_again(tmp_path: Path) -> None:
    journal = written(tmp_path, "a.jpg", "caf\udce9.png", begun=("c.jpg",))
    past = read_journals(LocalStore(tmp_path), FOLDER)
    assert past.settled == {path: [outcome(path)] for path in ("a.jpg", "caf\udce9.png")}
    assert past.begun == {"c.jpg": 1}
    assert past.names == {"a.jpg": "a.jpg", "caf\udce9.png": "caf\udce9.png", "c.jpg": "name of c.jpg"}
    assert past.sources == journal.sources


def test_nothing_is_known_of_nothing(tmp_path: Path) -> None:
    past = read_journals(LocalStore(tmp_path), FOLDER)
    assert (past.settled, past.begun, past.names, past.sources) == ({}, {}, {}, [])
    Journal(LocalStore(tmp_path), FOLDER).close()
    assert list(tmp_path.iterdir()) == []


def test_what_ended_by_itself_suspects_nobody(tmp_path: Path) -> None:
    written(tmp_path, "a.jpg", begun=("b.jpg",), close=True)
    assert read_journals(LocalStore(tmp_path), FOLDER).begun == {}
    written(tmp_path, begun=("b.jpg",))
    assert read_journals(LocalStore(tmp_path), FOLDER).begun == {"b.jpg": 1}
    written(tmp_path, begun=("b.jpg", "c.jpg"))
    assert read_journals(LocalStore(tmp_path), FOLDER).begun == {"b.jpg": 2, "c.jpg": 1}
    # Somebody managed it: it was not the file's fault.
    written(tmp_path, "b.jpg")
    assert read_journals(LocalStore(tmp_path), FOLDER).begun == {"c.jpg": 1}


def test_two_attempts_at_the_same_time(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    one, two = Journal(store, FOLDER), Journal(store, FOLDER)
    for journal, paths in ((one, "ab"), (two, "bc"), (one, "de"), (two, "ef")):
        for path in paths:
            journal.begin(Item(path, path))
            journal.settle(path, [outcome(path)])
    abandon(one)
    two.close()
    past = read_journals(store, FOLDER)
    assert past.settled == {path: [outcome(path)] for path in "abcdef"}
    assert len(past.sources) == 2


def test_the_last_word_counts(tmp_path: Path) -> None:
    for attempt in range(20):
        journal = Journal(LocalStore(tmp_path), FOLDER)
        found = outcome("a") if attempt % 2 else failure(Item("a", "a"), f"attempt {attempt}", "error")
        journal.settle("a", [found])
        journal.close()
        assert read_journals(LocalStore(tmp_path), FOLDER).settled == {"a": [found]}


@pytest.mark.parametrize("seed", range(3))
def test_cut_anywhere_all_lines_before_are_known(tmp_path: Path, seed: int) -> None:
    names = [f"{k}.jpg" for k in range(5)]
    (source,) = written(tmp_path, *names).sources
    content = (tmp_path / source).read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    rng = random.Random(seed)
    for length in [0, 1, *ends, *(end - 1 for end in ends), *(rng.randrange(len(content)) for _ in range(40))]:
        (tmp_path / source).write_bytes(content[:length])
        # Every other line settles a file; one that lacks only its line end is whole.
        whole = sum(1 for end in ends[1::2] if end - 1 <= length)
        assert list(read_journals(LocalStore(tmp_path), FOLDER).settled) == names[:whole]


@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_cost_a_line_and_mislead_nobody(tmp_path: Path, seed: int) -> None:
    names = [f"{k}.jpg" for k in range(6)]
    (source,) = written(tmp_path, *names).sources
    content = (tmp_path / source).read_bytes()
    rng = random.Random(seed)
    for _ in range(60):
        flipped = bytearray(content)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        (tmp_path / source).write_bytes(flipped)
        found = read_journals(LocalStore(tmp_path), FOLDER).settled
        assert len(found) >= 4  # a line end that is gone joins two lines
        assert all(outcomes == [outcome(path)] for path, outcomes in found.items())


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\n\n", b"\0" * 4096, random.Random(0).randbytes(1000), b"0", b"00000000 ", b"zz {}\n", b"x" * 70_000],
)
def test_garbage_is_passed_over(tmp_path: Path, garbage: bytes) -> None:
    (source,) = written(tmp_path, "a.jpg", "b.jpg").sources
    with (tmp_path / source).open("ab") as file:
        file.write(garbage)
    assert set(read_journals(LocalStore(tmp_path), FOLDER).settled) == {"a.jpg", "b.jpg"}


def test_a_line_that_was_torn_by_a_full_disk_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(LocalStore(tmp_path), FOLDER)
    journal.settle("a", [outcome("a")])
    write = os.write

    def full(descriptor: int, content: memoryview) -> int:
        write(descriptor, content[:50])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sparsespec.batch.journal.os.write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.settle("b", [outcome("b")])
    journal.begin(Item("c", "c"))
    journal.close()
    past = read_journals(LocalStore(tmp_path), FOLDER)
    assert set(past.settled) == {"a"}
    assert past.begun == {}
    assert past.names == {"c": "c"}


def test_writes_that_are_cut_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr("sparsespec.batch.journal.os.write", lambda descriptor, content: write(descriptor, content[:7]))
    written(tmp_path, "a.jpg")
    assert set(read_journals(LocalStore(tmp_path), FOLDER).settled) == {"a.jpg"}


def test_lines_are_what_they_say(tmp_path: Path) -> None:
    (source,) = written(tmp_path, "a.jpg", close=True).sources
    for line in (tmp_path / source).read_bytes().splitlines():
        checksum, _, text = line.partition(b" ")
        assert int(checksum, 16) == zlib.crc32(text)
        assert set(json.loads(text)) & {"begun", "settled", "closed"}


class Parts:
    """A store without a folder: whole files only."""

    folder = None
    place = "memory"

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.writes = 0

    def write(self, path: str, content: bytes) -> None:
        assert path not in self.files
        self.files[path] = content
        self.writes += 1

    def read(self, path: str) -> bytes:
        return self.files[path]

    def list(self, prefix: str) -> Any:
        return iter([path for path in self.files if path.startswith(prefix + "/")])


def test_behind_a_url_lines_are_written_some_at_a_time() -> None:
    store: Any = Parts()
    journal = Journal(store, FOLDER)
    paths = [f"{k:03}" for k in range(100)]
    for path in paths:
        journal.begin(Item(path, path))
        journal.settle(path, [outcome(path)])
    noted = read_journals(store, FOLDER)
    assert 80 <= len(noted.settled) < 100
    assert store.writes == len(noted.sources) <= 8
    journal.begin(Item("late", "late"))
    journal.close()
    past = read_journals(store, FOLDER)
    assert list(past.settled) == paths
    assert past.begun == {}
    assert past.sources == journal.sources


def test_a_file_that_is_tried_again_is_suspect_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    journal = Journal(store, FOLDER)
    journal.begin(Item("a", "a"))
    journal.settle("a", [failure(Item("a", "a"), "out of memory", "memory")])
    journal.close()
    assert read_journals(store, FOLDER).begun == {}
    for deaths in (1, 2, 3):
        written(tmp_path, begun=("a",))
        assert read_journals(store, FOLDER).begun == {"a": deaths}
    written(tmp_path, "a")
    assert read_journals(store, FOLDER).begun == {}


def test_a_journal_that_goes_while_it_is_read_is_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "a")
    written(tmp_path, "b")
    store = LocalStore(tmp_path)
    paths = sorted(store.list(FOLDER))
    monkeypatch.setattr(LocalStore, "list", lambda self, prefix: iter(paths))
    store.remove(paths[0])
    assert list(read_journals(store, FOLDER).settled) == ["b"]


@pytest.mark.skipif(os.name != "posix", reason="descriptors are reused at once on POSIX")
def test_a_full_disk_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(LocalStore(tmp_path), FOLDER)
    journal.begin(Item("a", "a"))
    descriptor = journal._descriptor
    assert descriptor is not None

    def full(number: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        journal.close()
    monkeypatch.undo()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
