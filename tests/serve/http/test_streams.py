"""Streams that stay silent for a while, fail, or are left."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator

import pytest
from fastapi.testclient import TestClient

from neounify.errors import EngineDied
from neounify.serve.events import Finished, TextPiece
from neounify.serve.http import create_app, streaming
from neounify.serve.http.streaming import ALIVE, start_stream
from support.scripted_service import Script, Scripted

BODY = {"messages": [{"role": "user", "content": "x"}], "stream": True}


@pytest.fixture(autouse=True)
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "SILENCE_SECONDS", 0.05)


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
