"""The scripts and styles of the pages that show photographs with their masks.

They are texts to be put into a page, which then needs nothing from elsewhere: ``<style>`` with `style` and ``<script>``
with `script` make ``sparsespec.viewer(element, picture)`` available, which shows one photograph; `report_style` and
`report_script` beside them build the page of a whole run.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files

from sparsespec.formats.overlay import instance_colours

__all__ = ["report_script", "report_style", "script", "style"]

_COLOURS = 240
_PLACE_OF_COLOURS = '"COLOURS"'


def style() -> str:
    """Return the style sheet of the viewer."""
    return _text("viewer.css")


def script() -> str:
    """Return the script of the viewer, with the colours that the overlays have."""
    colours = ["#" + bytes(colour).hex() for colour in instance_colours(_COLOURS)]
    return _text("viewer.js").replace(_PLACE_OF_COLOURS, json.dumps(colours))


def report_style() -> str:
    """Return the style sheet of a run's page, to be put behind that of the viewer."""
    return _text("report.css")


def report_script() -> str:
    """Return the script of a run's page, to be put behind that of the viewer."""
    return _text("report.js")


@lru_cache(maxsize=8)
def _text(name: str) -> str:
    return files("sparsespec.formats.viewer").joinpath(name).read_text("utf-8")
