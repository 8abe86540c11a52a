"""Figures of every stage, for notebooks and files; needs Matplotlib: ``pip install 'sparsespec[figures]'``.

Each function takes an :class:`~sparsespec.explanation.stages.Explanation` and returns a
:class:`matplotlib.figure.Figure` that belongs to nobody: pyplot is not used. A notebook shows it.

Examples
--------
>>> import sparsespec
>>> from skimage.data import coffee
>>> from sparsespec.explanation import explain, figures
>>> made = explain(sparsespec.Segmenter(long_side=224), coffee(), name="coffee")
>>> figures.spectrum(made).savefig("spectrum.png")               # doctest: +SKIP
>>> figures.figure(made).get_size_inches().round().tolist()[0]
14.0
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec._display import BACKGROUND, instance_colours
from sparsespec.explanation import texts
from sparsespec.explanation._sheet import (
    ACCENT,
    BODY,
    INK,
    LINE,
    MARGIN,
    SECOND,
    SOFT,
    TEXT_WIDTH,
    WIDTH,
    Row,
    colours_of,
    draw_grid,
    draw_map,
    draw_photograph,
    draw_scale,
    mark_token,
    mask_colours,
    picture_height,
    pictures_beside,
    shape_of,
    tinted,
    wrapped,
    write,
)
from sparsespec.explanation.stages import ChannelChoice, Explanation
from sparsespec.formats.overlay import draw_instances
from sparsespec.formats.report import readable_name

try:
    import matplotlib.lines
    import matplotlib.ticker
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise ImportError("figures need Matplotlib: pip install 'sparsespec[figures]'") from error

__all__ = [
    "affinity",
    "candidates",
    "channels",
    "edges",
    "figure",
    "figure_bytes",
    "foreground",
    "graph",
    "image",
    "scores",
    "spectrum",
]

DPI = 110
_MOST_SCORES, _MOST_REGIONS, _MOST_ARROWS, _MOST_CROPS = 16, 6, 22, 6
_FORMATS = ("png", "svg")


class _Sheet(Figure):
    """A figure that a notebook shows whether or not pyplot is there."""

    def _repr_png_(self) -> bytes:
        return figure_bytes(self, "png")


def figure_bytes(drawn: Figure, kind: str) -> bytes:
    """Encode a figure, the same bytes for the same figure.

    Parameters
    ----------
    drawn
        Of this module or another.
    kind
        "png" or "svg".

    Raises
    ------
    ValueError
        For another kind.
    """
    if kind not in _FORMATS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _FORMATS))}, not {kind!r}")
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "sparsespec"}), warnings.catch_warnings():
        # A name may hold letters that the font lacks; they become boxes.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        drawn.savefig(content, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return content.getvalue()


def image(made: Explanation, *, token: int | None = None) -> Figure:
    """The photograph with its tokens, and the result.

    Parameters
    ----------
    made
        Of :func:`~sparsespec.explanation.trace.explain`.
    token
        To mark, row by row from 0; the default is one inside the best instance.

    Raises
    ------
    ValueError
        There is no such token.
    """
    return _alone(made, "image", token)


def channels(made: Explanation) -> Figure:
    """Entropy and deviation of every channel, and which are kept."""
    return _alone(made, "channels", None)


def affinity(made: Explanation, *, token: int | None = None) -> Figure:
    """How alike one token is to every other, and the edges to its neighbours.

    Parameters
    ----------
    made
        Of :func:`~sparsespec.explanation.trace.explain`.
    token
        Row by row from 0; the default is one inside the best instance.

    Raises
    ------
    ValueError
        There is no such token.
    """
    return _alone(made, "affinity", token)


def graph(made: Explanation) -> Figure:
    """The edges that are cut, before and after the position weakens some; nothing for ``method="paper"``."""
    return _alone(made, "graph", None)


def spectrum(made: Explanation) -> Figure:
    """The smallest eigenvalues, their largest gap, and the eigenvectors."""
    return _alone(made, "spectrum", None)


def foreground(made: Explanation) -> Figure:
    """Objectness maps, their thresholds, and the share of them that each token is above."""
    return _alone(made, "foreground", None)


def candidates(made: Explanation) -> Figure:
    """Merit of the candidate regions, and the threshold that decides how many are instances."""
    return _alone(made, "candidates", None)


def edges(made: Explanation) -> Figure:
    """From masks on tokens to edges in the photograph, and the closer look."""
    return _alone(made, "edges", None)


def scores(made: Explanation) -> Figure:
    """The score of each instance, and what it is made of."""
    return _alone(made, "scores", None)


def figure(made: Explanation, *, token: int | None = None) -> Figure:
    """All stages on one sheet, from top to bottom.

    Parameters
    ----------
    made
        Of :func:`~sparsespec.explanation.trace.explain`.
    token
        The one whose affinities are shown, row by row from 0; the default is one inside the best instance.

    Returns
    -------
    matplotlib.figure.Figure
        14 inches wide, at 110 dots an inch.

    Raises
    ------
    ValueError
        There is no such token.
    """
    token = _checked(made, token)
    stages = [stage for stage in _DRAWN if not (stage == "graph" and made.graph is None)]
    heights = [_height(made, stage) for stage in stages]
    head = 0.85
    sheet = _empty(head + sum(heights) + 0.15)
    total = sheet.get_figheight()
    write(sheet, readable_name(made.name), MARGIN, 0.48, size=19, weight="bold")
    write(sheet, texts.summary(made), MARGIN, 0.72, size=10.5, color=SOFT)
    top = head
    for number, (stage, height) in enumerate(zip(stages, heights, strict=True), start=1):
        sheet.add_artist(
            matplotlib.lines.Line2D(
                [MARGIN / WIDTH, 1 - MARGIN / WIDTH], [1 - top / total] * 2, color=LINE, linewidth=0.8
            )
        )
        _draw(Row(sheet, top, height), made, stage, token, number)
        top += height
    return sheet


def _alone(made: Explanation, stage: str, token: int | None) -> Figure:
    token = _checked(made, token)
    height = _height(made, stage)
    sheet = _empty(height)
    _draw(Row(sheet, 0.0, height), made, stage, token, None)
    return sheet


def _checked(made: Explanation, token: int | None) -> int:
    if token is None:
        return made.typical_token()
    size = made.grid[0] * made.grid[1]
    if not 0 <= token < size:
        raise ValueError(f"token must be from 0 to {size - 1}, not {token!r}")
    return token


def _empty(height: float) -> Figure:
    sheet = _Sheet(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(sheet)
    return sheet


def _draw(row: Row, made: Explanation, stage: str, token: int, number: int | None) -> None:
    said = texts.of_stage(made, stage)
    heading = textwrap.wrap(said.heading if number is None else f"{number}  {said.heading}", 30)
    y = 0.42
    for line in heading:
        row.write(line, MARGIN, y, size=12.5, weight="bold")
        y += 0.23
    y += 0.03
    for line in wrapped(said.paragraphs):
        row.write(line, MARGIN, y, color="#3a414a")
        y += 0.168 if line else 0.09
    _DRAWN[stage](row, made, token)


def _height(made: Explanation, stage: str) -> float:
    """Height of a stage's row: the larger of its text's and of its panels'."""
    said = texts.of_stage(made, stage)
    lines = wrapped(said.paragraphs)
    wanted = 0.55 + 0.23 * len(textwrap.wrap(said.heading, 28)) + sum(0.168 if line else 0.09 for line in lines)
    return max(wanted + 0.1, _PANELS[stage](made) + 0.3)


def _draw_image(row: Row, made: Explanation, token: int) -> None:
    from PIL import Image

    first, second = pictures_beside(row, made, 2, 0.62)
    axes = row.panel(*first, title="The photograph and its tokens; one is marked")
    draw_photograph(axes, made)
    draw_grid(axes, made)
    mark_token(axes, made, token)
    count = len(made.result)
    found = f"{texts.counted(count, 'instance')}, with label and score" if count else "nothing found"
    axes = row.panel(*second, title=f"The result: {found}")
    drawn = draw_instances(Image.fromarray(made.photograph), made.after, made.result.scores)
    draw_photograph(axes, made, pixels=np.asarray(drawn))


def _draw_channels(row: Row, made: Explanation, token: int) -> None:
    width, lefts = row.columns(len(made.channels), 0.5)
    for place, (left, choice) in enumerate(zip(lefts, made.channels, strict=True)):
        axes = row.panel(left + 0.3, 0.62, width - 0.3, 2.5, choice.name)
        _scatter(axes, choice)
        axes.set_xlabel("entropy, bits × number of channels", fontsize=BODY - 1, color=SOFT)
        if place == 0:
            axes.set_ylabel("deviation over the tokens", fontsize=BODY - 1, color=SOFT)
    row.write("●  dropped by NCR: noise", row.left + 0.3, 3.82, color="#8f98a3")
    row.write("●  dropped by DCR: too even", row.left + 2.6, 3.82, color=SECOND)
    row.write("●  kept", row.left + 5.1, 3.82, color=ACCENT)


def _scatter(axes: Axes, choice: ChannelChoice) -> None:
    entropy, empty = choice.entropy_to_show()
    groups = [(~choice.quiet, "#a9b1bb"), (choice.quiet & ~choice.kept, SECOND), (choice.kept, ACCENT)]
    for which, colour in groups:
        axes.scatter(entropy[which], choice.deviation[which], s=11, color=colour, alpha=0.75, linewidths=0)
    if empty is not None:
        axes.text(
            empty, 1.01, "an empty bin", ha="right", va="bottom", fontsize=BODY - 1.5, color=SOFT,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.margins(0.05)
    axes.grid(color="#eef0f3", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_affinity(row: Row, made: Explanation, token: int) -> None:
    first, second, third = pictures_beside(row, made, 3, 0.62)
    similarity = made.similarity.row(token).reshape(made.grid)
    others = np.delete(similarity.ravel(), token)
    low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 1.0)
    axes = row.panel(*first, title="Photograph, the token marked")
    draw_photograph(axes, made, dim=0.25)
    mark_token(axes, made, token)
    axes = row.panel(*second, title="Similarity to every token")
    drawn = draw_map(axes, made, similarity, cmap="magma", vmin=low, vmax=max(high, low + 1e-9))
    mark_token(axes, made, token, "#7fffd4")
    draw_scale(row, drawn, second[0], 0.62 + second[3] + 0.08, second[2])
    x, y, wide, tall = third
    if made.graph is None:
        axes = row.panel(x, y, wide, tall, title="Those most like it")
        draw_photograph(axes, made, dim=0.6)
        most = similarity >= np.quantile(similarity, 0.95)
        draw_map(axes, made, np.where(most, 1.0, np.nan), cmap="spring", alpha=0.6, vmin=0, vmax=1)
        mark_token(axes, made, token, "#7fffd4")
        return
    side = min(max(wide, 1.6), max(tall, 1.6), 3.0)
    axes = row.panel(x, y, side, side, title="Edges to its neighbours")
    down, across = divmod(token, made.grid[1])
    draw_photograph(axes, made, dim=0.45)
    axes.set_xlim(across - 1.2, across + 2.2)
    axes.set_ylim(down + 2.2, down - 1.2)
    neighbours, plain, cut = made.graph.row(token)
    strongest = max(float(cut.max(initial=0)), 1e-12)
    for neighbour, before, after in zip(neighbours, plain, cut, strict=True):
        there, aside = divmod(int(neighbour), made.grid[1])
        axes.plot(
            [across + 0.5, aside + 0.5],
            [down + 0.5, there + 0.5],
            color="#7fffd4",
            linewidth=0.6 + 5 * after / strongest,
            alpha=0.9,
            solid_capstyle="round",
        )
        text = f"{after:.2f}" if made.graph.position is None else f"{before:.2f}\n→ {after:.2f}"
        axes.text(
            aside + 0.5, there + 0.5, text, ha="center", va="center", fontsize=BODY - 1.5, color="white",
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "black", "alpha": 0.65, "linewidth": 0},
        )  # fmt: skip
    mark_token(axes, made, token, "#7fffd4")


def _draw_graph(row: Row, made: Explanation, token: int) -> None:
    if made.graph is None:
        return
    places = pictures_beside(row, made, 3, 0.62)
    axes = row.panel(*places[0], title="Edges by the features alone: −ln weight")
    draw_photograph(axes, made, dim=0.75)
    drawn = _weak_edges(axes, made, made.graph.plain)
    draw_scale(row, drawn, places[0][0], 0.62 + places[0][3] + 0.08, places[0][2])
    if made.graph.position is None:
        return
    axes = row.panel(*places[1], title="Position in the object")
    draw_photograph(axes, made, dim=0.45)
    height, width = made.grid
    step = -(-max(height, width) // _MOST_ARROWS)
    across, down = np.meshgrid(np.arange(0, width, step), np.arange(0, height, step))
    x, y = made.graph.position.reshape(height, width, 2)[down, across].transpose(2, 0, 1)
    axes.quiver(
        across + 0.5, down + 0.5, x, y, angles="xy", scale_units="xy", scale=0.55 / step, color="#ffe066", width=0.004
    )
    axes = row.panel(*places[2], title="Edges that are cut: −ln weight")
    draw_photograph(axes, made, dim=0.75)
    drawn = _weak_edges(axes, made, made.graph.cut)
    draw_scale(row, drawn, places[2][0], 0.62 + places[2][3] + 0.08, places[2][2])


def _weak_edges(axes: Axes, made: Explanation, weights: Any) -> Any:
    """Draw the sides between tokens, brighter the weaker the edge across them is."""
    width = made.grid[1]
    pairs = weights.tocoo()
    first, second = np.asarray(pairs.row, np.int64), np.asarray(pairs.col, np.int64)
    beside = (second - first == 1) & (second % width > 0)
    below = second - first == width
    rows, columns = np.divmod(second, width)
    starts = np.stack([columns, rows], axis=1)
    ends = starts + np.where(beside[:, None], (0, 1), (1, 0))
    shown = beside | below
    weakness = -np.log(np.maximum(np.asarray(pairs.data)[shown], 1e-12))
    order = np.argsort(weakness, kind="stable")
    lines = LineCollection(
        np.stack([starts[shown], ends[shown]], axis=1)[order].tolist(), cmap="magma", linewidths=1.7, rasterized=True
    )
    lines.set_array(weakness[order])
    lines.set_clim(0.5, 9)
    lines.set_capstyle("butt")
    axes.add_collection(lines)
    return lines


def _draw_spectrum(row: Row, made: Explanation, token: int) -> None:
    values, gap = made.spectrum.values, made.spectrum.gap
    wide, tall = _eigenvector_shape(made)
    axes = row.panel(0.35, 0.62, 3.3, max(2.3, 2 * tall + 0.2), "Smallest eigenvalues")
    numbers = np.arange(1, len(values) + 1)
    if gap is not None:
        axes.axvspan(gap, gap + 1, color="#fff0c2", linewidth=0)
        axes.annotate(
            "largest gap", (gap + 0.5, 1), xycoords=("data", "axes fraction"), xytext=(0, -11),
            textcoords="offset points", ha="center",
            fontsize=BODY - 1, color="#7a5b00",
        )  # fmt: skip
    axes.vlines(numbers, 0, values, color=LINE, linewidth=1)
    axes.scatter(numbers, values, s=24, color=ACCENT, zorder=3)
    axes.set_xlabel("number", fontsize=BODY - 1, color=SOFT)
    axes.set_xlim(0.4, len(values) + 0.6)
    axes.set_ylim(0, max(float(values.max(initial=0)), 1e-9) * 1.15)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(axis="y", color="#eef0f3", linewidth=0.7)
    axes.set_axisbelow(True)
    for k, vector in enumerate(made.spectrum.vectors[1:7]):
        down, across = divmod(k, 3)
        axes = row.panel(
            3.95 + across * (wide + 0.15), 0.62 + down * (tall + 0.3), wide, tall, f"{k + 2}: {values[k + 1]:.3g}"
        )
        draw_map(axes, made, vector, cmap="RdBu_r", vmin=-1, vmax=1)


def _eigenvector_shape(made: Explanation) -> tuple[float, float]:
    return shape_of(made, (WIDTH - 2 * MARGIN - TEXT_WIDTH - 0.3 - 3.95 - 0.3) / 3, 2.6)


def _draw_foreground(row: Row, made: Explanation, token: int) -> None:
    seen = made.foreground
    if seen.fiedler is not None:
        first, second, third = pictures_beside(row, made, 3, 0.62)
        axes = row.panel(*first, title="Fiedler vector")
        largest = float(np.abs(seen.fiedler).max()) or 1.0
        drawn = draw_map(axes, made, seen.fiedler, cmap="RdBu_r", vmin=-largest, vmax=largest)
        draw_scale(row, drawn, first[0], 0.62 + first[3] + 0.08, first[2])
        axes = row.panel(*second, title="Foreground, cleaned")
        draw_map(axes, made, seen.share, cmap="gray", vmin=0, vmax=1)
        axes = row.panel(*third, title="On the photograph")
        _shaded(axes, made)
        return
    count = len(seen.maps) + 1
    y = 0.62
    places = pictures_beside(row, made, count, y, 0.15)
    for (x, _, wide, tall), shown in zip(places, seen.maps, strict=False):
        votes = f", {shown.votes} votes" if shown.votes > 1 else ""
        name = "learned" if shown.name == "learned" else shown.name
        low = float(min(shown.raw.min(), shown.smoothed.min()))
        high = max(float(max(shown.raw.max(), shown.smoothed.max())), low + 1e-9)
        axes = row.panel(x, y, wide, tall, f"{name}{votes}")
        draw_map(axes, made, shown.raw.reshape(made.grid), cmap="viridis", vmin=low, vmax=high)
        axes = row.panel(x, y + tall + 0.28, wide, tall, "smoothed, with thresholds")
        smooth = shown.smoothed.reshape(made.grid)
        drawn = draw_map(axes, made, smooth, cmap="viridis", vmin=low, vmax=high)
        _contours(axes, smooth, shown.thresholds)
        draw_scale(row, drawn, x, y + 2 * tall + 0.36, wide)
    x, _, wide, tall = places[-1]
    axes = row.panel(x, y, wide, tall, "share of thresholds")
    drawn = draw_map(axes, made, seen.share, cmap="gray", vmin=0, vmax=1)
    axes = row.panel(x, y + tall + 0.28, wide, tall, "on the photograph")
    _shaded(axes, made)
    draw_scale(row, drawn, x, y + 2 * tall + 0.36, wide)


def _shaded(axes: Axes, made: Explanation) -> None:
    """The photograph, dark where nothing is foreground."""
    draw_photograph(axes, made)
    shade = np.zeros((*made.grid, 4))
    shade[..., 3] = 0.85 * (1 - made.foreground.share)
    draw_map(axes, made, shade)


def _contours(axes: Axes, values: npt.NDArray[Any], thresholds: Sequence[float]) -> None:
    levels = [t for t in sorted(thresholds) if values.min() < t < values.max()]
    if not levels or min(values.shape) < 2:
        return
    down, across = (np.arange(side) + 0.5 for side in values.shape)
    axes.contour(across, down, values, levels=levels, colors="white", linestyles="solid", linewidths=0.7, alpha=0.85)


def _draw_candidates(row: Row, made: Explanation, token: int) -> None:
    regions = made.candidates
    if regions is None:
        first, second = pictures_beside(row, made, 2, 0.62)
        axes = row.panel(*first, title="Groups of the foreground's tokens")
        _token_masks(axes, made)
        axes = row.panel(*second, title="The third eigenvector, for comparison")
        if len(made.spectrum.vectors) > 2:
            draw_map(axes, made, made.spectrum.vectors[2], cmap="RdBu_r", vmin=-1, vmax=1)
        else:
            draw_photograph(axes, made)
        return
    if not len(regions):
        row.write("No candidates.", row.left, 0.75, color=SOFT)
        return
    axes = row.panel(0.35, 0.62, row.width - 0.35, 2.1, "Regions in the order in which they are taken")
    shown = min(len(regions.taken), 40)
    merit = regions.merit[regions.taken[:shown]]
    palette = colours_of(len(made.scores))
    labels = made.label_of_region()
    for place in range(shown):
        label = labels[place]
        colour = palette[label - 1] if label is not None else "#c3c9d1"
        axes.bar(
            place + 1, merit[place], color=colour, edgecolor=INK if label is not None else "#9aa3ae", linewidth=0.6
        )
        name = f"{merit[place]:.2f}"
        if label is None and place < regions.count:
            name += "\ndropped" if not regions.enough[place] else ""
        axes.text(place + 1, merit[place] + 0.015, name, ha="center", va="bottom", fontsize=BODY - 2, color=INK)
    if regions.given is None:
        upper, lower = regions.gap
        if regions.count:
            axes.axhspan(lower, upper, color="#fff0c2", linewidth=0, zorder=0)
        axes.axhline(regions.min_merit, color=SECOND, linewidth=1.4, linestyle=(0, (5, 3)))
        axes.text(
            shown + 0.55, regions.min_merit + 0.015, f"threshold {regions.min_merit:g}", ha="right", va="bottom",
            fontsize=BODY - 1, color=SECOND,
        )  # fmt: skip
    elif regions.count < shown:
        axes.axvline(regions.count + 0.5, color=SECOND, linewidth=1.4, linestyle=(0, (5, 3)))
    axes.set_xlim(0.4, max(shown, 4) + 0.6)
    axes.set_ylim(0, max(1.0, float(merit.max(initial=0))) * 1.12)
    axes.set_ylabel("merit", fontsize=BODY - 1, color=SOFT)
    axes.set_xticks([])
    width, lefts = row.columns(_MOST_REGIONS, 0.15)
    wide, tall = shape_of(made, width, 2.4)
    for place, left in zip(range(shown), lefts, strict=False):
        region = int(regions.taken[place])
        wholeness = "" if regions.residuals is None else f" × {_wholeness(made, region):.2f}"
        axes = row.panel(left, 3.12, wide, tall, f"{regions.votes[region]:.2f}{wholeness} = {merit[place]:.2f}")
        axes.title.set_fontsize(BODY - 1)
        draw_photograph(axes, made, dim=0.7)
        label = labels[place]
        _fill(axes, made, regions.masks[place].reshape(made.grid), palette[label - 1] if label is not None else None)


def _wholeness(made: Explanation, region: int) -> float:
    assert made.candidates is not None
    votes = made.candidates.votes[region]
    return float(made.candidates.merit[region] / votes) if votes else 1.0


def _fill(axes: Axes, made: Explanation, mask: npt.NDArray[np.bool_], colour: Any) -> None:
    layer = np.zeros((*mask.shape, 4))
    layer[mask] = (*(colour or (0.8, 0.82, 0.85)), 0.75)
    draw_map(axes, made, layer)


def _token_masks(axes: Axes, made: Explanation) -> None:
    draw_photograph(axes, made, dim=0.6)
    colours = mask_colours(made) / 255
    layer = np.zeros((*made.grid, 4))
    for number, mask in enumerate(made.masks, start=1):
        layer[mask] = (*colours[number], 0.7)
    draw_map(axes, made, layer)


def _draw_edges(row: Row, made: Explanation, token: int) -> None:
    palette = np.concatenate([np.array([BACKGROUND], np.uint8), instance_colours(max(len(made.scores), 1))])
    first, second, third = pictures_beside(row, made, 3, 0.62)
    axes = row.panel(*first, title="Masks on the tokens")
    _token_masks(axes, made)
    axes = row.panel(*second, title="Edges by the guided filter" if made.method == "sparse" else "Enlarged")
    draw_photograph(axes, made, pixels=tinted(made, made.before, mask_colours(made)))
    side = made.token_side
    for crop in made.crops[:_MOST_CROPS]:
        top, left, bottom, right = (edge / side for edge in crop.box)
        box = (left, top), right - left, bottom - top
        axes.add_patch(Rectangle(*box, fill=False, edgecolor="black", linewidth=1.6, alpha=0.6))
        axes.add_patch(Rectangle(*box, fill=False, edgecolor="white", linewidth=0.9, linestyle=(0, (4, 3))))
    axes = row.panel(*third, title="The result, after the closer look" if made.method == "sparse" else "The result")
    draw_photograph(axes, made, pixels=tinted(made, made.after, palette))


def _draw_scores(row: Row, made: Explanation, token: int) -> None:
    paper = made.method == "paper"
    shown = made.scores[:_MOST_SCORES]
    if not shown:
        row.write("No instances, no scores.", row.left, 0.75, color=SOFT)
        return
    titles = ["label", "tokens", "share", "score"] if paper else [
        "label", "votes", "× wholeness", "= merit", "worth", "in the crop", "score"
    ]  # fmt: skip
    widths = [0.8, 0.9, 0.9, 0.8] if paper else [0.8, 0.95, 1.05, 0.95, 0.95, 1.25, 0.8]
    lefts = np.concatenate([[0.1], 0.1 + np.cumsum(widths)])
    for title, left in zip(titles, lefts, strict=False):
        row.write(title, row.left + left, 0.55, color=SOFT)
    start = float(lefts[-1]) + 0.05
    bars = row.panel(start, 0.62, row.width - start, 0.26 * len(shown))
    for place, part in enumerate(shown):
        y = 0.79 + 0.26 * place
        crop = "–"
        if part.crop is not None:
            crop = "redrawn" if part.second is None else f"split, {part.second:.2f}"
        cells = [f"{part.tokens:,}", f"{part.first:.2f}"] if paper else [
            _number(part.votes), _number(part.wholeness), _number(part.merit), f"{part.first:.2f}", crop
        ]  # fmt: skip
        for text, left in zip([f"{part.label}", *cells], lefts, strict=False):
            row.write(text, row.left + left, y)
        row.write(f"{part.score:.2f}", row.left + lefts[len(titles) - 1], y, weight="bold")
    places = np.arange(len(shown))
    bars.barh(
        places, [part.score for part in shown], height=0.62, color=colours_of(len(made.scores))[: len(shown)],
        edgecolor=INK, linewidth=0.6,
    )  # fmt: skip
    bars.set_ylim(len(shown) - 0.5, -0.5)
    bars.set_xlim(0, 1)
    bars.set_yticks([])
    bars.tick_params(axis="x", labelsize=BODY - 2)
    if len(made.scores) > len(shown):
        rest = f"and {len(made.scores) - len(shown)} more"
        row.write(rest, row.left + 0.1, 0.95 + 0.26 * len(shown), color=SOFT)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


_Draw = Callable[[Row, Explanation, int], None]
_DRAWN: dict[str, _Draw] = {
    "image": _draw_image,
    "channels": _draw_channels,
    "affinity": _draw_affinity,
    "graph": _draw_graph,
    "spectrum": _draw_spectrum,
    "foreground": _draw_foreground,
    "candidates": _draw_candidates,
    "edges": _draw_edges,
    "scores": _draw_scores,
}
# How far down the panels reach.
_PANELS: dict[str, Callable[[Explanation], float]] = {
    "image": lambda made: 0.62 + picture_height(made, 2),
    "channels": lambda made: 3.9,
    "affinity": lambda made: 0.62 + max(picture_height(made, 3), 1.6) + 0.35,
    "graph": lambda made: 0.62 + picture_height(made, 3) + 0.35,
    "spectrum": lambda made: 0.62 + max(2.3, 2 * _eigenvector_shape(made)[1] + 0.3) + 0.3,
    "foreground": lambda made: (
        0.62 + picture_height(made, 3) + 0.35
        if made.foreground.fiedler is not None
        else 0.62 + 2 * picture_height(made, len(made.foreground.maps) + 1, 0.15) + 0.65
    ),
    "candidates": lambda made: (
        0.62 + picture_height(made, 2)
        if made.candidates is None
        else 3.12 + shape_of(made, (WIDTH - 2 * MARGIN - TEXT_WIDTH - 0.3) / _MOST_REGIONS - 0.15, 2.4)[1]
        if len(made.candidates)
        else 1.0
    ),
    "edges": lambda made: 0.62 + picture_height(made, 3),
    "scores": lambda made: 0.62 + 0.26 * min(len(made.scores), _MOST_SCORES) + 0.5,
}
