"""Errors: their status, their shape, and what they keep to themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from PIL.Image import Image

from neounify.errors import (
    CheckpointError,
    DeadlineExceeded,
    Draining,
    EngineDied,
    ImageError,
    InputError,
    Overloaded,
    PromptError,
    RequestError,
)
from neounify.serve.http import HttpConfig, Limits, create_app
from neounify.serve.http.errors import sanitise
from neounify.serve.safety.hooks import Hooks, Refused
from neounify.serve.service import ServiceRequest
from neounify.tasks.program import TaskEvent, TextPiece
from support.http_server import data_url, openai_client, png
from support.scripted_service import Scripted

CHAT = "/v1/chat/completions"
GENERATIONS = "/v1/images/generations"


def asking(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello?"}]} | fields


def client_of(service: Scripted | None = None, **config: Any) -> TestClient:
    app = create_app(service or Scripted(), HttpConfig(**config))
    return TestClient(app, raise_server_exceptions=False)


def failing(error: Exception, *before: TaskEvent) -> Scripted:
    def script(_: ServiceRequest, __: int) -> Sequence[TaskEvent | Exception]:
        return [*before, error]

    return Scripted(script)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (PromptError("a prompt is needed"), 400, "invalid_prompt", None),
        (ImageError("size 3x3: too small"), 400, "invalid_image", None),
        (RequestError("steps must be small"), 400, "invalid_value", None),
        (Refused("words", "no"), 400, "content_policy_violation", None),
        (Overloaded("too much", 3.2), 429, "overloaded", "4"),
        (DeadlineExceeded("in /srv/engine/x.py"), 504, "deadline_exceeded", None),
        (EngineDied("process 12 at /srv/engine died"), 503, "engine_restarting", "2"),
        (Draining("bye"), 503, "shutting_down", "2"),
        (CheckpointError("/srv/models/x is damaged"), 500, "internal_error", None),
        (RuntimeError("/srv/models/x is damaged"), 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_each_error_has_its_answer(
    error: Exception, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    response = client_of(failing(error)).post(CHAT, json=asking(stream=stream))
    assert response.status_code == status
    body = response.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert body["code"] == code
    assert "/srv" not in response.text
    assert response.headers.get("retry-after") == retry_after


@pytest.mark.parametrize(
    ("param", "field"),
    [
        ("steps", "steps"),
        ("t_eps", "t_eps"),
        ("max_new_tokens", "max_tokens"),
        ("images_per_prompt", "n"),
        ("width", "size"),
        (None, None),
    ],
)
@pytest.mark.parametrize("kind", [RequestError, PromptError, ImageError])
def test_the_parameter_at_fault_is_named_as_the_field_it_is_here(
    kind: type[InputError], param: str | None, field: str | None
) -> None:
    service = failing(kind("steps must be small", param=param))
    assert client_of(service).post(CHAT, json=asking()).json()["error"]["param"] == field


def test_an_error_after_the_first_piece_is_an_event() -> None:
    service = failing(EngineDied("gone"), TextPiece("Hel"))
    with openai_client(create_app(service)) as client:
        stream = client.chat.completions.create(
            model="", messages=asking()["messages"], stream=True
        )
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "Hel"]
        with pytest.raises(openai.APIError, match="being started again"):
            next(stream)
    assert service.open == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages.0.role"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"n": 11}, "n"),
        ({"n": 2, "modalities": ["text", "image"]}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"guidence": 3}, "guidence"),
        ({"model": "gpt-4"}, "model"),
        ({"modalities": ["image"]}, "modalities"),
        ({"modalities": ["text", "image"], "stop": "x"}, "stop"),
        ({"modalities": ["text", "image"], "size": "33x32"}, "size"),
        ({"modalities": ["text", "image"], "max_images": 11}, "max_images"),
        (
            {
                "modalities": ["text", "image"],
                "messages": [*asking()["messages"], {"role": "assistant", "content": "It"}],
            },
            "messages",
        ),
    ],
)
def test_bad_chat_fields(fields: dict[str, Any], param: str) -> None:
    response = client_of().post(CHAT, json=asking(**fields))
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert error["param"] is not None
    assert error["param"].startswith(param)
    assert error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": " "}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"size": "big"}, "size"),
        ({"size": "100x100"}, "size"),
        ({"size": "4096x4096"}, "size"),
        ({"steps": 201}, "steps"),
        ({"quality": "best"}, "quality"),
        ({"guidance": -1}, "guidance"),
        ({"guidance_interval": [0.9, 0.1]}, "guidance_interval"),
        ({"shift": 0}, "shift"),
        ({"t_eps": 0}, "t_eps"),
        ({"solver": "rk4"}, "solver"),
        ({"partial_images": 4}, "partial_images"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"background": "transparent"}, "background"),
    ],
)
def test_bad_image_fields(fields: dict[str, Any], param: str) -> None:
    response = client_of().post(GENERATIONS, json={"prompt": "a boat"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_limits_of_images_and_text() -> None:
    client = client_of(limits=Limits(images=1, image_pixels=100, prompt_chars=10))
    url = {"type": "image_url", "image_url": {"url": data_url(png(size=(5, 5)))}}
    for content, param in (
        ([url, url], "messages"),
        ("more than ten characters", None),
        ([url | {"image_url": {"url": data_url(png(size=(11, 10)))}}], "messages.0.content"),
    ):
        response = client.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_bodies_that_are_no_json() -> None:
    client = client_of()
    headers = {"content-type": "application/json"}
    for body in (b"{", b"[]", b"nul", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000):
        response = client.post(CHAT, content=body, headers=headers)
        assert response.status_code == 400, body[:10]
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_wrong_paths_and_methods() -> None:
    client = client_of()
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    response = client.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "OPTIONS, POST")
    assert response.json()["error"]["code"] == "method_not_allowed"


def test_every_method_of_a_path_is_named() -> None:
    client = client_of()
    for path, methods in (
        ("/v1/videos", "GET, HEAD, OPTIONS, POST"),
        ("/v1/videos/video_1", "DELETE, GET, HEAD, OPTIONS"),
    ):
        response = client.put(path)
        assert (response.status_code, response.headers["allow"]) == (405, methods)
        assert response.json()["error"]["message"] == f"PUT is not allowed here, only {methods}."


def test_hooks_may_refuse_prompts_and_images() -> None:
    class Strict(Hooks):
        def check_prompt(self, text: str, images: Sequence[Image]) -> None:
            if "bad" in text:
                raise Refused("words", "not here")

        def encode_image(self, image: Image, *_: Any) -> bytes:
            raise Refused("looks", "not this")

    service = Scripted()
    client = TestClient(create_app(service, hooks=Strict()))
    response = client.post(GENERATIONS, json={"prompt": "bad"})
    assert (response.status_code, response.json()["error"]["code"]) == (
        400,
        "content_policy_violation",
    )
    assert not service.requests
    assert client.post(GENERATIONS, json={"prompt": "good"}).status_code == 400
    assert client.post(CHAT, json=asking()).status_code == 200
    assert service.open == 0


@pytest.mark.parametrize(
    ("message", "clean"),
    [
        ("/srv/models/x: no such file", "…: no such file"),
        ("cannot read '/home/me/a.png'", "cannot read '…'"),
        (r"C:\models\x is gone", "… is gone"),
        ("<_io.BytesIO object at 0x7f3a>", "<_io.BytesIO>"),
        ("see https://example.com/a/b and 3/4/5", "see https://example.com/a/b and 3/4/5"),
        ("size 64x64: multiples of 32", "size 64x64: multiples of 32"),
    ],
)
def test_paths_are_cut_out(message: str, clean: str) -> None:
    assert sanitise(message) == clean
