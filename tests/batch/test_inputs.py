from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch import InputsError, find_inputs


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_folder_is_walked_in_order(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.JPG", "a.png", "sub/z.tif", "sub/deep/y.Webp", "a/x.jpeg", "B.gif", "notes.txt", "x.jpg.txt", "no"
    )
    found = find_inputs(tmp_path)
    assert found.root == tmp_path
    assert found.images == ("B.gif", "a/x.jpeg", "a.png", "b.JPG", "sub/deep/y.Webp", "sub/z.tif")
    assert found.unlisted == ()


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{folder}/{k}.png" for folder in "cab" for k in range(4)))
    expected = find_inputs(tmp_path).images
    walk = os.walk

    def backwards(*arguments: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for here, folders, files in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield here, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert find_inputs(tmp_path).images == expected


def test_hidden_names_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", ".b.png", "._a.png", ".thumbnails/c.png")
    assert find_inputs(tmp_path).images == ("a.png",)
    assert find_inputs(str(tmp_path / "*")).images == ("a.png",)
    assert find_inputs(str(tmp_path / "**" / "*")).images == ("a.png",)


def test_output_folder_and_earlier_outputs_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "out/overlays/a.jpg", "old/masks/a.png", "other/run.json", "other/b.png")
    (tmp_path / "old" / "run.json").write_text('{\n "program": "sparsespec",\n "version": "0.1.0"}')
    assert find_inputs(tmp_path, output=tmp_path / "out").images == ("a.png", "other/b.png")
    with pytest.raises(InputsError, match="holds no image"):
        find_inputs(str(tmp_path / "**" / "*.jpg"), output=tmp_path / "out")


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "sparsespec-out/overlays/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert find_inputs(".", output="sparsespec-out").images == ("a.png",)
    single = find_inputs("a.png", output="sparsespec-out")
    assert (single.root, single.images) == (Path("."), ("a.png",))
    pattern = find_inputs("*.png", output="sparsespec-out")
    assert (pattern.root, pattern.images) == (Path("."), ("a.png",))


def test_one_file_whatever_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "scan", "b.png")
    found = find_inputs(tmp_path / "scan", output=tmp_path / "out")
    assert (found.root, found.images) == (tmp_path, ("scan",))


def test_patterns(tmp_path: Path) -> None:
    touch(tmp_path, "2023/a.jpg", "2024/b.jpg", "2024/c.png", "2024/c.txt", "2024/deep/d.jpg", "folder.jpg/e.png")

    def images(pattern: str) -> tuple[str, ...]:
        return find_inputs(str(tmp_path / pattern)).images

    assert images("2024/*.jpg") == ("b.jpg",)
    assert images("2024/*") == ("b.jpg", "c.png")
    assert images("20*/*.jpg") == ("2023/a.jpg", "2024/b.jpg")
    assert images("**/*.jpg") == ("2023/a.jpg", "2024/b.jpg", "2024/deep/d.jpg")
    assert images("202[34]/?.jpg") == ("2023/a.jpg", "2024/b.jpg")
    assert find_inputs(str(tmp_path / "2024" / "*.jpg")).root == tmp_path / "2024"


def test_brackets_in_a_real_name_are_no_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "trip [2024]/a.png")
    assert find_inputs(tmp_path / "trip [2024]").images == ("a.png",)
    assert find_inputs(tmp_path / "trip [2024]" / "a.png").images == ("a.png",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "'.*missing' does not exist"),
        ("missing/*.jpg", "the pattern '.*' holds no image"),
        ("empty", r"the folder '.*empty' holds no image \(looked for .*\.jpg"),
        ("texts", "holds no image"),
        ("texts/*", "holds no image"),
    ],
)
def test_nothing_to_do_is_an_error(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "texts/a.txt")
    with pytest.raises(InputsError, match=message):
        find_inputs(tmp_path / source)


@pytest.mark.parametrize("source", ["", "a\x00b"])
def test_impossible_names(source: str) -> None:
    with pytest.raises(InputsError, match="input"):
        find_inputs(source)


@pytest.mark.parametrize("source", ["photos", "photos/a.png", "photos/*.png"])
def test_output_must_lie_elsewhere(tmp_path: Path, source: str) -> None:
    touch(tmp_path, "photos/a.png")
    with pytest.raises(InputsError, match="the output folder is the folder of the input"):
        find_inputs(tmp_path / source, output=tmp_path / "photos" / "." / "x" / "..")
    with pytest.raises(InputsError, match="lies inside the output folder"):
        find_inputs(tmp_path / source, output=tmp_path)
    assert find_inputs(tmp_path / source, output=tmp_path / "photos" / "out").images == ("a.png",)


def test_linked_folders_are_not_followed(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.png", "elsewhere/b.png")
    try:
        (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos", target_is_directory=True)
        (tmp_path / "photos" / "b.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    except OSError:
        pytest.skip("this system does not let us make symbolic links")
    assert find_inputs(tmp_path / "photos").images == ("a.png", "b.png")


def test_folder_that_cannot_be_listed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "private/b.png")
    scandir = os.scandir

    def guarded(path: str | Path) -> object:
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = find_inputs(tmp_path)
    assert found.images == ("a.png",)
    assert found.unlisted == (("private/", "the folder cannot be listed: Permission denied"),)
    with pytest.raises(InputsError, match="cannot list the folder"):
        find_inputs(tmp_path / "private")
