"""Reports to be opened in a browser, written the way runs write them, and visits to pages that are watched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparsespec.batch import Inline, find_inputs, run_batch
from sparsespec.formats import instance_annotations
from sparsespec.formats.card import card_photograph, card_script
from sparsespec.formats.report import ReportRow, ReportWriter

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HEIGHT = 240
STAGES = ("read", "features", "instances")
# Rows and columns of the instances that `segment` finds, in the order of their scores.
PLACES = ((slice(40, 120), slice(40, 140)), (slice(130, 200), slice(180, 300)), (slice(20, 60), slice(200, 260)))
SCORES = (0.91, 0.64, 0.253)
ODD_NAMES = (
    'it\'s "quoted" & <b>bold</b>.jpg',
    "100% #1 ?x=y+z.jpg",
    "</script><script>alert(1)</script>.jpg",
    "  two  spaces .jpg",
    "äöü 写真 🦊 e\u0301.jpg",
    "a\\b;c:d.jpg",
    "%41.jpg",
)


def segment(image: Any, out: Any = None) -> SimpleNamespace:
    """Find as many of the places as the picture's width says."""
    count = (image.shape[1] - 320) // 8
    labels = np.zeros(image.shape[:2], np.int32)
    for label, place in enumerate(PLACES[:count], start=1):
        labels[place] = label
    ramp = np.linspace(-1, 1, 8 * 11).reshape(8, 11)
    return SimpleNamespace(
        labels=labels,
        scores=np.array(SCORES[:count], np.float32),
        layers={"foreground": np.abs(ramp), "eigenvector 1": ramp},
        info={"grid": [8, 11], "extent": [8.0, 10.5], "seconds": {"features": 0.2, "instances": 0.1}},
    )


def photograph(count: int) -> Image.Image:
    """Make a picture in which `segment` finds so many instances."""
    width = 320 + 8 * count
    pixels = np.empty((HEIGHT, width, 3), np.uint8)
    pixels[...] = np.linspace(60, 200, width)[None, :, None]
    for place, colour in zip(PLACES[:count], ((200, 60, 60), (60, 160, 60), (60, 60, 200)), strict=False):
        pixels[place] = colour
    return Image.fromarray(pixels)


def report_of(root: Path, names: dict[str, int | bytes]) -> Path:
    """Run over photographs with so many instances each, or files with these bytes, and return the page."""
    for name, what in names.items():
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            photograph(what).save(path)
    inputs = find_inputs(root / "photos", output=root / "out")
    run_batch(segment, inputs, root / "out", engine=Inline(1), parameters={"model": "none", "seed": 0})
    return root / "out" / "report.html"


def many_rows(count: int) -> list[ReportRow]:
    """Make up what a run over so many images found."""
    rows = []
    for k in range(count):
        path = f"{k // 1000} of them/photo {k:05d}.jpg"
        if k % 100 == 99:
            rows.append(ReportRow(path, "failed", error="not an image", seconds={"total": 0.001}))
            continue
        instances = k % 7
        rows.append(
            ReportRow(
                path,
                "done",
                instances=instances,
                score=(k % 97) / 96 if instances else None,
                area=(k % 41) / 40 if instances else 0.0,
                size=(336, HEIGHT),
                name=path.removesuffix(".jpg"),
                seconds={"read": 0.001, "features": 0.05 * (k % 40) + 0.01, "total": 0.05 * (k % 40) + 0.011},
            )
        )
    return rows


def many_images(root: Path, count: int) -> Path:
    """Write the report of `many_rows`; the images have the masks and photographs of a few."""
    out = root / "out"
    (out / "report" / "images").mkdir(parents=True)
    scripts = []
    for instances in range(4):
        picture = photograph(instances)
        found = segment(np.asarray(picture))
        annotations = instance_annotations(found.labels, found.scores)
        script = card_script("", picture.size, found.labels, annotations, found.layers, found.info["extent"])
        scripts.append(script.partition(b'""')[2])
        (root / f"{instances}.jpg").write_bytes(card_photograph(picture))
    writer = ReportWriter(out / "report.html")
    for k, row in enumerate(many_rows(count)):
        writer.add(row)
        if row.name is None:
            continue
        base = out / "report" / "images" / row.name
        if k % 1000 == 0:
            base.parent.mkdir()
        kind = min(row.instances, 3)
        os.link(root / f"{kind}.jpg", base.with_name(base.name + ".jpg"))
        base.with_name(base.name + ".js").write_bytes(
            b"sparsespec.card(" + json.dumps(row.name).encode() + scripts[kind]
        )
    writer.close(totals={"Images done": f"{count:,}"}, parameters={"seed": 0}, finished="2024-05-01T12:00:00Z")
    return out / "report.html"


class Visit:
    """A page in a window of its own, and all that it asks for, says and violates.

    Parameters
    ----------
    browser
        Of the system.
    path
        A file, or an address on this machine.
    within
        What every address that is asked for begins with; the folder above that of the page if not given.
    missing
        The page is allowed to ask in vain.
    hash
        Behind the address.
    options
        Of the window.
    """

    def __init__(
        self,
        browser: Browser,
        path: Path | str,
        *,
        within: str | None = None,
        missing: bool = False,
        hash: str = "",  # noqa: A002 - what browsers call it
        **options: Any,
    ) -> None:
        self.address = path.as_uri() if isinstance(path, Path) else path
        above = path.parent.parent.as_uri() + "/" if isinstance(path, Path) else path.rpartition("/")[0]
        self.within = within or above
        self.missing = missing
        self.requests: list[str] = []
        self.said: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(15_000)
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"not caught: {error}"))
        self.page.add_init_script(
            "window.violations = []; addEventListener('securitypolicyviolation',"
            " event => violations.push(`${event.violatedDirective}: ${event.blockedURI}`));"
        )
        self.page.goto(self.address + hash)

    def leave(self) -> None:
        """Close the window; nothing was said, nothing violated, nothing asked for elsewhere."""
        violations = self.page.evaluate("window.violations")
        self.context.close()
        said = [line for line in self.said if not (self.missing and "Failed to load resource" in line)]
        elsewhere = [url for url in self.requests if not url.startswith((self.within, "data:", "blob:"))]
        assert (violations, said, elsewhere) == ([], [], []), (violations, said, elsewhere)

    # -- what is to be seen

    def status(self) -> str:
        """How many images are shown, as the page says it."""
        return self.page.locator(".status").inner_text()

    def names(self) -> list[str]:
        """Names on the cards."""
        return self.page.locator(".card .name").all_text_contents()

    def open(self, name: str) -> None:
        """Open a card and wait until its photograph is there."""
        self.page.locator(".card", has=self.page.get_by_title(name, exact=True)).locator("a").click()
        self.wait_for_photograph()

    def wait_for_photograph(self) -> None:
        """Wait until the opened photograph has been loaded."""
        self.page.wait_for_function(
            "() => { const image = document.querySelector('#opened .sv-photo img');"
            " return image && image.complete && image.naturalWidth > 0; }"
        )
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for has been drawn."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the opened photograph is in the window."""
        image = self.page.locator(".sv-photo").bounding_box()
        assert image is not None
        size = self.page.evaluate(
            "() => { const s = document.querySelector('.sv-photo').style; return [s.width, s.height]; }"
        )
        width, height = (float(length.removesuffix("px")) for length in size)
        return image["x"] + image["width"] * x / width, image["y"] + image["height"] * y / height

    def drawn(self, x: float, y: float) -> list[int]:
        """Colour and opacity that lie over a pixel of the opened photograph."""
        left, top = self.at(x, y)
        self.settle()
        found = self.page.evaluate(
            """([left, top]) => {
                const canvas = document.querySelector(".sv-surface > canvas"), box = canvas.getBoundingClientRect();
                const scale = canvas.width / box.width;
                const copy = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
                copy.drawImage(canvas, -Math.floor((left - box.left) * scale), -Math.floor((top - box.top) * scale));
                return [...copy.getImageData(0, 0, 1, 1).data];
            }""",
            [left, top],
        )
        return [int(value) for value in found]

    def active(self) -> str:
        """Describe the element that has the keyboard."""
        return str(
            self.page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.outerHTML")
        )


def axe_violations(visit: Visit) -> list[str]:
    """Check the page for barriers, and name those that are there."""
    import axe_core_python

    script = Path(axe_core_python.__file__).with_name("axe.min.js")
    visit.page.evaluate(script.read_text(encoding="utf-8"))
    found = visit.page.evaluate("async () => await axe.run({resultTypes: ['violations']})")
    return [
        f"{violation['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
