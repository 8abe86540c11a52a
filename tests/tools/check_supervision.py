"""COCO JSON and YOLO labels, as supervision reads them."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import supervision
import truth

Pairs = list[tuple[np.ndarray, np.ndarray]]


def read(dataset: supervision.DetectionDataset, run: Path, images: Path) -> tuple[Pairs, float]:
    """Masks beside the true ones, and how far a side of a box is off at most, in pixels."""
    pairs, off = [], []
    by_path = {Path(path).resolve(): detections for path, _, detections in dataset}
    for true in truth.read(run):
        if (images / true.path).resolve() not in by_path:
            # It does not look for YOLO's labels in folders below the one that it is given.
            assert "/" in true.path
            continue
        detections = by_path[(images / true.path).resolve()]
        assert len(detections) == len(true.masks), (true.path, len(detections), len(true.masks))
        if true.masks:
            pairs += list(zip(np.asarray(detections.mask, bool), true.masks, strict=True))
            boxes = np.array([truth.box(mask) for mask in true.masks])
            off.append(np.abs(detections.xyxy - boxes).max())
    return pairs, float(max(off))


def grown(mask: np.ndarray) -> np.ndarray:
    """With the next row and column, which belong to a polygon where its outline does."""
    wide = np.pad(mask, ((1, 0), (1, 0)))
    return wide[1:, 1:] | wide[:-1, 1:] | wide[1:, :-1] | wide[:-1, :-1]


VERSION = version("supervision")
output = Path(sys.argv[1])
photographs = output / "photographs"
coco = supervision.DetectionDataset.from_coco

pairs, off = read(
    coco(str(photographs), str(output / "runs" / "instances.json"), force_masks=True), output / "runs", photographs
)
result, right = truth.agreement(pairs)
truth.report(VERSION, "COCO JSON", f"{result}; boxes within {off:.2f} pixels", right and off == 0)

run = output / "outlines"
pairs, off = read(coco(str(photographs), str(run / "instances.json"), force_masks=True), run, photographs)
result, _ = truth.agreement(pairs)
# It fills a polygon with its outline, which along the edges of pixels adds a row and a column.
right = all((true <= found).all() and (found <= grown(true)).all() for found, true in pairs)
result += "; at most one row and column more, as it fills outlines" if right else "; not within a row and a column"
truth.report(VERSION, "COCO JSON with `--polygons`", f"{result}; boxes within {off:.2f} pixels", right and off == 0)

yolo = output / "runs" / "yolo"
dataset = supervision.DetectionDataset.from_yolo(
    str(yolo / "images"), str(yolo / "labels"), str(yolo / "data.yaml"), force_masks=True
)
assert dataset.classes == ["object"]
pairs, off = read(dataset, output / "runs", yolo / "images")
result, right = truth.yolo_agreement(pairs)
# An outline through the centres of the pixels has a box that is half a pixel smaller on each side.
truth.report(VERSION, "YOLO labels", f"{result}; boxes within {off:.2f} pixels", right and off < 0.6)
