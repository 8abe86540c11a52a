from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sparsespec.evaluation.benchmark.report_page import BROWSER_ARGUMENTS, find_browser
from tests.browser.pages import ODD_NAMES, Visit, many_images, report_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium of the system."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'"
    )
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=list(BROWSER_ARGUMENTS))
        yield started
        started.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Any]:
    """Open a page and, in the end, hold it to what every page has to keep to."""
    visits: list[Visit] = []

    def open_page(path: Path | str, **options: Any) -> Visit:
        visits.append(Visit(browser, path, **options))
        return visits[-1]

    yield open_page
    for each in visits:
        each.leave()


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of a run over three photographs."""
    return report_of(tmp_path_factory.mktemp("three"), {"a.jpg": 2, "b/c.png": 1, "d.jpg": 0})


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of a run over files with odd names, some of which are no images."""
    names: dict[str, int | bytes] = {name: 1 + k % 3 for k, name in enumerate(ODD_NAMES)}
    return report_of(tmp_path_factory.mktemp("odd"), {**names, "no image.jpg": b"text", "empty <i>.png": b""})


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Report of a run over 5,000 photographs."""
    return many_images(tmp_path_factory.mktemp("many"), 5000)
