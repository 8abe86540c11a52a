from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparsespec._atomic import TEMPORARY_PATTERN
from sparsespec.batch import BatchResult, Formats, Inline, OutputsError, find_inputs, run_batch
from sparsespec.evaluation.benchmark.killing import without_times

HERE = Path(__file__).parent
Photo = Callable[..., Path]
posix = pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL of POSIX")
ALL = {"overlays": True, "cutouts": True, "yolo": True, "coco_shards": True, "table": "csv"}


@pytest.fixture
def resuming(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("resuming")


@pytest.fixture
def runner(resuming: ModuleType) -> Iterator[Any]:
    found = resuming.Runner()
    yield found
    found.close()


def pictures(folder: Path, count: int, **marked: int) -> None:
    """Write small pictures into several folders, a file of several pages, and a damaged one; some in a certain grey."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.full((16, 20, 3), marked.get(f"n{number}", 30), np.uint8)
        top, left, side = rng.integers(1, 8, 3)
        pixels[top : top + side, left : left + 2 * side] = 230
        path = folder / f"folder-{number % 3}" / f"{number:03}.{('png', 'jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    with tifffile.TiffWriter(folder / "scan.tif") as tiff:
        for page in range(3):
            pixels = np.full((16, 20, 3), 30, np.uint8)
            pixels[2:5, 3 : 5 + page] = 230
            tiff.write(pixels, photometric="rgb", metadata=None, contiguous=False)
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")


def check_same(resuming: ModuleType, output: Path, other: Path) -> None:
    found, expected = resuming.contents(output), resuming.contents(other)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert without_times(output) == without_times(other)
    assert not list(output.rglob(TEMPORARY_PATTERN))
    rows = json.loads((output / "run.json").read_text())["images"]
    places = [(row["path"], row["page"]) for row in rows]
    assert len(set(places)) == len(places)


@posix
@pytest.mark.parametrize("every", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_step_goes_on(
    tmp_path: Path, resuming: ModuleType, runner: Any, every: int
) -> None:
    """Each step that is taken on a file of the output, or each of so many, is the last one once."""
    source = tmp_path / "in"
    pictures(source, 2)
    status, told = runner.run(source, tmp_path / "undisturbed", formats=ALL)
    assert status == 0, told
    assert told["counts"] == {"images": 6, "done": 5, "failed": 1, "instances": 5}
    steps = told["steps"]
    assert steps > 50
    for step in range(1, steps + 1, every):
        output = tmp_path / f"{step}"
        assert runner.run(source, output, formats=ALL, kill_at=step, seed=step)[0] == -9
        status, told = runner.run(source, output, formats=ALL)
        assert status == 0
        # Nothing that was noted is done again, but what failed.
        assert len(set(told["seen"])) + told["earlier"] == 4
        check_same(resuming, output, tmp_path / "undisturbed")


@posix
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_is_killed_again_and_again(tmp_path: Path, resuming: ModuleType, runner: Any, workers: int) -> None:
    source = tmp_path / "in"
    pictures(source, 198)
    status, told = runner.run(source, tmp_path / "undisturbed")
    assert (status, told["counts"]["done"]) == (0, 201)
    rng = random.Random(workers)
    kills = attempts = 0
    while kills < 10:
        output = tmp_path / f"{attempts}"
        attempts += 1
        status = -9
        while status == -9:
            # A few images each time at least: one that is at work in three deaths is blamed for them.
            status, told = runner.run(source, output, workers=workers, kill_at=rng.randrange(150, 450), seed=kills)
            kills += status == -9
        assert status == 0
        assert kills > 0
        check_same(resuming, output, tmp_path / "undisturbed")


@posix
@pytest.mark.slow
def test_worker_processes_that_are_killed_with_their_run(tmp_path: Path, resuming: ModuleType, runner: Any) -> None:
    source = tmp_path / "in"
    pictures(source, 60)
    how: dict[str, Any] = {"engine": "processes", "guarded": True}
    assert runner.run(source, tmp_path / "undisturbed", **how)[0] == 0
    for kill_at in (12, 40, 60):
        assert runner.run(source, tmp_path / "out", kill_at=kill_at, **how)[0] == -9
    assert runner.run(source, tmp_path / "out", **how)[0] == 0
    check_same(resuming, tmp_path / "out", tmp_path / "undisturbed")


@posix
def test_a_file_that_ends_the_process_is_found_and_the_rest_done(
    tmp_path: Path, resuming: ModuleType, runner: Any
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    pictures(source, 20, n8=77)
    how: dict[str, Any] = {"marks": {"77": "segfault"}, "guarded": True}
    bad = "folder-2/008.png"
    status, _ = runner.run(source, output, **how)
    assert status == -11
    status, told = runner.run(source, output, **how)
    assert status == 0
    assert told["counts"]["failed"] == 2
    (row,) = [row for row in json.loads((output / "run.json").read_text())["images"] if row["path"] == bad]
    assert (row["status"], row["reason"]) == ("failed", "crash")
    assert "SIGSEGV" in row["error"]
    # It stays where it is until somebody asks for it.
    status, told = runner.run(source, output, **how)
    assert (status, told["seen"]) == (0, ["damaged.png"])
    assert told["counts"]["failed"] == 2


@posix
def test_a_file_that_ends_the_process_where_no_other_can_be_used(
    tmp_path: Path, resuming: ModuleType, runner: Any
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    pictures(source, 6, n4=77)
    how = {"marks": {"77": "segfault"}}
    statuses = [runner.run(source, output, **how)[0] for _ in range(4)]
    assert statuses == [-11, -11, -11, 0]
    rows = {row["path"]: row for row in json.loads((output / "run.json").read_text())["images"]}
    assert rows["folder-1/004.png"]["reason"] == "crash"
    assert "quarantined" in rows["folder-1/004.png"]["error"]
    assert sum(row["status"] == "done" for row in rows.values()) == 5 + 1
    assert not (output / "masks" / "folder-1" / "004.png").exists()


def run(segmenter: Any, source: Path, output: Path, **options: Any) -> BatchResult:
    return run_batch(segmenter, find_inputs(source, output=output), output, **options)


@pytest.mark.parametrize("engine", ["inline 2", "inline 4", "processes"])
def test_every_engine_writes_the_same_bytes(
    tmp_path: Path, resuming: ModuleType, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    from sparsespec.batch import processes

    monkeypatch.setattr(processes, "available_cpus", lambda: 4)
    stubs = importlib.import_module("stubs")
    pictures(tmp_path / "in", 70)
    formats = Formats(**ALL)  # type: ignore[arg-type]
    run(stubs.Stub(), tmp_path / "in", tmp_path / "one", formats=formats, shard_size=64)
    other: Any = Inline(int(engine[-1])) if engine != "processes" else processes.Processes(2, 1)
    run(stubs.Stub(), tmp_path / "in", tmp_path / "other", formats=formats, shard_size=64, engine=other)
    if engine == "processes":
        other.close()
    found, expected = resuming.contents(tmp_path / "other"), resuming.contents(tmp_path / "one")
    different = {name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)}
    # What the stub says of its process is noted of each image.
    assert different <= {name for name in found if name.startswith(".sparsespec/records/")}
    assert engine == "processes" or not different


def random_change(rng: random.Random, source: Path, output: Path, photo: Photo) -> str:
    """Do to the inputs or outputs what people do between two runs."""
    images = sorted(path for path in source.rglob("*.*") if path.is_file())
    results = sorted(path for kind in ("masks", "overlays") for path in (output / kind).rglob("*.*"))
    kind = rng.choice(["add", "remove", "replace", "spoil", "meet", "lose", "cut"])
    if kind == "add":
        photo(source / rng.choice("abc") / f"{rng.randrange(10**6)}.png", rng.randrange(20, 60))
    elif kind == "remove" and len(images) > 3:
        rng.choice(images).unlink()
    elif kind == "replace":
        photo(rng.choice(images), rng.randrange(61, 99))
    elif kind == "spoil":
        rng.choice(images).write_bytes(b"spoilt %d" % rng.randrange(10**6))
    elif kind == "meet":
        image = rng.choice(images)
        photo(image.with_suffix(".png" if image.suffix == ".jpg" else ".jpg"), rng.randrange(20, 60))
    elif kind == "lose" and results:
        rng.choice(results).unlink()
    elif kind == "cut" and results:
        path = rng.choice(results)
        path.write_bytes(path.read_bytes()[:-5])
    return kind


@pytest.mark.parametrize("seed", range(15))
def test_whatever_happens_between_runs_the_end_is_that_of_a_new_one(
    tmp_path: Path, resuming: ModuleType, segmenter: Any, photo: Photo, seed: int
) -> None:
    rng = random.Random(seed)
    source, output = tmp_path / "in", tmp_path / "out"
    for k in range(8):
        photo(source / "abc"[k % 3] / f"{k}.{('jpg', 'png')[k % 2]}", 30 + k)
    history = []

    def moody(image: np.ndarray) -> Any:
        if rng.random() < 0.12:
            raise KeyboardInterrupt
        return segmenter(image)

    for _ in range(8):
        history += [random_change(rng, source, output, photo) for _ in range(rng.randrange(3))]
        result = run(moody, source, output, prune=True, engine=Inline(1))
        history.append("interrupted" if result.interrupted else "run")
    result = run(segmenter, source, output, prune=True)
    assert not result.interrupted
    run(segmenter, source, tmp_path / "new")
    found, expected = resuming.contents(output), resuming.contents(tmp_path / "new")
    plan = ".sparsespec/plan.json"
    assert found.pop(plan) == expected.pop(plan)
    assert found.keys() == expected.keys(), history
    assert [name for name in found if found[name] != expected[name]] == [], history


def test_nothing_is_done_again(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    for k in range(5):
        photo(tmp_path / "in" / f"{k}.jpg", 50 + k)
    run(segmenter, tmp_path / "in", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "masks").iterdir()}
    del segmenter.seen[:]
    result = run(segmenter, tmp_path / "in", tmp_path / "out")
    assert segmenter.seen == []
    assert (result.earlier, result.count("done"), result.instances) == (5, 5, 10)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "masks").iterdir()} == before
    photo(tmp_path / "in" / "2.jpg", 99)
    photo(tmp_path / "in" / "new.jpg", 33)
    result = run(segmenter, tmp_path / "in", tmp_path / "out")
    assert sorted(shape[1] for shape in segmenter.seen) == [33, 99]
    assert result.earlier == 4


def test_images_that_are_gone_are_not_forgotten_by_accident(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    for k in range(4):
        photo(tmp_path / "in" / f"{k}.jpg")
    out = tmp_path / "out"
    run(segmenter, tmp_path / "in", out)
    before = json.loads((out / "run.json").read_text())
    for k in (1, 3):
        (tmp_path / "in" / f"{k}.jpg").unlink()
    with pytest.raises(
        OutputsError, match=r"2 of the images .* no longer in the input, such as '[13]\.jpg': .*--prune"
    ):
        run(segmenter, tmp_path / "in", out)
    assert json.loads((out / "run.json").read_text()) == before
    assert (out / "masks" / "1.png").exists()
    result = run(segmenter, tmp_path / "in", out, prune=True)
    assert [row.path for row in result.rows] == ["0.jpg", "2.jpg"]
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["0.png", "2.png"]


def test_images_that_meet_are_renamed(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    photo(tmp_path / "in" / "x.jpg", 50)
    out = tmp_path / "out"
    run(segmenter, tmp_path / "in", out)
    photo(tmp_path / "in" / "x.png", 60)
    result = run(segmenter, tmp_path / "in", out)
    assert result.earlier == 0
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["x.jpg.png", "x.png.png"]
    (tmp_path / "in" / "x.jpg").unlink()
    run(segmenter, tmp_path / "in", out, prune=True)
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["x.png"]
    with Image.open(out / "masks" / "x.png") as mask:
        assert mask.size == (60, 40)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupted_run_does_not_tell_of_what_is_out_of_date(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg", 50)
    photo(tmp_path / "in" / "x.jpg", 50)
    out = tmp_path / "out"
    run(segmenter, tmp_path / "in", out)
    photo(tmp_path / "in" / "x.png", 60)

    def stop(image: np.ndarray) -> Any:
        raise KeyboardInterrupt

    result = run(stop, tmp_path / "in", out)
    assert [(row.path, row.status) for row in result.rows] == [
        ("a.jpg", "done"),
        ("x.jpg", "skipped"),
        ("x.png", "skipped"),
    ]
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["a.png"]


def test_more_shards_than_files_that_may_be_open(
    tmp_path: Path, resuming: ModuleType, segmenter: Any, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsespec.batch.run.shard_count", lambda files, size=64: 9)
    for k in range(20):
        photo(tmp_path / "in" / f"{k}.jpg", 20 + k)
    run(segmenter, tmp_path / "in", tmp_path / "one")
    monkeypatch.setattr("sparsespec.batch.merge._FILES_AT_ONCE", 2)
    run(segmenter, tmp_path / "in", tmp_path / "two")
    check_same(resuming, tmp_path / "two", tmp_path / "one")
    assert len(list((tmp_path / "two" / ".sparsespec" / "records").iterdir())) == 9


def test_times_of_a_run_survive_the_next_one(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    for k in range(3):
        photo(tmp_path / "in" / f"{k}.jpg")

    def slow(image: np.ndarray) -> Any:
        time.sleep(0.05)
        return segmenter(image)

    first = [row.seconds for row in run(slow, tmp_path / "in", tmp_path / "out").rows]
    photo(tmp_path / "in" / "3.jpg")
    again = [row.seconds for row in run(segmenter, tmp_path / "in", tmp_path / "out").rows]
    assert again[:3] == first
    assert not (tmp_path / "out" / ".sparsespec" / "times").exists()
