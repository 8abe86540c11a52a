"""Make the pictures of docs/method.md: what each stage makes of one photograph, as the pipeline itself tells it.

python docs/images/make_stages.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from sparsespec import Segmentation, Segmenter, affinity, channels
from sparsespec.directions import find_directions
from sparsespec.formats import instance_colours, jpeg_bytes, render_overlay
from sparsespec.images import read_image
from sparsespec.pipeline import likely_overlap

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PHOTOGRAPH = "coffee"
# Whose small instances the closer look redraws.
SMALL = "coins"
WIDTH, GAP, TITLE = 1000, 8, 24
# Share of the photograph's height and width at which the token lies whose affinities are shown.
TOKEN = (0.45, 0.45)
_STOPS = np.array([[20, 22, 50], [70, 60, 140], [200, 80, 110], [250, 170, 70], [255, 250, 190]], np.float64)
_LEFT_RIGHT = np.array([[40, 90, 200], [235, 235, 235], [200, 60, 40]], np.float64)

Picture = npt.NDArray[np.uint8]
Panel = tuple[str, Picture]


class Seen:
    """What a segmenter told of its steps on one photograph."""

    def __init__(self, segmenter: Segmenter, photograph: Picture, eigenvectors: int = 0) -> None:
        self.photograph = photograph
        self.steps: dict[str, Mapping[str, Any]] = {}
        self.crops: list[Mapping[str, Any]] = []
        self.before: npt.NDArray[np.integer[Any]] | None = None
        self.result: Segmentation = segmenter(photograph, eigenvectors=eigenvectors, watch=self._watch)
        self.tokens = self.steps["features"]["tokens"]
        self.grid: tuple[int, int] = self.tokens.grid
        rows, columns = self.tokens.extent
        self.shown = (slice(0, round(rows)), slice(0, round(columns)))

    def _watch(self, step: str, made: Mapping[str, Any]) -> None:
        if step == "refine":
            self.before = made["labels"].copy()
        if step == "crop":
            self.crops.append(dict(made))
        else:
            self.steps[step] = dict(made)

    def map(self, values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
        """Values of the tokens as a map of what of the grid is photograph."""
        return np.reshape(values, (*self.grid, *values.shape[1:]))[self.shown]


def resized(picture: Picture, width: int, *, smooth: bool = True) -> Picture:
    """Scale a picture to a width."""
    height = round(picture.shape[0] * width / picture.shape[1])
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), how))


def coloured(
    values: npt.NDArray[np.floating[Any]],
    stops: npt.NDArray[np.float64] = _STOPS,
    limits: tuple[float, float] | None = None,
) -> Picture:
    """Show a map: dark low, bright high, between the first and the last percent unless told otherwise."""
    low, high = np.percentile(values, (1, 99)) if limits is None else limits
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    places = np.linspace(0, 1, len(stops))
    return np.rint(np.stack([np.interp(share, places, stops[:, c]) for c in range(3)], axis=-1)).astype(np.uint8)


def row(panels: Sequence[Panel], width: int = WIDTH) -> Picture:
    """Panels side by side under their titles, all of one width."""
    wide = (width - GAP * (len(panels) - 1)) // len(panels)
    pictures = [resized(picture, wide, smooth=picture.shape[1] > wide) for _, picture in panels]
    page = Image.new("RGB", (width, TITLE + max(p.shape[0] for p in pictures)), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=15)
    for k, ((title, _), picture) in enumerate(zip(panels, pictures, strict=True)):
        left = k * (wide + GAP)
        draw.text((left, 2), title, fill=(60, 60, 66), font=font)
        page.paste(Image.fromarray(picture), (left, TITLE))
    return np.asarray(page)


def rows(*parts: Picture) -> Picture:
    """Rows below each other."""
    gap = np.full((GAP, WIDTH, 3), 255, np.uint8)
    return np.concatenate([part for k, picture in enumerate(parts) for part in ([gap] if k else []) + [picture]])


def regions(masks: npt.NDArray[np.bool_], seen: Seen) -> Picture:
    """Show disjoint regions on the token grid, each in a colour, on dark grey."""
    colours = np.vstack([[[46, 46, 52]], instance_colours(len(masks))])
    labels = np.zeros(seen.grid[0] * seen.grid[1], np.intp)
    for k, mask in enumerate(masks):
        labels[mask] = k + 1
    return seen.map(colours[labels].astype(np.uint8))


def components(features: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Three principal components of the tokens, each between 0 and 1."""
    unit = channels.normalize_tokens(features).astype(np.float64)
    centred = unit - unit.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    found = centred @ directions[:3].T
    low, high = np.percentile(found, (2, 98), axis=0)
    return np.clip((found - low) / (high - low), 0, 1)


def tokens(seen: Seen) -> Picture:
    """The input of the network, with the mirrored edge and the grid."""
    photo, found = seen.photograph, seen.tokens
    patch, (down, across) = found.patch_size, seen.grid
    height, width = (round(side * found.scale) for side in photo.shape[:2])
    small = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS))
    padding = ((0, down * patch - height), (0, across * patch - width), (0, 0))
    whole = np.pad(small, padding, mode="symmetric")
    means = whole.reshape(down, patch, across, patch, 3).mean(axis=(1, 3)).astype(np.uint8)
    lined = resized(whole, 3 * whole.shape[1]).copy()
    lined[:: 3 * patch] = lined[:, :: 3 * patch] = 255
    # What is mirrored lies behind a veil.
    lined[3 * height :] = lined[3 * height :] // 2 + 127
    lined[:, 3 * width :] = lined[:, 3 * width :] // 2 + 127
    return row(
        [
            (f"photograph, {photo.shape[1]} x {photo.shape[0]}", photo),
            (f"network input, {across} x {down} tokens", lined),
            ("how much there is of it: a token each", means),
        ]
    )


def features(seen: Seen) -> Picture:
    """Principal components of queries, keys and values as colours."""
    found = seen.tokens
    kinds = (("keys", found.keys), ("queries", found.queries), ("values", found.values))
    panels = [
        (f"{name}: 3 of {kind.shape[1]} dimensions", (255 * seen.map(components(kind))).astype(np.uint8))
        for name, kind in kinds
    ]
    return row([("photograph", seen.photograph), *panels])


def channel_maps(seen: Seen) -> Picture:
    """Channels of the keys: those that NCR keeps and drops, and those of the kept that DCR keeps and drops."""
    keys = seen.tokens.keys
    entropy = channels.channel_entropy(keys, normalize=False)
    by_entropy = np.argsort(entropy)
    stayed = channels.noise_channel_reduction(keys, normalize=False)
    unit = channels.normalize_tokens(keys[:, stayed])
    deviation = unit.std(axis=0)
    by_deviation = np.argsort(deviation)[::-1]

    def panels(which: Sequence[int], values: npt.NDArray[Any], what: str, numbers: npt.NDArray[Any]) -> list[Panel]:
        return [(f"{what} {numbers[k]:.3g}", coloured(seen.map(values[:, k]))) for k in which]

    return rows(
        row(panels(by_entropy[[0, 4, 8]], keys, "kept, H =", entropy)
            + panels(by_entropy[[-9, -5, -1]], keys, "dropped, H =", entropy)),
        row(panels(by_deviation[[0, 1, 2]], unit, "kept, deviation", deviation)
            + panels(by_deviation[[-3, -2, -1]], unit, "left out,", deviation)),
    )  # fmt: skip


def affinity_row(seen: Seen) -> Picture:
    """How like one token all others are, and what the graph of neighbours makes of it."""
    made = seen.steps["channels"]["reduced"]
    rows_, columns = seen.tokens.extent
    place = (int(TOKEN[0] * rows_), int(TOKEN[1] * columns))
    token = place[0] * seen.grid[1] + place[1]
    like = np.mean([affinity.bray_curtis_over_chebyshev(kind)[token] for kind in made], axis=0)
    like[token] = np.nan
    like[token] = np.nanmax(like)
    plain = seen.steps["affinity"]["plain"]
    counts = np.diff(plain.indptr)
    strength = np.asarray(plain.sum(axis=1)).ravel() / np.maximum(counts, 1)
    marked = seen.photograph.copy()
    side = seen.tokens.token_side
    top, left = (round(p * side) for p in place)
    box = Image.fromarray(marked)
    ImageDraw.Draw(box).rectangle((left, top, left + side, top + side), outline=(255, 255, 255), width=4)
    return row(
        [
            ("a token", np.asarray(box)),
            ("its affinity (BoC) to all others", coloured(seen.map(like))),
            ("weights W to the 8 neighbours, mean", coloured(seen.map(strength))),
        ]
    )


def directions(seen: Seen, segmenter: Segmenter) -> Picture:
    """Learned objectness, position, and the edges that stepping back weakens."""
    network = segmenter.backbone
    learned = find_directions("default", source_sha256=network.features_sha256, channels=network.channels)
    if learned is None:
        raise RuntimeError(f"no directions for {network.name}")
    found = seen.tokens
    objectness = learned.objectness_of(found.keys, found.queries, found.values)
    position = learned.position_of(found.keys, found.queries, found.values)
    graph, plain = (seen.steps["affinity"][name] for name in ("graph", "plain"))
    kept = np.asarray(graph.sum(axis=1)).ravel() / np.asarray(plain.sum(axis=1)).ravel()
    return row(
        [
            ("objectness, learned", coloured(seen.map(objectness))),
            ("x: left blue, right red", coloured(seen.map(position[:, 0]), _LEFT_RIGHT, (-0.5, 0.5))),
            ("y: top blue, bottom red", coloured(seen.map(position[:, 1]), _LEFT_RIGHT, (-0.5, 0.5))),
            ("share of W that is left", coloured(seen.map(kept))),
        ]
    )


def objectness_maps(seen: Seen) -> Picture:
    """The four maps, smoothed as they are thresholded."""
    maps = seen.steps["foreground"]["maps"]
    return rows(
        row([(f"{m.name}", coloured(seen.map(m.raw))) for m in maps]),
        row([(f"{m.name}, smoothed", coloured(seen.map(m.smoothed))) for m in maps]),
    )


def votes(seen: Seen) -> Picture:
    """Regions of high and of low merit, with what it is made of."""
    made = seen.steps["instances"]
    masks = made["candidates"].masks
    merit, share, residual = (np.asarray(made[name]) for name in ("merit", "votes", "residuals"))
    order = np.argsort(-merit, kind="stable")
    # The best ones that are not nearly each other.
    chosen: list[int] = []
    for k in order:
        alike = [np.count_nonzero(masks[k] & masks[j]) / np.count_nonzero(masks[k] | masks[j]) for j in chosen]
        if max(alike, default=0) < 0.5:
            chosen.append(int(k))
        if len(chosen) == 8:
            break
    panels = []
    for k in chosen:
        picture = coloured(seen.map(masks[k].astype(np.float64)), limits=(0, 1.25))
        panels.append((f"v {share[k]:.2f}  r {residual[k]:.2f}  m {merit[k]:.2f}", picture))
    return rows(row(panels[:4]), row(panels[4:8]))


def closer(seen: Seen) -> Picture:
    """An instance, the crop around it, what was found in the crop, and the labels before and after."""
    photo, before, after = seen.photograph, seen.before, seen.result.labels

    def changed(crop: Mapping[str, Any]) -> float:
        top, left, bottom, right = crop["box"]
        return float(np.mean((before[top:bottom, left:right] > 0) != (after[top:bottom, left:right] > 0)))

    # The crop in which most was changed.
    top, left, bottom, right = max(seen.crops, key=changed)["box"]
    marked = Image.fromarray(photo)
    ImageDraw.Draw(marked).rectangle((left, top, right, bottom), outline=(255, 220, 0), width=4)
    window = photo[top:bottom, left:right]

    def drawn(labels: npt.NDArray[np.integer[Any]]) -> Picture:
        part = labels[top:bottom, left:right]
        # Numbered anew, so that neighbours in the crop have the first colours, which differ most.
        numbers = np.unique(part[part > 0])
        colours = instance_colours(len(numbers))[np.minimum(np.searchsorted(numbers, part), len(numbers) - 1)]
        return np.where((part > 0)[..., None], window // 2 + colours // 2, window).astype(np.uint8)

    height = photo.shape[0]
    scale = height / window.shape[0]
    size = (round(window.shape[1] * scale), height)
    tall = [np.asarray(Image.fromarray(p).resize(size)) for p in (window, drawn(before), drawn(after))]
    whole = np.asarray(marked)
    total = whole.shape[1] + sum(p.shape[1] for p in tall)
    page_height = round((WIDTH - 3 * GAP) * height / total)
    parts = [np.asarray(Image.fromarray(p).resize((round(p.shape[1] * page_height / height), page_height)))
             for p in (whole, *tall)]  # fmt: skip
    page = Image.new("RGB", (WIDTH, TITLE + page_height), "white")
    font = ImageFont.load_default(size=15)
    place = 0
    for title, part in zip(("where", "the crop", "first look", "after the closer look"), parts, strict=True):
        ImageDraw.Draw(page).text((place, 2), title, fill=(60, 60, 66), font=font)
        page.paste(Image.fromarray(part), (place, TITLE))
        place += part.shape[1] + GAP
    return np.asarray(page)


def scores(seen: Seen) -> Picture:
    """Instances with their scores, and where these lie on the curve."""
    photo = resized(seen.photograph, (WIDTH - GAP) // 2)
    labels = Image.fromarray(seen.result.labels.astype(np.uint16)).resize(photo.shape[1::-1], Image.Resampling.NEAREST)
    drawn = render_overlay(photo, np.asarray(labels).astype(np.int32), seen.result.scores)
    height, width = photo.shape[:2]
    plot = Image.new("RGB", (width, height), (250, 250, 252))
    draw = ImageDraw.Draw(plot)
    font = ImageFont.load_default(size=15)
    edge = 44

    def at(merit: float, score: float) -> tuple[float, float]:
        return edge + merit / 1.2 * (width - 2 * edge), height - edge - score * (height - 2 * edge)

    for tick in np.linspace(0, 1, 6):
        draw.line((*at(0, tick), *at(1.2, tick)), fill=(225, 225, 230))
        draw.text((6, at(0, tick)[1] - 9), f"{tick:.1f}", fill=(90, 90, 96), font=font)
        draw.text((at(tick, 0)[0] - 10, height - edge + 6), f"{tick:.1f}", fill=(90, 90, 96), font=font)
    merits = np.linspace(0, 1.2, 100)
    draw.line([at(m, s) for m, s in zip(merits, likely_overlap(merits), strict=True)], fill=(70, 60, 140), width=3)
    made = seen.steps["instances"]
    for merit, score in zip(made["mask_merit"], made["scores"], strict=True):
        x, y = at(float(merit), float(score))
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=(200, 80, 110))
    return row(
        [("instances and scores", drawn), ("score (up) by merit (right); dots: these instances", np.asarray(plot))]
    )


def overview(seen: Seen) -> Picture:
    """From a photograph to masks in five pictures, for the first page."""
    width = (WIDTH - 4 * GAP) // 5
    photo = resized(seen.photograph, 2 * width)
    labels = Image.fromarray(seen.result.labels.astype(np.uint16)).resize(photo.shape[1::-1], Image.Resampling.NEAREST)
    overlay = render_overlay(photo, np.asarray(labels).astype(np.int32), seen.result.scores)
    maps = seen.steps["foreground"]["maps"]
    return row(
        [
            ("photograph", seen.photograph),
            ("features", (255 * seen.map(components(seen.tokens.keys))).astype(np.uint8)),
            ("what stands out", coloured(seen.map(maps[-1].smoothed))),
            ("instances on tokens", regions(seen.steps["instances"]["masks"], seen)),
            ("masks", overlay),
        ]
    )


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="folder of the pictures")
    folder = parser.parse_args().output
    segmenter = Segmenter()
    seen = Seen(segmenter, read_image(EXAMPLES / f"{PHOTOGRAPH}.jpg"))
    small = Seen(segmenter, read_image(EXAMPLES / f"{SMALL}.jpg"))
    pictures = {
        "stages": overview(seen),
        "stage-01-tokens": tokens(seen),
        "stage-02-features": features(seen),
        "stage-03-channels": channel_maps(seen),
        "stage-04-affinity": affinity_row(seen),
        "stage-05-directions": directions(seen, segmenter),
        "stage-06-objectness": objectness_maps(seen),
        "stage-08-votes": votes(seen),
        "stage-10-closer": closer(small),
        "stage-11-scores": scores(seen),
    }
    for name, picture in pictures.items():
        (folder / f"{name}.jpg").write_bytes(jpeg_bytes(picture, quality=80))


if __name__ == "__main__":
    main()
