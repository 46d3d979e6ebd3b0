"""Services that answer late, never, too much, or with an error: which requests are tried again."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from neounify import services
from neounify.services import BadAnswer, NoAnswer, post, post_json
from support.services import say, service


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(services.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_tried_again(status: int, waits: list[float]) -> None:
    def answer(handler: Any, number: int) -> None:
        say(handler, 200 if number == 2 else status, handler.body)

    with service(answer) as (url, times):
        assert post(url, b"[1]", timeout=5, retries=2) == b"[1]"
        assert waits == [0.5, 1.0]
        with pytest.raises(NoAnswer, match=f"{status}.*, 1 times"):
            post(url, b"[1]", timeout=5, retries=0)
    assert len(times) == 4


@pytest.mark.parametrize(("after", "waited"), [("3", 3.0), ("1e9", 60.0), ("Wed, 21 Oct", 0.5)])
def test_a_service_says_when_it_may_be_asked_again(
    after: str, waited: float, waits: list[float]
) -> None:
    def answer(handler: Any, number: int) -> None:
        say(handler, 429 if number == 0 else 200, Retry_After=after)

    with service(answer) as (url, _):
        assert post_json(url, {}, timeout=5, retries=1) == {}
    assert waits == [waited]


def test_a_refusal_is_not_tried_again() -> None:
    with service(lambda handler, _: say(handler, 400, b"no such model")) as (url, times):
        with pytest.raises(BadAnswer, match="status 400: no such model"):
            post(url, b"{}", timeout=5, retries=5)
        assert len(times) == 1


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"\xff", b"[" * 100_000])
def test_garbage_is_no_answer(body: bytes) -> None:
    with (
        service(lambda handler, _: say(handler, 200, body)) as (url, _),
        pytest.raises(BadAnswer, match="is n"),
    ):
        post_json(url, {}, timeout=5, retries=0)


def test_too_long_an_answer() -> None:
    with (
        service(lambda handler, _: say(handler, 200, b"x" * 101)) as (url, _),
        pytest.raises(BadAnswer, match="more than 100 bytes"),
    ):
        post(url, b"", timeout=5, retries=3, max_bytes=100)


def test_an_answer_that_ends_early_is_tried_again() -> None:
    def answer(handler: Any, number: int) -> None:
        say(handler, 200, b"{}", Content_Length="9" if number == 0 else "2")

    with service(answer) as (url, times):
        assert post(url, b"", timeout=5, retries=1) == b"{}"
        assert len(times) == 2


def test_a_service_that_drips_does_not_hold_a_run() -> None:
    ended = threading.Event()

    def answer(handler: Any, number: int) -> None:
        say(handler, 200, b"", Content_Length="1000")
        while not ended.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    with service(answer) as (url, _):
        started = time.monotonic()
        with pytest.raises(NoAnswer, match=r"0\.3 s"):
            post(url, b"", timeout=0.3, retries=0)
        assert time.monotonic() - started < 5
        ended.set()


def test_a_service_that_is_not_there() -> None:
    with pytest.raises(NoAnswer, match=r"refused.*2 times"):
        post("http://127.0.0.1:9/", b"", timeout=5, retries=1)
