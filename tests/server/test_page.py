"""The page in a browser, against a real server with a stub for a model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.serving import Served, photo, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Chromium of Debian")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(models={"small": "Stub()", "large": "Stub()"}, limits="max_body=50000") as server:  # type: ignore[arg-type]
        server.event("ready")
        yield server


@pytest.fixture
def page(browser: Browser, browser_thread: ThreadPoolExecutor, server: Served) -> Iterator[Page]:
    """The page; in the end nothing was asked for elsewhere, and nothing complained about."""
    asked: list[str] = []
    said: list[str] = []
    opened = browser_thread.submit(_open, browser, server.url, asked, said).result()
    yield opened
    browser_thread.submit(opened.context.close).result()
    assert said == []
    assert all(url.startswith((server.url + "/", "blob:", "data:")) for url in asked)


def _open(browser: Browser, url: str, asked: list[str], said: list[str]) -> Page:
    context = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    opened.on("request", lambda request: asked.append(request.url))
    # A refusal, which the page shows, is also noted by the browser itself.
    opened.on(
        "console",
        lambda message: (
            said.append(message.text)
            if message.type in ("error", "warning") and "status of 4" not in message.text
            else None
        ),
    )
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(url + "/")
    opened.wait_for_function("() => document.getElementById('model').options.length === 2")
    return opened


def drop(page: Page, content: bytes, name: str = "cat.png") -> None:
    page.evaluate(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
            for (const kind of ["dragover", "drop"])
                document.getElementById("drop").dispatchEvent(
                    new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        [list(content), name],
    )


def choose(page: Page, content: bytes, name: str = "cat.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def status(page: Page, text: str) -> None:
    page.wait_for_function("text => document.getElementById('status').textContent.startsWith(text)", arg=text)


def test_a_photograph_is_dropped_and_its_masks_are_shown(page: Page) -> None:
    drop(page, photo(320, 240), "my <b>cat</b>.png")
    status(page, "2 objects")
    assert page.locator(".sv-instances li").count() == 2
    assert page.locator(".sv-name strong").inner_text() == "my <b>cat</b>.png"
    assert "foreground" in page.locator(".sv-layers").inner_text().lower()
    assert page.locator("#problem").is_hidden()
    box = page.locator(".sv-instances input").first
    assert box.is_checked()
    box.uncheck()
    page.keyboard.press("m")
    # Another one takes its place.
    page.fill("#count", "3")
    page.press("#count", "Tab")
    status(page, "3 objects")
    assert page.locator(".sv-instances li").count() == 3


def test_results_are_saved(page: Page, tmp_path: Path) -> None:
    choose(page, photo(320, 240))
    status(page, "2 objects")
    names = {"COCO JSON": "cat.json", "Labels PNG": "cat-labels.png", "Overlay JPEG": "cat-overlay.jpg"}
    starts = {"COCO JSON": b"{", "Labels PNG": b"\x89PNG", "Overlay JPEG": b"\xff\xd8"}
    for button, name in names.items():
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(starts[button])
    document = json.loads((tmp_path / "cat.json").read_text())
    assert document["images"][0]["file_name"] == "cat.png"
    assert "layers" not in document


def test_what_goes_wrong_is_said(page: Page) -> None:
    choose(page, b"<!doctype html>", "page.png")
    page.wait_for_selector("#problem:not([hidden])")
    assert "Not an image" in page.locator("#problem").inner_text()
    assert "web page" in page.locator("#problem").inner_text()
    choose(page, b"x" * 60_000)
    page.locator("#problem", has_text="too large").wait_for()
    choose(page, photo(320, 240))
    status(page, "2 objects")
    assert page.locator("#problem").is_hidden()


def test_keyboard_and_the_choice_of_a_model(page: Page, server: Served) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert page.locator("#model-choice").is_visible()
    choose(page, photo(320, 240))
    status(page, "2 objects")
    with page.expect_request(lambda request: "model=large" in request.url):
        page.select_option("#model", "large")
    status(page, "2 objects")
    assert f"{server.url}/segment" in page.locator("#examples").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_and_narrow(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": 320, "height": 640})
    choose(page, photo(320, 240))
    status(page, "2 objects")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.locator("#choose").bounding_box()["height"] >= 32  # type: ignore[index]
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed")
    found = axe.Axe().run(page)
    assert [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found["violations"]] == []
