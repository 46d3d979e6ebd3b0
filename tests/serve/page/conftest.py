"""A headless Chromium for the tests of the page; without one they are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.chrome.webdriver import WebDriver

from serve.page.device import set_device
from serve.page.scripted import Script, scripted_server

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
SHOTS = Path("out/page")


@pytest.fixture(scope="session")
def started_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or chromedriver is not installed: scripts/browser-tests")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(started_browser: WebDriver) -> Iterator[WebDriver]:
    """A desktop's window in light colours, with nothing in the browser's log."""
    set_device(started_browser)
    started_browser.get_log("browser")
    yield started_browser
    started_browser.get("about:blank")


@pytest.fixture
def shoot(browser: WebDriver) -> Callable[[str], None]:
    """Write a screenshot of what is seen to out/page/NAME.png."""

    def write(name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        assert browser.save_screenshot(SHOTS / f"{name}.png")

    return write


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Script]]:
    with scripted_server() as (url, script):
        yield url, script


@pytest.fixture
def script(server: tuple[str, Script]) -> Script:
    script = server[1]
    script.asked.clear()
    script.broken_off.clear()
    script.wants_key = False
    return script


@pytest.fixture
def url(server: tuple[str, Script], script: Script) -> str:
    return server[0]
