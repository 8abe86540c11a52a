"""Models made ready to run: published files downloaded and built, foreign files built, both kept in the store."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hub
from .metadata import read_trunk_metadata
from .registry import ModelInfo, SourceFile, get_model, list_models
from .sources import deciding_files
from .store import ChecksumError, Store, StoreError, disk_is_full, file_sha256, source_key

_LOG = logging.getLogger(__name__)


def pull(
    name: str,
    *,
    precision: str | None = None,
    source: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    endpoint: str | None = None,
    force: bool = False,
    keep_download: bool = False,
) -> Path:
    """Make a model of the registry ready to run: download its files, build from them, keep the result.

    What is there already is compared with its record and left alone. What was downloaded is deleted after the build;
    files that somebody had put into the folder of downloads stay.

    Parameters
    ----------
    name : str
        A name of the registry.
    precision : {"float32", "float16", "int8"}, optional
        In place of what the name says.
    source : path, optional
        The published file of weights, fetched by other means; a ``config.json`` beside it is used too. Nothing is
        downloaded then.
    offline : bool, optional
        Whether to download nothing; by default what ``SPARSESPEC_OFFLINE`` and ``HF_HUB_OFFLINE`` say.
    endpoint : str, optional
        Address of a mirror of the hub; ``HF_ENDPOINT`` by default.
    force : bool
        Download and build again what is there already.
    keep_download : bool
        Keep what was downloaded, for other precisions.

    Returns
    -------
    pathlib.Path
        The model's file.

    Raises
    ------
    UnknownModelError
        When there is no model of that name.
    sparsespec.models.hub.DownloadError
        When a file can't be downloaded; the message says what to copy where.
    sparsespec.models.store.ChecksumError
        When a file isn't the one that was pinned or recorded.
    sparsespec.models.store.StoreError
        When the store can't be used, or what was built isn't what the registry says.
    sparsespec.models.vit.BuildError
        When nothing can be built from the file.
    ImportError
        When a package of the extra ``hub`` is missing.
    """
    info = get_model(name, precision=precision)
    if info.embedded:
        if source is not None:
            raise ValueError(f"model {info.name!r} comes with the package, it isn't made from a file")
        return info.path
    store = Store()
    path = store.model_path(info.file)
    if path.is_file() and not force:
        return store.check_model(info.file)
    _require_packages(info, source)
    store.make_folder(path.parent)
    with store.exclusive(info.family):
        if path.is_file() and not force:
            return store.check_model(info.file)  # another process made it meanwhile
        if path.is_file():
            _LOG.info("model %s is made again in %s", info.name, store.root)
        else:
            _LOG.info("model %s isn't in %s yet: it is made now, once", info.name, store.root)
        if source is not None:
            given = Path(source)
            if not given.is_file():
                raise FileNotFoundError(f"there is no file {os.fspath(source)!r} to build {info.name!r} from")
            entry = _entry(info, info.files[0], given, file_sha256(given), "unknown")
            weights, entries, temporary = given, [entry], list[Path]()
        else:
            weights, entries, temporary = _download(info, store, offline, endpoint, force)
        _LOG.info("building %s from %s", path, weights)
        _build(weights, path, store, info=info, origin=_origin(info, entries), sources=[key for key, _ in entries])
        for key, entry_of_file in entries:
            store.record_source(key, entry_of_file)
        if not keep_download:
            for file in temporary:
                _remove(file, store.root / "downloads")
    return path


@contextmanager
def published(name: str) -> Iterator[tuple[Path, str]]:
    """Get the published files of a model for as long as the block runs.

    They are checked, recorded and deleted as by :func:`pull`.

    Parameters
    ----------
    name : str
        A name of the registry, of a model that isn't embedded.

    Yields
    ------
    path : pathlib.Path
        The file of weights, with what belongs to it beside it.
    origin : str
        Where it comes from: repository, commit and file.

    Raises
    ------
    UnknownModelError, DownloadError, ChecksumError, StoreError, ImportError
        As :func:`pull`.
    """
    info = get_model(name)
    _require_packages(info)
    store = Store()
    with store.exclusive(info.family):
        weights, entries, temporary = _download(info, store, None, None, False)
        yield weights, _origin(info, entries)
        for key, entry in entries:
            store.record_source(key, entry)
        for file in temporary:
            _remove(file, store.root / "downloads")


def adopt(source: str | os.PathLike[str]) -> Path:
    """Build a foreign file into the store, once for each content of it and of what lies beside it and belongs to it.

    Parameters
    ----------
    source : path
        An .onnx export or a .safetensors state dict of a vision transformer.

    Returns
    -------
    pathlib.Path
        The file that was built, in float32.

    Raises
    ------
    sparsespec.models.vit.BuildError
        When nothing can be built from the file.
    sparsespec.models.store.StoreError
        When the store can't be used.
    ImportError
        Without a package that the build needs.
    """
    given = Path(source)
    key = _content(given)
    store = Store()
    file = f"{key}-float32.onnx"
    path = store.model_path(file)
    if not path.is_file():
        store.make_folder(path.parent)
        with store.exclusive(key):
            if not path.is_file():
                _LOG.info("%s is built into %s now, once", given, path)
                _build(given, path, store)
    return store.check_model(file)


# By path, sizes and times of change.
_contents: dict[Any, str] = {}


def _content(path: Path) -> str:
    """SHA-256 of a file, together with those beside it that a build reads."""
    files = deciding_files(path)
    seen: Any = tuple((os.path.abspath(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    if seen not in _contents:
        parts = [file_sha256(file) for file in files]
        _contents[seen] = parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()
    return _contents[seen]


def _require_packages(info: ModelInfo, source: str | os.PathLike[str] | None = None) -> None:
    """Say what is missing before a gigabyte is downloaded, not after."""
    needed = ["huggingface_hub"] * (source is None) + ["onnx"]
    needed += ["safetensors"] * any(file.name.endswith(".safetensors") for file in info.files)
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"making the model {info.name!r} needs {', '.join(missing)}: pip install 'sparsespec[hub]'")


def _entry(info: ModelInfo, file: SourceFile, path: Path, sha256: str, commit: str) -> tuple[str, dict[str, Any]]:
    """Compare a published file with what the registry says; make its entry of the record."""
    assert info.repository is not None
    assert info.revision is not None
    if file.sha256 is not None and sha256 != file.sha256:
        raise ChecksumError(
            f"{str(path)!r} isn't {file.name} of {info.repository} at revision {info.revision}: its SHA-256 is "
            f"{sha256}, expected {file.sha256}. Delete it and fetch it again; a model of your own is built by "
            "'sparsespec models build FILE -o OUT.onnx'"
        )
    if file.sha256 is not None:
        commit = info.revision  # wherever the file comes from
    entry = {
        "repository": info.repository,
        "revision": info.revision,
        "commit": commit,
        "file": file.name,
        "sha256": sha256,
        "size": path.stat().st_size,
    }
    return source_key(info.repository, info.revision, file.name), entry


def _download(
    info: ModelInfo, store: Store, offline: bool | None, endpoint: str | None, force: bool
) -> tuple[Path, list[tuple[str, dict[str, Any]]], list[Path]]:
    """Get the published files of a model: the weights, the entries of the record, and those that are new here."""
    assert info.repository is not None
    assert info.revision is not None
    may_fetch = not (hub.is_offline() if offline is None else offline or hub.is_offline())
    recorded = store.read_record()["sources"]
    paths, entries, new = [], [], []
    for file in info.files:
        key = source_key(info.repository, info.revision, file.name)
        path = store.download_path(info.repository, info.revision, file.name)
        known = recorded.get(key, {})
        # "main" means the commit of the first pull from then on.
        commit = known.get("commit", "unknown")
        revision = commit if info.revision == "main" and commit != "unknown" else info.revision
        if path.is_file() and not (force and may_fetch):
            _LOG.info("using %s", path)
            sha256 = file_sha256(path)
        else:
            try:
                if not may_fetch:
                    ruled_out_by = hub.offline_variable() or "the option 'offline'"
                    url = hub.file_url(info.repository, revision, file.name, endpoint=endpoint)
                    raise hub.OfflineError(f"{url} would have to be downloaded, which {ruled_out_by} rules out")
                _LOG.info("downloading %s of %s to %s", file.name, info.repository, path)
                store.make_folder(path.parent)
                there = path.is_file()
                fetched = hub.fetch(info.repository, file.name, path, revision=revision, endpoint=endpoint)
            except hub.DownloadError as error:
                raise type(error)(f"{error}.\n{_by_hand(info, store, revision)}") from error
            sha256, commit = fetched.sha256, fetched.commit
            if not there:
                new.append(path)
        try:
            entry = _entry(info, file, path, sha256, commit)
            store.check_source(key, sha256)
        except ChecksumError:
            if path in new:
                path.unlink()  # or the next pull would take it for one that was put there
            raise
        paths.append(path)
        entries.append(entry)
    return paths[0], entries, new


def _by_hand(info: ModelInfo, store: Store, revision: str) -> str:
    """Say how to do without network: what to copy where, and what to call then."""
    assert info.repository is not None
    assert info.revision is not None
    copies = "".join(
        f"\n  {hub.file_url(info.repository, revision, file.name, endpoint=hub.ENDPOINT)}"
        f"\n  to {str(store.download_path(info.repository, info.revision, file.name))!r}"
        for file in info.files
    )
    return (
        f"Without network, copy{copies}\nand call 'sparsespec models pull {info.name} --offline'; with the file "
        f"elsewhere, 'sparsespec models pull {info.name} --from FILE'"
    )


def _origin(info: ModelInfo, entries: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Say where weights come from: which commit, as far as it is known."""
    commit = entries[0][1]["commit"]
    return f"{info.repository}@{info.revision if commit == 'unknown' else commit}, {info.files[0].name}"


def _build(
    source: Path,
    path: Path,
    store: Store,
    *,
    info: ModelInfo | None = None,
    origin: str | None = None,
    sources: Sequence[str] = (),
) -> None:
    """Build a file into the store and record it; without ``info`` a foreign one."""
    from .build import build_model

    options: dict[str, Any] = {"precision": "float32"}
    if info is not None:
        options = {"precision": info.precision, "name": info.name, "rule": info.rule, "origin": origin}
    temporary = path.with_name(f"tmp-{secrets.token_hex(8)}.onnx")
    try:
        build_model(source, temporary, **options)
        if info is not None:
            _check_architecture(temporary, info, source)
        known = {"sources": list(sources)} | ({} if info is None else {"name": info.name})
        store.keep_model(path.name, temporary, known)
    except OSError as error:
        if disk_is_full(error) or isinstance(error, PermissionError):
            raise store.unwritable(path, error) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _check_architecture(path: Path, info: ModelInfo, source: Path) -> None:
    found = read_trunk_metadata(path)
    facts = {
        "patch size": (found.patch_size, info.patch_size),
        "channels": (found.embed_dim, info.dim),
        "heads": (found.heads, info.heads),
        "blocks": (found.blocks, info.blocks),
        "register tokens": (len(found.prefix) - 1, info.registers),
    }
    wrong = [f"{what} {is_}, expected {must}" for what, (is_, must) in facts.items() if is_ != must]
    if wrong:
        raise StoreError(
            f"{str(source)!r} isn't the network of model {info.name!r}: {'; '.join(wrong)}. A model of your own is "
            "built by 'sparsespec models build FILE -o OUT.onnx'"
        )


def _remove(file: Path, top: Path) -> None:
    """Delete a file and the folders above it that are empty then."""
    with suppress(OSError):
        file.unlink(missing_ok=True)
        for folder in file.parents:
            if folder == top:
                break
            folder.rmdir()


@dataclass(frozen=True)
class Finding:
    """What became of one file when it was verified.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    name : str
        Model it belongs to, or the place it was downloaded from.
    sha256 : str or None
        What it is; None where it can't be read.
    problem : str or None
        What is wrong, and what to do; None where all is well.
    failed : bool
        False for a file that merely isn't in the record yet.
    """

    path: Path
    name: str
    sha256: str | None
    problem: str | None
    failed: bool


def verify(names: Sequence[str] = ()) -> list[Finding]:
    """Compute the SHA-256 of the embedded model and of every file in the store, and compare each with its record.

    Parameters
    ----------
    names : sequence of str
        Models to look at; by default all there are, in every precision, foreign files and kept downloads included.

    Returns
    -------
    list of Finding
        None for a model that isn't installed.

    Raises
    ------
    UnknownModelError
        When there is no model of such a name.
    sparsespec.models.store.StoreError
        When the record is damaged.
    """
    wanted = {get_model(name).name for name in names}
    wanted_files = {get_model(name).file for name in wanted}
    found = []
    for info in list_models():
        if info.embedded and (not wanted or info.name in wanted):
            found.append(_compare(info.path, info.name, info.sha256, "reinstall sparsespec"))
    try:
        store = Store()
    except StoreError:
        return found  # without a folder there is nothing in it
    record = store.read_record()
    folder = store.root / "models"
    for path in sorted(folder.glob("*.onnx")) if folder.is_dir() else []:
        entry = record["models"].get(path.name, {})
        name = str(entry.get("name", path.stem))
        if path.name.startswith("tmp-") or (wanted and path.name not in wanted_files and name not in wanted):
            continue
        again = f"'sparsespec models pull {name} --force'" if "name" in entry else "delete it, then use it again"
        found.append(_compare(path, name, entry.get("sha256"), again))
    for key, entry in sorted(record["sources"].items()):
        path = store.download_path(entry["repository"], entry["revision"], entry["file"])
        if path.is_file() and not wanted:
            found.append(_compare(path, key, entry["sha256"], "delete it; it is downloaded again when needed"))
    return found


def _compare(path: Path, name: str, expected: str | None, remedy: str) -> Finding:
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        return Finding(path, name, None, f"can't be read ({error.strerror or error}); {remedy}", True)
    if expected is None:
        return Finding(path, name, sha256, "isn't in the record yet; it is recorded when it is first used", False)
    if sha256 != expected:
        return Finding(path, name, sha256, f"SHA-256 is {sha256}, expected {expected}; {remedy}", True)
    return Finding(path, name, sha256, None, False)


def remove(name: str, *, forget: bool = False) -> list[Path]:
    """Delete a model from the store, in the precision named, with what was downloaded for it.

    Parameters
    ----------
    name : str
        A name of the registry.
    forget : bool
        Forget the recorded SHA-256 and commit of its published files too, so that the next pull records new ones.

    Returns
    -------
    list of pathlib.Path
        What was deleted.

    Raises
    ------
    UnknownModelError
        When there is no such model.
    ValueError
        When it is the embedded one.
    sparsespec.models.store.StoreError
        When the store can't be written.
    """
    info = get_model(name)
    if info.embedded:
        raise ValueError(f"model {info.name!r} comes with the package and stays")
    assert info.repository is not None
    assert info.revision is not None
    store = Store()
    downloads = [store.download_path(info.repository, info.revision, file.name) for file in info.files]
    gone = []
    with store.exclusive(info.family):
        for path in (store.model_path(info.file), *downloads):
            parts = [part for part in path.parent.glob(f"{path.name}.*.part") if path in downloads]
            for file in (path, *parts):
                if file.exists():
                    try:
                        file.unlink()
                    except OSError as error:
                        raise store.unwritable(file, error) from error
                    gone.append(file)
                    if path in downloads:
                        _remove(file, store.root / "downloads")

        def drop(record: dict[str, dict[str, dict[str, Any]]]) -> None:
            record["models"].pop(info.file, None)
            for file in info.files if forget else ():
                record["sources"].pop(source_key(str(info.repository), str(info.revision), file.name), None)

        store.update_record(drop)
    return gone
