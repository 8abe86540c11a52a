"""What the method made of one image, stage by stage: for figures, and for a page to explore.

Examples
--------
>>> import sparsespec
>>> from skimage.data import coffee
>>> from sparsespec.explanation import explain, html_page
>>> made = explain(sparsespec.Segmenter(long_side=224), coffee(), name="coffee")
>>> html_page(made)[:15]
'<!doctype html>'
"""

from __future__ import annotations

from sparsespec.explanation.page import html_page
from sparsespec.explanation.stages import Explanation
from sparsespec.explanation.trace import explain

__all__ = ["Explanation", "explain", "html_page"]
