"""Label maps in colour, for pages, notebooks and overlays: the palette, small pictures, PNG for a data URI."""

from __future__ import annotations

import base64
import colorsys
import io
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BACKGROUND", "coloured_labels", "instance_colours", "png_bytes", "png_uri", "reduced_labels"]

BACKGROUND = (38, 40, 46)
"""Colour of what is no instance."""

_OUTLINE = (16, 16, 20)
# Neighbours in this list are far apart; each is bright enough for dark photographs and dark writing.
_FIRST_COLOURS = (
    (64, 196, 255),
    (255, 84, 84),
    (255, 214, 10),
    (88, 224, 100),
    (208, 124, 255),
    (255, 152, 32),
    (40, 226, 205),
    (255, 120, 196),
    (176, 228, 36),
    (130, 150, 255),
)


def instance_colours(count: int) -> npt.NDArray[np.uint8]:
    """Colours for labels 1..count; label k has the same colour in every picture.

    Returns
    -------
    (count, 3) ndarray of uint8
        RGB, all different for the first few hundred.
    """
    colours = [*_FIRST_COLOURS[:count]]
    for k in range(len(colours), count):
        hue = (0.11 + k * 0.61803398875) % 1  # the golden ratio keeps successive hues apart
        saturation, value = (0.85, 0.6, 0.72)[k % 3], (1.0, 0.96, 0.82)[(k // 3) % 3]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        colours.append((round(red * 255), round(green * 255), round(blue * 255)))
    return np.array(colours, np.uint8).reshape(count, 3)


def reduced_labels(labels: npt.NDArray[np.integer[Any]], max_side: int) -> npt.NDArray[np.intp]:
    """Take the nearest pixels, so that the longest side is at most `max_side`: of a mapped file, little is read."""
    shrink = min(1.0, max_side / max(labels.shape))
    rows, columns = (
        ((np.arange(max(1, round(side * shrink))) + 0.5) * (side / max(1, round(side * shrink)))).astype(np.intp)
        for side in labels.shape
    )
    return np.asarray(labels[rows][:, columns], np.intp)


def coloured_labels(labels: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint8]:
    """Draw labels in their colours, with a dark line where one meets another.

    Parameters
    ----------
    labels
        (h, w), 0 is background.

    Returns
    -------
    (h, w, 3) ndarray of uint8
    """
    colours = np.concatenate([np.array([BACKGROUND], np.uint8), instance_colours(int(labels.max(initial=0)))])
    picture = colours[labels]
    meets = np.zeros(labels.shape, bool)
    meets[:-1] |= labels[1:] != labels[:-1]
    meets[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    picture[meets] = _OUTLINE
    return picture


def png_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode (h, w), (h, w, 3) or (h, w, 4) pixels."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    return content.getvalue()


def png_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode pixels as a ``data:`` URI."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode("ascii")
