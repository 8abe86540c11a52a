"""Single requests to object stores and web servers, by fsspec: what each needs, and what its errors mean."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import mimetypes
import os
import random
import re
import secrets
import shutil
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

from sparsespec._atomic import TEMPORARY_PATTERN

__all__ = ["Entry", "Remote", "StoreError", "connect", "problem"]

_Result = TypeVar("_Result")

_ATTEMPTS = 8
_ATTEMPTS_AT_FIRST = 3
_FIRST_DELAY, _LONGEST_DELAY = 0.25, 20.0
_PATIENCE = 60.0
"""Seconds after which nothing is tried again."""
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 60.0
# A server that sends a byte now and then never runs into the limit for one read.
_SLOWEST, _GRACE = 10_000, 120.0
_CHUNK = 1 << 18
_WHOLE_UPLOAD = 64 << 20
_UNKNOWN_LENGTH = 4 << 30
_LISTING_BYTES, _LISTING_DEPTH = 64 << 20, 32
_REDIRECTS = 5

_S3, _GCS, _HTTP = ("s3", "s3a"), ("gs", "gcs"), ("http", "https")
_WHOLE_OR_NOT = (*_S3, *_GCS, "abfs", "abfss", "az", "adl", "oci", "oss", "memory")
"""Stores in which a file appears when all of it is there."""


class StoreError(OSError):
    """A store as a whole cannot be used: no credentials, no bucket, no answer."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        # What follows would fail too.
        self.errno = errno.EIO


class Entry(NamedTuple):
    """A file of a store.

    Attributes
    ----------
    path : str
        Relative to the store.
    size : int or None
        In bytes, when it is known.
    fingerprint : str or None
        Changes when the file does.
    """

    path: str
    size: int | None = None
    fingerprint: str | None = None


class Remote(Protocol):
    """Where files are. Each method is one try, and raises whatever the library in use raises."""

    def pages(self, folder: str, stem: str, unlisted: Callable[[str, str], None]) -> Iterator[list[Entry]]:
        """List the files below a folder whose names start with `stem`, or all; report folders that cannot be listed."""
        ...

    def info(self, path: str) -> Entry | None:
        """Look at a file; None when there is none."""
        ...

    def get(self, path: str, file: BinaryIO) -> Entry:
        """Download a file."""
        ...

    def start(self, path: str, count: int) -> bytes:
        """Read the first bytes of a file."""
        ...

    def put(self, path: str, source: Path | bytes) -> None:
        """Upload a file, and see that it has arrived."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file if there is one."""
        ...

    def attempt(self, work: Callable[[], _Result], path: str) -> _Result:
        """Do something as often as it takes, within bounds; what goes wrong becomes an OSError."""
        ...


def problem(path: str) -> str | None:
    """Say why something that is in a store cannot be the path of a file here; None when it can."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not valid UTF-8; rename it"
    parts = path.split("/")
    if "" in parts:
        return "its name has an empty part ('//', or '/' at an end); rename it"
    for part in ("..", "."):
        if part in parts:
            return f"its name has the part '{part}', which would lead elsewhere; rename it"
    if "\0" in path:
        return "its name has a zero character; rename it"
    if os.name == "nt" and any(character in path for character in '\\:*?"<>|'):
        return "its name has a character that Windows does not allow; rename it"
    return None


# --- opening ----------------------------------------------------------------------------------------------------------

_opened: dict[Any, Any] = {}
_opening = threading.Lock()


def connect(scheme: str, root: str, query: str, options: Mapping[str, Any], place: str) -> Remote:
    """Open a store, once in each process.

    Parameters
    ----------
    scheme : str
        ``s3``, ``https`` and so on.
    root : str
        What follows ``://``, without a ``/`` at its end.
    query : str
        Appended to addresses of ``http``, after a ``?``.
    options : mapping
        Handed to fsspec's class for the scheme; names with dots stand for mappings in mappings.
    place : str
        The URL, for messages.

    Raises
    ------
    ImportError
        A package is missing.
    StoreError
        There is no such scheme, or it does not take one of the options.
    """
    # Sessions belong to the event loop of one process; file systems without one belong to a thread.
    key = (os.getpid(), scheme, repr(sorted(options.items())))
    with _opening:
        filesystem = _opened.get(key) or _opened.get((*key, threading.get_ident()))
        if filesystem is None:
            filesystem = _open(scheme, options, place)
            _opened[key if filesystem.async_impl else (*key, threading.get_ident())] = filesystem
        found = _opened.get((id(filesystem), root, query))
        if found is None:
            wrapper: type[_Filesystem] = _Filesystem
            for schemes, kind in ((_S3, _S3Bucket), (_GCS, _GcsBucket), (_HTTP, _Website)):
                if scheme in schemes:
                    wrapper = kind
            found = _opened[id(filesystem), root, query] = wrapper(filesystem, scheme, root, query, place)
    remote: Remote = found
    return remote


def _open(scheme: str, options: Mapping[str, Any], place: str) -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"'{scheme}://' needs the package fsspec: pip install 'sparsespec[remote]'") from error
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = ": pip install 'sparsespec[remote]'" if scheme in (*_S3, *_HTTP) else ""
        raise ImportError(f"'{scheme}://' needs a package that is not installed ({error}){extra}") from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "https", "http", "abfs", "sftp"))
        raise StoreError(f"cannot use '{place}': nothing is known about '{scheme}://'; there are {known}") from error
    settings = _nested(options)
    settings["use_listings_cache"] = False
    if scheme in _S3:
        _s3_settings(settings)
    elif scheme in _GCS:
        settings.setdefault("requests_timeout", _timeouts())
    elif scheme in _HTTP:
        # The session takes proxies and passwords from the environment and from .netrc, as other programs do.
        settings["client_kwargs"] = {"timeout": _timeouts(), "trust_env": True, **settings.get("client_kwargs", {})}
    try:
        filesystem = kind(skip_instance_cache=True, **settings)
    except (TypeError, ValueError, KeyError) as error:
        raise StoreError(f"cannot use '{place}': an option is not understood: {error}") from error
    except Exception as error:  # file systems such as sftp connect here, and have exceptions of their own
        raise _Fault.of(error).error("", place, 1) from error
    if scheme in _S3:
        filesystem.retries = 1
    return filesystem


def _timeouts() -> Any:
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)


def _s3_settings(settings: dict[str, Any]) -> None:
    from botocore.config import Config

    config = {
        "connect_timeout": _CONNECT_SECONDS,
        "read_timeout": _READ_SECONDS,
        # Tried again is here, for all kinds of stores in the same way.
        "retries": {"total_max_attempts": 1},
    }
    if "request_checksum_calculation" in Config.OPTION_DEFAULTS:
        # Other servers than Amazon's often don't know the newer checksums; MD5 is known to all.
        config |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    settings["config_kwargs"] = {**config, **settings.get("config_kwargs", {})}


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in options.items():
        *outer, last = name.split(".")
        here = settings
        for part in outer:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise StoreError(f"the option '{name}' contradicts another one of the name '{part}'")
        here[last] = _value(last, value)
    return settings


_WORDS = {"true": True, "false": False, "none": None, "null": None}
_AS_TEXT = re.compile("key|secret|token|pass|user|name|id$", re.IGNORECASE)


def _value(name: str, value: Any) -> Any:
    """Understand what was given on a command line."""
    if not isinstance(value, str):
        return value
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    return int(value) if re.fullmatch(r"-?\d{1,15}", value) and not _AS_TEXT.search(name) else value


# --- any file system of fsspec ----------------------------------------------------------------------------------------


class _Filesystem:
    """Any file system of fsspec."""

    attempts = _ATTEMPTS

    def __init__(self, filesystem: Any, scheme: str, root: str, query: str, place: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self.place = place
        self.query = query
        self.scheme = scheme
        self._answered = False
        self._whole = scheme in _WHOLE_OR_NOT

    def attempt(self, work: Callable[[], _Result], path: str) -> _Result:
        """Do something as often as it takes, within bounds; what goes wrong becomes an OSError."""
        began = time.monotonic()
        tried = 0
        while True:
            tried += 1
            try:
                result = work()
            except Exception as error:
                fault = _Fault.of(error)
                self._answered |= fault.kind not in ("unreachable", "transient")
                most = self.attempts if self._answered else min(self.attempts, _ATTEMPTS_AT_FIRST)
                pause = random.uniform(0.5, 1) * min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (tried - 1))
                pause = max(pause, min(fault.wait, _LONGEST_DELAY))
                late = time.monotonic() - began + pause > _PATIENCE
                if fault.kind not in ("unreachable", "transient") or tried >= most or late:
                    raise fault.error(path, self.place, tried) from error
            else:
                self._answered = True
                return result
            time.sleep(pause)

    def _address(self, path: str) -> str:
        return f"{self.root}/{path}" if path and self.root else path or self.root

    def pages(self, folder: str, stem: str, unlisted: Callable[[str, str], None]) -> Iterator[list[Entry]]:
        """List folder by folder."""
        start = self._address(folder)
        waiting = [(start, 0)]
        while waiting:
            here, depth = waiting.pop()
            try:
                found = self.attempt(lambda here=here: self.filesystem.ls(here, detail=True), ".")  # type: ignore[misc]
            except FileNotFoundError:
                continue
            except StoreError:
                raise
            except OSError as error:
                if here == start:
                    raise StoreError(f"cannot list '{self.place}': {error.strerror or error}") from error
                unlisted(self._relative(here) + "/", f"the folder cannot be listed: {error.strerror or error}")
                continue
            page = []
            for info in found:
                name = str(info["name"]).rstrip("/")
                if name == here.rstrip("/"):
                    continue  # the folder itself, or its marker
                relative = self._relative(name)
                if here == start and stem and not name.rpartition("/")[2].startswith(stem):
                    continue
                if info.get("type") == "directory":
                    if depth < _LISTING_DEPTH:
                        waiting.append((name, depth + 1))
                    else:
                        unlisted(relative + "/", f"it lies more than {_LISTING_DEPTH} folders deep")
                elif info.get("type") == "file" and not info.get("islink"):
                    page.append(_entry(relative, info))
            yield page

    def _relative(self, name: str) -> str:
        root = self.filesystem._strip_protocol(self.root).rstrip("/")
        return name[len(root) + 1 :] if name.startswith(root + "/") else name.lstrip("/")

    def info(self, path: str) -> Entry | None:
        """Look at a file; None when there is none."""
        try:
            found = self.filesystem.info(self._address(path))
        except FileNotFoundError:
            return None
        return None if found.get("type") == "directory" else _entry(path, found)

    def get(self, path: str, file: BinaryIO) -> Entry:
        """Download a file."""
        entry = self.info(path)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        _reserve(entry.size)
        # By its name: file systems differ in whether they take a file that is open.
        with tempfile.TemporaryDirectory(prefix="sparsespec-") as folder:
            local = Path(folder) / "download"
            self.filesystem.get_file(self._address(path), str(local))
            with local.open("rb") as downloaded:
                shutil.copyfileobj(downloaded, file, _CHUNK)
        _check_length(file.tell(), entry.size)
        return entry

    def start(self, path: str, count: int) -> bytes:
        """Read the first bytes of a file."""
        found: bytes = self.filesystem.cat_file(self._address(path), start=0, end=count)
        return found

    def put(self, path: str, source: Path | bytes) -> None:
        """Upload a file, under another name first where one could be left half written, and compare its size."""
        address = self._address(path)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        writing = address
        if not self._whole:
            parent = address.rpartition("/")[0]
            self.filesystem.makedirs(parent, exist_ok=True)
            writing = f"{parent}/{TEMPORARY_PATTERN.replace('*', secrets.token_hex(8))}"
        with _Named(source) as local:
            self.filesystem.put_file(str(local), writing)
        if writing != address:
            self.filesystem.mv(writing, address)
        entry = self.info(path)
        _check_length(-1 if entry is None else entry.size, size)

    def delete(self, path: str) -> None:
        """Remove a file if there is one."""
        try:
            self.filesystem.rm_file(self._address(path))
        except FileNotFoundError:
            return


def _entry(path: str, info: Mapping[str, Any]) -> Entry:
    size = info.get("size")
    marks = ("ETag", "md5Hash", "content_md5", "checksum", "etag", "generation")
    times = ("mtime", "last_modified", "LastModified", "modified", "created")
    mark = next((info[name] for name in (*marks, *times) if info.get(name)), None)
    if isinstance(mark, datetime):
        mark = mark.timestamp()  # some file systems say it in one way in listings and in another for one file
    return Entry(path, None if size is None else int(size), None if mark is None else _fingerprint(size, str(mark)))


def _fingerprint(size: int | None, mark: str) -> str:
    return f"{'?' if size is None else size}-{mark.strip(chr(34))}"


class _Named:
    """A file with this content on the disk for the time of a block."""

    def __init__(self, source: Path | bytes) -> None:
        self._source = source

    def __enter__(self) -> Path:
        if isinstance(self._source, Path):
            return self._source
        handle, name = tempfile.mkstemp(prefix="sparsespec-")
        self._made = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(self._source)
        return self._made

    def __exit__(self, *_: object) -> None:
        if not isinstance(self._source, Path):
            self._made.unlink(missing_ok=True)


def _reserve(size: int | None) -> None:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size is not None and size > free:
        raise OSError(
            errno.ENOSPC,
            f"no space for the download: {size} bytes, and {free} are free in '{tempfile.gettempdir()}';"
            " make room there or set TMPDIR",
        )


class _Incomplete(ConnectionError):
    """Fewer or more bytes than were announced."""


def _check_length(found: int | None, expected: int | None) -> None:
    if expected is not None and found is not None and found != expected:
        raise _Incomplete(f"{max(found, 0)} of {expected} bytes arrived")


class _Pace:
    """Ends a transfer that would never end."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def check(self, done: int) -> None:
        spent = time.monotonic() - self._began
        if spent > _GRACE + done / _SLOWEST:
            raise _Incomplete(f"only {done} bytes arrived in {spent:.0f} s")


# --- S3 and what speaks like it ---------------------------------------------------------------------------------------


class _S3Bucket(_Filesystem):
    """A bucket; requests are made one by one, since s3fs reads listings whole and some keys as something else."""

    def __init__(self, filesystem: Any, scheme: str, root: str, query: str, place: str) -> None:
        super().__init__(filesystem, scheme, root, query, place)
        self._bucket = filesystem.split_path(root)[0]
        self._prefix = root[len(self._bucket) :].strip("/")
        self._prefix += "/" if self._prefix else ""

    def pages(self, folder: str, stem: str, unlisted: Callable[[str, str], None]) -> Iterator[list[Entry]]:
        """List a thousand keys at a time."""
        more: dict[str, str] = {}
        prefix = self._prefix + (folder + "/" if folder else "") + stem
        while True:
            answer = self.attempt(
                lambda more=more: self.filesystem.call_s3(  # type: ignore[misc]
                    "list_objects_v2", Bucket=self._bucket, Prefix=prefix, **more
                ),
                "",
            )
            yield [
                self._found(item["Key"][len(self._prefix) :], item["Size"], item.get("ETag"))
                for item in answer.get("Contents", ())
                # Folders made by web consoles are empty objects of such a name.
                if not item["Key"].endswith("/")
            ]
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def _found(self, path: str, size: int | None, tag: str | None) -> Entry:
        return Entry(path, size, None if tag is None else _fingerprint(size, tag))

    def info(self, path: str) -> Entry | None:
        """Ask for the head of an object."""
        try:
            answer = self.filesystem.call_s3("head_object", Bucket=self._bucket, Key=self._prefix + path)
        except FileNotFoundError:
            return None
        return self._found(path, answer["ContentLength"], answer.get("ETag"))

    def get(self, path: str, file: BinaryIO) -> Entry:
        """Download an object with one request."""
        from fsspec.asyn import sync

        entry: Entry = sync(self.filesystem.loop, self._get, path, file)
        return entry

    async def _get(self, path: str, file: BinaryIO, **more: str) -> Entry:
        answer = await self.filesystem._call_s3("get_object", Bucket=self._bucket, Key=self._prefix + path, **more)
        size, body, done, pace = answer.get("ContentLength"), answer["Body"], 0, _Pace()
        try:
            _reserve(size)
            while chunk := await body.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                pace.check(done)
        finally:
            body.close()
        _check_length(done, size)
        return self._found(path, done, answer.get("ETag"))

    def start(self, path: str, count: int) -> bytes:
        """Read the first bytes of an object."""
        from fsspec.asyn import sync

        file = io.BytesIO()
        sync(self.filesystem.loop, self._get, path, file, Range=f"bytes=0-{count - 1}")
        return file.getvalue()[:count]

    def put(self, path: str, source: Path | bytes) -> None:
        """Upload an object. The server compares the checksum, of a very large one only the size is compared."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        if size > _WHOLE_UPLOAD:
            with _Named(source) as local:
                self.filesystem.put_file(str(local), f"{self._bucket}/{self._prefix}{path}", ContentType=kind)
            entry = self.info(path)
            _check_length(-1 if entry is None else entry.size, size)
            return
        body = source if isinstance(source, bytes) else source.read_bytes()
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        self.filesystem.call_s3(
            "put_object", Bucket=self._bucket, Key=self._prefix + path, Body=body, ContentMD5=digest, ContentType=kind
        )

    def delete(self, path: str) -> None:
        """Remove an object if there is one."""
        self.filesystem.call_s3("delete_object", Bucket=self._bucket, Key=self._prefix + path)


# --- Google Cloud Storage ---------------------------------------------------------------------------------------------


class _GcsBucket(_Filesystem):
    """A bucket of Google's; gcsfs tries again by itself."""

    attempts = 2

    def pages(self, folder: str, stem: str, unlisted: Callable[[str, str], None]) -> Iterator[list[Entry]]:
        """List a thousand names at a time."""
        bucket, _, prefix = self.root.partition("/")
        start = len(prefix) + 1 if prefix else 0
        wanted = "/".join(part for part in (prefix, folder) if part)
        more: dict[str, str] = {}
        while True:
            answer = self.attempt(
                lambda more=more: self.filesystem.call(  # type: ignore[misc]
                    "GET",
                    "b/{}/o",
                    bucket,
                    prefix=(wanted + "/" if wanted else "") + stem,
                    fields="nextPageToken,items(name,size,md5Hash,etag,generation)",
                    json_out=True,
                    **more,
                ),
                "",
            )
            yield [
                _entry(item["name"][start:], item) for item in answer.get("items", ()) if not item["name"].endswith("/")
            ]
            if not answer.get("nextPageToken"):
                return
            more = {"pageToken": answer["nextPageToken"]}


# --- web servers ------------------------------------------------------------------------------------------------------


class _HttpStatus(Exception):
    """A server's answer that is no success."""

    def __init__(self, status: int, reason: str | None, wait: str | None) -> None:
        super().__init__(f"{status} {reason or ''}".strip())
        self.status = status
        self.wait = float(wait) if wait and wait.isdigit() else 0.0


class _Elsewhere(Exception):
    """A server sends us to another one."""


class _Enough(Exception):
    """What is wanted has been read."""


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


class _Website(_Filesystem):
    """A folder of a web server, which may list it in HTML."""

    def __init__(self, filesystem: Any, scheme: str, root: str, query: str, place: str) -> None:
        super().__init__(filesystem, scheme, root, query, place)
        host, _, path = root.partition("/")
        self._base = f"{scheme}://{host}/{_canonical(path)}{'/' if path else ''}"

    def _url(self, path: str) -> str:
        whole = self._base + quote(path, safe="/" + _PLAIN)
        return f"{whole}?{self.query}" if self.query else whole

    def pages(self, folder: str, stem: str, unlisted: Callable[[str, str], None]) -> Iterator[list[Entry]]:
        """Read the server's pages for folders; links out of the folder are left alone."""
        start = folder + "/" if folder else ""
        waiting, seen = [(start, 0)], {start}
        while waiting:
            here, depth = waiting.pop()
            try:
                links = self.attempt(lambda here=here: self._links(here), here)  # type: ignore[misc]
            except StoreError:
                raise
            except OSError as error:
                if here == start and isinstance(error, FileNotFoundError):
                    return
                if here == start:
                    raise
                unlisted(here, f"the folder cannot be listed: {error.strerror or error}")
                continue
            page = []
            for raw in dict.fromkeys(links):
                path = unquote(raw, errors="surrogateescape")
                if not path.startswith(here) or path == here:
                    continue
                if here == start and not path[len(here) :].startswith(stem):
                    continue
                reason = problem(path.removesuffix("/"))
                if "%2F" in raw:
                    reason = "its name has a '/' that is written as '%2F'; rename it"
                if reason is not None:
                    unlisted(path, reason)
                elif not path.endswith("/"):
                    page.append(Entry(path))
                elif path not in seen:
                    seen.add(path)
                    if depth < _LISTING_DEPTH:
                        waiting.append((path, depth + 1))
                    else:
                        unlisted(path, f"it lies more than {_LISTING_DEPTH} folders deep")
            yield page

    def _links(self, folder: str) -> list[str]:
        """Give what the page of a folder links to, as far as it lies below the store, relative to that, quoted."""
        url = self._url(folder)
        with tempfile.TemporaryFile(prefix="sparsespec-") as file:
            headers, _ = self._sync(self._request, "GET", url, file, _LISTING_BYTES)
            if "html" not in headers.get("Content-Type", "text/html"):
                raise StoreError(f"the server does not list '{self.place}': give the address of a single file")
            file.seek(0)
            parser = _Links()
            parser.feed(file.read().decode("utf-8", "replace"))
        top = urlsplit(self._base)
        found = []
        for link in parser.found:
            try:
                target = urlsplit(urljoin(url, link.strip()))
                same = (target.scheme, target.hostname, target.port) == (top.scheme, top.hostname, top.port)
            except ValueError:
                continue
            path = _canonical(target.path)
            # Sorting by columns, other servers, folders above: none of it is a file of this folder.
            if same and not target.query and not target.fragment and path.startswith(top.path):
                found.append(path[len(top.path) :])
        return found

    def info(self, path: str) -> Entry | None:
        """Ask for the head of a file."""
        try:
            headers, url = self._sync(self._request, "HEAD", self._url(path), None, None)
        except _HttpStatus as error:
            if error.status in (404, 410):
                return None
            if error.status in (405, 501):
                return Entry(path)
            raise
        # That is where servers send us when it is a folder.
        return None if urlsplit(url).path.endswith("/") else _web_entry(path, headers)

    def get(self, path: str, file: BinaryIO) -> Entry:
        """Download a file with one request."""
        headers, _ = self._sync(self._request, "GET", self._url(path), file, None)
        return _web_entry(path, headers)

    def start(self, path: str, count: int) -> bytes:
        """Read the first bytes of a file; a server that sends all of it is not listened to for long."""
        file = io.BytesIO()
        with suppress(_Enough):
            self._sync(self._request, "GET", self._url(path), file, -count)
        return file.getvalue()[:count]

    def put(self, path: str, source: Path | bytes) -> None:
        """Refuse."""
        raise StoreError(f"cannot write to '{self.place}': results cannot be sent by http; give a folder or a bucket")

    def delete(self, path: str) -> None:
        """Refuse."""
        raise StoreError(f"cannot remove anything from '{self.place}': by http it can only be read")

    def _sync(self, work: Callable[..., Any], *arguments: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self.filesystem.loop, work, *arguments)

    async def _request(self, method: str, url: str, file: BinaryIO | None, most: int | None) -> tuple[Any, str]:
        from yarl import URL

        session = await self.filesystem.set_session()
        options = dict(self.filesystem.kwargs)
        # Compressed on the way, a file's length could not be checked.
        options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"}
        if most is not None and most < 0:
            options["headers"]["Range"] = f"bytes=0-{-most - 1}"
        for _ in range(_REDIRECTS + 1):
            request = session.request(method, URL(url, encoded=True), allow_redirects=False, **options)
            async with request as answer:
                if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                    url = _redirected(url, answer.headers["Location"])
                    continue
                if answer.status not in (200, 204, 206):
                    raise _HttpStatus(answer.status, answer.reason, answer.headers.get("Retry-After"))
                if file is not None:
                    await self._body(answer, file, most)
                return answer.headers, url
        raise _Elsewhere("it redirects again and again")

    async def _body(self, answer: Any, file: BinaryIO, most: int | None) -> None:
        text = answer.headers.get("Content-Length", "")
        size = int(text) if text.isdigit() else None
        if most is None:
            _reserve(size)
        limit = most if most is not None and most > 0 else (_UNKNOWN_LENGTH if size is None else size)
        done, pace = 0, _Pace()
        while chunk := await answer.content.read(_CHUNK):
            done += len(chunk)
            if most is not None and most < 0 and done >= -most:
                file.write(chunk)
                raise _Enough
            if done > limit:
                raise _Elsewhere(f"it sends more than {limit} bytes")
            file.write(chunk)
            pace.check(done)
        _check_length(done, size)


# What may stand in a part of a path as it is; everything else is written in percent signs.
_PLAIN = "!$&'()*+,;=:@~-._"


def _canonical(path: str) -> str:
    """Write a quoted path in the one way in which it is also written here."""
    return "/".join(quote(unquote_to_bytes(part), safe=_PLAIN) for part in path.split("/"))


def _redirected(url: str, location: str) -> str:
    target = urljoin(url, location)
    old, new = urlsplit(url), urlsplit(target)
    same = (old.scheme, old.hostname, old.port) == (new.scheme, new.hostname, new.port)
    secured = (old.scheme, new.scheme) == ("http", "https") and old.hostname == new.hostname and new.port in (None, 443)
    if not (same or secured):
        raise _Elsewhere(f"it redirects to {new.scheme}://{new.hostname or ''}; give that address if you trust it")
    return target


def _web_entry(path: str, headers: Mapping[str, str]) -> Entry:
    text = headers.get("Content-Length", "")
    size = int(text) if text.isdigit() else None
    mark = headers.get("ETag") or headers.get("Last-Modified")
    return Entry(path, size, None if mark is None else _fingerprint(size, mark))


# --- what errors mean -------------------------------------------------------------------------------------------------

_NO_CREDENTIALS = frozenset({
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
    "SSOTokenLoadError", "UnauthorizedSSOTokenError", "SSOError", "ProfileNotFound", "DefaultCredentialsError",
    "RefreshError", "InvalidConfigError", "ClientAuthenticationError",
})  # fmt: skip
_REFUSED_CREDENTIALS = frozenset({
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "RequestTimeTooSkewed", "InvalidClientTokenId", "NotSignedUp", "AccountProblem",
})  # fmt: skip
_WRONG_PLACE = frozenset({
    "NoSuchBucket", "InvalidBucketName", "PermanentRedirect", "AuthorizationHeaderMalformed", "InvalidRegionError",
    "IllegalLocationConstraintException", "InvalidRegionName", "ParamValidationError", "AllAccessDisabled",
})  # fmt: skip
_BUSY = frozenset({
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "OperationAborted", "BadDigest", "IncompleteBody", "TooManyRequests",
    "XAmzContentSHA256Mismatch",
})  # fmt: skip
_UNREACHABLE = frozenset({
    "EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ClientConnectorDNSError", "gaierror",
    "ConnectionTimeoutError", "ProxyConnectionError", "ConnectionRefusedError", "ServiceRequestError",
    "NoValidConnectionsError", "TransportError",
})  # fmt: skip
_BROKEN_OFF = frozenset({
    "ReadTimeoutError", "AioReadTimeoutError", "ConnectionClosedError", "HTTPClientError", "ResponseStreamingError",
    "IncompleteReadError", "IncompleteRead", "ClientPayloadError", "ServerDisconnectedError", "ClientOSError",
    "ClientConnectionResetError", "SocketTimeoutError", "ServerTimeoutError", "ClientResponseError",
    "ResponseParserError", "FSTimeoutError", "TimeoutError", "EOFError", "ChunkedEncodingError", "ProxyError",
    "ClientConnectionError", "ChecksumError", "ServiceResponseError",
})  # fmt: skip
_TLS = frozenset({
    "SSLError", "SSLCertVerificationError", "ClientSSLError", "ClientConnectorSSLError",
    "ClientConnectorCertificateError", "CertificateError",
})  # fmt: skip

_GIVE_CREDENTIALS = (
    "give them by the environment or by the store's own files of settings,"
    " or for what is public the option anon=true (S3) or token=anon (Google)"
)


class _Fault(NamedTuple):
    """What an exception means.

    ``kind`` is one of: ``store`` (nothing in it can be used), ``unreachable`` and ``transient`` (worth another try),
    ``missing``, ``denied``, ``disk`` (the one of this machine), ``other``.
    """

    kind: str
    text: str
    wait: float = 0.0

    @classmethod
    def of(cls, error: BaseException) -> _Fault:
        """Look at an exception, and at those that it comes from."""
        chain: list[BaseException] = []
        following: BaseException | None = error
        while following is not None and following not in chain:
            chain.append(following)
            following = following.__cause__ or following.__context__
        # What the server said is more exact than what a library made of it.
        for look in (cls._of_saying, cls._of_kind):
            for each in chain:
                fault = look(each)
                if fault is not None:
                    return fault
        if isinstance(error, ImportError):
            return cls("store", f"a package is missing: {_line(error)}")
        if isinstance(error, TypeError):
            return cls("store", f"an option is not understood: {_line(error)}")
        return cls("other", _line(error))

    @classmethod
    def _of_saying(cls, error: BaseException) -> _Fault | None:
        if isinstance(error, _HttpStatus):
            return cls._of_status(error.status, str(error), error.wait)
        if isinstance(error, _Elsewhere | StoreError):
            return cls("store" if isinstance(error, StoreError) else "other", str(error))
        if isinstance(error, _Incomplete):
            return cls("transient", f"the transfer broke off: {error}")
        answer = getattr(error, "response", None)
        if isinstance(answer, dict) and isinstance(answer.get("Error"), dict):
            return cls._of_answer(answer)
        code = getattr(error, "code", None)
        if type(error).__module__.startswith("gcsfs") and str(code).isdigit():
            return cls._of_status(int(str(code)), _line(error))
        return None

    @classmethod
    def _of_kind(cls, error: BaseException) -> _Fault | None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return cls("disk", error.strerror or str(error))
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & _NO_CREDENTIALS:
            return cls("store", f"no credentials: {_line(error)}; {_GIVE_CREDENTIALS}")
        if names & _TLS or isinstance(error, ssl.SSLError):
            return cls("store", f"no secure connection: {_line(error)}")
        if names & _WRONG_PLACE:
            return cls("store", _line(error))
        if names & _UNREACHABLE:
            return cls("unreachable", f"the server does not answer: {_line(error)}")
        if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
            return cls("denied", f"access denied: {_line(error)}")
        if isinstance(error, FileNotFoundError):
            return cls("missing", "there is no such file or bucket")
        if names & _BROKEN_OFF or isinstance(error, ConnectionError):
            return cls("transient", f"the connection broke off: {_line(error)}")
        return None

    @classmethod
    def _of_answer(cls, answer: Mapping[str, Any]) -> _Fault:
        """Look at what an S3 server says."""
        code = str(answer["Error"].get("Code", ""))
        message = " ".join(str(answer["Error"].get("Message", "")).split())
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        status = int(code) if code.isdigit() else status if isinstance(status, int) else 0
        said = ": ".join(text for text in (code, message) if text)
        if code in _REFUSED_CREDENTIALS:
            return cls("store", f"the credentials are refused ({said}); {_GIVE_CREDENTIALS}")
        if code == "NoSuchBucket":
            return cls("store", f"there is no such bucket ({said}); check the name, and the endpoint")
        if code in _WRONG_PLACE:
            return cls("store", f"the server refuses the bucket ({said}); is the name right, and the region?")
        if code in _BUSY:
            return cls("transient", f"the server is busy ({said})")
        return cls._of_status(status, said)

    @classmethod
    def _of_status(cls, status: int, said: str, wait: float = 0.0) -> _Fault:
        if status in (404, 410):
            return cls("missing", f"there is no such file or bucket ({said})")
        if status in (401, 403, 407):
            return cls("denied", f"access denied ({said})")
        if status in (408, 425, 429) or (status >= 500 and status not in (501, 505)):
            return cls("transient", f"the server is busy ({said})", wait)
        return cls("other", f"the server answers {said}")

    def error(self, path: str, place: str, tried: int) -> OSError:
        """Make the exception that tells it: about the store as a whole, or about one of its files."""
        text = self.text + (f"; tried {tried} times" if tried > 1 else "")
        whole = self.kind in ("store", "unreachable")
        if self.kind == "denied" and not path:
            whole, text = True, f"{text}; may these credentials list it?"
        if self.kind == "missing" and not path:
            whole, text = True, "there is no such bucket or folder"
        if whole:
            return StoreError(f"cannot use '{place}': {text}")
        number = {"missing": errno.ENOENT, "denied": errno.EACCES, "disk": errno.ENOSPC}.get(self.kind, errno.EIO)
        return OSError(number, text, f"{place.rstrip('/')}/{path}")


def _line(error: BaseException) -> str:
    """Write an exception on a line, without the secrets that may be in an address."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(://)[^/@\s]*@", r"\1", text)
    return re.sub(r"(://[^?\s]*)\?[^\s'\")]*", r"\1", text)
