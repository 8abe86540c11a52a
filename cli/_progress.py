"""The progress line on a terminal, and failures as they happen."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sparsespec.batch import Row

__all__ = ["Line", "Progress"]

_BAR = 24


class Line:
    """One line on stderr that says what is done now; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._visible = self._stream.isatty()
        self._length = 0

    def show(self, text: str) -> None:
        """Put a text in the place of the one before."""
        if self._visible:
            self.erase()
            # One column stays free: a full line would scroll.
            text = text[: shutil.get_terminal_size().columns - 1]
            self._length = len(text)
            self._stream.write(text)
            self._stream.flush()

    def erase(self) -> None:
        """Take the line away."""
        # Spaces instead of an escape sequence: every terminal knows them.
        if self._length:
            self._stream.write("\r" + " " * self._length + "\r")
            self._stream.flush()
            self._length = 0


class Progress(Line):
    """Shows on stderr how far a run is; without a terminal there, only its failures.

    Parameters
    ----------
    total : int
        Number of images.
    """

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total = total
        self._failed = 0
        self._began = time.perf_counter()
        self._first: int | None = None

    def __enter__(self) -> Progress:
        self._show(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.erase()

    def update(self, row: Row, position: int, total: int) -> None:
        """Take note of one finished image."""
        from sparsespec.formats.report import readable_name

        if row.status == "failed":
            self._failed += 1
            self.erase()
            page = "" if row.page is None else f", page {row.page}"
            click.echo(f"failed: {readable_name(row.path)}{page}: {readable_name(row.error or '')}", err=True)
        if self._first is None:
            self._first = position - 1
        self._show(position)

    def stopping(self) -> None:
        """Say after Ctrl-C what happens now."""
        self.erase()
        click.echo("stopping after the images at work; Ctrl-C again to stop now", err=True)

    def _show(self, position: int) -> None:
        if self._visible:
            self.show(self.line(position, time.perf_counter() - self._began, self._first or 0))

    def line(self, position: int, elapsed: float, earlier: int = 0) -> str:
        """Compose the line for `position` images done after `elapsed` seconds, `earlier` of them before that."""
        from sparsespec.formats.report import readable_duration

        filled = _BAR * position // max(1, self._total)
        text = f"[{'#' * filled}{'-' * (_BAR - filled)}] {position}/{self._total}"
        if position > earlier and elapsed > 0:
            each = elapsed / (position - earlier)
            rate = f"{1 / each:.1f} images/s" if each < 1 else f"{each:.1f} s/image"
            left = readable_duration(each * (self._total - position))
            text += f"  {rate}  {left} left"
        if self._failed:
            text += f"  {self._failed} failed"
        return text
