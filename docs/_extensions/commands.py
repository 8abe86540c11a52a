"""Help texts of the command line, which are plain text, as sphinx-click needs them."""

from __future__ import annotations

from typing import Any

import click
from sphinx.application import Sphinx

_MARKUP = str.maketrans({"*": r"\*", "`": r"\`"})


def as_rst(lines: list[str]) -> list[str]:
    """Escape what would be markup, and keep as they are the lines that click keeps (after a line with a backspace)."""
    made: list[str] = []
    literal = False
    for line in lines:
        text = line.lstrip()
        indent = line[: len(line) - len(text)]
        if text.startswith("| "):
            if not literal:
                made += ["", f"{indent}::", ""]
            made.append(f"{indent}    {text[2:]}")
            literal = True
            continue
        if literal:
            made.append("")
            literal = False
        made.append(line if text.startswith((".. ", ":default:")) else line.translate(_MARKUP))
    return made


def _process(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    lines[:] = as_rst(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    for part in ("description", "options", "epilog"):
        app.connect(f"sphinx-click-process-{part}", _process)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
