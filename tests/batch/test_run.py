from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import tifffile
from PIL import Image

import sparsespec
from sparsespec._atomic import TEMPORARY_PATTERN
from sparsespec.batch import BatchResult, Formats, Inline, OutputsError, Row, find_inputs, run_batch
from sparsespec.batch.inputs import Inputs
from sparsespec.batch.job import Job
from sparsespec.batch.record import jsonable
from sparsespec.batch.shard import ShardSummary, work_shard
from sparsespec.batch.store import LocalStore
from sparsespec.formats import decode_rle

Photo = Callable[..., Path]
Segmenter = Callable[..., Any]


def run(segmenter: Segmenter, source: Path, output: Path, **options: Any) -> BatchResult:
    return run_batch(segmenter, find_inputs(source, output=output), output, **options)


def record(output: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    loaded = json.loads((output / "run.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert isinstance(loaded, dict)
    return loaded


def files(root: Path) -> set[str]:
    """All but the state of the run."""
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith(".sparsespec/")}


def contents(output: Path) -> dict[str, bytes]:
    """Every file but those with times and of the lock, the state of the run included."""
    found = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if name not in ("run.json", "report/run.js", ".sparsespec/lock")
    }


def final(*names: str) -> set[str]:
    """Files about all images, and what the report shows of these."""
    cards = {f"report/images/{name}.{ending}" for name in names for ending in ("jpg", "js")}
    return {"run.json", "instances.json", "report.html", "report/run.js"} | cards


def index_of(out: Path) -> dict[str, Any]:
    """What stands in the report."""
    page = (out / "report.html").read_text(encoding="utf-8")
    index: dict[str, Any] = json.loads(page.partition('id="index">')[2].partition("</script>")[0])
    return index


def labels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "I;16"
        return np.asarray(image).astype(int)


def test_everything_is_written_and_agrees(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a" / "x.jpg", 80, 50)
    photo(tmp_path / "in" / "a" / "x.png", 60, 40)
    photo(tmp_path / "in" / "y.png", 41, 33)
    Image.new("RGB", (20, 10)).save(tmp_path / "in" / "black.png")
    out = tmp_path / "out"
    seen: list[tuple[str, int, int]] = []
    result = run(
        segmenter,
        tmp_path / "in",
        out,
        parameters={"model": "fake", "n_instances": np.int64(2)},
        execution={"host": "this one"},
        progress=lambda row, position, total: seen.append((row.path, position, total)),
    )
    expected = {"a/x.jpg", "a/x.png", "y", "black"}
    assert files(out) == (
        {f"masks/{name}.png" for name in expected} | {f"overlays/{name}.jpg" for name in expected} | final(*expected)
    )
    paths = ["a/x.jpg", "a/x.png", "black.png", "y.png"]
    assert seen == [(path, k, 4) for k, path in enumerate(paths, start=1)]
    assert (len(result.rows), result.instances, result.earlier) == (4, 6, 0)
    assert [row.status for row in result.rows] == ["done"] * 4
    assert not result.interrupted

    saved = record(out)
    assert saved["program"] == "sparsespec"
    assert saved["version"] == sparsespec.__version__
    assert saved["state"] == "finished"
    assert saved["parameters"] == {"model": "fake", "n_instances": 2}
    assert saved["execution"] == {"engine": "inline", "workers": 1, "host": "this one"}
    assert saved["totals"] | {"seconds": 0} == {
        "images": 4, "done": 4, "failed": 0, "skipped": 0, "instances": 6, "seconds": 0,
    }  # fmt: skip
    assert saved["started"] <= saved["finished"]
    assert saved["machine"]["cpus"] >= 1
    assert saved["machine"]["libraries"]["numpy"] == np.__version__
    assert [row["path"] for row in saved["images"]] == paths
    first = saved["images"][0]
    assert first["mask"] == "masks/a/x.jpg.png"
    assert first["overlay"] == "overlays/a/x.jpg.jpg"
    assert first["size"] == [80, 50]
    assert first["instances"] == 2
    assert first["scores"] == pytest.approx([0.9, 0.4], abs=1e-6)
    assert first["details"] == {"model": "fake", "grid": [3, 4], "tokens": 12, "solver": "none"}
    assert set(first["seconds"]) == {"read", "features", "instances", "write", "total"}
    assert first["seconds"]["features"] == 0.01
    assert first["error"] is None

    coco = json.loads((out / "instances.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == paths
    assert len(coco["annotations"]) == 6
    for row, image in zip(saved["images"], coco["images"], strict=True):
        labels = labels_of(out / row["mask"])
        assert labels.shape == (image["height"], image["width"])
        assert [image["width"], image["height"]] == row["size"]
        mine = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert len(mine) == row["instances"] == len(np.unique(labels)) - 1
        for annotation in mine:
            np.testing.assert_array_equal(decode_rle(annotation["segmentation"]), labels == annotation["label"])
        with Image.open(out / row["overlay"]) as overlay:
            assert overlay.size == tuple(row["size"])
    index = index_of(out)
    shown = [dict(zip(index["columns"], row, strict=True)) for row in index["rows"]]
    assert [row["path"] for row in shown] == paths
    assert shown[0] == {
        "path": "a/x.jpg", "page": None, "status": "done", "instances": 2, "score": 0.9, "width": 80, "height": 50,
        "area": round(sum(a["area"] for a in coco["annotations"] if a["image_id"] == 1) / 4000, 4),
        "name": "a/x.jpg", "overlay": "overlays/a/x.jpg.jpg", "mask": "masks/a/x.jpg.png", "error": None,
    }  # fmt: skip
    assert (index["shown"], index["images"], index["done"], index["without"]) == (4, 4, [4, 4], [0, 0])
    assert index["histograms"]["counts"] == [[0, 1], [2, 3]]


def test_results_do_not_depend_on_the_run(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    for k in range(3):
        photo(tmp_path / "in" / f"{k}.jpg", 50 + k)
    run(segmenter, tmp_path / "in", tmp_path / "one")
    run(segmenter, tmp_path / "in", tmp_path / "two")
    for name in sorted(files(tmp_path / "one") - {"run.json", "report/run.js"}):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_one_bad_image_costs_one_row(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "b.jpg").write_bytes(b"")
    (tmp_path / "in" / "c.jpg").write_text("not an image at all")
    photo(tmp_path / "in" / "d.jpg", 64, 64)
    photo(tmp_path / "in" / "e.jpg", 65, 65)
    photo(tmp_path / "in" / "f.jpg", 66, 66)
    photo(tmp_path / "in" / "g.jpg", 67, 67)

    def moody(image: np.ndarray) -> Any:
        if image.shape[0] == 64:
            raise MemoryError
        if image.shape[0] == 65:
            raise RuntimeError("first line\nsecond line " + "x" * 1000)
        result = segmenter(image)
        if image.shape[0] == 66:
            result.labels = result.labels[:-1]
        return result

    out = tmp_path / "out"
    result = run(moody, tmp_path / "in", out)
    assert [row.status for row in result.rows] == ["done", "failed", "failed", "failed", "failed", "failed", "done"]
    rows = {row["path"]: row for row in record(out)["images"]}
    assert rows["b.jpg"]["error"] == "it is empty (zero bytes); copy or export it again"
    assert "not an image" in rows["c.jpg"]["error"]
    assert rows["d.jpg"]["error"] == "out of memory (64 x 64 pixels); make the image smaller"
    assert rows["e.jpg"]["error"].startswith("RuntimeError: first line second line xxx")
    assert len(rows["e.jpg"]["error"]) == 400
    assert "labels of shape (65, 66) for an image of shape (66, 66)" in rows["f.jpg"]["error"]
    for name in "bcdef":
        assert rows[f"{name}.jpg"]["mask"] is None
        assert rows[f"{name}.jpg"]["instances"] == 0
    assert files(out / "masks") == {"a.png", "g.png"}
    coco = json.loads((out / "instances.json").read_text())
    assert [(image["id"], image["file_name"]) for image in coco["images"]] == [(1, "a.jpg"), (7, "g.jpg")]
    index = index_of(out)
    assert [row[index["columns"].index("status")] for row in index["rows"]] == ["done"] + ["failed"] * 5 + ["done"]
    assert "it is empty (zero bytes)" in index["rows"][1][-1]
    assert files(out / "report" / "images") == {"a.jpg", "a.js", "g.jpg", "g.js"}


def test_failure_while_writing_leaves_no_half_result(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "in" / "a.jpg")

    def refused(*_: object, **__: object) -> None:
        raise OSError(36, "File name too long")

    with monkeypatch.context() as patch:
        patch.setattr("sparsespec.batch.one.write_overlay_jpeg", refused)
        result = run(segmenter, tmp_path / "in", tmp_path / "out")
    assert result.rows[0].status == "failed"
    assert result.rows[0].reason == "storage"
    assert result.rows[0].error == "OSError: File name too long"
    assert files(tmp_path / "out") == final()


def fail_with(patch: pytest.MonkeyPatch, number: int, at: int) -> list[Path]:
    """Let the overlay number `at`, and all after it, fail with this error."""
    from sparsespec.formats.overlay import write_overlay_jpeg

    written: list[Path] = []

    def write(path: Path, *arguments: Any, **options: Any) -> None:
        written.append(path)
        if len(written) >= at:
            raise OSError(number, os.strerror(number))
        write_overlay_jpeg(path, *arguments, **options)

    patch.setattr("sparsespec.batch.one.write_overlay_jpeg", write)
    return written


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_disk_that_takes_nothing_more_ends_the_run_which_goes_on_later(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for k in range(5):
        photo(tmp_path / "in" / f"{k}.jpg", 50 + k)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        written = fail_with(patch, number, 3)
        result = run(segmenter, tmp_path / "in", out)
    assert len(written) == 3
    assert result.blocked == f"cannot write the results: {os.strerror(number)}"
    assert not result.interrupted
    assert [row.status for row in result.rows] == ["done", "done", "skipped", "skipped", "skipped"]
    assert record(out)["state"] == "blocked"
    names = {f"masks/{k}.png" for k in range(2)} | {f"overlays/{k}.jpg" for k in range(2)}
    assert files(out) == names | final("0", "1")

    result = run(segmenter, tmp_path / "in", out)
    assert (result.blocked, result.earlier, result.count("done")) == (None, 2, 5)
    run(segmenter, tmp_path / "in", tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_all_fail(tmp_path: Path, segmenter: Segmenter) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    result = run(segmenter, tmp_path / "in", tmp_path / "out")
    assert result.count("failed") == 1
    assert json.loads((tmp_path / "out" / "instances.json").read_text())["images"] == []
    assert index_of(tmp_path / "out")["done"] == [0, 0]
    assert index_of(tmp_path / "out")["without"] == [1, 1]


def test_without_overlays(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    run(segmenter, tmp_path / "in", tmp_path / "out", formats=Formats(overlays=False))
    assert not (tmp_path / "out" / "overlays").exists()
    assert record(tmp_path / "out")["images"][0]["overlay"] is None
    assert files(tmp_path / "out") == {"masks/a.png"} | final("a")


def test_a_second_run_goes_on_or_needs_permission(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    photo(tmp_path / "in" / "b.jpg")
    out = tmp_path / "out"
    run(segmenter, tmp_path / "in", out, parameters={"seed": 0})
    before = contents(out)
    result = run(segmenter, tmp_path / "in", out, parameters={"seed": 0})
    assert len(segmenter.seen) == 2
    assert (result.earlier, result.count("done")) == (2, 2)
    assert contents(out) == before
    assert all(row.seconds["total"] > 0 for row in result.rows)

    saved = record(out)
    with pytest.raises(OutputsError, match=r"other settings \(overlays was true, is false; seed was 0, is 1\): .*"):
        run(segmenter, tmp_path / "in", out, parameters={"seed": 1}, formats=Formats(overlays=False))
    assert contents(out) == before
    assert record(out) == saved
    result = run(segmenter, tmp_path / "in", out, parameters={"seed": 1}, overwrite=True)
    assert (result.earlier, len(segmenter.seen)) == (0, 4)


def test_overwriting_leaves_nothing_stale(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    old = photo(tmp_path / "in" / "b.jpg")
    out = tmp_path / "out"
    run(segmenter, tmp_path / "in", out)
    old.unlink()
    (tmp_path / "in" / "a.jpg").write_bytes(b"")
    photo(tmp_path / "in" / "c.jpg")
    (out / "mine.txt").write_text("keep")
    run(segmenter, tmp_path / "in", out, overwrite=True)
    assert files(out) == {"masks/c.png", "overlays/c.jpg", "mine.txt"} | final("c")


def pages(path: Path, count: int) -> Path:
    """Write a TIFF file of so many pages, each wider than the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tifffile.TiffWriter(path) as tiff:
        for page in range(count):
            pixels = np.full((40, 50 + page, 3), 30, np.uint8)
            pixels[10:20, 5 : 10 + page] = 250
            tiff.write(pixels, photometric="rgb", metadata=None, contiguous=False)
    return path


def test_files_of_several_pages(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    pages(tmp_path / "in" / "a" / "scan.tif", 3)
    pages(tmp_path / "in" / "single.tif", 1)
    photo(tmp_path / "in" / "z.jpg")
    out = tmp_path / "out"
    seen: list[tuple[str, int | None, int, int]] = []
    result = run(
        segmenter,
        tmp_path / "in",
        out,
        formats=Formats(cutouts=True),
        progress=lambda row, k, total: seen.append((row.path, row.page, k, total)),
    )
    names = [f"a/scan.tif/page-{page:04d}" for page in (1, 2, 3)] + ["single", "z"]
    assert files(out / "masks") == {f"{name}.png" for name in names}
    assert files(out / "overlays") == {f"{name}.jpg" for name in names}
    assert {path.rpartition("/")[0] for path in files(out / "cutouts")} == set(names)
    assert [(row.path, row.page) for row in result.rows] == [
        ("a/scan.tif", 1), ("a/scan.tif", 2), ("a/scan.tif", 3), ("single.tif", None), ("z.jpg", None),
    ]  # fmt: skip
    assert [row.size for row in result.rows][:3] == [(50, 40), (51, 40), (52, 40)]
    # A file is one step on the way, whatever pages it has.
    assert [(position, total) for *_, position, total in seen] == [(1, 3), (1, 3), (1, 3), (2, 3), (3, 3)]
    coco = json.loads((out / "instances.json").read_text())
    assert [(image["id"], image["file_name"], image.get("page")) for image in coco["images"]] == [
        (1, "a/scan.tif", 1), (2, "a/scan.tif", 2), (3, "a/scan.tif", 3), (4, "single.tif", None), (5, "z.jpg", None),
    ]  # fmt: skip
    for row in record(out)["images"]:
        assert labels_of(out / row["mask"]).shape == tuple(reversed(row["size"]))
    index = index_of(out)
    assert [row[:2] for row in index["rows"]][1:4] == [["a/scan.tif", 2], ["a/scan.tif", 3], ["single.tif", None]]
    assert files(out / "report" / "images") == {f"{name}.{ending}" for name in names for ending in ("jpg", "js")}
    assert run(segmenter, tmp_path / "in", out, formats=Formats(cutouts=True)).earlier == 3


def test_a_damaged_page_among_good_ones_fails_alone(tmp_path: Path, segmenter: Any) -> None:
    path = pages(tmp_path / "in" / "scan.tif", 3)
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages[1].dataoffsets[0]
        tag = tiff.pages[1].tags["StripOffsets"]
        assert tag.value[0] == start
        place = tag.valueoffset
    data = bytearray(path.read_bytes())
    data[place : place + 4] = (len(data) + 1000).to_bytes(4, "little")
    path.write_bytes(data)
    out = tmp_path / "out"
    result = run(segmenter, tmp_path / "in", out)
    assert [(row.page, row.status) for row in result.rows] == [(1, "done"), (2, "failed"), (3, "done")], result.rows[:]
    assert result.rows[1].reason == "unreadable"
    assert files(out / "masks") == {"scan.tif/page-0001.png", "scan.tif/page-0003.png"}
    assert result.counts["failed"] == 1
    # The file is whole again, with fewer pages: nothing of the former ones is left.
    pages(path, 2)
    result = run(segmenter, tmp_path / "in", out)
    assert [(row.page, row.status) for row in result.rows] == [(1, "done"), (2, "done")]
    assert files(out / "masks") == {"scan.tif/page-0001.png", "scan.tif/page-0002.png"}
    assert files(out / "overlays") == {"scan.tif/page-0001.jpg", "scan.tif/page-0002.jpg"}
    pages(path, 1)
    run(segmenter, tmp_path / "in", out)
    assert files(out / "masks") == {"scan.png"}
    assert not (out / "masks" / "scan.tif").exists()


def test_too_large_an_image(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg", 100, 100)
    result = run(segmenter, tmp_path / "in", tmp_path / "out", max_pixels=9999)
    assert result.rows[0].error is not None
    assert "more than the limit of" in result.rows[0].error


def test_rotated_photographs(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    path = photo(tmp_path / "in" / "a.jpg", 80, 50)
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(path) as image:
        image.save(path, exif=exif)
    out = tmp_path / "out"
    run(segmenter, tmp_path / "in", out)
    assert segmenter.seen == [(80, 50, 3)]
    assert labels_of(out / "masks" / "a.png").shape == (80, 50)
    (image_entry,) = json.loads((out / "instances.json").read_text())["images"]
    assert (image_entry["width"], image_entry["height"]) == (50, 80)
    assert record(out)["images"][0]["size"] == [50, 80]
    with Image.open(out / "overlays" / "a.jpg") as overlay:
        assert overlay.size == (50, 80)


def interrupted_run(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, at: int, raiser: Callable[[], None], **options: Any
) -> BatchResult:
    for k in range(4):
        photo(tmp_path / "in" / f"{k}.jpg")
    calls = 0

    def stopping(image: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raiser()
        return segmenter(image)

    return run(stopping, tmp_path / "in", tmp_path / "out", **options)


def stop() -> None:
    raise KeyboardInterrupt


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def press_ctrl_c_twice() -> None:
    press_ctrl_c()
    press_ctrl_c()


def check_interrupted(tmp_path: Path, result: BatchResult, done: int) -> None:
    """So many images are there in every file, and nothing else."""
    assert result.interrupted
    statuses = ["done"] * done + ["skipped"] * (4 - done)
    assert [row.status for row in result.rows] == statuses
    out = tmp_path / "out"
    saved = record(out)
    assert saved["state"] == "interrupted"
    assert saved["totals"]["skipped"] == 4 - done
    assert [row["status"] for row in saved["images"]] == statuses
    assert saved["images"][done] == {
        "path": f"{done}.jpg", "status": "skipped", "mask": None, "overlay": None, "size": None, "instances": 0,
        "scores": [], "seconds": {}, "details": {}, "error": "not reached", "reason": None, "page": None,
        "cutouts": [], "yolo": None, "fingerprint": None,
    }  # fmt: skip
    names = {f"masks/{k}.png" for k in range(done)} | {f"overlays/{k}.jpg" for k in range(done)}
    assert files(out) == names | final(*map(str, range(done)))
    coco = json.loads((out / "instances.json").read_text())
    assert [image["id"] for image in coco["images"]] == list(range(1, done + 1))
    assert index_of(out)["interrupted"]


def test_interrupt_finishes_the_files(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    check_interrupted(tmp_path, interrupted_run(tmp_path, segmenter, photo, 3, stop), 2)


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C there without its console")
@pytest.mark.parametrize("signalling", [press_ctrl_c, terminate])
def test_the_first_signal_finishes_the_image_at_work(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, signalling: Callable[[], None]
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    told: list[str] = []
    result = interrupted_run(tmp_path, segmenter, photo, 2, signalling, on_stop=lambda: told.append("stopping"))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert told == ["stopping"]
    check_interrupted(tmp_path, result, 2)


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C there without its console")
def test_the_second_signal_gives_up_the_image_at_work(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    check_interrupted(tmp_path, interrupted_run(tmp_path, segmenter, photo, 2, press_ctrl_c_twice), 1)


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C there without its console")
@pytest.mark.parametrize("signalling", [press_ctrl_c, press_ctrl_c_twice])
def test_signal_while_results_are_noted_waits(
    tmp_path: Path,
    segmenter: Segmenter,
    photo: Photo,
    monkeypatch: pytest.MonkeyPatch,
    signalling: Callable[[], None],
) -> None:
    from sparsespec.batch.journal import Journal

    settle = Journal.settle

    def signalled(self: Journal, path: str, outcomes: Any) -> None:
        if path == "1.jpg":
            signalling()
        settle(self, path, outcomes)

    monkeypatch.setattr(Journal, "settle", signalled)
    # The second image, during which the signal came, is complete in every file.
    check_interrupted(tmp_path, interrupted_run(tmp_path, segmenter, photo, 99, stop), 2)


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C there without its console")
def test_signal_while_the_final_files_are_written_waits(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsespec.formats import CocoWriter

    close = CocoWriter.close

    def signalled(self: CocoWriter) -> None:
        press_ctrl_c()
        close(self)

    monkeypatch.setattr(CocoWriter, "close", signalled)
    result = interrupted_run(tmp_path, segmenter, photo, 99, stop)
    assert not result.interrupted
    assert record(tmp_path / "out")["state"] == "finished"
    assert json.loads((tmp_path / "out" / "instances.json").read_text())["images"][3]["id"] == 4


def test_the_first_failure_ends_the_run_on_request(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    for k in range(4):
        photo(tmp_path / "in" / f"{k}.jpg")
    (tmp_path / "in" / "1.jpg").write_bytes(b"")
    result = run(segmenter, tmp_path / "in", tmp_path / "out", fail_fast=True)
    assert result.stopped
    assert not result.interrupted
    assert [row.status for row in result.rows] == ["done", "failed", "skipped", "skipped"]
    assert record(tmp_path / "out")["state"] == "stopped"
    photo(tmp_path / "in" / "1.jpg")
    result = run(segmenter, tmp_path / "in", tmp_path / "out", fail_fast=True)
    assert (result.stopped, result.count("done"), result.earlier) == (False, 4, 1)


def test_another_thread_can_run_it(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    results: list[BatchResult] = []
    thread = threading.Thread(target=lambda: results.append(run(segmenter, tmp_path / "in", tmp_path / "out")))
    thread.start()
    thread.join()
    assert results[0].count("done") == 1


def test_the_record_is_there_from_the_start(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "a.jpg")
    states = []

    def spying(image: np.ndarray) -> Any:
        states.append(record(tmp_path / "out"))
        return segmenter(image)

    run(spying, tmp_path / "in", tmp_path / "out")
    (early,) = states
    assert early["program"] == "sparsespec"
    assert early["state"] == "running"
    assert early["finished"] is None
    assert early["images"] == []


def test_folders_that_cannot_be_listed_count_as_failures(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    from dataclasses import replace

    photo(tmp_path / "in" / "a.jpg")
    inputs = replace(find_inputs(tmp_path / "in"), unlisted=(("private/", "the folder cannot be listed: denied"),))
    seen: list[Row] = []
    result = run_batch(segmenter, inputs, tmp_path / "out", progress=lambda row, *_: seen.append(row))
    assert (result.count("done"), result.count("failed")) == (1, 1)
    assert [row.path for row in seen] == ["private/", "a.jpg"]
    row = record(tmp_path / "out")["images"][0]
    assert (row["error"], row["reason"]) == ("the folder cannot be listed: denied", "unlisted")
    assert json.loads((tmp_path / "out" / "instances.json").read_text())["images"][0]["id"] == 1
    assert "private/" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_names_beyond_ascii(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    photo(tmp_path / "in" / "größe 日本.jpg")
    raw = b"caf\xe9.png"
    try:
        os.rename(photo(tmp_path / "in" / "c.png"), os.path.join(os.fsencode(tmp_path / "in"), raw))
    except OSError:
        raw = b"c.png"  # this file system takes Unicode only
    result = run(segmenter, tmp_path / "in", tmp_path / "out")
    assert result.count("done") == 2
    assert [row["path"] for row in record(tmp_path / "out")["images"]] == [os.fsdecode(raw), "größe 日本.jpg"]
    assert (tmp_path / "out" / "masks" / "größe 日本.png").is_file()


def test_the_final_files_are_cleaned_up_when_the_disk_is_full(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsespec.formats import CocoWriter

    def full(self: CocoWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CocoWriter, "close", full)
    photo(tmp_path / "in" / "a.jpg")
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        run(segmenter, tmp_path / "in", out)
    assert files(out) == {"masks/a.png", "overlays/a.jpg"} | final("a") - {
        "instances.json",
        "report.html",
        "report/run.js",
    }
    assert record(out)["state"] == "running"
    monkeypatch.undo()
    result = run(segmenter, tmp_path / "in", out)
    assert (result.earlier, result.count("done")) == (1, 1)
    assert record(out)["state"] == "finished"


def test_jsonable() -> None:
    value = {
        1: np.float32(0.5),
        "nan": float("nan"),
        "inf": np.float64("inf"),
        "flag": np.bool_(True),
        "array": np.array([[1, 2]], np.int8),
        "tuple": (1, None, "x"),
        "set": {2, 1},
        "path": Path("a"),
        "other": 1j,
    }
    assert jsonable(value) == {
        "1": 0.5, "nan": None, "inf": None, "flag": True, "array": [[1, 2]], "tuple": [1, None, "x"], "set": [1, 2],
        "path": "a", "other": "1j",
    }  # fmt: skip
    json.dumps(jsonable(value), allow_nan=False)


class ByWindow:
    """A segmenter as large images need it: the left half is one object, found by window."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, Any]] = []
        self.temporary: list[str] = []
        self.error: BaseException | None = None

    def __call__(self, image: Any, out: np.ndarray | None = None) -> Any:
        self.calls.append((type(image).__name__, None if out is None else (type(out).__name__, out.dtype, out.shape)))
        self.temporary += [path.name for path in self.folder.rglob(TEMPORARY_PATTERN) if path.stat().st_size]
        labels = np.zeros(image.shape[:2], np.int32) if out is None else out
        assert not labels.any()
        if out is None:
            labels[:, : image.shape[1] // 2] = 1
        else:
            for top in range(0, image.shape[0], 7):
                window = image.read(top, 0, min(top + 7, image.shape[0]), image.shape[1] // 2)
                labels[top : top + len(window), : window.shape[1]] = 1
        if self.error is not None:
            raise self.error
        return SimpleNamespace(labels=labels, scores=np.array([0.5]), info={})


@pytest.fixture
def large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an image be large from 3000 pixels on."""
    monkeypatch.setattr("sparsespec.batch.one.LARGE_IMAGE", 3000)
    monkeypatch.setattr("sparsespec.images.LARGE_IMAGE", 3000)


@pytest.mark.usefixtures("large_images")
def test_large_images_are_read_and_written_by_window(tmp_path: Path, photo: Photo) -> None:
    photo(tmp_path / "in" / "large.jpg", 80, 50)
    photo(tmp_path / "in" / "small.jpg", 50, 40)
    out = tmp_path / "out"
    segmenter = ByWindow(out)
    result = run(segmenter, tmp_path / "in", out)
    assert [row.status for row in result.rows] == ["done", "done"], result.rows
    assert segmenter.calls == [("_PillowPixels", ("memmap", np.uint16, (50, 80))), ("ndarray", None)]
    # One file for the labels while they were made, beside those that are written at the end; none of it is left.
    assert len(segmenter.temporary) == 1
    assert files(out) == {
        "masks/large.png", "masks/small.png", "overlays/large.jpg", "overlays/small.jpg",
    } | final("large", "small")  # fmt: skip
    for name, width, height in (("large", 80, 50), ("small", 50, 40)):
        expected = np.zeros((height, width), int)
        expected[:, : width // 2] = 1
        np.testing.assert_array_equal(labels_of(out / "masks" / f"{name}.png"), expected)
    coco = json.loads((out / "instances.json").read_text())
    assert [a["bbox"] for a in coco["annotations"]] == [[0, 0, 40, 50], [0, 0, 25, 40]]


@pytest.mark.usefixtures("large_images")
@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError(), KeyboardInterrupt()])
def test_the_file_of_the_labels_goes_with_a_failure(tmp_path: Path, photo: Photo, error: BaseException) -> None:
    photo(tmp_path / "in" / "large.jpg", 80, 50)
    out = tmp_path / "out"
    segmenter = ByWindow(out)
    segmenter.error = error
    result = run(segmenter, tmp_path / "in", out)
    assert len(segmenter.temporary) == 1
    assert result.interrupted == isinstance(error, KeyboardInterrupt)
    assert result.rows[0].status == ("skipped" if result.interrupted else "failed")
    assert files(out) == final()


@pytest.mark.usefixtures("large_images")
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no space on a disk")
def test_no_room_for_the_labels_costs_one_row(tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "in" / "large.jpg", 80, 50)
    photo(tmp_path / "in" / "small.jpg", 50, 40)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    out = tmp_path / "out"
    result = run(ByWindow(out), tmp_path / "in", out)
    assert [row.status for row in result.rows] == ["failed", "done"]
    assert result.rows[0].error == "OSError: No space left on device"
    assert not list(out.glob(TEMPORARY_PATTERN))


@pytest.mark.usefixtures("large_images")
def test_a_large_tiff_with_a_damaged_tile_fails_alone(
    tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 100, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for name in ("bad.tif", "good.tif"):
        tifffile.imwrite(tmp_path / "in" / name, pixels, tile=(32, 32), photometric="rgb", compression="zlib")
    data = bytearray((tmp_path / "in" / "bad.tif").read_bytes())
    data[len(data) * 2 // 3 :] = bytes(len(data) - len(data) * 2 // 3)
    (tmp_path / "in" / "bad.tif").write_bytes(data)
    monkeypatch.setattr("sparsespec.images._WHOLE_TIFF", 0)
    monkeypatch.setattr("sparsespec._tiff._PIECE_AIM", 1)
    out = tmp_path / "out"
    segmenter = ByWindow(out)
    result = run(segmenter, tmp_path / "in", out)
    assert [row.status for row in result.rows] == ["failed", "done"]
    assert [call[0] for call in segmenter.calls] == ["_WindowedTiff", "_WindowedTiff"]
    assert result.rows[0].error is not None
    assert result.rows[0].error.startswith("it is damaged or cut short near row ")
    assert labels_of(out / "masks" / "good.png").shape == (90, 100)


def test_times_that_are_no_numbers_are_left_out(tmp_path: Path, photo: Photo, segmenter: Segmenter) -> None:
    photo(tmp_path / "in" / "a.jpg")

    def timed(image: np.ndarray) -> Any:
        found = segmenter(image)
        found.info["seconds"] = {"one": float("nan"), "two": float("inf"), "three": 0.5}
        return found

    (row,) = run(timed, tmp_path / "in", tmp_path / "out").rows
    assert row.status == "done"
    assert row.seconds["three"] == 0.5
    assert not {"one", "two"} & row.seconds.keys()


@pytest.mark.parametrize("images", [("b.jpg", "a.jpg"), ("a.jpg", "a.jpg"), ("a-b.jpg", "a/b.jpg")])
def test_inputs_must_be_in_order(tmp_path: Path, segmenter: Segmenter, images: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"sorted part by part, and all different"):
        run_batch(segmenter, Inputs(tmp_path, images), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_inputs(tmp_path: Path, segmenter: Segmenter) -> None:
    result = run_batch(segmenter, Inputs(tmp_path / "in", ()), tmp_path / "out")
    assert (len(result.rows), result.instances) == (0, 0)
    assert record(tmp_path / "out")["state"] == "finished"


class LostAttempts:
    """Engine of shards: half of a shard is settled by an attempt that is lost, which only its state tells."""

    settings: ClassVar[dict[str, Any]] = {"engine": "fake"}

    def summaries(self, job: Job, tasks: Any, *, stopping: threading.Event) -> Iterator[ShardSummary]:
        for task in tasks:
            half = frozenset(item.path for item in task.items[::2])
            work_shard(job, replace(task, only=half), Inline(), stopping=stopping)
            yield work_shard(job, task, Inline(), stopping=stopping)


def test_progress_of_shards_counts_files(tmp_path: Path, segmenter: Segmenter, photo: Photo) -> None:
    for k in range(3):
        photo(tmp_path / "in" / f"{k}.jpg")
    with tifffile.TiffWriter(tmp_path / "in" / "3.tif") as tiff:
        for _ in range(3):
            tiff.write(np.full((16, 20, 3), 30, np.uint8), photometric="rgb", metadata=None, contiguous=False)
    told: list[tuple[int, int]] = []
    engine: Any = LostAttempts()
    run(
        segmenter,
        tmp_path / "in",
        tmp_path / "out",
        engine=engine,
        progress=lambda row, settled, total: told.append((settled, total)),
    )
    assert told
    assert told[-1] == (4, 4)
    assert max(told) == (4, 4)


def test_nothing_is_begun_after_a_callback_has_failed(tmp_path: Path, segmenter: Any, photo: Photo) -> None:
    for k in range(6):
        photo(tmp_path / "in" / f"{k}.jpg")

    def broken(*_: object) -> None:
        raise RuntimeError("no terminal")

    for workers in (1, 2):
        with pytest.raises(RuntimeError, match="no terminal"):
            run(segmenter, tmp_path / "in", tmp_path / "out", engine=Inline(workers), progress=broken)
    assert len(segmenter.seen) < 6
    assert run(segmenter, tmp_path / "in", tmp_path / "out").count("done") == 6


def test_the_record_is_published_when_everything_else_is(
    tmp_path: Path, segmenter: Segmenter, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "in" / "a.jpg")
    published: list[list[str]] = []
    monkeypatch.setattr(LocalStore, "publish", lambda self, staging, paths: published.append(list(paths)))
    run(segmenter, tmp_path / "in", tmp_path / "out")
    assert published[-2:] == [["instances.json", "report/run.js", "report.html"], ["run.json"]]
