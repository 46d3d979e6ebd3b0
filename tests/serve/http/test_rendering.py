"""Large answers and requests are worked on in threads, small ones on the event loop."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse

from neounify.serve.events import (
    Finished,
    Painted,
    Preview,
    ServiceEvent,
    ServiceRequest,
    TextPiece,
    TokenLogProb,
)
from neounify.serve.http import chat_request, create_app, streaming
from neounify.serve.http.streaming import INLINE_BYTES
from neounify.tasks.requests import PaintRequest
from support.scripted_service import Scripted

CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
TURNS: Any = [{"role": "user", "content": "Hello?"}]
NOISE: Any = {"modalities": ["text", "image"]}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """(on the event loop, bytes) of every piece of JSON that is written."""
    pieces: list[tuple[bool, int]] = []
    render, sse_event = JSONResponse.render, streaming.sse

    def noted(data: bytes) -> bytes:
        pieces.append((threading.current_thread() in Answers.loops, len(data)))
        return data

    def rendered(response: JSONResponse, content: Any) -> bytes:
        return noted(render(response, content))

    def event(*args: Any) -> bytes:
        return noted(sse_event(*args))

    monkeypatch.setattr(JSONResponse, "render", rendered)
    monkeypatch.setattr(streaming, "sse", event)
    monkeypatch.setattr("neounify.serve.http.chat.sse", event)
    return pieces


class Answers(Scripted):
    """Remembers the threads of its event loops."""

    loops: ClassVar[set[threading.Thread]] = set()

    def answer(self, *args: Any, **options: Any) -> Any:
        self.loops.add(threading.current_thread())
        return super().answer(*args, **options)


def noisy(request: ServiceRequest, previews: int) -> Iterable[ServiceEvent]:
    """An image that takes more than INLINE_BYTES, or as many tokens."""
    import torch

    token = TokenLogProb(b"x", -1.0, tuple((b"%9d" % n, -2.0) for n in range(5)))
    pixels = torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if isinstance(request, PaintRequest) or hasattr(request, "sizes"):
        return [Preview(0, 1, 8, pixels), Painted(0, pixels), Finished("stop", 1, 0, 0, 16)]
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
    parts = chat_request._parts

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return parts(*args)

    monkeypatch.setattr(chat_request, "_parts", noted)
    service = Answers()
    client = TestClient(create_app(service))
    for text, on_loop in (("Hi", True), ("word " * 18_000, False)):
        threads.clear()
        turns = [{"role": "assistant", "content": text}, *TURNS]
        assert client.post(CHAT, json={"messages": turns}).status_code == 200
        assert [thread in service.loops for thread in threads] == [on_loop] * 2
