"""Where results go: a folder that is never overwritten by accident."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sparsespec._atomic import TEMPORARY_PATTERN
from sparsespec.batch.record import RECORD_NAME, is_record

__all__ = ["OutputFolder", "OutputsError"]

_MASKS, _OVERLAYS = "masks", "overlays"


class OutputsError(ValueError):
    """The output folder cannot be used as it is."""


@dataclass(frozen=True)
class OutputFolder:
    """The files of a run.

    Attributes
    ----------
    root : Path
        The output folder.
    """

    root: Path

    @property
    def record(self) -> Path:
        """``run.json``."""
        return self.root / RECORD_NAME

    @property
    def coco(self) -> Path:
        """``instances.json``."""
        return self.root / "instances.json"

    @property
    def report(self) -> Path:
        """``report.html``."""
        return self.root / "report.html"

    @staticmethod
    def mask(name: str) -> str:
        """Path of the label image, relative to the output folder."""
        return f"{_MASKS}/{name}.png"

    @staticmethod
    def overlay(name: str) -> str:
        """Path of the overlay, relative to the output folder."""
        return f"{_OVERLAYS}/{name}.jpg"

    def prepare(self, names: Iterable[str], *, overwrite: bool) -> None:
        """Make the folder ready: new, empty, or cleared of the former run's files.

        Parameters
        ----------
        names : iterable of str
            What `output_names` gave for this run.
        overwrite : bool
            Allow a folder that is not empty. Removed are the files that its ``run.json`` lists, those that this run is
            going to write, and what an aborted run left unfinished; nothing else is touched.

        Raises
        ------
        OutputsError
            The folder is in use and `overwrite` is False, it is no folder, or it cannot be made or cleared.
        """
        try:
            if self.root.exists() and not self.root.is_dir():
                raise OutputsError(f"the output '{self.root}' is a file: give a folder")
            self.root.mkdir(parents=True, exist_ok=True)
            used = any(not name.startswith(".") for name in os.listdir(self.root))
            if used and not overwrite:
                reason = "already holds a run" if is_record(self.record) else "is not empty"
                raise OutputsError(
                    f"the output folder '{self.root}' {reason}: replace its results with --overwrite"
                    " (overwrite=True), or choose another one"
                )
            if used:
                self._clear(names)
        except OSError as error:
            raise OutputsError(f"cannot use the output folder '{self.root}': {error.strerror or error}") from error

    def _clear(self, names: Iterable[str]) -> None:
        old = [*_recorded_outputs(self.record)]
        old += [path for name in names for path in (self.mask(name), self.overlay(name))]
        for relative in old:
            path = self.root / relative
            if path.is_file() or path.is_symlink():
                path.unlink()
        for path in (self.coco, self.report, self.record):
            path.unlink(missing_ok=True)
        for path in self.root.glob(TEMPORARY_PATTERN):
            path.unlink(missing_ok=True)
        for folder in (self.root / _MASKS, self.root / _OVERLAYS):
            for here, _, _ in os.walk(folder, topdown=False):
                for path in Path(here).glob(TEMPORARY_PATTERN):
                    path.unlink(missing_ok=True)
                with suppress(OSError):  # not empty: it holds something that is not ours
                    os.rmdir(here)


def _recorded_outputs(record: Path) -> list[str]:
    """List the masks and overlays that a former run says it wrote."""
    try:
        rows = json.loads(record.read_bytes())["images"]
        paths = [row[kind] for row in rows for kind in ("mask", "overlay") if row.get(kind)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    # Somebody may have edited the record: nothing outside the two folders is ever removed on its word.
    return [
        path
        for path in paths
        if isinstance(path, str)
        and PurePosixPath(path).parts[:1] in ((_MASKS,), (_OVERLAYS,))
        and ".." not in PurePosixPath(path).parts
    ]
