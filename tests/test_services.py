"""Services that answer late, never, too much, or with an error: which requests are tried again."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from neounify import services
from neounify.services import BadAnswer, NoAnswer, at_once, post, post_json
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


@pytest.mark.parametrize(
    ("url", "headers"),
    [("http://a..b/v1", {}), ("http://[::1/", {}), ("http://127.0.0.1:1/", {"X": "a\nb"})],
)
def test_what_cannot_be_sent_is_refused_at_once(
    url: str, headers: dict[str, str], waits: list[float]
) -> None:
    with pytest.raises(BadAnswer, match="cannot be asked"):
        post(url, b"", timeout=5, retries=3, headers=headers)
    assert waits == []


def test_an_error_whose_text_does_not_arrive_is_still_that_error() -> None:
    def answer(handler: Any, number: int) -> None:
        say(handler, 400 if number else 503, b"", Content_Length="9")

    with service(answer) as (url, times):
        with pytest.raises(BadAnswer, match="status 400"):
            post(url, b"", timeout=5, retries=1)
        assert len(times) == 2


def test_half_a_surrogate_pair_is_no_answer() -> None:
    with (
        service(lambda handler, _: say(handler, 200, rb'{"a": "\ud800"}')) as (url, _),
        pytest.raises(BadAnswer, match="half a surrogate pair"),
    ):
        post_json(url, {}, timeout=5, retries=0)


def test_calls_at_once_are_limited_and_in_order() -> None:
    running: list[int] = []
    most = 0

    def call(item: int) -> int:
        nonlocal most
        running.append(item)
        most = max(most, len(running))
        threading.Event().wait(0.01)
        running.remove(item)
        return -item

    assert at_once(call, range(9), 3) == [-item for item in range(9)]
    assert 1 < most <= 3


def test_an_error_ends_the_calls_that_wait() -> None:
    called: list[int] = []
    over = threading.Event()

    def call(item: int) -> None:
        called.append(item)
        if item == 0:
            raise ValueError(item)
        over.wait()

    with pytest.raises(ValueError, match="0"):
        at_once(call, range(9), 2)
    over.set()
    assert set(called) <= {0, 1, 2}, "one hangs, one may have begun in place of the first"


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    program = (
        "import time\nfrom neounify.services import in_thread\n"
        "in_thread(lambda: time.sleep(60)).result(0.01)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30)
    assert b"TimeoutError" in ended.stderr
