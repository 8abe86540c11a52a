from __future__ import annotations

import json
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin

import pytest

import sparsespec
from sparsespec.formats import ReportWriter
from sparsespec.formats.report import RUN_SCRIPT, ReportRow, photographs_link, readable_duration, readable_name

VOID = {"meta", "br", "link"}


class Page(HTMLParser):
    """Collects tags with their attributes and checks that they nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(self.source)
        assert self.open == []
        self.index = json.loads(self.scripts[0])
        self.rows = [dict(zip(self.index["columns"], row, strict=True)) for row in self.index["rows"]]
        run_script = (path.parent / RUN_SCRIPT).read_text(encoding="ascii")
        self.run = json.loads(run_script.removeprefix("sparsespec.run(").removesuffix(");\n"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write(path: Path, rows: list[ReportRow], **options: Any) -> Page:
    report = ReportWriter(path)
    for row in rows:
        report.add(row)
    report.close(**{"totals": {"Images done": f"{len(rows)}"}, "parameters": {"model": "default"}, **options})
    return Page(path)


def done(path: str, **values: Any) -> ReportRow:
    return ReportRow(path, "done", **{"name": path.rpartition(".")[0], **values})


def test_an_empty_run(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", [])
    assert page.index == {
        "version": sparsespec.__version__,
        "interrupted": False,
        "totals": {"Images done": "0"},
        "parameters": {"model": "default"},
        "shown": 0,
        "images": 0,
        "done": [0, 0],
        "without": [0, 0],
        "histograms": {"counts": [], "scores": [0] * 20},
        "columns": [
            "path", "page", "status", "instances", "score", "area", "width", "height", "name", "overlay", "mask",
            "error",
        ],
        "rows": [],
    }  # fmt: skip
    assert page.run == {"photographs": None, "finished": None, "stages": [], "seconds": []}


def test_a_row_for_each_image_in_their_order(tmp_path: Path) -> None:
    files = {"overlay": "overlays/b.jpg", "mask": "masks/b.png"}
    page = write(
        tmp_path / "r.html",
        [
            done("b.jpg", instances=2, score=0.123456, area=0.654321, size=(640, 480), **files),
            ReportRow("c.jpg", "failed", error="it is empty (zero bytes)"),
            done("d/a.tif", name="d/a.tif/page-0003", page=3),
            ReportRow("e.jpg", "skipped", error="not reached"),
        ],
        interrupted=True,
    )
    assert page.rows[0] == {
        "path": "b.jpg", "page": None, "status": "done", "instances": 2, "score": 0.1235, "area": 0.6543, "width": 640,
        "height": 480, "name": "b", "overlay": "overlays/b.jpg", "mask": "masks/b.png", "error": None,
    }  # fmt: skip
    assert [(row["path"], row["page"], row["status"], row["error"]) for row in page.rows[1:]] == [
        ("c.jpg", None, "failed", "it is empty (zero bytes)"),
        ("d/a.tif", 3, "done", None),
        ("e.jpg", None, "skipped", "not reached"),
    ]
    assert [row["name"] for row in page.rows] == ["b", None, "d/a.tif/page-0003", None]
    assert page.index["interrupted"]
    assert "was interrupted" in page.text


def test_the_page_loads_its_own_script_and_nothing_else(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", [done("a.jpg")])
    assert not page.all("link")
    assert not page.all("img")
    scripts = page.all("script")
    assert [script.get("src") for script in scripts] == [None, None, None, "report/run.js"]
    assert scripts[0] == {"type": "application/json", "id": "index"}
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert not any(word.startswith(("http", "*")) for rule in rules.values() for word in rule.split())
    # Whoever runs no scripts is told the totals.
    assert "Images done: 1." in page.text


@pytest.mark.parametrize(
    "name", ['<script>alert("1")</script>.jpg', "<!--.jpg", "ü/日本 #1?.jpg", "100%.jpg", "\u2028"]
)
def test_names_are_text(tmp_path: Path, name: str) -> None:
    page = write(
        tmp_path / "r.html",
        [done(name, overlay=f"overlays/{name}"), ReportRow(name, "failed", error=f"cannot read <{name}>")],
        totals={"<b>": "</noscript>"},
        parameters={"input": name, "seed": 0, "n_instances": None, "follow_links": True},
    )
    assert len(page.all("script")) == 4
    assert not page.all("b")
    assert page.rows[0]["path"] == page.rows[1]["path"] == page.index["parameters"]["input"] == readable_name(name)
    assert page.rows[0]["overlay"] == f"overlays/{name}"
    assert page.index["parameters"] | {"input": ""} == {
        "input": "", "seed": "0", "n_instances": "–", "follow_links": "yes",
    }  # fmt: skip


def test_histograms_are_of_all_images(tmp_path: Path) -> None:
    """Those without a card, and those of other scales, are counted too."""
    scores = [0.0, 0.049, 0.05, 0.5, 0.999, 1.0, 1.7, -0.2]
    rows = [done(f"{k}.jpg", name=None, instances=k % 3, score=score) for k, score in enumerate(scores)]
    rows += [done("none.jpg"), ReportRow("x.jpg", "failed")]
    page = write(tmp_path / "r.html", rows)
    expected = [0] * 20
    for place in (0, 0, 1, 10, 19, 19, 19, 0):
        expected[place] += 1
    assert page.index["histograms"] == {"counts": [[0, 4], [1, 3], [2, 2]], "scores": expected}
    assert [row["path"] for row in page.rows] == ["none.jpg", "x.jpg"]
    assert (page.index["shown"], page.index["images"]) == (2, 10)
    assert (page.index["done"], page.index["without"]) == ([1, 9], [1, 1])


def test_of_many_failures_the_first_are_listed(tmp_path: Path) -> None:
    rows = [ReportRow(f"{k}.jpg", "failed", error="no") for k in range(1234)]
    page = write(tmp_path / "r.html", [*rows, done("z.jpg", seconds={"total": 1})])
    assert (page.index["without"], page.index["shown"], page.index["images"]) == ([1000, 1234], 1001, 1235)
    assert [row["path"] for row in page.rows] == [f"{k}.jpg" for k in range(1000)] + ["z.jpg"]
    assert page.run["seconds"] == [None] * 1000 + [[1]]


def test_times_are_not_in_the_page(tmp_path: Path) -> None:
    def both(name: str, seconds: list[dict[str, float]], **options: Any) -> Page:
        (tmp_path / name).mkdir()
        rows = [done(f"{k}.jpg", seconds=entry) for k, entry in enumerate(seconds)]
        return write(tmp_path / name / "r.html", rows, **options)

    slow = [{"read": 1, "features": 2.00006, "total": 4}, {}, {"read": 1, "eigenvectors": 3, "total": 5}]
    page = both("slow", slow, photographs="../in/", finished="2026-01-02T03:04:05+00:00")
    other = both("fast", [{}, {"total": 1}, {}])
    assert page.source == other.source
    assert page.run == {
        "photographs": "../in/",
        "finished": "2026-01-02T03:04:05+00:00",
        "stages": ["read", "features", "eigenvectors"],
        "seconds": [[1, 2.0001, 0, 4], None, [1, 0, 3, 5]],
    }
    assert other.run == {"photographs": None, "finished": None, "stages": [], "seconds": [None, [1], None]}


def test_photographs_whose_names_are_not_shown_as_they_are(tmp_path: Path) -> None:
    raw = os.fsdecode(b"a b/caf\xe9#.jpg")
    rows = [done("x.jpg"), ReportRow("y\n.jpg", "failed"), done(raw, name="a b/caf%E9#")]
    page = write(tmp_path / "r.html", rows, photographs="../in/")
    assert [row["path"] for row in page.rows] == ["x.jpg", "y\N{REPLACEMENT CHARACTER}.jpg", readable_name(raw)]
    assert page.run["others"] == {"1": "y%0A.jpg", "2": "a%20b/caf%E9%23.jpg"}


@pytest.mark.parametrize(
    ("photos", "page", "expected"),
    [
        ("in", "out", "../in/"),
        ("in", "in/out", "../"),
        ("in/deep er", "out/a/b", "../../../in/deep%20er/"),
        ("#1 100%", "out", "../%231%20100%25/"),
        ("in", "in", "./"),
    ],
)
def test_the_way_to_the_photographs(tmp_path: Path, photos: str, page: str, expected: str) -> None:
    found = photographs_link(tmp_path / photos, tmp_path / page)
    assert found == expected
    address = urljoin((tmp_path / page / "report.html").as_uri(), f"{found}x.jpg")
    assert unquote(address) == unquote((tmp_path / photos / "x.jpg").as_uri())


def test_the_way_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert photographs_link("in", Path("out")) == "../in/"


def test_there_is_no_way_between_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_drive(*_: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", other_drive)
    assert photographs_link("in", "out") is None


def test_a_page_keeps_no_row_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    def peak(count: int) -> int:
        report = ReportWriter(tmp_path / "r.html")
        tracemalloc.start()
        try:
            for k in range(count):
                report.add(done(f"folder/{k}.jpg", instances=k % 5, score=0.5, seconds={"read": 0.1, "total": 0.2}))
            report.close(totals={}, parameters={})
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(3000) < peak(300) + 100_000


def test_nothing_is_written_before_the_end(tmp_path: Path) -> None:
    report = ReportWriter(tmp_path / "r.html")
    report.add(done("a.jpg"))
    if sys.platform != "win32":
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
