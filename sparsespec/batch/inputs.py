"""Which images a run is about."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path

from sparsespec.batch.record import RECORD_NAME, is_record
from sparsespec.images import IMAGE_SUFFIXES

__all__ = ["Inputs", "InputsError", "find_inputs"]


class InputsError(ValueError):
    """The input does not exist, holds no image, or collides with the output folder."""


@dataclass(frozen=True)
class Inputs:
    """The images of a run.

    Attributes
    ----------
    root : Path
        The folder that all names are relative to.
    images : tuple of str
        Relative paths with ``/`` between the parts, sorted part by part, the same on every machine.
    unlisted : tuple of (str, str)
        Folders below `root` that could not be listed, and why.
    """

    root: Path
    images: tuple[str, ...]
    unlisted: tuple[tuple[str, str], ...] = ()


def find_inputs(source: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None) -> Inputs:
    """Find the images that `source` stands for.

    A folder is searched with everything below it. Left out are files without an image's ending (in either case), names
    that begin with a dot, linked folders, the output folder, and output folders of earlier runs. A single file is taken
    whatever it is called. A pattern (``*``, ``?``, ``[...]``, ``**`` for any depth) matches files with an image's
    ending; names are then relative to the folder in front of the first wildcard.

    Parameters
    ----------
    source : str or os.PathLike
        A folder, a file or a pattern.
    output : str or os.PathLike, optional
        Where results will go.

    Returns
    -------
    Inputs

    Raises
    ------
    InputsError
        Nothing there, no image in it, or input and output in each other's way.
    """
    text = os.fspath(source)
    path = Path(text)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise InputsError(f"cannot look at the input '{text}': {error}") from error
    if not text:
        raise InputsError("the input is an empty string: give a folder, an image file or a pattern")
    target = None if output is None else Path(output).resolve()
    if is_folder:
        _check_apart(path, target, text)
        found = _walk(path, target)
        what = "the folder"
    elif exists:
        _check_apart(path.parent, target, text)
        return Inputs(path.parent, (path.name,))
    elif glob.has_magic(text):
        root = _fixed_part(path)
        _check_apart(root, target, text)
        found = _expand(text, root, target)
        what = "the pattern"
    else:
        raise InputsError(
            f"the input '{text}' does not exist: give a folder, an image file or a pattern such as 'photos/*.jpg'"
        )
    if not found.images:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        hidden = f"; could not list {found.unlisted[0][0]}: {found.unlisted[0][1]}" if found.unlisted else ""
        raise InputsError(f"{what} '{text}' holds no image (looked for {endings}){hidden}")
    return found


def _check_apart(root: Path, target: Path | None, text: str) -> None:
    if target is None:
        return
    folder = root.resolve()
    if folder == target:
        raise InputsError(f"the output folder is the folder of the input '{text}': choose another output")
    if target in folder.parents:
        raise InputsError(f"the input '{text}' lies inside the output folder '{target}': choose another output")


def _walk(root: Path, target: Path | None) -> Inputs:
    images: list[str] = []
    unlisted: list[tuple[str, str]] = []

    def note(error: OSError) -> None:
        folder = Path(error.filename or root)
        reason = error.strerror or str(error)
        if folder == root:
            raise InputsError(f"cannot list the folder '{root}': {reason}") from error
        unlisted.append((folder.relative_to(root).as_posix() + "/", f"the folder cannot be listed: {reason}"))

    for folder, folders, files in os.walk(root, onerror=note):
        here = Path(folder)
        if here != root and RECORD_NAME in files and is_record(here / RECORD_NAME):
            folders.clear()
            continue
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (target is None or (here / name).resolve() != target)
        ]
        images += [(here / name).relative_to(root).as_posix() for name in files if _is_image_name(name)]
    return Inputs(root, _in_order(images), tuple(sorted(unlisted)))


def _expand(text: str, root: Path, target: Path | None) -> Inputs:
    images = set()
    for match in glob.iglob(text, recursive=True):
        path = Path(match)
        relative = path.relative_to(root)
        if not _is_image_name(path.name) or any(part.startswith(".") for part in relative.parts[:-1]):
            continue
        if path.is_dir() or (target is not None and target in path.resolve().parents):
            continue
        images.add(relative.as_posix())
    return Inputs(root, _in_order(images))


def _fixed_part(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _in_order(images: list[str] | set[str]) -> tuple[str, ...]:
    return tuple(sorted(images, key=lambda name: name.split("/")))
