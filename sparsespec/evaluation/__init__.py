"""Measures of instance masks against true ones."""

from sparsespec.evaluation.average_precision import MissingPackageError
from sparsespec.evaluation.folders import evaluate, evaluate_folders
from sparsespec.evaluation.intervals import Interval, bootstrap, bootstrap_all, bootstrap_difference
from sparsespec.evaluation.metrics import MEASURES, ImageScore, SetScore, iou_matrix, score_image, summarise
from sparsespec.evaluation.report import Report, measure
from sparsespec.evaluation.truth import Dataset, Example, TrueInstances

__all__ = [
    "MEASURES",
    "Dataset",
    "Example",
    "ImageScore",
    "Interval",
    "MissingPackageError",
    "Report",
    "SetScore",
    "TrueInstances",
    "bootstrap",
    "bootstrap_all",
    "bootstrap_difference",
    "evaluate",
    "evaluate_folders",
    "iou_matrix",
    "measure",
    "score_image",
    "summarise",
]
