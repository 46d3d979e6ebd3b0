"""The same journeys on the bundled model, or on the server that NEOUNIFY_PAGE_URL names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver

from serve.page import journeys
from serve.page.device import set_device
from support.serving_command import served

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def url(started_browser: WebDriver) -> Iterator[str]:
    """Without a browser no server is started."""
    if variable := os.environ.get("NEOUNIFY_PAGE_URL"):
        yield variable.rstrip("/")
        return
    with served("--dtype", "float32") as (_, address):
        yield address


@pytest.mark.parametrize(
    "journey",
    [
        journeys.answer,
        journeys.generating,
        journeys.again,
        journeys.variations,
        journeys.editing,
        journeys.story,
        journeys.refusal,
    ],
    ids=lambda journey: journey.__name__,
)
def test_journey(
    browser: WebDriver,
    shoot: Callable[[str], None],
    journey: Callable[[WebDriver, str], Any],
    url: str,
) -> None:
    journey(browser, url)
    journeys.assert_fits(browser)
    shoot(f"real-{journey.__name__}")


@pytest.mark.parametrize("width", [320, 768])
def test_the_description_of_the_api_fits(browser: WebDriver, url: str, width: int) -> None:
    set_device(browser, width, 640)
    browser.get(f"{url}/docs")
    assert journeys.find_all(browser, "td code")
    shown = browser.execute_script("return [window.innerWidth, document.body.scrollWidth]")
    assert shown[0] == width
    assert shown[1] <= width
    assert browser.get_log("browser") == []
