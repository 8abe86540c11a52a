from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsespec.batch import OutputsError
from sparsespec.batch.outputs import OutputFolder


def test_new_and_empty_folders_are_fine(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "a" / "b").prepare(["x"], overwrite=False)
    assert (tmp_path / "a" / "b").is_dir()
    OutputFolder(tmp_path / "a" / "b").prepare(["x"], overwrite=False)
    (tmp_path / "a" / "b" / ".DS_Store").write_bytes(b"")
    OutputFolder(tmp_path / "a" / "b").prepare(["x"], overwrite=False)


def test_used_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputsError, match=r"is not empty: .*--overwrite"):
        OutputFolder(tmp_path).prepare(["x"], overwrite=False)
    (tmp_path / "run.json").write_text('{"program": "sparsespec"}')
    with pytest.raises(OutputsError, match="already holds a run"):
        OutputFolder(tmp_path).prepare(["x"], overwrite=False)
    with pytest.raises(OutputsError, match="is a file"):
        OutputFolder(tmp_path / "thesis.tex").prepare(["x"], overwrite=True)
    with pytest.raises(OutputsError, match="cannot use the output folder"):
        OutputFolder(tmp_path / "thesis.tex" / "below").prepare(["x"], overwrite=True)


def fill(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("content")


def left(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_overwriting_clears_the_former_run_and_nothing_else(tmp_path: Path) -> None:
    ours = ["masks/old.png", "overlays/old.jpg", "masks/a/x.png", "instances.json", "report.html", "run.json"]
    unfinished = [".sparsespec-0123.tmp", "masks/a/.sparsespec-4567.tmp"]
    foreign = ["masks/by-hand.png", "notes.txt", "secret.png"]
    fill(tmp_path, *ours, *unfinished, *foreign)
    rows = [
        {"path": "old.jpg", "mask": "masks/old.png", "overlay": "overlays/old.jpg"},
        {"path": "evil", "mask": "masks/../secret.png", "overlay": "notes.txt"},
        {"path": "odd", "mask": ".", "overlay": 7},
        {"path": "failed.jpg", "mask": None, "overlay": None},
    ]
    (tmp_path / "run.json").write_text(json.dumps({"program": "sparsespec", "images": rows}))
    OutputFolder(tmp_path).prepare(["a/x"], overwrite=True)
    assert left(tmp_path) == set(foreign)
    assert not (tmp_path / "overlays").exists()


@pytest.mark.parametrize("record", ["", "[]", "{", '{"images": 3}', '{"images": [3]}'])
def test_a_broken_record_is_no_obstacle(tmp_path: Path, record: str) -> None:
    fill(tmp_path, "masks/a.png")
    (tmp_path / "run.json").write_text(record)
    OutputFolder(tmp_path).prepare(["a"], overwrite=True)
    assert left(tmp_path) == set()
