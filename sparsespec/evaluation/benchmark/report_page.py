"""``sparsespec bench report``: how large the report of a run is, and how quickly a browser shows and searches it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparsespec.evaluation.benchmark import data
from sparsespec.evaluation.benchmark.bench import Bench
from sparsespec.evaluation.benchmark.report import Column, Table

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from sparsespec.pipeline import Segmentation, Segmenter

__all__ = ["BROWSER_ARGUMENTS", "Remembered", "find_browser", "run", "sizes_of", "time_in_browser", "write_photographs"]

_IMAGES, _QUICK_IMAGES = 5000, 200
_DIFFERENT, _QUICK_DIFFERENT = 100, 6
_PIXELS = 640
_IN_A_FOLDER = 1000
_FEWEST = 51
_PATIENCE = 60_000
"""Milliseconds that a step may take in the browser."""
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Chromium without a screen that asks nobody for anything."""

_SHOWN = """() => {
    const cards = [...document.querySelectorAll(".card")];
    const seen = cards.filter(card => card.getBoundingClientRect().top < innerHeight);
    return seen.length > 0 && seen.every(card => [...card.querySelectorAll("img")].every(image => image.complete)
        && [...card.querySelectorAll("canvas")].every(canvas => canvas.width > 1)) && performance.now() / 1000;
}"""
_PAINTED = "await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));"
_OPENED = """
    const photograph = () => document.querySelector("#opened .sv-photo img");
    while (!photograph()?.naturalWidth || window.before === photograph())
        await new Promise(done => requestAnimationFrame(done));
    window.before = photograph();
"""
_TYPE = """
    const field = document.querySelector("input[type=search]");
    field.value = "{}";
    field.dispatchEvent(new Event("input"));
"""
_SORT = """
    const list = document.querySelector("select");
    list.value = "{}";
    list.dispatchEvent(new Event("change"));
"""
_FILTER = """
    const changed = new Promise(done => addEventListener("hashchange", done, {{once: true}}));
    location.hash = "{}";
    await changed;
"""
# In this order: each begins where the one before left the page.
_STEPS: dict[str, str] = {
    "search by name": _TYPE.format("04") + _PAINTED,
    "all again": _TYPE.format("") + _PAINTED,
    "filter by score": _FILTER.format("score=0.5..0.7") + _PAINTED,
    # There may be no image of such a score, and what follows needs more than a page of them.
    "without the filter": _FILTER.format("") + _PAINTED,
    "sort by area": _SORT.format("area") + _PAINTED,
    "next page": "document.querySelector('[aria-label=\"Next page\"]').click();" + _PAINTED,
    "open an image": "document.querySelector('.card a').click();" + _OPENED + _PAINTED,
    "next image": "document.querySelector('[aria-label^=\"Next image\"]').click();" + _OPENED + _PAINTED,
}


def run(bench: Bench) -> list[Table]:
    """Make the report of a run, weigh it and open it."""
    from sparsespec.batch import Formats, Inline, find_inputs, run_batch
    from sparsespec.pipeline import Segmenter

    count = bench.options.photographs or (_QUICK_IMAGES if bench.quick else _IMAGES)
    different = min(count, _QUICK_DIFFERENT if bench.quick else _DIFFERENT)
    bench.say(f"report: {different} photographs")
    photographs, output = bench.folder / "report-photographs", bench.folder / "report-output"
    write_photographs(photographs, list(bench.photos.values()), count, different)
    bench.say(f"report: a run over {count:,} images")
    segmenter = Remembered(Segmenter(threads=bench.threads))
    inputs = find_inputs(photographs, output=output)
    result = run_batch(segmenter, inputs, output, engine=Inline(1), formats=Formats(overlays=False))
    if result.counts.get("done") != count:
        raise data.InputError(f"only {result.counts.get('done', 0):,} of {count:,} photographs could be segmented")
    size = Table(
        "size",
        f"The report of a run over {count:,} photographs of {_PIXELS} pixels, on disk",
        (
            Column("what", "what"),
            Column("files", "files", "count"),
            Column("bytes", "together", "megabytes"),
            Column("occupied", "with whole blocks", "megabytes"),
            Column("each", "an image", "kilobytes"),
        ),
    )
    for what, weight in sizes_of(output).items():
        size.rows.append({"what": what, **weight, "each": weight["bytes"] / count, **_OURS})
    size.notes.append(
        f"{different} different photographs, cut out of those of the benchmark, each under {count // different} names;"
        " all have files of their own in the report. Masks, overlays and the photographs are not counted."
    )
    bench.say("report: in a browser")
    times = Table(
        "browser",
        "That report in headless Chromium, from the disk",
        (
            Column("step", "step"),
            Column("seconds", "median", "seconds"),
            Column("longest", "longest", "seconds"),
            Column("remark", "remark"),
        ),
    )
    missing = _missing(count)
    if missing is not None:
        times.rows.append({**_OURS, "step": "opening", "remark": missing, "status": "not available"})
        return [size, times]
    repeats = bench.options.repeats or (2 if bench.quick else 5)
    found, elements = time_in_browser(output / "report.html", repeats)
    for step, seconds in found.items():
        row = {"step": step, "seconds": statistics.median(seconds), "longest": max(seconds), "runs": seconds}
        times.rows.append({**row, **_OURS})
    times.notes.append(
        f"{repeats} times, each with a new browser; graphics are computed by the processor. *Open the page* ends when"
        " all photographs and masks in sight are drawn, everything else with the frame that shows its result. The"
        f" document never held more than {elements:,} elements."
    )
    return [size, times]


_OURS: Mapping[str, Any] = {"ours": True, "status": "done", "remark": ""}


class Remembered:
    """A segmenter that computes each photograph once, however many names it has, with all layers of the report.

    Parameters
    ----------
    segmenter
        Computes them.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self._segmenter = segmenter
        self._known: dict[bytes, Segmentation] = {}

    def __call__(self, image: Any, /, *, out: npt.NDArray[np.integer[Any]] | None = None) -> Segmentation:
        """Give what the segmenter gives; ``out`` is left alone."""
        from sparsespec.batch.one import EIGENVECTORS

        pixels = np.ascontiguousarray(image)
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
        if digest not in self._known:
            # A run asks no segmenter but ours for them.
            self._known[digest] = self._segmenter(pixels, eigenvectors=EIGENVECTORS)
        return self._known[digest]


def write_photographs(folder: Path, photos: list[data.Photograph], count: int, different: int) -> None:
    """Fill a folder with names of so many different pictures, which are parts of photographs, every other mirrored.

    Parameters
    ----------
    folder
        Must not exist.
    photos
        (H, W, 3) uint8.
    count, different
        Names, and pictures.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    first: list[Path] = []
    for number in range(count):
        path = folder / f"{number // _IN_A_FOLDER:02d}" / f"photograph {number:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        if number >= different:
            try:
                os.link(first[number % different], path)
            except OSError:  # a file system without such links
                shutil.copyfile(first[number % different], path)
            continue
        photo = photos[number % len(photos)]
        height, width = (max(1, round(side * rng.uniform(0.5, 1))) for side in photo.shape[:2])
        top, left = (
            int(rng.integers(had - side + 1)) for had, side in zip(photo.shape[:2], (height, width), strict=True)
        )
        part = photo[top : top + height, left : left + width]
        part = part[:, ::-1] if number % 2 else part
        Image.fromarray(data.long_side(np.ascontiguousarray(part), _PIXELS)).save(path, quality=90)
        first.append(path)


def sizes_of(output: Path) -> dict[str, dict[str, int]]:
    """Weigh the files of a report by what they hold: the page, times, small photographs, masks; and all together.

    Returns
    -------
    dict
        For each, how many ``files``, their ``bytes``, and how many bytes they have ``occupied`` on the disk.
    """
    below = output / "report"
    kinds: dict[str, list[Path]] = {
        "page": [output / "report.html"],
        "times": [below / "run.js"],
        "small photographs": sorted((below / "images").rglob("*.jpg")),
        "masks, scores and layers": sorted((below / "images").rglob("*.js")),
    }
    kinds["together"] = [file for files in kinds.values() for file in files]
    weights = {}
    for what, files in kinds.items():
        known = [file.stat() for file in files]
        occupied = sum(512 * stat.st_blocks if hasattr(stat, "st_blocks") else stat.st_size for stat in known)
        weights[what] = {"files": len(files), "bytes": sum(stat.st_size for stat in known), "occupied": occupied}
    return weights


def find_browser() -> str | None:
    """Return the path of the system's Chromium, or None."""
    return next((found for name in _BROWSERS if (found := shutil.which(name))), None)


def _missing(count: int) -> str | None:
    if count < _FEWEST:
        return f"at least {_FEWEST} images are needed to turn pages"
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install 'sparsespec[browser]'"
    if find_browser() is None:
        return f"there is no browser: none of {', '.join(_BROWSERS)} is installed"
    return None


def time_in_browser(page: Path, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Open a report and use it.

    Parameters
    ----------
    page
        ``report.html`` of a run over more than fifty images.
    repeats
        So many times, each with a new browser.

    Returns
    -------
    seconds : dict of str to list of float
        Of each step, each time.
    elements : int
        How many the document held at most.

    Raises
    ------
    RuntimeError
        The page reported an error.
    """
    from playwright.sync_api import sync_playwright

    seconds: dict[str, list[float]] = defaultdict(list)
    elements: list[int] = []
    for _ in range(repeats):
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=list(BROWSER_ARGUMENTS))
            tab = browser.new_page(viewport={"width": 1440, "height": 900})
            for step, taken in _steps(tab, page, elements):
                seconds[step].append(taken)
            browser.close()
    return dict(seconds), max(elements)


def _steps(tab: Page, page: Path, elements: list[int]) -> Iterator[tuple[str, float]]:
    errors: list[str] = []
    tab.set_default_timeout(_PATIENCE)
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.resolve().as_uri(), wait_until="commit")
    yield "open the page", float(tab.wait_for_function(_SHOWN).json_value())
    for step, action in _STEPS.items():
        script = f"async () => {{ const start = performance.now(); {action} return performance.now() - start; }}"
        yield step, tab.evaluate(script) / 1000
        elements.append(int(tab.evaluate("document.getElementsByTagName('*').length")))
    if errors:
        raise RuntimeError(f"the page reported: {errors[0]}")
