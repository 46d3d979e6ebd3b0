"""The page in a real Chromium against a scripted server.

The page is a static one of our own, not Gradio: it has one origin with the API, and uses the same
public API like any client, so that what it can do, any client can. No second framework comes in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.keys import Keys

from serve.page import journeys
from serve.page.scripted import KEY, PAGE, Script
from support.clips import clip_bytes, numbered

PREVIEW = "#generate [data-state=generating] img"
Shoot = Callable[[str], None]
Browser = WebDriver

pytestmark = pytest.mark.browser


def test_an_answer_is_text_and_nothing_else(
    browser: Browser, url: str, script: Script, shoot: Shoot
) -> None:
    assert "<b>a triangle</b>" in journeys.answer(browser, url)
    shoot("chat")
    journeys.follow_up(browser, "And what colour is the square?")
    first, second = script.bodies("/v1/chat/completions")
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["stream"] is True


def test_a_thought_is_folded(browser: Browser, url: str, shoot: Shoot) -> None:
    journeys.open_page(browser, url, "chat")
    journeys.click(browser, "#setting-think")
    journeys.follow_up(browser, "How many squares are there?")
    thought = journeys.find(browser, "#chat .thought")
    assert "what can be seen" not in thought.text
    journeys.click(browser, "#chat .thought summary")
    assert "what can be seen" in thought.text
    shoot("chat-thought")


def test_images_in_an_answer_of_the_chat(browser: Browser, url: str, script: Script) -> None:
    journeys.open_page(browser, url, "chat")
    journeys.follow_up(browser, "Hello")
    journeys.click(browser, "#setting-modalities")
    journeys.follow_up(browser, "Draw a circle.")
    journeys.assert_finished(browser, "#chat", 2)
    body = script.bodies("/v1/chat/completions")[-1]
    assert body["modalities"] == ["text", "image"]
    assert len(body["messages"]) == 1


def test_previews_come_before_the_image(
    browser: Browser, url: str, script: Script, shoot: Shoot
) -> None:
    journeys.generating(browser, url)
    shoot("generate")
    [body] = script.bodies("/v1/images/generations")
    assert body["prompt"] == "a red circle"
    assert body["partial_images"] == 3
    assert set(body) == {"prompt", "seed", "steps", "stream", "partial_images", "response_format"}


def test_an_image_on_its_way(browser: Browser, url: str, shoot: Shoot) -> None:
    journeys.open_page(browser, url, "generate")
    journeys.enter(browser, "#setting-n", "2")
    journeys.click(browser, "#setting-think")
    journeys.enter(browser, "#generate-input", "a red circle")
    journeys.click(browser, "#generate .primary")
    journeys.wait_for(browser, PREVIEW, 2)
    shoot("generate-preview")
    journeys.wait_until_done(browser, "#generate")
    journeys.click(browser, "#generate .tile .thought summary")
    assert "A plan for a red circle." in journeys.text_of(browser, "#generate .tile .thought")


def test_settings_that_are_entered_are_sent(browser: Browser, url: str, script: Script) -> None:
    journeys.open_page(browser, url, "generate")
    settings = {"n": 2, "size": "96x64", "steps": 8, "guidance": 1.5, "shift": 2, "seed": 7}
    for name, value in settings.items():
        journeys.enter(browser, f"#setting-{name}", str(value))
    journeys.enter(browser, "#generate-input", "a red circle" + Keys.ENTER)
    journeys.wait_until_done(browser, "#generate")
    [body] = script.bodies("/v1/images/generations")
    assert settings.items() <= body.items()
    assert "fast" not in body
    browser.refresh()
    assert journeys.find(browser, "#setting-steps").get_property("value") == "8"


def test_fewer_steps_are_chosen_from_a_list(browser: Browser, url: str, script: Script) -> None:
    journeys.open_page(browser, url, "generate")
    journeys.click(browser, "#setting-fast option[value=third]")
    journeys.enter(browser, "#generate-input", "a red circle" + Keys.ENTER)
    journeys.wait_until_done(browser, "#generate")
    [body] = script.bodies("/v1/images/generations")
    assert body["fast"] == "third"
    browser.refresh()
    assert journeys.find(browser, "#setting-fast").get_property("value") == "third"


def test_a_new_conversation_forgets_the_old_one(browser: Browser, url: str, script: Script) -> None:
    journeys.open_page(browser, url, "chat")
    journeys.enter(browser, "#chat-input", "Go on for long." + Keys.ENTER)
    journeys.wait(browser, lambda: bool(journeys.find_all(browser, "#chat .answer .text")))
    journeys.click(browser, "#chat > .quiet")
    assert script.broken_off.wait(10)
    journeys.wait_until_done(browser, "#chat")
    journeys.follow_up(browser, "Hello")
    assert len(script.bodies("/v1/chat/completions")[-1]["messages"]) == 1


def test_an_image_can_be_downloaded(browser: Browser, url: str, tmp_path: Path) -> None:
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    journeys.generating(browser, url)
    seed = journeys.text_of(browser, "#generate .seed").removeprefix("Seed ")
    journeys.click(browser, "#generate .tile button")
    file = tmp_path / f"neounify-generate-seed-{seed}-1.png"
    journeys.wait(browser, file.exists)
    with Image.open(file) as image:
        assert image.size == (64, 64)


def test_the_dice_keeps_a_seed(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "generate")
    journeys.click(browser, ".dice")
    first = journeys.find(browser, "#setting-seed").get_property("value")
    journeys.click(browser, ".dice")
    second = journeys.find(browser, "#setting-seed").get_property("value")
    assert first != second
    assert str(first).isdigit()


def test_nonsense_is_not_sent(browser: Browser, url: str, script: Script) -> None:
    journeys.open_page(browser, url, "generate")
    journeys.enter(browser, "#setting-steps", "0")
    journeys.enter(browser, "#generate-input", "a red circle" + Keys.ENTER)
    assert not script.asked
    journeys.open_page(browser, url, "edit")
    journeys.enter(browser, "#edit-input", "Turn it red." + Keys.ENTER)
    assert "Add the image" in journeys.text_of(browser, "#edit .notice")


def test_again_is_the_same_request(browser: Browser, url: str, script: Script) -> None:
    seed = journeys.again(browser, url)
    first, second = script.bodies("/v1/images/generations")
    assert first == second
    assert str(first["seed"]) == seed


def test_each_of_several_images_has_its_seed(browser: Browser, url: str, shoot: Shoot) -> None:
    journeys.variations(browser, url)
    shoot("generate-several")
    journeys.open_gallery(browser)
    assert "42" in journeys.text_of(browser, "#viewer dl")
    shoot("gallery")


def test_an_edit_sends_the_images(browser: Browser, url: str, script: Script, shoot: Shoot) -> None:
    journeys.editing(browser, url)
    shoot("edit")
    [body] = script.bodies("/v1/images/edits")
    assert body["image[]"] == 1
    assert body["prompt"] == "Turn the square red."
    assert body["stream"] == "true"


def test_a_file_can_be_added_and_removed(browser: Browser, url: str) -> None:
    journeys.upload(browser, url, Path(str(PAGE / "example.png")).resolve())


def test_a_clip_is_shown_by_a_still_and_sent(
    browser: Browser, url: str, script: Script, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.webm"
    clip.write_bytes(clip_bytes(numbered(9), format="webm", codec="libvpx"))
    journeys.open_page(browser, url, "chat")
    journeys.find(browser, "#chat input[type=file]").send_keys(str(clip))
    still = "return document.querySelector('#chat .attached video')?.videoWidth"
    journeys.wait(browser, lambda: browser.execute_script(still) == 48)
    journeys.enter(browser, "#chat-input", "What moves?")
    journeys.click(browser, "#chat .primary")
    journeys.wait_until_done(browser, "#chat")
    journeys.wait_for(browser, "#chat .question video", 1)
    [body] = script.bodies("/v1/chat/completions")
    video, text = body["messages"][-1]["content"]
    assert video["type"] == "video_url"
    assert video["video_url"]["url"].startswith("data:video/webm;base64,")
    assert text["text"] == "What moves?"
    journeys.open_page(browser, url, "edit")
    journeys.find(browser, "#edit input[type=file]").send_keys(str(clip))
    journeys.wait(browser, lambda: "Only images can be added." in browser.page_source)


def test_images_can_be_dropped_and_pasted(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "edit")
    browser.execute_async_script(_HAND_OVER, "drop", "dataTransfer")
    journeys.wait_for(browser, "#edit .attached img", 1)
    browser.execute_async_script(_HAND_OVER, "paste", "clipboardData")
    journeys.wait_for(browser, "#edit .attached img", 2)


_HAND_OVER = """
const [kind, name, done] = arguments;
fetch("example.png").then((response) => response.blob()).then((blob) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([blob], "example.png", { type: "image/png" }));
  const event = new Event(kind, { bubbles: true, cancelable: true });
  event[name] = transfer;
  document.body.dispatchEvent(event);
  done();
});
"""


def test_a_story(browser: Browser, url: str, script: Script, shoot: Shoot) -> None:
    journeys.story(browser, url)
    shoot("story")
    [body] = script.bodies("/v1/chat/completions")
    assert body["modalities"] == ["text", "image"]
    assert body["max_images"] == 2
    assert body["partial_images"] == 3
    kinds = [
        "text" if "text" in str(part.get_attribute("class")) else "image"
        for part in journeys.find_all(browser, "#story .answer-body > *")
    ]
    assert kinds == ["text", "image", "text", "image", "text"]


def test_an_error_is_said_near_the_button(browser: Browser, url: str, shoot: Shoot) -> None:
    assert "63 is not a multiple" in journeys.refusal(browser, url)
    shoot("error")


def test_a_busy_server_says_when_to_come_back(browser: Browser, url: str, shoot: Shoot) -> None:
    journeys.open_page(browser, url, "chat")
    journeys.enter(browser, "#chat-input", "busy" + Keys.ENTER)
    journeys.wait(browser, lambda: journeys.find(browser, "#chat .notice").is_displayed())
    assert "Try again in" in journeys.text_of(browser, "#chat .countdown")
    retry = journeys.find(browser, "#chat .notice button")
    assert not retry.is_enabled()
    assert journeys.find(browser, "#chat-input").get_property("value") == "busy"
    shoot("error-busy")
    journeys.wait(browser, retry.is_enabled)


def test_an_error_on_the_way_leaves_what_came(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "chat")
    journeys.follow_up(browser, "fail")
    assert "The engine stopped" in journeys.text_of(browser, "#chat .notice")
    assert "two shapes" in journeys.text_of(browser, "#chat .answer")


def test_stop_ends_the_request(browser: Browser, url: str, script: Script) -> None:
    journeys.stop(browser, url)
    assert script.broken_off.wait(10)


@pytest.mark.parametrize("mode", ["chat", "generate", "story"])
def test_what_is_stopped_before_it_began_stays_and_can_be_done_again(
    browser: Browser, url: str, script: Script, shoot: Shoot, mode: str
) -> None:
    journeys.open_page(browser, url, mode)
    journeys.enter(browser, f"#{mode}-input", "silence" + Keys.ENTER)
    journeys.wait_for(browser, f"#{mode} .answer", 1)
    waiting = [
        element.text
        for element in journeys.find_all(browser, f"#{mode} .answer *")
        if element.is_displayed() and element.text.startswith("Waiting")
    ]
    assert len({text.splitlines()[0] for text in waiting}) == 1
    journeys.click(browser, f"#{mode} .stop")
    journeys.wait_until_done(browser, f"#{mode}")
    assert journeys.text_of(browser, f"#{mode} .answer .status") == "Stopped."
    assert "Waiting" not in journeys.text_of(browser, f"#{mode} .answer")
    assert "silence" in journeys.text_of(browser, f"#{mode}")
    shoot(f"stopped-{mode}")
    journeys.click_text(browser, f"#{mode} .answer button", "Regenerate")
    journeys.wait_for(browser, f"#{mode} .answer", 2)
    journeys.click(browser, f"#{mode} .stop")
    journeys.wait_until_done(browser, f"#{mode}")
    (first, second) = (body for _, body in script.asked)
    assert first == second


def test_a_generation_stopped_on_its_way_keeps_its_preview(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "generate")
    journeys.enter(browser, "#setting-n", "2")
    journeys.enter(browser, "#generate-input", "a red circle" + Keys.ENTER)
    journeys.wait_for(browser, PREVIEW, 2)
    journeys.click(browser, "#generate .stop")
    journeys.wait_until_done(browser, "#generate")
    assert len(journeys.find_all(browser, "#generate .tile img")) == 2
    assert journeys.text_of(browser, "#generate .answer .status") == "Stopped."
    journeys.click_text(browser, "#generate .answer button", "Regenerate")
    journeys.wait_for(browser, "#generate .card", 2)
    journeys.wait_until_done(browser, "#generate")
    journeys.assert_finished(browser, "#generate", 2)


@pytest.mark.parametrize("prompt", ["cut", "cut at once"])
@pytest.mark.parametrize("mode", ["chat", "generate", "story"])
def test_a_connection_that_breaks_is_said_and_can_be_tried_again(
    browser: Browser, url: str, script: Script, shoot: Shoot, mode: str, prompt: str
) -> None:
    journeys.open_page(browser, url, mode)
    journeys.enter(browser, f"#{mode}-input", prompt + Keys.ENTER)
    journeys.wait(browser, lambda: journeys.find(browser, f"#{mode} .notice").is_displayed())
    assert "connection to the server was lost" in journeys.text_of(browser, f"#{mode} .notice")
    assert journeys.find(browser, f"#{mode} .notice button").text == "Try again"
    status = journeys.text_of(browser, f"#{mode} .answer .status")
    assert "connection to the server was lost" in status
    shoot(f"broken-{mode}-{prompt.replace(' ', '-')}")
    again = "Regenerate" if mode == "chat" else "Try again"
    journeys.click_text(browser, f"#{mode} .answer button", again)
    journeys.wait(browser, lambda: len(script.asked) == 2)
    (first, second) = (body for _, body in script.asked)
    assert first == second


def test_a_half_finished_image_stays_when_the_connection_breaks(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "generate")
    journeys.enter(browser, "#generate-input", "cut" + Keys.ENTER)
    journeys.wait(browser, lambda: journeys.find(browser, "#generate .notice").is_displayed())
    assert len(journeys.find_all(browser, "#generate .card .tile img")) == 1
    assert journeys.text_of(browser, "#generate .tile figcaption") == "Not finished (step 10 of 20)"


def test_a_server_that_restarts_says_when_to_come_back(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "generate")
    journeys.enter(browser, "#generate-input", "down" + Keys.ENTER)
    journeys.wait(browser, lambda: journeys.find(browser, "#generate .notice").is_displayed())
    assert "The engine starts again." in journeys.text_of(browser, "#generate .notice")
    assert "Try again in" in journeys.text_of(browser, "#generate .countdown")
    assert not journeys.find_all(browser, "#generate .card")


def test_the_size_field_offers_what_the_model_was_trained_at(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "generate")
    offered = "#trained-sizes option"
    journeys.wait_for(browser, offered, 2)
    values = [e.get_attribute("value") for e in journeys.find_all(browser, offered)]
    assert values == ["64x64", "96x64"]
    hint = journeys.find(browser, "#size-hint")
    for size, odd in (("96x64", False), ("96x96", True), ("auto", False), ("64x64", False)):
        journeys.enter(browser, "#setting-size", size)
        assert hint.is_displayed() is odd
        assert ("64x64, 96x64" in hint.text) is odd
    journeys.enter(browser, "#setting-size", "96x96")
    journeys.click(browser, "#tab-chat")
    assert not hint.is_displayed()
    journeys.click(browser, "#tab-story")
    assert hint.is_displayed()
    journeys.click_text(browser, "#settings button", "Reset")
    assert not hint.is_displayed()


def test_an_earlier_address_of_a_tab_leads_to_it(browser: Browser, url: str) -> None:
    browser.get("about:blank")
    browser.get(f"{url}/#paint")
    journeys.wait(browser, lambda: journeys.find(browser, "#generate-input").is_displayed())
    assert browser.current_url == f"{url}/#generate"


def test_back_returns_to_the_tab_before(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "chat")
    journeys.follow_up(browser, "Hello")
    journeys.click(browser, "#tab-generate")
    journeys.click(browser, "#tab-edit")
    browser.back()
    journeys.wait(browser, lambda: journeys.find(browser, "#generate-input").is_displayed())
    browser.back()
    journeys.wait(browser, lambda: journeys.find(browser, "#chat-input").is_displayed())
    assert journeys.find_all(browser, "#chat .answer")


def test_a_key_is_sent_and_forgotten(browser: Browser, url: str, script: Script) -> None:
    script.wants_key = True
    journeys.open_page(browser, url, "generate")
    journeys.wait(browser, lambda: "API key" in journeys.text_of(browser, "#model"))
    journeys.enter(browser, "#api-key", KEY + Keys.TAB)
    journeys.wait(browser, lambda: journeys.text_of(browser, "#model") == "scenes")
    assert browser.execute_script("return localStorage.length") == 0
    assert browser.execute_script("return document.cookie") == ""


def test_the_keyboard_is_enough(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "chat")
    tab = journeys.find(browser, "#tab-chat")
    tab.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("id") == "tab-generate"
    assert journeys.find(browser, "#generate-input").is_displayed()
    browser.switch_to.active_element.send_keys(Keys.END)
    assert browser.switch_to.active_element.get_attribute("id") == "tab-story"


def test_every_field_and_button_has_a_name(browser: Browser, url: str) -> None:
    journeys.editing(browser, url)
    unnamed = browser.execute_script(
        """
        return [...document.querySelectorAll("button, input, textarea, img, dialog")]
          .filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel
                           || e.hasAttribute("alt")))
          .map((e) => e.outerHTML);
        """
    )
    assert unnamed == []


def test_nothing_is_loaded_from_elsewhere(browser: Browser, url: str) -> None:
    journeys.answer(browser, url)
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert loaded
    assert all(name.startswith((f"{url}/", "data:", "blob:")) for name in loaded)
    complaints = [entry["message"] for entry in browser.get_log("browser")]
    assert complaints == []


def test_inline_scripts_do_not_run(browser: Browser, url: str) -> None:
    journeys.open_page(browser, url, "chat")
    browser.execute_script(
        """
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        """
    )
    assert browser.execute_script("return window.ran") is None


def test_the_sources_make_no_markup_of_text() -> None:
    for script in Path(str(PAGE / "js")).glob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"https?://", text)
