"""What the readers share: images and their names, label images, and errors that say what belongs where."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import imageio.v3 as iio
import numpy as np
import numpy.typing as npt

from sparsespec.batch.inputs import InputsError, find_inputs
from sparsespec.batch.names import output_names, result_name
from sparsespec.evaluation.truth import Dataset, Example, TrueInstances
from sparsespec.images import _own_process_state, open_image

LABEL_SUFFIXES = frozenset({".png", ".tif", ".tiff"})
"""File name endings (lower case) of label images."""

_ARCHIVE_SUFFIXES = frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"})
_SHOWN = 6
_MOST_BYTES = 1 << 32
_ORIENTATION_TAG = 274


class DatasetError(ValueError):
    """A data set that can't be read as it is: which file or folder, what is wrong with it, what belongs there."""


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, as a run over it finds and names them.

    Attributes
    ----------
    root
        The folder.
    names
        What the results of each image are called, by its path below the folder; in the order of a run.
    """

    root: Path
    names: Mapping[str, str]

    @cached_property
    def paths(self) -> dict[str, str]:
        """The path of each image below the folder, by name."""
        return {name: path for path, name in self.names.items()}


@dataclass(frozen=True)
class Truth:
    """Where the truth of an image comes from.

    Attributes
    ----------
    source
        What it is called in errors.
    load
        Reads it.
    shape
        Height and width, where they are known without reading it.
    """

    source: str
    load: Callable[[], TrueInstances]
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class _SizeChecked:
    """The truth of an image, refused where it hasn't the size of the image."""

    image: Path
    truth: Truth

    def __call__(self) -> TrueInstances:
        shape, turned = image_size(self.image)
        # A size that is only claimed is checked before masks of it are made.
        if self.truth.shape is not None:
            self._check(self.truth.shape, shape, turned)
        instances = self.truth.load()
        self._check(instances.shape, shape, turned)
        return instances

    def _check(self, ours: tuple[int, int], image: tuple[int, int], turned: bool) -> None:
        if ours != image:
            exif = ", turned upright as its EXIF orientation says" if turned else ""
            raise DatasetError(
                f"the sizes differ: the truth of {self.truth.source} is {ours[1]} x {ours[0]} pixels, and the image "
                f"'{self.image}' is {image[1]} x {image[0]}{exif}"
            )


def list_images(folder: Path, what: str) -> ImageFolder:
    """Find the images below a folder; `what` they are goes into the error."""
    if not folder.is_dir():
        raise DatasetError(f"{what}: '{folder}' is not a folder; {contents(folder.parent)}")
    try:
        found = find_inputs(folder)
    except InputsError as error:
        raise DatasetError(f"{what}: '{folder}' has no image in it; {contents(folder)}") from error
    return ImageFolder(folder, dict(zip(found.images, output_names(found.images), strict=True)))


def contents(folder: Path) -> str:
    """Say what a folder holds instead of what was looked for, and which archives wait in it to be unpacked."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return f"'{folder}' cannot be listed, or does not exist"
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    if not visible:
        return f"'{folder}' is empty"
    shown = [entry.name + ("/" if entry.is_dir() else "") for entry in visible]
    archives = [name for name in shown if Path(name).suffix.lower() in _ARCHIVE_SUFFIXES and not name.endswith("/")]
    advice = f"; unpack {some(archives)} there first" if archives else ""
    return f"'{folder}' holds {some(shown)}{advice}"


def some(names: Collection[str]) -> str:
    """List the first few names."""
    first = list(names)[:_SHOWN]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def first_folder(candidates: Iterable[Path]) -> Path | None:
    """Return the first of several places that is a folder."""
    return next((path for path in candidates if path.is_dir()), None)


def first_file(candidates: Iterable[Path]) -> Path | None:
    """Return the first of several places that is a file."""
    return next((path for path in candidates if path.is_file()), None)


def set_root(
    root: Path, is_root: Callable[[Path], bool], belongs: str, inside: Sequence[str] = (), shown: Sequence[str] = ()
) -> Path:
    """Find the folder that holds a set: `root`, or one of the folders `inside` it that the download makes.

    Raises
    ------
    DatasetError
        Neither is; names what `belongs` there, what is there instead, also in the folders `shown`, and the right folder
        where that is near.
    """
    if not root.exists():
        raise DatasetError(f"'{root}' does not exist; give the folder that holds {belongs}; {contents(root.parent)}")
    if not root.is_dir():
        advice = ": unpack it, and give the folder" if root.suffix.lower() in _ARCHIVE_SUFFIXES else ""
        raise DatasetError(f"'{root}' is a file{advice}; give the folder that holds {belongs}")
    for candidate in (root, *(root / name for name in inside)):
        if is_root(candidate):
            return candidate
    near = _near(root, is_root)
    there = "; ".join(contents(folder) for folder in (root, *(root / name for name in shown)) if folder.is_dir())
    advice = f"; it looks as if you meant '{near}'" if near else ""
    raise DatasetError(f"expected in '{root}': {belongs}; {there}{advice}")


def _near(root: Path, is_root: Callable[[Path], bool]) -> Path | None:
    try:
        below = sorted(root.iterdir())[:100]
    except OSError:
        below = []
    for path in (*list(root.absolute().parents)[:3], *below):
        # A neighbour that may not be looked into is no reason to fail.
        with suppress(OSError):
            if path.is_dir() and is_root(path):
                return path
    return None


def split_file(folder: Path, split: str, what: str, remark: str = "") -> Path:
    """Return ``{split}.txt`` of a folder; the error names the splits there are."""
    path = folder / f"{split}.txt"
    if path.is_file():
        return path
    there = sorted(file.stem for file in folder.glob("*.txt"))
    splits = f"there are those of {some(there)}" if there else contents(folder)
    raise DatasetError(f"the {what} of split {split!r} is missing: it belongs in '{path}'; {splits}{remark}")


def read_list(path: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not empty, with their numbers; no two may be the same."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read the list '{path}': {error}") from error
    rows = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DatasetError(f"the list '{path}' is empty")
    seen: dict[str, int] = {}
    for number, line in rows:
        if seen.setdefault(line, number) != number:
            raise DatasetError(f"lines {seen[line]} and {number} of '{path}' are the same: {line!r}")
    return rows


def relative_name(text: Any, where: str) -> str:
    """Check a path that a file of the set names: it must stay below the folder it is relative to."""
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(f"{where} names no file, but {text!r}")
    path = PurePosixPath(text)
    leaves = path.is_absolute() or ".." in path.parts or PureWindowsPath(text).drive or "\\" in text or "\0" in text
    if leaves or not path.parts:
        raise DatasetError(f"{where} names the file {text!r}, which does not lie below the image folder: refused")
    return str(path)


def assemble(
    name: str,
    pictures: ImageFolder,
    truths: Mapping[str, Truth],
    *,
    described_by: str,
    without_image: Iterable[str] = (),
    within: Callable[[str], bool] | None = None,
    expected: str = "",
) -> Dataset:
    """Bring images and truths of the same name together.

    Parameters
    ----------
    name
        Of the set.
    pictures
        The images.
    truths
        By name.
    described_by
        Where the truths come from, for errors.
    without_image
        Names of truths already known to have no image.
    within
        Whether an image, by name, belongs to the part of the set that is opened, so that it should have a truth. By
        default all do.
    expected
        A file that was looked for, to be named where nothing matches.

    Raises
    ------
    DatasetError
        No image has a truth; or one that has is a link to a file outside of the folder.
    """
    examples = []
    for path, image_name in pictures.names.items():
        if image_name in truths:
            truth = truths[image_name]
            image = pictures.root / path
            examples.append(Example(image_name, image, _SizeChecked(image, truth)))
    missing = sorted({*without_image, *(truths.keys() - pictures.paths.keys())})
    if not examples:
        wanted = expected or (missing[0] if missing else "")
        looked_for = f", such as {wanted!r}" if wanted else ""
        raise DatasetError(
            f"none of the images that {described_by} describes{looked_for}, is in '{pictures.root}'; "
            f"the images there are {some(list(pictures.names))}"
        )
    return Dataset(
        name=name,
        examples=tuple(examples),
        without_truth=tuple(n for n in pictures.names.values() if n not in truths and (within is None or within(n))),
        without_image=tuple(missing),
    )


def check_memory(count: int, shape: tuple[int, int], where: str) -> None:
    """Refuse more masks of one image than any image has, before there are as many."""
    if count * shape[0] * shape[1] > _MOST_BYTES:
        raise DatasetError(f"{where} has {count:,} instances of {shape[1]} x {shape[0]} pixels, which no memory holds")


def image_size(path: Path) -> tuple[tuple[int, int], bool]:
    """Read height and width of the upright image from the file's header, and whether its sides change places for it."""
    from PIL import Image

    try:
        with _own_process_state(), Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION_TAG) in (5, 6, 7, 8)
    except Exception:
        # What Pillow doesn't know by itself, the reader of images may; it also says best what is wrong.
        with open_image(path) as source:
            return source.shape[:2], False
    return ((width, height) if turned else (height, width)), turned


def read_values(path: Path) -> npt.NDArray[np.integer]:
    """Read a label image: (H, W), the number of each pixel, and of a palette image the index of its colour."""
    from PIL import Image

    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            # From memory: a plugin that refuses a file does not always close it.
            values = np.asarray(iio.imread(path.read_bytes(), extension=".tif"))
        else:
            with _own_process_state(), Image.open(path) as image:
                values = np.asarray(image)
    except Exception as error:
        raise DatasetError(f"cannot read the label image '{path}': {error}") from error
    if values.ndim == 3 and values.dtype == np.uint8:
        # Grey that was saved as colour; the last of two or four channels is opacity.
        colours = values[:, :, : values.shape[2] - 1 + values.shape[2] % 2]
        if (colours == colours[:, :, :1]).all():
            values = colours[:, :, 0]
    if values.ndim != 2 or not (values.dtype == bool or np.issubdtype(values.dtype, np.integer)):
        raise DatasetError(
            f"'{path}' is not a label image: it should hold one whole number for each pixel, or a palette, and is "
            f"of shape {values.shape} and type {values.dtype}; was it saved anew with colours?"
        )
    return values.astype(np.uint8) if values.dtype == bool else values


@dataclass(frozen=True)
class LabelTruth:
    """The truth of an image that has its own label image.

    Attributes
    ----------
    path
        The label image.
    void
        Value of the pixels that nobody judged.
    """

    path: Path
    void: int | None = None

    def __call__(self) -> TrueInstances:
        """Read it."""
        values = read_values(self.path)
        unjudged = None
        if self.void is not None:
            unjudged = values == self.void
            values = np.where(unjudged, 0, values)
        count = np.unique(values).size
        if count * values.size > _MOST_BYTES:
            raise DatasetError(
                f"'{self.path}' has {count} different values, too many to be instances; is it a label image?"
            )
        return TrueInstances.from_labels(values, unjudged if unjudged is not None and unjudged.any() else None)


def label_files(folder: Path, what: str, suffixes: Collection[str] = LABEL_SUFFIXES) -> dict[str, Path]:
    """Find the label images below a folder by what a run would call the mask of an image of that name.

    Raises
    ------
    DatasetError
        The folder is missing or holds none, or two have the same name.
    """
    if not folder.is_dir():
        raise DatasetError(f"{what}: '{folder}' is not a folder; {contents(folder.parent)}")
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower() not in suffixes or not path.is_file():
            continue
        name = result_name(relative.as_posix())
        if name in files:
            raise DatasetError(f"two label images have one name: '{files[name]}' and '{path}'")
        files[name] = path
    if not files:
        endings = " ".join(sorted(suffixes))
        raise DatasetError(f"{what}: '{folder}' has no label image in it ({endings}); {contents(folder)}")
    return files


def no_splits(kind: str, split: str | None) -> None:
    """Refuse a split of a set that has none."""
    if split is not None:
        raise DatasetError(f"a set of kind {kind!r} has no splits; leave out the split {split!r}")
