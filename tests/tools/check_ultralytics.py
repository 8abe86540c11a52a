"""YOLO labels, as the data set of Ultralytics reads them."""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import truth
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset, polygon2mask

output = Path(sys.argv[1])
run = output / "runs"
with tempfile.TemporaryDirectory() as temporary:
    # It writes caches beside the labels.
    yolo = Path(temporary).resolve() / "yolo"
    shutil.copytree(run / "yolo", yolo)
    data = check_det_dataset(str(yolo / "data.yaml"), autodownload=False)
    assert data["names"] == {0: "object"}
    dataset = build_yolo_dataset(get_cfg(overrides={"task": "segment"}), data["train"], 1, data, mode="val")
    read = {str(Path(label["im_file"]).relative_to(yolo / "images")): label for label in dataset.labels}
pairs, off = [], 0.0
for true in truth.read(run):
    label, masks = read[true.path], true.masks
    height, width = true.labels.shape
    assert label["shape"] == (height, width)
    assert len(label["segments"]) == len(masks), (true.path, len(label["segments"]), len(masks))
    assert (label["cls"] == 0).all()
    for segment, box, mask in zip(label["segments"], label["bboxes"], masks, strict=True):
        pairs.append((polygon2mask((height, width), [(segment * (width, height)).ravel()]) > 0, mask))
        x, y, w, h = box * (width, height, width, height)
        off = max(off, np.abs(np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) - truth.box(mask)).max())
result, right = truth.yolo_agreement(pairs)
truth.report(
    version("ultralytics-opencv-headless"),
    "YOLO labels",
    f"{result}; boxes within {off:.2f} pixels",
    right and off < 0.6,
)
