"""Make the pictures of pages in this folder: the report of a run over photographs of scikit-image, in Chromium.

python docs/images/make_screens.py [--output FOLDER]

Needs the extra ``browser`` and an installed Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from sparsespec import Segmenter
from sparsespec.batch import find_inputs, run_batch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SIZE = (1180, 820)
WIDTH = 1600
GAP = 12


def photographs(folder: Path) -> None:
    """Put the photographs of docs/examples and some more into a folder."""
    for path in EXAMPLES.glob("*.jpg"):
        shutil.copy(path, folder)
    more = {"chelsea": skimage.data.chelsea(), "motorcycle": skimage.data.stereo_motorcycle()[0]}
    for name, image in more.items():
        Image.fromarray(image).save(folder / f"{name}.jpg", quality=92)


def taken(page: Page, address: str, path: Path) -> Image.Image:
    """Open a page, wait for its pictures, and take it."""
    page.goto(address)
    page.wait_for_timeout(2500)
    page.screenshot(path=path)
    return Image.open(path).convert("RGB")


def main() -> None:
    """Write report.webp."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    output = parser.parse_args().output
    browser_path = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if browser_path is None:
        sys.exit("there is no Chromium on this machine: install it")
    with tempfile.TemporaryDirectory() as name, sync_playwright() as play:
        folder = Path(name)
        (folder / "photographs").mkdir()
        photographs(folder / "photographs")
        run_batch(Segmenter(), find_inputs(folder / "photographs"), folder / "out")
        address = (folder / "out" / "report.html").as_uri()
        browser = play.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        size = {"width": SIZE[0], "height": SIZE[1]}
        light = browser.new_page(viewport=size, device_scale_factor=1.5)
        gallery = taken(light, address, folder / "gallery.png")
        dark = browser.new_page(viewport=size, device_scale_factor=1.5, color_scheme="dark")
        dark.goto(address)
        dark.wait_for_timeout(1500)
        dark.get_by_role("button", name="coffee.jpg").or_(dark.get_by_role("link", name="coffee.jpg")).first.click()
        dark.wait_for_timeout(2000)
        dark.mouse.move(SIZE[0] * 0.4, SIZE[1] * 0.35)
        dark.wait_for_timeout(500)
        dark.screenshot(path=folder / "viewer.png")
        viewer = Image.open(folder / "viewer.png").convert("RGB")
        browser.close()
    height = round((WIDTH - GAP) / 2 * SIZE[1] / SIZE[0])
    sheet = Image.fromarray(np.full((height, WIDTH, 3), 255, np.uint8))
    for picture, left in ((gallery, 0), (viewer, (WIDTH + GAP) // 2)):
        sheet.paste(picture.resize(((WIDTH - GAP) // 2, height), Image.Resampling.LANCZOS), (left, 0))
    sheet.save(output / "report.webp", quality=82, method=6)


if __name__ == "__main__":
    main()
