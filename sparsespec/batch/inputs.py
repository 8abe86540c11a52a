"""Which images a run is about."""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsespec.batch.record import RECORD_NAME, is_record
from sparsespec.batch.store import LocalStore, Store
from sparsespec.images import IMAGE_SUFFIXES

__all__ = ["Inputs", "InputsError", "find_inputs", "leads_outside"]

_STATE = ".sparsespec/plan.json"


class InputsError(ValueError):
    """The input does not exist, holds no image, or collides with the output folder."""


@dataclass(frozen=True)
class Inputs:
    """The images of a run.

    Attributes
    ----------
    root : Path or str
        The folder, or the URL, that all names are relative to.
    images : tuple of str
        Relative paths with ``/`` between the parts, sorted part by part, the same on every machine.
    unlisted : tuple of (str, str)
        Folders below `root` that could not be listed, and why.
    store : Store or None
        Where the images are read, if not from a folder of this machine.
    named : bool
        The image was named by itself, and not found in a folder: it is read even if it is a link to somewhere else.
    """

    root: Path | str
    images: tuple[str, ...]
    unlisted: tuple[tuple[str, str], ...] = ()
    store: Store | None = None
    named: bool = False

    @property
    def source(self) -> Store:
        """Where the images are read."""
        return LocalStore(Path(self.root)) if self.store is None else self.store


def find_inputs(
    source: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, str] | None = None,
) -> Inputs:
    """Find the images that `source` stands for.

    A folder is searched with everything below it. Left out are files without an image's ending (in either case), names
    that begin with a dot, linked folders, the output folder, and output folders of earlier runs. Nothing is opened: a
    link or a pipe that is called like an image is listed, and the run says what is wrong with it. A single file is
    taken whatever it is called. A pattern (``*``, ``?``, ``[...]``, ``**`` for any depth) matches files with an image's
    ending; names are then relative to the folder in front of the first wildcard, and what is left out is the same.

    Parameters
    ----------
    source : str or os.PathLike
        A folder, a file, a pattern, or a URL such as ``s3://bucket/photos/``.
    output : str or os.PathLike, optional
        Where results will go.
    storage_options : mapping of str to str, optional
        For a URL, see `sparsespec.batch.urls.find_url_inputs`.

    Returns
    -------
    Inputs

    Raises
    ------
    InputsError
        Nothing there, no image in it, or input and output in each other's way.
    """
    text = os.fspath(source)
    if "://" in text:
        from sparsespec.batch.urls import find_url_inputs

        return find_url_inputs(text, storage_options, output=output)
    path = Path(text)
    try:
        is_folder, exists = path.is_dir(), path.exists()
        link = os.readlink(path) if path.is_symlink() and not exists else None
    except (OSError, ValueError) as error:
        raise InputsError(f"cannot look at the input '{text}': {error}") from error
    if not text:
        raise InputsError("the input is an empty string: give a folder, an image file or a pattern")
    if link is not None:
        raise InputsError(f"the input '{text}' is a link to '{link}', which does not exist")
    target = None if output is None or "://" in os.fspath(output) else Path(output)
    if is_folder:
        _check_apart(path, target, text)
        found, what = _listed(path, target, None), "the folder"
    elif exists:
        _check_apart(path.parent, target, text)
        return Inputs(path.parent, (path.name,), named=True)
    elif glob.has_magic(text):
        root = _fixed_part(path)
        _check_apart(root, target, text)
        pattern = _Pattern(path.parts[len(root.parts) :])
        found, what = _listed(root, target, pattern) if root.is_dir() else Inputs(root, ()), "the pattern"
    else:
        raise InputsError(
            f"the input '{text}' does not exist: give a folder, an image file or a pattern such as 'photos/*.jpg'"
        )
    if not found.images:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        hidden = f"; could not list {found.unlisted[0][0]}: {found.unlisted[0][1]}" if found.unlisted else ""
        raise InputsError(f"{what} '{text}' holds no image (looked for {endings}){hidden}")
    return found


def leads_outside(root: str | os.PathLike[str], path: str) -> bool:
    """Tell whether a file of the input lies outside of it, because it, or a folder on the way, is a link.

    Parameters
    ----------
    root : str or os.PathLike
        Folder of the input; it may be a link itself.
    path : str
        The file, relative to `root`, ``/`` between the parts.

    Raises
    ------
    OSError
        The file is not there: also when it is a link to nothing, or one that leads to itself.
    """
    parts = path.split("/")
    place = os.fspath(root)
    for part in parts:
        place = os.path.join(place, part)
        if part == ".." or stat.S_ISLNK(os.lstat(place).st_mode):
            break
    else:
        # Resolving asks about every folder from the top of the disk on: only where there is a link.
        return False
    whole = os.path.join(root, *parts)
    try:
        real = os.path.realpath(whole, strict=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "a link leads to a file that does not exist", whole) from error
    except OSError as error:
        loop = "a link leads back to itself" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise OSError(error.errno or errno.ELOOP, loop, whole) from error
    top = os.path.realpath(root)
    return real != top and not real.startswith(top.rstrip(os.sep) + os.sep)


def _check_apart(root: Path, target: Path | None, text: str) -> None:
    if target is None:
        return
    try:
        resolved, folder = target.resolve(), root.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputsError(f"cannot look at the output folder '{target}': {error}") from error
    # Two spellings can be one folder, on a disk that ignores case or where one is mounted twice: the system knows.
    if folder == resolved or _is_same(folder, resolved):
        raise InputsError(f"the output folder is the folder of the input '{text}': choose another output")
    if resolved in folder.parents or any(_is_same(parent, resolved) for parent in folder.parents):
        raise InputsError(f"the input '{text}' lies inside the output folder '{resolved}': choose another output")


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _listed(root: Path, target: Path | None, pattern: _Pattern | None) -> Inputs:
    unlisted: list[tuple[str, str]] = []
    images = tuple(_walk(root, target, pattern, unlisted))
    return Inputs(root, images, tuple(sorted(unlisted)))


def _walk(root: Path, target: Path | None, pattern: _Pattern | None, unlisted: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the images below a folder sorted part by part; note what cannot be listed."""
    output = _identity(target) if target is not None else None
    first = frozenset({0}) if pattern is None else pattern.start
    # Of each folder on the way down: its path with a slash, what is left of it, last name first, and of the pattern.
    stack: list[tuple[str, list[tuple[str, bool]], frozenset[int]]] = []

    def enter(prefix: str, places: frozenset[int]) -> None:
        try:
            stack.append((prefix, _entries(root, prefix), places))
        except OSError as error:
            reason = error.strerror or str(error)
            if not prefix:
                raise InputsError(f"cannot list the folder '{root}': {reason}") from error
            unlisted.append((prefix, f"the folder cannot be listed: {reason}"))

    enter("", first)
    while stack:
        prefix, entries, places = stack[-1]
        if not entries:
            stack.pop()
            continue
        name, is_folder = entries.pop()
        following = places if pattern is None else pattern.step(places, name)
        if not is_folder:
            if pattern is None or pattern.end in following:
                yield prefix + name
        elif following and (output is None or _identity(root / (prefix + name)) != output):
            enter(f"{prefix}{name}/", following)


def _entries(root: Path, prefix: str) -> list[tuple[str, bool]]:
    """Names in a folder that count, last first, and whether each is a folder; none in the output of another run."""
    here = root / prefix
    found: list[tuple[str, bool]] = []
    output = False
    with os.scandir(here) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                output |= name == ".sparsespec" and (here / _STATE).is_file()
            elif _is_folder(entry):
                if not entry.is_symlink() and not _is_junction(entry):
                    found.append((name, True))
            elif _is_image_name(name):
                found.append((name, False))
            elif name == RECORD_NAME:
                output |= entry.is_file(follow_symlinks=False) and is_record(here / name)
    if output and prefix:
        return []
    found.sort(reverse=True)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself, or to where we may not look
        return False


def _is_junction(entry: os.DirEntry[str]) -> bool:
    asked = getattr(entry, "is_junction", None)  # of Python 3.12 and later
    return bool(asked and asked())


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


class _Pattern:
    """The parts of a pattern with wildcards. A state is the set of parts that the next name may belong to."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self._parts = [
            None if part == "**" else re.compile(fnmatch.translate(os.path.normcase(part))) for part in parts
        ]
        self.end = len(parts)
        self.start = self._closed({0})

    def _closed(self, places: set[int]) -> frozenset[int]:
        # ``**`` stands for no folder too.
        for place in range(self.end):
            if place in places and self._parts[place] is None:
                places.add(place + 1)
        return frozenset(places)

    def step(self, places: frozenset[int], name: str) -> frozenset[int]:
        """Go one name down."""
        following: set[int] = set()
        for place in places:
            if place == self.end:
                continue
            part = self._parts[place]
            if part is None:
                following.add(place)
            elif part.match(os.path.normcase(name)):
                following.add(place + 1)
        return self._closed(following)


def _fixed_part(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
