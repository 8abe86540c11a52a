from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sparsespec._atomic import TEMPORARY_PATTERN
from sparsespec.batch import BatchResult, Inline, find_inputs, run_batch
from sparsespec.batch.several import Room

Photo = Callable[..., Path]
Segmenter = Callable[[np.ndarray], Any]


def run(segmenter: Any, source: Path, output: Path, **options: Any) -> BatchResult:
    return run_batch(segmenter, find_inputs(source, output=output), output, **options)


def contents(output: Path) -> dict[str, bytes]:
    """Every file but those with times and of the lock, the state of the run included."""
    found = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if name not in ("run.json", "report/run.js", ".sparsespec/lock")
    }


_VOLATILE = ("seconds", "started", "finished", "execution")


def without_times(path: Path) -> Any:
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(each) for key, each in value.items() if key not in _VOLATILE}
        return [clean(each) for each in value] if isinstance(value, list) else value

    return clean(json.loads(path.read_text(encoding="utf-8")))


def test_files_are_the_same_for_any_number_of_workers(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    for k in range(25):
        photo(tmp_path / "in" / f"{k:02}.jpg", 40 + k)
    (tmp_path / "in" / "07-bad.jpg").write_bytes(b"no image")

    def uneven(image: np.ndarray) -> Any:
        time.sleep(0.02 if image.shape[1] % 5 == 0 else 0)
        return segmenter(image)

    seen: list[tuple[str, int]] = []
    run(segmenter, tmp_path / "in", tmp_path / "one")
    result = run(
        uneven,
        tmp_path / "in",
        tmp_path / "three",
        engine=Inline(3),
        progress=lambda row, k, _: seen.append((row.path, k)),
    )
    assert [row.status for row in result.rows].count("failed") == 1
    # Each once, as it is finished; the rows are in the order of the images.
    assert [position for _, position in seen] == list(range(1, 27))
    paths = [row.path for row in result.rows]
    assert sorted(path for path, _ in seen) == sorted(paths) == paths
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert without_times(tmp_path / "one" / "run.json") == without_times(tmp_path / "three" / "run.json")
    assert json.loads((tmp_path / "three" / "run.json").read_text())["execution"] == {"engine": "inline", "workers": 3}


def test_so_many_at_once_and_no_more(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    for k in range(8):
        photo(tmp_path / "in" / f"{k}.jpg")
    together = threading.Barrier(2)
    inside, most = [0], [0]
    counting = threading.Lock()

    def meeting(image: np.ndarray) -> Any:
        with counting:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        together.wait(timeout=20)
        with counting:
            inside[0] -= 1
        return segmenter(image)

    assert run(meeting, tmp_path / "in", tmp_path / "out", engine=Inline(2)).count("done") == 8
    assert most[0] == 2


@pytest.mark.parametrize("workers", [0, -1])
def test_bad_number_of_workers(workers: int) -> None:
    with pytest.raises(ValueError, match=f"workers must be at least 1, not {workers}"):
        Inline(workers)


def opened(width: int, height: int = 1) -> Any:
    @contextmanager
    def opening() -> Any:
        yield SimpleNamespace(shape=(height, width, 3))

    return opening()


def test_room_for_so_many_pixels() -> None:
    room = Room(10)
    states: list[str] = []

    def enter(name: str, size: int) -> None:
        with room.admit(opened(size)):
            states.append(name)

    with room.admit(opened(4)):
        small = threading.Thread(target=enter, args=("small", 6))
        small.start()
        small.join(20)
        assert states == ["small"]
        large = threading.Thread(target=enter, args=("larger than the room", 99))
        large.start()
        late = threading.Thread(target=enter, args=("late", 1))
        late.start()
        large.join(0.05)
        # There would be room for the late one, but its turn is after the large one's.
        assert states == ["small"]
    for thread in (large, late):
        thread.join(20)
    assert sorted(states) == ["larger than the room", "late", "small"]
    with room.admit(opened(10)):
        pass


def test_room_is_left_whatever_happens() -> None:
    room = Room(10)

    @contextmanager
    def broken() -> Any:
        raise OSError("damaged")
        yield

    for _ in range(3):
        with pytest.raises(OSError, match="damaged"), room.admit(broken()):
            pass
        with pytest.raises(RuntimeError), room.admit(opened(10)):
            raise RuntimeError
    with room.admit(opened(10)):
        pass


def test_large_images_are_worked_on_alone(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsespec.batch.inline.Room", lambda: Room(3000))
    for k in range(4):
        photo(tmp_path / "in" / f"{k}.jpg", 80, 50)
    inside = [0]

    def lonely(image: np.ndarray) -> Any:
        inside[0] += 1
        assert inside[0] == 1
        time.sleep(0.01)
        inside[0] -= 1
        return segmenter(image)

    assert run(lonely, tmp_path / "in", tmp_path / "out", engine=Inline(3)).count("done") == 4


_INTERRUPTED = """
import os, signal, sys, threading, time, types
from pathlib import Path
import numpy as np
from sparsespec.batch import Inline, find_inputs, run_batch

source, output, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
begun, free = [], threading.Event()

def segment(image):
    begun.append(image.shape)
    if len(begun) == 4:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            # Two that come before Python looks are one.
            time.sleep(0.3 if times == 1 else 1.5)
        # After the second, nobody waits for the images at work.
        free.set() if times == 1 else free.wait(20)
    elif len(begun) > 2:
        free.wait(20)
    return types.SimpleNamespace(labels=np.ones(image.shape[:2], int), scores=np.ones(1), info={})

result = run_batch(segment, find_inputs(source, output=output), output, engine=Inline(2))
free.set()
print(result.interrupted, len(begun), *(row.status for row in result.rows))
"""


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C there without its console")
def test_ctrl_c_ends_after_the_images_at_work(tmp_path: Path, photo: Photo) -> None:
    for k in range(30):
        photo(tmp_path / "in" / f"{k:02}.jpg")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, tmp_path / "in", out, "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    interrupted, begun, *states = done.stdout.split()
    assert interrupted == "True"
    # All that was begun is there, and nothing was begun after.
    assert states.count("done") == int(begun) < 30
    saved = json.loads((out / "run.json").read_text())
    assert saved["state"] == "interrupted"
    masks = {row["mask"] for row in saved["images"] if row["status"] == "done"}
    assert {name for name in contents(out) if name.startswith("masks/")} == masks
    assert len(json.loads((out / "instances.json").read_text())["images"]) == int(begun)


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C there without its console")
def test_a_second_ctrl_c_gives_up_what_is_at_work(tmp_path: Path, photo: Photo) -> None:
    for k in range(30):
        photo(tmp_path / "in" / f"{k:02}.jpg")
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, tmp_path / "in", out, "2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    states = done.stdout.split()[2:]
    assert states.count("done") == 2
    saved = json.loads((out / "run.json").read_text())
    assert [row["status"] for row in saved["images"]] == states
    assert len(json.loads((out / "instances.json").read_text())["images"]) == 2
    assert not list(out.rglob(TEMPORARY_PATTERN))


def test_interrupt_raised_by_a_worker(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    for k in range(6):
        photo(tmp_path / "in" / f"{k}.jpg", 50 + k)

    def stopping(image: np.ndarray) -> Any:
        if image.shape[1] == 53:
            raise KeyboardInterrupt
        return segmenter(image)

    handler = signal.getsignal(signal.SIGINT)
    result = run(stopping, tmp_path / "in", tmp_path / "out", engine=Inline(2))
    assert signal.getsignal(signal.SIGINT) is handler
    assert result.interrupted
    states = [row.status for row in result.rows]
    assert states[3] == "skipped"
    # The other worker had one at work, and perhaps another one that nobody has asked for.
    assert states.count("done") >= 1
    assert len(json.loads((tmp_path / "out" / "instances.json").read_text())["images"]) == states.count("done")


def test_disk_that_is_full_ends_the_run(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsespec.formats.labels import write_label_png

    for k in range(12):
        photo(tmp_path / "in" / f"{k:02}.jpg", 50 + k)
    out = tmp_path / "out"
    written = []

    def write(path: Path, labels: np.ndarray) -> None:
        written.append(path)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_label_png(path, labels)

    with monkeypatch.context() as patch:
        patch.setattr("sparsespec.batch.one.write_label_png", write)
        result = run(segmenter, tmp_path / "in", out, engine=Inline(2))
    assert result.blocked is not None
    assert "No space left on device" in result.blocked
    assert len(written) < 10
    assert sorted(row.status for row in result.rows) == ["done"] * 5 + ["skipped"] * 7
    result = run(segmenter, tmp_path / "in", out, engine=Inline(2))
    assert (result.blocked, result.earlier, result.count("done")) == (None, 5, 12)
    run(segmenter, tmp_path / "in", tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_state_that_cannot_be_written_ends_the_run(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line is written of what became of an image, and nothing after it."""
    for k in range(6):
        photo(tmp_path / "in" / f"{k}.jpg", 50 + k)
    write = os.write

    def full(descriptor: int, content: memoryview) -> int:
        if b'"settled": "3.jpg"' in bytes(content):
            write(descriptor, content[:40])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("sparsespec.batch.journal.os.write", full)
        with pytest.raises(OSError, match="No space left"):
            run(segmenter, tmp_path / "in", out)
    result = run(segmenter, tmp_path / "in", out)
    assert (result.earlier, result.count("done")) == (3, 6)
    run(segmenter, tmp_path / "in", tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")
