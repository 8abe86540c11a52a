"""The viewer by itself: masks are decoded as they were encoded, and pictures with little in them are shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsespec.formats import encode_rle, instance_colours
from sparsespec.formats.viewer import script, style
from tests.browser.pages import Visit

Open = Callable[..., Visit]


@pytest.fixture
def blank(tmp_path: Path) -> Path:
    page = tmp_path / "page" / "index.html"
    page.parent.mkdir()
    page.write_text(
        "<!DOCTYPE html><html lang=en><meta charset=utf-8>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline';"
        " script-src 'unsafe-inline' 'unsafe-eval'\">"
        f"<title>viewer</title><style>{style()}</style><div id=v></div><script>{script()}</script></html>"
    )
    return page


def instances(masks: list[Any]) -> list[dict[str, Any]]:
    return [
        {"label": k, "score": 0.5, "box": [0, 0, 1, 1], "area": int(mask.sum()), "rle": encode_rle(mask)["counts"]}
        for k, mask in enumerate(masks, start=1)
    ]


def random_masks(height: int, width: int, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 4, (-(-height // 5), -(-width // 5)))
    labels = np.kron(coarse, np.ones((5, 5), int))[:height, :width]
    return [labels == k for k in (1, 2, 3)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (33, 47), (64, 20)])
def test_masks_are_decoded(visit: Open, blank: Path, shape: tuple[int, int]) -> None:
    seen = visit(blank)
    speckles = np.random.default_rng(1).random(shape) < 0.5
    for masks in (random_masks(*shape, seed=2), [speckles], [np.ones(shape, bool)], [np.zeros(shape, bool)]):
        picture = {"maskSize": shape, "instances": instances(masks)}
        owners = np.array(seen.page.evaluate("p => [...sparsespec.masksOf(p).owners]", picture)).reshape(shape)
        for k, mask in enumerate(masks, start=1):
            assert np.array_equal(owners == k, mask)


@pytest.mark.parametrize("shape", [(1, 1), (33, 47), (64, 20)])
def test_outlines_enclose_the_masks(visit: Open, blank: Path, shape: tuple[int, int]) -> None:
    seen = visit(blank)
    speckles = np.random.default_rng(1).random(shape) < 0.5
    for masks in (random_masks(*shape, seed=3), [speckles], [np.ones(shape, bool)], [np.zeros(shape, bool)]):
        picture = {"maskSize": shape, "instances": instances(masks)}
        inside = seen.page.evaluate(
            """p => {
                const context = document.createElement("canvas").getContext("2d"), [rows, columns] = p.maskSize;
                return sparsespec.masksOf(p, false).paths.map(path => Array.from({length: rows * columns}, (_, k) =>
                    context.isPointInPath(path, k % columns + 0.5, Math.floor(k / columns) + 0.5, "evenodd")));
            }""",
            picture,
        )
        for found, mask in zip(inside, masks, strict=True):
            assert np.array_equal(np.array(found).reshape(shape), mask)


def test_colours_are_those_of_the_overlays(visit: Open, blank: Path) -> None:
    seen = visit(blank)
    found = seen.page.evaluate("[1, 2, 11, 240, 241].map(sparsespec.colour)")
    expected = ["#" + bytes(colour).hex() for colour in instance_colours(240)]
    assert found == [expected[0], expected[1], expected[10], expected[239], expected[0]]


def test_of_two_masks_the_smaller_is_pointed_at(visit: Open, blank: Path) -> None:
    large, small = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    large[2:18, 2:18] = True
    small[8:12, 8:12] = True
    seen = visit(blank)
    owners = seen.page.evaluate(
        "p => [...sparsespec.masksOf(p).owners]", {"maskSize": (20, 20), "instances": instances([small, large])}
    )
    assert owners[10 * 20 + 10] == 1
    assert owners[4 * 20 + 4] == 2


def test_a_picture_of_one_pixel_and_nothing_else(visit: Open, blank: Path) -> None:
    seen = visit(blank)
    seen.page.evaluate(
        "window.view = sparsespec.viewer(document.getElementById('v'), {name: 'dot', size: [1, 1], photograph: []})"
    )
    assert seen.page.get_by_text("1 × 1 · no instances").is_visible()
    assert seen.page.locator(".sv-layers, .sv-seconds, .sv-links").count() == 0
    seen.page.locator(".sv-surface").focus()
    for key in ("m", "n", "l", "o", "+", "0", "1", "Enter", "f"):
        seen.page.keyboard.press(key)
    seen.page.evaluate("view.destroy()")
    assert seen.page.locator("#v > *").count() == 0


def test_facts_are_told_and_clicks_reported(visit: Open, blank: Path) -> None:
    mask = np.zeros((20, 40), bool)
    mask[5:15, 10:30] = True
    picture = {
        "name": "<b>x</b>",
        "size": [400, 200],
        "maskSize": [20, 40],
        "photograph": [],
        "instances": [{**instances([mask])[0], "facts": {"votes": "0.62"}}],
    }
    seen = visit(blank)
    seen.page.evaluate(
        """p => {
            window.picked = [];
            const element = document.getElementById("v");
            element.addEventListener("sparsespec:pick", event => picked.push(event.detail));
            window.view = sparsespec.viewer(element, p);
            view.highlight(1);
        }""",
        picture,
    )
    tip = seen.page.locator(".sv-tip")
    assert "votes0.62" in tip.inner_text()
    seen.page.evaluate("view.highlight(null)")
    assert not tip.is_visible()
    seen.page.mouse.click(*seen.at(200, 100))
    seen.page.mouse.click(*seen.at(20, 20))
    (first, second) = json.loads(seen.page.evaluate("JSON.stringify(picked)"))
    assert first["label"] == 1
    assert [first["x"], first["y"]] == pytest.approx([200, 100], abs=2)
    assert second["label"] is None
    assert seen.page.locator(".sv-name strong").inner_text() == "<b>x</b>"


def test_the_page_scrolls_over_a_viewer_that_is_not_used(visit: Open, blank: Path) -> None:
    seen = visit(blank)
    seen.page.evaluate(
        "document.body.style.height = '4000px';"
        "sparsespec.viewer(document.getElementById('v'), {name: 'x', size: [40, 30], photograph: []})"
    )
    seen.page.mouse.move(*seen.at(20, 15))
    seen.page.mouse.wheel(0, 200)
    seen.page.wait_for_function("() => scrollY > 100")
    assert seen.page.locator(".sv-wide").inner_text() == "fit"
