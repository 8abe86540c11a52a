"""What the documentation says must run, and what it points to must be there."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import itertools
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner
from PIL import Image

import sparsespec
import sparsespec.cli
import sparsespec.models
from sparsespec.evaluation.benchmark.report_page import find_browser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = sorted(
    page
    for page in {*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "models").glob("*.md")}
    if "_build" not in page.parts
)
# Folder of the site's own extensions, which say what a link to a file means.
EXTENSIONS = DOCS / "_extensions"

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
_OPTION = re.compile(r"--[a-z][a-z-]+")
# Blocks of commands and of what they print, whether fenced or indented; and code within a sentence.
_FENCE = re.compile(r"^```([a-z]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHELLS = ("", "sh", "shell", "bash", "console", "text", "ini", "yaml", "dockerfile")
_INDENTED = re.compile(r"(?<=\n\n)((?: {4,}\S.*\n)+)")
_INLINE = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(r"(?:^|(?<=[\s&|;$(]))sparsespec +([a-z-].*)$", re.MULTILINE)
_SOURCE_LINK = re.compile(r"\[`([^`]+)`\]\(([^)\s]+\.py)\)")


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


def commands(command: click.Command = sparsespec.cli.main, name: str = "") -> dict[str, click.Command]:
    """Every command that does something, by the words that call it."""
    if not isinstance(command, click.Group):
        return {name: command}
    found: dict[str, click.Command] = {}
    for word, inner in command.commands.items():
        found |= commands(inner, f"{name} {word}".strip())
    return found


@pytest.mark.parametrize("name", commands())
def test_every_option_of_a_command_is_in_its_section(name: str) -> None:
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", text.partition(f"## `sparsespec {name.split()[0]}`\n")[2], flags=re.MULTILINE)[0]
    options = {option for parameter in commands()[name].params for option in parameter.opts if option.startswith("--")}
    assert options <= set(_OPTION.findall(section))


def commands_of(page: Path) -> list[str]:
    """What follows "sparsespec" in each command line on a page."""
    text = page.read_text(encoding="utf-8")
    blocks = [match[2] for match in _FENCE.finditer(text) if match[1] in _SHELLS]
    text = _FENCED.sub("", text)
    blocks += [match[1] for match in _INDENTED.finditer(text)]
    blocks += [match[1] for match in _INLINE.finditer(text)]
    return [match[1] for block in blocks for match in _COMMAND.finditer(block.replace("\\\n", " "))]


def mistakes_in(line: str) -> list[str]:
    """What a command line names that the command doesn't have; placeholders and comments may stand in it."""
    words = re.sub(r" #.*| [|>&;].*", "", line).replace("[", " ").replace("]", " ").replace("=", " ").split()
    command: click.Command = sparsespec.cli.main
    while isinstance(command, click.Group) and words and re.fullmatch(r"[a-z]+", words[0]):
        found = command.commands.get(words.pop(0))
        if found is None:
            return [f"no such command: {line}"]
        command = found
    options = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    options |= {"--help": click.Option(["--help"], is_flag=True), "-h": click.Option(["-h"], is_flag=True)}
    wrong = []
    for word, after in itertools.pairwise([*words, ""]):
        if not re.fullmatch(r"--?[a-z][a-z-]*", word):
            continue
        option = options.get(word)
        if option is None:
            wrong.append(f"{command.name} has no {word}: {line}")
        elif isinstance(option.type, click.Choice) and re.fullmatch(r"[a-z0-9|-]+", after):
            wrong += [
                f"{word} can't be {value}: {line}" for value in after.split("|") if value not in option.type.choices
            ]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_on_the_pages_exist(page: Path) -> None:
    assert [mistake for line in commands_of(page) for mistake in mistakes_in(line)] == []


def test_commands_are_found_and_mistakes_in_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\npip install . && sparsespec run --inputs x\n```\nSay `sparsespec fly`.\n\n"
        "    sparsespec run \\\n      --method magic\n\n"
        "```\nNUMBA=1 sparsespec models pull NAME [--offline] # --never\n```\nsparsespec walks\n",
        encoding="utf-8",
    )
    lines = commands_of(page)
    assert sorted(line.split()[0] for line in lines) == ["fly", "models", "run", "run"]
    found = [mistake.partition(":")[0] for line in lines for mistake in mistakes_in(line)]
    assert sorted(found) == ["--method can't be magic", "no such command", "run has no --inputs"]


def imported(name: str) -> ModuleType:
    """Import a module, or skip the test if the module needs an extra that is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if "pip install 'sparsespec[" in str(error) or error.name in ("python_multipart", "starlette", "uvicorn"):
            pytest.skip(f"{name}: {error}")
        raise


def offers(module: str, name: str) -> bool:
    """Tell whether ``from module import name`` works: for what a module defines, and for modules of a package."""
    with contextlib.suppress(ModuleNotFoundError):
        imported(f"{module}.{name}")
    return hasattr(imported(module), name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_on_the_pages_imports_what_is_there(page: Path) -> None:
    missing = []
    for _, code in python_blocks(page):
        for statement in ast.walk(ast.parse(code)):
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("sparsespec"):
                missing += [name.name for name in statement.names if not offers(str(statement.module), name.name)]
            elif isinstance(statement, ast.Attribute) and ast.unparse(statement.value) == "sparsespec":
                missing += [statement.attr] if not offers("sparsespec", statement.attr) else []
    assert missing == []


def test_missing_imports_are_found() -> None:
    assert offers("sparsespec", "segment")
    assert offers("sparsespec.explanation", "texts")  # a module of the package
    assert not offers("sparsespec.explanation", "pictures")
    assert not offers("sparsespec", "segments")


@pytest.mark.parametrize(
    "page", ["README.md", "docs/index.md", "docs/models.md", "docs/providers.md", "docs/method.md"]
)
def test_code_on_the_pages_runs(page: str, photo_folder: Path) -> None:
    row = {"status": "done", "seconds": dict.fromkeys(("features", "channels", "affinity", "foreground"), 0.1)}
    row["seconds"] |= {"instances": 0.2, "refine": 0.1}
    (photo_folder / "OUT").mkdir()
    (photo_folder / "OUT" / "run.json").write_text(json.dumps({"images": [row]}), encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "page"}
    blocks = python_blocks(ROOT / page)
    assert blocks
    for line, code in blocks:
        exec(compile("\n" * line + code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_on_the_pages(page: Path, photo_folder: Path) -> None:
    assert doctest.testfile(str(page), module_relative=False).failed == 0


def defined_in(path: Path) -> set[str]:
    """What a file defines, with the methods of its classes as ``Class.method``."""
    names = set()
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        if isinstance(statement, ast.ClassDef):
            names |= {f"{statement.name}.{part.name}" for part in statement.body if isinstance(part, ast.FunctionDef)}
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_to_code_name_what_is_defined_there(page: Path) -> None:
    missing = []
    for name, link in _SOURCE_LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / link
        if not name.endswith(".py") and name.removeprefix(f"{file.stem}.") not in defined_in(file):
            missing.append(f"{name} in {link}")
    assert missing == []


def test_each_stage_has_a_picture_an_equation_and_its_line_of_code() -> None:
    text = (DOCS / "method.md").read_text(encoding="utf-8")
    stages = re.split(r"^## (?=\d+\. )", text.partition("## What was chosen")[0], flags=re.MULTILINE)[1:]
    assert len(stages) == 11
    for stage in stages:
        title = stage.partition("\n")[0]
        assert re.search(r"!\[[^\]]+\]\(images/[\w-]+\.jpg\)", stage), title
        assert _SOURCE_LINK.search(stage), title
    # The input, the network and the closer look are told in words.
    without = [stage.partition(".")[0] for stage in stages if "```math" not in stage]
    assert without == ["1", "2", "10"]


def test_site_shows_every_page() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:.* <)?([\w/-]+)>?$", "".join(re.findall(r"```\{toctree\}\n(.*?)```", index, re.S)), re.M)
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES if page.is_relative_to(DOCS)}
    generated = {page for page in pages if page.startswith("api/")}
    shown = pages - generated - {"index", "README"}
    assert sorted(listed) == sorted(shown)


def test_folder_of_the_pages_lists_them() -> None:
    listed = {link.partition("#")[0] for link in _LINK.findall((DOCS / "README.md").read_text(encoding="utf-8"))}
    stubs = {"model-card.md", "changelog.md", "contributing.md"}  # what they show is listed
    assert {page.name for page in DOCS.glob("*.md")} - stubs - {"README.md"} <= listed


def test_site_describes_every_module() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^ +(sparsespec[\w.]*)$", text, re.MULTILINE)
    # Packages list their modules themselves.
    packages = {
        name
        for block in text.split("```")
        if ":recursive:" in block
        for name in re.findall(r"^ +(sparsespec\S*)$", block, re.M)
    }
    modules = {name for name in public_modules() if not name.startswith("sparsespec.cli")}
    assert sorted(listed) == sorted(name for name in modules if not name.startswith(tuple(f"{p}." for p in packages)))


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(EXTENSIONS))
    return importlib.import_module


@pytest.mark.needs("sphinx")
def test_site_leads_to_the_line(extension: Callable[[str], ModuleType]) -> None:
    pages = extension("source_pages")
    file = ROOT / "sparsespec" / "affinity.py"
    lines = file.read_text(encoding="utf-8").splitlines()
    for text in ("affinity.local_affinity", "local_affinity"):
        assert lines[pages.find_line(file, text) - 1].startswith("def local_affinity(")
    pipeline = ROOT / "sparsespec" / "pipeline.py"
    line = pages.find_line(pipeline, "Segmenter._look_closer")
    assert pipeline.read_text(encoding="utf-8").splitlines()[line - 1].startswith("    def _look_closer(")
    assert pages.find_line(file, "sparsespec/affinity.py") == 0
    assert pages.find_line(file, "the code") == 0
    assert pages.find_line(file, "affinity.nothing") is None
    uri = pages.source_of("py", {"module": "sparsespec.affinity", "fullname": "local_affinity"})
    assert uri == f"source:sparsespec/affinity.py#L-{pages.find_line(file, 'local_affinity')}"


@pytest.mark.needs("sphinx")
def test_site_moves_links_of_outer_pages(extension: Callable[[str], ModuleType]) -> None:
    rebased = extension("outer_pages").rebased
    text = (
        "[a](docs/method.md#x), [b](#y), [c](https://z), ![d](docs/images/e.jpg), [f](LICENSE)\n```\n[g](docs/h)\n```\n"
    )
    assert rebased(text, ROOT) == (
        "[a](method.md#x), [b](#y), [c](https://z), ![d](images/e.jpg), [f](../LICENSE)\n```\n[g](docs/h)\n```\n"
    )


@pytest.mark.needs("sphinx")
def test_site_takes_help_texts_for_what_they_are(extension: Callable[[str], ModuleType]) -> None:
    as_rst = extension("commands").as_rst
    assert as_rst(["Reads *.jpg.", "", ".. option:: --input <*>"]) == [r"Reads \*.jpg.", "", ".. option:: --input <*>"]
    kept = as_rst(["| Examples", "|   sparsespec run *", "", "More."])
    assert kept == ["", "::", "", "    Examples", "      sparsespec run *", "", "", "More."]


@pytest.mark.needs("sphinx")
def test_site_folds_without_headings(extension: Callable[[str], ModuleType]) -> None:
    text = "# A\n<details>\n\n### B\n\ntext\n</details>\n## C\n"
    assert extension("folded").flattened(text) == "# A\n<details>\n\n**B**\n\ntext\n</details>\n## C\n"


@pytest.mark.needs("latex2mathml")
def test_equations_become_mathml() -> None:
    from latex2mathml.converter import convert

    equations = re.findall(r"```math\n(.*?)```", (DOCS / "method.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(equations) > 10
    for equation in equations:
        # A command it doesn't know comes out as text.
        assert not re.findall(r"\\[A-Za-z|]+", convert(" ".join(equation.split()))), equation


@pytest.mark.parametrize("name", public_modules())
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(imported(name)).failed == 0


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
    pictures = ["*.jpg"]
    scripts = ["make_results.py", "make_stages.py"]
    if importlib.util.find_spec("playwright") is not None and find_browser() is not None:
        pictures.append("*.webp")
        scripts.append("make_screens.py")
    for script in scripts:
        command = [sys.executable, DOCS / "images" / script, "--output", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    kept = sorted(picture for pattern in pictures for picture in (DOCS / "images").glob(pattern))
    assert sum(picture.stat().st_size for picture in kept) < 2_000_000
    assert sorted(made.name for made in tmp_path.iterdir()) == sorted(picture.name for picture in kept)
    for picture in kept:
        assert picture.stat().st_size < 400_000
        with Image.open(picture) as old, Image.open(tmp_path / picture.name) as new:
            assert old.size == new.size
