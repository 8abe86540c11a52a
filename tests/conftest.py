from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sparsespec._threads import available_cpus

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Several test processes with threads of their own for small matrices wait for each other most of the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Some tests import ONNX Runtime themselves.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# The installed package is tested, also by processes that tests start, and not the checkout around it (which
# "python -m pytest" puts first): there, cli/ and models/ are not yet where they are imported from.
_CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _CHECKOUT]
os.environ["PYTHONSAFEPATH"] = "1"
# Nothing is downloaded, and the models that somebody pulled on this machine are not looked at.
os.environ["SPARSESPEC_OFFLINE"] = "1"

_SHARED = "SPARSESPEC_SHARED"


def pytest_configure(config: pytest.Config) -> None:
    # Most of a file's tests go to one process of pytest-xdist, which makes what they share once, and none is idle.
    if config.getoption("dist", "no") == "load":
        config.option.dist = "worksteal"
    # A shell starts what it runs in the background with Ctrl-C ignored, and so would be all that the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than processors for ``-n auto``: many tests wait for servers and other processes."""
    return available_cpus() + 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a package that is not installed."""
    for mark in item.iter_markers("needs"):
        for module in mark.args:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed: pip install '.[test]'")


@pytest.fixture(scope="session", autouse=True)
def _own_folder_of_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SPARSESPEC_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Photographs and reference numbers that are too large, or not free enough, to live in the project."""
    folder = Path(os.environ.get(_SHARED, _CHECKOUT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"measuring data not found: no folder 'shared' beside the checkout and {_SHARED} is not set")
    return folder


@pytest.fixture(scope="session")
def browser_thread() -> Iterator[ThreadPoolExecutor]:
    """The thread that drives the browser.

    Playwright keeps an event loop running where it was started, and another one of its kind, or ``asyncio.run`` of
    another test, fails in that thread.
    """
    with ThreadPoolExecutor(1, "browser") as thread:
        yield thread


@pytest.fixture(scope="session")
def _started_browser(browser_thread: ThreadPoolExecutor) -> Iterator[Browser]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'"
    )
    from sparsespec.evaluation.benchmark.report_page import BROWSER_ARGUMENTS, find_browser

    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium on the PATH")
    driver = browser_thread.submit(playwright.sync_playwright().start).result()
    start = functools.partial(driver.chromium.launch, executable_path=program, args=list(BROWSER_ARGUMENTS))
    started = browser_thread.submit(start).result()
    yield started
    browser_thread.submit(started.close).result()
    browser_thread.submit(driver.stop).result()


@pytest.fixture
def browser(
    _started_browser: Browser, browser_thread: ThreadPoolExecutor, request: pytest.FixtureRequest
) -> Iterator[Browser]:
    """Chromium of the system, one for all tests of a process; a test that uses it runs in the browser's thread.

    Fixtures are not moved there: what they ask of the browser, they submit to `browser_thread`.
    """
    test = request.node.obj

    @functools.wraps(test)
    def in_the_thread(**arguments: Any) -> Any:
        return browser_thread.submit(test, **arguments).result()

    request.node.obj = in_the_thread
    yield _started_browser
    request.node.obj = test
