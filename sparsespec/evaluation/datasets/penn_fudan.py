"""Penn-Fudan: pedestrians in streets."""

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
    no_splits,
    set_root,
)
from sparsespec.evaluation.truth import Dataset

_ENDING = "_mask"
_BELONGS = "PNGImages/ and PedMasks/ (of PennFudanPed.zip, which unpacks to PennFudanPed/)"


def open_penn_fudan(root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open ``PedMasks/<name>_mask.png`` and ``PNGImages/<name>.png``; in a mask every value but 0 is a pedestrian."""
    no_splits("penn-fudan", split)
    root = set_root(root, lambda folder: (folder / "PedMasks").is_dir(), _BELONGS, ("PennFudanPed",))
    files = label_files(root / "PedMasks", "the masks of the pedestrians", {".png"})
    strange = [path for name, path in files.items() if not name.endswith(_ENDING)]
    if strange:
        raise DatasetError(f"'{strange[0]}' is not called <name>{_ENDING}.png, as the masks of Penn-Fudan are")
    if images is None and not (root / "PNGImages").is_dir():
        raise DatasetError(f"the images are missing: they belong in '{root / 'PNGImages'}'; {contents(root)}")
    pictures = list_images(images or root / "PNGImages", "the images")
    truths = {name.removesuffix(_ENDING): Truth(f"'{path}'", LabelTruth(path)) for name, path in files.items()}
    return assemble("Penn-Fudan", pictures, truths, described_by=f"'{root / 'PedMasks'}'")
