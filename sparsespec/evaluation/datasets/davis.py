"""DAVIS: frames of videos, with one object (2016) or each object by itself (2017)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from sparsespec.evaluation.datasets._common import (
    DatasetError,
    ImageFolder,
    LabelTruth,
    Truth,
    assemble,
    contents,
    first_folder,
    label_files,
    list_images,
    read_list,
    read_values,
    relative_name,
    set_root,
    split_file,
)
from sparsespec.evaluation.truth import Dataset, TrueInstances

_VOID = 255
_IMAGES, _MASKS = "JPEGImages/480p", "Annotations/480p"
_UNPROMPTED = "Annotations_unsupervised/480p"


def open_davis2016(root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open the pairs of frame and mask that ``ImageSets/480p/{split}.txt`` lists, ``val`` by default.

    Everything that moves is one object: every pixel of a mask that is not 0 belongs to it.
    """
    split = split or "val"
    belongs = f"{_IMAGES}/, {_MASKS}/ and ImageSets/480p/{split}.txt (of DAVIS-data.zip, which unpacks to DAVIS/)"
    try:
        root = set_root(root, lambda folder: (folder / "ImageSets" / "480p").is_dir(), belongs, ("DAVIS",))
    except DatasetError as error:
        if any((base / "ImageSets" / "2017").is_dir() for base in (root, root / "DAVIS")):
            raise DatasetError(f"{error}; that is DAVIS 2017: its kind is davis2017") from error
        raise
    file = split_file(root / "ImageSets" / "480p", split, "list of frames and masks")
    pictures = _frames(root, images)
    masks = label_files(root / _MASKS, "the masks of the frames", {".png"})
    truths, missing, sequences = {}, [], set()
    for number, line in read_list(file):
        frame, mask = _pair(line, f"line {number} of '{file}'")
        if frame in truths:
            raise DatasetError(f"'{file}' lists the frame {frame!r} twice")
        sequences.add(frame.split("/")[0])
        if mask in masks:
            truths[frame] = Truth(f"'{masks[mask]}'", _OneObject(masks[mask]))
        elif frame not in pictures.paths:
            missing.append(frame)
    return assemble(
        f"DAVIS 2016 {split}",
        pictures,
        truths,
        described_by=f"'{file}'",
        without_image=missing,
        within=lambda name: name.split("/")[0] in sequences,
    )


def open_davis2017(root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open the sequences that ``ImageSets/2017/{split}.txt`` lists, ``val`` by default.

    In a mask the value 255 is void and every other but 0 one object. Where the download is the one without prompts, its
    masks in ``Annotations_unsupervised/480p`` are read.
    """
    split = split or "val"
    belongs = (
        f"{_IMAGES}/, {_MASKS}/ and ImageSets/2017/{split}.txt (of DAVIS-2017-trainval-480p.zip, which unpacks to "
        "DAVIS/)"
    )
    try:
        root = set_root(root, lambda folder: (folder / "ImageSets" / "2017").is_dir(), belongs, ("DAVIS",))
    except DatasetError as error:
        if any((base / "ImageSets" / "480p").is_dir() for base in (root, root / "DAVIS")):
            raise DatasetError(f"{error}; that is DAVIS 2016: its kind is davis2016") from error
        raise
    file = split_file(root / "ImageSets" / "2017", split, "list of sequences")
    sequences = [relative_name(line, f"line {number} of '{file}'") for number, line in read_list(file)]
    folder = first_folder([root / _MASKS, root / _UNPROMPTED]) or root / _MASKS
    pictures = _frames(root, images)
    masks = label_files(folder, "the masks of the frames", {".png"})
    listed = set(sequences)
    truths = {
        name: Truth(f"'{path}'", LabelTruth(path, _VOID))
        for name, path in masks.items()
        if name.split("/")[0] in listed
    }
    _check_complete(sequences, [*truths, *pictures.paths], file)
    return assemble(
        f"DAVIS 2017 {split}",
        pictures,
        truths,
        described_by=f"'{file}'",
        expected=f"{sequences[0]}/00000.jpg",
        within=lambda name: name.split("/")[0] in listed,
    )


@dataclass(frozen=True)
class _OneObject:
    path: Path

    def __call__(self) -> TrueInstances:
        values = read_values(self.path)
        others = np.setdiff1d(values, (0, 255))
        if others.size > 1:
            raise DatasetError(
                f"'{self.path}' has the values {', '.join(map(str, others[:6]))}, and masks of DAVIS 2016 have one; "
                "masks of several objects are of DAVIS 2017: their kind is davis2017"
            )
        return TrueInstances.from_labels((values != 0).astype(np.uint8))


def _frames(root: Path, images: Path | None) -> ImageFolder:
    if images is None and not (root / _IMAGES).is_dir():
        raise DatasetError(f"the frames are missing: they belong in '{root / _IMAGES}'; {contents(root)}")
    return list_images(images or root / _IMAGES, "the frames")


def _pair(line: str, where: str) -> tuple[str, str]:
    """Names of frame and mask, from paths below the set's folder that begin with a slash."""
    parts = line.split()
    names = []
    for part, base in zip(parts, (_IMAGES, _MASKS), strict=False):
        path = PurePosixPath(relative_name(part.lstrip("/"), where))
        if not path.is_relative_to(base):
            break
        names.append(path.relative_to(base).with_suffix("").as_posix())
    if len(parts) != 2 or len(names) != 2:
        raise DatasetError(f"{where} is {line!r}, and should be '/{_IMAGES}/<name>.jpg /{_MASKS}/<name>.png'")
    return names[0], names[1]


def _check_complete(sequences: Sequence[str], names: Sequence[str], file: Path) -> None:
    present = {name.split("/")[0] for name in names}
    absent = [sequence for sequence in sequences if sequence not in present]
    if absent:
        raise DatasetError(
            f"'{file}' lists {absent[0]!r}, of which there is neither a frame nor a mask ({len(absent)} of "
            f"{len(sequences)} sequences are missing); unpack the download again"
        )
