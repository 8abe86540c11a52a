"""Files of the Hugging Face hub, or of a mirror of it: downloaded once, resumed where they broke off, hashed.

Metadata, address, token, proxies and transfer are huggingface_hub's own. The place is ours: a file that broke off is
continued by the next call, whichever process makes it, and nothing but the file is left.

What is obeyed: ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``, ``HF_HUB_ETAG_TIMEOUT``, ``HF_HUB_DOWNLOAD_TIMEOUT``,
``HF_HUB_DISABLE_PROGRESS_BARS``, the variables of proxies and certificates, and ``SPARSESPEC_OFFLINE``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from .store import ChecksumError, StoreError, disk_is_full, file_sha256

_LOG = logging.getLogger(__name__)

ENDPOINT = "https://huggingface.co"
SUFFIXES = (".onnx", ".safetensors", ".json")
"""What may be downloaded: formats that hold data and no program, unlike a pickle."""

_WAITS = (0.5, 2.0, 5.0)
"""Seconds before each new attempt."""
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_TRUE = ("1", "on", "yes", "true")


class DownloadError(RuntimeError):
    """A file could not be downloaded."""


class OfflineError(DownloadError):
    """A file would have to be downloaded, and that was ruled out."""


@dataclass(frozen=True)
class Fetched:
    """A downloaded file.

    Attributes
    ----------
    path : pathlib.Path
        Where it lies.
    commit : str
        Commit of the repository that it belongs to.
    size : int
        Bytes.
    sha256 : str
        Its SHA-256.
    """

    path: Path
    commit: str
    size: int
    sha256: str


def is_offline() -> bool:
    """Whether ``SPARSESPEC_OFFLINE`` or ``HF_HUB_OFFLINE`` forbids downloads."""
    return offline_variable() is not None


def offline_variable() -> str | None:
    """Name the variable of the environment that forbids downloads."""
    names = ("SPARSESPEC_OFFLINE", "HF_HUB_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").lower() in _TRUE), None)


def endpoint_of(endpoint: str | None = None) -> str:
    """Say which server is asked: the one given, else ``HF_ENDPOINT``, else the hub itself.

    Raises
    ------
    ValueError
        When it isn't an http or https address.
    """
    chosen = (endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    parts = urlsplit(chosen)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        where = "endpoint" if endpoint else "HF_ENDPOINT"
        raise ValueError(f"{where} must be an address such as {ENDPOINT}, got {chosen!r}")
    return chosen


def file_url(repository: str, revision: str, file: str, *, endpoint: str | None = None) -> str:
    """Give the address of a file, for a message or another program to fetch it."""
    return f"{endpoint_of(endpoint)}/{repository}/resolve/{quote(revision, safe='')}/{quote(file)}"


def fetch(
    repository: str,
    file: str,
    target: str | os.PathLike[str],
    *,
    revision: str = "main",
    endpoint: str | None = None,
) -> Fetched:
    """Download a file of a repository, or the rest of it where an earlier call broke off.

    Unfinished, it lies beside the target as ``TARGET.<etag>.part``. The hub says the SHA-256 of large files in
    advance; what arrives is compared with it. Shows a progress bar on a terminal. Only one process at a time may fetch
    to a target.

    Parameters
    ----------
    repository : str
        Such as ``facebook/dinov2-base``.
    file : str
        Path inside it. Only .onnx, .safetensors and .json are downloaded.
    target : path
        Where to put it. Its folder must exist; a file that is there is replaced when the new one is whole.
    revision : str
        Commit, tag or branch.
    endpoint : str, optional
        Address of the hub or a mirror; ``HF_ENDPOINT`` by default.

    Returns
    -------
    Fetched

    Raises
    ------
    DownloadError
        When the server can't be reached, hasn't got the file or doesn't give it away.
    OfflineError
        When downloads are forbidden by ``SPARSESPEC_OFFLINE`` or ``HF_HUB_OFFLINE``.
    sparsespec.models.store.ChecksumError
        When what arrived isn't what the hub had announced.
    sparsespec.models.store.StoreError
        When the disk is full or can't be written.
    ImportError
        When huggingface_hub isn't installed.
    ValueError
        When the file is of another kind, or the endpoint no address.
    """
    if not file.lower().endswith(SUFFIXES):
        raise ValueError(
            f"{file!r} of {repository!r} isn't downloaded: only {', '.join(SUFFIXES)} are, which hold no program"
        )
    server = endpoint_of(endpoint)
    url = file_url(repository, revision, file, endpoint=server)
    if is_offline():
        raise OfflineError(f"{url} would have to be downloaded, but SPARSESPEC_OFFLINE or HF_HUB_OFFLINE is set")
    hub = _huggingface_hub()
    path = Path(target)
    for wait in (*_WAITS, None):
        try:
            return _attempt(hub, repository, file, path, revision, server)
        except (StoreError, DownloadError):
            raise
        except Exception as error:  # the HTTP library below huggingface_hub changed twice; each has its own exceptions
            if isinstance(error, OSError) and (disk_is_full(error) or isinstance(error, PermissionError)):
                raise StoreError(
                    f"cannot write {str(path)!r}: {error.strerror}. What arrived is kept, and the next call goes on "
                    "from there: make room, or set SPARSESPEC_HOME to a folder on another disk"
                ) from error
            if wait is None or not _may_pass(error):
                raise DownloadError(_explain(error, url)) from error
            _LOG.info("%s: %s; trying again in %g s", url, _first_line(error), wait)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _attempt(hub: Any, repository: str, file: str, path: Path, revision: str, server: str) -> Fetched:
    import sparsespec

    said = {"library_name": "sparsespec", "library_version": sparsespec.__version__}
    asked = hub.hf_hub_url(repository, file, revision=revision, endpoint=server)
    metadata = hub.get_hf_file_metadata(asked, **said)
    commit, etag, size = metadata.commit_hash, metadata.etag, metadata.size
    if not commit or not etag:
        missing = "X-Repo-Commit" if not commit else "ETag"
        raise DownloadError(
            f"{asked} was answered without the header {missing}: {server} isn't a Hugging Face hub or a mirror of one; "
            "check HF_ENDPOINT and the proxy"
        )
    if re.fullmatch("[0-9a-f]{40}", commit) is None:
        raise DownloadError(f"{asked} was answered with the commit {commit!r}, which is none")
    # The file of that commit, whatever becomes of the branch meanwhile.
    url = hub.hf_hub_url(repository, file, revision=commit, endpoint=server)
    headers = hub.build_hf_headers(**said)
    headers["Accept-Encoding"] = "identity"  # a compressed answer can't be continued
    # An ETag may hold anything; its digest may be part of a file name.
    part = path.with_name(f"{path.name}.{hashlib.sha256(etag.encode()).hexdigest()[:16]}.part")
    for old in path.parent.glob(f"{path.name}.*.part"):
        if old != part:
            old.unlink(missing_ok=True)
    done = part.stat().st_size if part.exists() else 0
    if size is not None:
        if done > size:
            part.unlink()
            done = 0
        free = shutil.disk_usage(path.parent).free
        if size - done > free:
            raise StoreError(
                f"cannot download {url}: {(size - done) / 1e6:.1f} MB are needed in {str(path.parent)!r}, which has "
                f"{free / 1e6:.1f} MB left; make room, or set SPARSESPEC_HOME to a folder on another disk"
            )
    try:
        with open(part, "ab") as stream:
            hub.http_get(url, stream, resume_size=done, headers=headers, expected_size=size)
            stream.flush()
            os.fsync(stream.fileno())
    except Exception as error:
        # 416: the server has no bytes after those that are here, so they can't be the beginning of its file.
        if done and _status(error) == 416:
            part.unlink(missing_ok=True)
            return _attempt(hub, repository, file, path, revision, server)
        raise
    sha256 = file_sha256(part)
    if re.fullmatch("[0-9a-f]{64}", etag) and sha256 != etag:
        part.unlink()
        raise ChecksumError(
            f"{url} arrived with SHA-256 {sha256}, the server had announced {etag}: something on the way changed it. "
            "Try again, without proxy or mirror if there is one"
        )
    os.replace(part, path)
    return Fetched(path, commit, path.stat().st_size, sha256)


class _Hub:
    """What is used of huggingface_hub, gathered so that one that is missing is noticed at once."""

    def __init__(self) -> None:
        # Nobody who segments photographs expects to be counted; a value that is set already is left alone.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        self.get_hf_file_metadata = get_hf_file_metadata
        self.hf_hub_url = hf_hub_url
        self.http_get = http_get
        self.build_hf_headers = build_hf_headers


def _huggingface_hub() -> _Hub:
    try:
        return _Hub()
    except ImportError as error:
        raise ImportError(
            f"downloading a model needs huggingface_hub 0.30 or newer ({error}): pip install 'sparsespec[hub]'"
        ) from error


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def _is_network(error: BaseException) -> bool:
    """Whether an exception comes from the HTTP library, which is requests, httpx or httpx2, by version."""
    return any(kind.__module__.partition(".")[0] in _HTTP_LIBRARIES for kind in type(error).__mro__)


_HTTP_LIBRARIES = ("requests", "httpx", "httpx2", "httpcore", "urllib3")


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in _BUSY
    # Without an errno: huggingface_hub found another number of bytes than announced.
    return _is_network(error) or (type(error) is OSError and error.errno is None)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _explain(error: Exception, url: str) -> str:
    status, kind = _status(error), type(error).__name__
    token = "there is a token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "no token is set in HF_TOKEN"
    if kind == "GatedRepoError":
        return f"{url}: access has to be granted on its page first, and then HF_TOKEN be set ({token})"
    if kind == "RevisionNotFoundError":
        return f"{url}: the server has no such revision (status {status})"
    if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return f"{url}: the server has no such file (status {status})"
    if kind == "RepositoryNotFoundError" or status in (401, 403):
        return (
            f"{url}: the server has no such repository or doesn't let you see it (status {status}; {token}). An "
            "expired token is refused even where none is needed"
        )
    if status is not None:
        return f"{url}: the server answered with status {status}: {_first_line(error)}"
    if _is_network(error):
        return f"{url} can't be reached: {kind}: {_first_line(error)}"
    return f"{url} can't be downloaded: {_first_line(error)}"
