"""COCO's average precision of scored masks, without regard to what the objects are.

The objects of each image are matched by pycocotools; what is left of an image afterwards is small enough to be put
together again and again, as the bootstrap does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MAX_DETECTIONS = 100
"""Masks of one image that count, those with the highest scores."""

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Intersections over union at which a mask counts as right."""

_RECALLS = np.linspace(0, 1, 101)
_AT_75 = 5


class MissingPackageError(ImportError):
    """pycocotools, which matches masks the way COCO does, is not installed."""

    def __init__(self) -> None:
        super().__init__("average precision needs pycocotools: pip install 'sparsespec[eval]'")


@dataclass(frozen=True, eq=False)
class ImageRanking:
    """The masks of one image by falling score, each right or wrong at every threshold.

    Attributes
    ----------
    scores
        (d,) float64, at most :data:`MAX_DETECTIONS`.
    matched, ignored
        (10, d) bool, a row for each of :data:`THRESHOLDS`: found a true instance; found a crowd region, so that it
        counts neither way.
    n_true
        True instances that are no crowd.
    """

    scores: FloatArray
    matched: BoolArray
    ignored: BoolArray
    n_true: int


@dataclass(frozen=True)
class AveragePrecision:
    """COCO's measures of a set of images; NaN where it has no true instance.

    Attributes
    ----------
    ap
        Mean over :data:`THRESHOLDS` of the precision, averaged over 101 recalls.
    ap_50, ap_75
        The same at the threshold 0.5 and at 0.75.
    ar_100
        Mean over the thresholds of the recall, with at most 100 masks an image.
    """

    ap: float
    ap_50: float
    ap_75: float
    ar_100: float


def is_available() -> bool:
    """Tell whether pycocotools can be imported."""
    try:
        _evaluator()
    except MissingPackageError:
        return False
    return True


def _evaluator() -> Any:
    try:
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingPackageError from error
    return COCOeval


def rank_image(
    intersections: npt.NDArray[np.integer],
    areas: npt.NDArray[np.integer],
    true_areas: npt.NDArray[np.integer],
    crowd: BoolArray,
    scores: FloatArray,
) -> ImageRanking:
    """Match the masks of one image with true ones, best score first, as COCO does.

    Parameters
    ----------
    intersections
        (p, t) pixels that mask and true instance share.
    areas, true_areas
        (p,) and (t,) pixels of each; none is 0.
    crowd
        (t,) regions of many objects: any number of masks may lie in one, and need cover no more than a part of it.
    scores
        (p,) of the masks. Equal ones keep their order.

    Raises
    ------
    MissingPackageError
        pycocotools is not installed.
    """
    order = np.argsort(-scores, kind="stable")[:MAX_DETECTIONS]
    shared, area = intersections[order].astype(np.float64), areas[order, None].astype(np.float64)
    union = np.where(crowd, area, area + true_areas - shared)
    # pycocotools' own matching of one image, which is the part of it that prints nothing and needs no files.
    evaluator = _evaluator()(iouType="segm")
    evaluator.params.maxDets = [MAX_DETECTIONS]
    evaluator.params.iouThrs = THRESHOLDS
    evaluator._gts[1, 1] = [
        {"id": k, "area": float(a), "iscrowd": int(c), "ignore": int(c)}
        for k, (a, c) in enumerate(zip(true_areas, crowd, strict=True), start=1)
    ]
    evaluator._dts[1, 1] = [
        {"id": k, "area": float(areas[i]), "score": float(scores[i])} for k, i in enumerate(order, start=1)
    ]
    evaluator.ious = {(1, 1): shared / union if shared.size else []}
    found = evaluator.evaluateImg(1, 1, [0, math.inf], MAX_DETECTIONS)
    shape = (len(THRESHOLDS), order.size)
    if found is None:
        found = {"dtMatches": np.zeros(shape), "dtIgnore": np.zeros(shape, bool)}
    return ImageRanking(
        scores=np.asarray(scores, np.float64)[order],
        matched=np.asarray(found["dtMatches"]).reshape(shape) > 0,
        ignored=np.asarray(found["dtIgnore"], bool).reshape(shape),
        n_true=int(np.count_nonzero(~crowd)),
    )


class Rankings:
    """The rankings of many images, ready to be put together for any choice of them.

    Parameters
    ----------
    rankings
        One for each image.
    """

    def __init__(self, rankings: Sequence[ImageRanking]) -> None:
        lengths = [r.scores.size for r in rankings]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._n_true = np.array([r.n_true for r in rankings], np.int64)
        nothing = np.zeros((len(THRESHOLDS), 0), bool)
        self._scores = np.concatenate([np.zeros(0), *(r.scores for r in rankings)])
        matched = np.concatenate([nothing, *(r.matched for r in rankings)], axis=1)
        ignored = np.concatenate([nothing, *(r.ignored for r in rankings)], axis=1)
        self._right, self._wrong = matched & ~ignored, ~matched & ~ignored

    def average_precision(self, pick: npt.NDArray[np.integer] | None = None) -> AveragePrecision:
        """Average precision and recall over the images.

        Parameters
        ----------
        pick
            Which images, by number; one may occur more than once. All of them once, if None.
        """
        pick = np.arange(self._n_true.size) if pick is None else np.sort(pick)
        n_true = int(self._n_true[pick].sum())
        if n_true == 0:
            return AveragePrecision(math.nan, math.nan, math.nan, math.nan)
        lengths = self._starts[pick + 1] - self._starts[pick]
        ends = np.cumsum(lengths)
        # The masks of the first image picked, then those of the second: each index is its image's start plus its rank.
        masks = np.arange(lengths.sum()) + np.repeat(self._starts[pick] - (ends - lengths), lengths)
        masks = masks[np.argsort(-self._scores[masks], kind="stable")]
        right = np.cumsum(self._right[:, masks], axis=1, dtype=np.float64)
        wrong = np.cumsum(self._wrong[:, masks], axis=1, dtype=np.float64)
        precision = right / (right + wrong + np.spacing(1))
        # The best precision at this recall or a higher one.
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        precision = np.concatenate([precision, np.zeros((len(THRESHOLDS), 1))], axis=1)
        recall = right / n_true
        at_recalls = np.array([p[np.searchsorted(r, _RECALLS)] for p, r in zip(precision, recall, strict=True)])
        per_threshold = at_recalls.mean(axis=1)
        return AveragePrecision(
            ap=float(per_threshold.mean()),
            ap_50=float(per_threshold[0]),
            ap_75=float(per_threshold[_AT_75]),
            ar_100=float(recall[:, -1].mean()) if masks.size else 0.0,
        )
