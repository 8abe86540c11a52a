from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsespec.batch import Inputs, InputsError, find_inputs
from sparsespec.batch.inputs import leads_outside
from sparsespec.batch.store import LocalStore


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


class Backwards:
    """What `os.scandir` returns, the last name first."""

    def __init__(self, entries: Any) -> None:
        with entries:
            self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

    def __enter__(self) -> Iterator[Any]:
        return iter(self.entries)

    def __exit__(self, *_: object) -> None:
        pass


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{folder}/{k}.png" for folder in "cab" for k in range(4)), "b.png", "a/c.png/d.png")
    expected = find_inputs(tmp_path).images
    assert expected == tuple(sorted(expected, key=lambda path: path.split("/")))
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Backwards(scandir(path)))
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


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(target, target_is_directory=Path(path.parent, target).is_dir())
    except OSError:
        pytest.skip("this system does not let us make symbolic links")


def test_linked_folders_are_not_followed(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.png", "photos/sub/c.png", "elsewhere/b.png")
    for name in ("loop", "loop2", "sub/loop", "folder.png"):
        link(tmp_path / "photos" / name, tmp_path / "photos")
    link(tmp_path / "photos" / "b.png", tmp_path / "elsewhere" / "b.png")
    link(tmp_path / "photos" / "broken.png", "nothing")
    link(tmp_path / "photos" / "self.png", "self.png")
    link(tmp_path / "photos" / "self", "self")
    found = ("a.png", "b.png", "broken.png", "self.png", "sub/c.png")
    assert find_inputs(tmp_path / "photos").images == found
    # With folders that lead back, following them would take a pattern through more paths than there are atoms.
    assert find_inputs(str(tmp_path / "photos" / "**" / "*.png")).images == found
    link(tmp_path / "way", tmp_path / "photos")
    assert find_inputs(tmp_path / "way").images == found


def test_a_file_that_leads_out_of_the_input_is_told(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    touch(tmp_path, "photos/a.png", "photos/sub/b.png", "photos2/secret.png", "key")
    link(root / "out.png", tmp_path / "key")
    link(root / "relative.png", "../key")
    link(root / "neighbour.png", "../photos2/secret.png")
    link(root / "chain.png", "out.png")
    link(root / "root.png", root)
    link(root / "in.png", "sub/b.png")
    link(root / "sub" / "up.png", "../a.png")
    link(root / "around.png", "../photos/a.png")
    link(root / "folder", "../photos2")
    link(root / "inner", "sub")
    link(tmp_path / "way", root)
    for start in (root, str(root), tmp_path / "way", tmp_path / "photos2" / ".." / "photos"):
        for path in ("a.png", "sub/b.png", "in.png", "sub/up.png", "around.png", "inner/b.png", "root.png"):
            assert not leads_outside(start, path), path
        for path in ("out.png", "relative.png", "neighbour.png", "chain.png", "folder/secret.png", "../key"):
            assert leads_outside(start, path), path
    hard = root / "hard.png"
    try:
        os.link(tmp_path / "key", hard)
    except OSError:
        pytest.skip("this disk has no hard links")
    assert not leads_outside(root, "hard.png")


def test_links_to_nothing_and_to_themselves_are_errors(tmp_path: Path) -> None:
    link(tmp_path / "broken.png", "nothing")
    link(tmp_path / "one.png", "two.png")
    link(tmp_path / "two.png", "one.png")
    with pytest.raises(FileNotFoundError, match="a link leads to a file that does not exist"):
        leads_outside(tmp_path, "broken.png")
    with pytest.raises(OSError, match="a link leads back to itself"):
        leads_outside(tmp_path, "one.png")
    with pytest.raises(FileNotFoundError):
        leads_outside(tmp_path, "missing.png")


def test_a_file_named_by_itself_may_be_a_link(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/b.png", "photos/a.png")
    link(tmp_path / "photos" / "b.png", tmp_path / "elsewhere" / "b.png")
    link(tmp_path / "photos" / "broken.png", "nothing")
    found = find_inputs(tmp_path / "photos" / "b.png")
    assert (found.root, found.images, found.named) == (tmp_path / "photos", ("b.png",), True)
    assert not find_inputs(tmp_path / "photos").named
    assert not find_inputs(str(tmp_path / "photos" / "*.png")).named
    with pytest.raises(InputsError, match="is a link to 'nothing', which does not exist"):
        find_inputs(tmp_path / "photos" / "broken.png")


def test_an_output_that_links_lead_to(tmp_path: Path) -> None:
    touch(tmp_path, "photos/a.png", "photos/out/b.png", "photos/other/c.png")
    link(tmp_path / "to-photos", "photos")
    link(tmp_path / "to-out", "photos/out")
    link(tmp_path / "to-all", ".")
    photos = tmp_path / "photos"
    with pytest.raises(InputsError, match="the output folder is the folder of the input"):
        find_inputs(photos, output=tmp_path / "to-photos")
    with pytest.raises(InputsError, match="the output folder is the folder of the input"):
        find_inputs(tmp_path / "to-photos", output=photos)
    with pytest.raises(InputsError, match="lies inside the output folder"):
        find_inputs(photos, output=tmp_path / "to-all")
    # It is the same folder, so that results of a run before are no images of this one.
    assert find_inputs(photos, output=tmp_path / "to-out").images == ("a.png", "other/c.png")
    assert find_inputs(str(photos / "**" / "*"), output=tmp_path / "to-out").images == ("a.png", "other/c.png")
    assert find_inputs(tmp_path / "to-photos", output=photos / "new").images == ("a.png", "other/c.png", "out/b.png")


def test_one_folder_under_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "photos/a.png")
    # A disk that ignores case gives one folder by both names; on others that is played here.
    same = os.path.samefile
    monkeypatch.setattr(
        os.path, "samefile", lambda one, other: str(one).lower() == str(other).lower() or same(one, other)
    )
    with pytest.raises(InputsError, match="the output folder is the folder of the input"):
        find_inputs(tmp_path / "photos", output=tmp_path / "PHOTOS")
    with pytest.raises(InputsError, match="lies inside the output folder"):
        find_inputs(tmp_path / "photos", output=tmp_path.parent / tmp_path.name.upper())


def test_odd_names_and_what_is_no_file(tmp_path: Path) -> None:
    names = [
        "a\nb.png",
        "<img src=x onerror=alert(1)>.jpg",
        "\x1b[31m.png",
        "\u202egpj.png",
        "javascript:1.jpg",
        "a\\b.png",
    ]
    if os.name == "nt":
        pytest.skip("this system does not allow such names")
    touch(tmp_path, *names)
    os.mkfifo(tmp_path / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listening:
        # A path of a socket may be short only.
        folder = os.getcwd()
        os.chdir(tmp_path)
        try:
            listening.bind("socket.png")
        finally:
            os.chdir(folder)
    expected = {*names, "fifo.png", "socket.png"}
    if sys.platform == "linux":
        (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
        expected.add("caf\udce9.png")
    assert set(find_inputs(tmp_path).images) == expected
    assert set(find_inputs(str(tmp_path / "*")).images) == expected
    assert stat.S_ISFIFO((tmp_path / "fifo.png").stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_opened_to_see_whether_it_is_a_record(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.png")
    os.mkfifo(tmp_path / "sub" / "run.json")
    assert find_inputs(tmp_path).images == ("sub/a.png",)


def test_the_output_of_a_run_at_work_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "out/masks/a.png", "out/.sparsespec/plan.json", "other/.sparsespec/b", "other/c.png")
    assert find_inputs(tmp_path).images == ("a.png", "other/c.png")
    assert find_inputs(str(tmp_path / "**" / "*.png")).images == ("a.png", "other/c.png")
    assert find_inputs(tmp_path / "out").images == ("masks/a.png",)


def test_what_vanishes_meanwhile_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.png", "gone/b.png", "left/c.png", "left/d.png")
    scandir = os.scandir

    def slow(path: str | Path) -> Any:
        entries = scandir(path)
        if Path(path) == tmp_path:
            # Between listing a folder and looking into those in it.
            (tmp_path / "gone" / "b.png").unlink()
            (tmp_path / "gone").rmdir()
            (tmp_path / "left" / "c.png").unlink()
        return entries

    monkeypatch.setattr(os, "scandir", slow)
    found = find_inputs(tmp_path)
    assert found.images == ("a.png", "left/d.png")
    assert [path for path, _ in found.unlisted] in ([], ["gone/"])


@pytest.mark.skipif(sys.platform != "linux", reason="the depth of folders is limited otherwise")
def test_folders_deeper_than_a_path_may_be_are_reported(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(25):
            os.mkdir("d" * 200, dir_fd=here)
            below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        found = find_inputs(tmp_path)
    finally:
        os.close(here)
        shutil.rmtree(tmp_path / ("d" * 200))
    assert found.images == ("a.png",)
    assert [reason for _, reason in found.unlisted] == ["the folder cannot be listed: File name too long"]


def test_what_the_images_are_read_from(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    found = find_inputs(tmp_path)
    assert found.source == LocalStore(tmp_path)
    store = LocalStore(tmp_path / "elsewhere")
    assert Inputs("s3://bucket", ("a.png",), store=store).source is store


def test_patterns_through_several_folders(tmp_path: Path) -> None:
    touch(
        tmp_path, "a/x/1.png", "a/y/1.png", "b/x/1.png", "b/x/z/1.png", "b/x/z/2.jpg", "x/1.png", "1.png", "[x]/1.png"
    )

    def images(*pattern: str) -> tuple[str, ...]:
        try:
            return find_inputs(os.path.join(tmp_path, *pattern)).images
        except InputsError:
            return ()

    assert images("*", "x", "*.png") == ("a/x/1.png", "b/x/1.png")
    assert images("**", "x", "*.png") == ("a/x/1.png", "b/x/1.png", "x/1.png")
    assert images("**", "x", "**", "*.png") == ("a/x/1.png", "b/x/1.png", "b/x/z/1.png", "x/1.png")
    assert images("b", "**") == ("x/1.png", "x/z/1.png", "x/z/2.jpg")
    assert images("**", "**", "z", "?.*") == ("b/x/z/1.png", "b/x/z/2.jpg")
    assert images("[[]x]", "*") == ("[x]/1.png",)
    assert images("[!b]", "**", "1.png") == ("a/x/1.png", "a/y/1.png", "x/1.png")
    assert images("*", "..", "*.png") == ()
    assert images("*.tif") == ()


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
