"""A YouTube-VIS submission, as TrackEval scores it against its own masks from the label images."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import trackeval
import truth
from pycocotools import mask as tools

output = Path(sys.argv[1])
run = output / "linked"
true = {t.path: t for t in truth.read(run)}
submission = json.loads((run / "youtube_vis.json").read_bytes())
listed = json.loads((run / "youtube_vis.videos.json").read_bytes())
videos = {video["id"]: video for video in listed["videos"]}

# The tracks are the submission's, the masks are those of the label images.
annotations = []
for number, entry in enumerate(submission, start=1):
    video = videos[entry["video_id"]]
    masks = []
    for name, encoded in zip(video["file_names"], entry["segmentations"], strict=True):
        labels = true[name].labels
        masks.append(None if encoded is None else labels == labels[tools.decode(encoded) > 0][0])
    runs = [None if mask is None else tools.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    counts = [
        None if mask is None else np.diff(np.flatnonzero(np.diff(mask.ravel("F"), prepend=2, append=2))).tolist()
        for mask in masks
    ]
    for place, mask in enumerate(masks):
        if mask is not None and mask[0, 0]:  # counts begin with the background
            counts[place] = [0, *counts[place]]
    annotations.append(
        {
            "id": number,
            "video_id": entry["video_id"],
            "category_id": 1,
            "iscrowd": 0,
            "height": video["height"],
            "width": video["width"],
            "length": video["length"],
            "segmentations": [c and {"size": [video["height"], video["width"]], "counts": c} for c in counts],
            "areas": [None if r is None else int(tools.area(r)) for r in runs],
            "bboxes": [None if r is None else tools.toBbox(r).tolist() for r in runs],
        }
    )
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    (folder / "gt" / "youtube_vis_train").mkdir(parents=True)
    (folder / "tracked" / "youtube_vis_train" / "sparsespec" / "data").mkdir(parents=True)
    (folder / "gt" / "youtube_vis_train" / "gt.json").write_text(json.dumps({**listed, "annotations": annotations}))
    (folder / "tracked" / "youtube_vis_train" / "sparsespec" / "data" / "x.json").write_text(json.dumps(submission))
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = trackeval.datasets.YouTubeVIS(
            {
                "GT_FOLDER": f"{folder}/gt/",
                "TRACKERS_FOLDER": f"{folder}/tracked/",
                "SPLIT_TO_EVAL": "train",
                "PRINT_CONFIG": False,
            }
        )
        metrics = [
            trackeval.metrics.TrackMAP({"USE_TIME_RANGES": False, "PRINT_CONFIG": False}),
            trackeval.metrics.HOTA(),
        ]
        evaluator = trackeval.Evaluator(
            {"USE_PARALLEL": False, "BREAK_ON_ERROR": True, "PRINT_RESULTS": False, "PRINT_CONFIG": False}
            | {"OUTPUT_SUMMARY": False, "OUTPUT_DETAILED": False, "PLOT_CURVES": False, "TIME_PROGRESS": False}
        )
        results, _ = evaluator.evaluate([dataset], metrics)
found = results["YouTubeVIS"]["sparsespec"]["COMBINED_SEQ"]["object"]
precision, hota = float(np.mean(found["TrackMAP"]["AP_all"])), float(np.mean(found["HOTA"]["HOTA"]))
truth.report(
    version("trackeval"),
    "YouTube-VIS",
    f"{len(videos)} videos, {len(submission)} tracks: AP {precision:.4f}, HOTA {hota:.4f}",
    precision > 0.9999 and hota > 0.9999,
)
