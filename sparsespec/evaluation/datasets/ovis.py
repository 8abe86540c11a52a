"""OVIS: videos whose instances cover each other."""

from __future__ import annotations

from pathlib import Path

from sparsespec.evaluation.datasets._video import Layout, open_videos
from sparsespec.evaluation.truth import Dataset

_LAYOUT = Layout(
    title="OVIS",
    files=(
        "annotations_{split}.json",
        "annotations/annotations_{split}.json",
        "annotations/{split}.json",
        "{split}.json",
    ),
    folders=("{split}", "Images/{split}"),
    archive="{split}.zip",
)


def open_ovis(root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open ``annotations_train.json`` and ``train/``; how much of an instance is covered is not read."""
    return open_videos(_LAYOUT, root, split, images)
