"""Readers of the data sets that instance segmentation without labels is reported on.

Each opens a download as it was published: nothing has to be converted. Where something is missing, the error says what
belongs where.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sparsespec.evaluation.datasets._common import DatasetError
from sparsespec.evaluation.datasets.coco import open_coco
from sparsespec.evaluation.datasets.davis import open_davis2016, open_davis2017
from sparsespec.evaluation.datasets.labels import open_labels
from sparsespec.evaluation.datasets.ovis import open_ovis
from sparsespec.evaluation.datasets.penn_fudan import open_penn_fudan
from sparsespec.evaluation.datasets.voc import open_voc
from sparsespec.evaluation.datasets.youtube_vis import open_youtube_vis
from sparsespec.evaluation.truth import Dataset

__all__ = ["KINDS", "DatasetError", "open_dataset"]

_Reader = Callable[[Path, str | None, Path | None], Dataset]

_READERS: dict[str, _Reader] = {
    "labels": open_labels,
    "coco": open_coco,
    "youtube-vis": open_youtube_vis,
    "ovis": open_ovis,
    "voc": open_voc,
    "davis2016": open_davis2016,
    "davis2017": open_davis2017,
    "penn-fudan": open_penn_fudan,
}

KINDS: tuple[str, ...] = tuple(_READERS)
"""What :func:`open_dataset` can read."""


def open_dataset(
    kind: str,
    root: str | os.PathLike[str],
    *,
    split: str | None = None,
    images: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Open a data set as it was published.

    Lists of images and JSON are read now, the truth of an image when it is asked for.

    Parameters
    ----------
    kind
        One of `KINDS`.
    root
        The unpacked download. For the kinds described by JSON the annotation file itself will do, with `images`.
    split
        Part of the set, such as ``"val"``. By default the one that results are usually given for, or the only one
        there is.
    images
        Folder of the images, where it isn't in its place below `root`. Names are paths below it.

    Returns
    -------
    Dataset
        Its images are called what ``sparsespec run`` over the image folder calls their masks: path and name below that
        folder, without suffix unless two images differ in nothing else.

    Raises
    ------
    DatasetError
        An unknown kind or split; a folder or file that is missing, with what belongs there; JSON of another kind or
        cut short; names that occur twice or lead out of the folder. Loading the truth of an image raises it too: a
        mask that can't be read or decoded, or one of another size than the image.
    """
    if kind not in _READERS:
        raise DatasetError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    return _READERS[kind](Path(root), split, None if images is None else Path(images))
