"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

TEMPORARY_PATTERN = ".sparsespec-*.tmp"
"""How unfinished files are called; only a killed process leaves one behind."""


def temporary_beside(path: Path) -> Path:
    """Give an unused name in the folder of `path`, by which `TEMPORARY_PATTERN` finds what a killed process left."""
    # Not named after the target: a name of the longest length allowed has no room for an ending.
    return path.with_name(TEMPORARY_PATTERN.replace("*", secrets.token_hex(8)))


class AtomicFile:
    """A file written under a temporary name beside its target, which it replaces when everything is written.

    As a context manager it commits, or discards when the block raised.

    Parameters
    ----------
    path : str or os.PathLike
        The target. Its folder must exist.
    durable : bool
        Wait until everything is on the disk. Otherwise a power cut may leave a file that is cut short.

    Attributes
    ----------
    path : Path
    file : BinaryIO
        Write here.
    """

    def __init__(self, path: str | os.PathLike[str], *, durable: bool = True) -> None:
        self.path = Path(path)
        self._durable = durable
        self._temporary = temporary_beside(self.path)
        # Not tempfile: it makes files that only their owner can read, the umask decides here as for any other file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self.file: BinaryIO = os.fdopen(os.open(self._temporary, flags, 0o666), "wb")

    def commit(self) -> None:
        """Put the file in its place."""
        try:
            self.file.flush()
            if self._durable:
                os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self._temporary, self.path)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Leave the target as it was. Harmless after `commit`."""
        with suppress(OSError):  # closing flushes, which a full disk refuses
            self.file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()


def write_atomic(path: str | os.PathLike[str], content: bytes, *, durable: bool = True) -> None:
    """Write `content` to `path`, whole or not at all; see `AtomicFile`."""
    with AtomicFile(path, durable=durable) as file:
        file.write(content)


def settle_folder(folder: str | os.PathLike[str]) -> None:
    """Bring the names of a folder's files to the disk, before what they replace is removed elsewhere.

    The contents are there already; a folder that cannot be asked for it, as on Windows, settles by itself.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
