"""Measure any number of predictions, one image after another, and lay out what came of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.average_precision import MissingPackageError, is_available
from sparsespec.evaluation.intervals import Interval, bootstrap_all
from sparsespec.evaluation.metrics import ImageScore, SetScore, score_image, summarise
from sparsespec.evaluation.truth import TrueInstances

Prediction = tuple[str, npt.NDArray[np.integer], npt.ArrayLike | None, "TrueInstances | npt.NDArray[np.integer]"]
"""Name of an image, its (H, W) labels, the (n,) scores of the labels 1..n or None, and what is true of it."""

_TITLES = {
    "mean_iou": "mIoU",
    "f1_50": "F1 at IoU 0.5",
    "ap": "AP",
    "ap_50": "AP50",
    "ap_75": "AP75",
    "ar_100": "AR100",
    "foreground_f": "foreground F",
    "foreground_iou": "foreground IoU",
    "count_error": "error in the count",
    "false_on_empty": "false on empty",
}
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Report:
    """Measures of a set, image by image and together.

    Attributes
    ----------
    summary
        The set's measures.
    images
        The score of each image, by its name.
    without_prediction, without_truth, without_image
        Names of images that are not part of the measures: true but not predicted, predicted but not true, and true
        ones whose image isn't there.
    notes
        What to know when reading the measures, a sentence each.
    intervals
        Confidence intervals of the measures, by name; empty before :meth:`with_intervals`.
    level
        Confidence of the intervals.
    """

    summary: SetScore
    images: dict[str, ImageScore]
    without_prediction: list[str] = field(default_factory=list)
    without_truth: list[str] = field(default_factory=list)
    without_image: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    intervals: dict[str, Interval] = field(default_factory=dict)
    level: float = 0.95

    def with_intervals(self, *, n: int = 1000, level: float = 0.95, seed: int = 0) -> Report:
        """The same report with confidence intervals over its images.

        Parameters
        ----------
        n, level, seed
            As in :func:`~sparsespec.evaluation.intervals.bootstrap`.
        """
        intervals = bootstrap_all(list(self.images.values()), n=n, level=level, seed=seed)
        return dataclasses.replace(self, intervals=intervals, level=level)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold (a measure without meaning or not taken is None)."""
        values: dict[str, Any] = {
            "summary": _finite(dataclasses.asdict(self.summary)),
            "images": {name: _finite(score.to_dict()) for name, score in self.images.items()},
            "without_prediction": self.without_prediction,
            "without_truth": self.without_truth,
            "without_image": self.without_image,
            "notes": self.notes,
        }
        if self.intervals:
            values["level"] = self.level
            values["intervals"] = {
                name: _finite({"low": interval.low, "high": interval.high}) for name, interval in self.intervals.items()
            }
        return values

    def table(self) -> str:
        """The set's measures as text for a terminal."""
        s = self.summary
        rows = [
            ("images", str(s.images)),
            ("true instances", str(s.n_true)),
            ("predicted instances", str(s.n_predicted)),
        ]
        for name, title in _TITLES.items():
            value = getattr(s, name)
            if value is not None:
                rows.append((title, self._shown(name, value)))
        for title, names in (
            ("no prediction for", self.without_prediction),
            ("no truth for", self.without_truth),
            ("no image for", self.without_image),
        ):
            if names:
                more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
                rows.append((title, ", ".join(names[:_NAMES_SHOWN]) + more))
        lines = [f"{title:<22}{text}" for title, text in rows]
        if self.intervals:
            lines.append(f"in brackets: {100 * self.level:g} % confidence intervals over the images")
        return "\n".join([*lines, *self.notes])

    def _shown(self, name: str, value: float) -> str:
        of_empty = name == "false_on_empty"
        if math.isnan(value):
            return "-  no image is empty" if of_empty else "-"
        digits = 2 if name == "count_error" else 3
        text = f"{value:.{digits}f}"
        if name in self.intervals:
            text += f"  [{self.intervals[name].low:.{digits}f}, {self.intervals[name].high:.{digits}f}]"
        return f"{text}  of {_images(self.summary.n_empty)}" if of_empty else text


def measure(predictions: Iterable[Prediction], *, average_precision: bool | None = None) -> Report:
    """Measure predictions against what is true, one image after another.

    Parameters
    ----------
    predictions
        For each image its name, the (H, W) label image that was predicted, the (n,) scores of its labels 1..n, and
        what is true: :class:`~sparsespec.evaluation.truth.TrueInstances` or a label image. Where the scores of an image
        are None, its instances all rank equal. Only one image is held at a time if this is a generator.
    average_precision
        Take COCO's average precision, for which pycocotools must be installed. None: if it is.

    Raises
    ------
    ValueError
        No prediction, two of one name, shapes that differ, or a label without score; the message names the image.
    MissingPackageError
        `average_precision` is True and pycocotools is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> labels = np.array([[1, 1, 0, 2]])
    >>> report = measure([("a", labels, [0.9, 0.4], labels), ("b", labels, None, np.zeros_like(labels))])
    >>> report.summary.f1_50, report.summary.false_on_empty
    (0.6666666666666666, 1.0)
    """
    ranking = is_available() if average_precision is None else average_precision
    images: dict[str, ImageScore] = {}
    unscored = 0
    for name, labels, scores, truth in predictions:
        if name in images:
            raise ValueError(f"two predictions are called '{name}'")
        try:
            images[name] = score_image(labels, truth, scores, ranking=ranking)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
        unscored += scores is None and images[name].n_predicted > 0
    if not images:
        raise ValueError("predictions is empty: there is no image to measure")
    notes = []
    if not ranking and average_precision is None:
        notes.append(f"AP is left out: {MissingPackageError()}")
    if ranking and unscored:
        which = "the predictions" if unscored == len(images) else f"those of {_images(unscored)}"
        notes.append(f"no scores with {which}: all their instances rank equal, so AP is only approximate")
    return Report(summary=summarise(list(images.values())), images=images, notes=notes)


def _images(number: int) -> str:
    return f"{number} image" + "s" * (number != 1)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
