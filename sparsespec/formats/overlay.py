"""The photograph with what was found drawn over it, to be looked at."""

from __future__ import annotations

import colorsys
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsespec.formats._atomic import write_atomic

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

__all__ = ["DEFAULT_MAX_SIDE", "instance_colours", "jpeg_bytes", "render_overlay", "write_overlay_jpeg"]

DEFAULT_MAX_SIDE = 2048
"""Longest side of an overlay in pixels: it is for looking, the label image has the full resolution."""

_TINT = 0.32
_CASING = np.array([16, 16, 20], np.float32)
_CASING_STRENGTH = 0.85
_SMALLEST_WITH_TEXT = 80
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


def render_overlay(
    image: npt.NDArray[Any], labels: npt.NDArray[Any], scores: npt.ArrayLike, *, max_side: int = DEFAULT_MAX_SIDE
) -> npt.NDArray[np.uint8]:
    """Draw the instances over their photograph: a tint, an outline with a dark rim, the label and its score.

    Parameters
    ----------
    image : (H, W, 3) ndarray of uint8 or uint16
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
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"image must be (H, W, 3) uint8 or uint16, got {image.dtype} {image.shape}")
    if labels.shape != image.shape[:2]:
        raise ValueError(f"labels must have the size of the image {image.shape[:2]}, got {labels.shape}")
    if labels.size and (labels.min() < 0 or labels.max() > confidence.size):
        raise ValueError(
            f"labels must lie in 0..{confidence.size}, the number of scores; got {labels.min()}..{labels.max()}"
        )
    if max_side < 1:
        raise ValueError(f"max_side must be at least 1, got {max_side}")
    photo, small = _reduced(image, labels, max_side)
    if not small.any():
        return photo
    colours = instance_colours(confidence.size)
    drawn = _tinted_and_outlined(photo, small, colours)
    if min(drawn.shape[:2]) >= _SMALLEST_WITH_TEXT:
        drawn = _with_scores(drawn, small, confidence, colours)
    return drawn


def jpeg_bytes(pixels: npt.NDArray[np.uint8], *, quality: int = 90) -> bytes:
    """Encode (H, W, 3) uint8 as JPEG, without colour subsampling so that thin coloured lines stay sharp."""
    import imageio.v3 as iio

    content: bytes = iio.imwrite(
        "<bytes>", pixels, plugin="pillow", extension=".jpg", quality=quality, subsampling=0, is_batch=False
    )
    return content


def write_overlay_jpeg(path: str | os.PathLike[str], overlay: npt.NDArray[np.uint8]) -> None:
    """Write the picture of `render_overlay`, whole or not at all; the folder must exist."""
    write_atomic(path, jpeg_bytes(overlay))


def _reduced(
    image: npt.NDArray[Any], labels: npt.NDArray[Any], max_side: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    from PIL import Image

    eight_bits = image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
    height, width = labels.shape
    shrink = min(1.0, max_side / max(height, width))
    if shrink == 1.0:
        return np.ascontiguousarray(eight_bits), labels.astype(np.int64)
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    photo = Image.fromarray(np.ascontiguousarray(eight_bits)).resize(size, Image.Resampling.HAMMING, reducing_gap=3.0)
    rows = ((np.arange(size[1]) + 0.5) * (height / size[1])).astype(np.intp)
    columns = ((np.arange(size[0]) + 0.5) * (width / size[0])).astype(np.intp)
    return np.array(photo), labels[rows[:, None], columns].astype(np.int64)


def _line_width(shape: tuple[int, ...]) -> int:
    longest = max(shape[:2])
    return 1 if longest < 200 else max(2, round(longest / 450))


def _tinted_and_outlined(
    photo: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], colours: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    # Row 0 is the rim: what the background is mixed with next to an instance.
    table = np.concatenate([_CASING[None], colours.astype(np.float32)])
    line = _line_width(photo.shape)
    # Only the part that holds instances is worked on, with room for the outlines.
    rows, columns = (np.flatnonzero(labels.any(axis=axis)) for axis in (1, 0))
    part = tuple(slice(max(0, int(found[0]) - line - 2), int(found[-1]) + line + 3) for found in (rows, columns))
    result = photo.copy()
    photo, labels = photo[part], labels[part]
    border = _border(labels)
    stroke = _soft(_grown(border, line - 1))
    rim = _soft(_grown(border, line // 2)) * _CASING_STRENGTH
    strength = np.where(labels > 0, np.maximum(stroke, np.float32(_TINT)), rim).ravel()
    touched = np.flatnonzero(strength)
    pixels = photo.reshape(-1, 3)[touched].astype(np.float32)
    pixels += (table[labels.ravel()[touched]] - pixels) * strength[touched, None]
    drawn = photo.reshape(-1, 3).copy()
    drawn[touched] = np.rint(pixels).astype(np.uint8)
    result[part] = drawn.reshape(photo.shape)
    return result


def _border(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
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


def _soft(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Round off the steps of a line: full inside, fading over half a pixel."""
    from PIL import Image, ImageFilter

    blurred = Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).filter(ImageFilter.BoxBlur(0.5))
    return np.asarray(blurred, np.float32) * np.float32(1 / 255)


def _with_scores(
    drawn: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    colours: npt.NDArray[np.uint8],
) -> npt.NDArray[np.uint8]:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(drawn)
    draw = ImageDraw.Draw(picture)
    size = int(np.clip(max(drawn.shape[:2]) / 45, 11, 40))
    font = _font(size)
    taken: list[tuple[float, float, float, float]] = []
    # Small instances first: they have the least choice of where their tag can go.
    for label, (top, left, bottom, right) in sorted(_boxes(labels).items(), key=lambda item: _area(item[1])):
        region = labels[top:bottom, left:right] == label
        text = f"{label}  {scores[label - 1]:.2f}"
        box = _place_tag(draw, font, text, region, (top, left), drawn.shape[:2], taken)
        taken.append(box)
        colour = tuple(int(channel) for channel in colours[label - 1])
        draw.rounded_rectangle(box, radius=(box[3] - box[1]) * 0.28, fill=colour, outline=(16, 16, 20))
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        left_edge, upper, right_edge, lower = draw.textbbox((0, 0), text, font=font)
        origin = (middle[0] - (left_edge + right_edge) / 2, middle[1] - (upper + lower) / 2)
        draw.text(origin, text, fill=(16, 16, 20), font=font)
    return np.array(picture)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=size)
    except (ImportError, TypeError):  # Pillow without FreeType, or from before its scalable default
        return ImageFont.load_default()


def _boxes(labels: npt.NDArray[np.int64]) -> dict[int, tuple[int, int, int, int]]:
    from scipy import ndimage

    slices = ndimage.find_objects(labels)
    return {
        label: (part[0].start, part[1].start, part[0].stop, part[1].stop)
        for label, part in enumerate(slices, start=1)
        if part is not None
    }


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _place_tag(
    draw: ImageDraw.ImageDraw,
    font: Any,
    text: str,
    region: npt.NDArray[np.bool_],
    corner: tuple[int, int],
    shape: tuple[int, ...],
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Where the tag goes: in the thickest part of its instance if it fits, else beside it, on top of no other tag."""
    left_edge, upper, right_edge, lower = draw.textbbox((0, 0), text, font=font)
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
    step = max(1, max(region.shape) // 128)
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
