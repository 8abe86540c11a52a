"""Pages of the site that live elsewhere in the repository, where Git hosts and people look for them.

The Markdown file in this folder only points there; the site shows the text itself, its links brought in order.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
# Page of the site: file.
TEXTS = {
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "model-card": ROOT / "models" / "dinov2_vits14_int8.md",
}
# File: page that says the same in the site.
INSTEAD = {**{file: page for page, file in TEXTS.items()}, ROOT / "README.md": "index", DOCS / "README.md": "index"}

_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_TARGET = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")


def rebased(text: str, folder: Path) -> str:
    """Text of a file in a folder, its relative links as they have to be in the folder of the site's pages."""

    def target(match: re.Match[str]) -> str:
        return match[1] + Path(os.path.relpath(folder / match[2], DOCS)).as_posix()

    parts = _FENCED.split(text)
    return "".join(part if k % 2 else _TARGET.sub(target, part) for k, part in enumerate(parts))


def _read(app: Sphinx, page: str, content: list[str]) -> None:
    if page in TEXTS:
        content[0] = rebased(TEXTS[page].read_text(encoding="utf-8"), TEXTS[page].parent)
        app.env.note_dependency(str(TEXTS[page]))


class OuterLinks(SphinxTransform):
    """Leads links to files outside of this folder to the pages that show them."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Work through a page."""
        for node in self.document.findall(addnodes.pending_xref):
            if node.get("reftype") != "myst" or node.get("refdomain") != "doc":
                continue
            path = Path(os.path.normpath(DOCS / f"{node['reftarget']}.md"))
            if path in INSTEAD:
                node["reftarget"] = INSTEAD[path]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("source-read", _read)
    app.add_transform(OuterLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
