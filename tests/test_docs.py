"""What the documentation says must run, and what it points to must be there."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from PIL import Image

import sparsespec
import sparsespec.cli
import sparsespec.models

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = sorted({*DOCS.rglob("*.md"), ROOT / "README.md", *(ROOT / "models").glob("*.md")})

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_OPTION = re.compile(r"--[a-z][a-z-]+")


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and code of every block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in _BLOCK.finditer(text)]


def is_script(code: str) -> bool:
    return "__main__" in code


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, by GitHub's rule."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in _HEADING.findall(text)}


def public_modules() -> list[str]:
    names = {"sparsespec"}
    for package in (sparsespec, sparsespec.cli, sparsespec.models):
        names.add(package.__name__)
        names.update(found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."))
    return sorted(name for name in names if not any(part.startswith("_") for part in name.split(".")))


@pytest.fixture
def photo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for photo in EXAMPLES.glob("*.jpg"):
        shutil.copy(photo, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_library_page_runs(photo_folder: Path) -> None:
    blocks = [(line, code) for line, code in python_blocks(DOCS / "library.md") if not is_script(code)]
    assert len(blocks) > 10
    namespace: dict[str, object] = {"__name__": "library_page"}
    for line, code in blocks:
        # Empty lines in front, so that a traceback shows the line of the page.
        exec(compile("\n" * line + code, str(DOCS / "library.md"), "exec"), namespace)
    assert (photo_folder / "coffee-labels.png").stat().st_size > 0
    assert (photo_folder / "instances.json").stat().st_size > 0


@pytest.mark.slow
def test_scripts_of_library_page_run(photo_folder: Path) -> None:
    scripts = [code for _, code in python_blocks(DOCS / "library.md") if is_script(code)]
    assert scripts
    for code in scripts:
        (photo_folder / "script.py").write_text(code, encoding="utf-8")
        env = {**os.environ, "NUMBA_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
        done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        assert "instances" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_anchors_follow_githubs_rule(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('# The `a_b`: 1, two\n```\n# no heading\n```\n## `method="paper"`\n', encoding="utf-8")
    assert anchors(page) == {"the-a_b-1-two", "methodpaper"}


def test_every_option_of_run_is_described() -> None:
    shown = CliRunner().invoke(sparsespec.cli.main, ["run", "--help"])
    options = set(_OPTION.findall(shown.output)) - {"--help"}
    assert {"--input", "--n-instances"} <= options
    assert options <= set(_OPTION.findall((DOCS / "command-line.md").read_text(encoding="utf-8")))


def test_method_page_names_what_is_there() -> None:
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    missing = []
    modules = "affinity|backbone|channels|foreground|instances|paper|refine|spectral"
    for module, path in re.findall(rf"`({modules})\.([A-Za-z_.]+)`", text):
        thing: object = importlib.import_module(f"sparsespec.{module}")
        for part in path.split("."):
            thing = getattr(thing, part, None)
        if thing is None:
            missing.append(f"{module}.{path}")
    assert "affinity.local_affinity" in text
    assert missing == []


@pytest.mark.parametrize("name", public_modules())
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module: ModuleType = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_example_photographs_are_few_small_and_licensed() -> None:
    photos = sorted(EXAMPLES.glob("*.jpg"))
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*$", table, re.MULTILINE)}
    assert sorted(rows) == [photo.name for photo in photos]
    assert all(re.search(r"CC0|public domain|no known copyright", row) for row in rows.values())
    assert sum(photo.stat().st_size for photo in photos) < 1_000_000
    for photo in photos:
        with Image.open(photo) as image:
            assert f"{image.width} x {image.height}" in rows[photo.name]


@pytest.mark.slow
def test_pictures_can_be_made_again(tmp_path: Path) -> None:
    script = DOCS / "images" / "make_results.py"
    done = subprocess.run([sys.executable, script, "--output", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kept = sorted(script.parent.glob("*.jpg"))
    assert sorted(made.name for made in tmp_path.glob("*.jpg")) == [picture.name for picture in kept]
    for picture in kept:
        assert picture.stat().st_size < 400_000
        with Image.open(picture) as old, Image.open(tmp_path / picture.name) as new:
            assert old.size == new.size
