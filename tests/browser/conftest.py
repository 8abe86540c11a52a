from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sparsespec._locks import try_to_lock
from tests.browser.pages import ODD_NAMES, Visit, many_images, report_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture
def visit(browser: Browser, browser_thread: ThreadPoolExecutor) -> Iterator[Any]:
    """Open a page and, in the end, hold it to what every page has to keep to."""
    visits: list[Visit] = []

    def open_page(path: Path | str, **options: Any) -> Visit:
        visits.append(Visit(browser, path, **options))
        return visits[-1]

    yield open_page
    for each in visits:
        browser_thread.submit(each.leave).result()


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
    """Report of a run over 5,000 photographs, written once for all processes of pytest-xdist."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / "many", root / "many.done"
    with (root / "many.lock").open("w") as lock:
        while not try_to_lock(lock.fileno()):
            time.sleep(0.05)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            many_images(folder, 5000)
            done.touch()
    return folder / "out" / "report.html"
