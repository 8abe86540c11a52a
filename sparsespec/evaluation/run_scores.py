"""Scores of the instances in the label images of a run, out of its ``instances.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.batch.names import output_names, page_name, result_name

_MOST_LABELS = 65_535
"""What a label image of a run can tell apart."""


@dataclass(frozen=True)
class _Image:
    width: int
    height: int
    instances: dict[int, tuple[float, int]]
    """Score and area by label."""


@dataclass(frozen=True)
class RunScores:
    """What ``instances.json`` says about the label images beside it.

    Attributes
    ----------
    path
        The file.
    images
        By name of the label image: the image's path without its ending, or with it.
    """

    path: Path
    images: Mapping[str, _Image]

    def of(self, name: str, labels: npt.NDArray[np.integer], mask: Path) -> npt.NDArray[np.float64]:
        """Scores of the labels 1..n of one label image.

        Parameters
        ----------
        name
            The label image's path below ``masks/``, without its ending.
        labels
            (H, W), what it holds.
        mask
            Its file, for messages.

        Raises
        ------
        ValueError
            The file doesn't know the image, or says something else about its size, its instances or their areas.
        """
        if name not in self.images:
            raise ValueError(f"'{self.path}' lists no image for the mask '{mask}'")
        image = self.images[name]
        if labels.shape != (image.height, image.width):
            raise ValueError(
                f"the sizes differ: '{self.path}' says {image.width} x {image.height}, "
                f"and the mask '{mask}' is {labels.shape[1]} x {labels.shape[0]} pixels"
            )
        values, areas = np.unique(labels[labels != 0], return_counts=True)
        in_mask = dict(zip(values.tolist(), areas.tolist(), strict=True))
        for label in sorted(in_mask.keys() | image.instances.keys()):
            listed = image.instances.get(label, (0.0, 0))[1]
            if in_mask.get(label, 0) != listed:
                raise ValueError(
                    f"'{self.path}' doesn't fit the mask '{mask}': instance {label} has {listed} pixels in the one "
                    f"and {in_mask.get(label, 0)} in the other; both must be of the same run"
                )
        scores = np.zeros(max(in_mask, default=0))
        for label, (score, _) in image.instances.items():
            scores[label - 1] = score
        return scores


def read_run_scores(path: Path) -> RunScores:
    """Read the ``instances.json`` of a run.

    Raises
    ------
    ValueError
        It can't be read, is no JSON, or is JSON of another kind; the message names the file.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read '{path}' as JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"cannot read '{path}' as JSON: it is nested too deeply") from error
    try:
        return RunScores(path, _images(content))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"'{path}' is not the instances.json of a run, which has 'images' with id, file_name, width and height and "
            f"'annotations' with image_id, label, score and area: {reason}"
        ) from error


def _images(content: Any) -> dict[str, _Image]:
    by_id: dict[Any, _Image] = {}
    by_path: dict[tuple[str, int | None], _Image] = {}
    for entry in content["images"]:
        number, path, page = entry["id"], entry["file_name"], entry.get("page")
        if not isinstance(path, str):
            raise ValueError(f"file_name {path!r} is no text")
        if page is not None and (type(page) is not int or page < 1):
            raise ValueError(f"page {page!r} of '{path}' is no whole number from 1")
        if number in by_id or (path, page) in by_path:
            raise ValueError(f"image {number!r} is listed twice" if number in by_id else f"{path!r} is listed twice")
        by_id[number] = by_path[path, page] = _Image(int(entry["width"]), int(entry["height"]), {})
    for entry in content["annotations"]:
        if entry["image_id"] not in by_id:
            raise ValueError(f"an instance is of image {entry['image_id']!r}, which is not listed")
        label, score, area = int(entry["label"]), float(entry["score"]), int(entry["area"])
        instances = by_id[entry["image_id"]].instances
        if not 1 <= label <= _MOST_LABELS or area < 1 or not math.isfinite(score):
            raise ValueError(f"an instance has label {label}, area {area} and score {score}")
        if label in instances:
            raise ValueError(f"image {entry['image_id']!r} has two instances of label {label}")
        instances[label] = (score, area)
    # The label image of a/x.jpg is a/x.png; where that is taken by another image's, it is a/x.jpg.png. Images without
    # a result are not listed, so that one of either name is looked for, and last by what those listed make of it.
    paths = list(dict.fromkeys(path for path, _ in by_path))
    numbered = dict(zip(paths, output_names(paths), strict=True))
    found: dict[str, _Image] = {}
    for name_of in (lambda path: numbered[path], result_name, lambda path: result_name(path, with_ending=True)):
        found |= {
            name_of(path) if page is None else page_name(name_of(path), path, page): image
            for (path, page), image in by_path.items()
        }
    return found
