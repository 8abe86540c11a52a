"""Compare a folder of predicted label images with a folder of true ones."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.metrics import ImageScore, SetScore, score_image, summarise

_LABEL_SUFFIXES = {".png", ".tif", ".tiff"}


@dataclass(frozen=True)
class Report:
    """Measures of a folder, image by image and together.

    Attributes
    ----------
    summary
        The set's measures.
    images
        The score of each image, by its name below the folder, without suffix.
    without_prediction, without_truth
        Names found in one folder only; they are not part of the measures.
    """

    summary: SetScore
    images: dict[str, ImageScore]
    without_prediction: list[str]
    without_truth: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold (a measure without meaning is None)."""
        rows = {
            name: {**asdict(score), "mean_iou": score.mean_iou, "foreground_f": score.foreground_f}
            for name, score in self.images.items()
        }
        return {
            "summary": _finite(asdict(self.summary)),
            "images": {name: _finite(row) for name, row in rows.items()},
            "without_prediction": self.without_prediction,
            "without_truth": self.without_truth,
        }

    def table(self) -> str:
        """The set's measures as text for a terminal."""
        s = self.summary
        lines = [
            f"{'images':<22}{s.images}",
            f"{'true instances':<22}{s.n_true}",
            f"{'predicted instances':<22}{s.n_predicted}",
            f"{'mIoU':<22}{s.mean_iou:.3f}",
            f"{'F1 at IoU 0.5':<22}{s.f1_50:.3f}",
            f"{'foreground F':<22}{s.foreground_f:.3f}",
            f"{'error in the count':<22}{s.count_error:.2f}",
        ]
        for title, names in (("no prediction for", self.without_prediction), ("no truth for", self.without_truth)):
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                lines.append(f"{title:<22}{shown}")
        return "\n".join(lines)


def evaluate_folders(pred_dir: str | os.PathLike[str], truth_dir: str | os.PathLike[str]) -> Report:
    """Compare the label images of two folders, matched by their path below the folder without suffix.

    Parameters
    ----------
    pred_dir
        A folder of label images (PNG or TIFF, 0 is background), or the output folder of a run, which holds ``masks/``.
    truth_dir
        A folder of true label images of the same sizes.

    Raises
    ------
    ValueError
        When a folder is missing or empty, no name is in both, an image can't be read or is not a label image, or the
        sizes of a pair differ.
    """
    predictions, truths = _label_files(pred_dir, "pred_dir"), _label_files(truth_dir, "truth_dir")
    common = sorted(predictions.keys() & truths.keys())
    if not common:
        raise ValueError(
            f"no image of pred_dir {os.fspath(pred_dir)!r} has the name of one in truth_dir {os.fspath(truth_dir)!r}; "
            "names are compared below the folders and without suffix"
        )
    scores: dict[str, ImageScore] = {}
    for name in common:
        predicted, truth = _read_labels(predictions[name]), _read_labels(truths[name])
        if predicted.shape != truth.shape:
            raise ValueError(
                f"the sizes differ: '{predictions[name]}' is {predicted.shape[1]} x {predicted.shape[0]} and "
                f"'{truths[name]}' is {truth.shape[1]} x {truth.shape[0]} pixels"
            )
        scores[name] = score_image(predicted, truth)
    return Report(
        summary=summarise(list(scores.values())),
        images=scores,
        without_prediction=sorted(truths.keys() - predictions.keys()),
        without_truth=sorted(predictions.keys() - truths.keys()),
    )


def _label_files(folder: str | os.PathLike[str], argument: str) -> dict[str, Path]:
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{argument} '{root}' is not a folder; give one that holds label images (PNG or TIFF)")
    if (root / "masks").is_dir():
        root = root / "masks"
    files: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in _LABEL_SUFFIXES and path.is_file():
            name = path.relative_to(root).with_suffix("").as_posix()
            if name in files:
                raise ValueError(f"{argument} has two label images of one name: '{files[name]}' and '{path}'")
            files[name] = path
    if not files:
        raise ValueError(f"{argument} '{root}' holds no label image (PNG or TIFF)")
    return files


def _read_labels(path: Path) -> npt.NDArray[np.integer]:
    try:
        # From memory: a plugin that refuses a file does not always close it.
        labels = np.asarray(iio.imread(path.read_bytes(), extension=path.suffix.lower()))
    except Exception as error:
        raise ValueError(f"cannot read the label image '{path}': {error}") from error
    if labels.ndim != 2 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise ValueError(
            f"'{path}' is not a label image: expected one integer per pixel, got shape {labels.shape} of {labels.dtype}"
        )
    return labels.astype(np.int64)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
