"""One page with every stage of one image, to explore: :func:`html_page`. It needs neither a network nor Matplotlib."""

from __future__ import annotations

import base64
import json
import math
from functools import lru_cache
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec._display import instance_colours, png_uri, reduced_labels
from sparsespec._mapped import bands
from sparsespec.explanation import texts
from sparsespec.explanation.stages import CandidateRegions, ChannelChoice, Explanation
from sparsespec.formats import viewer
from sparsespec.formats.coco import encode_rle, instance_annotations
from sparsespec.formats.overlay import jpeg_bytes
from sparsespec.formats.report import readable_name

__all__ = ["MOST_TOKENS", "html_page"]

MOST_TOKENS = 8192
"""A larger grid is thinned for the page, which is bounded by it: every second token, every third, ..."""

_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
_WITHOUT_SCRIPTS = (
    "<noscript><p>What is shown here is drawn by scripts in this page, which this browser does not run.</p></noscript>"
)
_QUALITY = 85
_MASK_SIDE, _GRID_SIDE = 640, 64
_MOST_REGIONS = 60
# Rows and columns to the neighbours of a token, and the largest -ln of a weight there is (the least is 1e-12).
_NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
_WEAKEST = 28.0
# Tokens for which the similarity is computed both ways, to say how exact it is on the page.
_CHECKED = 24
_STAGES = ("image", "channels", "affinity", "spectrum", "foreground", "candidates", "edges", "scores")

Array = npt.NDArray[Any]


def html_page(made: Explanation, *, token: int | None = None) -> str:
    """Write the page.

    Parameters
    ----------
    made
        Of :func:`~sparsespec.explanation.trace.explain`.
    token
        The one that is chosen at first, row by row from 0; the default is one inside the best instance.

    Returns
    -------
    str
        HTML, the same for the same explanation; everything it needs is in it.

    Raises
    ------
    ValueError
        There is no such token.
    """
    size = made.grid[0] * made.grid[1]
    if token is not None and not 0 <= token < size:
        raise ValueError(f"token must be from 0 to {size - 1}, not {token!r}")
    chosen = made.typical_token() if token is None else token
    name = escape(readable_name(made.name))
    # A name must not end the script, nor begin a comment in it.
    content = json.dumps(_data(made, chosen), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    sections = [_section(made, stage) for stage in _STAGES]
    links = "".join(
        f'<li><a href="#{stage}">{escape(texts.of_stage(made, stage).heading.partition(":")[0])}</a></li>'
        for stage in _STAGES
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{name}: how it was segmented</title>",
            f"<style>{viewer.style()}\n{_text('page.css')}</style>",
            f"<header><h1>{name}</h1><p>{escape(texts.summary(made))}</p>",
            _WITHOUT_SCRIPTS,
            f'<nav aria-label="Stages"><ol>{links}</ol></nav></header>',
            "<main>",
            *sections,
            "</main>",
            f'<script type="application/json" id="explanation">{content}</script>',
            f"<script>{viewer.script()}</script>",
            f"<script>{_text('page.js')}</script>",
            "</html>\n",
        ]
    )


@lru_cache(maxsize=4)
def _text(name: str) -> str:
    return files("sparsespec.explanation").joinpath(name).read_text("utf-8")


def _section(made: Explanation, stage: str) -> str:
    said = [texts.of_stage(made, stage)]
    if stage == "affinity" and made.graph is not None:
        said.append(texts.of_stage(made, "graph"))
    paragraphs = "".join(f"<p>{escape(paragraph)}</p>" for text in said for paragraph in text.paragraphs)
    body = _score_table(made) if stage == "scores" else f'<div id="{stage}-view"></div>'
    return (
        f'<section id="{stage}" aria-labelledby="{stage}-title"><div class="said">'
        f'<h2 id="{stage}-title">{escape(said[0].heading)}</h2>{paragraphs}</div>{body}</section>'
    )


def _score_table(made: Explanation) -> str:
    if not made.scores:
        return "<p>No instances, no scores.</p>"
    paper = made.method == "paper"
    titles = ["label", "tokens", "share of the foreground", "score"] if paper else [
        "label", "votes", "× wholeness", "= merit", "worth", "closer look", "score"
    ]  # fmt: skip
    rows = []
    for part, colour in zip(made.scores, instance_colours(len(made.scores)), strict=True):
        cells = [f"{part.tokens:,}", f"{part.first:.3f}"]
        if not paper:
            closer = "–"
            if part.crop is not None:
                closer = "redrawn" if part.second is None else f"split: √({part.first:.3f} × {part.second:.3f})"
            cells = [*map(_number, (part.votes, part.wholeness, part.merit)), f"{part.first:.3f}", closer]
        swatch = f'<i class="swatch" style="background:#{bytes(colour).hex()}"></i>'
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{swatch}{part.label}</th>{body}<td><b>{part.score:.3f}</b></td></tr>')
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        '<div class="wide" role="region" aria-label="Table of the scores" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _data(made: Explanation, chosen: int) -> dict[str, Any]:
    """What the page's script reads."""
    rows, columns = made.grid
    step = max(1, math.ceil(math.sqrt(rows * columns / MOST_TOKENS)))
    while -(-rows // step) * -(-columns // step) > MOST_TOKENS:
        step += 1
    kept = np.arange(rows * columns).reshape(rows, columns)[::step, ::step]
    thin = _Thinned(step, kept)
    down, across = divmod(chosen, columns)
    height, width = made.result.labels.shape
    photograph = _uri("image/jpeg", jpeg_bytes(made.photograph, quality=_QUALITY))
    return {
        "size": [width, height],
        "photograph": photograph,
        "grid": list(kept.shape),
        "extent": [_round(length / step) for length in made.extent],
        "step": step,
        "chosen": [min(down // step, kept.shape[0] - 1), min(across // step, kept.shape[1] - 1)],
        "picture": _picture(made),
        "similarity": _similarity(made, thin),
        "edges": _edges(made, thin),
        "channels": [_channels(choice) for choice in made.channels],
        "spectrum": {
            "values": [_round(value) for value in made.spectrum.values],
            "gap": made.spectrum.gap,
            "vectors": [thin.layer(vector, (-1.0, 1.0)) for vector in made.spectrum.vectors],
        },
        "foreground": _foreground(made, thin),
        "candidates": None if made.candidates is None else _regions(made, made.candidates, thin),
        "edgeViews": _views(made),
        "crops": [
            {
                "box": list(crop.box),
                "became": "as before" if not crop.taken else "redrawn" if len(crop.taken) == 1 else "split",
            }
            for crop in made.crops
        ],
    }


def _channels(choice: ChannelChoice) -> dict[str, Any]:
    entropy, empty = choice.entropy_to_show()
    return {
        "name": choice.name,
        "entropy": [_round(value) for value in entropy],
        "empty": None if empty is None else _round(empty),
        "deviation": [_round(value) for value in choice.deviation],
        # 0 dropped by NCR, 1 by DCR, 2 kept.
        "state": "".join(str(int(quiet) + int(kept)) for quiet, kept in zip(choice.quiet, choice.kept, strict=True)),
    }


class _Thinned:
    """Every n-th token both ways."""

    def __init__(self, step: int, kept: Array) -> None:
        self.step, self.kept = step, kept

    def layer(self, values: Array, span: tuple[float, float] | None = None) -> dict[str, Any]:
        """Encode a map on the grid, in steps of 1/255 of its range."""
        shown = np.asarray(values, np.float64).ravel()[self.kept]
        low, high = span or (float(shown.min()), float(shown.max()))
        scaled = np.clip((shown - low) / (high - low) * 255, 0, 255) if high > low else np.zeros(shown.shape)
        return {"range": [_round(low), _round(high)], "data": _base64(np.rint(scaled).astype(np.uint8))}


def _similarity(made: Explanation, thin: _Thinned) -> dict[str, Any]:
    """Encode the features in 16 bits, and say how far the similarities are from those of all their digits."""
    similarity = made.similarity
    kept = thin.kept.ravel()
    kinds, rounded = [], []
    for features, divisor in zip(similarity.features, similarity.divisors, strict=True):
        part = features[kept].astype(np.float64)
        scale = float(np.abs(part).max(initial=0)) / 32767 or 1.0
        steps = np.rint(part / scale).astype("<i2")
        rounded.append(np.asarray(steps * scale, np.float32))
        kinds.append({"channels": int(part.shape[1]), "scale": scale, "divisor": divisor, "data": _base64(steps)})
    shown = type(similarity)(similarity.weights, tuple(rounded), similarity.divisors, similarity.sharpness)
    tokens = np.unique(np.linspace(0, len(kept) - 1, _CHECKED).astype(np.intp))
    error = max(float(np.abs(shown.row(t) - similarity.row(int(kept[t]))[kept]).max()) for t in tokens)
    return {
        "weights": similarity.weights,
        "sharpness": similarity.sharpness,
        "kinds": kinds,
        # Rounded up, to a number that is easily read.
        "error": float(f"{error * 1.05 + 1e-7:.1e}"),
    }


def _edges(made: Explanation, thin: _Thinned) -> dict[str, Any] | None:
    """Encode -ln of the weights of each token's edges to its eight neighbours; 65535 where there is none."""
    if made.graph is None:
        return None
    rows, columns = made.grid
    encoded = {}
    for name, weights in (("plain", made.graph.plain), ("cut", made.graph.cut)):
        pairs = weights.tocoo()
        first, second = np.asarray(pairs.row, np.int64), np.asarray(pairs.col, np.int64)
        down, across = second // columns - first // columns, second % columns - first % columns
        near = (np.abs(down) <= 1) & (np.abs(across) <= 1)
        place = 3 * (down[near] + 1) + across[near] + 1
        # The token itself, in the middle, is no neighbour.
        place -= place > 4
        weakness = -np.log(np.maximum(np.asarray(pairs.data)[near], 1e-12))
        steps = np.full((rows * columns, len(_NEIGHBOURS)), 65535, "<u2")
        steps[first[near], place] = np.rint(np.clip(weakness, 0, _WEAKEST) / _WEAKEST * 65534)
        encoded[name] = _base64(steps[thin.kept.ravel()])
    position = None
    if made.graph.position is not None:
        steps = np.rint(np.clip(made.graph.position[thin.kept.ravel()], -1, 1) * 127)
        position = _base64(steps.astype(np.int8))
    return {"weakest": _WEAKEST, "position": position, **encoded}


def _foreground(made: Explanation, thin: _Thinned) -> dict[str, Any]:
    seen = made.foreground
    maps = [
        {
            "name": one.name,
            "votes": one.votes,
            "thresholds": [_round(float(threshold)) for threshold in one.thresholds],
            "raw": thin.layer(one.raw),
            "smoothed": thin.layer(one.smoothed),
        }
        for one in seen.maps
    ]
    if seen.fiedler is not None:
        layer = thin.layer(seen.fiedler)
        maps = [{"name": "Fiedler vector", "votes": 1, "thresholds": [0.0], "raw": layer, "smoothed": layer}]
    return {"maps": maps, "share": thin.layer(seen.share, (0.0, 1.0))}


def _regions(made: Explanation, regions: CandidateRegions, thin: _Thinned) -> dict[str, Any]:
    shown = min(len(regions.taken), max(_MOST_REGIONS, regions.count + 1))
    taken = regions.taken[:shown]
    upper, lower = regions.gap
    return {
        "merit": [_round(value) for value in regions.merit[taken]],
        "votes": [_round(value) for value in regions.votes[taken]],
        "residuals": None if regions.residuals is None else [_round(value) for value in regions.residuals[taken]],
        "sizes": regions.sizes[taken].tolist(),
        "labels": made.label_of_region()[:shown],
        "dropped": np.flatnonzero(~regions.enough).tolist(),
        "masks": [_base64(np.packbits(mask[thin.kept.ravel()])) for mask in regions.masks[:shown]],
        "threshold": regions.min_merit,
        "count": regions.count,
        "given": regions.given,
        "gap": [None if math.isinf(upper) else _round(upper), _round(lower)],
    }


def _views(made: Explanation) -> list[dict[str, str]]:
    """Pictures to lay over the photograph: masks on the tokens, their edges, and the result."""
    palette = np.concatenate([np.zeros((1, 3), np.uint8), instance_colours(len(made.scores))])
    of_masks = np.full((len(made.masks) + 1, 3), 150, np.uint8)
    for part in reversed(made.scores):
        of_masks[part.mask + 1] = palette[part.label]
    height, width = made.before.shape
    rows, columns = (
        np.minimum((np.arange(side) + 0.5) * (extent / side), cells - 1).astype(np.intp)
        for side, extent, cells in zip((height, width), made.extent, made.grid, strict=True)
    )
    numbers = np.arange(1, len(made.masks) + 1)[:, None, None]
    on_tokens = (made.masks * numbers).sum(axis=0, dtype=np.intp)[rows[:, None], columns]
    sparse = made.method == "sparse"
    views = [
        ("Masks on the tokens", on_tokens, of_masks),
        ("Edges by the guided filter" if sparse else "Enlarged", made.before, of_masks),
        ("After the closer look" if sparse else "The result", made.after, palette),
    ]
    return [{"name": name, "picture": png_uri(_laid_over(labels, colours))} for name, labels, colours in views]


def _laid_over(labels: Array, colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    picture = np.empty((*labels.shape, 4), np.uint8)
    picture[..., :3] = colours[labels]
    picture[..., 3] = np.where(labels > 0, 128, 0)
    border = np.zeros(labels.shape, bool)
    border[:-1] |= labels[1:] != labels[:-1]
    border[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    picture[border] = 255
    return picture


def _picture(made: Explanation) -> dict[str, Any]:
    """What the viewer shows, see :mod:`sparsespec.formats.viewer`; without the photograph, which is there already."""
    result = made.result
    height, width = result.labels.shape
    small = reduced_labels(result.labels, _MASK_SIDE)
    areas = np.zeros(len(result) + 1, np.int64)
    for _, band in bands(result.labels):
        areas += np.bincount(band.ravel().astype(np.intp), minlength=len(areas))
    seen = {a["label"]: a["segmentation"]["counts"] for a in instance_annotations(small, result.scores)}
    nothing = encode_rle(np.zeros(small.shape, bool))["counts"]
    instances = []
    for part in made.scores:
        facts = {}
        if part.votes is not None:
            facts = {"votes": f"{part.votes:.2f}", "wholeness": _number(part.wholeness), "merit": _number(part.merit)}
        instances.append(
            {
                "label": part.label,
                "score": round(part.score, 4),
                "box": [float(side) for side in result.boxes[part.label - 1]],
                "area": int(areas[part.label]),
                "rle": seen.get(part.label, nothing),
                "facts": facts,
            }
        )
    step = math.ceil(max(made.grid) / _GRID_SIDE)
    whole = _Thinned(step, np.arange(made.grid[0] * made.grid[1]).reshape(made.grid)[::step, ::step])
    layers = [
        {
            "name": name,
            "grid": list(whole.kept.shape),
            "extent": [_round(length / step) for length in made.extent],
            **whole.layer(values),
        }
        for name, values in [*result.layers.items()][:5]
    ]
    return {
        "name": readable_name(made.name),
        "size": [width, height],
        "maskSize": list(small.shape),
        "instances": instances,
        "layers": layers,
        "seconds": None,
        "links": [],
    }


def _round(value: float) -> float:
    return float(f"{float(value):.5g}")


def _base64(array: Array) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
