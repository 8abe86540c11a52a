"""Tables of measurements: as text for a terminal, as Markdown for a document, as plain values for JSON."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparsespec.evaluation.benchmark.measure import Outcome

__all__ = [
    "Column",
    "Section",
    "Table",
    "check_document",
    "contest",
    "growth_exponent",
    "ratio",
    "update_document",
]

OURS = "sparsespec"


@dataclass(frozen=True)
class Column:
    """One column: the key of its values in a row, its caption, and how its values are written.

    ``kind`` is one of text, count, seconds, ratio, percent, number, residual, bytes, kilobytes, megabytes,
    microseconds, cosine, fine (a ratio near 1).
    """

    key: str
    caption: str
    kind: str = "text"

    def show(self, row: Mapping[str, Any]) -> str:
        """Write this column's value of a row; "-" where there is none."""
        value = row.get(self.key)
        if value is None:
            return "-"
        if self.kind == "ratio":
            return f"{'> ' if row.get('ratio_at_least') else ''}{_significant(value, 2)} x"
        return _WRITERS[self.kind](value)


@dataclass
class Table:
    """Measurements under one heading.

    Attributes
    ----------
    key
        Short name, for JSON.
    title
        Heading.
    columns
        In their order. Rows may hold more than is shown; JSON has it all.
    rows
        Plain values, as JSON can hold. Each has ``ours`` (is it our own figure), ``status`` (see
        :class:`~sparsespec.evaluation.benchmark.measure.Outcome`) and ``remark``.
    notes
        Sentences below the table.
    """

    key: str
    title: str
    columns: Sequence[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def _cells(self) -> list[list[str]]:
        return [[column.show(row) for column in self.columns] for row in self.rows]

    def to_text(self) -> str:
        """Return the table with aligned columns."""
        lines = [[column.caption for column in self.columns], *self._cells()]
        widths = [max(len(line[position]) for line in lines) for position in range(len(self.columns))]
        shown = [self.title, "-" * len(self.title)]
        for line in lines:
            cells = [
                cell.ljust(width) if column.kind == "text" else cell.rjust(width)
                for column, cell, width in zip(self.columns, line, widths, strict=True)
            ]
            shown.append("  ".join(cells).rstrip())
        return "\n".join([*shown, *self.notes])

    def to_markdown(self) -> str:
        """Return a heading, a pipe table and the notes as a list."""
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(_escaped(column.caption) for column in self.columns) + " |")
        lines.append("|" + "|".join("---" if column.kind == "text" else "---:" for column in self.columns) + "|")
        lines += ["| " + " | ".join(map(_escaped, cells)) + " |" for cells in self._cells()]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, rows as measured."""
        return {"key": self.key, "title": self.title, "rows": self.rows, "notes": self.notes}


@dataclass
class Section:
    """The tables of one part of the benchmark, with the machine they were measured on.

    Attributes
    ----------
    name
        "kernels", "solver", "image" or "backbone": what the document's markers call it.
    machine
        Of :func:`sparsespec.evaluation.benchmark.machine.describe`.
    command
        What was run.
    tables
        In the order of the document.
    """

    name: str
    machine: dict[str, Any]
    command: str
    tables: list[Table]

    def _head(self) -> list[str]:
        machine = self.machine
        versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["versions"].items())
        memory = f"{machine['memory_gb'] or '?'} GB"
        about = (machine["processor"], f"{machine['threads']} threads", memory, machine["platform"])
        return [f"{', '.join(about)}, Python {machine['python']}.", f"{versions}."]

    def to_text(self) -> str:
        """Return everything for a terminal."""
        title = f"{self.name}: {self.command}"
        parts = ["\n".join([title, "=" * len(title), *self._head()]), *(table.to_text() for table in self.tables)]
        return "\n\n".join(parts)

    def to_markdown(self) -> str:
        """Return what stands between the document's markers."""
        first, second = self._head()
        head = f"Measured by `{self.command}` on {first}\n{second}"
        return "\n\n".join([head, *(table.to_markdown() for table in self.tables)])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "command": self.command,
            "machine": self.machine,
            "tables": {table.key: table.to_dict() for table in self.tables},
        }

    @property
    def own_failures(self) -> list[str]:
        """What sparsespec itself did not manage, as sentences."""
        return [
            f"{self.name}, {table.title}: {row['remark'] or row['status']}"
            for table in self.tables
            for row in table.rows
            if row["ours"] and row["status"] not in ("done", "not available", "not run")
        ]


def ratio(ours: Outcome, peer: Outcome) -> tuple[float | None, bool]:
    """Peer's seconds over ours, and whether that is only a lower bound.

    A peer that was stopped took at least as long as it was given. One that gave no answer, or not the answer asked for,
    has no ratio: a wrong answer can be had in any time.

    Returns
    -------
    ratio : float or None
    at_least : bool
    """
    if ours.status != "done" or not ours.seconds or peer.seconds is None:
        return None, False
    if peer.status == "done":
        return peer.seconds / ours.seconds, False
    if peer.status == "out of time" and peer.seconds > ours.seconds:
        return peer.seconds / ours.seconds, True
    return None, False


def contest(
    group: Mapping[str, Any],
    ours: Outcome,
    peers: Iterable[tuple[str, Outcome]] = (),
    extras: Sequence[str] = (),
    *,
    name: str = OURS,
) -> list[dict[str, Any]]:
    """Rows of one measurement: ours first, then each peer with its ratio.

    Parameters
    ----------
    group
        Values that all the rows share, such as the number of tokens.
    ours, peers
        What was measured, peers with their names.
    extras
        Keys of ``Outcome.result`` that become columns.
    name
        What our row is called.
    """
    rows: list[dict[str, Any]] = []
    for who, outcome in [(name, ours), *peers]:
        own = not rows
        number, at_least = (None, False) if own else ratio(ours, outcome)
        rows.append(
            {
                **group,
                "who": who,
                "ours": own,
                "status": outcome.status,
                # What was only a limit is no measurement.
                "seconds": None if outcome.status == "out of time" else outcome.seconds,
                **{key: outcome.result.get(key) for key in extras},
                "ratio": number,
                "ratio_at_least": at_least,
                "remark": outcome.remark,
            }
        )
    return rows


def growth_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Slope of log(seconds) over log(size) by least squares: 1 is linear growth. None for fewer than two sizes."""
    import numpy as np

    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def update_document(path: str | os.PathLike[str], sections: Iterable[Section]) -> None:
    """Put the sections' tables between their markers in a Markdown document.

    Section ``kernels`` goes between the lines ``<!-- begin kernels -->`` and ``<!-- end kernels -->``; what stood there
    before is replaced and everything else is left as it is.

    Raises
    ------
    ValueError
        A pair of markers is missing; nothing is written then.
    OSError
        The file can't be read or written.
    """
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    for section in sections:
        body = f"\n{section.to_markdown()}\n\n"
        # A function, since a replacement text would have its backslashes read.
        text = _between(section.name, file, text).sub(partial(_filled, body), text)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def check_document(path: str | os.PathLike[str], names: Iterable[str]) -> None:
    """See that a document has the markers of the sections of these names.

    Raises
    ------
    ValueError
        It hasn't; the message says which.
    OSError
        The file can't be read.
    """
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    for name in names:
        _between(name, file, text)


def _filled(body: str, match: re.Match[str]) -> str:
    return match[1] + body + match[2]


def _between(name: str, file: Path, text: str) -> re.Pattern[str]:
    """Pattern of a section's place in a document that has it."""
    pattern = re.compile(rf"(^<!-- begin {name} -->\n).*?(^<!-- end {name} -->$)", re.MULTILINE | re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(
            f"{file} must hold the lines '<!-- begin {name} -->' and '<!-- end {name} -->' once, in this order"
        )
    return pattern


def _significant(value: float, digits: int = 3) -> str:
    """Write a number with so many digits that matter, never as a power of ten unless it is tiny."""
    value = float(value)
    if value == 0 or abs(value) < 1e-4:
        return f"{value:.{digits - 1}g}"
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e" in text or abs(value) >= 1000 else text


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


_WRITERS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "count": lambda value: f"{value:,}",
    "seconds": lambda value: f"{_significant(value * 1000)} ms" if value < 0.1 else f"{_significant(value)} s",
    "percent": lambda value: f"{value:.1%}".replace("%", " %"),
    "number": _significant,
    "residual": lambda value: f"{value:.1e}",
    "bytes": lambda value: f"{value:,.0f} B",
    "microseconds": lambda value: f"{_significant(value * 1e6)} \u00b5s",
    "kilobytes": lambda value: f"{_significant(value / 1e3, 2)} kB",
    "fine": lambda value: f"{value:.2f} x",
    "cosine": lambda value: f"{value:.5f}",
    "megabytes": lambda value: f"{value / 1e6:,.0f} MB",
}
