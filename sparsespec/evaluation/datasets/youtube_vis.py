"""YouTube-VIS: videos with a mask of each instance in every fifth frame."""

from __future__ import annotations

from pathlib import Path

from sparsespec.evaluation.datasets._video import Layout, open_videos
from sparsespec.evaluation.truth import Dataset

_LAYOUT = Layout(
    title="YouTube-VIS",
    files=(
        "{split}.json",
        "annotations/{split}.json",
        "{split}/instances.json",
        "annotations/instances_{split}.json",
        "instances_{split}_sub.json",
        "annotations/instances_{split}_sub.json",
    ),
    folders=("{split}/JPEGImages", "JPEGImages/{split}", "{split}"),
    archive="{split}.zip",
)


def open_youtube_vis(root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open ``train.json`` and ``train/JPEGImages/``; the 2021 version, with ``train/instances.json``, reads as well."""
    return open_videos(_LAYOUT, root, split, images)
