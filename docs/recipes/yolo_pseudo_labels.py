"""Make a data set for YOLO's segmentation models out of photographs without labels, and read it back.

python yolo_pseudo_labels.py FOLDER [--output FOLDER] [--min-score S]
yolo segment train data=yolo-dataset/data.yaml model=yolo11n-seg.pt
"""

import argparse
import hashlib
import json
import shutil
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

import sparsespec
from sparsespec.batch import InputsError, OutputsError, find_inputs, run_batch
from sparsespec.formats import decode_rle
from sparsespec.formats.polygons import add_polygons
from sparsespec.formats.yolo import write_yolo

Written = list[tuple[Path, Path, list[dict[str, Any]]]]


def write_dataset(run: Path, photographs: Path, dataset: Path, *, min_score: float, share: float) -> Written:
    """Copy photographs and write labels: of each the image, the text file and the annotations that are in it."""
    record = json.loads((run / "run.json").read_bytes())
    coco = json.loads((run / "instances.json").read_bytes())
    of_image: dict[str, list[dict[str, Any]]] = defaultdict(list)
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if annotation["score"] >= min_score:
            of_image[names[annotation["image_id"]]].append(annotation)
    # An image without labels teaches the detector that nothing is there. That is more than a low score says: leave it
    # out. (Pages of a TIFF are left out too, since readers of YOLO's format open the first one only.)
    rows = [row for row in record["images"] if row["page"] is None and of_image[row["path"]]]
    # By a digest of the name, the same photograph is always on the same side, in whatever order they come.
    rows.sort(key=lambda row: hashlib.sha256(row["path"].encode()).digest())
    written = []
    for number, row in enumerate(rows):
        part = "val" if number < max(1, round(share * len(rows))) else "train"
        # The run's own name of the image, under which x.jpg and x.png are kept apart.
        name = PurePosixPath(row["mask"]).relative_to("masks").with_suffix("")
        image = dataset / "images" / part / f"{name}{Path(row['path']).suffix}"
        text = dataset / "labels" / part / f"{name}.txt"
        for file in (image, text):
            file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photographs / row["path"], image)
        annotations = of_image[row["path"]]
        add_polygons(annotations)
        write_yolo(text, annotations, *row["size"])
        written.append((image, text, annotations))
    if not written:
        return []
    yaml = "train: images/train\nval: images/val\nnames:\n  0: object\n"
    (dataset / "data.yaml").write_text(yaml, encoding="utf-8")
    return written


def read_masks(image_file: Path, label_file: Path) -> list[npt.NDArray[np.bool_]]:
    """Read labels as a training program does: points cut to whole pixels, filled together with their outline."""
    with Image.open(image_file) as image:
        width, height = ImageOps.exif_transpose(image).size  # labels are of the upright photograph
    masks = []
    for line in label_file.read_text(encoding="ascii").splitlines():
        number, *values = line.split()
        points = np.array(values, float).reshape(-1, 2)
        if number != "0" or len(points) < 3 or not ((points >= 0) & (points <= 1)).all():
            raise ValueError(f"{label_file}: no class 0 with a polygon in parts of width and height: {line[:60]}")
        mask = Image.new("1", (width, height))
        corners = [tuple(point) for point in (points * (width, height)).astype(int).tolist()]
        ImageDraw.Draw(mask).polygon(corners, fill=1, outline=1)
        masks.append(np.asarray(mask))
    return masks


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photographs", nargs="?", default="docs/examples", help="a folder")
    parser.add_argument("--output", type=Path, default=Path("yolo-dataset"))
    parser.add_argument("--min-score", type=float, default=0.4)
    parser.add_argument("--validation", type=float, default=0.2, help="share of the photographs")
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f"{args.output} is there already, and old labels in it would be trained on: remove it")

    run = args.output.with_name(args.output.name + "-run")
    try:
        inputs = find_inputs(args.photographs, output=run)
        # What a run has done is kept: with another --min-score, nothing is segmented again.
        result = run_batch(sparsespec.Segmenter(), inputs, run)
    except (InputsError, OutputsError) as error:
        parser.error(str(error))
    written = write_dataset(run, Path(inputs.root), args.output, min_score=args.min_score, share=args.validation)
    if not written:
        parser.error(f"no instance has a score of {args.min_score}: give a lower --min-score")

    overlaps = []
    for image, text, annotations in written:
        for annotation, read in zip(annotations, read_masks(image, text), strict=True):
            mask = decode_rle(annotation["segmentation"]) > 0
            overlaps.append((mask & read).sum() / (mask | read).sum())
    kept, found = len(overlaps), result.instances
    print(f"{len(written)} of {len(inputs.images)} photographs with {kept} of {found} instances: {args.output}")
    print(f"read back: IoU with our masks {np.mean(overlaps):.4f} on average, {np.min(overlaps):.4f} at least")
    print(f"look at {run / 'report.html'} before you train")


if __name__ == "__main__":
    main()
