"""Journeys of a visitor on the page: the same against a scripted and a real server.

Every journey takes (browser, base_url) and begins by opening the page anew.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 120
"""Seconds a real model may take for one answer."""

STORY = (
    "Tell a story in two pictures. It starts with a red circle in the top left on a white "
    "background. Draw a blue star in the bottom right."
)

# Keeps what every image of the page showed, in order: (state of its tile, its URL, its caption).
_WATCH = """
window.shown = [];
new MutationObserver((changes) => {
  for (const { target, addedNodes } of changes) {
    for (const node of [target, ...addedNodes]) {
      const tile = node.closest?.(".tile");
      if (node.tagName !== "IMG" || !tile) continue;
      const words = tile.querySelector("figcaption").textContent;
      window.shown.push([tile.dataset.state, node.src, words]);
    }
  }
}).observe(document.body, { subtree: true, childList: true, attributeFilter: ["src"] });
"""


def open_page(browser: WebDriver, base_url: str, mode: str) -> None:
    """A fresh page in that mode, with nothing left of an earlier visit."""
    browser.get(base_url + "/")
    browser.execute_script("sessionStorage.clear()")
    browser.get("about:blank")
    browser.get(f"{base_url}/#{mode}")
    wait(browser, lambda: find(browser, f"#{mode}-input").is_displayed())
    browser.execute_script(_WATCH)


def answer(browser: WebDriver, base_url: str) -> str:
    """Chat: an example's question about an image, answered; gives the answer."""
    open_page(browser, base_url, "chat")
    click_text(browser, "#chat .example", "How many squares are there?")
    wait(browser, lambda: find(browser, "#chat .attached img").is_displayed())
    click(browser, "#chat .primary")
    wait_until_done(browser, "#chat")
    assert find(browser, "#chat .question .text").text == "How many squares are there?"
    said = find(browser, "#chat .answer .text").text
    assert said.strip()
    return said


def follow_up(browser: WebDriver, question: str) -> None:
    """Chat: one more turn of the conversation, sent with the keyboard."""
    before = len(find_all(browser, "#chat .answer"))
    find(browser, "#chat-input").send_keys(question + Keys.ENTER)
    wait_for(browser, "#chat .answer", before + 1)
    wait_until_done(browser, "#chat")


def generating(browser: WebDriver, base_url: str) -> list[str]:
    """Generate: at least two different previews before the image; gives the previews' URLs."""
    open_page(browser, base_url, "generate")
    enter(browser, "#setting-steps", "200")  # long enough to be seen
    enter(browser, "#generate-input", "a red circle")
    click(browser, "#generate .primary")
    wait(browser, lambda: bool(find_all(browser, "#generate [data-state=generating] img")))
    assert "Step" in text_of(browser, "#generate figcaption")
    wait_until_done(browser, "#generate")
    assert_finished(browser, "#generate", 1)
    final = find(browser, "#generate .tile img").get_attribute("src")
    previews = list(previews_shown(browser))
    assert len(previews) >= 2, f"{len(previews)} previews"
    assert final not in previews
    return previews


def again(browser: WebDriver, base_url: str) -> str:
    """Generate, and once more from the gallery: the same seed, the same image; gives the seed."""
    open_page(browser, base_url, "generate")
    enter(browser, "#generate-input", "a red circle")
    click(browser, "#generate .primary")
    wait_until_done(browser, "#generate")
    open_gallery(browser)
    click_text(browser, "#viewer button", "Regenerate")
    wait_for(browser, "#generate .card", 2)
    wait_until_done(browser, "#generate")
    assert_finished(browser, "#generate", 2)
    seeds = [element.text for element in find_all(browser, "#generate .card .seed")]
    urls = [element.get_attribute("src") for element in find_all(browser, "#generate .tile img")]
    assert seeds[0] == seeds[1]
    assert_same_image(*urls)
    return seeds[0].removeprefix("Seed ")


def editing(browser: WebDriver, base_url: str) -> None:
    """Edit: an example's image changed, and the result taken as the next one to change."""
    open_page(browser, base_url, "edit")
    click_text(browser, "#edit .example", "Turn the square red.")
    wait(browser, lambda: find(browser, "#edit .attached img").is_displayed())
    click(browser, "#edit .primary")
    wait_until_done(browser, "#edit")
    assert_finished(browser, "#edit", 1)
    click_text(browser, "#edit .tile button", "Edit this")
    source = find(browser, "#edit .tile img").get_attribute("src")
    assert find(browser, "#edit .attached img").get_attribute("src") == source


def upload(browser: WebDriver, base_url: str, image: Path) -> None:
    """Edit: an image from a file, taken out again."""
    open_page(browser, base_url, "edit")
    find(browser, "#edit input[type=file]").send_keys(str(image))
    wait(browser, lambda: bool(find_all(browser, "#edit .attached img")))
    click(browser, "#edit .remove")
    assert not find_all(browser, "#edit .attached img")


def story(browser: WebDriver, base_url: str) -> None:
    """Story: text and two images, in turn."""
    open_page(browser, base_url, "story")
    enter(browser, "#setting-max_images", "2")
    enter(browser, "#story-input", STORY)
    click(browser, "#story .primary")
    wait_until_done(browser, "#story")
    assert_finished(browser, "#story", 2)
    assert text_of(browser, "#story .answer .text").strip()


def variations(browser: WebDriver, base_url: str) -> None:
    """Generate: three images at once; the last one alone, by its own seed, is the same again."""
    open_page(browser, base_url, "generate")
    enter(browser, "#setting-n", "3")
    enter(browser, "#setting-seed", "40")
    enter(browser, "#generate-input", "two purple crosses")
    click(browser, "#generate .primary")
    wait_until_done(browser, "#generate")
    assert_finished(browser, "#generate", 3)
    last = find_all(browser, "#generate .tile")[2]
    url = last.find_element(By.TAG_NAME, "img").get_attribute("src")
    next(b for b in last.find_elements(By.TAG_NAME, "button") if b.text == "Regenerate").click()
    wait_until_done(browser, "#generate")
    assert_finished(browser, "#generate", 4)
    assert text_of(browser, "#generate .card .seed") == "Seed 42"
    assert_same_image(find(browser, "#generate .tile img").get_attribute("src"), url)


def video(browser: WebDriver, base_url: str) -> list[str]:
    """Video: previews of a frame, then the video, which plays; gives the previews' URLs."""
    open_page(browser, base_url, "video")
    enter(browser, "#setting-steps", "200")
    enter(browser, "#setting-frames", "64")  # so that it lasts for several looks at the server
    enter(browser, "#video-input", "A red circle moves to the right.")
    click(browser, "#video .primary")
    wait_for(browser, "#video .card", 1)
    wait_until_done(browser, "#video")
    assert_plays(browser, "#video .tile[data-state=finished] video")
    previews = previews_shown(browser)
    assert all("% of 64 frames" in words for words in previews.values())
    return list(previews)


def previews_shown(browser: WebDriver) -> dict[str, str]:
    """The caption of each preview that the page has shown, by its URL."""
    shown: list[tuple[str, str, str]] = browser.execute_script("return window.shown")
    return {url: words for state, url, words in shown if state == "generating"}


def assert_plays(browser: WebDriver, selector: str) -> None:
    """A video that is decoded, and moves on when it is played."""
    element = find(browser, selector)
    wait(browser, lambda: int(str(element.get_property("readyState"))) >= 2)
    browser.execute_script("arguments[0].play()", element)
    wait(browser, lambda: float(str(element.get_property("currentTime"))) > 0)
    browser.execute_script("arguments[0].pause()", element)


def refusal(browser: WebDriver, base_url: str) -> str:
    """Generate: a size that no model takes; gives the words that say so, near the button."""
    open_page(browser, base_url, "generate")
    enter(browser, "#setting-size", "63x63")
    enter(browser, "#generate-input", "a red circle")
    click(browser, "#generate .primary")
    wait(browser, lambda: find(browser, "#generate .notice").is_displayed())
    assert not find_all(browser, "#generate .card")
    words = text_of(browser, "#generate .notice p")
    assert "63" in words
    return words


def stop(browser: WebDriver, base_url: str, prompt: str = "Go on for long.") -> None:
    """Chat: an answer stopped on its way; what had come stays."""
    open_page(browser, base_url, "chat")
    find(browser, "#chat-input").send_keys(prompt + Keys.ENTER)
    wait(browser, lambda: bool(find_all(browser, "#chat .answer .text")))
    click(browser, "#chat .stop")
    wait_until_done(browser, "#chat")
    assert text_of(browser, "#chat .answer .status") == "Stopped."


def assert_finished(browser: WebDriver, panel: str, count: int) -> None:
    """So many finished images in that panel, decoded and not empty."""
    tiles = find_all(browser, f"{panel} .tile[data-state=finished] img")
    assert len(tiles) == count
    wait(browser, lambda: all(tile.get_property("naturalWidth") for tile in tiles))


def assert_same_image(url: str | None, other: str | None) -> None:
    """Equal but for the rounding of a batch of another size."""
    first, second = read_image(url), read_image(other)
    assert first.shape == second.shape
    furthest = np.abs(first - second).max()
    assert furthest <= 2, f"a pixel is {furthest} of 255 off"


def read_image(url: str | None) -> NDArray[np.int16]:
    """The colours of the image in a data URL."""
    assert url is not None
    content = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=np.int16)


def assert_fits(browser: WebDriver) -> None:
    """Nothing is wider than the window."""
    wide, inner = browser.execute_script(
        "return [document.scrollingElement.scrollWidth, window.innerWidth]"
    )
    assert wide <= inner, f"the page is {wide} wide in a window of {inner}"


def open_gallery(browser: WebDriver) -> None:
    """The newest image of the gallery, in its viewer."""
    opener = find(browser, "[popovertarget=gallery]")
    if opener.is_displayed():
        opener.click()
    click(browser, "#gallery .thumbs button")
    wait(browser, lambda: find(browser, "#viewer").is_displayed())


def wait_until_done(browser: WebDriver, panel: str) -> None:
    """Until nothing is under way in that panel."""
    wait(
        browser,
        lambda: (
            find(browser, f"{panel} .primary").is_displayed()
            and not find_all(browser, f"{panel} [aria-busy]")
        ),
    )


def wait(browser: WebDriver, condition: Callable[[], Any]) -> None:
    WebDriverWait(browser, PATIENCE, poll_frequency=0.05).until(lambda _: condition())


def find(browser: WebDriver, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def find_all(browser: WebDriver, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def wait_for(browser: WebDriver, selector: str, count: int) -> None:
    """Until there are exactly so many elements."""
    wait(browser, lambda: len(find_all(browser, selector)) == count)


def text_of(browser: WebDriver, selector: str) -> str:
    return find(browser, selector).text


def click(browser: WebDriver, selector: str) -> None:
    find(browser, selector).click()


def click_text(browser: WebDriver, selector: str, words: str) -> None:
    """The element of that selector with exactly these words."""
    next(e for e in find_all(browser, selector) if e.text == words).click()


def enter(browser: WebDriver, selector: str, text: str) -> None:
    """Text into a field, which is shown first where it lies in a closed sheet."""
    element = find(browser, selector)
    if not element.is_displayed():
        click(browser, "[popovertarget=settings]")
    element.clear()
    element.send_keys(text)
    closing = find(browser, "#settings .sheet-close")
    if closing.is_displayed():
        closing.click()
