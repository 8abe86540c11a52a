"""Where results go: names that never meet, and a folder that is never overwritten by accident."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from sparsespec._atomic import TEMPORARY_PATTERN
from sparsespec._locks import try_to_lock
from sparsespec.batch.job import Item
from sparsespec.batch.names import page_name
from sparsespec.batch.plan import Plan, PlanError
from sparsespec.batch.record import RECORD_NAME, is_record, stored_rows
from sparsespec.batch.state import STATE, State
from sparsespec.batch.store import Store, inside
from sparsespec.formats.report import RUN_SCRIPT

__all__ = [
    "FINAL_FILES",
    "OutputsError",
    "card_files",
    "coco_file",
    "held",
    "mask_file",
    "overlay_file",
    "planned_files",
    "prepare",
    "remove_outputs",
    "sweep",
    "yolo_file",
]

_MASKS, _OVERLAYS, _CUTOUTS, _YOLO, _SHARDS = "masks", "overlays", "cutouts", "yolo/labels", "instances"
_REPORT = "report"
# Below that folder, so that no image can be called like the file of the report beside it.
_CARDS = f"{_REPORT}/images"
_OF_IMAGES = (_MASKS, _OVERLAYS, _YOLO, _CUTOUTS, _CARDS)
FINAL_FILES = (
    "instances.json",
    "report.html",
    RUN_SCRIPT,
    "instances.csv",
    "instances.parquet",
    "youtube_vis.json",
    "youtube_vis.videos.json",
    "yolo/data.yaml",
    RECORD_NAME,
)
"""What a run writes at its end, as far as it is asked for; the record last."""

_ALWAYS = ("instances.json", "report.html", RUN_SCRIPT, RECORD_NAME)
_COCO_FILE = re.compile(rf"{_SHARDS}/[0-9]{{6,}}\.json")


class OutputsError(ValueError):
    """The output folder cannot be used as it is."""


def mask_file(name: str) -> str:
    """Give the path of a label image, relative to the output."""
    return f"{_MASKS}/{name}.png"


def overlay_file(name: str) -> str:
    """Give the path of an overlay, relative to the output."""
    return f"{_OVERLAYS}/{name}.jpg"


def yolo_file(name: str) -> str:
    """Give the path of labels for YOLO, relative to the output."""
    return f"{_YOLO}/{name}.txt"


def card_files(name: str) -> tuple[str, str]:
    """Give the paths of what the report shows of an image, relative to the output: its photograph, and the rest."""
    return f"{_CARDS}/{name}.jpg", f"{_CARDS}/{name}.js"


def coco_file(shard: int) -> str:
    """Give the path of the COCO JSON of a shard, relative to the output."""
    return f"{_SHARDS}/{shard:06d}.json"


def planned_files(store: Store, item: Item) -> Iterator[str]:
    """List what a process may have written of a file when it ended too early to tell.

    Not what it had begun to write: that may be somebody else's who is at work on the same file; :func:`sweep` removes
    it.
    """
    yield from (mask_file(item.name), overlay_file(item.name), yolo_file(item.name), *card_files(item.name))
    pages = page_name(item.name, item.path, 1).rpartition("/")[0]
    # Beside the cut-outs of an image may lie those of a folder that is called like it.
    own = f"{_CUTOUTS}/{item.name}/"
    yield from _written(path for path in store.list(own.rstrip("/")) if "/" not in path.removeprefix(own))
    for kind in _OF_IMAGES:
        yield from _written(store.list(f"{kind}/{pages}"))


def _written(paths: Iterable[str]) -> list[str]:
    return [path for path in paths if not fnmatchcase(os.path.basename(path), TEMPORARY_PATTERN)]


def sweep(store: Store) -> None:
    """Remove what a process that ended too early left unfinished."""
    if store.folder is not None:
        _sweep(store.folder)


def remove_outputs(store: Store, paths: Iterable[str], *, item: Item | None = None) -> None:
    """Remove files of images, and the folders that are empty then; nothing outside the folders of results.

    Parameters
    ----------
    store : Store
        Of the output.
    paths : iterable of str
        The files.
    item : Item, optional
        Whose they are, while others may be at work: folders go only if they are its own, since somebody may be about
        to write a file into any other.
    """
    own = None if item is None else _own_folders(item)
    folders = set()
    for path in paths:
        if _is_ours(path):
            store.remove(path)
            folders.add(os.path.dirname(path))
    if store.folder is not None:
        for folder in folders:
            with suppress(OSError):  # not empty
                while folder and (own is None or folder.startswith(own)):
                    (store.folder / folder).rmdir()
                    folder = os.path.dirname(folder)


def _own_folders(item: Item) -> tuple[str, ...]:
    pages = page_name(item.name, item.path, 1).rpartition("/")[0]
    return f"{_CUTOUTS}/{item.name}", *(f"{kind}/{pages}" for kind in _OF_IMAGES)


@contextmanager
def held(store: Store) -> Iterator[None]:
    """Keep other runs out of an output folder, as far as its disk has locks.

    Raises
    ------
    OutputsError
        Another run is at work there, or the folder cannot be made.
    """
    if store.folder is None:
        yield
        return
    try:
        if store.folder.exists() and not store.folder.is_dir():
            raise OutputsError(f"the output '{store.place}' is a file: give a folder")
        store.folder.mkdir(parents=True, exist_ok=True)
        for folder in (store.folder / _REPORT, store.folder / STATE):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                kind = "link" if folder.is_symlink() else "file"
                raise OutputsError(f"'{folder}' is a {kind}: remove it, or choose another output")
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _unusable(store, error) from error
    try:
        if not try_to_lock(descriptor):
            raise OutputsError(f"another run is at work in the output folder '{store.place}': wait for its end")
        try:
            yield
        except OutputsError:
            if os.listdir(folder) == ["lock"]:  # a folder that is not ours is left as it was
                with suppress(OSError):
                    (folder / "lock").unlink()
                    folder.rmdir()
            raise
    finally:
        # Not removed: another run may hold the same file open by now, and a third would make a new one.
        os.close(descriptor)


def prepare(store: Store, plan: Plan, names: Iterable[str], *, overwrite: bool) -> Plan:
    """Make the output ready: new, empty, cleared of the former run's files, or to be gone on with.

    Parameters
    ----------
    store : Store
        Of the output.
    plan : Plan
        Of this run.
    names : iterable of str
        What `output_names` gave for this run.
    overwrite : bool
        Replace a former run. Removed are the files that it noted, those that this run is going to write, and what it
        left unfinished; nothing else is touched.

    Returns
    -------
    Plan
        The former one when the same run goes on, as its number of shards is kept; otherwise `plan`.

    Raises
    ------
    OutputsError
        The output holds something else and `overwrite` is False, or cannot be used.
    """
    state = State(store)
    try:
        former, problem = _former(state)
        if not overwrite:
            if former is not None:
                _check_same(store, former, plan)
                if store.folder is not None:
                    _sweep(store.folder)
                return former
            if problem is not None:
                reason = f"holds a run that cannot be continued: {problem}"
            elif not _is_used(store):
                state.clear()
                return plan
            elif store.folder is not None and is_record(store.folder / RECORD_NAME):
                reason = "already holds a run that cannot be continued"
            else:
                reason = "is not empty"
            raise OutputsError(
                f"the output folder '{store.place}' {reason}: replace its results with --overwrite (overwrite=True),"
                " or choose another one"
            )
        if former is not None or problem is not None or _is_used(store):
            _clear(state, names)
        else:
            state.clear()
    except OutputsError:
        raise
    except OSError as error:
        raise _unusable(store, error) from error
    return plan


def _former(state: State) -> tuple[Plan | None, str | None]:
    try:
        return state.plan(), None
    except PlanError as error:
        return None, str(error)


def _check_same(store: Store, former: Plan, plan: Plan) -> None:
    differences = plan.differences(former)
    if differences:
        raise OutputsError(
            f"the output folder '{store.place}' holds a run with other settings ({'; '.join(differences)}): continue it"
            " with the former ones, replace its results with --overwrite (overwrite=True), or choose another output"
        )


def _unusable(store: Store, error: OSError) -> OutputsError:
    return OutputsError(f"cannot use the output folder '{store.place}': {error.strerror or error}")


def _is_used(store: Store) -> bool:
    if store.folder is None:
        return next(store.list(""), None) is not None
    return any(not name.startswith(".") for name in os.listdir(store.folder))


def _clear(state: State, names: Iterable[str]) -> None:
    store = state.store
    # A folder without a run of ours may hold files of such names all the same, which are somebody's.
    ours = store.size(f"{STATE}/plan.json") is not None
    if store.folder is not None:
        ours = ours or is_record(store.folder / RECORD_NAME)
    for shard in state.shards():
        past, _ = state.past(shard)
        remove_outputs(store, (path for outcomes in past.settled.values() for o in outcomes for path in o.files))
        for path, name in past.names.items():
            remove_outputs(store, planned_files(store, Item(path, name)))
    if ours:
        remove_outputs(store, [path for path in store.list(_SHARDS) if _COCO_FILE.fullmatch(path)])
    if store.folder is not None:
        _clear_folder(store.folder, names)
    for path in FINAL_FILES if ours else _ALWAYS:
        store.remove(path)
    state.clear()


def _clear_folder(root: Path, names: Iterable[str]) -> None:
    """Remove what former versions noted in another way, what this run is going to write, and what is unfinished."""
    for row in stored_rows(root / RECORD_NAME):
        for kind in ("mask", "overlay"):
            if isinstance(row.get(kind), str) and _is_ours(row[kind]):
                _unlink(root, row[kind])
    for name in names:
        for path in (mask_file(name), overlay_file(name), *card_files(name)):
            _unlink(root, path)
    _sweep(root)
    for kind in (_MASKS, _OVERLAYS, _CUTOUTS, _YOLO, _REPORT):
        if _is_linked(root, kind):
            continue
        for here, _, _ in os.walk(root / kind, topdown=False):
            with suppress(OSError):  # not empty: it holds something that is not ours
                os.rmdir(here)


def _sweep(root: Path) -> None:
    """Remove what a killed process left unfinished."""
    folders = [str(root)]
    for kind in (_MASKS, _OVERLAYS, _CUTOUTS, "yolo", _REPORT, _SHARDS, STATE):
        if not _is_linked(root, kind):
            folders += [here for here, _, _ in os.walk(root / kind)]
    start, end = TEMPORARY_PATTERN.split("*")
    for folder in folders:
        with os.scandir(folder) as entries:
            left = [entry.path for entry in entries if entry.name.startswith(start) and entry.name.endswith(end)]
        for path in left:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _unlink(root: Path, path: str) -> None:
    if not _is_linked(root, os.path.dirname(path)):
        place = root / path
        if place.is_file() or place.is_symlink():
            place.unlink()


def _is_linked(root: Path, folder: str) -> bool:
    """Tell whether a folder of results is somewhere else, where nothing is ours."""
    try:
        inside(root, f"{folder}/x")
    except OSError:
        return True
    return False


def _is_ours(path: str) -> bool:
    # Somebody may have edited a record: nothing outside the folders of results is ever removed on its word.
    parts = PurePosixPath(path).parts
    top = {_MASKS, _OVERLAYS, _CUTOUTS, "yolo", _REPORT, _SHARDS}
    return len(parts) > 1 and parts[0] in top and ".." not in parts and not PurePosixPath(path).is_absolute()
