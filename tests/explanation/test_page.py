from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sparsespec.explanation import Explanation, html_page
from sparsespec.explanation.page import MOST_TOKENS
from sparsespec.formats import decode_rle

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CASES = ("made", "plain", "paper", "nothing", "one_pixel", "one_token", "large")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="explanation">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def decoded(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


# What is in the page


@pytest.mark.parametrize("which", CASES)
def test_one_file_with_all_it_needs(which: str, request: pytest.FixtureRequest) -> None:
    made: Explanation = request.getfixturevalue(which)
    page = html_page(made)
    assert page == html_page(made)
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert len(page) < (20_000_000 if which == "large" else 5_000_000)
    data = data_of(page)
    assert len(data["channels"]) == len(made.channels)
    assert data["grid"][0] * data["grid"][1] <= MOST_TOKENS
    assert len(data["picture"]["instances"]) == len(made.result)


def test_the_largest_page_is_bounded(large: Explanation) -> None:
    assert large.grid[0] * large.grid[1] > MOST_TOKENS
    data = data_of(html_page(large))
    assert data["step"] == 2
    assert data["grid"] == [48, 48]
    assert data["extent"] == [48, 48]
    assert 0 <= data["chosen"][0] < 48


def test_features_in_16_bits_give_the_similarity_within_what_is_said(made: Explanation, large: Explanation) -> None:
    for explanation in (made, large):
        data = data_of(html_page(explanation))
        step = data["step"]
        kept = np.arange(explanation.grid[0] * explanation.grid[1]).reshape(explanation.grid)[::step, ::step].ravel()
        similarity = data["similarity"]
        assert similarity["error"] < 1e-4
        kinds = []
        for kind, exact in zip(similarity["kinds"], explanation.similarity.features, strict=True):
            steps = decoded(kind["data"], "<i2").reshape(-1, kind["channels"])
            np.testing.assert_allclose(steps * kind["scale"], exact[kept], atol=kind["scale"])
            kinds.append((steps.astype(float), kind["scale"], kind["divisor"]))
        for token in (0, len(kept) // 3, len(kept) - 1):
            row = np.zeros(len(kept))
            for steps, scale, divisor in kinds:
                apart = np.abs(steps - steps[token])
                together = np.abs(steps + steps[token]).sum(axis=1)
                row += (1 + apart.max(axis=1) * scale) / (1 + apart.sum(axis=1) / together) / divisor / len(kinds)
            exact_row = explanation.similarity.row(int(kept[token]))[kept]
            assert np.abs(row - exact_row).max() <= similarity["error"]


def test_edges_are_where_they_belong(made: Explanation) -> None:
    data = data_of(html_page(made))
    assert made.graph is not None
    columns = made.grid[1]
    for name, graph in (("plain", made.graph.plain), ("cut", made.graph.cut)):
        steps = decoded(data["edges"][name], "<u2").reshape(-1, 8)
        for place, (down, across) in enumerate([(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]):
            for row, column in ((5, 7), (0, 0), (15, 15)):
                token = row * columns + column
                there = 0 <= row + down < 16 and 0 <= column + across < 16
                step = steps[token, place]
                assert (step == 65535) is not there
                if there:
                    exact = graph[token, token + down * columns + across]
                    assert np.exp(-float(step) / 65534 * data["edges"]["weakest"]) == pytest.approx(exact, rel=1e-3)


def test_masks_and_regions_are_those_of_the_result(made: Explanation) -> None:
    data = data_of(html_page(made))
    picture = data["picture"]
    for instance in picture["instances"]:
        mask = decode_rle({"size": picture["maskSize"], "counts": instance["rle"]})
        assert np.array_equal(mask, made.result.labels == instance["label"])
        assert instance["area"] == mask.sum()
    regions = data["candidates"]
    assert made.candidates is not None
    for packed, mask in zip(regions["masks"], made.candidates.masks, strict=True):
        assert np.array_equal(np.unpackbits(decoded(packed, "u1"))[: mask.size].astype(bool), mask)
    assert regions["labels"] == made.label_of_region()


def test_names_cannot_break_the_page(made: Explanation) -> None:
    name = '<!--<script></script><script>alert(1)</script>"&.jpg'
    page = html_page(dataclasses.replace(made, name=name))
    assert "<script>alert(1)" not in page
    assert data_of(page)["picture"]["name"] == name


def test_a_token_that_is_not_there(made: Explanation) -> None:
    assert data_of(html_page(made, token=2 * 16 + 5))["chosen"] == [2, 5]
    with pytest.raises(ValueError, match="token must be from 0 to 255, not 256"):
        html_page(made, token=256)


# In a browser


@pytest.fixture
def visit(browser: Browser, browser_thread: ThreadPoolExecutor, tmp_path: Path) -> Iterator[Any]:
    """Open the page of an explanation from the disk; in the end nothing may have gone wrong, no request have left."""
    wrong: list[str] = []
    pages: list[Page] = []

    def note(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            wrong.append(request.url)

    def open_page(made: Explanation, **options: Any) -> Page:
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(html_page(made), encoding="utf-8")
        page = browser.new_page(**options)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", note)
        page.goto(path.as_uri())
        page.wait_for_function("() => !!sparsespec.similarityRow")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        browser_thread.submit(page.close).result()
    assert wrong == []


@pytest.mark.parametrize("which", CASES)
def test_it_opens(which: str, request: pytest.FixtureRequest, visit: Any) -> None:
    made: Explanation = request.getfixturevalue(which)
    page = visit(made)
    assert page.locator("#tokens canvas").count() == 1
    assert page.locator("#image-view .sv-instances li").count() == len(made.result)
    assert page.locator("#scores tbody tr").count() == len(made.result)
    dots = page.locator("#channels path.dots").evaluate_all("all => all.map(one => one.getAttribute('d')).join('')")
    assert dots.count("M") == sum(len(choice.entropy) for choice in made.channels)


def test_a_click_on_a_token_shows_its_row(made: Explanation, visit: Any) -> None:
    page = visit(made)
    tokens = page.locator("#tokens")
    box = tokens.bounding_box()
    tokens.click(position={"x": box["width"] * 3.5 / 16, "y": box["height"] * 12.5 / 16})
    said = page.locator("#affinity [role=status]").inner_text()
    assert said.startswith("Token in row 12, column 3 of the grid.")
    token = made.token_at(12, 3)
    exact = made.similarity.row(token)
    shown = np.array(page.evaluate("sparsespec.similarityRow(12, 3)"))
    assert np.abs(shown - exact).max() <= data_of(html_page(made))["similarity"]["error"]
    assert f"{np.delete(exact, token).max():.2f}" in said
    page.keyboard.press("ArrowRight")
    assert "row 12, column 4" in page.locator("#affinity [role=status]").inner_text()
    assert made.graph is not None
    neighbours, _, after = made.graph.row(made.token_at(12, 4))
    right = after[list(neighbours).index(made.token_at(12, 5))]
    cell = page.locator(".compass td").nth(5).inner_text()
    assert float(cell.partition("→ ")[2]) == pytest.approx(right, abs=0.006)


def test_the_threshold_of_the_candidates_can_be_moved(made: Explanation, visit: Any) -> None:
    page = visit(made)
    regions = made.candidates
    assert regions is not None
    slider = page.locator("#candidates input[type=range]")
    said = page.locator("#candidates [role=status]")
    assert said.nth(0).inner_text() == f"At a threshold of 0.36: {regions.count} regions."
    slider.focus()
    page.keyboard.press("Home")
    everything = len(data_of(html_page(made))["candidates"]["merit"])
    assert said.nth(0).inner_text().endswith(f": {everything} regions.")
    page.locator("#candidates .bars button").nth(1).focus()
    assert said.nth(1).inner_text().startswith("Region 2:")


def test_maps_are_thresholded(made: Explanation, visit: Any) -> None:
    page = visit(made)
    page.locator("#foreground .stop").nth(4).click()
    shown = made.foreground.maps[0]
    said = page.locator("#foreground [role=status]").inner_text()
    count = int(said.split()[0])
    # Maps are in steps of 1/255 of their range.
    step = np.ptp(shown.smoothed) / 255
    threshold = shown.thresholds[4]
    assert (shown.smoothed > threshold + step).sum() <= count <= (shown.smoothed > threshold - step).sum()


def test_channels_are_told_by_the_keyboard(made: Explanation, visit: Any) -> None:
    page = visit(made)
    page.locator("#channels svg").first.focus()
    page.keyboard.press("ArrowRight")
    least = int(made.channels[0].entropy.argmin())
    assert page.locator("#channels [role=status]").inner_text().startswith(f"Channel {least} of the keys: entropy ")


@pytest.mark.slow
def test_phones_and_people_who_need_help(made: Explanation, paper: Explanation, visit: Any) -> None:
    axe = pytest.importorskip(
        "axe_core_python.sync_playwright", reason="axe is not installed: pip install '.[browser]'"
    )
    for explanation, width, scheme in ((made, 1300, "light"), (paper, 320, "dark")):
        page = visit(explanation, viewport={"width": width, "height": 800}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        violations = axe.Axe().run(page)["violations"]
        assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in violations] == []
