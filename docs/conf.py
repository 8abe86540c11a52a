"""The documentation site: python -m sphinx -W -b html docs docs/_build/html."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
# The installed package is described, and not the checkout around it: there, cli/ and models/ are not yet where they are
# imported from.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != DOCS.parent]
sys.path.insert(0, str(DOCS / "_extensions"))
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import exports  # noqa: E402
import source_pages  # noqa: E402

import sparsespec  # noqa: E402

project = "sparsespec"
copyright = "the authors of sparsespec, Apache-2.0"  # noqa: A001
version = release = sparsespec.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.linkcode",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "commands",
    "docstrings",
    "folded",
    "mathml",
    "outer_pages",
    "signatures",
    "source_pages",
]
exclude_patterns = ["_build", "README.md"]
templates_path = ["_templates"]
default_role = "code"
nitpicky = True
# Two hyphens are two hyphens: options begin with them.
smartquotes = False
maximum_signature_line_length = 88
# Of numpy, in functions that a package describes in place of their modules. All other names are looked up.
nitpick_ignore = [("py:class", name) for name in ("npt.ArrayLike", "npt.NDArray", "np.uint8")]

myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "attrs_inline"]

# Blocks that name no language are shells or what programs print.
highlight_language = "text"
html_theme = "furo"
html_title = "sparsespec"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
# The search fetches pages for their summaries, which browsers forbid it for pages from disk.
html_show_search_summary = False
html_theme_options = {
    "footer_icons": [],
    "light_css_variables": {"color-brand-primary": "#5b3fa0", "color-brand-content": "#5b3fa0"},
    "dark_css_variables": {"color-brand-primary": "#c3aaff", "color-brand-content": "#c3aaff"},
}

autosummary_generate = True
autosummary_context = {"exports": exports.of_packages()}
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_typehints = "signature"
napoleon_google_docstring = False
# Shapes and units, which are no names of types.
napoleon_use_rtype = False
napoleon_use_param = False

linkcode_resolve = source_pages.source_of
