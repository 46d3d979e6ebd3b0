"""The same journeys against a server that runs: NEOUNIFY_PAGE_URL=http://127.0.0.1:8000."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver

from serve.page import journeys

URL = os.environ.get("NEOUNIFY_PAGE_URL", "").rstrip("/")

pytestmark = pytest.mark.skipif(not URL, reason="NEOUNIFY_PAGE_URL names no server")


@pytest.mark.parametrize(
    "journey",
    [
        journeys.answer,
        journeys.painting,
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
) -> None:
    journey(browser, URL)
    journeys.assert_fits(browser)
    shoot(f"real-{journey.__name__}")
