"""``report.html``: a page to look at a whole run from a disk, without a network.

In the page itself stands what all images have in common and a row for each. What is seen when one is opened lies in
files of the image, see `sparsespec.formats.card`, and what differs from run to run in a script beside them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import sparsespec
from sparsespec._atomic import AtomicFile

__all__ = ["RUN_SCRIPT", "ReportRow", "ReportWriter", "photographs_link", "readable_duration", "readable_name"]

RUN_SCRIPT = "report/run.js"
"""What differs from run to run, relative to the folder of the page: times, and where the photographs are."""

MOST_FAILURES = 1000
"""Images without a result that are listed."""

_BINS = 20
_COLUMNS = (
    "path",
    "page",
    "status",
    "instances",
    "score",
    "area",
    "width",
    "height",
    "name",
    "overlay",
    "mask",
    "error",
)
# The page asks for nothing outside its disk or server, and a browser holds it to that. By "self" browsers mean
# different things for files.
_POLICY = (
    "default-src 'none'; img-src 'self' file: data: blob:; script-src 'self' file: 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class ReportRow:
    """What the report says of one image.

    Attributes
    ----------
    path : str
        The image, relative to the input.
    status : str
        ``done``, ``failed`` or ``skipped``.
    page : int or None
        Which page of a file that has several, from 1.
    instances : int
        How many were found.
    score : float or None
        The best of their scores.
    area : float or None
        Share of the picture that they cover together.
    size : (int, int) or None
        Width and height in pixels.
    name : str or None
        Output name, if there is a card: its files, of `sparsespec.formats.card`, are in ``report/images/``.
    overlay, mask : str or None
        Output files, relative to the page.
    error : str or None
        Why there is no result.
    seconds : mapping of str to float
        Time by stage, and ``total``.
    """

    path: str
    status: str
    page: int | None = None
    instances: int = 0
    score: float | None = None
    area: float | None = None
    size: tuple[int, int] | None = None
    name: str | None = None
    overlay: str | None = None
    mask: str | None = None
    error: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class ReportWriter:
    """Collects one row after the other, and writes the page and ``report/run.js`` at the end.

    There are no times in the page: it depends on the results only. The rows wait in unnamed temporary files, so that
    memory does not grow with the run.

    Parameters
    ----------
    path : str or os.PathLike
        Target; it appears with `close`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._rows: IO[bytes] = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 - lives as long as this
        self._times: IO[bytes] = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115
        self._stages: dict[str, None] = {}
        self._others: dict[int, str] = {}
        # Of those done, and of those without a result: how many are shown, and how many there are.
        self._done = [0, 0]
        self._without = [0, 0]
        self._counts: Counter[int] = Counter()
        self._scores = [0] * _BINS

    def add(self, row: ReportRow) -> None:
        """Add one image, in the order of the inputs. Of those done the ones with a card are shown, all are counted."""
        done = row.status == "done"
        shown = row.name is not None if done else self._without[0] < MOST_FAILURES
        kind = self._done if done else self._without
        kind[1] += 1
        if done:
            self._counts[row.instances] += 1
            if row.score is not None:
                self._scores[min(max(int(row.score * _BINS), 0), _BINS - 1)] += 1
        if not shown:
            return
        path = readable_name(row.path)
        if path != row.path:
            self._others[self._done[0] + self._without[0]] = quote(os.fsencode(row.path))
        kind[0] += 1
        width, height = row.size or (None, None)
        values = {
            **vars(row),
            "path": path,
            "score": None if row.score is None else round(row.score, 4),
            "area": None if row.area is None else round(row.area, 4),
            "width": width,
            "height": height,
            "error": None if row.error is None else readable_name(row.error),
        }
        self._rows.write(_line([values[column] for column in _COLUMNS]))
        self._stages.update(dict.fromkeys(stage for stage in row.seconds if stage != "total"))
        self._times.write(_line(dict(row.seconds)))

    def close(
        self,
        *,
        totals: Mapping[str, str],
        parameters: Mapping[str, object],
        interrupted: bool = False,
        photographs: str | None = None,
        finished: str | None = None,
    ) -> None:
        """Write both files and forget the rows.

        Parameters
        ----------
        totals : mapping of str to str
            Figures for the head of the page, by their captions.
        parameters : mapping
            What the run was asked to do.
        interrupted : bool
            Say that the run ended early.
        photographs : str or None
            Where the images are, of `photographs_link`.
        finished : str or None
            ISO 8601.
        """
        script = self._path.parent / RUN_SCRIPT
        script.parent.mkdir(exist_ok=True)
        with AtomicFile(script) as file:
            self._write_run(file, photographs, finished)
        index = {
            "version": sparsespec.__version__,
            "interrupted": interrupted,
            "totals": dict(totals),
            "parameters": {str(name): readable_name(_shown_value(value)) for name, value in parameters.items()},
            "shown": self._done[0] + self._without[0],
            "images": self._done[1] + self._without[1],
            "done": self._done,
            "without": self._without,
            "histograms": {"counts": [list(entry) for entry in sorted(self._counts.items())], "scores": self._scores},
            "columns": _COLUMNS,
        }
        from sparsespec.formats import viewer

        with AtomicFile(self._path) as page:
            page.write(_head(viewer.style() + viewer.report_style()).encode())
            page.write(_without_scripts(totals, interrupted=interrupted).encode("utf-8", "replace"))
            page.write(b'<script type="application/json" id="index">' + _line(index)[:-2] + b',"rows":[\n')
            _copy_lines(self._rows, page)
            page.write(b"]}</script>\n")
            for text in (viewer.script(), viewer.report_script()):
                page.write(f"<script>{text}</script>\n".encode())
            page.write(f'<script src="{RUN_SCRIPT}"></script>\n</body></html>\n'.encode())
        self.discard()

    def discard(self) -> None:
        """Give the temporary files back."""
        for file in (self._rows, self._times):
            with suppress(OSError):  # closing flushes, which a full disk refuses
                file.close()

    def _write_run(self, file: IO[bytes], photographs: str | None, finished: str | None) -> None:
        known: dict[str, Any] = {"photographs": photographs, "finished": finished, "stages": list(self._stages)}
        if photographs is not None and self._others:
            known["others"] = self._others
        file.write(b"sparsespec.run(" + _line(known)[:-2] + b',"seconds":[\n')
        before = b""
        for line in _lines(self._times):
            seconds = json.loads(line)
            numbers = [round(float(seconds.get(stage, 0)), 4) for stage in (*self._stages, "total")]
            file.write(before + _line(numbers if seconds else None).rstrip())
            before = b",\n"
        file.write(b"]});\n")


def photographs_link(folder: str | os.PathLike[str], page_folder: str | os.PathLike[str]) -> str | None:
    """Give the URL of a folder of photographs, relative to a page and with a slash at its end.

    None if there is none, as between the drives of Windows.
    """
    # Links are not resolved: browsers go up by the names in a URL.
    try:
        way = os.path.relpath(folder, page_folder)
    except ValueError:
        return None
    return "/".join(quote(os.fsencode(part)) for part in way.split(os.sep)) + "/"


def readable_name(name: str) -> str:
    """Show a file name that is not valid Unicode, and keep everything on one line."""
    text = os.fsencode(name).decode("utf-8", "replace") if _has_surrogates(name) else name
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def readable_duration(seconds: float) -> str:
    """Write a duration for people: ``0.42 s``, ``12.3 s``, ``4 min 05 s``, ``3 h 20 min``."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _has_surrogates(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _line(value: Any) -> bytes:
    # Within a page: nothing in it may look like the end of a script.
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return text.encode("ascii") + b"\n"


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    yield from file


def _copy_lines(file: IO[bytes], target: IO[bytes]) -> None:
    """Copy lines with commas between them."""
    before = b""
    for line in _lines(file):
        target.write(before + line.rstrip())
        before = b",\n"


def _head(style: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>sparsespec report</title><style>{style}</style></head><body>\n"
    )


def _without_scripts(totals: Mapping[str, str], *, interrupted: bool) -> str:
    figures = "; ".join(f"{caption}: {figure}" for caption, figure in totals.items())
    note = " The run was interrupted." if interrupted else ""
    return (
        '<div id="report"></div>\n<noscript><h1>sparsespec report</h1>'
        f"<p>{escape(figures)}.{note}</p><p>The images are shown by scripts in this page, which this browser does not"
        ' run. All results are in <a href="run.json">run.json</a> beside it.</p></noscript>\n'
    )


def _shown_value(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
