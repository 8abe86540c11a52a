"""COCO JSON and YOLO labels, as FiftyOne imports them."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import truth

try:
    import fiftyone

    fiftyone.list_datasets()  # starts the database
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(3)


def placed(detection: fiftyone.Detection, height: int, width: int) -> np.ndarray:
    """The mask of a detection, which is that of its box, in the photograph."""
    left, top, _, _ = np.array(detection.bounding_box) * (width, height, width, height)
    left, top = round(left), round(top)
    whole = np.zeros((height, width), bool)
    rows, columns = detection.mask.shape
    whole[top : top + rows, left : left + columns] = detection.mask
    return whole


def check_coco(run: Path, photographs: Path, reads: str) -> None:
    """Import ``instances.json`` with masks."""
    dataset = fiftyone.Dataset.from_dir(
        dataset_type=fiftyone.types.COCODetectionDataset,
        data_path=str(photographs),
        labels_path=str(run / "instances.json"),
        label_types="segmentations",
        label_field="instances",
        extra_attrs=False,  # our field "label" has the name of an argument of its own
        progress=False,
    )
    samples = {str(Path(sample.filepath).relative_to(photographs)): sample for sample in dataset}
    pairs, scores = [], True
    for true in truth.read(run):
        found = samples[true.path]["instances"]
        detections = found.detections if found else []
        assert len(detections) == len(true.masks), (true.path, len(detections), len(true.masks))
        for detection, mask in zip(detections, true.masks, strict=True):
            pairs.append((placed(detection, *mask.shape), mask))
            left, top, right, bottom = truth.box(mask)
            height, width = mask.shape
            box = np.array(detection.bounding_box) * (width, height, width, height)
            assert np.abs(box - (left, top, right - left, bottom - top)).max() < 1e-6
            assert detection.label == "object"
    result, right = truth.agreement(pairs)
    truth.report(version("fiftyone"), reads, f"{result}; boxes equal", right and scores)


def check_yolo(run: Path) -> None:
    """Import YOLO's labels as outlines."""
    yolo = run / "yolo"
    dataset = fiftyone.Dataset.from_dir(
        dataset_dir=str(yolo),
        dataset_type=fiftyone.types.YOLOv5Dataset,
        yaml_path="data.yaml",
        split="train",
        label_type="polylines",
        label_field="instances",
        progress=False,
    )
    samples = {str(Path(sample.filepath).relative_to(yolo / "images")): sample for sample in dataset}
    off = count = 0
    for true in truth.read(run):
        found = samples[true.path]["instances"]
        polylines = found.polylines if found else []
        assert len(polylines) == len(true.masks), (true.path, len(polylines), len(true.masks))
        height, width = true.labels.shape
        for polyline, mask in zip(polylines, true.masks, strict=True):
            (points,) = (np.array(part) * (width, height) for part in polyline.points)
            assert mask[tuple(points.astype(int).T[::-1])].all()
            box = np.concatenate([points.min(axis=0), points.max(axis=0)])
            off = max(off, np.abs(box - truth.box(mask)).max())
            count += 1
    result = f"{count} outlines, all points on their instances; boxes within {off:.2f} pixels"
    truth.report(version("fiftyone"), "YOLO labels", result, off < 0.6)


output = Path(sys.argv[1]).resolve()
check_coco(output / "runs", output / "photographs", "COCO JSON")
check_coco(output / "outlines", output / "photographs", "COCO JSON with `--polygons`")
check_yolo(output / "runs")
