from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from sparsespec.formats import ReportWriter, jpeg_bytes
from sparsespec.formats.report import ReportCard, readable_duration, readable_name

THUMBNAIL = jpeg_bytes(np.full((20, 30, 3), 128, np.uint8))
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects tags with their attributes and checks that they nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write(path: Path, cards: list[ReportCard], **options: Any) -> Page:
    report = ReportWriter(path)
    for card in cards:
        report.add(card)
    report.close(totals={"Images done": f"{len(cards)}"}, parameters={"model": "default", "seed": 0}, **options)
    return Page(path)


def done(name: str, **values: Any) -> ReportCard:
    return ReportCard(name=name, status="done", thumbnail=THUMBNAIL, **values)


def test_cards_carry_what_they_are_sorted_by(tmp_path: Path) -> None:
    page = write(
        tmp_path / "r.html",
        [
            done("b.jpg", count=2, score=0.75, size=(640, 480), overlay="overlays/b.jpg", mask="masks/b.png"),
            done("a.jpg", count=0, score=None, size=(8, 8)),
        ],
    )
    figures = page.all("figure")
    assert [figure["data-name"] for figure in figures] == ["b.jpg", "a.jpg"]
    assert [float(figure["data-score"] or "nan") for figure in figures] == [0.75, -1]
    assert [figure["data-count"] for figure in figures] == ["2", "0"]
    assert [button["data-key"] for button in page.all("button")] == ["name", "score", "count"]
    assert "2 instances · best score 0.75 · 640 × 480" in page.text
    assert "0 instances · 8 × 8" in page.text
    for wanted in ("Images done", "model", "default", "seed"):
        assert wanted in page.text
    assert {link["href"] for link in page.all("a")} == {"overlays/b.jpg", "masks/b.png"}


def test_pictures_are_inside_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", [done("a.jpg")])
    (picture,) = page.all("img")
    head, _, data = (picture["src"] or "").partition(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(data) == THUMBNAIL
    assert not re.search(r"https?://|//cdn|@import|url\(", page.source)
    assert not page.all("link")
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme:dark" in page.source


@pytest.mark.parametrize("name", ['<script>alert("1")</script>.jpg', 'a & b\'s "c".jpg', "ü/日本 #1?.jpg", "100%.jpg"])
def test_names_are_escaped(tmp_path: Path, name: str) -> None:
    page = write(
        tmp_path / "r.html",
        [done(name, overlay=f"overlays/{name}"), ReportCard(name=name, status="failed", error=f"cannot read <{name}>")],
    )
    assert len(page.all("script")) == 1
    assert page.all("figure")[0]["data-name"] == name
    assert unquote(page.all("a")[0]["href"] or "") == f"overlays/{name}"
    assert not set(page.all("a")[0]["href"] or "") & set("<>\"'# ?")
    assert f"cannot read <{name}>" in page.text


def test_failures_are_listed_with_their_reason(tmp_path: Path) -> None:
    page = write(
        tmp_path / "r.html",
        [
            ReportCard(name="x.jpg", status="failed", error="it is empty (zero bytes)"),
            done("y.jpg"),
            ReportCard(name="z.jpg", status="skipped", error="not reached"),
        ],
        interrupted=True,
    )
    assert "it is empty (zero bytes)" in page.text
    assert "not reached" in page.text
    assert "was interrupted" in page.text
    assert [figure["data-name"] for figure in page.all("figure")] == ["y.jpg"]


def test_nothing_done(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", [ReportCard(name="x.jpg", status="failed", error="no")])
    assert "No image was segmented." in page.text
    assert not page.all("script")
    page = write(tmp_path / "s.html", [])
    assert "No image was segmented." in page.text
    assert "Without a result" not in page.text


def test_a_choice_of_many_pictures_is_said_to_be_one(tmp_path: Path) -> None:
    cards = [done("a.jpg"), done("b.jpg")]
    assert "chosen by chance" not in write(tmp_path / "r.html", cards, of=2).text
    page = write(tmp_path / "r.html", cards, of=3456)
    assert "2 of 3,456 pictures, chosen by chance" in page.text


def test_of_many_failures_the_first_are_listed(tmp_path: Path) -> None:
    cards = [ReportCard(name=f"{k}.jpg", status="failed", error="no") for k in range(1234)]
    page = write(tmp_path / "r.html", cards)
    assert "Without a result (1234)" in page.text
    # The head, and two parameters.
    assert len(page.all("tr")) == 1 + 2 + 1000
    assert "999.jpg" in page.text
    assert "1000.jpg" not in page.text
    assert "The first 1,000; all are in run.json." in page.text


def test_nothing_is_written_before_the_end(tmp_path: Path) -> None:
    report = ReportWriter(tmp_path / "r.html")
    report.add(done("a.jpg"))
    assert list(tmp_path.iterdir()) == []
    report.discard()
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_unicode() -> None:
    raw = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert readable_name(raw) == "caf\N{REPLACEMENT CHARACTER}.jpg"
    assert readable_name("two\nlines\x1b[31m") == "two\N{REPLACEMENT CHARACTER}lines\N{REPLACEMENT CHARACTER}[31m"
    assert readable_name("grün 日本.jpg") == "grün 日本.jpg"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.4211, "0.42 s"),
        (9.999, "10.0 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (12_000, "3 h 20 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert readable_duration(seconds) == text
