"""Measures of instance masks against true ones."""

from sparsespec.evaluation.folders import Report, evaluate_folders
from sparsespec.evaluation.metrics import ImageScore, SetScore, iou_matrix, score_image, summarise

__all__ = ["ImageScore", "Report", "SetScore", "evaluate_folders", "iou_matrix", "score_image", "summarise"]
