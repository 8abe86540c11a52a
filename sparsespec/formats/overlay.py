"""The photograph with what was found drawn over it, to be looked at."""

from __future__ import annotations

import io
import math
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsespec._atomic import write_atomic
from sparsespec._display import instance_colours
from sparsespec._mapped import bands, release
from sparsespec.formats.labels import label_range

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    from sparsespec.images import PixelSource

__all__ = [
    "DEFAULT_MAX_SIDE",
    "draw_instances",
    "instance_colours",
    "jpeg_bytes",
    "reduced_copy",
    "reduced_labels",
    "render_overlay",
    "write_overlay_jpeg",
]

DEFAULT_MAX_SIDE = 2048
"""Longest side of an overlay in pixels: it is for looking, the label image has the full resolution."""

_TINT = round(0.32 * 255)
_CASING = (16, 16, 20)
_CASING_STRENGTH = 0.85
_PIXELS_AT_ONCE = 1 << 23
_REDUCING_GAP = 3.0
_SMALLEST_WITH_TEXT = 80


def render_overlay(
    image: npt.NDArray[Any] | PixelSource,
    labels: npt.NDArray[Any],
    scores: npt.ArrayLike,
    *,
    max_side: int = DEFAULT_MAX_SIDE,
) -> npt.NDArray[np.uint8]:
    """Draw the instances over their photograph: a tint, an outline with a dark rim, the label and its score.

    Parameters
    ----------
    image : (H, W, 3) ndarray of uint8 or uint16, or PixelSource
        The photograph.
    labels : (H, W) ndarray of int
        0 = background, 1..n = instances.
    scores : (n,) array_like of float
        ``scores[k - 1]`` belongs to label ``k``.
    max_side : int
        A larger picture is reduced to this longest side, in pixels. Smaller ones keep their size.

    Returns
    -------
    (h, w, 3) ndarray of uint8

    Raises
    ------
    ValueError
        Shapes that do not fit together, an image of another type, or a label without a score.
    """
    confidence = np.asarray(scores, dtype=np.float64).ravel()
    photo, small = reduced_copy(image, labels, max_side)
    if labels.size:
        smallest, largest = label_range(labels)
        if smallest < 0 or largest > confidence.size:
            raise ValueError(
                f"labels must lie in 0..{confidence.size}, the number of scores; got {smallest}..{largest}"
            )
    return np.array(draw_instances(photo, small, confidence))


def reduced_copy(
    image: npt.NDArray[Any] | PixelSource, labels: npt.NDArray[Any], max_side: int
) -> tuple[Image.Image, npt.NDArray[Any]]:
    """Reduce a photograph and its labels for `draw_instances`, reading either a few rows at a time.

    Parameters
    ----------
    image : (H, W, 3) ndarray of uint8 or uint16, or PixelSource
        The photograph.
    labels : (H, W) ndarray of int
        Its labels.
    max_side : int
        Longest side of the result, in pixels. Smaller pictures keep their size.

    Returns
    -------
    photo : PIL.Image.Image
        RGB, antialiased.
    labels : (h, w) ndarray of int
        Of the nearest pixels.

    Raises
    ------
    ValueError
        Shapes that do not fit together, or an image of another type.
    """
    from sparsespec.images import as_pixels

    if isinstance(image, np.ndarray) and (
        image.ndim != 3 or image.shape[2] != 3 or image.dtype not in (np.uint8, np.uint16)
    ):
        raise ValueError(f"image must be (H, W, 3) uint8 or uint16, got {image.dtype} {image.shape}")
    if labels.shape != tuple(image.shape[:2]):
        raise ValueError(f"labels must have the size of the image {tuple(image.shape[:2])}, got {labels.shape}")
    if max_side < 1:
        raise ValueError(f"max_side must be at least 1, got {max_side}")
    height, width = labels.shape
    shrink = min(1.0, max_side / max(height, width))
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return _reduced_photo(as_pixels(image), size), reduced_labels(labels, size)


def draw_instances(photo: Image.Image, labels: npt.NDArray[Any], scores: npt.ArrayLike) -> Image.Image:
    """Draw instances over a photograph of the size in which it is going to be seen.

    Parameters
    ----------
    photo : PIL.Image.Image
        RGB; it is left as it is.
    labels : (h, w) ndarray of int
        0 = background, 1..n = instances.
    scores : (n,) array_like of float
        ``scores[k - 1]`` belongs to label ``k``.

    Returns
    -------
    PIL.Image.Image
        The photograph itself where there is nothing to draw.
    """
    confidence = np.asarray(scores, dtype=np.float64).ravel()
    if not labels.any():
        return photo
    colours = instance_colours(confidence.size)
    drawn = _tinted_and_outlined(photo, labels, colours)
    if min(drawn.size) >= _SMALLEST_WITH_TEXT:
        _write_scores(drawn, labels, confidence, colours)
    return drawn


def jpeg_bytes(
    pixels: npt.NDArray[np.uint8] | Image.Image, *, quality: int = 90, subsampling: int = 0, optimize: bool = False
) -> bytes:
    """Encode RGB pixels as JPEG; by default without colour subsampling, so that thin coloured lines stay sharp."""
    from PIL import Image

    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, subsampling=subsampling, optimize=optimize)
    return content.getvalue()


def write_overlay_jpeg(path: str | os.PathLike[str], overlay: npt.NDArray[np.uint8] | Image.Image) -> None:
    """Write a picture of `render_overlay` or `draw_instances`, whole or not at all; the folder must exist."""
    write_atomic(path, jpeg_bytes(overlay))


def _eight_bits(pixels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    return np.rint(pixels * 255).astype(np.uint8)


def _reduced_photo(source: PixelSource, size: tuple[int, int]) -> Image.Image:
    """Reduce by bands to what Pillow would make of the whole picture."""
    from PIL import Image

    height, width = source.shape[:2]

    def band(top: int, bottom: int) -> Image.Image:
        return Image.fromarray(_eight_bits(source.read(top, 0, bottom, width)))

    if size == (width, height):
        return band(0, height)
    filtering = Image.Resampling.HAMMING
    if height * width <= _PIXELS_AT_ONCE:
        return band(0, height).resize(size, filtering, reducing_gap=_REDUCING_GAP)
    # As Pillow does it: the mean of whole pixels first, as far as that does no harm, then the filter.
    step = max(1, int(width / size[0] / _REDUCING_GAP)), max(1, int(height / size[1] / _REDUCING_GAP))
    if step != (1, 1):
        coarse = Image.new("RGB", (math.ceil(width / step[0]), math.ceil(height / step[1])))
        rows = max(1, _PIXELS_AT_ONCE // (width * step[1])) * step[1]
        for top in range(0, height, rows):
            coarse.paste(band(top, min(top + rows, height)).reduce(step), (0, top // step[1]))
        return coarse.resize(size, filtering, box=(0, 0, width / step[0], height / step[1]))
    result = Image.new("RGB", size)
    scale = height / size[1]
    rows = max(1, int(_PIXELS_AT_ONCE / (width * scale)))
    for first in range(0, size[1], rows):
        last = min(first + rows, size[1])
        # The filter reaches as far beyond its rows as one row of the result is high.
        top, bottom = max(0, math.floor((first - 1) * scale) - 1), min(height, math.ceil((last + 1) * scale) + 1)
        box = (0, first * scale - top, width, min(last * scale, height) - top)
        result.paste(band(top, bottom).resize((size[0], last - first), filtering, box=box), (0, first))
    return result


def reduced_labels(labels: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Take the nearest labels for a picture of another size, width and height; a few rows at a time."""
    height, width = labels.shape
    if size == (width, height):
        return labels
    rows = ((np.arange(size[1]) + 0.5) * (height / size[1])).astype(np.intp)
    columns = ((np.arange(size[0]) + 0.5) * (width / size[0])).astype(np.intp)
    result = np.empty((size[1], size[0]), labels.dtype)
    for top, part in bands(result, step=64):
        np.take(labels[rows[top : top + len(part)]], columns, axis=1, out=part)
        release(labels)
    return result


def _line_width(shape: tuple[int, ...]) -> int:
    longest = max(shape[:2])
    return 1 if longest < 200 else max(2, round(longest / 450))


def _tinted_and_outlined(photo: Image.Image, labels: npt.NDArray[Any], colours: npt.NDArray[np.uint8]) -> Image.Image:
    from PIL import Image

    line = _line_width((photo.height, photo.width))
    # Only the part that holds instances is worked on, with room for the outlines.
    rows, columns = (np.flatnonzero(labels.any(axis=axis)) for axis in (1, 0))
    top, bottom = max(0, int(rows[0]) - line - 2), min(photo.height, int(rows[-1]) + line + 3)
    left, right = max(0, int(columns[0]) - line - 2), min(photo.width, int(columns[-1]) + line + 3)
    labels = labels[top:bottom, left:right]
    border = _border(labels)
    stroke = _soft(_grown(border, line - 1), 1.0)
    rim = _soft(_grown(border, line // 2), _CASING_STRENGTH)
    strength = np.where(labels > 0, np.maximum(stroke, _TINT), rim)
    # The background's colour is the rim's: what it is mixed with next to an instance.
    table = np.concatenate([np.array([_CASING], np.uint8), colours])
    if len(table) <= 256:
        colour = Image.fromarray(labels.astype(np.uint8))
        colour.putpalette(table.tobytes())
        colour = colour.convert("RGB")
    else:
        colour = Image.fromarray(table[labels])
    result = photo.copy()
    result.paste(colour, (left, top), Image.fromarray(strength))
    return result


def _border(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Pixels, on either side, where one label meets another."""
    border = np.zeros(labels.shape, bool)
    vertical = labels[1:] != labels[:-1]
    border[1:] |= vertical
    border[:-1] |= vertical
    horizontal = labels[:, 1:] != labels[:, :-1]
    border[:, 1:] |= horizontal
    border[:, :-1] |= horizontal
    return border


def _grown(mask: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    """Grow by `steps` pixels, alternating between cross and square, which comes close to a disc."""
    for step in range(steps):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        vertical = grown if step % 2 else mask
        result = grown.copy()
        result[:, 1:] |= vertical[:, :-1]
        result[:, :-1] |= vertical[:, 1:]
        mask = result
    return mask


def _soft(mask: npt.NDArray[np.bool_], strength: float) -> npt.NDArray[np.uint8]:
    """Round off the steps of a line: of that strength inside (255 is full), fading over half a pixel."""
    counts = np.pad(mask.view(np.uint8), 1, mode="edge")
    # Weights 1, 2, 1 along both axes, whose sum of at most 16 says how deep inside a pixel lies.
    across = counts[:, :-2] + counts[:, 2:]
    across += counts[:, 1:-1]
    across += counts[:, 1:-1]
    down = across[:-2] + across[2:]
    down += across[1:-1]
    down += across[1:-1]
    steps: npt.NDArray[np.uint8] = np.rint(np.arange(17) * (255 / 16 * strength)).astype(np.uint8)
    return steps[down]


def _write_scores(
    drawn: Image.Image,
    labels: npt.NDArray[Any],
    scores: npt.NDArray[np.float64],
    colours: npt.NDArray[np.uint8],
) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(drawn)
    shape = (drawn.height, drawn.width)
    font = _font(int(np.clip(max(shape) / 45, 11, 40)))
    taken: list[tuple[float, float, float, float]] = []
    # Small instances first: they have the least choice of where their tag can go.
    for label, (top, left, bottom, right) in sorted(_boxes(labels).items(), key=lambda item: _area(item[1])):
        region = labels[top:bottom, left:right] == label
        text = f"{label}  {scores[label - 1]:.2f}"
        extent = draw.textbbox((0, 0), text, font=font)
        box = _place_tag(extent, region, (top, left), shape, taken)
        taken.append(box)
        colour = tuple(int(channel) for channel in colours[label - 1])
        draw.rounded_rectangle(box, radius=(box[3] - box[1]) * 0.28, fill=colour, outline=_CASING)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        origin = (middle[0] - (extent[0] + extent[2]) / 2, middle[1] - (extent[1] + extent[3]) / 2)
        draw.text(origin, text, fill=_CASING, font=font)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=size)
    except (ImportError, TypeError):  # Pillow without FreeType, or from before its scalable default
        return ImageFont.load_default()


def _boxes(labels: npt.NDArray[Any]) -> dict[int, tuple[int, int, int, int]]:
    """Top, left, bottom and right of each label that has a pixel, from the runs in its rows."""
    flat = labels.ravel()
    begins = np.append(0, np.flatnonzero(flat[1:] != flat[:-1]) + 1)
    width = labels.shape[1]
    # A run may go on in the next row; then it touches both sides.
    ends = np.append(begins[1:], flat.size) - 1
    owners = flat[begins]
    used = owners > 0
    begins, ends, owners = begins[used], ends[used], owners[used]
    present, index = np.unique(owners, return_inverse=True)
    first, last = begins // width, ends // width
    left = np.where(first == last, begins % width, 0)
    right = np.where(first == last, ends % width, width - 1)
    corners = np.tile([len(labels), width, 0, 0], (len(present), 1))
    np.minimum.at(corners[:, 0], index, first)
    np.minimum.at(corners[:, 1], index, left)
    np.maximum.at(corners[:, 2], index, last + 1)
    np.maximum.at(corners[:, 3], index, right + 1)
    return {
        int(label): (int(top), int(left_), int(bottom), int(right_))
        for label, (top, left_, bottom, right_) in zip(present, corners, strict=True)
    }


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _place_tag(
    extent: tuple[float, float, float, float],
    region: npt.NDArray[np.bool_],
    corner: tuple[int, int],
    shape: tuple[int, ...],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Where the tag goes: in the thickest part of its instance if it fits, else beside it, on top of no other tag."""
    left_edge, upper, right_edge, lower = extent
    pad = max(2.0, (lower - upper) * 0.35)
    width, height = right_edge - left_edge + 2 * pad, lower - upper + 2 * pad
    top, left = corner
    rows, columns = region.shape
    row, column = _thickest(region)
    centre = (left + column, top + row)
    above, below = (left + columns / 2, top - height * 0.75), (left + columns / 2, top + rows + height * 0.75)
    large = columns > 1.5 * width and rows > 2 * height
    candidates = [centre, above, below] if large else [above, below, centre]
    candidates += [(centre[0], centre[1] + step * height * 1.1) for step in (1, -1, 2, -2, 3, -3)]
    boxes = []
    for x, y in candidates:
        x0 = min(max(x - width / 2, 1), max(1, shape[1] - width - 2))
        y0 = min(max(y - height / 2, 1), max(1, shape[0] - height - 2))
        boxes.append((x0, y0, x0 + width, y0 + height))
    overlaps = [sum(_shared(box, other) for other in taken) for box in boxes]
    return boxes[int(np.argmin(overlaps))]  # the first without any, in the order of preference


def _thickest(region: npt.NDArray[np.bool_]) -> tuple[float, float]:
    from scipy import ndimage

    # A coarse look is enough to place a tag.
    step = math.ceil(max(region.shape) / 64)
    coarse = np.pad(region[::step, ::step], 1)
    if not coarse.any():
        rows, columns = np.nonzero(region)
        return float(rows[0]), float(columns[0])
    depth = ndimage.distance_transform_edt(coarse)
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return float((row - 1) * step), float((column - 1) * step)


def _shared(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
