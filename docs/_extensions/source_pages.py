"""The project's own code in the site: a page for each Python file, and links that lead to the line of a definition.

A page in Markdown links a file as a Git host wants it, ``[`affinity.local_affinity`](../sparsespec/affinity.py)``.
Where the text of the link names something that is defined in the file, the site leads to its line, so no line number is
ever written down; a name that the file doesn't define is a warning.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
# Where the files lie that have a page.
FOLDERS = ("sparsespec", "cli", "models", "docs")
_SCHEME = "source:"
_NAME = re.compile(r"[A-Za-z_][\w.]*")

logger = logging.getLogger(__name__)


@functools.cache
def definitions(path: Path) -> dict[str, int]:
    """Lines of what a file defines, methods as ``Class.method``."""
    lines: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for statement in body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines.setdefault(prefix + statement.name, statement.lineno)
                if isinstance(statement, ast.ClassDef):
                    visit(statement.body, f"{prefix}{statement.name}.")
            elif isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        lines.setdefault(prefix + target.id, statement.lineno)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return lines


def find_line(path: Path, text: str) -> int | None:
    """Line of what the text of a link names in a file; 0 where it doesn't name anything, None where that is missing."""
    if text.endswith(".py") or not _NAME.fullmatch(text):
        return 0
    return definitions(path).get(text.removeprefix(f"{path.stem}."))


def is_source(path: Path) -> bool:
    """Tell whether a file has a page of its own."""
    return path.suffix == ".py" and path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS


class SourceLinks(SphinxTransform):
    """Takes links to Python files out of the hands of Sphinx, which would offer them as downloads."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Work through a page."""
        for node in list(self.document.findall(addnodes.download_reference)):
            path = Path(os.path.normpath(self.env.doc2path(self.env.docname).parent / node["reftarget"]))
            if not is_source(path):
                continue
            line = find_line(path, node.astext())
            if line is None:
                logger.warning("%s does not define %s", path.relative_to(ROOT), node.astext(), location=node)
            self.env.note_dependency(str(path))
            name = path.relative_to(ROOT).as_posix()
            link = nodes.reference("", "", *node.children, internal=True, refuri=_uri(name, line))
            link["reftitle"] = f"{name}, line {line}" if line else name
            node.replace_self(link)


def _uri(name: str, line: int | None) -> str:
    return f"{_SCHEME}{name}#L-{line}" if line else f"{_SCHEME}{name}"


def source_of(domain: str, info: dict[str, str]) -> str | None:
    """Where something documented is defined, for :mod:`sphinx.ext.linkcode`."""
    if domain != "py" or not info["module"]:
        return None
    thing: Any = importlib.import_module(info["module"])
    try:
        for part in info["fullname"].split("."):
            thing = getattr(thing, part)
        file = inspect.getsourcefile(inspect.unwrap(thing))
    except (AttributeError, TypeError):  # a constant, or an attribute of instances
        thing, file = None, importlib.import_module(info["module"]).__file__
    if file is None or not is_source(_in_checkout(Path(file))):
        return None
    path = _in_checkout(Path(file))
    line = definitions(path).get(getattr(thing, "__qualname__", info["fullname"]))
    return _uri(path.relative_to(ROOT).as_posix(), line)


def _in_checkout(path: Path) -> Path:
    """Find the source of a module, which may be installed elsewhere."""
    package = Path(str(importlib.import_module("sparsespec").__file__)).parent
    if not path.is_relative_to(package) or path.is_relative_to(ROOT):
        return path
    part = path.relative_to(package)
    return ROOT / part if part.parts[0] in ("cli", "models") else ROOT / "sparsespec" / part


def _resolve(app: Sphinx, document: nodes.document, page: str) -> None:
    if app.builder.format != "html":
        return
    for node in document.findall(nodes.reference):
        uri = node.get("refuri", "")
        if uri.startswith(_SCHEME):
            name, mark, line = uri.removeprefix(_SCHEME).partition("#")
            node["refuri"] = app.builder.get_relative_uri(page, _page(name)) + mark + line


def _page(name: str) -> str:
    return f"source/{name}"


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    if app.builder.format != "html":
        return
    # The same for all pages of a folder, and most of the work where each makes its own.
    menus: dict[str, Callable[..., str]] = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if "_build" in path.parts:
                continue
            listing = app.builder.highlighter.highlight_block(
                path.read_text(encoding="utf-8"), "python", linenos="inline", lineanchors="L", anchorlinenos=True
            )
            page = _page(name)
            menu = menus.setdefault(os.path.dirname(page), _menu(app.builder, page))
            body = f'<h1>{name}</h1><div class="source-page">{listing}</div>'
            yield page, {"title": name, "body": body, "toctree": menu}, "page.html"


def _menu(builder: StandaloneHTMLBuilder, page: str) -> Callable[..., str]:
    @functools.cache
    def menu(**options: Any) -> str:
        return builder._get_local_toctree(page, **options)

    return menu


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_transform(SourceLinks)
    app.connect("doctree-resolved", _resolve)
    app.connect("html-collect-pages", _pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
