"""Class-agnostic measures of instance masks against true ones, at full image resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from sparsespec.evaluation.average_precision import ImageRanking, Rankings, rank_image
from sparsespec.evaluation.truth import TrueInstances

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MEASURES = (
    "mean_iou",
    "f1_50",
    "ap",
    "ap_50",
    "ap_75",
    "ar_100",
    "foreground_f",
    "foreground_iou",
    "count_error",
    "false_on_empty",
)
"""The measures of a set that :class:`SetScore` holds."""

_RANKED = ("ap", "ap_50", "ap_75", "ar_100")
# Above it, looking up every pixel's value in a table would take more memory than sorting them.
_LARGEST_LOOKUP = 1 << 16


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
    overlap = _overlap_of_labels(predicted, truth)
    return overlap.iou


@dataclass(frozen=True, eq=False)
class _Overlap:
    """How the predicted and the true instances of one image lie, in pixels that somebody judged."""

    values: IntArray
    """(p,) what the predicted instances are in the label image, rising."""
    areas: IntArray
    """(p,) at least 1."""
    shared: IntArray
    """(p, t) with every true instance that has a pixel, crowds included."""
    true_areas: IntArray
    """(t,) at least 1."""
    crowd: BoolArray
    """(t,)."""
    in_crowd: IntArray
    """(p,) in any crowd region."""
    foreground: tuple[int, int, int]
    """Pixels predicted, true and both; crowd regions left out."""

    @cached_property
    def iou(self) -> npt.NDArray[np.float64]:
        """(p, t') with the true instances that are no crowd."""
        counts = ~self.crowd
        shared = self.shared[:, counts]
        return np.asarray(shared / (self.areas[:, None] + self.true_areas[counts] - shared), dtype=np.float64)


def _index(labels: npt.NDArray[np.integer]) -> tuple[IntArray, npt.NDArray[np.integer]]:
    """Rising values of an image, 0 always among them, and for each pixel the position of its value."""
    if labels.dtype == bool:
        labels = labels.view(np.uint8)
    if labels.size and (labels.min() < 0 or labels.max() > _LARGEST_LOOKUP):
        values, index = np.unique(np.append(labels.ravel(), labels.dtype.type(0)), return_inverse=True)
        return values.astype(np.int64), index[:-1].reshape(labels.shape)
    present = np.bincount(labels.ravel().astype(np.intp), minlength=1) > 0
    present[0] = True
    values = np.flatnonzero(present)
    # Half the memory of what NumPy counts with: a label image may have hundreds of millions of pixels.
    return values, (np.cumsum(present, dtype=np.int32) - 1)[labels]


def _overlap_of_labels(predicted: npt.NDArray[np.integer], truth: npt.NDArray[np.integer]) -> _Overlap:
    """Without a mask for each true instance, of which a label image may hold thousands."""
    values, index = _index(predicted)
    true_values, true_index = _index(truth)
    pairs = index.ravel().astype(np.int64) * true_values.size
    pairs += true_index.ravel()
    joint = np.bincount(pairs, minlength=values.size * true_values.size).reshape(values.size, true_values.size)
    rows, columns = values != 0, true_values != 0
    shared = joint[rows][:, columns]
    return _Overlap(
        values=values[rows],
        areas=joint[rows].sum(axis=1),
        shared=shared,
        true_areas=joint[:, columns].sum(axis=0),
        crowd=np.zeros(shared.shape[1], bool),
        in_crowd=np.zeros(shared.shape[0], np.int64),
        foreground=(int(joint[rows].sum()), int(joint[:, columns].sum()), int(shared.sum())),
    )


def _overlap_of_masks(predicted: npt.NDArray[np.integer], truth: TrueInstances) -> _Overlap:
    values, index = _index(predicted)
    background = int(np.searchsorted(values, 0))
    if truth.void is not None:
        index = np.where(truth.void, background, index)
    shared = np.zeros((len(truth.masks), values.size), np.int64)
    true_fg, crowd_fg = np.zeros(index.shape, bool), np.zeros(index.shape, bool)
    for row, mask, crowd in zip(shared, truth.masks, truth.crowd, strict=True):
        judged = mask if truth.void is None else mask & ~truth.void
        row[:] = np.bincount(index[judged], minlength=values.size)
        union = crowd_fg if crowd else true_fg
        union |= judged
    crowd_fg &= ~true_fg
    all_areas = np.bincount(index.ravel(), minlength=values.size)
    in_crowd, in_true = (np.bincount(index[region], minlength=values.size) for region in (crowd_fg, true_fg))
    # An instance without a pixel that somebody judged is neither found nor missed, on either side.
    rows, columns = (all_areas > 0) & (values != 0), shared.any(axis=1)
    return _Overlap(
        values=values[rows],
        areas=all_areas[rows],
        shared=shared[columns][:, rows].T,
        true_areas=shared[columns].sum(axis=1),
        crowd=truth.crowd[columns],
        in_crowd=in_crowd[rows],
        foreground=(
            int((all_areas - in_crowd)[rows].sum()),
            int(in_true.sum()),
            int(in_true[rows].sum()),
        ),
    )


@dataclass(frozen=True)
class ImageScore:
    """What one image contributes to the measures of a set.

    Attributes
    ----------
    n_predicted, n_true
        Instances that count: those with a pixel that is not void; of the predicted ones none that is in a crowd.
    matched_iou
        Sum of the IoU over the one-to-one (Hungarian) assignment that makes it largest.
    matches_50
        One-to-one pairs with an IoU of at least 0.5, as many as there can be.
    foreground_predicted, foreground_true, foreground_both
        Pixels in the union of all predicted instances, of all true ones, and in both; void and crowds left out.
    n_in_crowd
        Predicted instances that match no true one at 0.5 and have more than half of their pixels in crowd regions.
    ranking
        What average precision needs to know, where it was asked for.
    """

    n_predicted: int
    n_true: int
    matched_iou: float
    matches_50: int
    foreground_predicted: int
    foreground_true: int
    foreground_both: int
    n_in_crowd: int = 0
    ranking: ImageRanking | None = field(default=None, compare=False, repr=False)

    @property
    def mean_iou(self) -> float:
        """Matched IoU divided by the number of true instances; NaN where there is none."""
        return self.matched_iou / self.n_true if self.n_true else math.nan

    @property
    def foreground_precision(self) -> float:
        """Share of the predicted foreground that is true; 0 where none was predicted."""
        return self.foreground_both / self.foreground_predicted if self.foreground_predicted else 0.0

    @property
    def foreground_recall(self) -> float:
        """Share of the true foreground that was predicted; 0 where there is none."""
        return self.foreground_both / self.foreground_true if self.foreground_true else 0.0

    @property
    def foreground_f(self) -> float:
        """F1 of the foreground; 1 where neither has any, 0 where one has none."""
        total = self.foreground_predicted + self.foreground_true
        return 2 * self.foreground_both / total if total else 1.0

    @property
    def foreground_iou(self) -> float:
        """Intersection over union of the foreground; 1 where neither has any, 0 where one has none."""
        union = self.foreground_predicted + self.foreground_true - self.foreground_both
        return self.foreground_both / union if union else 1.0

    def to_dict(self) -> dict[str, float | int]:
        """Every number, the derived ones too; the ranking is left out."""
        return {
            "n_predicted": self.n_predicted,
            "n_true": self.n_true,
            "mean_iou": self.mean_iou,
            "matched_iou": self.matched_iou,
            "matches_50": self.matches_50,
            "foreground_f": self.foreground_f,
            "foreground_iou": self.foreground_iou,
            "foreground_precision": self.foreground_precision,
            "foreground_recall": self.foreground_recall,
            "foreground_predicted": self.foreground_predicted,
            "foreground_true": self.foreground_true,
            "foreground_both": self.foreground_both,
            "n_in_crowd": self.n_in_crowd,
        }


def score_image(
    predicted: npt.NDArray[np.integer],
    truth: npt.NDArray[np.integer] | TrueInstances,
    scores: npt.ArrayLike | None = None,
    *,
    ranking: bool = False,
) -> ImageScore:
    """Compare one predicted label image with what is true.

    Instances are matched by the assignment with the largest summed IoU, each used once (Hungarian matching). Void
    pixels are taken out of both sides first; then an instance without a pixel, on either side, is not there.

    Parameters
    ----------
    predicted
        (H, W) label image, 0 is background.
    truth
        Label image of the same shape, or true instances, which may overlap.
    scores
        (n,) finite, of the labels 1..n: ``scores[k - 1]`` belongs to label k. Without them all rank equal, in the order
        of their labels. They matter for the ranking only.
    ranking
        Prepare the image for average precision (needs pycocotools).

    Raises
    ------
    ValueError
        When the shapes differ, or a label has no score.
    MissingPackageError
        The ranking is asked for and pycocotools is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> score = score_image(np.array([[1, 1, 0, 2]]), np.array([[7, 7, 7, 0]]))
    >>> score.n_predicted, score.n_true, round(score.mean_iou, 3), score.foreground_both
    (2, 1, 0.667, 2)
    """
    predicted = np.asarray(predicted)
    truth = truth if isinstance(truth, TrueInstances) else np.asarray(truth)
    if predicted.ndim != 2 or predicted.shape != truth.shape:
        raise ValueError(f"predicted and truth must be of one shape (H, W), not {predicted.shape} and {truth.shape}")
    if isinstance(truth, TrueInstances):
        overlap = _overlap_of_masks(predicted, truth)
    else:
        overlap = _overlap_of_labels(predicted, truth)
    confidence = _confidence(overlap.values, scores)

    iou = overlap.iou
    matched = iou[linear_sum_assignment(iou, maximize=True)]
    # As many pairs as there can be, and among such choices the one with the largest IoU.
    above = np.where(iou >= 0.5, min(iou.shape) + iou, 0)
    rows, columns = linear_sum_assignment(above, maximize=True)
    hits = iou[rows, columns] >= 0.5
    excused = 2 * overlap.in_crowd > overlap.areas
    excused[rows[hits]] = False
    fg_predicted, fg_true, fg_both = overlap.foreground
    return ImageScore(
        n_predicted=int(np.count_nonzero(~excused)),
        n_true=iou.shape[1],
        matched_iou=float(matched.sum()),
        matches_50=int(np.count_nonzero(hits)),
        foreground_predicted=fg_predicted,
        foreground_true=fg_true,
        foreground_both=fg_both,
        n_in_crowd=int(np.count_nonzero(excused)),
        ranking=rank_image(overlap.shared, overlap.areas, overlap.true_areas, overlap.crowd, confidence)
        if ranking
        else None,
    )


def _confidence(values: IntArray, scores: npt.ArrayLike | None) -> npt.NDArray[np.float64]:
    if scores is None:
        return np.ones(values.size)
    confidence = np.asarray(scores, dtype=np.float64)
    if confidence.ndim != 1 or not np.isfinite(confidence).all():
        raise ValueError(f"scores must be finite numbers, one for each label, not an array of shape {confidence.shape}")
    if values.size and (values[0] < 0 or values[-1] > confidence.size):
        raise ValueError(
            f"labels must lie in 0..{confidence.size}, the number of scores; got {values[0]}..{values[-1]}"
        )
    return confidence[values - 1]


@dataclass(frozen=True)
class SetScore:
    """The measures of a set of images.

    A measure is NaN where it has no meaning, and None where it was not taken.

    Attributes
    ----------
    images
        How many images were compared.
    mean_iou
        Mean over the images with true instances of :attr:`ImageScore.mean_iou`.
    f1_50
        F1 of instances over the whole set, a match being an IoU of at least 0.5.
    foreground_f, foreground_iou
        Means over the images of :attr:`ImageScore.foreground_f` and :attr:`ImageScore.foreground_iou`.
    count_error
        Mean absolute difference of the number of instances.
    false_on_empty
        Of the images without a true instance, the share in which something was predicted; NaN where there is none.
    n_predicted, n_true
        Instances over the whole set.
    n_empty
        Images without a true instance.
    ap, ap_50, ap_75, ar_100
        COCO's average precision and recall, see
        :class:`~sparsespec.evaluation.average_precision.AveragePrecision`; None where an image has no ranking.
    """

    images: int
    mean_iou: float
    f1_50: float
    foreground_f: float
    foreground_iou: float
    count_error: float
    false_on_empty: float
    n_predicted: int
    n_true: int
    n_empty: int
    ap: float | None = None
    ap_50: float | None = None
    ap_75: float | None = None
    ar_100: float | None = None


def summarise(scores: Sequence[ImageScore]) -> SetScore:
    """Put the scores of single images together.

    Raises
    ------
    ValueError
        When there are none.
    """
    return ScoreSet(scores).summary()


class ScoreSet:
    """The scores of many images, ready to be summarised for any choice of them.

    Parameters
    ----------
    scores
        One for each image.

    Raises
    ------
    ValueError
        When there are none.
    """

    def __init__(self, scores: Sequence[ImageScore]) -> None:
        if not scores:
            raise ValueError("scores is empty: there is no image to summarise")
        self._n_predicted = np.array([s.n_predicted for s in scores], np.int64)
        self._n_true = np.array([s.n_true for s in scores], np.int64)
        self._matches = np.array([s.matches_50 for s in scores], np.int64)
        self._mean_iou = np.array([s.mean_iou for s in scores])
        self._foreground_f = np.array([s.foreground_f for s in scores])
        self._foreground_iou = np.array([s.foreground_iou for s in scores])
        rankings = [s.ranking for s in scores if s.ranking is not None]
        self._rankings = Rankings(rankings) if len(rankings) == len(scores) else None

    def __len__(self) -> int:
        return self._n_true.size

    @property
    def measures(self) -> tuple[str, ...]:
        """Those of :data:`MEASURES` that can be taken."""
        return MEASURES if self._rankings else tuple(name for name in MEASURES if name not in _RANKED)

    def summary(self, pick: npt.NDArray[np.integer] | None = None) -> SetScore:
        """Measure the images of these numbers, one of which may occur more than once; all of them once, if None."""
        pick = np.arange(len(self)) if pick is None else np.asarray(pick)
        n_predicted, n_true = self._n_predicted[pick], self._n_true[pick]
        instances = int(n_predicted.sum() + n_true.sum())
        empty = n_true == 0
        ranked = None if self._rankings is None else self._rankings.average_precision(pick)
        return SetScore(
            images=pick.size,
            mean_iou=_mean(self._mean_iou[pick][~empty]),
            f1_50=2 * int(self._matches[pick].sum()) / instances if instances else 1.0,
            foreground_f=_mean(self._foreground_f[pick]),
            foreground_iou=_mean(self._foreground_iou[pick]),
            count_error=_mean(np.abs(n_predicted - n_true)),
            false_on_empty=_mean(n_predicted[empty] > 0),
            n_predicted=int(n_predicted.sum()),
            n_true=int(n_true.sum()),
            n_empty=int(np.count_nonzero(empty)),
            ap=None if ranked is None else ranked.ap,
            ap_50=None if ranked is None else ranked.ap_50,
            ap_75=None if ranked is None else ranked.ap_75,
            ar_100=None if ranked is None else ranked.ar_100,
        )


def _mean(values: npt.NDArray[np.floating | np.integer | np.bool_]) -> float:
    return float(np.mean(values)) if values.size else math.nan
