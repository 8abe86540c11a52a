"""The folder that keeps pulled and built models, and the record of what its files must be.

The folder is ``SPARSESPEC_HOME``, or ``sparsespec`` in the user's cache directory::

    models/dino-vits16-float32.onnx          ready to run
    downloads/Xenova--dino-vits16/main/...   files as they were published
    models.lock                              JSON: repository, commit, size and SHA-256 of each file
    locks/                                   empty files by which processes wait for each other

The SHA-256 of a file is recorded when it is first used, and from then on a file with another one is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparsespec._atomic import write_atomic
from sparsespec._locks import try_to_lock

_LOG = logging.getLogger(__name__)

HOME_VARIABLE = "SPARSESPEC_HOME"
LOCK_VERSION = 1
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Device names of Windows, which no file may have there, whatever its ending.
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_POLL_SECONDS = 0.1

# Files whose SHA-256 this process has compared: path to (size, time of change, inode).
_compared: dict[str, tuple[int, int, int]] = {}


class StoreError(RuntimeError):
    """The folder of models can't be used, or what is in it isn't what it should be."""


class ChecksumError(StoreError):
    """A file isn't the one that was recorded."""


def home() -> Path:
    """Say which folder keeps the models.

    Returns
    -------
    pathlib.Path
        ``SPARSESPEC_HOME``; else ``sparsespec`` in the user's cache directory: ``XDG_CACHE_HOME`` or ``~/.cache``,
        ``~/Library/Caches`` on macOS, ``LOCALAPPDATA`` on Windows. It need not exist.

    Raises
    ------
    StoreError
        When there is neither.
    """
    given = os.environ.get(HOME_VARIABLE)
    if given:
        return Path(os.path.abspath(Path(given).expanduser()))
    base: Path | None = None
    if sys.platform == "win32":
        base = _absolute(os.environ.get("LOCALAPPDATA"))
    elif sys.platform != "darwin":
        base = _absolute(os.environ.get("XDG_CACHE_HOME"))  # relative ones are to be ignored, its specification says
    if base is None:
        with suppress(RuntimeError):  # what Path.home raises where there is none
            user = Path.home()
            if user.is_absolute():
                base = {"darwin": user / "Library/Caches", "win32": user / "AppData/Local"}.get(
                    sys.platform, user / ".cache"
                )
    if base is None:
        raise StoreError(
            f"there is no folder to keep models in, because this user has no home directory; set {HOME_VARIABLE} to "
            "a folder that can be written. The model 'default' needs none"
        )
    return base / "sparsespec"


def _absolute(text: str | None) -> Path | None:
    return Path(text) if text and Path(text).is_absolute() else None


def file_sha256(*paths: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file, or of several one after the other.

    Parameters
    ----------
    *paths : path
        The files.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            # It goes on with the digest it gets, where it would make one of a name.
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


class Store:
    """The folder of models.

    Parameters
    ----------
    root : path, optional
        The folder; :func:`home` by default. Nothing is written before something is to be kept.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None) -> None:
        self.root = home() if root is None else Path(root)

    @property
    def lock_file(self) -> Path:
        """The record of checksums."""
        return self.root / "models.lock"

    def model_path(self, file: str) -> Path:
        """Where a built model lies, or will.

        Raises
        ------
        StoreError
            When ``file`` isn't the bare name of an .onnx file.
        """
        if not file.endswith(".onnx"):
            raise StoreError(f"{file!r} isn't the name of an .onnx file")
        return self._inside("models", file)

    def download_path(self, repository: str, revision: str, file: str) -> Path:
        """Where a published file lies, or will.

        Parameters
        ----------
        repository : str
            Such as ``Xenova/dino-vits16``.
        revision : str
            A commit, or ``main``.
        file : str
            Path inside the repository, with ``/``.

        Raises
        ------
        StoreError
            When a part of these could lead out of the folder.
        """
        owner = repository.split("/")
        if len(owner) != 2:
            raise StoreError(f"{repository!r} isn't the name of a repository, which is OWNER/NAME")
        for part in owner:
            _check_part(part, repository)
        return self._inside("downloads", "--".join(owner), revision, *file.split("/"))

    def _inside(self, *parts: str) -> Path:
        for part in parts:
            _check_part(part, "/".join(parts))
        return self.root.joinpath(*parts)

    def make_folder(self, folder: Path) -> None:
        """Make a folder of the store where there is none.

        Raises
        ------
        StoreError
            When it can't be made, or not be written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self.unwritable(folder, error) from error
        if not os.access(folder, os.W_OK):
            raise self.unwritable(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))

    def unwritable(self, path: Path, error: OSError) -> StoreError:
        """Word the error that a file or folder of the store can't be written."""
        said = error.strerror or str(error)
        if disk_is_full(error):
            return StoreError(
                f"cannot write {str(path)!r}: {said}; make room, or set {HOME_VARIABLE} to a folder on another disk"
            )
        return StoreError(
            f"cannot write {str(path)!r}: {said}; set {HOME_VARIABLE} to a folder that can be written, or build a file "
            "of your own with 'sparsespec models build FILE -o OUT.onnx' and give its path"
        )

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a name of the store alone, among all threads and processes; waits until it is free.

        Raises
        ------
        StoreError
            When the store can't be written.
        """
        folder = self.root / "locks"
        self.make_folder(folder)
        _check_part(name, name)
        path = folder / f"{name}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self.unwritable(path, error) from error
        try:
            waited = False
            while not try_to_lock(descriptor):
                if not waited:
                    _LOG.info("waiting for another process that holds %s", path)
                    waited = True
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)  # which ends the lock too

    # The record

    def read_record(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Read the record.

        Returns
        -------
        dict
            ``sources``: by ``REPOSITORY@REVISION/FILE``, what was downloaded; ``models``: by file name, what was built.

        Raises
        ------
        StoreError
            When the file is damaged.
        """
        try:
            raw = self.lock_file.read_bytes()
        except FileNotFoundError:
            return {"sources": {}, "models": {}}
        except OSError as error:
            raise StoreError(f"cannot read {str(self.lock_file)!r}: {error.strerror or error}") from error
        try:
            data = json.loads(raw)
            if data["version"] != LOCK_VERSION:
                raise ValueError(f"it has version {data['version']!r}, this program reads {LOCK_VERSION}")
            record = {kind: data[kind] for kind in ("sources", "models")}
            for entries in record.values():
                for key, entry in entries.items():
                    if not (
                        isinstance(entry["size"], int) and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None
                    ):
                        raise ValueError(f"the entry {key!r} has no size or no SHA-256")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"the record of checksums {str(self.lock_file)!r} is damaged ({error}); restore it, or delete it to "
                "have the files recorded anew as they are now"
            ) from error
        return record

    def update_record(self, change: Callable[[dict[str, dict[str, dict[str, Any]]]], None]) -> None:
        """Change the record: read, call ``change`` on it, write whole or not at all.

        Raises
        ------
        StoreError
            When it is damaged or can't be written.
        """
        with self.exclusive("models.lock"):
            record = self.read_record()
            change(record)
            content = json.dumps({"version": LOCK_VERSION, **record}, indent=2, sort_keys=True) + "\n"
            try:
                write_atomic(self.lock_file, content.encode())
            except OSError as error:
                raise self.unwritable(self.lock_file, error) from error

    def record_source(self, key: str, entry: dict[str, Any]) -> None:
        """Record a published file, ``entry`` holding at least ``size`` and ``sha256``; see :meth:`check_source`."""
        self.check_source(key, entry["sha256"])
        if self.read_record()["sources"].get(key) != entry:
            self.update_record(lambda record: record["sources"].update({key: entry}))

    def check_source(self, key: str, sha256: str) -> None:
        """Compare a published file with what was recorded for it, if anything was.

        Raises
        ------
        ChecksumError
            When it is another one.
        """
        entry = self.read_record()["sources"].get(key)
        if entry is not None and entry["sha256"] != sha256:
            raise ChecksumError(
                f"{key} has changed since it was first used: its SHA-256 is {sha256}, {str(self.lock_file)!r} has "
                f"{entry['sha256']} (commit {entry.get('commit') or 'unknown'}). Don't use it unless you know why; "
                "'sparsespec models remove NAME --forget' forgets the recorded one"
            )

    def keep_model(self, file: str, built: Path, entry: dict[str, Any]) -> None:
        """Put a finished model into its place and record it.

        Parameters
        ----------
        file : str
            Its name in the store.
        built : path
            The file, in the folder of models under another name; it is moved.
        entry : dict
            What to record beside ``size`` and ``sha256``, such as the ``name`` it is pulled by.

        Raises
        ------
        StoreError
            When the store can't be written.
        """
        path = self.model_path(file)
        entry = {**entry, "sha256": file_sha256(built), "size": built.stat().st_size}
        # The record comes first: a file without one would be taken as it is.
        self.update_record(lambda record: record["models"].update({file: entry}))
        try:
            os.replace(built, path)
        except OSError as error:
            raise self.unwritable(path, error) from error
        _compared[os.path.abspath(path)] = _identity(path)

    def check_model(self, file: str, *, again: bool = False) -> Path:
        """Compare a model of the store with its record; one that has none is recorded as it is.

        The size is compared every time, the SHA-256 once in a process while the file stays as it is.

        Parameters
        ----------
        file : str
            Its name.
        again : bool
            Compute the SHA-256 in any case.

        Returns
        -------
        pathlib.Path

        Raises
        ------
        ChecksumError
            When it isn't what was recorded.
        StoreError
            When it isn't there or can't be read.
        """
        path = self.model_path(file)
        entry = self.read_record()["models"].get(file)
        try:
            identity = _identity(path)
            known = _compared.get(os.path.abspath(path)) == identity and not again
            if entry is not None and entry["size"] != identity[0]:
                raise ChecksumError(
                    f"{str(path)!r} has {identity[0]} bytes, but {entry['size']} when it was built; {_again(entry)}"
                )
            if known:
                return path
            sha256 = file_sha256(path)
        except OSError as error:
            raise StoreError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
        if entry is None:
            # Somebody copied it here. Where nothing can be written, it is taken as it is.
            with suppress(StoreError):
                self.update_record(
                    lambda record: record["models"].update({file: {"sha256": sha256, "size": identity[0]}})
                )
        elif entry["sha256"] != sha256:
            raise ChecksumError(
                f"{str(path)!r} isn't what was built: its SHA-256 is {sha256}, {str(self.lock_file)!r} has "
                f"{entry['sha256']}; {_again(entry)}"
            )
        _compared[os.path.abspath(path)] = identity
        return path


def source_key(repository: str, revision: str, file: str) -> str:
    """Name a published file in the record."""
    return f"{repository}@{revision}/{file}"


def _again(entry: dict[str, Any]) -> str:
    name = entry.get("name")
    return "delete it" if name is None else f"build it again with 'sparsespec models pull {name} --force'"


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _check_part(part: str, whole: str) -> None:
    """Refuse what isn't the name of one file or folder everywhere: empty, ``..``, separators, drives, devices."""
    if _PART.fullmatch(part) is None or part.endswith(".") or _RESERVED.fullmatch(part) or len(part) > 128:
        raise StoreError(
            f"{whole!r} can't be a place in the folder of models: {part!r} isn't allowed as the name of a file"
        )
