"""Layout of the page on phones and desktops, against a scripted server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.keys import Keys

from serve.page import journeys
from serve.page.device import set_device

Shoot = Callable[[str], None]
Browser = WebDriver

pytestmark = pytest.mark.browser


_REACHED = """
const box = arguments[0].getBoundingClientRect();
const there = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
return arguments[0] === there || arguments[0].contains(there);
"""


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_scrolled_far_everything_is_in_reach(browser: Browser, url: str, width: int) -> None:
    set_device(browser, width, 640)
    journeys.open_page(browser, url, "generate")
    for count in (1, 2):
        journeys.enter(browser, "#generate-input", "a red circle" + Keys.ENTER)
        journeys.wait_for(browser, "#generate .card", count)
        journeys.wait_until_done(browser, "#generate")
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    narrow = width < 960
    wanted = ("#tab-chat", "#tab-story") + (
        ("[popovertarget=settings]", "[popovertarget=gallery]")
        if narrow
        else ("#settings-title", "#setting-steps")
    )
    for selector in wanted:
        assert browser.execute_script(_REACHED, journeys.find(browser, selector)), selector
    journeys.open_gallery(browser)


def test_a_row_of_examples_shows_that_it_scrolls(browser: Browser, url: str) -> None:
    set_device(browser, 320, 640)
    journeys.open_page(browser, url, "generate")
    first, second = journeys.find_all(browser, "#generate .example")[:2]
    assert first.rect["x"] + first.rect["width"] < 320 - 8
    assert second.rect["x"] < 320 - 8


@pytest.mark.parametrize(("width", "height"), [(320, 480), (320, 640), (375, 740), (1280, 400)])
def test_nothing_covers_the_examples(browser: Browser, url: str, width: int, height: int) -> None:
    set_device(browser, width, height)
    journeys.open_page(browser, url, "chat")
    examples = journeys.find_all(browser, "#chat .example")
    assert len(examples) == 3
    for example in examples:
        browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", example)
        assert browser.execute_script(_REACHED, example), example.text
    title = journeys.find(browser, "h1")
    assert title.size["height"] < 40
    journeys.assert_fits(browser)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_looks_right(
    browser: Browser, url: str, shoot: Shoot, width: int, scheme: str
) -> None:
    set_device(browser, width, 740 if width == 360 else 860, scheme)
    name = f"{'phone' if width == 360 else 'desktop'}-{scheme}"
    journeys.open_page(browser, url, "chat")
    shoot(f"{name}-welcome")
    journeys.answer(browser, url)
    journeys.assert_fits(browser)
    shoot(f"{name}-chat")
    for mode, journey in (
        ("generate", journeys.variations),
        ("edit", journeys.editing),
        ("story", journeys.story),
        ("error", journeys.refusal),
    ):
        journey(browser, url)
        journeys.assert_fits(browser)
        shoot(f"{name}-{mode}")
    if width == 360:
        journeys.click(browser, "[popovertarget=settings]")
        journeys.assert_fits(browser)
        shoot(f"{name}-settings")
    journeys.generating(browser, url)
    journeys.open_gallery(browser)
    journeys.assert_fits(browser)
    shoot(f"{name}-viewer")


@pytest.mark.parametrize("width", [320, 375])
def test_labels_of_tabs_stay_on_one_line(browser: Browser, url: str, width: int) -> None:
    set_device(browser, width, 640)
    journeys.open_page(browser, url, "generate")
    heights = [tab.rect["height"] for tab in journeys.find_all(browser, "[role=tab]")]
    assert max(heights) < 50
    journeys.assert_fits(browser)
