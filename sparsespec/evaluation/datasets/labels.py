"""A plain folder of photographs and one of label images."""

from __future__ import annotations

from pathlib import Path

from sparsespec.evaluation.datasets._common import (
    LabelTruth,
    Truth,
    assemble,
    label_files,
    list_images,
    no_splits,
    set_root,
)
from sparsespec.evaluation.truth import Dataset

_BELONGS = (
    "images/ with photographs and labels/ with label images of the same names (for a folder of label images alone, "
    "give the folder of the images too)"
)


def open_labels(root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open ``images/`` and ``labels/`` of a folder, or a folder of label images with `images` given.

    In a label image (PNG or TIFF) 0 is background and every other value one instance. It is called what a run calls the
    mask of the image: ``labels/a/x.png`` belongs to ``images/a/x.jpg``.
    """
    no_splits("labels", split)
    if images is None:
        if root.name == "labels" and (root.parent / "images").is_dir():
            root = root.parent
        root = set_root(root, _is_root, _BELONGS)
        images = root / "images"
    below = root / "labels" if (root / "labels").is_dir() else root
    name = (below.absolute().parent if below.name == "labels" else below.absolute()).name
    files = label_files(below, "label images")
    pictures = list_images(images, "the images of the label images")
    truths = {name: Truth(f"'{path}'", LabelTruth(path)) for name, path in files.items()}
    return assemble(name, pictures, truths, described_by=f"'{below}'")


def _is_root(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "labels").is_dir()
