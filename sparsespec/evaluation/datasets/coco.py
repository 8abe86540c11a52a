"""COCO: instances of images as polygons, crowds as runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsespec.batch.names import result_name
from sparsespec.evaluation.datasets._common import (
    DatasetError,
    Truth,
    assemble,
    check_memory,
    contents,
    first_folder,
    list_images,
    relative_name,
    set_root,
)
from sparsespec.evaluation.datasets._json import (
    by_id,
    entries,
    grouped,
    other_kind,
    read_annotations,
    unique_ids,
    whole,
)
from sparsespec.evaluation.datasets._masks import decode_segmentation
from sparsespec.evaluation.truth import Dataset, TrueInstances

_USUAL = ("val2017", "val2014", "train2017", "train2014")
_PREFIX = "instances_"
_BELONGS = "annotations/instances_{split}.json (of annotations_trainval2017.zip) and the image folder {split}/"


def open_coco(root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open ``annotations/instances_{split}.json`` and ``{split}/``, or a file of that form with `images` given.

    An image that the file lists and no annotation names has no instance, which is a truth too.
    """
    if root.suffix.lower() == ".json" and root.is_file():
        if images is None:
            raise DatasetError(f"'{root}' is a file of annotations; give the folder of its images too")
        if split is not None:
            raise DatasetError(f"'{root}' is a file of annotations, which is one split; leave out the split {split!r}")
        file, name = root, root.stem.removeprefix(_PREFIX)
    else:
        belongs = _BELONGS.replace("{split}", split or "val2017")
        root = set_root(
            root, lambda folder: bool(_annotation_files(folder)), belongs, ("coco", "COCO"), ("annotations",)
        )
        split = _choose(root, split)
        file, name = _annotation_files(root)[split], f"COCO {split}"
    data = read_annotations(file)
    kind = other_kind(data)
    if kind is not None:
        raise DatasetError(f"'{file}' holds {kind}; of COCO give the file instances_*.json, which holds masks")
    described = entries(data, "images", file)
    if data.get("annotations") is None:
        raise DatasetError(
            f"'{file}' lists images and says nothing about them, as for the test images of COCO, whose truth was never "
            "published: use val2017 or train2017"
        )
    by_number = by_id(described, "images", file)
    annotations = entries(data, "annotations", file)
    unique_ids(annotations, "annotations", file)
    groups = grouped(annotations, "image_id", by_number, file)
    if images is None:
        images = first_folder([root / str(split), root / "images" / str(split)])
        if images is None:
            raise DatasetError(
                f"the images of '{file}' are missing: they belong in '{root / str(split)}' (of {split}.zip); "
                f"{contents(root)}"
            )
    pictures = list_images(images, f"the images of '{file}'")
    truths, missing = {}, []
    seen: set[str] = set()
    for number, row in by_number.items():
        path = relative_name(row.get("file_name"), f"image {number} of '{file}'")
        if path in seen:
            raise DatasetError(f"'{file}' lists the image {path!r} twice")
        seen.add(path)
        source = f"image {number} of '{file}'"
        height, width = whole(row, "height", source, 1), whole(row, "width", source, 1)
        if path in pictures.names:
            load = _ImageTruth(file, height, width, groups.get(number, ()))
            truths[pictures.names[path]] = Truth(source, load, (height, width))
        else:
            missing.append(result_name(path))
    expected = described[0]["file_name"] if described else ""
    return assemble(name, pictures, truths, described_by=f"'{file}'", without_image=missing, expected=expected)


@dataclass(frozen=True)
class _ImageTruth:
    file: Path
    height: int
    width: int
    annotations: Sequence[dict[str, Any]]

    def __call__(self) -> TrueInstances:
        check_memory(len(self.annotations), (self.height, self.width), f"an image of '{self.file}'")
        masks = np.zeros((len(self.annotations), self.height, self.width), bool)
        for mask, annotation in zip(masks, self.annotations, strict=True):
            try:
                mask[:] = decode_segmentation(annotation.get("segmentation"), self.height, self.width)
            except ValueError as error:
                raise DatasetError(f"annotation {annotation['id']} of '{self.file}': {error}") from error
        return TrueInstances(
            masks, np.array([annotation.get("iscrowd", 0) == 1 for annotation in self.annotations], bool)
        )


def _annotation_files(root: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for folder in (root, root / "annotations"):
        files |= {path.stem.removeprefix(_PREFIX): path for path in sorted(folder.glob(f"{_PREFIX}*.json"))}
    return files


def _choose(root: Path, split: str | None) -> str:
    files = _annotation_files(root)
    if split is not None:
        if split in files:
            return split
        if split.startswith("test"):
            raise DatasetError("the truth of COCO's test images was never published: use val2017 or train2017")
        raise DatasetError(
            f"the annotations of split {split!r} are missing: they belong in "
            f"'{root / 'annotations' / (_PREFIX + split + '.json')}'; there are those of {', '.join(sorted(files))}"
        )
    usual = [name for name in _USUAL if name in files]
    if not usual and len(files) > 1:
        raise DatasetError(f"'{root}' has the splits {', '.join(sorted(files))}; say which")
    return usual[0] if usual else next(iter(files))
