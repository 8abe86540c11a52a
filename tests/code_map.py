"""The map in docs/architecture.md: layers, which the tests hold the imports to, and a line on each module.

``python .ci/dev.py map`` writes the lines anew, from the first line of each module's docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
# cli/ and models/ stand in folders of their own, see setup.cfg.
FOLDERS = {"sparsespec": "sparsespec", "sparsespec.models": "models", "sparsespec.cli": "cli"}
BEGIN, END = "<!-- begin modules -->", "<!-- end modules -->"


def modules() -> dict[str, Path]:
    """Dotted name and file of every module in the checkout."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return dict(sorted(found.items()))


def layers() -> list[tuple[str, ...]]:
    """Parts of the package as the picture on the page has them, from the lowest line to the highest."""
    blocks = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (picture,) = (block for block in blocks if "|" in block)
    lines = [line.partition("|")[2].split() for line in picture.splitlines() if "|" in line]
    return [tuple(names) for names in reversed(lines) if names]


def summary(path: Path) -> str:
    """First line of a module's docstring, in Markdown."""
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def _sections(named: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Packages in the order of the picture, from above, each with its modules."""
    place = {part: number for number, parts in enumerate(layers()) for part in parts}
    packages = {name for name, path in named.items() if path.stem == "__init__"}
    by_package: dict[str, list[str]] = {}
    for name in named:
        by_package.setdefault(name if name in packages else name.rpartition(".")[0], []).append(name)

    def key(package: str) -> tuple[int, str]:
        part = package.removeprefix("sparsespec").removeprefix(".").split(".")[0]
        return -place.get(part, len(place)), package

    for package in sorted(by_package, key=key):
        yield package, sorted(by_package[package])


def written() -> str:
    """The part of the page between the two marks, as it has to be."""
    named = modules()
    lines = []
    for package, names in _sections(named):
        folder = named[package].parent.relative_to(ROOT).as_posix()
        lines += ["", f"### `{package}`, in `{folder}/`", "", "| file | what it holds |", "| --- | --- |"]
        lines += [f"| `{named[name].name}` | {summary(named[name])} |" for name in names]
    return "\n".join([*lines, "", ""]).lstrip("\n")


def update() -> bool:
    """Write the lines on the modules; False if the page had them already."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{written()}{END}{after}"
    if new == page:
        return False
    PAGE.write_text(new, encoding="utf-8", newline="\n")
    return True
