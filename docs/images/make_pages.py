"""Make the picture of a report: a run over docs/examples, its page in Chromium, and one photograph opened in it.

python docs/images/make_pages.py [--output FOLDER]

Needs Chromium and what talks to it: pip install '.[browser]'.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from sparsespec import Segmenter
from sparsespec.batch import find_inputs, run_batch
from sparsespec.evaluation.benchmark.report_page import BROWSER_ARGUMENTS, find_browser
from sparsespec.images import read_image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OPENED = "coins.jpg"
WIDTH, HEIGHT, GAP = 1000, 700, 8


def photographed(report: Path) -> list[Image.Image]:
    """Give the page as it opens, and with a photograph opened in it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(BROWSER_ARGUMENTS))
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(report.resolve().as_uri())
        page.wait_for_function(
            """() => [...document.querySelectorAll(".card img")].every(image => image.naturalWidth)
                && [...document.querySelectorAll(".card canvas")].every(canvas => canvas.width > 1)"""
        )
        seen = [page.screenshot()]
        page.locator(".card", has=page.get_by_title(OPENED, exact=True)).locator("a").click()
        page.wait_for_function("() => document.querySelector('#opened .sv-photo img')?.naturalWidth")
        page.mouse.move(1, 1)
        seen.append(page.screenshot())
        browser.close()
    return [Image.open(io.BytesIO(png)).convert("RGB") for png in seen]


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="folder of the picture")
    output: Path = parser.parse_args().output
    segmenter = Segmenter()
    segmenter(read_image(EXAMPLES / OPENED))  # so that no image of the run waits for the kernels to be loaded
    with tempfile.TemporaryDirectory() as folder:
        run_batch(segmenter, find_inputs(EXAMPLES), folder)
        left, right = photographed(Path(folder, "report.html"))
    sheet = Image.new("RGB", (2 * WIDTH + GAP, HEIGHT), "#888")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (WIDTH + GAP, 0))
    sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4), Image.Resampling.LANCZOS).save(
        output / "report.jpg", quality=88, optimize=True
    )


if __name__ == "__main__":
    main()
