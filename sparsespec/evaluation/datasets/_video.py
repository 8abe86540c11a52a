"""Videos whose annotations hold a mask for each frame, in the layout of YouTube-VIS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsespec.batch.names import result_name
from sparsespec.evaluation.datasets._common import (
    DatasetError,
    Truth,
    assemble,
    check_memory,
    contents,
    first_file,
    first_folder,
    list_images,
    relative_name,
    set_root,
)
from sparsespec.evaluation.datasets._json import by_id, entries, grouped, read_annotations, unique_ids, whole
from sparsespec.evaluation.datasets._masks import decode_segmentation
from sparsespec.evaluation.truth import Dataset, TrueInstances


@dataclass(frozen=True)
class Layout:
    """Where a set keeps what, with ``{split}`` for the part of the set; the first of several places is the official.

    Attributes
    ----------
    title
        Name of the set.
    files
        Annotations.
    folders
        Folder that the paths in the annotations are relative to.
    archive
        What the frames are published in.
    """

    title: str
    files: Sequence[str]
    folders: Sequence[str]
    archive: str


def open_videos(layout: Layout, root: Path, split: str | None, images: Path | None) -> Dataset:
    """Open every frame of the videos as an image; instances that a frame doesn't show are left out of its truth."""
    if root.suffix.lower() == ".json" and root.is_file():
        if images is None:
            raise DatasetError(f"'{root}' is a file of annotations; give the folder of its frames too")
        if split is not None:
            raise DatasetError(f"'{root}' is a file of annotations, which is one split; leave out the split {split!r}")
        file, name = root, f"{layout.title} {root.stem}"
    else:
        split = split or "train"
        places = [place.format(split=split) for place in layout.files]
        belongs = f"the annotations {places[0]} and the frames in {layout.folders[0].format(split=split)}/"
        root = set_root(
            root,
            lambda folder: first_file(folder / place for place in places) is not None,
            belongs,
            shown=("annotations", split),
        )
        file, name = first_file(root / place for place in places) or root / places[0], f"{layout.title} {split}"
    data = read_annotations(file)
    videos = _videos(data, file, layout)
    numbers = by_id(videos, "videos", file)
    annotations = entries(data, "annotations", file)
    unique_ids(annotations, "annotations", file)
    groups = grouped(annotations, "video_id", numbers, file)
    if images is None:
        folders = [folder.format(split=split) for folder in layout.folders]
        images = first_folder(root / folder for folder in folders)
        if images is None:
            raise DatasetError(
                f"the frames of '{file}' are missing: they belong in '{root / folders[0]}' (of "
                f"{layout.archive.format(split=split)}); {contents(root)}"
            )
    pictures = list_images(images, f"the frames of '{file}'")
    truths, missing = {}, []
    seen: set[str] = set()
    for number, video in numbers.items():
        where = f"video {number} of '{file}'"
        height, width = whole(video, "height", where, 1), whole(video, "width", where, 1)
        tracks = groups.get(number, [])
        _check_lengths(video, tracks, where, file)
        for frame, frame_name in enumerate(video["file_names"]):
            path = relative_name(frame_name, where)
            if path in seen:
                raise DatasetError(f"'{file}' lists the frame {path!r} twice")
            seen.add(path)
            if path in pictures.names:
                shown = [(track["id"], track["segmentations"][frame]) for track in tracks]
                load = _FrameTruth(file, frame, height, width, tuple(shown), _crowds(tracks))
                truths[pictures.names[path]] = Truth(f"frame {frame} of {where}", load, (height, width))
            else:
                missing.append(result_name(path))
    first = next((video["file_names"][0] for video in videos if video["file_names"]), "")
    return assemble(name, pictures, truths, described_by=f"'{file}'", without_image=missing, expected=first)


@dataclass(frozen=True)
class _FrameTruth:
    file: Path
    frame: int
    height: int
    width: int
    shown: Sequence[tuple[int, Any]]
    crowds: Sequence[bool]

    def __call__(self) -> TrueInstances:
        masks, crowds = [], []
        shown = sum(segmentation is not None for _, segmentation in self.shown)
        check_memory(shown, (self.height, self.width), f"frame {self.frame} of a video of '{self.file}'")
        for (number, segmentation), crowd in zip(self.shown, self.crowds, strict=True):
            if segmentation is None:
                continue
            try:
                mask = decode_segmentation(segmentation, self.height, self.width)
            except ValueError as error:
                where = f"annotation {number} of '{self.file}', frame {self.frame}"
                raise DatasetError(f"{where}: {error}") from error
            # Some annotations say "not in this frame" with runs that hold no pixel.
            if mask.any():
                masks.append(mask)
                crowds.append(crowd)
        stack = np.array(masks, bool).reshape(-1, self.height, self.width)
        return TrueInstances(stack, np.array(crowds, bool))


def _videos(data: dict[str, Any], file: Path, layout: Layout) -> list[dict[str, Any]]:
    if "videos" not in data and "images" in data:
        raise DatasetError(f"'{file}' holds annotations of single images, and no videos: its kind is coco")
    videos = entries(data, "videos", file)
    if data.get("annotations") is None:
        raise DatasetError(
            f"'{file}' lists videos and says nothing about them: the truth of the validation and test videos of "
            f"{layout.title} was never published; use the split train"
        )
    for video in videos:
        names = video.get("file_names")
        where = f"video {video['id']} of '{file}'"
        if not isinstance(names, list) or not names:
            raise DatasetError(f"{where} has no list of file_names")
        if video.get("length", len(names)) != len(names):
            raise DatasetError(f"{where} has the length {video['length']!r} and names {len(names)} frames")
    return videos


def _check_lengths(video: dict[str, Any], tracks: list[dict[str, Any]], where: str, file: Path) -> None:
    for track in tracks:
        masks = track.get("segmentations")
        if not isinstance(masks, list):
            raise DatasetError(f"annotation {track['id']} of '{file}' has no list of segmentations, one for each frame")
        if len(masks) != len(video["file_names"]):
            raise DatasetError(
                f"annotation {track['id']} of '{file}' has {len(masks)} segmentations, and {where} has "
                f"{len(video['file_names'])} frames"
            )


def _crowds(tracks: list[dict[str, Any]]) -> tuple[bool, ...]:
    return tuple(track.get("iscrowd", 0) == 1 for track in tracks)
