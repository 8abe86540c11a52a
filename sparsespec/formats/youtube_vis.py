"""Instances of videos in the layout in which YouTube-VIS takes submissions."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from sparsespec._atomic import AtomicFile
from sparsespec.formats.coco import CATEGORY_ID
from sparsespec.formats.tracks import Linker

__all__ = ["YouTubeVisWriter", "video_ids", "videos_path"]

_MAX_JSON_BYTES = 1 << 25
_LARGEST_ID = 2**53 - 1  # what every JSON reader keeps exactly


def videos_path(path: str | os.PathLike[str]) -> Path:
    """Where `YouTubeVisWriter` lists the videos of ``x.json``: in ``x.videos.json`` beside it."""
    return Path(path).with_suffix(".videos.json")


def video_ids(path: str | os.PathLike[str], *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, int]:
    """Read which number each video has in a data set's own list, such as YouTube-VIS' ``valid.json``.

    Parameters
    ----------
    path : str or os.PathLike
        A JSON file with ``{"videos": [{"id": 1, "file_names": ["0043f083b5/00000.jpg", ...]}, ...]}``.
    max_bytes : int
        Largest file to read. Reading one takes up to twenty times as much memory.

    Returns
    -------
    dict
        Number by folder of the frames, in the order of the file. The names are for comparing with those of videos that
        are there: nothing was opened by them, and none leads out of its folder.

    Raises
    ------
    ValueError
        The file is too large or no file, is not JSON, has no videos, or says of one what makes no sense: frames in
        several folders, a path that is absolute or leads upwards, or a number that is none or given twice.
    OSError
        The file cannot be read.
    """
    source = os.fspath(path)
    with open(source, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"'{source}' is no regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"'{source}' has more than {max_bytes} bytes: leave only its list of videos in it")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{source}' is not JSON that can be read: {error}") from error
    videos = data.get("videos") if isinstance(data, dict) else None
    if not isinstance(videos, list) or not videos:
        raise ValueError(f"'{source}' has no list of videos")
    numbers: dict[str, int] = {}
    used: set[int] = set()
    for place, video in enumerate(videos):
        try:
            name, number = _folder_and_id(video)
            if name in numbers or number in used:
                raise ValueError(f"its folder {name!r} or its id {number} is that of another one")
        except ValueError as error:
            raise ValueError(f"'{source}': video {place} of the list: {error}") from error
        numbers[name] = number
        used.add(number)
    return numbers


def _without_waiting(path: str, flags: int) -> int:
    # Opening a pipe would wait for somebody to write into it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _folder_and_id(video: Any) -> tuple[str, int]:
    if not isinstance(video, dict):
        raise ValueError("it is no object")
    number, names = video.get("id"), video.get("file_names")
    if type(number) is not int or not 0 <= number <= _LARGEST_ID:
        raise ValueError("its id is no whole number from 0 to 2**53 - 1")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("it has no file_names")
    folders = {_folder(name) for name in names}
    if len(folders) > 1:
        raise ValueError(f"its frames are in several folders, {' and '.join(repr(f) for f in sorted(folders)[:2])}")
    return folders.pop(), number


def _folder(name: str) -> str:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or not name.isprintable()
        or PureWindowsPath(name).drive
        or len(path.parts) < 2
    ):
        raise ValueError(f"the frame {name[:200]!r} is not given as folder/file")
    return str(path.parent)


@dataclass
class _Track:
    frames: array[int] = field(default_factory=lambda: array("q"))
    places: array[int] = field(default_factory=lambda: array("q"))
    score: float = 0.0


@dataclass
class _Video:
    name: str
    number: int
    linker: Linker
    frames: int = 0
    size: tuple[int, int] = (0, 0)
    tracks: dict[int, _Track] = field(default_factory=dict)


class YouTubeVisWriter:
    """A submission for YouTube-VIS, written as the run goes: the masks of one video wait in an unnamed file.

    Each track of a video is an entry ``{"video_id", "category_id", "score", "segmentations"}`` with a run-length
    encoding, or null, for each frame. Its score is the mean over the frames in which it was seen. A second file (see
    `videos_path`) lists the videos as YouTube-VIS does, with the names of their frames, so that numbers and places in
    the lists of masks can be understood.

    Parameters
    ----------
    path : str or os.PathLike
        Target; it appears with `close`, after the list of videos.
    ids : mapping of str to int, optional
        Numbers of the videos, of `video_ids`, by their folders: by the whole name, or else by the last part of it.
        Others are numbered after the largest of these. Without, videos are numbered from 1 in the order in which they
        come.
    """

    def __init__(self, path: str | os.PathLike[str], *, ids: Mapping[str, int] | None = None) -> None:
        self._ids = dict(ids or {})
        self._next = max(self._ids.values(), default=0) + 1
        self._seen: set[str] = set()
        self._given: set[int] = set()
        self._video: _Video | None = None
        self._entries = 0
        self._masks: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        try:
            self._list = AtomicFile(videos_path(path))
            try:
                self._target = AtomicFile(path)
            except BaseException:
                self._list.discard()
                raise
        except BaseException:
            self._masks.close()
            raise
        self._target.file.write(b"[")
        category = {"id": CATEGORY_ID, "name": "object", "supercategory": "object"}
        self._list.file.write(f'{{"categories": {json.dumps([category])},\n"videos": ['.encode())

    def add(
        self, video: str, frame: str, width: int, height: int, annotations: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """Add the next frame of a video.

        Parameters
        ----------
        video : str
            Name of the video. All its frames are added before the next video begins.
        frame : str
            Name of the frame in its video: the list has it as ``video/frame``.
        width, height : int
            Size of the frame, pixels. 0 for a frame without a result: it takes its place in the lists all the same.
        annotations : sequence of mapping
            Of `sparsespec.formats.instance_annotations`.

        Returns
        -------
        list of int
            The track of each annotation, counting from 1 in each video, see `sparsespec.formats.tracks.Linker`.

        Raises
        ------
        ValueError
            The video was finished before, or a run-length encoding is damaged.
        """
        if self._video is None or self._video.name != video:
            if video in self._seen:
                raise ValueError(f"the frames of video {video!r} do not follow one another")
            self._finish_video()
            self._begin_video(video)
        current = self._video
        assert current is not None
        numbers = current.linker.add(annotations)
        for number, annotation in zip(numbers, annotations, strict=True):
            track = current.tracks.setdefault(number, _Track())
            track.frames.append(current.frames)
            track.places.append(self._masks.tell())
            track.score += annotation["score"]
            self._masks.write(json.dumps(annotation["segmentation"]).encode() + b"\n")
        before = ", " if current.frames else ""
        self._list.file.write((before + json.dumps(f"{video}/{frame}")).encode())
        current.frames += 1
        if current.size == (0, 0):
            current.size = (width, height)
        return numbers

    def close(self) -> None:
        """Finish both files and put them in their places."""
        try:
            self._finish_video()
            self._list.file.write(b"\n]}\n")
            self._target.file.write(b"\n]\n")
            self._list.commit()
            self._target.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        """Give up; files of an earlier run stay as they were. Harmless after `close`."""
        with suppress(OSError):  # closing flushes, which a full disk refuses
            self._masks.close()
        self._list.discard()
        self._target.discard()

    def _begin_video(self, name: str) -> None:
        number = self._ids.get(name, self._ids.get(PurePosixPath(name).name))
        if number is None or number in self._given:
            number, self._next = self._next, self._next + 1
        self._video = _Video(name, number, Linker())
        before = ",\n" if self._seen else "\n"
        self._seen.add(name)
        self._given.add(number)
        self._list.file.write(f'{before}{{"id": {number}, "name": {json.dumps(name)}, "file_names": ['.encode())

    def _finish_video(self) -> None:
        video, self._video = self._video, None
        if video is None:
            return
        width, height = video.size
        self._list.file.write(f'], "length": {video.frames}, "width": {width}, "height": {height}}}'.encode())
        for track in video.tracks.values():
            score = round(track.score / len(track.frames), 6)
            before = ",\n" if self._entries else "\n"
            self._entries += 1
            self._target.file.write(
                f'{before}{{"video_id": {video.number}, "category_id": {CATEGORY_ID}, "score": {score},'
                f' "segmentations": ['.encode()
            )
            following = 0
            for frame, place in zip(track.frames, track.places, strict=True):
                self._masks.seek(place)
                parts = [b"null"] * (frame - following) + [self._masks.readline().rstrip()]
                self._target.file.write((b", " if following else b"") + b", ".join(parts))
                following = frame + 1
            self._target.file.write(b", null" * (video.frames - following) + b"]}")
        self._masks.seek(0)
        self._masks.truncate()
