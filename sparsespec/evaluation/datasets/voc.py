"""Pascal VOC: object masks with rims that nobody judged."""

from __future__ import annotations

from pathlib import Path

from sparsespec.evaluation.datasets._common import (
    DatasetError,
    LabelTruth,
    Truth,
    assemble,
    contents,
    label_files,
    list_images,
    read_list,
    relative_name,
    set_root,
    split_file,
)
from sparsespec.evaluation.truth import Dataset

_VOID = 255
_YEARS = ("VOC2012", "VOC2007")
_BELONGS = (
    "SegmentationObject/, JPEGImages/ and ImageSets/Segmentation/, which the archives of Pascal VOC unpack to "
    "VOCdevkit/VOC2012/ or VOCdevkit/VOC2007/"
)


def open_voc(root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open ``SegmentationObject/`` for the names of ``ImageSets/Segmentation/{split}.txt``, ``val`` by default.

    Pixels of the value 255, the rims of objects and what was too difficult to judge, are void.
    """
    years = [year for year in _YEARS if any(_is_root(base / year) for base in (root, root / "VOCdevkit"))]
    if not _is_root(root) and len(years) > 1:
        raise DatasetError(f"'{root}' holds {' and '.join(years)}; give the folder of one of them")
    inside = [f"{base}{year}" for base in ("", "VOCdevkit/") for year in _YEARS]
    root = set_root(root, _is_root, _BELONGS, inside)
    split = split or "val"
    file = split_file(root / "ImageSets" / "Segmentation", split, "list of images with masks", _remark(split))
    names = [relative_name(line, f"line {number} of '{file}'") for number, line in read_list(file)]
    masks = label_files(root / "SegmentationObject", "the masks of the objects", {".png"})
    if images is None and not (root / "JPEGImages").is_dir():
        raise DatasetError(f"the images are missing: they belong in '{root / 'JPEGImages'}'; {contents(root)}")
    pictures = list_images(images or root / "JPEGImages", "the images")
    truths = {name: Truth(f"'{masks[name]}'", LabelTruth(masks[name], _VOID)) for name in names if name in masks}
    listed = set(names)
    if not truths:
        raise DatasetError(
            f"none of the {len(names)} images that '{file}' lists has a mask in "
            f"'{root / 'SegmentationObject'}'{_remark(split)}"
        )
    return assemble(
        f"{root.absolute().name} {split}",
        pictures,
        truths,
        described_by=f"'{file}'",
        without_image=listed - pictures.paths.keys(),
        within=lambda name: name in listed,
    )


def _is_root(folder: Path) -> bool:
    return (folder / "SegmentationObject").is_dir()


def _remark(split: str) -> str:
    return "; the masks of VOC2012's test images were never published: use val" if split == "test" else ""
