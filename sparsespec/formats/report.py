"""``report.html``: one self-contained page to look at a whole run, without a network."""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import IO
from urllib.parse import quote

from sparsespec._atomic import AtomicFile

__all__ = ["ReportCard", "ReportWriter", "readable_duration", "readable_name"]


MOST_FAILURES = 1000
"""Images without a result that are listed."""


@dataclass(frozen=True)
class ReportCard:
    """What the report shows of one image.

    Attributes
    ----------
    name : str
        Path of the image, relative to the input.
    status : str
        ``done``, ``failed`` or ``skipped``.
    count : int
        Instances found.
    score : float or None
        The best of their scores.
    size : (int, int) or None
        Width and height in pixels.
    thumbnail : bytes or None
        A small JPEG.
    overlay, mask : str or None
        Output files, relative to the report.
    error : str or None
        Why there is no result.
    """

    name: str
    status: str
    count: int = 0
    score: float | None = None
    size: tuple[int, int] | None = None
    thumbnail: bytes | None = None
    overlay: str | None = None
    mask: str | None = None
    error: str | None = None


class ReportWriter:
    """Collects one card after the other and writes the page at the end.

    There are no times in it: it depends on the results only. The cards, with their pictures, wait in an unnamed
    temporary file, so that memory does not grow with the run.

    Parameters
    ----------
    path : str or os.PathLike
        Target; it appears with `close`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        folder = os.path.dirname(path) or "."
        self._cards: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this object
        self._failures: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._shown = 0
        self._failed = 0

    def add(self, card: ReportCard) -> None:
        """Add one image; cards are shown in the order in which they came, until the reader sorts them."""
        if card.status == "done":
            self._cards.write(_card_html(card, self._shown).encode("utf-8", "replace"))
            self._shown += 1
        elif self._failed < MOST_FAILURES:
            name, reason = escape(readable_name(card.name)), escape(readable_name(card.error or card.status))
            self._failures.write(
                f'<tr><td class="name">{name}</td><td>{escape(card.status)}</td><td>{reason}</td></tr>\n'.encode(
                    "utf-8", "replace"
                )
            )
            self._failed += 1
        else:
            self._failed += 1

    def close(
        self, *, totals: Mapping[str, str], parameters: Mapping[str, object], interrupted: bool = False, of: int = 0
    ) -> None:
        """Write the page and forget the cards.

        Parameters
        ----------
        totals : mapping of str to str
            Figures for the head of the page, by their captions.
        parameters : mapping
            What the run was asked to do.
        interrupted : bool
            Say that the run ended early.
        of : int
            How many images have a result, when not all of them were added.
        """
        with AtomicFile(self._path) as page:
            page.write(_head(totals, parameters, interrupted=interrupted).encode("utf-8", "replace"))
            if self._failed:
                page.write(
                    f'<section><h2>Without a result <span class="muted">({self._failed})</span></h2>'
                    '<div class="scroll"><table><thead><tr><th>Image</th><th>Status</th><th>Reason</th></tr></thead>'
                    "<tbody>\n".encode()
                )
                self._failures.seek(0)
                shutil.copyfileobj(self._failures, page)
                page.write(b"</tbody></table></div>")
                if self._failed > MOST_FAILURES:
                    page.write(f"<p>The first {MOST_FAILURES:,}; all are in run.json.</p>".encode())
                page.write(b"</section>\n")
            if self._shown:
                if of > self._shown:
                    note = f"{self._shown:,} of {of:,} pictures, chosen by chance; the others are beside this page."
                    page.write(f'<p class="muted">{note}</p>\n'.encode())
                page.write(_CONTROLS.encode())
                self._cards.seek(0)
                shutil.copyfileobj(self._cards, page)
                page.write(b"</main>\n")
                page.write(f"<script>{_SCRIPT}</script>\n".encode())
            else:
                page.write(b'<p class="empty">No image was segmented.</p>\n')
            page.write(b"</body></html>\n")
        self.discard()

    def discard(self) -> None:
        """Give the temporary files back."""
        for file in (self._cards, self._failures):
            with suppress(OSError):  # closing flushes, which a full disk refuses
                file.close()


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


def _link(path: str) -> str:
    return escape(quote(os.fsencode(path)), quote=True)


def _card_html(card: ReportCard, position: int) -> str:
    name = escape(readable_name(card.name), quote=True)
    picture = '<div class="nothumb">no picture</div>'
    if card.thumbnail is not None:
        data = base64.b64encode(card.thumbnail).decode("ascii")
        picture = (
            f'<img loading="lazy" decoding="async" alt="{name} with its instances" src="data:image/jpeg;base64,{data}">'
        )
    if card.overlay is not None:
        picture = f'<a href="{_link(card.overlay)}">{picture}</a>'
    score = "" if card.score is None else f"{card.score:.3f}"
    facts = [f"{card.count} instance{'' if card.count == 1 else 's'}"]
    if card.score is not None:
        facts.append(f"best score {card.score:.2f}")
    if card.size is not None:
        facts.append(f"{card.size[0]} × {card.size[1]}")
    if card.mask is not None:
        facts.append(f'<a href="{_link(card.mask)}">mask</a>')
    return (
        f'<figure data-position="{position}" data-name="{name}" data-score="{score or -1}" data-count="{card.count}">'
        f'{picture}<figcaption><div class="name">{name}</div>'
        f'<div class="facts">{" · ".join(facts)}</div></figcaption></figure>\n'
    )


def _head(totals: Mapping[str, str], parameters: Mapping[str, object], *, interrupted: bool) -> str:
    tiles = "".join(
        f"<div><dt>{escape(caption)}</dt><dd>{escape(figure)}</dd></div>" for caption, figure in totals.items()
    )
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(readable_name(_shown_value(value)))}</td></tr>"
        for name, value in parameters.items()
    )
    note = '<p class="note">The run was interrupted: what follows is what it had done until then.</p>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The page asks for nothing outside itself, and a browser holds it to that.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
        " style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>sparsespec report</title><style>{_STYLE}</style></head><body>\n"
        f'<header><h1>sparsespec report</h1><dl class="tiles">{tiles}</dl>'
        f"<details><summary>Parameters</summary><table>{rows}</table></details>"
        f"{note if interrupted else ''}</header>\n"
    )


def _shown_value(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--text:#1b1f24;--muted:#5d6673;--line:#d9dee5;--accent:#0b62d6;
--warn:#8a4b00;--warn-page:#fff4e0}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1e2228;--text:#e8ebef;--muted:#9aa4b1;--line:#323943;
--accent:#6cb2ff;--warn:#ffc670;--warn-page:#33270f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1680px;padding:24px;background:var(--page);color:var(--text);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:22px;margin:0 0 16px}h2{font-size:17px;margin:28px 0 10px}
a{color:var(--accent)}.muted{color:var(--muted);font-weight:400}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 14px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:120px}
dt{color:var(--muted);font-size:13px}dd{margin:2px 0 0;font-size:20px;font-variant-numeric:tabular-nums}
summary{cursor:pointer;color:var(--muted)}
table{border-collapse:collapse;margin-top:8px}th,td{text-align:left;vertical-align:top;padding:4px 16px 4px 0;
border-bottom:1px solid var(--line)}th{color:var(--muted);font-weight:500}
.scroll{overflow-x:auto;max-height:420px;overflow-y:auto}
.note{background:var(--warn-page);color:var(--warn);border-radius:8px;padding:10px 16px}
.empty{color:var(--muted);padding:40px 0;text-align:center}
.sort{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:24px 0 14px}
button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:999px;
padding:5px 14px;cursor:pointer}button:hover{border-color:var(--accent)}
button[aria-pressed=true]{border-color:var(--accent);color:var(--accent)}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden;
content-visibility:auto;contain-intrinsic-size:auto 290px}
figure img,.nothumb{display:block;width:100%;height:215px;object-fit:contain;background:rgba(127,127,127,.13)}
.nothumb{display:grid;place-items:center;color:var(--muted)}
figcaption{padding:9px 13px 12px}.name{overflow-wrap:anywhere;font-weight:600}
.facts{color:var(--muted);font-size:13px;font-variant-numeric:tabular-nums}
@media print{body{max-width:none;padding:0}.sort,summary{display:none}figure{break-inside:avoid}}
"""

_CONTROLS = """<div class="sort" role="group" aria-label="Sort the images"><span class="muted">Sort by</span>
<button type="button" data-key="name" aria-pressed="false">name</button>
<button type="button" data-key="score" aria-pressed="false">score</button>
<button type="button" data-key="count" aria-pressed="false">instances</button></div>
<main>
"""

_SCRIPT = """
"use strict";
(() => {
  const grid = document.querySelector("main"), buttons = [...document.querySelectorAll(".sort button")];
  const labels = new Map(buttons.map(button => [button, button.textContent]));
  const compare = new Intl.Collator(undefined, {numeric: true}).compare;
  let key = null, direction = 1;
  buttons.forEach(button => button.addEventListener("click", () => {
    // Names are first read from A, figures from the largest; a second click turns the order round.
    direction = button.dataset.key === key ? -direction : button.dataset.key === "name" ? 1 : -1;
    key = button.dataset.key;
    const cards = [...grid.children].sort((a, b) =>
      direction * (key === "name" ? compare(a.dataset.name, b.dataset.name) : a.dataset[key] - b.dataset[key])
      || a.dataset.position - b.dataset.position);
    grid.append(...cards);
    buttons.forEach(other => {
      const active = other === button;
      other.setAttribute("aria-pressed", active);
      other.textContent = labels.get(other) + (active ? (direction > 0 ? " \\u2191" : " \\u2193") : "");
    });
  }));
})();
"""
