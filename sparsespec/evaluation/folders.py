"""Compare a folder of predicted label images with what is true."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import numpy.typing as npt

from sparsespec.batch.names import result_name
from sparsespec.evaluation.report import Prediction, Report, measure
from sparsespec.evaluation.run_scores import read_run_scores
from sparsespec.evaluation.truth import Dataset, TrueInstances

_LABEL_SUFFIXES = {".png", ".tif", ".tiff"}
_INSTANCES = "instances.json"


def evaluate_folders(pred_dir: str | os.PathLike[str], truth_dir: str | os.PathLike[str]) -> Report:
    """Compare the label images of two folders, matched by their path below the folder without suffix.

    Parameters
    ----------
    pred_dir
        A folder of label images (PNG or TIFF, 0 is background), or the output folder of a run, which holds ``masks/``
        and the scores in ``instances.json``. Without scores all instances rank equal, and average precision is only
        approximate.
    truth_dir
        A folder of true label images of the same sizes.

    Raises
    ------
    ValueError
        When a folder is missing or empty, no name is in both, an image can't be read or is not a label image, the
        sizes of a pair differ, or ``instances.json`` is broken or doesn't fit the masks.
    """
    predictions = _Predictions(pred_dir)
    truths = _label_files(truth_dir, "truth_dir")
    common = sorted(predictions.files.keys() & truths.keys())
    if not common:
        raise ValueError(
            f"no image of pred_dir {os.fspath(pred_dir)!r} has the name of one in truth_dir {os.fspath(truth_dir)!r}; "
            "names are compared below the folders and without suffix"
        )

    def pairs() -> Iterator[Prediction]:
        for name in common:
            labels, scores = predictions.read(name)
            truth = _read_labels(truths[name])
            _check_sizes(labels, predictions.files[name], truth, truths[name])
            yield name, labels, scores, truth

    return dataclasses.replace(
        measure(pairs()),
        without_prediction=sorted(truths.keys() - predictions.files.keys()),
        without_truth=sorted(predictions.files.keys() - truths.keys()),
    )


def evaluate(dataset: Dataset, pred_dir: str | os.PathLike[str]) -> Report:
    """Compare a folder of predicted label images with the truth of a data set.

    Parameters
    ----------
    dataset
        Images and what is true of them.
    pred_dir
        As in :func:`evaluate_folders`. The label image of an example is found by the example's name.

    Raises
    ------
    ValueError
        As in :func:`evaluate_folders`, and what the data set raises where a truth can't be read.
    """
    predictions = _Predictions(pred_dir)
    known = {example.name for example in dataset}
    if not known & predictions.files.keys():
        example = f", such as '{min(known)}'" if known else ""
        raise ValueError(
            f"no label image in pred_dir {os.fspath(pred_dir)!r} has the name of one of the {len(known)} images of "
            f"{dataset.name}{example}; names are compared below the folders and without suffix"
        )

    def pairs() -> Iterator[Prediction]:
        for example in dataset:
            if example.name in predictions.files:
                labels, scores = predictions.read(example.name)
                truth = example.load()
                _check_sizes(labels, predictions.files[example.name], truth, example.image)
                yield example.name, labels, scores, truth

    return dataclasses.replace(
        measure(pairs()),
        without_prediction=sorted(known - predictions.files.keys()),
        without_truth=sorted({*dataset.without_truth, *(predictions.files.keys() - known)}),
        without_image=sorted(dataset.without_image),
    )


def _check_sizes(
    labels: npt.NDArray[np.integer], file: Path, truth: npt.NDArray[np.integer] | TrueInstances, truth_file: Path
) -> None:
    if labels.shape != truth.shape:
        raise ValueError(
            f"the sizes differ: '{file}' is {labels.shape[1]} x {labels.shape[0]} and "
            f"'{truth_file}' is {truth.shape[1]} x {truth.shape[0]} pixels"
        )


class _Predictions:
    """The label images of a folder, with their scores where a run left them."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.files = _label_files(folder, "pred_dir")
        record = Path(folder) / _INSTANCES
        # Beside masks/ it is a run's; elsewhere it may be anything.
        self._scores = read_run_scores(record) if (Path(folder) / "masks").is_dir() and record.is_file() else None

    def read(self, name: str) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.float64] | None]:
        """Labels, and the scores of the labels 1..n if there are any."""
        labels = _read_labels(self.files[name])
        return labels, None if self._scores is None else self._scores.of(name, labels, self.files[name])


def _label_files(folder: str | os.PathLike[str], argument: str) -> dict[str, Path]:
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{argument} '{root}' is not a folder; give one that holds label images (PNG or TIFF)")
    if (root / "masks").is_dir():
        root = root / "masks"
    files: dict[str, Path] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in _LABEL_SUFFIXES and path.is_file():
            name = result_name(path.relative_to(root).as_posix())
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
    return labels
