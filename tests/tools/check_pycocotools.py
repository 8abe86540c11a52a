"""COCO JSON with encodings and with outlines, and YouTube-VIS masks, as pycocotools reads them."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from importlib.metadata import version
from pathlib import Path

import truth
from pycocotools import mask as tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

VERSION = version("pycocotools")


def check_coco(run: Path, reads: str) -> None:
    """Masks, areas and boxes, and the evaluation of the file against itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(run / "instances.json"))
    pairs, facts = [], True
    numbers = {image["file_name"]: image["id"] for image in coco.dataset["images"]}
    truths = truth.read(run)
    assert sorted(numbers) == sorted(t.path for t in truths)
    for true in truths:
        annotations = coco.loadAnns(coco.getAnnIds(numbers[true.path]))
        assert len(annotations) == len(true.masks)
        for annotation, mask in zip(annotations, true.masks, strict=True):
            found = coco.annToMask(annotation) > 0
            pairs.append((found, mask))
            left, top, right, bottom = truth.box(mask)
            encoded = coco.annToRLE(annotation)
            facts &= annotation["area"] == int(tools.area(encoded)) == int(mask.sum())
            facts &= annotation["bbox"] == tools.toBbox(encoded).tolist() == [left, top, right - left, bottom - top]
    with contextlib.redirect_stdout(io.StringIO()):
        results = [{**annotation, "segmentation": coco.annToRLE(annotation)} for annotation in coco.anns.values()]
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    result, right = truth.agreement(pairs)
    facts &= evaluation.stats[0] == 1
    said = "areas and boxes equal, AP against itself 1" if facts else "areas, boxes or AP differ"
    truth.report(VERSION, reads, f"{result}; {said}", right and facts)


def check_submission(run: Path) -> None:
    """The masks of a YouTube-VIS submission, frame by frame."""
    true = {t.path: t for t in truth.read(run)}
    videos = {video["id"]: video for video in json.loads((run / "youtube_vis.videos.json").read_bytes())["videos"]}
    left = {(path, int(label)) for path, t in true.items() for label in set(t.labels[t.labels > 0].tolist())}
    pairs = []
    for entry in json.loads((run / "youtube_vis.json").read_bytes()):
        for name, encoded in zip(videos[entry["video_id"]]["file_names"], entry["segmentations"], strict=True):
            if encoded is not None:
                found = tools.decode(encoded) > 0
                label = int(true[name].labels[found][0])
                pairs.append((found, true[name].labels == label))
                left.remove((name, label))
    result, right = truth.agreement(pairs)
    result += "; every instance in one track" if not left else f"; {len(left)} instances in no track"
    truth.report(VERSION, "YouTube-VIS", result, right and not left)


output = Path(sys.argv[1])
check_coco(output / "runs", "COCO JSON")
check_coco(output / "outlines", "COCO JSON with `--polygons`")
check_submission(output / "linked")
