"""Inputs and outputs behind a URL: in a bucket, on a web server, or wherever else fsspec reaches."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from sparsespec.batch.inputs import Inputs, InputsError, find_inputs
from sparsespec.batch.record import RECORD_NAME, is_record
from sparsespec.batch.remote import Entry, Remote, StoreError, connect, problem
from sparsespec.batch.store import LocalStore, Store, is_url
from sparsespec.images import IMAGE_SUFFIXES

__all__ = ["StoreError", "UrlStore", "find_url_inputs", "list_images", "local_path", "open_url"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_CHAINED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+::[^/]")
_LOCAL = ("file", "local")
_HTTP = ("http", "https")
_SAME = {"s3a": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs"}
_MAGIC = re.compile(r"[*?\[]")
_UPLOADS = 4

Options = Mapping[str, Any] | Iterable[tuple[str, Any]] | None


def local_path(url: str) -> Path | None:
    """Give the path that a URL of this machine stands for, ``file:///data``; None for all others."""
    scheme, rest = _split(url)
    return Path(rest) if scheme in _LOCAL else None


def open_url(url: str, options: Options = None) -> Store:
    """Give the store of a URL: a folder of this machine for ``file://``, else a `UrlStore`.

    Parameters
    ----------
    url : str
        The URL.
    options : mapping or iterable of (str, object), optional
        Of `UrlStore`.

    Returns
    -------
    Store

    Raises
    ------
    StoreError
        The URL is of no use.
    """
    path = local_path(url)
    return UrlStore(url, options) if path is None else LocalStore(path)


class UrlStore:
    """Files below a URL, as a `sparsespec.batch.store.Store`.

    It can be pickled: what it is connected with is opened in each process when it is first needed. Several threads can
    use it.

    Parameters
    ----------
    url : str
        ``s3://bucket/folder``, ``gs://``, ``https://`` and so on; a bucket's name has no escapes, a web address may.
    options : mapping or iterable of (str, object), optional
        Handed to fsspec's class for the scheme. Dots in a name lead into mappings: ``client_kwargs.region_name``. A
        name that begins with a scheme and a colon, ``s3:anon``, is for URLs of that scheme only. Of values that are
        text, ``true``, ``false``, ``none`` and whole numbers are understood, except where a password may stand.

    Attributes
    ----------
    url : str
        As it was given, with all that is in it.
    root : str
        What follows the scheme in it.
    options : tuple of (str, object)
        Those that are for its scheme.
    place : str
        The URL without user, password and query.
    folder : None
        It is not on this machine's disk.

    Raises
    ------
    StoreError
        The URL is of no use, or holds credentials where they cannot be used.
    """

    def __init__(self, url: str, options: Options = None) -> None:
        scheme, rest = _split(url)
        if scheme in _LOCAL:
            raise StoreError(f"'{url}' is a folder of this machine: give its path")
        host = rest.partition("/")[0]
        query = ""
        if scheme in _HTTP:
            rest, _, query = rest.partition("#")[0].partition("?")
            host = rest.partition("/")[0]
            shown = rest.removeprefix(host)
            shown = host.rpartition("@")[2] + shown
        else:
            shown = rest
            if scheme in ("s3", "s3a", "gs", "gcs") and "@" in host:
                raise StoreError(f"'{scheme}://' takes no user and password in the URL: give them by the environment")
            if "@" in host:
                shown = re.sub(r":[^@]*@", "@", host) + rest.removeprefix(host)
        if not host and scheme not in ("memory", "file"):
            raise StoreError(f"'{url}' names no bucket or server: give {scheme}://NAME/FOLDER")
        self.url = url
        self.root = rest.rstrip("/")
        self._scheme = scheme
        self._query = query
        self.place = f"{scheme}://{shown.rstrip('/')}"
        given = options.items() if isinstance(options, Mapping) else options or ()
        self.options = tuple(
            (name.removeprefix(f"{scheme}:"), value)
            for name, value in given
            if ":" not in name or name.startswith(f"{scheme}:")
        )
        self._known: dict[str, str | None] = {}

    def __repr__(self) -> str:
        return f"UrlStore({self.place!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlStore) and (self.url, self.options) == (other.url, other.options)

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return UrlStore, (self.url, self.options)

    @property
    def folder(self) -> None:
        """It is not on this machine's disk."""
        return

    @property
    def scheme(self) -> str:
        """The same for all ways to write it: ``s3`` for ``s3a``."""
        return _SAME.get(self._scheme, self._scheme)

    @property
    def inner(self) -> str:
        """What follows the bucket's or server's name."""
        return self.root if self._scheme == "memory" else self.root.partition("/")[2]

    def at(self, root: str, options: Options) -> UrlStore:
        """Give the store of another folder of the same bucket or server."""
        query = f"?{self._query}" if self._query else ""
        return UrlStore(f"{self._scheme}://{root}{query}", options)

    @property
    def _remote(self) -> Remote:
        return connect(self._scheme, self.root, self._query, dict(self.options), self.place)

    def _checked(self, path: str) -> str:
        reason = problem(path)
        if reason is not None:
            raise ValueError(f"'{path}' cannot be a file in '{self.place}': {reason}")
        return path

    def read(self, path: str) -> bytes:
        """Read a file."""
        with self.fetched(path) as local:
            return local.read_bytes()

    def start(self, path: str, count: int) -> bytes:
        """Read the first bytes of a file."""
        self._checked(path)
        remote = self._remote
        return remote.attempt(lambda: remote.start(path, count), path)

    def write(self, path: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        self._checked(path)
        remote = self._remote
        remote.attempt(lambda: remote.put(path, content), path)

    def size(self, path: str) -> int | None:
        """Size of a file in bytes; None when there is none, or the server does not say it."""
        entry = self._info(path)
        return None if entry is None else entry.size

    def exists(self, path: str) -> bool:
        """Tell whether there is such a file."""
        return self._info(path) is not None

    def _info(self, path: str) -> Entry | None:
        self._checked(path)
        remote = self._remote
        return remote.attempt(lambda: remote.info(path), path)

    def list(self, prefix: str) -> Iterator[str]:
        """Paths of all files below a folder, in any order, of as many as can be used; none when there is no folder."""
        for entry in self.entries(prefix):
            yield entry.path

    def entries(
        self, prefix: str = "", *, stem: str = "", refused: Callable[[str, str], None] = lambda path, reason: None
    ) -> Iterator[Entry]:
        """Files below a folder with their sizes and fingerprints, as far as a listing tells them: a request a thousand.

        Parameters
        ----------
        prefix : str
            The folder, relative to the store; empty for all of it.
        stem : str
            Only what begins with this in that folder.
        refused : callable
            Called with the path of what cannot be used, and why: a name that would lead elsewhere, a folder that cannot
            be listed.

        Yields
        ------
        Entry
        """
        if prefix:
            prefix = self._checked(prefix.rstrip("/"))
        for page in self._remote.pages(prefix, stem, refused):
            for entry in page:
                reason = problem(entry.path)
                if reason is None:
                    yield entry
                else:
                    refused(entry.path, reason)

    def remove(self, path: str) -> None:
        """Remove a file, or do nothing when there is none."""
        self._checked(path)
        remote = self._remote
        remote.attempt(lambda: remote.delete(path), path)

    def fingerprint(self, path: str) -> str | None:
        """Size and the server's tag or checksum, or the time of change; None when there is nothing of the kind.

        While the file is `fetched` it is that of what was downloaded, and costs no request.
        """
        if path in self._known:
            return self._known[path]
        with suppress(OSError):
            entry = self._info(path)
            return None if entry is None else entry.fingerprint
        return None

    @contextmanager
    def fetched(self, path: str) -> Iterator[Path]:
        """Give the file on this machine's disk for the time of a block; it is removed after it."""
        self._checked(path)
        remote = self._remote
        ending = PurePosixPath(path).suffix
        ending = ending if re.fullmatch(r"\.\w{1,10}", ending, re.ASCII) else ""
        try:
            handle, name = tempfile.mkstemp(prefix="sparsespec-", suffix=ending)
        except OSError as error:
            raise OSError(error.errno, f"no place for the download: {error.strerror}", error.filename) from error
        local = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:

                def download() -> Entry:
                    file.seek(0)
                    file.truncate()
                    entry = remote.get(path, file)
                    file.flush()
                    return entry

                entry = remote.attempt(download, path)
            self._known[path] = entry.fingerprint
            yield local
        finally:
            self._known.pop(path, None)
            with suppress(OSError):  # an open file cannot be removed on Windows
                local.unlink(missing_ok=True)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Give a new folder on this machine's disk to write files into, removed after the block."""
        with tempfile.TemporaryDirectory(prefix="sparsespec-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def publish(self, staging: Path, paths: Sequence[str]) -> None:
        """Upload files of a folder of `staged`, a few at a time, and remove them there."""
        for path in paths:
            self._checked(path)
        if len(paths) <= 1:
            for path in paths:
                self._publish_one(staging, path)
            return
        with ThreadPoolExecutor(min(_UPLOADS, len(paths)), thread_name_prefix="sparsespec-upload") as pool:
            # All of them are finished before an error is raised: nothing is written any more after that.
            for upload in [pool.submit(self._publish_one, staging, path) for path in paths]:
                upload.result()

    def _publish_one(self, staging: Path, path: str) -> None:
        remote = self._remote
        local = staging / path
        remote.attempt(lambda: remote.put(path, local), path)
        local.unlink()


def _split(url: str) -> tuple[str, str]:
    match = _URL.match(url)
    if match is None or _CHAINED.match(url) is not None:
        raise StoreError(
            f"cannot use '{url}': give one address such as s3://bucket/photos; chained ones are not supported"
        )
    return match[1].lower(), match[2]


# --- inputs -----------------------------------------------------------------------------------------------------------


def find_url_inputs(source: str, options: Options = None, *, output: str | os.PathLike[str] | None = None) -> Inputs:
    """Find the images that a URL stands for, by the rules of `sparsespec.batch.find_inputs`.

    Parameters
    ----------
    source : str
        The URL of a folder, of a file, or of a pattern (``*``, ``?``, ``[...]``, ``**`` for any depth; on web servers
        ``?`` begins the query instead).
    options : mapping or iterable of (str, object)
        Of `UrlStore`.
    output : str or os.PathLike, optional
        Where results will go.

    Returns
    -------
    Inputs
        With the URL as its root, and the store.

    Raises
    ------
    InputsError
        Nothing there, no image in it, or input and output in each other's way.
    StoreError
        The store cannot be used: no credentials, no bucket, no answer, or it must not be listed.
    """
    path = local_path(source)
    if path is not None:
        return find_inputs(path, output=output)
    store = UrlStore(source, options)
    place = store.place
    target = None if output is None or not is_url(output) else _open_target(os.fspath(output), options)
    single = _single(store, options)
    if single is not None:
        where, name = single
        _check_apart(where, target)
        return Inputs(where.place, (name,), store=where, named=True)
    if _MAGIC.search(store.inner) is None or _is_folder(store):
        _check_apart(store, target)
        images, unlisted = list_images(store, exclude=_below(store, target))
        what = "the folder"
    else:
        where, pattern = _fixed_part(store, options)
        _check_apart(where, target)
        images, unlisted = list_images(where, exclude=_below(where, target), pattern=pattern)
        store, what = where, "the pattern"
    if not images:
        endings = " ".join(sorted(IMAGE_SUFFIXES))
        more = f"; {unlisted[0][0]!r}: {unlisted[0][1]}" if unlisted else ""
        raise InputsError(f"{what} '{place}' holds no image (looked for {endings}){more}")
    return Inputs(store.place, tuple(images), tuple(unlisted), store)


def list_images(
    store: UrlStore, *, exclude: str | None = None, pattern: str | None = None
) -> tuple[list[str], list[tuple[str, str]]]:
    """List the images in a store.

    Left out are other endings than those of images, names that begin with a dot, and output folders of earlier runs.

    Parameters
    ----------
    store : UrlStore
        Where to look.
    exclude : str, optional
        A folder to leave out, relative to the store.
    pattern : str, optional
        Which images to take, relative to the store; with one, output folders of earlier runs are not left out.

    Returns
    -------
    images : list of str
        Sorted part by part.
    unlisted : list of (str, str)
        Images whose names cannot be used and folders that cannot be listed, and why.
    """
    unlisted: list[tuple[str, str]] = []
    wanted = None if pattern is None else pattern.split("/")

    def refused(path: str, reason: str) -> None:
        if path.endswith("/") or (_is_image(path) and (wanted is None or _matches(path.split("/"), wanted))):
            unlisted.append((path, reason))

    # What stands in front of the first wildcard, the server can look for.
    stem = "" if wanted is None else _MAGIC.split(wanted[0])[0]
    images: list[str] = []
    records: list[str] = []
    for entry in store.entries(stem=stem, refused=refused):
        path = entry.path
        if exclude is not None and path.startswith(exclude + "/"):
            continue
        if _is_image(path):
            if wanted is None or _matches(path.split("/"), wanted):
                images.append(path)
        elif wanted is None and path.endswith("/" + RECORD_NAME) and not _is_hidden(path):
            records.append(path)
    runs = tuple(path.removesuffix(RECORD_NAME) for path in records if _is_run(store, path))
    if runs:
        images = [path for path in images if not path.startswith(runs)]
    # The order of `in_order`, with one string for each name instead of a list.
    images.sort(key=lambda path: path.replace("/", "\0"))
    return images, sorted(set(unlisted))


def _is_image(path: str) -> bool:
    return os.path.splitext(path.rpartition("/")[2])[1].lower() in IMAGE_SUFFIXES and not _is_hidden(path)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in path.split("/"))


def _is_run(store: UrlStore, path: str) -> bool:
    # Records of large runs are large themselves: only the beginning is read.
    with suppress(OSError), tempfile.TemporaryDirectory(prefix="sparsespec-") as folder:
        local = Path(folder) / RECORD_NAME
        local.write_bytes(store.start(path, 200))
        return is_record(local)
    return False


def _open_target(output: str, options: Options) -> UrlStore | None:
    return None if local_path(output) is not None else UrlStore(output, options)


def _single(store: UrlStore, options: Options) -> tuple[UrlStore, str] | None:
    """Give the store around a single file and its name there; None when it is no single file."""
    if store.url.partition("?")[0].endswith("/") or not store.inner:
        return None
    parent, _, last = store.root.rpartition("/")
    name = unquote(last) if store.scheme in _HTTP else last
    if problem(name) is not None:
        return None
    where = store.at(parent, options)
    try:
        return (where, name) if where.exists(name) else None
    except PermissionError:
        # A bucket that must not be listed does not tell what is missing from what is denied; and there are addresses
        # with a signature for reading only.
        return (where, name) if _is_image(name) and not _MAGIC.search(name) else None


def _is_folder(store: UrlStore) -> bool:
    """Tell whether there is something below what looks like a pattern."""
    with suppress(OSError):
        return next(store.entries(), None) is not None
    return False


def _fixed_part(store: UrlStore, options: Options) -> tuple[UrlStore, str]:
    """Give the store in front of the first wildcard, and what follows."""
    parts = store.inner.split("/")
    count = next(index for index, part in enumerate(parts) if _MAGIC.search(part))
    rest = "/".join(parts[count:])
    fixed = store.root.removesuffix(rest).rstrip("/")
    return store.at(fixed, options), unquote(rest) if store.scheme in _HTTP else rest


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _check_apart(store: UrlStore, target: UrlStore | None) -> None:
    if target is None or store.scheme != target.scheme:
        return
    if store.root == target.root:
        raise InputsError(f"the output is the folder of the input '{store.place}': choose another output")
    if store.root.startswith(target.root + "/"):
        raise InputsError(f"the input '{store.place}' lies inside the output '{target.place}': choose another output")


def _below(store: UrlStore, target: UrlStore | None) -> str | None:
    if target is None or store.scheme != target.scheme or not target.root.startswith(store.root + "/"):
        return None
    return target.root[len(store.root) + 1 :]
