"""Class-agnostic measures of instance masks against true ones, at full image resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment


def iou_matrix(predicted: npt.NDArray[np.integer], truth: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Intersection over union of every predicted with every true instance.

    Parameters
    ----------
    predicted, truth
        (H, W) label images of the same shape; 0 is background, every other value is one instance.

    Returns
    -------
    (n_predicted, n_true) float64 array
        Rows and columns in ascending order of the label values.

    Raises
    ------
    ValueError
        When the shapes differ or are not two-dimensional.

    Examples
    --------
    >>> import numpy as np
    >>> iou_matrix(np.array([[1, 1, 0, 2]]), np.array([[7, 7, 7, 0]])).round(3)
    array([[0.667],
           [0.   ]])
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.ndim != 2 or predicted.shape != truth.shape:
        raise ValueError(
            f"predicted and truth must be label images of one shape (H, W), not {predicted.shape} and {truth.shape}"
        )
    predicted_values, predicted_index = np.unique(predicted, return_inverse=True)
    true_values, true_index = np.unique(truth, return_inverse=True)
    joint = np.bincount(
        predicted_index.ravel() * true_values.size + true_index.ravel(),
        minlength=predicted_values.size * true_values.size,
    ).reshape(predicted_values.size, true_values.size)
    union = joint.sum(axis=1, keepdims=True) + joint.sum(axis=0, keepdims=True) - joint
    iou = joint / union if joint.size else joint.astype(np.float64)
    return np.asarray(iou[predicted_values != 0][:, true_values != 0], dtype=np.float64)


@dataclass(frozen=True)
class ImageScore:
    """What one image contributes to the measures of a set.

    Attributes
    ----------
    n_predicted, n_true
        Instances in each label image.
    matched_iou
        Sum of the IoU over the one-to-one (Hungarian) assignment that makes it largest.
    matches_50
        One-to-one pairs with an IoU of at least 0.5, as many as there can be.
    foreground_precision, foreground_recall
        Of the union of all instances against the union of all true ones, per pixel.
    """

    n_predicted: int
    n_true: int
    matched_iou: float
    matches_50: int
    foreground_precision: float
    foreground_recall: float

    @property
    def mean_iou(self) -> float:
        """Matched IoU divided by the number of true instances; NaN where there is none."""
        return self.matched_iou / self.n_true if self.n_true else math.nan

    @property
    def foreground_f(self) -> float:
        """F1 of the foreground; 1 where neither has any, 0 where one has none."""
        if self.n_predicted == 0 and self.n_true == 0:
            return 1.0
        total = self.foreground_precision + self.foreground_recall
        return 2 * self.foreground_precision * self.foreground_recall / total if total > 0 else 0.0


def score_image(predicted: npt.NDArray[np.integer], truth: npt.NDArray[np.integer]) -> ImageScore:
    """Compare one predicted label image with the true one.

    Instances are matched by the assignment with the largest summed IoU, each used once (Hungarian matching).

    Parameters
    ----------
    predicted, truth
        (H, W) label images of the same shape, 0 is background.

    Raises
    ------
    ValueError
        When the shapes differ.
    """
    iou = iou_matrix(predicted, truth)
    predicted_fg, true_fg = np.asarray(predicted) != 0, np.asarray(truth) != 0
    both = int(np.count_nonzero(predicted_fg & true_fg))
    n_predicted_px, n_true_px = int(np.count_nonzero(predicted_fg)), int(np.count_nonzero(true_fg))
    rows, columns = linear_sum_assignment(iou, maximize=True)
    matched = iou[rows, columns]
    above = linear_sum_assignment(iou >= 0.5, maximize=True) if iou.size else (rows, columns)
    return ImageScore(
        n_predicted=iou.shape[0],
        n_true=iou.shape[1],
        matched_iou=float(matched.sum()),
        matches_50=int(np.count_nonzero(iou[above] >= 0.5)),
        foreground_precision=both / n_predicted_px if n_predicted_px else 0.0,
        foreground_recall=both / n_true_px if n_true_px else 0.0,
    )


@dataclass(frozen=True)
class SetScore:
    """The measures of a set of images.

    Attributes
    ----------
    images
        How many images were compared.
    mean_iou
        Mean over the images with true instances of :attr:`ImageScore.mean_iou`.
    f1_50
        F1 of instances over the whole set, a match being an IoU of at least 0.5.
    foreground_f
        Mean over the images of :attr:`ImageScore.foreground_f`.
    count_error
        Mean absolute difference of the number of instances.
    n_predicted, n_true
        Instances over the whole set.
    """

    images: int
    mean_iou: float
    f1_50: float
    foreground_f: float
    count_error: float
    n_predicted: int
    n_true: int


def summarise(scores: list[ImageScore]) -> SetScore:
    """Put the scores of single images together.

    Raises
    ------
    ValueError
        When there are none.
    """
    if not scores:
        raise ValueError("scores is empty: there is no image to summarise")
    n_predicted = sum(s.n_predicted for s in scores)
    n_true = sum(s.n_true for s in scores)
    matches = sum(s.matches_50 for s in scores)
    with_truth = [s.mean_iou for s in scores if s.n_true]
    return SetScore(
        images=len(scores),
        mean_iou=float(np.mean(with_truth)) if with_truth else math.nan,
        f1_50=2 * matches / (n_predicted + n_true) if n_predicted + n_true else 1.0,
        foreground_f=float(np.mean([s.foreground_f for s in scores])),
        count_error=float(np.mean([abs(s.n_predicted - s.n_true) for s in scores])),
        n_predicted=n_predicted,
        n_true=n_true,
    )
