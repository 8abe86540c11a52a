from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sparsespec.batch import OutputsError, output_names
from sparsespec.batch.outputs import OutputFolder


def names(*images: str) -> dict[str, str]:
    return dict(zip(images, output_names(images), strict=True))


def test_plain_names_lose_their_ending() -> None:
    assert names("x.jpg", "a/x.jpg", "a/b.c.png") == {"x.jpg": "x", "a/x.jpg": "a/x", "a/b.c.png": "a/b.c"}


def test_equal_stems_keep_their_endings() -> None:
    assert names("a/x.jpg", "a/x.png", "b/x.jpg") == {"a/x.jpg": "a/x.jpg", "a/x.png": "a/x.png", "b/x.jpg": "b/x"}


def test_a_third_file_with_the_name_of_an_output() -> None:
    assert names("x.jpg", "x.jpg.png", "x.png") == {"x.jpg": "x.jpg", "x.jpg.png": "x.jpg.png", "x.png": "x.png"}
    assert names("x.jpg.png", "x.jpg.tif") == {"x.jpg.png": "x.jpg.png", "x.jpg.tif": "x.jpg.tif"}


def test_disks_that_ignore_case_and_composition() -> None:
    assert names("X.jpg", "x.png") == {"X.jpg": "X.jpg", "x.png": "x.png"}
    assert names("X.JPG", "x.jpg") == {"X.JPG": "X.JPG", "x.jpg": "x.jpg.2"}
    assert names("A/x.jpg", "a/x.jpg") == {"A/x.jpg": "A/x.jpg", "a/x.jpg": "a/x.jpg.2"}
    assert names("\u00fc.jpg", "u\u0308.png") == {"\u00fc.jpg": "\u00fc.jpg", "u\u0308.png": "u\u0308.png"}


def test_a_folder_with_the_name_of_an_output() -> None:
    assert names("x.jpg", "x.png/y.jpg") == {"x.jpg": "x.jpg", "x.png/y.jpg": "x.png/y"}
    assert names("x.tif", "x.jpg/y.jpg") == {"x.tif": "x.tif", "x.jpg/y.jpg": "x.jpg/y"}


@pytest.mark.parametrize("seed", range(200))
def test_outputs_never_meet(seed: int) -> None:
    rng = random.Random(seed)
    parts = ["x", "X", "x.jpg", "x.png", "x.jpg.png", "x.png.jpg", "x.2", "y"]
    images = {
        "/".join(
            [*rng.choices(parts, k=rng.randrange(3)), rng.choice(parts) + rng.choice([".jpg", ".png", ".JPG", ".tif"])]
        )
        for _ in range(rng.randrange(1, 13))
    }
    # A path is a file or a folder, not both.
    ordered = sorted(image for image in images if not any(other.startswith(image + "/") for other in images))
    found = output_names(ordered)
    for kind in (OutputFolder.mask, OutputFolder.overlay):
        outputs = [kind(name).casefold() for name in found]
        assert len(set(outputs)) == len(outputs)
        taken = set(outputs)
        for output in outputs:
            parents = output.split("/")
            assert not any("/".join(parents[:k]) in taken for k in range(1, len(parents)))
    assert output_names(ordered) == found


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
