from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import Result
from PIL import Image
from skimage import data

Invoke = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a photograph in another."""
    (tmp_path / "photos").mkdir()
    Image.fromarray(data.astronaut()[::2, ::2]).save(tmp_path / "photos" / "a.cat.png")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


IMAGE = "../photos/a.cat.png"
SMALL = ("--long-side", 112)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written


@pytest.mark.needs("matplotlib")
def test_a_figure_in_the_current_folder(invoke: Invoke, folder: Path) -> None:
    done = invoke("explain", IMAGE, *SMALL)
    assert done.exit_code == 0, done.output
    assert "figure in a.cat-explained.png" in done.stdout
    assert files(folder) == ["a.cat-explained.png"]
    with Image.open(folder / "a.cat-explained.png") as figure:
        assert figure.width == 1540


def test_a_page_and_no_figure(invoke: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    # An option that may go without a value doesn't swallow the image.
    done = invoke("explain", *SMALL, "--token", "1,2", "--html", IMAGE)
    assert done.exit_code == 0, done.output
    assert files(folder) == ["a.cat-explained.html"]
    page = (folder / "a.cat-explained.html").read_text(encoding="utf-8")
    assert '"chosen":[1,2]' in page
    assert "<h1>a.cat.png</h1>" in page


@pytest.mark.needs("matplotlib")
def test_both_by_name_and_the_published_method(invoke: Invoke, folder: Path) -> None:
    options = ("--method", "paper", "--n-instances", 2, "--output", "x.SVG", "--html", "y.html")
    done = invoke("explain", IMAGE, *SMALL, *options)
    assert done.exit_code == 0, done.output
    assert "figure in x.SVG, page in y.html" in done.stdout
    assert files(folder) == ["x.SVG", "y.html"]
    assert (folder / "x.SVG").read_bytes().startswith(b"<?xml")


def test_nothing_is_replaced_unasked(invoke: Invoke, folder: Path) -> None:
    assert invoke("explain", IMAGE, *SMALL, "--html", "y.html").exit_code == 0
    first = (folder / "y.html").read_bytes()
    again = invoke("explain", IMAGE, *SMALL, "--html", "y.html")
    assert again.exit_code == 2
    assert "'y.html' exists: replace it with --overwrite, or choose another file with --html" in again.stderr
    assert invoke("explain", IMAGE, *SMALL, "--html", "y.html", "--overwrite").exit_code == 0
    assert (folder / "y.html").read_bytes() == first


def test_a_page_of_a_tiff(invoke: Invoke, folder: Path) -> None:
    with tifffile.TiffWriter("pages.tif") as tiff:
        for level in (0, 90):
            tiff.write(np.full((40, 60, 3), level, np.uint8), photometric="rgb")
    done = invoke("explain", "pages.tif", *SMALL, "--page", 2, "--html", "two.html")
    assert done.exit_code == 0, done.output
    assert "<h1>pages.tif, page 2</h1>" in (folder / "two.html").read_text(encoding="utf-8")
    done = invoke("explain", "pages.tif", *SMALL, "--page", 3, "--html", "three.html")
    assert done.exit_code == 2
    assert "--page 3: the image has 2 pages" in done.stderr


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the image is missing: sparsespec explain IMAGE"),
        (("--html",), "the image is missing"),
        (("nosuch.jpg",), "the image 'nosuch.jpg' does not exist"),
        (("../photos",), "'../photos' is a folder: give one image"),
        ((IMAGE, "--output", "x.gif"), "--output 'x.gif' must end in .png or .svg."),
        ((IMAGE, "--output", "x.html"), "must end in .png or .svg; a page is written with --html"),
        ((IMAGE, "--html", "x.png"), "--html 'x.png' must end in .html or .htm"),
        ((IMAGE, "--output", IMAGE, "--overwrite"), "is the image itself: choose another file"),
        ((IMAGE, "--output", "nosuch/x.png"), "the folder of --output 'nosuch/x.png' does not exist"),
        ((IMAGE, "--token", "3"), "'3' is not of the form ROW,COLUMN"),
        ((IMAGE, "--token", "-1,2"), "'-1,2' is not of the form ROW,COLUMN"),
        ((IMAGE, "--html", "x.html", "--token", "99,0", *SMALL), "--token: the token must be in row 0 to 7"),
        ((IMAGE, "--method", "paper"), "--method paper needs the number of objects"),
        ((IMAGE, "--method", "paper", "--n-instances", 1, "--directions", "x.npz"), "uses no directions"),
        ((IMAGE, "--html", "x.html", "--directions", "nosuch.npz"), "nosuch.npz"),
        ((IMAGE, "--html", "x.html", "--model", "nosuch"), "nosuch"),
    ],
)
def test_wrong_usage(arguments: tuple[Any, ...], message: str, invoke: Invoke, folder: Path) -> None:
    done = invoke("explain", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert files(folder) == []


def test_a_folder_that_is_in_the_way(invoke: Invoke, folder: Path) -> None:
    (folder / "x.html").mkdir()
    done = invoke("explain", IMAGE, "--html", "x.html")
    assert done.exit_code == 2
    assert "--html 'x.html' is a folder: name a file" in done.stderr


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions don't bind this user")
def test_a_folder_without_permission(invoke: Invoke, folder: Path) -> None:
    (folder / "locked").mkdir(mode=0o500)
    done = invoke("explain", IMAGE, "--html", "locked/x.html")
    assert done.exit_code == 2
    assert "cannot be written to" in done.stderr


def test_writing_that_fails(invoke: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsespec._atomic.write_atomic", full)
    done = invoke("explain", IMAGE, *SMALL, "--html", "x.html")
    assert done.exit_code == 1
    assert "cannot write x.html: No space left on device" in done.stderr
    assert files(folder) == []


def test_matplotlib_is_missing(invoke: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = invoke("explain", IMAGE)
    assert done.exit_code == 2
    assert "pip install 'sparsespec[figures]'. --html makes a page without it" in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["cut.jpg", "empty.jpg", "text.jpg"])
def test_what_is_no_image(name: str, invoke: Invoke, folder: Path, zoo: Path) -> None:
    done = invoke("explain", zoo / "bad" / name, "--html", "x.html")
    assert done.exit_code == 1
    assert f"sparsespec: cannot explain {zoo / 'bad' / name}: " in done.stderr
    assert files(folder) == []


def test_more_instances_than_there_is_room_for(invoke: Invoke, folder: Path) -> None:
    done = invoke("explain", IMAGE, *SMALL, "--html", "x.html", "--n-instances", 1000)
    assert done.exit_code == 1
    assert "n_instances is 1000" in done.stderr


# What the documentation says


def page_of_docs() -> str:
    return (Path(__file__).resolve().parents[2] / "docs" / "explain.md").read_text(encoding="utf-8")


def test_every_option_is_described(invoke: Invoke) -> None:
    options = set(re.findall(r"--[a-z][a-z-]+", invoke("explain", "--help").output)) - {"--help"}
    assert {"--html", "--token"} <= options
    assert options <= set(re.findall(r"--[a-z][a-z-]+", page_of_docs()))


@pytest.mark.slow
@pytest.mark.needs("matplotlib")
def test_the_examples_run(folder: Path) -> None:
    Image.fromarray(data.coffee()).save("coffee.jpg")
    namespace: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page_of_docs(), re.MULTILINE | re.DOTALL):
        exec(code, namespace)
    assert files(folder) == ["coffee-explained.html", "coffee-explained.png", "coffee.jpg"]
    assert len(namespace["made"].scores) > 0
