"""Videos on the page, by a tiny PixelUMM model behind the real server."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.keys import Keys

from neounify.flow.sampling import SOLVERS
from serve.page import journeys
from serve.page.device import set_device
from support.pixelumm import saved
from support.serving_command import served

Shoot = Callable[[str], None]
Browser = WebDriver

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def films(started_browser: WebDriver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server; without a browser none is started."""
    folder = saved(tmp_path_factory.mktemp("pixelumm") / "model")
    with served("--model", str(folder), "--dtype", "float32") as (_, address):
        yield address


def jobs(url: str) -> list[Any]:
    """The videos that the server has of callers without a key."""
    with urllib.request.urlopen(f"{url}/v1/videos", timeout=30) as answer:
        listed: list[Any] = json.load(answer)["data"]
    return listed


def tabs(browser: Browser) -> list[str]:
    return [e.text for e in journeys.find_all(browser, "[role=tab]") if e.is_displayed()]


def test_a_model_shows_the_modes_it_was_trained_for(browser: Browser, films: str, url: str) -> None:
    journeys.open_page(browser, films, "chat")
    journeys.wait(browser, lambda: tabs(browser) == ["Chat", "Generate", "Video"])
    assert not journeys.find(browser, "#setting-think").is_displayed()
    journeys.find(browser, "#tab-chat").send_keys(Keys.END)
    assert browser.switch_to.active_element.get_attribute("id") == "tab-video"
    browser.get("about:blank")
    browser.get(f"{films}/#story")
    journeys.wait(browser, lambda: journeys.find(browser, "#chat-input").is_displayed())
    browser.get("about:blank")
    browser.get(f"{url}/#video")
    journeys.wait(browser, lambda: tabs(browser) == ["Chat", "Generate", "Edit", "Story"])
    assert journeys.find(browser, "#chat-input").is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_previews_come_before_the_video_which_plays(
    browser: Browser, films: str, shoot: Shoot, width: int, scheme: str
) -> None:
    set_device(browser, width, 740 if width == 360 else 860, scheme)
    previews = journeys.video(browser, films)
    assert previews
    name = f"{'phone' if width == 360 else 'desktop'}-{scheme}-video"
    journeys.assert_fits(browser)
    shoot(name)
    element = journeys.find(browser, "#video video")
    assert (element.get_property("videoWidth"), element.get_property("videoHeight")) == (64, 48)
    assert "64 frames, 2.67 s, 64x48" in journeys.text_of(browser, "#video figcaption")
    journeys.open_gallery(browser)
    journeys.assert_plays(browser, "#viewer video")
    facts = journeys.text_of(browser, "#viewer dl").split("\n")
    assert facts[facts.index("Steps") + 1] == "200"
    assert facts[facts.index("Solver") + 1] == "unipc"
    assert facts[facts.index("Frames") + 1] == "64"
    journeys.assert_fits(browser)
    shoot(f"{name}-viewer")
    journeys.wait(browser, lambda: jobs(films) == [])
    assert browser.get_log("browser") == []


def test_settings_are_sent_and_the_file_is_saved(
    browser: Browser, films: str, tmp_path: Path
) -> None:
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    journeys.open_page(browser, films, "video")
    offered = journeys.find_all(browser, "#setting-solver option")
    assert {e.get_attribute("value") for e in offered} == {"", *SOLVERS}
    journeys.enter(browser, "#setting-frames", "4")
    journeys.enter(browser, "#setting-seconds", "1.5")
    assert journeys.find(browser, "#setting-frames").get_property("value") == ""
    settings = {"fps": 8, "size": "48x32", "seed": 7, "negative_prompt": "blur", "steps": 2}
    for name, value in settings.items():
        journeys.enter(browser, f"#setting-{name}", str(value))
    journeys.click(browser, "#setting-solver option[value=dpm2m]")
    journeys.enter(browser, "#video-input", "a fox" + Keys.ENTER)
    journeys.wait_until_done(browser, "#video")
    assert "12 frames, 1.5 s, 48x32" in journeys.text_of(browser, "#video figcaption")
    assert journeys.text_of(browser, "#video .card .seed") == "Seed 7"
    journeys.click_text(browser, "#video figcaption button", "Download")
    file = tmp_path / "neounify-video-seed-7-1.mp4"
    journeys.wait(browser, file.exists)
    assert file.read_bytes()[4:8] == b"ftyp"
    journeys.click_text(browser, "#video figcaption button", "Regenerate")
    journeys.wait_for(browser, "#video .card", 2)
    journeys.wait_until_done(browser, "#video")
    stills = [e.get_attribute("poster") for e in journeys.find_all(browser, "#video .tile video")]
    journeys.assert_same_image(*stills)


def test_a_stopped_video_ends_on_the_server(browser: Browser, films: str, shoot: Shoot) -> None:
    journeys.open_page(browser, films, "video")
    journeys.enter(browser, "#setting-steps", "200")
    journeys.enter(browser, "#setting-frames", "64")
    journeys.enter(browser, "#video-input", "a fox" + Keys.ENTER)
    journeys.wait(
        browser, lambda: bool(journeys.find_all(browser, "#video [data-state=generating] img"))
    )
    assert len(jobs(films)) == 1
    journeys.click(browser, "#video .stop")
    journeys.wait_until_done(browser, "#video")
    assert journeys.text_of(browser, "#video .answer .status") == "Stopped."
    assert "Not finished" in journeys.text_of(browser, "#video figcaption")
    shoot("video-stopped")
    journeys.wait(browser, lambda: jobs(films) == [])


def test_a_video_that_is_left_ends_on_the_server(browser: Browser, films: str) -> None:
    journeys.open_page(browser, films, "video")
    journeys.enter(browser, "#setting-steps", "200")
    journeys.enter(browser, "#setting-frames", "64")
    journeys.enter(browser, "#video-input", "a fox" + Keys.ENTER)
    journeys.wait(browser, lambda: len(jobs(films)) == 1)
    browser.get("about:blank")
    journeys.wait(browser, lambda: jobs(films) == [])


def test_a_refusal_is_said_near_the_button(browser: Browser, films: str, shoot: Shoot) -> None:
    journeys.open_page(browser, films, "video")
    journeys.enter(browser, "#setting-size", "63x63")
    journeys.enter(browser, "#video-input", "a fox" + Keys.ENTER)
    journeys.wait(browser, lambda: journeys.find(browser, "#video .notice").is_displayed())
    assert "63" in journeys.text_of(browser, "#video .notice p")
    assert not journeys.find_all(browser, "#video .card")
    shoot("video-refused")


def test_a_job_that_the_server_lost_is_said(browser: Browser, films: str) -> None:
    journeys.open_page(browser, films, "video")
    journeys.enter(browser, "#setting-steps", "200")
    journeys.enter(browser, "#setting-frames", "64")
    journeys.enter(browser, "#video-input", "a fox" + Keys.ENTER)
    journeys.wait(browser, lambda: len(jobs(films)) == 1)
    address = f"{films}/v1/videos/{jobs(films)[0]['id']}"
    urllib.request.urlopen(urllib.request.Request(address, method="DELETE"), timeout=30).close()
    journeys.wait(browser, lambda: journeys.find(browser, "#video .notice").is_displayed())
    assert "The server has lost this video" in journeys.text_of(browser, "#video .notice")
    assert journeys.find(browser, "#video .notice button").text == "Try again"
