"""What makes a segmenter ready is done once, and is no image's time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch import Inline, find_inputs, run_batch
from sparsespec.batch.job import Item, Job
from sparsespec.batch.one import process_file
from sparsespec.batch.store import LocalStore

Photo = Callable[..., Path]


class Slow:
    """A segmenter that has to be made ready."""

    def __init__(self, segmenter: Any, error: BaseException | None = None) -> None:
        self._segmenter = segmenter
        self._error = error
        self.calls: list[str] = []

    def warm_up(self) -> None:
        self.calls.append("warm up")
        if self._error is not None:
            raise self._error

    def __call__(self, image: Any) -> Any:
        self.calls.append("image")
        return self._segmenter(image)


@pytest.mark.parametrize("workers", [1, 3])
def test_once_before_the_first_image(tmp_path: Path, segmenter: Any, photo: Photo, workers: int) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0 damaged.jpg").write_bytes(b"nothing")
    for k in range(5):
        photo(tmp_path / "in" / f"{k}.jpg")
    slow = Slow(segmenter)
    run_batch(slow, find_inputs(tmp_path / "in"), tmp_path / "out", engine=Inline(workers))
    assert slow.calls == ["warm up", *5 * ["image"]]


def test_it_is_no_time_of_the_image(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    (tmp_path / "out").mkdir()
    job = Job(segmenter, LocalStore(tmp_path / "in"), LocalStore(tmp_path / "out"))
    (outcome,) = process_file(job, Item("a.jpg", "a"), warm_up=lambda: 1000.0)
    assert outcome.row.status == "done"
    assert -1000 < outcome.row.seconds.pop("total") < -900
    assert all(0 <= seconds < 900 for seconds in outcome.row.seconds.values())


def test_not_where_no_image_can_be_read(tmp_path: Path, segmenter: Any) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "damaged.jpg").write_bytes(b"nothing")
    slow = Slow(segmenter)
    (row,) = run_batch(slow, find_inputs(tmp_path / "in"), tmp_path / "out").rows
    assert row.status == "failed"
    assert slow.calls == []


def test_what_goes_wrong_is_for_the_images_to_tell(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    slow = Slow(segmenter, RuntimeError("no such thing"))
    (row,) = run_batch(slow, find_inputs(tmp_path / "in"), tmp_path / "out").rows
    assert row.status == "done"
    assert slow.calls == ["warm up", "image"]


def test_it_can_be_interrupted(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    slow = Slow(segmenter, KeyboardInterrupt())
    result = run_batch(slow, find_inputs(tmp_path / "in"), tmp_path / "out")
    assert result.interrupted
    assert slow.calls == ["warm up"]
    assert not (tmp_path / "out" / "masks" / "a.jpg.png").exists()
