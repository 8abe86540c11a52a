"""Make the pictures of this folder: what the pipeline really does to the photographs of docs/examples.

python docs/images/make_results.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image

from sparsespec import Segmentation, Segmenter, affinity, channels, foreground, instances, refine
from sparsespec.explanation import explain, figures
from sparsespec.formats import instance_colours, jpeg_bytes, render_overlay
from sparsespec.images import read_image, to_rgb_float
from sparsespec.pipeline import Settings

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ROWS = (("rocket", "coffee", "coins", "astronaut"),)
STAGES = ("coffee", "coins")
STAGES_WIDTH = 900
WIDTH, GAP = 1200, 6
SHEET_WIDTH = 1000

Picture = npt.NDArray[np.uint8]


def fitted(image: Picture, height: int) -> Picture:
    """Scale a picture to a height."""
    width = round(image.shape[1] * height / image.shape[0])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def overlay(image: Picture, result: Segmentation, height: int) -> Picture:
    """Draw a result at the size at which it will be seen, so that lines and numbers stay readable."""
    photo = fitted(image, height)
    labels = Image.fromarray(result.labels.astype(np.uint16)).resize(photo.shape[1::-1], Image.Resampling.NEAREST)
    return render_overlay(photo, np.asarray(labels).astype(np.int32), result.scores)


def row_height(pictures: Sequence[Picture], width: int = WIDTH) -> int:
    """Find the height at which pictures side by side are as wide as the page."""
    return int((width - GAP * (len(pictures) - 1)) / sum(p.shape[1] / p.shape[0] for p in pictures))


def side_by_side(pictures: Sequence[Picture], width: int = WIDTH) -> Picture:
    """Put pictures of one height into a row on white."""
    row = np.full((pictures[0].shape[0], width, 3), 255, np.uint8)
    left = 0
    for picture in pictures:
        row[:, left : left + picture.shape[1]] = picture[:, : width - left]
        left += picture.shape[1] + GAP
    return row


def stacked(rows: Sequence[Picture], gaps: Sequence[int]) -> Picture:
    """Put rows below each other, with the given gap above each but the first."""
    parts = [rows[0]]
    for row, gap in zip(rows[1:], gaps, strict=True):
        parts += [np.full((gap, row.shape[1], 3), 255, np.uint8), row]
    return np.concatenate(parts)


def results(segmenter: Segmenter) -> Picture:
    """Photographs, and below each what was found in it."""
    rows = []
    for names in ROWS:
        photos = [read_image(EXAMPLES / f"{name}.jpg") for name in names]
        height = row_height(photos)
        rows.append(side_by_side([fitted(photo, height) for photo in photos]))
        rows.append(side_by_side([overlay(photo, segmenter(photo), height) for photo in photos]))
    return stacked(rows, ([GAP, 4 * GAP] * len(ROWS))[:-1])


def limits(segmenter: Segmenter, photos: Sequence[Picture]) -> Picture:
    """Photographs on which the method does badly."""
    height = row_height(photos, STAGES_WIDTH)
    return side_by_side([overlay(photo, segmenter(photo), height) for photo in photos], STAGES_WIDTH)


def heat(values: npt.NDArray[np.floating], height: int) -> Picture:
    """Show a map on the token grid: dark low, bright high."""
    low, high = np.percentile(values, (1, 99))
    share = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    stops = np.array([[20, 22, 50], [70, 60, 140], [200, 80, 110], [250, 170, 70], [255, 250, 190]], np.float64)
    colours = np.stack([np.interp(share, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)], axis=-1)
    return enlarged(np.rint(colours).astype(np.uint8), height)


def regions(masks: npt.NDArray[np.bool_], grid: tuple[int, int], height: int) -> Picture:
    """Show disjoint regions on the token grid, each in a colour, on dark grey."""
    colours = np.vstack([[[46, 46, 52]], instance_colours(len(masks))])
    labels = np.zeros(grid, np.intp)
    for k, mask in enumerate(masks):
        labels[mask.reshape(grid)] = k + 1
    return enlarged(colours[labels].astype(np.uint8), height)


def enlarged(tokens: Picture, height: int) -> Picture:
    """Enlarge a picture with a pixel for each token, so that the tokens show."""
    width = round(tokens.shape[1] * height / tokens.shape[0])
    return np.asarray(Image.fromarray(tokens).resize((width, height), Image.Resampling.NEAREST))


def stages(segmenter: Segmenter) -> tuple[Picture, Picture, Picture]:
    """Objectness before and after smoothing; partitions at rising cut thresholds; masks before and after edges."""
    settings = Settings()
    objectness_rows, cut_rows, edge_rows = [], [], []
    for name in STAGES:
        photo = read_image(EXAMPLES / f"{name}.jpg")
        pixels = to_rgb_float(photo)
        tokens = segmenter.backbone.features(pixels)
        grid = tokens.grid
        kinds = (tokens.keys, tokens.queries, tokens.values)
        graph = affinity.local_affinity([channels.instance_channels(f) for f in kinds], grid)
        smoothing_graph = graph.copy()
        smoothing_graph.data **= settings.smoothing_sharpness / settings.sharpness
        raw = [foreground.border_contrast(channels.normalize_tokens(f), grid) for f in kinds]
        smooth = [foreground.smooth(foreground.standardise(m), smoothing_graph, settings.smoothing) for m in raw]

        # What of the padded grid is photograph.
        high, wide = (side * tokens.scale / tokens.patch_size for side in tokens.image_shape)
        height = row_height([photo] * 3, STAGES_WIDTH)
        shown = (slice(0, round(high)), slice(0, round(wide)))
        objectness_rows.append(
            [fitted(photo, height)] + [heat(m.reshape(grid)[shown], height) for m in (raw[0], smooth[0])]
        )

        cutter = instances.RegionCutter(graph, grid)
        partitions = []
        for cut in settings.cut_thresholds:
            found = instances.propose([(smooth[0], (0.0,))], cutter, cut_thresholds=[cut * 32 / max(grid)])
            kept = np.array([m.reshape(grid)[shown] for m in found.masks])
            partitions.append(regions(kept, kept.shape[1:], height))
        cut_rows.append(partitions)

        maps = [(m, settings.thresholds) for m in smooth]
        scaled = [cut * 32 / max(grid) for cut in settings.cut_thresholds]
        masks = instances.select(instances.propose(maps, cutter, cut_thresholds=scaled))
        labels = refine.refine_masks(pixels, masks.reshape(-1, *grid), (high, wide))
        labels = refine.absorb_specks(labels, settings.min_speck * (tokens.patch_size / tokens.scale) ** 2)
        colours = np.vstack([[[46, 46, 52]], instance_colours(len(masks))]).astype(np.uint8)
        on_tokens = np.array([m.reshape(grid)[shown] for m in masks])
        edge_rows.append(
            [
                fitted(photo, height),
                regions(on_tokens, on_tokens.shape[1:], height),
                np.asarray(Image.fromarray(colours[labels]).resize(fitted(photo, height).shape[1::-1])),
            ]
        )

    def grid_of(rows: list[list[Picture]]) -> Picture:
        return stacked([side_by_side(row, STAGES_WIDTH) for row in rows], [GAP] * (len(rows) - 1))

    return grid_of(objectness_rows), grid_of(cut_rows), grid_of(edge_rows)


def explained(segmenter: Segmenter) -> Picture:
    """Show all stages of a photograph on one sheet."""
    made = explain(segmenter, read_image(EXAMPLES / "coffee.jpg"), name="coffee.jpg")
    sheet = Image.open(io.BytesIO(figures.figure_bytes(figures.figure(made), "png"))).convert("RGB")
    return fitted(np.asarray(sheet), round(sheet.height * SHEET_WIDTH / sheet.width))


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="folder of the pictures")
    folder = parser.parse_args().output
    segmenter = Segmenter()
    objectness, cuts, edges = stages(segmenter)
    camera = read_image(EXAMPLES / "camera.jpg")
    others = [camera, skimage.data.hubble_deep_field(), skimage.data.immunohistochemistry()]
    pictures = {
        "results": results(segmenter),
        "objectness": objectness,
        "cuts": cuts,
        "edges": edges,
        "limits": limits(segmenter, [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee()]),
        "limits-more": limits(segmenter, others),
    }
    for name, picture in pictures.items():
        (folder / f"{name}.jpg").write_bytes(jpeg_bytes(picture, quality=80))
    # Much of it is white, but it is large.
    sheet = jpeg_bytes(explained(segmenter), quality=62, subsampling=2)
    (folder / "explain.jpg").write_bytes(sheet)


if __name__ == "__main__":
    main()
