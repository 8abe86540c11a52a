"""Parts of a page that are folded away, ``<details>`` as Git hosts know it.

A heading begins a section, and an element of HTML can't reach from one section into the next: within what is folded,
headings become bold lines.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_FOLDED = re.compile(r"^<details>$.*?^</details>$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def flattened(text: str) -> str:
    """Text of a page without headings in what is folded."""
    return _FOLDED.sub(lambda match: _HEADING.sub(r"**\1**", match[0]), text)


def _read(app: Sphinx, page: str, content: list[str]) -> None:
    content[0] = flattened(content[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", _read)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
