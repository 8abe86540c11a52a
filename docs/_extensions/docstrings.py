"""What docstrings need beside napoleon: attributes with their types, and names found where the code finds them."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections import namedtuple
from typing import Any

from docutils import nodes
from signatures import written
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

_HEADING = re.compile(r"^-{3,}$")
_NAMES = re.compile(r"^[A-Za-z_][\w.]*(, *[A-Za-z_][\w.]*)*$")
_NOTHING = object()
_FIELD = type(namedtuple("_Any", "field").field)
_kept: dict[str, list[str]] = {}


def attributes(lines: list[str], thing: Any) -> list[str]:
    """Turn the section "Attributes" of a class into directives, one for each entry, several names together too."""
    start = next(
        (k for k, line in enumerate(lines[:-1]) if line == "Attributes" and _HEADING.match(lines[k + 1])), None
    )
    if start is None:
        return lines
    end = next((k for k in range(start + 2, len(lines) - 1) if _HEADING.match(lines[k + 1])), len(lines))
    hints = {name: hint for base in reversed(thing.__mro__) for name, hint in _hints(base).items()}
    made = [""]
    for line in lines[start + 2 : end]:
        if line and not line.startswith(" "):
            names = [name.strip() for name in line.partition(" : ")[0].split(",")]
            if isinstance(vars(thing).get(names[0]), property):  # has a docstring of its own
                continue
            made += ["", f".. attribute:: {names[0]}", *(f"               {name}" for name in names[1:])]
            kinds = {hints.get(name) for name in names}
            if len(kinds) == 1 and None not in kinds:
                made.append(f"    :type: {kinds.pop()}")
            made.append("")
        else:
            made.append(line)
    return [*lines[:start], *made, "", *lines[end:]]


def errors(lines: list[str], module: str) -> list[str]:
    """Give the errors of the section "Raises" their full names: modules have errors of the same name."""
    made, inside = [], False
    for number, line in enumerate(lines):
        if number + 1 < len(lines) and _HEADING.match(lines[number + 1]):
            inside = line == "Raises"
        elif inside and _NAMES.match(line):
            made.append(", ".join(_full(name.strip(), module) for name in line.split(",")))
            continue
        made.append(line)
    return made


def _full(name: str, module: str) -> str:
    thing = find(name, module)
    home = getattr(thing, "__module__", "")
    return f"~{home}.{thing.__qualname__}" if isinstance(thing, type) and home.startswith("sparsespec.") else name


def _hints(kind: type) -> dict[str, str]:
    scope = vars(inspect.getmodule(kind) or object)
    return {name: written(hint, dict(scope)) for name, hint in vars(kind).get("__annotations__", {}).items()}


def _before(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    module = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", None)
    if module:
        lines[:] = errors(lines, module)
    if what in ("class", "exception") and isinstance(thing, type):
        lines[:] = attributes(lines, thing)
    # Napoleon takes what stands before a colon for a type there.
    _kept[name] = list(lines) if what in ("attribute", "data", "property") else []


def _after(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    kept = _kept.pop(name, [])
    if kept:
        lines[:] = kept


def _skip(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    # What a named tuple has for each field; the section "Attributes" says more.
    return True if isinstance(thing, _FIELD) else None


@functools.cache
def _imported(module: str) -> dict[str, tuple[str, str | None]]:
    """Module and name of what a module imports, also what it does for type checkers only."""
    names: dict[str, tuple[str, str | None]] = {}
    for statement in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            names.update({name.asname or name.name: (statement.module, name.name) for name in statement.names})
        elif isinstance(statement, ast.Import):
            names.update({name.asname: (name.name, None) for name in statement.names if name.asname})
    return names


def find(target: str, module: str | None) -> Any:
    """What a name means in a module, or by itself."""
    if module:
        thing: Any = importlib.import_module(module)
        for part in target.split("."):
            thing = getattr(thing, part, _NOTHING)
        if thing is not _NOTHING:
            return thing
        first, *rest = target.split(".")
        home, name = _imported(module).get(first, (None, None))
        if home is not None:
            return find(".".join(part for part in (home, name, *rest) if part), None)
    parts = target.split(".")
    for split in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:split]))
        except (ImportError, ValueError):
            continue
        for part in parts[split:]:
            thing = getattr(thing, part, _NOTHING)
        return thing
    return _NOTHING


def _missing(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Node | None:
    """Find what is imported into the module that speaks of it; leave as text what belongs to other libraries."""
    if node.get("refdomain") != "py":
        return None
    thing = find(node["reftarget"], node.get("py:module"))
    if thing is _NOTHING:
        return None
    home, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if isinstance(home, str) and home.startswith("sparsespec") and name:
        known = env.domains.python_domain.objects.get(f"{home}.{name}")
        if known is not None:
            return make_refnode(app.builder, node["refdoc"], known.docname, known.node_id, text, f"{home}.{name}")
        # Private: said in a signature, described nowhere.
        return text if name.startswith("_") or any(part.startswith("_") for part in home.split(".")) else None
    return text


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", _before, priority=400)
    app.connect("autodoc-process-docstring", _after, priority=600)
    app.connect("autodoc-skip-member", _skip)
    app.connect("missing-reference", _missing)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
