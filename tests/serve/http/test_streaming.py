"""Streams of answers: merged, silent, failing, left; and large ones rendered in threads."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, ClassVar

import pytest
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse

from neounify.errors import EngineDied
from neounify.serve.http import chat, create_app, serving
from neounify.serve.http.serving import ALIVE, INLINE_BYTES, merge_streams, start_stream
from neounify.serve.service import ServiceRequest
from neounify.tasks.image import ImageRequest
from neounify.tasks.program import (
    Finished,
    ImageFinished,
    Preview,
    TaskEvent,
    TextPiece,
    TokenLogProb,
)
from support.scripted_service import Script, Scripted

closed: list[str] = []


async def source(name: str, *items: float | Exception) -> AsyncGenerator[TaskEvent]:
    try:
        for item in items:
            if isinstance(item, Exception):
                raise item
            await asyncio.sleep(item)
            yield TextPiece(name)
    finally:
        closed.append(name)


@pytest.fixture(autouse=True)
def nothing_closed() -> None:
    closed.clear()


def test_events_come_as_they_are_ready() -> None:
    async def main() -> list[int]:
        sources = [source("a", 0.0, 0.2), source("b", 0.1)]
        return [number async for number, _ in merge_streams(sources)]

    assert asyncio.run(main()) == [0, 1, 0]
    assert sorted(closed) == ["a", "b"]


def test_an_error_closes_all() -> None:
    async def main() -> None:
        async for _ in merge_streams([source("a", 60.0), source("b", 0.0, ValueError("no"))]):
            pass

    with pytest.raises(ValueError, match="no"):
        asyncio.run(asyncio.wait_for(main(), 20))
    assert sorted(closed) == ["a", "b"]


def test_leaving_closes_all() -> None:
    async def main() -> None:
        async with aclosing(merge_streams([source("a", 60.0), source("b", 0.0, 60.0)])) as events:
            await anext(events)
        assert sorted(closed) == ["a", "b"]

    asyncio.run(asyncio.wait_for(main(), 20))


BODY = {"messages": [{"role": "user", "content": "x"}], "stream": True}


@pytest.fixture(autouse=True)
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SILENCE_SECONDS", 0.05)


def ask(script: Script) -> tuple[int, str]:
    response = TestClient(create_app(Scripted(script))).post("/v1/chat/completions", json=BODY)
    return response.status_code, response.text


def said(text: str) -> str:
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)


def test_comments_while_nothing_comes() -> None:
    status, text = ask(
        lambda *_: [0.14, TextPiece("a"), 0.14, TextPiece("b"), Finished("stop", 1, 2, 0)]
    )
    assert status == 200
    assert text.startswith(ALIVE.decode())
    assert text.count(ALIVE.decode()) >= 4
    assert said(text) == "ab"
    assert text.endswith("data: [DONE]\n\n")


def test_no_comments_where_something_comes() -> None:
    _, text = ask(lambda *_: [TextPiece("a"), Finished("stop", 1, 1, 0)])
    assert ALIVE.decode() not in text


def test_an_error_has_its_status_until_the_first_comment() -> None:
    assert ask(lambda *_: [EngineDied("Gone.")])[0] == 503
    status, text = ask(lambda *_: [0.14, EngineDied("Gone.")])
    assert status == 200
    assert "event: error" in text
    assert "engine_restarting" in text


def test_closing_ends_a_generator_that_waits() -> None:
    ended: list[float] = []

    async def slow() -> AsyncGenerator[bytes]:
        try:
            yield b"first"
            await asyncio.sleep(60)
        finally:
            ended.append(time.monotonic())

    async def leave() -> None:
        stream = await start_stream(slow())
        began = asyncio.Event()

        async def send(message: object) -> None:
            began.set()

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        sending = asyncio.ensure_future(stream({"type": "http"}, receive, send))
        await began.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        assert ended

    asyncio.run(asyncio.wait_for(leave(), 5))


CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
TURNS: Any = [{"role": "user", "content": "Hello?"}]
NOISE: Any = {"modalities": ["text", "image"]}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """(on the event loop, bytes) of every piece of JSON that is written."""
    pieces: list[tuple[bool, int]] = []
    render, sse_event = JSONResponse.render, serving.sse

    def noted(data: bytes) -> bytes:
        pieces.append((threading.current_thread() in Answers.loops, len(data)))
        return data

    def rendered(response: JSONResponse, content: Any) -> bytes:
        return noted(render(response, content))

    def event(*args: Any) -> bytes:
        return noted(sse_event(*args))

    monkeypatch.setattr(JSONResponse, "render", rendered)
    monkeypatch.setattr(serving, "sse", event)
    return pieces


class Answers(Scripted):
    """Remembers the threads of its event loops."""

    loops: ClassVar[set[threading.Thread]] = set()

    def answer(self, *args: Any, **options: Any) -> Any:
        self.loops.add(threading.current_thread())
        return super().answer(*args, **options)


def noisy(request: ServiceRequest, previews: int) -> Iterable[TaskEvent]:
    """An image that takes more than INLINE_BYTES, or as many tokens."""
    import torch

    token = TokenLogProb(b"x", -1.0, tuple((b"%9d" % n, -2.0) for n in range(5)))
    pixels = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if isinstance(request, ImageRequest) or hasattr(request, "sizes"):
        usage = Finished("stop", 1, 0, 0, 16)
        return [Preview(0, 1, 8, pixels), ImageFinished(0, pixels, usage, 16.0), usage]
    return [TextPiece("x" * 500, log_probs=(token,) * 900), Finished("stop", 1, 500)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": TURNS, "logprobs": True, "top_logprobs": 5}),
        (CHAT, {"messages": TURNS} | NOISE),
        (CHAT, {"messages": TURNS, "stream": True, "partial_images": 1} | NOISE),
        (COMPLETIONS, {"prompt": "x", "logprobs": 5}),
        (IMAGES, {"prompt": "x"}),
        (IMAGES, {"prompt": "x", "stream": True, "partial_images": 1}),
    ],
)
def test_large_answers_are_written_in_threads(
    written: list[tuple[bool, int]], path: str, body: dict[str, Any]
) -> None:
    response = TestClient(create_app(Answers(noisy))).post(path, json=body)
    assert response.status_code == 200, response.text
    assert max(size for _, size in written) > INLINE_BYTES
    assert all(not on_loop for on_loop, size in written if size > INLINE_BYTES)


@pytest.mark.parametrize("stream", [False, True])
def test_small_answers_stay_on_the_event_loop(
    written: list[tuple[bool, int]], stream: bool
) -> None:
    client = TestClient(create_app(Answers()))
    assert client.post(CHAT, json={"messages": TURNS, "stream": stream}).status_code == 200
    assert written
    assert all(on_loop for on_loop, _ in written)


def test_long_messages_are_searched_for_images_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[threading.Thread] = []
    parts = chat._parts

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return parts(*args)

    monkeypatch.setattr(chat, "_parts", noted)
    service = Answers()
    client = TestClient(create_app(service))
    for text, on_loop in (("Hi", True), ("word " * 18_000, False)):
        threads.clear()
        turns = [{"role": "assistant", "content": text}, *TURNS]
        assert client.post(CHAT, json={"messages": turns}).status_code == 200
        assert [thread in service.loops for thread in threads] == [on_loop] * 2
