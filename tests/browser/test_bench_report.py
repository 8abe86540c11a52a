from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from sparsespec.evaluation.benchmark.report_page import time_in_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser


def test_the_steps_of_the_benchmark_work(browser: Browser, many: Path) -> None:
    # Playwright allows one of its kind in a thread, and that of the other tests is in the one this runs in.
    with ThreadPoolExecutor(1) as pool:
        seconds, elements = pool.submit(time_in_browser, many, 1).result()
    assert next(iter(seconds)) == "open the page"
    assert {"search by name", "filter by score", "sort by area", "next page", "open an image"} <= set(seconds)
    assert all(len(runs) == 1 and runs[0] > 0 for runs in seconds.values())
    assert 500 < elements < 1500
