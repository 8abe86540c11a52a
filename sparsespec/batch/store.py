"""Folders that a run reads from and writes to: on a disk, or behind a URL."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from sparsespec._atomic import write_atomic

__all__ = ["LocalStore", "Store", "inside", "is_url", "open_store"]


@runtime_checkable
class Store(Protocol):
    """A folder of files. Paths are relative to it, with ``/`` between the parts.

    It can be pickled, and used by several threads. What goes wrong is an OSError; a file that is not there a
    FileNotFoundError.
    """

    @property
    def place(self) -> str:
        """Folder or URL, for messages; no passwords."""
        ...

    @property
    def folder(self) -> Path | None:
        """The folder on this machine's disk, or None when it is behind a URL."""
        ...

    def read(self, path: str) -> bytes:
        """Read a file."""
        ...

    def write(self, path: str, content: bytes) -> None:
        """Write a file, whole or not at all; folders are made if need be."""
        ...

    def size(self, path: str) -> int | None:
        """Size of a file in bytes; None when there is none."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """Paths of all files below a folder, in any order; none when there is no such folder."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file, or do nothing when there is none."""
        ...

    def fingerprint(self, path: str) -> str | None:
        """Short text that changes when the file does: size and time of change, or the server's tag; None: unknown."""
        ...

    def fetched(self, path: str) -> AbstractContextManager[Path]:
        """Give the file on this machine's disk for the time of a block; what was downloaded is removed after it."""
        ...

    def staged(self) -> AbstractContextManager[Path]:
        """Give a folder on this machine's disk to write files into, for the time of a block.

        It is the store itself when that is on this disk; otherwise a new folder, removed after the block.
        """
        ...

    def publish(self, staging: Path, paths: Sequence[str]) -> None:
        """Bring files written into a folder of `staged` to the store, and remove them there; nothing if it is one."""
        ...


def inside(folder: Path, path: str) -> Path:
    """Give the place of a file in a folder of results, and see that no link leads it elsewhere.

    Parameters
    ----------
    folder : Path
        The folder, which may itself be a link.
    path : str
        Relative to it, with ``/`` between the parts.

    Raises
    ------
    OSError
        A folder on the way is a link, or the path leads out by its parts.
    """
    parts = path.split("/")
    if os.path.isabs(path) or any(part in ("", ".", "..") for part in parts):
        raise OSError(errno.EINVAL, "the path leads out of its folder", path)
    place = os.fspath(folder)
    for part in parts[:-1]:
        place = os.path.join(place, part)
        if os.path.islink(place):
            raise OSError(errno.ELOOP, "a folder of results is a link: remove it", place)
    return Path(place, parts[-1])


@dataclass(frozen=True)
class LocalStore:
    """A folder on this machine's disk, or one that it sees as such.

    Attributes
    ----------
    folder : Path
    """

    folder: Path

    @property
    def place(self) -> str:
        """The folder, as it was given."""
        return str(self.folder)

    def read(self, path: str) -> bytes:
        """Read a file."""
        return (self.folder / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        """Write a file, whole or not at all; folders are made if need be."""
        target = inside(self.folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content)

    def size(self, path: str) -> int | None:
        """Size of a file in bytes; None when there is none."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return (self.folder / path).stat().st_size
        return None

    def list(self, prefix: str) -> Iterator[str]:
        """Paths of all files below a folder, in any order."""
        for here, _, files in os.walk(self.folder / prefix):
            base = Path(here).relative_to(self.folder)
            yield from ((base / name).as_posix() for name in files)

    def remove(self, path: str) -> None:
        """Remove a file, or do nothing when there is none."""
        with suppress(NotADirectoryError):
            inside(self.folder, path).unlink(missing_ok=True)

    def fingerprint(self, path: str) -> str | None:
        """Size in bytes and time of the last change in nanoseconds."""
        try:
            found = (self.folder / path).stat()
        except OSError:
            return None
        return f"{found.st_size}-{found.st_mtime_ns}"

    @contextmanager
    def fetched(self, path: str) -> Iterator[Path]:
        """Give the path itself."""
        yield self.folder / path

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Give the folder itself."""
        yield self.folder

    def publish(self, staging: Path, paths: Sequence[str]) -> None:
        """Nothing is to be done: the files are where they belong."""


def is_url(place: str | os.PathLike[str]) -> bool:
    """Tell a URL from a folder."""
    return "://" in os.fspath(place)


def open_store(place: str | os.PathLike[str], options: Mapping[str, str] | None = None) -> Store:
    """Give the store for a folder or a URL.

    Parameters
    ----------
    place : str or os.PathLike
        A folder, or a URL such as ``s3://bucket/results``.
    options : mapping, optional
        Of the file system behind a URL, see `fsspec`.

    Raises
    ------
    ImportError
        A URL, and a package that it needs is missing.
    OSError
        A URL that cannot be used.
    """
    if is_url(place):
        from sparsespec.batch.urls import open_url

        return open_url(os.fspath(place), options)
    return LocalStore(Path(place))
