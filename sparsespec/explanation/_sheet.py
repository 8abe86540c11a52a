"""How a sheet of figures is laid out, in inches, and what several of its panels draw; needs Matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec._display import instance_colours
from sparsespec.explanation.stages import Explanation

try:
    import matplotlib.ticker
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise ImportError("figures need Matplotlib: pip install 'sparsespec[figures]'") from error

WIDTH = 14.0
INK, SOFT, LINE = "#1c2026", "#5c6570", "#c9ced6"
ACCENT, SECOND = "#0b6bcb", "#d9480f"
BODY = 9.0
MARGIN, TEXT_WIDTH = 0.35, 3.05
TALLEST = 4.6

Place = tuple[float, float, float, float]


class Row:
    """One stage on a sheet: text on the left, panels on the right, placed in inches from its upper left corner."""

    def __init__(self, sheet: Figure, top: float, height: float) -> None:
        self.sheet, self.top, self.height = sheet, top, height
        self.left = MARGIN + TEXT_WIDTH + 0.3
        self.width = WIDTH - self.left - MARGIN

    def write(self, text: str, x: float, y: float, **options: Any) -> None:
        write(self.sheet, text, x, self.top + y, **options)

    def panel(self, x: float, y: float, width: float, height: float, title: str = "") -> Axes:
        """Make axes at (x, y) from the upper left corner of the panels."""
        total = self.sheet.get_figheight()
        axes = self.sheet.add_axes(
            ((self.left + x) / WIDTH, 1 - (self.top + y + height) / total, width / WIDTH, height / total)
        )
        if title:
            axes.set_title(title, loc="left", fontsize=BODY, color=INK, pad=4)
        axes.tick_params(labelsize=BODY - 1.5, colors=SOFT, length=2.5, width=0.6)
        for spine in axes.spines.values():
            spine.set(color=LINE, linewidth=0.8)
        return axes

    def columns(self, count: int, gap: float = 0.22) -> tuple[float, list[float]]:
        """Width and left edges of so many panels side by side."""
        width = (self.width - gap * (count - 1)) / count
        return width, [k * (width + gap) for k in range(count)]


def write(sheet: Figure, text: str, x: float, y: float, **options: Any) -> None:
    options = {"color": INK, "size": BODY, "va": "baseline", **options}
    sheet.text(x / WIDTH, 1 - y / sheet.get_figheight(), text, parse_math=False, **options)


def wrapped(paragraphs: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for paragraph in paragraphs:
        lines += ([""] if lines else []) + textwrap.wrap(paragraph, 43)
    return lines


def shape_of(made: Explanation, width: float, tallest: float = TALLEST) -> tuple[float, float]:
    """Width and height of a panel that shows the photograph, at most so wide and so tall."""
    # A strip is drawn wider than it is: there has to be room for what stands above it.
    ratio = float(np.clip(made.photograph.shape[0] / made.photograph.shape[1], 0.12, 4.0))
    height = min(width * ratio, tallest)
    return height / ratio, height


def pictures_beside(row: Row, made: Explanation, columns: int, y: float, gap: float = 0.22) -> list[Place]:
    """Places (x, y, width, height) of pictures side by side."""
    width, lefts = row.columns(columns, gap)
    wide, tall = shape_of(made, width)
    return [(left, y, wide, tall) for left in lefts]


def picture_height(made: Explanation, columns: int, gap: float = 0.22) -> float:
    width = (WIDTH - 2 * MARGIN - TEXT_WIDTH - 0.3 - gap * (columns - 1)) / columns
    return shape_of(made, width)[1]


def frame(axes: Axes, made: Explanation) -> None:
    """Let axes count in tokens, over the part of the grid that the photograph covers."""
    axes.set_xlim(0, made.extent[1])
    axes.set_ylim(made.extent[0], 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("auto")


def draw_photograph(axes: Axes, made: Explanation, dim: float = 0.0, pixels: Any = None) -> None:
    shown = made.photograph if pixels is None else pixels
    if dim:
        shown = np.rint(shown * (1 - dim)).astype(np.uint8)
    axes.imshow(shown, extent=(0, made.extent[1], made.extent[0], 0), interpolation="antialiased")
    frame(axes, made)


def draw_map(axes: Axes, made: Explanation, values: npt.NDArray[Any], **options: Any) -> Any:
    height, width = made.grid
    drawn = axes.imshow(values, extent=(0, width, height, 0), interpolation="nearest", **options)
    frame(axes, made)
    return drawn


def draw_scale(row: Row, drawn: Any, x: float, y: float, width: float) -> None:
    """Draw the scale of a map below it."""
    axes = row.panel(x, y, width, 0.07)
    bar = row.sheet.colorbar(drawn, cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=BODY - 2, colors=SOFT, length=2, width=0.5)
    bar.locator = matplotlib.ticker.MaxNLocator(4)
    bar.update_ticks()


def mark_token(axes: Axes, made: Explanation, token: int, colour: str = "#ffffff") -> None:
    down, across = divmod(token, made.grid[1])
    axes.add_patch(Rectangle((across, down), 1, 1, fill=False, edgecolor="#000000", linewidth=3.2))
    axes.add_patch(Rectangle((across, down), 1, 1, fill=False, edgecolor=colour, linewidth=1.6))


def draw_grid(axes: Axes, made: Explanation) -> None:
    height, width = made.grid
    if max(height, width) > 80:
        return
    lines = [[(x, 0), (x, height)] for x in range(width + 1)] + [[(0, y), (width, y)] for y in range(height + 1)]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.35, alpha=0.55))


def colours_of(count: int) -> list[tuple[float, float, float]]:
    return [tuple(c) for c in (instance_colours(count) / 255).tolist()]


def label_of_mask(made: Explanation) -> dict[int, int]:
    """Label of the result for each mask that has one: the first where it was split."""
    first: dict[int, int] = {}
    for part in made.scores:
        first.setdefault(part.mask, part.label)
    return first


def tinted(made: Explanation, labels: npt.NDArray[Any], colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The photograph, labels laid over it in the colours of their numbers (0 first, which is not used)."""
    shown = made.photograph.astype(np.float64)
    inside = labels > 0
    shown[inside] = 0.5 * shown[inside] + 0.5 * colours[labels[inside]]
    shown[~inside] *= 0.55
    border = np.zeros(labels.shape, bool)
    border[:-1] |= labels[1:] != labels[:-1]
    border[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    shown[border] = 255
    return np.rint(shown).astype(np.uint8)


def mask_colours(made: Explanation) -> npt.NDArray[np.uint8]:
    """Colours for mask numbers from 1 on, those of the labels that the masks have in the end."""
    colours = np.full((len(made.masks) + 1, 3), 150, np.uint8)
    palette = instance_colours(len(made.scores))
    for mask, label in label_of_mask(made).items():
        colours[mask + 1] = palette[label - 1]
    return colours
